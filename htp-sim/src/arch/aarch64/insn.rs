//! Instructions that stable Rust has no intrinsics for. Each names its extension to the assembler, so that it can be
//! inlined anywhere; whether the CPU has it is the caller's to know.

use std::arch::aarch64::{float32x4_t, int8x16_t, int32x4_t, uint16x4_t};
use std::arch::asm;

/// `sdot`: adds to each sum the product of four bytes of `a` with the four bytes number `LANE` of `b`.
///
/// # Safety
/// The CPU has `dotprod`.
#[inline(always)]
pub(crate) unsafe fn sdot_lane<const LANE: i32>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes registers only; the caller's promise for the extension.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// `smmla`: `a` and `b` are two rows of eight bytes each; adds the four products of a row of `a` by a row of `b`.
///
/// # Safety
/// The CPU has `i8mm`.
#[inline(always)]
pub(crate) unsafe fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes registers only; the caller's promise for the extension.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// `fcvtl`: four half floats to floats. Every 64-bit ARM CPU has it.
#[inline(always)]
pub(crate) fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: reads and writes registers only; the instruction is part of the base architecture.
    unsafe {
        asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = out(vreg) floats,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    floats
}
