//! Weights to integers, rounded to nearest: per output channel or per block of inputs, symmetric or not.
//!
//! Scales and minima that are stored as f16 are rounded first and the codes chosen for the rounded values, so that no
//! second rounding follows. Rows are shared among workers; the result does not depend on their number.

use std::ops::Range;
use std::sync::Mutex;

use htp_sim::{Workers, round_to_f16};

use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    map::Bytes,
    offline::source::SourceTensor,
    types::DataType,
};

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

/// Quantizes `tensor`, `[n, k]`.
///
/// # Errors
/// [`QuantizeError`] naming the tensor, and the block sizes that work if the given one does not.
pub fn quantize(tensor: &SourceTensor, scheme: Scheme, workers: &Workers) -> Result<Quantized, QuantizeError> {
    match scheme {
        Scheme::PerChannel { bits } => Ok(run(tensor, Form::Symmetric(bits), tensor.k(), workers)?.per_channel(bits)),
        Scheme::Block { bits, block_size } => {
            check_block(tensor, bits, block_size)?;
            let coded = run(tensor, Form::SymmetricF16(bits), block_size, workers)?;
            Ok(coded.blocks(symmetric_type(bits), block_size, BlockOffsets::Symmetric))
        }
        Scheme::AsymmetricBlock4 { block_size } => {
            check_block(tensor, Bits::Four, block_size)?;
            let whole = run(tensor, Form::Offset, block_size, workers)?;
            let float = run(tensor, Form::Min, block_size, workers)?;
            if float.squared_error < whole.squared_error * MIN_FORM_GAIN {
                let mins = BlockOffsets::Min(Floats::from_f16(&float.offsets));
                return Ok(float.blocks(DataType::UFixedPoint4, block_size, mins));
            }
            let offsets: Vec<u8> = whole.offsets.iter().map(|o| (*o as i8).cast_unsigned()).collect();
            let offsets = BlockOffsets::Integer(offsets.into());
            Ok(whole.blocks(DataType::UFixedPoint4, block_size, offsets))
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

/// How one block is coded.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// `q · scale`, f32 scale.
    Symmetric(Bits),
    /// `q · scale`, f16 scale.
    SymmetricF16(Bits),
    /// `(q + offset) · scale`, f16 scale, i8 offset, `q` in `0..=15`.
    Offset,
    /// `q · scale + min`, f16 scale and minimum, `q` in `0..=15`.
    Min,
}

impl Form {
    fn bits(self) -> Bits {
        match self {
            Form::Symmetric(bits) | Form::SymmetricF16(bits) => bits,
            Form::Offset | Form::Min => Bits::Four,
        }
    }

    /// Smallest and largest code.
    fn codes(self) -> (f32, f32) {
        match self {
            Form::Symmetric(Bits::Eight) | Form::SymmetricF16(Bits::Eight) => (-127.0, 127.0),
            Form::Symmetric(Bits::Four) | Form::SymmetricF16(Bits::Four) => (-8.0, 7.0),
            Form::Offset | Form::Min => (0.0, 15.0),
        }
    }

    /// Scale and offset for a block of values from `min` to `max`, or `None` if f16 cannot hold them.
    fn fit(self, min: f32, max: f32) -> Option<(f32, f32)> {
        let largest = max.max(-min);
        match self {
            Form::Symmetric(_) => Some((largest / self.codes().1, 0.0)),
            Form::SymmetricF16(_) => Some((round_to_f16(largest / self.codes().1)?, 0.0)),
            Form::Min => Some((round_to_f16((max - min) / 15.0)?, round_to_f16(min)?)),
            Form::Offset => {
                // The offset is an i8: a block far from 0 gets a wider range that reaches nearer to it.
                let scale = round_to_f16(((max - min) / 15.0).max(largest / 127.0))?;
                let offset = if scale == 0.0 { 0.0 } else { (min / scale).round_ties_even() };
                Some((scale, offset.clamp(-128.0, 127.0)))
            }
        }
    }

    /// What code 0 means.
    fn zero(self, scale: f32, offset: f32) -> f32 {
        match self {
            Form::Symmetric(_) | Form::SymmetricF16(_) => 0.0,
            Form::Offset => offset * scale,
            Form::Min => offset,
        }
    }
}

/// All codes of a tensor, before they are given their encoding.
struct Coded {
    codes: Vec<u8>,
    scales: Vec<f32>,
    offsets: Vec<f32>,
    squared_error: f64,
}

impl Coded {
    fn per_channel(self, bits: Bits) -> Quantized {
        let bitwidth = bitwidth(bits);
        let (scales, offsets) = (Floats::from_f32(&self.scales), Vec::new());
        let encoding = Encoding::AxisScaleOffset { bitwidth, axis: 0, scales, offsets };
        Quantized { data_type: symmetric_type(bits), data: self.codes.into(), encoding }
    }

    fn blocks(self, data_type: DataType, block_size: usize, offsets: BlockOffsets) -> Quantized {
        let (bitwidth, scales) = (data_type.bits() as u8, Floats::from_f16(&self.scales));
        let encoding = Encoding::Block { bitwidth, block_size, scales, offsets };
        Quantized { data_type, data: self.codes.into(), encoding }
    }
}

/// Codes every row of `tensor` in blocks of `block_size`.
fn run(tensor: &SourceTensor, form: Form, block_size: usize, workers: &Workers) -> Result<Coded, QuantizeError> {
    let (n, k) = (tensor.n(), tensor.k());
    let four = form.bits() == Bits::Four;
    if four && !k.is_multiple_of(2) {
        return Err(QuantizeError::OddRow { tensor: tensor.name.clone(), k });
    }
    let (row_codes, row_blocks) = (if four { k / 2 } else { k }, k / block_size);
    let mut coded = Coded {
        codes: vec![0; n * row_codes],
        scales: vec![0.0; n * row_blocks],
        offsets: vec![0.0; n * row_blocks],
        squared_error: 0.0,
    };
    let chunks: Vec<Mutex<Chunk<'_>>> = coded
        .codes
        .chunks_mut(ROWS_PER_ITEM * row_codes)
        .zip(coded.scales.chunks_mut(ROWS_PER_ITEM * row_blocks))
        .zip(coded.offsets.chunks_mut(ROWS_PER_ITEM * row_blocks))
        .enumerate()
        .map(|(i, ((codes, scales), offsets))| {
            let start = i * ROWS_PER_ITEM;
            let rows = start..n.min(start + ROWS_PER_ITEM);
            Mutex::new(Chunk { rows, codes, scales, offsets, outcome: Ok(0.0) })
        })
        .collect();
    workers.for_each(chunks.len(), |item, _| {
        // Each item is taken by one worker, so the lock is never waited for; it only proves that to the compiler.
        let mut chunk = chunks[item].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        chunk.outcome = chunk.code(tensor, form, block_size);
    });
    let mut squared_error = 0.0;
    for chunk in chunks {
        squared_error += chunk.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).outcome?;
    }
    coded.squared_error = squared_error;
    Ok(coded)
}

/// Rows that one worker codes at a time.
struct Chunk<'a> {
    rows: Range<usize>,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    offsets: &'a mut [f32],
    outcome: Result<f64, QuantizeError>,
}

impl Chunk<'_> {
    /// Codes the rows and returns the sum of squared differences.
    fn code(&mut self, tensor: &SourceTensor, form: Form, block_size: usize) -> Result<f64, QuantizeError> {
        let k = tensor.k();
        let mut values = vec![0.0; self.rows.len() * k];
        tensor.read_rows(self.rows.clone(), &mut values);
        let mut codes = vec![0i8; block_size];
        let mut squared_error = 0.0;
        for (i, block) in values.chunks(block_size).enumerate() {
            let row = self.rows.start + i * block_size / k;
            let (min, max) = block.iter().fold((f32::MAX, f32::MIN), |(min, max), v| (v.min(min), v.max(max)));
            if block.iter().any(|v| !v.is_finite()) {
                return Err(QuantizeError::NotFinite { tensor: tensor.name.clone(), row });
            }
            let (scale, offset) =
                form.fit(min, max).ok_or_else(|| QuantizeError::TooLarge { tensor: tensor.name.clone(), row })?;
            (self.scales[i], self.offsets[i]) = (scale, offset);
            squared_error += code_block(form, block, (scale, offset), &mut codes);
            match form.bits() {
                Bits::Eight => {
                    for (out, code) in self.codes[i * block_size..].iter_mut().zip(&codes) {
                        *out = code.cast_unsigned();
                    }
                }
                Bits::Four => pack_nibbles(&codes, &mut self.codes[i * block_size / 2..]),
            }
        }
        Ok(squared_error)
    }
}

/// Chooses the nearest code for each value and returns the sum of squared differences.
fn code_block(form: Form, block: &[f32], (scale, offset): (f32, f32), codes: &mut [i8]) -> f64 {
    let (lowest, highest) = form.codes();
    let zero = form.zero(scale, offset);
    let mut squared_error = 0.0;
    for (code, value) in codes.iter_mut().zip(block) {
        let q = if scale == 0.0 { 0.0 } else { ((value - zero) / scale).round_ties_even().clamp(lowest, highest) };
        *code = q as i8;
        squared_error += f64::from(q * scale + zero - value).powi(2);
    }
    squared_error
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
const ROWS_PER_ITEM: usize = 16;
