//! A model converted into a temporary folder and opened as a user's config opens it: tiny ones, and the real one of the
//! slow tests.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use genie::{config::DialogConfig, engine::qnn::QnnEngine};
use htp_sim::Workers;
use qnn_core::{
    backend::HtpBackend,
    offline::{
        arch::{ActivationBits, CacheType, Grouping, Precision, WeightType},
        convert::{ConvertOptions, convert_with_lora},
        dlc::{read_dlc, write_dlc},
        generate::{GenerateOptions, generate},
        lora::{
            LoraBits, LoraOptions, PlacedAdapters, UpdatableMode,
            import::{ImportOptions, import},
        },
        quantize::{Activations, Calibration, QuantizeOptions, Schema, Tools, adapters::calibrate_adapters, quantize},
        quantize_weights::Bits,
    },
};
use serde_json::json;
use tempfile::TempDir;

use crate::tiny_model::{SplitMix64, TinyModel};

/// A converted model in a folder that is removed when this is dropped.
pub struct Converted {
    folder: TempDir,
    context_size: usize,
    n_vocab: usize,
    num_splits: usize,
    /// Use cases: a name and the PEFT directories that it is made of.
    use_cases: Vec<(String, Vec<PathBuf>)>,
    /// Groups: a name and the names of their members.
    groups: Vec<(String, Vec<String>)>,
    /// Whether activations have static encodings of 8 bits, which adapters and groups replace by their own.
    is_static: bool,
}

impl Converted {
    /// Converts the real model `input`, a folder or file below `$GENIE_MODELS` (or `models/`).
    pub fn real(input: &str, precision: Precision) -> Result<Converted> {
        let input = models_folder().join(input);
        let converted = Converted::empty(1024, 49152, Vec::new())?;
        converted.make(&input, precision).with_context(|| format!("{} (see tests/golden)", input.display()))?;
        Ok(converted)
    }

    /// Converts the real model with branches for the adapters of `examples/adapters`, and these: `json`, `pirate`, `sql`
    /// and `json+pirate` of both.
    pub fn real_with_adapters(input: &str, precision: Precision) -> Result<Converted> {
        let input = models_folder().join(input);
        let use_case = |parts: &[&str]| (parts.join("+"), parts.iter().map(|part| adapter_folder(part)).collect());
        let use_cases = [&["json"][..], &["pirate"], &["sql"], &["json", "pirate"]].map(use_case).into();
        let converted = Converted::empty(1024, 49152, use_cases)?;
        converted.make(&input, precision).with_context(|| format!("{} (see tests/golden)", input.display()))?;
        Ok(converted)
    }

    /// Converts a tiny model.
    pub fn tiny(model: &TinyModel, precision: Precision) -> Result<Converted> {
        Converted::tiny_with_adapters(model, precision, &[])
    }

    /// Converts a tiny model with branches for these adapters: a name and a PEFT directory each.
    pub fn tiny_with_adapters(
        model: &TinyModel,
        precision: Precision,
        adapters: &[(&str, &Path)],
    ) -> Result<Converted> {
        Converted::tiny_in_splits(model, precision, adapters, 1)
    }

    /// The same in so many context binaries.
    pub fn tiny_in_splits(
        model: &TinyModel,
        precision: Precision,
        adapters: &[(&str, &Path)],
        num_splits: usize,
    ) -> Result<Converted> {
        let whole = Converted::empty(model.max_positions, model.vocab, use_cases(adapters))?;
        let converted = Converted { num_splits, ..whole };
        let source = converted.path().join("source");
        model.write_hf(&source)?;
        converted.make(&source, precision)?;
        Ok(converted)
    }

    /// Converts a tiny model whose activations have static encodings of 8 bits. Each adapter brings its own, those of a group
    /// (a name and its members) share theirs.
    pub fn tiny_static(model: &TinyModel, adapters: &[(&str, &Path)], groups: &[(&str, &[&str])]) -> Result<Converted> {
        let group = |(name, members): &(&str, &[&str])| {
            ((*name).to_owned(), members.iter().map(|member| (*member).to_owned()).collect())
        };
        let empty = Converted::empty(model.max_positions, model.vocab, use_cases(adapters))?;
        let converted = Converted { groups: groups.iter().map(group).collect(), is_static: true, ..empty };
        let source = converted.path().join("source");
        model.write_hf(&source)?;
        let activations = ActivationBits::Sixteen;
        let precision = Precision { weights: WeightType::F32, activations, cache: Some(CacheType::F32) };
        converted.make(&source, precision)?;
        Ok(converted)
    }

    fn empty(context_size: usize, n_vocab: usize, use_cases: Vec<(String, Vec<PathBuf>)>) -> Result<Converted> {
        let (folder, groups) = (TempDir::new()?, Vec::new());
        Ok(Converted { folder, context_size, n_vocab, num_splits: 1, use_cases, groups, is_static: false })
    }

    fn make(&self, input: &Path, precision: Precision) -> Result<()> {
        let dlc = self.path().join("model.dlc");
        let options = ConvertOptions { input: input.to_owned(), output: dlc.clone(), precision, threads: 2 };
        let lora = LoraOptions {
            weight_list: None,
            adapters: self.use_cases.iter().flat_map(|(_, parts)| parts).cloned().collect(),
            max_rank: Some(24),
            bits: self.is_static.then_some(LoraBits::Eight),
            mode: if self.is_static { UpdatableMode::All } else { UpdatableMode::AdapterOnly },
        };
        let has_adapters = !self.use_cases.is_empty();
        convert_with_lora(&options, has_adapters.then_some(&lora), &mut |_| {})?;
        let adapter_weight_config = if has_adapters { Some(self.import_adapters(&dlc)?) } else { None };
        if self.is_static {
            self.quantize(&dlc, adapter_weight_config.as_deref())?;
        }
        let options = GenerateOptions {
            dlc_path: dlc.clone(),
            output_dir: self.path().to_owned(),
            binary_file: "model".to_owned(),
            ar: vec![128, 1],
            cl: vec![self.context_size],
            num_splits: self.num_splits,
            adapter_weight_config,
            lora_weight_sharing: false,
        };
        generate(&options, &mut |_| {})?;
        Ok(std::fs::remove_file(dlc)?)
    }

    fn import_adapters(&self, dlc: &Path) -> Result<PathBuf> {
        let use_case = |(name, parts): &(String, Vec<PathBuf>)| json!({ "name": name, "model_name": "model", "lora_weights": parts });
        let use_cases: Vec<_> = self.use_cases.iter().map(use_case).collect();
        let group = |(name, members): &(String, Vec<String>)| json!({ "name": name, "members": members });
        let groups: Vec<_> = self.groups.iter().map(group).collect();
        let lora_config = self.path().join("use_cases.yaml");
        // JSON is YAML.
        std::fs::write(&lora_config, json!({ "use_case": use_cases, "group": groups }).to_string())?;
        let options =
            ImportOptions { lora_config, input_dlc: dlc.to_owned(), output_dir: self.path().join("adapters") };
        Ok(import(&options)?.list)
    }

    /// Gives weights and activations 8 bits, by what random ids show with and without the adapters of `list`.
    fn quantize(&self, dlc: &Path, list: Option<&Path>) -> Result<()> {
        let graph = read_dlc(dlc)?;
        let mut random = SplitMix64(11);
        let ids: Vec<u32> = (0..256).map(|_| random.below(self.n_vocab as u64) as u32).collect();
        let windows: Vec<&[u32]> = ids.chunks(32).collect();
        let calibration = Calibration::MinMax;
        let activations = Activations { bits: 8, calibration, schema: Schema::Asymmetric, least_sqnr_db: None };
        // Without blocks: on every tier a conversation that goes on has the bits of one that is fed whole.
        let weights = WeightType::Int { bits: Bits::Eight, grouping: Grouping::PerChannel };
        let options = QuantizeOptions { weights, activations, cache: None };
        let (backend, workers) = (HtpBackend::new(2)?, Workers::new(2)?);
        let mut tools = Tools { backend: &backend, workers: &workers, progress: &mut |_| {} };
        let (quantized, _) = quantize(&graph, &windows, &options, None, &mut tools)?;
        if let Some(list) = list {
            let mut placed = PlacedAdapters::as_imported(list);
            calibrate_adapters(&graph, &quantized, &mut placed, &windows, activations, &mut tools)?;
            placed.write()?;
        }
        Ok(write_dlc(dlc, &quantized)?)
    }

    /// The dialog config of the model: greedy, two threads.
    pub fn config(&self) -> Result<DialogConfig> {
        self.config_with(|_| {})
    }

    /// The same with what `change` makes of it.
    pub fn config_with(&self, change: impl FnOnce(&mut serde_json::Value)) -> Result<DialogConfig> {
        let mut config: serde_json::Value =
            serde_json::from_str(include_str!("../../configs/smollm2-135m-instruct.json"))?;
        let dialog = &mut config["dialog"];
        dialog["context"]["size"] = json!(self.context_size);
        dialog["context"]["n-vocab"] = json!(self.n_vocab);
        dialog["engine"]["n-threads"] = json!(2);
        let files: Vec<String> = match self.num_splits {
            1 => vec!["model.bin".to_owned()],
            n => (1..=n).map(|i| format!("model_{i}_of_{n}.bin")).collect(),
        };
        dialog["engine"]["model"]["binary"]["ctx-bins"] = json!(files);
        if !self.use_cases.is_empty() {
            let section = |file: &String, name: &str| file.replace(".bin", &format!("_{name}.bin"));
            let sections = |name: &str| files.iter().map(|file| section(file, name)).collect::<Vec<_>>();
            let adapter = |name: &str| json!({"version": 1, "name": name, "bin-sections": sections(name)});
            let names = self.use_cases.iter().map(|(name, _)| name.as_str()).chain(["default_adapter"]);
            let adapters: Vec<_> = names.map(adapter).collect();
            let group = |(name, members): &(String, Vec<String>)| json!({"version": 1, "name": name, "members": members, "quant-bin-sections": sections(name)});
            let groups: Vec<_> = self.groups.iter().map(group).collect();
            dialog["engine"]["model"]["binary"]["lora"] = json!({"version": 1, "adapters": adapters, "groups": groups});
        }
        change(&mut config["dialog"]);
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

/// Use cases of one PEFT directory each.
fn use_cases(adapters: &[(&str, &Path)]) -> Vec<(String, Vec<PathBuf>)> {
    adapters.iter().map(|(name, folder)| ((*name).to_owned(), vec![folder.to_path_buf()])).collect()
}

/// An adapter of `examples/adapters`.
pub fn adapter_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/adapters").join(name)
}

/// Where the models of the slow tests are.
pub fn models_folder() -> PathBuf {
    std::env::var_os("GENIE_MODELS").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models"), PathBuf::from)
}
