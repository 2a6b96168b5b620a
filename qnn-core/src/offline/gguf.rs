//! GGUF: a model in one file. Its tensors get Hugging Face names and row order, its block formats keep their grids.

use std::collections::BTreeMap;

mod ggml;
mod parse;
mod tokenizer;

pub use ggml::GgmlType;
pub use parse::{GgufError, GgufFile, TensorEntry, Value, ValueType};

use crate::{
    map::Bytes,
    offline::{
        arch::{self, Architecture},
        config::{Biases, DEFAULT_ROPE_THETA, MAX_HEAD_DIM, ModelConfig, RopeBase, config_error},
        error::ImportError,
        source::{ElementFormat, SourceTensor},
    },
};

/// A GGUF file that holds a model of a known architecture.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    architecture: &'static Architecture,
    /// The file's own word for the architecture, which begins its metadata keys.
    prefix: String,
    /// Hugging Face name -> name in the file.
    names: BTreeMap<String, String>,
}

impl GgufModel {
    /// Reads header, metadata and tensor table; `bytes` is kept.
    ///
    /// # Errors
    /// [`ImportError`]: a damaged file, an unknown architecture, a tensor that this architecture does not have, tensors
    /// that overlap.
    pub fn parse(bytes: Bytes) -> Result<GgufModel, ImportError> {
        let file = GgufFile::parse(bytes)?;
        let prefix = file.string("general.architecture")?.ok_or_else(|| missing("general.architecture"))?.to_owned();
        let architecture = arch::find_gguf(&prefix)?;
        let mut names = BTreeMap::new();
        for name in file.tensors().keys() {
            if name == "rope_freqs.weight" {
                let (what, supported) = ("rotary scaling (tensor rope_freqs.weight)".to_owned(), "none".to_owned());
                return Err(ImportError::Unsupported { what, supported });
            }
            let hf_name = hf_name(name)
                .ok_or_else(|| ImportError::UnusedTensor { name: name.clone(), architecture: prefix.clone() })?;
            names.insert(hf_name, name.clone());
        }
        let model = GgufModel { file, architecture, prefix, names };
        model.refuse_overlaps()?;
        Ok(model)
    }

    /// The configuration that the metadata describes.
    ///
    /// # Errors
    /// [`ImportError`] naming the key that is missing, wrong, or asks for what is not supported.
    pub fn config(&self) -> Result<ModelConfig, ImportError> {
        self.refuse_unsupported()?;
        let heads = self.size("attention.head_count")?;
        let hidden_size = self.size("embedding_length")?;
        let head_dim = match self.optional_size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(have) = self.optional_size(key)?.filter(|have| *have != head_dim) {
                let (have, want) = (have.to_string(), format!("{head_dim}, as the heads have"));
                return Err(ImportError::Config { key: self.key(key), have, want });
            }
        }
        let epsilon_key = self.key("attention.layer_norm_rms_epsilon");
        let epsilon = self.file.float(&epsilon_key)?.ok_or_else(|| missing(&epsilon_key))?;
        let has = |name: &str| self.file.tensors().contains_key(name);
        let token_id = |key: &str| self.token_id(key);
        let eos = [token_id("tokenizer.ggml.eos_token_id")?, token_id("tokenizer.ggml.eot_token_id")?];
        let mut eos_token_ids: Vec<u32> = eos.into_iter().flatten().collect();
        eos_token_ids.dedup();
        let embedding = self.file.tensors().get("token_embd.weight");
        let max_position_embeddings = self.size("context_length")?;
        let rope = RopeBase {
            theta: self.file.float(&self.key("rope.freq_base"))?.unwrap_or(DEFAULT_ROPE_THETA),
            rotary_dim: head_dim,
            max_positions: max_position_embeddings,
            original_max_positions: None,
        };
        if head_dim > MAX_HEAD_DIM {
            return Err(config_error(&self.key("attention.key_length"), head_dim, format!("1 to {MAX_HEAD_DIM}")));
        }
        let mut config = ModelConfig {
            hidden_size,
            intermediate_size: self.size("feed_forward_length")?,
            heads,
            kv_heads: self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab_size: embedding.and_then(|t| t.shape.first().copied()).unwrap_or(0),
            max_position_embeddings,
            rms_norm_epsilon: epsilon as f32,
            ropes: vec![rope.plain()],
            bias: Biases {
                qkv: has("blk.0.attn_q.bias"),
                output: has("blk.0.attn_output.bias"),
                mlp: has("blk.0.ffn_gate.bias"),
            },
            tied_head: !has("output.weight"),
            bos_token_id: token_id("tokenizer.ggml.bos_token_id")?,
            eos_token_ids,
            ..ModelConfig::plain(self.architecture.model_types[0], self.size("block_count")?)
        };
        config.set_window(self.optional_size("attention.sliding_window")?.filter(|window| *window > 0));
        config.check()
    }

    /// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`, rebuilt from the metadata.
    ///
    /// # Errors
    /// [`ImportError::Unsupported`] for a tokenizer whose ids could not be reproduced, or what is wrong with the metadata.
    pub fn sidecars(&self, config: &ModelConfig) -> Result<Vec<(&'static str, Vec<u8>)>, ImportError> {
        tokenizer::sidecars(&self.file, config)
    }

    /// Hugging Face names of all tensors.
    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// The tensor with Hugging Face name `name`, its rows in Hugging Face order; `None` if there is none.
    ///
    /// # Errors
    /// [`ImportError`] if its format is not supported or it does not lie in the file.
    pub fn tensor(&self, name: &str, config: &ModelConfig) -> Result<Option<SourceTensor>, ImportError> {
        let Some(own_name) = self.names.get(name) else { return Ok(None) };
        let entry = &self.file.tensors()[own_name];
        let (format, size_bytes) = size_of(own_name, entry)?;
        let bytes = self.file.slice(entry.at_bytes, size_bytes).ok_or_else(|| GgufError::Tensor {
            tensor: own_name.clone(),
            have: format!("{size_bytes} bytes from {}", entry.at_bytes),
            want: "bytes inside the file".to_owned(),
        })?;
        let mut tensor = SourceTensor::new(name, entry.shape.clone(), format, bytes)?;
        if self.architecture.gguf_interleaves_qk {
            let heads = match own_name.split('.').nth(2) {
                Some("attn_q") => config.heads,
                Some("attn_k") => config.kv_heads,
                _ => return Ok(Some(tensor)),
            };
            tensor.bytes = half_split(&tensor, heads)?;
        }
        Ok(Some(tensor))
    }

    fn refuse_unsupported(&self) -> Result<(), ImportError> {
        let refuse =
            |what: String, supported: &str| Err(ImportError::Unsupported { what, supported: supported.to_owned() });
        let scaling_key = self.key("rope.scaling.type");
        if let Some(scaling) = self.file.string(&scaling_key)?.filter(|scaling| *scaling != "none") {
            return refuse(format!("{scaling_key} {scaling:?}"), "\"none\"");
        }
        if let Some(experts) = self.optional_size("expert_count")?.filter(|n| *n > 0) {
            return refuse(format!("{} {experts}", self.key("expert_count")), "dense models");
        }
        Ok(())
    }

    /// Checks that each tensor lies in the file and no two share bytes.
    fn refuse_overlaps(&self) -> Result<(), ImportError> {
        let mut places = Vec::new();
        for (name, entry) in self.file.tensors() {
            let (_, size_bytes) = size_of(name, entry)?;
            let end = entry
                .at_bytes
                .checked_add(size_bytes)
                .filter(|_| self.file.slice(entry.at_bytes, size_bytes).is_some());
            let end = end.ok_or_else(|| GgufError::Tensor {
                tensor: name.clone(),
                have: format!("{size_bytes} bytes from {}", entry.at_bytes),
                want: "bytes inside the file".to_owned(),
            })?;
            places.push((entry.at_bytes, end, name));
        }
        places.sort_unstable();
        for pair in places.windows(2) {
            let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
            if start < end {
                let (have, want) = (format!("starts at {start}"), format!("{end} or later, where {first} ends"));
                return Err(GgufError::Tensor { tensor: second.clone(), have, want }.into());
            }
        }
        Ok(())
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn size(&self, key: &str) -> Result<usize, ImportError> {
        self.optional_size(key)?.ok_or_else(|| missing(&self.key(key)))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ImportError> {
        // What does not fit `usize` is above every limit that `check` knows.
        Ok(self.file.unsigned(&self.key(key))?.map(|size| usize::try_from(size).unwrap_or(usize::MAX)))
    }

    fn token_id(&self, key: &str) -> Result<Option<u32>, ImportError> {
        let Some(have) = self.file.unsigned(key)? else { return Ok(None) };
        u32::try_from(have).map(Some).map_err(|_| ImportError::Config {
            key: key.to_owned(),
            have: have.to_string(),
            want: "a token id".to_owned(),
        })
    }
}

fn missing(key: &str) -> ImportError {
    ImportError::Config { key: key.to_owned(), have: "missing".to_owned(), want: "a value".to_owned() }
}

/// Element format of a tensor, and its size.
fn size_of(name: &str, entry: &TensorEntry) -> Result<(ElementFormat, usize), ImportError> {
    let format = match entry.format {
        0 => ElementFormat::F32,
        1 => ElementFormat::F16,
        30 => ElementFormat::Bf16,
        number => ElementFormat::Ggml(GgmlType::from_number(number).ok_or_else(|| ImportError::Unsupported {
            what: format!("tensor {name} of GGML type {}", ggml_name(number)),
            supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K".to_owned(),
        })?),
    };
    let (block, block_bytes) = format.block();
    let elements = entry.shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    let size = elements.filter(|n| n.is_multiple_of(block)).and_then(|n| (n / block).checked_mul(block_bytes));
    match size {
        Some(size_bytes) => Ok((format, size_bytes)),
        None => {
            let (have, want) = (format!("shape {:?}", entry.shape), format!("whole blocks of {block}"));
            Err(GgufError::Tensor { tensor: name.to_owned(), have, want }.into())
        }
    }
}

/// GGML's name of an element format, as far as it is known here.
fn ggml_name(number: u32) -> String {
    let names = [
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let name = names.iter().find(|(n, _)| *n == number).map(|(_, name)| *name);
    name.map_or_else(|| format!("number {number}"), str::to_owned)
}

/// The Hugging Face name of a GGUF tensor.
fn hf_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.split('.');
    let (layer, module, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let plain = !layer.is_empty() && layer.bytes().all(|b| b.is_ascii_digit());
    if parts.next().is_some() || !plain || !matches!(kind, "weight" | "bias") {
        return None;
    }
    let module = MODULES.iter().find(|(own, _)| *own == module)?.1;
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

/// The rows (or, for a bias, elements) of `tensor` with each head's interleaved pairs taken apart: row `2i + p` of a head
/// goes to `p · head_dim / 2 + i`.
fn half_split(tensor: &SourceTensor, heads: usize) -> Result<Bytes, ImportError> {
    let refuse = |have: String, want: String| Err(ImportError::Tensor { name: tensor.name.clone(), have, want });
    let rows = tensor.shape[0];
    if !rows.is_multiple_of(heads * 2) {
        return refuse(format!("{rows} rows"), format!("{heads} heads of an even number of rows"));
    }
    if tensor.shape.len() == 1 && tensor.format.block().0 != 1 {
        return refuse(format!("format {}", tensor.format.name()), "a float format".to_owned());
    }
    let (head_dim, row_bytes) = (rows / heads, tensor.bytes.len() / rows);
    let mut out = Vec::with_capacity(tensor.bytes.len());
    for row in 0..rows {
        let (head, place) = (row / head_dim, row % head_dim);
        let (pair, member) = (place % (head_dim / 2), place / (head_dim / 2));
        let from = head * head_dim + pair * 2 + member;
        out.extend_from_slice(&tensor.bytes[from * row_bytes..][..row_bytes]);
    }
    Ok(out.into())
}

const MODULES: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
