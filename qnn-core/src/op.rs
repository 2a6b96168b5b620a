//! Operations: kinds, attributes and the rule that gives each output its shape.
//!
//! Names are QNN's (package `qti.aisw`). `Attention`, `RotaryTable`, `RotaryEmbedding` and `SoftCap` are ours: what an
//! LLM needs as one operation, as ONNX opset 23 has it.

use crate::{
    graph::GraphError,
    tensor::{Dim, Shape, Tensor},
    types::{DataType, TensorType},
};

/// An operation with its attributes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OpKind {
    /// `x [rows, k]`, `weight [n, k]`, optional `bias [n]` -> `[rows, n]`: `x · weightᵀ + bias`.
    FullyConnected,
    /// `data [n, …]`, `indices [rows]` (i32) -> `[rows, …]`: rows of `data` picked by index.
    Gather,
    /// `x [rows, n]`, `weight [k]` -> `x / sqrt(mean(x²) + epsilon) · weight`, over each run of `k` values: the whole
    /// row if `k` is `n`, each head of it if `k` is the size of a head.
    RmsNorm {
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `a`, `b` of one shape -> `a + b`.
    ElementWiseAdd,
    /// `a`, `b` -> `a · b`. `b` has the shape of `a`, or is `[1]` or `[last extent of a]` and repeated over the rest.
    ElementWiseMultiply,
    /// `x` -> `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `x` -> the Gaussian error linear unit, in its tanh form.
    Gelu,
    /// `x` -> `cap · tanh(x / cap)`.
    SoftCap {
        /// Bound of the result; finite and above 0.
        cap: f32,
    },
    /// `positions [rows]` (i32), `inv_freq [half]` -> `cos [rows, half]`, `sin [rows, half]` of
    /// `positions · inv_freq`, both times `scale`. A third input is the frequencies for long contexts: a graph that is bound
    /// to a context length has those that it needs as its second (see [`fn@crate::offline::specialize`]).
    RotaryTable {
        /// Attention scaling of long-context variants; 1 otherwise.
        scale: f32,
    },
    /// `x [rows, heads · head_dim]`, `cos`, `sin [rows, half]` -> each head rotated, element `i` paired with
    /// `i + half`. Elements from `2 · half` on pass through.
    RotaryEmbedding {
        /// Elements of one head.
        head_dim: usize,
    },
    /// Causal grouped-query attention over a KV cache that is written in place.
    ///
    /// Inputs: `q [rows, heads · head_dim]`, `k`, `v [rows, kv_heads · head_dim]`, states `past_key`, `past_value`
    /// `[kv_heads, capacity, head_dim]`, `cache_index [1]` (i32). Rows of `k` and `v` go to positions
    /// `cache_index..` first; then row `i` of `q` sees positions `0 ..= cache_index + i`. Output as `q`.
    Attention(AttentionAttrs),
}

/// Attributes of [`OpKind::Attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionAttrs {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Factor on the scores, normally `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window: a row sees at most this many positions, itself included; at least 1.
    pub window: Option<usize>,
    /// Soft cap, finite and above 0: scores become `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
}

impl OpKind {
    /// QNN's name of the operation.
    pub fn name(&self) -> &'static str {
        match self {
            OpKind::FullyConnected => "FullyConnected",
            OpKind::Gather => "Gather",
            OpKind::RmsNorm { .. } => "RmsNorm",
            OpKind::ElementWiseAdd => "ElementWiseAdd",
            OpKind::ElementWiseMultiply => "ElementWiseMultiply",
            OpKind::Sigmoid => "Sigmoid",
            OpKind::Gelu => "Gelu",
            OpKind::SoftCap { .. } => "SoftCap",
            OpKind::RotaryTable { .. } => "RotaryTable",
            OpKind::RotaryEmbedding { .. } => "RotaryEmbedding",
            OpKind::Attention(_) => "Attention",
        }
    }

    /// Shapes of the outputs for these inputs.
    ///
    /// # Errors
    /// [`GraphError`] naming `node` and the tensor that does not fit.
    pub fn output_shapes(&self, node: &str, inputs: &[&Tensor]) -> Result<Vec<Shape>, GraphError> {
        let rule = Rule { node, op: self.name(), inputs };
        match self {
            OpKind::FullyConnected => rule.fully_connected(),
            OpKind::Gather => rule.gather(),
            OpKind::RmsNorm { .. } => rule.rms_norm(),
            OpKind::ElementWiseAdd => rule.same_shape(),
            OpKind::ElementWiseMultiply => rule.multiply(),
            OpKind::Sigmoid | OpKind::Gelu => rule.count(1..=1).map(|()| vec![inputs[0].shape.clone()]),
            OpKind::SoftCap { cap } => rule.soft_cap(*cap),
            OpKind::RotaryTable { .. } => rule.rotary_table(),
            OpKind::RotaryEmbedding { head_dim } => rule.rotary_embedding(*head_dim),
            OpKind::Attention(attrs) => rule.attention(attrs),
        }
    }
}

/// One application of a shape rule: everything an error message needs.
struct Rule<'a> {
    node: &'a str,
    op: &'static str,
    inputs: &'a [&'a Tensor],
}

impl Rule<'_> {
    fn fully_connected(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=3)?;
        let (x, weight) = (self.inputs[0], self.inputs[1]);
        self.rank(0, 2)?;
        self.rank(1, 2)?;
        let (n, k) = (weight.shape.0[0].max(), weight.shape.last());
        self.expect(0, x.shape.last() == k, || format!("last extent {k}, as the weight {} has", weight.name))?;
        self.expect(1, weight.tensor_type.is_static(), || "a constant".to_owned())?;
        if let Some(bias) = self.inputs.get(2) {
            self.expect(2, bias.shape == Shape::fixed(&[n]), || format!("shape [{n}]"))?;
        }
        Ok(vec![Shape(vec![x.shape.0[0], Dim::Fixed(n)])])
    }

    fn gather(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=2)?;
        self.rank(0, 2)?;
        self.rank(1, 1)?;
        self.data_type(1, DataType::Int32)?;
        Ok(vec![Shape(vec![self.inputs[1].shape.0[0], self.inputs[0].shape.0[1]])])
    }

    fn rms_norm(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=2)?;
        self.rank(0, 2)?;
        self.rank(1, 1)?;
        let (n, k) = (self.inputs[0].shape.last(), self.inputs[1].shape.last());
        let whole = k > 0 && n.is_multiple_of(k) && self.inputs[1].shape == Shape::fixed(&[k]);
        self.expect(1, whole, || format!("shape [{n}], or that of heads which divide it"))?;
        Ok(vec![self.inputs[0].shape.clone()])
    }

    fn same_shape(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=2)?;
        let shape = &self.inputs[0].shape;
        self.expect(1, self.inputs[1].shape == *shape, || format!("shape {shape}, as {}", self.inputs[0].name))?;
        Ok(vec![shape.clone()])
    }

    fn multiply(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=2)?;
        let (a, b) = (&self.inputs[0].shape, &self.inputs[1].shape);
        let fits = a == b || *b == Shape::fixed(&[1]) || *b == Shape::fixed(&[a.last()]);
        self.expect(1, fits, || format!("shape {a}, [1] or [{}]", a.last()))?;
        Ok(vec![a.clone()])
    }

    fn soft_cap(&self, cap: f32) -> Result<Vec<Shape>, GraphError> {
        self.count(1..=1)?;
        self.cap(cap)?;
        Ok(vec![self.inputs[0].shape.clone()])
    }

    fn cap(&self, cap: f32) -> Result<(), GraphError> {
        self.expect(0, cap > 0.0 && cap.is_finite(), || format!("a finite cap above 0, not {cap}"))
    }

    fn rotary_table(&self) -> Result<Vec<Shape>, GraphError> {
        self.count(2..=3)?;
        self.rank(0, 1)?;
        self.rank(1, 1)?;
        self.data_type(0, DataType::Int32)?;
        if let Some(long) = self.inputs.get(2) {
            let shape = &self.inputs[1].shape;
            self.expect(2, long.shape == *shape, || format!("shape {shape}, as {}", self.inputs[1].name))?;
        }
        let table = Shape(vec![self.inputs[0].shape.0[0], self.inputs[1].shape.0[0]]);
        Ok(vec![table.clone(), table])
    }

    fn rotary_embedding(&self, head_dim: usize) -> Result<Vec<Shape>, GraphError> {
        self.count(3..=3)?;
        self.rank(0, 2)?;
        self.rank(1, 2)?;
        let (x, cos) = (&self.inputs[0].shape, &self.inputs[1].shape);
        let whole_heads = head_dim > 0 && x.last().is_multiple_of(head_dim);
        self.expect(0, whole_heads, || format!("a last extent of whole heads of {head_dim}"))?;
        let fits = cos.0[0] == x.0[0] && cos.last() * 2 <= head_dim;
        self.expect(1, fits, || format!("shape [{:?}, at most {}]", x.0[0], head_dim / 2))?;
        self.expect(2, self.inputs[2].shape == *cos, || format!("shape {cos}"))?;
        Ok(vec![x.clone()])
    }

    fn attention(&self, a: &AttentionAttrs) -> Result<Vec<Shape>, GraphError> {
        self.count(6..=6)?;
        let ratio = a.kv_heads > 0 && a.heads.is_multiple_of(a.kv_heads) && a.heads > 0 && a.head_dim > 0;
        self.expect(0, ratio, || format!("heads ({}) that are a multiple of kv heads ({})", a.heads, a.kv_heads))?;
        a.softcap.map_or(Ok(()), |cap| self.cap(cap))?;
        self.expect(0, a.window != Some(0), || "a window of at least 1 position, not 0".to_owned())?;
        let rows = self.inputs[0].shape.0.first().copied().unwrap_or(Dim::Fixed(1));
        let (q, kv) = (a.heads.checked_mul(a.head_dim), a.kv_heads.checked_mul(a.head_dim));
        for (i, width) in [(0, q), (1, kv), (2, kv)] {
            let shape = width.map(|w| Shape(vec![rows, Dim::Fixed(w)]));
            let fits = shape.as_ref() == Some(&self.inputs[i].shape);
            self.expect(i, fits, || shape.map_or_else(|| "smaller heads".to_owned(), |s| format!("shape {s}")))?;
        }
        for i in [3, 4] {
            self.rank(i, 3)?;
            let dims = self.inputs[i].shape.max_dims();
            let fits = dims[0] == a.kv_heads && dims[2] == a.head_dim;
            self.expect(i, fits, || format!("shape [{}, capacity, {}]", a.kv_heads, a.head_dim))?;
            self.expect(i, self.inputs[i].tensor_type.is_state(), || TensorType::AppReadWrite.name().to_owned())?;
        }
        self.expect(5, self.inputs[5].shape == Shape::fixed(&[1]), || "shape [1]".to_owned())?;
        self.data_type(5, DataType::Int32)?;
        Ok(vec![self.inputs[0].shape.clone()])
    }

    fn count(&self, want: std::ops::RangeInclusive<usize>) -> Result<(), GraphError> {
        if want.contains(&self.inputs.len()) {
            return Ok(());
        }
        Err(GraphError::InputCount { node: self.node.to_owned(), op: self.op, have: self.inputs.len(), want })
    }

    fn rank(&self, input: usize, rank: usize) -> Result<(), GraphError> {
        self.expect(input, self.inputs[input].shape.rank() == rank, || format!("{rank} dimensions"))
    }

    fn data_type(&self, input: usize, want: DataType) -> Result<(), GraphError> {
        self.expect(input, self.inputs[input].data_type == want, || want.name().to_owned())
    }

    fn expect(&self, input: usize, holds: bool, want: impl FnOnce() -> String) -> Result<(), GraphError> {
        if holds {
            return Ok(());
        }
        let tensor = self.inputs[input];
        Err(GraphError::Input {
            node: self.node.to_owned(),
            op: self.op,
            tensor: tensor.name.clone(),
            have: format!("{} {} {}", tensor.tensor_type, tensor.data_type, tensor.shape),
            want: want(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(tensor_type: TensorType, data_type: DataType, dims: &[usize]) -> Tensor {
        let shape = Shape::fixed(dims);
        Tensor { name: "x".to_owned(), tensor_type, data_type, shape, encoding: None, data: None }
    }

    /// Guards: a soft cap that would make NaN of numbers, of logits and of scores, and a window in which a row does not see even
    /// itself are refused when the graph is made.
    #[test]
    fn caps_are_finite_and_windows_not_empty() {
        let x = tensor(TensorType::Native, DataType::Float32, &[3, 8]);
        let past = tensor(TensorType::AppReadWrite, DataType::Float32, &[2, 16, 4]);
        let at = tensor(TensorType::AppWrite, DataType::Int32, &[1]);
        let attrs = AttentionAttrs { heads: 2, kv_heads: 2, head_dim: 4, scale: 0.5, window: None, softcap: None };
        for (cap, is_fine) in [(30.0, true), (0.0, false), (-1.0, false), (f32::NAN, false), (f32::INFINITY, false)] {
            let attention = OpKind::Attention(AttentionAttrs { softcap: Some(cap), ..attrs });
            let of_scores = attention.output_shapes("attention", &[&x, &x, &x, &past, &past, &at]);
            let of_logits = OpKind::SoftCap { cap }.output_shapes("cap", &[&x]);
            for shapes in [of_scores, of_logits] {
                assert_eq!(shapes.is_ok(), is_fine, "{cap}: {shapes:?}");
            }
        }
        for (window, is_fine) in [(None, true), (Some(1), true), (Some(0), false)] {
            let attention = OpKind::Attention(AttentionAttrs { window, ..attrs });
            let shapes = attention.output_shapes("attention", &[&x, &x, &x, &past, &past, &at]);
            assert_eq!(shapes.is_ok(), is_fine, "{window:?}: {shapes:?}");
        }
    }
}
