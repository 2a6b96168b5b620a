//! Guards: what a config says about a model is compared with the model when it is opened, and what is not so is refused by name.

use std::path::Path;

use genie::{Error, Model};
use genie_workspace::{converted::Converted, tiny_model::TinyModel};
use qnn_core::adapter::Description;
use qnn_core::offline::arch::{ActivationBits, Precision, WeightType};
use qnn_core::{Adapter, Bytes, Context, OpenOptions};
use serde_json::{Value, json};

const PRECISION: Precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };

/// What is wrong, with all its causes.
fn refusal(opened: Result<Model, Error>) -> String {
    let error = anyhow::Error::from(opened.expect_err("it is refused"));
    format!("{error:#}")
}

// Guards: positions are rotated as the config states, or the model is not opened.
#[test]
fn rotary_positions_are_compared() {
    let model = Converted::tiny(&TinyModel::llama(31), PRECISION).expect("it converts");
    let open = |block: Value| {
        Model::open(
            model.config_with(|dialog| dialog["engine"]["model"]["positional-encoding"] = block).expect("a config"),
        )
    };
    let rope = |more: Value| {
        let mut block = json!({"type": "rope"});
        block.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        block
    };
    for same in [
        json!({}),
        json!({"rope-dim": 8}),
        json!({"rope-dim": 8, "rope-theta": 10000}),
        json!({"rope-theta": 10000, "rope-scaling": {"rope-type": "default"}}),
        json!({"rope-scaling": {"rope-type": "linear", "factor": 1}}),
    ] {
        assert!(open(rope(same.clone())).is_ok(), "{same}");
    }
    let llama3 = json!({"rope-type": "llama3", "factor": 8, "low-freq-factor": 1, "high-freq-factor": 4,
                        "original-max-position-embeddings": 64});
    for (other, word) in [
        (json!({"rope-dim": 16}), "rope-dim: config says 16 frequencies"),
        (json!({"rope-theta": 500_000}), "rope-theta and rope-scaling: config says 8 frequencies"),
        (json!({"rope-scaling": {"rope-type": "linear", "factor": 4}}), "config says 8 frequencies from 0.25"),
        (json!({"rope-theta": 10000, "rope-scaling": llama3}), "model has 8 frequencies from 1 to"),
    ] {
        let refused = refusal(open(rope(other)));
        assert!(refused.contains(word), "{refused}");
    }
    let in_htp = model.config_with(|dialog| dialog["engine"]["backend"]["QnnHtp"]["rope-theta"] = json!(500_000));
    assert!(refusal(Model::open(in_htp.expect("a config"))).contains("rope-theta"));
}

// Guards: an adapter is what one name stands for; sections of several are not taken for one, though each fits its split.
#[test]
fn sections_of_several_adapters_are_refused() {
    let tiny = TinyModel::llama(32);
    let folder = tempfile::tempdir().expect("a folder");
    let folders = ["a", "b"].map(|name| folder.path().join(name));
    for (seed, folder) in (1..).zip(&folders) {
        tiny.write_peft(folder, seed, 3).expect("it is written");
    }
    let adapters: Vec<(&str, &Path)> =
        ["a", "b"].into_iter().zip(folders.iter().map(|folder| folder.as_path())).collect();
    let model = Converted::tiny_in_splits(&tiny, PRECISION, &adapters, 2).expect("it converts");
    let sections = |first: &str, second: &str| {
        let config = model.config_with(|dialog| {
            let files = json!([format!("model_1_of_2_{first}.bin"), format!("model_2_of_2_{second}.bin")]);
            dialog["engine"]["model"]["binary"]["lora"]["adapters"] =
                json!([{"version": 1, "name": "mine", "bin-sections": files}]);
        });
        let mut dialog = Model::open(config.expect("a config")).and_then(|model| model.dialog()).expect("it opens");
        dialog.apply_lora("primary", "mine")
    };
    sections("a", "a").expect("one adapter");
    let refused = format!("{:#}", anyhow::Error::from(sections("a", "b").expect_err("two adapters")));
    assert!(
        refused.contains("model_2_of_2_b.bin") && refused.contains("\"b\"") && refused.contains("\"a\""),
        "{refused}"
    );
}

// Guards: a section for one graph is not applied to the others of its context.
#[test]
fn a_section_for_one_graph_is_refused() {
    let tiny = TinyModel::llama(33);
    let folder = tempfile::tempdir().expect("a folder");
    tiny.write_peft(folder.path(), 1, 3).expect("it is written");
    let model = Converted::tiny_with_adapters(&tiny, PRECISION, &[("a", folder.path())]).expect("it converts");
    let context = Context::open(&model.path().join("model.bin"), &OpenOptions::default()).expect("it opens");
    let section = model.path().join("model_a.bin");
    let adapter = context.load_section(Bytes::map_file(&section).expect("it is there")).expect("it fits");
    let values = adapter.values().map(|(name, panels)| (name.to_owned(), panels.clone()));
    let token = context.graphs().find(|graph| graph.contains("ar1_")).expect("a graph for tokens").to_owned();
    let one = Description { graph: Some(token.clone()), ..adapter.description().clone() };
    let one = Adapter::new("a", adapter.names().clone(), values).expect("the same names").described(one);
    std::fs::write(&section, context.section(&one).expect("it fits")).expect("it is written");
    let mut dialog = Model::open(model.config().expect("a config")).and_then(|model| model.dialog()).expect("it opens");
    let refused =
        format!("{:#}", anyhow::Error::from(dialog.apply_lora("primary", "a").expect_err("one graph of two")));
    assert!(refused.contains("model_a.bin") && refused.contains(&token), "{refused}");
}
