//! The promises of the quantizer: every input of a matrix gets an encoding that covers what the text showed, adapters get
//! their own, both backends follow them, and what cannot be calibrated is refused by name.

use std::{process::Command, sync::Arc};

use crate::support::{Rng, Runner, Tiny, VOCAB, check_stdout, random_adapter, tiny};
use htp_sim::Workers;
use qnn_core::{
    Adapter, Bytes, Context, ContextBuilder, DataType, Encoding, Graph, SectionError, Tensor, TensorData, TensorType,
    adapter::TensorEncoding,
    backend::{HtpBackend, ReferenceBackend},
    binary::Verify,
    offline::{
        arch::{Grouping, WeightType},
        dlc::{read_dlc, write_dlc},
        encodings::{EncodingsFile, override_encodings},
        quantize::{
            Activations, Calibration, QuantizeError, QuantizeOptions, Schema, Tools, encode, matrix_inputs, observe,
            quantize,
            text::{read_ids, read_list},
        },
        quantize_weights::Bits,
    },
};

const RANK: usize = 4;

fn options(bits: u8) -> QuantizeOptions {
    let calibration = Calibration::Mse;
    QuantizeOptions {
        weights: WeightType::Int { bits: Bits::Eight, grouping: Grouping::Default },
        activations: Activations { bits, calibration, schema: Schema::Asymmetric, least_sqnr_db: None },
        cache: Some(qnn_core::offline::arch::CacheType::F32),
    }
}

/// A float model; with branches that may bring encodings of their own, if `branch`.
fn model(branch: bool) -> Graph {
    let branch = branch.then_some((RANK, DataType::SFixedPoint8));
    let mut graph = tiny("model", Tiny { seed: 3, ar: 32, cl: 32, branch, ..Tiny::default() });
    if branch.is_some() {
        graph.set_metadata("lora_alpha_tensor", "lora_alpha");
        graph.set_metadata("quant_updatable_mode", "all");
    }
    graph
}

fn ids(seed: u64, n: usize) -> Vec<u32> {
    let mut rng = Rng(seed);
    (0..n).map(|_| (rng.next() % VOCAB as u64) as u32).collect()
}

fn with_tools<T>(work: impl FnOnce(&mut Tools<'_>) -> T) -> T {
    let (backend, workers) = (HtpBackend::new(1).expect("one thread"), Workers::new(1).expect("one thread"));
    work(&mut Tools { backend: &backend, workers: &workers, progress: &mut |_| {} })
}

fn quantized(graph: &Graph, bits: u8) -> Graph {
    let text = ids(1, 64);
    let windows: Vec<&[u32]> = text.chunks(32).collect();
    with_tools(|tools| quantize(graph, &windows, &options(bits), None, tools)).expect("it can be quantized").0
}

fn logits(graph: &Graph, htp: bool, adapter: Option<Arc<Adapter>>) -> Vec<f32> {
    let ids: Vec<i32> = ids(1, 20).iter().map(|id| *id as i32).collect();
    let backend = HtpBackend::new(2).expect("two threads");
    let mut runner = if htp { Runner::new(&backend, graph) } else { Runner::new(&ReferenceBackend, graph) };
    runner.run(&ids, adapter, 1.0)
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let size = b.iter().map(|v| v * v).sum::<f32>().sqrt();
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt() / size
}

// Broken if an input of a matrix stays without encoding, an encoding does not fit what the tensor holds, or the backends
// follow it differently.
#[test]
fn matrix_inputs_get_encodings_that_fit() {
    let graph = model(false);
    let float = logits(&graph, false, None);
    for (bits, bound) in [(16, 0.02), (8, 0.1)] {
        let quantized = quantized(&graph, bits);
        let inputs = matrix_inputs(&quantized);
        assert_eq!(inputs.len(), 2 * 4 + 1, "four of each layer and the head's");
        for id in inputs {
            let tensor = quantized.tensor(id);
            assert!(matches!(tensor.encoding, Some(Encoding::ScaleOffset { bitwidth, .. }) if bitwidth == bits));
        }
        let (htp, reference) = (logits(&quantized, true, None), logits(&quantized, false, None));
        assert!(distance(&htp, &reference) < 1e-3, "{bits} bits: {}", distance(&htp, &reference));
        assert!(distance(&htp, &float) < bound, "{bits} bits: {} off float", distance(&htp, &float));
    }
}

// Broken if what an encodings file has as floats becomes integers though the report says that it is left as it is, or if
// the backends then differ.
#[test]
fn what_a_file_has_as_floats_stays_floats() {
    let graph = model(false);
    let (weight, input) = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.input_layernorm");
    let json = serde_json::json!({"version": "2.0.0", "encodings": [
        {"name": weight, "output_dtype": "float16"}, {"name": input, "output_dtype": "float16"},
    ]});
    let file = EncodingsFile::parse(json.to_string().as_bytes()).expect("AIMET's form");
    let text = ids(1, 32);
    let done = with_tools(|tools| quantize(&graph, &[&text], &options(8), Some(&file), tools)).expect("it can be");
    let (quantized, overrides) = (done.0, done.1.overrides.expect("there was a file"));
    assert_eq!(overrides.passed_over.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [weight, input]);
    for name in [weight, input] {
        let [now, before] = [&quantized, &graph].map(|graph| graph.tensor(graph.find(name).expect("it is there")));
        assert!(now.data_type == before.data_type && now.encoding.is_none(), "{name} is {}", now.data_type);
    }
    let (htp, reference) = (logits(&quantized, true, None), logits(&quantized, false, None));
    assert!(distance(&htp, &reference) < 1e-3, "{}", distance(&htp, &reference));
    // What is integers already is not called floats.
    let rounded = with_tools(|tools| quantize(&graph, &[&text], &options(8), None, tools)).expect("it can be").0;
    let (_, report) = override_encodings(&rounded, &file).expect("it is for this model");
    assert!(report.passed_over[0].1.contains("here it is integers"), "{report:?}");
    assert_eq!(report.passed_over[1].1, "the file has it as floats");
}

// Broken if a section loses an adapter's encodings, if they do not hold after an apply, or if they stay after it is gone.
#[test]
fn adapters_bring_their_own_encodings() {
    let graph = model(true);
    let quantized = quantized(&graph, 16);
    let bytes = ContextBuilder::new().graph(quantized.clone()).to_binary().expect("it can be stored");
    let context = Context::from_binary(bytes.into(), Verify::Checksums).expect("it was written just now");
    let plain = random_adapter(&context, "a", 3, RANK, &["layers"]);
    // Half the base's range: what the adapter holds outside of it is cut off, which shows.
    let name = "model.layers.0.input_layernorm";
    let own = |bits: u8, shrink: f32| {
        let tensor = quantized.tensor(quantized.find(name).expect("every tiny model has it"));
        assert_eq!(tensor.tensor_type, TensorType::UpdateableNative);
        let Some(Encoding::ScaleOffset { scale, offset, .. }) = tensor.encoding else { panic!("no encoding") };
        let encoding = Encoding::ScaleOffset { bitwidth: bits, scale: scale * shrink, offset };
        (name.to_owned(), TensorEncoding { data_type: tensor.data_type, encoding })
    };
    let with = |encodings: Vec<(String, TensorEncoding)>| {
        let plain = random_adapter(&context, "a", 3, RANK, &["layers"]);
        plain.with_encodings(encodings).expect("a computed tensor can have it")
    };
    let section = context.section(&with(vec![own(16, 0.5)])).expect("it fits");
    assert_eq!(
        context.section(&context.load_section(Bytes::from(section.clone())).expect("it fits")).expect("it fits"),
        section
    );
    let tailored = context.apply_section(None, Bytes::from(section)).expect("it fits");
    let Some(Encoding::ScaleOffset { scale, .. }) = context.encoding("model", name) else { panic!("no encoding") };
    let Some(Encoding::ScaleOffset { scale: base, .. }) =
        quantized.tensor(quantized.find(name).expect("there")).encoding
    else {
        panic!("no encoding")
    };
    assert_eq!(scale, base * 0.5);
    let htp = logits(&quantized, true, Some(Arc::clone(&tailored)));
    assert!(distance(&htp, &logits(&quantized, false, Some(tailored))) < 1e-3);
    assert!(distance(&htp, &logits(&quantized, true, Some(Arc::new(plain)))) > 1e-3, "the cut-off values have to show");
    context.clear(None).expect("all graphs");
    assert!(matches!(context.encoding("model", name), Some(Encoding::ScaleOffset { scale, .. }) if scale == base));

    // A tensor that no one declared as updatable, and one that is not there.
    let refused = |encodings| context.section(&with(encodings)).expect_err("it does not fit");
    let elsewhere = |tensor: &str| vec![(tensor.to_owned(), own(16, 1.0).1)];
    assert!(matches!(refused(elsewhere("model.embed_tokens")), SectionError::Encoding { .. }));
    assert!(matches!(refused(elsewhere("nowhere")), SectionError::UnknownTensor { .. }));
}

// Broken if an adapter's wider encodings are refused or stay narrow when it is applied, or if something of them is left when
// it is gone.
#[test]
fn an_adapter_may_need_more_bits_than_its_base() {
    let float = model(true);
    let quantized = quantized(&float, 8);
    let bytes = ContextBuilder::new().graph(quantized.clone()).to_binary().expect("it can be stored");
    let context = Context::from_binary(bytes.into(), Verify::Checksums).expect("it was written just now");
    let plain = || random_adapter(&context, "a", 3, RANK, &["layers"]);
    let (taps, text) = (matrix_inputs(&quantized), ids(1, 20));
    let seen = with_tools(|tools| observe(&float, &taps, &[&text], Some(&Arc::new(plain())), tools)).expect("it runs");
    let own = |bits: u8| -> Vec<(String, TensorEncoding)> {
        let own = taps.iter().zip(&seen).map(|(id, seen)| {
            let tensor = quantized.tensor(*id);
            assert!(matches!(tensor.encoding, Some(Encoding::ScaleOffset { bitwidth: 8, .. })), "its base has 8");
            let encoding = encode(&tensor.name, seen, options(bits).activations).expect("all are finite").encoding.1;
            (tensor.name.clone(), TensorEncoding { data_type: tensor.data_type, encoding })
        });
        own.collect()
    };
    let section =
        |bits| context.section(&plain().with_encodings(own(bits)).expect("computed tensors")).expect("it fits");
    let [wide, narrow] = [16, 8].map(|bits| context.load_section(section(bits).into()).expect("it fits"));

    let exact = logits(&float, false, Some(Arc::clone(&wide)));
    let found = logits(&quantized, true, Some(Arc::clone(&wide)));
    assert!(distance(&found, &logits(&quantized, false, Some(Arc::clone(&wide)))) < 1e-3);
    let (wide_off, narrow_off) = (distance(&found, &exact), distance(&logits(&quantized, true, Some(narrow)), &exact));
    assert!(wide_off < narrow_off / 2.0, "{wide_off} off the floats with 16 bits, {narrow_off} with 8");

    // One runner: with the adapter, and then without it.
    let ids: Vec<i32> = ids(1, 20).iter().map(|id| *id as i32).collect();
    let backend = HtpBackend::new(2).expect("two threads");
    let mut runner = Runner::new(&backend, &quantized);
    let before = runner.run(&ids, None, 1.0);
    assert_eq!(runner.run(&ids, Some(wide), 1.0), found);
    assert_eq!(runner.run(&ids, None, 1.0), before);

    // Where the base's type has no room for them they are refused.
    let mut tight = quantized.clone();
    let id = matrix_inputs(&tight)[0];
    let (name, encoding) = (tight.tensor(id).name.clone(), tight.tensor(id).encoding.clone());
    tight.set_encoding(id, DataType::UFixedPoint8, encoding).expect("8 bits in 8");
    let bytes = ContextBuilder::new().graph(tight).to_binary().expect("it can be stored");
    let tight = Context::from_binary(bytes.into(), Verify::Checksums).expect("it was written just now");
    let adapter = random_adapter(&tight, "a", 3, RANK, &["layers"]);
    let adapter = adapter.with_encodings(own(16)).expect("computed tensors");
    let error = tight.section(&adapter).expect_err("16 bits in 8").to_string();
    assert!(error.contains(&name) && error.contains("16 bits, need 2 to 8"), "{error}");
}

// Broken if calibration runs without the adapter: its observers then see what the base's see.
#[test]
fn observers_see_the_adapter() {
    let graph = model(true);
    let context = ContextBuilder::new().graph(graph.clone()).to_binary().expect("it can be stored");
    let context = Context::from_binary(context.into(), Verify::Checksums).expect("it was written just now");
    let adapter = Arc::new(random_adapter(&context, "a", 3, RANK, &["layers"]));
    let floats: Vec<_> = adapter
        .values()
        .map(|(name, panels)| {
            let (n, k) = (panels.layout().n(), panels.layout().k());
            let mut bytes = Vec::new();
            for row in 0..n {
                let mut values = vec![0.0; k];
                panels.view().dequantize_row(row, &mut values);
                bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            }
            let (shape, data) = (qnn_core::Shape::fixed(&[n, k]), Some(TensorData::Flat(bytes.into())));
            let (tensor_type, data_type) = (TensorType::Static, DataType::Float32);
            let tensor = Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding: None, data };
            (name.to_owned(), qnn_core::backend::htp::pack_constant(&tensor).expect("floats have kernels"))
        })
        .collect();
    let adapter = Arc::new(Adapter::new("a", Arc::clone(adapter.names()), floats).expect("names of the context"));
    let tap = graph.find("model.layers.1.self_attn").expect("every tiny model has it");
    let text = ids(1, 32);
    let see = |adapter| with_tools(|tools| observe(&graph, &[tap], &[&text], adapter, tools)).expect("it runs");
    let (base, adapted) = (see(None), see(Some(&adapter)));
    assert_eq!(base[0].count(), 32 * 32);
    assert_ne!(base[0].range(), adapted[0].range());
}

// Broken if numbers that are none, or no text at all, end in a silent encoding.
#[test]
fn what_cannot_be_calibrated_is_refused() {
    let mut graph = Graph::new("model");
    for tensor in model(false).tensors() {
        let mut tensor = tensor.clone();
        if tensor.name == "model.norm.weight" {
            let bytes: Vec<u8> = (0..32).flat_map(|_| f32::NAN.to_le_bytes()).collect();
            tensor.data = Some(TensorData::Flat(bytes.into()));
        }
        graph.add_tensor(tensor).expect("as before");
    }
    for node in model(false).nodes() {
        graph.add_node(node.clone()).expect("as before");
    }
    let text = ids(1, 32);
    let error = with_tools(|tools| quantize(&graph, &[&text], &options(8), None, tools)).expect_err("NaN");
    assert!(
        matches!(error, QuantizeError::NotFinite { ref tensor, count: 1024, .. } if tensor == "model.norm"),
        "{error}"
    );
    let keep = QuantizeOptions { weights: WeightType::Keep, ..options(8) };
    let error = with_tools(|tools| quantize(&model(false), &[&text], &keep, None, tools)).expect_err("floats");
    assert!(matches!(error, QuantizeError::NothingToDo), "{error}");
    // Without text the inputs are quantized row by row, and nothing is static.
    let (dynamic, report) =
        with_tools(|tools| quantize(&model(false), &[], &options(8), None, tools)).expect("it can be");
    assert!(report.tensors.is_empty() && report.weights > 0);
    let types = matrix_inputs(&dynamic).into_iter().map(|id| dynamic.tensor(id).clone());
    assert!(types.into_iter().all(|t| t.data_type == DataType::SFixedPoint8 && t.encoding.is_none()));
}

// Broken if files that hold no ids, or cut ones, calibrate with less than was asked for, without a word.
#[test]
fn files_without_ids_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let error = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("it can be written");
        let done = if name == "list" { read_list(&path).map(|_| ()) } else { read_ids(&path).map(|_| ()) };
        let error = done.expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    assert!(error("empty.json", b"[]").contains("no token ids"));
    assert!(error("empty.raw", b"").contains("no token ids"));
    assert!(error("cut.raw", &[0; 6]).contains("6 bytes, need a multiple of 4"));
    assert!(error("words.json", b"[\"a\"]").contains("expected u32"));
    assert!(error("list", b"# nothing\n\n").contains("need at least one"));
}

// Guards: the tokenizer's files are copied beside the new DLC, and are left alone where that is their own folder, however it
// is spelled.
#[test]
fn tokenizer_files_survive_and_travel() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    write_dlc(&path("model.dlc"), &model(false)).expect("it can be written");
    for name in names {
        std::fs::write(path(name), name).expect("it can be written");
    }
    std::fs::create_dir(path("other")).expect("it can be made");
    let mut cases = vec![("./model.dlc", None), ("model.dlc", Some("other/../made.dlc"))];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.path(), path("link")).expect("it can be made");
        cases.push(("link/model.dlc", Some("made.dlc")));
    }
    cases.push(("model.dlc", Some("other/made.dlc")));
    for (input, output) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
        command.current_dir(folder.path()).args(["-i", input, "--float_fallback"]);
        if let Some(output) = output {
            command.args(["-o", output]);
        }
        let done = command.output().expect("the tool starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        for name in names {
            assert_eq!(std::fs::read_to_string(path(name)).expect("it is there"), name, "{input} to {output:?}");
        }
    }
    for name in names {
        assert_eq!(std::fs::read_to_string(path("other").join(name)).expect("it was copied"), name);
    }
}

// Guards: an output that cannot be written is refused before any work, which would be lost.
#[test]
fn a_folder_as_output_is_refused_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
    let done = command.args(["-i", "nowhere.dlc", "-o"]).arg(folder.path()).output().expect("the tool starts");
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && error.contains("is a folder; name the file"), "{error}");
}

// Guards: no output replaces an input, nor is replaced by the tokenizer's files, and that is found before any work.
#[test]
fn outputs_replace_no_inputs() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    write_dlc(&path("m.dlc"), &model(false)).expect("it can be written");
    std::fs::write(path("m_encodings.json"), "{}").expect("it can be written");
    std::fs::write(path("list.txt"), "ids.json").expect("it can be written");
    std::fs::write(path("ids.json"), "[1]").expect("it can be written");
    let before = ["m.dlc", "m_encodings.json", "list.txt", "ids.json"].map(|name| (name, std::fs::read(path(name))));
    let cases: [(&[&str], &str); 5] = [
        (&["-o", "./m.dlc"], "--output_dlc ./m.dlc: it is the file of --input_dlc too"),
        (&["-o", "ids.json", "--input_list", "list.txt"], "the calibration set too"),
        (&["-o", "list.txt", "--input_list", "list.txt"], "--input_list too"),
        (
            &["-o", "none/../m.bin", "--quantization_overrides", "m_encodings.json", "--dump_encoding_json"],
            "--quantization_overrides too",
        ),
        (&["-o", "tokenizer_config.json"], "the name of a file that is written beside a DLC"),
    ];
    for (arguments, want) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
        command.current_dir(folder.path()).args(["-i", "m.dlc", "--float_fallback"]).args(arguments);
        let done = command.output().expect("the tool starts");
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && error.contains(want), "{arguments:?}: {error}");
    }
    for (name, content) in before {
        assert_eq!(std::fs::read(path(name)).expect("it is there"), content.expect("it was there"), "{name}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("it is there").count(), 4);
}

// Guards: ids that the model does not have are refused by their file before weights are rounded for nothing.
#[test]
fn foreign_ids_are_refused_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    write_dlc(&path("m.dlc"), &model(false)).expect("it can be written");
    std::fs::write(path("list.txt"), "good.json\nforeign.json").expect("it can be written");
    let good: Vec<usize> = (0..VOCAB).collect();
    std::fs::write(path("good.json"), format!("{good:?}")).expect("it can be written");
    std::fs::write(path("foreign.json"), format!("[1, {VOCAB}]")).expect("it can be written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
    command.current_dir(folder.path()).args(["-i", "m.dlc", "--input_list", "list.txt", "--calibration_window", "32"]);
    let done = command.output().expect("the tool starts");
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && error.contains("foreign.json: token id 40, the model has 40: need 0 to 39"));
    assert_eq!(error.lines().count(), 1, "work was done: {error}");
}

// Guards: a closed or full standard output ends in no panic, and costs none of the files.
#[test]
fn standard_output_may_fail() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    write_dlc(&path("m.dlc"), &model(false)).expect("it can be written");
    std::fs::write(path("tokenizer.json"), "{}").expect("it can be written");
    check_stdout(|| {
        let _ = std::fs::remove_dir_all(path("out"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
        command.current_dir(folder.path()).args(["-i", "m.dlc", "-o", "out/q.dlc", "--float_fallback"]);
        command.arg("--dump_encoding_json");
        command
    });
    for name in ["q.dlc", "tokenizer.json", "q_encodings.json"] {
        assert!(path("out").join(name).is_file(), "{name}");
    }
}

// Guards: a number of nothing is refused before any work, by its flag.
#[test]
fn no_windows_are_refused_by_their_flags() {
    for flag in ["--calibration_window", "--calibration_windows"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
        let done = command.args(["-i", "nowhere.dlc", flag, "0"]).output().expect("the tool starts");
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && error.contains(&format!("{flag} 0, need at least 1")), "{error}");
    }
}

// Guards: flags that would have no effect are refused, and by their names.
#[test]
fn flags_without_effect_are_refused() {
    for flag in [&["--block_size", "32"][..], &["--use_per_channel_quantization"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"));
        command.args(["-i", "nowhere.dlc", "--float_fallback", "--weights_bitwidth", "16"]).args(flag);
        let done = command.output().expect("the tool starts");
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && error.contains(flag[0]) && error.contains("4 or 8"), "{error}");
    }
}

// Broken if the tool with its default flags refuses a model whose weights are integers already, or changes them.
#[test]
fn the_tool_calibrates_integer_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let (integers, _) = with_tools(|tools| quantize(&model(false), &[], &options(8), None, tools)).expect("no text");
    write_dlc(&path("integers.dlc"), &integers).expect("it can be written");
    std::fs::write(path("ids.json"), format!("{:?}", ids(1, 64))).expect("it can be written");
    std::fs::write(path("list.txt"), "ids.json").expect("it can be written");
    for bits in ["16", "8"] {
        let done = Command::new(env!("CARGO_BIN_EXE_qairt-quantizer"))
            .current_dir(folder.path())
            .args(["-i", "integers.dlc", "-o", "static.dlc", "--input_list", "list.txt", "--calibration_window", "32"])
            .args(["--act_bitwidth", bits])
            .output()
            .expect("the tool starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let made = read_dlc(&path("static.dlc")).expect("it was written just now");
        assert!(matrix_inputs(&made).into_iter().all(|id| made.tensor(id).encoding.is_some()));
        let weights = |graph: &Graph| -> Vec<(String, Vec<u8>)> {
            let bytes = |tensor: &Tensor| match tensor.data.as_ref()? {
                TensorData::Flat(bytes) => Some((tensor.name.clone(), bytes.to_vec())),
                TensorData::Panels(panels) => Some((tensor.name.clone(), panels.bytes().to_vec())),
            };
            graph.tensors().iter().filter_map(bytes).collect()
        };
        assert!(weights(&made) == weights(&integers), "weights changed");
    }
}
