//! One tile of attention: some query rows of one KV head.

use std::ops::Range;

use super::{AttentionParams, Cache, CacheFormat, CacheLayout, RANGE, TILE_ROWS};
use crate::arch::portable::vector::exp;
use crate::kernels::{FloatTile, IntegerTile, Kernels, QuantizedRowMut, RowValues, SoftmaxTotals, ValuesTile};
use crate::packed::{BlockOffset, PANEL};
use crate::scratch::Disjoint;

/// One call of attention; every length in it was checked.
pub(super) struct Problem<'a> {
    pub(super) kernels: &'static Kernels,
    pub(super) cache: Cache<'a>,
    pub(super) past: usize,
    pub(super) m: usize,
    pub(super) q: &'a [f32],
    pub(super) params: AttentionParams,
}

/// Query rows `first..first + rows` of a KV head, counted over positions and, inside a position, over its query heads.
pub(super) struct Tile {
    pub(super) kv_head: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Rows of all tiles before this one.
    pub(super) slot: usize,
    /// Positions that some row sees.
    pub(super) positions: Range<usize>,
}

impl Tile {
    /// The ranges that hold a position which some row sees.
    pub(super) fn ranges(&self) -> Range<usize> {
        self.positions.start / RANGE..self.positions.end.div_ceil(RANGE)
    }
}

impl Problem<'_> {
    /// Tiles of one KV head.
    pub(super) fn tiles(&self) -> usize {
        self.rows().div_ceil(TILE_ROWS)
    }

    pub(super) fn tile(&self, kv_head: usize, tile: usize) -> Tile {
        let first = tile * TILE_ROWS;
        let rows = TILE_ROWS.min(self.rows() - first);
        let positions = self.visible(first).start..self.visible(first + rows - 1).end;
        Tile { kv_head, first, rows, slot: kv_head * self.rows() + first, positions }
    }

    /// Copies the tile's queries side by side, quantized if the cache is.
    pub(super) fn load_queries(&self, tile: &Tile, scratch: &mut WorkerScratch) {
        let head_dim = self.cache.layout.head_dim();
        let stride = self.cache.layout.key_head_dim();
        for row in 0..tile.rows {
            let x = &self.q[self.at(tile, row)..][..head_dim];
            if self.cache.layout.format() != CacheFormat::Int8 {
                scratch.q[row * head_dim..][..head_dim].copy_from_slice(x);
                continue;
            }
            let mut sum = 0;
            let target = QuantizedRowMut {
                hi: &mut scratch.hi[row * stride..][..head_dim],
                lo: &mut scratch.lo[row * stride..][..head_dim],
                scale: &mut scratch.q_scales[row],
                sums: std::slice::from_mut(&mut sum),
                sum_block: head_dim,
                plane_sums: &mut scratch.plane_sums[row],
            };
            // SAFETY: the table exists only on a CPU that has its instruction set; both planes are as long as x.
            unsafe { (self.kernels.quantize)(RowValues { x, norm: None }, target) };
        }
    }

    /// Computes the tile's part of range `range`: `scratch.totals` and `scratch.part`.
    pub(super) fn compute_range(&self, tile: &Tile, range: usize, scratch: &mut WorkerScratch) {
        let from = tile.positions.start.max(range * RANGE);
        let to = tile.positions.end.min((range + 1) * RANGE);
        let first = from / PANEL * PANEL;
        let width = to.next_multiple_of(PANEL) - first;
        self.scores(tile, first, width, scratch);
        for row in 0..tile.rows {
            let visible = self.visible(tile.first + row);
            let visible = visible.start.clamp(from, to) - first..visible.end.clamp(from, to) - first;
            let scores = &mut scratch.scores[row * width..][..width];
            scratch.totals[row] = self.probabilities(scores, visible);
            if self.cache.layout.format() == CacheFormat::Int8 {
                let scales = self.cache.value_scales(tile.kv_head, first).as_chunks().0;
                // Only where the cache has been written: `to` and beyond may hold anything.
                let written = &mut scores[..to - first];
                written.iter_mut().zip(scales).for_each(|(p, scale)| *p *= f32::from_le_bytes(*scale));
            }
        }
        let head_dim = self.cache.layout.head_dim();
        let part = &mut scratch.part[..tile.rows * head_dim];
        part.fill(0.0);
        let values = ValuesTile {
            rows: tile.rows,
            positions: to - from,
            head_dim,
            p: &scratch.scores[from - first..],
            p_stride: width,
            values: self.cache.values(tile.kv_head, from),
        };
        let kernel = match self.cache.layout.format() {
            CacheFormat::F32 => self.kernels.values_f32,
            CacheFormat::F16 => self.kernels.values_f16,
            CacheFormat::Int8 => self.kernels.values_i8,
        };
        // SAFETY: the table exists only on a CPU that has its instruction set. `attention` checked that the positions are
        // inside the cache; p has `rows` rows of `width` values, and `part` `rows` rows of `head_dim`.
        unsafe { kernel(&values, part) }
    }

    /// Writes the tile's rows of the result.
    pub(super) fn store(&self, tile: &Tile, scratch: &WorkerScratch, out: &Disjoint<'_, f32>) {
        let head_dim = self.cache.layout.head_dim();
        for row in 0..tile.rows {
            // SAFETY: each pair of row and head belongs to one tile, and each tile is one item.
            let out = unsafe { out.range(self.at(tile, row), head_dim) };
            let sum = scratch.running[row].sum;
            for (out, acc) in out.iter_mut().zip(&scratch.acc[row * head_dim..]) {
                *out = acc / sum;
            }
        }
    }

    /// `q · k` for `width` positions from `first`, into `scratch.scores`, `[rows, width]`.
    fn scores(&self, tile: &Tile, first: usize, width: usize, scratch: &mut WorkerScratch) {
        let layout = &self.cache.layout;
        let codes = self.cache.keys(tile.kv_head, first);
        let out = &mut scratch.scores[..tile.rows * width];
        if layout.format() == CacheFormat::Int8 {
            let tile = IntegerTile {
                rows: tile.rows,
                panels: width / PANEL,
                k: layout.key_head_dim(),
                hi: &scratch.hi,
                lo: &scratch.lo,
                x_stride: layout.key_head_dim(),
                x_scales: &scratch.q_scales,
                sums: &[],
                plane_sums: &scratch.plane_sums,
                codes,
                panel_bytes: layout.key_panel_bytes(),
                scales: self.cache.key_scales(tile.kv_head, first),
                offsets: &[],
                block: layout.key_head_dim(),
                offset: BlockOffset::Symmetric,
            };
            // SAFETY: the table exists only on a CPU that has its instruction set. The cache holds whole panels, so the
            // last one is inside it; planes and scores have `rows` rows.
            return unsafe { (self.kernels.matmul_q_w8c)(&tile, out) };
        }
        let tile = FloatTile {
            rows: tile.rows,
            panels: width / PANEL,
            k: layout.head_dim(),
            x: &scratch.q,
            x_stride: layout.head_dim(),
            codes,
            panel_bytes: layout.key_panel_bytes(),
            scales: &[],
        };
        let f16 = layout.format() == CacheFormat::F16;
        let kernel = if f16 { self.kernels.matmul_f32_f16 } else { self.kernels.matmul_f32_f32 };
        // SAFETY: as above.
        unsafe { kernel(&tile, out) }
    }

    /// Turns one row's scores into probabilities (not yet divided by their sum), 0 outside `visible`.
    fn probabilities(&self, scores: &mut [f32], visible: Range<usize>) -> SoftmaxTotals {
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        let seen = &mut scores[visible];
        seen.iter_mut().for_each(|score| *score *= self.params.scale);
        // SAFETY: the table exists only on a CPU that has its instruction set.
        unsafe {
            if let Some(cap) = self.params.softcap {
                (self.kernels.soft_cap)(seen, cap);
            }
            (self.kernels.softmax)(seen)
        }
    }

    /// Query rows of one KV head.
    fn rows(&self) -> usize {
        self.m * self.group()
    }

    /// Query heads of one KV head.
    fn group(&self) -> usize {
        self.params.heads / self.cache.layout.kv_heads()
    }

    /// The positions that query row `row` of a KV head sees.
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.past + row / self.group() + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Where the tile's row `row` starts in q and in the output.
    fn at(&self, tile: &Tile, row: usize) -> usize {
        let (position, head) = ((tile.first + row) / self.group(), (tile.first + row) % self.group());
        (position * self.params.heads + tile.kv_head * self.group() + head) * self.cache.layout.head_dim()
    }
}

/// One worker's buffers.
#[derive(Debug)]
pub(super) struct WorkerScratch {
    head_dim: usize,
    q: Vec<f32>,
    hi: Vec<i8>,
    lo: Vec<i8>,
    q_scales: [f32; TILE_ROWS],
    plane_sums: [[i32; 2]; TILE_ROWS],
    scores: Vec<f32>,
    totals: [SoftmaxTotals; TILE_ROWS],
    part: Vec<f32>,
    running: [SoftmaxTotals; TILE_ROWS],
    acc: Vec<f32>,
}

impl WorkerScratch {
    pub(super) fn new(layout: CacheLayout) -> Self {
        let (head_dim, stride) = (layout.head_dim(), layout.key_head_dim());
        let planes = if layout.format() == CacheFormat::Int8 { TILE_ROWS * stride } else { 0 };
        Self {
            head_dim,
            q: vec![0.0; TILE_ROWS * head_dim],
            hi: vec![0; planes],
            lo: vec![0; planes],
            q_scales: [0.0; TILE_ROWS],
            plane_sums: [[0; 2]; TILE_ROWS],
            scores: vec![0.0; TILE_ROWS * RANGE],
            totals: [EMPTY; TILE_ROWS],
            part: vec![0.0; TILE_ROWS * head_dim],
            running: [EMPTY; TILE_ROWS],
            acc: vec![0.0; TILE_ROWS * head_dim],
        }
    }

    /// Forgets what was merged.
    pub(super) fn reset(&mut self, tile: &Tile) {
        self.running[..tile.rows].fill(EMPTY);
        self.acc[..tile.rows * self.head_dim].fill(0.0);
    }

    /// Merges `totals` and `part` into `running` and `acc`.
    pub(super) fn merge_part(&mut self, tile: &Tile) {
        for row in 0..tile.rows {
            let (new, old) = (self.totals[row], self.running[row]);
            if new.sum == 0.0 {
                continue;
            }
            let max = if old.max >= new.max { old.max } else { new.max };
            let (old_factor, new_factor) = (exp(old.max - max), exp(new.max - max));
            self.running[row] = SoftmaxTotals { max, sum: old.sum * old_factor + new.sum * new_factor };
            let part = &self.part[row * self.head_dim..][..self.head_dim];
            for (acc, part) in self.acc[row * self.head_dim..].iter_mut().zip(part) {
                *acc = *acc * old_factor + part * new_factor;
            }
        }
    }

    /// Writes `totals` and `part` to `slots`, `[rows, head_dim + 2]`.
    pub(super) fn save_part(&self, tile: &Tile, slots: &mut [f32]) {
        for (row, slot) in slots.chunks_exact_mut(self.head_dim + 2).take(tile.rows).enumerate() {
            let SoftmaxTotals { max, sum } = self.totals[row];
            slot[..2].copy_from_slice(&[max, sum]);
            slot[2..].copy_from_slice(&self.part[row * self.head_dim..][..self.head_dim]);
        }
    }

    /// Reads what [`save_part`](Self::save_part) wrote.
    pub(super) fn load_part(&mut self, tile: &Tile, slots: &[f32]) {
        for (row, slot) in slots.chunks_exact(self.head_dim + 2).take(tile.rows).enumerate() {
            self.totals[row] = SoftmaxTotals { max: slot[0], sum: slot[1] };
            self.part[row * self.head_dim..][..self.head_dim].copy_from_slice(&slot[2..]);
        }
    }
}

/// Nothing seen yet.
const EMPTY: SoftmaxTotals = SoftmaxTotals { max: f32::NEG_INFINITY, sum: 0.0 };
