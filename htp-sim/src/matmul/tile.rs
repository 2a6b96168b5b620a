//! One tile of a matrix product: the kernel's call, then bias and branch.

use super::branch::{FirstHalves, IntegerRows};
use super::{Half, PANEL, PRODUCTS, Rows, TILE_VALUES, Write, with_buffer};
use crate::Cx;
use crate::elementwise::Activation;
use crate::kernels::{
    FloatFn, FloatTile, GatedFn, IntegerFn, IntegerTile, MAX_TILE_ROWS, RowsMut, STREAM_AHEAD, Straight, StraightFn,
};
use crate::packed::{PackedWeights, WeightFormat};
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

    /// The tile in pieces that a buffer has room for.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Tile> {
        let Tile { row, rows, panel, panels } = *self;
        let most = TILE_VALUES / PANEL / rows;
        (0..panels).step_by(most).map(move |at| Tile { row, rows, panel: panel + at, panels: most.min(panels - at) })
    }
}

/// Computes the tile with its bias. `values` is `[rows, 16 · panels]`.
pub(super) fn compute(cx: &Cx<'_>, x: Rows<'_>, half: &Half<'_>, tile: &Tile, values: &mut [f32]) {
    match x {
        Rows::F32 { x, .. } => {
            let k = half.weights.layout().k();
            compute_floats(cx, FloatRows { x: &x[tile.row * k..], stride: k }, half.weights, tile, values);
        }
        Rows::Quantized(rows) => {
            let kernel = integer_kernel(cx, half.weights);
            // SAFETY: the table exists only on a CPU that has its instruction set. `check` matched k and the blocks of x and the
            // weights, the grid bounded rows and panels, and `values` has the tile's length.
            unsafe { kernel(&integer_tile(rows, half.weights, tile), values) }
            if rows.shift() != 0.0 {
                // What code 0 of x stands for: `shift · Σ w` of each output.
                add_row(cx, tile, values, half.weights.row_sums(), rows.shift());
            }
        }
    }
    if let Some(bias) = half.bias {
        add_row(cx, tile, values, bias, 1.0);
    }
}

/// Computes the tile, with all that is added to it, straight into the output, if this tier has kernels for that. Says whether it did.
pub(super) fn compute_straight(
    cx: &Cx<'_>,
    x: Rows<'_>,
    half: &Half<'_>,
    firsts: &FirstHalves<'_>,
    tile: &Tile,
    to: &RowsMut<'_>,
) -> bool {
    let Some((kernels, integers)) = straight(cx, x, half, tile, to) else { return false };
    let Some((kernel, _)) = straight_kernels(&kernels, half.weights) else { return false };
    with_branches(cx, [half; 2], firsts, tile, |[branch, _]| {
        // SAFETY: as in `compute`; the tile fits, and its place has whole panels. `straight` saw that k and rank fit, too, and
        // `IntegerRows` are padded with zeros.
        unsafe { kernel(&IntegerTile { branch, ..integers }, to) }
    });
    true
}

/// The same for a gated tile.
pub(super) fn compute_gated_straight(
    cx: &Cx<'_>,
    x: Rows<'_>,
    halves: [&Half<'_>; 2],
    activation: Activation,
    firsts: &FirstHalves<'_>,
    tile: &Tile,
    to: &RowsMut<'_>,
) -> bool {
    let [format, other] = halves.map(|half| half.weights.layout().format());
    let [gate_has_branch, up_has_branch] = halves.map(|half| half.branch.is_some());
    if activation != Activation::Silu || format != other || gate_has_branch != up_has_branch {
        return false;
    }
    let [Some((kernels, gate)), Some((_, up))] = halves.map(|half| straight(cx, x, half, tile, to)) else {
        return false;
    };
    // Of two layouts, one tight, the inputs as stored may differ.
    if gate.k != up.k {
        return false;
    }
    let Some((_, kernel)) = straight_kernels(&kernels, halves[0].weights) else { return false };
    with_branches(cx, halves, firsts, tile, |branches| {
        let tiles = [&IntegerTile { branch: branches[0], ..gate }, &IntegerTile { branch: branches[1], ..up }];
        // SAFETY: as above; `gated_linear` checked that the two have one shape, and `k` is that of both (checked here).
        unsafe { kernel(tiles, to) }
    });
    true
}

/// Calls `f` with the branches of a tile as kernels add them, if both halves have one. It is not called if a first half panicked.
fn with_branches(
    cx: &Cx<'_>,
    halves: [&Half<'_>; 2],
    firsts: &FirstHalves<'_>,
    tile: &Tile,
    f: impl FnOnce([Option<&IntegerTile<'_>>; 2]),
) {
    let [Some(first), Some(second)] = halves.map(|half| half.branch) else { return f([None; 2]) };
    let branches = [first, second];
    let [Some(first), Some(second)] = branches.map(|branch| firsts.rows(cx, &branch, tile.row, tile.rows)) else {
        return;
    };
    let [up_0, up_1] = branches.map(|branch| branch.up);
    let [key_0, key_1] = branches.map(|branch| firsts.key(&branch, tile));
    let rows = [(key_0, first, up_0.layout().k()), (key_1, second, up_1.layout().k())];
    IntegerRows::with(cx, rows, |[first, second]| {
        let tiles = [first.tile(0..tile.rows, up_0, tile), second.tile(0..tile.rows, up_1, tile)];
        f(tiles.each_ref().map(Some));
    });
}

/// The kernels of the weights' format: for a product, and for a gated layer. Floats have none.
fn straight_kernels(kernels: &Straight, weights: PackedWeights<'_>) -> Option<(StraightFn, GatedFn)> {
    match weights.layout().format() {
        WeightFormat::Int8PerChannel => Some((kernels.q_w8c, kernels.silu_w8c)),
        WeightFormat::Int4PerChannel => Some((kernels.q_w4c, kernels.silu_w4c)),
        WeightFormat::Int4Expansion { .. } => Some((kernels.q_w4e, kernels.silu_w4e)),
        WeightFormat::Int8Block { .. } => Some((kernels.q_w8b, kernels.silu_w8b)),
        WeightFormat::Int6Block { .. } => Some((kernels.q_w6b, kernels.silu_w6b)),
        WeightFormat::Int5Block { .. } => Some((kernels.q_w5b, kernels.silu_w5b)),
        WeightFormat::Int4Block { .. } => Some((kernels.q_w4b, kernels.silu_w4b)),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
    }
}

/// The kernels, and the tile as they see it, if it can go straight to its place.
fn straight<'a>(
    cx: &Cx<'_>,
    x: Rows<'a>,
    half: &Half<'a>,
    tile: &Tile,
    to: &RowsMut<'_>,
) -> Option<(Straight, IntegerTile<'a>)> {
    let kernels = cx.kernels.straight?;
    let Rows::Quantized(rows) = x else { return None };
    if to.columns != tile.panels * PANEL {
        return None;
    }
    let first = tile.panel * PANEL;
    let mut tile = integer_tile(rows, half.weights, tile);
    // In the order of `compute`.
    if rows.shift() != 0.0 {
        tile.added[0] = (&half.weights.row_sums()[first..], rows.shift());
    }
    if let Some(bias) = half.bias {
        tile.added[1] = (&bias[first..], 1.0);
    }
    let fits = if half.weights.layout().format().block().is_some() {
        (kernels.fits_blocks)(tile.all_rows, tile.k)
    } else {
        // SAFETY: the table exists only on a CPU that has its instruction set.
        unsafe { (kernels.fits)(&tile) }
    };
    let takes_branch = half
        .branch
        .as_ref()
        .is_none_or(|branch| branch.in_integers && (kernels.fits_branch)(tile.k, branch.up.layout().k()));
    (fits && takes_branch).then_some((kernels, tile))
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

/// Asks for the few bytes that the tile needs of a branch.
pub(super) fn prefetch_branch(cx: &Cx<'_>, half: &Half<'_>, tile: &Tile) {
    if let Some(branch) = &half.branch {
        let layout = branch.up.layout();
        let ask = |bytes: &[u8], len: usize| (cx.kernels.prefetch)(&bytes[..len.min(bytes.len())]);
        ask(branch.up.codes_from(tile.panel), tile.panels * layout.panel_code_bytes());
        ask(branch.up.scales_from(tile.panel), tile.panels * layout.panel_scale_bytes());
    }
}

/// Adds the branch to the tile's values, `[rows, 16 · panels]`. Rows whose first half is all zeros are left out.
pub(super) fn add_branch(cx: &Cx<'_>, half: &Half<'_>, firsts: &FirstHalves<'_>, tile: &Tile, values: &mut [f32]) {
    let Some(branch) = &half.branch else { return };
    let rank = branch.up.layout().k();
    let Some(t) = firsts.rows(cx, branch, tile.row, tile.rows) else { return };
    if branch.in_integers {
        let key = firsts.key(branch, tile);
        return IntegerRows::with(cx, [(key, t, rank)], |[t]| add_integers(cx, t, branch.up, tile, values));
    }
    let is_zero = |row: &[f32]| row.iter().all(|&t| t == 0.0);
    if !t.chunks_exact(rank).any(is_zero) {
        return add_floats(cx, FloatRows { x: t, stride: rank }, branch.up, tile, values);
    }
    let rows = values.chunks_exact_mut(tile.panels * PANEL).zip(t.chunks_exact(rank));
    for (i, (values, t)) in rows.enumerate().filter(|(_, (_, t))| !is_zero(t)) {
        let tile = Tile { row: tile.row + i, rows: 1, ..*tile };
        add_floats(cx, FloatRows { x: t, stride: rank }, branch.up, &tile, values);
    }
}

/// Adds the product of a first half's integers with the second half.
fn add_integers(cx: &Cx<'_>, t: &IntegerRows, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    let width = tile.panels * PANEL;
    let mut add = |row: usize, rows: usize| {
        let values = &mut values[row * width..][..rows * width];
        with_buffer(&PRODUCTS, values.len(), |products| {
            t.product(cx, row..row + rows, weights, tile, products);
            // SAFETY: the table exists only on a CPU that has its instruction set; both are one row, however long.
            unsafe { (cx.kernels.add_row)(values, products.len(), products, 1.0) }
        });
    };
    if !(0..tile.rows).any(|row| t.is_zero(row)) {
        return (0..tile.rows).step_by(ADDED_ROWS).for_each(|row| add(row, ADDED_ROWS.min(tile.rows - row)));
    }
    (0..tile.rows).filter(|row| !t.is_zero(*row)).for_each(|row| add(row, 1));
}

/// Adds the product with a branch's second half.
fn add_floats(cx: &Cx<'_>, rows: FloatRows<'_>, weights: PackedWeights<'_>, tile: &Tile, values: &mut [f32]) {
    if weights.layout().format() == WeightFormat::Int8PerChannel && weights.layout().width(tile.panel) == PANEL {
        let tile = FloatTile { write: Write::Add, ..float_tile(rows, weights, tile) };
        // SAFETY: as in `compute_floats`.
        return unsafe { (cx.kernels.matmul_f32_w8c)(&tile, values) };
    }
    with_buffer(&PRODUCTS, tile.values(), |products| {
        compute_floats(cx, rows, weights, tile, products);
        // SAFETY: the table exists only on a CPU that has its instruction set; both are one row, however long.
        unsafe { (cx.kernels.add_row)(values, tile.values(), products, 1.0) }
    });
}

fn integer_kernel(cx: &Cx<'_>, weights: PackedWeights<'_>) -> IntegerFn {
    match weights.layout().format() {
        WeightFormat::Int8PerChannel => cx.kernels.matmul_q_w8c,
        WeightFormat::Int4PerChannel => cx.kernels.matmul_q_w4c,
        WeightFormat::Int4Expansion { .. } => cx.kernels.matmul_q_w4e,
        WeightFormat::Int8Block { .. } => cx.kernels.matmul_q_w8b,
        WeightFormat::Int6Block { .. } => cx.kernels.matmul_q_w6b,
        WeightFormat::Int5Block { .. } => cx.kernels.matmul_q_w5b,
        WeightFormat::Int4Block { .. } => cx.kernels.matmul_q_w4b,
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => unreachable!("`check` refused float weights"),
    }
}

fn integer_tile<'a>(x: &'a QuantizedRows, weights: PackedWeights<'a>, tile: &Tile) -> IntegerTile<'a> {
    let layout = weights.layout();
    let format = layout.format();
    let k = if format.block().is_some() { layout.k() } else { layout.k_padded() };
    let from = x.from(tile.row, format.block().unwrap_or(layout.k()));
    IntegerTile {
        rows: tile.rows,
        all_rows: x.rows(),
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
        ahead: STREAM_AHEAD,
        width: layout.width(tile.panel),
        scales: weights.scales_from(tile.panel),
        offsets: weights.offsets_from(tile.panel),
        block: format.block().or(format.step_block()).unwrap_or(k),
        offset: format.block_offset(),
        added: [(&[], 0.0); 2],
        branch: None,
    }
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
    let tile = float_tile(rows, weights, tile);
    // SAFETY: the table exists only on a CPU that has its instruction set. `check` matched the lengths of x and the
    // weights, the grid bounded rows and panels, and `values` has the tile's length.
    unsafe { kernel(&tile, values) }
}

fn float_tile<'a>(rows: FloatRows<'a>, weights: PackedWeights<'a>, tile: &Tile) -> FloatTile<'a> {
    FloatTile {
        rows: tile.rows,
        panels: tile.panels,
        k: weights.layout().k(),
        x: rows.x,
        x_stride: rows.stride,
        codes: weights.codes_from(tile.panel),
        panel_bytes: weights.layout().panel_code_bytes(),
        scales: weights.scales_from(tile.panel),
        write: Write::Store,
    }
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
            write: Write::Store,
        };
        // SAFETY: as in `compute_floats`; the piece has `k` inputs of one panel.
        unsafe { kernel(&piece, products) };
        for (values, products) in values.chunks_mut(tile.panels * PANEL).zip(products.chunks_exact(PANEL)) {
            values.iter_mut().zip(products).for_each(|(value, product)| *value += product);
        }
    }
}

/// Rows of a second half that are computed before they are added: few enough that they stay in the first cache, and a multiple of
/// what kernels take at a time.
const ADDED_ROWS: usize = 48;

/// Inputs of a panel that are widened at a time, and their bytes as f32.
const PIECE: usize = 64;
const PIECE_BYTES: usize = PIECE * PANEL * 4;
