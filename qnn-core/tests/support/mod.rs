//! A tiny llama built by hand, and the means to damage context binaries.
#![allow(dead_code, reason = "each test file uses its part of this")]

use std::io::Cursor;
use std::process::Command;
use std::sync::{Arc, atomic::AtomicBool};

use qnn_core::{
    Adapter, Backend, Bindings, BlockOffsets, Bytes, Context, DataType, Dim, Encoding, Executable, Floats, Graph,
    OpKind, Panels, Shape, State, Tensor, TensorData, TensorId, TensorType,
    adapter::{Description, Slot},
    backend::htp::pack_update,
    binary::{Binary, BinaryWriter, SectionKind, Verify},
    op::AttentionAttrs,
};

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    F16,
    Int8Channel,
    Int4Channel,
    Int8Block,
    Int4Block,
    Int4BlockInteger,
    Int4BlockMin,
}

pub(crate) const FORMS: [Form; 8] = [
    Form::F32,
    Form::F16,
    Form::Int8Channel,
    Form::Int4Channel,
    Form::Int8Block,
    Form::Int4Block,
    Form::Int4BlockInteger,
    Form::Int4BlockMin,
];

/// What to build.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiny {
    pub(crate) seed: u64,
    pub(crate) ar: usize,
    pub(crate) cl: usize,
    pub(crate) layers: usize,
    /// Form of the linear layers' weights, in turn; empty means f32.
    pub(crate) forms: &'static [Form],
    /// Rank and element type of an adapter branch on every linear layer.
    pub(crate) branch: Option<(usize, DataType)>,
}

impl Default for Tiny {
    fn default() -> Tiny {
        Tiny { seed: 1, ar: 8, cl: 32, layers: 2, forms: &[], branch: None }
    }
}

pub(crate) const HIDDEN: usize = 32;
pub(crate) const VOCAB: usize = 40;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 16;
const FFN: usize = 64;

/// A graph in the shape that the importers give theirs: same inputs, names, states and metadata.
pub(crate) fn tiny(name: &str, tiny: Tiny) -> Graph {
    let mut b = Builder { graph: Graph::new(name), rng: Rng(tiny.seed), forms: tiny.forms, n_linear: 0, branch: None };
    let ids = b.input("input_ids", Some(tiny.ar));
    let positions = b.input_by("position_ids", tiny.ar, ids);
    let cache_index = b.input("cache_index", None);
    let logit_indices = b.input("logit_indices", Some(tiny.ar));
    if let Some((rank, data_type)) = tiny.branch {
        let alpha = b.add("lora_alpha", TensorType::AppWrite, DataType::Float32, Shape::fixed(&[rank]), None, None);
        b.branch = Some((rank, data_type, alpha));
        b.graph.set_metadata("lora_max_rank", rank.to_string());
    }
    let embedding = b.weight("model.embed_tokens.weight", VOCAB, HIDDEN, Form::F32);
    let inv_freq = b.vector("inv_freq", HEAD_DIM / 2);
    let mut hidden = b.op("model.embed_tokens", OpKind::Gather, &[embedding, ids])[0];
    let table = b.op("rotary", OpKind::RotaryTable { scale: 1.0 }, &[positions, inv_freq]);
    let mut layer_outputs = Vec::new();
    for layer in 0..tiny.layers {
        let states = ["key", "value"].map(|kind| b.state(&format!("past_{kind}_{layer}_in"), tiny.cl));
        hidden = b.layer(layer, hidden, &table, &[states[0], states[1], cache_index]);
        layer_outputs.push(b.graph.tensor(hidden).name.clone());
    }
    let picked = b.op("model.last", OpKind::Gather, &[hidden, logit_indices])[0];
    let weight = b.vector("model.norm.weight", HIDDEN);
    let normed = b.op("model.norm", OpKind::RmsNorm { epsilon: 1e-5 }, &[picked, weight])[0];
    let logits = b.op("logits", OpKind::FullyConnected, &[normed, embedding])[0];
    b.graph.mark_output(logits);
    b.graph.set_metadata("layer_outputs", layer_outputs.join(","));
    b.graph.set_metadata("architecture", "tiny");
    b.graph.set_metadata("max_position_embeddings", "64");
    b.graph.finalize().expect("the graph is complete");
    b.graph
}

struct Builder {
    graph: Graph,
    rng: Rng,
    forms: &'static [Form],
    n_linear: usize,
    branch: Option<(usize, DataType, TensorId)>,
}

impl Builder {
    fn layer(&mut self, layer: usize, x: TensorId, table: &[TensorId], states: &[TensorId]) -> TensorId {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let normed = self.norm(&name("input_layernorm"), x);
        let q = self.linear(&name("self_attn.q_proj"), normed, HEADS * HEAD_DIM, HIDDEN);
        let k = self.linear(&name("self_attn.k_proj"), normed, KV_HEADS * HEAD_DIM, HIDDEN);
        let v = self.linear(&name("self_attn.v_proj"), normed, KV_HEADS * HEAD_DIM, HIDDEN);
        let rotate = OpKind::RotaryEmbedding { head_dim: HEAD_DIM };
        let q = self.op(&name("self_attn.q_rope"), rotate, &[q, table[0], table[1]])[0];
        let k = self.op(&name("self_attn.k_rope"), rotate, &[k, table[0], table[1]])[0];
        let attrs = AttentionAttrs {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let inputs = [q, k, v, states[0], states[1], states[2]];
        let attention = self.op(&name("self_attn"), OpKind::Attention(attrs), &inputs)[0];
        let o = self.linear(&name("self_attn.o_proj"), attention, HIDDEN, HEADS * HEAD_DIM);
        let x = self.op(&name("residual_1"), OpKind::ElementWiseAdd, &[x, o])[0];
        let normed = self.norm(&name("post_attention_layernorm"), x);
        let gate = self.linear(&name("mlp.gate_proj"), normed, FFN, HIDDEN);
        let up = self.linear(&name("mlp.up_proj"), normed, FFN, HIDDEN);
        let sigmoid = self.op(&name("mlp.sigmoid"), OpKind::Sigmoid, &[gate])[0];
        let silu = self.op(&name("mlp.silu"), OpKind::ElementWiseMultiply, &[gate, sigmoid])[0];
        let product = self.op(&name("mlp.product"), OpKind::ElementWiseMultiply, &[silu, up])[0];
        let down = self.linear(&name("mlp.down_proj"), product, HIDDEN, FFN);
        self.op(&name("residual_2"), OpKind::ElementWiseAdd, &[x, down])[0]
    }

    fn norm(&mut self, name: &str, x: TensorId) -> TensorId {
        let weight = self.vector(&format!("{name}.weight"), HIDDEN);
        self.op(name, OpKind::RmsNorm { epsilon: 1e-5 }, &[x, weight])[0]
    }

    fn linear(&mut self, name: &str, x: TensorId, n: usize, k: usize) -> TensorId {
        let form = if self.forms.is_empty() { Form::F32 } else { self.forms[self.n_linear % self.forms.len()] };
        self.n_linear += 1;
        let weight = self.weight(&format!("{name}.weight"), n, k, form);
        let base = self.op(name, OpKind::FullyConnected, &[x, weight])[0];
        let Some((rank, data_type, alpha)) = self.branch else { return base };
        let mut updatable = |half: &str, n, k| {
            let name = format!("base_model.model.{name}.{half}.weight");
            self.add(&name, TensorType::UpdateableStatic, data_type, Shape::fixed(&[n, k]), None, None)
        };
        let (a, b) = (updatable("lora_A", rank, k), updatable("lora_B", n, rank));
        let down = self.op(&format!("{name}.lora_A"), OpKind::FullyConnected, &[x, a])[0];
        let scaled = self.op(&format!("{name}.lora_scale"), OpKind::ElementWiseMultiply, &[down, alpha])[0];
        let up = self.op(&format!("{name}.lora_B"), OpKind::FullyConnected, &[scaled, b])[0];
        self.op(&format!("{name}.lora_add"), OpKind::ElementWiseAdd, &[base, up])[0]
    }

    fn op(&mut self, name: &str, op: OpKind, inputs: &[TensorId]) -> Vec<TensorId> {
        self.graph.op(name, op, inputs, DataType::Float32).expect("the tiny model is well formed")
    }

    fn input(&mut self, name: &str, ar: Option<usize>) -> TensorId {
        let own = TensorId(self.graph.tensors().len() as u32);
        let dim = ar.map_or(Dim::Fixed(1), |max| Dim::UpTo { max, by: own });
        self.add(name, TensorType::AppWrite, DataType::Int32, Shape(vec![dim]), None, None)
    }

    fn input_by(&mut self, name: &str, max: usize, by: TensorId) -> TensorId {
        self.add(name, TensorType::AppWrite, DataType::Int32, Shape(vec![Dim::UpTo { max, by }]), None, None)
    }

    fn state(&mut self, name: &str, cl: usize) -> TensorId {
        let shape = Shape::fixed(&[KV_HEADS, cl, HEAD_DIM]);
        self.add(name, TensorType::AppReadWrite, DataType::Float32, shape, None, None)
    }

    fn vector(&mut self, name: &str, n: usize) -> TensorId {
        let bytes = (0..n).flat_map(|_| (1.0 + 0.1 * self.rng.float()).to_le_bytes()).collect();
        self.add(name, TensorType::Static, DataType::Float32, Shape::fixed(&[n]), None, Some(bytes))
    }

    fn weight(&mut self, name: &str, n: usize, k: usize, form: Form) -> TensorId {
        let (data_type, encoding, bytes) = random_weight(&mut self.rng, n, k, form);
        self.add(name, TensorType::Static, data_type, Shape::fixed(&[n, k]), encoding, Some(bytes))
    }

    fn add(
        &mut self,
        name: &str,
        tensor_type: TensorType,
        data_type: DataType,
        shape: Shape,
        encoding: Option<Encoding>,
        bytes: Option<Vec<u8>>,
    ) -> TensorId {
        let data = bytes.map(|bytes| TensorData::Flat(Bytes::from(bytes)));
        let tensor = Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding, data };
        self.graph.add_tensor(tensor).expect("the tiny model is well formed")
    }
}

/// Random values of rank `rank` for the updatable tensors of `context` whose names contain one of `modules`.
pub(crate) fn random_values(context: &Context, seed: u64, rank: usize, modules: &[&str]) -> Vec<(String, Panels)> {
    let mut rng = Rng(seed);
    let mut values = Vec::new();
    for name in context.updatable().iter().filter(|name| modules.iter().any(|module| name.contains(module))) {
        let graphs = || context.graphs().filter_map(|graph| context.graph(graph));
        let tensor = graphs().find_map(|graph| Some(graph.tensor(graph.find(name)?))).expect("listed, so declared");
        let dims = tensor.shape.max_dims();
        let (n, k) = if name.contains("lora_A") { (rank, dims[1]) } else { (dims[0], rank) };
        let form = match tensor.data_type {
            DataType::Float32 => Form::F32,
            DataType::Float16 => Form::F16,
            DataType::SFixedPoint4 => Form::Int4Channel,
            _ => Form::Int8Channel,
        };
        let (data_type, encoding, bytes) = random_weight(&mut rng, n, k, form);
        let (shape, data) = (Shape::fixed(&[n, k]), Some(TensorData::Flat(bytes.into())));
        let tensor = Tensor { name: name.clone(), tensor_type: TensorType::Static, data_type, shape, encoding, data };
        values.push((name.clone(), pack_update(&tensor).expect("these formats have kernels")));
    }
    values
}

/// An adapter of `context` with one slot, its values from [`random_values`].
pub(crate) fn random_adapter(context: &Context, name: &str, seed: u64, rank: usize, modules: &[&str]) -> Adapter {
    let values = random_values(context, seed, rank, modules);
    let slot = Slot { name: name.to_owned(), columns: 0..rank, scaling: Some(2.0) };
    let metadata = [("source".to_owned(), format!("seed {seed}"))].into();
    let description = Description { graph: None, rank, slots: vec![slot], metadata };
    let adapter = Adapter::new(name, context.updatable().clone(), values).expect("names of the context");
    adapter.described(description)
}

/// A graph made ready, always run from an empty cache.
pub(crate) struct Runner {
    executable: Box<dyn Executable>,
    bindings: Bindings,
    state: State,
}

impl Runner {
    pub(crate) fn new(backend: &dyn Backend, graph: &Graph) -> Runner {
        let executable = backend.prepare(graph).expect("the tiny model can run");
        let state = backend.new_state(&[graph], 32).expect("its caches are plain");
        Runner { executable, bindings: Bindings::new(graph), state }
    }

    /// Logits of the last of `ids`, with `adapter` at `strength`.
    pub(crate) fn run(&mut self, ids: &[i32], adapter: Option<Arc<Adapter>>, strength: f32) -> Vec<f32> {
        let positions: Vec<i32> = (0..ids.len() as i32).collect();
        let rows = [ids.len() as i32 - 1];
        let integers =
            [("input_ids", ids), ("position_ids", &positions), ("cache_index", &[0]), ("logit_indices", &rows)];
        for (name, values) in integers {
            let input = self.bindings.find_input(name).expect("every tiny model has it");
            self.bindings.set_i32(input, values).expect("it fits");
        }
        if let Some(alpha) = self.bindings.find_input("lora_alpha") {
            let rank = self.bindings.inputs()[alpha].max_rows;
            self.bindings.set_f32(alpha, &vec![strength; rank]).expect("it fits");
        }
        self.bindings.set_adapter(adapter);
        let Runner { executable, bindings, state } = self;
        executable.execute(bindings, state, &AtomicBool::new(false)).expect("the step runs");
        self.bindings.output_f32(0).to_vec()
    }
}

/// Type, encoding and bytes of a random weight `[n, k]`.
pub(crate) fn random_weight(rng: &mut Rng, n: usize, k: usize, form: Form) -> (DataType, Option<Encoding>, Vec<u8>) {
    let block_size = 16;
    let blocks = n * k / block_size;
    let mut bytes = |len: usize| -> Vec<u8> { (0..len).map(|_| rng.next() as u8).collect() };
    let (codes8, codes4) = (bytes(n * k), bytes((n * k).div_ceil(2)));
    let whole = bytes(blocks).iter().map(|b| (b % 16).wrapping_neg()).collect::<Vec<u8>>();
    let mut floats = |len: usize| -> Vec<f32> { (0..len).map(|_| 0.01 + 0.005 * rng.float()).collect() };
    let axis = |bitwidth, scales: &[f32]| Encoding::AxisScaleOffset {
        bitwidth,
        axis: 0,
        scales: Floats::from_f32(scales),
        offsets: Vec::new(),
    };
    let block = |bitwidth, scales: &[f32], offsets| Encoding::Block {
        bitwidth,
        block_size,
        scales: Floats::from_f16(scales),
        offsets,
    };
    match form {
        Form::F32 => (DataType::Float32, None, floats(n * k).iter().flat_map(|v| (v * 10.0).to_le_bytes()).collect()),
        Form::F16 => (DataType::Float16, None, Floats::from_f16(&floats(n * k)).bytes().to_vec()),
        Form::Int8Channel => (DataType::SFixedPoint8, Some(axis(8, &floats(n))), codes8),
        Form::Int4Channel => (DataType::SFixedPoint4, Some(axis(4, &floats(n))), codes4),
        Form::Int8Block => (DataType::SFixedPoint8, Some(block(8, &floats(blocks), BlockOffsets::Symmetric)), codes8),
        Form::Int4Block => (DataType::SFixedPoint4, Some(block(4, &floats(blocks), BlockOffsets::Symmetric)), codes4),
        Form::Int4BlockInteger => {
            let offsets = BlockOffsets::Integer(whole.into());
            (DataType::UFixedPoint4, Some(block(4, &floats(blocks), offsets)), codes4)
        }
        Form::Int4BlockMin => {
            let minima: Vec<f32> = floats(blocks).iter().map(|v| v * -8.0).collect();
            let offsets = BlockOffsets::Min(Floats::from_f16(&minima));
            (DataType::UFixedPoint4, Some(block(4, &floats(blocks), offsets)), codes4)
        }
    }
}

/// SplitMix64: the same numbers for ever.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// An error with all its causes, as a user sees it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Makes both checksums of header and table true again, so that what they protect is checked itself.
pub(crate) fn mend_checksums(file: &mut [u8]) {
    let table_at = u64::from_le_bytes(file[24..32].try_into().expect("eight bytes")) as usize;
    if let Some(table) = file.get(table_at..) {
        let crc = crc32fast::hash(table);
        file[40..44].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32fast::hash(&file[..124]);
    file[124..128].copy_from_slice(&crc.to_le_bytes());
}

/// A section for `context` with the parts of `section`, changed by `change`; its checksums are true.
pub(crate) fn splice(
    context: &Context,
    section: &[u8],
    change: impl FnOnce(&mut Vec<(SectionKind, String, Vec<u8>)>),
) -> Vec<u8> {
    let binary = Binary::parse_any(Bytes::from(section.to_vec()), Verify::Headers).expect("the section is whole");
    let own = binary.sections().iter().enumerate();
    let mut parts = own.map(|(i, s)| (s.kind, s.name.to_string(), binary.bytes(i).to_vec())).collect();
    change(&mut parts);
    let mut writer = BinaryWriter::section(Cursor::new(Vec::new()), context.identity()).unwrap();
    for (kind, name, bytes) in parts {
        writer.add(kind, &name, &bytes).unwrap();
    }
    writer.finish().unwrap().0.into_inner()
}

/// Puts `to` in place of the first `from` of a JSON text.
pub(crate) fn replace(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = std::str::from_utf8(bytes).expect("JSON");
    assert!(text.contains(from), "{text}");
    *bytes = text.replacen(from, to, 1).into_bytes();
}

/// A tool has to end well where nobody reads what it prints, and with an error where there is no room for it; `command` makes
/// a call that succeeds.
pub(crate) fn check_stdout(command: impl Fn() -> Command) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let done = command().stdout(writer).output().expect("the tool starts");
    assert!(done.status.success(), "nobody reads: {}", String::from_utf8_lossy(&done.stderr));
    #[cfg(target_os = "linux")]
    {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("every Linux has it");
        let done = command().stdout(full).output().expect("the tool starts");
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{error}");
        assert!(error.contains(": standard output: ") && !error.contains("panicked"), "{error}");
    }
}
