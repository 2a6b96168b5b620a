//! `MODELS.md` says what the importers accept, and nothing else.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use qnn_core::offline::arch::SUPPORTED;
use qnn_core::offline::gguf::{GgmlType, pre_tokenizer_names};
use qnn_core::offline::source::{ElementFormat, SourceTensor};
use qnn_core::{BlockOffsets, Encoding};
use serde_json::Value;

fn crate_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// One line for each family: its names, what is built, what PEFT adapters may target, the variants of its configuration that
/// are checked against transformers.
fn table() -> String {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/families/logits.json")).unwrap();
    let list = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let mut out = String::from(
        "| family | `model_type` | GGUF | built | adapters on | checked |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for family in SUPPORTED {
        let model_type = family.model_types[0];
        let folder = model_type.trim_end_matches("_text");
        let config = crate_file(&format!("../tests/golden/families/{folder}/adapter/adapter_config.json"));
        let config: Value = serde_json::from_slice(&std::fs::read(&config).expect(folder)).unwrap();
        let targets: Vec<&str> =
            config["target_modules"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let variants: Vec<&str> = golden["families"][folder].as_object().unwrap().keys().map(String::as_str).collect();
        let gguf = if family.gguf_names.is_empty() { "no".to_owned() } else { list(family.gguf_names) };
        writeln!(
            out,
            "| {} | {} | {gguf} | {} | {} | {} |",
            family.title,
            list(family.model_types),
            family.notes,
            list(&targets),
            variants.join(", ")
        )
        .unwrap();
    }
    out
}

/// One line for each GGML format: what its matrices become without `--weights_bitwidth`, and what that does to the numbers.
fn formats() -> String {
    let mut out = String::from("| in the file | in the graph | numbers |\n| --- | --- | --- |\n");
    for name in ["F32", "F16", "BF16"] {
        writeln!(out, "| {name} | {name} | exact |").unwrap();
    }
    let workers = htp_sim::Workers::new(1).unwrap();
    for ggml in GgmlType::ALL {
        let (shape, bytes) = (vec![1, ggml.block_elements()], vec![0; ggml.block_bytes()]);
        let block = SourceTensor::new("block", shape, ElementFormat::Ggml(*ggml), bytes.into()).unwrap();
        let kept = ggml.keep_grid(&block, &workers).unwrap();
        let Encoding::Block { bitwidth, block_size, offsets, .. } = kept.encoding else {
            panic!("{}: no blocks", ggml.name())
        };
        let fills = usize::from(bitwidth) == kept.data_type.bits();
        let bits = if fills { String::new() } else { format!(" of {bitwidth} bits,") };
        let offsets = if matches!(offsets, BlockOffsets::Min(_)) { ", float minima" } else { "" };
        let change = ggml.change().name();
        writeln!(out, "| {} | {}{bits} block {block_size}{offsets} | {change} |", ggml.name(), kept.data_type).unwrap();
    }
    out
}

/// The ways of cutting text before byte-level merges, by the names that GGUF files give them.
fn pre_tokenizers() -> String {
    pre_tokenizer_names().iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ") + "\n"
}

/// Guards: the tables in the documentation are what the importers do. `UPDATE_MODELS_MD=1` writes them.
#[test]
fn models_md_is_up_to_date() {
    let path = crate_file("MODELS.md");
    let mut text = std::fs::read_to_string(&path).unwrap();
    for (name, new) in [("families", table()), ("formats", formats()), ("pre-tokenizers", pre_tokenizers())] {
        let (begin, end) =
            (format!("<!-- {name}: written by tests/suite/models_md.rs -->\n"), format!("<!-- end of {name} -->\n"));
        let (before, rest) = text.split_once(&begin).expect("the mark before the table");
        let (old, after) = rest.split_once(&end).expect("the mark after the table");
        if std::env::var_os("UPDATE_MODELS_MD").is_some() {
            text = format!("{before}{begin}{new}{end}{after}");
            std::fs::write(&path, &text).unwrap();
        } else {
            assert_eq!(old, new, "run this test with UPDATE_MODELS_MD=1");
        }
    }
}
