//! Equalization: channels between a source and the matrices that read it are scaled so that the matrices fit the grid of
//! their quantization better. What the graph computes stays the same.
//!
//! ```text
//! norm ─► q, k, v          norm ─► gate, up          v ─► attention ─► o          up ─► · silu(gate) ─► down
//! source · s, readers / s: per channel; a norm's weight, or the rows of the matrix before, takes the factor
//!
//! s = root mean square of the readers' columns
//! repeat: Q = grid(W / s)            as if it were quantized now
//!         s = argmin |W − Q · s|²    per column: <W, Q> / <Q, Q>
//! ```
//!
//! Alternating least squares finds factors under which the columns lie near the grid, not only factors that make columns
//! equally large: where a model's weights came off a grid by such factors, it finds the grid again. A group keeps its
//! weights where the factors do not bring the error down clearly.
//!
//! An adapter of an equalized base needs the same factors on its own weights: they are recorded in the graph's metadata
//! ([`ChannelScales`]) and everything that imports an adapter applies them.
//!
//! Sources: Nagel et al. 2019 (cross-layer equalization), Lin et al. 2024 (AWQ: scales folded into the norm before).

use std::sync::Mutex;

use htp_sim::Workers;

use crate::{
    backend::reference::dequantize_constant,
    encoding::Floats,
    graph::{Graph, GraphError},
    offline::{
        quantize_weights::{Scheme, SchemeGrid},
        rounding::HEAD,
    },
    tensor::{TensorData, TensorId},
    types::DataType,
};

mod groups;
mod scales;
mod smooth;

pub use scales::{ChannelMap, ChannelScales, ModuleScales, SCALES_KEY, ScalesError, fingerprint};
pub use smooth::{SmoothError, SmoothOptions, SmoothReport, smooth};

use groups::{Group, Partner, Source};

/// How matrices will be rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schemes {
    /// Those of the layers.
    pub layers: Scheme,
    /// The head, where its weight is not the embedding's.
    pub head: Scheme,
}

impl Schemes {
    /// What the readers of `group` get: the head reads a norm that no layer reads.
    fn of(self, graph: &Graph, group: &Group) -> Scheme {
        let is_head = group.readers.iter().all(|reader| graph.tensor(reader.weight).name == HEAD);
        if is_head { self.head } else { self.layers }
    }
}

/// One group that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupReport {
    /// The norm or matrix that takes the factors.
    pub source: String,
    /// The modules whose inputs are scaled.
    pub readers: Vec<String>,
    /// Squared error of rounding to nearest, relative to the weights, before.
    pub error_before: f64,
    /// The same with the factors; equal to the one before if the group keeps its weights.
    pub error_after: f64,
}

/// Scales the channels of `graph` for quantization with `schemes`, and records the factors in its metadata. Only matrices of
/// floats are touched, and only channels of tensors without static encodings.
///
/// # Errors
/// [`ScalesError::Twice`] if factors are recorded already.
pub fn equalize(graph: &mut Graph, schemes: Schemes, workers: &Workers) -> Result<Vec<GroupReport>, ScalesError> {
    if graph.metadata().contains_key(SCALES_KEY) {
        return Err(ScalesError::Twice);
    }
    let mut record = ChannelScales::default();
    let mut reports = Vec::new();
    for group in groups::find(graph) {
        let weights: Vec<Matrix> = group.readers.iter().map(|reader| Matrix::read(graph, reader.weight)).collect();
        let scheme = schemes.of(graph, &group);
        let found = Solver { group: &group, weights: &weights, scheme, workers }.solve();
        let error_after = found.factors.as_ref().map_or(found.error_before, |(_, error)| *error);
        if let Some((factors, _)) = &found.factors {
            apply(graph, &group, weights, factors)?;
            record.insert(&group, factors, None);
        }
        reports.push(GroupReport {
            source: group.source_name(graph),
            readers: group.readers.iter().map(|reader| reader.module.clone()).collect(),
            error_before: found.error_before,
            error_after,
        });
    }
    if !record.is_empty() {
        graph.set_metadata(SCALES_KEY, record.to_text());
    }
    Ok(reports)
}

/// Whether `graph` has channels that can be scaled, if nobody has scaled them before.
pub(in crate::offline) fn has_groups(graph: &Graph) -> bool {
    !groups::find(graph).is_empty()
}

/// A weight's values.
struct Matrix {
    k: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn read(graph: &Graph, id: TensorId) -> Matrix {
        let tensor = graph.tensor(id);
        let values = dequantize_constant(tensor);
        Matrix { k: tensor.shape.last(), values: values.into_iter().map(|v| v as f32).collect() }
    }
}

/// What a search found.
struct Found {
    error_before: f64,
    /// A factor for each channel, and the error with them; `None` if the weights had better stay.
    factors: Option<(Vec<f32>, f64)>,
}

struct Solver<'a> {
    group: &'a Group,
    weights: &'a [Matrix],
    scheme: Scheme,
    workers: &'a Workers,
}

/// Sums over rows: of `W · Q`, `Q · Q` per channel, and the squared error.
#[derive(Clone)]
struct Sums {
    wq: Vec<f64>,
    qq: Vec<f64>,
    error: f64,
}

impl Solver<'_> {
    fn solve(&self) -> Found {
        let n = self.group.n_channels;
        let energy: f64 = self.weights.iter().flat_map(|w| &w.values).map(|v| f64::from(*v).powi(2)).sum();
        if energy == 0.0 || !energy.is_finite() {
            return Found { error_before: 0.0, factors: None };
        }
        let error_before = self.sums(&vec![1.0; n]).error / energy;
        let mut factors = self.root_mean_squares();
        let mut best: Option<(Vec<f32>, f64)> = None;
        for _ in 0..MAX_ROUNDS {
            let rounded = normalized(&factors);
            let sums = self.sums(&rounded);
            let error = sums.error / energy;
            let before = best.as_ref().map_or(f64::INFINITY, |(_, error)| *error);
            if error < before {
                best = Some((rounded.clone(), error));
            }
            if error > before * LEAST_PROGRESS {
                break;
            }
            for (channel, factor) in factors.iter_mut().enumerate() {
                if sums.qq[channel] > 0.0 && sums.wq[channel] > 0.0 {
                    *factor = sums.wq[channel] / sums.qq[channel];
                }
            }
        }
        let factors = best.filter(|(_, error)| *error < error_before * LEAST_GAIN);
        Found { error_before, factors }
    }

    fn root_mean_squares(&self) -> Vec<f64> {
        let mut sums = vec![(0.0f64, 0usize); self.group.n_channels];
        for weights in self.weights {
            for row in weights.values.chunks_exact(weights.k) {
                for (column, value) in row.iter().enumerate() {
                    let sum = &mut sums[self.group.channel(column)];
                    *sum = (sum.0 + f64::from(*value).powi(2), sum.1 + 1);
                }
            }
        }
        let root = |(sum, n): (f64, usize)| if sum > 0.0 { (sum / n as f64).sqrt() } else { 1.0 };
        sums.into_iter().map(root).collect()
    }

    /// Quantizes all readers divided by `factors`. Rows go in batches of fixed size whose sums are added in order, so the
    /// result does not depend on the number of workers.
    fn sums(&self, factors: &[f32]) -> Sums {
        let batches: Vec<(&[f32], usize)> = self
            .weights
            .iter()
            .flat_map(|weights| weights.values.chunks(weights.k * ROWS_PER_BATCH).map(|rows| (rows, weights.k)))
            .collect();
        let results: Vec<Mutex<Option<Sums>>> = batches.iter().map(|_| Mutex::new(None)).collect();
        self.workers.for_each(batches.len(), |item, _| {
            let (rows, k) = batches[item];
            let sums = self.batch(rows, k, factors);
            *results[item].lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(sums);
        });
        let n = self.group.n_channels;
        let mut total = Sums { wq: vec![0.0; n], qq: vec![0.0; n], error: 0.0 };
        for result in results {
            let Some(sums) = result.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) else { continue };
            total.wq.iter_mut().zip(&sums.wq).for_each(|(total, own)| *total += own);
            total.qq.iter_mut().zip(&sums.qq).for_each(|(total, own)| *total += own);
            total.error += sums.error;
        }
        total
    }

    fn batch(&self, rows: &[f32], k: usize, factors: &[f32]) -> Sums {
        let n = self.group.n_channels;
        let mut sums = Sums { wq: vec![0.0; n], qq: vec![0.0; n], error: 0.0 };
        let grid = SchemeGrid::of(self.scheme);
        let mut scaled = vec![0.0; k];
        let mut rounded = vec![0.0; k];
        for row in rows.chunks_exact(k) {
            for (column, (scaled, value)) in scaled.iter_mut().zip(row).enumerate() {
                *scaled = value / factors[self.group.channel(column)];
            }
            grid.round_row(&scaled, &mut rounded);
            for (column, (value, q)) in row.iter().zip(&rounded).enumerate() {
                let channel = self.group.channel(column);
                let (value, q, factor) = (f64::from(*value), f64::from(*q), f64::from(factors[channel]));
                sums.wq[channel] += value * q;
                sums.qq[channel] += q * q;
                sums.error += (value - q * factor).powi(2);
            }
        }
        sums
    }
}

/// Factors with geometric mean 1, in numbers that f16 holds: that is how they are recorded.
fn normalized(factors: &[f64]) -> Vec<f32> {
    let mean = factors.iter().map(|f| f.ln()).sum::<f64>() / factors.len().max(1) as f64;
    let limit = |factor: f64| (factor / mean.exp()).clamp(1.0 / MAX_FACTOR, MAX_FACTOR);
    factors.iter().map(|f| half::f16::from_f64(limit(*f)).to_f32()).collect()
}

fn apply(graph: &mut Graph, group: &Group, weights: Vec<Matrix>, factors: &[f32]) -> Result<(), GraphError> {
    for (reader, matrix) in group.readers.iter().zip(weights) {
        let divide = |(at, value): (usize, &f32)| value / factors[group.channel(at % matrix.k)];
        let values: Vec<f32> = matrix.values.iter().enumerate().map(divide).collect();
        replace(graph, reader.weight, &values)?;
    }
    let scale_rows = |graph: &mut Graph, id: TensorId| {
        let source = Matrix::read(graph, id);
        let width = source.values.len() / factors.len();
        let scaled = source.values.iter().enumerate().map(|(at, value)| value * factors[at / width]);
        replace(graph, id, &scaled.collect::<Vec<f32>>())
    };
    match &group.source {
        Source::Norm { weight, .. } => scale_rows(graph, *weight),
        Source::Matrix(Partner { weight, bias, .. }) => {
            scale_rows(graph, *weight)?;
            bias.map_or(Ok(()), |bias| scale_rows(graph, bias))
        }
    }
}

/// Gives the channels of `group` other places: channel `order[i]` comes to place `i`, in the columns of the readers and the
/// rows of what makes them.
fn permute(graph: &mut Graph, group: &Group, order: &[u32]) -> Result<(), GraphError> {
    for reader in &group.readers {
        let matrix = Matrix::read(graph, reader.weight);
        let rows = matrix.values.chunks_exact(matrix.k);
        let values: Vec<f32> = rows.flat_map(|row| order.iter().map(|at| row[*at as usize])).collect();
        replace(graph, reader.weight, &values)?;
    }
    for id in group.partners.iter().flat_map(|partner| [Some(partner.weight), partner.bias]).flatten() {
        let matrix = Matrix::read(graph, id);
        let width = matrix.values.len() / order.len();
        let row = |at: &u32| &matrix.values[*at as usize * width..][..width];
        replace(graph, id, &order.iter().flat_map(row).copied().collect::<Vec<f32>>())?;
    }
    Ok(())
}

fn replace(graph: &mut Graph, id: TensorId, values: &[f32]) -> Result<(), GraphError> {
    let data = TensorData::Flat(Floats::from_f32(values).bytes().clone());
    graph.replace_constant(id, DataType::Float32, None, data)
}

/// Most rounds of the search.
const MAX_ROUNDS: usize = 40;
/// The search ends when a round leaves more than this part of the error.
const LEAST_PROGRESS: f64 = 0.98;
/// Factors are taken if they leave at most this part of the error.
const LEAST_GAIN: f64 = 0.9;
/// Farthest that a channel is scaled.
const MAX_FACTOR: f64 = 64.0;
const ROWS_PER_BATCH: usize = 16;
