//! Perplexity, the measure of GenieAccuracy: how surprised a model is by a text.
//!
//! The method is the usual one for comparing forms of one model: the text's ids, without special tokens, are cut into
//! windows; each starts from an empty cache at position 0; the first id of a window is not scored; perplexity is
//! `exp` of the mean negative natural logarithm of the probability of all scored ids.

use std::sync::atomic::AtomicBool;

use crate::engine::{Engine, EngineError, Logits};

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
    let too_short = AccuracyError::TooShort { have: ids.len(), window: cut.window };
    if cut.window < 2 || ids.len() < cut.window {
        return Err(too_short);
    }
    let windows: Vec<&[u32]> = ids.chunks_exact(cut.window).take(cut.windows).collect();
    if windows.is_empty() {
        return Err(too_short);
    }
    let (mut nll, mut window_mean_nll) = (Vec::new(), Vec::new());
    for (done, window) in windows.iter().enumerate() {
        let start = nll.len();
        score_window(engine, window, &mut nll)?;
        window_mean_nll.push(mean(&nll[start..]));
        progress(done + 1, windows.len());
    }
    engine.rewind(0);
    Ok(Perplexity { perplexity: mean(&nll).exp(), nll, window_mean_nll })
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
