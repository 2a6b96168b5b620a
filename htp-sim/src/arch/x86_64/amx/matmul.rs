//! Matrix products of one tile of the output, in tiles of the unit.
//!
//! 8-bit codes are read where they lie, 4-bit codes are unpacked once for all rows of a span.
//!
//! ```text
//! for each panel, for each span of rows, for each piece of k (as many inputs as are unpacked at a time):
//!     a scale per output: sums += x · weights
//!     a scale per block:  for each block: sums = x · weights, floats += scale · sums
//! ```

mod blocks;

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::insn::TileUnit;
use super::tiles::{MAX_ROWS, Operands, Span, Sums};
use crate::arch::x86_64::avx512_vnni;
use crate::arch::x86_64::avx512_vnni::matmul::{Place, channel_finish, load_bytes, load_i8, store};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, PANEL};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w8c<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    product::<U, EIGHT_BIT>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4c<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    product::<U, FOUR_BIT>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4e<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    product::<U, FOUR_BIT_STEPS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w8b<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    product::<U, EIGHT_BIT_BLOCKS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4b<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    product::<U, FOUR_BIT_BLOCKS>(tile, out);
}

/// Leaves what does not fill the tiles to VNNI and cuts the rest into spans of [`MAX_ROWS`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn product<U: TileUnit, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let is_blocks = matches!(CODES, EIGHT_BIT_BLOCKS | FOUR_BIT_BLOCKS);
    if tile.rows < MIN_ROWS || tile.width < PANEL || is_blocks && tile.block > PIECE {
        return match CODES {
            EIGHT_BIT => avx512_vnni::matmul::q_w8c(tile, out),
            FOUR_BIT => avx512_vnni::matmul::q_w4c(tile, out),
            FOUR_BIT_STEPS => avx512_vnni::matmul::q_w4e(tile, out),
            EIGHT_BIT_BLOCKS => avx512_vnni::matmul::q_w8b(tile, out),
            _ => avx512_vnni::matmul::q_w4b(tile, out),
        };
    }
    let mut unit = U::default();
    for panel in 0..tile.panels {
        for first in (0..tile.rows).step_by(MAX_ROWS) {
            let span = Span { panel, first, rows: MAX_ROWS.min(tile.rows - first) };
            if is_blocks {
                blocks::span::<U, CODES>(&mut unit, tile, span, out);
            } else {
                channel_span::<U, CODES>(&mut unit, tile, span, out);
            }
        }
    }
    // SAFETY: a table with this unit exists only where it may be used.
    unsafe { unit.release() };
}

/// A span by weights with a scale per output.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn channel_span<U: TileUnit, const CODES: u8>(unit: &mut U, tile: &IntegerTile<'_>, span: Span, out: &mut [f32]) {
    let mut sums = Sums::uninit();
    let mut unpacked = Unpacked::uninit();
    for from in (0..tile.k).step_by(PIECE) {
        let weights = signed_bytes::<CODES>(tile, span.panel, from..tile.k.min(from + PIECE), &mut unpacked);
        let operands = Operands { tile, span, from, weights, afresh: from == 0 };
        for part in span.parts() {
            // SAFETY: a table with this unit exists only where it may be used. The first piece stores the sums.
            unsafe {
                part.configure(unit, weights.len());
                part.multiply(unit, operands, &mut sums, |_, _| ());
            }
        }
    }
    for row in 0..span.rows {
        let at = Place { panel: span.panel, row: span.first + row };
        // SAFETY: the parts are all rows of the span, and their sums were stored in every plane.
        let [values] = unsafe {
            match tile.lo.is_empty() {
                true => channel_finish(tile, at, [[load_sums(sums.row(0, row))]]),
                false => channel_finish(tile, at, [[load_sums(sums.row(0, row)), load_sums(sums.row(1, row))]]),
            }
        };
        store(&mut out[(at.row * tile.panels + at.panel) * PANEL..], values);
    }
}

/// The codes of some inputs of a panel as signed bytes, `[k/4][16][4]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn signed_bytes<'a, const CODES: u8>(
    tile: &IntegerTile<'a>,
    panel: usize,
    inputs: std::ops::Range<usize>,
    unpacked: &'a mut Unpacked,
) -> &'a [[u8; 64]] {
    let fours = inputs.len() / 4;
    if matches!(CODES, EIGHT_BIT | EIGHT_BIT_BLOCKS) {
        return &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[inputs.start / 4..][..fours];
    }
    unpack::<CODES>(tile, panel, inputs.start, &mut unpacked.0[..fours])
}

/// Writes the codes of inputs `from..` of a panel as signed bytes, steps included: as many inputs as `to` has room for, a
/// multiple of 8.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<'a, const CODES: u8>(
    tile: &IntegerTile<'_>,
    panel: usize,
    from: usize,
    to: &'a mut [MaybeUninit<[u8; 64]>],
) -> &'a [[u8; 64]] {
    let codes = &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[from / 8..];
    let blocks = tile.k / tile.block;
    let mut zero = match (CODES, tile.offset) {
        (FOUR_BIT_BLOCKS, BlockOffset::Integer | BlockOffset::Min) => _mm512_setzero_si512(),
        _ => _mm512_set1_epi8(8),
    };
    let (low_mask, mut step) = (_mm512_set1_epi8(15), _mm512_set1_epi16(1));
    assert!(to.len() <= codes.len() * 2 && to.len().is_multiple_of(2));
    for (i, (pair, codes)) in to.as_chunks_mut::<2>().0.iter_mut().zip(codes).enumerate() {
        let k = from + i * 8;
        if CODES == FOUR_BIT_STEPS && (i == 0 || k.is_multiple_of(tile.block)) {
            let steps = load_i8(&tile.offsets[(panel * blocks + k / tile.block) * PANEL..]);
            step = _mm512_or_si512(steps, _mm512_slli_epi32::<16>(steps));
            zero = _mm512_slli_epi16::<3>(step);
            zero = _mm512_or_si512(zero, _mm512_slli_epi16::<8>(zero));
        }
        let codes = load_bytes(codes);
        let nibbles = [_mm512_and_si512(codes, low_mask), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_mask)];
        for (to, mut nibbles) in pair.iter_mut().zip(nibbles) {
            if CODES == FOUR_BIT_STEPS {
                // At most 240: the product of the lower byte does not reach the upper one.
                nibbles = _mm512_mullo_epi16(nibbles, step);
            }
            // SAFETY: 64 bytes, unaligned.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_sub_epi8(nibbles, zero)) };
        }
    }
    // SAFETY: the loop wrote every element, as the assertion says.
    unsafe { to.assume_init_ref() }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(from: &[i32; PANEL]) -> __m512i {
    // SAFETY: 64 bytes, unaligned.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Unpacked weights.
#[repr(align(64))]
struct Unpacked([MaybeUninit<[u8; 64]>; PIECE / 4]);

impl Unpacked {
    #[inline]
    fn uninit() -> Self {
        Self([const { MaybeUninit::uninit() }; PIECE / 4])
    }
}

/// How the codes lie.
const EIGHT_BIT: u8 = 0;
const FOUR_BIT: u8 = 1;
const FOUR_BIT_STEPS: u8 = 2;
const EIGHT_BIT_BLOCKS: u8 = 3;
const FOUR_BIT_BLOCKS: u8 = 4;

/// Inputs that are unpacked at a time: 32 KiB.
const PIECE: usize = 2048;

/// With fewer rows the tiles are too empty. Not measured yet: no such CPU was at hand.
const MIN_ROWS: usize = 4;
