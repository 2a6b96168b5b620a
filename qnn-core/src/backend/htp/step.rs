//! What a plan consists of: one call of an `htp-sim` operation each, over numbered buffers.

use htp_sim::{ActBits, Activation, Grid, QuantizedRows, ShapeError};

use crate::{
    backend::PrepareError,
    op::AttentionAttrs,
    tensor::{Dim, Panels},
};

/// Number of a float buffer: virtual after lowering, real after placing.
pub(super) type Float = usize;
/// Number of a buffer of quantized rows.
pub(super) type Quantized = usize;

/// One step of a plan.
#[derive(Debug)]
pub(super) struct Step {
    /// Name of the node it comes from, for errors and profiles.
    pub(super) node: String,
    /// Rows of the result.
    pub(super) rows: Dim,
    /// The work.
    pub(super) work: Work,
    /// Number of the attention step whose cache is asked for before this step.
    pub(super) prefetch: Option<usize>,
    /// Number of the product after this one, whose weights workers ask for while they wait.
    pub(super) next_product: Option<usize>,
}

/// A computed tensor, as one who watches the run is shown it.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) name: String,
    pub(super) rows: Dim,
    pub(super) width: usize,
    pub(super) place: Source,
    /// Number of the step after which its value is there.
    pub(super) after: usize,
}

/// The work of a step.
#[derive(Debug)]
pub(super) enum Work {
    /// Copies graph input number `input` into a buffer.
    Load { input: usize, out: Float },
    /// Rows of a packed constant, dequantized: an embedding lookup.
    Lookup { table: Panels, indices: usize, out: Float },
    /// Rows of a computed tensor.
    Select { x: Float, width: usize, indices: usize, out: Float },
    /// RMS norm of each run of `weight.len()` values in rows of `width`; the result is quantized at once if `out` says so,
    /// which takes one run a row.
    RmsNorm { x: Float, width: usize, weight: Vec<f32>, epsilon: f32, out: NormOut },
    /// Float rows to quantized rows, on a fixed grid or (`None`) each with its own scale.
    Quantize { x: Float, out: Quantized, grid: Option<GridRef> },
    /// Each value to the nearest one of a fixed grid, in place.
    Snap { x: Float, grid: GridRef },
    /// Quantized rows back to floats, for a consumer that takes no codes.
    Dequantize { x: Quantized, out: Float },
    /// Weights that share their input, in one parallel region.
    Linear { x: Source, parts: Vec<LinearPart> },
    /// `activation(gate · x) · (up · x)`, gate first.
    Gated { x: Source, halves: Box<[LinearPart; 2]>, activation: Activation, out: Float },
    /// Cosines and sines of the positions in graph input `positions`.
    RotaryTable { positions: usize, inv_freq: Vec<f32>, scale: f32, cos: Float, sin: Float },
    /// Rotation of every head, in place.
    Rotate { x: Float, heads: usize, head_dim: usize, cos: Float, sin: Float },
    /// Cache update and attention.
    Attention { q: Float, k: Float, v: Float, out: Float, cache: CacheRef },
    /// `a + b` or `a · b`, element by element.
    Binary { op: Binary, a: Float, b: Float, out: Float },
    /// A function of each element.
    Unary { op: Unary, x: Float, out: Float },
    /// A copy.
    Copy { x: Float, out: Float },
}

/// Where a norm's result goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum NormOut {
    Float(Float),
    Quantized(Quantized, Option<GridRef>),
}

/// The grid of a static encoding.
#[derive(Debug, Clone, Copy)]
pub(super) struct GridRef {
    /// That of the graph.
    pub(super) base: Grid,
    /// Number among the plan's updatable encodings, if an adapter may bring its own.
    pub(super) slot: Option<usize>,
}

/// What a linear layer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Float(Float),
    Quantized(Quantized),
}

/// One weight of a linear step.
#[derive(Debug)]
pub(super) struct LinearPart {
    pub(super) weights: Panels,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) branch: Option<BranchPart>,
    /// Result buffer (not used by the two halves of a gated step).
    pub(super) out: Float,
    /// True if the product is added to what `out` holds: the residual.
    pub(super) add: bool,
}

/// An adapter's branch of a weight: `out += B · (alpha · A x)`.
#[derive(Debug)]
pub(super) struct BranchPart {
    /// What A reads: the weight's input, or the floats that it was made of.
    pub(super) x: Source,
    /// Slot of A.
    pub(super) down: usize,
    /// Slot of B.
    pub(super) up: usize,
    /// Graph input that holds the strengths.
    pub(super) alpha: usize,
    /// Room for the first half, `[rows, rank]`.
    pub(super) t: Float,
}

/// The cache an attention step writes and reads.
#[derive(Debug)]
pub(super) struct CacheRef {
    /// Number among the plan's caches.
    pub(super) slot: usize,
    /// Graph input that holds the first position to write.
    pub(super) index_input: usize,
    /// Heads and scale.
    pub(super) attrs: AttentionAttrs,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Binary {
    Add,
    Multiply,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Unary {
    Sigmoid,
    Gelu,
    SoftCap { cap: f32 },
    Scale { factor: f32 },
}

/// Extents of a buffer of quantized rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QuantizedSpec {
    pub(super) max_rows: usize,
    pub(super) k: usize,
    pub(super) bits: ActBits,
    /// Block of the finest sums: divides those of all weights that read the rows.
    pub(super) sum_block: usize,
    /// Larger blocks of weights that read the rows.
    pub(super) coarser: Vec<usize>,
}

impl QuantizedSpec {
    fn rows(&self) -> Result<QuantizedRows, ShapeError> {
        let finest = QuantizedRows::new(self.max_rows, self.k, self.bits, self.sum_block)?;
        self.coarser.iter().try_fold(finest, |rows, block| rows.with_sums_over(*block))
    }

    pub(super) fn allocate(&self) -> Result<QuantizedRows, PrepareError> {
        self.rows().map_err(|e| PrepareError::Tensor {
            tensor: format!("quantized rows [{}, {}]", self.max_rows, self.k),
            why: e.to_string(),
        })
    }
}

impl Work {
    /// What it is called in accounts.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Work::Load { .. } => "load",
            Work::Lookup { .. } => "lookup",
            Work::Select { .. } => "select",
            Work::RmsNorm { .. } => "norm",
            Work::Quantize { .. } => "quantize",
            Work::Snap { .. } => "snap",
            Work::Dequantize { .. } => "dequantize",
            Work::Linear { .. } => "linear",
            Work::Gated { .. } => "gated linear",
            Work::RotaryTable { .. } => "rotary table",
            Work::Rotate { .. } => "rotate",
            Work::Attention { .. } => "attention",
            Work::Binary { .. } | Work::Unary { .. } | Work::Copy { .. } => "elementwise",
        }
    }

    /// The weights of a product; none of other work.
    pub(super) fn parts(&self) -> &[LinearPart] {
        match self {
            Work::Linear { parts, .. } => parts,
            Work::Gated { halves, .. } => &halves[..],
            _ => &[],
        }
    }

    /// Calls `visit` with every float buffer the work touches.
    pub(super) fn floats(&mut self, visit: &mut dyn FnMut(&mut Float)) {
        match self {
            Work::Load { out, .. } | Work::Lookup { out, .. } | Work::Dequantize { out, .. } => visit(out),
            Work::Quantize { x, .. } | Work::Snap { x, .. } => visit(x),
            Work::Select { x, out, .. } | Work::Unary { x, out, .. } | Work::Copy { x, out } => {
                visit(x);
                visit(out);
            }
            Work::RmsNorm { x, out, .. } => {
                visit(x);
                if let NormOut::Float(out) = out {
                    visit(out);
                }
            }
            Work::Linear { x, parts } => {
                x.float(visit);
                for part in parts {
                    visit(&mut part.out);
                    part.branch.iter_mut().for_each(|branch| branch.floats(visit));
                }
            }
            Work::Gated { x, halves, out, .. } => {
                x.float(visit);
                halves.iter_mut().filter_map(|half| half.branch.as_mut()).for_each(|branch| branch.floats(visit));
                visit(out);
            }
            Work::RotaryTable { cos, sin, .. } => {
                visit(cos);
                visit(sin);
            }
            Work::Rotate { x, cos, sin, .. } => [x, cos, sin].into_iter().for_each(visit),
            Work::Attention { q, k, v, out, .. } => [q, k, v, out].into_iter().for_each(visit),
            Work::Binary { a, b, out, .. } => [a, b, out].into_iter().for_each(visit),
        }
    }

    /// Calls `visit` with every buffer of quantized rows the work touches.
    pub(super) fn quantized(&mut self, visit: &mut dyn FnMut(&mut Quantized)) {
        match self {
            Work::RmsNorm { out: NormOut::Quantized(q, _), .. }
            | Work::Quantize { out: q, .. }
            | Work::Dequantize { x: q, .. } => visit(q),
            Work::Linear { x, parts } => {
                x.quantized(visit);
                parts.iter_mut().filter_map(|part| part.branch.as_mut()).for_each(|branch| branch.x.quantized(visit));
            }
            Work::Gated { x, halves, .. } => {
                x.quantized(visit);
                halves.iter_mut().filter_map(|half| half.branch.as_mut()).for_each(|branch| branch.x.quantized(visit));
            }
            _ => {}
        }
    }
}

impl BranchPart {
    fn floats(&mut self, visit: &mut dyn FnMut(&mut Float)) {
        self.x.float(visit);
        visit(&mut self.t);
    }
}

impl Source {
    fn float(&mut self, visit: &mut dyn FnMut(&mut Float)) {
        if let Source::Float(x) = self {
            visit(x);
        }
    }

    fn quantized(&mut self, visit: &mut dyn FnMut(&mut Quantized)) {
        if let Source::Quantized(x) = self {
            visit(x);
        }
    }
}

/// Most weights in one linear step.
pub(super) const MAX_PARTS: usize = 4;
