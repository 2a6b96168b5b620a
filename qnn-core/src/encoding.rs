//! Quantization encodings: what a fixed-point number means.
//!
//! The law, everywhere: `float = (q + offset) * scale`. A zero point of ONNX or PyTorch is `-offset`.
//!
//! # Static encodings of computed tensors
//!
//! An input, an intermediate result or an output that has a [`Encoding::ScaleOffset`] holds only floats of that encoding:
//! whatever computes it in whatever precision, the result `x` becomes `q = clamp(round(x / scale) - offset, least, most)`,
//! where ties go to the even multiple of `scale`, and what reads it reads `(q + offset) * scale`. Codes of `bitwidth` bits
//! are `0 ..= 2^bits - 1` in unsigned types and `-2^(bits - 1) ..= 2^(bits - 1) - 1` in signed ones. Zero has to be a code
//! (`-most <= offset <= -least`), so that padding and an absent adapter stay exact. NaN stays NaN; infinities clamp.
//!
//! A tensor with an encoding is never fused away; one without is free to be. Both backends follow this, so a result of
//! one is at most one step of the last encoding from the other's as long as no rounding before it went another way.

use half::{bf16, f16};
use htp_sim::Grid;

use crate::{map::Bytes, types::DataType};

/// How the numbers of a fixed-point tensor map to floats.
///
/// A fixed-point tensor *without* an encoding that is computed at run time (an activation, a KV cache) is quantized
/// dynamically: each row gets a symmetric scale of its own from its largest magnitude.
#[derive(Debug, Clone)]
pub enum Encoding {
    /// One scale and offset for the whole tensor (QNN `SCALE_OFFSET`, or `BW_SCALE_OFFSET` if `bitwidth` is narrower
    /// than the container).
    ScaleOffset {
        /// True width in bits.
        bitwidth: u8,
        /// Step between two codes.
        scale: f32,
        /// Added to the code before scaling.
        offset: i32,
    },
    /// One scale, and possibly offset, for each index of `axis` (QNN `AXIS_SCALE_OFFSET`, `BW_AXIS_SCALE_OFFSET`).
    AxisScaleOffset {
        /// True width in bits.
        bitwidth: u8,
        /// The axis that has a scale per index; 0 for the output features of a weight `[n, k]`.
        axis: usize,
        /// One scale per index.
        scales: Floats,
        /// One offset per index, or empty when all are 0.
        offsets: Vec<i32>,
    },
    /// One scale for each run of `block_size` elements along the last axis of a `[n, k]` tensor (QNN `BLOCK`).
    Block {
        /// True width in bits.
        bitwidth: u8,
        /// Elements that share a scale.
        block_size: usize,
        /// Scales `[n, k / block_size]`, row-major.
        scales: Floats,
        /// Offsets in the same order.
        offsets: BlockOffsets,
    },
    /// One scale for each row of a `[n, k]` tensor and a whole number for each run of `block_size` elements (QNN
    /// `BLOCKWISE_EXPANSION`, LPBQ): `float = q * step * scale`. Symmetric.
    BlockExpansion {
        /// True width in bits.
        bitwidth: u8,
        /// Elements that share a step.
        block_size: usize,
        /// Scales `[n]`.
        scales: Floats,
        /// Steps `[n, k / block_size]`, row-major, each 1 to [`MAX_BLOCK_STEP`].
        steps: Bytes,
    },
}

impl Encoding {
    /// The floats that a computed tensor of `data_type` with this encoding can hold.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn grid(&self, data_type: DataType) -> Result<Grid, String> {
        let Encoding::ScaleOffset { bitwidth, scale, offset } = *self else {
            return Err("an encoding per axis or block, need one scale and offset for a computed tensor".to_owned());
        };
        let signed = match data_type {
            DataType::SFixedPoint8 | DataType::SFixedPoint16 => true,
            DataType::UFixedPoint8 | DataType::UFixedPoint16 => false,
            _ => return Err(format!("an encoding on {data_type}, need a fixed-point type of 8 or 16 bits")),
        };
        if bitwidth < 2 || usize::from(bitwidth) > data_type.bits() {
            return Err(format!("{bitwidth} bits in {data_type}, need 2 to {}", data_type.bits()));
        }
        if !(scale.is_normal() && scale > 0.0) {
            return Err(format!("scale {scale}, need a positive number"));
        }
        let least = if signed { -(1i32 << (bitwidth - 1)) } else { 0 };
        let most = least + ((1 << bitwidth) - 1);
        let ends = least.checked_add(offset).zip(most.checked_add(offset));
        ends.and_then(|(low, high)| Grid::new(scale, low, high))
            .ok_or_else(|| format!("offset {offset}, need {} to {} so that zero is a code", -most, -least))
    }
}

/// Largest step of [`Encoding::BlockExpansion`]: a four-bit code times its step fits eight bits.
pub const MAX_BLOCK_STEP: u8 = 16;

/// Offsets of a block encoding.
#[derive(Debug, Clone)]
pub enum BlockOffsets {
    /// All 0.
    Symmetric,
    /// One whole number (i8) per block: `float = (q + offset) * scale`.
    Integer(Bytes),
    /// One float per block, for grids whose zero is no whole step (GGUF's `Q4_1`, `Q4_K`): `float = q * scale + min`.
    Min(Floats),
}

/// A flat array of floats in the bytes of a file: f32, f16 or bf16, little endian.
#[derive(Debug, Clone)]
pub struct Floats {
    bytes: Bytes,
    data_type: DataType,
}

impl Floats {
    /// Wraps `bytes` as floats of `data_type`, or `None` if that is no float type or the length is not whole.
    pub fn new(bytes: Bytes, data_type: DataType) -> Option<Floats> {
        (data_type.is_float() && bytes.len().is_multiple_of(data_type.bits() / 8))
            .then_some(Floats { bytes, data_type })
    }

    /// Stores `values` as f32.
    pub fn from_f32(values: &[f32]) -> Floats {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Floats { bytes: bytes.into(), data_type: DataType::Float32 }
    }

    /// Stores `values` as f16, rounded to nearest.
    pub fn from_f16(values: &[f32]) -> Floats {
        let bytes: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        Floats { bytes: bytes.into(), data_type: DataType::Float16 }
    }

    /// Number of floats.
    pub fn len(&self) -> usize {
        self.bytes.len() / (self.data_type.bits() / 8)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The float at `index`, widened.
    ///
    /// # Panics
    /// If `index` is not below [`Floats::len`].
    pub fn get(&self, index: usize) -> f32 {
        match self.data_type {
            DataType::Float32 => {
                let at = index * 4;
                f32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
            }
            DataType::Float16 => f16::from_le_bytes([self.bytes[index * 2], self.bytes[index * 2 + 1]]).to_f32(),
            _ => bf16::from_le_bytes([self.bytes[index * 2], self.bytes[index * 2 + 1]]).to_f32(),
        }
    }

    /// All floats, widened.
    pub fn to_vec(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The stored type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }
}
