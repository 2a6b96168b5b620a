//! Values of updatable tensors: floats to the panels that a section stores.

use htp_sim::{Offsets, PackedLayout, ShapeError, WeightFormat, pack_float, pack_quantized};

use crate::{map::Bytes, tensor::Panels, types::DataType};

/// Why floats cannot become the value of an updatable tensor.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ValueError {
    #[error("{have} values, need {want} for extents {dims:?}")]
    Count { have: usize, want: usize, dims: [usize; 2] },
    #[error("row {row}: a value that is not finite")]
    NotFinite { row: usize },
    #[error("{have} scales, need one for each of {want} rows")]
    Scales { have: usize, want: usize },
    #[error("row {row}: scale {scale}, need a finite one, above 0 unless the row is all zeros")]
    Scale { row: usize, scale: f32 },
    #[error("declared {have}, need FLOAT_32, FLOAT_16, BFLOAT_16, SFIXED_POINT_8 or SFIXED_POINT_4")]
    DataType { have: DataType },
    #[error(transparent)]
    Pack(#[from] ShapeError),
}

/// The value `values`, row-major `[n, k]`, in panels of the declared type.
///
/// The fixed-point types are symmetric with one scale per row: `scales`, or those of [`row_scales`]. Codes are rounded to
/// nearest, ties to even, and stop at the ends of their range. Float types take no scales.
///
/// # Errors
/// [`ValueError`] naming the row, count or type that does not fit.
pub fn pack_value(
    declared: DataType,
    dims: [usize; 2],
    values: &[f32],
    scales: Option<&[f32]>,
) -> Result<Panels, ValueError> {
    let [n, k] = dims;
    let format = match declared {
        DataType::Float32 => WeightFormat::F32,
        DataType::Float16 => WeightFormat::F16,
        DataType::BFloat16 => WeightFormat::Bf16,
        DataType::SFixedPoint8 => WeightFormat::Int8PerChannel,
        DataType::SFixedPoint4 => WeightFormat::Int4PerChannel,
        have => return Err(ValueError::DataType { have }),
    };
    let layout = PackedLayout::new(n, k, format)?;
    if n.checked_mul(k) != Some(values.len()) {
        return Err(ValueError::Count { have: values.len(), want: n.saturating_mul(k), dims });
    }
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(ValueError::NotFinite { row: at / k });
    }
    if format.is_float() {
        return Ok(Panels::new(layout, Bytes::from(pack_float(&layout, values)?))?);
    }
    let own = if scales.is_none() { row_scales(values, k, declared) } else { Vec::new() };
    let scales = scales.unwrap_or(&own);
    let codes = codes(values, k, scales, declared)?;
    Ok(Panels::new(layout, Bytes::from(pack_quantized(&layout, &codes, scales, Offsets::None)?))?)
}

/// One scale for each row of `k` values, so that its largest magnitude is the largest code.
pub fn row_scales(values: &[f32], k: usize, declared: DataType) -> Vec<f32> {
    let most = if declared == DataType::SFixedPoint4 { 7.0 } else { 127.0 };
    values.chunks(k.max(1)).map(|row| row.iter().fold(0.0f32, |top, v| top.max(v.abs())) / most).collect()
}

/// Codes as the panels keep them: 4-bit ones moved up by 8.
fn codes(values: &[f32], k: usize, scales: &[f32], declared: DataType) -> Result<Vec<i8>, ValueError> {
    let n = values.len() / k;
    if scales.len() != n {
        return Err(ValueError::Scales { have: scales.len(), want: n });
    }
    let (least, most, shift) = if declared == DataType::SFixedPoint4 { (-8.0, 7.0, 8) } else { (-128.0, 127.0, 0) };
    let mut codes = Vec::with_capacity(values.len());
    for (row, (values, scale)) in values.chunks(k).zip(scales).enumerate() {
        let zeros = values.iter().all(|v| *v == 0.0);
        if !scale.is_finite() || *scale < 0.0 || (*scale == 0.0 && !zeros) {
            return Err(ValueError::Scale { row, scale: *scale });
        }
        // The clamp keeps every code in i8. A row of zeros stays zeros whatever its scale.
        let code = |v: &f32| if zeros { shift } else { (v / scale).round_ties_even().clamp(least, most) as i8 + shift };
        codes.extend(values.iter().map(code));
    }
    Ok(codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Broken if a value is rounded twice, a given scale is not the one that is stored, or 4-bit codes lose their sign.
    #[test]
    fn values_come_back_within_half_a_step() {
        let values: Vec<f32> = (0..17 * 5).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let given: Vec<f32> = (0..17).map(|row| 0.9 + row as f32 / 50.0).collect();
        for (declared, scales) in [
            (DataType::SFixedPoint8, None),
            (DataType::SFixedPoint4, None),
            (DataType::SFixedPoint8, Some(&given[..])),
            (DataType::SFixedPoint4, Some(&given[..])),
        ] {
            let panels = pack_value(declared, [17, 5], &values, scales).unwrap();
            let own = row_scales(&values, 5, declared);
            let mut row = vec![0.0; 5];
            for (n, want) in values.chunks(5).enumerate() {
                let scale = scales.unwrap_or(&own)[n];
                let least = if declared == DataType::SFixedPoint4 { -8.0 } else { -128.0 } * scale;
                let most = if declared == DataType::SFixedPoint4 { 7.0 } else { 127.0 } * scale;
                panels.view().dequantize_row(n, &mut row);
                for (have, want) in row.iter().zip(want) {
                    let want = want.clamp(least, most);
                    assert!((have - want).abs() <= scale * 0.5001, "{declared} row {n}: {have} for {want}");
                }
            }
        }
        let floats = pack_value(DataType::Float32, [17, 5], &values, None).unwrap();
        let mut row = vec![0.0; 5];
        floats.view().dequantize_row(16, &mut row);
        assert_eq!(row, values[80..]);
    }

    // Broken if values that mean nothing become weights.
    #[test]
    fn what_has_no_meaning_is_refused() {
        let pack = |values: &[f32], scales: Option<&[f32]>| pack_value(DataType::SFixedPoint8, [2, 2], values, scales);
        assert_eq!(pack(&[1.0; 3], None).unwrap_err(), ValueError::Count { have: 3, want: 4, dims: [2, 2] });
        assert_eq!(pack(&[1.0, 1.0, f32::NAN, 1.0], None).unwrap_err(), ValueError::NotFinite { row: 1 });
        assert_eq!(pack(&[1.0; 4], Some(&[1.0])).unwrap_err(), ValueError::Scales { have: 1, want: 2 });
        assert_eq!(pack(&[1.0; 4], Some(&[1.0, 0.0])).unwrap_err(), ValueError::Scale { row: 1, scale: 0.0 });
        pack(&[0.0; 4], None).expect("zeros are a value");
        let wrong = pack_value(DataType::UFixedPoint8, [1, 1], &[0.0], None).unwrap_err();
        assert_eq!(wrong, ValueError::DataType { have: DataType::UFixedPoint8 });
    }
}
