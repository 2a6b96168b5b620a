//! Eight rows of x by 4-bit weights in blocks of 32.
//!
//! Products keep half of the vector pipes busy, and what else there is runs on the same pipes. So a block's codes stay in
//! registers: the upper plane meets them, its sums are shifted once, and the lower plane's products are added to these.

use std::arch::x86_64::*;

use super::{Place, Planes, load_bytes, load_f16, load_i8};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// Whether [`floats`] can compute rows of the tile, if its weights have 4 bits and scales for blocks.
pub(super) fn fits(tile: &IntegerTile<'_>) -> bool {
    tile.block == BLOCK
}

/// `offset_floats` of the module above, bit for bit; with its sums as a part of that one the gain was gone.
///
/// Eight rows give the chains of sums that registers have room for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn floats<const OFFSET: u8, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
) -> [__m512; ROWS] {
    let planes = Planes::<PLANES>::new(tile, at.row);
    let blocks = tile.k / BLOCK;
    let first = at.panel * blocks * PANEL;
    let codes = tile.codes[at.panel * tile.panel_bytes..].as_chunks::<64>().0.as_chunks::<4>().0;
    let scales = tile.scales[first * 2..].as_chunks::<{ PANEL * 2 }>().0;
    let mut sums = [&tile.sums[..0]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = &tile.sums[(at.row + row) * blocks..][..blocks];
    }
    let low_mask = _mm512_set1_epi8(15);
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for (block, (rows, scales)) in codes[..blocks].iter().zip(&scales[..blocks]).enumerate() {
        let mut codes = [_mm512_setzero_si512(); BLOCK / 4];
        for (pair, row) in codes.as_chunks_mut::<2>().0.iter_mut().zip(rows) {
            let row = load_bytes(row);
            *pair = [_mm512_and_si512(row, low_mask), _mm512_and_si512(_mm512_srli_epi16::<4>(row), low_mask)];
        }
        let mut dots = [_mm512_setzero_si512(); ROWS];
        for plane in 0..PLANES {
            if plane > 0 {
                for dot in &mut dots {
                    *dot = _mm512_slli_epi32::<8>(*dot);
                }
            }
            for (four, codes) in codes.iter().enumerate() {
                for (row, dot) in dots.iter_mut().enumerate() {
                    // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise), and this block is inside them.
                    let x = unsafe { planes.broadcast(plane, row, block * BLOCK + four * 4) };
                    *dot = _mm512_dpbusd_epi32(*dot, *codes, x);
                }
            }
        }
        let scale = load_f16(scales);
        for (row, (acc, mut dot)) in acc.iter_mut().zip(dots).enumerate() {
            let sum = _mm512_set1_epi32(sums[row][block]);
            if OFFSET == SYMMETRIC {
                dot = _mm512_sub_epi32(dot, _mm512_slli_epi32::<3>(sum));
            }
            if OFFSET == INTEGER {
                let offset = load_i8(&tile.offsets[first + block * PANEL..]);
                dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(offset, sum));
            }
            *acc = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), *acc);
            if OFFSET == MIN {
                let min = load_f16(&tile.offsets[(first + block * PANEL) * 2..]);
                *acc = _mm512_fmadd_ps(min, _mm512_cvtepi32_ps(sum), *acc);
            }
        }
    }
    for (row, acc) in acc.iter_mut().enumerate() {
        *acc = _mm512_mul_ps(*acc, _mm512_set1_ps(tile.x_scales[at.row + row]));
    }
    acc
}

/// Inputs of a block.
const BLOCK: usize = 32;
