//! Weights with a scale per block: the sums of a block leave the tiles before those of the next.
//!
//! ```text
//! for each 16 rows and each panel, floats in vector registers:
//!     tiles of block 0
//!     for each block: tiles of the next one; floats += scale · sums of this one
//! ```
//! The unit works on a block while the vector registers take in the one before: each has a set of registers and of sums.

use std::arch::x86_64::*;
use std::ops::Range;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, configure, load_sums, tile_fours};
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
            let mut configured = 0;
            for row in (0..tile.rows).step_by(ROWS) {
                let height = ROWS.min(tile.rows - row);
                if configured != height {
                    configured = height;
                    // SAFETY: a table with this unit exists only where it may be used.
                    unsafe { configure(&mut unit, height, step) };
                }
                let blocks = blocks.clone();
                let mut product = Product { tile, panel, row, height, step, tile_blocks, blocks, weights: &[] };
                if OFFSET != SYMMETRIC {
                    product.load_x_sums::<OFFSET>(&mut buffers.x_sums);
                }
                for (i, weights) in weights.into_iter().enumerate().take(n_panels) {
                    (product.panel, product.weights) = (panel + i, weights);
                    product.run::<U, OFFSET, PLANES>(&mut unit, &mut buffers, out);
                }
            }
        }
    }
}

/// Some blocks of up to 16 rows and a panel.
struct Product<'a> {
    tile: &'a IntegerTile<'a>,
    panel: usize,
    row: usize,
    height: usize,
    /// Groups of four inputs that a tile holds.
    step: usize,
    /// Blocks of a whole row, and which of them these are.
    tile_blocks: usize,
    blocks: Range<usize>,
    /// Signed bytes of these blocks, `[k/4][16][4]`.
    weights: &'a [[u8; 64]],
}

impl Product<'_> {
    /// Σx of each row and block, as floats where they meet minima.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn load_x_sums<const OFFSET: u8>(&self, to: &mut [[i32; MAX_BLOCKS]; ROWS]) {
        for (row, to) in to.iter_mut().enumerate().take(self.height) {
            let from = &self.tile.sums[(self.row + row) * self.tile_blocks..][self.blocks.clone()];
            for (to, sum) in to.iter_mut().zip(from) {
                *to = if OFFSET == MIN { (*sum as f32).to_bits().cast_signed() } else { *sum };
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
        let tile = self.tile;
        let at = |row: usize| ((self.row + row) * tile.panels + self.panel) * PANEL;
        let mut acc = [_mm512_setzero_ps(); ROWS];
        if self.blocks.start > 0 {
            for (row, acc) in acc.iter_mut().enumerate() {
                *acc = load(&out[at(row.min(self.height - 1))..]);
            }
        }
        let (operands, n) = (self.operands::<PLANES>(), self.blocks.len());
        // Two blocks are under way: one in the unit, the sums of the other on their way to memory.
        // SAFETY: `panels` configured the unit for this height and step, and the operands hold all `n` blocks.
        unsafe {
            operands.multiply::<U, 0, PLANES>(unit, 0);
            if n > 1 {
                operands.multiply::<U, 1, PLANES>(unit, 1);
            }
            store_sums::<U, 0, PLANES>(unit, &mut buffers.sums[0]);
        }
        for block in 0..n {
            let set = block % 2;
            self.add::<OFFSET, PLANES>(block, &buffers.sums[set], &buffers.x_sums, &mut acc);
            // SAFETY: as above.
            unsafe {
                match (set, block + 2 < n) {
                    (0, true) => operands.multiply::<U, 0, PLANES>(unit, block + 2),
                    (1, true) => operands.multiply::<U, 1, PLANES>(unit, block + 2),
                    _ => {}
                }
                match (set, block + 1 < n) {
                    (0, true) => store_sums::<U, 1, PLANES>(unit, &mut buffers.sums[1]),
                    (1, true) => store_sums::<U, 0, PLANES>(unit, &mut buffers.sums[0]),
                    _ => {}
                }
            }
        }
        let is_last = self.blocks.end * tile.block == tile.k;
        for (row, mut acc) in acc.into_iter().enumerate().take(self.height) {
            if is_last {
                acc = _mm512_mul_ps(acc, _mm512_set1_ps(tile.x_scales[self.row + row]));
            }
            store(&mut out[at(row)..], acc);
        }
    }

    /// Where the unit reads. Every block was seen to be inside.
    fn operands<const PLANES: usize>(&self) -> Operands {
        let tile = self.tile;
        let (blocks, fours) = (self.blocks.len(), tile.block / 4);
        let first = self.row * tile.x_stride + self.blocks.start * tile.block;
        let rows = first..first + (self.height - 1) * tile.x_stride + blocks * tile.block;
        let hi = tile.hi[rows.clone()].as_ptr().cast();
        let lo = if PLANES == 2 { tile.lo[rows].as_ptr().cast() } else { hi };
        let weights = self.weights[..blocks * fours].as_ptr().cast();
        Operands { x: [hi, lo], x_stride: tile.x_stride, weights, fours, step: self.step }
    }

    /// Adds the floats of the `block`th block to those of each row. Rows beyond the height get what does not matter.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn add<const OFFSET: u8, const PLANES: usize>(
        &self,
        block: usize,
        [hi, lo]: &[SumTile; 2],
        x_sums: &[[i32; MAX_BLOCKS]; ROWS],
        acc: &mut [__m512; ROWS],
    ) {
        let tile = self.tile;
        let at = (self.panel * self.tile_blocks + self.blocks.start + block) * PANEL;
        let scale = load_f16(&tile.scales[at * 2..]);
        let offset = if OFFSET == INTEGER { load_i8(&tile.offsets[at..]) } else { _mm512_setzero_si512() };
        let min = if OFFSET == MIN { load_f16(&tile.offsets[at * 2..]) } else { _mm512_setzero_ps() };
        assert!(block < MAX_BLOCKS);
        macro_rules! row {
            ($($row:literal)*) => {$({
                let row = $row;
                let mut dot = load_sums(&hi[row]);
                if PLANES == 2 {
                    dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(dot), load_sums(&lo[row]));
                }
                let sum = x_sums[row][block];
                if OFFSET == INTEGER {
                    dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(offset, _mm512_set1_epi32(sum)));
                }
                acc[row] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), acc[row]);
                if OFFSET == MIN {
                    let sum = _mm512_set1_ps(f32::from_bits(sum.cast_unsigned()));
                    acc[row] = _mm512_fmadd_ps(min, sum, acc[row]);
                }
            })*};
        }
        // Written out: the floats stay in registers only if the compiler sees every index.
        row!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    }
}

/// What the unit reads for some blocks.
struct Operands {
    x: [*const u8; 2],
    x_stride: usize,
    weights: *const u8,
    /// Groups of four inputs of a block, and in a tile.
    fours: usize,
    step: usize,
}

impl Operands {
    /// The sums of block `block`, in the registers of set `SET`.
    ///
    /// # Safety
    /// The unit is configured for the height of x and the step, which divides a block; the block is among those that were
    /// checked.
    #[inline(always)]
    unsafe fn multiply<U: TileUnit, const SET: usize, const PLANES: usize>(&self, unit: &mut U, block: usize) {
        let [hi, lo] = self.x;
        let (mut at, end) = (block * self.fours, (block + 1) * self.fours);
        // SAFETY: the caller's promise.
        unsafe {
            if SET == 0 {
                unit.zero::<0>();
                unit.zero::<1>();
            } else {
                unit.zero::<2>();
                unit.zero::<3>();
            }
            while at < end {
                unit.load::<4>(hi.add(at * 4), self.x_stride);
                if SET == 0 {
                    unit.load::<6>(self.weights.add(at * 64), 64);
                    unit.dot::<0, 4, 6>();
                } else {
                    unit.load::<7>(self.weights.add(at * 64), 64);
                    unit.dot::<2, 4, 7>();
                }
                if PLANES == 2 {
                    unit.load::<5>(lo.add(at * 4), self.x_stride);
                    if SET == 0 { unit.dot::<1, 5, 6>() } else { unit.dot::<3, 5, 7>() }
                }
                at += self.step;
            }
        }
    }
}

/// Stores the registers of set `SET`.
///
/// # Safety
/// The unit is configured.
#[inline(always)]
unsafe fn store_sums<U: TileUnit, const SET: usize, const PLANES: usize>(unit: &mut U, [hi, lo]: &mut [SumTile; 2]) {
    let (hi, lo) = (hi.as_mut_ptr().cast(), lo.as_mut_ptr().cast());
    // SAFETY: the caller's promise; each plane has room for 16 rows.
    unsafe {
        if SET == 0 {
            unit.store::<0>(hi, 64)
        } else {
            unit.store::<2>(hi, 64)
        }
        if PLANES == 2 {
            if SET == 0 { unit.store::<1>(lo, 64) } else { unit.store::<3>(lo, 64) }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32]) -> __m512 {
    // SAFETY: the slice has sixteen values (checked here), unaligned.
    unsafe { _mm512_loadu_ps(from[..PANEL].as_ptr()) }
}

/// The sums of a block in both planes, those of the block after it, and the sums of x.
#[repr(align(64))]
struct Buffers {
    sums: [[SumTile; 2]; 2],
    x_sums: [[i32; MAX_BLOCKS]; ROWS],
}

impl Buffers {
    fn zeroed() -> Self {
        Self { sums: [[[[0; PANEL]; ROWS]; 2]; 2], x_sums: [[0; MAX_BLOCKS]; ROWS] }
    }
}

/// Blocks of a piece.
const MAX_BLOCKS: usize = 64;

const _: () = assert!(MAX_BLOCK <= PIECE);
