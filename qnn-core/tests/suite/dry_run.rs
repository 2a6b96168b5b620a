//! A dry run says what the conversion then does.

use std::path::{Path, PathBuf};

use qnn_core::offline::arch::{ActivationBits, Grouping, Precision, WeightType};
use qnn_core::offline::convert::{ConvertOptions, convert_with_lora};
use qnn_core::offline::dry_run::dry_run;
use qnn_core::offline::lora::{LoraOptions, UpdatableMode};
use qnn_core::offline::quantize_weights::Bits;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// Guards: the formats and sizes that a dry run tells are those of the conversion, to the byte; nothing is written.
#[test]
fn dry_run_is_exact() {
    let int = |bits, grouping| WeightType::Int { bits, grouping };
    for (name, weights, adapter) in [
        ("families/gemma3", WeightType::Keep, true),
        ("families/phi3", int(Bits::Eight, Grouping::PerChannel), true),
        ("families/qwen3", int(Bits::Eight, Grouping::Block(8)), false),
        ("families/llama", WeightType::F16, true),
        ("families/granite", int(Bits::Four, Grouping::PerChannel), false),
        ("int4/gptq", WeightType::Keep, false),
        ("int4/awq", WeightType::F32, false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out/model.dlc");
        let precision = Precision { weights, activations: ActivationBits::Sixteen, cache: None };
        let options = ConvertOptions { input: golden(name), output, precision, threads: 1 };
        let lora = adapter.then(|| LoraOptions {
            weight_list: None,
            adapters: vec![golden(name).join("adapter")],
            max_rank: Some(4),
            bits: None,
            mode: UpdatableMode::AdapterOnly,
        });
        let told = dry_run(&options, lora.as_ref()).unwrap();
        assert!(!folder.path().join("out").exists(), "{name}: something was written");
        let done = convert_with_lora(&options, lora.as_ref(), &mut |_| {}).unwrap();
        assert_eq!(told.dlc_bytes, done.size_bytes, "{name}");
        assert_eq!(told.weights, done.weights, "{name}");
        assert_eq!(told.parameters, done.parameters, "{name}");
        assert_eq!(told.lora, done.lora, "{name}");
        assert_eq!(told.architecture, done.architecture, "{name}");
        let attach: usize = told.attach_points.iter().map(|kind| kind.layers).sum();
        assert_eq!(attach, 7 * told.layers, "{name}");
    }
}

/// Guards: an adapter that does not fit is refused by a dry run as by the conversion.
#[test]
fn dry_run_refuses_what_does_not_fit() {
    let precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };
    let options = ConvertOptions { input: golden("families/qwen2"), output: "model.dlc".into(), precision, threads: 1 };
    let lora = LoraOptions {
        weight_list: None,
        adapters: vec![golden("families/phi3/adapter")],
        max_rank: None,
        bits: None,
        mode: UpdatableMode::AdapterOnly,
    };
    let dry = dry_run(&options, Some(&lora)).unwrap_err();
    let wet = convert_with_lora(&options, Some(&lora), &mut |_| {}).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(dry));
    assert!(text.contains("layers.0.mlp.down_proj.lora_B.weight: 48 outputs, need 40"), "{text}");
    assert_eq!(text, format!("{:#}", anyhow::Error::from(wet)));
}
