//! Constants as floats: the law `float = (q + offset) * scale`, applied element by element.

use half::{bf16, f16};

use crate::{
    encoding::{BlockOffsets, Encoding},
    map::Bytes,
    tensor::{Panels, Tensor, TensorData},
    types::DataType,
};

/// The value of constant `tensor` as f64, row-major; empty for every other kind of tensor.
pub fn dequantize_constant(tensor: &Tensor) -> Vec<f64> {
    match &tensor.data {
        None => Vec::new(),
        Some(TensorData::Panels(panels)) => dequantize_panels(panels),
        Some(TensorData::Flat(bytes)) => {
            let elements = tensor.shape.max_elements().unwrap_or(0);
            let k = tensor.shape.last().max(1);
            let raw = (0..elements).map(|i| element(bytes, tensor.data_type, i));
            match &tensor.encoding {
                None => raw.collect(),
                Some(encoding) => raw.enumerate().map(|(i, q)| decode(encoding, tensor, k, i, q)).collect(),
            }
        }
    }
}

/// The value of a packed weight, row-major.
pub(super) fn dequantize_panels(panels: &Panels) -> Vec<f64> {
    let (layout, view) = (panels.layout(), panels.view());
    let mut row = vec![0.0f32; layout.k()];
    let mut out = Vec::with_capacity(layout.n() * layout.k());
    for n in 0..layout.n() {
        view.dequantize_row(n, &mut row);
        out.extend(row.iter().map(|v| f64::from(*v)));
    }
    out
}

fn decode(encoding: &Encoding, tensor: &Tensor, k: usize, at: usize, q: f64) -> f64 {
    match encoding {
        Encoding::ScaleOffset { scale, offset, .. } => (q + f64::from(*offset)) * f64::from(*scale),
        Encoding::AxisScaleOffset { axis, scales, offsets, .. } => {
            let inner: usize = tensor.shape.max_dims()[axis + 1..].iter().product();
            let index = at / inner % scales.len();
            let offset = offsets.get(index).copied().unwrap_or(0);
            (q + f64::from(offset)) * f64::from(scales.get(index))
        }
        Encoding::Block { block_size, scales, offsets, .. } => {
            let block = at / k * (k / block_size) + at % k / block_size;
            let scale = f64::from(scales.get(block));
            match offsets {
                BlockOffsets::Symmetric => q * scale,
                BlockOffsets::Integer(bytes) => (q + f64::from(bytes[block] as i8)) * scale,
                BlockOffsets::Min(mins) => q * scale + f64::from(mins.get(block)),
            }
        }
        Encoding::BlockExpansion { block_size, scales, steps, .. } => {
            let step = steps[at / k * (k / block_size) + at % k / block_size];
            q * f64::from(step) * f64::from(scales.get(at / k))
        }
    }
}

/// Element number `at` of `bytes`, as the number that is stored.
fn element(bytes: &Bytes, data_type: DataType, at: usize) -> f64 {
    let two = |at: usize| [bytes[at * 2], bytes[at * 2 + 1]];
    let four = |at: usize| [bytes[at * 4], bytes[at * 4 + 1], bytes[at * 4 + 2], bytes[at * 4 + 3]];
    let nibble = |at: usize| bytes[at / 2] >> (at % 2 * 4) & 15;
    match data_type {
        DataType::SFixedPoint4 => f64::from(((nibble(at) << 4) as i8) >> 4),
        DataType::UFixedPoint4 => f64::from(nibble(at)),
        DataType::Int8 | DataType::SFixedPoint8 => f64::from(bytes[at] as i8),
        DataType::UInt8 | DataType::UFixedPoint8 | DataType::Bool8 => f64::from(bytes[at]),
        DataType::Int16 | DataType::SFixedPoint16 => f64::from(i16::from_le_bytes(two(at))),
        DataType::UInt16 | DataType::UFixedPoint16 => f64::from(u16::from_le_bytes(two(at))),
        DataType::Float16 => f16::from_le_bytes(two(at)).to_f64(),
        DataType::BFloat16 => bf16::from_le_bytes(two(at)).to_f64(),
        DataType::Float32 => f64::from(f32::from_le_bytes(four(at))),
        DataType::Int32 | DataType::SFixedPoint32 => f64::from(i32::from_le_bytes(four(at))),
        DataType::UInt32 | DataType::UFixedPoint32 => f64::from(u32::from_le_bytes(four(at))),
    }
}
