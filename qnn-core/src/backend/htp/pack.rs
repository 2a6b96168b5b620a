//! Constants in the kernels' layout: done once, when a context binary is generated.

use half::{bf16, f16};
use htp_sim::{BlockOffset, Offsets, PackedLayout, Packer, ShapeError, WeightFormat};

use crate::{
    backend::PrepareError,
    encoding::{BlockOffsets, Encoding},
    map::Bytes,
    tensor::{Panels, Tensor, TensorData},
    types::DataType,
};

/// The weight `tensor` (a constant `[n, k]`) in panels; one that is packed already is shared.
///
/// Encodings that the kernels have are kept as they are: symmetric 4 and 8 bit per channel and per block, and 4 bit per
/// block with whole-number or float offsets. f32, f16 and bf16 keep their type.
///
/// # Errors
/// [`PrepareError::Tensor`] if it is no matrix, or its type and encoding have no kernel.
pub fn pack_constant(tensor: &Tensor) -> Result<Panels, PrepareError> {
    pack_as(tensor, PackedLayout::new)
}

/// As [`pack_constant`], for the value of an updatable tensor: with the least padding, so that an adapter of a small rank is
/// a small file.
///
/// # Errors
/// As [`pack_constant`].
pub fn pack_update(tensor: &Tensor) -> Result<Panels, PrepareError> {
    pack_as(tensor, PackedLayout::tight)
}

fn pack_as(
    tensor: &Tensor,
    layout: fn(usize, usize, WeightFormat) -> Result<PackedLayout, ShapeError>,
) -> Result<Panels, PrepareError> {
    let refuse = |why: String| PrepareError::Tensor { tensor: tensor.name.clone(), why };
    let bytes = match &tensor.data {
        Some(TensorData::Panels(panels)) => return Ok(panels.clone()),
        Some(TensorData::Flat(bytes)) => bytes,
        None => return Err(refuse(format!("{} where a constant is needed", tensor.tensor_type))),
    };
    let [n, k] = tensor.shape.max_dims()[..] else {
        return Err(refuse(format!("a weight of shape {}, need two dimensions", tensor.shape)));
    };
    let format = weight_format(tensor).map_err(refuse)?;
    let pack = || -> Result<Panels, ShapeError> {
        let layout = layout(n, k, format)?;
        let mut blob = vec![0; layout.size_bytes()];
        let mut packer = Packer::new(layout, &mut blob)?;
        let source = Source { tensor, bytes, k };
        for panel in 0..layout.panels() {
            source.pack_panel(&mut packer, panel, format, panel * PANEL..n.min((panel + 1) * PANEL))?;
        }
        Panels::new(layout, Bytes::from(blob))
    };
    pack().map_err(|e| refuse(e.to_string()))
}

/// A float constant's values.
///
/// # Errors
/// [`PrepareError::Tensor`] if `tensor` is no flat float constant.
pub(super) fn floats_of(tensor: &Tensor) -> Result<Vec<f32>, PrepareError> {
    match &tensor.data {
        Some(TensorData::Flat(bytes)) if tensor.data_type.is_float() => {
            Ok((0..tensor.shape.max_elements().unwrap_or(0)).map(|i| float(bytes, tensor.data_type, i)).collect())
        }
        _ => {
            let why = format!("{} {}, need a flat float constant", tensor.tensor_type, tensor.data_type);
            Err(PrepareError::Tensor { tensor: tensor.name.clone(), why })
        }
    }
}

/// The kernels' format for a constant, or why there is none.
fn weight_format(tensor: &Tensor) -> Result<WeightFormat, String> {
    let four = matches!(tensor.data_type, DataType::SFixedPoint4 | DataType::UFixedPoint4);
    Ok(match (&tensor.encoding, tensor.data_type) {
        (None, DataType::Float32) => WeightFormat::F32,
        (None, DataType::Float16) => WeightFormat::F16,
        (None, DataType::BFloat16) => WeightFormat::Bf16,
        (Some(Encoding::AxisScaleOffset { axis: 0, offsets, .. }), DataType::SFixedPoint4 | DataType::SFixedPoint8)
            if offsets.iter().all(|o| *o == 0) =>
        {
            if four {
                WeightFormat::Int4PerChannel
            } else {
                WeightFormat::Int8PerChannel
            }
        }
        (Some(Encoding::Block { block_size, offsets, .. }), data_type) => match (offsets, data_type) {
            (BlockOffsets::Symmetric, DataType::SFixedPoint8) => WeightFormat::Int8Block { block: *block_size },
            (BlockOffsets::Symmetric, DataType::SFixedPoint4) => int4(*block_size, BlockOffset::Symmetric),
            (BlockOffsets::Integer(_), DataType::UFixedPoint4) => int4(*block_size, BlockOffset::Integer),
            (BlockOffsets::Min(_), DataType::UFixedPoint4) => int4(*block_size, BlockOffset::Min),
            _ => return Err(format!("{data_type} with these block offsets has no kernel")),
        },
        (Some(Encoding::BlockExpansion { block_size, .. }), DataType::SFixedPoint4) => {
            WeightFormat::Int4Expansion { block: *block_size }
        }
        (encoding, data_type) => {
            let encoded = if encoding.is_some() { "with this encoding" } else { "without encoding" };
            return Err(format!("{data_type} {encoded} has no kernel"));
        }
    })
}

fn int4(block: usize, offset: BlockOffset) -> WeightFormat {
    WeightFormat::Int4Block { block, offset }
}

/// A flat constant being packed.
struct Source<'a> {
    tensor: &'a Tensor,
    bytes: &'a Bytes,
    k: usize,
}

impl Source<'_> {
    fn pack_panel(
        &self,
        packer: &mut Packer<'_>,
        panel: usize,
        format: WeightFormat,
        rows: std::ops::Range<usize>,
    ) -> Result<(), ShapeError> {
        let elements = rows.start * self.k..rows.end * self.k;
        let (scales, offsets, block) = match &self.tensor.encoding {
            Some(Encoding::AxisScaleOffset { scales, .. }) => (scales, &BlockOffsets::Symmetric, self.k),
            Some(Encoding::Block { block_size, scales, offsets, .. }) => (scales, offsets, *block_size),
            Some(Encoding::BlockExpansion { block_size, scales, steps, .. }) => {
                let row_blocks = self.k / block_size;
                let steps = &steps[rows.start * row_blocks..rows.end * row_blocks];
                let scales: Vec<f32> = rows.map(|row| scales.get(row)).collect();
                let codes: Vec<i8> = elements.map(|i| self.code(i, format)).collect();
                return packer.quantized_panel(panel, &codes, &scales, Offsets::Steps(steps));
            }
            _ => {
                let values: Vec<f32> = elements.map(|i| float(self.bytes, self.tensor.data_type, i)).collect();
                return packer.float_panel(panel, &values);
            }
        };
        let blocks = elements.start / block..elements.end / block;
        let codes: Vec<i8> = elements.map(|i| self.code(i, format)).collect();
        let scales: Vec<f32> = blocks.clone().map(|b| scales.get(b)).collect();
        match offsets {
            BlockOffsets::Symmetric => packer.quantized_panel(panel, &codes, &scales, Offsets::None),
            BlockOffsets::Integer(all) => {
                let offsets: Vec<i8> = all[blocks].iter().map(|b| *b as i8).collect();
                packer.quantized_panel(panel, &codes, &scales, Offsets::Integer(&offsets))
            }
            BlockOffsets::Min(all) => {
                let mins: Vec<f32> = blocks.map(|b| all.get(b)).collect();
                packer.quantized_panel(panel, &codes, &scales, Offsets::Min(&mins))
            }
        }
    }

    /// Code number `at` as the kernels store it: 4-bit codes are unsigned there, symmetric ones moved up by 8.
    fn code(&self, at: usize, format: WeightFormat) -> i8 {
        if !format.is_4bit() {
            return self.bytes[at] as i8;
        }
        let nibble = (self.bytes[at / 2] >> (at % 2 * 4) & 15) as i8;
        if self.tensor.data_type == DataType::SFixedPoint4 { nibble ^ 8 } else { nibble }
    }
}

/// Element number `at` of a flat float constant.
fn float(bytes: &Bytes, data_type: DataType, at: usize) -> f32 {
    match data_type {
        DataType::Float16 => f16::from_le_bytes([bytes[at * 2], bytes[at * 2 + 1]]).to_f32(),
        DataType::BFloat16 => bf16::from_le_bytes([bytes[at * 2], bytes[at * 2 + 1]]).to_f32(),
        _ => f32::from_le_bytes([bytes[at * 4], bytes[at * 4 + 1], bytes[at * 4 + 2], bytes[at * 4 + 3]]),
    }
}

/// Rows of a panel.
const PANEL: usize = 16;
