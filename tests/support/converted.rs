//! A model converted into a temporary folder and opened as a user's config opens it: tiny ones, and the real one of the
//! slow tests.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use genie::{config::DialogConfig, engine::qnn::QnnEngine};
use qnn_core::offline::{
    arch::Precision,
    convert::{ConvertOptions, convert},
    generate::{GenerateOptions, generate},
};
use serde_json::json;
use tempfile::TempDir;

use crate::tiny_model::TinyModel;

/// A converted model in a folder that is removed when this is dropped.
pub struct Converted {
    folder: TempDir,
    context_size: usize,
    n_vocab: usize,
}

impl Converted {
    /// Converts the real model `input`, a folder or file below `$GENIE_MODELS` (or `models/`).
    pub fn real(input: &str, precision: Precision) -> Result<Converted> {
        let input = models_folder().join(input);
        let converted = Converted { folder: TempDir::new()?, context_size: 1024, n_vocab: 49152 };
        converted.make(&input, precision).with_context(|| format!("{} (see tests/golden)", input.display()))?;
        Ok(converted)
    }

    /// Converts a tiny model.
    pub fn tiny(model: &TinyModel, precision: Precision) -> Result<Converted> {
        let context_size = model.max_positions;
        let converted = Converted { folder: TempDir::new()?, context_size, n_vocab: model.vocab };
        let source = converted.path().join("source");
        model.write_hf(&source)?;
        converted.make(&source, precision)?;
        Ok(converted)
    }

    fn make(&self, input: &Path, precision: Precision) -> Result<()> {
        let dlc = self.path().join("model.dlc");
        let options = ConvertOptions { input: input.to_owned(), output: dlc.clone(), precision, threads: 2 };
        convert(&options, &mut |_| {})?;
        let options = GenerateOptions {
            dlc_path: dlc.clone(),
            output_dir: self.path().to_owned(),
            binary_file: "model".to_owned(),
            ar: vec![128, 1],
            cl: vec![self.context_size],
            num_splits: 1,
            adapter_weight_config: None,
        };
        generate(&options, &mut |_| {})?;
        Ok(std::fs::remove_file(dlc)?)
    }

    /// The dialog config of the model: greedy, two threads.
    pub fn config(&self) -> Result<DialogConfig> {
        let mut config: serde_json::Value =
            serde_json::from_str(include_str!("../../configs/smollm2-135m-instruct.json"))?;
        let dialog = &mut config["dialog"];
        dialog["context"]["size"] = json!(self.context_size);
        dialog["context"]["n-vocab"] = json!(self.n_vocab);
        dialog["engine"]["n-threads"] = json!(2);
        dialog["engine"]["model"]["binary"]["ctx-bins"] = json!(["model.bin"]);
        Ok(DialogConfig::from_json(&config.to_string(), self.path())?)
    }

    /// The model, open.
    pub fn engine(&self) -> Result<QnnEngine> {
        Ok(QnnEngine::open(&self.config()?.engine)?)
    }

    /// The folder with the context binary.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Where the models of the slow tests are.
pub fn models_folder() -> PathBuf {
    std::env::var_os("GENIE_MODELS").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models"), PathBuf::from)
}
