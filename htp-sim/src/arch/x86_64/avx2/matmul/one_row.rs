//! One row of 16-bit x by 4-bit block weights: a decode step's product of most weights.
//!
//! The same as [`super::dots`] does, but all of a block at once: of its length the compiler knows that it is 32 inputs or several times
//! as many, so that nothing but products, their sums and the loads of both is left in the loop.

use std::arch::x86_64::*;

use super::{LANES, PANEL, code_bytes, load_f16, load_i8, nibbles, store};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, ask_ahead};
use crate::kernels::IntegerTile;
use crate::packed::BlockOffset;

/// Computes the tile, if it is one for this kernel. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    if tile.rows != 1 || tile.lo.is_empty() || !tile.block.is_multiple_of(PIECE) {
        return false;
    }
    match tile.offset {
        BlockOffset::Symmetric => panels::<SYMMETRIC>(tile, out),
        BlockOffset::Integer => panels::<INTEGER>(tile, out),
        BlockOffset::Min => panels::<MIN>(tile, out),
    }
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
fn panels<const OFFSET: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let x_scale = _mm256_set1_ps(tile.x_scales[0]);
    for panel in 0..tile.panels {
        let values = panel_values::<OFFSET>(tile, panel);
        for (half, values) in values.into_iter().enumerate() {
            store(&mut out[panel * PANEL + half * LANES..], _mm256_mul_ps(values, x_scale));
        }
    }
}

/// The sums of one panel, without the scale of x.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_values<const OFFSET: u8>(tile: &IntegerTile<'_>, panel: usize) -> [__m256; 2] {
    let blocks = tile.k / tile.block;
    let first = panel * blocks * PANEL;
    let mut codes = tile.codes[panel * tile.panel_bytes..][..code_bytes::<4>(tile.k)].as_ptr();
    let (mut hi, mut lo) = (tile.hi[..tile.k].as_ptr(), tile.lo[..tile.k].as_ptr());
    let scales = tile.scales[first * 2..][..blocks * PANEL * 2].chunks_exact(PANEL * 2);
    let offset_bytes = if OFFSET == MIN { 2 } else { 1 };
    let mut offsets = match OFFSET {
        SYMMETRIC => tile.codes.as_ptr(),
        _ => tile.offsets[first * offset_bytes..][..blocks * PANEL * offset_bytes].as_ptr(),
    };
    let mut totals = [_mm256_setzero_ps(); 2];
    for (scales, sum) in scales.zip(&tile.sums[..blocks]) {
        let mut dots = [_mm256_setzero_si256(); 2];
        for _ in 0..tile.block / PIECE {
            // SAFETY: the slices above have 32 inputs for each piece of each block.
            let piece = unsafe { piece(codes, hi, lo) };
            dots[0] = _mm256_add_epi32(dots[0], piece[0]);
            dots[1] = _mm256_add_epi32(dots[1], piece[1]);
            (codes, hi, lo) = (codes.wrapping_add(PIECE * PANEL / 2), hi.wrapping_add(PIECE), lo.wrapping_add(PIECE));
        }
        let sum = _mm256_set1_epi32(*sum);
        for half in 0..2 {
            let mut dot = dots[half];
            // SAFETY: the slice above has as many offsets for each block.
            let offset =
                |bytes: usize| unsafe { std::slice::from_raw_parts(offsets.add(half * LANES * bytes), LANES * bytes) };
            if OFFSET == SYMMETRIC {
                dot = _mm256_sub_epi32(dot, _mm256_slli_epi32::<3>(sum));
            }
            if OFFSET == INTEGER {
                dot = _mm256_add_epi32(dot, _mm256_mullo_epi32(load_i8(offset(1)), sum));
            }
            let scale = load_f16(&scales[half * LANES * 2..]);
            totals[half] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), totals[half]);
            if OFFSET == MIN {
                totals[half] = _mm256_fmadd_ps(load_f16(offset(2)), _mm256_cvtepi32_ps(sum), totals[half]);
            }
        }
        if OFFSET != SYMMETRIC {
            offsets = offsets.wrapping_add(PANEL * offset_bytes);
        }
    }
    totals
}

/// `Σ x · (unsigned code)` over 32 inputs, of both halves of a panel.
///
/// # Safety
/// There are codes of a panel for 32 inputs, and as many bytes in both planes of x.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn piece(codes: *const u8, hi: *const i8, lo: *const i8) -> [__m256i; 2] {
    let mut sums = [[_mm256_setzero_si256(); 2]; 2];
    for group in 0..PIECE / 8 {
        // SAFETY: the caller's promise: eight of the inputs; the reads are unaligned.
        let (codes, x) = unsafe {
            let codes = codes.add(group * 64);
            ask_ahead(codes);
            let four =
                |plane: *const i8, i: usize| _mm256_set1_epi32(plane.add(group * 8 + i).cast::<i32>().read_unaligned());
            let x = [[four(hi, 0), four(hi, 4)], [four(lo, 0), four(lo, 4)]];
            ([_mm256_loadu_si256(codes.cast()), _mm256_loadu_si256(codes.add(32).cast())], x)
        };
        for half in 0..2 {
            let codes = nibbles(codes[half]);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(codes[0], x[0]));
                sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(codes[1], x[1]));
            }
        }
        for sum in sums.as_flattened_mut() {
            // The compiler would do one half of all groups and then the other, and store all of x in between.
            // SAFETY: no instruction.
            unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) * sum, options(nomem, nostack, preserves_flags)) }
        }
    }
    let mut dots = [_mm256_setzero_si256(); 2];
    for half in 0..2 {
        let (one, upper) = (_mm256_set1_epi16(1), _mm256_set1_epi16(256));
        dots[half] = _mm256_add_epi32(_mm256_madd_epi16(sums[0][half], upper), _mm256_madd_epi16(sums[1][half], one));
    }
    dots
}

/// Inputs whose sums fit 16 bits.
const PIECE: usize = 32;
