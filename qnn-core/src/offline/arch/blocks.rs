//! What decoder architectures are built of.
//!
//! Weights keep their Hugging Face names; a node and its output are called as the module they stand for, so that an
//! adapter finds its targets: weight `model.layers.0.self_attn.q_proj.weight`, output `model.layers.0.self_attn.q_proj`.

use std::collections::{BTreeMap, BTreeSet};

use htp_sim::Workers;

use super::weights::{ActivationBits, CacheType, Constant, MakeConstant, Precision, WeightClass, WeightUse};
use crate::{
    graph::Graph,
    offline::{
        config::{GatedActivation, ModelConfig, Rope},
        error::ImportError,
        source::{Source, SourceTensor},
        specialize::LONG_CONTEXT_ABOVE,
    },
    op::{AttentionAttrs, OpKind},
    tensor::{Dim, Shape, Tensor, TensorData, TensorId},
    types::{DataType, TensorType},
};

/// Builds one graph out of one source.
pub(super) struct Builder<'a> {
    pub(super) config: &'a ModelConfig,
    source: &'a Source,
    precision: Precision,
    workers: &'a Workers,
    make_constant: MakeConstant,
    progress: &'a mut dyn FnMut(&str),
    graph: Graph,
    inputs: Inputs,
    /// Cosines and sines of each rotary embedding, once a layer has asked for them.
    rotary_tables: Vec<Option<[TensorId; 2]>>,
    used: BTreeSet<String>,
    weight_uses: BTreeMap<String, WeightUse>,
    layer_outputs: Vec<String>,
}

/// The graph's inputs.
#[derive(Clone, Copy)]
struct Inputs {
    ids: TensorId,
    positions: TensorId,
    cache_index: TensorId,
    logit_indices: TensorId,
}

impl<'a> Builder<'a> {
    /// A builder with the inputs in its graph. `make_constant` converts the weights; `progress` is told the name of each weight.
    pub(super) fn new(
        source: &'a Source,
        precision: Precision,
        workers: &'a Workers,
        make_constant: MakeConstant,
        progress: &'a mut dyn FnMut(&str),
    ) -> Result<Builder<'a>, ImportError> {
        let config = &source.config;
        let mut graph = Graph::new("model");
        let inputs = Inputs::add(&mut graph)?;
        let rotary_tables = vec![None; config.ropes.len()];
        let (used, weight_uses, layer_outputs) = Default::default();
        Ok(Builder {
            config,
            source,
            precision,
            workers,
            make_constant,
            progress,
            graph,
            inputs,
            rotary_tables,
            used,
            weight_uses,
            layer_outputs,
        })
    }

    /// Rows of the embedding for the input ids, times the embedding's factor.
    pub(super) fn scaled_embedding(&mut self, module: &str) -> Result<TensorId, ImportError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let table = self.weight(&format!("{module}.weight"), &shape, WeightClass::Embedding)?;
        let rows = self.op(module, OpKind::Gather, &[table, self.inputs.ids], DataType::Float32)?;
        self.scale("model.scaled_embeddings", rows, self.config.embedding_multiplier)
    }

    /// RMS norm of `x`, over runs as long as its weight. In floats.
    pub(super) fn norm(&mut self, module: &str, x: TensorId) -> Result<TensorId, ImportError> {
        self.norm_over(module, x, self.config.hidden_size, DataType::Float32)
    }

    /// RMS norm of rows for the matrices called `weights`, in the numbers that these take.
    pub(super) fn norm_for(&mut self, module: &str, x: TensorId, weights: &[String]) -> Result<TensorId, ImportError> {
        let data_type = self.input_type(weights)?;
        self.norm_over(module, x, self.config.hidden_size, data_type)
    }

    /// The matrices that read a layer's first norm.
    pub(super) fn attention_weights(&self, layer: usize) -> [String; 3] {
        ["q_proj", "k_proj", "v_proj"].map(|name| format!("model.layers.{layer}.self_attn.{name}.weight"))
    }

    /// The matrices that read the norm before a layer's MLP.
    pub(super) fn mlp_weights(&self, layer: usize) -> [String; 2] {
        ["gate_proj", "up_proj"].map(|name| format!("model.layers.{layer}.mlp.{name}.weight"))
    }

    /// `x · factor`; `x` itself if the factor is 1.
    pub(super) fn scale(&mut self, name: &str, x: TensorId, factor: f32) -> Result<TensorId, ImportError> {
        if factor == 1.0 {
            return Ok(x);
        }
        let factor = self.float_constant(&format!("{name}.factor"), &[factor])?;
        self.op(name, OpKind::ElementWiseMultiply, &[x, factor], DataType::Float32)
    }

    /// `x` times the matrix of `module`, which has `n` outputs, plus its bias if it has one.
    pub(super) fn linear(&mut self, module: &str, x: TensorId, n: usize, bias: bool) -> Result<TensorId, ImportError> {
        let inputs = self.linear_inputs(module, x, n, bias)?;
        self.op(module, OpKind::FullyConnected, &inputs, DataType::Float32)
    }

    /// Self-attention over `x`, with what the layer asks for and a KV cache of its own.
    pub(super) fn attention(&mut self, layer: usize, x: TensorId) -> Result<TensorId, ImportError> {
        let (config, module) = (self.config, format!("model.layers.{layer}.self_attn"));
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let q = self.linear(&format!("{module}.q_proj"), x, q_width, config.bias.qkv)?;
        let k = self.linear(&format!("{module}.k_proj"), x, kv_width, config.bias.qkv)?;
        let v = self.linear(&format!("{module}.v_proj"), x, kv_width, config.bias.qkv)?;
        let q = self.head_norm(&format!("{module}.q_norm"), q)?;
        let k = self.head_norm(&format!("{module}.k_norm"), k)?;
        let q = self.rotary(&format!("{module}.q_rotary"), q, layer)?;
        let k = self.rotary(&format!("{module}.k_rotary"), k, layer)?;
        let past_key = self.cache(&format!("past_key_{layer}_in"))?;
        let past_value = self.cache(&format!("past_value_{layer}_in"))?;
        let attrs = AttentionAttrs {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale.unwrap_or((1.0 / (config.head_dim as f64).sqrt()) as f32),
            window: config.layers[layer].window,
            softcap: config.attention_soft_cap,
        };
        let out_type = self.input_type(&[format!("{module}.o_proj.weight")])?;
        let inputs = [q, k, v, past_key, past_value, self.inputs.cache_index];
        let mixed = self.op(&format!("{module}.attention"), OpKind::Attention(attrs), &inputs, out_type)?;
        self.linear(&format!("{module}.o_proj"), mixed, config.hidden_size, config.bias.output)
    }

    /// The gated MLP: `down(activation(gate(x)) · up(x))`.
    pub(super) fn gated_mlp(&mut self, layer: usize, x: TensorId) -> Result<TensorId, ImportError> {
        let (config, module) = (self.config, format!("model.layers.{layer}.mlp"));
        let gate = self.linear(&format!("{module}.gate_proj"), x, config.intermediate_size, config.bias.mlp)?;
        let up = self.linear(&format!("{module}.up_proj"), x, config.intermediate_size, config.bias.mlp)?;
        let float = DataType::Float32;
        let activated = match config.activation {
            GatedActivation::Silu => {
                let sigmoid = self.op(&format!("{module}.sigmoid"), OpKind::Sigmoid, &[gate], float)?;
                self.op(&format!("{module}.silu"), OpKind::ElementWiseMultiply, &[gate, sigmoid], float)?
            }
            GatedActivation::GeluTanh => self.op(&format!("{module}.gelu"), OpKind::Gelu, &[gate], float)?,
        };
        let out_type = self.input_type(&[format!("{module}.down_proj.weight")])?;
        let gated = self.op(&format!("{module}.gated"), OpKind::ElementWiseMultiply, &[activated, up], out_type)?;
        self.linear(&format!("{module}.down_proj"), gated, config.hidden_size, config.bias.mlp)
    }

    /// `residual + x`.
    pub(super) fn add(&mut self, name: &str, residual: TensorId, x: TensorId) -> Result<TensorId, ImportError> {
        self.op(name, OpKind::ElementWiseAdd, &[residual, x], DataType::Float32)
    }

    /// Records `hidden` as what leaves a layer: a place where the graph can be cut.
    pub(super) fn end_layer(&mut self, hidden: TensorId) {
        self.layer_outputs.push(self.graph.tensor(hidden).name.clone());
    }

    /// The final norm and the head, of the rows of `hidden` that `logit_indices` asks for.
    pub(super) fn head(&mut self, norm: &str, embedding: &str, hidden: TensorId) -> Result<(), ImportError> {
        let rows = self.inputs.logit_indices;
        let hidden = self.op("model.asked_rows", OpKind::Gather, &[hidden, rows], DataType::Float32)?;
        let module = if self.ties_head(embedding)? { embedding } else { "lm_head" };
        let normed = self.norm_for(norm, hidden, &[format!("{module}.weight")])?;
        let inputs = self.linear_inputs(module, normed, self.config.vocab_size, false)?;
        let mut logits = self.op("lm_head", OpKind::FullyConnected, &inputs, DataType::Float32)?;
        logits = self.scale("lm_head.scaled", logits, self.config.logit_multiplier)?;
        if let Some(cap) = self.config.logit_soft_cap {
            logits = self.op("lm_head.capped", OpKind::SoftCap { cap }, &[logits], DataType::Float32)?;
        }
        Ok(self.graph.name_output(logits, "logits")?)
    }

    /// Whether the head is the matrix of `embedding`: where the configuration ties them, unless the source has a head of other
    /// values. transformers 5 compares them, too.
    fn ties_head(&self, embedding: &str) -> Result<bool, ImportError> {
        if !self.config.tied_head {
            return Ok(false);
        }
        match self.source.tensor(HEAD)? {
            Some(head) => Ok(self.fetch(&format!("{embedding}.weight"))?.has_values_of(&head)),
            None => Ok(true),
        }
    }

    /// Element type of a tensor that the matrices called `weights` multiply: integers, quantized per row when the graph
    /// runs, if all of these have integer weights.
    pub(super) fn input_type(&mut self, weights: &[String]) -> Result<DataType, ImportError> {
        for name in weights {
            let id = self.matrix(name)?;
            if !self.graph.tensor(id).data_type.is_fixed_point() {
                return Ok(DataType::Float32);
            }
        }
        Ok(match self.precision.activations {
            ActivationBits::Eight => DataType::SFixedPoint8,
            ActivationBits::Sixteen => DataType::SFixedPoint16,
        })
    }

    /// Ends the graph: metadata, and the proof that no tensor of the source was left out.
    pub(super) fn finish(mut self) -> Result<(Graph, Vec<WeightUse>), ImportError> {
        for name in self.source.names()? {
            let repeated = self.config.tied_head && name == HEAD;
            if !self.used.contains(&name) && !repeated && !name.ends_with(".rotary_emb.inv_freq") {
                return Err(ImportError::UnusedTensor { name, architecture: self.config.model_type.clone() });
            }
        }
        let config = self.config;
        let ids: Vec<String> = config.eos_token_ids.iter().map(u32::to_string).collect();
        let facts = [
            ("architecture", config.model_type.clone()),
            ("vocab_size", config.vocab_size.to_string()),
            ("hidden_size", config.hidden_size.to_string()),
            ("n_layers", config.layers.len().to_string()),
            ("max_position_embeddings", config.max_position_embeddings.to_string()),
            ("eos_token_ids", ids.join(",")),
            ("source", self.source.kind.to_owned()),
            ("layer_outputs", self.layer_outputs.join(",")),
        ];
        for (key, value) in facts {
            self.graph.set_metadata(key, value);
        }
        if let Some(bos) = config.bos_token_id {
            self.graph.set_metadata("bos_token_id", bos.to_string());
        }
        self.graph.finalize()?;
        Ok((self.graph, self.weight_uses.into_values().collect()))
    }

    fn linear_inputs(&mut self, module: &str, x: TensorId, n: usize, bias: bool) -> Result<Vec<TensorId>, ImportError> {
        let k = self.graph.tensor(x).shape.last();
        let weight = format!("{module}.weight");
        let class = self.class_of(&weight);
        let mut inputs = vec![x, self.weight(&weight, &[n, k], class)?];
        if bias {
            inputs.push(self.weight(&format!("{module}.bias"), &[n], WeightClass::Vector)?);
        }
        Ok(inputs)
    }

    /// `x` rotated as `layer` does it.
    fn rotary(&mut self, name: &str, x: TensorId, layer: usize) -> Result<TensorId, ImportError> {
        let Some(rope) = self.config.layers[layer].rope else { return Ok(x) };
        let [cos, sin] = match self.rotary_tables[rope] {
            Some(table) => table,
            None => self.rotary_table(rope)?,
        };
        let op = OpKind::RotaryEmbedding { head_dim: self.config.head_dim };
        self.op(name, op, &[x, cos, sin], DataType::Float32)
    }

    fn rotary_table(&mut self, rope: usize) -> Result<[TensorId; 2], ImportError> {
        let Rope { inv_freq, scale, long, .. } = &self.config.ropes[rope];
        let name = if rope == 0 { "model.rotary_emb".to_owned() } else { format!("model.rotary_emb_{rope}") };
        let mut inputs = vec![self.inputs.positions, self.float_constant(&format!("{name}.inv_freq"), inv_freq)?];
        if let Some(long) = long {
            inputs.push(self.float_constant(&format!("{name}.inv_freq_long"), &long.inv_freq)?);
            self.graph.set_metadata(LONG_CONTEXT_ABOVE, long.above.to_string());
        }
        let op = OpKind::RotaryTable { scale: *scale };
        let table = self.graph.op(&name, op, &inputs, DataType::Float32)?;
        let table = [table[0], table[1]];
        self.rotary_tables[rope] = Some(table);
        Ok(table)
    }

    /// The norm of each head of `x`, if the model has one.
    fn head_norm(&mut self, module: &str, x: TensorId) -> Result<TensorId, ImportError> {
        if !self.config.qk_norm {
            return Ok(x);
        }
        self.norm_over(module, x, self.config.head_dim, DataType::Float32)
    }

    /// RMS norm of each run of `k` values of `x`.
    fn norm_over(&mut self, module: &str, x: TensorId, k: usize, out: DataType) -> Result<TensorId, ImportError> {
        let name = format!("{module}.weight");
        let mut tensor = self.fetch(&name)?;
        if self.config.norm_offset != 0.0 {
            tensor = tensor.map(|weight| weight + self.config.norm_offset);
        }
        let weight = self.add_weight(&tensor, &[k], WeightClass::Vector)?;
        let op = OpKind::RmsNorm { epsilon: self.config.rms_norm_epsilon };
        self.op(module, op, &[x, weight], out)
    }

    fn float_constant(&mut self, name: &str, values: &[f32]) -> Result<TensorId, ImportError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(self.graph.add_tensor(Tensor {
            name: name.to_owned(),
            tensor_type: TensorType::Static,
            data_type: DataType::Float32,
            shape: Shape::fixed(&[values.len()]),
            encoding: None,
            data: Some(TensorData::Flat(bytes.into())),
        })?)
    }

    fn cache(&mut self, name: &str) -> Result<TensorId, ImportError> {
        let config = self.config;
        let capacity = config.max_position_embeddings.min(DEFAULT_MAX_CL);
        // The layer's own projections are in the graph by now.
        let integers = self.graph.tensors().iter().any(|t| t.tensor_type.is_static() && t.data_type.is_fixed_point());
        let cache = self.precision.cache.unwrap_or(if integers { CacheType::Int8 } else { CacheType::F32 });
        Ok(self.graph.add_tensor(Tensor {
            name: name.to_owned(),
            tensor_type: TensorType::AppReadWrite,
            data_type: match cache {
                CacheType::Int8 => DataType::SFixedPoint8,
                CacheType::F16 => DataType::Float16,
                CacheType::F32 => DataType::Float32,
            },
            shape: Shape::fixed(&[config.kv_heads, capacity, config.head_dim]),
            encoding: None,
            data: None,
        })?)
    }

    /// The matrix called `name`, whatever its shape.
    fn matrix(&mut self, name: &str) -> Result<TensorId, ImportError> {
        if let Some(id) = self.graph.find(name) {
            return Ok(id);
        }
        let tensor = self.fetch(name)?;
        self.add_weight(&tensor, &tensor.shape, self.class_of(name))
    }

    fn class_of(&self, weight: &str) -> WeightClass {
        if matches!(weight, EMBEDDING | HEAD) {
            return WeightClass::Embedding;
        }
        WeightClass::Linear
    }

    /// The constant called `name`, of `shape`; made on its first use.
    fn weight(&mut self, name: &str, shape: &[usize], class: WeightClass) -> Result<TensorId, ImportError> {
        let Some(id) = self.graph.find(name) else {
            let tensor = self.fetch(name)?;
            return self.add_weight(&tensor, shape, class);
        };
        // `matrix` takes it as it is.
        check_shape(name, &self.graph.tensor(id).shape.max_dims(), shape)?;
        Ok(id)
    }

    /// `tensor` as a constant under its own name.
    fn add_weight(
        &mut self,
        tensor: &SourceTensor,
        shape: &[usize],
        class: WeightClass,
    ) -> Result<TensorId, ImportError> {
        let name = &tensor.name;
        (self.progress)(name);
        check_shape(name, &tensor.shape, shape)?;
        let constant = (self.make_constant)(tensor, class, self.precision, self.workers)?;
        self.report(class, tensor, &constant);
        self.used.insert(name.clone());
        let Constant { data_type, encoding, bytes } = constant;
        Ok(self.graph.add_tensor(Tensor {
            name: name.clone(),
            tensor_type: TensorType::Static,
            data_type,
            shape: Shape::fixed(shape),
            encoding,
            data: Some(TensorData::Flat(bytes)),
        })?)
    }

    fn fetch(&self, name: &str) -> Result<SourceTensor, ImportError> {
        let mut tensor = self.source.tensor(name)?;
        // Of two that are one, a checkpoint may have either.
        if tensor.is_none() && self.config.tied_head && name == EMBEDDING {
            tensor = self.source.tensor(HEAD)?.map(|head| SourceTensor { name: name.to_owned(), ..head });
        }
        tensor.ok_or_else(|| ImportError::MissingTensor { name: name.to_owned() })
    }

    fn report(&mut self, class: WeightClass, tensor: &SourceTensor, constant: &Constant) {
        let (source, format) = (tensor.format.name(), constant.format());
        let change = constant.change(tensor.format, self.precision);
        let key = format!("{class:?} {source} {format}");
        let new = WeightUse { class, source, format, change, n_tensors: 0, elements: 0, size_bytes: 0 };
        let entry = self.weight_uses.entry(key).or_insert(new);
        entry.n_tensors += 1;
        entry.elements += tensor.n() as u64 * tensor.k() as u64;
        entry.size_bytes += constant.size_bytes();
    }

    fn op(&mut self, name: &str, op: OpKind, inputs: &[TensorId], out: DataType) -> Result<TensorId, ImportError> {
        Ok(self.graph.op(name, op, inputs, out)?[0])
    }
}

impl Inputs {
    fn add(graph: &mut Graph) -> Result<Inputs, ImportError> {
        let input = |name: &str, dim, graph: &mut Graph| {
            graph.add_tensor(Tensor {
                name: name.to_owned(),
                tensor_type: TensorType::AppWrite,
                data_type: DataType::Int32,
                shape: Shape(vec![dim]),
                encoding: None,
                data: None,
            })
        };
        let up_to = |by: usize| Dim::UpTo { max: DEFAULT_AR, by: TensorId(by as u32) };
        let ids = input("input_ids", up_to(0), graph)?;
        let positions = input("position_ids", up_to(0), graph)?;
        let cache_index = input("cache_index", Dim::Fixed(1), graph)?;
        let logit_indices = input("logit_indices", up_to(3), graph)?;
        Ok(Inputs { ids, positions, cache_index, logit_indices })
    }
}

fn check_shape(name: &str, have: &[usize], want: &[usize]) -> Result<(), ImportError> {
    if have == want {
        return Ok(());
    }
    let (have, want) = (format!("shape {have:?}"), format!("{want:?}"));
    Err(ImportError::Tensor { name: name.to_owned(), have, want })
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Most rows of one execute in an imported graph; the generator makes graphs of other bounds.
pub const DEFAULT_AR: usize = 128;
/// Most positions of the cache in an imported graph, if the model allows as many.
pub const DEFAULT_MAX_CL: usize = 4096;
