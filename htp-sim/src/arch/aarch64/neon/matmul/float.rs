//! Float rows by float weights, and by 8-bit ones with a scale per output.

use std::arch::aarch64::*;

use super::{LANES, load_bytes, load_f16, load_f32, store};
use crate::kernels::FloatTile;
use crate::matmul::Write;
use crate::packed::PANEL;

#[target_feature(enable = "neon")]
pub(crate) fn f32_f32(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F32>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn f32_f16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F16>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn f32_bf16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<BF16>(tile, out);
}

/// Float rows by 8-bit per-channel weights.
#[target_feature(enable = "neon")]
pub(crate) fn f32_w8c(tile: &FloatTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..][..tile.panel_bytes].as_chunks::<64>().0;
        for row in 0..tile.rows {
            let x = &tile.x[row * tile.x_stride..][..tile.k];
            for quarter in 0..4 {
                let mut acc = vdupq_n_f32(0.0);
                for (x, codes) in x.chunks(4).zip(codes.iter()) {
                    let codes = vreinterpretq_s32_s8(load_bytes(&codes[quarter * 16..]));
                    // Byte i of each lane, moved to the top and shifted down with its sign.
                    let bytes = [vshlq_n_s32::<24>(codes), vshlq_n_s32::<16>(codes), vshlq_n_s32::<8>(codes), codes];
                    for (x, byte) in x.iter().zip(bytes) {
                        acc = vfmaq_n_f32(acc, vcvtq_f32_s32(vshrq_n_s32::<24>(byte)), *x);
                    }
                }
                let column = panel * PANEL + quarter * LANES;
                let scales = load_f32(&tile.scales[column * 4..]);
                let (out, mut value) = (&mut out[row * tile.panels * PANEL + column..], vmulq_f32(acc, scales));
                if tile.write == Write::Add {
                    // SAFETY: the slice has four values (checked here).
                    value = vaddq_f32(unsafe { vld1q_f32(out[..LANES].as_ptr()) }, value);
                }
                store(out, value);
            }
        }
    }
}

/// Float rows by float weights: up to four rows share each load of weights.
#[target_feature(enable = "neon")]
fn float<const ELEMENT: u8>(tile: &FloatTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let mut row = 0;
        while row < tile.rows {
            row += match tile.rows - row {
                4.. => float_rows::<ELEMENT, 4>(tile, panel, row, out),
                2.. => float_rows::<ELEMENT, 2>(tile, panel, row, out),
                _ => float_rows::<ELEMENT, 1>(tile, panel, row, out),
            };
        }
    }
}

/// One panel by `ROWS` rows; returns `ROWS`.
#[target_feature(enable = "neon")]
fn float_rows<const ELEMENT: u8, const ROWS: usize>(
    tile: &FloatTile<'_>,
    panel: usize,
    row: usize,
    out: &mut [f32],
) -> usize {
    let row_bytes = PANEL * if ELEMENT == F32 { 4 } else { 2 };
    let codes = &tile.codes[panel * tile.panel_bytes..][..tile.k * row_bytes];
    let mut x = [tile.x; ROWS];
    for (i, x) in x.iter_mut().enumerate() {
        *x = &tile.x[(row + i) * tile.x_stride..][..tile.k];
    }
    let mut acc = [[vdupq_n_f32(0.0); 4]; ROWS];
    for (k, codes) in codes.chunks_exact(row_bytes).enumerate() {
        let quarters = codes.chunks_exact(row_bytes / 4);
        for (quarter, codes) in quarters.enumerate() {
            let w = match ELEMENT {
                F32 => load_f32(codes),
                F16 => load_f16(codes),
                _ => load_bf16(codes),
            };
            for (acc, x) in acc.iter_mut().zip(x) {
                acc[quarter] = vfmaq_n_f32(acc[quarter], w, x[k]);
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[((row + i) * tile.panels + panel) * PANEL..][..PANEL];
        for (out, acc) in out.chunks_exact_mut(LANES).zip(acc) {
            store(out, acc);
        }
    }
    ROWS
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bf16(from: &[u8]) -> float32x4_t {
    // SAFETY: the slice has 8 bytes (checked here); the load is of bytes, unaligned.
    let halves = vreinterpret_u16_u8(unsafe { vld1_u8(from[..8].as_ptr()) });
    vreinterpretq_f32_u32(vshll_n_u16::<16>(halves))
}

/// Elements of float weights.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
