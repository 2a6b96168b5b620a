//! Integer products by `smmla`: two outputs by the two vectors of a pair, eight inputs each. A row's two planes are a pair,
//! so that one row keeps the multipliers as busy as many.

use std::arch::aarch64::*;

use crate::arch::aarch64::insn::smmla;
use crate::arch::aarch64::neon::matmul::{CODES_4, CODES_5, CODES_6, CODES_8, Dot, per_block, per_channel, per_step};
use crate::kernels::IntegerTile;

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Smmla, CODES_8>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Smmla, CODES_4>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smmla, CODES_8>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smmla, CODES_6>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smmla, CODES_5>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smmla, CODES_4>(tile, out);
}

#[target_feature(enable = "neon,i8mm")]
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_step::<Smmla>(tile, out);
}

struct Smmla;

impl Dot for Smmla {
    /// For the outputs 0 and 1, and for 2 and 3: the products with the first vector, then those with the second.
    type Sums = [int32x4_t; 2];
    const MAX_PAIRS: usize = 2;

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM CPU has NEON.
        [unsafe { vdupq_n_s32(0) }; 2]
    }

    #[inline(always)]
    fn add(sums: Self::Sums, [first, second]: [int8x16_t; 2], x: int8x16_t) -> Self::Sums {
        // SAFETY: this type is used by the functions above only, whose table exists only where the CPU has `i8mm`.
        unsafe {
            let (first, second) = (vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second));
            // The eight inputs of an output side by side.
            let low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
            let high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
            [smmla(sums[0], x, low), smmla(sums[1], x, high)]
        }
    }

    #[inline(always)]
    fn finish([low, high]: Self::Sums) -> [int32x4_t; 2] {
        // SAFETY: every 64-bit ARM CPU has NEON.
        unsafe {
            let (low, high) = (vreinterpretq_s64_s32(low), vreinterpretq_s64_s32(high));
            [vreinterpretq_s32_s64(vzip1q_s64(low, high)), vreinterpretq_s32_s64(vzip2q_s64(low, high))]
        }
    }
}
