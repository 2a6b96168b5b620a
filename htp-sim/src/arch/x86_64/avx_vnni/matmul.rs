//! The integer products of AVX2 with other steps. One row: codes are the unsigned operand of `vpdpbusd`, 4-bit codes as they are and
//! 8-bit codes plus 128, and nothing has to be cut to fit 16 bits. So with several rows of 8-bit x; with those of 16-bit x `vpdpwssd` adds
//! what it multiplies. Few rows, or 8-bit ones, by weights with steps are as there.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::insn::Encoding;
use crate::arch::x86_64::ask_ahead;
use crate::arch::x86_64::avx2::matmul::split::{join, upper_bits};
use crate::arch::x86_64::avx2::matmul::{
    BLOCKS, Codes, Dot, LANES, Planes, STEPS, Sums, integer, load_half, nibbles, per_channel,
};
use crate::kernels::IntegerTile;

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8c<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Vnni<E>, 8>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4c<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Vnni<E>, 4>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, 8, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w6b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, 6, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w5b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, 5, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, 4, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4e<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, 4, STEPS>(tile, out);
}

struct Vnni<E>(PhantomData<E>);

impl<E: Encoding> Dot for Vnni<E> {
    const WIDENS_X: bool = false;

    #[inline(always)]
    unsafe fn dots<
        const BITS: usize,
        const NARROW: bool,
        const HALVES: usize,
        const PLANES: usize,
        const ROWS: usize,
    >(
        codes: Codes<'_>,
        planes: &Planes<PLANES>,
        k: usize,
        start: Sums<HALVES, PLANES, ROWS>,
    ) -> Sums<HALVES, PLANES, ROWS> {
        // SAFETY: the caller's promise.
        unsafe {
            match BITS {
                6 => split_dots::<E, 2, HALVES, PLANES, ROWS>(codes, planes, k, start),
                5 => split_dots::<E, 1, HALVES, PLANES, ROWS>(codes, planes, k, start),
                _ => dots::<E, BITS, NARROW, HALVES, PLANES, ROWS>(codes, planes, k, start),
            }
        }
    }

    #[inline(always)]
    unsafe fn pairs(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { E::dpwssd(sums, a, b) }
    }
}

/// See [`Dot::dots`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<
    E: Encoding,
    const BITS: usize,
    const NARROW: bool,
    const HALVES: usize,
    const PLANES: usize,
    const ROWS: usize,
>(
    codes: Codes<'_>,
    planes: &Planes<PLANES>,
    mut k: usize,
    start: Sums<HALVES, PLANES, ROWS>,
) -> Sums<HALVES, PLANES, ROWS> {
    let mut acc = start;
    let flip = _mm256_set1_epi8(-128);
    let row_bytes = if NARROW { codes.row_bytes } else { 64 };
    let half = codes.half;
    for row in codes.bytes.chunks_exact(row_bytes) {
        if ROWS == 1 && half == 0 {
            ask_ahead(row.as_ptr());
        }
        let (mut first, mut second) = ([_mm256_setzero_si256(); HALVES], [_mm256_setzero_si256(); HALVES]);
        for h in 0..HALVES {
            let codes = load_half::<NARROW>(&row[(half + h) * LANES * 4..]);
            [first[h], second[h]] = if BITS == 4 { nibbles(codes) } else { [_mm256_xor_si256(codes, flip); 2] };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            for (plane, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the caller's promise: `codes` still holds these inputs, four, or eight of 4 bits.
                let x = unsafe { planes.broadcast(plane, r, k) };
                // SAFETY: as above.
                let next_x = if BITS == 4 { unsafe { planes.broadcast(plane, r, k + 4) } } else { x };
                for (h, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe {
                        *acc = E::dpbusd(*acc, first[h], x);
                        if BITS == 4 {
                            *acc = E::dpbusd(*acc, second[h], next_x);
                        }
                    }
                }
            }
        }
        k += if BITS == 4 { 8 } else { 4 };
    }
    acc
}

/// As [`dots`], for codes of `4 + HIGH` bits, see [`crate::packed`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn split_dots<E: Encoding, const HIGH: usize, const HALVES: usize, const PLANES: usize, const ROWS: usize>(
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
            for row in pair {
                if ROWS == 1 && half == 0 {
                    ask_ahead(row.as_ptr());
                }
                let (mut first, mut second) = ([_mm256_setzero_si256(); HALVES], [_mm256_setzero_si256(); HALVES]);
                for h in 0..HALVES {
                    let nibbles = load_half::<false>(&row[(half + h) * LANES * 4..]);
                    (first[h], second[h]) = join::<HIGH>(nibbles, &mut high[h]);
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (plane, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: the caller's promise: `codes` still holds these eight inputs.
                        let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                        for (h, acc) in acc.iter_mut().enumerate() {
                            // SAFETY: the caller's promise.
                            unsafe {
                                *acc = E::dpbusd(*acc, first[h], x);
                                *acc = E::dpbusd(*acc, second[h], next_x);
                            }
                        }
                    }
                }
                k += 8;
            }
        }
    }
    acc
}
