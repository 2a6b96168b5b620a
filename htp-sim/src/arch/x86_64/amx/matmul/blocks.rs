//! Weights with a scale per block: the sums of a block leave the tiles before those of the next.

use std::arch::x86_64::*;

use super::{PIECE, Unpacked, load_sums, signed_bytes};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::amx::tiles::{Operands, Span, Sums};
use crate::arch::x86_64::avx512_vnni::matmul::{load_f16, load_i8, store};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, PANEL};

/// A span by a panel of at most [`PIECE`] inputs in a block. The floats are summed where they will be in the end.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn span<U: TileUnit, const CODES: u8>(unit: &mut U, tile: &IntegerTile<'_>, span: Span, out: &mut [f32]) {
    let mut sums = Sums::uninit();
    let mut unpacked = Unpacked::uninit();
    let whole_blocks = PIECE / tile.block * tile.block;
    for from in (0..tile.k).step_by(whole_blocks) {
        let inputs = from..tile.k.min(from + whole_blocks);
        let weights = signed_bytes::<CODES>(tile, span.panel, inputs.clone(), &mut unpacked);
        for part in span.parts() {
            // SAFETY: a table with this unit exists only where it may be used.
            unsafe { part.configure(unit, tile.block / 4) };
            for (from, weights) in inputs.clone().step_by(tile.block).zip(weights.chunks_exact(tile.block / 4)) {
                let block = Block::load(tile, span.panel, from / tile.block);
                let operands = Operands { tile, span, from, weights, afresh: true };
                let add = |sums: &Sums, rows| {
                    for row in rows {
                        // SAFETY: these sums were just stored in every plane.
                        let dot = unsafe { block_sums(tile, sums, row) };
                        block.add(tile, span.first + row, dot, out);
                    }
                };
                // SAFETY: as above, configured for a block.
                unsafe { part.multiply(unit, operands, &mut sums, add) };
            }
        }
    }
    for row in span.first..span.first + span.rows {
        let out = &mut out[(row * tile.panels + span.panel) * PANEL..];
        store(out, _mm512_mul_ps(load(out), _mm512_set1_ps(tile.x_scales[row])));
    }
}

/// `Σ x · code` of a row and a block.
///
/// # Safety
/// The sums of the row were stored in every plane.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn block_sums(tile: &IntegerTile<'_>, sums: &Sums, row: usize) -> __m512i {
    // SAFETY: the caller's promise.
    let hi = load_sums(unsafe { sums.row(0, row) });
    if tile.lo.is_empty() {
        return hi;
    }
    // SAFETY: the caller's promise.
    let lo = load_sums(unsafe { sums.row(1, row) });
    _mm512_add_epi32(_mm512_slli_epi32::<8>(hi), lo)
}

/// What makes floats of a block's sums.
struct Block {
    panel: usize,
    block: usize,
    scale: __m512,
    /// Integer offsets; zero unless the encoding has them.
    offset: __m512i,
    /// Minima; zero unless the encoding has them.
    min: __m512,
}

impl Block {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(tile: &IntegerTile<'_>, panel: usize, block: usize) -> Self {
        let at = (panel * (tile.k / tile.block) + block) * PANEL;
        let (mut offset, mut min) = (_mm512_setzero_si512(), _mm512_setzero_ps());
        match tile.offset {
            BlockOffset::Symmetric => {}
            BlockOffset::Integer => offset = load_i8(&tile.offsets[at..]),
            BlockOffset::Min => min = load_f16(&tile.offsets[at * 2..]),
        }
        Self { panel, block, scale: load_f16(&tile.scales[at * 2..]), offset, min }
    }

    /// Adds the floats of a row's `dot` to `out`, or stores them there if this is the first block.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, tile: &IntegerTile<'_>, row: usize, mut dot: __m512i, out: &mut [f32]) {
        let out = &mut out[(row * tile.panels + self.panel) * PANEL..];
        let mut acc = if self.block == 0 { _mm512_setzero_ps() } else { load(out) };
        let sum = tile.sums[row * (tile.k / tile.block) + self.block];
        if tile.offset == BlockOffset::Integer {
            dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(self.offset, _mm512_set1_epi32(sum)));
        }
        acc = _mm512_add_ps(acc, _mm512_mul_ps(self.scale, _mm512_cvtepi32_ps(dot)));
        if tile.offset == BlockOffset::Min {
            acc = _mm512_add_ps(acc, _mm512_mul_ps(self.min, _mm512_set1_ps(sum as f32)));
        }
        store(out, acc);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32]) -> __m512 {
    // SAFETY: the slice has sixteen values (checked here), unaligned.
    unsafe { _mm512_loadu_ps(from[..PANEL].as_ptr()) }
}
