//! `vpdpbusd` on 256 bits. Its intrinsic can only be inlined into functions that are compiled for AVX-VNNI; here it is one
//! instruction in the functions that this tier shares with AVX2.

use std::arch::asm;
use std::arch::x86_64::__m256i;

/// How the instruction is written.
pub(crate) trait Encoding {
    /// Adds to each sum the products of four unsigned bytes by four signed ones.
    ///
    /// # Safety
    /// The CPU has AVX2 and the instruction in this encoding.
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;
}

/// As AVX-VNNI has it.
pub(crate) struct Vex;

impl Encoding for Vex {
    #[inline(always)]
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { vex(sums, unsigned, signed) }
    }
}

/// As AVX-512 VNNI with 256-bit registers has it.
#[cfg(test)]
pub(crate) struct Evex;

#[cfg(test)]
impl Encoding for Evex {
    #[inline(always)]
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { evex(sums, unsigned, signed) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn vex(mut sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: reads and writes registers only; the caller promised the instruction.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sums}, {unsigned}, {signed}",
            sums = inout(ymm_reg) sums,
            unsigned = in(ymm_reg) unsigned,
            signed = in(ymm_reg) signed,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

#[cfg(test)]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn evex(mut sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: as above.
    unsafe {
        asm!(
            "{{evex}} vpdpbusd {sums}, {unsigned}, {signed}",
            sums = inout(ymm_reg) sums,
            unsigned = in(ymm_reg) unsigned,
            signed = in(ymm_reg) signed,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
