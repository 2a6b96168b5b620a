//! `y[m, n] = x[m, k] · W[n, k]ᵀ`, for one or several weights that share `x`.
//!
//! The output is cut into tiles of some rows by some panels of 16 columns. One worker computes a tile into a buffer of
//! its own, adds bias and branch there, and writes it out: a result never waits in memory for its epilogue.

use std::cell::RefCell;
use std::thread::LocalKey;

use crate::Cx;
use crate::elementwise::Activation;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::kernels::{MAX_TILE_ROWS, RowsMut};
use crate::packed::{PANEL, PackedLayout, PackedWeights};
use crate::quantize::{self, ActBits, QuantizedRows, quantize_rows};
use crate::scratch::Disjoint;

mod ahead;
mod branch;
mod tile;

pub use ahead::{Next, Starts, expect};

use branch::{FirstHalves, SecondHalf};
use tile::{Tile, add_branch, compute, compute_gated_straight, compute_straight, prefetch_branch};

/// The left operand: `m` rows of `k` values.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// Floats, `[m, k]`. Meet weights of any format; block formats and 4 bit by a slower path.
    F32 {
        /// The values, row-major.
        x: &'a [f32],
        /// Rows.
        m: usize,
    },
    /// Integers with a scale per row. Meet the integer formats only.
    Quantized(&'a QuantizedRows),
}

/// What happens to the previous contents of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Write {
    /// Overwritten.
    Store,
    /// Added to: a residual connection costs no extra pass.
    Add,
}

/// One weight of a [`linear`] and its output.
#[derive(Debug)]
pub struct Part<'a> {
    /// `[n, k]`.
    pub weights: PackedWeights<'a>,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// An adapter's branch.
    pub branch: Option<Branch<'a>>,
    /// Whether `out` is overwritten or added to.
    pub write: Write,
    /// `[m, n]`.
    pub out: &'a mut [f32],
}

/// An adapter's branch of a weight: `out += (alpha · (x · downᵀ)) · upᵀ`, added while the output tile is hot.
///
/// Where x has integers and `up` 8 bits per channel, the first half `t = alpha · (x · downᵀ)` gets 16 bits and a scale per row,
/// up to rank 128. The branch then has the same bits on every tier (unless `down` has blocks, and a tier rounds them, see
/// [`linear`]), costs less than with floats, and is off by up to `max |t| / 65024 · Σ |up|` of an output's row, and by what rounding
/// to f32 adds.
///
/// Where a row of the first half is all zeros nothing is added, so strength 0 gives the base bit for bit.
#[derive(Debug)]
pub struct Branch<'a> {
    /// As many rows as the layer's: the same, or the floats that they were made of.
    pub x: Rows<'a>,
    /// `[r, k]`.
    pub down: PackedWeights<'a>,
    /// Strengths of the `r` columns, over again where there are fewer.
    pub alpha: &'a [f32],
    /// `[n, r]`.
    pub up: PackedWeights<'a>,
    /// Room for the first half, `[m, r]`.
    pub t: &'a mut [f32],
}

/// One half of a [`GateUp`].
#[derive(Debug)]
pub struct Gate<'a> {
    /// `[n, k]`.
    pub weights: PackedWeights<'a>,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// An adapter's branch.
    pub branch: Option<Branch<'a>>,
}

/// The two weights of a gated layer; their shapes are the same, their formats may differ.
#[derive(Debug)]
pub struct GateUp<'a> {
    /// Goes through the activation.
    pub gate: Gate<'a>,
    /// Is multiplied with it.
    pub up: Gate<'a>,
}

/// Computes `out = x · Wᵀ + bias + branch` for every part, in one parallel region.
///
/// Between quantized rows and integer weights every tier gives the same bits, as long as the steps of an expansion format are
/// 1 to [`MAX_STEP`](crate::packed::MAX_STEP). Float products differ between tiers by rounding only: each is within
/// `(k + 2) · 2^-23 · Σ |x · w|` of the exact sum. No result depends on the number of workers, or on how many rows or parts
/// are computed together.
///
/// One case is rounded: on AMX, 16 rows and more by weights with a float scale per block, which take half of the time so. Weights
/// become integers of 16 bits, `unit` apart, on one grid per output, and products of low bytes are left out. With the middle code of a
/// block standing for `middle`, and half of the codes on each side of it, `unit` is
/// `(half · largest |scale| + largest |middle|) / 32512` over the blocks of the output. A result is off by up to
/// `unit · x_scale · (1.5 · Σ |code of x| + k · 2^14)`, the last term of 16-bit rows only, and not the one that fewer rows give. All
/// else above holds.
///
/// # Errors
/// [`ShapeError`] if a length does not match, there are more than [`MAX_PARTS`] parts, quantized rows meet float weights,
/// or their sums are over other blocks than the weights'. No output is changed then.
pub fn linear(cx: &Cx<'_>, x: Rows<'_>, parts: &mut [Part<'_>]) -> Result<(), ShapeError> {
    expect_at_most("parts of a linear", parts.len(), MAX_PARTS)?;
    for part in &*parts {
        check(x, part.weights, part.bias, part.out.len())?;
        check_branch(x, part.weights, part.branch.as_ref())?;
    }
    let m = x.count();
    let layouts = parts.iter().map(|part| part.weights.layout());
    let grid = Grid::of_linear(m, layouts.clone(), cx.workers.count(), Limits::of(cx, layouts));
    let mut firsts = FirstHalves::new();
    let mut targets = [const { None }; MAX_PARTS];
    let mut n_groups = 0;
    for (target, part) in targets.iter_mut().zip(parts) {
        let Part { weights, bias, ref mut branch, write, ref mut out } = *part;
        let half = Half { weights, bias, branch: branch.as_mut().map(|branch| firsts.add(cx, branch)) };
        n_groups += grid.groups(weights);
        *target = Some((half, Target { write, n: weights.layout().n(), out: Disjoint::new(out) }));
    }
    let tiles = |item: usize| {
        let mut group = item % n_groups;
        for (half, target) in targets.iter().flatten() {
            if group < grid.groups(half.weights) {
                let tile = grid.tile(item / n_groups, group, half.weights);
                return target.fill(cx, x, half, &firsts, &tile);
            }
            group -= grid.groups(half.weights);
        }
    };
    firsts.then_each(cx, grid.row_blocks() * n_groups, tiles);
    Ok(())
}

/// The sum of each row of integer weights, `[n]`: their product with a row of ones. What [`PackedWeights::with_row_sums`] wants.
///
/// # Errors
/// [`ShapeError`] for float weights.
pub fn sum_rows(cx: &Cx<'_>, weights: PackedWeights<'_>) -> Result<Vec<f32>, ShapeError> {
    let (n, k) = (weights.layout().n(), weights.layout().k());
    let mut ones = QuantizedRows::new(1, k, ActBits::Eight, weights.layout().format().block().unwrap_or(k))?;
    ones.set_grid(quantize::Grid::new(1.0, 0, 1))?;
    quantize_rows(cx, &vec![1.0; k], &mut ones)?;
    let mut out = vec![0.0; n];
    let part = Part { weights, bias: None, branch: None, write: Write::Store, out: &mut out };
    linear(cx, Rows::Quantized(&ones), &mut [part])?;
    Ok(out)
}

/// Computes `out = activation(gate) · up`, where gate and up are linear layers over the same `x`, in one parallel region.
///
/// `out` is `[m, n]` and overwritten.
///
/// # Errors
/// As [`linear`], and if the two halves differ in `n`.
pub fn gated_linear(
    cx: &Cx<'_>,
    x: Rows<'_>,
    halves: GateUp<'_>,
    activation: Activation,
    out: &mut [f32],
) -> Result<(), ShapeError> {
    let GateUp { mut gate, mut up } = halves;
    for half in [&gate, &up] {
        check(x, half.weights, half.bias, out.len())?;
        check_branch(x, half.weights, half.branch.as_ref())?;
    }
    let n = gate.weights.layout().n();
    expect_len("outputs of up", up.weights.layout().n(), n)?;
    let layouts = [gate.weights.layout(), up.weights.layout()];
    let grid = Grid::of_gated(x.count(), layouts, cx.workers.count(), Limits::of(cx, layouts.into_iter()));
    let n_groups = grid.groups(gate.weights);
    let mut firsts = FirstHalves::new();
    let [gate, up] = [&mut gate, &mut up].map(|half| {
        let branch = half.branch.as_mut().map(|branch| firsts.add(cx, branch));
        Half { weights: half.weights, bias: half.bias, branch }
    });
    let target = Target { write: Write::Store, n, out: Disjoint::new(out) };
    let tiles = |item: usize| {
        let tile = grid.tile(item / n_groups, item % n_groups, gate.weights);
        if compute_gated_straight(cx, x, [&gate, &up], activation, &firsts, &tile, &target.rows(&tile)) {
            return;
        }
        for tile in tile.pieces() {
            with_buffer(&VALUES, 2 * tile.values(), |values| {
                let (gate_values, up_values) = values.split_at_mut(tile.values());
                for (half, values) in [(&gate, &mut *gate_values), (&up, &mut *up_values)] {
                    prefetch_branch(cx, half, &tile);
                    compute(cx, x, half, &tile, values);
                    add_branch(cx, half, &firsts, &tile, values);
                }
                // SAFETY: the table exists only on a CPU that has its instruction set; both slices have the tile's length.
                unsafe { (cx.kernels.gate)(activation, gate_values, up_values) };
                target.store(cx, &tile, Write::Store, gate_values);
            });
        }
    };
    firsts.then_each(cx, grid.row_blocks() * n_groups, tiles);
    Ok(())
}

impl Rows<'_> {
    /// Rows.
    pub(crate) fn count(&self) -> usize {
        match self {
            Rows::F32 { m, .. } => *m,
            Rows::Quantized(rows) => rows.rows(),
        }
    }
}

/// Checks one weight against `x` and the length of its output.
fn check(x: Rows<'_>, weights: PackedWeights<'_>, bias: Option<&[f32]>, out_len: usize) -> Result<(), ShapeError> {
    let layout = weights.layout();
    let m = x.count();
    expect_len("length of out", out_len, size("length of out", &[m, layout.n()])?)?;
    match x {
        Rows::F32 { x, m } => expect_len("length of x", x.len(), size("length of x", &[m, layout.k()])?)?,
        Rows::Quantized(rows) => {
            expect_len("values in a row of x", rows.k(), layout.k())?;
            if layout.format().is_float() {
                return Err(ShapeError::new("outputs of a float weight", layout.n(), Needed::Rule("rows of floats")));
            }
            if let Some(block) = layout.format().block()
                && !rows.has_sums_over(block)
            {
                return Err(ShapeError::new("block of sums in x", rows.sum_block(), Needed::Exactly(block)));
            }
            if rows.shift() != 0.0 {
                expect_len("sums of rows of weights", weights.row_sums().len(), layout.n())?;
            }
        }
    }
    bias.map_or(Ok(()), |bias| expect_len("length of bias", bias.len(), layout.n()))
}

/// Checks the branch of a weight that meets `x`.
fn check_branch(x: Rows<'_>, weights: PackedWeights<'_>, branch: Option<&Branch<'_>>) -> Result<(), ShapeError> {
    let Some(branch) = branch else { return Ok(()) };
    expect_len("rows of x of a branch", branch.x.count(), x.count())?;
    check(branch.x, branch.down, None, branch.t.len())?;
    expect_len("inputs of a branch's second half", branch.up.layout().k(), branch.down.layout().n())?;
    expect_len("outputs of a branch", branch.up.layout().n(), weights.layout().n())?;
    if branch.alpha.is_empty() {
        return Err(ShapeError::new("strengths of a branch", 0, Needed::AtLeast(1)));
    }
    Ok(())
}

/// A weight with what is added to its product, as tiles see it.
#[derive(Clone, Copy)]
struct Half<'a> {
    weights: PackedWeights<'a>,
    bias: Option<&'a [f32]>,
    branch: Option<SecondHalf<'a>>,
}

/// An output shared by the workers.
struct Target<'a> {
    write: Write,
    n: usize,
    out: Disjoint<'a, f32>,
}

impl Target<'_> {
    /// Computes a tile of a linear layer and writes or adds it to its place. What a branch adds is added there, too.
    fn fill(&self, cx: &Cx<'_>, x: Rows<'_>, half: &Half<'_>, firsts: &FirstHalves<'_>, tile: &Tile) {
        prefetch_branch(cx, half, tile);
        if compute_straight(cx, x, half, firsts, tile, &self.rows(tile)) {
            return;
        }
        for tile in tile.pieces() {
            with_buffer(&VALUES, tile.values(), |values| {
                compute(cx, x, half, &tile, values);
                let mut write = self.write;
                if half.branch.is_some() {
                    // The branch comes last, in whatever way the base is computed: results do not depend on that.
                    self.add_old(cx, &tile, values);
                    add_branch(cx, half, firsts, &tile, values);
                    write = Write::Store;
                }
                self.store(cx, &tile, write, values);
            });
        }
    }

    /// Adds what is at the tile's place to its values, if they are to be added there.
    fn add_old(&self, cx: &Cx<'_>, tile: &Tile, values: &mut [f32]) {
        if self.write == Write::Add {
            let to = self.rows(tile);
            for (i, values) in values.chunks_exact_mut(tile.panels * PANEL).enumerate() {
                // SAFETY: the ranges of a tile are its own.
                let old = unsafe { self.out.range(to.first + i * to.stride, to.columns) };
                // SAFETY: the table exists only on a CPU that has its instruction set; both have as many values.
                unsafe { (cx.kernels.add_row)(&mut values[..to.columns], to.columns, old, 1.0) }
            }
        }
    }

    /// Writes or adds the tile's values to its place; columns from `n` on are padding.
    fn store(&self, cx: &Cx<'_>, tile: &Tile, write: Write, values: &[f32]) {
        // SAFETY: the table exists only on a CPU that has its instruction set. A tile is one item, and tiles do not overlap.
        unsafe { (cx.kernels.store_rows)(values, tile.panels * PANEL, RowsMut { write, ..self.rows(tile) }) }
    }

    /// A tile's place.
    fn rows(&self, tile: &Tile) -> RowsMut<'_> {
        let column = tile.panel * PANEL;
        let columns = (tile.panels * PANEL).min(self.n - column);
        RowsMut { out: &self.out, first: tile.row * self.n + column, stride: self.n, columns, write: self.write }
    }
}

/// A worker's values of a tile, or of both halves of a gated one.
#[repr(align(64))]
struct TileBuffer([f32; 2 * TILE_VALUES]);

/// Calls `f` with `len` values that `buffer` keeps for this thread. They hold what the last tile left there: clearing them took a
/// tenth of a prompt's product on AMX.
fn with_buffer(buffer: &'static LocalKey<RefCell<TileBuffer>>, len: usize, f: impl FnOnce(&mut [f32])) {
    buffer.with_borrow_mut(|buffer| {
        let values = &mut buffer.0[..len];
        if cfg!(test) {
            // The last tile is often that of another tier, and has what this one should.
            values.fill(f32::NAN);
        }
        f(values);
    });
}

thread_local! {
    /// The tile that is being computed.
    static VALUES: RefCell<TileBuffer> = const { RefCell::new(TileBuffer([0.0; 2 * TILE_VALUES])) };
    /// What is added to it.
    static PRODUCTS: RefCell<TileBuffer> = const { RefCell::new(TileBuffer([0.0; 2 * TILE_VALUES])) };
}

/// How an output is cut into tiles.
struct Grid {
    m: usize,
    tile_rows: usize,
    tile_panels: usize,
}

impl Grid {
    /// For a linear layer of some weights.
    fn of_linear(
        m: usize,
        layouts: impl Iterator<Item = PackedLayout> + Clone,
        workers: usize,
        limits: Limits,
    ) -> Self {
        let n_panels = layouts.clone().map(|layout| layout.panels()).sum();
        Self::plan(m, n_panels, layouts.map(|layout| layout.size_bytes()).sum(), workers, limits)
    }

    /// For a gated layer of gate and up, whose tiles have both.
    fn of_gated(m: usize, [gate, up]: [PackedLayout; 2], workers: usize, limits: Limits) -> Self {
        Self::plan(m, gate.panels(), gate.size_bytes() + up.size_bytes(), workers, limits)
    }

    /// For `m` rows and weights of `n_panels`, `bytes` in all.
    fn plan(m: usize, n_panels: usize, bytes: usize, workers: usize, limits: Limits) -> Self {
        // Rows are shared out before panels: what a worker reads it has mostly written itself, and lines of the output do not go
        // from core to core.
        let row_blocks = (m / limits.shared_rows).clamp(1, workers).max(m.div_ceil(MAX_TILE_ROWS));
        let tile_rows = m.div_ceil(row_blocks).next_multiple_of(PANEL).min(m).clamp(1, MAX_TILE_ROWS);
        if m < PANEL {
            // One worker waits for nobody.
            let n_tiles = if workers == 1 { 1 } else { (bytes / workers / STREAMED_BYTES).max(1) };
            let fits = TILE_VALUES / PANEL / tile_rows;
            return Self { m, tile_rows, tile_panels: n_panels.div_ceil(workers * n_tiles).min(fits) };
        }
        // Even numbers: a kernel may take two panels at a time.
        let share = n_panels.div_ceil(workers * TILES_PER_WORKER).next_multiple_of(2);
        let fits = limits.tile_values / PANEL / tile_rows;
        Self { m, tile_rows, tile_panels: share.min(fits).min(MAX_TILE_PANELS) }
    }

    fn row_blocks(&self) -> usize {
        self.m.div_ceil(self.tile_rows)
    }

    fn groups(&self, weights: PackedWeights<'_>) -> usize {
        let panels = weights.layout().panels();
        let wide = wide_panels(weights);
        wide.div_ceil(self.tile_panels) + (panels - wide)
    }

    fn tile(&self, row_block: usize, group: usize, weights: PackedWeights<'_>) -> Tile {
        let row = row_block * self.tile_rows;
        let wide = wide_panels(weights);
        let panel = (group * self.tile_panels).min(wide);
        Tile { row, rows: self.tile_rows.min(self.m - row), panel, panels: self.tile_panels.min(wide - panel).max(1) }
    }
}

/// Panels without a last one that could be narrow. That one is a tile of its own, whatever the layout, so that all weights
/// of a tile are cut alike.
fn wide_panels(weights: PackedWeights<'_>) -> usize {
    weights.layout().n().next_multiple_of(4) / PANEL
}

/// Weights that one [`linear`] can take.
pub const MAX_PARTS: usize = 8;

/// f32 values in a tile's buffer: 16 KiB, half of the smallest L1.
const TILE_VALUES: usize = 4096;

// As many rows fit with two panels.
const _: () = assert!(MAX_TILE_ROWS * 2 * PANEL <= TILE_VALUES);

/// What bounds tiles of many rows.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Rows that a worker should have, so that weights are not unpacked too often.
    shared_rows: usize,
    /// Values of a tile, at most.
    tile_values: usize,
}

impl Limits {
    /// Of tiles that go through a buffer.
    const BUFFERED: Self = Self { shared_rows: 64, tile_values: TILE_VALUES };

    /// Of a product with weights of some layouts.
    fn of(cx: &Cx<'_>, mut layouts: impl Iterator<Item = PackedLayout>) -> Self {
        if cx.kernels.straight.is_none() {
            return Self::BUFFERED;
        }
        // Kernels that go straight to the output need no buffer (a tile of them that has to do without goes through it in pieces). They
        // have most to do with blocks.
        let has_blocks = layouts.any(|layout| layout.format().block().is_some());
        let shared_rows = if has_blocks { MAX_TILE_ROWS } else { Self::BUFFERED.shared_rows };
        Self { shared_rows, tile_values: MAX_TILE_ROWS * MAX_TILE_PANELS * PANEL }
    }
}

/// Panels of a tile of many rows.
const MAX_TILE_PANELS: usize = 16;

/// Tiles of many rows per worker, as far as there are panels: what a worker waits for in the end is one tile of another.
const TILES_PER_WORKER: usize = 5;

/// Bytes of weights that a tile of few rows streams, at least, if it is not all that a worker has: a stream that begins again waits
/// for memory again. (With five tiles for each worker the layers of a 135M model took 5 % longer than with one.)
const STREAMED_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests;
