//! Several rows of 8-bit x by 4-bit codes, which were widened to bytes once for all rows.
//!
//! `vpmaddubsw` multiplies unsigned bytes by signed ones. Where codes have a zero it is taken off when they are widened, and x gets 128
//! more: `255 · 8 · 2 = 4080`, of which eight fit 16 bits, those of 32 inputs. What the 128 adds, `128 · Σ code`, is the same for
//! all rows and taken off where sums start. Codes with a minimum stay unsigned
//! and x is as it is: `15 · 128 · 2 = 3840`. Both halves of a panel share each load of x.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::one_row::pin;
use super::pairs::{codes_of, finish, load, load_f16s};
use super::{BLOCKS, LANES, STEPS, load_half, load_i8, load_steps, nibbles, store};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, prefetch};
use crate::kernels::{IntegerTile, MAX_TILE_ROWS};
use crate::packed::{BlockOffset, MAX_BLOCK, PANEL};

/// Computes the tile, if it is one for these kernels. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product<const SCALES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    if !tile.lo.is_empty() || tile.rows < fewest_rows::<SCALES>() {
        return false;
    }
    match tile.offset {
        BlockOffset::Integer if SCALES == BLOCKS => pieces::<SCALES, INTEGER>(tile, out),
        BlockOffset::Min if SCALES == BLOCKS => pieces::<SCALES, MIN>(tile, out),
        _ => pieces::<SCALES, SYMMETRIC>(tile, out),
    }
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
fn pieces<const SCALES: u8, const OFFSET: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let (mut x, mut codes) = (Bytes::uninit(), Widened::uninit());
    let whole_blocks = PIECE / tile.block * tile.block;
    for from in (0..tile.k).step_by(whole_blocks) {
        let inputs = from..tile.k.min(from + whole_blocks);
        let x = if OFFSET == MIN { Rows::of(tile, from) } else { x.load(tile, &inputs) };
        for panel in 0..tile.panels {
            codes.load::<OFFSET>(tile, panel, &inputs);
            // Memory is read while this panel is multiplied.
            codes_of::<4>(tile, panel + 1, &inputs).into_iter().for_each(prefetch);
            let piece = Piece { tile, panel, inputs: inputs.clone(), x: &x, codes: &codes };
            let mut row = 0;
            while row < tile.rows {
                row += match tile.rows - row {
                    4.. => piece.rows::<SCALES, OFFSET, 4>(row, out),
                    3 => piece.rows::<SCALES, OFFSET, 3>(row, out),
                    2 => piece.rows::<SCALES, OFFSET, 2>(row, out),
                    _ => piece.rows::<SCALES, OFFSET, 1>(row, out),
                };
            }
        }
    }
}

/// Some inputs of one panel, and of all rows.
struct Piece<'a, 't> {
    tile: &'a IntegerTile<'t>,
    panel: usize,
    inputs: Range<usize>,
    x: &'a Rows,
    codes: &'a Widened,
}

impl Piece<'_, '_> {
    /// Adds the piece to `ROWS` rows of `out`, which has the sums of those before: floats of block weights, else integers. The last
    /// piece makes it the product. Returns `ROWS`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rows<const SCALES: u8, const OFFSET: u8, const ROWS: usize>(&self, row: usize, out: &mut [f32]) -> usize {
        let tile = self.tile;
        let place = |r: usize, half: usize| ((row + r) * tile.panels + self.panel) * PANEL + half * LANES;
        let mut totals = [[_mm256_setzero_ps(); 2]; ROWS];
        if self.inputs.start > 0 {
            for (r, totals) in totals.iter_mut().enumerate() {
                *totals = [load(&out[place(r, 0)..]), load(&out[place(r, 1)..])];
            }
        }
        let (blocks, first_block) = (tile.k / tile.block, self.inputs.start / tile.block);
        let mut x: [_; ROWS] = std::array::from_fn(|r| self.x.row(row + r));
        let mut starts = self.codes.starts.iter();
        for (i, codes) in self.codes.codes[..self.inputs.len() / 4].chunks(tile.block / 4).enumerate() {
            let at = (self.panel * blocks + first_block + i) * PANEL;
            let weights = if SCALES == STEPS {
                [load_steps(&tile.offsets[at..]), load_steps(&tile.offsets[at + LANES..])]
            } else {
                [_mm256_set1_epi16(1); 2]
            };
            let mut shorts = codes.chunks(SHORT / 4).zip(&mut starts).map(|(codes, start)| {
                // SAFETY: `Widened::load` wrote the codes and the starts of all inputs of the piece; each row of x has its inputs.
                let sums = unsafe { short_sums::<OFFSET, ROWS>(codes, &mut x, start.assume_init_ref()) };
                sums.map(|[left, right]| [_mm256_madd_epi16(left, weights[0]), _mm256_madd_epi16(right, weights[1])])
            });
            let mut sums = shorts.next().expect("a block has inputs");
            for short in shorts {
                for (sums, short) in sums.iter_mut().zip(short) {
                    *sums = [_mm256_add_epi32(sums[0], short[0]), _mm256_add_epi32(sums[1], short[1])];
                }
            }
            if SCALES != BLOCKS {
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    for (total, sum) in totals.iter_mut().zip(sums) {
                        *total = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(*total), sum));
                    }
                }
                continue;
            }
            let scales = load_f16s(&tile.scales[at * 2..]);
            let mins = if OFFSET == MIN { load_f16s(&tile.offsets[at * 2..]) } else { scales };
            for (r, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
                let x_sum = _mm256_set1_epi32(tile.sums[(row + r) * blocks + first_block + i]);
                let x_sum = _mm256_cvtepi32_ps(x_sum);
                for half in 0..2 {
                    let mut dot = _mm256_cvtepi32_ps(sums[half]);
                    if OFFSET == INTEGER {
                        // Exact: all are whole, and below 2^24.
                        let offset =
                            _mm256_add_epi32(load_i8(&tile.offsets[at + half * LANES..]), _mm256_set1_epi32(8));
                        dot = _mm256_fmadd_ps(_mm256_cvtepi32_ps(offset), x_sum, dot);
                    }
                    totals[half] = _mm256_fmadd_ps(scales[half], dot, totals[half]);
                    if OFFSET == MIN {
                        totals[half] = _mm256_fmadd_ps(mins[half], x_sum, totals[half]);
                    }
                }
            }
        }
        for (r, totals) in totals.into_iter().enumerate() {
            for (half, total) in totals.into_iter().enumerate() {
                let last = self.inputs.end == tile.k;
                let value = if last { finish::<SCALES>(tile, self.panel, row + r, half, total) } else { total };
                store(&mut out[place(r, half)..], value);
            }
        }
        ROWS
    }
}

/// Sums of pairs, in 16 bits, of up to [`SHORT`] inputs; `x` moves behind them.
///
/// # Safety
/// The codes are written, and each row of x has as many inputs.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn short_sums<const OFFSET: u8, const ROWS: usize>(
    codes: &[Group],
    x: &mut [*const i8; ROWS],
    start: &[__m256i; 2],
) -> [[__m256i; 2]; ROWS] {
    let mut sums = [*start; ROWS];
    for (group, codes) in codes.iter().enumerate() {
        // SAFETY: the caller's promise.
        let codes = unsafe { codes.assume_init_ref() };
        for (x, sums) in x.iter().zip(&mut sums) {
            // SAFETY: the caller's promise: four inputs; the read is unaligned.
            let x = _mm256_set1_epi32(unsafe { x.add(group * 4).cast::<i32>().read_unaligned() });
            for (sum, codes) in sums.iter_mut().zip(codes) {
                let products =
                    if OFFSET == MIN { _mm256_maddubs_epi16(*codes, x) } else { _mm256_maddubs_epi16(x, *codes) };
                *sum = _mm256_add_epi16(*sum, products);
            }
        }
        for sum in sums.as_flattened_mut() {
            pin(sum);
        }
    }
    for x in x {
        *x = x.wrapping_add(codes.len() * 4);
    }
    sums
}

/// Where the rows of x are.
struct Rows {
    start: *const i8,
    stride: usize,
}

impl Rows {
    /// Those of a tile, from some input on.
    fn of(tile: &IntegerTile<'_>, from: usize) -> Self {
        Self { start: tile.hi[from..].as_ptr(), stride: tile.x_stride }
    }

    fn row(&self, row: usize) -> *const i8 {
        self.start.wrapping_add(row * self.stride)
    }
}

/// Values of x plus 128, of some rows and the inputs of a piece.
struct Bytes([[MaybeUninit<u8>; PIECE]; MAX_TILE_ROWS]);

impl Bytes {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PIECE] }; MAX_TILE_ROWS])
    }

    #[target_feature(enable = "avx2")]
    fn load(&mut self, tile: &IntegerTile<'_>, inputs: &Range<usize>) -> Rows {
        for (row, to) in self.0[..tile.rows].iter_mut().enumerate() {
            let x = &tile.hi[row * tile.x_stride..][inputs.clone()];
            for (x, to) in x.iter().zip(to) {
                to.write(x.cast_unsigned() ^ 0x80);
            }
        }
        Rows { start: self.0.as_ptr().cast(), stride: PIECE }
    }
}

/// Codes of a panel for the inputs of a piece, widened to bytes, and what sums of 32 inputs, or of fewer at the end of a block, start
/// with.
struct Widened {
    codes: [Group; PIECE / 4],
    starts: [MaybeUninit<[__m256i; 2]>; PIECE / SMALLEST_BLOCK],
}

impl Widened {
    #[inline]
    fn uninit() -> Self {
        Self {
            codes: [const { MaybeUninit::uninit() }; PIECE / 4],
            starts: [const { MaybeUninit::uninit() }; PIECE / SMALLEST_BLOCK],
        }
    }

    /// Widens the codes of some inputs of a panel.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load<const OFFSET: u8>(&mut self, tile: &IntegerTile<'_>, panel: usize, inputs: &Range<usize>) {
        let codes = codes_of::<4>(tile, panel, inputs).expect("the tile has the codes of its panels");
        let mut starts = self.starts.iter_mut();
        let blocks = codes.chunks_exact(tile.block * PANEL / 2);
        for (codes, to) in blocks.zip(self.codes.chunks_exact_mut(tile.block / 4)) {
            let shorts = codes.as_chunks::<64>().0.chunks(SHORT / 8);
            for ((rows, to), start) in shorts.zip(to.chunks_mut(SHORT / 4)).zip(&mut starts) {
                let mut sums = [_mm256_setzero_si256(); 2];
                for (row, to) in rows.iter().zip(to.as_chunks_mut::<2>().0) {
                    let (left, right) =
                        (nibbles(load_half::<false>(row)), nibbles(load_half::<false>(&row[LANES * 4..])));
                    for (i, to) in to.iter_mut().enumerate() {
                        let mut codes = [left[i], right[i]];
                        if OFFSET != MIN {
                            for (codes, sum) in codes.iter_mut().zip(&mut sums) {
                                *codes = _mm256_sub_epi8(*codes, _mm256_set1_epi8(8));
                                let excess = _mm256_maddubs_epi16(_mm256_set1_epi8(-128), *codes);
                                *sum = _mm256_sub_epi16(*sum, excess);
                            }
                        }
                        to.write(codes);
                    }
                }
                start.write(sums);
            }
        }
    }
}

/// Codes of four inputs, both halves of the panel.
type Group = MaybeUninit<[__m256i; 2]>;

/// Inputs whose sums fit 16 bits.
const SHORT: usize = 32;

/// Inputs of a piece: 8 KiB of codes.
const PIECE: usize = 2 * MAX_BLOCK;

/// Inputs of a block, at least.
const SMALLEST_BLOCK: usize = 8;

/// With fewer rows widening takes longer than it saves, measured on Zen 3: with steps 16 rows were 0.95 times as fast as without and
/// 64 rows 1.1 times, with scales per block 4 rows were as fast and 8 rows 1.1 times.
const fn fewest_rows<const SCALES: u8>() -> usize {
    if SCALES == STEPS { 32 } else { 6 }
}
