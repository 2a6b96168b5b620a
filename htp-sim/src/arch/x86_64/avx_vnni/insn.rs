//! `vpdpbusd` and `vpdpwssd` on 256 bits. Their intrinsics can only be inlined into functions that are compiled for AVX-VNNI; here
//! each is one instruction in the functions that this tier shares with AVX2.

use std::arch::asm;
use std::arch::x86_64::__m256i;

/// How the instructions are written.
pub(crate) trait Encoding {
    /// Adds to each sum the products of four unsigned bytes by four signed ones.
    ///
    /// # Safety
    /// The CPU has AVX2 and the instruction in this encoding.
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;

    /// Adds to each sum the products of two 16-bit integers by two others.
    ///
    /// # Safety
    /// As above.
    unsafe fn dpwssd(sums: __m256i, a: __m256i, b: __m256i) -> __m256i;
}

/// As AVX-VNNI has them.
pub(crate) struct Vex;

/// As AVX-512 VNNI with 256-bit registers has them.
#[cfg(test)]
pub(crate) struct Evex;

/// Implements an encoding, with a function for each instruction.
macro_rules! encoding {
    ($encoding:ident, $dpbusd:ident = $dpbusd_text:literal, $dpwssd:ident = $dpwssd_text:literal) => {
        impl Encoding for $encoding {
            #[inline(always)]
            unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
                // SAFETY: the caller's promise.
                unsafe { $dpbusd(sums, unsigned, signed) }
            }

            #[inline(always)]
            unsafe fn dpwssd(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
                // SAFETY: the caller's promise.
                unsafe { $dpwssd(sums, a, b) }
            }
        }
        encoding!($dpbusd, $dpbusd_text);
        encoding!($dpwssd, $dpwssd_text);
    };
    ($name:ident, $text:literal) => {
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn $name(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: reads and writes registers only; the caller promised the instruction.
            unsafe {
                asm!(
                    $text,
                    sums = inout(ymm_reg) sums,
                    a = in(ymm_reg) a,
                    b = in(ymm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            sums
        }
    };
}

encoding!(Vex, vex_bytes = "{{vex}} vpdpbusd {sums}, {a}, {b}", vex_words = "{{vex}} vpdpwssd {sums}, {a}, {b}");
#[cfg(test)]
mod evex {
    use super::*;
    encoding!(
        Evex,
        evex_bytes = "{{evex}} vpdpbusd {sums}, {a}, {b}",
        evex_words = "{{evex}} vpdpwssd {sums}, {a}, {b}"
    );
}
