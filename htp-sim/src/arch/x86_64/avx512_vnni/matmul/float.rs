//! Rows of floats.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{Place, load_bytes, load_f32, store};
use crate::kernels::{FloatTile, MAX_TILE_ROWS};
use crate::matmul::Write;
use crate::packed::PANEL;

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn f32_f32(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F32>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn f32_f16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<F16>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn f32_bf16(tile: &FloatTile<'_>, out: &mut [f32]) {
    float::<BF16>(tile, out);
}

/// Float rows by 8-bit per-channel weights: a piece of a panel becomes floats, for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn f32_w8c(tile: &FloatTile<'_>, out: &mut [f32]) {
    let mut floats = [const { MaybeUninit::uninit() }; W8C_INPUTS];
    // Written only where there is more than one piece.
    let mut sums = [const { MaybeUninit::uninit() }; MAX_TILE_ROWS];
    for panel in 0..tile.panels {
        let codes = tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0;
        for from in (0..tile.k).step_by(W8C_INPUTS) {
            let inputs = from..tile.k.min(from + W8C_INPUTS);
            let codes = &codes[from / 4..][..inputs.len().div_ceil(4)];
            for (floats, codes) in floats.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                let codes = load_bytes(codes);
                // Byte i of each lane, moved to the top and shifted down with its sign.
                floats[0].write(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(codes))));
                floats[1].write(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(codes))));
                floats[2].write(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(codes))));
                floats[3].write(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(codes)));
            }
            // SAFETY: the loop wrote four for each group of four inputs, the last of which may have fewer.
            let weights = unsafe { floats[..inputs.len()].assume_init_ref() };
            let mut row = 0;
            while row < tile.rows {
                let at = Place { panel, row };
                row += match tile.rows - row {
                    12.. => w8c_rows::<12>(tile, at, from, weights, &mut sums, out),
                    4.. => w8c_rows::<4>(tile, at, from, weights, &mut sums, out),
                    2.. => w8c_rows::<2>(tile, at, from, weights, &mut sums, out),
                    _ => w8c_rows::<1>(tile, at, from, weights, &mut sums, out),
                };
            }
        }
    }
}

/// Adds the products with the inputs from `from` on to the rows' `sums`, which the first inputs store; the last ones go to `out`
/// instead, scaled. Returns `ROWS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn w8c_rows<const ROWS: usize>(
    tile: &FloatTile<'_>,
    at: Place,
    from: usize,
    weights: &[__m512],
    sums: &mut [MaybeUninit<__m512>; MAX_TILE_ROWS],
    out: &mut [f32],
) -> usize {
    let mut acc = [_mm512_setzero_ps(); ROWS];
    let mut x = [tile.x; ROWS];
    let sums = &mut sums[at.row..][..ROWS];
    for (r, (acc, x)) in acc.iter_mut().zip(&mut x).enumerate() {
        *x = &tile.x[(at.row + r) * tile.x_stride..][from..from + weights.len()];
        if from > 0 {
            // SAFETY: the pieces before this one stored it.
            *acc = unsafe { sums[r].assume_init() };
        }
    }
    for (k, weights) in weights.iter().enumerate() {
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: each slice of x is as long as the weights.
            *acc = _mm512_fmadd_ps(_mm512_set1_ps(unsafe { *x.get_unchecked(k) }), *weights, *acc);
        }
    }
    if from + weights.len() < tile.k {
        for (sums, acc) in sums.iter_mut().zip(acc) {
            sums.write(acc);
        }
        return ROWS;
    }
    let scales = load_f32(&tile.scales[at.panel * PANEL * 4..]);
    for (r, acc) in acc.into_iter().enumerate() {
        let out = &mut out[((at.row + r) * tile.panels + at.panel) * PANEL..];
        let mut value = _mm512_mul_ps(acc, scales);
        if tile.write == Write::Add {
            // SAFETY: the slice has sixteen values (checked here), unaligned.
            value = _mm512_add_ps(unsafe { _mm512_loadu_ps(out[..PANEL].as_ptr()) }, value);
        }
        store(out, value);
    }
    ROWS
}

/// Float rows by float weights: some rows by some panels at a time, so that enough sums are under way.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn float<const ELEMENT: u8>(tile: &FloatTile<'_>, out: &mut [f32]) {
    let mut panel = 0;
    while panel < tile.panels {
        panel += match tile.panels - panel {
            4.. => float_panels::<ELEMENT, 4>(tile, panel, out),
            2.. => float_panels::<ELEMENT, 2>(tile, panel, out),
            _ => float_panels::<ELEMENT, 1>(tile, panel, out),
        };
    }
}

/// `PANELS` panels by all rows; returns `PANELS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn float_panels<const ELEMENT: u8, const PANELS: usize>(tile: &FloatTile<'_>, panel: usize, out: &mut [f32]) -> usize {
    let mut row = 0;
    while row < tile.rows {
        let at = Place { panel, row };
        row += match tile.rows - row {
            6.. => float_rows::<ELEMENT, PANELS, 6>(tile, at, out),
            4.. => float_rows::<ELEMENT, PANELS, 4>(tile, at, out),
            3 => float_rows::<ELEMENT, PANELS, 3>(tile, at, out),
            2 => float_rows::<ELEMENT, PANELS, 2>(tile, at, out),
            _ => float_rows::<ELEMENT, PANELS, 1>(tile, at, out),
        };
    }
    PANELS
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn float_rows<const ELEMENT: u8, const PANELS: usize, const ROWS: usize>(
    tile: &FloatTile<'_>,
    at: Place,
    out: &mut [f32],
) -> usize {
    let row_bytes = PANEL * if ELEMENT == F32 { 4 } else { 2 };
    let mut acc = [[_mm512_setzero_ps(); PANELS]; ROWS];
    let mut codes = [tile.codes.as_ptr(); PANELS];
    for (i, codes) in codes.iter_mut().enumerate() {
        *codes = tile.codes[(at.panel + i) * tile.panel_bytes..][..tile.k * row_bytes].as_ptr();
    }
    let mut x = [tile.x.as_ptr(); ROWS];
    for (i, x) in x.iter_mut().enumerate() {
        *x = tile.x[(at.row + i) * tile.x_stride..][..tile.k].as_ptr();
    }
    for k in 0..tile.k {
        // SAFETY: the slices above have `tile.k` rows of `row_bytes`.
        let w = codes.map(|codes| unsafe { load_row::<ELEMENT>(codes.add(k * row_bytes)) });
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: the slices above have `tile.k` values.
            let x = _mm512_set1_ps(unsafe { *x.add(k) });
            for (acc, w) in acc.iter_mut().zip(w) {
                *acc = _mm512_fmadd_ps(x, w, *acc);
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[((at.row + i) * tile.panels + at.panel) * PANEL..];
        for (panel, acc) in acc.into_iter().enumerate() {
            store(&mut out[panel * PANEL..], acc);
        }
    }
    ROWS
}

/// Sixteen float weights.
///
/// # Safety
/// `from` has sixteen elements.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_row<const ELEMENT: u8>(from: *const u8) -> __m512 {
    // SAFETY: the caller's promise; the loads are unaligned.
    unsafe {
        match ELEMENT {
            F32 => _mm512_loadu_ps(from.cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            _ => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
        }
    }
}

/// Elements of float weights.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Inputs that become floats at a time: all of an adapter's branch, as a rule.
const W8C_INPUTS: usize = 64;
