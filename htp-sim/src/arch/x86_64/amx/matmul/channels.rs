//! Weights with a scale per output: sums stay in the tiles over all of k, or over a piece of it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, configure, load_sums, tile_fours};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::{load_f32, store};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<U: TileUnit, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let mut unit = U::default();
    for panel in (0..tile.panels).step_by(PANELS) {
        match (tile.panels - panel, tile.lo.is_empty()) {
            (1, true) => panels::<U, CODES, 1, 1>(&mut unit, tile, panel, out),
            (1, false) => panels::<U, CODES, 1, 2>(&mut unit, tile, panel, out),
            (_, true) => panels::<U, CODES, 2, 1>(&mut unit, tile, panel, out),
            (_, false) => panels::<U, CODES, 2, 2>(&mut unit, tile, panel, out),
        }
    }
    // SAFETY: a table with this unit exists only where it may be used.
    unsafe { unit.release() };
}

/// All rows by `W` panels from `panel` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panels<U: TileUnit, const CODES: u8, const W: usize, const PLANES: usize>(
    unit: &mut U,
    tile: &IntegerTile<'_>,
    panel: usize,
    out: &mut [f32],
) {
    let mut unpacked = Unpacked::uninit();
    let mut sums = Sums::uninit();
    let fours = tile_fours(tile.k);
    // Pieces of one length, whole tiles and whole rows of 4-bit codes.
    let whole = (fours * 4).next_multiple_of(8).max(fours * 4 * (1 + fours % 2));
    let piece = tile.k.div_ceil(tile.k.div_ceil(PIECE)).next_multiple_of(whole).min(PIECE / whole * whole);
    for from in (0..tile.k).step_by(piece) {
        let inputs = from..tile.k.min(from + piece);
        let weights = unpacked.fill::<CODES>(tile, (panel, W), inputs.clone());
        let is_last = inputs.end == tile.k;
        let mut configured = 0;
        // Rows whose sums have been stored, and where.
        let mut done: Option<Finish<'_>> = None;
        let mut row = 0;
        while row < tile.rows {
            let height = ROWS.min(tile.rows - row);
            if configured != height {
                configured = height;
                // SAFETY: a table with this unit exists only where it may be used.
                unsafe { configure(unit, height, fours) };
            }
            // One plane of these rows and of the next ones take the places of two planes.
            let two_heights = PLANES == 1 && tile.rows - row >= 2 * ROWS;
            let rows = if two_heights { 2 * ROWS } else { height };
            // Where the sums do not have to wait for another piece, two places take turns and stay in the first cache.
            let slot = if is_last && from == 0 { row / (ROWS * (3 - PLANES)) % 2 * 2 } else { row / ROWS * PLANES };
            let group = Group { tile, weights, from, row, height, fours };
            // The unit multiplies these rows while the vector registers make floats of those before.
            let mut pending = done.take();
            let per_step = (2 * ROWS * W).div_ceil(weights[0].len() / fours);
            let mut meanwhile = |sums: &Sums| {
                if let Some(finish) = &mut pending {
                    // SAFETY: the sums of `done` were stored.
                    unsafe { finish.some::<W, PLANES>(sums, per_step, out) };
                }
            };
            // SAFETY: configured for the height and the inputs; the first piece stores the sums that the others load.
            unsafe {
                if two_heights || PLANES == 2 {
                    group.multiply::<U, 2, W>(unit, &mut sums, slot, &mut meanwhile);
                } else {
                    group.multiply::<U, 1, W>(unit, &mut sums, slot, &mut meanwhile);
                }
            }
            if is_last {
                done = Some(Finish { tile, panel, row, rows, slot, at: 0 });
            }
            // The next panels' codes come to the second cache meanwhile.
            let ahead = |row: usize| tile.panel_bytes * W * (tile.rows + row) / tile.rows;
            ask_for(&tile.codes[panel * tile.panel_bytes..], ahead(row)..ahead(row + rows));
            row += rows;
        }
        if let Some(mut finish) = done {
            // SAFETY: as above.
            unsafe { finish.some::<W, PLANES>(&sums, usize::MAX, out) };
        }
    }
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
    row: usize,
    /// At most 16 of two planes, 32 of one.
    rows: usize,
    slot: usize,
    /// How many pairs of panel and row are done, panel by panel.
    at: usize,
}

impl Finish<'_> {
    /// The next `n` pairs of panel and row.
    ///
    /// # Safety
    /// The sums of all planes and panels were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn some<const W: usize, const PLANES: usize>(&mut self, sums: &Sums, n: usize, out: &mut [f32]) {
        let tile = self.tile;
        let end = (W * self.rows).min(self.at.saturating_add(n));
        while self.at < end {
            let w = self.at / self.rows;
            let scales = load_f32(&tile.scales[(self.panel + w) * PANEL * 4..]);
            let first = self.at - w * self.rows;
            let last = self.rows.min(end - w * self.rows);
            for i in first..last {
                let place = self.slot + if PLANES == 1 { i / ROWS } else { 0 };
                // SAFETY: the caller's promise.
                let (hi, lo) =
                    unsafe { (stored(&sums.0[place][w], i % ROWS), stored(&sums.0[place + PLANES - 1][w], i % ROWS)) };
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(tile.x_scales[self.row + i]));
                let mut dot = _mm512_cvtepi32_ps(hi);
                if PLANES == 2 {
                    dot = _mm512_mul_ps(dot, _mm512_set1_ps(256.0));
                    dot = _mm512_add_ps(dot, _mm512_cvtepi32_ps(lo));
                }
                let at = ((self.row + i) * tile.panels + self.panel + w) * PANEL;
                store(&mut out[at..], _mm512_mul_ps(dot, scale));
            }
            self.at = w * self.rows + last;
        }
    }
}

/// Row `row` of some sums.
///
/// # Safety
/// It was stored.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn stored(sums: &MaybeUninit<SumTile>, row: usize) -> __m512i {
    assert!(row < ROWS);
    // SAFETY: the row is inside (asserted) and was stored (the caller's promise).
    load_sums(unsafe { &*sums.as_ptr().cast::<[i32; PANEL]>().add(row) })
}

/// Asks for the bytes `range` behind the start of `from`, wherever they are.
fn ask_for(from: &[u8], range: std::ops::Range<usize>) {
    for at in range.step_by(64) {
        // SAFETY: every CPU of this architecture has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(at).cast()) }
    }
}

/// Sums of each plane (or each 16 rows) and panel. Left as they are at the start: filling 32 KiB would cost as much as the
/// products of a short row.
#[repr(align(64))]
struct Sums([[MaybeUninit<SumTile>; PANELS]; 2 * MAX_ROWS / ROWS]);

impl Sums {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PANELS] }; 2 * MAX_ROWS / ROWS])
    }
}

/// Rows of a tile of the output.
const MAX_ROWS: usize = 128;
