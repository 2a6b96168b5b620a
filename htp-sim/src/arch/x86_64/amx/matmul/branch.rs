//! The second half of an adapter's branch: products with the few inputs of its rank, beside those of the layer.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::finish::{PairSums, RowSums, Sums};
use super::{PANELS, ROWS};
use crate::arch::x86_64::amx::insn::TileUnit;
use crate::arch::x86_64::avx512_vnni::matmul::load_f32;
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// The branches of a pair of panels.
pub(super) struct Branches<'a> {
    tiles: [&'a IntegerTile<'a>; PANELS],
    scales: [__m512; PANELS],
    room: &'a mut Room,
}

/// Room for the panels' codes, `[k/4][16][4]`, with zeros up to a multiple of [`STEP`], and for the sums of 16 rows in both planes.
#[repr(align(64))]
pub(super) struct Room {
    weights: [[MaybeUninit<[u8; 64]>; MAX_INPUTS / 4]; PANELS],
    sums: Sums<2>,
}

impl Room {
    #[inline]
    pub(super) fn uninit() -> Self {
        Self { weights: [const { [const { MaybeUninit::uninit() }; MAX_INPUTS / 4] }; PANELS], sums: Sums::uninit() }
    }
}

impl<'a> Branches<'a> {
    /// Both of them or none.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn new(tiles: [&'a IntegerTile<'a>; PANELS], room: &'a mut Room) -> Option<Self> {
        let [Some(first), Some(second)] = tiles.map(|tile| tile.branch) else { return None };
        let tiles = [first, second];
        for (weights, tile) in room.weights.iter_mut().zip(tiles) {
            weights[tile.k / 4..].fill(MaybeUninit::new([0; 64]));
        }
        Some(Self { tiles, scales: [_mm512_setzero_ps(); PANELS], room })
    }

    /// Goes on to panels of the tiles.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn set_panels(&mut self, panels: [usize; PANELS]) {
        for (i, (tile, panel)) in self.tiles.into_iter().zip(panels).enumerate() {
            let codes = &tile.codes[panel * tile.panel_bytes..].as_chunks().0[..tile.k / 4];
            for (to, codes) in self.room.weights[i].iter_mut().zip(codes) {
                *to = MaybeUninit::new(*codes);
            }
            self.scales[i] = load_f32(&tile.scales[panel * PANEL * 4..]);
        }
    }

    /// The sums of rows from `row` on, as many as the unit is shaped for.
    ///
    /// # Safety
    /// The unit is configured for tiles of [`STEP`] inputs, and the tiles' rows have as many, zeros from `k` on. Panels were set.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn multiply<U: TileUnit>(&mut self, unit: &mut U, row: usize) -> Branch<'_> {
        let tiles = self.tiles;
        let inputs = tiles.map(|tile| tile.k.next_multiple_of(STEP));
        let planes =
            tiles.map(|tile| [tile.hi, tile.lo].map(|plane| plane[row * tile.x_stride..].as_ptr().cast::<u8>()));
        let [hi, lo] = [0, 1].map(|plane| [0, 1].map(|panel| self.room.sums.0[plane][panel].as_mut_ptr().cast::<u8>()));
        // SAFETY: the caller's promise; `weights` has the padded inputs, and each place in the sums 16 rows.
        unsafe {
            unit.zero::<0>();
            unit.zero::<1>();
            unit.zero::<2>();
            unit.zero::<3>();
            for at in (0..inputs[0]).step_by(STEP) {
                unit.load::<6>(self.room.weights[0][at / 4..].as_ptr().cast(), 64);
                unit.load::<4>(planes[0][0].add(at), tiles[0].x_stride);
                unit.dot::<0, 4, 6>();
                unit.load::<5>(planes[0][1].add(at), tiles[0].x_stride);
                unit.dot::<2, 5, 6>();
            }
            for at in (0..inputs[1]).step_by(STEP) {
                unit.load::<7>(self.room.weights[1][at / 4..].as_ptr().cast(), 64);
                // The same rows are there still if they are one tile.
                if !std::ptr::eq(tiles[0], tiles[1]) || inputs[0] > STEP {
                    unit.load::<4>(planes[1][0].add(at), tiles[1].x_stride);
                    unit.load::<5>(planes[1][1].add(at), tiles[1].x_stride);
                }
                unit.dot::<1, 4, 7>();
                unit.dot::<3, 5, 7>();
            }
            unit.store::<0>(hi[0], 64);
            unit.store::<1>(hi[1], 64);
            unit.store::<2>(lo[0], 64);
            unit.store::<3>(lo[1], 64);
        }
        Branch { x_scales: tiles.map(|tile| &tile.x_scales[row..]), scales: self.scales, sums: &self.room.sums.0 }
    }
}

/// The sums of 16 rows.
#[derive(Clone, Copy)]
pub(super) struct Branch<'a> {
    x_scales: [&'a [f32]; PANELS],
    scales: [__m512; PANELS],
    sums: &'a [PairSums],
}

impl Branch<'_> {
    /// `value` and the product of a row with panel 0 or 1, unless the row is all zeros.
    ///
    /// # Safety
    /// The row is one of those whose sums were stored.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn add_to(&self, value: __m512, panel: usize, row: usize) -> __m512 {
        let x_scale = self.x_scales[panel][row];
        // SAFETY: the caller's promise.
        let dot = unsafe { RowSums::<2, true>::new(self.sums).get(panel, row) };
        let product = _mm512_mul_ps(dot, _mm512_mul_ps(self.scales[panel], _mm512_set1_ps(x_scale)));
        let is_some = if x_scale == 0.0 { 0 } else { u16::MAX };
        _mm512_mask_add_ps(value, is_some, value, product)
    }
}

/// Whether rows of so many inputs, and a branch of so many, can be multiplied side by side: by tiles of one width, and not where all
/// inputs are one step, whose tiles of x stay in their registers and whose floats wait for rows of another height.
pub(super) fn fits(k: usize, rank: usize) -> bool {
    k > STEP && k.is_multiple_of(STEP) && rank <= MAX_INPUTS
}

/// Inputs of a tile of the unit.
const STEP: usize = ROWS * 4;

/// The most that a branch may have.
const MAX_INPUTS: usize = 128;
