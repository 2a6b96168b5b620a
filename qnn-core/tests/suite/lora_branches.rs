//! The promises of adapter branches: a branch computes what a merged weight would, and lands where its name says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, atomic::AtomicBool};

use crate::peft::{Stored, config, pair, write};
use crate::support::{Form, Rng, Tiny, VOCAB, chain, tiny};
use qnn_core::{
    Adapter, Backend, Bindings, Context, ContextBuilder, DataType, Executable, Graph, OpenOptions, State, Tensor,
    TensorData, TensorType,
    backend::{HtpBackend, ReferenceBackend},
    binary::Verify,
    offline::{
        dlc::{read_dlc, write_dlc},
        generate::{GenerateOptions, generate},
        lora::{
            self, LoraBits, LoraOptions, LoraPlan, UpdatableMode, adapter_from_peft, adapters_from_peft, add_branches,
            attach_points, fold, load_peft,
        },
    },
};
use safetensors::Dtype;
use serde_json::{Value, json};

const ROWS: usize = 5;

/// Adapters, each with its strength.
type ByHand<'a> = &'a [(&'a Path, f64)];

/// A PEFT directory with random values for the modules of `graph` whose names end with one of `targets`.
fn random_peft(parent: &Path, name: &str, seed: u64, graph: &Graph, targets: &[&str], changes: Value) -> PathBuf {
    let rank = changes.get("r").and_then(Value::as_u64).unwrap_or(4) as usize;
    let mut config = config(changes);
    config["target_modules"] = json!(targets);
    let mut rng = Rng(seed);
    let points = attach_points(graph);
    let wanted = points.iter().filter(|point| targets.iter().any(|target| point.module.ends_with(target)));
    let tensors: Vec<Stored> =
        wanted.flat_map(|p| pair(&p.module, [p.n, p.k, rank], Dtype::F32, &mut |_, _| rng.float() * 0.8)).collect();
    write(parent, name, &config, &tensors)
}

fn options(adapters: &[&Path]) -> LoraOptions {
    LoraOptions {
        weight_list: None,
        adapters: adapters.iter().map(|dir| (*dir).to_owned()).collect(),
        max_rank: None,
        bits: None,
        mode: UpdatableMode::AdapterOnly,
    }
}

fn with_branches(graph: &Graph, options: &LoraOptions) -> Graph {
    add_branches(graph, &lora::plan(options).unwrap().0).unwrap()
}

fn context_of(graph: &Graph) -> Context {
    let builder = graph.metadata().iter().fold(ContextBuilder::new(), |b, (key, value)| b.metadata(key, value));
    let binary = builder.graph(graph.clone()).to_binary().unwrap();
    Context::from_binary(binary.into(), Verify::Checksums).unwrap()
}

/// Graphs that feed each other, run on one prompt.
fn logits(backend: &dyn Backend, parts: &[(&Graph, Option<Arc<Adapter>>)], strengths: &[f32]) -> Vec<f32> {
    let graphs: Vec<&Graph> = parts.iter().map(|(graph, _)| *graph).collect();
    let mut state: State = backend.new_state(&graphs, 32).unwrap();
    let ids: Vec<i32> = (0..ROWS).map(|i| (i * 11 % VOCAB) as i32).collect();
    let rows: Vec<i32> = (0..ROWS as i32).collect();
    let mut given: BTreeMap<String, Vec<f32>> = BTreeMap::from([("lora_alpha".to_owned(), strengths.to_vec())]);
    for (graph, adapter) in parts {
        let mut executable: Box<dyn Executable> = backend.prepare(graph).unwrap();
        let mut bindings = Bindings::new(graph);
        for (name, values) in
            [("input_ids", &ids[..]), ("position_ids", &rows), ("cache_index", &[0]), ("logit_indices", &rows)]
        {
            if let Some(index) = bindings.find_input(name) {
                bindings.set_i32(index, values).unwrap();
            }
        }
        for (name, values) in &given {
            if let Some(index) = bindings.find_input(name) {
                bindings.set_f32(index, values).unwrap();
            }
        }
        bindings.set_adapter(adapter.clone());
        executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        for (i, output) in bindings.outputs().iter().enumerate() {
            given.insert(output.name.clone(), bindings.output_f32(i).to_vec());
        }
    }
    given.remove("logits").expect("the last part gives logits")
}

/// `graph` (f32) with `strength · scaling · B · A` added to its weights by hand.
fn merged(graph: &Graph, adapters: ByHand<'_>) -> Graph {
    let mut deltas: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (dir, strength) in adapters {
        for m in load_peft(dir).unwrap().modules {
            let delta = deltas.entry(format!("{}.weight", m.name)).or_insert_with(|| vec![0.0; m.n * m.k]);
            for (i, out) in delta.iter_mut().enumerate() {
                let (n, k) = (i / m.k, i % m.k);
                let dot: f64 = (0..m.rank).map(|r| f64::from(m.b[n * m.rank + r]) * f64::from(m.a[r * m.k + k])).sum();
                *out += strength * m.scaling * dot;
            }
        }
    }
    let mut result = Graph::new(graph.name());
    for tensor in graph.tensors() {
        let mut tensor: Tensor = tensor.clone();
        if let (Some(delta), Some(TensorData::Flat(bytes))) = (deltas.remove(&tensor.name), &tensor.data) {
            let values = bytes.as_chunks::<4>().0.iter().zip(delta);
            let sums: Vec<u8> =
                values.flat_map(|(w, d)| ((f64::from(f32::from_le_bytes(*w)) + d) as f32).to_le_bytes()).collect();
            tensor.data = Some(TensorData::Flat(sums.into()));
        }
        result.add_tensor(tensor).unwrap();
    }
    assert!(deltas.is_empty(), "every module has a weight");
    graph.nodes().iter().for_each(|node| result.add_node(node.clone()).unwrap());
    result
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

// Broken if a branch is not `y + strength · scaling · B (A x)`: a wrong place, factor, column, or adapter. Both backends.
#[test]
fn a_branch_equals_the_merged_weight() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny("model", Tiny { seed: 21, ..Tiny::default() });
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let one = random_peft(dir.path(), "one", 1, &base, &["q_proj", "down_proj"], json!({"r": 3}));
    let two = random_peft(dir.path(), "two", 2, &base, &all, json!({"r": 5, "use_rslora": true}));
    let graph = with_branches(&base, &LoraOptions { max_rank: Some(9), ..options(&[&one, &two]) });
    assert_eq!(attach_points(&graph).iter().filter(|point| point.branch.is_some()).count(), 14);
    let context = context_of(&graph);
    let (first, second) = (load_peft(&one).unwrap(), load_peft(&two).unwrap());
    let both = fold("both", &[("one".to_owned(), &first), ("two".to_owned(), &second)]).unwrap();
    assert_eq!((both.rank, both.slots[1].columns), (8, [3, 8]));
    let adapters = [
        adapter_from_peft(&context, &one, "one").unwrap(),
        adapter_from_peft(&context, &two, "two").unwrap(),
        lora::adapters(&[&context], &both).unwrap().remove(0),
    ];
    assert_eq!((adapters[0].rank(), adapters[0].n_targets(), adapters[0].scaling()), (3, 4, Some(2.0)));
    let htp = HtpBackend::new(2).unwrap();
    for backend in [&ReferenceBackend as &dyn Backend, &htp] {
        let run = |adapter: &Arc<Adapter>, strengths: &[f32]| {
            logits(backend, &[(context.graph("model").unwrap(), Some(adapter.clone()))], strengths)
        };
        let plain = logits(backend, &[(&base, None)], &[]);
        let cases: [(usize, [f32; 9], ByHand<'_>); 5] = [
            (0, [1.0; 9], &[(&one, 1.0)]),
            (1, [1.0; 9], &[(&two, 1.0)]),
            (1, [0.5; 9], &[(&two, 0.5)]),
            (2, [1.0; 9], &[(&one, 1.0), (&two, 1.0)]),
            (2, [-1.5, -1.5, -1.5, 0.25, 0.25, 0.25, 0.25, 0.25, 7.0], &[(&one, -1.5), (&two, 0.25)]),
        ];
        for (adapter, strengths, by_hand) in cases {
            let want = logits(backend, &[(&merged(&base, by_hand), None)], &[]);
            let have = run(&adapters[adapter], &strengths);
            let (off, moved) = (distance(&have, &want), distance(&plain, &want));
            assert!(moved > 0.05, "{by_hand:?} moves the logits by {moved} only");
            assert!(off < 2e-4, "{by_hand:?}: off by {off} of {moved}");
        }
        assert_eq!(run(&adapters[2], &[0.0; 9]), plain, "strength 0 is the base, bit for bit");
        let without = logits(backend, &[(context.graph("model").unwrap(), None)], &[1.0; 9]);
        assert_eq!(without, plain, "no adapter is the base, bit for bit");
    }
}

// Broken if a storage of the adapters' weights is not what was asked for, or far worse than its bits.
#[test]
fn fewer_bits_are_nearly_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny("model", Tiny { seed: 5, ..Tiny::default() });
    let adapter = random_peft(dir.path(), "a", 3, &base, &["v_proj", "o_proj", "up_proj"], json!({"r": 7}));
    let want = logits(&ReferenceBackend, &[(&merged(&base, &[(&adapter, 1.0)]), None)], &[]);
    let moved = distance(&want, &logits(&ReferenceBackend, &[(&base, None)], &[]));
    let mut last = 0.0;
    let cases = [
        (LoraBits::ThirtyTwo, DataType::Float32, 1e-4),
        (LoraBits::Sixteen, DataType::Float16, 5e-3),
        (LoraBits::Eight, DataType::SFixedPoint8, 0.05),
        (LoraBits::Four, DataType::SFixedPoint4, 0.6),
    ];
    for (bits, data_type, bound) in cases {
        let graph = with_branches(&base, &LoraOptions { bits: Some(bits), ..options(&[&adapter]) });
        assert!(attach_points(&graph).iter().filter_map(|p| p.branch).all(|branch| branch.data_type == data_type));
        let context = context_of(&graph);
        let adapter = adapter_from_peft(&context, &adapter, "a").unwrap();
        let have = logits(&ReferenceBackend, &[(context.graph("model").unwrap(), Some(adapter))], &[1.0; 7]);
        let off = distance(&have, &want) / moved;
        assert!(
            off < bound && (off > last || last == 0.0),
            "{data_type}: off by {off} of what the adapter does, {last} before"
        );
        last = off;
    }
}

// Broken if branches do not survive the DLC, the cut into parts or the bounds of a graph: the parts with their adapters
// must give what the whole gives.
#[test]
fn branches_survive_files_and_splits() {
    let dir = tempfile::tempdir().unwrap();
    let base =
        tiny("model", Tiny { seed: 8, layers: 4, forms: &[Form::Int8Channel, Form::Int8Block], ..Tiny::default() });
    let adapter = random_peft(dir.path(), "a", 3, &base, &["q_proj", "gate_proj", "down_proj"], json!({"r": 6}));
    let graph = with_branches(&base, &options(&[&adapter]));
    for (key, value) in [
        ("lora_max_rank", "6"),
        ("lora_weights_bitwidth", "8"),
        ("lora_alpha_tensor", "lora_alpha"),
        ("quant_updatable_mode", "adapter_only"),
    ] {
        assert_eq!(graph.metadata()[key], value);
    }
    let dlc_path = dir.path().join("model.dlc");
    write_dlc(&dlc_path, &graph).unwrap();
    let read = read_dlc(&dlc_path).unwrap();
    assert_eq!(attach_points(&read), attach_points(&graph));
    assert_eq!(read.nodes(), graph.nodes());
    let options = GenerateOptions {
        dlc_path,
        output_dir: dir.path().to_owned(),
        binary_file: "m".to_owned(),
        ar: vec![8, 1],
        cl: vec![32],
        num_splits: 2,
        adapter_weight_config: None,
        lora_weight_sharing: false,
    };
    let report = generate(&options, &mut |_| {}).unwrap();
    let open = |path: &Path| Context::open(path, &OpenOptions::default()).unwrap();
    let contexts: Vec<Context> = report.files.iter().map(|file| open(&file.path)).collect();
    assert!(contexts.iter().all(|context| context.updatable().len() == 12 && context.max_rank() == 6));
    let alone = chain(&adapter_from_peft(&contexts[0], &adapter, "a").unwrap_err());
    assert!(alone.contains("lands nowhere") && alone.contains("layers.2"), "half a model is no place: {alone}");
    let adapters = adapters_from_peft(&[&contexts[0], &contexts[1]], &adapter, "a").unwrap();
    assert_eq!(adapters.iter().map(|adapter| adapter.n_targets()).collect::<Vec<_>>(), [6, 6]);
    let parts: Vec<(&Graph, Option<Arc<Adapter>>)> = contexts
        .iter()
        .zip(&adapters)
        .enumerate()
        .map(|(i, (c, a))| (c.graph(&format!("prompt_ar8_cl32_{}_of_2", i + 1)).unwrap(), Some(a.clone())))
        .collect();
    let have = logits(&ReferenceBackend, &parts, &[0.75; 6]);
    let whole = context_of(&graph);
    let own = adapter_from_peft(&whole, &adapter, "a").unwrap();
    let want = logits(&ReferenceBackend, &[(whole.graph("model").unwrap(), Some(own))], &[0.75; 6]);
    let plain = logits(&ReferenceBackend, &[(&base, None)], &[]);
    assert!(distance(&want, &plain) > 0.01 && distance(&have, &want) < 1e-4);
}

// Broken if the branches of a list are others than those it names, or a list with an error is taken for a shorter one.
#[test]
fn a_weight_list_decides_the_branches() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny("model", Tiny::default());
    let path = dir.path().join("lora_weight_list.txt");
    let pair = |module: &str| format!("{}\n{}\n", lora::a_name(module), lora::b_name(module));
    let q = "model.layers.1.self_attn.q_proj";
    let plan = |text: &str, change: &dyn Fn(&mut LoraOptions)| {
        std::fs::write(&path, text).unwrap();
        let mut options = LoraOptions { weight_list: Some(path.clone()), max_rank: Some(4), ..options(&[]) };
        change(&mut options);
        lora::plan(&options).map(|(plan, _)| plan).map_err(|error| chain(&error))
    };
    let same = |_: &mut LoraOptions| {};
    let listed = plan(&format!("\n{}  \n", pair(q)), &same).unwrap();
    assert_eq!((listed.targets.clone(), listed.max_rank), ([q.to_owned()].into(), 4));
    let graph = add_branches(&base, &listed).unwrap();
    let with: Vec<String> =
        attach_points(&graph).into_iter().filter(|p| p.branch.is_some()).map(|p| p.module).collect();
    assert_eq!(with, [q]);
    let refused = |text: &str, change: &dyn Fn(&mut LoraOptions), words: &[&str]| {
        let error = plan(text, change).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
    };
    refused(&lora::a_name(q), &same, &["q_proj.lora_A.weight has no other half"]);
    refused(&(pair(q) + &lora::b_name(q)), &same, &["q_proj.lora_B.weight is listed twice"]);
    refused("", &same, &["lora_weight_list.txt", "no tensors"]);
    refused("model.layers.0.q_proj.weight", &same, &["does not begin with base_model.model."]);
    refused(&pair("lm_head"), &same, &["lm_head", "leave"]);
    refused(&pair(q), &|o| o.max_rank = None, &["lora_max_rank: not given"]);
    let adapter = random_peft(dir.path(), "a", 3, &base, &["v_proj"], json!({"r": 6}));
    let both = |rank| {
        let adapter = adapter.clone();
        move |o: &mut LoraOptions| (o.adapters, o.max_rank) = (vec![adapter.clone()], rank)
    };
    refused(&pair(q), &both(None), &["layers.0.self_attn.v_proj.lora_A.weight lands nowhere", "does not list it"]);
    let v = |layer| pair(&format!("model.layers.{layer}.self_attn.v_proj"));
    refused(&(v(0) + &v(1)), &both(Some(5)), &["rank 6, the graph takes at most 5"]);
    assert_eq!(plan(&(v(0) + &v(1)), &both(None)).unwrap().max_rank, 6);
}

// Broken if a graph gets branches that no adapter could use, or a mode that its storage contradicts.
#[test]
fn impossible_plans_are_refused() {
    let base = tiny("model", Tiny::default());
    let integers = tiny("model", Tiny { forms: &[Form::Int8Channel], ..Tiny::default() });
    let plan = LoraPlan {
        targets: ["model.layers.0.mlp.up_proj".to_owned()].into(),
        max_rank: 4,
        bits: None,
        mode: UpdatableMode::AdapterOnly,
    };
    let data_type = |graph: &Graph, mode| {
        let graph = add_branches(graph, &LoraPlan { mode, ..plan.clone() }).unwrap();
        attach_points(&graph).into_iter().find_map(|p| p.branch).unwrap().data_type
    };
    assert_eq!(data_type(&base, UpdatableMode::AdapterOnly), DataType::Float32);
    assert_eq!(data_type(&integers, UpdatableMode::AdapterOnly), DataType::SFixedPoint8);
    assert_eq!(data_type(&integers, UpdatableMode::None), DataType::Float16);
    let refused = |graph: &Graph, plan: LoraPlan, words: &[&str]| {
        let error = add_branches(graph, &plan).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
    };
    let targets = |module: &str| LoraPlan { targets: [module.to_owned()].into(), ..plan.clone() };
    refused(&base, targets("model.layers.7.mlp.up_proj"), &["layers.7", "lands nowhere", "layers.0.mlp.up_proj"]);
    refused(&base, targets("logits"), &["logits"]);
    refused(&base, LoraPlan { targets: Default::default(), ..plan.clone() }, &["none of its 0 tensors"]);
    refused(&base, LoraPlan { max_rank: 0, ..plan.clone() }, &["maximum rank: 0"]);
    refused(&base, LoraPlan { max_rank: 100_000, ..plan.clone() }, &["maximum rank: 100000"]);
    let none = LoraPlan { bits: Some(LoraBits::Eight), mode: UpdatableMode::None, ..plan.clone() };
    refused(&base, none, &["8 bits with quant_updatable_mode none"]);
    let once = add_branches(&base, &plan).unwrap();
    refused(&once, plan.clone(), &["has adapter branches already"]);
    let a = once.tensor(once.find(&lora::a_name("model.layers.0.mlp.up_proj")).unwrap());
    assert!(a.tensor_type == TensorType::UpdateableStatic && a.data.is_none());
}

// Broken if an adapter that the graph has no room or place for is cut to fit.
#[test]
fn adapters_that_do_not_fit_a_context_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny("model", Tiny::default());
    let small = random_peft(dir.path(), "small", 1, &base, &["q_proj"], json!({"r": 2}));
    let large = random_peft(dir.path(), "large", 1, &base, &["q_proj"], json!({"r": 3}));
    let wide = random_peft(dir.path(), "wide", 1, &base, &["q_proj", "k_proj"], json!({"r": 2}));
    let other = random_peft(dir.path(), "other", 1, &base, &["k_proj"], json!({"r": 2}));
    let context = context_of(&with_branches(&base, &options(&[&small])));
    let error = |context: &Context, dir: &Path| chain(&adapter_from_peft(context, dir, "a").unwrap_err());
    adapter_from_peft(&context, &small, "a").unwrap();
    assert!(error(&context, &large).contains("rank 3, the graph takes at most 2"));
    assert!(error(&context, &wide).contains("k_proj.lora_A.weight lands nowhere: the graph has no adapter branch"));
    assert!(error(&context, &other).contains("none of its 4 tensors lands"));
    assert!(error(&context_of(&base), &small).contains("has no adapter branches"));
}
