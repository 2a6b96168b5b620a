//! What becomes of the sums of some rows and a pair of panels: floats. Where weights are not rounded it is by the same operations as on
//! the other tiers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::branch::Branch;
use super::{PANELS, ROWS, bytes_up, load_sums, times_256};
use crate::arch::x86_64::avx512_vnni::vector::silu;
use crate::kernels::{IntegerTile, MAX_TILE_ROWS, RowsMut};
use crate::matmul::Write;
use crate::packed::PANEL;

/// Writes the outputs of a tile or, of gate and up, `silu(gate) · up`.
pub(super) struct Writer<'a, const GATED: bool> {
    /// Of the first panel of a pair and of the second: one and the same, or gate and up. Their x and shapes are the same.
    pub(super) tiles: [&'a IntegerTile<'a>; PANELS],
    to: &'a RowsMut<'a>,
    /// Whether something is added to the outputs.
    adds: bool,
}

impl<'a, const GATED: bool> Writer<'a, GATED> {
    /// Panels of the output that a pair makes.
    pub(super) const PANELS: usize = if GATED { 1 } else { PANELS };

    #[inline]
    pub(super) fn new(tiles: [&'a IntegerTile<'a>; PANELS], to: &'a RowsMut<'a>) -> Self {
        let adds = tiles.iter().any(|tile| tile.added.iter().any(|(row, _)| !row.is_empty()));
        Self { tiles, to, adds }
    }

    /// How many panels the pair that starts at `panel` has, and each panel with its tile.
    #[inline]
    pub(super) fn pair(&self, panel: usize) -> (usize, [(&'a IntegerTile<'a>, usize); PANELS]) {
        let [first, second] = self.tiles;
        let n_panels = if GATED { PANELS } else { PANELS.min(first.panels - panel) };
        let next = if GATED || n_panels == 1 { panel } else { panel + 1 };
        (n_panels, [(first, panel), (second, next)])
    }

    /// What writes rows of the pair that starts at `panel`; `scales` are those of each panel's outputs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn of_pair(&self, panel: usize, scales: [__m512; PANELS]) -> PairWriter<'a, GATED> {
        let (n_panels, [first, second]) = self.pair(panel);
        let columns = if GATED { PANEL } else { n_panels * PANEL };
        let tile = self.tiles[0];
        PairWriter {
            is_single: n_panels == 1,
            adds: self.adds,
            fits: tile.k <= MAX_JOINED,
            write: self.to.write,
            outputs: [Outputs::new(first, scales[0]), Outputs::new(second, scales[1])],
            x_scales: &tile.x_scales[..tile.rows],
            to: self.to.place(0, tile.rows, panel * PANEL, columns),
            stride: self.to.stride,
        }
    }
}

/// Writes rows of a pair of panels. What it needs is put together once for all of them: for each 16 rows anew it cost short ones 6 % of
/// their time.
#[derive(Clone, Copy)]
pub(super) struct PairWriter<'a, const GATED: bool> {
    /// Whether the first panel is alone: the last of an odd number.
    is_single: bool,
    /// Whether something is added to the outputs.
    adds: bool,
    /// Whether the sums of two planes fit in one integer.
    fits: bool,
    write: Write,
    outputs: [Outputs; PANELS],
    /// One for each row of the tile.
    x_scales: &'a [f32],
    /// Where the first row goes. There is room for all, which are this tile's own.
    to: *mut f32,
    stride: usize,
}

impl<const GATED: bool> PairWriter<'_, GATED> {
    /// Writes `rows`, at most 16, whose sums these are, of each plane, and what a branch adds.
    ///
    /// # Safety
    /// The sums of these rows were stored, of as many panels as there are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn write<const PLANES: usize>(
        &self,
        rows: Range<usize>,
        sums: &[PairSums],
        branch: Option<Branch<'_>>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.is_single, self.adds, PLANES == 2 && self.fits) {
                (true, false, false) => self.write_panels::<PLANES, 1, false, false>(rows, sums, branch),
                (true, false, true) => self.write_panels::<PLANES, 1, false, true>(rows, sums, branch),
                (true, true, _) => self.write_panels::<PLANES, 1, true, false>(rows, sums, branch),
                (false, false, false) => self.write_panels::<PLANES, 2, false, false>(rows, sums, branch),
                (false, false, true) => self.write_panels::<PLANES, 2, false, true>(rows, sums, branch),
                (false, true, _) => self.write_panels::<PLANES, 2, true, false>(rows, sums, branch),
            }
        }
    }

    /// The same of `W` panels. `ADDS` says whether something is added to their outputs, `JOINS` whether planes meet as integers.
    ///
    /// # Safety
    /// As [`write`](Self::write).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn write_panels<const PLANES: usize, const W: usize, const ADDS: bool, const JOINS: bool>(
        &self,
        rows: Range<usize>,
        sums: &[PairSums],
        branch: Option<Branch<'_>>,
    ) {
        let to = self.to.wrapping_add(rows.start * self.stride);
        let (outputs, x_scales) = (&self.outputs, &self.x_scales[rows]);
        let (sums, stride) = (RowSums::new(sums), self.stride);
        let rows = RowValues::<PLANES, W, ADDS, JOINS, GATED> { outputs, sums, x_scales, to, stride };
        // SAFETY: the caller's promise; there is room for the rows.
        unsafe {
            match (self.write, branch) {
                (Write::Store, None) => rows.write::<false>(|value, _, _| value),
                (Write::Add, None) => rows.write::<true>(|value, _, _| value),
                (Write::Store, Some(branch)) => {
                    rows.write::<false>(|value, panel, row| branch.add_to(value, panel, row))
                }
                (Write::Add, Some(branch)) => rows.write::<true>(|value, panel, row| branch.add_to(value, panel, row)),
            }
        }
    }
}

/// Some rows of `W` panels (gate and up make one).
struct RowValues<'a, const PLANES: usize, const W: usize, const ADDS: bool, const JOINS: bool, const GATED: bool> {
    outputs: &'a [Outputs; PANELS],
    sums: RowSums<PLANES, JOINS>,
    /// One for each row.
    x_scales: &'a [f32],
    to: *mut f32,
    stride: usize,
}

impl<const PLANES: usize, const W: usize, const ADDS: bool, const JOINS: bool, const GATED: bool>
    RowValues<'_, PLANES, W, ADDS, JOINS, GATED>
{
    /// Writes all rows, or with `ADD` adds them, and what `branch` makes of a value, a panel and a row.
    ///
    /// # Safety
    /// The rows' sums were stored. There is room for the rows, which are this tile's own.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn write<const ADD: bool>(&self, branch: impl Fn(__m512, usize, usize) -> __m512) {
        let (mut row, rows) = (0, self.x_scales.len());
        // SAFETY: the caller's promise; these are rows of `x_scales`.
        unsafe {
            while GATED && row + TOGETHER <= rows {
                self.write_some::<ADD, TOGETHER>(row, &branch);
                row += TOGETHER;
            }
            while row < rows {
                self.write_some::<ADD, 1>(row, &branch);
                row += 1;
            }
        }
    }

    /// The same for `N` rows from `first` on.
    ///
    /// # Safety
    /// As [`write`](Self::write), for these rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn write_some<const ADD: bool, const N: usize>(
        &self,
        first: usize,
        branch: &impl Fn(__m512, usize, usize) -> __m512,
    ) {
        // SAFETY: the caller's promise.
        let value = |panel: usize, row: usize| unsafe {
            self.outputs[panel].value::<ADDS>(self.sums.get(panel, row), self.x_scales[row])
        };
        for panel in 0..if GATED { 1 } else { W } {
            let to = |row: usize| self.to.wrapping_add(row * self.stride + panel * PANEL);
            let mut values = [_mm512_setzero_ps(); N];
            for (row, to_be) in (first..).zip(&mut values) {
                let mut value = value(panel, row);
                if ADD {
                    // SAFETY: the caller's promise; unaligned.
                    value = _mm512_add_ps(unsafe { _mm512_loadu_ps(to(row)) }, value);
                }
                *to_be = branch(value, panel, row);
            }
            if GATED {
                values = silu(values);
                for (row, gate) in (first..).zip(&mut values) {
                    *gate = _mm512_mul_ps(*gate, branch(value(1, row), 1, row));
                }
            }
            for (row, value) in (first..).zip(values) {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(to(row), value) }
            }
        }
    }
}

/// Rows of gate and up whose floats are made side by side, see [`silu`].
const TOGETHER: usize = 4;

/// What makes floats of the sums of a panel's outputs.
#[derive(Clone, Copy)]
struct Outputs {
    scales: __m512,
    /// -0.0, which changes nothing, where there is nothing to add.
    added: [__m512; 2],
}

impl Outputs {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn new((tile, panel): (&IntegerTile<'_>, usize), scales: __m512) -> Self {
        let mut added = [_mm512_set1_ps(-0.0); 2];
        for (added, (row, factor)) in added.iter_mut().zip(&tile.added) {
            if !row.is_empty() {
                // SAFETY: the slice has sixteen values (checked here), unaligned.
                let row = unsafe { _mm512_loadu_ps(row[panel * PANEL..][..PANEL].as_ptr()) };
                *added = _mm512_mul_ps(row, _mm512_set1_ps(*factor));
            }
        }
        Self { scales, added }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn value<const ADDS: bool>(&self, dot: __m512, x_scale: f32) -> __m512 {
        let value = _mm512_mul_ps(dot, _mm512_mul_ps(self.scales, _mm512_set1_ps(x_scale)));
        if ADDS { _mm512_add_ps(_mm512_add_ps(value, self.added[0]), self.added[1]) } else { value }
    }
}

/// Sums of some rows and a pair of panels.
pub(super) struct RowSums<const PLANES: usize, const JOINS: bool>(*const [i32; PANEL]);

impl<const PLANES: usize, const JOINS: bool> RowSums<PLANES, JOINS> {
    /// Those of each plane.
    #[inline(always)]
    pub(super) fn new(planes: &[PairSums]) -> Self {
        assert_eq!(planes.len(), PLANES);
        Self(planes.as_ptr().cast())
    }

    /// Those of a row and panel 0 or 1, both planes together.
    ///
    /// # Safety
    /// The row is one of 16, and its sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn get(&self, panel: usize, row: usize) -> __m512 {
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

/// Inputs up to which `256 · Σhi + Σlo` is inside i32, whatever the codes, also where the second plane has two products for each input.
const MAX_JOINED: usize = 508;
const _: () = assert!(MAX_JOINED as i64 * 128 * 128 * 258 <= i32::MAX as i64);

/// Sums of each plane (or each 16 rows) and panel. Left as they are at the start: filling 32 KiB would cost as much as the
/// products of a short row.
#[repr(align(64))]
pub(super) struct Sums<const N: usize>(pub(super) [PairSums; N]);

/// One plane's (or 16 rows') of a pair of panels.
pub(super) type PairSums = [MaybeUninit<SumTile>; PANELS];

/// Sixteen rows of sums: what a register of the unit holds.
pub(super) type SumTile = [[i32; PANEL]; ROWS];

impl<const N: usize> Sums<N> {
    #[inline]
    pub(super) fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PANELS] }; N])
    }
}

/// Those of a tile's rows, two for each 16.
pub(super) const MAX_SUMS: usize = 2 * MAX_TILE_ROWS / ROWS;
