//! Probabilities by float value rows: up to four query rows share each load of values.

use std::arch::aarch64::*;

use half::f16;

use crate::arch::aarch64::insn::widen_f16;
use crate::kernels::ValuesTile;

#[target_feature(enable = "neon")]
pub(crate) fn values_f32(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<4>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn values_f16(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<2>(tile, out);
}

/// Cuts the rows into groups that the kernel was compiled for.
#[target_feature(enable = "neon")]
fn values<const BYTES: usize>(tile: &ValuesTile<'_>, out: &mut [f32]) {
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            4.. => columns::<BYTES, 4>(tile, row, out),
            3 => columns::<BYTES, 3>(tile, row, out),
            2 => columns::<BYTES, 2>(tile, row, out),
            _ => columns::<BYTES, 1>(tile, row, out),
        };
    }
}

/// All columns of `ROWS` rows, 16 at a time while there are so many; returns `ROWS`.
#[target_feature(enable = "neon")]
fn columns<const BYTES: usize, const ROWS: usize>(tile: &ValuesTile<'_>, row: usize, out: &mut [f32]) -> usize {
    let mut column = 0;
    while column + 16 <= tile.head_dim {
        piece::<BYTES, ROWS, 4>(tile, row, column, out);
        column += 16;
    }
    while column + 4 <= tile.head_dim {
        piece::<BYTES, ROWS, 1>(tile, row, column, out);
        column += 4;
    }
    for column in column..tile.head_dim {
        for row in row..row + ROWS {
            let p = &tile.p[row * tile.p_stride..][..tile.positions];
            let products = p.iter().enumerate().map(|(i, p)| p * element::<BYTES>(tile, i * tile.head_dim + column));
            out[row * tile.head_dim + column] += products.fold(0.0, |sum, product| sum + product);
        }
    }
    ROWS
}

/// `ROWS` rows by `REGISTERS · 4` columns.
#[target_feature(enable = "neon")]
fn piece<const BYTES: usize, const ROWS: usize, const REGISTERS: usize>(
    tile: &ValuesTile<'_>,
    row: usize,
    column: usize,
    out: &mut [f32],
) {
    let mut p = [tile.p; ROWS];
    for (i, p) in p.iter_mut().enumerate() {
        *p = &tile.p[(row + i) * tile.p_stride..][..tile.positions];
    }
    let mut acc = [[vdupq_n_f32(0.0); REGISTERS]; ROWS];
    for position in 0..tile.positions {
        let v = &tile.values[(position * tile.head_dim + column) * BYTES..][..REGISTERS * 4 * BYTES];
        for (register, v) in v.chunks_exact(4 * BYTES).enumerate() {
            let v = load::<BYTES>(v);
            for (acc, p) in acc.iter_mut().zip(p) {
                acc[register] = vfmaq_n_f32(acc[register], v, p[position]);
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[(row + i) * tile.head_dim + column..][..REGISTERS * 4];
        for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
            // SAFETY: `out` has four values.
            unsafe { vst1q_f32(out.as_mut_ptr(), vaddq_f32(acc, vld1q_f32(out.as_ptr()))) }
        }
    }
}

/// Four values of a row.
#[inline]
#[target_feature(enable = "neon")]
fn load<const BYTES: usize>(from: &[u8]) -> float32x4_t {
    let from = from[..4 * BYTES].as_ptr();
    // SAFETY: the slice has the bytes that are loaded (checked above); the loads are of bytes, unaligned.
    match BYTES {
        4 => vreinterpretq_f32_u8(unsafe { vld1q_u8(from) }),
        _ => widen_f16(vreinterpret_u16_u8(unsafe { vld1_u8(from) })),
    }
}

/// Value `i`, for columns that do not fill a register.
fn element<const BYTES: usize>(tile: &ValuesTile<'_>, i: usize) -> f32 {
    let bytes = &tile.values[i * BYTES..][..BYTES];
    match *bytes {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}
