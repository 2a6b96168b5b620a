//! Tensors of a graph: name, kind, type, shape, encoding and, for constants, data.

use std::sync::{Arc, OnceLock};

use htp_sim::{BlockOffset, PackedLayout, PackedWeights, WeightFormat};

use crate::{
    encoding::Encoding,
    map::Bytes,
    types::{DataType, TensorType},
};

/// Index of a tensor in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

impl TensorId {
    /// The index as a `usize`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One tensor.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Unique within the graph.
    pub name: String,
    /// Input, output, state, intermediate or constant.
    pub tensor_type: TensorType,
    /// Element type.
    pub data_type: DataType,
    /// Extents, outermost first.
    pub shape: Shape,
    /// Meaning of fixed-point numbers; `None` on a computed fixed-point tensor means dynamic (see [`Encoding`]).
    pub encoding: Option<Encoding>,
    /// The constant's value; `None` for everything computed, and for an UPDATEABLE_STATIC tensor, which is all zeros
    /// until a section brings its value.
    pub data: Option<TensorData>,
}

/// The bytes of a constant.
#[derive(Debug, Clone)]
pub enum TensorData {
    /// Row-major elements of the tensor's data type; four-bit elements two to a byte, the first in the low half.
    Flat(Bytes),
    /// A weight `[n, k]` in the kernels' panel layout, scales and offsets included.
    Panels(Panels),
}

impl TensorData {
    /// Stored size in bytes.
    pub fn size_bytes(&self) -> usize {
        match self {
            TensorData::Flat(bytes) => bytes.len(),
            TensorData::Panels(panels) => panels.bytes.len(),
        }
    }
}

/// A weight packed for the kernels.
#[derive(Debug, Clone)]
pub struct Panels {
    layout: PackedLayout,
    bytes: Bytes,
    /// Made when first asked for, and shared by clones.
    row_sums: Arc<OnceLock<Vec<f32>>>,
}

impl Panels {
    /// Joins a layout with its bytes, checking that they fit.
    ///
    /// # Errors
    /// `ShapeError` if the number of bytes is not what the layout needs.
    pub fn new(layout: PackedLayout, bytes: Bytes) -> Result<Panels, htp_sim::ShapeError> {
        layout.view(&bytes)?;
        Ok(Panels { layout, bytes, row_sums: Arc::default() })
    }

    /// The layout.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// True if the other is a view of the same bytes.
    pub(crate) fn is_same(&self, other: &Panels) -> bool {
        self.layout == other.layout && std::ptr::eq::<[u8]>(&*self.bytes, &*other.bytes)
    }

    /// The format in words: `int4 block 32, symmetric`.
    pub fn format_name(&self) -> String {
        format_name(self.layout.format())
    }

    /// The bytes: codes, scales, offsets.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// A view that the kernels take.
    pub fn view(&self) -> PackedWeights<'_> {
        self.layout.view(&self.bytes).expect("`new` checked that the bytes fit the layout")
    }

    /// The same with the sums of rows, if they were made. They lie elsewhere: only to look for them costs a trip to memory.
    pub(crate) fn view_with_sums(&self) -> PackedWeights<'_> {
        match self.row_sums.get() {
            None => self.view(),
            Some(sums) => self.view().with_row_sums(sums).expect("`sum_rows` makes one for each row"),
        }
    }

    /// Makes the sums of rows that products with inputs on a shifted grid need, unless they are there: one pass over the
    /// weights, for all clones.
    ///
    /// # Errors
    /// `ShapeError` for float weights.
    pub(crate) fn sum_rows(&self, cx: &htp_sim::Cx<'_>) -> Result<(), htp_sim::ShapeError> {
        if self.row_sums.get().is_none() {
            // Who comes second has made the same.
            let _ = self.row_sums.set(htp_sim::sum_rows(cx, self.view())?);
        }
        Ok(())
    }
}

/// Extents of a tensor, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shape(pub Vec<Dim>);

/// One extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Known when the graph is built.
    Fixed(usize),
    /// Known at each execute: the length of the first dimension of input `by`, at most `max`.
    UpTo {
        /// The bound (AR-n for token-shaped tensors).
        max: usize,
        /// The graph input whose first dimension decides.
        by: TensorId,
    },
}

impl Dim {
    /// The largest value the extent can have.
    pub fn max(self) -> usize {
        match self {
            Dim::Fixed(n) => n,
            Dim::UpTo { max, .. } => max,
        }
    }
}

impl Shape {
    /// A shape whose extents are all known.
    pub fn fixed(dims: &[usize]) -> Shape {
        Shape(dims.iter().map(|n| Dim::Fixed(*n)).collect())
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Largest value of each extent.
    pub fn max_dims(&self) -> Vec<usize> {
        self.0.iter().map(|d| d.max()).collect()
    }

    /// Largest number of elements, or `None` if it does not fit `usize`.
    pub fn max_elements(&self) -> Option<usize> {
        self.0.iter().try_fold(1usize, |product, d| product.checked_mul(d.max()))
    }

    /// The last extent, or 1 for a scalar.
    pub fn last(&self) -> usize {
        self.0.last().map_or(1, |d| d.max())
    }

    /// Elements in all but the first dimension, or `None` if that does not fit `usize`.
    pub fn row_elements(&self) -> Option<usize> {
        self.0.iter().skip(1).try_fold(1usize, |product, d| product.checked_mul(d.max()))
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[")?;
        for (i, dim) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            match dim {
                Dim::Fixed(n) => write!(f, "{n}")?,
                Dim::UpTo { max, .. } => write!(f, "<={max}")?,
            }
        }
        f.write_str("]")
    }
}

/// A weight format in words, as tools print it.
pub(crate) fn format_name(format: WeightFormat) -> String {
    match format {
        WeightFormat::F32 => "f32".to_owned(),
        WeightFormat::F16 => "f16".to_owned(),
        WeightFormat::Bf16 => "bf16".to_owned(),
        WeightFormat::Int8PerChannel => "int8 per channel".to_owned(),
        WeightFormat::Int4PerChannel => "int4 per channel".to_owned(),
        WeightFormat::Int8Block { block } => format!("int8 block {block}"),
        WeightFormat::Int4Expansion { block } => format!("int4 block {block} steps"),
        WeightFormat::Int6Block { block } => format!("int6 block {block}"),
        WeightFormat::Int4Block { block, offset } | WeightFormat::Int5Block { block, offset } => {
            let offset = match offset {
                BlockOffset::Symmetric => "symmetric",
                BlockOffset::Integer => "whole offsets",
                BlockOffset::Min => "float minima",
            };
            format!("int{} block {block}, {offset}", format.bits())
        }
    }
}
