//! One row of x by 4-bit block weights: a decode step's products with most of its weights.
//!
//! What [`super::dots`] does, 32 inputs at once: the compiler knows their number, so that little is left but loads, products and
//! sums.

use std::arch::x86_64::*;

use super::{LANES, PANEL, Planes, code_bytes, load_f16, load_i8, nibbles, store};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, ask_ahead};
use crate::kernels::IntegerTile;
use crate::packed::BlockOffset;

pub(super) mod bytes;

/// Computes the tile, if it is one for this kernel. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    if tile.rows != 1 || !tile.block.is_multiple_of(PIECE) {
        return false;
    }
    match (tile.offset, tile.lo.is_empty()) {
        (BlockOffset::Symmetric, false) => panels::<SYMMETRIC, 2>(tile, out),
        (BlockOffset::Integer, false) => panels::<INTEGER, 2>(tile, out),
        (BlockOffset::Min, false) => panels::<MIN, 2>(tile, out),
        (BlockOffset::Symmetric, true) => panels::<SYMMETRIC, 1>(tile, out),
        (BlockOffset::Integer, true) => panels::<INTEGER, 1>(tile, out),
        (BlockOffset::Min, true) => panels::<MIN, 1>(tile, out),
    }
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
fn panels<const OFFSET: u8, const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let x_scale = _mm256_set1_ps(tile.x_scales[0]);
    for panel in 0..tile.panels {
        let values = panel_values::<OFFSET, PLANES>(tile, panel);
        for (half, values) in values.into_iter().enumerate() {
            store(&mut out[panel * PANEL + half * LANES..], _mm256_mul_ps(values, x_scale));
        }
    }
}

/// The sums of one panel, without the scale of x.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_values<const OFFSET: u8, const PLANES: usize>(tile: &IntegerTile<'_>, panel: usize) -> [__m256; 2] {
    let blocks = tile.k / tile.block;
    let first = panel * blocks * PANEL;
    let planes = Planes::<PLANES>::new(tile, 0);
    let mut k = 0;
    let mut codes = tile.codes[panel * tile.panel_bytes..][..code_bytes::<4>(tile.k)].as_ptr();
    let scales = tile.scales[first * 2..][..blocks * PANEL * 2].chunks_exact(PANEL * 2);
    let offset_bytes = if OFFSET == MIN { 2 } else { 1 };
    // Where there are no offsets, something as long stands for them.
    let offsets = if OFFSET == SYMMETRIC { tile.scales } else { tile.offsets };
    let offsets = offsets[first * offset_bytes..][..blocks * PANEL * offset_bytes].chunks_exact(PANEL * offset_bytes);
    let mut totals = [_mm256_setzero_ps(); 2];
    for ((scales, offsets), sum) in scales.zip(offsets).zip(&tile.sums[..blocks]) {
        let mut dots = [_mm256_setzero_si256(); 2];
        for _ in 0..tile.block / PIECE {
            // SAFETY: the slice above has codes for 32 inputs of each piece of each block, and so has x (the tile's promise).
            let sums = unsafe { short_sums(codes, planes.at_input(k), [[_mm256_setzero_si256(); 2]; PLANES]) };
            for (plane, sums) in sums.into_iter().enumerate() {
                let weight = _mm256_set1_epi16(if plane + 1 < PLANES { 256 } else { 1 });
                for (dot, sum) in dots.iter_mut().zip(sums) {
                    *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(sum, weight));
                }
            }
            codes = codes.wrapping_add(PIECE * PANEL / 2);
            k += PIECE;
        }
        let sum = _mm256_set1_epi32(*sum);
        for half in 0..2 {
            let (mut dot, lane) = (dots[half], half * LANES);
            if OFFSET == SYMMETRIC {
                dot = _mm256_sub_epi32(dot, _mm256_slli_epi32::<3>(sum));
            }
            if OFFSET == INTEGER {
                dot = _mm256_add_epi32(dot, _mm256_mullo_epi32(load_i8(&offsets[lane..]), sum));
            }
            totals[half] = _mm256_fmadd_ps(load_f16(&scales[lane * 2..]), _mm256_cvtepi32_ps(dot), totals[half]);
            if OFFSET == MIN {
                let min = load_f16(&offsets[lane * 2..]);
                totals[half] = _mm256_fmadd_ps(min, _mm256_cvtepi32_ps(sum), totals[half]);
            }
        }
    }
    totals
}

/// Sums of pairs, in 16 bits: of 32 inputs by unsigned codes, both halves of a panel, and of what each plane starts with.
///
/// # Safety
/// There are codes of a panel for 32 inputs, and as many bytes in each plane of x.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn short_sums<const PLANES: usize>(
    codes: *const u8,
    planes: [*const i8; PLANES],
    start: [[__m256i; 2]; PLANES],
) -> [[__m256i; 2]; PLANES] {
    let mut sums = start;
    for group in 0..PIECE / 8 {
        let mut x = [[_mm256_setzero_si256(); 2]; PLANES];
        for (x, plane) in x.iter_mut().zip(planes) {
            for (i, x) in x.iter_mut().enumerate() {
                // SAFETY: the caller's promise: four of the inputs; the read is unaligned.
                *x = _mm256_set1_epi32(unsafe { plane.add(group * 8 + i * 4).cast::<i32>().read_unaligned() });
            }
        }
        let codes = codes.wrapping_add(group * 64);
        ask_ahead(codes);
        for half in 0..2 {
            // SAFETY: the caller's promise: half the outputs' codes of these eight inputs; the read is unaligned.
            let codes = nibbles(unsafe { _mm256_loadu_si256(codes.add(half * 32).cast()) });
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(codes[0], x[0]));
                sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(codes[1], x[1]));
            }
        }
        // The compiler would do one half of all groups and then the other, and store all of x in between.
        for sum in sums.as_flattened_mut() {
            pin(sum);
        }
    }
    sums
}

/// Keeps a sum in a register here, in the order that was written: the compiler would sort sums anew, and run out of registers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn pin(sum: &mut __m256i) {
    // SAFETY: no instruction.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) * sum, options(nomem, nostack, preserves_flags)) }
}

/// Inputs whose sums fit 16 bits.
pub(super) const PIECE: usize = 32;
