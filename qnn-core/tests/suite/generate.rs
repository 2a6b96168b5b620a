//! The promises of the context binary generator: same numbers, weights once, parts that chain, nothing done silently.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::support::{FORMS, Form, HIDDEN, Rng, Tiny, VOCAB, chain, tiny};
use qnn_core::{
    Backend, Bindings, Context, Executable, Graph, OpenOptions, State, TensorData,
    backend::reference::ReferenceBackend,
    offline::{
        dlc::write_dlc,
        generate::{GenerateOptions, Report, generate},
    },
};

const MODEL: Tiny = Tiny { seed: 4, ar: 8, cl: 32, layers: 4, forms: &FORMS, branch: None };

fn options(dir: &Path, graph: &Graph, num_splits: usize) -> GenerateOptions {
    let dlc_path = dir.join("model.dlc");
    write_dlc(&dlc_path, graph).expect("the tiny model can be stored");
    GenerateOptions {
        dlc_path,
        output_dir: dir.join("out"),
        binary_file: "tiny".to_owned(),
        ar: vec![8, 1],
        cl: vec![32],
        num_splits,
        adapter_weight_config: None,
        lora_weight_sharing: false,
    }
}

fn run(options: &GenerateOptions) -> Result<Report, String> {
    let (mut last, mut total) = (0, 0);
    let report = generate(options, &mut |progress| {
        assert!(progress.done_bytes > last && progress.done_bytes <= progress.total_bytes);
        (last, total) = (progress.done_bytes, progress.total_bytes);
    })
    .map_err(|error| chain(&error))?;
    assert_eq!(last, total, "progress did not reach its end");
    Ok(report)
}

fn open(report: &Report) -> Vec<Context> {
    let open = |file: &qnn_core::offline::generate::FileReport| Context::open(&file.path, &OpenOptions::default());
    report.files.iter().map(|file| open(file).expect("what was written can be read")).collect()
}

/// A chain of graphs under the reference backend, each fed by name from the outputs of those before it.
struct Chain {
    parts: Vec<(Box<dyn Executable>, Bindings)>,
    state: State,
}

impl Chain {
    fn new(graphs: &[&Graph]) -> Chain {
        let backend = ReferenceBackend;
        let state = backend.new_state(graphs, 32).expect("the caches are plain");
        let prepare = |graph: &&Graph| (backend.prepare(graph).expect("the graph is plain"), Bindings::new(graph));
        Chain { parts: graphs.iter().map(prepare).collect(), state }
    }

    fn step(&mut self, ids: &[i32], at: i32) -> Vec<f32> {
        let positions: Vec<i32> = (at..at + ids.len() as i32).collect();
        let rows: Vec<i32> = (0..ids.len() as i32).collect();
        let mut given: Vec<(String, Vec<f32>)> = Vec::new();
        for (executable, bindings) in &mut self.parts {
            let integers =
                [("input_ids", ids), ("position_ids", &positions), ("cache_index", &[at]), ("logit_indices", &rows)];
            for (name, values) in integers {
                if let Some(index) = bindings.find_input(name) {
                    bindings.set_i32(index, values).expect("it fits");
                }
            }
            for (name, values) in &given {
                if let Some(index) = bindings.find_input(name) {
                    bindings.set_f32(index, values).expect("it fits");
                }
            }
            executable.execute(bindings, &mut self.state, &AtomicBool::new(false)).expect("the step runs");
            given = (0..bindings.outputs().len())
                .map(|i| (bindings.outputs()[i].name.clone(), bindings.output_f32(i).to_vec()))
                .collect();
        }
        given.iter().find(|(name, _)| name == "logits").expect("the last part gives logits").1.clone()
    }
}

// Broken if the channel scales of a large model, some megabytes, have no place in a context binary, or metadata that has none is
// found only after files were written.
#[test]
fn long_channel_scales_have_a_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut graph = tiny("model", MODEL);
    let scales = format!(r#"{{"lists":["{}"],"modules":{{}}}}"#, "3c00".repeat(1 << 19));
    graph.set_metadata("channel_scales", scales.clone());
    let contexts = open(&run(&options(dir.path(), &graph, 1)).unwrap());
    let made = contexts[0].graph(contexts[0].graphs().next().unwrap()).unwrap();
    assert_eq!(made.metadata().get("channel_scales"), Some(&scales));

    let dir = tempfile::tempdir().unwrap();
    graph.set_metadata("note", "long ".repeat(1 << 18));
    let options = options(dir.path(), &graph, 1);
    let error = run(&options).unwrap_err();
    assert!(error.contains("metadata of the model") && error.contains("1048576"), "{error}");
    assert!(!options.output_dir.exists());
}

// Broken if a model changes by being packed, bounded or cut: the chain of parts must give the logits of the whole,
// for prompt and token graphs over one state.
#[test]
fn the_chain_of_splits_gives_the_same_logits_as_the_dlc() {
    let whole = tiny("model", MODEL);
    let ids: Vec<i32> = {
        let mut rng = Rng(9);
        (0..7).map(|_| (rng.next() % VOCAB as u64) as i32).collect()
    };
    let (prompt, token) = ids.split_at(6);
    let mut oracle = Chain::new(&[&whole]);
    let want = [oracle.step(prompt, 0), oracle.step(token, 6)];
    assert!(want[0].len() == 6 * VOCAB && want[0].iter().all(|v| v.is_finite() && *v != 0.0));
    for num_splits in 1..=4 {
        let dir = tempfile::tempdir().unwrap();
        let contexts = open(&run(&options(dir.path(), &whole, num_splits)).unwrap());
        assert_eq!(contexts.len(), num_splits);
        let graphs = |role: &str| -> Vec<Graph> {
            let name = |i| format!("{role}_cl32_{}_of_{num_splits}", i + 1);
            contexts.iter().enumerate().map(|(i, c)| c.graph(&name(i)).expect("named so").clone()).collect()
        };
        let (prompts, tokens) = (graphs("prompt_ar8"), graphs("token_ar1"));
        let mut chain = Chain::new(&prompts.iter().collect::<Vec<_>>());
        assert_close(&chain.step(prompt, 0), &want[0], &format!("{num_splits} splits, prompt"));
        let state = chain.state;
        chain = Chain::new(&tokens.iter().collect::<Vec<_>>());
        chain.state = state;
        assert_close(&chain.step(token, 6), &want[1], &format!("{num_splits} splits, token"));
    }
}

/// Panels give each weight, and a cut each residual, rounded once to f32; the oracle computes on in f64.
fn assert_close(have: &[f32], want: &[f32], what: &str) {
    assert_eq!(have.len(), want.len(), "{what}");
    let worst = have.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{what}: off by {worst}");
}

// Broken if a file has another name than asked for, a weight twice, an unpacked matrix, or more than its part.
#[test]
fn files_hold_their_part_once_and_packed() {
    let dir = tempfile::tempdir().unwrap();
    let options = GenerateOptions { cl: vec![32, 64], ..options(dir.path(), &tiny("model", MODEL), 2) };
    let report = run(&options).unwrap();
    let names: Vec<_> = report.files.iter().map(|f| f.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["tiny_1_of_2.bin", "tiny_2_of_2.bin"]);
    let contexts = open(&report);
    let (mut names, mut n_layers) = (Vec::new(), Vec::new());
    for (context, file) in contexts.iter().zip(&report.files) {
        assert_eq!((context.identity(), context.size_bytes()), (file.identity, file.size_bytes));
        assert_eq!(context.to_binary().unwrap(), std::fs::read(&file.path).unwrap());
        assert_eq!(context.metadata()["architecture"], "tiny");
        let info = context.info();
        names.extend(info.graphs.iter().map(|g| g.name.clone()));
        n_layers.push(info.graphs[0].states.len() / 2);
        for constant in &info.constants {
            let is_matrix = constant.tensor.dims.len() == 2;
            assert_eq!(constant.tensor.panels.is_some(), is_matrix, "{}", constant.tensor.name);
            assert_eq!((constant.n_graphs, constant.tensor.encoding.as_ref()), (4, None), "{}", constant.tensor.name);
        }
        assert_eq!(file.weights.values().map(|(n, _)| n).sum::<usize>(), 15);
    }
    assert_eq!(n_layers, [2, 2]);
    let want =
        |i| ["prompt_ar8_cl32", "token_ar1_cl32", "prompt_ar8_cl64", "token_ar1_cl64"].map(|n| format!("{n}_{i}_of_2"));
    assert_eq!(names, [want(1), want(2)].concat());
    let caches = |name: &str| {
        let graph = contexts[0].graph(name).unwrap();
        graph.tensor(graph.states()[0]).shape.max_dims()
    };
    assert_eq!((caches("token_ar1_cl32_1_of_2")[1], caches("prompt_ar8_cl64_1_of_2")[1]), (32, 64));
    let input = contexts[1].graph("prompt_ar8_cl32_2_of_2").unwrap();
    let inputs: Vec<_> = input.inputs().into_iter().map(|id| input.tensor(id)).collect();
    assert_eq!(inputs[0].name, "model.layers.1.residual_2");
    assert_eq!(inputs[0].shape.max_dims(), [8, HIDDEN]);
    assert_eq!(
        inputs[1..].iter().map(|t| &*t.name).collect::<Vec<_>>(),
        ["position_ids", "cache_index", "logit_indices"]
    );
}

// Broken if the tied embedding is stored twice, or its rows differ from the DLC's.
#[test]
fn a_tied_head_shares_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let contexts =
        open(&run(&options(dir.path(), &tiny("model", Tiny { forms: &[Form::Int8Block], ..MODEL }), 1)).unwrap());
    let graph = contexts[0].graph("token_ar1_cl32_1_of_1").unwrap();
    let users =
        graph.nodes().iter().filter(|node| node.inputs.contains(&graph.find("model.embed_tokens.weight").unwrap()));
    assert_eq!(users.map(|node| node.op.name()).collect::<Vec<_>>(), ["Gather", "FullyConnected"]);
    let Some(TensorData::Panels(panels)) = &graph.tensor(graph.find("model.embed_tokens.weight").unwrap()).data else {
        panic!("the embedding is not packed")
    };
    assert_eq!((panels.layout().n(), panels.layout().k()), (VOCAB, HIDDEN));
}

// Broken if a dialog finds no tokenizer beside its context, or a copy onto itself empties the file.
#[test]
fn tokenizer_files_travel_with_the_binary() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), &tiny("model", MODEL), 1);
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    std::fs::write(dir.path().join("generation_config.json"), "[]").unwrap();
    let report = run(&options).unwrap();
    let copies: Vec<PathBuf> =
        ["tokenizer.json", "generation_config.json"].map(|n| options.output_dir.join(n)).to_vec();
    assert_eq!(report.sidecars, copies);
    assert_eq!(std::fs::read_to_string(&copies[1]).unwrap(), "[]");
    options.output_dir = dir.path().to_path_buf();
    run(&options).unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), "{}");
}

// Broken if the tool guesses, or leaves files behind, where it should refuse and say why.
#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let good = options(dir.path(), &tiny("model", MODEL), 1);
    let with = |change: fn(&mut GenerateOptions)| {
        let mut options = good.clone();
        change(&mut options);
        options
    };
    let cases = [
        (with(|o| o.ar = vec![]), "ar: an empty list, need at least one number of rows"),
        (with(|o| o.ar = vec![8, 8]), "ar: 8 twice, need each number once"),
        (with(|o| o.ar = vec![64]), "ar: 64, need 1 to 32 rows, no more than the smallest context (cl)"),
        (with(|o| o.ar = vec![0]), "ar: 0, need 1 to 32 rows"),
        (with(|o| o.cl = vec![128]), "cl: 128, need at most 64, the positions that the model knows"),
        (with(|o| (o.ar, o.cl) = ((1..=9).collect(), (50..=59).collect())), "90 graphs, need at most 64 graphs"),
        (with(|o| o.num_splits = 5), "5 splits of a model with 4 layers"),
        (with(|o| o.num_splits = 0), "0 splits"),
        (with(|o| o.binary_file = "../x".to_owned()), "need a file name without folders"),
        (with(|o| o.binary_file = ".bin".to_owned()), "need a file name without folders"),
    ];
    for (options, want) in cases {
        let error = run(&options).expect_err(want);
        assert!(error.starts_with(options.dlc_path.to_str().unwrap()) && error.contains(want), "{error}");
        assert!(!options.output_dir.exists(), "{want}: something was written");
    }
    let missing = with(|o| o.dlc_path = PathBuf::from("/no/such/model.dlc"));
    assert!(run(&missing).unwrap_err().starts_with("/no/such/model.dlc"));
}
