//! One tile of a matrix product: the kernel's call, then bias and branch.

use super::{Branch, Gate, PANEL, Rows, TILE_VALUES};
use crate::Cx;
use crate::kernels::{FloatTile, IntegerTile};
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
pub(super) fn finish(cx: &Cx<'_>, x: Rows<'_>, half: &Gate<'_>, tile: &Tile, values: &mut [f32]) {
    match x {
        Rows::F32 { x, .. } => {
            let k = half.weights.layout().k();
            compute_floats(cx, FloatRows { x: &x[tile.row * k..], stride: k }, half.weights, tile, values);
        }
        Rows::Quantized(rows) => {
            compute_integers(cx, rows, half.weights, tile, values);
            if rows.shift() != 0.0 {
                add_shift(rows.shift(), half.weights.row_sums(), tile, values);
            }
        }
    }
    if let Some(bias) = half.bias {
        add_bias(bias, tile, values);
    }
    if let Some(branch) = &half.branch {
        add_branch(cx, branch, tile, values);
    }
}

/// Rows of floats, starting at a tile's first row.
#[derive(Clone, Copy)]
struct FloatRows<'a> {
    x: &'a [f32],
    stride: usize,
}

fn add_bias(bias: &[f32], tile: &Tile, values: &mut [f32]) {
    let bias = &bias[tile.panel * PANEL..];
    for row in values.chunks_exact_mut(tile.panels * PANEL) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

/// Adds what code 0 of x stands for: `shift · Σ w` of each output.
fn add_shift(shift: f32, row_sums: &[f32], tile: &Tile, values: &mut [f32]) {
    let sums = &row_sums[tile.panel * PANEL..];
    for row in values.chunks_exact_mut(tile.panels * PANEL) {
        row.iter_mut().zip(sums).for_each(|(value, sum)| *value += shift * sum);
    }
}

fn add_branch(cx: &Cx<'_>, branch: &Branch<'_>, tile: &Tile, values: &mut [f32]) {
    let rank = branch.up.layout().k();
    let t = &branch.t[tile.row * branch.t_stride + branch.t_at..];
    let row_of = |row: usize| &t[row * branch.t_stride..][..rank];
    let is_zero = |row: usize| row_of(row).iter().all(|&t| t == 0.0);
    if (0..tile.rows).all(is_zero) {
        return;
    }
    let mut buffer = [0.0; TILE_VALUES];
    let products = &mut buffer[..values.len()];
    compute_floats(cx, FloatRows { x: t, stride: branch.t_stride }, branch.up, tile, products);
    let width = tile.panels * PANEL;
    for (row, (values, products)) in values.chunks_exact_mut(width).zip(products.chunks_exact(width)).enumerate() {
        if !is_zero(row) {
            values.iter_mut().zip(products).for_each(|(value, product)| *value += product);
        }
    }
}

fn compute_integers(cx: &Cx<'_>, x: &QuantizedRows, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
    let from = x.from(tile.row, layout.format().block().unwrap_or(layout.k()));
    let (kernel, k, offset) = match layout.format() {
        WeightFormat::Int8PerChannel => (cx.kernels.matmul_q_w8c, layout.k_padded(), BlockOffset::Symmetric),
        WeightFormat::Int4PerChannel => (cx.kernels.matmul_q_w4c, layout.k_padded(), BlockOffset::Symmetric),
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
        scales: weights.scales_from(tile.panel),
        offsets: weights.offsets_from(tile.panel),
        block: layout.format().block().unwrap_or(k),
        offset,
    };
    // SAFETY: the table exists only on a CPU that has its instruction set. `check` matched k and the blocks of x and the
    // weights, the grid bounded rows and panels, and `values` has the tile's length.
    unsafe { kernel(&tile, values) }
}

fn compute_floats(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let layout = weights.layout();
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

/// The slow path: some inputs of a panel at a time become floats on the stack, and the products of each piece are added.
fn compute_dequantized(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    const PIECE: usize = 64;
    let layout = weights.layout();
    values.fill(0.0);
    for panel in 0..tile.panels {
        let first = (tile.panel + panel) * PANEL;
        for from in (0..layout.k()).step_by(PIECE) {
            let k = PIECE.min(layout.k() - from);
            let mut piece = [0; PIECE * PANEL * 4];
            for (i, bytes) in piece.as_chunks_mut().0[..k * PANEL].iter_mut().enumerate() {
                let (row, k) = (first + i % PANEL, from + i / PANEL);
                *bytes = if row < layout.n() { weights.dequantize(row, k) } else { 0.0 }.to_le_bytes();
            }
            let mut buffer = [0.0; TILE_VALUES];
            let products = &mut buffer[..tile.rows * PANEL];
            let piece = FloatTile {
                rows: tile.rows,
                panels: 1,
                k,
                x: &rows.x[from..],
                x_stride: rows.stride,
                codes: &piece,
                panel_bytes: piece.len(),
                scales: &[],
            };
            // SAFETY: as in `compute_floats`; the piece has `k` inputs of one panel.
            unsafe { (cx.kernels.matmul_f32_f32)(&piece, products) };
            for (row, products) in products.chunks_exact(PANEL).enumerate() {
                let target = &mut values[(row * tile.panels + panel) * PANEL..][..PANEL];
                target.iter_mut().zip(products).for_each(|(value, product)| *value += product);
            }
        }
    }
}
