//! GPTQ and AWQ checkpoints: 4-bit codes eight to a word, with a scale and a zero for each group of inputs.
//!
//! ```text
//!          qweight (i32)    nibble i of a word        qzeros (i32)           scales     value
//! GPTQ     [k/8, n]         input 8·row + i           [k/group, n/8]         [.., n]    (q - zero) · scale
//! AWQ      [k, n/8]         output 8·column + ORDER   [k/group, n/8], ORDER  [.., n]    (q - zero) · scale
//! ```
//! Each matrix becomes `[n, k]` in blocks that hold scale, offset and codes. The grid stays what it was: no value changes.

use half::{bf16, f16};
use serde_json::Value;

use super::{
    config::config_error,
    error::ImportError,
    quantize_weights::{Bits, Quantized, block_sizes},
    safetensors::StoredTensor,
    source::{ElementFormat, SourceTensor},
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
    /// Zeros are stored less one, in the first version of the format.
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
            "gptq" => match text("checkpoint_format").unwrap_or("gptq") {
                "gptq" => Packing::Gptq { zeros_less_one: true },
                "gptq_v2" => Packing::Gptq { zeros_less_one: false },
                other => return refuse(format!("checkpoint_format {other:?}"), "\"gptq\", \"gptq_v2\""),
            },
            "awq" => match text("version").unwrap_or("gemm").to_ascii_lowercase().as_str() {
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
    /// [`ImportError`] naming the tensor that is missing or of another shape or type, and groups in the order of activations
    /// (act-order), which would need the inputs to be shuffled for each matrix.
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
        let groups = scales.shape[0];
        let group = if groups > 0 && k.is_multiple_of(groups) { k / groups } else { 0 };
        if group == 0 || group != self.group_size.unwrap_or(k) {
            let want = format!("rows for groups of {} in {k} inputs", self.group_size.unwrap_or(k));
            return Err(scales.refuse(want));
        }
        scales.expect_shape([groups, n])?;
        zeros.expect_shape([groups, n / 8])?;
        if let Some(order) = stored(&format!("{module}.g_idx")) {
            expect_order(module, &order, group)?;
        }
        let block_size = block_sizes(Bits::Four, k).into_iter().rev().find(|block| group.is_multiple_of(*block));
        let Some(block_size) = block_size else {
            return Err(scales.refuse(format!("groups that are a multiple of 8, not {group}")));
        };
        let scales = scales.halves()?;
        let matrix =
            Matrix { packing: self.packing, k, n, group, block_size, codes: codes.words(), zeros: zeros.words() };
        let bytes = matrix.blocks(&scales);
        SourceTensor::new(&format!("{module}.weight"), vec![n, k], ElementFormat::Int4 { block_size }, bytes.into())
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

    /// The elements as f16, which has to hold them exactly: the kernels' scales are halves.
    fn halves(&self) -> Result<Vec<f16>, ImportError> {
        let bytes = &self.tensor.bytes;
        let floats: Vec<f32> = match self.tensor.dtype {
            "F16" => return Ok(bytes.as_chunks::<2>().0.iter().map(|v| f16::from_le_bytes(*v)).collect()),
            "BF16" => bytes.as_chunks::<2>().0.iter().map(|v| bf16::from_le_bytes(*v).to_f32()).collect(),
            "F32" => bytes.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect(),
            _ => return Err(self.refuse("F16".to_owned())),
        };
        match floats.iter().find(|v| f16::from_f32(**v).to_f32() != **v) {
            None => Ok(floats.into_iter().map(f16::from_f32).collect()),
            Some(v) => Err(self.refuse(format!("scales that F16 holds exactly, unlike {v}"))),
        }
    }
}

/// Refuses groups that are not the inputs in their order.
fn expect_order(module: &str, order: &StoredTensor, group: usize) -> Result<(), ImportError> {
    let indices = order.bytes.as_chunks::<4>().0.iter().map(|index| i32::from_le_bytes(*index));
    let plain = order.dtype == "I32" && indices.enumerate().all(|(i, index)| usize::try_from(index) == Ok(i / group));
    if plain {
        return Ok(());
    }
    Err(ImportError::Unsupported {
        what: format!("act-order (desc_act) of {module}: its groups are not inputs in a row"),
        supported: "groups in the order of the inputs".to_owned(),
    })
}

/// A packed matrix whose sizes fit.
struct Matrix {
    packing: Packing,
    k: usize,
    n: usize,
    group: usize,
    block_size: usize,
    codes: Vec<u32>,
    zeros: Vec<u32>,
}

impl Matrix {
    /// Blocks of the rows `[n, k]`: scale (f16), offset (i8), codes two to a byte, the first in the low half.
    fn blocks(&self, scales: &[f16]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.n * self.k / self.block_size * block_bytes(self.block_size));
        for n in 0..self.n {
            for start in (0..self.k).step_by(self.block_size) {
                let group = start / self.group;
                bytes.extend_from_slice(&scales[group * self.n + n].to_le_bytes());
                bytes.push((-(self.zero(group, n) as i8)).cast_unsigned());
                let pair = |i: usize| self.code(start + 2 * i, n) | self.code(start + 2 * i + 1, n) << 4;
                bytes.extend((0..self.block_size / 2).map(pair));
            }
        }
        bytes
    }

    fn code(&self, k: usize, n: usize) -> u8 {
        match self.packing {
            Packing::Gptq { .. } => nibble(self.codes[k / 8 * self.n + n], k % 8),
            Packing::Awq => nibble(self.codes[k * (self.n / 8) + n / 8], AWQ_PLACE[n % 8]),
        }
    }

    fn zero(&self, group: usize, n: usize) -> u8 {
        let word = self.zeros[group * (self.n / 8) + n / 8];
        match self.packing {
            Packing::Gptq { zeros_less_one: true } => (nibble(word, n % 8) + 1) & 15,
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
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let offset = f32::from(block[2].cast_signed());
        for (i, out) in out.iter_mut().enumerate() {
            let code = block[HEAD_BYTES + i / 2] >> (i % 2 * 4) & 15;
            *out = (f32::from(code) + offset) * scale;
        }
    }
}

/// The blocks of `tensor` as codes with an encoding. Symmetric ones need no offsets.
pub(super) fn keep_grid(tensor: &SourceTensor, block_size: usize) -> Quantized {
    let blocks = || tensor.bytes.chunks_exact(block_bytes(block_size));
    let scales: Vec<u8> = blocks().flat_map(|block| [block[0], block[1]]).collect();
    let scales = Floats::new(scales.into(), DataType::Float16).expect("two bytes for each");
    let symmetric = blocks().all(|block| block[2].cast_signed() == -8);
    // Without an offset a code is a signed number: the highest bit turns.
    let (data_type, flip) = if symmetric { (DataType::SFixedPoint4, 0x88) } else { (DataType::UFixedPoint4, 0) };
    let codes: Vec<u8> = blocks().flat_map(|block| block[HEAD_BYTES..].iter().map(|pair| pair ^ flip)).collect();
    let offsets = match symmetric {
        true => BlockOffsets::Symmetric,
        false => BlockOffsets::Integer(blocks().map(|block| block[2]).collect::<Vec<u8>>().into()),
    };
    Quantized {
        data_type,
        data: codes.into(),
        encoding: Encoding::Block { bitwidth: 4, block_size, scales, offsets },
        squared_error: 0.0,
    }
}

/// Scale and offset, before a block's codes.
const HEAD_BYTES: usize = 3;
/// Nibble that holds output `i` of eight: AWQ stores them in the order 0, 2, 4, 6, 1, 3, 5, 7.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
