//! `qairt-quantizer` as a function: a DLC and some text in, a DLC with integer weights and static encodings out.
//!
//! ```text
//! graph ─► weights to integers ──────────────────────────────────────────┐
//!    └───► float graph over the text ─► observer of each tensor ─► range ─┴─► graph with encodings
//! ```
//!
//! A tensor gets a static encoding where it is executed as integers: at the input of a matrix with integer weights. What
//! is between two matrices is computed in floats and needs none.

use std::collections::HashSet;
use std::sync::Arc;

use htp_sim::Workers;

use crate::{
    adapter::Adapter,
    backend::HtpBackend,
    encoding::Encoding,
    graph::{Graph, GraphError},
    offline::{
        ImportError,
        arch::{CacheType, Precision, WeightClass, WeightType, weights},
        calibrate::{CalibrateError, Calibrator, Feed, Probe},
        encodings::{EncodingsError, EncodingsFile, OverrideReport, override_encodings, replaced},
        lora::MODE_KEY,
        source::{ElementFormat, SourceTensor},
    },
    op::OpKind,
    tensor::{Tensor, TensorData, TensorId},
    types::{DataType, TensorType},
};

pub mod adapters;
pub mod observe;
pub mod range;
pub mod text;

use observe::Observer;
pub use range::{Calibration, Schema};

/// What becomes of a graph.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeOptions {
    /// Weights that are floats and have no encoding of a file; [`WeightType::Keep`] leaves them.
    pub weights: WeightType,
    /// Width of the inputs of matrices.
    pub activations: Activations,
    /// Element type of the KV cache; `None` is integers.
    pub cache: Option<CacheType>,
}

/// Static encodings of the inputs of matrices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activations {
    /// 8 or 16.
    pub bits: u8,
    /// How a range is found.
    pub calibration: Calibration,
    /// Where codes lie.
    pub schema: Schema,
    /// With 8 bits: a tensor whose signal to noise is below so many decibels gets 16.
    pub least_sqnr_db: Option<f64>,
}

/// Why a graph cannot be quantized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum QuantizeError {
    #[error("tensor {tensor}: {count} of {of} values are not finite; it cannot be calibrated")]
    NotFinite { tensor: String, count: u64, of: u64 },
    #[error("no text to calibrate with, and {} tensors without encodings, {} the first", missing.len(), missing[0])]
    NoText { missing: Vec<String> },
    #[error("the graph has no matrix with integer weights: nothing to quantize for")]
    NothingToDo,
    #[error("no computed tensor is updatable (quant_updatable_mode {mode}): convert with --quant_updatable_mode all")]
    NothingUpdatable { mode: String },
    #[error(
        "adapter {adapter} has no key encodings in the list, so nothing would read what is found; add one, as in \
         encodings: {adapter}.encodings"
    )]
    NoFile { adapter: String },
    #[error(
        "group {group}: its encodings are in {path}, outside of the folder of the list, and would be replaced there; for \
         calibrated ones leave its key encodings out where the group is imported"
    )]
    OwnFile { group: String, path: String },
    #[error("{path}: {why}")]
    Text { path: String, why: String },
    #[error(transparent)]
    Encodings(Box<EncodingsError>),
    #[error(transparent)]
    Weights(Box<ImportError>),
    #[error(transparent)]
    Calibrate(Box<CalibrateError>),
    #[error(transparent)]
    Graph(Box<GraphError>),
}

/// Each of these is larger than a result should be.
macro_rules! boxed {
    ($($error:ty => $variant:ident),*) => {
        $(impl From<$error> for QuantizeError {
            fn from(why: $error) -> QuantizeError {
                QuantizeError::$variant(Box::new(why))
            }
        })*
    };
}

boxed!(EncodingsError => Encodings, ImportError => Weights, CalibrateError => Calibrate, GraphError => Graph);

/// A step of the work, for a progress display.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// Work on this weight begins.
    Weight(&'a str),
    /// Calibration with this adapter begins.
    Adapter(&'a str),
    /// So many of so many windows of text were run.
    Window(usize, usize),
}

/// The static encoding that a tensor got.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Smallest and largest value seen, zero included.
    pub range: (f32, f32),
    /// Element type and encoding.
    pub encoding: (DataType, Encoding),
    /// Signal to noise of it over the text, in decibels.
    pub sqnr_db: f64,
}

/// What was done.
#[derive(Debug, Clone, Default)]
pub struct QuantizeReport {
    /// Weights that became integers.
    pub weights: usize,
    /// Calibrated tensors.
    pub tensors: Vec<TensorReport>,
    /// What an encodings file did.
    pub overrides: Option<OverrideReport>,
}

/// Quantizes `graph`: weights by `options` or the scales of `overrides`, inputs of matrices by `overrides` or by their ranges
/// over `windows` of token ids. Without windows only tensors that a file has encodings for become static; the others are
/// quantized row by row when the graph runs. What the file has as floats stays floats.
///
/// # Errors
/// [`QuantizeError`] naming the tensor or file, and what is wrong with it.
pub fn quantize(
    graph: &Graph,
    windows: &[&[u32]],
    options: &QuantizeOptions,
    overrides: Option<&EncodingsFile>,
    tools: &mut Tools<'_>,
) -> Result<(Graph, QuantizeReport), QuantizeError> {
    let mut report = QuantizeReport::default();
    let mut result = graph.clone();
    if let Some(file) = overrides {
        let (overridden, done) = override_encodings(&result, file)?;
        (result, report.overrides) = (overridden, Some(done));
    }
    let floats = report.overrides.as_ref().map_or(&[][..], |done| &done.floats);
    (result, report.weights) = quantize_weights(&result, options, floats, tools)?;
    if matrix_inputs(&result).is_empty() {
        return Err(QuantizeError::NothingToDo);
    }
    let open = open_inputs(&result, floats);
    if windows.is_empty() {
        make_dynamic(&mut result, &open, options.activations.bits)?;
    } else if !open.is_empty() {
        // What the float weights compute, not what is left of them, is what the codes should cover.
        let observers = observe(graph, &open, windows, None, tools)?;
        for (id, observer) in open.iter().zip(observers) {
            let tensor = encode(&result.tensor(*id).name, &observer, options.activations)?;
            let (data_type, encoding) = tensor.encoding.clone();
            result.set_encoding(*id, data_type, Some(encoding))?;
            report.tensors.push(tensor);
        }
    }
    Ok((with_updatable_types(&with_cache(&result, options.cache)?)?, report))
}

/// `graph` with the encodings of `file`; inputs of matrices that it has none for are quantized row by row, as codes of `bits`
/// bits, when the graph runs, but for those that it has as floats.
///
/// # Errors
/// [`QuantizeError::Encodings`] naming the tensors that do not fit.
pub fn with_overrides(
    graph: &Graph,
    file: &EncodingsFile,
    bits: u8,
    cache: Option<CacheType>,
) -> Result<(Graph, OverrideReport), QuantizeError> {
    let (mut result, report) = override_encodings(graph, file)?;
    let open = open_inputs(&result, &report.floats);
    make_dynamic(&mut result, &open, bits)?;
    Ok((with_updatable_types(&with_cache(&result, cache)?)?, report))
}

/// What the work is done with.
pub struct Tools<'a> {
    /// Runs the float graph.
    pub backend: &'a HtpBackend,
    /// Rounds weights.
    pub workers: &'a Workers,
    /// Is told how far the work is.
    pub progress: &'a mut dyn FnMut(Progress<'_>),
}

/// The tensors that matrices with integer weights multiply, in the order of the graph. Inside adapter branches there are none.
pub fn matrix_inputs(graph: &Graph) -> Vec<TensorId> {
    let mut seen = HashSet::new();
    let input = |node: &crate::Node| {
        let weight = graph.tensor(*node.inputs.get(1)?);
        let fits = node.op == OpKind::FullyConnected
            && weight.tensor_type == TensorType::Static
            && weight.data_type.is_fixed_point();
        fits.then(|| node.inputs[0])
    };
    graph.nodes().iter().filter_map(input).filter(|id| seen.insert(*id)).collect()
}

/// Inputs of matrices without static encodings, but for `floats`.
fn open_inputs(graph: &Graph, floats: &[String]) -> Vec<TensorId> {
    let is_open = |id: &TensorId| graph.tensor(*id).encoding.is_none() && !floats.contains(&graph.tensor(*id).name);
    matrix_inputs(graph).into_iter().filter(is_open).collect()
}

/// What `taps` hold when the float version of `graph` runs over `windows`, with `adapter` at strength 1 or without.
///
/// # Errors
/// [`QuantizeError::Calibrate`].
pub fn observe(
    graph: &Graph,
    taps: &[TensorId],
    windows: &[&[u32]],
    adapter: Option<&Arc<Adapter>>,
    tools: &mut Tools<'_>,
) -> Result<Vec<Observer>, QuantizeError> {
    let max_window = windows.iter().map(|window| window.len()).max().unwrap_or(1);
    let probe = Probe { taps: taps.to_vec(), max_window, ..Probe::default() };
    let mut calibrator = Calibrator::new(graph, &probe, tools.backend)?;
    if let Some(adapter) = adapter {
        calibrator.set_adapter(Some(Arc::clone(adapter)), &vec![1.0; calibrator.n_strengths()])?;
    }
    let mut observers = vec![Observer::default(); taps.len()];
    for (i, window) in windows.iter().enumerate() {
        calibrator.run(Feed::Ids(window), &mut |rows| observers[rows.tap].see(rows.values))?;
        (tools.progress)(Progress::Window(i + 1, windows.len()));
    }
    Ok(observers)
}

/// The encoding of the tensor called `name`, of which `observer` saw the values.
///
/// # Errors
/// [`QuantizeError::NotFinite`].
pub fn encode(name: &str, observer: &Observer, wanted: Activations) -> Result<TensorReport, QuantizeError> {
    if observer.not_finite() > 0 {
        let (count, of) = (observer.not_finite(), observer.count());
        return Err(QuantizeError::NotFinite { tensor: name.to_owned(), count, of });
    }
    let with_bits = |bits: u8| {
        // At 16 bits there are steps to spare and none to be gained by cutting values off: what calibration did not see
        // gets room instead.
        let calibration = if bits == 16 { Calibration::MinMax } else { wanted.calibration };
        let encoding = range::encoding(observer, bits, calibration, wanted.schema);
        (range::sqnr_db(observer, &encoding), encoding)
    };
    let (mut sqnr_db, mut encoding) = with_bits(wanted.bits);
    if wanted.bits == 8 && wanted.least_sqnr_db.is_some_and(|least| sqnr_db < least) {
        (sqnr_db, encoding) = with_bits(16);
    }
    Ok(TensorReport { name: name.to_owned(), range: observer.range(), encoding, sqnr_db })
}

/// Float matrices of `graph` as integers, but for `floats`.
fn quantize_weights(
    graph: &Graph,
    options: &QuantizeOptions,
    floats: &[String],
    tools: &mut Tools<'_>,
) -> Result<(Graph, usize), QuantizeError> {
    if !matches!(options.weights, WeightType::Int { .. }) {
        return Ok((graph.clone(), 0));
    }
    let precision = Precision {
        weights: options.weights,
        activations: crate::offline::arch::ActivationBits::Sixteen,
        cache: options.cache,
    };
    let tables: HashSet<TensorId> =
        graph.nodes().iter().filter(|node| node.op == OpKind::Gather).map(|node| node.inputs[0]).collect();
    let mut changes = Vec::new();
    for (i, tensor) in graph.tensors().iter().enumerate() {
        let id = TensorId(i as u32);
        let format = match tensor.data_type {
            DataType::Float32 => ElementFormat::F32,
            DataType::Float16 => ElementFormat::F16,
            DataType::BFloat16 => ElementFormat::Bf16,
            _ => continue,
        };
        let is_matrix = tensor.shape.rank() == 2 && !floats.contains(&tensor.name);
        let (true, Some(TensorData::Flat(bytes))) = (is_matrix, &tensor.data) else { continue };
        (tools.progress)(Progress::Weight(&tensor.name));
        let is_table = tables.contains(&id) || tensor.name == "lm_head.weight";
        let class = if is_table { WeightClass::Embedding } else { WeightClass::Linear };
        let source = SourceTensor::new(&tensor.name, tensor.shape.max_dims(), format, bytes.clone())?;
        let constant = weights::constant(&source, class, precision, tools.workers)?;
        let data = Some(TensorData::Flat(constant.bytes));
        let (data_type, encoding) = (constant.data_type, constant.encoding);
        changes.push((id, Tensor { data_type, encoding, data, ..tensor.clone() }));
    }
    let n = changes.len();
    Ok((replaced(graph, changes)?, n))
}

/// Codes with a scale for each row, for tensors without static encodings.
fn make_dynamic(graph: &mut Graph, open: &[TensorId], bits: u8) -> Result<(), GraphError> {
    let data_type = if bits == 8 { DataType::SFixedPoint8 } else { DataType::SFixedPoint16 };
    open.iter().try_for_each(|id| graph.set_encoding(*id, data_type, None))
}

/// `graph` with caches of type `cache`, by default integers.
fn with_cache(graph: &Graph, cache: Option<CacheType>) -> Result<Graph, QuantizeError> {
    let data_type = match cache {
        Some(CacheType::Int8) | None => DataType::SFixedPoint8,
        Some(CacheType::F16) => DataType::Float16,
        Some(CacheType::F32) => DataType::Float32,
    };
    let mut result = graph.clone();
    for id in graph.ids_where(|tensor| tensor.tensor_type.is_state()) {
        result.set_encoding(id, data_type, None)?;
    }
    Ok(result)
}

/// `graph` with the encodings that an adapter may bring declared as updatable, if its mode asks for that. Eight bits that only
/// the graph itself sees are kept in a type of sixteen, so that an adapter may bring more of them than its base needs.
fn with_updatable_types(graph: &Graph) -> Result<Graph, QuantizeError> {
    if graph.metadata().get(MODE_KEY).is_none_or(|mode| mode != "all") {
        return Ok(graph.clone());
    }
    let ids = graph.ids_where(|tensor| tensor.encoding.is_some() && !tensor.tensor_type.is_static());
    let updatable = |id: TensorId| {
        let tensor = graph.tensor(id);
        let is_own = !tensor.tensor_type.is_input() && !tensor.tensor_type.is_output();
        let data_type = match tensor.data_type {
            DataType::SFixedPoint8 if is_own => DataType::SFixedPoint16,
            DataType::UFixedPoint8 if is_own => DataType::UFixedPoint16,
            other => other,
        };
        (id, Tensor { tensor_type: tensor.tensor_type.updateable(), data_type, ..tensor.clone() })
    };
    Ok(replaced(graph, ids.into_iter().map(updatable).collect())?)
}
