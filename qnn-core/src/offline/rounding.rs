//! Weights of a float graph to integers, layer by layer, with calibration: what `quantize_weights` does for one matrix,
//! done for a model.
//!
//! ```text
//! equalize channels (if asked for)
//! for each layer: run it over the calibration windows ─► second moments of what its matrices read
//!                 round its matrices with them
//!                 run it again, rounded ─► what the next layer reads
//! head: as the embedding, or as a layer
//! embedding: 8 bits
//! ```
//!
//! Each layer is calibrated on what the rounded layers before it give, so it makes good some of their error, too. In memory
//! are the layer's input for all windows and one layer's moments.

use std::collections::{HashMap, HashSet};

use htp_sim::{Cx, Part, Rows, Write, pack_float};

use crate::{
    backend::HtpBackend,
    graph::{Graph, GraphError, Node},
    offline::{
        calibrate::{CalibrateError, Calibrator, Feed, Finite, Probe},
        equalize::{GroupReport, SCALES_KEY, ScalesError, Schemes, equalize, has_groups},
        quantize_weights::{Bits, Feedback, Moments, QuantizeError, Rounding, Scheme, Search, quantize_with},
        source::{ElementFormat, SourceTensor},
    },
    op::OpKind,
    tensor::{Tensor, TensorData, TensorId},
    types::{DataType, TensorType},
};

mod layers;

pub(in crate::offline) use layers::HEAD;
use layers::{Layer, head, head_node, layers};

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Scales from the smallest and largest value, nearest codes. Needs no calibration.
    Nearest,
    /// Scales with the least squared error, nearest codes. With calibration each input counts by its mean square.
    Mse,
    /// As [`Method::Mse`], and later columns make good the error of earlier ones (GPTQ). Needs calibration.
    Feedback {
        /// Part of the inputs' mean square that is added to the diagonal of their moments; 0.01 is usual.
        damping: f32,
    },
}

/// What to do with the weights of a graph.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundingOptions {
    /// The matrices of the layers.
    pub scheme: Scheme,
    /// The embedding, and the head unless that has a scheme of its own.
    pub embedding: Scheme,
    /// The head, rounded as the layers are. One that shares the embedding's weight gets a copy of it.
    pub head: Option<Scheme>,
    /// Where a block size does not divide the rows, takes the largest smaller one that does ([`Scheme::fitting`]).
    pub fit_blocks: bool,
    /// How codes are chosen.
    pub method: Method,
    /// Scales channels first, so that they fit the grid better ([`crate::offline::equalize`]).
    pub equalize: bool,
    /// Part of the layers' elements that gets 8 bits instead: the matrices that lose most. 0 to 1.
    pub wide_share: f64,
}

/// What became of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightReport {
    /// Its name.
    pub name: String,
    /// Width of a code.
    pub bits: u8,
    /// Elements.
    pub elements: u64,
    /// Ratio of signal to error in decibels; each input counts by its mean square in calibration where there was one.
    pub sqnr_db: f64,
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoundingReport {
    /// Groups of channels that were looked at for equalization.
    pub groups: Vec<GroupReport>,
    /// The weights, in the order in which they were rounded.
    pub weights: Vec<WeightReport>,
}

/// How far the work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundingStep {
    /// Channels are being scaled.
    Equalize,
    /// The sensitivity of this layer is being measured.
    Measure {
        /// Its number.
        layer: usize,
        /// Number of layers.
        of: usize,
    },
    /// This layer is being rounded.
    Layer {
        /// Its number.
        layer: usize,
        /// Number of layers.
        of: usize,
    },
    /// Embedding and head are being rounded.
    Embedding,
}

/// Why weights cannot be rounded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RoundingError {
    #[error("error feedback needs calibration text")]
    NoCalibration,
    #[error("{have} of the elements at 8 bits, need a part from 0 to 1")]
    Share { have: f64 },
    #[error("graph {graph} has no matrices of floats to round")]
    NothingToRound { graph: String },
    #[error("graph {graph} has no head of floats to round")]
    NoHead { graph: String },
    #[error(transparent)]
    Scales(#[from] ScalesError),
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// `graph` with its float matrices rounded as `options` say, calibrated on `windows` of token ids (which may be empty where
/// the method needs none). Computed tensors stay floats; adapters' branches are not touched.
///
/// # Errors
/// [`RoundingError`] naming the weight or what is missing.
pub fn round_weights(
    graph: &Graph,
    options: &RoundingOptions,
    windows: &[&[u32]],
    backend: &HtpBackend,
    progress: &mut dyn FnMut(RoundingStep),
) -> Result<(Graph, RoundingReport), RoundingError> {
    if matches!(options.method, Method::Feedback { .. }) && windows.is_empty() {
        return Err(RoundingError::NoCalibration);
    }
    if !(0.0..=1.0).contains(&options.wide_share) {
        return Err(RoundingError::Share { have: options.wide_share });
    }
    let mut work = graph.clone();
    let mut report = RoundingReport::default();
    let layers = layers(&work);
    if layers.iter().all(|layer| layer.weights.is_empty()) {
        return Err(RoundingError::NothingToRound { graph: graph.name().to_owned() });
    }
    if options.head.is_some() && head_node(&work).is_none() {
        return Err(RoundingError::NoHead { graph: graph.name().to_owned() });
    }
    if options.equalize {
        progress(RoundingStep::Equalize);
        let schemes = Schemes { layers: options.scheme, head: options.head.unwrap_or(options.embedding) };
        report.groups = equalize(&mut work, schemes, backend.cx().workers)?;
    }
    let mut wide = HashSet::new();
    if options.wide_share > 0.0 {
        let measured = Pass { options: *options, windows, backend, wide: HashSet::new(), keep: false };
        let (losses, _) = measured.run(&mut work.clone(), &layers, &mut |layer, of| {
            progress(RoundingStep::Measure { layer, of });
        })?;
        wide = most_sensitive(&losses, options.wide_share);
    }
    let pass = Pass { options: *options, windows, backend, wide, keep: true };
    let (weights, hidden) =
        pass.run(&mut work, &layers, &mut |layer, of| progress(RoundingStep::Layer { layer, of }))?;
    report.weights = weights;
    progress(RoundingStep::Embedding);
    if let Some(scheme) = options.head
        && let Some(head) = head(&mut work, &layers)?
    {
        let moments = pass.moments(&work, &head, hidden.as_deref())?;
        for weight in &head.weights {
            report.weights.push(pass.round(&mut work, weight.id, scheme, moments.get(&weight.input))?);
        }
    }
    for id in embeddings(&work) {
        report.weights.push(pass.round(&mut work, id, options.embedding, None)?);
    }
    Ok((work, report))
}

/// Whether the layers of `graph` have matrices of floats whose channels were not scaled before, and whose tensors have no
/// static encodings yet.
pub fn can_scale_channels(graph: &Graph) -> bool {
    let has_floats = || layers(graph).iter().any(|layer| !layer.weights.is_empty());
    !graph.metadata().contains_key(SCALES_KEY) && has_groups(graph) && has_floats()
}

/// Gives the inputs of integer matrices dynamic encodings of `activations` (one scale for each row, found when the graph
/// runs), and its KV caches the type `cache`: a graph that needs no calibration of activations.
///
/// # Errors
/// [`GraphError`] if one of these cannot have that type.
pub fn set_dynamic_activations(graph: &mut Graph, activations: DataType, cache: DataType) -> Result<(), GraphError> {
    let integer = |node: &&Node| {
        let fixed = |id: &TensorId| graph.tensor(*id).data_type.is_fixed_point();
        node.op == OpKind::FullyConnected && fixed(&node.inputs[1]) && is_static(graph, node.inputs[1])
    };
    let inputs: HashSet<TensorId> = graph.nodes().iter().filter(integer).map(|node| node.inputs[0]).collect();
    let computed = |id: &TensorId| graph.tensor(*id).tensor_type == TensorType::Native;
    for id in inputs.into_iter().filter(computed).collect::<Vec<_>>() {
        graph.set_encoding(id, activations, None)?;
    }
    graph.states().into_iter().try_for_each(|id| graph.set_encoding(id, cache, None))
}

/// What a layer gives, of each window.
type Hidden = Vec<Vec<f32>>;

/// One walk over the layers.
struct Pass<'a> {
    options: RoundingOptions,
    windows: &'a [&'a [u32]],
    backend: &'a HtpBackend,
    /// Weights that get 8 bits.
    wide: HashSet<String>,
    /// Whether the graph gets the rounded weights, or they are only measured.
    keep: bool,
}

impl Pass<'_> {
    /// Rounds `layers`; also returns what the last of them gives for each window, where there is calibration.
    fn run(
        &self,
        graph: &mut Graph,
        layers: &[Layer],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Vec<WeightReport>, Option<Hidden>), RoundingError> {
        let mut hidden: Option<Hidden> = None;
        let mut reports = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            progress(number, layers.len());
            let moments = self.moments(graph, layer, hidden.as_deref())?;
            for weight in &layer.weights {
                let moments = moments.get(&weight.input);
                let is_wide = self.wide.contains(&graph.tensor(weight.id).name);
                let scheme = if is_wide { widened(self.options.scheme) } else { self.options.scheme };
                reports.push(self.round(graph, weight.id, scheme, moments)?);
            }
            if let (Some(end), true) = (layer.end, self.calibrates()) {
                hidden = Some(self.outputs(graph, layer, end, hidden.as_deref())?);
            }
        }
        Ok((reports, hidden))
    }

    fn calibrates(&self) -> bool {
        self.options.method != Method::Nearest && !self.windows.is_empty()
    }

    /// Second moments of what the matrices of `layer` read.
    fn moments(
        &self,
        graph: &Graph,
        layer: &Layer,
        hidden: Option<&[Vec<f32>]>,
    ) -> Result<HashMap<TensorId, Calibrated>, RoundingError> {
        let mut taps: Vec<TensorId> = layer.weights.iter().map(|weight| weight.input).collect();
        taps.sort_unstable();
        taps.dedup();
        if !self.calibrates() || taps.is_empty() {
            return Ok(HashMap::new());
        }
        let mut moments: Vec<Moments> = taps.iter().map(|id| Moments::new(graph.tensor(*id).shape.last())).collect();
        let cx = self.backend.cx();
        let mut finite = vec![Finite::default(); taps.len()];
        self.walk(graph, layer, &taps, hidden, &mut |_, tap, values| {
            if finite[tap].see(values) {
                accumulate(&cx, &mut moments[tap], values);
            }
        })?;
        taps.iter().zip(finite).try_for_each(|(id, finite)| finite.check(&graph.tensor(*id).name))?;
        let damping = match self.options.method {
            Method::Feedback { damping } => Some(damping),
            Method::Nearest | Method::Mse => None,
        };
        let calibrated = |moments: Moments| Calibrated {
            importance: moments.diagonal(),
            feedback: damping.and_then(|damping| Feedback::new(&moments, damping)),
        };
        Ok(taps.into_iter().zip(moments.into_iter().map(calibrated)).collect())
    }

    /// What `layer` gives for each window.
    fn outputs(
        &self,
        graph: &Graph,
        layer: &Layer,
        end: TensorId,
        hidden: Option<&[Vec<f32>]>,
    ) -> Result<Vec<Vec<f32>>, RoundingError> {
        let mut outputs = vec![Vec::new(); self.windows.len()];
        self.walk(graph, layer, &[end], hidden, &mut |window, _, values| outputs[window].extend_from_slice(values))?;
        Ok(outputs)
    }

    /// Runs `layer` over all windows and shows the rows of `taps`, with the numbers of window and tap.
    fn walk(
        &self,
        graph: &Graph,
        layer: &Layer,
        taps: &[TensorId],
        hidden: Option<&[Vec<f32>]>,
        observe: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RoundingError> {
        let max_window = self.windows.iter().map(|window| window.len()).max().unwrap_or(0);
        let probe = Probe { taps: taps.to_vec(), from: layer.begin, max_window, rows_per_run: ROWS_PER_RUN };
        let mut calibrator = Calibrator::new(graph, &probe, self.backend)?;
        for (number, ids) in self.windows.iter().enumerate() {
            let feed = match (layer.begin, hidden) {
                (Some(_), Some(hidden)) => Feed::Rows(&hidden[number]),
                _ => Feed::Ids(ids),
            };
            calibrator.run(feed, &mut |rows| observe(number, rows.tap, rows.values))?;
        }
        Ok(())
    }

    fn round(
        &self,
        graph: &mut Graph,
        id: TensorId,
        scheme: Scheme,
        calibrated: Option<&Calibrated>,
    ) -> Result<WeightReport, RoundingError> {
        let tensor = graph.tensor(id);
        let source = source(tensor)?;
        let rounding = Rounding {
            search: if self.options.method == Method::Nearest { Search::MinMax } else { Search::Mse },
            importance: calibrated.map(|calibrated| calibrated.importance.as_slice()),
            feedback: calibrated.and_then(|calibrated| calibrated.feedback.as_ref()),
        };
        let scheme = if self.options.fit_blocks { scheme.fitting(source.k()) } else { scheme };
        let signal = energy(&source, rounding.importance);
        let quantized = quantize_with(&source, scheme, &rounding, self.backend.cx().workers)?;
        let report = WeightReport {
            name: tensor.name.clone(),
            bits: quantized.data_type.bits() as u8,
            elements: (source.n() * source.k()) as u64,
            sqnr_db: 10.0 * (signal / quantized.squared_error).log10(),
        };
        if self.keep {
            let (encoding, data) = (Some(quantized.encoding), TensorData::Flat(quantized.data));
            graph.replace_constant(id, quantized.data_type, encoding, data)?;
        }
        Ok(report)
    }
}

/// What calibration says of one input.
struct Calibrated {
    importance: Vec<f32>,
    feedback: Option<Feedback>,
}

/// Adds the rows in `values`, all of them finite, to the moments: their transpose times itself, by the kernels.
fn accumulate(cx: &Cx<'_>, moments: &mut Moments, values: &[f32]) {
    let k = moments.k();
    let m = values.len() / k;
    let mut columns = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(k).enumerate() {
        values.iter().enumerate().for_each(|(column, value)| columns[column * m + row] = *value);
    }
    let layout = htp_sim::PackedLayout::new(k, m, htp_sim::WeightFormat::F32).expect("a matrix that is in memory");
    let packed = pack_float(&layout, &columns).expect("finite values, as many as the layout says");
    let weights = layout.view(&packed).expect("packed for this layout");
    let part = Part { weights, bias: None, branch: None, write: Write::Add, out: moments.sums_mut() };
    htp_sim::linear(cx, Rows::F32 { x: &columns, m: k }, &mut [part]).expect("the extents are those of the layout");
}

/// `Σ w²`, each input times its importance.
fn energy(source: &SourceTensor, importance: Option<&[f32]>) -> f64 {
    let mut row = vec![0.0; source.k()];
    let mut sum = 0.0;
    for n in 0..source.n() {
        source.read_rows(n..n + 1, &mut row);
        let square = |(i, v): (usize, &f32)| f64::from(*v).powi(2) * importance.map_or(1.0, |all| f64::from(all[i]));
        sum += row.iter().enumerate().map(square).sum::<f64>();
    }
    sum
}

fn source(tensor: &Tensor) -> Result<SourceTensor, RoundingError> {
    let format = match tensor.data_type {
        DataType::Float16 => ElementFormat::F16,
        DataType::BFloat16 => ElementFormat::Bf16,
        _ => ElementFormat::F32,
    };
    let Some(TensorData::Flat(bytes)) = &tensor.data else {
        unreachable!("`is_roundable` lets flat constants through")
    };
    let shape = tensor.shape.max_dims();
    SourceTensor::new(&tensor.name, shape, format, bytes.clone()).map_err(|why| {
        let (have, want) = (why.to_string(), "a matrix".to_owned());
        RoundingError::Graph(GraphError::Tensor { tensor: tensor.name.clone(), have, want })
    })
}

/// A flat float constant `[n, k]`.
fn is_roundable(graph: &Graph, id: TensorId) -> bool {
    let tensor = graph.tensor(id);
    is_static(graph, id)
        && tensor.data_type.is_float()
        && tensor.shape.rank() == 2
        && matches!(tensor.data, Some(TensorData::Flat(_)))
}

fn is_static(graph: &Graph, id: TensorId) -> bool {
    graph.tensor(id).tensor_type == TensorType::Static
}

/// Float matrices that no layer has: the embedding table, and the head.
fn embeddings(graph: &Graph) -> Vec<TensorId> {
    let matrix = |node: &Node| match node.op {
        OpKind::Gather => Some(node.inputs[0]),
        OpKind::FullyConnected => Some(node.inputs[1]),
        _ => None,
    };
    let mut ids: Vec<TensorId> =
        graph.nodes().iter().filter_map(matrix).filter(|id| is_roundable(graph, *id)).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The same grouping at 8 bits.
fn widened(scheme: Scheme) -> Scheme {
    match scheme {
        Scheme::PerChannel { .. } => Scheme::PerChannel { bits: Bits::Eight },
        Scheme::Block { block_size, .. }
        | Scheme::AsymmetricBlock4 { block_size }
        | Scheme::BlockExpansion4 { block_size } => Scheme::Block { bits: Bits::Eight, block_size },
    }
}

/// The weights that lose most to four bits, as long as they have at most `share` of all elements.
fn most_sensitive(losses: &[WeightReport], share: f64) -> HashSet<String> {
    let all: u64 = losses.iter().map(|loss| loss.elements).sum();
    let mut order: Vec<&WeightReport> = losses.iter().collect();
    order.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db).then_with(|| a.name.cmp(&b.name)));
    let mut left = (all as f64 * share) as u64;
    let mut wide = HashSet::new();
    for loss in order {
        if loss.elements <= left {
            left -= loss.elements;
            wide.insert(loss.name.clone());
        }
    }
    wide
}

/// Rows that one run of a layer takes: many, so that the moments' products are large.
const ROWS_PER_RUN: usize = 256;
