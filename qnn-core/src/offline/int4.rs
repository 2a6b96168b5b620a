//! GPTQ and AWQ checkpoints: 4-bit codes eight to a word, with a scale and a zero for each group of inputs.
//!
//! ```text
//!          qweight (i32)    nibble i of a word        qzeros (i32)           scales     value
//! GPTQ     [k/8, n]         input 8·row + i           [k/group, n/8]         [.., n]    (q - zero) · scale
//! AWQ      [k, n/8]         output 8·column + ORDER   [k/group, n/8], ORDER  [.., n]    (q - zero) · scale
//! ```
//! Each matrix becomes `[n, k]` in blocks that hold scale, offset and codes. The grid stays what it was: no value changes.
//! Only where GPTQ has put inputs into groups by their activations (`desc_act`, in `g_idx`) are there no blocks; such a matrix
//! becomes floats, of the very values.

use half::{bf16, f16};
use serde_json::Value;

use super::{
    config::config_error,
    error::ImportError,
    quantize_weights::{Bits, QuantizeError, Quantized, block_sizes},
    safetensors::StoredTensor,
    source::{ElementFormat, ScaleType, SourceTensor},
};
use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    types::DataType,
};

/// How a checkpoint packs its 4-bit matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Grids {
    packing: Packing,
    /// Inputs that share a scale; all of a row if `None`.
    group_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// In the first version of the format zeros are stored less one.
    Gptq {
        zeros_less_one: bool,
    },
    Awq,
}

impl Int4Grids {
    /// Reads `quantization_config` of `config.json`, or what is in `quantize_config.json` (GPTQ) or `quant_config.json`
    /// (AWQ).
    ///
    /// # Errors
    /// [`ImportError`] naming the method, width or variant that is not supported, or the key that is missing or wrong.
    pub fn from_config(config: &Value) -> Result<Int4Grids, ImportError> {
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let method = text("quant_method").unwrap_or(if config.get("w_bit").is_some() { "awq" } else { "gptq" });
        let refuse = |what: String, supported: &str| {
            Err(ImportError::Unsupported { what: format!("{method} {what}"), supported: supported.to_owned() })
        };
        let packing = match method {
            "gptq" => match text("checkpoint_format").or(text("format")).unwrap_or("gptq") {
                "gptq" => Packing::Gptq { zeros_less_one: true },
                "gptq_v2" => Packing::Gptq { zeros_less_one: false },
                other => return refuse(format!("checkpoint_format {other:?}"), "\"gptq\", \"gptq_v2\""),
            },
            "awq" => match text("version").or(text("format")).unwrap_or("gemm").to_ascii_lowercase().as_str() {
                "gemm" => Packing::Awq,
                other => return refuse(format!("version {other:?}"), "\"gemm\""),
            },
            other => {
                return Err(ImportError::Unsupported {
                    what: format!("quantization_config of method {other:?}"),
                    supported: "unquantized weights (F32, F16, BF16), \"gptq\" and \"awq\" of 4 bits, GGUF".to_owned(),
                });
            }
        };
        if let Some(word) = text("pack_dtype").filter(|word| *word != "int32") {
            return refuse(format!("pack_dtype {word:?}"), "\"int32\"");
        }
        let number = |keys: [&str; 2]| keys.iter().find_map(|key| config.get(*key)).and_then(Value::as_i64);
        match number(["bits", "w_bit"]) {
            Some(4) => {}
            Some(bits) => return refuse(format!("of {bits} bits"), "4 bits"),
            None => return Err(config_error("quantization_config/bits", "missing", "4".to_owned())),
        }
        let group_size = match number(["group_size", "q_group_size"]) {
            Some(-1) => None,
            Some(size) if size > 0 => usize::try_from(size).ok(),
            other => {
                let have = other.map_or_else(|| "missing".to_owned(), |size| size.to_string());
                let want = "a number of inputs, or -1".to_owned();
                return Err(config_error("quantization_config/group_size", have, want));
            }
        };
        Ok(Int4Grids { packing, group_size })
    }

    /// The matrix of `module` as `<module>.weight`, from what `stored` has for it.
    ///
    /// # Errors
    /// [`ImportError`] naming the tensor that is missing or of another shape or type.
    pub fn weight(
        &self,
        module: &str,
        stored: &dyn Fn(&str) -> Option<StoredTensor>,
    ) -> Result<SourceTensor, ImportError> {
        let part = |name: &str| Part::find(format!("{module}.{name}"), stored);
        let (codes, zeros, scales) = (part("qweight")?, part("qzeros")?, part("scales")?);
        codes.expect_type("I32")?;
        zeros.expect_type("I32")?;
        let [rows, columns] = codes.shape;
        let (k, n) = match self.packing {
            Packing::Gptq { .. } => (rows.saturating_mul(8), columns),
            Packing::Awq => (rows, columns.saturating_mul(8)),
        };
        // The zeros of eight outputs share a word; AWQ's codes do too, so there it is always so.
        if !n.is_multiple_of(8) {
            return Err(codes.refuse(format!("outputs in a multiple of 8, not {n}")));
        }
        let groups = scales.shape[0];
        let group = if groups > 0 && k.is_multiple_of(groups) { k / groups } else { 0 };
        if group == 0 || group != self.group_size.unwrap_or(k) {
            let want = format!("rows for groups of {} in {k} inputs", self.group_size.unwrap_or(k));
            return Err(scales.refuse(want));
        }
        scales.expect_shape([groups, n])?;
        zeros.expect_shape([groups, n / 8])?;
        let order = match stored(&format!("{module}.g_idx")) {
            Some(order) => groups_of_inputs(&format!("{module}.g_idx"), &order, k, groups)?,
            None => (0..k).map(|i| i / group).collect(),
        };
        let blocks = block_sizes(Bits::Four, k).into_iter().rev().find(|block| group.is_multiple_of(*block));
        let Some(block_size) = blocks else {
            return Err(scales.refuse(format!("groups that are a multiple of 8, not {group}")));
        };
        let (in_order, scales) = (order.iter().enumerate().all(|(i, g)| *g == i / group), scales.floats()?);
        let matrix = Matrix { packing: self.packing, k, n, order, scales, codes: codes.words(), zeros: zeros.words() };
        let (format, bytes) = match in_order {
            true => (ElementFormat::Int4 { block_size, scales: matrix.scale_type() }, matrix.blocks(block_size)),
            false => (ElementFormat::Int4ActOrder, matrix.floats()),
        };
        SourceTensor::new(&format!("{module}.weight"), vec![n, k], format, bytes.into())
    }
}

/// A stored tensor of two extents, under its name.
struct Part {
    name: String,
    shape: [usize; 2],
    tensor: StoredTensor,
}

impl Part {
    fn find(name: String, stored: &dyn Fn(&str) -> Option<StoredTensor>) -> Result<Part, ImportError> {
        let Some(tensor) = stored(&name) else { return Err(ImportError::MissingTensor { name }) };
        match tensor.shape[..] {
            [a, b] if a > 0 && b > 0 => Ok(Part { name, shape: [a, b], tensor }),
            _ => {
                let (have, want) = (format!("shape {:?}", tensor.shape), "two extents above 0".to_owned());
                Err(ImportError::Tensor { name, have, want })
            }
        }
    }

    fn refuse(&self, want: String) -> ImportError {
        let have = format!("{} {:?}", self.tensor.dtype, self.shape);
        ImportError::Tensor { name: self.name.clone(), have, want }
    }

    fn expect_type(&self, dtype: &str) -> Result<(), ImportError> {
        if self.tensor.dtype == dtype { Ok(()) } else { Err(self.refuse(dtype.to_owned())) }
    }

    fn expect_shape(&self, shape: [usize; 2]) -> Result<(), ImportError> {
        if self.shape == shape { Ok(()) } else { Err(self.refuse(format!("{shape:?}"))) }
    }

    fn words(&self) -> Vec<u32> {
        self.tensor.bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }

    fn floats(&self) -> Result<Vec<f32>, ImportError> {
        let bytes = &self.tensor.bytes;
        Ok(match self.tensor.dtype {
            "F16" => bytes.as_chunks::<2>().0.iter().map(|v| f16::from_le_bytes(*v).to_f32()).collect(),
            "BF16" => bytes.as_chunks::<2>().0.iter().map(|v| bf16::from_le_bytes(*v).to_f32()).collect(),
            "F32" => bytes.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect(),
            _ => return Err(self.refuse("F16, BF16 or F32".to_owned())),
        })
    }
}

/// The group that each of `k` inputs is in.
fn groups_of_inputs(name: &str, order: &StoredTensor, k: usize, groups: usize) -> Result<Vec<usize>, ImportError> {
    let refuse = |have: String| {
        let want = format!("{k} numbers below {groups}, of type I32");
        Err(ImportError::Tensor { name: name.to_owned(), have, want })
    };
    if order.dtype != "I32" || order.shape != [k] {
        return refuse(format!("{} {:?}", order.dtype, order.shape));
    }
    let indices = order.bytes.as_chunks::<4>().0.iter().map(|index| i32::from_le_bytes(*index));
    let found: Vec<usize> = indices.map(|index| usize::try_from(index).unwrap_or(usize::MAX)).collect();
    match found.iter().find(|group| **group >= groups) {
        Some(_) => refuse("a group that there is not".to_owned()),
        None => Ok(found),
    }
}

/// A packed matrix whose sizes fit.
struct Matrix {
    packing: Packing,
    k: usize,
    n: usize,
    /// Group of each input.
    order: Vec<usize>,
    scales: Vec<f32>,
    codes: Vec<u32>,
    zeros: Vec<u32>,
}

impl Matrix {
    /// Blocks of the rows `[n, k]`: scale (f32), offset (i8), codes two to a byte, the first in the low half.
    fn blocks(&self, block_size: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.n * self.k / block_size * block_bytes(block_size));
        for n in 0..self.n {
            for start in (0..self.k).step_by(block_size) {
                bytes.extend_from_slice(&self.scale(start, n).to_le_bytes());
                bytes.push((-(self.zero(start, n) as i8)).cast_unsigned());
                let pair = |i: usize| self.code(start + 2 * i, n) | self.code(start + 2 * i + 1, n) << 4;
                bytes.extend((0..block_size / 2).map(pair));
            }
        }
        bytes
    }

    /// The values themselves, `[n, k]` in f32.
    fn floats(&self) -> Vec<u8> {
        let value = |k, n| (f32::from(self.code(k, n)) - f32::from(self.zero(k, n))) * self.scale(k, n);
        (0..self.n).flat_map(|n| (0..self.k).flat_map(move |k| value(k, n).to_le_bytes())).collect()
    }

    fn scale_type(&self) -> ScaleType {
        let is_half = |scale: &f32| f16::from_f32(*scale).to_f32() == *scale;
        if self.scales.iter().all(is_half) { ScaleType::Half } else { ScaleType::Wider }
    }

    fn scale(&self, k: usize, n: usize) -> f32 {
        self.scales[self.order[k] * self.n + n]
    }

    fn code(&self, k: usize, n: usize) -> u8 {
        match self.packing {
            Packing::Gptq { .. } => nibble(self.codes[k / 8 * self.n + n], k % 8),
            Packing::Awq => nibble(self.codes[k * (self.n / 8) + n / 8], AWQ_PLACE[n % 8]),
        }
    }

    fn zero(&self, k: usize, n: usize) -> u8 {
        let word = self.zeros[self.order[k] * (self.n / 8) + n / 8];
        match self.packing {
            // One was taken from each nibble by a subtraction of words, so it is given back with its carries.
            Packing::Gptq { zeros_less_one: true } => nibble(word.wrapping_add(0x1111_1111), n % 8),
            Packing::Gptq { zeros_less_one: false } => nibble(word, n % 8),
            Packing::Awq => nibble(word, AWQ_PLACE[n % 8]),
        }
    }
}

fn nibble(word: u32, at: usize) -> u8 {
    (word >> (4 * at) & 15) as u8
}

/// Bytes of a block of [`ElementFormat::Int4`].
pub(super) fn block_bytes(block_size: usize) -> usize {
    HEAD_BYTES + block_size / 2
}

/// Writes the blocks in `bytes` as floats to `out`.
pub(super) fn dequantize(bytes: &[u8], block_size: usize, out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(block_bytes(block_size)).zip(out.chunks_exact_mut(block_size)) {
        let (scale, offset) = (scale(block), f32::from(offset(block)));
        for (i, out) in out.iter_mut().enumerate() {
            let code = block[HEAD_BYTES + i / 2] >> (i % 2 * 4) & 15;
            *out = (f32::from(code) + offset) * scale;
        }
    }
}

/// The blocks of `tensor` as codes with an encoding, whose scales are halves. Symmetric ones need no offsets.
///
/// # Errors
/// [`QuantizeError::TooLarge`] naming the row with a scale that f16 cannot hold.
pub(super) fn keep_grid(tensor: &SourceTensor, block_size: usize) -> Result<Quantized, QuantizeError> {
    let blocks = || tensor.bytes.chunks_exact(block_bytes(block_size));
    let scales: Vec<f32> = blocks().map(scale).collect();
    if let Some(at) = scales.iter().position(|scale| !f16::from_f32(*scale).is_finite()) {
        let row = at / (tensor.k() / block_size);
        return Err(QuantizeError::TooLarge { tensor: tensor.name.clone(), row });
    }
    let symmetric = blocks().all(|block| offset(block) == -8);
    // Without an offset a code is a signed number: the highest bit turns.
    let (data_type, flip) = if symmetric { (DataType::SFixedPoint4, 0x88) } else { (DataType::UFixedPoint4, 0) };
    let codes: Vec<u8> = blocks().flat_map(|block| block[HEAD_BYTES..].iter().map(|pair| pair ^ flip)).collect();
    let offsets = match symmetric {
        true => BlockOffsets::Symmetric,
        false => BlockOffsets::Integer(blocks().map(|block| offset(block).cast_unsigned()).collect::<Vec<u8>>().into()),
    };
    let encoding = Encoding::Block { bitwidth: 4, block_size, scales: Floats::from_f16(&scales), offsets };
    Ok(Quantized { data_type, data: codes.into(), encoding, squared_error: 0.0 })
}

fn scale(block: &[u8]) -> f32 {
    f32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

fn offset(block: &[u8]) -> i8 {
    block[4].cast_signed()
}

/// Scale and offset, before a block's codes.
const HEAD_BYTES: usize = 5;
/// Nibble that holds output `i` of eight: AWQ stores them in the order 0, 2, 4, 6, 1, 3, 5, 7.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
