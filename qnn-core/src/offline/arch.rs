//! Architectures: one short file each, over the shared blocks.

use htp_sim::Workers;

use crate::{
    graph::Graph,
    offline::{
        config::{HfConfig, HfDefaults, ModelConfig},
        error::ImportError,
        source::Source,
    },
};

mod blocks;
mod gemma;
mod granite;
mod llama;
mod phi3;
mod qwen;
mod smollm3;
pub(in crate::offline) mod weights;

use blocks::Builder;
pub use blocks::{DEFAULT_AR, DEFAULT_MAX_CL};
pub use weights::{ActivationBits, CacheType, Grouping, Precision, WeightClass, WeightType, WeightUse};

/// A family of models that can be imported.
#[derive(Debug)]
pub struct Architecture {
    /// What people call the family.
    pub title: &'static str,
    /// What of its configuration is built, and what is refused or limited.
    pub notes: &'static str,
    /// Values of `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// Values of `general.architecture` in a GGUF.
    pub gguf_names: &'static [&'static str],
    /// True if the GGUF converter interleaves the rows of q and k (llama does, for the sake of another rotation).
    pub gguf_interleaves_qk: bool,
    /// True if a head may be rotated in part.
    pub partial_rotary: bool,
    /// What absent keys of `config.json` mean.
    pub defaults: HfDefaults,
    /// Applies keys of `config.json` whose meaning differs between families.
    pub apply_hf: fn(&mut ModelConfig, &HfConfig) -> Result<(), ImportError>,
    /// Adds the nodes from the input ids to the logits.
    build: fn(&mut Builder<'_>) -> Result<(), ImportError>,
}

/// Builds the graph of `source`, and says what became of its weights. `progress` is told the name of each weight.
///
/// # Errors
/// [`ImportError`] naming the tensor that is missing, unused, of a wrong shape or cannot be quantized.
pub fn build(
    source: &Source,
    precision: Precision,
    workers: &Workers,
    progress: &mut dyn FnMut(&str),
) -> Result<(Graph, Vec<WeightUse>), ImportError> {
    let architecture = find(&source.config.model_type)?;
    let mut builder = Builder::new(source, precision, workers, weights::constant, progress)?;
    (architecture.build)(&mut builder)?;
    builder.finish()
}

/// As [`build`], but only some rows of each weight are converted, and the graph's weights are all zeros: what there is to
/// know before the work is done.
///
/// # Errors
/// As [`build`], as far as these rows show it.
pub fn outline(
    source: &Source,
    precision: Precision,
    workers: &Workers,
) -> Result<(Graph, Vec<WeightUse>), ImportError> {
    let architecture = find(&source.config.model_type)?;
    let mut progress = |_: &str| {};
    let mut builder = Builder::new(source, precision, workers, weights::outline, &mut progress)?;
    (architecture.build)(&mut builder)?;
    builder.finish()
}

/// Every architecture that can be imported.
pub const SUPPORTED: &[Architecture] = &[
    llama::LLAMA,
    llama::MISTRAL,
    qwen::QWEN2,
    qwen::QWEN3,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi3::PHI3,
    smollm3::SMOLLM3,
    granite::GRANITE,
];

/// The architecture with `model_type`.
///
/// # Errors
/// [`ImportError::Unsupported`] listing those there are.
pub fn find(model_type: &str) -> Result<&'static Architecture, ImportError> {
    find_by(model_type, |a| a.model_types)
}

/// The architecture that a GGUF calls `name`.
///
/// # Errors
/// [`ImportError::Unsupported`] listing those there are.
pub fn find_gguf(name: &str) -> Result<&'static Architecture, ImportError> {
    find_by(name, |a| a.gguf_names)
}

fn find_by(
    name: &str,
    names: fn(&Architecture) -> &'static [&'static str],
) -> Result<&'static Architecture, ImportError> {
    SUPPORTED.iter().find(|a| names(a).contains(&name)).ok_or_else(|| ImportError::Unsupported {
        what: format!("architecture {name:?}"),
        supported: SUPPORTED.iter().flat_map(names).copied().collect::<Vec<_>>().join(", "),
    })
}
