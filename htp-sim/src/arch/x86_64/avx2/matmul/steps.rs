//! 4-bit weights with a step per block, where neither [`super::pairs`] nor, on AVX2, [`super::bytes`] takes them: few rows of x.
//!
//! Sums of 32 inputs fit 16 bits, as in the module above; the step comes in where pairs of them become 32 bits. What unsigned codes
//! have too much, `8 · Σx`, is taken off where the sums start: then they fit, whatever they were on the way.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::one_row::{PIECE, short_sums};
use super::{LANES, Place, Planes, channel_finish, code_bytes, load_half, load_steps, nibbles, store_rows};
use crate::arch::x86_64::ask_ahead;
use crate::kernels::IntegerTile;
use crate::packed::{MAX_INTEGER_K, PANEL};

/// The product of the tile.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match tile.lo.is_empty() {
        true => planes::<1>(tile, out),
        false => planes::<2>(tile, out),
    }
}

/// As many rows at a time as starts have room for, one panel after the other.
#[target_feature(enable = "avx2,fma,f16c")]
fn planes<const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let mut starts = Starts::<PLANES>::uninit();
    for first in (0..tile.rows).step_by(starts.most_rows(tile)) {
        let end = tile.rows.min(first + starts.most_rows(tile));
        starts.load(tile, first..end);
        for panel in 0..tile.panels {
            let mut row = first;
            while row < end {
                let at = Place { panel, row };
                row += match end - row {
                    4.. if PLANES == 1 => panel_rows::<PLANES, 4>(tile, at, starts.of(tile, row - first), out),
                    2.. => panel_rows::<PLANES, 2>(tile, at, starts.of(tile, row - first), out),
                    _ => panel_rows::<PLANES, 1>(tile, at, starts.of(tile, row - first), out),
                };
            }
        }
    }
}

/// One panel by `ROWS` rows, whose starts follow each other. Both halves of the panel share each load of x. Returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_rows<const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    starts: &[Start<PLANES>],
    out: &mut [f32],
) -> usize {
    let planes = Planes::<PLANES>::new(tile, at.row);
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<4>(tile.block);
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..blocks * block_bytes];
    let steps = &tile.offsets[at.panel * blocks * PANEL..][..blocks * PANEL];
    let mut acc = [[[_mm256_setzero_si256(); 2]; PLANES]; ROWS];
    let (mut k, mut piece) = (0, 0);
    for (codes, steps) in codes.chunks_exact(block_bytes).zip(steps.chunks_exact(PANEL)) {
        let steps = [load_steps(steps), load_steps(&steps[LANES..])];
        for codes in codes.as_chunks::<64>().0.chunks(PIECE / 8) {
            let mut low = [[[_mm256_setzero_si256(); 2]; PLANES]; ROWS];
            for (r, low) in low.iter_mut().enumerate() {
                // SAFETY: `Starts::load` wrote those of all pieces of these rows.
                let start = unsafe { starts[r * pieces(tile) + piece].assume_init() };
                for (low, start) in low.iter_mut().zip(start) {
                    *low = [_mm256_set1_epi32(start); 2];
                }
            }
            let mut rest = codes;
            if let (1, Some(whole)) = (ROWS, codes.as_array::<{ PIECE / 8 }>()) {
                // SAFETY: these are codes for 32 inputs; x has `tile.k` bytes in each plane (the tile's promise), these among them.
                low[0] = unsafe { short_sums(whole.as_ptr().cast(), planes.at_input(k), low[0]) };
                k += PIECE;
                rest = &[];
            }
            for codes in rest {
                if ROWS == 1 {
                    ask_ahead(codes.as_ptr());
                }
                let left = nibbles(load_half::<false>(codes));
                let right = nibbles(load_half::<false>(&codes[LANES * 4..]));
                for (r, low) in low.iter_mut().enumerate() {
                    for (plane, low) in low.iter_mut().enumerate() {
                        // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are eight.
                        let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                        for (low, codes) in low.iter_mut().zip([left, right]) {
                            *low = _mm256_add_epi16(*low, _mm256_maddubs_epi16(codes[0], x));
                            *low = _mm256_add_epi16(*low, _mm256_maddubs_epi16(codes[1], next_x));
                        }
                    }
                }
                k += 8;
            }
            for (acc, low) in acc.as_flattened_mut().iter_mut().zip(low.as_flattened()) {
                for half in 0..2 {
                    acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(low[half], steps[half]));
                }
            }
            piece += 1;
        }
    }
    store_rows(tile, at, 0, channel_finish(tile, at, 0, acc), out);
    ROWS
}

/// `-8 · Σx` over the inputs of a piece, of each plane: in its lower 16 bits those of the first two of each four inputs, in its upper
/// ones those of the others.
type Start<const PLANES: usize> = MaybeUninit<[i32; PLANES]>;

/// The starts of some rows, piece by piece.
struct Starts<const PLANES: usize>([Start<PLANES>; MAX_PIECES]);

impl<const PLANES: usize> Starts<PLANES> {
    #[inline]
    fn uninit() -> Self {
        Self([const { MaybeUninit::uninit() }; MAX_PIECES])
    }

    /// Rows that there is room for, at least one.
    fn most_rows(&self, tile: &IntegerTile<'_>) -> usize {
        self.0.len() / pieces(tile)
    }

    /// Those from row `row` of the loaded ones on.
    fn of(&self, tile: &IntegerTile<'_>, row: usize) -> &[Start<PLANES>] {
        &self.0[row * pieces(tile)..]
    }

    /// Those of some rows of the tile.
    #[target_feature(enable = "avx2")]
    fn load(&mut self, tile: &IntegerTile<'_>, rows: Range<usize>) {
        let planes = Planes::<PLANES>::new(tile, rows.start);
        for (row, starts) in self.0.chunks_exact_mut(pieces(tile)).take(rows.len()).enumerate() {
            let (mut k, mut block_end) = (0, 0);
            for start in starts {
                if k == block_end {
                    block_end += tile.block;
                }
                let inputs = k..block_end.min(k + PIECE);
                let mut of_planes = [0; PLANES];
                for (plane, start) in of_planes.iter_mut().enumerate() {
                    let mut pairs = _mm_setzero_si128();
                    for k in inputs.clone().step_by(8) {
                        // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are eight.
                        let x = unsafe { planes.eight(plane, row, k) };
                        pairs = _mm_sub_epi16(pairs, _mm_maddubs_epi16(_mm_set1_epi8(8), x));
                    }
                    *start = _mm_cvtsi128_si32(_mm_add_epi16(pairs, _mm_srli_si128::<4>(pairs)));
                }
                start.write(of_planes);
                k = inputs.end;
            }
        }
    }
}

/// Pieces of a row: a block has some, the last of which may be shorter.
fn pieces(tile: &IntegerTile<'_>) -> usize {
    tile.k / tile.block * tile.block.div_ceil(PIECE)
}

/// Pieces that there is room for: those of the longest row, with the smallest blocks.
const MAX_PIECES: usize = MAX_INTEGER_K / 8;
