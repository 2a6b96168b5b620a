//! Rows of floats by weights of any plain format, eight outputs in a register.

use std::arch::x86_64::*;

use super::{LANES, Place, load_bytes, load_f32, store};
use crate::kernels::FloatTile;
use crate::matmul::Write;
use crate::packed::PANEL;

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn f32_f32(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F32>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn f32_f16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F16>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn f32_bf16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<BF16>(tile, out);
}

/// Float rows by 8-bit per-channel weights.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn f32_w8c(tile: &FloatTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let mut row = 0;
        while row < tile.rows {
            let at = Place { panel, row };
            row += match tile.rows - row {
                4.. => w8c_rows::<4>(tile, at, out),
                2.. => w8c_rows::<2>(tile, at, out),
                _ => w8c_rows::<1>(tile, at, out),
            };
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn w8c_rows<const ROWS: usize>(tile: &FloatTile<'_>, at: Place, out: &mut [f32]) -> usize {
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..tile.panel_bytes];
    for half in 0..2 {
        let scales = load_f32(&tile.scales[(at.panel * PANEL + half * LANES) * 4..]);
        let mut acc = [_mm256_setzero_ps(); ROWS];
        for (group, codes) in codes.as_chunks::<64>().0[..tile.k.div_ceil(4)].iter().enumerate() {
            let codes = load_bytes(&codes.as_chunks().0[half]);
            // Byte i of each lane, moved to the top and shifted down with its sign.
            let floats = [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(codes))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(codes))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(codes))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(codes)),
            ];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = &tile.x[(at.row + r) * tile.x_stride..][..tile.k][group * 4..];
                for (x, floats) in x.iter().zip(floats) {
                    *acc = _mm256_fmadd_ps(_mm256_set1_ps(*x), floats, *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            let out = &mut out[((at.row + r) * tile.panels + at.panel) * PANEL + half * LANES..];
            let mut value = _mm256_mul_ps(acc, scales);
            if tile.write == Write::Add {
                // SAFETY: the slice has eight values (checked here), unaligned.
                value = _mm256_add_ps(unsafe { _mm256_loadu_ps(out[..LANES].as_ptr()) }, value);
            }
            store(out, value);
        }
    }
    ROWS
}

/// Float rows by float weights: some rows by some panels at a time, so that enough sums are under way.
#[target_feature(enable = "avx2,fma,f16c")]
fn float<const ELEMENT: u8>(tile: &FloatTile<'_>, out: &mut [f32]) {
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            6.. => float_panels::<ELEMENT, 1, 6>(tile, row, out),
            3.. => float_panels::<ELEMENT, 2, 3>(tile, row, out),
            2 => float_panels::<ELEMENT, 2, 2>(tile, row, out),
            _ => float_panels::<ELEMENT, 4, 1>(tile, row, out),
        };
    }
}

/// All panels by `ROWS` rows, `PANELS` at a time; returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn float_panels<const ELEMENT: u8, const PANELS: usize, const ROWS: usize>(
    tile: &FloatTile<'_>,
    row: usize,
    out: &mut [f32],
) -> usize {
    let mut panel = 0;
    while panel < tile.panels {
        let at = Place { panel, row };
        panel += if panel + PANELS <= tile.panels {
            float_piece::<ELEMENT, PANELS, ROWS>(tile, at, out)
        } else {
            float_piece::<ELEMENT, 1, ROWS>(tile, at, out)
        };
    }
    ROWS
}

/// `PANELS` panels by `ROWS` rows; returns `PANELS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn float_piece<const ELEMENT: u8, const PANELS: usize, const ROWS: usize>(
    tile: &FloatTile<'_>,
    at: Place,
    out: &mut [f32],
) -> usize {
    let row_bytes = PANEL * if ELEMENT == F32 { 4 } else { 2 };
    let mut acc = [[[_mm256_setzero_ps(); 2]; PANELS]; ROWS];
    let mut codes = [tile.codes.as_ptr(); PANELS];
    for (i, codes) in codes.iter_mut().enumerate() {
        *codes = tile.codes[(at.panel + i) * tile.panel_bytes..][..tile.k * row_bytes].as_ptr();
    }
    let mut x = [tile.x.as_ptr(); ROWS];
    for (i, x) in x.iter_mut().enumerate() {
        *x = tile.x[(at.row + i) * tile.x_stride..][..tile.k].as_ptr();
    }
    for k in 0..tile.k {
        for (panel, codes) in codes.iter().enumerate() {
            for half in 0..2 {
                // SAFETY: the slices above have `tile.k` rows of `row_bytes`.
                let w = unsafe { load_row::<ELEMENT>(codes.add(k * row_bytes + half * row_bytes / 2)) };
                for (acc, x) in acc.iter_mut().zip(x) {
                    // SAFETY: the slices above have `tile.k` values.
                    let x = _mm256_set1_ps(unsafe { *x.add(k) });
                    acc[panel][half] = _mm256_fmadd_ps(x, w, acc[panel][half]);
                }
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[((at.row + i) * tile.panels + at.panel) * PANEL..];
        for (half, acc) in acc.into_iter().flatten().enumerate() {
            store(&mut out[half * LANES..], acc);
        }
    }
    PANELS
}

/// Eight float weights.
///
/// # Safety
/// `from` has eight elements.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_row<const ELEMENT: u8>(from: *const u8) -> __m256 {
    // SAFETY: the caller's promise; the loads are unaligned.
    unsafe {
        match ELEMENT {
            F32 => _mm256_loadu_ps(from.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _ => {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            }
        }
    }
}

/// Elements of float weights.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
