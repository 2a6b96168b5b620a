//! Weights to integers: per output channel or per block of inputs, symmetric or not; rounded to nearest, or better.
//!
//! Scales and minima that are stored as f16 are rounded first and the codes chosen for the rounded values, so that no
//! second rounding follows. Rows are shared among workers; the result does not depend on their number.

use htp_sim::Workers;

use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    map::Bytes,
    offline::source::SourceTensor,
    types::DataType,
};

mod feedback;
mod form;
mod rows;

pub use feedback::{Feedback, Moments};
pub use form::Search;

use form::Form;
use rows::{Coded, code_rows};

/// How a weight becomes integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Symmetric, one f32 scale for each output.
    PerChannel {
        /// Width of a code.
        bits: Bits,
    },
    /// Symmetric, one f16 scale for each block of inputs.
    Block {
        /// Width of a code.
        bits: Bits,
        /// Inputs that share a scale.
        block_size: usize,
    },
    /// Four bits, an f16 scale and an offset for each block of inputs. The offset is a whole number unless a float
    /// minimum fits the tensor clearly better (see [`MIN_FORM_GAIN`]), as it does when its values lie on such a grid.
    AsymmetricBlock4 {
        /// Inputs that share a scale.
        block_size: usize,
    },
    /// Four bits, symmetric, a whole number from 1 to 16 for each block of inputs and one f32 scale for each output: low
    /// power blockwise quantization (LPBQ).
    BlockExpansion4 {
        /// Inputs that share a whole number.
        block_size: usize,
    },
}

impl Scheme {
    /// This scheme for rows of `k`: with the largest block size, up to its own, that divides them; without one per channel.
    #[must_use]
    pub fn fitting(self, k: usize) -> Scheme {
        let largest = |bits, most: usize| block_sizes(bits, k).into_iter().rev().find(|block| *block <= most);
        let (bits, block) = match self {
            Scheme::PerChannel { .. } => return self,
            Scheme::Block { bits, block_size } => (bits, largest(bits, block_size)),
            Scheme::AsymmetricBlock4 { block_size } | Scheme::BlockExpansion4 { block_size } => {
                (Bits::Four, largest(Bits::Four, block_size))
            }
        };
        match (self, block) {
            (_, None) => Scheme::PerChannel { bits },
            (Scheme::AsymmetricBlock4 { .. }, Some(block_size)) => Scheme::AsymmetricBlock4 { block_size },
            (Scheme::BlockExpansion4 { .. }, Some(block_size)) => Scheme::BlockExpansion4 { block_size },
            (_, Some(block_size)) => Scheme::Block { bits, block_size },
        }
    }
}

/// How codes are chosen.
#[derive(Debug, Clone, Copy)]
pub struct Rounding<'a> {
    /// How the scale of a block is chosen.
    pub search: Search,
    /// How much the error of each input counts: its mean square in calibration. `None`: all the same.
    pub importance: Option<&'a [f32]>,
    /// Lets later columns make good the error of earlier ones.
    pub feedback: Option<&'a Feedback>,
}

impl Rounding<'_> {
    /// Scales by smallest and largest value, codes to the nearest.
    pub const NEAREST: Rounding<'static> = Rounding { search: Search::MinMax, importance: None, feedback: None };
}

/// Width of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Bits {
    Four,
    Eight,
}

/// A weight as integers, row-major, with what they mean.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// Type of the codes.
    pub data_type: DataType,
    /// The codes; four-bit ones two to a byte, the first in the low half.
    pub data: Bytes,
    /// What they mean.
    pub encoding: Encoding,
    /// Sum of the squared differences from the values, each times the importance of its input.
    pub squared_error: f64,
}

/// Why a weight cannot be quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum QuantizeError {
    #[error("tensor {tensor}: blocks of {block_size} in rows of {k}; block sizes that work: {}", list(works))]
    Block { tensor: String, block_size: usize, k: usize, works: Vec<usize> },
    #[error("tensor {tensor}: rows of {k} elements of 4 bits, need an even number")]
    OddRow { tensor: String, k: usize },
    #[error("tensor {tensor}, row {row}: a value that is not finite")]
    NotFinite { tensor: String, row: usize },
    #[error("tensor {tensor}, row {row}: values too large for an f16 scale")]
    TooLarge { tensor: String, row: usize },
}

/// Quantizes `tensor`, `[n, k]`, to the nearest codes.
///
/// # Errors
/// [`QuantizeError`] naming the tensor, and the block sizes that work if the given one does not.
pub fn quantize(tensor: &SourceTensor, scheme: Scheme, workers: &Workers) -> Result<Quantized, QuantizeError> {
    quantize_with(tensor, scheme, &Rounding::NEAREST, workers)
}

/// Quantizes `tensor`, `[n, k]`, as `rounding` says.
///
/// # Errors
/// [`QuantizeError`] naming the tensor, and the block sizes that work if the given one does not.
///
/// # Panics
/// If the importance or the feedback is for rows of another length.
pub fn quantize_with(
    tensor: &SourceTensor,
    scheme: Scheme,
    rounding: &Rounding<'_>,
    workers: &Workers,
) -> Result<Quantized, QuantizeError> {
    let k = tensor.k();
    assert!(rounding.importance.is_none_or(|all| all.len() == k), "an importance for each of the {k} inputs");
    assert!(rounding.feedback.is_none_or(|feedback| feedback.k() == k), "feedback for rows of {k}");
    match scheme {
        Scheme::PerChannel { bits } => {
            Ok(code_rows(tensor, Form::Symmetric(bits), k, rounding, workers)?.per_channel(bits))
        }
        Scheme::Block { bits, block_size } => {
            check_block(tensor, bits, block_size)?;
            let coded = code_rows(tensor, Form::SymmetricF16(bits), block_size, rounding, workers)?;
            Ok(coded.blocks(symmetric_type(bits), block_size, BlockOffsets::Symmetric))
        }
        Scheme::AsymmetricBlock4 { block_size } => asymmetric(tensor, block_size, rounding, workers),
        Scheme::BlockExpansion4 { block_size } => {
            check_block(tensor, Bits::Four, block_size)?;
            Ok(code_rows(tensor, Form::Expansion, block_size, rounding, workers)?.expansion(block_size))
        }
    }
}

fn asymmetric(
    tensor: &SourceTensor,
    block_size: usize,
    rounding: &Rounding<'_>,
    workers: &Workers,
) -> Result<Quantized, QuantizeError> {
    check_block(tensor, Bits::Four, block_size)?;
    // Which form fits is seen without feedback, which hides it and takes longer.
    let plain = Rounding { feedback: None, ..*rounding };
    let whole = code_rows(tensor, Form::Offset, block_size, &plain, workers)?;
    let float = code_rows(tensor, Form::Min, block_size, &plain, workers)?;
    let takes_min = float.squared_error < whole.squared_error * MIN_FORM_GAIN;
    let (form, mut coded) = if takes_min { (Form::Min, float) } else { (Form::Offset, whole) };
    if rounding.feedback.is_some() {
        coded = code_rows(tensor, form, block_size, rounding, workers)?;
    }
    let offsets = if takes_min {
        BlockOffsets::Min(Floats::from_f16(&coded.stored))
    } else {
        let offsets: Vec<u8> = coded.stored.iter().map(|o| (*o as i8).cast_unsigned()).collect();
        BlockOffsets::Integer(offsets.into())
    };
    Ok(coded.blocks(DataType::UFixedPoint4, block_size, offsets))
}

/// The grid of a scheme, applied to single rows: what a row becomes when it is rounded to nearest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SchemeGrid {
    form: Form,
    block_size: Option<usize>,
}

impl SchemeGrid {
    /// Four-bit asymmetric blocks are taken with float minima, the finest form they have.
    pub(crate) fn of(scheme: Scheme) -> SchemeGrid {
        let (form, block_size) = match scheme {
            Scheme::PerChannel { bits } => (Form::Symmetric(bits), None),
            Scheme::Block { bits, block_size } => (Form::SymmetricF16(bits), Some(block_size)),
            Scheme::AsymmetricBlock4 { block_size } => (Form::Min, Some(block_size)),
            Scheme::BlockExpansion4 { block_size } => (Form::Expansion, Some(block_size)),
        };
        SchemeGrid { form, block_size }
    }

    /// Writes what the codes nearest to `row` mean to `rounded`. A block that f16 cannot scale stays as it is; rows that
    /// are no whole blocks end in a shorter one.
    pub(crate) fn round_row(&self, row: &[f32], rounded: &mut [f32]) {
        let block_size = self.block_size.unwrap_or(row.len()).max(1);
        let row_scale = self.form.row_scale(row, None, block_size, Search::MinMax);
        for (block, rounded) in row.chunks(block_size).zip(rounded.chunks_mut(block_size)) {
            match self.form.fit(block, None, row_scale, Search::MinMax) {
                None => rounded.copy_from_slice(block),
                Some(grid) => rounded.iter_mut().zip(block).for_each(|(out, v)| *out = grid.value(grid.code(*v))),
            }
        }
    }
}

/// Block sizes that the kernels take for rows of `k`: multiples of 8 (4 for eight bits), at most 256, that divide `k`.
pub fn block_sizes(bits: Bits, k: usize) -> Vec<usize> {
    let step = match bits {
        Bits::Four => 8,
        Bits::Eight => 4,
    };
    (step..=htp_sim::packed::MAX_BLOCK).step_by(step).filter(|block| k.is_multiple_of(*block)).collect()
}

fn check_block(tensor: &SourceTensor, bits: Bits, block_size: usize) -> Result<(), QuantizeError> {
    let (k, works) = (tensor.k(), block_sizes(bits, tensor.k()));
    if works.contains(&block_size) {
        return Ok(());
    }
    Err(QuantizeError::Block { tensor: tensor.name.clone(), block_size, k, works })
}

impl Coded {
    fn per_channel(self, bits: Bits) -> Quantized {
        let bitwidth = bitwidth(bits);
        let (scales, offsets) = (Floats::from_f32(&self.scales), Vec::new());
        let encoding = Encoding::AxisScaleOffset { bitwidth, axis: 0, scales, offsets };
        Quantized {
            data_type: symmetric_type(bits),
            data: self.codes.into(),
            encoding,
            squared_error: self.squared_error,
        }
    }

    fn blocks(self, data_type: DataType, block_size: usize, offsets: BlockOffsets) -> Quantized {
        let (bitwidth, scales) = (data_type.bits() as u8, Floats::from_f16(&self.scales));
        let encoding = Encoding::Block { bitwidth, block_size, scales, offsets };
        Quantized { data_type, data: self.codes.into(), encoding, squared_error: self.squared_error }
    }

    fn expansion(self, block_size: usize) -> Quantized {
        let steps: Vec<u8> = self.stored.iter().map(|step| *step as u8).collect();
        let (bitwidth, scales) = (4, Floats::from_f32(&self.row_scales));
        let encoding = Encoding::BlockExpansion { bitwidth, block_size, scales, steps: steps.into() };
        let squared_error = self.squared_error;
        Quantized { data_type: DataType::SFixedPoint4, data: self.codes.into(), encoding, squared_error }
    }
}

/// Stores four-bit codes (signed ones in two's complement) two to a byte, the first in the low half.
pub(super) fn pack_nibbles(codes: &[i8], out: &mut [u8]) {
    for (pair, out) in codes.as_chunks::<2>().0.iter().zip(out) {
        *out = pair[0].cast_unsigned() & 15 | pair[1].cast_unsigned() << 4;
    }
}

fn symmetric_type(bits: Bits) -> DataType {
    match bits {
        Bits::Four => DataType::SFixedPoint4,
        Bits::Eight => DataType::SFixedPoint8,
    }
}

fn bitwidth(bits: Bits) -> u8 {
    match bits {
        Bits::Four => 4,
        Bits::Eight => 8,
    }
}

fn list(sizes: &[usize]) -> String {
    if sizes.is_empty() {
        return "none; use per-channel quantization".to_owned();
    }
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// The float minimum is taken when it brings the squared error below this part of that of a whole offset. It costs two
/// bytes a block instead of one.
pub const MIN_FORM_GAIN: f64 = 0.5;
