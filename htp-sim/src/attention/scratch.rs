//! One worker's buffers, and the merging of ranges.

use super::tile::Tile;
use super::{CacheFormat, CacheLayout, RANGE, TILE_ROWS};
use crate::kernels::Kernels;
use crate::scratch::Aligned;

/// One worker's buffers.
#[derive(Debug)]
pub(super) struct WorkerScratch {
    /// Values of a row of `part` and `acc`.
    stride: usize,
    /// The queries: floats, or two planes with their scales and sums.
    pub(super) q: Aligned<f32>,
    pub(super) hi: Aligned<i8>,
    pub(super) lo: Aligned<i8>,
    pub(super) q_scales: [f32; TILE_ROWS],
    pub(super) plane_sums: [[i32; 2]; TILE_ROWS],
    /// One range: scores, which become probabilities, and these as planes.
    pub(super) scores: Aligned<f32>,
    pub(super) p_hi: Aligned<i8>,
    pub(super) p_lo: Aligned<i8>,
    pub(super) p_scales: [f32; TILE_ROWS],
    pub(super) p_sums: [[i32; 2]; TILE_ROWS],
    pub(super) totals: Totals,
    /// What the scales of the codes follow from, besides the largest scores: logarithms of the values' scales, and each row's largest
    /// product.
    pub(super) log_scales: [f32; RANGE],
    pub(super) log_tops: [f32; TILE_ROWS],
    /// The inverses of `p_scales`, or 0.
    pub(super) factors: [f32; TILE_ROWS],
    pub(super) part: Aligned<f32>,
    /// All ranges so far.
    pub(super) running: Totals,
    pub(super) acc: Aligned<f32>,
}

impl WorkerScratch {
    pub(super) fn new(layout: CacheLayout) -> Self {
        let stride = layout.value_head_dim();
        let is_int8 = layout.format() == CacheFormat::Int8;
        let q_planes = if is_int8 { TILE_ROWS * layout.key_head_dim() } else { 0 };
        let p_planes = if is_int8 { TILE_ROWS * RANGE } else { 0 };
        Self {
            stride,
            q: Aligned::zeroed(TILE_ROWS * layout.head_dim()),
            hi: Aligned::zeroed(q_planes),
            lo: Aligned::zeroed(q_planes),
            q_scales: [0.0; TILE_ROWS],
            plane_sums: [[0; 2]; TILE_ROWS],
            scores: Aligned::zeroed(TILE_ROWS * RANGE),
            p_hi: Aligned::zeroed(p_planes),
            p_lo: Aligned::zeroed(p_planes),
            p_scales: [0.0; TILE_ROWS],
            p_sums: [[0; 2]; TILE_ROWS],
            totals: Totals::EMPTY,
            log_scales: [0.0; RANGE],
            log_tops: [0.0; TILE_ROWS],
            factors: [0.0; TILE_ROWS],
            part: Aligned::zeroed(TILE_ROWS * stride),
            running: Totals::EMPTY,
            acc: Aligned::zeroed(TILE_ROWS * stride),
        }
    }

    /// Forgets what was merged.
    pub(super) fn reset(&mut self, tile: &Tile) {
        self.running = Totals::EMPTY;
        self.acc[..tile.rows * self.stride].fill(0.0);
    }

    /// Merges `totals` and `part` into `running` and `acc`.
    pub(super) fn merge_part(&mut self, kernels: &Kernels, tile: &Tile) {
        let (rows, old) = (tile.rows, self.running.sums);
        let Totals { maxima, sums } = &mut self.running;
        let totals = [&mut maxima[..rows], &mut sums[..rows]];
        let new = [&self.totals.maxima[..rows], &self.totals.sums[..rows]];
        let [mut old_factors, mut new_factors] = [[0.0; TILE_ROWS]; 2];
        let factors = [&mut old_factors[..rows], &mut new_factors[..rows]];
        // SAFETY: the table exists only on a CPU that has its instruction set; all slices have a value for each row.
        unsafe { (kernels.merge_totals)(totals, new, factors) };
        let parts = self.part.chunks_exact(self.stride).zip(self.acc.chunks_exact_mut(self.stride));
        for (row, (part, acc)) in parts.take(rows).enumerate() {
            if self.totals.sums[row] == 0.0 {
                continue;
            }
            if old[row] == 0.0 {
                acc.copy_from_slice(part);
                continue;
            }
            // SAFETY: the table exists only on a CPU that has its instruction set.
            unsafe { (kernels.merge)(acc, part, [old_factors[row], new_factors[row]]) }
        }
    }

    /// Writes `totals` and `part` to `slots`, `[rows, stride + 2]`.
    pub(super) fn save_part(&self, tile: &Tile, slots: &mut [f32]) {
        for (row, slot) in slots.chunks_exact_mut(self.stride + 2).take(tile.rows).enumerate() {
            slot[..2].copy_from_slice(&[self.totals.maxima[row], self.totals.sums[row]]);
            slot[2..].copy_from_slice(&self.part[row * self.stride..][..self.stride]);
        }
    }

    /// Reads what [`save_part`](Self::save_part) wrote.
    pub(super) fn load_part(&mut self, tile: &Tile, slots: &[f32]) {
        for (row, slot) in slots.chunks_exact(self.stride + 2).take(tile.rows).enumerate() {
            (self.totals.maxima[row], self.totals.sums[row]) = (slot[0], slot[1]);
            self.part[row * self.stride..][..self.stride].copy_from_slice(&slot[2..]);
        }
    }
}

/// Of each row the largest score, and the sum of `exp(score - max)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Totals {
    pub(super) maxima: [f32; TILE_ROWS],
    pub(super) sums: [f32; TILE_ROWS],
}

impl Totals {
    /// Nothing seen yet.
    const EMPTY: Self = Self { maxima: [f32::NEG_INFINITY; TILE_ROWS], sums: [0.0; TILE_ROWS] };
}
