//! Weights with a scale per output: sums stay in the tiles over all of k, or over a piece of it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::unpack::{PIECE, Unpacked};
use super::{PANELS, ROWS, SumTile, ask_for_line, bytes_up, configure, load_sums, tile_fours, times_256};
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
    /// Whether something is added to the outputs.
    adds: bool,
    sums: Sums,
    /// Where all of k is one step: rows whose sums are on their way to memory. They become floats when the unit has the next to do.
    pending: Option<Finish>,
}

impl<'a, U: TileUnit, const PLANES: usize, const GATED: bool> Product<'a, U, PLANES, GATED> {
    #[inline]
    fn new(tiles: [&'a IntegerTile<'a>; PANELS], to: &'a RowsMut<'a>) -> Self {
        let adds = tiles.iter().any(|tile| tile.added.iter().any(|(row, _)| !row.is_empty()));
        let fours = tile_fours(tiles[0].k);
        Self { unit: U::default(), tiles, to, fours, height: 0, adds, sums: Sums::uninit(), pending: None }
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
                let piece = Piece { panel, inputs, weights };
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

    /// Panels of the output that a pair makes.
    const PANELS: usize = if GATED { 1 } else { PANELS };

    /// All rows by a piece of `W` panels.
    ///
    /// The unit's loads and stores take so much of what a core can begin in a cycle that a hundred plain instructions for each 16
    /// rows cost up to a tenth: as little as can be is done in the loop.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const W: usize>(&mut self, piece: &Piece<'_>) {
        let tile = self.tiles[0];
        let (is_first, is_last) = (piece.inputs.start == 0, piece.inputs.end == tile.k);
        let is_one_step = self.fours * 4 == tile.k;
        let (hi, lo) = piece.planes::<PLANES>(tile);
        let weights = piece.weights.map(|weights| weights[..piece.inputs.len() / 4].as_ptr().cast());
        let mut ahead = self.codes_ahead(piece);
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
            // SAFETY: configured for the height and the inputs; `planes` and the slices of weights hold what is read; the first
            // piece stores the sums that the others load.
            unsafe {
                if two_heights || PLANES == 2 {
                    group.multiply::<U, 2, W>(&mut self.unit, &mut self.sums.0[slot..][..2], &mut ahead);
                } else {
                    group.multiply::<U, 1, W>(&mut self.unit, &mut self.sums.0[slot..][..1], &mut ahead);
                }
            }
            if is_last {
                let finish = Finish { panel: piece.panel, is_single: W == 1, row, rows, slot };
                let finish = if is_one_step { self.pending.replace(finish) } else { Some(finish) };
                if let Some(finish) = finish {
                    // SAFETY: the last piece stored the sums of these rows.
                    unsafe { self.finish(finish) }
                }
            }
            row += rows;
        }
    }

    /// The same inputs of the next panels, to come to the second cache while these are multiplied by all rows.
    #[inline(always)]
    fn codes_ahead(&self, piece: &Piece<'_>) -> CodesAhead {
        let tile = self.tiles[0];
        let [from, bytes] = [piece.inputs.start, piece.inputs.len()].map(|inputs| tile.panel_bytes * inputs / tile.k);
        let steps = piece.inputs.len() / (self.fours * 4) * tile.rows.div_ceil(ROWS);
        let lines = if tile.rows > ROWS { bytes.div_ceil(64).div_ceil(steps).min(MAX_LINES) } else { 0 };
        let next = std::array::from_fn(|i| {
            let panel = piece.panel + Self::PANELS + if GATED { 0 } else { i };
            self.tiles[i].codes.as_ptr().wrapping_add(panel * tile.panel_bytes + from)
        });
        CodesAhead { next, lines }
    }

    /// Makes floats of sums, with the same operations as on the other tiers.
    ///
    /// # Safety
    /// The sums of all rows were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn finish(&self, finish: Finish) {
        let joins = PLANES == 2 && self.tiles[0].k <= MAX_JOINED;
        // SAFETY: the caller's promise.
        unsafe {
            match (finish.is_single, self.adds, joins) {
                (true, false, false) => self.finish_panels::<1, false, false>(finish),
                (true, false, true) => self.finish_panels::<1, false, true>(finish),
                (true, true, _) => self.finish_panels::<1, true, false>(finish),
                (false, false, false) => self.finish_panels::<2, false, false>(finish),
                (false, false, true) => self.finish_panels::<2, false, true>(finish),
                (false, true, _) => self.finish_panels::<2, true, false>(finish),
            }
        }
    }

    /// All rows of `W` panels. `ADDS` says whether something is added to their outputs, `JOINS` whether planes meet as integers.
    ///
    /// # Safety
    /// Their sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn finish_panels<const W: usize, const ADDS: bool, const JOINS: bool>(&self, finish: Finish) {
        let Finish { panel, row, rows, slot, .. } = finish;
        let (second, columns) = if GATED { (panel, PANEL) } else { (panel + W - 1, W * PANEL) };
        let outputs = [Outputs::<ADDS>::new(self.tiles[0], panel), Outputs::<ADDS>::new(self.tiles[1], second)];
        // One plane has its second 16 rows where two have the second plane.
        let heights = if PLANES == 1 { rows.div_ceil(ROWS) } else { 1 };
        for i in 0..heights {
            let row = row + i * ROWS;
            let x_scales = &self.tiles[0].x_scales[row..][..(rows - i * ROWS).min(ROWS)];
            let to = self.to.place(row, x_scales.len(), panel * PANEL, columns);
            let sums = RowSums::<PLANES, JOINS>::new(&self.sums.0[slot + i..][..PLANES]);
            let to = Places { to, stride: self.to.stride };
            // SAFETY: the caller's promise; `place` has room for the rows.
            unsafe {
                match self.to.write {
                    Write::Store => write_rows::<PLANES, W, ADDS, JOINS, GATED, false>(&outputs, &sums, x_scales, to),
                    Write::Add => write_rows::<PLANES, W, ADDS, JOINS, GATED, true>(&outputs, &sums, x_scales, to),
                }
            }
        }
    }
}

/// Some inputs of a pair.
struct Piece<'w> {
    /// The first of the pair.
    panel: usize,
    inputs: Range<usize>,
    /// Signed bytes, `[k/4][16][4]`.
    weights: [&'w [[u8; 64]]; PANELS],
}

impl Piece<'_> {
    /// The first of these inputs in both planes of a tile's x, or twice in the only one. The tile's rows are seen to be inside.
    #[inline(always)]
    fn planes<const PLANES: usize>(&self, tile: &IntegerTile<'_>) -> (*const u8, *const u8) {
        let all = self.inputs.start..(tile.rows - 1) * tile.x_stride + self.inputs.end;
        let hi = tile.hi[all.clone()].as_ptr();
        let lo = if PLANES == 2 { tile.lo[all].as_ptr() } else { hi };
        (hi.cast(), lo.cast())
    }
}

/// Where the next codes of both panels lie, and how many lines of them are asked for with each step. (All of 16 rows' at once were so
/// many that the core waited for them: that cost long rows a tenth to a third of their time.)
struct CodesAhead {
    next: [*const u8; PANELS],
    lines: usize,
}

impl CodesAhead {
    /// Asks for the next lines of `W` panels, wherever they are.
    #[inline(always)]
    fn ask_for_some<const W: usize>(&mut self) {
        for next in &mut self.next[..W] {
            for _ in 0..self.lines {
                ask_for_line(*next);
                *next = next.wrapping_add(64);
            }
        }
    }
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
    panel: usize,
    /// Whether the panel is alone: the last of an odd number.
    is_single: bool,
    row: usize,
    /// At most 16 of two planes, 32 of one.
    rows: usize,
    slot: usize,
}

/// Where the rows of a panel go.
#[derive(Clone, Copy)]
struct Places {
    to: *mut f32,
    stride: usize,
}

/// Writes, or with `ADD` adds, as many rows as there are scales.
///
/// # Safety
/// The rows' sums were stored. There is room for the rows of `W` panels (gate and up make one), which are this tile's own.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn write_rows<
    const PLANES: usize,
    const W: usize,
    const ADDS: bool,
    const JOINS: bool,
    const GATED: bool,
    const ADD: bool,
>(
    outputs: &[Outputs<ADDS>; PANELS],
    sums: &RowSums<PLANES, JOINS>,
    x_scales: &[f32],
    to: Places,
) {
    for (row, x_scale) in x_scales.iter().enumerate() {
        let to = to.to.wrapping_add(row * to.stride);
        // SAFETY: the caller's promise.
        unsafe {
            let first = outputs[0].value(sums.get(0, row), *x_scale);
            if GATED {
                let up = outputs[1].value(sums.get(1, row), *x_scale);
                write::<ADD>(_mm512_mul_ps(silu(first), up), to);
            } else {
                write::<ADD>(first, to);
                if W == 2 {
                    write::<ADD>(outputs[1].value(sums.get(1, row), *x_scale), to.wrapping_add(PANEL));
                }
            }
        }
    }
}

/// # Safety
/// `to` has room for 16 values, which are this tile's own.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn write<const ADD: bool>(mut value: __m512, to: *mut f32) {
    // SAFETY: the caller's promise; unaligned.
    unsafe {
        if ADD {
            value = _mm512_add_ps(_mm512_loadu_ps(to), value);
        }
        _mm512_storeu_ps(to, value);
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
    fn new(tile: &IntegerTile<'_>, panel: usize) -> Self {
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

/// Sums of some rows and a pair of panels.
struct RowSums<const PLANES: usize, const JOINS: bool>(*const [i32; PANEL]);

impl<const PLANES: usize, const JOINS: bool> RowSums<PLANES, JOINS> {
    /// Those of each plane.
    #[inline(always)]
    fn new(planes: &[PairSums]) -> Self {
        assert_eq!(planes.len(), PLANES);
        Self(planes.as_ptr().cast())
    }

    /// Those of a row and panel 0 or 1, both planes together.
    ///
    /// # Safety
    /// The row is one of 16, and its sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn get(&self, panel: usize, row: usize) -> __m512 {
        let plane = |plane: usize| self.0.wrapping_add((plane * PANELS + panel) * ROWS + row);
        // SAFETY: the caller's promise.
        let (hi, lo) = unsafe { (load_sums(&*plane(0)), load_sums(&*plane(PLANES - 1))) };
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

/// Lines of a panel that are asked for with a step at most. Few rows have to do with a part: more would make them wait.
const MAX_LINES: usize = 2;

/// Inputs up to which `256 · Σhi + Σlo` is inside i32, whatever the codes.
const MAX_JOINED: usize = 508;
const _: () = assert!(MAX_JOINED as i64 * 128 * 128 * 257 <= i32::MAX as i64);

/// Sums of each plane (or each 16 rows) and panel. Left as they are at the start: filling 32 KiB would cost as much as the
/// products of a short row.
#[repr(align(64))]
struct Sums([PairSums; 2 * MAX_TILE_ROWS / ROWS]);

/// One plane's (or 16 rows') of a pair of panels.
type PairSums = [MaybeUninit<SumTile>; PANELS];

impl Sums {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PANELS] }; 2 * MAX_TILE_ROWS / ROWS])
    }
}
