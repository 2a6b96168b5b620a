//! How far a quantized model is from its float original, and where it leaves it.
//!
//! ```text
//! reference  ids ─► layer 0 ─► layer 1 ─► … ─► logits
//!                      │keep       │keep          │
//! free       ids ─► layer 0 ─► layer 1 ─► … ─► logits     against kept: the error that has accumulated so far
//! forced     ids ─► layer 0 ─┐ layer 1 ─┐ …               against kept: the error that this layer makes
//!                      kept ─┘     kept ─┘                 each layer is given what the reference gave to it
//! ```
//!
//! The three run side by side, a few rows at a time, over caches of their own; the forced one's caches come from the
//! reference's inputs too. Only the rows of one run are kept, whatever the length of the text.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use qnn_core::{
    backend::{Seen, Watched},
    outline::Place,
};

use super::{AccuracyError, Perplexity, ROWS_PER_RUN, Windows, log_sum_exp, mean, noise::Noise};
use crate::adapters::{AdapterChoice, Adapters, Selection};
use crate::engine::qnn::{QnnEngine, Spot};
use crate::engine::{Engine, EngineError};
use crate::{Error, Model};

/// One of the two models of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that is taken to be right.
    Reference,
    /// The one that is compared with it.
    Tested,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Of the reference.
    pub reference: Perplexity,
    /// Of the model compared with it.
    pub tested: Perplexity,
    /// Mean over the scored ids of `ln(p_reference / p_tested)`; its `exp` is the ratio of the perplexities.
    pub log_ratio: f64,
    /// Standard error of that mean, the ids taken as independent.
    pub log_ratio_error: f64,
    /// Share of the scored ids where both have the same most probable token.
    pub top1_agreement: f64,
    /// Kullback-Leibler divergence of the tested from the reference's distribution.
    pub divergence: Divergence,
    /// Every tensor that both models compute, in the order of computation.
    pub tensors: Vec<TensorError>,
}

/// `Σ p_reference ln(p_reference / p_tested)` at each scored id, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the names say it all")]
pub struct Divergence {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
}

/// How far a tensor is from the reference's.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorError {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// True for the result of its place.
    pub ends: bool,
    /// Elements of a row.
    pub width: usize,
    /// With all that went wrong before it.
    pub accumulated: Sqnr,
    /// With its place given what the reference gave to it.
    pub made: Sqnr,
}

/// Ratio of signal to quantization noise in decibels; infinite where nothing differs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sqnr {
    /// Energy of all rows over that of all errors. A few rows with massive values can decide it.
    pub all: f64,
    /// Mean over the rows of their own ratio, none counted beyond ±150: the typical row.
    pub row: f64,
}

/// Two forms of one model, open, to be compared with and without adapters.
pub struct Comparer {
    reference: Runner,
    free: Runner,
    forced: Runner,
    spots: Spots,
}

/// An engine with the adapters of its config.
struct Runner {
    side: Side,
    engine: QnnEngine,
    adapters: Adapters,
}

/// The tensors that may be in both models.
struct Spots {
    pairs: Vec<Pair>,
    by_name: HashMap<String, usize>,
    rows_per_run: usize,
}

/// A tensor as the reference and as the tested model have it.
struct Pair {
    reference: Spot,
    tested: Spot,
}

/// What a comparison adds up.
struct Sums {
    reference_nll: Vec<f64>,
    tested_nll: Vec<f64>,
    divergence: Vec<f64>,
    same_top: usize,
    accumulated: Vec<Noise>,
    made: Vec<Noise>,
    /// The reference's rows of the run that goes on; empty where it did not show the tensor.
    kept: Vec<Vec<f32>>,
}

impl Comparer {
    /// Makes `tested` ready to be compared with `reference`.
    ///
    /// # Errors
    /// [`AccuracyError::Differ`] if they have another vocabulary, number of layers or width; [`AccuracyError::Side`].
    pub fn new(reference: &Model, tested: &Model) -> Result<Comparer, AccuracyError> {
        let (reference, free) = (Runner::new(Side::Reference, reference)?, Runner::new(Side::Tested, tested)?);
        let forced = Runner::new(Side::Tested, tested)?;
        let (n_reference, n_tested) = (reference.engine.n_vocab(), free.engine.n_vocab());
        check_same("size of the vocabulary", n_reference, n_tested)?;
        let (n_reference, n_tested) = (reference.engine.model().n_layers()?, free.engine.model().n_layers()?);
        check_same("number of layers", n_reference, n_tested)?;
        let spots = Spots::of(&reference.engine, &free.engine)?;
        Ok(Comparer { reference, free, forced, spots })
    }

    /// An engine of the tested model: it tells the kernels and the threads that are used.
    pub fn engine(&self) -> &QnnEngine {
        &self.free.engine
    }

    /// Compares the two over windows of `ids` ([`super::shared_ids`]), both with the adapter and strengths of `choice`;
    /// `progress` is told windows done and in all.
    ///
    /// # Errors
    /// [`AccuracyError`]: no full window, one that a context does not hold, an adapter that one of them does not have, what
    /// the engines say.
    pub fn run(
        &mut self,
        choice: &AdapterChoice,
        ids: &[u32],
        cut: Windows,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Comparison, AccuracyError> {
        let (reference, tested) = (&self.reference.engine, &self.free.engine);
        let context_size = reference.context_size().min(tested.context_size());
        let windows = cut.of(ids, reference.n_vocab(), context_size)?;
        for runner in [&mut self.reference, &mut self.free, &mut self.forced] {
            runner.select(choice)?;
        }
        let mut sums = Sums::new(self.spots.pairs.len());
        for (done, window) in windows.iter().enumerate() {
            self.rewind();
            // The last id is only predicted, never fed.
            for (i, chunk) in window[..window.len() - 1].chunks(self.spots.rows_per_run).enumerate() {
                let next = &window[i * self.spots.rows_per_run + 1..][..chunk.len()];
                self.run_chunk(chunk, next, &mut sums)?;
            }
            progress(done + 1, windows.len());
        }
        self.rewind();
        sums.finish(&self.spots, cut.window - 1)
    }

    fn rewind(&mut self) {
        [&mut self.reference, &mut self.free, &mut self.forced].into_iter().for_each(|runner| runner.engine.rewind(0));
    }

    /// Runs all three over `chunk`, behind which comes, id by id, `next`.
    fn run_chunk(&mut self, chunk: &[u32], next: &[u32], sums: &mut Sums) -> Result<(), AccuracyError> {
        let Comparer { reference, free, forced, spots } = self;
        let Sums { accumulated, made, kept, .. } = sums;
        let from = reference.engine.position();
        kept.iter_mut().for_each(Vec::clear);
        let want = reference.engine.forward_watched(chunk, &mut |tensor: Watched<'_>| {
            if let Some(at) = spots.find(tensor.name) {
                kept[at].extend_from_slice(tensor.values);
                spots.pairs[at].reference.channels.undo(&mut kept[at]);
            }
            Seen::Kept
        })?;
        let have = free.engine.forward_watched(chunk, &mut |tensor: Watched<'_>| {
            if let Some(at) = spots.find(tensor.name).filter(|at| !kept[*at].is_empty()) {
                accumulated[at].add(&kept[at], &undone(&spots.pairs[at], tensor.values), tensor.width);
            }
            Seen::Kept
        })?;
        forced.engine.forward_watched(chunk, &mut |tensor: Watched<'_>| {
            let Some(at) = spots.find(tensor.name).filter(|at| !kept[*at].is_empty()) else { return Seen::Kept };
            made[at].add(&kept[at], &undone(&spots.pairs[at], tensor.values), tensor.width);
            if !spots.pairs[at].tested.ends {
                return Seen::Kept;
            }
            tensor.values.copy_from_slice(&kept[at]);
            spots.pairs[at].tested.channels.redo(tensor.values);
            Seen::Replaced
        })?;
        sums.score(want, have, next, from)
    }
}

fn of_side(side: Side, why: EngineError) -> AccuracyError {
    AccuracyError::Side { side, why: Box::new(Error::engine("primary", why)) }
}

impl Runner {
    fn new(side: Side, model: &Model) -> Result<Runner, AccuracyError> {
        let engine = model.engine().map_err(|why| AccuracyError::Side { side, why: Box::new(why) })?;
        let config = &model.config().engine;
        Ok(Runner { side, engine, adapters: Adapters::new(&config.lora, &config.role) })
    }

    fn select(&mut self, choice: &AdapterChoice) -> Result<(), AccuracyError> {
        let side = self.side;
        let mut select = || -> Result<(), Error> {
            let selection = self.adapters.resolve(&mut self.engine, choice)?;
            let selected = self.engine.select_adapter(selection.as_ref().map(Selection::for_engine));
            selected.map_err(|why| Error::engine("primary", why))
        };
        select().map_err(|why| AccuracyError::Side { side, why: Box::new(why) })
    }
}

impl Spots {
    fn of(reference: &QnnEngine, tested: &QnnEngine) -> Result<Spots, AccuracyError> {
        let mut tested_spots: HashMap<String, Spot> =
            tested.model().spots()?.into_iter().map(|spot| (spot.name.clone(), spot)).collect();
        let mut pairs = Vec::new();
        for reference in reference.model().spots()? {
            let Some(tested) = tested_spots.remove(&reference.name) else {
                if reference.ends {
                    return Err(AccuracyError::Hidden { tensor: reference.name });
                }
                continue;
            };
            check_same(&format!("width of tensor {}", reference.name), reference.width, tested.width)?;
            pairs.push(Pair { reference, tested });
        }
        let by_name = pairs.iter().enumerate().map(|(at, pair)| (pair.tested.name.clone(), at)).collect();
        let max_rows = reference.model().max_rows().min(tested.model().max_rows());
        Ok(Spots { pairs, by_name, rows_per_run: ROWS_PER_RUN.min(max_rows) })
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}

impl Sums {
    fn new(n_spots: usize) -> Sums {
        Sums {
            reference_nll: Vec::new(),
            tested_nll: Vec::new(),
            divergence: Vec::new(),
            same_top: 0,
            accumulated: vec![Noise::default(); n_spots],
            made: vec![Noise::default(); n_spots],
            kept: vec![Vec::new(); n_spots],
        }
    }

    /// Adds rows of logits, the first at position `from`, with the id that follows each.
    fn score(&mut self, reference: &[f32], tested: &[f32], next: &[u32], from: usize) -> Result<(), AccuracyError> {
        let n_vocab = reference.len() / next.len();
        let rows = reference.chunks_exact(n_vocab).zip(tested.chunks_exact(n_vocab));
        for (position, ((reference, tested), next)) in (from..).zip(rows.zip(next)) {
            let log_total = |side, logits| log_sum_exp(logits, position).map_err(|why| of_side(side, why));
            let (total, tested_total) = (log_total(Side::Reference, reference)?, log_total(Side::Tested, tested)?);
            let log_p = |logits: &[f32], total: f64, id: usize| f64::from(logits[id]) - total;
            let term = |id: usize| {
                let log_p_reference = log_p(reference, total, id);
                log_p_reference.exp() * (log_p_reference - log_p(tested, tested_total, id))
            };
            // Never below 0 but for rounding.
            self.divergence.push((0..n_vocab).map(term).sum::<f64>().max(0.0));
            self.reference_nll.push(-log_p(reference, total, *next as usize));
            self.tested_nll.push(-log_p(tested, tested_total, *next as usize));
            self.same_top += usize::from(top(reference) == top(tested));
        }
        Ok(())
    }

    fn finish(mut self, spots: &Spots, scored: usize) -> Result<Comparison, AccuracyError> {
        let mut tensors = Vec::new();
        for (pair, (accumulated, made)) in spots.pairs.iter().zip(self.accumulated.iter().zip(&self.made)) {
            if made.is_empty() && pair.tested.ends {
                return Err(AccuracyError::Hidden { tensor: pair.tested.name.clone() });
            }
            if !made.is_empty() {
                let sqnr = |noise: &Noise| Sqnr { all: noise.decibels(), row: noise.row_decibels() };
                let Spot { name, place, ends, width, .. } = pair.tested.clone();
                let (accumulated, made) = (sqnr(accumulated), sqnr(made));
                tensors.push(TensorError { name, place, ends, width, accumulated, made });
            }
        }
        let n = self.tested_nll.len() as f64;
        let differences: Vec<f64> = self.tested_nll.iter().zip(&self.reference_nll).map(|(t, r)| t - r).collect();
        let log_ratio = mean(&differences);
        let variance = differences.iter().map(|d| (d - log_ratio).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        self.divergence.sort_by(f64::total_cmp);
        Ok(Comparison {
            reference: Perplexity::new(self.reference_nll, scored),
            tested: Perplexity::new(self.tested_nll, scored),
            log_ratio,
            log_ratio_error: (variance / n).sqrt(),
            top1_agreement: self.same_top as f64 / n,
            divergence: Divergence::of(&self.divergence),
            tensors,
        })
    }
}

impl Comparison {
    /// Perplexity over that of the reference.
    pub fn ratio(&self) -> f64 {
        self.log_ratio.exp()
    }

    /// The results of the places: the embedding, each layer, the logits.
    pub fn layers(&self) -> impl Iterator<Item = &TensorError> {
        self.tensors.iter().filter(|tensor| tensor.ends)
    }
}

impl Divergence {
    /// Of values in ascending order.
    fn of(sorted: &[f64]) -> Divergence {
        // The smallest value that so many percent are not above.
        let percentile = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
        Divergence { mean: mean(sorted), median: percentile(50), p99: percentile(99), max: percentile(100) }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Reference => "the reference",
            Side::Tested => "the model to compare",
        })
    }
}

fn check_same(what: &str, reference: usize, tested: usize) -> Result<(), AccuracyError> {
    if reference == tested {
        return Ok(());
    }
    let (what, reference, tested) = (what.to_owned(), reference.to_string(), tested.to_string());
    Err(AccuracyError::Differ { what, reference, tested })
}

/// Rows of the tested model with the channels of the model as it was.
fn undone<'a>(pair: &Pair, rows: &'a [f32]) -> Cow<'a, [f32]> {
    let channels = &pair.tested.channels;
    if channels.is_identity() {
        return Cow::Borrowed(rows);
    }
    let mut rows = rows.to_vec();
    channels.undo(&mut rows);
    Cow::Owned(rows)
}

/// The first of the largest.
fn top(logits: &[f32]) -> usize {
    let best = |best: usize, id: usize| if logits[id] > logits[best] { id } else { best };
    (0..logits.len()).fold(0, best)
}
