//! Matrix products of one tile of the output, in tiles of the unit.
//!
//! A panel of weights is what the unit wants as its second operand once its codes are signed bytes: 8-bit codes are read
//! where they lie, 4-bit codes are unpacked once for all rows. Up to four blocks of 16 rows of a plane are multiplied by
//! each tile of weights.
//!
//! ```text
//! for each panel, for each piece of k (as many inputs as are unpacked at a time):
//!     for each group of blocks: sums = 0, or what the last piece left
//!         for each 64 inputs: load weights; for each block: load x, sums += x · weights
//!         keep the sums
//!     floats from the sums
//! ```

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::insn::{Shapes, TileUnit};
use crate::arch::x86_64::avx512_vnni;
use crate::arch::x86_64::avx512_vnni::matmul::{Place, channel_finish, load_bytes, load_i8, store};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

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

/// Leaves small tiles to VNNI and cuts the others into spans of [`MAX_ROWS`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn product<U: TileUnit, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if tile.rows < MIN_ROWS || tile.width < PANEL {
        return match CODES {
            EIGHT_BIT => avx512_vnni::matmul::q_w8c(tile, out),
            FOUR_BIT => avx512_vnni::matmul::q_w4c(tile, out),
            _ => avx512_vnni::matmul::q_w4e(tile, out),
        };
    }
    let mut unit = U::default();
    for panel in 0..tile.panels {
        for first in (0..tile.rows).step_by(MAX_ROWS) {
            let rows = MAX_ROWS.min(tile.rows - first);
            span::<U, CODES>(&mut unit, tile, Span { panel, first, rows }, out);
        }
    }
    // SAFETY: a table with this unit exists only where it may be used.
    unsafe { unit.release() };
}

/// Some rows of one panel.
#[derive(Clone, Copy)]
struct Span {
    panel: usize,
    first: usize,
    rows: usize,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn span<U: TileUnit, const CODES: u8>(unit: &mut U, tile: &IntegerTile<'_>, span: Span, out: &mut [f32]) {
    let codes = &tile.codes[span.panel * tile.panel_bytes..];
    // Left as they are: filling 48 KiB would cost as much as the products of a short row.
    let mut sums = Sums([const { MaybeUninit::uninit() }; 2 * MAX_ROWS]);
    let mut unpacked = Unpacked([const { MaybeUninit::uninit() }; PIECE / 4]);
    for from in (0..tile.k).step_by(PIECE) {
        let k = PIECE.min(tile.k - from);
        let weights = match CODES {
            EIGHT_BIT => &codes.as_chunks::<64>().0[from / 4..][..k / 4],
            _ => unpack::<CODES>(tile, span.panel, from, &mut unpacked.0[..k / 4]),
        };
        piece(unit, tile, (span, from), weights, &mut sums);
    }
    let planes = if tile.lo.is_empty() { 1 } else { 2 };
    for row in 0..span.rows {
        let at = Place { panel: span.panel, row: span.first + row };
        let target = &mut out[(at.row * tile.panels + at.panel) * PANEL..];
        // SAFETY: `piece` stored the sums of every row of the span in every plane.
        let [values] = unsafe {
            match planes {
                1 => channel_finish(tile, at, [[load_sums(&sums.0[row])]]),
                _ => channel_finish(tile, at, [[load_sums(&sums.0[row]), load_sums(&sums.0[MAX_ROWS + row])]]),
            }
        };
        store(target, values);
    }
}

/// Adds to `sums` the products of the span's rows, from input `from` on, and `weights`, `[k/4][16][4]` signed bytes.
fn piece<U: TileUnit>(
    unit: &mut U,
    tile: &IntegerTile<'_>,
    (span, from): (Span, usize),
    weights: &[[u8; 64]],
    sums: &mut Sums,
) {
    let planes = if tile.lo.is_empty() { &[tile.hi][..] } else { &[tile.hi, tile.lo][..] };
    let mut row = 0;
    while row < span.rows {
        let rows = BLOCK_ROWS.min(span.rows - row);
        let n_blocks = if rows == BLOCK_ROWS { ((span.rows - row) / BLOCK_ROWS).min(4 / planes.len()) } else { 1 };
        let mut x = [tile.hi.as_ptr().cast(); 4];
        let mut at = [0; 4];
        for i in 0..n_blocks * planes.len() {
            let (block_row, plane) = (row + i / planes.len() * BLOCK_ROWS, i % planes.len());
            let first = (span.first + block_row) * tile.x_stride + from;
            // Up to the last byte that the tiles read.
            let last = first + (rows - 1) * tile.x_stride + weights.len() * 4;
            x[i] = planes[plane][first..last].as_ptr().cast();
            at[i] = plane * MAX_ROWS + block_row;
        }
        let group = Group { rows, x, x_stride: tile.x_stride, at, is_first: from == 0 };
        // SAFETY: a table with this unit exists only where it may be used. The slices above reach to the last byte of each
        // block's rows; `at + rows` rows of sums are inside the array, as the span has at most `MAX_ROWS` rows.
        unsafe {
            match n_blocks * planes.len() {
                1 => group.multiply::<U, 1>(unit, weights, sums),
                2 => group.multiply::<U, 2>(unit, weights, sums),
                3 => group.multiply::<U, 3>(unit, weights, sums),
                _ => group.multiply::<U, 4>(unit, weights, sums),
            }
        }
        row += n_blocks * rows;
    }
}

/// Blocks of x that share the loads of weights.
struct Group {
    /// Rows of each block.
    rows: usize,
    x: [*const u8; 4],
    x_stride: usize,
    /// Where in the sums each block starts, in rows.
    at: [usize; 4],
    /// Whether there are no sums yet.
    is_first: bool,
}

impl Group {
    /// # Safety
    /// The unit may be used; each of the first `N` blocks has `rows` rows of as many bytes as `weights` has inputs, and
    /// `rows` rows in `sums`.
    #[inline]
    unsafe fn multiply<U: TileUnit, const N: usize>(&self, unit: &mut U, weights: &[[u8; 64]], sums: &mut Sums) {
        let (full, cut) = (weights.len() / 16, weights.len() % 16);
        let sum = (self.rows, PANEL * 4);
        // A register without a use keeps a valid shape.
        let cut_k = cut.max(1);
        let shapes = [sum, sum, sum, sum, (self.rows, 64), (16, 64), (self.rows, cut_k * 4), (cut_k, 64)];
        // SAFETY: the caller's promise; the shapes of sums, x and weights match, for the full tiles and the cut ones.
        unsafe {
            unit.configure(&Shapes::new(shapes));
            if !self.is_first {
                self.load_sums::<U, N>(unit, sums);
            }
            for i in 0..full {
                unit.load::<5>(weights.as_ptr().add(i * 16).cast(), 64);
                self.add::<U, N, 4, 5>(unit, i * 64);
            }
            if cut > 0 {
                unit.load::<7>(weights.as_ptr().add(full * 16).cast(), 64);
                self.add::<U, N, 6, 7>(unit, full * 64);
            }
            self.store_sums::<U, N>(unit, sums);
        }
    }

    /// Adds the products of `N` blocks, from byte `from` of their rows on, and register `B`.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply), with `B` loaded.
    #[inline]
    unsafe fn add<U: TileUnit, const N: usize, const A: usize, const B: usize>(&self, unit: &mut U, from: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            unit.load::<A>(self.x[0].add(from), self.x_stride);
            unit.dot::<0, A, B>();
            if N > 1 {
                unit.load::<A>(self.x[1].add(from), self.x_stride);
                unit.dot::<1, A, B>();
            }
            if N > 2 {
                unit.load::<A>(self.x[2].add(from), self.x_stride);
                unit.dot::<2, A, B>();
            }
            if N > 3 {
                unit.load::<A>(self.x[3].add(from), self.x_stride);
                unit.dot::<3, A, B>();
            }
        }
    }

    /// Where the sums of block `i` lie.
    fn sums_of(&self, i: usize, sums: &mut Sums) -> *mut u8 {
        sums.0[self.at[i]..][..self.rows].as_mut_ptr().cast()
    }

    /// # Safety
    /// As [`multiply`](Self::multiply), and the sums were stored before.
    #[inline]
    unsafe fn load_sums<U: TileUnit, const N: usize>(&self, unit: &mut U, sums: &mut Sums) {
        // SAFETY: the caller's promise; each place has `rows` rows.
        unsafe {
            unit.load::<0>(self.sums_of(0, sums), PANEL * 4);
            if N > 1 {
                unit.load::<1>(self.sums_of(1, sums), PANEL * 4);
            }
            if N > 2 {
                unit.load::<2>(self.sums_of(2, sums), PANEL * 4);
            }
            if N > 3 {
                unit.load::<3>(self.sums_of(3, sums), PANEL * 4);
            }
        }
    }

    /// # Safety
    /// As [`multiply`](Self::multiply).
    #[inline]
    unsafe fn store_sums<U: TileUnit, const N: usize>(&self, unit: &mut U, sums: &mut Sums) {
        // SAFETY: the caller's promise; each place has `rows` rows.
        unsafe {
            unit.store::<0>(self.sums_of(0, sums), PANEL * 4);
            if N > 1 {
                unit.store::<1>(self.sums_of(1, sums), PANEL * 4);
            }
            if N > 2 {
                unit.store::<2>(self.sums_of(2, sums), PANEL * 4);
            }
            if N > 3 {
                unit.store::<3>(self.sums_of(3, sums), PANEL * 4);
            }
        }
    }
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
    let (low_mask, mut step, mut zero) = (_mm512_set1_epi8(15), _mm512_set1_epi16(1), _mm512_set1_epi8(8));
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

/// # Safety
/// The sums were stored.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_sums(from: &MaybeUninit<[i32; PANEL]>) -> __m512i {
    // SAFETY: 64 bytes, unaligned; the caller's promise.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// The planes' sums of a span, `hi` first. Aligned as the tiles' rows like it.
#[repr(align(64))]
struct Sums([MaybeUninit<[i32; PANEL]>; 2 * MAX_ROWS]);

/// Unpacked weights.
#[repr(align(64))]
struct Unpacked([MaybeUninit<[u8; 64]>; PIECE / 4]);

/// How the codes lie.
const EIGHT_BIT: u8 = 0;
const FOUR_BIT: u8 = 1;
const FOUR_BIT_STEPS: u8 = 2;

/// Rows of a tile of x.
const BLOCK_ROWS: usize = 16;

/// Rows of a span: with two planes 16 KiB of sums.
const MAX_ROWS: usize = 128;

/// Inputs that are unpacked at a time: 32 KiB.
const PIECE: usize = 2048;

/// With fewer rows the tiles are too empty. Not measured yet: no such CPU was at hand.
const MIN_ROWS: usize = 4;
