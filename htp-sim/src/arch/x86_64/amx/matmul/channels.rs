//! Weights with a scale per output: sums stay in the tiles over all of k, or over a piece of it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, configure, load_sums, tile_fours};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::load_f32;
use crate::kernels::{IntegerTile, MAX_TILE_ROWS};
use crate::packed::PANEL;

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match tile.lo.is_empty() {
        true => Product::<U, 1>::new(tile).run::<CODES>(out),
        false => Product::<U, 2>::new(tile).run::<CODES>(out),
    }
}

/// The product of a tile of the output, with what goes on from one pair of panels to the next.
struct Product<'a, U, const PLANES: usize> {
    unit: U,
    tile: &'a IntegerTile<'a>,
    /// Groups of four inputs in a tile of the unit.
    fours: usize,
    /// Rows that the registers are shaped for.
    height: usize,
    sums: Sums,
    /// Rows whose sums are stored and not yet floats.
    done: Option<Finish<'a>>,
}

impl<'a, U: TileUnit, const PLANES: usize> Product<'a, U, PLANES> {
    #[inline]
    fn new(tile: &'a IntegerTile<'a>) -> Self {
        let fours = tile_fours(tile.k);
        Self { unit: U::default(), tile, fours, height: 0, sums: Sums::uninit(), done: None }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn run<const CODES: u8>(&mut self, out: &mut [f32]) {
        let mut unpacked = Unpacked::uninit();
        let tile = self.tile;
        // Pieces of one length, whole tiles and whole rows of 4-bit codes.
        let whole = self.fours * 4 * (1 + self.fours % 2);
        let piece = tile.k.div_ceil(tile.k.div_ceil(PIECE)).next_multiple_of(whole).min(PIECE / whole * whole);
        for panel in (0..tile.panels).step_by(PANELS) {
            let n_panels = PANELS.min(tile.panels - panel);
            for from in (0..tile.k).step_by(piece) {
                let inputs = from..tile.k.min(from + piece);
                let weights = unpacked.fill::<CODES>(tile, (panel, n_panels), inputs.clone());
                let piece = Piece { panel, inputs, weights };
                match n_panels {
                    1 => self.rows::<1>(&piece, out),
                    _ => self.rows::<2>(&piece, out),
                }
            }
        }
        if let Some(mut finish) = self.done.take() {
            // SAFETY: the sums of `done` were stored.
            unsafe { finish.some::<PLANES>(&self.sums, usize::MAX, out) };
        }
    }

    /// All rows by a piece of `W` panels.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const W: usize>(&mut self, piece: &Piece<'_>, out: &mut [f32]) {
        let tile = self.tile;
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
            let slot = if is_first && is_last { 0 } else { row / ROWS * PLANES };
            let group =
                Group { tile, weights: piece.weights, from: piece.inputs.start, row, height, fours: self.fours };
            // The unit multiplies these rows while the vector registers make floats of those before, all of them.
            let mut before = self.done.take();
            let steps = piece.weights[0].len() / self.fours;
            // Their sums are still on their way when the first steps begin.
            let wait = usize::from(steps > 2) * 2;
            let per_step = before.as_ref().map_or(0, |finish| finish.count().div_ceil(steps - wait));
            let mut step = 0;
            let mut meanwhile = |sums: &Sums| {
                step += 1;
                if step <= wait {
                    return;
                }
                if let Some(finish) = &mut before {
                    // SAFETY: the sums of `done` were stored.
                    unsafe { finish.some::<PLANES>(sums, per_step, out) };
                }
            };
            // SAFETY: configured for the height and the inputs; the first piece stores the sums that the others load.
            unsafe {
                if two_heights || PLANES == 2 {
                    group.multiply::<U, 2, W>(&mut self.unit, &mut self.sums, slot, &mut meanwhile);
                } else {
                    group.multiply::<U, 1, W>(&mut self.unit, &mut self.sums, slot, &mut meanwhile);
                }
            }
            if is_last {
                self.done = Some(Finish { tile, panel: piece.panel, n_panels: W, row, rows, slot, at: 0 });
            }
            if tile.rows > ROWS {
                // The next panels' codes come to the second cache meanwhile.
                let ahead = |row: usize| tile.panel_bytes * W * (tile.rows + row) / tile.rows;
                ask_for(&tile.codes[piece.panel * tile.panel_bytes..], ahead(row)..ahead(row + rows));
            }
            row += rows;
        }
    }
}

/// Some inputs of one or two panels.
struct Piece<'a> {
    panel: usize,
    inputs: Range<usize>,
    /// Signed bytes, `[k/4][16][4]`.
    weights: [&'a [[u8; 64]]; PANELS],
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
}

impl Group<'_> {
    /// Adds to the sums at `slot`, or in the first piece stores there, the products of `X` tiles of x (two planes, or the rows and
    /// the next 16) and `W` panels. Calls `meanwhile` once for each tile of inputs.
    ///
    /// # Safety
    /// The unit is configured for the height and the width of the tiles. But for the first piece, the sums were stored before.
    #[inline(always)]
    unsafe fn multiply<U: TileUnit, const X: usize, const W: usize>(
        &self,
        unit: &mut U,
        sums: &mut Sums,
        slot: usize,
        meanwhile: &mut impl FnMut(&Sums),
    ) {
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
                unit.load::<4>(x0.add(four * 4), tile.x_stride);
                unit.load::<6>(w0.add(four).cast(), 64);
                unit.dot::<0, 4, 6>();
                if W == 2 {
                    unit.load::<7>(w1.add(four).cast(), 64);
                    unit.dot::<1, 4, 7>();
                }
                if X == 2 {
                    unit.load::<5>(x1.add(four * 4), tile.x_stride);
                    unit.dot::<2, 5, 6>();
                }
                if X == 2 && W == 2 {
                    unit.dot::<3, 5, 7>()
                }
                meanwhile(sums);
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

/// Rows whose sums become floats, some at a time, with the same operations as on the other tiers.
struct Finish<'a> {
    tile: &'a IntegerTile<'a>,
    panel: usize,
    n_panels: usize,
    row: usize,
    /// At most 16 of two planes, 32 of one.
    rows: usize,
    slot: usize,
    /// How many pairs of panel and row are done, panel by panel.
    at: usize,
}

impl Finish<'_> {
    /// Pairs of panel and row.
    fn count(&self) -> usize {
        self.n_panels * self.rows
    }

    /// The next `n` pairs of panel and row.
    ///
    /// # Safety
    /// The sums of all planes and panels were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn some<const PLANES: usize>(&mut self, sums: &Sums, n: usize, out: &mut [f32]) {
        let tile = self.tile;
        let mut left = n.min(self.count() - self.at);
        while left > 0 {
            let (w, first) = (self.at / self.rows, self.at % self.rows);
            // One plane has its second 16 rows where two have the second plane.
            let second = usize::from(PLANES == 1 && first >= ROWS);
            let end = if PLANES == 1 && first < ROWS { ROWS.min(self.rows) } else { self.rows };
            let n = left.min(end - first);
            let scales = load_f32(&tile.scales[(self.panel + w) * PANEL * 4..]);
            let x_scales = &tile.x_scales[self.row + first..][..n];
            let to = ((self.row + first) * tile.panels + self.panel + w) * PANEL;
            let mut to = out[to..to + (n - 1) * tile.panels * PANEL + PANEL].as_mut_ptr();
            let from = |place: usize| sums.0[place][w].as_ptr().cast::<[i32; PANEL]>().wrapping_add(first % ROWS);
            let (mut hi, mut lo) = (from(self.slot + second), from(self.slot + second + PLANES - 1));
            for x_scale in x_scales {
                // SAFETY: the caller's promise: `n` rows from `first` on are in the sums. The slice of out above reaches to the last
                // of them.
                unsafe {
                    let mut dot = _mm512_cvtepi32_ps(load_sums(&*hi));
                    if PLANES == 2 {
                        // The product is exact, so that one rounding makes no difference.
                        dot = _mm512_fmadd_ps(dot, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(load_sums(&*lo)));
                    }
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*x_scale));
                    _mm512_storeu_ps(to, _mm512_mul_ps(dot, scale));
                }
                (hi, lo, to) = (hi.wrapping_add(1), lo.wrapping_add(1), to.wrapping_add(tile.panels * PANEL));
            }
            (self.at, left) = (self.at + n, left - n);
        }
    }
}

/// Asks for the bytes `range` behind the start of `from`, wherever they are.
fn ask_for(from: &[u8], range: Range<usize>) {
    for at in range.step_by(64) {
        // SAFETY: every CPU of this architecture has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(at).cast()) }
    }
}

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
