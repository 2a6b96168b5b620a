//! One tile of attention: some query rows of one KV head.

use std::ops::Range;

use super::scratch::WorkerScratch;
use super::{AttentionParams, Cache, CacheFormat, MAX_HEAD_DIM, RANGE};
use crate::kernels::{
    FloatTile, IntegerTile, Kernels, QuantizedRowMut, RowValues, SoftmaxTotals, ValuesTile, WeightsMut,
};
use crate::matmul::Write;
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
    /// At most `TILE_ROWS`.
    pub(super) tile_rows: usize,
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

/// The positions of a range that are computed: `from..to`, in columns that start at `first`, a multiple of 16.
#[derive(Clone, Copy)]
struct Span {
    from: usize,
    to: usize,
    first: usize,
    width: usize,
}

impl Span {
    /// What a tile sees of a range; no columns if it sees nothing.
    fn of(tile: &Tile, range: usize) -> Self {
        let from = tile.positions.start.max(range * RANGE);
        let to = tile.positions.end.min((range + 1) * RANGE);
        let first = from / PANEL * PANEL;
        Self { from, to, first, width: to.next_multiple_of(PANEL).saturating_sub(first) }
    }

    fn columns(&self) -> Range<usize> {
        self.first..self.first + self.width
    }
}

impl Problem<'_> {
    /// Tiles of one KV head.
    pub(super) fn tiles(&self) -> usize {
        self.rows().div_ceil(self.tile_rows)
    }

    pub(super) fn tile(&self, kv_head: usize, tile: usize) -> Tile {
        let first = tile * self.tile_rows;
        let rows = self.tile_rows.min(self.rows() - first);
        let positions = self.visible(first).start..self.visible(first + rows - 1).end;
        Tile { kv_head, first, rows, slot: kv_head * self.rows() + first, positions }
    }

    /// Copies the tile's queries side by side, scaled, and quantized if the cache is.
    pub(super) fn load_queries(&self, tile: &Tile, scratch: &mut WorkerScratch) {
        let head_dim = self.cache.layout.head_dim();
        let stride = self.cache.layout.key_head_dim();
        for row in 0..tile.rows {
            let x = &self.q[self.at(tile, row)..][..head_dim];
            if self.cache.layout.format() != CacheFormat::Int8 {
                let q = &mut scratch.q[row * head_dim..][..head_dim];
                q.iter_mut().zip(x).for_each(|(q, x)| *q = x * self.params.scale);
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
                steps: None,
            };
            // SAFETY: the table exists only on a CPU that has its instruction set; both planes are as long as x.
            unsafe { (self.kernels.quantize)(RowValues { x, norm: None }, target) };
            scratch.q_scales[row] *= self.params.scale;
        }
    }

    /// Computes the tile's part of range `range`: `scratch.totals` and `scratch.part`. The worker then goes on to `next`, a KV head and
    /// a range.
    pub(super) fn compute_range(
        &self,
        tile: &Tile,
        range: usize,
        next: Option<(usize, usize)>,
        scratch: &mut WorkerScratch,
    ) {
        let span = Span::of(tile, range);
        // While keys are read their values are asked for, and while these are, the next keys.
        let to_values = self.cache.ask_for_values(self.kernels, tile.kv_head, span.columns());
        self.scores(tile, span, to_values, scratch);
        let to_next = next.map_or(0, |(head, next_range)| {
            let blocks = [(tile.kv_head, range), (head, next_range)];
            // Tiles that follow each other see much the same positions.
            self.cache.ask_for_keys(self.kernels, blocks, Span::of(tile, next_range).columns())
        });
        if self.cache.layout.format() == CacheFormat::Int8 {
            self.integer_values(tile, span, to_next, scratch);
        } else {
            self.float_values(tile, span, scratch);
        }
    }

    /// `p · V` of an int8 cache. The probabilities times the scales of the values are quantized to 16 bits for each row and
    /// range, so the sums are exact integers.
    fn integer_values(&self, tile: &Tile, span: Span, ahead: isize, scratch: &mut WorkerScratch) {
        let layout = &self.cache.layout;
        let scales = &self.cache.value_scales(tile.kv_head, span.first).as_chunks().0[..span.width];
        let logs = &mut scratch.log_scales[..span.width];
        // SAFETY: the table exists only on a CPU that has its instruction set.
        unsafe { (self.kernels.log_scales)(scales, logs) };
        let rows = || (0..tile.rows).map(|row| (row, self.visible_in(row + tile.first, span)));
        let scores =
            |row: usize, visible: &Range<usize>| row * span.width + visible.start..row * span.width + visible.end;
        // Step by step over all rows: what ends the step of one overlaps with that of the next.
        for (row, visible) in rows() {
            let seen = &mut scratch.scores[scores(row, &visible)];
            self.cap(seen);
            // SAFETY: as above; there is a logarithm for each position of the span, and `visible` is inside.
            let peak = unsafe { (self.kernels.peak)(seen, &logs[visible]) };
            (scratch.totals.maxima[row], scratch.log_tops[row]) = (peak.max, peak.log_top);
        }
        let peaks = [&scratch.totals.maxima[..tile.rows], &scratch.log_tops[..tile.rows]];
        // SAFETY: as above; all slices have a value for each row.
        unsafe {
            (self.kernels.weight_scales)(peaks, [&mut scratch.p_scales[..tile.rows], &mut scratch.factors[..tile.rows]])
        };
        for (row, visible) in rows() {
            let at = row * RANGE;
            let (hi, lo) = (&mut scratch.p_hi[at..][..span.width], &mut scratch.p_lo[at..][..span.width]);
            for outside in [0..visible.start, visible.end..span.width].into_iter().filter(|outside| !outside.is_empty())
            {
                hi[outside.clone()].fill(0);
                lo[outside].fill(0);
            }
            let seen = &scratch.scores[scores(row, &visible)];
            let max = scratch.totals.maxima[row];
            let target = WeightsMut {
                hi: &mut hi[visible.clone()],
                lo: &mut lo[visible.clone()],
                scale: &mut scratch.p_scales[row],
                plane_sums: &mut scratch.p_sums[row],
            };
            // SAFETY: as above; all slices are as long as `visible`.
            scratch.totals.sums[row] =
                unsafe { (self.kernels.weigh)(seen, &scales[visible], [max, scratch.factors[row]], target) };
        }
        let values = IntegerTile {
            rows: tile.rows,
            all_rows: tile.rows,
            panels: layout.value_head_dim() / PANEL,
            k: span.width,
            hi: &scratch.p_hi,
            lo: &scratch.p_lo,
            x_stride: RANGE,
            x_scales: &scratch.p_scales,
            sums: &[],
            plane_sums: &scratch.p_sums,
            codes: self.cache.value_panels(tile.kv_head, span.first),
            panel_bytes: RANGE * PANEL,
            ahead,
            width: PANEL,
            scales: ONES.as_flattened(),
            offsets: &[],
            block: span.width,
            offset: BlockOffset::Symmetric,
            added: [(&[], 0.0); 2],
            branch: None,
        };
        let part = &mut scratch.part[..tile.rows * layout.value_head_dim()];
        // SAFETY: the table exists only on a CPU that has its instruction set. The cache holds whole groups of 16 positions,
        // so the span is inside it; the planes have `rows` rows of `width`, and `part` `rows` rows of whole panels.
        unsafe { (self.kernels.matmul_q_w8c)(&values, part) }
    }

    /// `p · V` of a float cache.
    fn float_values(&self, tile: &Tile, span: Span, scratch: &mut WorkerScratch) {
        let head_dim = self.cache.layout.head_dim();
        for row in 0..tile.rows {
            let visible = self.visible_in(row + tile.first, span);
            let scores = &mut scratch.scores[row * span.width..][..span.width];
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let seen = &mut scores[visible];
            self.cap(seen);
            // SAFETY: the table exists only on a CPU that has its instruction set.
            let SoftmaxTotals { max, sum } = unsafe { (self.kernels.softmax)(seen) };
            (scratch.totals.maxima[row], scratch.totals.sums[row]) = (max, sum);
        }
        let part = &mut scratch.part[..tile.rows * head_dim];
        part.fill(0.0);
        let values = ValuesTile {
            rows: tile.rows,
            positions: span.to - span.from,
            head_dim,
            p: &scratch.scores[span.from - span.first..],
            p_stride: span.width,
            values: self.cache.value_rows(tile.kv_head, span.from),
        };
        let f16 = self.cache.layout.format() == CacheFormat::F16;
        let kernel = if f16 { self.kernels.values_f16 } else { self.kernels.values_f32 };
        // SAFETY: the table exists only on a CPU that has its instruction set. `attention` checked that the positions are
        // inside the cache; p has `rows` rows of `width` values, and `part` `rows` rows of `head_dim`.
        unsafe { kernel(&values, part) }
    }

    /// Writes the tile's rows of the result.
    pub(super) fn store(&self, tile: &Tile, scratch: &WorkerScratch, out: &Disjoint<'_, f32>) {
        let (head_dim, stride) = (self.cache.layout.head_dim(), self.cache.layout.value_head_dim());
        for row in 0..tile.rows {
            // SAFETY: each pair of row and head belongs to one tile, and each tile is stored once, by whoever has all of it.
            let out = unsafe { out.range(self.at(tile, row), head_dim) };
            let factor = 1.0 / scratch.running.sums[row];
            // SAFETY: the table exists only on a CPU that has its instruction set.
            unsafe { (self.kernels.scale)(&scratch.acc[row * stride..][..head_dim], factor, out) }
        }
    }

    /// `q · k` of the span's columns, into `scratch.scores`, `[rows, width]`.
    fn scores(&self, tile: &Tile, span: Span, ahead: isize, scratch: &mut WorkerScratch) {
        let Span { first, width, .. } = span;
        let layout = &self.cache.layout;
        let codes = self.cache.keys(tile.kv_head, first);
        let out = &mut scratch.scores[..tile.rows * width];
        if layout.format() == CacheFormat::Int8 {
            let tile = IntegerTile {
                rows: tile.rows,
                all_rows: tile.rows,
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
                ahead,
                width: PANEL,
                scales: self.cache.key_scales(tile.kv_head, first),
                offsets: &[],
                block: layout.key_head_dim(),
                offset: BlockOffset::Symmetric,
                added: [(&[], 0.0); 2],
                branch: None,
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
            write: Write::Store,
        };
        let f16 = layout.format() == CacheFormat::F16;
        let kernel = if f16 { self.kernels.matmul_f32_f16 } else { self.kernels.matmul_f32_f32 };
        // SAFETY: as above.
        unsafe { kernel(&tile, out) }
    }

    fn cap(&self, seen: &mut [f32]) {
        if let Some(cap) = self.params.softcap {
            // SAFETY: the table exists only on a CPU that has its instruction set.
            unsafe { (self.kernels.soft_cap)(seen, cap) }
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

    /// The columns of `span` that query row `row` of a KV head sees.
    fn visible_in(&self, row: usize, span: Span) -> Range<usize> {
        let visible = self.visible(row);
        let column = |position: usize| position.saturating_sub(span.first).min(span.width);
        column(visible.start)..column(visible.end)
    }

    /// Where the tile's row `row` starts in q and in the output.
    fn at(&self, tile: &Tile, row: usize) -> usize {
        let (position, head) = ((tile.first + row) / self.group(), (tile.first + row) % self.group());
        (position * self.params.heads + tile.kv_head * self.group() + head) * self.cache.layout.head_dim()
    }
}

/// Scales of the value panels, little endian: the values' own are in the probabilities.
static ONES: [[u8; 4]; MAX_HEAD_DIM] = [1.0_f32.to_le_bytes(); MAX_HEAD_DIM];
