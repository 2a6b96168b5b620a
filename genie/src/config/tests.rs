use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::Code;
use crate::engine::{AdapterSource, GroupSource};

/// A folder with the files that [`full`] names.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("med")).unwrap();
    for name in ["tok.json", "p1.bin", "p2.bin", "ext.json", "law.bin", "tax_q.bin"] {
        std::fs::write(folder.path().join(name), "x").unwrap();
    }
    folder
}

/// A config with every key that is supported.
fn full() -> Value {
    json!({"dialog": {
        "version": 1, "type": "basic", "max-num-tokens": 256, "stop-sequence": ["a", "bc"],
        "context": {"version": 1, "size": 2048, "n-vocab": 32064, "bos-token": 1, "eos-token": [2, 7],
                    "eot-token": 9, "pad-token": -1, "n-embd": 576},
        "sampler": {"version": 1, "type": "basic", "seed": 7, "temp": 0.6, "top-k": 30, "top-p": 0.9, "min-p": 0.05,
                    "greedy": false, "token-penalty": {"version": 1, "penalize-last-n": 64, "repetition-penalty": 1.1,
                    "presence-penalty": 0.5, "frequency-penalty": -0.5}},
        "tokenizer": {"version": 1, "path": "tok.json"},
        "engine": {"version": 1, "n-threads": 2, "role": "primary", "type": "x",
            "backend": {"version": 1, "type": "QnnHtp", "extensions": "ext.json", "device": "x",
                "QnnHtp": {"version": 1, "use-mmap": true, "spill-fill-bufsize": 0, "mmap-budget": 0, "poll": false,
                    "cpu-mask": "0xe0", "kv-dim": 64, "kv-update-method": "SMART_MASK", "allow-async-init": true,
                    "enable-graph-switching": true, "graph-switching-lora-policy": "lazy",
                    "weight-shared-lora": false, "skip-lora-validation": false, "shared-engine": true,
                    "data-alignment-size": 0, "batch-size": 1}},
            "model": {"version": 1, "type": "binary", "cross-attention": false, "linear-attention": false,
                "positional-encoding": {"type": "rope", "rope-dim": 32, "rope-theta": 10000, "rope-scaling": {
                    "rope-type": "llama3", "factor": 8, "low-freq-factor": 1, "high-freq-factor": 4,
                    "original-max-position-embeddings": 8192}},
                "binary": {"version": 1, "ctx-bins": ["p1.bin", "p2.bin"], "lora": {
                    "version": 1, "lora-version": 2, "alpha-tensor-name": "strength", "kv-reuse": "prefill",
                    "adapters": [
                        {"version": 1, "name": "law", "alphas": ["a0", "a1"], "bin-sections": ["", "law.bin"]},
                        {"version": 1, "name": "med", "peft": "med"},
                        {"version": 1, "name": "tax", "bin-sections": ["law.bin", ""]}],
                    "groups": [{"version": 1, "name": "both", "members": ["law", "med"]},
                               {"version": 1, "name": "money", "members": ["tax"],
                                "quant-bin-sections": ["", "tax_q.bin"]}]}}}}}})
}

fn parse(json: &Value) -> Result<DialogConfig, Error> {
    let folder = folder();
    DialogConfig::from_json(&json.to_string(), folder.path())
}

fn why(error: Error) -> ConfigError {
    match error {
        Error::Config { why, .. } => why,
        other => panic!("{other}"),
    }
}

fn pointer(error: &ConfigError) -> &str {
    match error {
        ConfigError::UnknownKey { pointer, .. }
        | ConfigError::MissingKey { pointer }
        | ConfigError::DuplicateKey { pointer }
        | ConfigError::WrongType { pointer, .. }
        | ConfigError::Value { pointer, .. }
        | ConfigError::Unsupported { pointer, .. }
        | ConfigError::File { pointer, .. } => pointer,
        other => panic!("{other}"),
    }
}

/// Every place in `json` for which `wanted` holds.
fn places(json: &Value, wanted: &dyn Fn(&Value) -> bool) -> Vec<String> {
    fn walk(json: &Value, at: &str, wanted: &dyn Fn(&Value) -> bool, found: &mut Vec<String>) {
        if wanted(json) {
            found.push(at.to_owned());
        }
        match json {
            Value::Object(entries) => {
                entries.iter().for_each(|(key, value)| walk(value, &format!("{at}/{key}"), wanted, found));
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, value)| walk(value, &format!("{at}/{i}"), wanted, found));
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(json, "", wanted, &mut found);
    found
}

// Guards: what a config says arrives, with paths resolved against its folder.
#[test]
fn everything_arrives() {
    let folder = folder();
    let path = folder.path().join("config.json");
    std::fs::write(&path, full().to_string()).unwrap();
    let config = DialogConfig::from_file(&path).unwrap();
    assert_eq!(config, DialogConfig::from_json(&full().to_string(), folder.path()).unwrap());
    let file = |name: &str| folder.path().join(name);
    let context = &config.settings.context;
    assert_eq!((context.size, context.n_vocab, context.bos_token, context.pad_token), (2048, 32064, Some(1), None));
    assert_eq!(context.eos_tokens, [2, 7, 9]);
    assert_eq!((config.settings.max_num_tokens, config.settings.stop_sequences), (256, vec!["a".into(), "bc".into()]));
    let penalty = TokenPenalty { last_n: 64, repetition: 1.1, presence: 0.5, frequency: -0.5 };
    let sampler =
        SamplerConfig { seed: Some(7), greedy: false, temp: 0.6, top_k: 30, top_p: 0.9, min_p: 0.05, penalty };
    assert_eq!(config.settings.sampler, sampler);
    assert_eq!(config.tokenizer_path, file("tok.json"));
    let rope_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let positions = PositionalEncoding { rope_dim: Some(32), rope_theta: Some(1e4), rope_scaling: Some(rope_scaling) };
    let engine = EngineConfig {
        n_threads: 2,
        ctx_bins: vec![file("p1.bin"), file("p2.bin")],
        use_mmap: true,
        cpu_mask: Some(0xe0),
        poll: false,
        role: "primary".to_owned(),
        context_size: 2048,
        n_vocab: 32064,
        positional_encoding: Some(positions),
        lora: LoraConfig {
            alpha_tensor_name: "strength".to_owned(),
            adapters: vec![
                AdapterConfig {
                    name: "law".to_owned(),
                    alphas: vec!["a0".to_owned(), "a1".to_owned()],
                    source: AdapterSource::Sections(vec![None, Some(file("law.bin"))]),
                },
                AdapterConfig { name: "med".to_owned(), alphas: Vec::new(), source: AdapterSource::Peft(file("med")) },
                AdapterConfig {
                    name: "tax".to_owned(),
                    alphas: Vec::new(),
                    source: AdapterSource::Grouped {
                        sections: vec![Some(file("law.bin")), None],
                        group: GroupSource { name: "money".to_owned(), sections: vec![None, Some(file("tax_q.bin"))] },
                    },
                },
            ],
            kv_reuse: KvReuse::Prefill,
        },
    };
    assert_eq!(config.engine, engine);
}

// Guards: a value of the wrong type is refused at its place, whichever key it is.
#[test]
fn every_wrong_type_is_refused() {
    let leaves = places(&full(), &|value| !value.is_object());
    assert!(60 < leaves.len(), "{}", leaves.len());
    for leaf in leaves {
        for wrong in [json!(null), json!({}), json!([[]]), json!("\u{1}x"), json!(-7), json!(1.5), json!(true)] {
            let mut config = full();
            let old = std::mem::replace(config.pointer_mut(&leaf).unwrap(), wrong.clone());
            let same_type = std::mem::discriminant(&old) == std::mem::discriminant(&wrong);
            match parse(&config) {
                Ok(_) => assert!(same_type || (leaf.contains("token") && wrong == json!(-7)), "{leaf}: {wrong}"),
                Err(error) => {
                    let error = why(error);
                    assert!(pointer(&error).starts_with(&leaf) || same_type, "{leaf}: {wrong}: {error}");
                }
            }
        }
    }
}

// Guards: a misspelt key is refused in every object, with the key that was meant.
#[test]
fn every_unknown_key_is_refused() {
    for object in places(&full(), &Value::is_object) {
        let mut config = full();
        config.pointer_mut(&object).unwrap()["versionn/~"] = json!(1);
        let error = why(parse(&config).unwrap_err());
        assert!(matches!(&error, ConfigError::UnknownKey { .. }), "{object}: {error}");
        assert_eq!(pointer(&error), format!("{object}/versionn~1~0"));
    }
    let mut config = full();
    config["dialog"]["engine"]["n_thread"] = json!(1);
    let error = parse(&config).unwrap_err();
    assert_eq!(error.code(), Code::JsonSchema);
    assert_eq!(why(error).to_string(), r#"/dialog/engine/n_thread: unknown key, did you mean "n-threads"?"#);
}

// Guards: exactly the keys that may be absent may be absent; the error names the one that may not.
#[test]
fn every_missing_key_is_refused() {
    let optional = [
        "max-num-tokens",
        "stop-sequence",
        "eot-token",
        "pad-token",
        "n-embd",
        "sampler",
        "seed",
        "temp",
        "top-k",
        "top-p",
        "min-p",
        "greedy",
        "token-penalty",
        "penalize-last-n",
        "repetition-penalty",
        "presence-penalty",
        "frequency-penalty",
        "role",
        "extensions",
        "device",
        "kv-dim",
        "kv-update-method",
        "graph-switching-lora-policy",
        "weight-shared-lora",
        "skip-lora-validation",
        "shared-engine",
        "data-alignment-size",
        "batch-size",
        "positional-encoding",
        "cross-attention",
        "linear-attention",
        "rope-dim",
        "rope-theta",
        "rope-scaling",
        "lora",
        "lora-version",
        "alpha-tensor-name",
        "kv-reuse",
        "alphas",
        "groups",
        "quant-bin-sections",
    ];
    for place in places(&full(), &|_| true).into_iter().skip(1) {
        let (object, key) = place.rsplit_once('/').unwrap();
        let mut config = full();
        let Value::Object(entries) = config.pointer_mut(object).unwrap() else { continue };
        entries.remove(key);
        let is_optional =
            optional.contains(&key) || ["/dialog/engine/type", "/dialog/sampler/type"].contains(&place.as_str());
        match parse(&config) {
            Ok(_) => assert!(is_optional, "{place}"),
            Err(error) if is_optional => panic!("{place}: {error}"),
            Err(error) => {
                let error = why(error);
                // These are needed by a neighbour's value, or in place of one, and are missed there.
                let by_neighbour = ["allow-async-init", "enable-graph-switching", "peft"].contains(&key);
                assert!(by_neighbour || matches!(error, ConfigError::MissingKey { .. }), "{place}: {error}");
                assert!(by_neighbour || pointer(&error) == place, "{place}: {error}");
            }
        }
    }
}

// Guards: values out of range, contradictions and what is not supported are refused at their place with their code.
#[test]
fn refused_values() {
    let check = |place: &str, value: Value, want: Code| {
        let mut config = full();
        let (object, key) = place.rsplit_once('/').unwrap();
        config.pointer_mut(&format!("/dialog{object}")).unwrap()[key] = value.clone();
        let error = parse(&config).expect_err(&format!("{place} {value}"));
        assert_eq!(error.code(), want, "{place}: {}", error.chain());
        let error = why(error);
        assert!(pointer(&error).starts_with(&format!("/dialog{place}")), "{place} {value}: {error}");
        error.to_string()
    };
    for (place, values) in [
        ("/version", vec![json!(0), json!(2)]),
        ("/max-num-tokens", vec![json!(-1), json!(4_294_967_296_u64)]),
        ("/stop-sequence", vec![json!([""]), json!(["a", "x".repeat(5000)]), json!(vec!["a"; 300])]),
        ("/context/size", vec![json!(0), json!(-5), json!(1_u64 << 40), json!(i64::MAX)]),
        ("/context/n-vocab", vec![json!(0), json!(u64::MAX)]),
        ("/context/eos-token", vec![json!([]), json!(-1), json!(32064), json!([1, 32064])]),
        ("/context/bos-token", vec![json!(32064), json!(-2)]),
        ("/sampler/temp", vec![json!(-0.1), json!(101)]),
        ("/sampler/top-k", vec![json!(-1)]),
        ("/sampler/top-p", vec![json!(0), json!(1.01), json!(-1)]),
        ("/sampler/min-p", vec![json!(-0.5), json!(2)]),
        ("/sampler/seed", vec![json!(-2)]),
        ("/sampler/callback-name", vec![json!("x")]),
        ("/sampler/type", vec![json!("basics"), json!("custom")]),
        ("/sampler/token-penalty/penalize-last-n", vec![json!(-1)]),
        ("/sampler/token-penalty/repetition-penalty", vec![json!(-1), json!(1e300)]),
        ("/engine/n-threads", vec![json!(-1), json!(100_000)]),
        ("/engine/role", vec![json!("first")]),
        (
            "/engine/backend/QnnHtp/cpu-mask",
            vec![json!(""), json!("0x"), json!("0"), json!("+1"), json!("fffffffffffffffff")],
        ),
        ("/engine/backend/QnnHtp/pos-id-dim", vec![json!(32)]),
        ("/engine/backend/QnnHtp/batch-size", vec![json!(0), json!(2)]),
        ("/engine/model/binary/ctx-bins", vec![json!([]), json!(["p1.bin", "."]), json!(["p\u{0}"])]),
        ("/engine/model/positional-encoding/rope-theta", vec![json!(0)]),
        ("/engine/model/positional-encoding/rope-scaling", vec![json!({"rope-type": "linear", "factor": 1, "dim": 2})]),
        ("/engine/model/positional-encoding/rope-scaling/high-freq-factor", vec![json!(1)]),
        // Known to the schema, and not supported yet.
        ("/type", vec![json!("ssd-q1"), json!("eaglet")]),
        ("/embedding", vec![json!({})]),
        ("/debug", vec![json!({})]),
        ("/spd", vec![json!({})]),
        ("/context/grammar", vec![json!({})]),
        ("/engine/longcontext", vec![json!({})]),
        ("/engine/cache-groups", vec![json!([])]),
        ("/engine/backend/type", vec![json!("QnnGpu"), json!("QnnGenAiTransformer"), json!("libtorch"), json!("Qnn")]),
        ("/engine/backend/QnnGpu", vec![json!({})]),
        ("/engine/model/type", vec![json!("library"), json!("checkpoint")]),
        ("/engine/model/binary/lora/version", vec![json!(2)]),
        ("/engine/model/binary/lora/lora-version", vec![json!(0), json!(1), json!(4)]),
        ("/engine/model/binary/lora/alpha-tensor-name", vec![json!(""), json!("x".repeat(300))]),
        ("/engine/model/binary/lora/kv-reuse", vec![json!("mix")]),
        ("/engine/model/binary/lora/adapters/0/alphas", vec![json!(["a", "a"]), json!([""]), json!(["a", "strength"])]),
        (
            "/engine/model/binary/lora/adapters/0/bin-sections",
            vec![json!([]), json!(["law.bin"]), json!(["", ""]), json!(["", "none.bin"]), json!(["", "med"])],
        ),
        ("/engine/model/binary/lora/adapters/0/path", vec![json!("law")]),
        ("/engine/model/binary/lora/adapters/0/peft", vec![json!("med")]),
        ("/engine/model/binary/lora/adapters/1/peft", vec![json!("none"), json!("law.bin")]),
        ("/engine/model/binary/lora/groups/0/members", vec![json!(["law", "mad"])]),
        ("/engine/model/binary/lora/groups/0/quant-bin-sections", vec![json!(["tax_q.bin"])]),
        (
            "/engine/model/binary/lora/groups/1/quant-bin-sections",
            vec![json!(["tax_q.bin"]), json!(["", "none.bin"]), json!(["", "med"])],
        ),
        ("/engine/model/binary/lora/groups/1/members", vec![json!(["tax", "tax"]), json!(["med"])]),
        ("/engine/model/linear-attention", vec![json!(true)]),
        ("/engine/model/mask-type", vec![json!("x")]),
        ("/engine/model/positional-encoding", vec![json!([])]),
        ("/engine/model/positional-encoding/type", vec![json!("alibi")]),
        ("/engine/model/positional-encoding/rope-scaling", vec![json!({"rope-type": "longrope"})]),
        ("/engine", vec![json!([])]),
    ] {
        for value in values {
            check(place, value, Code::JsonValue);
        }
    }
    let lora = "/engine/model/binary/lora";
    let version_1 = check(&format!("{lora}/lora-version"), json!(1), Code::JsonValue);
    assert!(version_1.contains("weights as graph inputs") && version_1.contains("not supported yet"), "{version_1}");
    let member = check(&format!("{lora}/groups/0/members"), json!(["mad"]), Code::JsonValue);
    assert!(member.contains("law, med"), "{member}");
    // Two groups cannot both say which encodings an adapter runs with.
    let in_two = check(&format!("{lora}/groups/1/members"), json!(["tax", "tax"]), Code::JsonValue);
    assert!(in_two.contains("not in group \"money\" already"), "{in_two}");
    let peft = check(&format!("{lora}/groups/1/members"), json!(["tax", "med"]), Code::JsonValue);
    assert!(peft.contains("an adapter with \"bin-sections\""), "{peft}");
    let mut twice = full();
    twice["dialog"]["engine"]["model"]["binary"]["lora"]["adapters"][1]["name"] = json!("law");
    assert_eq!(pointer(&why(parse(&twice).unwrap_err())), "/dialog/engine/model/binary/lora/adapters/1");
    assert!(check("/sampler/type", json!("basics"), Code::JsonValue).contains("did you mean \"basic\"?"));
    let absent = check("/tokenizer/path", json!("sub/none.json"), Code::JsonValue);
    let at = absent.find("sub/none.json").expect("the path is named");
    assert!(absent[..at].contains("/tmp") || absent[..at].len() > 30, "resolved: {absent}");
}

// Guards: a key that is there twice is refused at any depth, also with the same value.
#[test]
fn duplicate_keys() {
    let check = |key: &str, place: &str| {
        let text = full().to_string().replacen(&format!("\"{key}\":"), &format!("\"{key}\":1,\"{key}\":"), 1);
        let error = why(DialogConfig::from_json(&text, folder().path()).unwrap_err());
        assert!(matches!(&error, ConfigError::DuplicateKey { pointer } if pointer == place), "{error}");
    };
    check("dialog", "/dialog");
    check("temp", "/dialog/sampler/temp");
    check("cpu-mask", "/dialog/engine/backend/QnnHtp/cpu-mask");
}

// Guards: what is not JSON is said to be none, with line and column; deep nesting and absent files do no harm.
#[test]
fn not_json() {
    let check = |text: &str| {
        let error = DialogConfig::from_json(text, "").unwrap_err();
        assert_eq!(error.code(), Code::JsonFormat, "{text:.40}: {}", error.chain());
        error.chain()
    };
    check("");
    assert!(check("{\n\"dialog\": oops}").contains("line 2 column"));
    check(&"[".repeat(100_000));
    check(&format!("\"{}\"", "x".repeat(5 << 20)));
    let whole = full().to_string();
    for len in 0..whole.len() {
        check(&whole[..len]);
    }
    let absent = DialogConfig::from_file("/nowhere/config.json").unwrap_err();
    assert!(absent.chain().starts_with("config /nowhere/config.json: cannot be read: "), "{}", absent.chain());
    assert_eq!(absent.code(), Code::InvalidConfig);
}

// Guards: the shortest config is enough; what it leaves out has the stated defaults.
#[test]
fn defaults() {
    let mut config = full();
    let dialog = config["dialog"].as_object_mut().unwrap();
    dialog.retain(|key, _| !["max-num-tokens", "stop-sequence", "sampler"].contains(&key.as_str()));
    dialog["engine"]["model"].as_object_mut().unwrap().remove("positional-encoding");
    let config = parse(&config).unwrap();
    assert_eq!(config.settings.max_num_tokens, u32::MAX);
    assert!(config.settings.stop_sequences.is_empty());
    assert_eq!(config.settings.sampler, SamplerConfig::default());
    assert_eq!(config.engine.positional_encoding, None);
}

proptest! {
    // Guards: no damage to a config's bytes makes it panic.
    #[test]
    fn damaged_bytes(at in 0_usize..2000, byte in 0x20_u8..0x7F) {
        let mut text = full().to_string().into_bytes();
        let at = at % text.len();
        text[at] = byte;
        let _ = DialogConfig::from_json(std::str::from_utf8(&text).unwrap(), "");
    }
}
