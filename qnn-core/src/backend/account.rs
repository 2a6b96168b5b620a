//! Where the time of executes goes, operation by operation. Kept only where somebody asked for it.

use std::time::Duration;

/// The account of one executable.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    /// Executes.
    pub n_executes: u64,
    /// Time of all executes.
    pub time: Duration,
    /// The part of it that went into handing work to the team and waiting for its end: the number of parallel regions times
    /// the time of an empty one, which is measured when the account is taken. Regions of other executables that ran on the
    /// same team meanwhile are counted too.
    pub scheduling: Duration,
    /// Operations of one kind and place in a layer, over all layers, in the order of the graph.
    pub operations: Vec<Operation>,
}

/// What one kind of operation cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// Kind and place: `linear self_attn.o_proj`.
    pub name: String,
    /// Calls, over all layers and executes.
    pub n_calls: u64,
    /// Time of all calls, scheduling included.
    pub time: Duration,
    /// Bytes of weights and caches that had to be read.
    pub bytes: u64,
    /// Products that were summed.
    pub multiply_adds: u64,
}

impl Operation {
    /// Bytes read per second.
    pub fn rate_bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Operations per second, a multiplication and an addition being two.
    pub fn rate_operations_per_s(&self) -> f64 {
        2.0 * self.multiply_adds as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}
