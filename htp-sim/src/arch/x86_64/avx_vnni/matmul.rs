//! The integer products of AVX2 with another step: codes are the unsigned operand of `vpdpbusd`, 4-bit codes as they are
//! and 8-bit codes plus 128, and nothing has to be cut to fit 16 bits.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::insn::Encoding;
use crate::arch::x86_64::ask_ahead;
use crate::arch::x86_64::avx2::matmul::{BLOCKS, Codes, Dot, LANES, Planes, integer, load_half, per_channel};
use crate::kernels::IntegerTile;

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8c<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Vnni<E>, false>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4c<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Vnni<E>, true>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, false, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4b<E: Encoding>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Vnni<E>, true, BLOCKS>(tile, out);
}

struct Vnni<E>(PhantomData<E>);

impl<E: Encoding> Dot for Vnni<E> {
    #[inline(always)]
    unsafe fn dots<const FOUR_BIT: bool, const NARROW: bool, const PLANES: usize, const ROWS: usize>(
        codes: Codes<'_>,
        planes: &Planes<PLANES>,
        k: usize,
        start: [[__m256i; PLANES]; ROWS],
    ) -> [[__m256i; PLANES]; ROWS] {
        // SAFETY: the caller's promise.
        unsafe { dots::<E, FOUR_BIT, NARROW, PLANES, ROWS>(codes, planes, k, start) }
    }
}

/// See [`Dot::dots`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<E: Encoding, const FOUR_BIT: bool, const NARROW: bool, const PLANES: usize, const ROWS: usize>(
    codes: Codes<'_>,
    planes: &Planes<PLANES>,
    mut k: usize,
    start: [[__m256i; PLANES]; ROWS],
) -> [[__m256i; PLANES]; ROWS] {
    let mut acc = start;
    let (low_mask, flip) = (_mm256_set1_epi8(15), _mm256_set1_epi8(-128));
    let row_bytes = if NARROW { codes.row_bytes } else { 64 };
    let half = codes.half * LANES * 4;
    for row in codes.bytes.chunks_exact(row_bytes) {
        if ROWS == 1 && half == 0 {
            ask_ahead(row.as_ptr());
        }
        let codes = load_half::<NARROW>(&row[half..]);
        let first = if FOUR_BIT { _mm256_and_si256(codes, low_mask) } else { _mm256_xor_si256(codes, flip) };
        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_mask);
        for (r, acc) in acc.iter_mut().enumerate() {
            for (plane, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the caller's promise: `codes` still holds these inputs, four, or eight of 4 bits.
                unsafe {
                    *acc = E::dpbusd(*acc, first, planes.broadcast(plane, r, k));
                    if FOUR_BIT {
                        *acc = E::dpbusd(*acc, second, planes.broadcast(plane, r, k + 4));
                    }
                }
            }
        }
        k += if FOUR_BIT { 8 } else { 4 };
    }
    acc
}
