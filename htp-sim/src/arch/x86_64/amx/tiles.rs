//! Integer sums of some rows and one panel, in tiles of the unit.
//!
//! A panel of weights is what the unit wants as its second operand once its codes are signed bytes. Up to four blocks of
//! 16 rows of a plane are multiplied by each tile of weights. A span's last rows, fewer than 16, are blocks of their own
//! height: the unit is told the height before.

use std::mem::MaybeUninit;

use super::insn::{Shapes, TileUnit};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// Some rows of one panel, at most [`MAX_ROWS`].
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) panel: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// Rows of a span in blocks of one height.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// First row, counted in the span.
    row: usize,
    height: usize,
    blocks: usize,
}

impl Span {
    /// The full blocks, and the rest as one.
    pub(super) fn parts(self) -> impl Iterator<Item = Part> {
        let (blocks, rest) = (self.rows / BLOCK_ROWS, self.rows % BLOCK_ROWS);
        let full = Part { row: 0, height: BLOCK_ROWS, blocks };
        let cut = Part { row: blocks * BLOCK_ROWS, height: rest, blocks: usize::from(rest > 0) };
        [full, cut].into_iter().filter(|part| part.blocks > 0)
    }
}

impl Part {
    /// Shapes the registers for blocks of this height by `fours · 4` inputs.
    ///
    /// # Safety
    /// The unit may be used.
    pub(super) unsafe fn configure<U: TileUnit>(self, unit: &mut U, fours: usize) {
        let sum = (self.height, PANEL * 4);
        // A register without a use keeps a valid shape.
        let cut = (fours % 16).max(1);
        let shapes = [sum, sum, sum, sum, (self.height, 64), (16, 64), (self.height, cut * 4), (cut, 64)];
        // SAFETY: the caller's promise.
        unsafe { unit.configure(&Shapes::new(shapes)) }
    }

    /// Adds to `sums`, or with `afresh` stores there, the products of the part's rows, from input `from` on, and `weights`,
    /// `[k/4][16][4]` signed bytes. Gives the rows, counted in the span, as they are done.
    ///
    /// # Safety
    /// [`configure`](Self::configure) was called for as many inputs; without `afresh` the sums were stored before.
    #[inline]
    pub(super) unsafe fn multiply<U: TileUnit>(
        self,
        unit: &mut U,
        operands: Operands<'_>,
        sums: &mut Sums,
        mut done: impl FnMut(&Sums, std::ops::Range<usize>),
    ) {
        let Operands { tile, span, from, weights, afresh } = operands;
        let planes = if tile.lo.is_empty() { &[tile.hi][..] } else { &[tile.hi, tile.lo][..] };
        let mut block = 0;
        while block < self.blocks {
            let n_blocks = (self.blocks - block).min(4 / planes.len());
            let row = self.row + block * BLOCK_ROWS;
            let mut x = [tile.hi.as_ptr().cast(); 4];
            let mut at = [0; 4];
            for i in 0..n_blocks * planes.len() {
                let (block_row, plane) = (row + i / planes.len() * BLOCK_ROWS, i % planes.len());
                let first = (span.first + block_row) * tile.x_stride + from;
                // Up to the last byte that the tiles read.
                let last = first + (self.height - 1) * tile.x_stride + weights.len() * 4;
                x[i] = planes[plane][first..last].as_ptr().cast();
                at[i] = plane * MAX_ROWS + block_row;
            }
            let group = Group { height: self.height, x, x_stride: tile.x_stride, at, afresh };
            // SAFETY: the caller's promise. The slices above reach to the last byte of each block's rows; `at + height` rows of
            // sums are inside the array, as the span has at most `MAX_ROWS` rows.
            unsafe {
                match n_blocks * planes.len() {
                    1 => group.multiply::<U, 1>(unit, weights, sums),
                    2 => group.multiply::<U, 2>(unit, weights, sums),
                    3 => group.multiply::<U, 3>(unit, weights, sums),
                    _ => group.multiply::<U, 4>(unit, weights, sums),
                }
            }
            done(sums, row..row + (n_blocks - 1) * BLOCK_ROWS + self.height);
            block += n_blocks;
        }
    }
}

/// What a part of a span is multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) tile: &'a IntegerTile<'a>,
    pub(super) span: Span,
    /// The first input of x.
    pub(super) from: usize,
    pub(super) weights: &'a [[u8; 64]],
    /// Whether there are no sums yet.
    pub(super) afresh: bool,
}

/// Blocks of x that share the loads of weights.
struct Group {
    /// Rows of each block.
    height: usize,
    x: [*const u8; 4],
    x_stride: usize,
    /// Where in the sums each block starts, in rows.
    at: [usize; 4],
    /// Whether there are no sums yet.
    afresh: bool,
}

impl Group {
    /// # Safety
    /// The unit is configured for the height and the inputs; each of the first `N` blocks has `height` rows of as many bytes
    /// as `weights` has inputs, and `height` rows in `sums`.
    #[inline]
    unsafe fn multiply<U: TileUnit, const N: usize>(&self, unit: &mut U, weights: &[[u8; 64]], sums: &mut Sums) {
        let (full, cut) = (weights.len() / 16, weights.len() % 16);
        // SAFETY: the caller's promise; the shapes of sums, x and weights match, for the full tiles and the cut ones.
        unsafe {
            if self.afresh {
                zero_sums::<U, N>(unit);
            } else {
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
        sums.0[self.at[i]..][..self.height].as_mut_ptr().cast()
    }

    /// # Safety
    /// As [`multiply`](Self::multiply), and the sums were stored before.
    #[inline]
    unsafe fn load_sums<U: TileUnit, const N: usize>(&self, unit: &mut U, sums: &mut Sums) {
        // SAFETY: the caller's promise; each place has `height` rows.
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
        // SAFETY: the caller's promise; each place has `height` rows.
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

/// # Safety
/// As [`Group::multiply`].
#[inline]
unsafe fn zero_sums<U: TileUnit, const N: usize>(unit: &mut U) {
    // SAFETY: the caller's promise.
    unsafe {
        unit.zero::<0>();
        if N > 1 {
            unit.zero::<1>();
        }
        if N > 2 {
            unit.zero::<2>();
        }
        if N > 3 {
            unit.zero::<3>();
        }
    }
}

/// The planes' sums of a span, `hi` first. Aligned as the tiles' rows like it.
///
/// Left as they are at the start: filling 16 KiB would cost as much as the products of a short row.
#[repr(align(64))]
pub(super) struct Sums([MaybeUninit<[i32; PANEL]>; 2 * MAX_ROWS]);

impl Sums {
    #[inline]
    pub(super) fn uninit() -> Self {
        Self([const { MaybeUninit::uninit() }; 2 * MAX_ROWS])
    }

    /// The sums of row `row` of the span in plane `plane`.
    ///
    /// # Safety
    /// They were stored.
    #[inline]
    pub(super) unsafe fn row(&self, plane: usize, row: usize) -> &[i32; PANEL] {
        // SAFETY: the caller's promise.
        unsafe { self.0[plane * MAX_ROWS + row].assume_init_ref() }
    }
}

/// Rows of a tile of x.
const BLOCK_ROWS: usize = 16;

/// Rows of a span: with two planes 16 KiB of sums.
pub(super) const MAX_ROWS: usize = 128;
