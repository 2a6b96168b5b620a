//! Matrix products of one tile of the output, in tiles of the unit.
//!
//! ```text
//! for each two panels, for each piece of k (as many inputs as stay in the first cache, unpacked to signed bytes):
//!     for each 16 rows:
//!         sums += x · weights, floats after the last piece
//! ```
//! Two panels share the loads of x, two planes (or 16 rows and the next) those of weights. Sums stay in the tiles over all of k, or
//! over a piece of it: weights with a scale per output are bytes as they are, those with a scale per block become two.

mod branch;
mod finish;
mod grid;
mod product;
mod unpack;
mod wide;

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::insn::{Shapes, TileUnit};
use crate::arch::x86_64::{ask_for as ask_for_line, avx512_vnni};
use crate::kernels::{IntegerTile, RowsMut};
use crate::matmul::Write;
use crate::packed::PANEL;
use crate::scratch::Disjoint;

macro_rules! products {
    ($codes:ident, $module:ident, $fits:ident, $into_buffer:ident, $straight:ident, $silu:ident) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $into_buffer<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
            if !$fits(tile) {
                return avx512_vnni::matmul::$into_buffer(tile, out);
            }
            $module::product::<U, $codes, false>([tile; 2], &in_buffer(tile, &Disjoint::new(out)));
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $straight<U: TileUnit>(tile: &IntegerTile<'_>, to: &RowsMut<'_>) {
            $module::product::<U, $codes, false>([tile; 2], to);
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $silu<U: TileUnit>(tiles: [&IntegerTile<'_>; 2], to: &RowsMut<'_>) {
            $module::product::<U, $codes, true>(tiles, to);
        }
    };
}

products!(EIGHT_BIT, product, fits_channels, q_w8c, q_w8c_straight, silu_w8c);
products!(FOUR_BIT, product, fits_channels, q_w4c, q_w4c_straight, silu_w4c);
products!(FOUR_BIT_STEPS, product, fits_channels, q_w4e, q_w4e_straight, silu_w4e);
products!(EIGHT_BIT_BLOCKS, wide, tile_fits_blocks, q_w8b, q_w8b_straight, silu_w8b);
products!(SIX_BIT_BLOCKS, wide, tile_fits_blocks, q_w6b, q_w6b_straight, silu_w6b);
products!(FIVE_BIT_BLOCKS, wide, tile_fits_blocks, q_w5b, q_w5b_straight, silu_w5b);
products!(FOUR_BIT_BLOCKS, wide, tile_fits_blocks, q_w4b, q_w4b_straight, silu_w4b);

/// Whether tiles are worth it for weights with a scale per output.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn fits_channels(tile: &IntegerTile<'_>) -> bool {
    tile.rows >= MIN_ROWS && tile.width == PANEL && tile_fours(tile.k) >= MIN_FOURS
}

/// Whether they are worth it for so many rows, in the whole product, of `k` inputs, if weights have a scale per block. As weights are
/// rounded then, the answer must not depend on how the output is cut.
pub(crate) fn fits_blocks(all_rows: usize, k: usize) -> bool {
    all_rows >= MIN_WIDE_ROWS && tile_fours(k) >= MIN_FOURS
}

/// The same for a tile of the product.
fn tile_fits_blocks(tile: &IntegerTile<'_>) -> bool {
    fits_blocks(tile.all_rows, tile.k)
}

/// Whether what a branch of such a rank adds to rows of `k` inputs can be multiplied beside them.
pub(crate) fn fits_branch(k: usize, rank: usize) -> bool {
    branch::fits(k, rank)
}

/// The rows of a tile side by side, as a kernel leaves them that knows no other place.
fn in_buffer<'a>(tile: &IntegerTile<'_>, out: &'a Disjoint<'a, f32>) -> RowsMut<'a> {
    let columns = tile.panels * PANEL;
    RowsMut { out, first: 0, stride: columns, columns, write: Write::Store }
}

/// Groups of four inputs in a tile: as many as fit and divide `inputs`.
fn tile_fours(inputs: usize) -> usize {
    (1..=16).rev().find(|fours| (inputs / 4).is_multiple_of(*fours)).unwrap_or(1)
}

/// Shapes registers 0 to 3 for sums, 4 and 5 for `height` rows of x, 6 and 7 for weights of as many groups of four inputs.
///
/// # Safety
/// The unit may be used.
unsafe fn configure<U: TileUnit>(unit: &mut U, height: usize, fours: usize) {
    let (sum, x, weights) = ((height, PANEL * 4), (height, fours * 4), (fours, 64));
    // SAFETY: the caller's promise.
    unsafe { unit.configure(&Shapes::new([sum, sum, sum, sum, x, x, weights, weights])) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(from: &[i32; PANEL]) -> __m512i {
    // SAFETY: 64 bytes, unaligned.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// The order that [`times_256`] moves bytes in.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes_up() -> __m512i {
    _mm512_set4_epi32(0x0e0d_0c80, 0x0a09_0880, 0x0605_0480, 0x0201_0080)
}

/// Each 32-bit value times 256, modulo 2³²: `up`, of [`bytes_up`], moves each byte up by one. Shifts have but one port, the one
/// that floats need; the compiler would make a shift of the intrinsic.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn times_256(x: __m512i, up: __m512i) -> __m512i {
    let result;
    // SAFETY: avx512bw is on, registers only.
    unsafe {
        asm!("vpshufb {}, {}, {}", lateout(zmm_reg) result, in(zmm_reg) x, in(zmm_reg) up,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// Inputs of a piece of `k`: pieces of one length but for the last, whole tiles of `fours` groups and multiples of `step`, at most
/// `most`.
fn piece_inputs(k: usize, fours: usize, step: usize, most: usize) -> usize {
    let tile = fours * 4;
    let whole = (tile..).step_by(tile).find(|inputs| inputs.is_multiple_of(step)).unwrap_or(tile);
    k.div_ceil(k.div_ceil(most)).next_multiple_of(whole).min(most / whole * whole)
}

/// The first of `inputs` in both planes of a tile's x, or twice in the only one. The tile's rows are seen to be inside.
#[inline(always)]
fn x_planes<const PLANES: usize>(tile: &IntegerTile<'_>, inputs: &Range<usize>) -> [*const u8; 2] {
    let all = inputs.start..(tile.rows - 1) * tile.x_stride + inputs.end;
    let hi = tile.hi[all.clone()].as_ptr();
    let lo = if PLANES == 2 { tile.lo[all].as_ptr() } else { hi };
    [hi.cast(), lo.cast()]
}

/// Where the next codes of both panels lie, to come to the second cache while these are multiplied by all rows, and how many lines of
/// them are asked for with each step. (All of 16 rows' at once were so many that the core waited for them: that cost long rows a tenth
/// to a third of their time.)
struct CodesAhead {
    next: [*const u8; PANELS],
    lines: usize,
}

impl CodesAhead {
    /// For `inputs` of a pair of panels, which may be beyond the last; a step has `fours` groups of four inputs.
    #[inline(always)]
    fn new(pair: [(&IntegerTile<'_>, usize); PANELS], inputs: Range<usize>, fours: usize) -> Self {
        let tile = pair[0].0;
        let [from, bytes] = [inputs.start, inputs.len()].map(|inputs| tile.panel_bytes * inputs / tile.k);
        let steps = inputs.len() / (fours * 4) * tile.rows.div_ceil(ROWS);
        let lines = if tile.rows > ROWS { bytes.div_ceil(64).div_ceil(steps).min(MAX_LINES) } else { 0 };
        let next = pair.map(|(tile, panel)| tile.codes.as_ptr().wrapping_add(panel * tile.panel_bytes + from));
        Self { next, lines }
    }

    /// Asks for the next lines of `W` panels, wherever they are.
    #[inline(always)]
    fn ask_for_some<const W: usize>(&mut self) {
        for next in &mut self.next[..W] {
            for _ in 0..self.lines {
                ask_for_line(*next);
                *next = next.wrapping_add(64);
            }
        }
    }
}

/// How the codes lie.
const EIGHT_BIT: u8 = 0;
const FOUR_BIT: u8 = 1;
const FOUR_BIT_STEPS: u8 = 2;
const EIGHT_BIT_BLOCKS: u8 = 3;
const SIX_BIT_BLOCKS: u8 = 4;
const FIVE_BIT_BLOCKS: u8 = 5;
const FOUR_BIT_BLOCKS: u8 = 6;

/// Rows of a tile.
const ROWS: usize = 16;

/// With fewer rows the tiles are too empty.
const MIN_ROWS: usize = 4;

/// Rows of a product that are worth making weights of 16 bits.
const MIN_WIDE_ROWS: usize = 16;

/// Lines of a panel that are asked for with a step at most. Few rows have to do with a part: more would make them wait.
const MAX_LINES: usize = 2;

/// Narrower tiles are too empty.
const MIN_FOURS: usize = 4;

/// Panels that are computed together.
const PANELS: usize = 2;
