//! One folder per instruction set. `portable` is plain Rust: the fallback, and the oracle of the others.

#[cfg(target_arch = "aarch64")]
pub(crate) mod aarch64;
pub(crate) mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
