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
    /// As `Sections`, but of weights only, and the group whose encodings they run with.
    Grouped {
        /// One section file per context binary, in split order.
        sections: Vec<Option<PathBuf>>,
        /// The group.
        group: GroupSource,
    },
    /// A PEFT directory, converted when it is loaded.
    Peft(PathBuf),
}

/// Where the encodings come from that the adapters of a group share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSource {
    /// The group's name.
    pub name: String,
    /// One quantization section per context binary, in split order; `None` where a split has none.
    pub sections: Vec<Option<PathBuf>>,
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
    /// Activations that have another encoding with it than the base's, its own or its group's.
    pub n_encodings: usize,
    /// The group whose encodings it runs with.
    pub group: Option<String>,
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
