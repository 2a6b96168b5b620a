//! The real model of the slow tests: converted once per precision into a temporary folder, opened as a user's config
//! opens it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use genie::{config::DialogConfig, engine::qnn::QnnEngine};
use qnn_core::offline::{
    arch::Precision,
    convert::{ConvertOptions, convert},
    generate::{GenerateOptions, generate},
};
use tempfile::TempDir;

/// A converted model in a folder that is removed when this is dropped.
pub struct RealModel {
    folder: TempDir,
}

impl RealModel {
    /// Converts `input`, a folder or file below `$GENIE_MODELS` (or `models/`), with graphs of 128 and 1 rows.
    pub fn convert(input: &str, precision: Precision) -> Result<RealModel> {
        let folder = TempDir::new()?;
        let dlc = folder.path().join("model.dlc");
        let input = models_folder().join(input);
        let options = ConvertOptions { input: input.clone(), output: dlc.clone(), precision, threads: 2 };
        convert(&options, &mut |_| {}).with_context(|| format!("{} (see tests/golden/README.md)", input.display()))?;
        let options = GenerateOptions {
            dlc_path: dlc.clone(),
            output_dir: folder.path().to_owned(),
            binary_file: "model".to_owned(),
            ar: vec![128, 1],
            cl: vec![1024],
            num_splits: 1,
        };
        generate(&options, &mut |_| {})?;
        std::fs::remove_file(dlc)?;
        Ok(RealModel { folder })
    }

    /// The dialog config of the model: greedy, two threads.
    pub fn config(&self) -> Result<DialogConfig> {
        let text = include_str!("../../configs/smollm2-135m-instruct.json");
        let mut config: serde_json::Value = serde_json::from_str(text)?;
        config["dialog"]["context"]["size"] = 1024.into();
        config["dialog"]["engine"]["n-threads"] = 2.into();
        config["dialog"]["engine"]["model"]["binary"]["ctx-bins"] = serde_json::json!(["model.bin"]);
        Ok(DialogConfig::from_json(&config.to_string(), self.folder.path())?)
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
