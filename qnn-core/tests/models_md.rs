//! `MODELS.md` says what the importers accept, and nothing else.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use qnn_core::offline::arch::SUPPORTED;
use serde_json::Value;

const BEGIN: &str = "<!-- families: written by tests/models_md.rs -->\n";
const END: &str = "<!-- end of families -->\n";

fn crate_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// One line for each family: its names, what is built, what PEFT adapters may target, the variants of its configuration that
/// are checked against transformers.
fn table() -> String {
    let golden: Value = serde_json::from_str(include_str!("../../tests/golden/families/logits.json")).unwrap();
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

/// Guards: the table in the documentation is what the importers do. `UPDATE_MODELS_MD=1` writes it.
#[test]
fn models_md_is_up_to_date() {
    let path = crate_file("MODELS.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the mark before the table");
    let (old, after) = rest.split_once(END).expect("the mark after the table");
    let new = table();
    if std::env::var_os("UPDATE_MODELS_MD").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{new}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(old, new, "run this test with UPDATE_MODELS_MD=1");
}
