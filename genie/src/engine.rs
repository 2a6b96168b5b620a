//! The seam to the model: ids in, logits out, rewind to a position.
//!
//! A dialog knows a model only through [`Engine`]. It has two implementors: the QNN engine over a context binary, and
//! [`scripted::Scripted`], whose logits are a plain function of the token history and which tests use.

use std::sync::atomic::AtomicBool;

use thiserror::Error;

mod account;
mod adapter;
pub mod qnn;
#[doc(hidden)]
pub mod scripted;

pub use account::GraphAccount;
pub use adapter::{AdapterInfo, AdapterSlot, AdapterSource, GroupSource};

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

    /// Reads an adapter and keeps it ready under `name`, in place of one that had the name before. What runs now is not
    /// changed: see [`Engine::select_adapter`].
    ///
    /// # Errors
    /// [`EngineError`]. Nothing is changed then.
    fn load_adapter(&mut self, name: &str, source: &AdapterSource) -> Result<AdapterInfo, EngineError>;

    /// Forgets the adapter `name`. If it is selected, it stays in use until another selection. False if there was none.
    fn unload_adapter(&mut self, name: &str) -> bool;

    /// Makes later calls of [`Engine::forward`] run with the loaded adapter of this name at these strengths, one for
    /// each of its rank columns; `None` is the base. Cheap: no weight is touched.
    ///
    /// # Errors
    /// [`EngineError::UnknownAdapter`]. The selection is then as before.
    fn select_adapter(&mut self, selection: Option<(&str, &[f32])>) -> Result<(), EngineError>;

    /// Keeps an account of where the time of each graph goes, from zero and from now on. An engine that cannot does
    /// nothing.
    fn start_account(&mut self) {}

    /// Ends the account and gives it: nothing if none was kept, and nothing of graphs that did not run.
    fn take_account(&mut self) -> Vec<GraphAccount> {
        Vec::new()
    }
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
    /// The ids do not fit one run.
    #[error("{have} ids in one run, the largest graph takes {max}")]
    RunTooLong {
        /// Ids given.
        have: usize,
        /// Most ids of one run.
        max: usize,
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
    /// A worker thread could not be started, or `HTP_SIM_ISA` names kernels that this CPU does not have.
    #[error("starting the backend")]
    Threads(#[source] std::io::Error),
    /// A context binary could not be opened, prepared or run.
    #[error("model")]
    Core(#[source] Box<qnn_core::Error>),
    /// No adapter of this name is loaded.
    #[error("adapter {name:?} is not loaded; loaded are {loaded:?}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names that are there.
        loaded: Vec<String>,
    },
    /// An adapter cannot be loaded.
    #[error("adapter {name:?}{}", path.as_ref().map_or_else(String::new, |path| format!(", {}", path.display())))]
    Adapter {
        /// The adapter's name.
        name: String,
        /// The file, where one is at fault.
        path: Option<std::path::PathBuf>,
        /// Why.
        #[source]
        why: Box<AdapterError>,
    },
    /// The model was made to run only with an adapter, and none is applied.
    #[error("no adapter is applied")]
    NotReady(#[source] qnn_core::context::StateError),
    /// The model does not tell its layers apart, or not as this library records it.
    #[error("graph {graph}: {why}")]
    Outline {
        /// The graph.
        graph: String,
        /// What it lacks.
        why: String,
    },
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

impl From<qnn_core::Error> for EngineError {
    fn from(why: qnn_core::Error) -> EngineError {
        EngineError::Core(Box::new(why))
    }
}

/// Why an adapter cannot be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file cannot be read.
    #[error("reading the file")]
    Io(#[from] std::io::Error),
    /// A section does not fit the context.
    #[error("section")]
    Section(#[from] qnn_core::context::SectionError),
    /// A PEFT directory cannot be used.
    #[error("PEFT directory")]
    Peft(#[from] qnn_core::Error),
    /// A quantization section is not that of the group.
    #[error("quantization section of group {have:?}, the config says {want:?}")]
    Group {
        /// Name in the section.
        have: String,
        /// Name in the config.
        want: String,
    },
    /// The sections of the splits are not all of one adapter.
    #[error("section of adapter {have:?}, that of the first split is of {want:?}")]
    OtherAdapter {
        /// Name in this section.
        have: String,
        /// Name in the section of the first split that has one.
        want: String,
    },
    /// A section is for one graph, and the engine runs others too.
    #[error("section for graph {graph} only, need one for all graphs (share_adapters_between_graphs: Yes)")]
    OneGraph {
        /// The graph.
        graph: String,
    },
    /// There are not as many sections as context binaries.
    #[error("{have} sections for {want} context binaries")]
    SectionCount {
        /// Sections given.
        have: usize,
        /// Context binaries of the model.
        want: usize,
    },
}
