//! Models in both formats become graphs that compute what the models' definitions say.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use genie_workspace::gguf_writer::GgufWriter;
use genie_workspace::tiny_model::TinyModel;
use qnn_core::backend::htp::HtpBackend;
use qnn_core::backend::reference::ReferenceBackend;
use qnn_core::offline::arch::{ActivationBits, CacheType, Grouping, Precision, WeightType};
use qnn_core::offline::config::RopeBase;
use qnn_core::offline::convert::{ConvertOptions, ConvertReport, convert};
use qnn_core::offline::quantize_weights::Bits;
use qnn_core::offline::{dlc, source::Source, specialize};
use qnn_core::{Backend, Bindings, Graph};

const FLOAT: Precision =
    Precision { weights: WeightType::F32, activations: ActivationBits::Sixteen, cache: Some(CacheType::F32) };

fn import(input: &Path, precision: Precision) -> (Graph, ConvertReport) {
    let output = input.with_extension("dlc");
    let options = ConvertOptions { input: input.to_owned(), output: output.clone(), precision, threads: 2 };
    let report = convert(&options, &mut |_| {}).unwrap();
    (dlc::read_dlc(&output).unwrap(), report)
}

fn write_hf(model: &TinyModel) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    model.write_hf(&path).unwrap();
    (folder, path)
}

/// Logits of `rows` after all of `ids` went through `graph` in pieces of `step`.
fn logits(backend: &dyn Backend, graph: &Graph, ids: &[i32], rows: &[usize], step: usize) -> Vec<Vec<f32>> {
    let mut executable = backend.prepare(graph).unwrap();
    let mut state = backend.new_state(&[graph], 64).unwrap();
    let mut bindings = Bindings::new(graph);
    let mut found = Vec::new();
    for (piece, ids) in ids.chunks(step).enumerate() {
        let start = piece * step;
        let inside = |row: &&usize| (start..start + ids.len()).contains(*row);
        let wanted: Vec<i32> = rows.iter().filter(inside).map(|row| (row - start) as i32).collect();
        let positions: Vec<i32> = (start..start + ids.len()).map(|p| p as i32).collect();
        let inputs: [(&str, &[i32]); 4] = [
            ("input_ids", ids),
            ("position_ids", &positions),
            ("cache_index", &[start as i32]),
            ("logit_indices", &wanted),
        ];
        for (name, values) in inputs {
            let index = bindings.find_input(name).unwrap();
            bindings.set_i32(index, values).unwrap();
        }
        executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        let out = bindings.output_f32(bindings.find_output("logits").unwrap());
        found.extend(out.chunks(67).take(wanted.len()).map(<[f32]>::to_vec));
    }
    found
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

struct Golden {
    ids: Vec<i32>,
    rows: Vec<usize>,
    logits: serde_json::Value,
}

impl Golden {
    fn read() -> Golden {
        let text = include_str!("golden/tiny_logits.json");
        let all: serde_json::Value = serde_json::from_str(text).unwrap();
        let list = |key: &str| all[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
        Golden {
            ids: list("ids").into_iter().map(|id| id as i32).collect(),
            rows: list("rows").into_iter().map(|row| row as usize).collect(),
            logits: all["logits"].clone(),
        }
    }

    fn of(&self, model: &TinyModel) -> Vec<Vec<f32>> {
        let floats = |row: &serde_json::Value| {
            row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect::<Vec<f32>>()
        };
        self.logits[model.model_type].as_array().unwrap().iter().map(floats).collect()
    }
}

/// Guards: every architecture computes what its definition says, on both backends, in one piece and token by token.
#[test]
fn float_graphs_match_the_definition() {
    let golden = Golden::read();
    for model in TinyModel::every_architecture(7) {
        let (_folder, path) = write_hf(&model);
        let (graph, report) = import(&path, FLOAT);
        assert_eq!(report.architecture, model.model_type);
        let graph = specialize(&graph, "test", 16, 64).unwrap();
        let want = golden.of(&model);
        let htp = HtpBackend::new(2).unwrap();
        for (backend, bound) in [(&ReferenceBackend as &dyn Backend, 1e-5), (&htp, 1e-3)] {
            for step in [16, 3, 1] {
                let have = logits(backend, &graph, &golden.ids, &golden.rows, step);
                let error = worst(&have, &want);
                assert!(error < bound, "{} in steps of {step}: off by {error}", model.model_type);
            }
        }
    }
}

/// Guards: a GGUF's names, row order and metadata lead to the very graph that the Hugging Face directory gives.
#[test]
fn gguf_and_hf_give_the_same_graph() {
    for model in [TinyModel::llama(3), TinyModel::qwen2(3)] {
        let (folder, path) = write_hf(&model);
        let gguf_path = folder.path().join("other.gguf");
        std::fs::write(&gguf_path, model.gguf(model.model_type == "llama").finish()).unwrap();
        let (hf, gguf) = (import(&path, FLOAT).0, import(&gguf_path, FLOAT).0);
        assert_eq!(hf.nodes(), gguf.nodes());
        for (a, b) in hf.tensors().iter().zip(gguf.tensors()) {
            assert_eq!(a.name, b.name);
            assert_eq!(a.shape, b.shape, "{}", a.name);
            let bytes = |t: &qnn_core::Tensor| match &t.data {
                Some(qnn_core::TensorData::Flat(bytes)) => bytes.to_vec(),
                _ => Vec::new(),
            };
            assert_eq!(bytes(a), bytes(b), "{}", a.name);
        }
    }
}

/// Guards: any part of a split GGUF opens the whole model, and parts that are missing or do not belong together are refused.
#[test]
fn split_gguf_is_joined() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = TinyModel::qwen2(3).gguf(false);
    std::fs::write(path("whole.gguf"), model.finish()).unwrap();
    let parts = model.split(3);
    let name = |part: usize| format!("m-0000{part}-of-00003.gguf");
    for (i, part) in parts.iter().enumerate() {
        std::fs::write(path(&name(i + 1)), part.finish()).unwrap();
    }
    let dlc_of = |name: &str| {
        import(&path(name), FLOAT);
        std::fs::read(path(name).with_extension("dlc")).unwrap()
    };
    let whole = dlc_of("whole.gguf");
    assert!(dlc_of(&name(1)) == whole && dlc_of(&name(3)) == whole);

    let refused = |name: &str, words: &[&str]| {
        let error = Source::open(&path(name)).map(|_| ()).unwrap_err();
        let text = format!("{:#}", anyhow::Error::from(error));
        assert!(words.iter().all(|word| text.contains(word)), "{text} does not say {words:?}");
    };
    std::fs::write(path("alone.gguf"), parts[0].finish()).unwrap();
    refused("alone.gguf", &["alone.gguf", "split.count", "3, need 1", "-00001-of-"]);
    std::fs::write(path(&name(2)), parts[2].finish()).unwrap();
    refused(&name(1), &["split.no", "2, need 1"]);
    std::fs::write(path(&name(2)), model.split(2)[1].finish()).unwrap();
    refused(&name(1), &["split.count", "2, need 3"]);
    let mut more = parts[1].clone();
    more.tensor_f32("more.weight", &[48], &[1.0; 48]);
    std::fs::write(path(&name(2)), more.finish()).unwrap();
    refused(&name(1), &["split.tensors.count"]);
    std::fs::remove_file(path(&name(2))).unwrap();
    refused(&name(1), &["m-00002-of-00003.gguf"]);
}

/// Guards: a GGUF's linear rope scaling is applied, also where only its factor, under the newer or the older key, asks for it,
/// and is not where the type is "none".
#[test]
fn gguf_linear_scaling_needs_no_type() {
    let folder = tempfile::tempdir().unwrap();
    let frequencies = |kind: Option<&str>, factors: &[(&str, f32)]| {
        let mut file = TinyModel::llama(3).gguf(true);
        if let Some(kind) = kind {
            file.string("llama.rope.scaling.type", kind);
        }
        for (key, factor) in factors {
            file.f32(&format!("llama.rope.{key}"), *factor);
        }
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, file.finish()).unwrap();
        Source::open(&path).unwrap().config.ropes[0].inv_freq.clone()
    };
    let plain = frequencies(None, &[]);
    let check = |kind: Option<&str>, factors: &[(&str, f32)], divisor: f32| {
        // Powers of two, so that the division is exact.
        let want: Vec<f32> = plain.iter().map(|frequency| frequency / divisor).collect();
        assert_eq!(frequencies(kind, factors), want, "{kind:?} {factors:?}");
    };
    let (new, old) = ("scaling.factor", "scale_linear");
    check(None, &[(new, 4.0)], 4.0);
    check(None, &[(old, 4.0)], 4.0);
    check(None, &[(old, 4.0), (new, 2.0)], 2.0);
    check(None, &[(old, 4.0), (new, 0.0)], 1.0);
    check(Some("linear"), &[], 1.0);
    check(Some("linear"), &[(old, 4.0)], 4.0);
    check(Some("none"), &[(new, 4.0)], 1.0);
}

/// A tiny llama as a GGUF, opened, with what `change` adds.
fn open_gguf(change: impl Fn(&mut GgufWriter)) -> Result<Source, String> {
    open_gguf_of(&TinyModel::llama(3), change)
}

fn open_gguf_of(model: &TinyModel, change: impl Fn(&mut GgufWriter)) -> Result<Source, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = model.gguf(true);
    change(&mut file);
    std::fs::write(&path, file.finish()).unwrap();
    Source::open(&path).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
}

/// Guards: what a GGUF says of YaRN's ramp and factor counts as it does in `config.json`, and what is not built is refused.
#[test]
fn gguf_yarn_has_all_its_parameters() {
    let yarn = |keys: &[(&str, f32)]| {
        let opened = open_gguf(|file| {
            file.string("llama.rope.scaling.type", "yarn");
            file.u32("llama.rope.scaling.original_context_length", 64);
            for (key, value) in [("factor", 8.0)].iter().chain(keys) {
                file.f32(&format!("llama.rope.scaling.{key}"), *value);
            }
        });
        opened.map(|source| source.config)
    };
    let plain = yarn(&[]).unwrap();
    assert_eq!((plain.max_position_embeddings, TinyModel::llama(3).max_positions), (512, 256));
    let base = RopeBase {
        theta: 10_000.0,
        rotary_dim: plain.head_dim,
        max_positions: plain.max_position_embeddings,
        original_max_positions: None,
    };
    let mut object = serde_json::json!({
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 0.0625,
    });
    let changed = yarn(&[("yarn_beta_fast", 1.0), ("yarn_beta_slow", 0.0625), ("yarn_ext_factor", -1.0)]).unwrap();
    assert_eq!(changed.ropes[0], base.scaled("test", &object).unwrap());
    assert_ne!(changed.ropes[0].inv_freq, plain.ropes[0].inv_freq);
    let scale = |keys: &[(&str, f32)]| yarn(keys).unwrap().ropes[0].scale;
    object["attention_factor"] = 1.5.into();
    assert_eq!(scale(&[("yarn_attn_factor", 1.5)]), base.scaled("test", &object).unwrap().scale);
    assert_eq!(scale(&[("attn_factor", 0.5)]), plain.ropes[0].scale * 0.5);
    for (key, value) in [("yarn_ext_factor", 0.5), ("yarn_log_multiplier", 0.1)] {
        let error = yarn(&[(key, value)]).unwrap_err();
        assert!(error.contains(&format!("llama.rope.scaling.{key} {}", f64::from(value))), "{error}");
    }
}

/// Guards: a factor beside a tensor of factors, both of which llama.cpp applies, is not dropped; keys that say nothing are harmless.
#[test]
fn gguf_scaling_beside_factors_is_refused() {
    let open = |kind: Option<&str>, factor: f32| {
        open_gguf(|file| {
            let pairs = TinyModel::llama(3).head_dim / 2;
            file.tensor_f32("rope_freqs.weight", &[pairs], &vec![2.0; pairs]);
            kind.iter().for_each(|kind| file.string("llama.rope.scaling.type", kind));
            file.f32("llama.rope.scaling.factor", factor);
        })
    };
    let plain = open_gguf(|_| {}).unwrap().config.ropes[0].inv_freq.clone();
    let halves: Vec<f32> = plain.iter().map(|frequency| frequency / 2.0).collect();
    for (kind, factor) in [(None, 1.0), (Some("linear"), 0.0), (Some("none"), 4.0)] {
        assert_eq!(open(kind, factor).unwrap().config.ropes[0].inv_freq, halves, "{kind:?} {factor}");
    }
    for kind in [None, Some("yarn")] {
        let error = open(kind, 4.0).unwrap_err();
        assert!(error.contains("llama.rope.scaling.factor 4 beside rope_freqs.weight"), "{error}");
    }
}

/// Guards: a GGUF's sliding window counts in the families that have one, and nowhere else, as in llama.cpp.
#[test]
fn gguf_windows_belong_to_their_families() {
    let model = TinyModel { window: Some(16), ..TinyModel::llama(3) };
    let source = open_gguf_of(&model, |_| {}).unwrap();
    assert!(source.config.layers.iter().all(|layer| layer.window.is_none()));
}

/// Guards: a GGUF whose attention sees what comes after is refused, and not converted as a causal model.
#[test]
fn gguf_encoders_are_refused() {
    assert!(open_gguf(|file| file.bool("llama.attention.causal", true)).is_ok());
    let error = open_gguf(|file| file.bool("llama.attention.causal", false)).unwrap_err();
    assert!(error.contains("llama.attention.causal false") && error.contains("causal models"), "{error}");
}

/// Guards: integer weights, block sizes that odd shapes force, and integer caches stay near the float graph, and the two
/// backends agree on them.
#[test]
fn quantized_graphs_stay_near_the_float_graph() {
    let golden = Golden::read();
    let model = TinyModel::qwen2(7);
    let (_folder, path) = write_hf(&model);
    let want = golden.of(&model);
    let largest = want.iter().flatten().fold(0.0f32, |m, v| m.max(v.abs()));
    let int = |bits, grouping| WeightType::Int { bits, grouping };
    for (weights, bound) in [
        (int(Bits::Eight, Grouping::Default), 0.03),
        (int(Bits::Eight, Grouping::PerChannel), 0.03),
        (int(Bits::Four, Grouping::Default), 0.3),
        (int(Bits::Four, Grouping::Block(8)), 0.3),
        (int(Bits::Four, Grouping::PerChannel), 0.5),
        (WeightType::F16, 1e-3),
    ] {
        let cache = Some(if weights == WeightType::F16 { CacheType::F32 } else { CacheType::Int8 });
        let precision = Precision { weights, cache, ..FLOAT };
        let graph = specialize(&import(&path, precision).0, "test", 16, 64).unwrap();
        let htp = HtpBackend::new(2).unwrap();
        let reference = logits(&ReferenceBackend, &graph, &golden.ids, &golden.rows, 16);
        let error = worst(&reference, &want) / largest;
        assert!(error < bound, "{weights:?}: off by {error} of the largest logit");
        let difference = worst(&logits(&htp, &graph, &golden.ids, &golden.rows, 16), &reference) / largest;
        assert!(difference < 0.01, "{weights:?}: backends differ by {difference} of the largest logit");
    }
}

/// Guards: a block size that does not divide a matrix is refused with the tensor, and the sizes that do.
#[test]
fn block_size_that_does_not_divide_is_refused() {
    let (folder, path) = write_hf(&TinyModel::llama(1));
    let weights = WeightType::Int { bits: Bits::Four, grouping: Grouping::Block(32) };
    let output = folder.path().join("model.dlc");
    let options =
        ConvertOptions { input: path, output: output.clone(), precision: Precision { weights, ..FLOAT }, threads: 1 };
    let error = convert(&options, &mut |_| {}).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    let want = "model.embed_tokens.weight: blocks of 32 in rows of 48; block sizes that work: 4, 8, 12, 16, 24, 48";
    assert!(text.contains(want), "{text}");
    assert!(!output.exists(), "a file was written");
}

/// Guards: what is not supported is refused by name, with what is.
#[test]
fn unsupported_models_are_refused_by_name() {
    let check = |key: &str, value: serde_json::Value, words: &[&str]| {
        let model = TinyModel::llama(1);
        let (folder, path) = write_hf(&model);
        let mut config = model.config();
        config[key] = value;
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        let output = folder.path().join("model.dlc");
        let options = ConvertOptions { input: path, output, precision: FLOAT, threads: 1 };
        let error = convert(&options, &mut |_| {}).expect_err(key);
        let text = format!("{:#}", anyhow::Error::from(error));
        for word in words.iter().chain(&["model"]) {
            assert!(text.contains(word), "{key}: {text} does not say {word}");
        }
    };
    check("model_type", "gpt_neox".into(), &["gpt_neox", "llama, smollm, mistral, qwen2"]);
    check("hidden_act", "gelu".into(), &["hidden_act \"gelu\"", "silu"]);
    let scaling = |rope_type: &str| serde_json::json!({ "rope_type": rope_type, "factor": 8.0 });
    check("rope_scaling", scaling("dynamic"), &["rope_scaling", "\"dynamic\"", "longrope"]);
    check("rope_scaling", scaling("llama3"), &["rope_scaling/low_freq_factor is missing"]);
    check("rope_scaling", scaling("longrope"), &["rope_scaling/short_factor", "8, one for each rotated pair"]);
    check("rope_scaling", serde_json::json!({ "factor": 8.0 }), &["rope_scaling/rope_type"]);
    check("rope_scaling", serde_json::json!({ "type": "linear", "factor": -1 }), &["rope_scaling/factor is -1"]);
    check("partial_rotary_factor", 0.5.into(), &["partial_rotary_factor 0.5"]);
    let mlx = serde_json::json!({ "group_size": 64, "bits": 4 });
    check("quantization_config", mlx, &["quantization_config without quant_method", "gptq"]);
    check("quantization_config", serde_json::json!({ "quant_method": "fp8" }), &["\"fp8\"", "\"gptq\" and \"awq\""]);
    check("quantization_config", serde_json::json!({ "quant_method": "gptq", "bits": 8 }), &["gptq of 8 bits"]);
    check("quantization_config", serde_json::json!({ "quant_method": "gptq", "bits": 4 }), &["group_size is missing"]);
    let gemv = serde_json::json!({ "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv" });
    check("quantization_config", gemv, &["awq version \"gemv\"", "gemm"]);
    check("num_key_value_heads", 2.into(), &["num_key_value_heads is 2", "divisor"]);
    check("num_hidden_layers", 1.into(), &["model.layers.1.", "used by nothing"]);
    check("num_hidden_layers", 3.into(), &["model.layers.2.", "missing"]);
    check("num_hidden_layers", 1_000_000_000.into(), &["num_hidden_layers is 1000000000", "1 to 1024"]);
    check("vocab_size", 68.into(), &["embed_tokens", "[67, 48]", "[68, 48]"]);
    check("rms_norm_eps", 0.into(), &["rms_norm_eps"]);
    check("hidden_size", serde_json::Value::Null, &["null"]);
    check("attention_bias", true.into(), &["q_proj.bias", "missing"]);
}
