//! Weights with a scale per output: sums stay in the tiles over all of k, or over a piece of it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, ask_for, bytes_up, configure, load_sums, tile_fours, times_256};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::load_f32;
use crate::arch::x86_64::avx512_vnni::vector::silu;
use crate::kernels::{IntegerTile, MAX_TILE_ROWS, RowsMut};
use crate::matmul::Write;
use crate::packed::PANEL;

/// Writes the products of x with a tile's weights to their places or, of gate and up, `silu(gate) · up`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8, const GATED: bool>(
    tiles: [&IntegerTile<'_>; PANELS],
    to: &RowsMut<'_>,
) {
    match tiles[0].lo.is_empty() {
        true => Product::<U, 1, GATED>::new(tiles, to).run::<CODES>(),
        false => Product::<U, 2, GATED>::new(tiles, to).run::<CODES>(),
    }
}

/// The product of a tile of the output, with what goes on from one pair of panels to the next.
struct Product<'a, U, const PLANES: usize, const GATED: bool> {
    unit: U,
    /// Of the first panel of a pair and of the second: one and the same, or gate and up. Their x and shapes are the same.
    tiles: [&'a IntegerTile<'a>; PANELS],
    to: &'a RowsMut<'a>,
    /// Groups of four inputs in a tile of the unit.
    fours: usize,
    /// Rows that the registers are shaped for.
    height: usize,
    sums: Sums,
    /// Where all of k is one step: rows whose sums are on their way to memory. They become floats when the unit has the next to do.
    pending: Option<Finish<'a, PLANES, GATED>>,
}

impl<'a, U: TileUnit, const PLANES: usize, const GATED: bool> Product<'a, U, PLANES, GATED> {
    #[inline]
    fn new(tiles: [&'a IntegerTile<'a>; PANELS], to: &'a RowsMut<'a>) -> Self {
        let fours = tile_fours(tiles[0].k);
        Self { unit: U::default(), tiles, to, fours, height: 0, sums: Sums::uninit(), pending: None }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn run<const CODES: u8>(&mut self) {
        let mut unpacked = Unpacked::uninit();
        let [first, second] = self.tiles;
        // Pieces of one length, whole tiles and whole rows of 4-bit codes.
        let whole = self.fours * 4 * (1 + self.fours % 2);
        let piece = first.k.div_ceil(first.k.div_ceil(PIECE)).next_multiple_of(whole).min(PIECE / whole * whole);
        for panel in (0..first.panels).step_by(Self::PANELS) {
            let (next, n_panels) = if GATED { (panel, 2) } else { (panel + 1, PANELS.min(first.panels - panel)) };
            let pair = [(first, panel), (second, next)];
            for from in (0..first.k).step_by(piece) {
                let inputs = from..first.k.min(from + piece);
                let weights = unpacked.fill::<CODES>(&pair, n_panels, inputs.clone());
                let piece = Piece { pair, inputs, weights };
                match n_panels {
                    1 => self.rows::<1>(&piece),
                    _ => self.rows::<2>(&piece),
                }
            }
        }
        if let Some(finish) = self.pending.take() {
            // SAFETY: the sums of `pending` were stored.
            unsafe { finish.run(&self.sums) }
        }
    }

    /// Panels of the output that a pair makes.
    const PANELS: usize = if GATED { 1 } else { PANELS };

    /// All rows by a piece of `W` panels.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const W: usize>(&mut self, piece: &Piece<'a, '_>) {
        let tile = self.tiles[0];
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
            let (is_first, is_last) = (piece.inputs.start == 0, piece.inputs.end == tile.k);
            // Where the sums do not have to wait for another piece they stay in the first cache.
            let slot = match &self.pending {
                Some(pending) => 2 - pending.slot,
                None if is_first && is_last => 0,
                None => row / ROWS * PLANES,
            };
            let is_one_step = self.fours * 4 == tile.k;
            let has_x = rows == tile.rows && self.pending.is_some();
            let from = piece.inputs.start;
            let group = Group { tile, weights: piece.weights, from, row, height, fours: self.fours, has_x };
            // SAFETY: configured for the height and the inputs; the first piece stores the sums that the others load.
            unsafe {
                if two_heights || PLANES == 2 {
                    group.multiply::<U, 2, W>(&mut self.unit, &mut self.sums, slot);
                } else {
                    group.multiply::<U, 1, W>(&mut self.unit, &mut self.sums, slot);
                }
            }
            if is_last {
                let finish = Finish { pair: piece.pair, n_panels: W, to: self.to, row, rows, slot };
                let finish = if is_one_step { self.pending.replace(finish) } else { Some(finish) };
                if let Some(finish) = finish {
                    // SAFETY: the last piece stored the sums of these rows.
                    unsafe { finish.run(&self.sums) }
                }
            }
            if tile.rows > ROWS {
                // The next panels' codes come to the second cache meanwhile.
                for (tile, panel) in piece.pair.iter().take(W) {
                    let ahead = |row: usize| tile.panel_bytes * (Self::PANELS * tile.rows + row) / tile.rows;
                    ask_for(&tile.codes[panel * tile.panel_bytes..], ahead(row)..ahead(row + rows));
                }
            }
            row += rows;
        }
    }
}

/// Some inputs of a pair.
struct Piece<'a, 'w> {
    /// The panels, each with the tile that it is of.
    pair: [(&'a IntegerTile<'a>, usize); PANELS],
    inputs: Range<usize>,
    /// Signed bytes, `[k/4][16][4]`.
    weights: [&'w [[u8; 64]]; PANELS],
}

/// Some rows by some panels, for a piece of k.
struct Group<'a> {
    tile: &'a IntegerTile<'a>,
    weights: [&'a [[u8; 64]]; PANELS],
    /// The first input of the piece.
    from: usize,
    row: usize,
    height: usize,
    /// Groups of four inputs in a tile.
    fours: usize,
    /// Whether the tiles of x are the last group's, and all there are.
    has_x: bool,
}

impl Group<'_> {
    /// Adds to the sums at `slot`, or in the first piece stores there, the products of `X` tiles of x (two planes, or the rows and
    /// the next 16) and `W` panels.
    ///
    /// # Safety
    /// The unit is configured for the height and the width of the tiles. But for the first piece, the sums were stored before.
    #[inline(always)]
    unsafe fn multiply<U: TileUnit, const X: usize, const W: usize>(&self, unit: &mut U, sums: &mut Sums, slot: usize) {
        let tile = self.tile;
        let inputs = self.weights[0].len() * 4;
        let rows = |plane: &[i8], row: usize| -> *const u8 {
            let first = row * tile.x_stride + self.from;
            // Up to the last byte that the tiles read.
            plane[first..first + (self.height - 1) * tile.x_stride + inputs].as_ptr().cast()
        };
        let x0 = rows(tile.hi, self.row);
        let x1 = match (X, tile.lo.is_empty()) {
            (1, _) => x0,
            (_, true) => rows(tile.hi, self.row + ROWS),
            (_, false) => rows(tile.lo, self.row),
        };
        let [w0, w1] = self.weights.map(|weights| weights.as_ptr());
        assert!(self.weights[1].len() >= self.weights[0].len());
        let places: [*mut u8; 4] =
            std::array::from_fn(|i| sums.0[slot + (i / 2).min(X - 1)][i % 2].as_mut_ptr().cast());
        // SAFETY: the caller's promise. The slices above hold the rows, and the weights as many inputs (asserted); each place in
        // the sums has 16 rows.
        unsafe {
            if self.from == 0 {
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
            let mut four = 0;
            while four < self.weights[0].len() {
                if !self.has_x {
                    unit.load::<4>(x0.add(four * 4), tile.x_stride);
                }
                unit.load::<6>(w0.add(four).cast(), 64);
                unit.dot::<0, 4, 6>();
                if W == 2 {
                    unit.load::<7>(w1.add(four).cast(), 64);
                    unit.dot::<1, 4, 7>();
                }
                if X == 2 {
                    if !self.has_x {
                        unit.load::<5>(x1.add(four * 4), tile.x_stride);
                    }
                    unit.dot::<2, 5, 6>();
                }
                if X == 2 && W == 2 {
                    unit.dot::<3, 5, 7>()
                }
                four += self.fours;
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

/// Rows whose sums become floats, with the same operations as on the other tiers.
struct Finish<'a, const PLANES: usize, const GATED: bool> {
    pair: [(&'a IntegerTile<'a>, usize); PANELS],
    n_panels: usize,
    to: &'a RowsMut<'a>,
    row: usize,
    /// At most 16 of two planes, 32 of one.
    rows: usize,
    slot: usize,
}

impl<const PLANES: usize, const GATED: bool> Finish<'_, PLANES, GATED> {
    /// # Safety
    /// The sums of all rows were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn run(&self, sums: &Sums) {
        let adds = self.pair.iter().any(|(tile, _)| tile.added.iter().any(|(row, _)| !row.is_empty()));
        let joins = PLANES == 2 && self.pair[0].0.k <= MAX_JOINED;
        // SAFETY: the caller's promise.
        unsafe {
            match (self.n_panels, adds, joins) {
                (1, false, false) => self.run_pair::<1, false, false>(sums),
                (1, false, true) => self.run_pair::<1, false, true>(sums),
                (1, true, _) => self.run_pair::<1, true, false>(sums),
                (_, false, false) => self.run_pair::<2, false, false>(sums),
                (_, false, true) => self.run_pair::<2, false, true>(sums),
                (_, true, _) => self.run_pair::<2, true, false>(sums),
            }
        }
    }

    /// All rows of `W` panels. `ADDS` says whether something is added to their outputs, `JOINS` whether planes meet as integers.
    ///
    /// # Safety
    /// Their sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn run_pair<const W: usize, const ADDS: bool, const JOINS: bool>(&self, sums: &Sums) {
        let columns = if GATED { PANEL } else { W * PANEL };
        let (tile, panel) = self.pair[0];
        let (first, second) = (Outputs::<ADDS>::new(self.pair[0]), Outputs::<ADDS>::new(self.pair[W - 1]));
        for (i, x_scales) in tile.x_scales[self.row..][..self.rows].chunks(ROWS).enumerate() {
            // One plane has its second 16 rows where two have the second plane.
            let mut sums = [0, W - 1].map(|w| RowSums::<PLANES, JOINS>::new(sums, self.slot + i, w));
            let row = self.row + i * ROWS;
            let mut to = self.to.place(row, x_scales.len(), panel * PANEL, columns);
            for x_scale in x_scales {
                // SAFETY: the caller's promise: the sums of as many rows; `place` has room for them.
                unsafe {
                    let dot = sums[0].next();
                    if GATED {
                        let gate = silu(first.value(dot, *x_scale));
                        self.write(_mm512_mul_ps(gate, second.value(sums[1].next(), *x_scale)), to);
                    } else {
                        self.write(first.value(dot, *x_scale), to);
                        if W == 2 {
                            self.write(second.value(sums[1].next(), *x_scale), to.add(PANEL));
                        }
                    }
                }
                to = to.wrapping_add(self.to.stride);
            }
        }
    }

    /// # Safety
    /// `to` has room for 16 values, which are this tile's own.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn write(&self, mut value: __m512, to: *mut f32) {
        // SAFETY: the caller's promise; unaligned.
        unsafe {
            if self.to.write == Write::Add {
                value = _mm512_add_ps(_mm512_loadu_ps(to), value);
            }
            _mm512_storeu_ps(to, value);
        }
    }
}

/// What makes floats of the sums of a panel's outputs.
struct Outputs<const ADDS: bool> {
    scales: __m512,
    /// -0.0, which changes nothing, where there is nothing to add.
    added: [__m512; 2],
}

impl<const ADDS: bool> Outputs<ADDS> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn new((tile, panel): (&IntegerTile<'_>, usize)) -> Self {
        let mut added = [_mm512_set1_ps(-0.0); 2];
        for (added, (row, factor)) in added.iter_mut().zip(&tile.added) {
            if ADDS && !row.is_empty() {
                // SAFETY: the slice has sixteen values (checked here), unaligned.
                let row = unsafe { _mm512_loadu_ps(row[panel * PANEL..][..PANEL].as_ptr()) };
                *added = _mm512_mul_ps(row, _mm512_set1_ps(*factor));
            }
        }
        Self { scales: load_f32(&tile.scales[panel * PANEL * 4..]), added }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn value(&self, dot: __m512, x_scale: f32) -> __m512 {
        let value = _mm512_mul_ps(dot, _mm512_mul_ps(self.scales, _mm512_set1_ps(x_scale)));
        if ADDS { _mm512_add_ps(_mm512_add_ps(value, self.added[0]), self.added[1]) } else { value }
    }
}

/// Sums of a panel, row after row.
struct RowSums<const PLANES: usize, const JOINS: bool> {
    hi: *const [i32; PANEL],
    lo: *const [i32; PANEL],
}

impl<const PLANES: usize, const JOINS: bool> RowSums<PLANES, JOINS> {
    /// Those at `slot`, panel `w`.
    #[inline(always)]
    fn new(sums: &Sums, slot: usize, w: usize) -> Self {
        let place = |slot: usize| sums.0[slot][w].as_ptr().cast::<[i32; PANEL]>();
        Self { hi: place(slot), lo: place(slot + PLANES - 1) }
    }

    /// Those of the next row, both planes together.
    ///
    /// # Safety
    /// The row's sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn next(&mut self) -> __m512 {
        // SAFETY: the caller's promise.
        let (hi, lo) = unsafe { (load_sums(&*self.hi), load_sums(&*self.lo)) };
        (self.hi, self.lo) = (self.hi.wrapping_add(1), self.lo.wrapping_add(1));
        // The products are exact, so that there is one rounding either way.
        if JOINS {
            // Next to the unit floats have one port: this is two of their operations less.
            _mm512_cvtepi32_ps(_mm512_add_epi32(times_256(hi, bytes_up()), lo))
        } else if PLANES == 2 {
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(hi), _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(lo))
        } else {
            _mm512_cvtepi32_ps(hi)
        }
    }
}

/// Inputs up to which `256 · Σhi + Σlo` is inside i32, whatever the codes.
const MAX_JOINED: usize = 508;
const _: () = assert!(MAX_JOINED as i64 * 128 * 128 * 257 <= i32::MAX as i64);

/// Sums of each plane (or each 16 rows) and panel. Left as they are at the start: filling 32 KiB would cost as much as the
/// products of a short row.
#[repr(align(64))]
struct Sums([[MaybeUninit<SumTile>; PANELS]; 2 * MAX_TILE_ROWS / ROWS]);

impl Sums {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PANELS] }; 2 * MAX_TILE_ROWS / ROWS])
    }
}
