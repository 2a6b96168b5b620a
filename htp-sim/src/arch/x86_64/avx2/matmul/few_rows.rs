//! A few rows of 16-bit x by 8-bit weights, over few inputs: attention of a decode step, where query heads share keys and values.
//!
//! As in [`super::pairs`], but codes are widened in registers for up to four rows, as they come from memory: with so few rows what it
//! takes to keep them, and to make up for the 128 that x has too much there, would be half of all instructions.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::pairs::MAX_CODE_SUM;
use super::{Dot, LANES, PANEL, load_f32, load_half, store};
use crate::arch::x86_64::ask_ahead;
use crate::kernels::IntegerTile;

/// Computes the tile, if it is one for this kernel. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product<D: Dot>(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    if tile.lo.is_empty() || tile.width != PANEL || !(2..=MOST_ROWS).contains(&tile.rows) || tile.k > MAX_K {
        return false;
    }
    let mut x = Values::uninit();
    if !x.load(tile) {
        return false;
    }
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            4 | 7.. => panels::<D, 4>(tile, &x, row, out),
            3.. => panels::<D, 3>(tile, &x, row, out),
            2 => panels::<D, 2>(tile, &x, row, out),
            _ => panels::<D, 1>(tile, &x, row, out),
        };
    }
    true
}

/// All panels by `ROWS` rows from `row` on; returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn panels<D: Dot, const ROWS: usize>(tile: &IntegerTile<'_>, x: &Values, row: usize, out: &mut [f32]) -> usize {
    let x: [_; ROWS] = std::array::from_fn(|r| x.row(row + r, tile.k / 4));
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..][..tile.k * PANEL];
        let sums = sums::<D, ROWS>(x, codes);
        let scales = &tile.scales[panel * PANEL * 4..][..PANEL * 4];
        for (r, sums) in sums.into_iter().enumerate() {
            let row = row + r;
            let x_scale = _mm256_set1_ps(tile.x_scales[row]);
            for (half, sum) in sums.into_iter().enumerate() {
                let scale = _mm256_mul_ps(load_f32(&scales[half * LANES * 4..]), x_scale);
                let out = &mut out[(row * tile.panels + panel) * PANEL + half * LANES..];
                store(out, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale));
            }
        }
    }
    ROWS
}

/// `Σ x · code` of each row, both halves of a panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums<D: Dot, const ROWS: usize>(x: [&[[i32; 2]]; ROWS], codes: &[u8]) -> [[__m256i; 2]; ROWS] {
    let mut sums = [[_mm256_setzero_si256(); 2]; ROWS];
    for (group, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
        ask_ahead(codes.as_ptr());
        let halves = [load_half::<false>(codes), load_half::<false>(&codes[32..])];
        // The first and third of four inputs, then the others.
        let even = halves.map(|codes| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(codes)));
        let odd = halves.map(|codes| _mm256_srai_epi16::<8>(codes));
        for (x, sums) in x.iter().zip(&mut sums) {
            for (pair, codes) in x[group].into_iter().zip([even, odd]) {
                let pair = _mm256_set1_epi32(pair);
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    // SAFETY: the table's `D` is one that the CPU has.
                    *sum = unsafe { D::pairs(*sum, codes, pair) };
                }
            }
        }
    }
    sums
}

/// Values of some rows, two registers for each 32 inputs: of each four the first and third, then the others.
struct Values([[MaybeUninit<[__m256i; 2]>; MAX_K.div_ceil(STEP)]; MOST_ROWS]);

impl Values {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; MAX_K.div_ceil(STEP)] }; MOST_ROWS])
    }

    /// Joins the planes of all rows of the tile. Says whether 16 bits hold each value.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn load(&mut self, tile: &IntegerTile<'_>) -> bool {
        let mut lost = _mm256_setzero_si256();
        for (row, to) in self.0.iter_mut().take(tile.rows).enumerate() {
            let [hi, lo] = [tile.hi, tile.lo].map(|plane| plane[row * tile.x_stride..][..tile.k].chunks(STEP));
            for ((hi, lo), to) in hi.zip(lo).zip(to) {
                let (hi, lo) = (load(hi), load(lo));
                let high = [_mm256_slli_epi16::<8>(hi), _mm256_andnot_si256(_mm256_set1_epi16(0xff), hi)];
                let low = [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(lo)), _mm256_srai_epi16::<8>(lo)];
                let mut values = [_mm256_setzero_si256(); 2];
                for ((high, low), values) in high.into_iter().zip(low).zip(&mut values) {
                    *values = _mm256_add_epi16(high, low);
                    lost = _mm256_or_si256(lost, _mm256_xor_si256(*values, _mm256_adds_epi16(high, low)));
                }
                // Pairs of both in turn; unpacking does it for each half of a register.
                let [even, odd] = values;
                let (first, second) = (_mm256_unpacklo_epi32(even, odd), _mm256_unpackhi_epi32(even, odd));
                let halves = |a, b| [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)];
                to.write(halves(first, second));
            }
        }
        _mm256_testz_si256(lost, lost) == 1
    }

    /// A row's values of `groups` times four inputs.
    #[inline]
    fn row(&self, row: usize, groups: usize) -> &[[i32; 2]] {
        // SAFETY: `load` wrote those of all inputs of the tile's rows, and a register has eight of these numbers.
        unsafe { std::slice::from_raw_parts(self.0[row][..groups.div_ceil(STEP / 4)].as_ptr().cast(), groups) }
    }
}

/// Up to 32 inputs of a plane; zeros where there are no more.
#[inline]
#[target_feature(enable = "avx2")]
fn load(plane: &[i8]) -> __m256i {
    let mut padded = [0; STEP];
    let bytes = plane.first_chunk().unwrap_or_else(|| {
        padded[..plane.len()].copy_from_slice(plane);
        &padded
    });
    // SAFETY: 32 bytes, unaligned.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Rows, at most. With more, codes that are kept serve enough of them.
const MOST_ROWS: usize = 8;

/// Inputs, at most: then no sum is beyond 32 bits, and those of each byte of x fit a float, so that both make the same float.
const MAX_K: usize = MAX_CODE_SUM / 128 / 4 * 4;

/// Inputs that are joined at a time.
const STEP: usize = 32;
