//! Weights with a scale per output: sums stay in the tiles over all of k, or over a piece of it.

use std::arch::x86_64::__m512;
use std::ops::Range;

use super::branch::{Branches, Room};
use super::finish::{MAX_SUMS, PairSums, PairWriter, Sums, Writer};
use super::unpack::{PIECE, Unpacked};
use super::{CodesAhead, PANELS, ROWS, configure, piece_inputs, tile_fours, x_planes};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::load_f32;
use crate::kernels::{IntegerTile, RowsMut};
use crate::packed::PANEL;

/// Writes the products of x with a tile's weights to their places or, of gate and up, `silu(gate) · up`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8, const GATED: bool>(
    tiles: [&IntegerTile<'_>; PANELS],
    to: &RowsMut<'_>,
) {
    let mut room = Room::uninit();
    match tiles[0].lo.is_empty() {
        true => Product::<U, 1, GATED>::new(tiles, to, &mut room).run::<CODES>(),
        false => Product::<U, 2, GATED>::new(tiles, to, &mut room).run::<CODES>(),
    }
}

/// The product of a tile of the output, with what goes on from one pair of panels to the next.
struct Product<'a, U, const PLANES: usize, const GATED: bool> {
    unit: U,
    writer: Writer<'a, GATED>,
    /// Of the pair that is being multiplied and of the one before, in turn.
    pairs: [PairWriter<'a, GATED>; 2],
    branches: Option<Branches<'a>>,
    /// Groups of four inputs in a tile of the unit.
    fours: usize,
    /// Rows that the registers are shaped for.
    height: usize,
    sums: Sums<MAX_SUMS>,
    /// Where all of k is one step: rows whose sums are on their way to memory. They become floats when the unit has the next to do.
    pending: Option<Finish>,
}

impl<'a, U: TileUnit, const PLANES: usize, const GATED: bool> Product<'a, U, PLANES, GATED> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn new(tiles: [&'a IntegerTile<'a>; PANELS], to: &'a RowsMut<'a>, room: &'a mut Room) -> Self {
        let fours = tile_fours(tiles[0].k);
        let (writer, branches) = (Writer::new(tiles, to), Branches::new(tiles, room));
        let pairs = [writer.of_pair(0, scales(&writer, 0)); 2];
        Self { unit: U::default(), writer, pairs, branches, fours, height: 0, sums: Sums::uninit(), pending: None }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn run<const CODES: u8>(&mut self) {
        let mut unpacked = Unpacked::uninit();
        let tile = self.writer.tiles[0];
        // Whole rows of 4-bit codes.
        let piece = piece_inputs(tile.k, self.fours, 8, PIECE);
        for (number, panel) in (0..tile.panels).step_by(Writer::<GATED>::PANELS).enumerate() {
            let (n_panels, pair) = self.writer.pair(panel);
            if number > 0 {
                self.pairs[number % 2] = self.writer.of_pair(panel, scales(&self.writer, panel));
            }
            if let Some(branches) = &mut self.branches {
                branches.set_panels(pair.map(|(_, panel)| panel));
            }
            for from in (0..tile.k).step_by(piece) {
                let inputs = from..tile.k.min(from + piece);
                let weights = unpacked.fill::<CODES>(&pair, n_panels, inputs.clone());
                let piece = Piece { number, panel, inputs, weights };
                match n_panels {
                    1 => self.rows::<1>(&piece),
                    _ => self.rows::<2>(&piece),
                }
            }
        }
        if let Some(finish) = self.pending.take() {
            // SAFETY: the sums of `pending` were stored.
            unsafe { self.finish(finish) }
        }
    }

    /// All rows by a piece of `W` panels.
    ///
    /// The unit's loads and stores take so much of what a core can begin in a cycle that a hundred plain instructions for each 16
    /// rows cost up to a tenth: as little as can be is done in the loop.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const W: usize>(&mut self, piece: &Piece<'_>) {
        let tile = self.writer.tiles[0];
        let (is_first, is_last) = (piece.inputs.start == 0, piece.inputs.end == tile.k);
        let is_one_step = self.fours * 4 == tile.k;
        let [hi, lo] = x_planes::<PLANES>(tile, &piece.inputs);
        let weights = piece.weights.map(|weights| weights[..piece.inputs.len() / 4].as_ptr().cast());
        let (_, pair) = self.writer.pair(piece.panel);
        let mut ahead = CodesAhead::new(
            pair.map(|(tile, panel)| (tile, panel + Writer::<GATED>::PANELS)),
            piece.inputs.clone(),
            self.fours,
        );
        let mut row = 0;
        while row < tile.rows {
            let height = ROWS.min(tile.rows - row);
            if self.height != height {
                self.height = height;
                // SAFETY: a table with this unit exists only where it may be used.
                unsafe { configure(&mut self.unit, height, self.fours) };
            }
            // One plane of these rows and of the next ones take the places of two planes.
            let two_heights = PLANES == 1 && tile.rows - row >= 2 * ROWS;
            let rows = if two_heights { 2 * ROWS } else { height };
            // Where the sums do not have to wait for another piece they stay in the first cache.
            let slot = match self.pending {
                Some(pending) => 2 - pending.slot,
                None if is_first && is_last => 0,
                None => row / ROWS * PLANES,
            };
            let has_x = rows == tile.rows && self.pending.is_some();
            let x0 = hi.wrapping_add(row * tile.x_stride);
            let x1 =
                if PLANES == 2 { lo } else { hi.wrapping_add(ROWS * tile.x_stride) }.wrapping_add(row * tile.x_stride);
            let x = [x0, x1];
            let (stride, inputs, step) = (tile.x_stride, piece.inputs.len(), self.fours * 4);
            let group = Group { x, stride, weights, inputs, step, is_first, has_x };
            // SAFETY: configured for the height and the inputs; `x_planes` and the slices of weights hold what is read; the first
            // piece stores the sums that the others load.
            unsafe {
                if two_heights || PLANES == 2 {
                    group.multiply::<U, 2, W>(&mut self.unit, &mut self.sums.0[slot..][..2], &mut ahead);
                } else {
                    group.multiply::<U, 1, W>(&mut self.unit, &mut self.sums.0[slot..][..1], &mut ahead);
                }
            }
            if is_last {
                let finish = Finish { pair: piece.number % 2, row, rows, slot };
                let finish = if is_one_step { self.pending.replace(finish) } else { Some(finish) };
                if let Some(finish) = finish {
                    // SAFETY: the last piece stored the sums of these rows.
                    unsafe { self.finish(finish) }
                }
            }
            row += rows;
        }
    }

    /// Makes floats of sums.
    ///
    /// # Safety
    /// The sums of all rows were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn finish(&mut self, finish: Finish) {
        let Finish { pair, row, rows, slot } = finish;
        // One plane has its second 16 rows where two have the second plane.
        for (i, row) in (row..row + rows).step_by(ROWS).enumerate() {
            let sums = &self.sums.0[slot + i..][..PLANES];
            // SAFETY: the caller's promise. Branches are only there if the unit is shaped for them, see `fits_branch`.
            unsafe {
                let branch = self.branches.as_mut().map(|branches| branches.multiply(&mut self.unit, row));
                self.pairs[pair].write::<PLANES>(row..row + ROWS.min(rows - i * ROWS), sums, branch);
            }
        }
    }
}

/// The scales of a pair's outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn scales<const GATED: bool>(writer: &Writer<'_, GATED>, panel: usize) -> [__m512; PANELS] {
    let (_, [(first, panel), (second, next)]) = writer.pair(panel);
    [load_f32(&first.scales[panel * PANEL * 4..]), load_f32(&second.scales[next * PANEL * 4..])]
}

/// Some inputs of a pair.
struct Piece<'w> {
    /// The pair, and the first of its panels.
    number: usize,
    panel: usize,
    inputs: Range<usize>,
    /// Signed bytes, `[k/4][16][4]`.
    weights: [&'w [[u8; 64]]; PANELS],
}

/// Some rows by some panels, for a piece of k.
struct Group {
    /// The first input of two tiles of x: two planes, or the rows and the next 16.
    x: [*const u8; 2],
    /// Bytes from one row of x to the next.
    stride: usize,
    weights: [*const u8; PANELS],
    /// Inputs of the piece, and of a tile.
    inputs: usize,
    step: usize,
    is_first: bool,
    /// Whether the tiles of x are the last group's, and all there are.
    has_x: bool,
}

impl Group {
    /// Adds to `sums`, or in the first piece stores there, the products of `X` tiles of x and `W` panels.
    ///
    /// # Safety
    /// The unit is configured for the height and the width of the tiles, and x and weights hold the piece's inputs of as many rows.
    /// But for the first piece, the sums were stored before.
    #[inline(always)]
    unsafe fn multiply<U: TileUnit, const X: usize, const W: usize>(
        &self,
        unit: &mut U,
        sums: &mut [PairSums],
        ahead: &mut CodesAhead,
    ) {
        let places: [*mut u8; 4] = std::array::from_fn(|i| sums[(i / 2).min(X - 1)][i % 2].as_mut_ptr().cast());
        // SAFETY: the caller's promise; each place in the sums has 16 rows.
        unsafe {
            if self.is_first {
                unit.zero::<0>();
                if W == 2 {
                    unit.zero::<1>()
                }
                if X == 2 {
                    unit.zero::<2>()
                }
                if X == 2 && W == 2 {
                    unit.zero::<3>()
                }
            } else {
                unit.load::<0>(places[0], 64);
                if W == 2 {
                    unit.load::<1>(places[1], 64)
                }
                if X == 2 {
                    unit.load::<2>(places[2], 64)
                }
                if X == 2 && W == 2 {
                    unit.load::<3>(places[3], 64)
                }
            }
            let mut at = 0;
            while at < self.inputs {
                if !self.has_x {
                    unit.load::<4>(self.x[0].add(at), self.stride);
                }
                unit.load::<6>(self.weights[0].add(at * PANEL), 64);
                unit.dot::<0, 4, 6>();
                if W == 2 {
                    unit.load::<7>(self.weights[1].add(at * PANEL), 64);
                    unit.dot::<1, 4, 7>();
                }
                if X == 2 {
                    if !self.has_x {
                        unit.load::<5>(self.x[1].add(at), self.stride);
                    }
                    unit.dot::<2, 5, 6>();
                }
                if X == 2 && W == 2 {
                    unit.dot::<3, 5, 7>()
                }
                ahead.ask_for_some::<W>();
                at += self.step;
            }
            unit.store::<0>(places[0], 64);
            if W == 2 {
                unit.store::<1>(places[1], 64)
            }
            if X == 2 {
                unit.store::<2>(places[2], 64)
            }
            if X == 2 && W == 2 {
                unit.store::<3>(places[3], 64)
            }
        }
    }
}

/// Rows of a pair of panels whose sums are on their way to memory.
#[derive(Clone, Copy)]
struct Finish {
    /// Which of the last two.
    pair: usize,
    row: usize,
    /// At most 16 of two planes, 32 of one.
    rows: usize,
    slot: usize,
}
