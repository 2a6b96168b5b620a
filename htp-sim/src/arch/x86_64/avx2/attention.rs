//! Probabilities by float value rows: up to six query rows share each load of values.

use std::arch::x86_64::*;

use half::f16;

use crate::kernels::ValuesTile;

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn values_f32(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<4>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn values_f16(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<2>(tile, out);
}

/// Cuts rows and columns into pieces that the kernel was compiled for.
#[target_feature(enable = "avx2,fma,f16c")]
fn values<const BYTES: usize>(tile: &ValuesTile<'_>, out: &mut [f32]) {
    assert!(tile.values.len() >= tile.positions * tile.head_dim * BYTES && out.len() >= tile.rows * tile.head_dim);
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            6.. => columns::<BYTES, 6, 2>(tile, row, out),
            3.. => columns::<BYTES, 3, 4>(tile, row, out),
            2 => columns::<BYTES, 2, 4>(tile, row, out),
            _ => columns::<BYTES, 1, 8>(tile, row, out),
        };
    }
}

/// All columns of `ROWS` rows, `REGISTERS · 8` at a time while there are so many; returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn columns<const BYTES: usize, const ROWS: usize, const REGISTERS: usize>(
    tile: &ValuesTile<'_>,
    row: usize,
    out: &mut [f32],
) -> usize {
    let mut column = 0;
    while column + REGISTERS * 8 <= tile.head_dim {
        piece::<BYTES, ROWS, REGISTERS>(tile, row, column, out);
        column += REGISTERS * 8;
    }
    while column + 8 <= tile.head_dim {
        piece::<BYTES, ROWS, 1>(tile, row, column, out);
        column += 8;
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

/// `ROWS` rows by `REGISTERS · 8` columns.
#[target_feature(enable = "avx2,fma,f16c")]
fn piece<const BYTES: usize, const ROWS: usize, const REGISTERS: usize>(
    tile: &ValuesTile<'_>,
    row: usize,
    column: usize,
    out: &mut [f32],
) {
    let mut p = [tile.p.as_ptr(); ROWS];
    for (i, p) in p.iter_mut().enumerate() {
        *p = tile.p[(row + i) * tile.p_stride..][..tile.positions].as_ptr();
    }
    let mut acc = [[_mm256_setzero_ps(); REGISTERS]; ROWS];
    let mut v = tile.values.as_ptr().wrapping_add(column * BYTES);
    for position in 0..tile.positions {
        for register in 0..REGISTERS {
            // SAFETY: `values` checked that all positions are inside; `columns` keeps to whole registers.
            let v = unsafe { load::<BYTES>(v.add(register * 8 * BYTES)) };
            for (acc, p) in acc.iter_mut().zip(p) {
                // SAFETY: the slices above have `positions` values.
                let p = _mm256_set1_ps(unsafe { *p.add(position) });
                acc[register] = _mm256_fmadd_ps(p, v, acc[register]);
            }
        }
        v = v.wrapping_add(tile.head_dim * BYTES);
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[(row + i) * tile.head_dim + column..][..REGISTERS * 8];
        for (out, acc) in out.as_chunks_mut::<8>().0.iter_mut().zip(acc) {
            // SAFETY: `out` has eight values, unaligned.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(acc, _mm256_loadu_ps(out.as_ptr()))) }
        }
    }
}

/// Eight values of a row.
///
/// # Safety
/// `from` has eight elements.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load<const BYTES: usize>(from: *const u8) -> __m256 {
    // SAFETY: the caller's promise; the loads are unaligned.
    unsafe {
        match BYTES {
            4 => _mm256_loadu_ps(from.cast()),
            _ => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
        }
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
