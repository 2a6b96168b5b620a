//! Few rows of x by 4-bit weights with a step per block.
//!
//! Sums of 32 inputs fit 16 bits, as in the module above; the step comes in where pairs of them become 32 bits. What unsigned codes
//! have too much, `8 · Σx`, is taken off where the sums start: then they fit whatever they were on the way.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{LANES, Place, Planes, channel_finish, code_bytes, load_half, load_i8, store};
use crate::arch::x86_64::ask_ahead;
use crate::kernels::IntegerTile;
use crate::packed::{MAX_INTEGER_K, PANEL};

/// The product of the tile.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let mut starts = Starts::uninit();
    let most_rows = starts.0.len() / (pieces(tile) * if tile.lo.is_empty() { 1 } else { 2 });
    let mut row = 0;
    while row < tile.rows {
        row += match (tile.lo.is_empty(), most_rows.min(tile.rows - row)) {
            (true, 4..) => rows::<1, 4>(tile, row, &mut starts, out),
            (true, 2..) => rows::<1, 2>(tile, row, &mut starts, out),
            (true, _) => rows::<1, 1>(tile, row, &mut starts, out),
            (false, 2..) => rows::<2, 2>(tile, row, &mut starts, out),
            (false, _) => rows::<2, 1>(tile, row, &mut starts, out),
        };
    }
}

/// All panels by `ROWS` rows; returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    row: usize,
    starts: &mut Starts,
    out: &mut [f32],
) -> usize {
    let planes = Planes::<PLANES>::new(tile, row);
    let starts = starts.load::<PLANES, ROWS>(tile, &planes);
    for panel in 0..tile.panels {
        panel_rows(tile, Place { panel, row }, &planes, starts, out);
    }
    ROWS
}

/// One panel by `ROWS` rows. Both halves of the panel share each load of x.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_rows<const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    planes: &Planes<PLANES>,
    starts: &[[[MaybeUninit<i32>; PLANES]; ROWS]],
    out: &mut [f32],
) {
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<4>(tile.block);
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..blocks * block_bytes];
    let steps = &tile.offsets[at.panel * blocks * PANEL..][..blocks * PANEL];
    let low_mask = _mm256_set1_epi8(15);
    let mut acc = [[[_mm256_setzero_si256(); 2]; PLANES]; ROWS];
    let (mut k, mut starts) = (0, starts.iter());
    for (codes, steps) in codes.chunks_exact(block_bytes).zip(steps.chunks_exact(PANEL)) {
        let steps = [load_steps(steps), load_steps(&steps[LANES..])];
        for (codes, starts) in codes.as_chunks::<64>().0.chunks(PIECE / 8).zip(&mut starts) {
            let mut low = [[[_mm256_setzero_si256(); 2]; PLANES]; ROWS];
            for (low, start) in low.as_flattened_mut().iter_mut().zip(starts.as_flattened()) {
                // SAFETY: `Starts::load` wrote those of all pieces, rows and planes.
                *low = [_mm256_set1_epi32(unsafe { start.assume_init() }); 2];
            }
            for codes in codes {
                if ROWS == 1 {
                    ask_ahead(codes.as_ptr());
                }
                let (left, right) = (load_half::<false>(codes), load_half::<false>(&codes[LANES * 4..]));
                let first = [_mm256_and_si256(left, low_mask), _mm256_and_si256(right, low_mask)];
                let (left, right) = (_mm256_srli_epi16::<4>(left), _mm256_srli_epi16::<4>(right));
                let second = [_mm256_and_si256(left, low_mask), _mm256_and_si256(right, low_mask)];
                for (r, low) in low.iter_mut().enumerate() {
                    for (plane, low) in low.iter_mut().enumerate() {
                        // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are eight.
                        let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                        for half in 0..2 {
                            low[half] = _mm256_add_epi16(low[half], _mm256_maddubs_epi16(first[half], x));
                            low[half] = _mm256_add_epi16(low[half], _mm256_maddubs_epi16(second[half], next_x));
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
        }
    }
    for (i, values) in channel_finish(tile, at, 0, acc).into_iter().enumerate() {
        for (half, values) in values.into_iter().enumerate() {
            store(&mut out[((at.row + i) * tile.panels + at.panel) * PANEL + half * LANES..], values);
        }
    }
}

/// `-8 · Σx` over the inputs of each piece, of some rows and planes: in its lower 16 bits those of the first two of each four inputs,
/// in its upper ones those of the others.
struct Starts([MaybeUninit<i32>; 2 * MAX_PIECES]);

impl Starts {
    #[inline]
    fn uninit() -> Self {
        Self([const { MaybeUninit::uninit() }; 2 * MAX_PIECES])
    }

    /// Those of `ROWS` rows, piece by piece.
    #[target_feature(enable = "avx2")]
    fn load<const PLANES: usize, const ROWS: usize>(
        &mut self,
        tile: &IntegerTile<'_>,
        planes: &Planes<PLANES>,
    ) -> &[[[MaybeUninit<i32>; PLANES]; ROWS]] {
        let starts = &mut self.0.as_chunks_mut::<PLANES>().0.as_chunks_mut::<ROWS>().0[..pieces(tile)];
        let (mut k, mut block_end) = (0, 0);
        for starts in starts.iter_mut() {
            if k == block_end {
                block_end += tile.block;
            }
            let inputs = PIECE.min(block_end - k);
            for (r, starts) in starts.iter_mut().enumerate() {
                for (plane, start) in starts.iter_mut().enumerate() {
                    let mut pairs = _mm_setzero_si128();
                    for k in (k..k + inputs).step_by(8) {
                        // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are eight.
                        let x = unsafe { planes.eight(plane, r, k) };
                        pairs = _mm_add_epi16(pairs, _mm_maddubs_epi16(_mm_set1_epi8(8), x));
                    }
                    pairs = _mm_add_epi16(pairs, _mm_srli_si128::<4>(pairs));
                    start.write(_mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), pairs)));
                }
            }
            k += inputs;
        }
        starts
    }
}

/// Pieces of a row: a block has some, the last of which may be shorter.
fn pieces(tile: &IntegerTile<'_>) -> usize {
    tile.k / tile.block * tile.block.div_ceil(PIECE)
}

/// The steps of eight outputs, each in both halves of its lane.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_steps(from: &[u8]) -> __m256i {
    let steps = load_i8(from);
    _mm256_or_si256(steps, _mm256_slli_epi32::<16>(steps))
}

/// Inputs whose sums fit 16 bits.
const PIECE: usize = 32;

/// Pieces of a row, at most: of the longest, with the smallest blocks.
const MAX_PIECES: usize = MAX_INTEGER_K / 8;
