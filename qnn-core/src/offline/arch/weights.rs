//! From a tensor of the source to a constant of the graph: which precision each use of a weight gets.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use htp_sim::Workers;

use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    map::Bytes,
    offline::{
        error::ImportError,
        int4,
        quantize_weights::{Bits, QuantizeError, Quantized, Scheme, block_sizes, quantize},
        source::{Change, ElementFormat, ScaleType, SourceTensor},
    },
    types::DataType,
};

/// Numbers of the imported graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Weights of the matrices.
    pub weights: WeightType,
    /// Inputs of matrices with integer weights, quantized per row when the graph runs.
    pub activations: ActivationBits,
    /// The KV cache; by default 8 bits, or f32 in a graph without integer weights.
    pub cache: Option<CacheType>,
}

/// Precision of the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// As the source has them: floats stay, and so do the grids of GGUF, GPTQ and AWQ.
    Keep,
    /// f32.
    F32,
    /// f16, or bf16 where the source has bf16.
    F16,
    /// Integers. With four bits, embedding and head get eight.
    Int {
        /// Width of a code.
        bits: Bits,
        /// What shares a scale.
        grouping: Grouping,
    },
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// Blocks of 32, or of the largest smaller size that divides the rows; without one, per channel.
    Default,
    /// Blocks of this size, refused where it does not divide the rows.
    Block(usize),
    /// One scale for each output.
    PerChannel,
}

/// Width of a matrix's input codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum ActivationBits {
    Eight,
    Sixteen,
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum CacheType {
    Int8,
    F16,
    F32,
}

/// What a weight is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WeightClass {
    /// Embedding, head, or both.
    Embedding,
    /// Matrix of a layer.
    Linear,
    /// Norm weight or bias: always f32.
    Vector,
}

/// The way of some weights into the graph, for a report: those of one use that came in one format and left in one.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightUse {
    /// What they are used for.
    pub class: WeightClass,
    /// Element format in the source: `Q4_K`.
    pub source: &'static str,
    /// Element type and grouping in the graph: `UFIXED_POINT_4 block 32`.
    pub format: String,
    /// What that did to their numbers.
    pub change: Change,
    /// Number of tensors.
    pub n_tensors: u64,
    /// Number of elements.
    pub elements: u64,
    /// Stored bytes, scales and offsets included.
    pub size_bytes: u64,
}

/// The value of a constant.
pub(in crate::offline) struct Constant {
    pub(in crate::offline) data_type: DataType,
    pub(in crate::offline) encoding: Option<Encoding>,
    pub(in crate::offline) bytes: Bytes,
}

/// [`constant`] or [`outline`].
pub(super) type MakeConstant = fn(&SourceTensor, WeightClass, Precision, &Workers) -> Result<Constant, ImportError>;

/// Makes a constant of `class` out of `tensor`.
///
/// # Errors
/// [`ImportError`] naming the tensor.
pub(in crate::offline) fn constant(
    tensor: &SourceTensor,
    class: WeightClass,
    precision: Precision,
    workers: &Workers,
) -> Result<Constant, ImportError> {
    let float = |data_type, bytes| Ok(Constant { data_type, encoding: None, bytes });
    let keep = |data_type| {
        check_finite(tensor, workers)?;
        float(data_type, tensor.bytes.clone())
    };
    if class == WeightClass::Vector {
        return float(DataType::Float32, to_f32(tensor, workers)?);
    }
    match (precision.weights, tensor.format) {
        (WeightType::Keep | WeightType::F32, ElementFormat::F32) => keep(DataType::Float32),
        (WeightType::Keep | WeightType::F16, ElementFormat::F16) => keep(DataType::Float16),
        (WeightType::Keep | WeightType::F16, ElementFormat::Bf16) => keep(DataType::BFloat16),
        (WeightType::Keep, ElementFormat::Ggml(ggml)) => Ok(ggml.keep_grid(tensor, workers)?.into()),
        (WeightType::Keep, ElementFormat::Int4 { block_size, .. }) => Ok(int4::keep_grid(tensor, block_size)?.into()),
        // Without blocks in a row there is no grid to keep.
        (WeightType::Keep, ElementFormat::Int4ActOrder) => {
            Ok(quantize(tensor, scheme(Bits::Eight, Grouping::Default, tensor.k()), workers)?.into())
        }
        (WeightType::F32, _) => float(DataType::Float32, to_f32(tensor, workers)?),
        (WeightType::F16, _) => float(DataType::Float16, to_f16(tensor)?),
        (WeightType::Int { bits, grouping }, _) => {
            let bits = if class == WeightClass::Embedding { Bits::Eight } else { bits };
            Ok(quantize(tensor, scheme(bits, grouping, tensor.k()), workers)?.into())
        }
    }
}

/// The constant that [`constant`] would make, with zeros for values: only the first rows are converted, to see what comes
/// out.
///
/// # Errors
/// As [`constant`], as far as these rows show it.
pub(super) fn outline(
    tensor: &SourceTensor,
    class: WeightClass,
    precision: Precision,
    workers: &Workers,
) -> Result<Constant, ImportError> {
    let rows = tensor.n().min(OUTLINE_ROWS);
    if class == WeightClass::Vector || tensor.shape.len() != 2 {
        return constant(tensor, class, precision, workers);
    }
    let sample = constant(&tensor.slice(&tensor.name, 0..rows)?, class, precision, workers)?;
    // Zeroed memory costs nothing until somebody writes to it.
    let zeros = |len: usize| vec![0u8; len / rows * tensor.n()];
    let floats = |f: &Floats| Floats::new(zeros(f.bytes().len()).into(), f.data_type()).expect("whole rows of floats");
    let encoding = sample.encoding.map(|encoding| match encoding {
        Encoding::AxisScaleOffset { bitwidth, axis, scales, offsets } => {
            let offsets = vec![0; offsets.len() / rows * tensor.n()];
            Encoding::AxisScaleOffset { bitwidth, axis, scales: floats(&scales), offsets }
        }
        Encoding::Block { bitwidth, block_size, scales, offsets } => {
            let offsets = match offsets {
                BlockOffsets::Symmetric => BlockOffsets::Symmetric,
                BlockOffsets::Integer(bytes) => BlockOffsets::Integer(zeros(bytes.len()).into()),
                BlockOffsets::Min(mins) => BlockOffsets::Min(floats(&mins)),
            };
            Encoding::Block { bitwidth, block_size, scales: floats(&scales), offsets }
        }
        per_tensor => per_tensor,
    });
    Ok(Constant { data_type: sample.data_type, encoding, bytes: zeros(sample.bytes.len()).into() })
}

fn scheme(bits: Bits, grouping: Grouping, k: usize) -> Scheme {
    let block_size = match grouping {
        Grouping::Block(block_size) => Some(block_size),
        Grouping::PerChannel => None,
        Grouping::Default => block_sizes(bits, k).into_iter().rev().find(|block| *block <= DEFAULT_BLOCK),
    };
    match (block_size, bits) {
        (None, _) => Scheme::PerChannel { bits },
        (Some(block_size), Bits::Four) => Scheme::AsymmetricBlock4 { block_size },
        (Some(block_size), Bits::Eight) => Scheme::Block { bits, block_size },
    }
}

/// Refuses values that are not finite: what is computed from them would not be, either.
fn check_finite(tensor: &SourceTensor, workers: &Workers) -> Result<(), ImportError> {
    let first = AtomicUsize::new(usize::MAX);
    workers.for_each(tensor.n(), |row, _| {
        let bytes = tensor.row_bytes(row..row + 1);
        // Without an early end, so that it is as fast as memory.
        let odd = match tensor.format {
            ElementFormat::F32 => {
                bytes.as_chunks::<4>().0.iter().fold(false, |odd, v| odd | !f32::from_le_bytes(*v).is_finite())
            }
            ElementFormat::F16 => {
                bytes.as_chunks::<2>().0.iter().fold(false, |odd, v| odd | !f16::from_le_bytes(*v).is_finite())
            }
            ElementFormat::Bf16 => {
                bytes.as_chunks::<2>().0.iter().fold(false, |odd, v| odd | !bf16::from_le_bytes(*v).is_finite())
            }
            _ => false,
        };
        if odd {
            first.fetch_min(row, Ordering::Relaxed);
        }
    });
    finite_up_to(tensor, first.into_inner())
}

/// The error of `row`, the first with a value that is not finite; `usize::MAX` if there is none.
fn finite_up_to(tensor: &SourceTensor, row: usize) -> Result<(), ImportError> {
    if row == usize::MAX {
        return Ok(());
    }
    Err(QuantizeError::NotFinite { tensor: tensor.name.clone(), row }.into())
}

fn to_f32(tensor: &SourceTensor, workers: &Workers) -> Result<Bytes, ImportError> {
    let first = AtomicUsize::new(usize::MAX);
    let (n, row_bytes) = (tensor.n(), tensor.k() * 4);
    let mut bytes = vec![0u8; n * row_bytes];
    let rows: Vec<std::sync::Mutex<&mut [u8]>> = bytes.chunks_mut(row_bytes).map(std::sync::Mutex::new).collect();
    workers.for_each(n, |row, _| {
        let mut values = vec![0.0; tensor.k()];
        tensor.read_rows(row..row + 1, &mut values);
        if values.iter().any(|value| !value.is_finite()) {
            first.fetch_min(row, Ordering::Relaxed);
        }
        // One worker takes one row; the lock is never waited for.
        let mut out = rows[row].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(&values) {
            *out = value.to_le_bytes();
        }
    });
    drop(rows);
    finite_up_to(tensor, first.into_inner())?;
    Ok(bytes.into())
}

fn to_f16(tensor: &SourceTensor) -> Result<Bytes, ImportError> {
    let mut bytes = Vec::with_capacity(tensor.n() * tensor.k() * 2);
    let mut values = vec![0.0; tensor.k()];
    for row in 0..tensor.n() {
        tensor.read_rows(row..row + 1, &mut values);
        for value in &values {
            let half = f16::from_f32(*value);
            if !half.is_finite() {
                let (have, want) = (format!("{value} in row {row}"), "values that f16 can hold".to_owned());
                return Err(ImportError::Tensor { name: tensor.name.clone(), have, want });
            }
            bytes.extend_from_slice(&half.to_le_bytes());
        }
    }
    Ok(bytes.into())
}

impl From<Quantized> for Constant {
    fn from(quantized: Quantized) -> Constant {
        let Quantized { data_type, data, encoding, .. } = quantized;
        Constant { data_type, encoding: Some(encoding), bytes: data }
    }
}

impl Constant {
    /// What making this constant out of a tensor in `format` did to its numbers.
    pub(super) fn change(&self, format: ElementFormat, precision: Precision) -> Change {
        match (format, precision.weights, self.data_type) {
            (ElementFormat::Ggml(ggml), WeightType::Keep, _) if self.encoding.is_some() => ggml.change(),
            (ElementFormat::Int4 { scales: ScaleType::Wider, .. }, WeightType::Keep, _) => Change::ScalesToF16,
            (ElementFormat::Int4 { .. }, WeightType::Keep, _)
            | (_, _, DataType::Float32)
            | (ElementFormat::F16, _, DataType::Float16)
            | (ElementFormat::Bf16, _, DataType::BFloat16) => Change::None,
            _ => Change::Rounded,
        }
    }

    /// Element type and grouping, for a report.
    pub(super) fn format(&self) -> String {
        match &self.encoding {
            None => self.data_type.name().to_owned(),
            Some(Encoding::ScaleOffset { .. }) => format!("{} per tensor", self.data_type),
            Some(Encoding::AxisScaleOffset { .. }) => format!("{} per channel", self.data_type),
            Some(Encoding::Block { bitwidth, block_size, offsets, .. }) => {
                let fills = usize::from(*bitwidth) == self.data_type.bits();
                let bits = if fills { String::new() } else { format!(" of {bitwidth} bits,") };
                let offsets = match offsets {
                    BlockOffsets::Symmetric => "",
                    BlockOffsets::Integer(_) => ", whole offsets",
                    BlockOffsets::Min(_) => ", float minima",
                };
                format!("{}{bits} block {block_size}{offsets}", self.data_type)
            }
            Some(Encoding::BlockExpansion { block_size, .. }) => {
                format!("{} block {block_size}, whole steps", self.data_type)
            }
        }
    }

    /// Bytes stored, those of the encoding's arrays included.
    pub(super) fn size_bytes(&self) -> u64 {
        let floats = |f: &Floats| f.bytes().len();
        let encoding = match &self.encoding {
            None | Some(Encoding::ScaleOffset { .. }) => 0,
            Some(Encoding::AxisScaleOffset { scales, offsets, .. }) => floats(scales) + offsets.len() * 4,
            Some(Encoding::BlockExpansion { scales, steps, .. }) => floats(scales) + steps.len(),
            Some(Encoding::Block { scales, offsets, .. }) => {
                floats(scales)
                    + match offsets {
                        BlockOffsets::Symmetric => 0,
                        BlockOffsets::Integer(bytes) => bytes.len(),
                        BlockOffsets::Min(mins) => floats(mins),
                    }
            }
        };
        (self.bytes.len() + encoding) as u64
    }
}

/// Block size where none is asked for and the rows allow it.
const DEFAULT_BLOCK: usize = 32;
/// Rows that an outline converts.
const OUTLINE_ROWS: usize = 16;
