//! Tiny random models, written as Hugging Face directories and GGUF files.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::gguf_writer::GgufWriter;

/// A model of odd sizes whose weights follow from a seed.
#[derive(Debug, Clone)]
pub struct TinyModel {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// Decides every weight.
    pub seed: u64,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Longest context.
    pub max_positions: usize,
    /// True if the head is the embedding.
    pub tied: bool,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Sliding window.
    pub window: Option<usize>,
    /// A layer whose matrices are rounded to sixteenths.
    pub coarse_layer: Option<usize>,
}

/// One tensor under its Hugging Face name: `[n, k]` or `[k]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyTensor {
    /// Hugging Face name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Elements.
    pub values: Vec<f32>,
}

impl TinyModel {
    /// Llama with a tied head.
    pub fn llama(seed: u64) -> TinyModel {
        TinyModel {
            model_type: "llama",
            seed,
            hidden: 48,
            heads: 3,
            kv_heads: 1,
            head_dim: 16,
            ffn: 80,
            vocab: 67,
            layers: 2,
            max_positions: 256,
            tied: true,
            qkv_bias: false,
            window: None,
            coarse_layer: None,
        }
    }

    /// Mistral: a sliding window of 5, a head of its own.
    pub fn mistral(seed: u64) -> TinyModel {
        TinyModel { model_type: "mistral", tied: false, window: Some(5), ..TinyModel::llama(seed) }
    }

    /// Qwen2: a bias on q, k and v, two KV heads, heads wider than the residual stream asks for.
    pub fn qwen2(seed: u64) -> TinyModel {
        let (heads, kv_heads, head_dim) = (4, 2, 24);
        TinyModel { model_type: "qwen2", qkv_bias: true, heads, kv_heads, head_dim, ..TinyModel::llama(seed) }
    }

    /// One model of each architecture.
    pub fn every_architecture(seed: u64) -> [TinyModel; 3] {
        [TinyModel::llama(seed), TinyModel::mistral(seed), TinyModel::qwen2(seed)]
    }

    /// All weights. Each is a multiple of 1/1024 below 2, so f16 holds it exactly.
    pub fn tensors(&self) -> Vec<TinyTensor> {
        let mut random = SplitMix64(self.seed);
        let coarse = self.coarse_layer.map(|layer| format!("layers.{layer}."));
        self.shapes()
            .into_iter()
            .map(|(name, shape)| {
                let centre = if name.ends_with("norm.weight") { 1024 } else { 0 };
                let count = shape.iter().product();
                let mut values: Vec<f32> =
                    (0..count).map(|_| (centre + random.below(513) as i32 - 256) as f32 / 1024.0).collect();
                if coarse.as_ref().is_some_and(|layer| name.contains(layer) && name.contains("_proj")) {
                    values.iter_mut().for_each(|value| *value = (*value * 16.0).round() / 16.0);
                }
                TinyTensor { name, shape, values }
            })
            .collect()
    }

    /// Writes a Hugging Face directory with f32 weights.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_hf(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        write_json(&folder.join("config.json"), &self.config())?;
        let ids = json!({ "bos_token_id": 1, "eos_token_id": [2] });
        write_json(&folder.join("generation_config.json"), &ids)?;
        write_json(&folder.join("tokenizer.json"), &tokenizer(self.vocab))?;
        write_json(&folder.join("tokenizer_config.json"), &tokenizer_config())?;
        std::fs::write(folder.join("model.safetensors"), safetensors(&self.tensors()))?;
        Ok(())
    }

    /// Writes a PEFT directory of an adapter of `rank` on every projection, strong enough to change what the model says.
    /// Its weights follow from `seed`.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_peft(&self, folder: &Path, seed: u64, rank: usize) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut random = SplitMix64(seed);
        let mut tensors = Vec::new();
        for (name, shape) in self.shapes() {
            let Some(module) = name.strip_suffix("_proj.weight") else { continue };
            for (half, shape) in [("A", vec![rank, shape[1]]), ("B", vec![shape[0], rank])] {
                let count = shape.iter().product();
                let values = (0..count).map(|_| (random.below(513) as i32 - 256) as f32 / 1024.0).collect();
                let name = format!("base_model.model.{module}_proj.lora_{half}.weight");
                tensors.push(TinyTensor { name, shape, values });
            }
        }
        let projections = ["q", "k", "v", "o", "gate", "up", "down"].map(|name| format!("{name}_proj"));
        let config = json!({ "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4 * rank,
                             "target_modules": projections, "bias": "none" });
        write_json(&folder.join("adapter_config.json"), &config)?;
        Ok(std::fs::write(folder.join("adapter_model.safetensors"), safetensors(&tensors))?)
    }

    /// `config.json`.
    pub fn config(&self) -> Value {
        json!({
            "architectures": [format!("{}ForCausalLM", self.model_type)],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "sliding_window": self.window,
            "bos_token_id": 1,
            "eos_token_id": 2,
        })
    }

    /// The same model as a GGUF with f32 weights, its q and k rows interleaved if `interleave` (as llama's are).
    pub fn gguf(&self, interleave: bool) -> GgufWriter {
        let mut file = self.gguf_without_tokenizer(interleave);
        let tokens = tokens(self.vocab);
        let kinds: Vec<i32> = (0..tokens.len()).map(|id| if id < SPECIALS.len() { 3 } else { 1 }).collect();
        file.string("tokenizer.ggml.model", "gpt2");
        file.string("tokenizer.ggml.pre", "gpt-2");
        file.strings("tokenizer.ggml.tokens", tokens.iter().map(String::as_str));
        file.integers("tokenizer.ggml.token_type", &kinds);
        file.strings("tokenizer.ggml.merges", []);
        file
    }

    /// As [`TinyModel::gguf`], but for the tokenizer, which is to be added.
    pub fn gguf_without_tokenizer(&self, interleave: bool) -> GgufWriter {
        let mut file = GgufWriter::default();
        // There is no name of its own for mistral.
        let arch = if self.model_type == "mistral" { "llama" } else { self.model_type };
        file.string("general.architecture", arch);
        for (key, value) in [
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.ffn),
            ("block_count", self.layers),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("context_length", self.max_positions),
            ("attention.sliding_window", self.window.unwrap_or(0)),
        ] {
            file.u32(&format!("{arch}.{key}"), value as u32);
        }
        file.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5);
        file.f32(&format!("{arch}.rope.freq_base"), 10000.0);
        file.u32("tokenizer.ggml.bos_token_id", 1);
        file.u32("tokenizer.ggml.eos_token_id", 2);
        for tensor in self.tensors() {
            let (name, mut values) = (gguf_name(&tensor.name), tensor.values);
            let heads = match name.split('.').nth(2) {
                Some("attn_q") => self.heads,
                Some("attn_k") => self.kv_heads,
                _ => 0,
            };
            if interleave && heads > 0 {
                values = interleaved(&values, tensor.shape[0], heads);
            }
            file.tensor_f32(&name, &tensor.shape, &values);
        }
        file
    }

    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}"), shape));
            add("input_layernorm.weight", vec![self.hidden]);
            for (module, n) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                add(&format!("self_attn.{module}.weight"), vec![n, self.hidden]);
                if self.qkv_bias {
                    add(&format!("self_attn.{module}.bias"), vec![n]);
                }
            }
            add("self_attn.o_proj.weight", vec![self.hidden, q]);
            add("post_attention_layernorm.weight", vec![self.hidden]);
            add("mlp.gate_proj.weight", vec![self.ffn, self.hidden]);
            add("mlp.up_proj.weight", vec![self.ffn, self.hidden]);
            add("mlp.down_proj.weight", vec![self.hidden, self.ffn]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        shapes
    }
}

/// The bytes of a safetensors file with f32 tensors.
pub fn safetensors(tensors: &[TinyTensor]) -> Vec<u8> {
    let (mut header, mut data) = (BTreeMap::new(), Vec::new());
    for tensor in tensors {
        let start = data.len();
        data.extend(tensor.values.iter().flat_map(|v| v.to_le_bytes()));
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()] });
        header.insert(tensor.name.as_str(), entry);
    }
    let header = json!(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A byte-level tokenizer with three special tokens and one token for each letter, digit, space and full stop, as far as
/// `vocab` goes. Every text of these characters has one id a character.
pub fn tokenizer(vocab: usize) -> Value {
    let ids: BTreeMap<String, usize> = tokens(vocab).into_iter().enumerate().map(|(id, token)| (token, id)).collect();
    let added = |(id, content): (usize, &&str)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": SPECIALS.iter().enumerate().map(added).collect::<Vec<Value>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": ids, "merges": [] },
    })
}

/// Special tokens, then one for each character, a space in its byte-level form.
fn tokens(vocab: usize) -> Vec<String> {
    let characters = ('a'..='z').chain('A'..='Z').chain('0'..='9').chain(['Ġ', '.']).map(String::from);
    SPECIALS.iter().map(|s| (*s).to_owned()).chain(characters).take(vocab).collect()
}

const SPECIALS: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// `tokenizer_config.json` with a chat template of one line a message.
pub fn tokenizer_config() -> Value {
    let template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '.' }}{% endfor %}\
                    {% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}";
    json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "chat_template": template })
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    Ok(std::fs::write(path, serde_json::to_vec_pretty(value)?)?)
}

/// The name of a Hugging Face tensor in a GGUF.
fn gguf_name(name: &str) -> String {
    let modules = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    modules.iter().fold(name.to_owned(), |name, (hf, gguf)| name.replace(hf, gguf))
}

/// Rows as llama's GGUF converter orders them: element `i` of a head's first half before element `i` of its second.
fn interleaved(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (head_dim, k) = (rows / heads, values.len() / rows);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for i in 0..head_dim / 2 {
            for half in 0..2 {
                let row = head * head_dim + half * head_dim / 2 + i;
                out.extend_from_slice(&values[row * k..][..k]);
            }
        }
    }
    out
}

/// Steele, Lea and Flood 2014: small, and the same on every machine.
#[derive(Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}
