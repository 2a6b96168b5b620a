//! Codes of 5 and 6 bits: rows of nibbles, and rows of the upper bits that they share, see [`crate::packed`].

use std::arch::x86_64::*;

use super::{Codes, LANES, Planes, Sums, load_half, nibbles};
use crate::arch::x86_64::ask_ahead;

/// As [`dots`](super::dots), for codes of `4 + HIGH` bits.
///
/// `31 · 128 · 2 = 7936`, of which four fit 16 bits, and `63 · 128 · 2 = 16128`, of which two do.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn dots<const HIGH: usize, const HALVES: usize, const PLANES: usize, const ROWS: usize>(
    codes: Codes<'_>,
    planes: &Planes<PLANES>,
    mut k: usize,
    start: Sums<HALVES, PLANES, ROWS>,
) -> Sums<HALVES, PLANES, ROWS> {
    let mut acc = start;
    let half = codes.half;
    for rows in codes.bytes.as_chunks::<64>().0.chunks_exact(4 / HIGH + 1) {
        for (i, pair) in rows[..4 / HIGH].chunks_exact(2 / HIGH).enumerate() {
            let mut high = [_mm256_setzero_si256(); HALVES];
            for (h, high) in high.iter_mut().enumerate() {
                *high = upper_bits::<HIGH>(rows, (half + h) * LANES * 4, i);
            }
            let mut low = [[[_mm256_setzero_si256(); HALVES]; PLANES]; ROWS];
            for row in pair {
                if ROWS == 1 && half == 0 {
                    ask_ahead(row.as_ptr());
                }
                let (mut first, mut second) = ([_mm256_setzero_si256(); HALVES], [_mm256_setzero_si256(); HALVES]);
                for h in 0..HALVES {
                    let nibbles = load_half::<false>(&row[(half + h) * LANES * 4..]);
                    (first[h], second[h]) = join::<HIGH>(nibbles, &mut high[h]);
                }
                for (r, low) in low.iter_mut().enumerate() {
                    for (plane, low) in low.iter_mut().enumerate() {
                        // SAFETY: the caller's promise: `codes` still holds these eight inputs.
                        let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                        for (h, low) in low.iter_mut().enumerate() {
                            *low = _mm256_add_epi16(*low, _mm256_maddubs_epi16(first[h], x));
                            *low = _mm256_add_epi16(*low, _mm256_maddubs_epi16(second[h], next_x));
                        }
                    }
                }
                k += 8;
            }
            let low = low.as_flattened().as_flattened();
            for (acc, low) in acc.as_flattened_mut().as_flattened_mut().iter_mut().zip(low) {
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(*low, _mm256_set1_epi16(1)));
            }
        }
    }
    acc
}

/// The upper bits of codes that share a row of them, from byte `at` of it on: those of the first half of their groups come to bit 4
/// from above, those of the second from below.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn upper_bits<const HIGH: usize>(rows: &[[u8; 64]], at: usize, half_of_groups: usize) -> __m256i {
    let row = load_half::<false>(&rows[4 / HIGH][at..]);
    if half_of_groups == 0 { row } else { _mm256_slli_epi16::<4>(row) }
}

/// The codes of two groups: a row of nibbles, and their upper bits, whose turn it is at bit 4 of `high`. What follows them moves
/// there.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn join<const HIGH: usize>(codes: __m256i, high: &mut __m256i) -> (__m256i, __m256i) {
    let high_mask = _mm256_set1_epi8(if HIGH == 1 { 0x10 } else { 0x30 });
    let mut next = || {
        let bits = _mm256_and_si256(*high, high_mask);
        *high = if HIGH == 1 { _mm256_srli_epi16::<1>(*high) } else { _mm256_srli_epi16::<2>(*high) };
        bits
    };
    let [first, second] = nibbles(codes);
    let first = _mm256_or_si256(first, next());
    (first, _mm256_or_si256(second, next()))
}
