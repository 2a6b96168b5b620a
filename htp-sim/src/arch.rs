//! One folder per instruction set. `portable` is plain Rust: the fallback, and the oracle of the others.

#[cfg(target_arch = "aarch64")]
pub(crate) mod aarch64;
pub(crate) mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

/// Asks for the line of memory at `address`, to the second cache, where this is known to help. Any address will do.
pub(crate) fn ask_for(address: usize) {
    #[cfg(target_arch = "x86_64")]
    x86_64::ask_for(std::ptr::without_provenance(address));
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
