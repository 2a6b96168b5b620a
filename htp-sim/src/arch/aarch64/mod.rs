//! 64-bit ARM tiers. Every such CPU has NEON; the 8-bit dot product and matrix product are extensions.

pub(crate) mod dotprod;
pub(crate) mod i8mm;
mod insn;
pub(crate) mod neon;
