//! Adapters as an engine sees them: where they come from, and what it found.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

/// Where an adapter comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterSource {
    /// One section file per context binary, in split order; `None` where a split has no branches.
    Sections(Vec<Option<PathBuf>>),
    /// A PEFT directory, converted when it is loaded.
    Peft(PathBuf),
}

/// What was loaded: the account of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterInfo {
    /// The adapter's name.
    pub name: String,
    /// Linear layers that it changes.
    pub targets: usize,
    /// Rank columns that it uses.
    pub rank: usize,
    /// Columns that share a strength, by name. A plain adapter has one slot of all its columns.
    pub slots: Vec<AdapterSlot>,
    /// Bytes of its weights.
    pub size_bytes: u64,
    /// Time to load it.
    pub load_time: Duration,
    /// Differs between any two loads of an engine, so that what one adapter computed is never taken for another's.
    pub generation: u64,
}

/// Rank columns that share a strength.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSlot {
    /// The slot's name: that of the adapter, or of one of several composed ones.
    pub name: String,
    /// Its columns.
    pub columns: Range<usize>,
    /// `lora_alpha / r` (or `/ √r`) as it was folded into the weights, if one number says it.
    pub scaling: Option<f32>,
}
