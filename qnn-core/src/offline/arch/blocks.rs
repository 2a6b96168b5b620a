//! What decoder architectures are built of.
//!
//! Weights keep their Hugging Face names; a node and its output are called as the module they stand for, so that an
//! adapter finds its targets: weight `model.layers.0.self_attn.q_proj.weight`, output `model.layers.0.self_attn.q_proj`.

use std::collections::{BTreeMap, BTreeSet};

use htp_sim::Workers;

use super::weights::{self, ActivationBits, CacheType, Constant, Precision, WeightClass, WeightUse};
use crate::{
    graph::{Graph, Node},
    offline::{
        config::ModelConfig,
        error::ImportError,
        source::{Source, SourceTensor},
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
    progress: &'a mut dyn FnMut(&str),
    graph: Graph,
    inputs: Inputs,
    used: BTreeSet<String>,
    weight_uses: BTreeMap<String, WeightUse>,
    layer_outputs: Vec<String>,
}

/// The graph's inputs, and what follows from them alone.
#[derive(Clone, Copy)]
struct Inputs {
    ids: TensorId,
    cache_index: TensorId,
    logit_indices: TensorId,
    cos: TensorId,
    sin: TensorId,
}

impl<'a> Builder<'a> {
    /// A builder with the inputs and the rotary table in its graph. `progress` is told the name of each weight.
    pub(super) fn new(
        source: &'a Source,
        precision: Precision,
        workers: &'a Workers,
        progress: &'a mut dyn FnMut(&str),
    ) -> Result<Builder<'a>, ImportError> {
        let config = &source.config;
        let mut graph = Graph::new("model");
        let inputs = Inputs::add(&mut graph, config)?;
        let (used, weight_uses, layer_outputs) = Default::default();
        Ok(Builder { config, source, precision, workers, progress, graph, inputs, used, weight_uses, layer_outputs })
    }

    /// Rows of the embedding for the input ids.
    pub(super) fn embedding(&mut self, module: &str) -> Result<TensorId, ImportError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let table = self.weight(&format!("{module}.weight"), &shape, WeightClass::Embedding)?;
        self.op(module, OpKind::Gather, &[table, self.inputs.ids], DataType::Float32)
    }

    /// RMS norm of `x`, in `data_type`: that which [`Builder::input_type`] gives for the matrices that read it.
    pub(super) fn rms_norm(&mut self, module: &str, x: TensorId, data_type: DataType) -> Result<TensorId, ImportError> {
        let weight = self.weight(&format!("{module}.weight"), &[self.config.hidden_size], WeightClass::Vector)?;
        let op = OpKind::RmsNorm { epsilon: self.config.rms_norm_epsilon };
        self.op(module, op, &[x, weight], data_type)
    }

    /// `x` times the matrix of `module`, which has `n` outputs, plus its bias if it has one.
    pub(super) fn linear(&mut self, module: &str, x: TensorId, n: usize, bias: bool) -> Result<TensorId, ImportError> {
        let inputs = self.linear_inputs(module, x, n, bias)?;
        self.op(module, OpKind::FullyConnected, &inputs, DataType::Float32)
    }

    /// Self-attention over `x`, with rotary embedding and a KV cache of its own; without the output projection's sum.
    pub(super) fn attention(&mut self, layer: usize, x: TensorId) -> Result<TensorId, ImportError> {
        let (config, module) = (self.config, format!("model.layers.{layer}.self_attn"));
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let q = self.linear(&format!("{module}.q_proj"), x, q_width, config.bias.qkv)?;
        let k = self.linear(&format!("{module}.k_proj"), x, kv_width, config.bias.qkv)?;
        let v = self.linear(&format!("{module}.v_proj"), x, kv_width, config.bias.qkv)?;
        let q = self.rotary(&format!("{module}.q_rotary"), q)?;
        let k = self.rotary(&format!("{module}.k_rotary"), k)?;
        let past_key = self.cache(&format!("past_key_{layer}_in"))?;
        let past_value = self.cache(&format!("past_value_{layer}_in"))?;
        let attrs = AttentionAttrs {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: (1.0 / (config.head_dim as f64).sqrt()) as f32,
            window: config.window,
            softcap: None,
        };
        let out_type = self.input_type(&[format!("{module}.o_proj.weight")])?;
        let inputs = [q, k, v, past_key, past_value, self.inputs.cache_index];
        let mixed = self.op(&format!("{module}.attention"), OpKind::Attention(attrs), &inputs, out_type)?;
        self.linear(&format!("{module}.o_proj"), mixed, config.hidden_size, config.bias.output)
    }

    /// The gated MLP: `down(silu(gate(x)) · up(x))`.
    pub(super) fn gated_mlp(&mut self, layer: usize, x: TensorId) -> Result<TensorId, ImportError> {
        let (config, module) = (self.config, format!("model.layers.{layer}.mlp"));
        let gate = self.linear(&format!("{module}.gate_proj"), x, config.intermediate_size, config.bias.mlp)?;
        let up = self.linear(&format!("{module}.up_proj"), x, config.intermediate_size, config.bias.mlp)?;
        let float = DataType::Float32;
        let sigmoid = self.op(&format!("{module}.sigmoid"), OpKind::Sigmoid, &[gate], float)?;
        let silu = self.op(&format!("{module}.silu"), OpKind::ElementWiseMultiply, &[gate, sigmoid], float)?;
        let out_type = self.input_type(&[format!("{module}.down_proj.weight")])?;
        let gated = self.op(&format!("{module}.gated"), OpKind::ElementWiseMultiply, &[silu, up], out_type)?;
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
        let module = if self.config.tied_head { embedding } else { "lm_head" };
        let norm_type = self.input_type(&[format!("{module}.weight")])?;
        let normed = self.rms_norm(norm, hidden, norm_type)?;
        let inputs = self.linear_inputs(module, normed, self.config.vocab_size, false)?;
        let rows = self.graph.tensor(hidden).shape.0[0];
        let logits = self.graph.add_tensor(Tensor {
            name: "logits".to_owned(),
            tensor_type: TensorType::AppRead,
            data_type: DataType::Float32,
            shape: Shape(vec![rows, Dim::Fixed(self.config.vocab_size)]),
            encoding: None,
            data: None,
        })?;
        let (name, op) = ("lm_head".to_owned(), OpKind::FullyConnected);
        Ok(self.graph.add_node(Node { name, op, inputs, outputs: vec![logits] })?)
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
            let repeated = self.config.tied_head && name == "lm_head.weight";
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
            ("n_layers", config.n_layers.to_string()),
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

    fn rotary(&mut self, name: &str, x: TensorId) -> Result<TensorId, ImportError> {
        let op = OpKind::RotaryEmbedding { head_dim: self.config.head_dim };
        self.op(name, op, &[x, self.inputs.cos, self.inputs.sin], DataType::Float32)
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
        let shape = match self.graph.find(name) {
            Some(id) => return Ok(id),
            None => self.fetch(name)?.shape,
        };
        let class = self.class_of(name);
        self.weight(name, &shape, class)
    }

    fn class_of(&self, weight: &str) -> WeightClass {
        if matches!(weight, "model.embed_tokens.weight" | "lm_head.weight") {
            return WeightClass::Embedding;
        }
        WeightClass::Linear
    }

    /// The constant called `name`, of `shape`; made on its first use.
    fn weight(&mut self, name: &str, shape: &[usize], class: WeightClass) -> Result<TensorId, ImportError> {
        if let Some(id) = self.graph.find(name) {
            return Ok(id);
        }
        (self.progress)(name);
        let tensor = self.fetch(name)?;
        if tensor.shape != shape {
            let (have, want) = (format!("shape {:?}", tensor.shape), format!("{shape:?}"));
            return Err(ImportError::Tensor { name: name.to_owned(), have, want });
        }
        let constant = weights::constant(&tensor, class, self.precision, self.workers)?;
        self.report(class, &constant, tensor.n() as u64 * tensor.k() as u64);
        self.used.insert(name.to_owned());
        let Constant { data_type, encoding, bytes } = constant;
        Ok(self.graph.add_tensor(Tensor {
            name: name.to_owned(),
            tensor_type: TensorType::Static,
            data_type,
            shape: Shape::fixed(shape),
            encoding,
            data: Some(TensorData::Flat(bytes)),
        })?)
    }

    fn fetch(&self, name: &str) -> Result<SourceTensor, ImportError> {
        self.source.tensor(name)?.ok_or_else(|| ImportError::MissingTensor { name: name.to_owned() })
    }

    fn report(&mut self, class: WeightClass, constant: &Constant, elements: u64) {
        let format = constant.format();
        let new = WeightUse { class, format: format.clone(), elements: 0, size_bytes: 0 };
        let entry = self.weight_uses.entry(format!("{class:?} {format}")).or_insert(new);
        entry.elements += elements;
        entry.size_bytes += constant.size_bytes();
    }

    fn op(&mut self, name: &str, op: OpKind, inputs: &[TensorId], out: DataType) -> Result<TensorId, ImportError> {
        Ok(self.graph.op(name, op, inputs, out)?[0])
    }
}

impl Inputs {
    fn add(graph: &mut Graph, config: &ModelConfig) -> Result<Inputs, ImportError> {
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
        let half = config.head_dim / 2;
        let frequency = |i: usize| config.rope_theta.powf(-((2 * i) as f64) / config.head_dim as f64) as f32;
        let bytes: Vec<u8> = (0..half).flat_map(|i| frequency(i).to_le_bytes()).collect();
        let inv_freq = graph.add_tensor(Tensor {
            name: "model.rotary_emb.inv_freq".to_owned(),
            tensor_type: TensorType::Static,
            data_type: DataType::Float32,
            shape: Shape::fixed(&[half]),
            encoding: None,
            data: Some(TensorData::Flat(bytes.into())),
        })?;
        let table = OpKind::RotaryTable { scale: 1.0 };
        let table = graph.op("model.rotary_emb", table, &[positions, inv_freq], DataType::Float32)?;
        Ok(Inputs { ids, cache_index, logit_indices, cos: table[0], sin: table[1] })
    }
}

/// Most rows of one execute in an imported graph; the generator makes graphs of other bounds.
pub const DEFAULT_AR: usize = 128;
/// Most positions of the cache in an imported graph, if the model allows as many.
pub const DEFAULT_MAX_CL: usize = 4096;
