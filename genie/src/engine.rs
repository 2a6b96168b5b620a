//! The seam to the model: ids in, logits out, rewind to a position.
//!
//! A dialog knows a model only through [`Engine`]. It has two implementors: the QNN engine over a context binary, and
//! [`scripted::Scripted`], whose logits are a plain function of the token history and which tests use.

use std::sync::atomic::AtomicBool;

use thiserror::Error;

pub mod qnn;
#[doc(hidden)]
pub mod scripted;

/// A model with one KV cache.
pub trait Engine: Send {
    /// Number of logits per position.
    fn n_vocab(&self) -> usize;

    /// Number of positions the KV cache holds.
    fn context_size(&self) -> usize;

    /// Number of valid cache rows: the tokens consumed so far.
    fn position(&self) -> usize;

    /// Forgets every position from `position` on. Cheap: no cache row is touched.
    ///
    /// `position` is at most [`Engine::position`].
    fn rewind(&mut self, position: usize);

    /// Consumes `ids` at the current position and lends the logits asked for.
    ///
    /// The result has `n_vocab` values of the last id ([`Logits::Last`]), `ids.len() * n_vocab` values, row by row
    /// ([`Logits::All`]), or none ([`Logits::None`]). `cancel` is read often, inside a long prompt too.
    ///
    /// # Errors
    /// [`EngineError`]. [`Engine::position`] then says what was fully consumed (whole chunks); the caller rewinds as
    /// it needs.
    fn forward(&mut self, ids: &[u32], logits: Logits, cancel: &AtomicBool) -> Result<&[f32], EngineError>;
}

/// Which logits a call of [`Engine::forward`] shall compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: only the cache is filled.
    None,
    /// Those of the last id.
    Last,
    /// Those of every id.
    All,
}

/// Why an engine could not be opened or could not consume its tokens.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The cancel flag was seen set.
    #[error("cancelled")]
    Cancelled,
    /// The ids do not fit behind what is in the cache.
    #[error("context holds {have} positions, need {need}")]
    ContextExceeded {
        /// Positions the cache holds.
        have: usize,
        /// Positions that the call would fill.
        need: usize,
    },
    /// A logit is NaN or infinite where it must be a number.
    #[error("logit {index} at position {position} is {value}, need a finite number")]
    NonFinite {
        /// Position of the token whose logits these are.
        position: usize,
        /// Index in the vocabulary.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// An id is not in the vocabulary.
    #[error("token id {id} is not below the vocabulary size {n_vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// The context binaries do not hold a graph that the engine needs.
    #[error("context binaries hold no {wanted}; they hold {found}")]
    MissingGraph {
        /// What was looked for, in words.
        wanted: String,
        /// The graphs that are there.
        found: String,
    },
    /// A worker thread could not be started.
    #[error("starting worker threads")]
    Threads(#[source] std::io::Error),
    /// A context binary could not be opened, prepared or run.
    #[error("model")]
    Core(#[source] qnn_core::Error),
    /// The config says one thing and the model another.
    #[error("{what}: config says {config}, model has {model}")]
    Mismatch {
        /// The quantity, as the config names it.
        what: &'static str,
        /// Value in the config.
        config: String,
        /// Value in the model.
        model: String,
    },
}
