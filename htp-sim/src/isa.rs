//! Which instruction sets this CPU has.

use std::fmt;

/// A tier name that is unknown, or known but not available on this CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsaError {
    pub(crate) found: String,
    pub(crate) available: Vec<&'static str>,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel tier {:?}: this CPU has {}", self.found, self.available.join(", "))
    }
}

impl std::error::Error for IsaError {}

/// Name of the environment variable that may choose a lower tier than the best one.
pub const ISA_VARIABLE: &str = "HTP_SIM_ISA";

/// AVX2 with FMA and half-float conversion.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// AVX-512 with byte and word operations and the 8-bit dot product, on top of [`has_avx2`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512_vnni() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

/// NEON's 8-bit dot product.
#[cfg(target_arch = "aarch64")]
pub(crate) fn has_dotprod() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

/// NEON's 8-bit matrix product.
#[cfg(target_arch = "aarch64")]
pub(crate) fn has_i8mm() -> bool {
    std::arch::is_aarch64_feature_detected!("i8mm")
}
