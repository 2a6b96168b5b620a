//! Every family computes what transformers computes with the same files: the tiny random models of `tests/golden/families`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, atomic::AtomicBool};

use qnn_core::backend::{HtpBackend, ReferenceBackend};
use qnn_core::binary::Verify;
use qnn_core::offline::arch::{ActivationBits, CacheType, Grouping, Precision, WeightType};
use qnn_core::offline::convert::{ConvertOptions, convert_with_lora};
use qnn_core::offline::lora::{LoraBits, LoraOptions, UpdatableMode, adapter_from_peft, attach_points, load_peft};
use qnn_core::offline::quantize_weights::Bits;
use qnn_core::offline::source::Source;
use qnn_core::offline::{dlc, specialize};
use qnn_core::{Adapter, Backend, Bindings, Context, ContextBuilder, Graph, OpKind, Tensor, TensorData};
use serde_json::{Value, json};

const FLOAT: Precision =
    Precision { weights: WeightType::F32, activations: ActivationBits::Sixteen, cache: Some(CacheType::F32) };
/// What is promised; the reference backend is far nearer.
const BOUND: f32 = 1e-3;

struct Golden {
    ids: Vec<i32>,
    rows: Vec<usize>,
    families: Value,
}

/// One variant of a family: changes of its `config.json`, and the logits.
struct Variant<'a> {
    family: &'a str,
    name: &'a str,
    changes: &'a Value,
    logits: Vec<Vec<f32>>,
}

impl Golden {
    fn read() -> Golden {
        let all: Value = serde_json::from_str(include_str!("../../../tests/golden/families/logits.json")).unwrap();
        let list = |key: &str| all[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
        Golden {
            ids: list("ids").into_iter().map(|id| id as i32).collect(),
            rows: list("rows").into_iter().map(|row| row as usize).collect(),
            families: all["families"].clone(),
        }
    }

    fn variants(&self) -> Vec<Variant<'_>> {
        let floats = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let families = self.families.as_object().unwrap();
        families
            .iter()
            .flat_map(|(family, variants)| variants.as_object().unwrap().iter().map(move |(name, v)| (family, name, v)))
            .map(|(family, name, v)| Variant {
                family,
                name,
                changes: &v["config"],
                logits: v["logits"].as_array().unwrap().iter().map(floats).collect(),
            })
            .collect()
    }
}

fn family_folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families").join(family)
}

/// A copy of the family's directory whose `config.json` has `changes`: null removes nothing, it stays as null.
fn with_changes(family: &str, changes: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(family_folder(family)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

/// The graph of `input`, with branches for `adapter`.
fn convert(input: &Path, adapter: Option<&Path>) -> Graph {
    convert_to(FLOAT, input, adapter)
}

fn convert_to(precision: Precision, input: &Path, adapter: Option<&Path>) -> Graph {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model.dlc");
    let options = ConvertOptions { input: input.to_owned(), output: output.clone(), precision, threads: 1 };
    let lora = adapter.map(|adapter| LoraOptions {
        weight_list: None,
        adapters: vec![adapter.to_owned()],
        max_rank: None,
        bits: Some(LoraBits::ThirtyTwo),
        mode: UpdatableMode::AdapterOnly,
    });
    convert_with_lora(&options, lora.as_ref(), &mut |_| {}).unwrap();
    specialize(&dlc::read_dlc(&output).unwrap(), "test", 20, 32).unwrap()
}

/// Logits of the golden rows after the golden ids went through `graph` in pieces of `step`.
fn logits(
    backend: &dyn Backend,
    graph: &Graph,
    adapter: Option<&Arc<Adapter>>,
    golden: &Golden,
    step: usize,
) -> Vec<f32> {
    let mut executable = backend.prepare(graph).unwrap();
    let mut state = backend.new_state(&[graph], 32).unwrap();
    let mut bindings = Bindings::new(graph);
    bindings.set_adapter(adapter.cloned());
    if let Some(alpha) = bindings.find_input("lora_alpha") {
        bindings.set_f32(alpha, &[1.0; 2]).unwrap();
    }
    let mut found = Vec::new();
    for (piece, ids) in golden.ids.chunks(step).enumerate() {
        let start = piece * step;
        let inside = |row: &&usize| (start..start + ids.len()).contains(*row);
        let wanted: Vec<i32> = golden.rows.iter().filter(inside).map(|row| (row - start) as i32).collect();
        let positions: Vec<i32> = (start..start + ids.len()).map(|p| p as i32).collect();
        let inputs: [(&str, &[i32]); 4] = [
            ("input_ids", ids),
            ("position_ids", &positions),
            ("cache_index", &[start as i32]),
            ("logit_indices", &wanted),
        ];
        for (name, values) in inputs {
            bindings.set_i32(bindings.find_input(name).unwrap(), values).unwrap();
        }
        executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        if !wanted.is_empty() {
            found.extend_from_slice(bindings.output_f32(bindings.find_output("logits").unwrap()));
        }
    }
    found
}

fn worst(have: &[f32], want: &[Vec<f32>]) -> f32 {
    let want: Vec<f32> = want.concat();
    assert_eq!(have.len(), want.len());
    have.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn check(graph: &Graph, adapter: Option<&Arc<Adapter>>, golden: &Golden, variant: &Variant<'_>) {
    let htp = HtpBackend::new(2).unwrap();
    for (backend, name) in [(&ReferenceBackend as &dyn Backend, "reference"), (&htp, "htp")] {
        for step in [20, 7, 1] {
            let error = worst(&logits(backend, graph, adapter, golden, step), &variant.logits);
            let Variant { family, name: variant, .. } = variant;
            assert!(error < BOUND, "{family} {variant} on {name} in steps of {step}: off by {error}");
        }
    }
}

/// Guards: every family, with every option of its configuration that is supported, computes transformers' logits on both
/// backends, as one prompt, in pieces and token by token.
#[test]
fn families_match_transformers() {
    let golden = Golden::read();
    for variant in golden.variants().iter().filter(|v| v.name != "adapter") {
        let folder = with_changes(variant.family, variant.changes);
        check(&convert(folder.path(), None), None, &golden, variant);
    }
}

/// Guards: PEFT's names of every family land, fused projections included, and a LoRA on every linear layer computes what
/// PEFT computes.
#[test]
fn adapters_of_every_family_match_peft() {
    let golden = Golden::read();
    for variant in golden.variants().iter().filter(|v| v.name == "adapter") {
        let folder = family_folder(variant.family);
        let graph = convert(&folder, Some(&folder.join("adapter")));
        let builder = graph.metadata().iter().fold(ContextBuilder::new(), |b, (key, value)| b.metadata(key, value));
        let binary = builder.graph(graph.clone()).to_binary().unwrap();
        let context = Context::from_binary(binary.into(), Verify::Checksums).unwrap();
        let adapter = adapter_from_peft(&context, &folder.join("adapter"), "adapter").unwrap();
        check(context.graph("test").unwrap(), Some(&adapter), &golden, variant);
    }
}

/// Guards: the names, row orders, norms, windows and rotary factors of a GGUF lead to the logits of transformers, for files that
/// llama.cpp's converter wrote.
#[test]
fn gguf_files_match_transformers() {
    let golden = Golden::read();
    let all: Value = serde_json::from_str(include_str!("../../../tests/golden/families/gguf/logits.json")).unwrap();
    for (name, rows) in all.as_object().unwrap() {
        let floats = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let want: Vec<Vec<f32>> = rows.as_array().unwrap().iter().map(floats).collect();
        let graph = convert(&family_folder("gguf").join(format!("{name}.gguf")), None);
        for step in [20, 3] {
            let error = worst(&logits(&ReferenceBackend, &graph, None, &golden, step), &want);
            assert!(error < BOUND, "{name} in steps of {step}: off by {error}");
        }
    }
    assert_eq!(all.as_object().unwrap().len(), 8);
}

/// Guards: of a GGUF with LongRoPE a graph for at most the original length takes the short factors, one for more the long ones.
#[test]
fn gguf_long_factors_serve_long_contexts() {
    const KEY: &[u8] = b"phi3.rope.scaling.original_context_length";
    let mut file = std::fs::read(family_folder("gguf").join("phi3.gguf")).unwrap();
    // Behind a key stand its type and its value, both of four bytes.
    let at = file.windows(KEY.len()).position(|window| window == KEY).unwrap() + KEY.len() + 4;
    assert_eq!(file[at..at + 4], 32u32.to_le_bytes());
    file[at..at + 4].copy_from_slice(&24u32.to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("phi3.gguf"), folder.path().join("model.dlc"));
    std::fs::write(&input, file).unwrap();
    let options = ConvertOptions { input, output: output.clone(), precision: FLOAT, threads: 1 };
    let report = convert_with_lora(&options, None, &mut |_| {}).unwrap();
    assert!(
        report.warnings.iter().any(|warning| warning.contains("up to 24 positions (--cl)")),
        "{:?}",
        report.warnings
    );
    let whole = dlc::read_dlc(&output).unwrap();
    for backend in [&HtpBackend::new(1).unwrap() as &dyn Backend, &ReferenceBackend] {
        let refused = backend.prepare(&whole).err().expect("which frequencies is open").to_string();
        assert!(refused.contains("RotaryTable") && refused.contains("one context length"), "{refused}");
    }
    let table = |cl: usize| {
        let graph = specialize(&whole, "test", 20, cl).unwrap();
        let node = graph.nodes().iter().find(|node| node.op.name() == "RotaryTable").unwrap();
        assert_eq!(node.inputs.len(), 2);
        match &graph.tensor(node.inputs[1]).data {
            Some(TensorData::Flat(bytes)) => {
                bytes.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect::<Vec<f32>>()
            }
            other => panic!("{other:?}"),
        }
    };
    let (short, long) = (table(24), table(25));
    for (i, factor) in [1.0, 1.3, 2.0].into_iter().enumerate() {
        assert!((short[i] * factor / (long[i] * 4.0) - 1.0).abs() < 1e-6, "{short:?} {long:?}");
    }
}

/// Guards: with integer weights, activations and caches both backends compute the same of every family, and stay near the
/// float graph.
#[test]
fn quantized_families_agree_on_both_backends() {
    let golden = Golden::read();
    let weights = WeightType::Int { bits: Bits::Eight, grouping: Grouping::PerChannel };
    let precision = Precision { weights, activations: ActivationBits::Sixteen, cache: Some(CacheType::Int8) };
    for variant in golden.variants().iter().filter(|v| v.name == "base") {
        let graph = convert_to(precision, &family_folder(variant.family), None);
        let largest = variant.logits.iter().flatten().fold(0.0f32, |largest, v| largest.max(v.abs()));
        let reference = logits(&ReferenceBackend, &graph, None, &golden, 20);
        let error = worst(&reference, &variant.logits) / largest;
        assert!(error < 0.1, "{}: off by {error} of the largest logit", variant.family);
        let difference =
            worst(&logits(&HtpBackend::new(2).unwrap(), &graph, None, &golden, 20), &[reference]) / largest;
        assert!(difference < 0.02, "{}: backends differ by {difference} of the largest logit", variant.family);
    }
}

/// Guards: the newer way to write rotary parameters (one object with the base inside, or one for each type of layer) gives
/// the very frequencies that the older keys give.
#[test]
fn rope_parameters_are_read_in_both_forms() {
    let check = |family: &str, old: Value, new: Value| {
        let tables = |changes: &Value| {
            let folder = with_changes(family, changes);
            let graph = convert(folder.path(), None);
            let is_table = |tensor: &&Tensor| tensor.name.ends_with(".inv_freq");
            let bytes = |tensor: &Tensor| match &tensor.data {
                Some(TensorData::Flat(bytes)) => bytes.to_vec(),
                other => panic!("{}: {other:?}", tensor.name),
            };
            graph.tensors().iter().filter(is_table).map(bytes).collect::<Vec<_>>()
        };
        let (old, new) = (tables(&old), tables(&new));
        assert!(!old.is_empty());
        assert_eq!(old, new, "{family}");
    };
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let mut with_base = yarn.clone();
    with_base["rope_theta"] = 300.0.into();
    check(
        "llama",
        json!({ "rope_theta": 300.0, "rope_scaling": yarn.clone() }),
        json!({ "rope_theta": null, "rope_scaling": null, "rope_parameters": with_base }),
    );
    check(
        "gemma3",
        json!({ "rope_theta": 300.0, "rope_local_base_freq": 70.0 }),
        json!({
            "rope_theta": null, "rope_local_base_freq": null,
            "rope_parameters": {
                "full_attention": { "rope_type": "default", "rope_theta": 300.0 },
                "sliding_attention": { "rope_type": "default", "rope_theta": 70.0 },
            },
        }),
    );
    let inside =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0 });
    check(
        "llama",
        json!({ "rope_theta": 300.0, "rope_scaling": yarn }),
        json!({ "rope_theta": 70.0, "rope_scaling": inside }),
    );
    let partial = json!({ "rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5 });
    check(
        "phi3",
        json!({ "rope_theta": 300.0, "partial_rotary_factor": 0.5 }),
        json!({ "rope_theta": null, "partial_rotary_factor": null, "rope_parameters": partial }),
    );
}

/// Guards: YaRN as model cards say to switch it on, beside an unchanged `max_position_embeddings`, allows the contexts that it is for.
#[test]
fn yarn_reaches_beyond_the_original_length() {
    let yarn = |factor: f64| json!({ "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 16 });
    let positions = |changes: Value| {
        let folder = with_changes("qwen2", &changes);
        let graph = convert(folder.path(), None);
        graph.metadata()["max_position_embeddings"].clone()
    };
    let own = json!({ "max_position_embeddings": 32, "rope_scaling": yarn(4.0) });
    assert_eq!(positions(own), "64");
    assert_eq!(positions(json!({ "max_position_embeddings": 80, "rope_scaling": yarn(4.0) })), "80");
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    assert_eq!(positions(json!({ "max_position_embeddings": 32, "rope_scaling": linear })), "32");
}

/// Guards: an adapter of a fused projection whose rows are not those of the parts together is refused by name.
#[test]
fn fused_adapter_of_another_size_is_refused() {
    let folder = family_folder("phi3");
    let mut points = attach_points(&convert(&folder, None));
    load_peft(&folder.join("adapter")).unwrap().split_fused(&points).unwrap();
    let k_proj = points.iter_mut().find(|point| point.module.ends_with("layers.1.self_attn.k_proj")).unwrap();
    k_proj.n += 2;
    let error = load_peft(&folder.join("adapter")).unwrap().split_fused(&points).unwrap_err().to_string();
    for words in ["layers.1.self_attn.qkv_proj.lora_B.weight: 96 outputs, need 98", "k_proj"] {
        assert!(error.contains(words), "{error} does not say {words}");
    }
}

/// Guards: settings that would change the result and are not built, or lists that do not fit the model, are refused by name.
#[test]
fn strange_configurations_are_refused() {
    let check = |family: &str, changes: Value, words: &[&str]| {
        let folder = with_changes(family, &changes);
        let error = Source::open(folder.path()).expect_err(words[0]);
        let text = format!("{:#}", anyhow::Error::from(error));
        for word in words {
            assert!(text.contains(word), "{family}: {text} does not say {word}");
        }
    };
    check(
        "gemma3",
        json!({ "layer_types": ["full_attention"] }),
        &["layer_types is a list of 1", "2, the number of layers"],
    );
    check("gemma3", json!({ "layer_types": ["full_attention", "chunked"] }), &["layer type \"chunked\""]);
    check("gemma3", json!({ "hidden_activation": "gelu" }), &["hidden_activation \"gelu\"", "gelu_pytorch_tanh"]);
    check("gemma3", json!({ "use_bidirectional_attention": true }), &["use_bidirectional_attention"]);
    check("qwen2", json!({ "is_causal": false }), &["is_causal false", "causal models"]);
    check("gemma3", json!({ "query_pre_attn_scalar": 0 }), &["query_pre_attn_scalar"]);
    check("gemma3", json!({ "rope_local_base_freq": -1 }), &["rope_theta is -1"]);
    check("gemma2", json!({ "final_logit_softcapping": -3.0 }), &["final_logit_softcapping", "above 0"]);
    check("gemma2", json!({ "sliding_window": 0 }), &["sliding_window is 0"]);
    check("smollm3", json!({ "no_rope_layers": [1] }), &["no_rope_layers is a list of 1"]);
    check("granite", json!({ "logits_scaling": 0 }), &["logits_scaling is 0"]);
    check("granite", json!({ "residual_multiplier": 0 }), &["residual_multiplier"]);
    check("phi3", json!({ "partial_rotary_factor": 0.25 }), &["partial_rotary_factor is 0.25"]);
    let partial = |factor: Value| json!({ "rope_parameters": { "partial_rotary_factor": factor } });
    check("llama", partial(0.5.into()), &["partial_rotary_factor 0.5"]);
    check("phi3", partial("half".into()), &["rope_parameters/partial_rotary_factor is \"half\"", "a number"]);
    let sliding = json!({ "sliding_attention": { "partial_rotary_factor": 0.5 } });
    check("gemma3", json!({ "rope_parameters": sliding }), &["partial_rotary_factor 0.5"]);
    let longrope = json!({ "type": "longrope", "short_factor": [1.0], "long_factor": [1.0] });
    check(
        "phi3",
        json!({ "rope_scaling": longrope }),
        &["rope_scaling/short_factor is 1 numbers above 0", "6, one for"],
    );
    let yarn = json!({ "rope_type": "yarn", "factor": "four" });
    check("llama", json!({ "rope_scaling": yarn }), &["rope_scaling/factor is \"four\"", "a number"]);
}

/// Guards: Gemma 3's local rotary embedding belongs to its windows: a GGUF without them rotates all layers alike.
#[test]
fn gemma3_without_windows_has_one_rotary_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = std::fs::read(family_folder("gguf").join("gemma3.gguf")).unwrap();
    let tables = |file: &[u8]| {
        std::fs::write(&path, file).unwrap();
        let graph = convert(&path, None);
        let rotated = graph.nodes().iter().filter(|node| matches!(node.op, OpKind::RotaryEmbedding { .. }));
        rotated.map(|node| node.inputs[1].index()).collect::<BTreeSet<usize>>().len()
    };
    assert_eq!(tables(&file), 2);
    // Behind the key comes its type, not the rest of a longer key.
    let key = b"gemma3.attention.sliding_window\x04";
    let at = file.windows(key.len()).position(|bytes| bytes == key).expect("the file has windows");
    file[at + key.len() - 2] = b'x';
    assert_eq!(tables(&file), 1);
}
