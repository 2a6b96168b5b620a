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
    /// Most windows to score; at least 1.
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
    /// No window is asked for.
    #[error("at most {windows} windows, need at least 1")]
    NoWindows {
        /// Most windows to score.
        windows: usize,
    },
    /// The context does not hold a window.
    #[error("windows of {window} ids, need at most one id more than the {context_size} positions of the context")]
    WindowTooLong {
        /// Ids of a window.
        window: usize,
        /// Positions of the context; of a comparison's two the smaller one.
        context_size: usize,
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
/// [`AccuracyError`] if no window is full or the context does not hold one, an id is not in the vocabulary, a logit is no
/// finite number, or the engine fails.
pub fn perplexity(
    engine: &mut dyn Engine,
    ids: &[u32],
    cut: Windows,
    mut progress: impl FnMut(usize, usize),
) -> Result<Perplexity, AccuracyError> {
    let windows = cut.of(ids, engine.n_vocab(), engine.context_size())?;
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
    /// The full windows of `ids`, for a model of `n_vocab` tokens whose context has `context_size` positions.
    fn of(self, ids: &[u32], n_vocab: usize, context_size: usize) -> Result<Vec<&[u32]>, AccuracyError> {
        let Windows { window, windows } = self;
        if windows == 0 {
            return Err(AccuracyError::NoWindows { windows });
        }
        // The last id of a window is only predicted, never fed.
        if window > 1 && context_size < window - 1 {
            return Err(AccuracyError::WindowTooLong { window, context_size });
        }
        if window < 2 || ids.len() < window {
            return Err(AccuracyError::TooShort { have: ids.len(), window });
        }
        if let Some(&id) = ids.iter().find(|id| **id as usize >= n_vocab) {
            return Err(EngineError::TokenOutOfRange { id, n_vocab }.into());
        }
        Ok(ids.chunks_exact(window).take(windows).collect())
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
            let position = i * ROWS_PER_RUN + row;
            let next = window[position + 1];
            nll.push(log_sum_exp(logits, position)? - f64::from(logits[next as usize]));
        }
    }
    Ok(())
}

/// `ln Σ exp(logit)`, in f64, of the logits at `position`, all of them finite: a sum over others looks like a good one.
fn log_sum_exp(logits: &[f32], position: usize) -> Result<f64, EngineError> {
    if let Some((index, &value)) = logits.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        return Err(EngineError::NonFinite { position, index, value });
    }
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    Ok(top + logits.iter().map(|logit| (f64::from(*logit) - top).exp()).sum::<f64>().ln())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Rows whose logits are held at a time: 64 rows of a vocabulary of 150,000 are 38 MB.
const ROWS_PER_RUN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::scripted::Scripted;

    // Guards: a window that the context does not hold, or none at all, is refused as that before anything runs.
    #[test]
    fn windows_fit_the_context() {
        let ids = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1];
        let score = |window, windows| {
            let mut engine = Scripted::new(4, 8, Box::new(|_: &[u32], _: &mut [f32]| {}));
            perplexity(&mut engine, &ids, Windows { window, windows }, |_, _| panic!("a window was run")).unwrap_err()
        };
        let refused = score(10, 1).to_string();
        assert_eq!(refused, "windows of 10 ids, need at most one id more than the 8 positions of the context");
        assert_eq!(score(9, 0).to_string(), "at most 0 windows, need at least 1");
        for window in [0, 1] {
            assert!(matches!(score(window, 1), AccuracyError::TooShort { have: 10, .. }));
        }
        let mut engine = Scripted::new(4, 8, Box::new(|_: &[u32], _: &mut [f32]| {}));
        assert!(perplexity(&mut engine, &ids, Windows { window: 9, windows: 1 }, |_, _| {}).is_ok());
    }

    // Guards: a model that computes no numbers, or a text that it has no tokens for, is an error and not a figure.
    #[test]
    fn refused() {
        let cut = Windows { window: 3, windows: 2 };
        let score = |broken_at: usize, value: f32, ids: &[u32]| {
            let script = move |history: &[u32], logits: &mut [f32]| {
                if history.len() == broken_at {
                    logits[2] = value;
                }
            };
            perplexity(&mut Scripted::new(4, 8, Box::new(script)), ids, cut, |_, _| {})
        };
        let ids = [0, 1, 3, 3, 1, 0];
        let even = score(1, 0.0, &ids).unwrap();
        assert!((even.perplexity - 4.0).abs() < 1e-12, "{even:?}");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let refused = score(2, value, &ids).unwrap_err();
            let AccuracyError::Engine(EngineError::NonFinite { position: 1, index: 2, .. }) = refused else {
                panic!("{refused}");
            };
        }
        // The last id of a window is never fed.
        let refused = score(9, 0.0, &[0, 1, 4]).unwrap_err();
        assert!(matches!(refused, AccuracyError::Engine(EngineError::TokenOutOfRange { id: 4, n_vocab: 4 })));
    }
}
