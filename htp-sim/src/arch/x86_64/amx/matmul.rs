//! Matrix products of one tile of the output, in tiles of the unit.
//!
//! ```text
//! for each two panels, for each piece of k (as many inputs as stay in the first cache, unpacked to signed bytes):
//!     for each 16 rows:
//!         a scale per output: sums += x · weights, floats after the last piece
//!         a scale per block:  for each block: sums = x · weights, floats += scale · sums
//! ```
//! Two panels share the loads of x, two planes (or 16 rows and the next) those of weights.

mod blocks;
mod channels;
mod unpack;

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::insn::{Shapes, TileUnit};
use crate::arch::x86_64::{ask_for as ask_for_line, avx512_vnni};
use crate::kernels::{IntegerTile, RowsMut};
use crate::matmul::Write;
use crate::packed::PANEL;
use crate::scratch::Disjoint;

macro_rules! channels {
    ($codes:ident, $into_buffer:ident, $straight:ident, $silu:ident) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $into_buffer<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
            if !fits_channels(tile) {
                return avx512_vnni::matmul::$into_buffer(tile, out);
            }
            channels::product::<U, $codes, false>([tile; 2], &in_buffer(tile, &Disjoint::new(out)));
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $straight<U: TileUnit>(tile: &IntegerTile<'_>, to: &RowsMut<'_>) {
            channels::product::<U, $codes, false>([tile; 2], to);
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $silu<U: TileUnit>(tiles: [&IntegerTile<'_>; 2], to: &RowsMut<'_>) {
            channels::product::<U, $codes, true>(tiles, to);
        }
    };
}

channels!(EIGHT_BIT, q_w8c, q_w8c_straight, silu_w8c);
channels!(FOUR_BIT, q_w4c, q_w4c_straight, silu_w4c);
channels!(FOUR_BIT_STEPS, q_w4e, q_w4e_straight, silu_w4e);

/// Whether tiles are worth it for weights with a scale per output.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn fits_channels(tile: &IntegerTile<'_>) -> bool {
    fits(tile, tile.k)
}

macro_rules! blocks {
    ($codes:ident, $name:ident) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub(crate) fn $name<U: TileUnit>(tile: &IntegerTile<'_>, out: &mut [f32]) {
            if !fits(tile, tile.block) {
                return avx512_vnni::matmul::$name(tile, out);
            }
            blocks::product::<U, $codes>(tile, out);
        }
    };
}

blocks!(EIGHT_BIT, q_w8b);
blocks!(SIX_BIT_BLOCKS, q_w6b);
blocks!(FIVE_BIT_BLOCKS, q_w5b);
blocks!(FOUR_BIT_BLOCKS, q_w4b);

/// The rows of a tile side by side, as a kernel leaves them that knows no other place.
fn in_buffer<'a>(tile: &IntegerTile<'_>, out: &'a Disjoint<'a, f32>) -> RowsMut<'a> {
    let columns = tile.panels * PANEL;
    RowsMut { out, first: 0, stride: columns, columns, write: Write::Store }
}

/// Whether tiles are worth it: enough rows, whole panels, and sums over `inputs` that can be cut into tiles of some width.
fn fits(tile: &IntegerTile<'_>, inputs: usize) -> bool {
    tile.rows >= MIN_ROWS && tile.width == PANEL && tile_fours(inputs) >= MIN_FOURS
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

/// Sixteen rows of sums: what a register of the unit holds.
type SumTile = [[i32; PANEL]; ROWS];

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

/// Asks for the bytes `range` behind the start of `from`, wherever they are.
fn ask_for(from: &[u8], range: Range<usize>) {
    range.step_by(64).for_each(|at| ask_for_line(from.as_ptr().wrapping_add(at)));
}

/// How the codes lie.
const EIGHT_BIT: u8 = 0;
const FOUR_BIT: u8 = 1;
const FOUR_BIT_STEPS: u8 = 2;
/// Codes as they are where there is an offset, minus 8 where there is none.
const FOUR_BIT_BLOCKS: u8 = 3;
/// The same with upper bits apart, minus 16 and 32.
const FIVE_BIT_BLOCKS: u8 = 4;
const SIX_BIT_BLOCKS: u8 = 5;

/// Rows of a tile.
const ROWS: usize = 16;

/// With fewer rows the tiles are too empty.
const MIN_ROWS: usize = 4;

/// Narrower tiles are too empty.
const MIN_FOURS: usize = 4;

/// Panels that are computed together.
const PANELS: usize = 2;
