//! Root-mean-square normalization.

use crate::Cx;
use crate::error::{Needed, ShapeError, expect_len};
use crate::kernels::RowValues;
use crate::quantize::{QuantizedRows, quantize_each};
use crate::scratch::Disjoint;

/// `out = x / sqrt(mean(x²) + epsilon) · weight`, row by row.
///
/// `weight` is `[k]`; `x` and `out` are `[m, k]`.
///
/// # Errors
/// [`ShapeError`] if `weight` is empty, `x` is not a whole number of rows, or `out` has another length. `out` is then
/// unchanged.
///
/// Source: Zhang and Sennrich 2019, eq. 4.
pub fn rms_norm(cx: &Cx<'_>, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) -> Result<(), ShapeError> {
    let k = weight.len();
    let rows = whole_rows(x, k)?;
    expect_len("length of out", out.len(), x.len())?;
    let out = Disjoint::new(out);
    let normalize_row = |row: usize| {
        let x = &x[row * k..][..k];
        // SAFETY: each row is one item, and its range is its own.
        let out = unsafe { out.range(row * k, k) };
        let inv = inverse_rms(cx, x, epsilon);
        // SAFETY: the table exists only on a CPU that has its instruction set; x, weight and out are `k` long.
        unsafe { (cx.kernels.normalize)(x, inv, weight, out) }
    };
    if x.len() < PARALLEL_VALUES {
        (0..rows).for_each(normalize_row);
    } else {
        cx.workers.for_each(rows, |row, _| normalize_row(row));
    }
    Ok(())
}

/// [`rms_norm`] and [`quantize_rows`](crate::quantize_rows) in one go; the same codes as the two in turn.
///
/// # Errors
/// [`ShapeError`] if `weight` is not as long as a row of `out`, or `x` is not a whole number of rows that fit in `out`.
pub fn rms_norm_quantize(
    cx: &Cx<'_>,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    out: &mut QuantizedRows,
) -> Result<(), ShapeError> {
    let k = weight.len();
    expect_len("length of the norm's weight", k, out.k())?;
    let rows = out.rows_in(x)?;
    quantize_each(cx, rows, out, |row| {
        let x = &x[row * k..][..k];
        RowValues { x, norm: Some((inverse_rms(cx, x, epsilon), weight)) }
    });
    Ok(())
}

fn inverse_rms(cx: &Cx<'_>, x: &[f32], epsilon: f32) -> f32 {
    // SAFETY: the table exists only on a CPU that has its instruction set.
    let squares = unsafe { (cx.kernels.sum_squares)(x) };
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

fn whole_rows(x: &[f32], k: usize) -> Result<usize, ShapeError> {
    if k == 0 {
        return Err(ShapeError::new("length of the norm's weight", k, Needed::AtLeast(1)));
    }
    if !x.len().is_multiple_of(k) {
        return Err(ShapeError::new("length of x", x.len(), Needed::MultipleOf(k)));
    }
    Ok(x.len() / k)
}

/// Below this many values a region costs more than it saves.
const PARALLEL_VALUES: usize = 8192;
