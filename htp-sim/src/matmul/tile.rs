//! One tile of a matrix product: the kernel's call, then bias and branch.

use super::branch::{FirstHalves, SecondHalf};
use super::{Half, PANEL, PRODUCTS, Rows, with_buffer};
use crate::Cx;
use crate::kernels::{FloatFn, FloatTile, IntegerTile, MAX_TILE_ROWS};
use crate::packed::{BlockOffset, PackedWeights, WeightFormat};
use crate::quantize::QuantizedRows;

/// A rectangle of the output, in rows and panels.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) panel: usize,
    pub(super) panels: usize,
}

impl Tile {
    /// Values in the tile's buffer.
    pub(super) fn values(&self) -> usize {
        self.rows * self.panels * PANEL
    }
}

/// Computes the tile with its bias and branch. `values` is `[rows, 16 · panels]`.
pub(super) fn finish(
    cx: &Cx<'_>,
    x: Rows<'_>,
    half: &Half<'_>,
    firsts: &FirstHalves<'_>,
    tile: &Tile,
    values: &mut [f32],
) {
    if let Some(branch) = &half.branch {
        // The few bytes that the tile needs of it come meanwhile.
        let bytes = branch.up.codes_from(tile.panel);
        let len = tile.panels * branch.up.layout().panel_code_bytes();
        (cx.kernels.prefetch)(&bytes[..len.min(bytes.len())]);
    }
    match x {
        Rows::F32 { x, .. } => {
            let k = half.weights.layout().k();
            compute_floats(cx, FloatRows { x: &x[tile.row * k..], stride: k }, half.weights, tile, values);
        }
        Rows::Quantized(rows) => {
            compute_integers(cx, rows, half.weights, tile, values);
            if rows.shift() != 0.0 {
                // What code 0 of x stands for: `shift · Σ w` of each output.
                add_row(cx, tile, values, half.weights.row_sums(), rows.shift());
            }
        }
    }
    if let Some(bias) = half.bias {
        add_row(cx, tile, values, bias, 1.0);
    }
    if let Some(branch) = &half.branch {
        add_branch(cx, branch, firsts, tile, values);
    }
}

/// Rows of floats, starting at a tile's first row.
#[derive(Clone, Copy)]
struct FloatRows<'a> {
    x: &'a [f32],
    stride: usize,
}

/// Adds `factor` times a row that has a value for each output of the weights.
fn add_row(cx: &Cx<'_>, tile: &Tile, values: &mut [f32], row: &[f32], factor: f32) {
    // SAFETY: the table exists only on a CPU that has its instruction set; `values` has whole rows of whole panels.
    unsafe { (cx.kernels.add_row)(values, tile.panels * PANEL, &row[tile.panel * PANEL..], factor) }
}

fn add_branch(cx: &Cx<'_>, branch: &SecondHalf<'_>, firsts: &FirstHalves<'_>, tile: &Tile, values: &mut [f32]) {
    let rank = branch.up.layout().k();
    let t = firsts.rows(branch, tile.row, tile.rows);
    let is_zero = |row: usize| t[row * rank..][..rank].iter().all(|&t| t == 0.0);
    if (0..tile.rows).all(is_zero) {
        return;
    }
    let width = tile.panels * PANEL;
    with_buffer(&PRODUCTS, values.len(), |products| {
        compute_floats(cx, FloatRows { x: t, stride: rank }, branch.up, tile, products);
        for (row, (values, products)) in values.chunks_exact_mut(width).zip(products.chunks_exact(width)).enumerate() {
            if !is_zero(row) {
                // SAFETY: the table exists only on a CPU that has its instruction set; `values` is one row of whole panels.
                unsafe { (cx.kernels.add_row)(values, width, products, 1.0) }
            }
        }
    });
}

fn compute_integers(cx: &Cx<'_>, x: &QuantizedRows, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
    let from = x.from(tile.row, layout.format().block().unwrap_or(layout.k()));
    let (kernel, k, offset) = match layout.format() {
        WeightFormat::Int8PerChannel => (cx.kernels.matmul_q_w8c, layout.k_padded(), BlockOffset::Symmetric),
        WeightFormat::Int4PerChannel => (cx.kernels.matmul_q_w4c, layout.k_padded(), BlockOffset::Symmetric),
        WeightFormat::Int4Expansion { .. } => (cx.kernels.matmul_q_w4e, layout.k(), BlockOffset::Symmetric),
        WeightFormat::Int8Block { .. } => (cx.kernels.matmul_q_w8b, layout.k(), BlockOffset::Symmetric),
        WeightFormat::Int4Block { offset, .. } => (cx.kernels.matmul_q_w4b, layout.k(), offset),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => unreachable!("`check` refused float weights"),
    };
    let tile = IntegerTile {
        rows: tile.rows,
        panels: tile.panels,
        k,
        hi: from.hi,
        lo: from.lo,
        x_stride: from.stride,
        x_scales: from.scales,
        sums: from.sums,
        plane_sums: from.plane_sums,
        codes: weights.codes_from(tile.panel),
        panel_bytes: layout.panel_code_bytes(),
        width: layout.width(tile.panel),
        scales: weights.scales_from(tile.panel),
        offsets: weights.offsets_from(tile.panel),
        block: layout.format().block().or(layout.format().step_block()).unwrap_or(k),
        offset,
    };
    // SAFETY: the table exists only on a CPU that has its instruction set. `check` matched k and the blocks of x and the
    // weights, the grid bounded rows and panels, and `values` has the tile's length.
    unsafe { kernel(&tile, values) }
}

fn compute_floats(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
    if layout.width(tile.panel) < PANEL {
        return compute_widened(cx, rows, weights, tile, values);
    }
    let kernel = match layout.format() {
        WeightFormat::F32 => cx.kernels.matmul_f32_f32,
        WeightFormat::F16 => cx.kernels.matmul_f32_f16,
        WeightFormat::Bf16 => cx.kernels.matmul_f32_bf16,
        WeightFormat::Int8PerChannel => cx.kernels.matmul_f32_w8c,
        _ => return compute_dequantized(cx, rows, weights, tile, values),
    };
    let tile = FloatTile {
        rows: tile.rows,
        panels: tile.panels,
        k: layout.k(),
        x: rows.x,
        x_stride: rows.stride,
        codes: weights.codes_from(tile.panel),
        panel_bytes: layout.panel_code_bytes(),
        scales: weights.scales_from(tile.panel),
    };
    // SAFETY: the table exists only on a CPU that has its instruction set. `check` matched the lengths of x and the
    // weights, the grid bounded rows and panels, and `values` has the tile's length.
    unsafe { kernel(&tile, values) }
}

/// A narrow panel: some of its inputs at a time are copied to a full panel on the stack.
fn compute_widened(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
    let (kernel, inputs_per_row, element_bytes) = match layout.format() {
        WeightFormat::F32 => (cx.kernels.matmul_f32_f32, 1, 4),
        WeightFormat::F16 => (cx.kernels.matmul_f32_f16, 1, 2),
        WeightFormat::Bf16 => (cx.kernels.matmul_f32_bf16, 1, 2),
        WeightFormat::Int8PerChannel => (cx.kernels.matmul_f32_w8c, 4, 4),
        _ => return compute_dequantized(cx, rows, weights, tile, values),
    };
    let row_bytes = layout.width(tile.panel) * element_bytes;
    values.fill(0.0);
    for from in (0..layout.k()).step_by(PIECE) {
        let k = PIECE.min(layout.k() - from);
        let mut piece = [0; PIECE_BYTES];
        let narrow = weights.codes_from(tile.panel)[from / inputs_per_row * row_bytes..].chunks_exact(row_bytes);
        let wide = piece.chunks_exact_mut(PANEL * element_bytes).take(k.div_ceil(inputs_per_row));
        wide.zip(narrow).for_each(|(wide, narrow)| wide[..row_bytes].copy_from_slice(narrow));
        let piece = Piece { from, k, codes: &piece, scales: weights.scales_from(tile.panel) };
        piece.add_product(kernel, rows, tile, values);
    }
}

/// The slow path: some inputs of a panel at a time become floats on the stack.
fn compute_dequantized(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
    values.fill(0.0);
    for panel in 0..tile.panels {
        let first = (tile.panel + panel) * PANEL;
        for from in (0..layout.k()).step_by(PIECE) {
            let k = PIECE.min(layout.k() - from);
            let mut piece = [0; PIECE_BYTES];
            for (i, bytes) in piece.as_chunks_mut().0[..k * PANEL].iter_mut().enumerate() {
                let (row, k) = (first + i % PANEL, from + i / PANEL);
                *bytes = if row < layout.n() { weights.dequantize(row, k) } else { 0.0 }.to_le_bytes();
            }
            let piece = Piece { from, k, codes: &piece, scales: &[] };
            piece.add_product(cx.kernels.matmul_f32_f32, rows, tile, &mut values[panel * PANEL..]);
        }
    }
}

/// Inputs `from..from + k` of one panel.
struct Piece<'a> {
    from: usize,
    k: usize,
    codes: &'a [u8; PIECE_BYTES],
    scales: &'a [u8],
}

impl Piece<'_> {
    /// Adds the product of `rows` and the piece to the columns of one panel of the tile, which start at `values`.
    fn add_product(&self, kernel: FloatFn, rows: FloatRows<'_>, tile: &Tile, values: &mut [f32]) {
        let mut buffer = [0.0; MAX_TILE_ROWS * PANEL];
        let products = &mut buffer[..tile.rows * PANEL];
        let piece = FloatTile {
            rows: tile.rows,
            panels: 1,
            k: self.k,
            x: &rows.x[self.from..],
            x_stride: rows.stride,
            codes: self.codes,
            panel_bytes: PIECE_BYTES,
            scales: self.scales,
        };
        // SAFETY: as in `compute_floats`; the piece has `k` inputs of one panel.
        unsafe { kernel(&piece, products) };
        for (values, products) in values.chunks_mut(tile.panels * PANEL).zip(products.chunks_exact(PANEL)) {
            values.iter_mut().zip(products).for_each(|(value, product)| *value += product);
        }
    }
}

/// Inputs of a panel that are widened at a time, and their bytes as f32.
const PIECE: usize = 64;
const PIECE_BYTES: usize = PIECE * PANEL * 4;
