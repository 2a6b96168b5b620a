//! Adapters: from PEFT directories to branches in a graph and values for them.
//!
//! ```text
//! PEFT directories ─► load_peft ─► plan ─► add_branches ─► the base's graph      (qairt-converter)
//!                        └──────► fold ─► import ─► <name>.safetensors, .encodings  (qairt-lora-importer)
//!                                   └───► adapter_from_peft ─► Adapter              (at run time)
//! ```
//!
//! A tensor of an adapter has PEFT's name, in the graph too: `base_model.model.<module>.lora_A.weight`. The scaling
//! (`lora_alpha / r`, or what the adapter's config says) is folded into B once, in [`fold`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::{
    adapter::Adapter,
    backend::PrepareError,
    context::Context,
    error::Error,
    graph::{Graph, GraphError},
    offline::{
        equalize::{ChannelScales, ScalesError},
        error::ImportError,
        safetensors::LayoutError,
    },
    tensor::Panels,
    types::{DataType, TensorType},
};

mod branches;
mod config;
mod encodings;
mod fold;
mod fused;
pub(in crate::offline) mod groups;
pub mod import;
mod peft;
mod plan;
mod rescale;
pub mod values;
mod yaml;

pub use branches::{
    ALPHA_KEY, AttachPoint, BITWIDTH_KEY, BranchTensors, LoraBits, LoraPlan, MAX_LORA_RANK, MAX_RANK_KEY, MODE_KEY,
    UpdatableMode, add_branches, attach_points,
};
pub use config::PeftConfig;
pub use encodings::{ParamEncodings, WeightEncoding};
pub(crate) use fold::describe;
pub use fold::{Folded, FoldedModule, Scaling, Slot, fold};
pub use groups::Group;
pub use peft::{PeftAdapter, PeftModule, load_peft};
pub use plan::{LoraOptions, plan};
pub use rescale::{PlacedAdapters, place_adapters};

/// Name of the graph input with one strength for each rank column.
pub const ALPHA_TENSOR: &str = "lora_alpha";
/// What PEFT puts before a module's path.
pub const PREFIX: &str = "base_model.model.";

/// Name of the tensor A of `module`.
pub fn a_name(module: &str) -> String {
    format!("{PREFIX}{module}.lora_A.weight")
}

/// Name of the tensor B of `module`.
pub fn b_name(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.weight")
}

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum LoraError {
    #[error("{what} is not supported; {instead}")]
    NotSupported { what: String, instead: &'static str },
    #[error("no adapter_config.json; a PEFT directory has it beside adapter_model.safetensors")]
    NoConfig,
    #[error("not the JSON expected here")]
    Json(#[source] serde_json::Error),
    #[error("{why}")]
    Yaml { why: String },
    #[error(transparent)]
    Safetensors(LayoutError),
    #[error(transparent)]
    Import(Box<ImportError>),
    #[error("{key}: {have}, need {want}")]
    Config { key: String, have: String, want: String },
    #[error("{key}: pattern {pattern:?}")]
    Pattern {
        key: &'static str,
        pattern: String,
        #[source]
        why: Box<fancy_regex::Error>,
    },
    #[error("the output is a file that the adapter is read from, need another folder (--output_dir)")]
    OutputIsInput,
    #[error("written by qairt-lora-importer, its scaling is folded in; need the adapter as PEFT saved it")]
    IsImported,
    #[error("no tensors")]
    Empty,
    #[error("tensor {tensor} {why}")]
    Key { tensor: String, why: String },
    #[error("tensor {have} has no other half (lora_A and lora_B come in pairs)")]
    Unpaired { have: String },
    #[error("tensor {tensor}: {have}, need {want}")]
    Tensor { tensor: String, have: String, want: String },
    #[error("tensor {tensor}: adapter_config.json does not target {module}")]
    NotSelected { tensor: String, module: String },
    #[error("tensor {tensor} lands nowhere: {why}")]
    NoPoint { tensor: String, why: String },
    #[error("none of its {tensors} tensors lands on one of the {points} linear layers of the model")]
    NothingLands { tensors: usize, points: usize },
    #[error("graph {graph} has adapter branches already; add them to a graph without")]
    HasBranches { graph: String },
    #[error("graph {graph} has no adapter branches; convert the model with --lora_adapter or --lora_weight_list")]
    NoBranches { graph: String },
    #[error("adapter {adapter}: rank {have}, the graph takes at most {max} ({MAX_RANK_KEY})")]
    Rank { adapter: String, have: usize, max: usize },
    #[error("imported for a base with other channel scales; import it with the DLC that is given here")]
    OtherScales,
    #[error(transparent)]
    Scales(#[from] ScalesError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Pack(Box<PrepareError>),
}

impl LoraError {
    pub(crate) fn config(key: &str, have: impl Into<String>, want: impl Into<String>) -> LoraError {
        LoraError::Config { key: key.to_owned(), have: have.into(), want: want.into() }
    }

    /// `tensor` of `module`, which none of `points` is.
    pub(crate) fn no_point<'a>(tensor: &str, module: &str, points: impl Iterator<Item = &'a String>) -> LoraError {
        let last = module.rsplit('.').next().unwrap_or(module);
        let like = points.map(String::as_str).find(|point| point.rsplit('.').next() == Some(last));
        let why = match like {
            Some(like) => format!("the model has no linear layer {module} (it has {like})"),
            None => format!("the model has no linear layer {module}"),
        };
        LoraError::NoPoint { tensor: tensor.to_owned(), why }
    }
}

/// An adapter for `context` straight from the PEFT directory `dir`: folded, quantized as the context's graphs ask for,
/// and packed, all in memory.
///
/// # Errors
/// [`Error::Io`]; [`Error::Lora`] naming the tensor that does not fit, or the feature that cannot be represented.
pub fn adapter_from_peft(context: &Context, dir: &Path, name: &str) -> Result<Arc<Adapter>, Error> {
    let mut adapters = adapters_from_peft(&[context], dir, name)?;
    Ok(adapters.pop().expect("one for each context"))
}

/// As [`adapter_from_peft`] for a model that is spread over several contexts: an adapter for each, and a tensor has to
/// land in one of them.
///
/// # Errors
/// As [`adapter_from_peft`].
pub fn adapters_from_peft(contexts: &[&Context], dir: &Path, name: &str) -> Result<Vec<Arc<Adapter>>, Error> {
    let mut peft = load_peft(dir)?;
    let points: Vec<AttachPoint> = contexts.iter().flat_map(|context| points_of(context)).collect();
    peft.split_fused(&points).map_err(Error::lora(dir))?;
    let folded = fold(name, &[(name.to_owned(), &peft)]).map_err(Error::lora(dir))?;
    adapters(contexts, &folded).map_err(Error::lora(dir))
}

/// The values of `folded` as an adapter for each of `contexts`, which hold a model together.
///
/// # Errors
/// [`LoraError`] naming the tensor that lands in none of them or does not fit.
pub fn adapters(contexts: &[&Context], folded: &Folded) -> Result<Vec<Arc<Adapter>>, LoraError> {
    let points: Vec<Vec<AttachPoint>> = contexts.iter().map(|context| points_of(context)).collect();
    let graph = contexts.first().and_then(|context| context.graph(context.graphs().next()?));
    folded.land(graph.map_or("", Graph::name), &points.concat())?;
    let folded = &on_base(folded, graph.map(Graph::metadata))?;
    contexts.iter().zip(&points).map(|(context, points)| adapter(context.updatable(), points, folded, None)).collect()
}

/// `folded` scaled as the channels of its base were, by the base's metadata: see [`crate::offline::equalize`].
fn on_base<'a>(folded: &'a Folded, metadata: Option<&BTreeMap<String, String>>) -> Result<Cow<'a, Folded>, LoraError> {
    let scales = metadata.map(ChannelScales::of).transpose()?.unwrap_or_default();
    let mut folded = Cow::Borrowed(folded);
    if !scales.is_empty() {
        scales.apply_to(folded.to_mut())?;
    }
    Ok(folded)
}

/// The values of `folded` in f32 as an adapter for `graph` alone, as a converter made it: what calibration runs with.
///
/// # Errors
/// [`LoraError`] naming the tensor that does not land in `graph` or does not fit.
pub fn adapter_for_graph(graph: &Graph, folded: &Folded) -> Result<Arc<Adapter>, LoraError> {
    let points = attach_points(graph);
    folded.land(graph.name(), &points)?;
    let folded = &on_base(folded, Some(graph.metadata()))?;
    let updatable = graph.tensors().iter().filter(|t| t.tensor_type == TensorType::UpdateableStatic);
    let mut names: Vec<String> = updatable.map(|tensor| tensor.name.clone()).collect();
    names.sort_unstable();
    adapter(&names.into(), &points, folded, Some(DataType::Float32))
}

/// The part of `folded` that is among `names`, the updatable tensors of a context or graph with these attach points, in
/// `data_type` or the type of each branch.
fn adapter(
    names: &Arc<[String]>,
    points: &[AttachPoint],
    folded: &Folded,
    data_type: Option<DataType>,
) -> Result<Arc<Adapter>, LoraError> {
    let mut tensors: Vec<(String, Panels)> = Vec::new();
    for module in &folded.modules {
        let point = points.iter().find(|point| point.module == module.module);
        let Some(branch) = point.and_then(|point| point.branch) else { continue };
        for half in [module.a(), module.b()] {
            tensors.push((half.name.clone(), values::pack(&half, data_type.unwrap_or(branch.data_type))?));
        }
    }
    let adapter = Adapter::new(folded.name.clone(), Arc::clone(names), tensors);
    let adapter = adapter.map_err(|tensor| LoraError::NoPoint { tensor, why: "no graph has it".to_owned() })?;
    Ok(Arc::new(adapter.described(folded.description())))
}

/// Attach points of all graphs of a context.
fn points_of(context: &Context) -> Vec<AttachPoint> {
    context.graphs().filter_map(|name| context.graph(name)).flat_map(attach_points).collect()
}
