//! Weights with a scale per block: the sums of a block leave the tiles before those of the next.
//!
//! ```text
//! for each 16 rows, for each panel, floats in vector registers:
//!     for each block, in turns: tiles of the third block from here; sums of the second to memory;
//!                               floats += scale · sums of this one
//! ```
//! The unit works on later blocks, also those of the next panel or rows, while the vector registers take in this one. Next to it
//! one of the two ports for vectors computes no floats: what need not be floats is done as bytes or integers.

use std::arch::x86_64::*;
use std::ops::Range;
use std::ptr;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, ask_for, ask_for_line, bytes_up, configure, load_sums, tile_fours, times_256};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::{load_f16, load_i8, store};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, MAX_BLOCK, PANEL};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match (tile.offset, tile.lo.is_empty()) {
        (BlockOffset::Symmetric, true) => panels::<U, CODES, SYMMETRIC, 1>(tile, out),
        (BlockOffset::Symmetric, false) => panels::<U, CODES, SYMMETRIC, 2>(tile, out),
        (BlockOffset::Integer, true) => panels::<U, CODES, INTEGER, 1>(tile, out),
        (BlockOffset::Integer, false) => panels::<U, CODES, INTEGER, 2>(tile, out),
        (BlockOffset::Min, true) => panels::<U, CODES, MIN, 1>(tile, out),
        (BlockOffset::Min, false) => panels::<U, CODES, MIN, 2>(tile, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panels<U: TileUnit, const CODES: u8, const OFFSET: u8, const PLANES: usize>(
    tile: &IntegerTile<'_>,
    out: &mut [f32],
) {
    let mut unit = U::default();
    let mut unpacked = Unpacked::uninit();
    let mut buffers = Buffers::zeroed();
    let (tile_blocks, step) = (tile.k / tile.block, tile_fours(tile.block));
    let piece = (PIECE / tile.block).min(MAX_BLOCKS);
    for panel in (0..tile.panels).step_by(PANELS) {
        let n_panels = PANELS.min(tile.panels - panel);
        for from in (0..tile_blocks).step_by(piece) {
            let blocks = from..tile_blocks.min(from + piece);
            let inputs = blocks.start * tile.block..blocks.end * tile.block;
            let weights = unpacked.fill::<CODES>(&[(tile, panel), (tile, panel + 1)], n_panels, inputs);
            // The unit has one height at a time.
            let whole = tile.rows / ROWS * ROWS;
            for rows in [0..whole, whole..tile.rows] {
                if rows.is_empty() {
                    continue;
                }
                let height = ROWS.min(rows.len());
                // SAFETY: a table with this unit exists only where it may be used.
                unsafe { configure(&mut unit, height, step) };
                let (blocks, weights) = (blocks.clone(), &weights[..n_panels]);
                let product = Product { tile, panel, rows, height, step, tile_blocks, blocks, weights };
                product.run::<U, OFFSET, PLANES>(&mut unit, &mut buffers, out);
            }
        }
    }
}

/// Some blocks of some rows and of one panel or two.
struct Product<'a> {
    tile: &'a IntegerTile<'a>,
    panel: usize,
    /// As many times the height as they are.
    rows: Range<usize>,
    /// Rows that the unit is shaped for.
    height: usize,
    /// Groups of four inputs that a tile holds.
    step: usize,
    /// Blocks of a whole row, and which of them these are.
    tile_blocks: usize,
    blocks: Range<usize>,
    /// Signed bytes of these blocks, `[k/4][16][4]`, of each panel.
    weights: &'a [&'a [[u8; 64]]],
}

impl Product<'_> {
    /// Σx of each of some rows and each block, as floats where they meet minima.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn load_x_sums<const OFFSET: u8>(&self, row: usize, to: &mut [[i32; MAX_BLOCKS]; ROWS]) {
        for (i, to) in to.iter_mut().enumerate().take(self.height) {
            let from = &self.tile.sums[(row + i) * self.tile_blocks..][self.blocks.clone()];
            for (to, from) in to.as_chunks_mut::<PANEL>().0.iter_mut().zip(from.chunks(PANEL)) {
                let mask = u16::MAX >> (PANEL - from.len());
                // SAFETY: the mask has a bit for each value of the chunk, and `to` has sixteen; unaligned.
                unsafe {
                    let mut sums = _mm512_maskz_loadu_epi32(mask, from.as_ptr());
                    if OFFSET == MIN {
                        sums = _mm512_castps_si512(_mm512_cvtepi32_ps(sums));
                    }
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), sums);
                }
            }
        }
    }

    /// Adds the blocks to the floats in `out`, which the first block stores and the last one scales.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn run<U: TileUnit, const OFFSET: u8, const PLANES: usize>(
        &self,
        unit: &mut U,
        buffers: &mut Buffers,
        out: &mut [f32],
    ) {
        let (tile, n) = (self.tile, self.blocks.len());
        assert!(n <= MAX_BLOCKS);
        let mut ahead = self.ahead::<PLANES>();
        // SAFETY: `panels` configured the unit for this height and step; `ahead` knows what it has left.
        unsafe {
            ahead.block::<U, 0, PLANES>(unit);
            ahead.block::<U, 1, PLANES>(unit);
            store_hi::<U, 0>(unit, &mut buffers.sums[0]);
            store_lo::<U, 0, PLANES>(unit, &mut buffers.sums[0]);
            ahead.block::<U, 0, PLANES>(unit);
            store_hi::<U, 1>(unit, &mut buffers.sums[1]);
            store_lo::<U, 1, PLANES>(unit, &mut buffers.sums[1]);
        }
        let up = bytes_up();
        let is_last = self.blocks.end * tile.block == tile.k;
        // Blocks of all rows and panels before the current one.
        let mut before = 0_usize;
        let mut next = self.next_codes();
        for row in self.rows.clone().step_by(self.height) {
            if OFFSET != SYMMETRIC {
                self.load_x_sums::<OFFSET>(row, &mut buffers.x_sums);
            }
            self.ask_for_next_scales::<OFFSET>(row);
            for panel in (self.panel..).take(self.weights.len()) {
                let first = panel * self.tile_blocks + self.blocks.start;
                let scales = &tile.scales.as_chunks::<{ PANEL * 2 }>().0[first..][..n];
                let offsets = if OFFSET == INTEGER { &tile.offsets.as_chunks::<PANEL>().0[first..][..n] } else { &[] };
                let mins = if OFFSET == MIN { &tile.offsets.as_chunks::<{ PANEL * 2 }>().0[first..][..n] } else { &[] };
                let at = |i: usize| ((row + i) * tile.panels + panel) * PANEL;
                let mut acc = [_mm512_setzero_ps(); ROWS];
                if self.blocks.start > 0 {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = load(&out[at(i.min(self.height - 1))..]);
                    }
                }
                // The `block`th block. `$set` has the sums of the second block from here, `$other` gets those of the third.
                macro_rules! step {
                    ($block:expr, $set:literal, $other:literal) => {{
                        let block = $block;
                        let (this, second) = (before % RING, (before + 2) % RING);
                        let scale = load_f16(&scales[block]);
                        let offset = if OFFSET == INTEGER { load_i8(&offsets[block]) } else { _mm512_setzero_si512() };
                        let min = if OFFSET == MIN { load_f16(&mins[block]) } else { _mm512_setzero_ps() };
                        // Rows beyond the height get what does not matter. Written out: the floats stay in registers only if the
                        // compiler sees every index.
                        macro_rules! add {
                            ($row:expr) => {{
                                let [hi, lo] = &buffers.sums[this];
                                let mut dot = load_sums(&hi[$row]);
                                if PLANES == 2 {
                                    dot = _mm512_add_epi32(times_256(dot, up), load_sums(&lo[$row]));
                                }
                                let sum = buffers.x_sums[$row][block];
                                if OFFSET == INTEGER {
                                    dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(offset, _mm512_set1_epi32(sum)));
                                }
                                acc[$row] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), acc[$row]);
                                if OFFSET == MIN {
                                    let sum = _mm512_set1_ps(f32::from_bits(sum.cast_unsigned()));
                                    acc[$row] = _mm512_fmadd_ps(min, sum, acc[$row]);
                                }
                            }};
                            ($first:expr, four) => {{
                                add!($first);
                                add!($first + 1);
                                add!($first + 2);
                                add!($first + 3);
                            }};
                        }
                        if next.start < next.end {
                            ask_for_line(next.start);
                            next.start = next.start.wrapping_add(64);
                        }
                        // SAFETY: as above.
                        unsafe {
                            ahead.start::<U, $other>(unit);
                            add!(0, four);
                            ahead.finish::<U, $other, PLANES>(unit);
                            add!(4, four);
                            store_hi::<U, $set>(unit, &mut buffers.sums[second]);
                            add!(8, four);
                            store_lo::<U, $set, PLANES>(unit, &mut buffers.sums[second]);
                            add!(12, four);
                        }
                    }};
                }
                for block in 0..n {
                    if before.is_multiple_of(2) {
                        step!(block, 0, 1)
                    } else {
                        step!(block, 1, 0)
                    }
                    before += 1;
                }
                macro_rules! finish {
                    ($($row:literal)*) => {$(
                        if $row < self.height {
                            let factor = if is_last { tile.x_scales[row + $row] } else { 1.0 };
                            store(&mut out[at($row)..], _mm512_mul_ps(acc[$row], _mm512_set1_ps(factor)));
                        }
                    )*};
                }
                finish!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
        }
    }

    /// A part of the next panels' codes, as large as these blocks are of all. Asked for line by line it comes to the second cache
    /// while the unit multiplies, and unpacking need not wait. (At once for 16 rows, that took two thirds of what it saved.)
    fn next_codes(&self) -> Range<*const u8> {
        let (tile, n_panels) = (self.tile, self.weights.len());
        if tile.rows <= ROWS {
            return ptr::null()..ptr::null();
        }
        let place = |block: usize| {
            let before = (self.panel + PANELS) * tile.panel_bytes;
            tile.codes.as_ptr().wrapping_add(before + n_panels * tile.panel_bytes * block / self.tile_blocks)
        };
        place(self.blocks.start)..place(self.blocks.end)
    }

    /// Asks for as much of the next panels' scales and offsets as the rows from `row` on are of all rows.
    fn ask_for_next_scales<const OFFSET: u8>(&self, row: usize) {
        let tile = self.tile;
        let offset_bytes = match OFFSET {
            SYMMETRIC => 0,
            INTEGER => 1,
            _ => 2,
        };
        if tile.rows > ROWS && self.blocks.start == 0 {
            for (section, value_bytes) in [(tile.scales, 2), (tile.offsets, offset_bytes)] {
                let bytes = self.tile_blocks * PANEL * value_bytes;
                let part = |row: usize| (self.panel + PANELS) * bytes + self.weights.len() * bytes * row / tile.rows;
                ask_for(section, part(row)..part(row + self.height));
            }
        }
    }

    /// What the unit has to do. Every block is seen to be inside.
    fn ahead<const PLANES: usize>(&self) -> Ahead {
        let tile = self.tile;
        let (blocks, fours) = (self.blocks.len(), tile.block / 4);
        let first = self.rows.start * tile.x_stride + self.blocks.start * tile.block;
        let x = first..first + (self.rows.len() - 1) * tile.x_stride + blocks * tile.block;
        let hi = tile.hi[x.clone()].as_ptr().cast();
        let lo = if PLANES == 2 { tile.lo[x].as_ptr().cast() } else { hi };
        let weights = |panel: usize| self.weights[panel][..blocks * fours].as_ptr().cast::<u8>();
        let last = self.weights.len() - 1;
        Ahead {
            x: [hi, lo],
            weights: weights(0),
            left: blocks,
            x_stride: tile.x_stride,
            fours,
            step: self.step,
            blocks,
            panels: [weights(0), weights(last)],
            is_last_panel: last == 0,
            n_panels: last + 1,
            next_rows: self.height * tile.x_stride,
            runs: self.rows.len() / self.height * (last + 1),
        }
    }
}

/// What the unit has not begun, in order: blocks of some rows and a panel, of these rows and the next panel, of the next rows.
struct Ahead {
    /// The next block, in both planes of the first row and in the panel.
    x: [*const u8; 2],
    weights: *const u8,
    /// Blocks that are left of these rows and this panel. 0 if nothing is left.
    left: usize,
    x_stride: usize,
    /// Groups of four inputs of a block, and in a tile.
    fours: usize,
    step: usize,
    /// Blocks of a row.
    blocks: usize,
    panels: [*const u8; PANELS],
    is_last_panel: bool,
    n_panels: usize,
    /// Bytes from a row to that of the next tile.
    next_rows: usize,
    /// Pairs of rows and panel that are left, these included.
    runs: usize,
}

impl Ahead {
    /// The sums of the next block in both planes.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    #[inline(always)]
    unsafe fn block<U: TileUnit, const SET: usize, const PLANES: usize>(&mut self, unit: &mut U) {
        // SAFETY: the caller's promise.
        unsafe {
            self.start::<U, SET>(unit);
            self.finish::<U, SET, PLANES>(unit);
        }
    }

    /// The sums of the next block in the first plane, in the registers of set `SET`; those of the second are cleared. Nothing if
    /// none is left.
    ///
    /// # Safety
    /// The unit is configured for the height of x and the step, which divides a block.
    #[inline(always)]
    unsafe fn start<U: TileUnit, const SET: usize>(&self, unit: &mut U) {
        if self.left == 0 {
            return;
        }
        let mut at = 0;
        // SAFETY: the caller's promise; `Product::ahead` saw that all that is left is inside.
        unsafe {
            if SET == 0 {
                unit.zero::<0>();
                unit.zero::<1>();
            } else {
                unit.zero::<2>();
                unit.zero::<3>();
            }
            loop {
                unit.load::<4>(self.x[0].add(at * 4), self.x_stride);
                if SET == 0 {
                    unit.load::<6>(self.weights.add(at * 64), 64);
                    unit.dot::<0, 4, 6>();
                } else {
                    unit.load::<7>(self.weights.add(at * 64), 64);
                    unit.dot::<2, 4, 7>();
                }
                at += self.step;
                if at >= self.fours {
                    break;
                }
            }
        }
    }

    /// The sums of the next block in the second plane, if there are two; goes on to the block after it.
    ///
    /// # Safety
    /// As [`start`](Self::start), which was the last call. It has loaded the weights if a block is one tile.
    #[inline(always)]
    unsafe fn finish<U: TileUnit, const SET: usize, const PLANES: usize>(&mut self, unit: &mut U) {
        if self.left == 0 {
            return;
        }
        if PLANES == 2 {
            let mut at = 0;
            // SAFETY: as in `start`.
            unsafe {
                loop {
                    unit.load::<5>(self.x[1].add(at * 4), self.x_stride);
                    if at > 0 || self.step < self.fours {
                        let weights = self.weights.add(at * 64);
                        if SET == 0 { unit.load::<6>(weights, 64) } else { unit.load::<7>(weights, 64) }
                    }
                    if SET == 0 {
                        unit.dot::<1, 5, 6>()
                    } else {
                        unit.dot::<3, 5, 7>()
                    }
                    at += self.step;
                    if at >= self.fours {
                        break;
                    }
                }
            }
        }
        self.left -= 1;
        let mut forward = self.fours * 4;
        self.weights = self.weights.wrapping_add(self.fours * 64);
        if self.left == 0 && self.runs > 1 {
            (self.runs, self.left) = (self.runs - 1, self.blocks);
            forward = forward.wrapping_sub(self.blocks * self.fours * 4);
            if self.is_last_panel {
                forward = forward.wrapping_add(self.next_rows);
            }
            self.weights = if self.is_last_panel { self.panels[0] } else { self.panels[1] };
            self.is_last_panel = self.n_panels == 1 || !self.is_last_panel;
        }
        self.x = [self.x[0].wrapping_add(forward), self.x[1].wrapping_add(forward)];
    }
}

/// Stores the first plane's register of set `SET`.
///
/// # Safety
/// The unit is configured.
#[inline(always)]
unsafe fn store_hi<U: TileUnit, const SET: usize>(unit: &mut U, [hi, _]: &mut [SumTile; 2]) {
    let hi = hi.as_mut_ptr().cast();
    // SAFETY: the caller's promise; a plane has room for 16 rows.
    unsafe { if SET == 0 { unit.store::<0>(hi, 64) } else { unit.store::<2>(hi, 64) } }
}

/// Stores the second plane's register of set `SET`, if there are two.
///
/// # Safety
/// The unit is configured.
#[inline(always)]
unsafe fn store_lo<U: TileUnit, const SET: usize, const PLANES: usize>(unit: &mut U, [_, lo]: &mut [SumTile; 2]) {
    if PLANES != 2 {
        return;
    }
    let lo = lo.as_mut_ptr().cast();
    // SAFETY: as above.
    unsafe { if SET == 0 { unit.store::<1>(lo, 64) } else { unit.store::<3>(lo, 64) } }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32]) -> __m512 {
    // SAFETY: the slice has sixteen values (checked here), unaligned.
    unsafe { _mm512_loadu_ps(from[..PANEL].as_ptr()) }
}

/// The sums of a block in both planes, those of the two after it, and the sums of x.
#[repr(align(64))]
struct Buffers {
    sums: [[SumTile; 2]; RING],
    x_sums: [[i32; MAX_BLOCKS]; ROWS],
}

impl Buffers {
    fn zeroed() -> Self {
        Self { sums: [[[[0; PANEL]; ROWS]; 2]; RING], x_sums: [[0; MAX_BLOCKS]; ROWS] }
    }
}

/// Blocks whose sums are in memory, and one: a power of two.
const RING: usize = 4;

/// Blocks of a piece.
const MAX_BLOCKS: usize = 64;

const _: () = assert!(MAX_BLOCK <= PIECE);
