//! Weights with a scale per block, for many rows: integers of 16 bits on one [grid](super::grid) per output, in two planes of bytes.
//!
//! ```text
//! w ≈ unit · (256 · high + low)
//! x · w ≈ x_scale · unit · 256 · (256 · Σ hi·high + Σ (hi·low + lo·high))       of 16-bit x, without Σ lo·low
//!         x_scale · unit · (256 · Σ hi·high + Σ hi·low)                         of 8-bit x
//! ```
//! So sums stay in the tiles over all of k, or over a piece of it. If they had to leave them for each block, products would take twice
//! the time and more.

use std::ops::Range;

use super::branch::{Branches, Room};
use super::finish::{MAX_SUMS, PairSums, PairWriter, Sums, Writer};
use super::grid::{Planes, WeightGrid};
use super::{CodesAhead, PANELS, ROWS, configure, piece_inputs, tile_fours, x_planes};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::kernels::{IntegerTile, RowsMut};
use crate::packed::PANEL;

/// Writes the products of x with a tile's weights to their places or, of gate and up, `silu(gate) · up`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8, const GATED: bool>(
    tiles: [&IntegerTile<'_>; PANELS],
    to: &RowsMut<'_>,
) {
    let mut room = Room::uninit();
    let mut product = Product {
        unit: U::default(),
        writer: Writer::<GATED>::new(tiles, to),
        branches: Branches::new(tiles, &mut room),
        fours: tile_fours(tiles[0].k),
        height: 0,
        sums: Sums::uninit(),
    };
    match tiles[0].lo.is_empty() {
        true => product.run::<CODES, 1>(),
        false => product.run::<CODES, 2>(),
    }
}

/// The product of a tile of the output, with what goes on from one pair of panels to the next.
struct Product<'a, U, const GATED: bool> {
    unit: U,
    writer: Writer<'a, GATED>,
    branches: Option<Branches<'a>>,
    /// Groups of four inputs in a tile of the unit.
    fours: usize,
    /// Rows that the registers are shaped for.
    height: usize,
    sums: Sums<MAX_SUMS>,
}

impl<U: TileUnit, const GATED: bool> Product<'_, U, GATED> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn run<const CODES: u8, const PLANES: usize>(&mut self) {
        let mut planes = Planes::uninit();
        let tile = self.writer.tiles[0];
        let piece = piece_inputs(tile.k, self.fours, Planes::inputs_step::<CODES>(), Planes::INPUTS);
        for panel in (0..tile.panels).step_by(Writer::<GATED>::PANELS) {
            let (n_panels, pair) = self.writer.pair(panel);
            if let Some(branches) = &mut self.branches {
                branches.set_panels(pair.map(|(_, panel)| panel));
            }
            let grids = pair.map(|(tile, panel)| WeightGrid::new::<CODES>(tile, panel));
            let scales = grids.each_ref().map(|grid| grid.scale::<PLANES>());
            let writer = self.writer.of_pair(panel, scales);
            for from in (0..tile.k).step_by(piece) {
                let inputs = from..tile.k.min(from + piece);
                let weights = planes.fill::<CODES>(&grids[..n_panels], inputs.clone());
                let ahead = pair.map(|(tile, panel)| (tile, panel + Writer::<GATED>::PANELS));
                let ahead = CodesAhead::new(ahead, inputs.clone(), self.fours);
                self.rows::<PLANES>(&writer, inputs, weights, ahead);
            }
        }
    }

    /// All rows by a piece of a pair of panels, of which the second may be the first again.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const PLANES: usize>(
        &mut self,
        writer: &PairWriter<'_, GATED>,
        inputs: Range<usize>,
        weights: [[*const u8; 2]; PANELS],
        mut ahead: CodesAhead,
    ) {
        let tile = self.writer.tiles[0];
        let (is_first, is_last) = (inputs.start == 0, inputs.end == tile.k);
        let planes = x_planes::<PLANES>(tile, &inputs);
        for row in (0..tile.rows).step_by(ROWS) {
            let height = ROWS.min(tile.rows - row);
            if self.height != height {
                self.height = height;
                // SAFETY: a table with this unit exists only where it may be used.
                unsafe { configure(&mut self.unit, height, self.fours) };
            }
            // Where the sums do not have to wait for another piece they stay in the first cache.
            let slot = if is_first && is_last { 0 } else { row / ROWS * 2 };
            let x = planes.map(|plane| plane.wrapping_add(row * tile.x_stride));
            let step = self.fours * 4;
            let group = Group { x, stride: tile.x_stride, weights, inputs: inputs.len(), step, is_first };
            let sums = &mut self.sums.0[slot..][..2];
            // SAFETY: configured for the height and the inputs; `x_planes` saw that x holds what is read, and `fill` has written the
            // weights; the first piece stores the sums that the others load, and the last one all. Branches are only there if the
            // unit is shaped for them, see `fits_branch`.
            unsafe {
                group.multiply::<U, PLANES>(&mut self.unit, sums, &mut ahead);
                if is_last {
                    let branch = self.branches.as_mut().map(|branches| branches.multiply(&mut self.unit, row));
                    writer.write::<2>(row..row + height, sums, branch);
                }
            }
        }
    }
}

/// Some rows by a pair of panels, for a piece of k.
struct Group {
    /// The first input of x in both planes.
    x: [*const u8; 2],
    /// Bytes from one row of x to the next.
    stride: usize,
    /// High and low bytes of each panel.
    weights: [[*const u8; 2]; PANELS],
    /// Inputs of the piece, and of a tile.
    inputs: usize,
    step: usize,
    is_first: bool,
}

impl Group {
    /// Adds to `sums`, or in the first piece stores there, the products of the high bytes and, in the second plane, the mixed ones.
    ///
    /// # Safety
    /// The unit is configured for the height and the width of the tiles, and x and weights hold the piece's inputs of as many rows.
    /// But for the first piece, the sums were stored before.
    #[inline(always)]
    unsafe fn multiply<U: TileUnit, const PLANES: usize>(
        &self,
        unit: &mut U,
        sums: &mut [PairSums],
        ahead: &mut CodesAhead,
    ) {
        let [high, mixed] = [0, 1].map(|plane| [0, 1].map(|panel| sums[plane][panel].as_mut_ptr().cast::<u8>()));
        let [[high_0, low_0], [high_1, low_1]] = self.weights;
        // SAFETY: the caller's promise; each place in the sums has 16 rows.
        unsafe {
            if self.is_first {
                unit.zero::<0>();
                unit.zero::<1>();
                unit.zero::<2>();
                unit.zero::<3>();
            } else {
                unit.load::<0>(high[0], 64);
                unit.load::<1>(mixed[0], 64);
                unit.load::<2>(high[1], 64);
                unit.load::<3>(mixed[1], 64);
            }
            let mut at = 0;
            while at < self.inputs {
                let weights = at * PANEL;
                unit.load::<4>(self.x[0].add(at), self.stride);
                unit.load::<6>(high_0.add(weights), 64);
                // Products that meet the same sums have two others between them, so that none waits.
                if PLANES == 2 {
                    unit.load::<5>(self.x[1].add(at), self.stride);
                    unit.dot::<1, 5, 6>();
                }
                unit.load::<7>(low_1.add(weights), 64);
                unit.dot::<3, 4, 7>();
                unit.dot::<0, 4, 6>();
                unit.load::<7>(low_0.add(weights), 64);
                unit.dot::<1, 4, 7>();
                unit.load::<6>(high_1.add(weights), 64);
                if PLANES == 2 {
                    unit.dot::<3, 5, 6>();
                }
                unit.dot::<2, 4, 6>();
                ahead.ask_for_some::<PANELS>();
                at += self.step;
            }
            unit.store::<0>(high[0], 64);
            unit.store::<1>(mixed[0], 64);
            unit.store::<2>(high[1], 64);
            unit.store::<3>(mixed[1], 64);
        }
    }
}
