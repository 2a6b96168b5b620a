//! Looking at the computed tensors of a run as they come, and running on with other values in their place.
//!
//! A watched run takes the steps of an unwatched one: nothing is fused or placed differently, so what is seen is what such
//! a model computes. Calibration, which wants floats, runs a float graph instead (`offline/calibrate.rs`).

/// Is shown each computed tensor of a run, in the order in which they are computed.
pub type Watch<'w> = dyn FnMut(Watched<'_>) -> Seen + 'w;

/// A computed tensor, just computed.
#[derive(Debug)]
pub struct Watched<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Elements of a row.
    pub width: usize,
    /// Whole rows, row-major; of a tensor in codes, what the codes mean.
    pub values: &'a mut [f32],
}

/// What a [`Watch`] did with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It only looked.
    Kept,
    /// It wrote other values. All that follows (tensors, caches, outputs) is computed from these, or, if the tensor is in
    /// codes, from the codes nearest to them.
    Replaced,
}
