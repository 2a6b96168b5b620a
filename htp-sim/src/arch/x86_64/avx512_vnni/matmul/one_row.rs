//! One row of x, as in a decode step, by weights with a step per block.
//!
//! With several rows the codes are multiplied by their steps once for all of them. With one it is cheaper to multiply the sums
//! of each block: six vector instructions for 128 codes instead of eleven, and four more for each block and plane. High nibbles
//! stay where they are, sixteen times too large until the block ends.

use std::arch::x86_64::*;

use super::{Place, Planes, channel_finish, code_bytes, load_bytes, load_i8, store};
use crate::arch::x86_64::ask_ahead;
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// Whether [`product`] can compute the tile.
pub(super) fn fits(tile: &IntegerTile<'_>) -> bool {
    tile.rows == 1 && tile.block.is_multiple_of(PIECE) && tile.k / tile.block <= MAX_BLOCKS
}

/// The product of a tile that [`fits`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let mut starts = [[0; PLANES]; MAX_BLOCKS];
    let starts = &mut starts[..tile.k / tile.block];
    for (plane, x) in [tile.hi, tile.lo].into_iter().enumerate().take(PLANES) {
        for (start, x) in starts.iter_mut().zip(x[..tile.k].chunks_exact(tile.block)) {
            // Codes are 8 too large.
            start[plane] = -8 * sum(x);
        }
    }
    for panel in 0..tile.panels {
        let [values] = panel_floats(tile, panel, starts);
        store(&mut out[panel * PANEL..], values);
    }
}

/// The finished floats of one panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_floats<const PLANES: usize>(tile: &IntegerTile<'_>, panel: usize, starts: &[[i32; PLANES]]) -> [__m512; 1] {
    let at = Place { panel, row: 0 };
    let planes = Planes::<PLANES>::new(tile, 0);
    let block_bytes = code_bytes::<4>(tile.block);
    let codes = &tile.codes[panel * tile.panel_bytes..][..starts.len() * block_bytes];
    let steps = &tile.offsets[panel * starts.len() * PANEL..][..starts.len() * PANEL];
    let (low, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
    let mut acc = [_mm512_setzero_si512(); PLANES];
    let mut k = 0;
    for ((codes, steps), start) in codes.chunks_exact(block_bytes).zip(steps.chunks_exact(PANEL)).zip(starts) {
        let mut first = start.map(|start| _mm512_set1_epi32(start));
        let mut second = [_mm512_setzero_si512(); PLANES];
        for row in codes.as_chunks::<64>().0 {
            ask_ahead(row.as_ptr());
            let codes = load_bytes(row);
            let nibbles = [_mm512_and_si512(codes, low), _mm512_and_si512(codes, high)];
            for plane in 0..PLANES {
                // SAFETY: x has `tile.k` bytes in each plane (the tile's promise); these are eight of them.
                let (x, next_x) = unsafe { (planes.broadcast(plane, 0, k), planes.broadcast(plane, 0, k + 4)) };
                first[plane] = _mm512_dpbusd_epi32(first[plane], nibbles[0], x);
                second[plane] = _mm512_dpbusd_epi32(second[plane], nibbles[1], next_x);
            }
            k += 8;
        }
        let step = load_i8(steps);
        for plane in 0..PLANES {
            let dot = _mm512_add_epi32(first[plane], _mm512_srai_epi32::<4>(second[plane]));
            acc[plane] = _mm512_add_epi32(acc[plane], _mm512_mullo_epi32(dot, step));
        }
    }
    channel_finish(tile, at, [acc])
}

/// The sum of some bytes, a multiple of [`PIECE`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn sum(x: &[i8]) -> i32 {
    let mut sums = _mm256_setzero_si256();
    for x in x.as_chunks::<PIECE>().0 {
        // SAFETY: 32 bytes, unaligned.
        let x = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        // As unsigned numbers they are 128 larger.
        let x = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(x, _mm256_setzero_si256()));
    }
    let halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let total = _mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves));
    _mm_cvtsi128_si32(total) - 128 * x.len() as i32
}

/// Bytes that [`sum`] takes at a time.
const PIECE: usize = 32;

/// Blocks of a row that there is room for.
const MAX_BLOCKS: usize = 256;
