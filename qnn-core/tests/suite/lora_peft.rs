//! The promises of reading PEFT directories: the meaning that PEFT gives them, and nothing that cannot be represented.

use std::path::Path;

use crate::peft::{Stored, config, pair, write};
use crate::support::chain;
use qnn_core::offline::lora::{AttachPoint, PeftConfig, fold, load_peft};
use safetensors::Dtype;
use serde_json::{Value, json};

const Q: &str = "model.layers.0.self_attn.q_proj";
const V: &str = "model.layers.1.self_attn.v_proj";

fn adapters() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/adapters")
}

/// Values that differ and that f16 and bf16 hold exactly.
fn plain(is_b: bool, i: usize) -> f32 {
    (i % 7) as f32 - 3.0 + if is_b { 0.25 } else { 0.5 }
}

/// Tensors for two modules `[12, 8]` of rank 4, as the default config wants them.
fn two_modules(dtype: Dtype) -> Vec<Stored> {
    [Q, V].iter().flat_map(|module| pair(module, [12, 8, 4], dtype, &mut plain)).collect()
}

// Broken if an adapter that PEFT saved is read with other targets, ranks or factors than PEFT gives it.
#[test]
fn real_adapters_mean_what_peft_says() {
    for (name, targets, rank, scaling) in [("json", 210, 8, 4.0), ("pirate", 210, 16, 2.0), ("sql", 60, 16, 1.0)] {
        let adapter = load_peft(&adapters().join(name)).unwrap();
        assert_eq!((adapter.modules.len(), adapter.rank()), (targets, rank), "{name}");
        assert!(adapter.modules.iter().all(|module| module.scaling == scaling && module.rank == rank), "{name}");
        let first = if name == "sql" { "model.layers.0.self_attn.q_proj" } else { "model.layers.0.mlp.down_proj" };
        assert_eq!(adapter.modules[0].name, first, "{name}");
        assert!(adapter.modules.last().unwrap().name.starts_with("model.layers.29."), "natural order");
        // The weights file stands for its directory.
        let file = load_peft(&adapters().join(name).join("adapter_model.safetensors")).unwrap();
        assert_eq!(file.hash, adapter.hash);
    }
}

// Broken if the factor on an adapter is not that of the formula: twice applied, forgotten, or of another module.
#[test]
fn scaling_is_folded_once() {
    let dir = tempfile::tempdir().unwrap();
    let check = |changes: Value, rank: [usize; 2], factor: [f64; 2]| {
        let tensors: Vec<Stored> = [Q, V]
            .iter()
            .zip(rank)
            .flat_map(|(module, rank)| pair(module, [12, 8, rank], Dtype::F32, &mut plain))
            .collect();
        let adapter = load_peft(&write(dir.path(), "a", &config(changes.clone()), &tensors)).unwrap();
        let folded = fold("a", &[("a".to_owned(), &adapter)]).unwrap();
        assert_eq!(folded.rank, rank[0].max(rank[1]));
        for (i, module) in folded.modules.iter().enumerate() {
            assert_eq!(module.a_values, tensors[i * 2].values, "{changes}: A stays");
            for (have, b) in module.b_values.iter().zip(&tensors[i * 2 + 1].values) {
                let want = f64::from(*b) * factor[i];
                assert!((f64::from(*have) - want).abs() <= want.abs() * 1e-7, "{changes}: {have} for {want}");
            }
        }
    };
    check(json!({}), [4, 4], [6.0 / 4.0; 2]);
    check(json!({"lora_alpha": 3.5}), [4, 4], [3.5 / 4.0; 2]);
    check(json!({"use_rslora": true, "lora_alpha": 8}), [4, 4], [4.0; 2]);
    check(json!({"rank_pattern": {"v_proj": 2}}), [4, 2], [6.0 / 4.0, 3.0]);
    check(json!({"rank_pattern": {"v_proj": 3}, "use_rslora": true}), [4, 3], [3.0, 6.0 / 3f64.sqrt()]);
    check(json!({"alpha_pattern": {"layers.1.self_attn.v_proj": 12}}), [4, 4], [1.5, 3.0]);
    // The first pattern of the file counts, also where another order of names would give another.
    check(json!({"r": 2, "rank_pattern": {"model.*": 4}, "alpha_pattern": {"z?q_proj": 1}}), [4, 4], [0.25, 1.5]);
}

// Broken if a module is targeted, or a pattern applied, where PEFT would not (or the reverse). The table is PEFT's rules.
#[test]
fn targets_follow_pefts_rules() {
    let (mlp, deep) = ("model.layers.0.mlp.gate_proj", "model.layers.12.self_attn.q_proj");
    let check = |changes: Value, selected: &[&str]| {
        let config = PeftConfig::from_json(config(changes.clone()).to_string().as_bytes()).unwrap();
        for module in [Q, V, mlp, deep] {
            assert_eq!(config.selects(module).unwrap(), selected.contains(&module), "{changes} on {module}");
        }
    };
    check(json!({}), &[Q, V, deep]);
    check(json!({"target_modules": "all-linear"}), &[Q, V, mlp, deep]);
    check(json!({"target_modules": ["proj"]}), &[]);
    check(json!({"target_modules": [Q]}), &[Q]);
    check(json!({"target_modules": ["self_attn.q_proj"]}), &[Q, deep]);
    check(json!({"target_modules": ".*q_proj"}), &[Q, deep]);
    check(json!({"target_modules": "q_proj"}), &[]);
    check(json!({"target_modules": r"model\.layers\.(0|1)\..*(v|gate)_proj"}), &[V, mlp]);
    check(json!({"target_modules": r"(?!.*mlp).*_proj"}), &[Q, V, deep]);
    check(json!({"exclude_modules": ["q_proj"]}), &[V]);
    check(json!({"exclude_modules": r".*layers\.1\..*"}), &[Q, deep]);
    check(json!({"layers_to_transform": 1}), &[V]);
    check(json!({"layers_to_transform": [0, 12]}), &[Q, deep]);
    check(json!({"layers_to_transform": [0], "layers_pattern": "layers"}), &[Q]);
    check(json!({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}), &[]);
    check(json!({"layers_to_transform": []}), &[Q, V, deep]);
    // A pattern string is the whole rule; PEFT looks at layer numbers only beside a list of names.
    check(json!({"layers_to_transform": [5], "target_modules": ".*q_proj"}), &[Q, deep]);
}

// Broken if a pattern's key matches a path elsewhere than PEFT does: at its end, from a dot or from its start.
#[test]
fn patterns_match_the_end_of_a_path() {
    let rank = |pattern: &str| {
        let changes = json!({"rank_pattern": {pattern: 9}});
        let config = PeftConfig::from_json(config(changes).to_string().as_bytes()).unwrap();
        config.rank_of(Q).unwrap()
    };
    for (pattern, matches) in [
        ("q_proj", true),
        ("proj", false),
        (".*proj", true),
        ("self_attn", false),
        ("self_attn.q_proj", true),
        ("^model.layers.0.self_attn.q_proj", true),
        ("^q_proj", false),
        ("layers.1.self_attn.q_proj", false),
        ("(k|q)_proj", true),
    ] {
        assert_eq!(rank(pattern) == 9, matches, "{pattern}");
    }
}

// Broken if a config's patterns can take memory without bound.
#[test]
fn patterns_are_bounded() {
    let read = |patterns: serde_json::Map<String, Value>| {
        let text = config(json!({"rank_pattern": patterns})).to_string();
        PeftConfig::from_json(text.as_bytes()).map_err(|error| chain(&error))
    };
    let layers = |n: usize| (0..n).map(|i| (format!("layers.{i}.q_proj"), json!(2))).collect();
    assert!(read(layers(1000)).is_ok());
    let error = read(layers(5000)).unwrap_err();
    assert!(error.contains("rank_pattern: 5000 patterns, need at most 4096"), "{error}");
    let error = read([(r"\w{900}".to_owned(), json!(2))].into_iter().collect()).unwrap_err();
    assert!(error.contains("rank_pattern") && error.contains("w{900}"), "{error}");
}

// Broken if an adapter in another element type, or with the adapter's name in its keys, is another adapter.
#[test]
fn types_and_key_spellings_are_alike() {
    let dir = tempfile::tempdir().unwrap();
    let want = load_peft(&write(dir.path(), "f32", &config(json!({})), &two_modules(Dtype::F32))).unwrap();
    let same = |tensors: &[Stored]| {
        let have = load_peft(&write(dir.path(), "other", &config(json!({})), tensors)).unwrap();
        assert_eq!(have.modules.len(), want.modules.len());
        for (have, want) in have.modules.iter().zip(&want.modules) {
            assert_eq!((&have.name, have.n, have.k, have.rank), (&want.name, want.n, want.k, want.rank));
            assert_eq!((&have.a, &have.b), (&want.a, &want.b));
        }
    };
    same(&two_modules(Dtype::F16));
    same(&two_modules(Dtype::BF16));
    for name in ["default", "my_adapter"] {
        let mut named = two_modules(Dtype::F32);
        for tensor in &mut named {
            tensor.name = tensor.name.replace(".weight", &format!(".{name}.weight"));
        }
        same(&named);
    }
}

/// Writes the default adapter after `change`, and checks that reading it fails with all of `words`.
fn refused(changes: Value, change: impl FnOnce(&mut Vec<Stored>), words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = two_modules(Dtype::F32);
    change(&mut tensors);
    let error = chain(&load_peft(&write(dir.path(), "a", &config(changes.clone()), &tensors)).unwrap_err());
    for word in words {
        assert!(error.contains(word), "{changes}: {error:?} does not say {word:?}");
    }
}

// Broken if a feature that would be lost is passed over in silence, or refused without saying what to do.
#[test]
fn features_that_cannot_be_represented_are_refused_by_name() {
    let by_config = |changes: Value, words: &[&str]| refused(changes, |_| {}, words);
    by_config(json!({"use_dora": true}), &["use_dora", "merge", "adapter_config.json"]);
    by_config(json!({"modules_to_save": ["lm_head"]}), &["modules_to_save", "lm_head", "without"]);
    by_config(json!({"bias": "lora_only"}), &["bias", "lora_only", "none"]);
    by_config(json!({"lora_bias": true}), &["lora_bias", "False"]);
    by_config(json!({"layer_replication": [[0, 4], [2, 5]]}), &["layer_replication", "repeated"]);
    by_config(json!({"target_parameters": ["experts.gate"]}), &["target_parameters", "target_modules"]);
    by_config(json!({"trainable_token_indices": [1, 2]}), &["trainable_token_indices", "without"]);
    by_config(json!({"alora_invocation_tokens": [5]}), &["alora_invocation_tokens", "plain"]);
    by_config(json!({"peft_type": "IA3"}), &["peft_type IA3", "LORA"]);
    by_config(json!({"peft_type": null}), &["peft_type (none)", "LORA"]);
    by_config(json!({"init_lora_weights": "pissa_niter_16"}), &["pissa_niter_16", "path_initial_model"]);
    by_config(json!({"use_something_new": 3}), &["use_something_new = 3", "remove the key"]);
    by_config(json!({"target_modules": "q_proj("}), &["target_modules", "q_proj("]);
    by_config(json!({"r": 0}), &["r: 0"]);
    by_config(json!({"r": "eight"}), &["eight"]);
    let by_tensor = |name: &str, words: &[&str]| {
        refused(json!({}), |tensors| tensors[0].name = format!("base_model.model.{name}"), words);
    };
    by_tensor(&format!("{Q}.lora_magnitude_vector.weight"), &["DoRA", "lora_magnitude_vector", "merge"]);
    by_tensor("model.embed_tokens.lora_embedding_A", &["embedding", "target_modules"]);
    by_tensor("lm_head.lora_A.weight", &["lm_head", "leave"]);
    by_tensor("lm_head.weight", &["whole weight (base_model.model.lm_head.weight)", "modules_to_save"]);
    by_tensor(&format!("{Q}.lora_B.bias"), &["bias", "lora_bias=False"]);
    by_tensor(&format!("{Q}.lora_C.weight"), &["lora_C.weight is no part"]);
    by_tensor(&format!("{Q}.lora_A.weight.extra"), &["does not end with"]);
    refused(json!({}), |t| t[0].name = format!("{Q}.lora_A.weight"), &["does not begin with base_model.model."]);
}

// Broken if an adapter that is incomplete, inconsistent or full of NaN becomes weights.
#[test]
fn tensors_that_do_not_fit_are_named() {
    refused(json!({}), |t| drop(t.remove(1)), &[Q, "lora_A.weight has no other half"]);
    refused(json!({}), |t| drop(t.remove(0)), &[Q, "lora_B.weight has no other half"]);
    refused(json!({}), Vec::clear, &["no tensors"]);
    refused(json!({"r": 5}), |_| {}, &["lora_A.weight: 4 rows", "5, the rank"]);
    refused(json!({}), |t| t[1].shape = vec![6, 8], &["lora_B.weight: rows of 8", "4, the rank"]);
    refused(json!({}), |t| t[1].shape = vec![4, 3, 4], &["[4, 3, 4]", "two extents"]);
    refused(json!({}), |t| t[2].values[9] = f32::NAN, &[V, "lora_A.weight: NaN in row 1"]);
    refused(json!({}), |t| t[3].values[0] = f32::INFINITY, &[V, "lora_B.weight: inf in row 0"]);
    refused(json!({}), |t| t[0].dtype = Dtype::I32, &["I32", "F32, F16 or BF16"]);
    refused(json!({"target_modules": ["q_proj"]}), |_| {}, &["lora_A.weight", "does not target", V]);
    refused(json!({"layers_to_transform": [0]}), |_| {}, &["does not target", V]);
    let doubled = |tensors: &mut Vec<Stored>| {
        let mut again = tensors[0].clone();
        again.name = again.name.replace(".weight", ".default.weight");
        tensors.push(again);
    };
    refused(json!({}), doubled, &["stands for the same as"]);
}

// Broken if a directory without the files that are needed is not told apart from a damaged one.
#[test]
fn missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &Path| chain(&load_peft(path).unwrap_err());
    assert!(error(&dir.path().join("nowhere")).contains("nowhere"));
    assert!(error(dir.path()).contains("no adapter_config.json"));
    let adapter = write(dir.path(), "a", &config(json!({})), &two_modules(Dtype::F32));
    let weights = adapter.join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(error(&adapter).contains("adapter_model.safetensors"));
    std::fs::rename(&weights, adapter.join("adapter_model.bin")).unwrap();
    let pickle = error(&adapter);
    assert!(pickle.contains("adapter_model.bin") && pickle.contains("safe_serialization"), "{pickle}");
}

// Broken if an adapter of another model is taken for one of this.
#[test]
fn what_lands_nowhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = load_peft(&write(dir.path(), "a", &config(json!({})), &two_modules(Dtype::F32))).unwrap();
    let point = |module: &str, n, k| AttachPoint { module: module.to_owned(), n, k, branch: None };
    let error = |points: &[AttachPoint]| adapter.fits(points).unwrap_err().to_string();
    adapter.fits(&[point(Q, 12, 8), point(V, 12, 8)]).unwrap();
    assert!(error(&[point("transformer.h.0.attn", 12, 8)]).contains("none of its 4 tensors"));
    let one = error(&[point(Q, 12, 8), point("model.layers.0.self_attn.v_proj", 12, 8)]);
    assert!(one.contains(&format!("{V}.lora_A.weight lands nowhere")) && one.contains("layers.0.self_attn.v"), "{one}");
    assert!(error(&[point(Q, 12, 9), point(V, 12, 8)]).contains("8 inputs, need 9"));
    assert!(error(&[point(Q, 13, 8), point(V, 12, 8)]).contains("12 outputs, need 13"));
}
