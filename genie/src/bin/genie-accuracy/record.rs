//! A result as it is kept: the JSON of `--output`, read back for reports.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use genie::AdapterChoice;
use genie::accuracy::compare::{Comparison, Sqnr, TensorError};
use genie::accuracy::{Perplexity, summary::Summary};
use qnn_core::outline::Place;
use serde::{Deserialize, Serialize};

/// One model compared with one reference over one text, with the base and adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// [`FORMAT`].
    pub(crate) format: String,
    /// [`VERSION`].
    pub(crate) version: u32,
    /// What the model is called.
    pub(crate) label: String,
    pub(crate) machine: MachineRecord,
    /// What made this result.
    pub(crate) command: String,
    /// What made the model.
    pub(crate) commands: Vec<String>,
    pub(crate) text: TextRecord,
    pub(crate) reference: ModelRecord,
    pub(crate) model: ModelRecord,
    pub(crate) cases: Vec<CaseRecord>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineRecord {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) system: String,
    pub(crate) kernels: String,
    pub(crate) threads: usize,
    /// Version of the library.
    pub(crate) genie: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextRecord {
    pub(crate) file: String,
    /// Ids of the whole text.
    pub(crate) ids: usize,
    /// Ids of a window.
    pub(crate) window: usize,
    /// Windows that were run.
    pub(crate) windows: usize,
}

/// What a model consists of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelRecord {
    pub(crate) config: String,
    pub(crate) files: Vec<FileRecord>,
    pub(crate) weights: Vec<FormatRecord>,
    /// Number of tensors that matrices multiply, by what they are.
    pub(crate) inputs: BTreeMap<String, usize>,
    pub(crate) cache: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileRecord {
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// The weights of one format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FormatRecord {
    pub(crate) format: String,
    pub(crate) count: usize,
    pub(crate) bytes: u64,
}

/// The base, or one adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CaseRecord {
    /// `null` is the base.
    pub(crate) adapter: Option<String>,
    /// By alpha; 1 for those that are not here.
    pub(crate) strengths: Vec<(String, f32)>,
    pub(crate) adapter_files: Option<AdapterFiles>,
    pub(crate) scored_ids: usize,
    pub(crate) reference: PerplexityRecord,
    pub(crate) tested: PerplexityRecord,
    /// Perplexity over that of the reference.
    pub(crate) ratio: f64,
    /// Its natural logarithm, and the standard error of that.
    pub(crate) log_ratio: f64,
    pub(crate) log_ratio_error: f64,
    /// Share of the scored ids where both have the same most probable token.
    pub(crate) top1_agreement: f64,
    /// In nats, of the tested from the reference's distribution.
    pub(crate) divergence: DivergenceRecord,
    pub(crate) tensors: Vec<TensorRecord>,
}

/// What the files of an adapter say. What a PEFT directory does not is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdapterFiles {
    pub(crate) bytes: u64,
    /// Layers that it changes.
    pub(crate) targets: Option<usize>,
    /// Tensors that it brings encodings of its own for; 0 means that it shares those of the base.
    pub(crate) encodings: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PerplexityRecord {
    pub(crate) perplexity: f64,
    pub(crate) window_mean_nll: Vec<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DivergenceRecord {
    pub(crate) mean: f64,
    pub(crate) median: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// How far a tensor is from the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorRecord {
    pub(crate) name: String,
    /// `embedding`, `layer 0`, `head`.
    pub(crate) place: String,
    /// True for the result of its place.
    pub(crate) ends: bool,
    /// Elements of a row.
    pub(crate) width: usize,
    /// With its place given what the reference gave to it.
    pub(crate) made: SqnrRecord,
    /// With all that went wrong before it.
    pub(crate) accumulated: SqnrRecord,
}

/// Signal to quantization noise in decibels; `null` where nothing differs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SqnrRecord {
    /// Of all rows together.
    pub(crate) all_db: Option<f64>,
    /// Mean of the rows' own.
    pub(crate) row_db: Option<f64>,
}

impl Record {
    /// Reads a file of `--output`.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Record> {
        let place = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(place)?;
        let head: serde_json::Value = serde_json::from_str(&text).with_context(place)?;
        ensure!(
            head["format"] == FORMAT && head["version"] == VERSION,
            "{}: format {} version {}, need {FORMAT:?} version {VERSION}: a file of --output",
            path.display(),
            head["format"],
            head["version"]
        );
        serde_json::from_str(&text).with_context(place)
    }

    pub(crate) fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The result without an adapter.
    pub(crate) fn base(&self) -> Option<&CaseRecord> {
        self.cases.iter().find(|case| case.adapter.is_none())
    }

    /// The results with adapters.
    pub(crate) fn adapters(&self) -> impl Iterator<Item = &CaseRecord> {
        self.cases.iter().filter(|case| case.adapter.is_some())
    }
}

impl ModelRecord {
    pub(crate) fn new(config: &Path, summary: &Summary) -> ModelRecord {
        let file = |(name, bytes): &(String, u64)| FileRecord { name: name.clone(), bytes: *bytes };
        let format = |(format, (count, bytes)): (&String, &(usize, u64))| FormatRecord {
            format: format.clone(),
            count: *count,
            bytes: *bytes,
        };
        ModelRecord {
            config: config.display().to_string(),
            files: summary.files.iter().map(file).collect(),
            weights: summary.weights.iter().map(format).collect(),
            inputs: summary.inputs.clone(),
            cache: summary.cache.clone(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl CaseRecord {
    pub(crate) fn new(choice: &AdapterChoice, adapter_files: Option<AdapterFiles>, found: &Comparison) -> CaseRecord {
        let (adapter, strengths) = match choice {
            AdapterChoice::Named { name, strengths } => (Some(name.clone()), strengths.clone()),
            _ => (None, Vec::new()),
        };
        let perplexity = |found: &Perplexity| PerplexityRecord {
            perplexity: found.perplexity,
            window_mean_nll: found.window_mean_nll.clone(),
        };
        let divergence = found.divergence;
        CaseRecord {
            adapter,
            strengths,
            adapter_files,
            scored_ids: found.tested.nll.len(),
            reference: perplexity(&found.reference),
            tested: perplexity(&found.tested),
            ratio: found.ratio(),
            log_ratio: found.log_ratio,
            log_ratio_error: found.log_ratio_error,
            top1_agreement: found.top1_agreement,
            divergence: DivergenceRecord {
                mean: divergence.mean,
                median: divergence.median,
                p99: divergence.p99,
                max: divergence.max,
            },
            tensors: found.tensors.iter().map(TensorRecord::new).collect(),
        }
    }

    /// `base`, or the adapter with its strengths.
    pub(crate) fn name(&self) -> String {
        let strengths = self.strengths.iter().map(|(alpha, value)| format!(", {alpha} {value}"));
        self.adapter.clone().unwrap_or_else(|| "base".to_owned()) + &strengths.collect::<String>()
    }

    /// The results of the places: the embedding, each layer, the logits.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &TensorRecord> {
        self.tensors.iter().filter(|tensor| tensor.ends)
    }

    /// The tensors by the error made up to them in their place, the worst first; exact ones are left out.
    pub(crate) fn worst(&self) -> Vec<&TensorRecord> {
        let mut worst: Vec<&TensorRecord> = self.tensors.iter().filter(|t| t.made.row_db.is_some()).collect();
        worst.sort_by(|a, b| a.made.row_db.partial_cmp(&b.made.row_db).unwrap_or(std::cmp::Ordering::Equal));
        worst
    }
}

impl TensorRecord {
    fn new(tensor: &TensorError) -> TensorRecord {
        TensorRecord {
            name: tensor.name.clone(),
            place: match tensor.place {
                Place::Embedding => "embedding".to_owned(),
                Place::Layer(layer) => format!("layer {layer}"),
                Place::Head => "head".to_owned(),
            },
            ends: tensor.ends,
            width: tensor.width,
            made: SqnrRecord::new(tensor.made),
            accumulated: SqnrRecord::new(tensor.accumulated),
        }
    }

    /// The place as an axis has it: `3` of `layer 3`.
    pub(crate) fn short_place(&self) -> &str {
        self.place.strip_prefix("layer ").unwrap_or(&self.place)
    }
}

impl SqnrRecord {
    fn new(sqnr: Sqnr) -> SqnrRecord {
        // Noise without any signal has no number in JSON either; nothing real is as bad.
        let finite = |db: f64| if db == f64::INFINITY { None } else { Some(db.max(LEAST_DB)) };
        SqnrRecord { all_db: finite(sqnr.all), row_db: finite(sqnr.row) }
    }
}

pub(crate) const FORMAT: &str = "genie-accuracy";
pub(crate) const VERSION: u32 = 1;
const LEAST_DB: f64 = -150.0;
