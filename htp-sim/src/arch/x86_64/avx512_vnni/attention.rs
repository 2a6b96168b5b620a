//! Probabilities by float value rows: up to four query rows share each load of values.

use std::arch::x86_64::*;

use crate::kernels::ValuesTile;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn values_f32(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<4>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn values_f16(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<2>(tile, out);
}

/// Cuts rows and columns into pieces that the kernel was compiled for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn values<const BYTES: usize>(tile: &ValuesTile<'_>, out: &mut [f32]) {
    assert!(tile.values.len() >= tile.positions * tile.head_dim * BYTES && out.len() >= tile.rows * tile.head_dim);
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            6.. => columns::<BYTES, 6>(tile, row, out),
            4.. => columns::<BYTES, 4>(tile, row, out),
            3 => columns::<BYTES, 3>(tile, row, out),
            2 => columns::<BYTES, 2>(tile, row, out),
            _ => columns::<BYTES, 1>(tile, row, out),
        };
    }
}

/// All columns of `ROWS` rows; returns `ROWS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn columns<const BYTES: usize, const ROWS: usize>(tile: &ValuesTile<'_>, row: usize, out: &mut [f32]) -> usize {
    let mut column = 0;
    while column + 64 <= tile.head_dim {
        piece::<BYTES, ROWS, 4>(tile, row, column, u16::MAX, out);
        column += 64;
    }
    while column < tile.head_dim {
        let mask = u16::MAX >> (16 - (tile.head_dim - column).min(16));
        piece::<BYTES, ROWS, 1>(tile, row, column, mask, out);
        column += 16;
    }
    ROWS
}

/// `ROWS` rows by `REGISTERS · 16` columns; `mask` has a bit for each column of a register that exists.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn piece<const BYTES: usize, const ROWS: usize, const REGISTERS: usize>(
    tile: &ValuesTile<'_>,
    row: usize,
    column: usize,
    mask: u16,
    out: &mut [f32],
) {
    let mut p = [tile.p.as_ptr(); ROWS];
    for (i, p) in p.iter_mut().enumerate() {
        *p = tile.p[(row + i) * tile.p_stride..][..tile.positions].as_ptr();
    }
    let mut acc = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
    let mut v = tile.values.as_ptr().wrapping_add(column * BYTES);
    for position in 0..tile.positions {
        let mut loaded = [_mm512_setzero_ps(); REGISTERS];
        for (i, loaded) in loaded.iter_mut().enumerate() {
            // SAFETY: `values` checked that all positions are inside; the masked columns are inside the row.
            *loaded = unsafe { load::<BYTES>(v.add(i * 16 * BYTES), mask) };
        }
        v = v.wrapping_add(tile.head_dim * BYTES);
        for (acc, p) in acc.iter_mut().zip(p) {
            // SAFETY: the slices above have `positions` values.
            let p = _mm512_set1_ps(unsafe { *p.add(position) });
            for (acc, v) in acc.iter_mut().zip(loaded) {
                *acc = _mm512_fmadd_ps(p, v, *acc);
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[(row + i) * tile.head_dim + column..];
        for (register, acc) in acc.into_iter().enumerate() {
            let to = out[register * 16..].as_mut_ptr();
            // SAFETY: `values` checked the length of out; the masked columns are inside the row.
            unsafe { _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(acc, _mm512_maskz_loadu_ps(mask, to))) }
        }
    }
}

/// Up to sixteen values of a row.
///
/// # Safety
/// The elements that `mask` names can be read from `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load<const BYTES: usize>(from: *const u8, mask: u16) -> __m512 {
    // SAFETY: the caller's promise; the loads are unaligned and touch only what the mask names.
    unsafe {
        match BYTES {
            4 => _mm512_maskz_loadu_ps(mask, from.cast()),
            _ => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())),
        }
    }
}
