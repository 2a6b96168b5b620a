//! Values of a branch in the form that the graph stores: floats, or integers with a scale for each row.

use half::f16;

use super::LoraError;
use crate::{
    backend::htp::pack_update,
    encoding::{Encoding, Floats},
    tensor::{Panels, Shape, Tensor, TensorData},
    types::{DataType, TensorType},
};

/// A or B of one module, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix<'a> {
    /// Name of the tensor.
    pub name: String,
    /// Rows: rank columns of A, outputs of B.
    pub n: usize,
    /// Elements of a row.
    pub k: usize,
    /// `n · k` elements.
    pub values: &'a [f32],
}

/// `matrix` as a constant of `data_type`: a float type, or SFIXED_POINT_8 or SFIXED_POINT_4 with a scale for each row.
/// `scales` overrides the scales, one for each row.
///
/// # Errors
/// [`LoraError`] naming the tensor, if its size, its scales or a value do not fit.
pub fn constant(matrix: &Matrix<'_>, data_type: DataType, scales: Option<&[f32]>) -> Result<Tensor, LoraError> {
    let refuse = |have: String, want: String| Err(LoraError::Tensor { tensor: matrix.name.clone(), have, want });
    if matrix.values.len() != matrix.n * matrix.k || matrix.values.is_empty() {
        return refuse(format!("{} elements", matrix.values.len()), format!("{} · {}", matrix.n, matrix.k));
    }
    if let Some(at) = matrix.values.iter().position(|v| !v.is_finite()) {
        return refuse(format!("{} in row {}", matrix.values[at], at / matrix.k), "finite values".to_owned());
    }
    let (bytes, encoding): (Vec<u8>, _) = match data_type {
        DataType::Float32 => (matrix.values.iter().flat_map(|v| v.to_le_bytes()).collect(), None),
        DataType::Float16 => {
            let halves: Vec<f16> = matrix.values.iter().map(|v| f16::from_f32(*v)).collect();
            if let Some(at) = halves.iter().position(|v| !v.is_finite()) {
                let have = format!("{} in row {}", matrix.values[at], at / matrix.k);
                return refuse(have, "values that f16 can hold".to_owned());
            }
            (halves.iter().flat_map(|v| v.to_le_bytes()).collect(), None)
        }
        DataType::SFixedPoint8 | DataType::SFixedPoint4 => {
            let own = if scales.is_none() { row_scales(matrix, data_type) } else { Vec::new() };
            let scales = scales.unwrap_or(&own);
            if scales.len() != matrix.n || scales.iter().any(|scale| !scale.is_finite() || *scale < 0.0) {
                return refuse(format!("{} scales", scales.len()), format!("{} finite ones, not negative", matrix.n));
            }
            let bitwidth = data_type.bits() as u8;
            let (offsets, axis, floats) = (Vec::new(), 0, Floats::from_f32(scales));
            let encoding = Encoding::AxisScaleOffset { bitwidth, axis, scales: floats, offsets };
            (codes(matrix, data_type, scales), Some(encoding))
        }
        other => return refuse(format!("branches of type {other}"), "floats, SFIXED_POINT_8 or _4".to_owned()),
    };
    Ok(Tensor {
        name: matrix.name.clone(),
        tensor_type: TensorType::Static,
        data_type,
        shape: Shape::fixed(&[matrix.n, matrix.k]),
        encoding,
        data: Some(TensorData::Flat(bytes.into())),
    })
}

/// `matrix` as `data_type` in the kernels' panels, with scales of its own.
///
/// # Errors
/// As [`constant`], and [`LoraError::Pack`].
pub fn pack(matrix: &Matrix<'_>, data_type: DataType) -> Result<Panels, LoraError> {
    panels(&constant(matrix, data_type, None)?)
}

/// A constant in the kernels' panels.
///
/// # Errors
/// [`LoraError::Pack`] naming the tensor.
pub fn panels(tensor: &Tensor) -> Result<Panels, LoraError> {
    pack_update(tensor).map_err(|why| LoraError::Pack(Box::new(why)))
}

/// The scale of each row: for 8 bits that of its largest magnitude, for 4 bits the one of a few with the least squared
/// error. A row of zeros gets 1.
pub fn row_scales(matrix: &Matrix<'_>, data_type: DataType) -> Vec<f32> {
    let scale = |row: &[f32]| {
        let largest = row.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        let candidates: &[f32] = if data_type.bits() == 4 { &STEPS_4BIT } else { &[127.0] };
        let scales = candidates.iter().map(|steps| largest / steps);
        // A row so small that its step is no f32 above zero is stored as zeros.
        let usable = scales.filter(|scale| *scale > 0.0);
        usable.min_by(|a, b| error(row, *a, data_type).total_cmp(&error(row, *b, data_type))).unwrap_or(1.0)
    };
    matrix.values.chunks_exact(matrix.k).map(scale).collect()
}

fn error(row: &[f32], scale: f32, data_type: DataType) -> f64 {
    row.iter().map(|v| f64::from(f32::from(code(*v, scale, data_type)) * scale - v).powi(2)).sum()
}

/// Codes, four-bit ones two to a byte, the first in the low half.
fn codes(matrix: &Matrix<'_>, data_type: DataType, scales: &[f32]) -> Vec<u8> {
    let rows = matrix.values.chunks_exact(matrix.k).zip(scales);
    let codes: Vec<u8> =
        rows.flat_map(|(row, scale)| row.iter().map(|v| code(*v, *scale, data_type).cast_unsigned())).collect();
    if data_type.bits() != 4 {
        return codes;
    }
    codes.chunks(2).map(|pair| pair[0] & 15 | pair.get(1).map_or(0, |code| code << 4)).collect()
}

fn code(value: f32, scale: f32, data_type: DataType) -> i8 {
    let (lowest, highest) = if data_type.bits() == 4 { (-8.0, 7.0) } else { (-127.0, 127.0) };
    if scale == 0.0 { 0 } else { (value / scale).round_ties_even().clamp(lowest, highest) as i8 }
}

/// Steps from zero to a row's largest magnitude that are tried for 4 bits; more than 7 clip it.
const STEPS_4BIT: [f32; 9] = [7.0, 6.5, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0];
