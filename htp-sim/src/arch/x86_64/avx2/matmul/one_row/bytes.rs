//! One row of x by 8-bit weights: in a decode step the head, and both halves of an adapter's branches.
//!
//! `vpmaddwd` multiplies 16 bits by 16: codes are widened on their way from memory, and both bytes of x are multiplied at once.
//! Byte by byte codes would have to be cut in two besides (see [`super::super::dots`]), which takes twice as many instructions.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::{LANES, PANEL, load_f16, load_f32, store};
use crate::arch::x86_64::ask_ahead;
use crate::arch::x86_64::avx2::quantize::add_lanes;
use crate::kernels::IntegerTile;

/// Computes the tile, if it is one for this kernel; with `BLOCKS`, one with a scale for each block. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn product<const BLOCKS: bool>(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    if tile.rows != 1 || tile.k > MAX_K {
        return false;
    }
    let mut x = Values([const { MaybeUninit::uninit() }; MAX_K / STEP]);
    let Some(x) = x.load::<BLOCKS>(tile) else { return false };
    match tile.width / QUARTER {
        1 => panels::<BLOCKS, 1>(tile, x, out),
        2 => panels::<BLOCKS, 2>(tile, x, out),
        3 => panels::<BLOCKS, 3>(tile, x, out),
        _ => panels::<BLOCKS, 4>(tile, x, out),
    }
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
fn panels<const BLOCKS: bool, const QUARTERS: usize>(tile: &IntegerTile<'_>, x: &[i64], out: &mut [f32]) {
    let x_scale = _mm256_set1_ps(tile.x_scales[0]);
    for (panel, out) in out[..tile.panels * PANEL].chunks_exact_mut(PANEL).enumerate() {
        let codes = &tile.codes[panel * tile.panel_bytes..][..tile.k * QUARTERS * QUARTER];
        let values = if BLOCKS {
            let blocks = tile.k / tile.block;
            let scales = &tile.scales[panel * blocks * PANEL * 2..][..blocks * PANEL * 2];
            let totals = block_floats::<QUARTERS>(x, codes, scales, tile.block);
            totals.map(|total| _mm256_mul_ps(total, x_scale))
        } else {
            let sums = sums::<QUARTERS>(x, codes);
            let scales = &tile.scales[panel * PANEL * 4..][..PANEL * 4];
            let scales = [load_f32(scales), load_f32(&scales[LANES * 4..])];
            let scale = |half: usize| _mm256_mul_ps(scales[half], x_scale);
            [0, 1].map(|half| _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), scale(half)))
        };
        store(out, values[0]);
        store(&mut out[LANES..], values[1]);
    }
}

/// The sums of one panel's blocks with their scales.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_floats<const QUARTERS: usize>(x: &[i64], codes: &[u8], scales: &[u8], block: usize) -> [__m256; 2] {
    let mut totals = [_mm256_setzero_ps(); 2];
    let blocks = x.chunks_exact(block / 4).zip(codes.chunks_exact(block * QUARTERS * QUARTER));
    for ((x, codes), scales) in blocks.zip(scales.chunks_exact(PANEL * 2)) {
        let sums = sums::<QUARTERS>(x, codes);
        totals[0] = _mm256_fmadd_ps(load_f16(scales), _mm256_cvtepi32_ps(sums[0]), totals[0]);
        totals[1] = _mm256_fmadd_ps(load_f16(&scales[LANES * 2..]), _mm256_cvtepi32_ps(sums[1]), totals[1]);
    }
    totals
}

/// `Σ x · code`, both halves of a panel; `QUARTERS` of it are there.
#[inline]
#[target_feature(enable = "avx2")]
fn sums<const QUARTERS: usize>(x: &[i64], codes: &[u8]) -> [__m256i; 2] {
    // Of each output the sum over its inputs 0 and 1 of four, then that over 2 and 3.
    let mut pairs = [_mm256_setzero_si256(); 4];
    for (x, codes) in x.iter().zip(codes.chunks_exact(QUARTERS * QUARTER_BYTES)) {
        ask_ahead(codes.as_ptr());
        let x = _mm256_set1_epi64x(*x);
        for (pairs, codes) in pairs.iter_mut().zip(codes.as_chunks::<QUARTER_BYTES>().0) {
            // SAFETY: 16 bytes, unaligned.
            let codes = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            *pairs = _mm256_add_epi32(*pairs, _mm256_madd_epi16(codes, x));
        }
    }
    // Adds neighbours of either operand, 128 bits of one and then of the other.
    let join = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(a, b));
    [join(pairs[0], pairs[1]), join(pairs[2], pairs[3])]
}

/// The values of a row, 16 to a register.
struct Values([MaybeUninit<__m256i>; MAX_K / STEP]);

impl Values {
    /// Joins the planes; returns four inputs to a number. `None` if a value of x or a product's sum may be more than its bits hold.
    #[target_feature(enable = "avx2")]
    fn load<const BLOCKS: bool>(&mut self, tile: &IntegerTile<'_>) -> Option<&[i64]> {
        let ones = _mm256_set1_epi16(1);
        let mut magnitudes = [_mm256_setzero_si256(); 2];
        let mut lost = _mm256_setzero_si256();
        let (hi, lo) = (&tile.hi[..tile.k], tile.lo.get(..tile.k).unwrap_or_default());
        for (i, to) in self.0.iter_mut().take(tile.k.div_ceil(STEP)).enumerate() {
            let (hi, lo) = (widen(hi, i), widen(lo, i));
            let high = if tile.lo.is_empty() { hi } else { _mm256_slli_epi16::<8>(hi) };
            let value = _mm256_add_epi16(high, lo);
            lost = _mm256_or_si256(lost, _mm256_xor_si256(value, _mm256_adds_epi16(high, lo)));
            for (sum, byte) in magnitudes.iter_mut().zip([hi, lo]) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_abs_epi16(byte), ones));
            }
            to.write(value);
        }
        let magnitudes = magnitudes.map(|sum| add_lanes(sum));
        let sums_fit = magnitudes[0] * 256 + magnitudes[1] <= MAX_X_SUM && magnitudes[1] <= MAX_LOW_SUM;
        // Of 8-bit x, with one plane, no sum passes 32 bits, and it is one float anyway.
        let fits = BLOCKS || tile.lo.is_empty() || sums_fit;
        if _mm256_testz_si256(lost, lost) == 0 || !fits {
            return None;
        }
        // SAFETY: the loop wrote `k` values of 16 bits and more, whose place is aligned for anything.
        Some(unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), tile.k / 4) })
    }
}

/// Values `16 · i..` of a plane as 16 bits each; zeros where it has no more.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(plane: &[i8], i: usize) -> __m256i {
    let mut padded = [0; STEP];
    let rest = plane.get(i * STEP..).unwrap_or_default();
    let values = rest.first_chunk().unwrap_or_else(|| {
        padded[..rest.len()].copy_from_slice(rest);
        &padded
    });
    // SAFETY: 16 bytes, unaligned.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(values.as_ptr().cast()) })
}

/// Inputs of x, at most: 32 KiB of values. None of its sums here is above `256 · 128 · 16384`, so they are 32-bit numbers.
const MAX_K: usize = 16384;

/// Values in a register.
const STEP: usize = 16;

/// Outputs whose codes are widened at a time, and the bytes of four inputs of these.
const QUARTER: usize = PANEL / 4;
const QUARTER_BYTES: usize = QUARTER * 4;

/// Magnitudes of x, added up, at most: no code is above 128, and sums have 32 bits. So those of its high bytes, at most a 256th,
/// are exact as floats, too.
const MAX_X_SUM: i32 = i32::MAX / 128;

/// The same of its low bytes: sums are exact as floats, of 24 bits. Then both planes' floats, added, are the float of the sum.
const MAX_LOW_SUM: i32 = (1 << 24) / 128;
