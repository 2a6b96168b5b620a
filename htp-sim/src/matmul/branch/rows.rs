//! First halves as integers.

use std::cell::RefCell;
use std::ops::Range;

use crate::Cx;
use crate::kernels::{IntegerTile, MAX_TILE_ROWS, QuantizedRowMut, RowValues, STREAM_AHEAD};
use crate::packed::{BlockOffset, PackedWeights};
use crate::scratch::LINE_BYTES;

use super::super::tile::Tile;

/// Names some rows of a first half.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::matmul) struct Key {
    /// Number of the layer, from 1 on.
    pub(super) layer: u64,
    /// Number of the first half in it.
    pub(super) first: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
}

/// Rows of a first half with 16 bits and a scale per row, as [`QuantizedRows`](crate::QuantizedRows) has them.
///
/// Each worker keeps those of its last tiles: the next tile mostly has the same rows and other panels.
#[repr(C, align(64))]
pub(in crate::matmul) struct IntegerRows {
    hi: [i8; PLANE],
    lo: [i8; PLANE],
    scales: [f32; MAX_TILE_ROWS],
    plane_sums: [[i32; 2]; MAX_TILE_ROWS],
    key: Key,
}

thread_local! {
    /// Two, since a gated layer goes to and fro between its halves.
    static ROWS: RefCell<[IntegerRows; 2]> = const { RefCell::new([IntegerRows::NONE, IntegerRows::NONE]) };
}

impl IntegerRows {
    /// No layer has number 0.
    const NONE: Self = Self {
        hi: [0; PLANE],
        lo: [0; PLANE],
        scales: [0.0; MAX_TILE_ROWS],
        plane_sums: [[0; 2]; MAX_TILE_ROWS],
        key: Key { layer: 0, first: 0, row: 0, rows: 0 },
    };

    /// Calls `f` with the rows of first halves, `[_, rank]` each, which the keys name. Of two, one is a gate's and one is that of what it
    /// gates.
    pub(in crate::matmul) fn with<const N: usize>(
        cx: &Cx<'_>,
        halves: [(Key, &[f32], usize); N],
        f: impl FnOnce([&Self; N]),
    ) {
        ROWS.with_borrow_mut(|rows| {
            for (key, t, rank) in halves {
                let rows = &mut rows[key.first % 2];
                if rows.key != key {
                    rows.quantize(cx, t, rank);
                    rows.key = key;
                }
            }
            f(halves.map(|(key, ..)| &rows[key.first % 2]));
        });
    }

    fn quantize(&mut self, cx: &Cx<'_>, t: &[f32], rank: usize) {
        let stride = stride(rank);
        for (row, x) in t.chunks_exact(rank).enumerate() {
            let at = row * stride;
            self.hi[at + rank..at + stride].fill(0);
            self.lo[at + rank..at + stride].fill(0);
            let mut sum = 0;
            let target = QuantizedRowMut {
                hi: &mut self.hi[at..at + rank],
                lo: &mut self.lo[at..at + rank],
                scale: &mut self.scales[row],
                sums: std::slice::from_mut(&mut sum),
                sum_block: rank,
                plane_sums: &mut self.plane_sums[row],
                steps: None,
            };
            // SAFETY: the table exists only on a CPU that has its instruction set; both planes are as long as x.
            unsafe { (cx.kernels.quantize)(RowValues { x, norm: None }, target) }
        }
    }

    /// Whether row `row` is all zeros, or so small that its scale is.
    pub(in crate::matmul) fn is_zero(&self, row: usize) -> bool {
        self.scales[row] == 0.0
    }

    /// The product of some rows with the panels of `tile`; `out` is `[rows, 16 · panels]`.
    pub(in crate::matmul) fn product(
        &self,
        cx: &Cx<'_>,
        rows: Range<usize>,
        weights: PackedWeights<'_>,
        tile: &Tile,
        out: &mut [f32],
    ) {
        // SAFETY: the table exists only on a CPU that has its instruction set. The planes have the rows that `quantize` wrote,
        // with zeros up to the stored k; the grid bounded rows and panels, and `out` has their length.
        unsafe { (cx.kernels.matmul_q_w8c)(&self.tile(rows, weights, tile), out) }
    }

    /// The same, as kernels see it.
    pub(in crate::matmul) fn tile<'a>(
        &'a self,
        Range { start: row, end }: Range<usize>,
        weights: PackedWeights<'a>,
        tile: &Tile,
    ) -> IntegerTile<'a> {
        let (layout, stride) = (weights.layout(), stride(weights.layout().k()));
        IntegerTile {
            rows: end - row,
            all_rows: end - row,
            panels: tile.panels,
            k: layout.k_padded(),
            hi: &self.hi[row * stride..],
            lo: &self.lo[row * stride..],
            x_stride: stride,
            x_scales: &self.scales[row..],
            sums: &[],
            plane_sums: &self.plane_sums[row..],
            codes: weights.codes_from(tile.panel),
            panel_bytes: layout.panel_code_bytes(),
            ahead: STREAM_AHEAD,
            width: layout.width(tile.panel),
            scales: weights.scales_from(tile.panel),
            offsets: &[],
            block: layout.k_padded(),
            offset: BlockOffset::Symmetric,
            added: [(&[], 0.0); 2],
            branch: None,
        }
    }
}

/// Bytes from one row to the next.
fn stride(rank: usize) -> usize {
    rank.next_multiple_of(LINE_BYTES)
}

/// Ranks above this are multiplied as floats: each thread of the process has the room for the rows.
pub(super) const MAX_INTEGER_RANK: usize = 128;

/// Bytes of a plane.
const PLANE: usize = MAX_TILE_ROWS * MAX_INTEGER_RANK;
