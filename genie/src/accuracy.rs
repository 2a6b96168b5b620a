//! Perplexity, the measure of GenieAccuracy: how surprised a model is by a text.
//!
//! The method is the usual one for comparing forms of one model: the text's ids, without special tokens, are cut into
//! windows; each starts from an empty cache at position 0; the first id of a window is not scored; perplexity is
//! `exp` of the mean negative natural logarithm of the probability of all scored ids.
//!
//! [`compare`] runs two forms of one model over the same windows and says how far they are apart, and where.

use std::sync::atomic::AtomicBool;

use crate::engine::{Engine, EngineError, Logits};
use crate::tokenizer::{Specials, Tokenizer, TokenizerError};

pub mod compare;
mod noise;
pub mod summary;

pub use compare::{Comparer, Comparison};

/// How a text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Ids of one window; at least 2.
    pub window: usize,
    /// Most windows to score.
    pub windows: usize,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Perplexity {
    /// `exp(mean NLL)` over all scored ids.
    pub perplexity: f64,
    /// Negative log-likelihood (nats) of every scored id, in order.
    pub nll: Vec<f64>,
    /// Mean of each window.
    pub window_mean_nll: Vec<f64>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccuracyError {
    /// There is nothing to score.
    #[error("text has {have} ids in windows of {window}, need a window of at least 2 ids and a text that fills one")]
    TooShort {
        /// Ids of the text.
        have: usize,
        /// Ids of a window.
        window: usize,
    },
    /// The model could not be run.
    #[error("engine")]
    Engine(#[from] EngineError),
    /// A text could not be made ids.
    #[error("tokenizer")]
    Tokenizer(#[from] TokenizerError),
    /// One of the two models of a comparison cannot be used, or not with this adapter.
    #[error("{side}")]
    Side {
        /// Which of the two.
        side: compare::Side,
        /// Why.
        #[source]
        why: Box<crate::Error>,
    },
    /// The models of a comparison are no two forms of one model.
    #[error("{what}: the reference has {reference}, the model to compare {tested}")]
    Differ {
        /// In what they differ.
        what: String,
        /// What the reference has.
        reference: String,
        /// What the other one has.
        tested: String,
    },
    /// What a layer gives to the next cannot be looked at.
    #[error("tensor {tensor}, what its layer gives to the next, is not computed as such in both models")]
    Hidden {
        /// The tensor.
        tensor: String,
    },
}

/// Scores `ids` window by window; `progress` is told windows done and in all. The engine is rewound to 0 before each
/// window and afterwards.
///
/// # Errors
/// [`AccuracyError`] if no window is full or the engine fails.
pub fn perplexity(
    engine: &mut dyn Engine,
    ids: &[u32],
    cut: Windows,
    mut progress: impl FnMut(usize, usize),
) -> Result<Perplexity, AccuracyError> {
    let windows = cut.of(ids)?;
    let mut nll = Vec::new();
    for (done, window) in windows.iter().enumerate() {
        score_window(engine, window, &mut nll)?;
        progress(done + 1, windows.len());
    }
    engine.rewind(0);
    Ok(Perplexity::new(nll, cut.window - 1))
}

/// The ids of `text`, which all of `tokenizers` have to agree on.
///
/// # Errors
/// [`AccuracyError::Differ`] with the first id that differs.
pub fn shared_ids(reference: &Tokenizer, tested: &Tokenizer, text: &str) -> Result<Vec<u32>, AccuracyError> {
    let ids = reference.encode(text, Specials::AsText)?;
    let other = tested.encode(text, Specials::AsText)?;
    let at = ids.iter().zip(&other).position(|(a, b)| a != b).unwrap_or(ids.len().min(other.len()));
    if at == ids.len() && at == other.len() {
        return Ok(ids);
    }
    let id = |ids: &[u32]| ids.get(at).map_or_else(|| format!("{} ids", ids.len()), u32::to_string);
    Err(AccuracyError::Differ { what: format!("id {at} of the text"), reference: id(&ids), tested: id(&other) })
}

impl Windows {
    /// The full windows of `ids`.
    fn of(self, ids: &[u32]) -> Result<Vec<&[u32]>, AccuracyError> {
        if self.window < 2 || self.windows == 0 || ids.len() < self.window {
            return Err(AccuracyError::TooShort { have: ids.len(), window: self.window });
        }
        Ok(ids.chunks_exact(self.window).take(self.windows).collect())
    }
}

impl Perplexity {
    /// Of the scored ids of windows, each with `scored` of them.
    fn new(nll: Vec<f64>, scored: usize) -> Perplexity {
        let window_mean_nll = nll.chunks(scored).map(mean).collect();
        Perplexity { perplexity: mean(&nll).exp(), nll, window_mean_nll }
    }
}

fn score_window(engine: &mut dyn Engine, window: &[u32], nll: &mut Vec<f64>) -> Result<(), EngineError> {
    engine.rewind(0);
    let n_vocab = engine.n_vocab();
    // The last id is only predicted, never fed.
    let fed = &window[..window.len() - 1];
    for (i, chunk) in fed.chunks(ROWS_PER_RUN).enumerate() {
        let logits = engine.forward(chunk, Logits::All, &AtomicBool::new(false))?;
        for (row, logits) in logits.chunks_exact(n_vocab).enumerate() {
            let next = window[i * ROWS_PER_RUN + row + 1];
            nll.push(log_sum_exp(logits) - f64::from(logits[next as usize]));
        }
    }
    Ok(())
}

/// `ln Σ exp(logit)`, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|logit| (f64::from(*logit) - top).exp()).sum::<f64>().ln()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Rows whose logits are held at a time: 64 rows of a vocabulary of 150,000 are 38 MB.
const ROWS_PER_RUN: usize = 64;
