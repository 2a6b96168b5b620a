//! The kernels of a language model on a CPU: quantized matrix products, attention over a KV cache, norms, rotations.
//!
//! This crate knows slices, shapes and the encodings of weights. It knows no names, files, graphs, tokens or clocks.
//!
//! Start with [`PackedLayout`] (weights in the one layout that every instruction set reads), [`quantize_rows`] (the other
//! operand) and [`linear`] (their product); then [`attention()`]. Every operation takes a [`Cx`]: the [`Kernels`] table of
//! this CPU, which is the one place that chooses by instruction set, and the [`Workers`] team that shares the work.
//!
//! Operations check every length first and write nothing if one is wrong. After construction nothing allocates. Results
//! depend neither on the number of workers nor, but for one case that [`linear`] tells of, on how many rows are computed together.

#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "kernels: intrinsics and raw loads")]
mod arch;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod attention;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod elementwise;
mod error;
#[allow(unsafe_code, reason = "asks the system for a permission")]
mod isa;
mod kernels;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod matmul;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod norm;
pub mod packed;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod quantize;
#[allow(unsafe_code, reason = "calls the kernel table")]
pub mod rope;
#[allow(unsafe_code, reason = "a slice that several threads write")]
mod scratch;
#[cfg(test)]
mod testing;
#[allow(unsafe_code, reason = "shares a closure with other threads")]
mod workers;

pub use attention::{AttentionParams, AttentionScratch, Cache, CacheFormat, CacheLayout, CacheMut, append, attention};
pub use elementwise::Activation;
pub use error::ShapeError;
pub use isa::{ISA_VARIABLE, IsaError};
pub use kernels::Kernels;
pub use matmul::{Branch, Gate, GateUp, Next, Part, Rows, Starts, Write, expect, gated_linear, linear, sum_rows};
pub use norm::{rms_norm, rms_norm_quantize};
pub use packed::{
    BlockOffset, Offsets, PackedLayout, PackedWeights, Packer, WeightFormat, pack_float, pack_quantized, round_to_f16,
};
pub use quantize::{ActBits, Grid, QuantizedRows, quantize_rows, snap};
pub use rope::{rotary_table, rotate};
pub use scratch::Aligned;
pub use workers::{MAX_WORKERS, Workers};

/// Asks for the memory of `values`, to the second cache, where this is known to help: a hint, and no operation.
pub fn prefetch<T>(values: &[T]) {
    let (start, end) = (values.as_ptr().addr(), values.as_ptr().addr() + size_of_val(values));
    let lines = start / scratch::LINE_BYTES..end.div_ceil(scratch::LINE_BYTES);
    lines.for_each(|line| arch::ask_for(line * scratch::LINE_BYTES));
}

/// What every operation needs from its caller: which kernels, and who runs them.
#[derive(Debug, Clone, Copy)]
pub struct Cx<'a> {
    /// The kernel table, usually [`Kernels::selected`].
    pub kernels: &'static Kernels,
    /// The team that shares the work.
    pub workers: &'a Workers,
}
