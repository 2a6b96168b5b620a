//! Guards rounding with calibration: equalization and smoothing keep what a graph computes, with and without an adapter;
//! smoothing saves inputs with massive channels; error feedback makes outputs better; block steps mean the same in files, in the reference and in the kernels' panels.

use crate::support::{Form, Rng, Tiny, tiny};
use htp_sim::Workers;
use qnn_core::{
    DataType, Encoding, Floats, Graph, TensorData,
    backend::{HtpBackend, htp::pack_constant, reference::dequantize_constant},
    offline::{
        calibrate::{Calibrator, Feed, Probe, float_graph},
        dlc,
        equalize::{ChannelScales, ScalesError, Schemes, SmoothError, SmoothOptions, equalize, smooth},
        lora::{Folded, FoldedModule, adapter_for_graph},
        quantize_weights::{Bits, Feedback, Moments, Rounding, Scheme, Search, quantize_with},
        rounding::{Method, RoundingError, RoundingOptions, round_weights, set_dynamic_activations},
        source::{ElementFormat, SourceTensor},
    },
};

const RANK: usize = 4;
const SCHEME: Scheme = Scheme::AsymmetricBlock4 { block_size: 16 };
const SCHEMES: Schemes = Schemes { layers: SCHEME, head: SCHEME };
const EIGHT: Scheme = Scheme::Block { bits: Bits::Eight, block_size: 16 };
const SMOOTHING: SmoothOptions =
    SmoothOptions { weights: Some(Schemes { layers: EIGHT, head: EIGHT }), least_sqnr_db: None };

/// A float model whose weights came off their four-bit grid by factors on the channels between norms and matrices.
fn off_grid(branch: bool) -> Graph {
    let branch = branch.then_some((RANK, DataType::Float32));
    let graph =
        tiny("model", Tiny { seed: 11, ar: 32, cl: 32, forms: &[Form::Int4BlockMin], branch, ..Tiny::default() });
    let mut graph = float_graph(&graph).expect("plain constants");
    graph.set_metadata("lora_alpha_tensor", "lora_alpha");
    let mut rng = Rng(4);
    for layer in 0..2 {
        for (norm, readers) in [
            ("input_layernorm", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
            ("post_attention_layernorm", &["mlp.gate_proj", "mlp.up_proj"]),
        ] {
            let factors: Vec<f32> = (0..crate::support::HIDDEN).map(|_| (0.5 * rng.float()).exp()).collect();
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            scale_columns(&mut graph, &name(norm), |column| 1.0 / factors[column]);
            readers.iter().for_each(|reader| scale_columns(&mut graph, &name(reader), |column| factors[column]));
        }
    }
    graph
}

fn scale_columns(graph: &mut Graph, name: &str, factor: impl Fn(usize) -> f32) {
    scale(graph, name, |at, k| factor(at % k));
}

fn scale_rows(graph: &mut Graph, name: &str, factor: impl Fn(usize) -> f32) {
    scale(graph, name, |at, k| factor(at / k));
}

/// `factor` gets the place of an element and the length of a row.
fn scale(graph: &mut Graph, name: &str, factor: impl Fn(usize, usize) -> f32) {
    let id = graph.find(name).expect("every tiny model has it");
    let k = graph.tensor(id).shape.last();
    let values = dequantize_constant(graph.tensor(id));
    let scaled: Vec<f32> = values.iter().enumerate().map(|(at, v)| *v as f32 * factor(at, k)).collect();
    let data = TensorData::Flat(Floats::from_f32(&scaled).bytes().clone());
    graph.replace_constant(id, DataType::Float32, None, data).expect("the same extents");
}

fn windows() -> Vec<Vec<u32>> {
    let mut rng = Rng(77);
    (0..6).map(|_| (0..24).map(|_| (rng.next() % crate::support::VOCAB as u64) as u32).collect()).collect()
}

/// Logits of all positions of the first window, on the float path, with `adapter` at strength 0.7.
fn logits(graph: &Graph, adapter: Option<&Folded>) -> Vec<f32> {
    let backend = HtpBackend::new(1).expect("one thread");
    let taps = vec![graph.find("logits").expect("every tiny model has it")];
    let probe = Probe { taps, max_window: 24, ..Probe::default() };
    let mut calibrator = Calibrator::new(graph, &probe, &backend).expect("it runs");
    let adapter = adapter.map(|folded| adapter_for_graph(graph, folded).expect("it fits"));
    calibrator.set_adapter(adapter, &vec![0.7; calibrator.n_strengths()]).expect("as many as there are");
    let mut all = Vec::new();
    calibrator.run(Feed::Ids(&windows()[0]), &mut |rows| all.extend_from_slice(rows.values)).expect("it runs");
    all
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (difference / b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>()).sqrt()
}

fn random_folded() -> Folded {
    let mut rng = Rng(21);
    let mut values = |n: usize| (0..n).map(|_| 0.3 * rng.float()).collect::<Vec<f32>>();
    let module = |(name, n, k): (&str, usize, usize)| FoldedModule {
        module: format!("model.layers.1.{name}"),
        rank: RANK,
        n,
        k,
        a_values: values(RANK * k),
        b_values: values(n * RANK),
    };
    let modules = [
        ("self_attn.q_proj", 32, 32),
        ("self_attn.v_proj", 16, 32),
        ("self_attn.o_proj", 32, 32),
        ("mlp.up_proj", 64, 32),
        ("mlp.down_proj", 32, 64),
        ("mlp.gate_proj", 64, 32),
    ];
    Folded { name: "a".to_owned(), rank: RANK, slots: Vec::new(), modules: modules.into_iter().map(module).collect() }
}

// Guards: equalization changes no result, lowers the error of weights that came off their grid, leaves those that lie on
// it and those beside a tensor whose encoding is given already, and says what it did.
#[test]
fn equalization_keeps_the_function_and_lowers_the_error() {
    let workers = Workers::new(2).expect("two threads");
    let graph = off_grid(false);
    let mut equalized = graph.clone();
    let reports = equalize(&mut equalized, SCHEMES, &workers).expect("a float graph");
    assert_eq!(reports.len(), 8, "two norms, v to o and up to down in each of two layers");
    let norms = reports.iter().filter(|report| report.source.ends_with("layernorm.weight"));
    let (before, after) = norms.fold((0.0, 0.0), |(a, b), r| (a + r.error_before, b + r.error_after));
    assert!(after < 0.9 * before, "{after} after {before}: {reports:?}");
    assert!(distance(&logits(&equalized, None), &logits(&graph, None)) < 1e-3);
    let mut again = graph.clone();
    equalize(&mut again, SCHEMES, &Workers::new(1).expect("one thread")).expect("a float graph");
    assert_eq!(again.metadata(), equalized.metadata(), "the factors do not depend on the number of workers");
    assert!(matches!(equalize(&mut equalized, SCHEMES, &workers), Err(ScalesError::Twice)));
    let on_grid = float_graph(&tiny("model", Tiny { forms: &[Form::Int4BlockMin], ..Tiny::default() }));
    let mut on_grid = on_grid.expect("plain constants");
    equalize(&mut on_grid, SCHEMES, &workers).expect("a float graph");
    assert!(ChannelScales::of(on_grid.metadata()).expect("none").is_empty(), "weights on the grid stay where they are");
    let mut encoded = graph.clone();
    for name in ["model.layers.0.input_layernorm", "model.layers.1.mlp.up_proj"] {
        let id = encoded.find(name).expect("every tiny model has it");
        let encoding = Encoding::ScaleOffset { bitwidth: 16, scale: 1e-4, offset: 0 };
        encoded.set_encoding(id, DataType::SFixedPoint16, Some(encoding)).expect("a computed tensor can have it");
    }
    let reports = equalize(&mut encoded, SCHEMES, &workers).expect("a float graph");
    assert_eq!(reports.len(), 6, "a reader's input and a source's output have encodings");
}

// Guards: an adapter has the effect on an equalized base that it has on the base it was trained on; one of another size is
// refused by the names.
#[test]
fn adapters_follow_an_equalized_base() {
    let graph = off_grid(true);
    let mut equalized = graph.clone();
    equalize(&mut equalized, SCHEMES, &Workers::new(1).expect("one thread")).expect("a float graph");
    let folded = random_folded();
    let (base, want) = (logits(&graph, None), logits(&graph, Some(&folded)));
    assert!(distance(&base, &want) > 0.05, "the adapter has an effect");
    assert!(distance(&logits(&equalized, Some(&folded)), &want) < 1e-3);
    let scales = ChannelScales::of(equalized.metadata()).expect("recorded just now");
    let mut wrong = folded;
    wrong.modules[0].k = 16;
    wrong.modules[0].a_values.truncate(RANK * 16);
    let refused = scales.apply_to(&mut wrong).expect_err("the extents differ").to_string();
    assert!(refused.contains("q_proj") && refused.contains("16 inputs") && refused.contains("32"), "{refused}");
}

// Guards: who compares an equalized model with the original knows by what each tensor was scaled, sums with an adapter's
// branch included.
#[test]
fn scaled_tensors_are_known_by_their_factors() {
    let graph = off_grid(false);
    let mut equalized = graph.clone();
    equalize(&mut equalized, SCHEMES, &Workers::new(1).expect("one thread")).expect("a float graph");
    let factors = ChannelScales::of(equalized.metadata()).expect("recorded just now").of_tensors(&equalized);
    let normed = "model.layers.0.input_layernorm";
    let values = |graph: &Graph| {
        let taps = vec![graph.find(normed).expect("every tiny model has it")];
        let probe = Probe { taps, max_window: 24, ..Probe::default() };
        let mut calibrator = Calibrator::new(graph, &probe, &HtpBackend::new(1).expect("one thread")).expect("it runs");
        let mut all = Vec::new();
        calibrator.run(Feed::Ids(&windows()[0]), &mut |rows| all.extend_from_slice(rows.values)).expect("it runs");
        all
    };
    let (scaled, want) = (values(&equalized), values(&graph));
    let mut undone = scaled.clone();
    factors[normed].undo(&mut undone);
    assert!(distance(&undone, &want) < 1e-3 && distance(&scaled, &want) > 0.05);

    let mut graph = off_grid(true);
    let list = "3c00".repeat(16);
    let record =
        format!("{{\"lists\":[\"{list}\"],\"modules\":{{\"model.layers.1.self_attn.v_proj\":{{\"outputs\":0}}}}}}");
    graph.set_metadata("channel_scales", &record);
    let factors = ChannelScales::of(graph.metadata()).expect("a record").of_tensors(&graph);
    let names: Vec<&str> = factors.keys().map(String::as_str).collect();
    assert_eq!(names, ["model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj.lora_add"]);
}

/// A float model whose gated channels are massive in one place, as those of language models are.
fn massive() -> Graph {
    let branch = Some((RANK, DataType::Float32));
    let mut graph = tiny("model", Tiny { seed: 5, ar: 32, cl: 32, branch, ..Tiny::default() });
    graph.set_metadata("lora_alpha_tensor", "lora_alpha");
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}.weight");
        scale_rows(&mut graph, &name("up_proj"), |row| if row == 5 { 300.0 } else { 1.0 });
        scale_columns(&mut graph, &name("down_proj"), |column| if column == 5 { 1.0 / 300.0 } else { 1.0 });
    }
    graph
}

fn smoothed(graph: &Graph, threads: usize) -> Graph {
    let (mut result, windows) = (graph.clone(), windows());
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let backend = HtpBackend::new(threads).expect("some threads");
    let reports = smooth(&mut result, &windows, SMOOTHING, &backend, &mut |_, _| {}).expect("a float graph");
    let massive = reports.iter().filter(|report| report.source.ends_with("up_proj"));
    assert!(massive.clone().count() == 2 && massive.clone().all(|report| report.is_sorted), "{reports:?}");
    assert!(massive.into_iter().all(|report| report.error_after < 0.1 * report.error_before), "{reports:?}");
    let again = smooth(&mut result, &windows, SMOOTHING, &backend, &mut |_, _| {});
    assert!(matches!(again, Err(SmoothError::Scales(ScalesError::Twice))));
    result
}

/// How many times larger than usual the largest channel is that the first layer's `down_proj` reads.
fn largest_channel(graph: &Graph) -> f32 {
    let down = graph.nodes().iter().find(|node| node.name == "model.layers.0.mlp.down_proj");
    let tap = down.expect("every tiny model has it").inputs[0];
    let probe = Probe { taps: vec![tap], max_window: 24, ..Probe::default() };
    let mut calibrator = Calibrator::new(graph, &probe, &HtpBackend::new(1).expect("one thread")).expect("it runs");
    let mut tops = vec![0.0f32; graph.tensor(tap).shape.last()];
    let mut see = |row: &[f32]| tops.iter_mut().zip(row).for_each(|(top, v)| *top = top.max(v.abs()));
    for window in windows() {
        let run =
            calibrator.run(Feed::Ids(&window), &mut |rows| rows.values.chunks_exact(rows.width).for_each(&mut see));
        run.expect("it runs");
    }
    tops.sort_by(f32::total_cmp);
    tops[tops.len() - 1] / tops[tops.len() / 2]
}

// Guards: smoothing changes no result of the base or of an adapter, gives the same factors with any number of workers, and
// makes massive channels fit one grid with the others.
#[test]
fn smoothing_keeps_the_function_and_saves_massive_channels() {
    let graph = massive();
    let smooth = smoothed(&graph, 2);
    assert_eq!(smooth.metadata(), smoothed(&graph, 1).metadata());
    let folded = random_folded();
    let float = logits(&graph, None);
    assert!(distance(&logits(&smooth, None), &float) < 1e-3);
    let want = logits(&graph, Some(&folded));
    assert!(distance(&float, &want) > 0.05, "the adapter has an effect");
    assert!(distance(&logits(&smooth, Some(&folded)), &want) < 1e-3);
    let (before, after) = (largest_channel(&graph), largest_channel(&smooth));
    assert!(before > 100.0 && after < 0.2 * before, "{before} times the usual before, {after} after");
}

// Guards: inputs that lose too much at 8 bits even when smoothed, and so get 16, keep their channels as they are.
#[test]
fn inputs_of_16_bits_are_not_smoothed() {
    let (graph, windows) = (massive(), windows());
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let backend = HtpBackend::new(1).expect("one thread");
    let smooth_for = |least_sqnr_db: f64| {
        let (mut result, options) = (graph.clone(), SmoothOptions { least_sqnr_db: Some(least_sqnr_db), ..SMOOTHING });
        let reports = smooth(&mut result, &windows, options, &backend, &mut |_, _| {}).expect("a float graph");
        (result, reports.iter().filter(|report| report.error_after < report.error_before).count())
    };
    let (all, n_all) = smooth_for(-100.0);
    assert_eq!(all.metadata(), smoothed(&graph, 1).metadata());
    let (none, n_none) = smooth_for(100.0);
    assert!(n_all > 0 && n_none == 0, "{n_all} and {n_none}");
    assert_eq!(none.metadata(), graph.metadata());
    assert!(distance(&logits(&none, None), &logits(&graph, None)) == 0.0);
}

// Guards: a record of scales that is no such record is refused, not taken for none.
#[test]
fn damaged_scales_are_refused() {
    for text in [
        "",
        "{}",
        r#"{"lists":["3c"],"modules":{}}"#,
        r#"{"lists":["0000"],"modules":{}}"#,
        r#"{"lists":[],"modules":{"m":{"inputs":0}}}"#,
        r#"{"lists":[],"orders":["00000000"],"modules":{"m":{"input_order":0}}}"#,
        r#"{"lists":[],"orders":["00000002"],"modules":{"m":{"output_order":0}}}"#,
        r#"{"lists":["7c00"],"modules":{}}"#,
        r#"{"lists":["äää"],"modules":{}}"#,
    ] {
        let metadata = [("channel_scales".to_owned(), text.to_owned())].into();
        assert!(ChannelScales::of(&metadata).is_err(), "{text}");
    }
}

/// Rows of inputs that hang together, as activations do.
fn correlated_inputs(k: usize, rows: usize) -> Vec<f32> {
    let mut rng = Rng(31);
    let mix: Vec<f32> = (0..k * 8).map(|_| rng.float()).collect();
    let mut all = Vec::new();
    for _ in 0..rows {
        let sources: Vec<f32> = (0..8).map(|_| rng.float()).collect();
        all.extend((0..k).map(|i| 0.3 * rng.float() + (0..8).map(|j| mix[i * 8 + j] * sources[j]).sum::<f32>()));
    }
    all
}

// Guards: error feedback makes the outputs of a matrix better than nearest codes do, for every scheme; and better scales
// make them better without it.
#[test]
fn feedback_reduces_the_output_error() {
    let (n, k) = (48, 64);
    let mut rng = Rng(8);
    let weights: Vec<f32> = (0..n * k).map(|_| rng.float() * rng.float()).collect();
    let bytes = weights.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
    let tensor = SourceTensor::new("w", vec![n, k], ElementFormat::F32, bytes).expect("a matrix");
    let inputs = correlated_inputs(k, 256);
    let mut moments = Moments::new(k);
    for x in inputs.chunks_exact(k) {
        for i in 0..k {
            (0..k).for_each(|j| moments.sums_mut()[i * k + j] += x[i] * x[j]);
        }
    }
    let importance = moments.diagonal();
    let feedback = Feedback::new(&moments, 0.01).expect("inputs were seen");
    let workers = Workers::new(2).expect("two threads");
    let error = |scheme, rounding: &Rounding<'_>| -> f64 {
        let quantized = quantize_with(&tensor, scheme, rounding, &workers).expect("finite weights");
        let tensor = support_tensor(&quantized, n, k);
        let values = dequantize_constant(&tensor);
        let differences: Vec<f64> = values.iter().zip(&weights).map(|(q, w)| q - f64::from(*w)).collect();
        let output = |x: &[f32], d: &[f64]| x.iter().zip(d).map(|(x, d)| f64::from(*x) * d).sum::<f64>().powi(2);
        inputs.chunks_exact(k).map(|x| differences.chunks_exact(k).map(|d| output(x, d)).sum::<f64>()).sum()
    };
    for scheme in [
        Scheme::AsymmetricBlock4 { block_size: 32 },
        Scheme::Block { bits: Bits::Four, block_size: 32 },
        Scheme::BlockExpansion4 { block_size: 32 },
        Scheme::PerChannel { bits: Bits::Four },
        Scheme::PerChannel { bits: Bits::Eight },
    ] {
        let nearest = error(scheme, &Rounding::NEAREST);
        let mse = Rounding { search: Search::Mse, importance: Some(&importance), feedback: None };
        let searched = error(scheme, &mse);
        let fed_back = error(scheme, &Rounding { feedback: Some(&feedback), ..mse });
        assert!(searched < nearest * 1.02, "{scheme:?}: {searched} after {nearest}");
        assert!(fed_back < nearest * 0.5, "{scheme:?}: {fed_back} after {nearest}");
    }
}

fn support_tensor(quantized: &qnn_core::offline::quantize_weights::Quantized, n: usize, k: usize) -> qnn_core::Tensor {
    qnn_core::Tensor {
        name: "w".to_owned(),
        tensor_type: qnn_core::TensorType::Static,
        data_type: quantized.data_type,
        shape: qnn_core::Shape::fixed(&[n, k]),
        encoding: Some(quantized.encoding.clone()),
        data: Some(TensorData::Flat(quantized.data.clone())),
    }
}

fn options(scheme: Scheme, method: Method) -> RoundingOptions {
    let embedding = Scheme::Block { bits: Bits::Eight, block_size: 32 };
    RoundingOptions { scheme, embedding, head: None, fit_blocks: false, method, equalize: true, wide_share: 0.0 }
}

// Guards: a whole model is rounded, is near what it was, and the report names each weight once; block steps survive a DLC
// and mean in panels exactly what they mean in the reference.
#[test]
fn models_are_rounded_layer_by_layer() {
    let backend = HtpBackend::new(2).expect("two threads");
    let graph = off_grid(false);
    let windows = windows();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let want = logits(&graph, None);
    let feedback = Method::Feedback { damping: 0.01 };
    let mut layers_seen = 0;
    let (rounded, report) = round_weights(&graph, &options(SCHEME, feedback), &windows, &backend, &mut |step| {
        layers_seen += usize::from(matches!(step, qnn_core::offline::rounding::RoundingStep::Layer { .. }));
    })
    .expect("it can be rounded");
    assert_eq!((layers_seen, report.weights.len(), report.groups.len()), (2, 15, 8));
    assert!(distance(&logits(&rounded, None), &want) < 0.02);
    let steps = Scheme::BlockExpansion4 { block_size: 16 };
    let (mut rounded, report) = round_weights(
        &graph,
        &RoundingOptions { wide_share: 0.2, ..options(steps, feedback) },
        &windows,
        &backend,
        &mut |_| {},
    )
    .expect("it can be rounded");
    let wide: u64 =
        report.weights.iter().filter(|w| w.bits == 8 && w.name.contains("layers")).map(|w| w.elements).sum();
    let all: u64 = report.weights.iter().filter(|w| w.name.contains("layers")).map(|w| w.elements).sum();
    assert!(wide > 0 && wide * 5 <= all, "{wide} of {all} are wide");
    assert!(distance(&logits(&rounded, None), &want) < 0.15);
    set_dynamic_activations(&mut rounded, DataType::SFixedPoint16, DataType::SFixedPoint8).expect("plain tensors");
    let path = std::env::temp_dir().join(format!("genie-rounding-{}.dlc", std::process::id()));
    dlc::write_dlc(&path, &rounded).expect("it can be stored");
    let read = dlc::read_dlc(&path).expect("it was written just now");
    std::fs::remove_file(&path).expect("it is there");
    let mut n_steps = 0;
    for tensor in read.tensors().iter().filter(|t| matches!(t.encoding, Some(Encoding::BlockExpansion { .. }))) {
        let want = dequantize_constant(tensor);
        let panels = pack_constant(tensor).expect("there is a kernel");
        let mut row = vec![0.0; tensor.shape.last()];
        for (n, want) in want.chunks_exact(row.len()).enumerate() {
            panels.view().dequantize_row(n, &mut row);
            assert!(row.iter().zip(want).all(|(have, want)| f64::from(*have) == *want), "{} row {n}", tensor.name);
        }
        n_steps += 1;
    }
    assert!(n_steps > 5);
}

// Guards: a head that is rounded like the layers gets a weight of its own, with their error feedback, and the embedding keeps
// its eight bits.
#[test]
fn a_head_of_four_bits_leaves_the_embedding() {
    let backend = HtpBackend::new(2).expect("two threads");
    let graph = off_grid(false);
    let windows = windows();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let want = logits(&graph, None);
    let round = |method| {
        let options = RoundingOptions { head: Some(SCHEME), ..options(SCHEME, method) };
        round_weights(&graph, &options, &windows, &backend, &mut |_| {}).expect("it can be rounded")
    };
    let (rounded, report) = round(Method::Feedback { damping: 0.01 });
    let bits = |name: &str| report.weights.iter().find(|weight| weight.name == name).map(|weight| weight.bits);
    assert_eq!(
        (bits("lm_head.weight"), bits("model.embed_tokens.weight"), report.weights.len()),
        (Some(4), Some(8), 16)
    );
    let fed_back = distance(&logits(&rounded, None), &want);
    let nearest = distance(&logits(&round(Method::Nearest).0, None), &want);
    assert!(fed_back < 0.05 && fed_back < nearest, "{fed_back}, nearest {nearest}");
    assert_eq!(report.weights.iter().filter(|weight| weight.bits == 8).count(), 1);
}

// Guards: a head with a weight of its own is equalized and smoothed for its own grid, not for that of the layers.
#[test]
fn a_heads_channels_are_scaled_for_its_grid() {
    let (tied, mut graph) = (off_grid(false), Graph::new("model"));
    tied.metadata().iter().for_each(|(key, value)| graph.set_metadata(key, value));
    for tensor in tied.tensors() {
        graph.add_tensor(tensor.clone()).expect("as before");
    }
    let table = tied.tensor(tied.find("model.embed_tokens.weight").expect("it has one")).clone();
    let own = graph.add_tensor(qnn_core::Tensor { name: "lm_head.weight".to_owned(), ..table }).expect("a new name");
    for mut node in tied.nodes().iter().cloned() {
        if node.name == "logits" {
            (node.name, node.inputs[1]) = ("lm_head".to_owned(), own);
        }
        graph.add_node(node).expect("as before");
    }
    graph.finalize().expect("it is complete");
    let (backend, windows) = (HtpBackend::new(1).expect("one thread"), windows());
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let error = |head: Option<Scheme>| {
        let options = RoundingOptions { head, embedding: EIGHT, ..options(SCHEME, Method::Nearest) };
        let (_, report) = round_weights(&graph, &options, &[], &backend, &mut |_| {}).expect("it can");
        let smoothing =
            SmoothOptions { weights: Some(Schemes { layers: SCHEME, head: head.unwrap_or(EIGHT) }), ..SMOOTHING };
        let reports = smooth(&mut graph.clone(), &windows, smoothing, &backend, &mut |_, _| {}).expect("a float graph");
        let equalized = report.groups.iter().find(|group| group.readers == ["lm_head"]).expect("a norm's reader");
        let smoothed = reports.iter().find(|group| group.readers == ["lm_head"]).expect("a norm's reader");
        [equalized.error_before, smoothed.error_before]
    };
    let (eight, four) = (error(None), error(Some(SCHEME)));
    assert!((0..2).all(|i| eight[i] < 0.3 * four[i]), "{eight:?} at 8 bits, {four:?} at 4");
}

// Guards: what cannot be done is refused, with the names and numbers.
#[test]
fn impossible_roundings_are_refused() {
    let backend = HtpBackend::new(1).expect("one thread");
    let graph = off_grid(false);
    let why = |graph: &Graph, options: RoundingOptions| {
        round_weights(graph, &options, &[], &backend, &mut |_| {}).expect_err("it has to be refused")
    };
    let feedback = Method::Feedback { damping: 0.01 };
    assert!(matches!(why(&graph, options(SCHEME, feedback)), RoundingError::NoCalibration));
    let (whole, _) =
        round_weights(&graph, &options(SCHEME, Method::Nearest), &[], &backend, &mut |_| {}).expect("it can");
    let mut headless = graph.clone();
    let (from, to) = [&whole, &graph].map(|graph| graph.find("model.embed_tokens.weight").expect("it has one")).into();
    let table = whole.tensor(from).clone();
    let data = table.data.expect("a constant");
    headless.replace_constant(to, table.data_type, table.encoding, data).expect("the same shape");
    let head = RoundingOptions { head: Some(SCHEME), ..options(SCHEME, Method::Nearest) };
    assert!(matches!(why(&headless, head), RoundingError::NoHead { .. }));
    let share = RoundingOptions { wide_share: 1.5, ..options(SCHEME, Method::Mse) };
    assert!(why(&graph, share).to_string().contains("1.5"));
    let block = why(&graph, options(Scheme::AsymmetricBlock4 { block_size: 24 }, Method::Nearest)).to_string();
    assert!(block.contains("blocks of 24 in rows of") && block.contains("8, 16, 32"), "{block}");
    let integers = tiny("model", Tiny { forms: &[Form::Int8Channel], ..Tiny::default() });
    assert!(matches!(why(&integers, options(SCHEME, Method::Mse)), RoundingError::NothingToRound { .. }));
    assert!(Feedback::new(&Moments::new(8), 0.01).is_none(), "nothing was seen");
}

// Guards: an input of matrices that holds what is not finite is refused by its name, by rounding and by smoothing.
#[test]
fn inputs_that_are_not_finite_are_named() {
    let (backend, windows) = (HtpBackend::new(1).expect("one thread"), windows());
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    for value in [f32::NAN, f32::INFINITY] {
        let mut graph = off_grid(false);
        scale_columns(&mut graph, "model.layers.1.input_layernorm.weight", |_| value);
        let options = RoundingOptions { equalize: false, ..options(SCHEME, Method::Mse) };
        let rounding = round_weights(&graph, &options, &windows, &backend, &mut |_| {}).expect_err("by name");
        let smoothing = smooth(&mut graph, &windows, SMOOTHING, &backend, &mut |_, _| {}).expect_err("by name");
        for error in [rounding.to_string(), smoothing.to_string()] {
            assert!(error.starts_with("tensor model.layers.1.input_layernorm: "), "{error}");
            assert!(error.ends_with("values are not finite; it cannot be calibrated"), "{error}");
        }
    }
}
