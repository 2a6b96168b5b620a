//! Integer products by `sdot`: each sum takes four products, of four inputs of x that all outputs share.

use std::arch::aarch64::*;

use crate::arch::aarch64::insn::sdot_lane;
use crate::arch::aarch64::neon::matmul::{CODES_4, CODES_5, CODES_6, CODES_8, Dot, per_block, per_channel, per_step};
use crate::kernels::IntegerTile;

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Sdot, CODES_8>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Sdot, CODES_4>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Sdot, CODES_8>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Sdot, CODES_6>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Sdot, CODES_5>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Sdot, CODES_4>(tile, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_step::<Sdot>(tile, out);
}

struct Sdot;

impl Dot for Sdot {
    type Sums = [int32x4_t; 2];
    const MAX_PAIRS: usize = 2;

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM CPU has NEON.
        [unsafe { vdupq_n_s32(0) }; 2]
    }

    #[inline(always)]
    fn add(sums: Self::Sums, [first, second]: [int8x16_t; 2], x: int8x16_t) -> Self::Sums {
        // SAFETY: this type is used by the functions above only, whose table exists only where the CPU has `dotprod`.
        unsafe {
            [
                sdot_lane::<1>(sdot_lane::<0>(sums[0], first, x), second, x),
                sdot_lane::<3>(sdot_lane::<2>(sums[1], first, x), second, x),
            ]
        }
    }

    #[inline(always)]
    fn finish(sums: Self::Sums) -> [int32x4_t; 2] {
        sums
    }
}
