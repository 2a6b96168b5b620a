//! Smoothing: channels are scaled so that the *inputs* of matrices fit one 8-bit grid.
//!
//! ```text
//! for each group: t = max(amax(x), least)^a / amax(W)^(1-a)      for some a, and for the best of them some least
//!                 error(t) = | q8(X / t) · grid(W · t)ᵀ − X · Wᵀ |²    on rows of the calibration text
//! source / t, readers · t for the best
//! ```
//!
//! Both roundings are in the error, as they will be executed: a channel that is scaled up in the weights coarsens the block
//! that it shares with others. Where channels may change places (those of a gated MLP), they are sorted so that a block's
//! are alike; its scale then takes the factors at no cost.
//!
//! Source: Xiao et al. 2023 (SmoothQuant), with the strength searched for each group.

use std::ops::Range;

use htp_sim::{Cx, Part, Rows, WeightFormat, Write, pack_float};

use super::{ChannelScales, Group, Matrix, SCALES_KEY, ScalesError, Schemes, apply, groups, permute};
use crate::{
    backend::HtpBackend,
    graph::Graph,
    offline::{
        calibrate::{CalibrateError, Calibrator, Feed, Finite, Probe},
        quantize::range::signal,
        quantize_weights::{Scheme, SchemeGrid},
    },
    tensor::TensorId,
};

/// How inputs are smoothed.
#[derive(Debug, Clone, Copy)]
pub struct SmoothOptions {
    /// How the matrices will be rounded; `None`: they stay floats.
    pub weights: Option<Schemes>,
    /// Inputs that lose more than this at 8 bits even when scaled (dB) will get more bits: their channels stay as they are, and
    /// the weights keep the sizes that round best. `None`: none will.
    pub least_sqnr_db: Option<f64>,
}

/// One group that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct SmoothReport {
    /// The norm or matrix that takes the factors.
    pub source: String,
    /// The modules whose inputs are scaled.
    pub readers: Vec<String>,
    /// Squared error of the readers' results, relative to them, before.
    pub error_before: f64,
    /// The same with the factors; equal to the one before if the group stays as it is.
    pub error_after: f64,
    /// Whether channels changed places.
    pub is_sorted: bool,
}

/// Why inputs cannot be smoothed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SmoothError {
    #[error(transparent)]
    Scales(#[from] ScalesError),
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
}

/// Scales the channels of `graph` so that the inputs of its matrices lose least at 8 bits, and records the factors in its
/// metadata. `windows` of token ids show what the inputs hold. `progress` is told groups done and in all.
///
/// # Errors
/// [`ScalesError::Twice`] if factors are recorded already; [`CalibrateError`] if the graph cannot be run, or naming the input
/// that holds what is not finite.
pub fn smooth(
    graph: &mut Graph,
    windows: &[&[u32]],
    options: SmoothOptions,
    backend: &HtpBackend,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<SmoothReport>, SmoothError> {
    if graph.metadata().contains_key(SCALES_KEY) {
        return Err(ScalesError::Twice.into());
    }
    let groups = groups::find(graph);
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let seen = observe(graph, &groups, windows, backend)?;
    let mut record = ChannelScales::default();
    let mut reports = Vec::new();
    for (number, (group, seen)) in groups.iter().zip(seen).enumerate() {
        progress(number, groups.len());
        let weights: Vec<Matrix> = group.readers.iter().map(|reader| Matrix::read(graph, reader.weight)).collect();
        let source = group.source_matrix().map(|matrix| Matrix::read(graph, matrix.weight));
        let scheme = options.weights.map(|schemes| schemes.of(graph, group));
        // Without weights to judge by the group stays as it is; who rounds the one that is not finite names it.
        let Some(site) = Site::new(backend.cx(), group, (&weights, source), &seen, scheme) else { continue };
        let (error_before, best) = site.search();
        let fits = |best: &Candidate| options.least_sqnr_db.is_none_or(|least| site.input_sqnr_db(best) >= least);
        let best = best.filter(fits);
        let report = SmoothReport {
            source: group.source_name(graph),
            readers: group.readers.iter().map(|reader| reader.module.clone()).collect(),
            error_before,
            error_after: best.as_ref().map_or(error_before, |best| best.error),
            is_sorted: best.as_ref().is_some_and(|best| best.order.is_some()),
        };
        reports.push(report);
        let Some(best) = best else { continue };
        apply(graph, group, weights, &best.factors).map_err(ScalesError::from)?;
        if let Some(order) = &best.order {
            permute(graph, group, order).map_err(ScalesError::from)?;
        }
        record.insert(group, &best.factors, best.order.as_deref());
    }
    if !record.is_empty() {
        graph.set_metadata(SCALES_KEY, record.to_text());
    }
    Ok(reports)
}

/// What calibration showed of the input of a group's readers.
struct Seen {
    /// Smallest and largest value of each column, in the first half of the windows.
    ends: Vec<(f32, f32)>,
    /// The same in all windows.
    all_ends: Vec<(f32, f32)>,
    /// Rows of the other half, by which candidates are judged: evenly spread ones, then those that leave the ends behind
    /// most.
    rows: Vec<f32>,
    /// Rows that each of the first `n_spread` stands for; the others stand for themselves.
    stride: usize,
    n_spread: usize,
}

impl Seen {
    /// Rows of the text that row `number` stands for.
    fn stands_for(&self, number: usize) -> f64 {
        if number < self.n_spread { self.stride as f64 } else { 1.0 }
    }
}

/// A row that leaves the ends behind, and how far.
struct Beyond {
    ratio: f32,
    row: Vec<f32>,
}

/// Runs the float graph once and looks at the inputs of all groups. A channel's largest value in some text says little about
/// its largest in another: the text that sets the factors is not the one that judges them.
fn observe(
    graph: &Graph,
    groups: &[Group],
    windows: &[&[u32]],
    backend: &HtpBackend,
) -> Result<Vec<Seen>, CalibrateError> {
    let taps: Vec<TensorId> = groups.iter().map(|group| group.input).collect();
    let max_window = windows.iter().map(|window| window.len()).max().unwrap_or(1);
    let mut calibrator = Calibrator::new(graph, &Probe { taps, max_window, ..Probe::default() }, backend)?;
    let (setting, judging): (Vec<_>, Vec<_>) = windows.iter().enumerate().partition(|(number, _)| number % 2 == 0);
    let mut ends: Vec<Vec<(f32, f32)>> = groups.iter().map(|group| vec![(0.0, 0.0); group.n_columns()]).collect();
    let mut finite = vec![Finite::default(); groups.len()];
    let check = |graph: &Graph, finite: &[Finite]| {
        groups.iter().zip(finite).try_for_each(|(group, finite)| finite.check(&graph.tensor(group.input).name))
    };
    for (_, window) in &setting {
        calibrator.run(Feed::Ids(window), &mut |rows| {
            finite[rows.tap].see(rows.values);
            for row in rows.values.chunks_exact(rows.width) {
                ends[rows.tap].iter_mut().zip(row).for_each(|(ends, v)| *ends = (ends.0.min(*v), ends.1.max(*v)));
            }
        })?;
    }
    check(graph, &finite)?;
    let mut all_ends = ends.clone();
    // A single window has to do both.
    let judging = if judging.is_empty() { setting } else { judging };
    let stride = judging.iter().map(|(_, window)| window.len()).sum::<usize>().div_ceil(SPREAD_ROWS).max(1);
    let mut spread: Vec<Vec<f32>> = groups.iter().map(|_| Vec::new()).collect();
    let mut beyond: Vec<Vec<Beyond>> = groups.iter().map(|_| Vec::new()).collect();
    let mut before = 0;
    for (_, window) in &judging {
        calibrator.run(Feed::Ids(window), &mut |rows| {
            finite[rows.tap].see(rows.values);
            for (i, row) in rows.values.chunks_exact(rows.width).enumerate() {
                keep_farthest(&mut beyond[rows.tap], &ends[rows.tap], row);
                all_ends[rows.tap].iter_mut().zip(row).for_each(|(ends, v)| *ends = (ends.0.min(*v), ends.1.max(*v)));
                // In the middle of what they stand for: the first position of a text is like no other.
                if (before + rows.position + i) % stride == stride / 2 {
                    spread[rows.tap].extend_from_slice(row);
                }
            }
        })?;
        before += window.len();
    }
    check(graph, &finite)?;
    let mut all = Vec::with_capacity(groups.len());
    for (((ends, all_ends), mut rows), beyond) in ends.into_iter().zip(all_ends).zip(spread).zip(beyond) {
        let n_spread = rows.len() / ends.len();
        beyond.into_iter().for_each(|beyond| rows.extend(beyond.row));
        all.push(Seen { ends, all_ends, rows, stride, n_spread });
    }
    Ok(all)
}

/// Takes `row` among the [`FARTHEST_ROWS`] that leave `ends` behind most, if it is one.
fn keep_farthest(kept: &mut Vec<Beyond>, ends: &[(f32, f32)], row: &[f32]) {
    let ratio = |(v, (least, most)): (&f32, &(f32, f32))| {
        let end = if *v < 0.0 { *least } else { *most };
        if *v == 0.0 { 0.0 } else { (v / end).abs().min(f32::MAX) }
    };
    let ratio = row.iter().zip(ends).map(ratio).fold(1.0, f32::max);
    if ratio > 1.0 && (kept.len() < FARTHEST_ROWS || kept.iter().any(|other| other.ratio < ratio)) {
        kept.push(Beyond { ratio, row: row.to_vec() });
        if kept.len() > FARTHEST_ROWS {
            let least = (0..kept.len()).min_by(|a, b| kept[*a].ratio.total_cmp(&kept[*b].ratio)).unwrap_or(0);
            kept.swap_remove(least);
        }
    }
}

/// Factors that were tried.
struct Candidate {
    /// What the source is multiplied by and the readers are divided by, for each channel.
    factors: Vec<f32>,
    /// Which channel comes where, if they change places.
    order: Option<Vec<u32>>,
    error: f64,
}

/// A group with all that a candidate is judged by.
struct Site<'a> {
    cx: Cx<'a>,
    group: &'a Group,
    /// All readers' rows, one below the other.
    weights: Vec<f32>,
    /// Largest magnitude in each column of the readers.
    weight_tops: Vec<f32>,
    seen: &'a Seen,
    /// What the readers give for the rows, and how much the errors count.
    exact: Vec<f32>,
    shares: Vec<Share>,
    scheme: Option<Scheme>,
    /// The matrix that makes the channels, and how it will be rounded; `None` for a norm.
    source: Option<Matrix>,
    source_scheme: Option<Scheme>,
    k: usize,
}

impl<'a> Site<'a> {
    fn new(
        cx: Cx<'a>,
        group: &'a Group,
        (readers, source): (&[Matrix], Option<Matrix>),
        seen: &'a Seen,
        scheme: Option<Scheme>,
    ) -> Option<Site<'a>> {
        let k = group.n_columns();
        let weights: Vec<f32> = readers.iter().flat_map(|reader| reader.values.iter().copied()).collect();
        let mut weight_tops = vec![0.0f32; k];
        for row in weights.chunks_exact(k) {
            weight_tops.iter_mut().zip(row).for_each(|(top, v)| *top = top.max(v.abs()));
        }
        let exact = product(&cx, &seen.rows, &weights, k)?;
        let shares = shares(&exact, weights.len() / k, seen, readers.iter().map(|reader| reader.values.len() / k));
        let source_scheme = source.as_ref().and_then(|source| scheme.map(|scheme| scheme.fitting(source.k)));
        let scheme = scheme.map(|scheme| scheme.fitting(k));
        Some(Site { cx, group, weights, weight_tops, seen, exact, shares, scheme, source, source_scheme, k })
    }

    /// The error without factors, and the best candidate if it is clearly better.
    fn search(&self) -> (f64, Option<Candidate>) {
        let n = self.group.n_channels;
        let before = self.candidate(vec![1.0; n], false).error;
        let (inputs, weights) = (self.channel_tops(&self.input_tops()), self.channel_tops(&self.weight_tops));
        let top = inputs.iter().copied().fold(0.0, f32::max);
        let factors = |strength: f32, least: f32| {
            let usable = |top: f32| if top > 0.0 { top } else { 1.0 };
            let factor = |(x, w): (&f32, &f32)| usable(*w).powf(1.0 - strength) / usable(x.max(least)).powf(strength);
            rounded(&inputs.iter().zip(&weights).map(factor).collect::<Vec<f32>>())
        };
        let sortable = !self.group.partners.is_empty() && self.has_blocks() && n <= usize::from(u16::MAX) + 1;
        let mut best = (1.0, self.candidate(factors(1.0, 0.0), sortable));
        for strength in STRENGTHS {
            let candidate = self.candidate(factors(strength, 0.0), sortable);
            if candidate.error < best.1.error {
                best = (strength, candidate);
            }
        }
        for part in LEAST_PARTS {
            let candidate = self.candidate(factors(best.0, top * part), sortable);
            if candidate.error < best.1.error {
                best.1 = candidate;
            }
        }
        (before, Some(best.1).filter(|best| best.error < before * LEAST_GAIN))
    }

    fn has_blocks(&self) -> bool {
        self.scheme.is_some_and(|scheme| !matches!(scheme, Scheme::PerChannel { .. }))
    }

    fn input_tops(&self) -> Vec<f32> {
        self.seen.ends.iter().map(|(least, most)| most.max(-least)).collect()
    }

    /// The largest of each channel's columns.
    fn channel_tops(&self, columns: &[f32]) -> Vec<f32> {
        let mut tops = vec![0.0f32; self.group.n_channels];
        for (column, top) in columns.iter().enumerate() {
            let channel = self.group.channel(column);
            tops[channel] = tops[channel].max(*top);
        }
        tops
    }

    /// `factors` with the error that is left with them.
    fn candidate(&self, factors: Vec<f32>, sorted: bool) -> Candidate {
        let by_column: Vec<f32> = (0..self.k).map(|column| factors[self.group.channel(column)]).collect();
        let order = sorted.then(|| self.order(&by_column));
        let gains = self.source_gains(&factors);
        let inputs = self.rounded_inputs(&self.seen.ends, &by_column, &gains);
        let weights = self.rounded_weights(&by_column, order.as_deref());
        let n = self.weights.len() / self.k;
        let Some(found) = product(&self.cx, &inputs, &weights, self.k) else {
            return Candidate { factors, order, error: f64::INFINITY };
        };
        let error = |share: &Share| {
            let rows = found.chunks_exact(n).zip(self.exact.chunks_exact(n)).zip(&share.row_weights);
            let columns = share.columns.clone();
            let one = |((found, exact), weight): ((&[f32], &[f32]), &f64)| {
                weight * squared_distance(&found[columns.clone()], &exact[columns.clone()])
            };
            rows.map(one).sum::<f64>()
        };
        let error = self.shares.iter().map(error).sum::<f64>() / self.shares.len().max(1) as f64;
        Candidate { factors, order, error }
    }

    /// Columns by how large they are in the scaled weights.
    fn order(&self, factors: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.k as u32).collect();
        let size = |column: &u32| self.weight_tops[*column as usize] / factors[*column as usize];
        order.sort_by(|a, b| size(b).total_cmp(&size(a)));
        order
    }

    /// How much larger or smaller each channel gets where the rows that make it are rounded: a scale that f16 hardly holds
    /// is off for all of its block. 1 for a norm, whose weight stays in floats.
    fn source_gains(&self, factors: &[f32]) -> Vec<f32> {
        let (Some(scheme), Some(source)) = (self.source_scheme, &self.source) else { return vec![1.0; factors.len()] };
        let (grid, mut rounded) = (SchemeGrid::of(scheme), vec![0.0; source.k]);
        let gain = |(row, factor): (&[f32], &f32)| {
            let scaled: Vec<f32> = row.iter().map(|v| v * factor).collect();
            grid.round_row(&scaled, &mut rounded);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let energy = dot(&scaled, &scaled);
            if energy > 0.0 { dot(&rounded, &scaled) / energy } else { 1.0 }
        };
        source.values.chunks_exact(source.k).zip(factors).map(gain).collect()
    }

    /// The sampled rows, scaled and on a grid of 8 bits for what is within `ends`.
    fn rounded_inputs(&self, ends: &[(f32, f32)], factors: &[f32], gains: &[f32]) -> Vec<f32> {
        let scaled = ends.iter().zip(factors).map(|((least, most), factor)| (least * factor, most * factor));
        let (least, most) = scaled.fold((0.0f32, 0.0f32), |all, one| (all.0.min(one.0), all.1.max(one.1)));
        let scale = ((most - least) / 255.0).max(f32::MIN_POSITIVE);
        let offset = (least / scale).round_ties_even();
        let value = |(at, v): (usize, &f32)| {
            let column = at % self.k;
            let gain = gains[self.group.channel(column)];
            let code = (v * factors[column] * gain / scale).round_ties_even().clamp(offset, offset + 255.0);
            code * scale
        };
        self.seen.rows.iter().enumerate().map(value).collect()
    }

    /// Signal to noise of the sampled rows, scaled, on their grid of 8 bits: by the measure that decides about their bits.
    fn input_sqnr_db(&self, candidate: &Candidate) -> f64 {
        let by_column: Vec<f32> = (0..self.k).map(|column| candidate.factors[self.group.channel(column)]).collect();
        let rounded = self.rounded_inputs(&self.seen.all_ends, &by_column, &vec![1.0; candidate.factors.len()]);
        let (mut values, mut noise) = (Vec::with_capacity(self.seen.rows.len()), 0.0);
        for (number, (row, rounded)) in
            self.seen.rows.chunks_exact(self.k).zip(rounded.chunks_exact(self.k)).enumerate()
        {
            let scaled: Vec<f32> = row.iter().zip(&by_column).map(|(v, factor)| v * factor).collect();
            let stands_for = self.seen.stands_for(number);
            values.extend(scaled.iter().map(|v| (f64::from(*v), stands_for)));
            noise += stands_for * squared_distance(rounded, &scaled);
        }
        10.0 * (signal(values).max(f64::MIN_POSITIVE) / noise.max(f64::MIN_POSITIVE)).log10()
    }

    /// The weights, scaled and as their scheme will round them in this order; columns are back in their places.
    fn rounded_weights(&self, factors: &[f32], order: Option<&[u32]>) -> Vec<f32> {
        let mut result: Vec<f32> = Vec::with_capacity(self.weights.len());
        let place = |at: usize| order.map_or(at, |order| order[at] as usize);
        let (mut scaled, mut grid) = (vec![0.0; self.k], vec![0.0; self.k]);
        for row in self.weights.chunks_exact(self.k) {
            scaled.iter_mut().enumerate().for_each(|(at, out)| *out = row[place(at)] / factors[place(at)]);
            match self.scheme {
                Some(scheme) => SchemeGrid::of(scheme).round_row(&scaled, &mut grid),
                None => grid.copy_from_slice(&scaled),
            }
            let begin = result.len();
            result.resize(begin + self.k, 0.0);
            grid.iter().enumerate().for_each(|(at, v)| result[begin + place(at)] = *v);
        }
        result
    }
}

/// One reader's part of the results.
struct Share {
    columns: Range<usize>,
    /// How much the error of each row counts.
    row_weights: Vec<f64>,
}

/// Readers count alike, however large their results are. So do rows, but where a result is much larger than usual its error
/// counts relative to it: what follows is a norm, or is added to something as large.
fn shares(exact: &[f32], n: usize, seen: &Seen, readers: impl Iterator<Item = usize>) -> Vec<Share> {
    let mut begin = 0;
    let share = |own: usize| {
        let columns = begin..begin + own;
        begin += own;
        let energy = |row: &[f32]| squared_distance(&row[columns.clone()], &[]);
        let energies: Vec<f64> = exact.chunks_exact(n.max(1)).map(energy).collect();
        let mut sorted = energies.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0).max(f64::MIN_POSITIVE);
        let all = (seen.stride * seen.n_spread).max(1) as f64;
        let weight = |(row, energy): (usize, f64)| seen.stands_for(row) / all / energy.max(median);
        Share { columns, row_weights: energies.into_iter().enumerate().map(weight).collect() }
    };
    readers.map(share).collect()
}

/// `Σ (a − b)²`; where `b` is empty it counts as zeros.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let other = |i: usize| b.get(i).copied().unwrap_or(0.0);
    a.iter().enumerate().map(|(i, a)| f64::from(a - other(i)).powi(2)).sum()
}

/// `x · Wᵀ` of rows of `k`; `None` if a weight is not finite.
fn product(cx: &Cx<'_>, x: &[f32], weights: &[f32], k: usize) -> Option<Vec<f32>> {
    let (m, n) = (x.len() / k, weights.len() / k);
    let layout = htp_sim::PackedLayout::new(n, k, WeightFormat::F32).expect("a matrix that is in memory");
    let packed = pack_float(&layout, weights).ok()?;
    let mut out = vec![0.0; m * n];
    let weights = layout.view(&packed).expect("packed for this layout");
    let part = Part { weights, bias: None, branch: None, write: Write::Store, out: &mut out };
    htp_sim::linear(cx, Rows::F32 { x, m }, &mut [part]).expect("the extents are those of the layout");
    Some(out)
}

/// Factors around 1, as they are recorded: numbers that f16 holds. Block scales of source and readers are f16, too, and are
/// multiplied and divided by them: as far up as down, both keep their bits longest.
fn rounded(factors: &[f32]) -> Vec<f32> {
    // A channel that hardly holds anything makes a factor that no f32 holds.
    let held = |factor: &f32| factor.clamp(f32::MIN_POSITIVE, f32::MAX);
    let (least, most) = factors.iter().map(held).fold((f32::MAX, 0.0f32), |ends, f| (ends.0.min(f), ends.1.max(f)));
    let product = least * most;
    let middle = if product.is_normal() { product.sqrt() } else { least.sqrt() * most.sqrt() };
    let limited = |factor: &f32| (held(factor) / middle).clamp(1.0 / MAX_FACTOR, MAX_FACTOR);
    factors.iter().map(|factor| half::f16::from_f32(limited(factor)).to_f32()).collect()
}

/// Rows that stand for the text that judges.
const SPREAD_ROWS: usize = 192;
/// Rows with values far beyond those in the text that sets the factors.
const FARTHEST_ROWS: usize = 64;
/// How much of a channel's size moves from inputs to weights; all of it is tried, too.
const STRENGTHS: [f32; 5] = [0.4, 0.55, 0.7, 0.8, 0.9];
/// Channels below such a part of the largest count as if they had it: their own codes may be few.
const LEAST_PARTS: [f32; 6] = [0.5, 0.25, 0.0625, 0.015_625, 0.003_906_25, 0.000_976_562_5];
/// Factors are taken if they leave at most this part of the error.
const LEAST_GAIN: f64 = 0.95;
/// Farthest that a channel is scaled; f16 holds its inverse with all its bits.
const MAX_FACTOR: f32 = 8192.0;

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: channels of any size get factors that f16 holds, as far up as down; a factor that is none ends in NaN weights.
    #[test]
    fn factors_of_any_size_are_held() {
        for factors in [[1e-42, 1.0], [f32::INFINITY, 1.0], [f32::INFINITY, 1e38], [0.0, 1e-30], [4.0, 1.0]] {
            let found = rounded(&factors);
            let inside = |factor: &f32| (1.0 / MAX_FACTOR..=MAX_FACTOR).contains(factor);
            assert!(found.iter().all(inside), "{factors:?}: {found:?}");
        }
        assert_eq!(rounded(&[4.0, 1.0]), [2.0, 0.5]);
    }
}
