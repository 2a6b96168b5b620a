//! Element by element: sums, products, activation functions, softmax of rows.

use std::ops::Range;

use crate::Cx;
use crate::error::{Needed, ShapeError, expect_len};
use crate::scratch::Disjoint;

/// The activation of a gated layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    Gelu,
}

/// A function of one number, as the kernel table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unary {
    Sigmoid,
    Silu,
    GeluTanh,
    GeluErf,
}

/// `out = a + b`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn add(cx: &Cx<'_>, a: &[f32], b: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    binary(cx, a, b, out, |a, b| a + b)
}

/// `out = a · b`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn mul(cx: &Cx<'_>, a: &[f32], b: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    binary(cx, a, b, out, |a, b| a * b)
}

/// `out += b`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn add_assign(cx: &Cx<'_>, out: &mut [f32], b: &[f32]) -> Result<(), ShapeError> {
    expect_len("length of b", b.len(), out.len())?;
    in_parts(cx, out, |part, out| out.iter_mut().zip(&b[part]).for_each(|(out, b)| *out += b));
    Ok(())
}

/// `out *= b`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn mul_assign(cx: &Cx<'_>, out: &mut [f32], b: &[f32]) -> Result<(), ShapeError> {
    expect_len("length of b", b.len(), out.len())?;
    in_parts(cx, out, |part, out| out.iter_mut().zip(&b[part]).for_each(|(out, b)| *out *= b));
    Ok(())
}

/// `out = x · factor`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn scale(cx: &Cx<'_>, x: &[f32], factor: f32, out: &mut [f32]) -> Result<(), ShapeError> {
    expect_len("length of out", out.len(), x.len())?;
    in_parts(cx, out, |part, out| out.iter_mut().zip(&x[part]).for_each(|(out, x)| *out = x * factor));
    Ok(())
}

/// `out = 1 / (1 + exp(-x))`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn sigmoid(cx: &Cx<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    unary(cx, Unary::Sigmoid, x, out)
}

/// `out = x · sigmoid(x)`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn silu(cx: &Cx<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    unary(cx, Unary::Silu, x, out)
}

/// `out = gelu(x)` in the tanh form, as [`Activation::Gelu`].
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn gelu_tanh(cx: &Cx<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    unary(cx, Unary::GeluTanh, x, out)
}

/// `out = x / 2 · (1 + erf(x / √2))`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ.
pub fn gelu_erf(cx: &Cx<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    unary(cx, Unary::GeluErf, x, out)
}

/// `out = cap · tanh(x / cap)`.
///
/// # Errors
/// [`ShapeError`] if the lengths differ, or `cap` is not a finite number above 0.
pub fn soft_cap(cx: &Cx<'_>, x: &[f32], cap: f32, out: &mut [f32]) -> Result<(), ShapeError> {
    expect_len("length of out", out.len(), x.len())?;
    expect_cap(cap)?;
    in_parts(cx, out, |part, out| {
        out.copy_from_slice(&x[part]);
        // SAFETY: the table exists only on a CPU that has its instruction set.
        unsafe { (cx.kernels.soft_cap)(out, cap) }
    });
    Ok(())
}

/// Softmax of each row of `x`, `[m, k]`, in place.
///
/// # Errors
/// [`ShapeError`] if `k` is 0 or `x` is not a whole number of rows.
pub fn softmax_rows(cx: &Cx<'_>, x: &mut [f32], k: usize) -> Result<(), ShapeError> {
    if k == 0 || !x.len().is_multiple_of(k) {
        return Err(ShapeError::new("length of x", x.len(), Needed::MultipleOf(k)));
    }
    let rows = x.len() / k;
    let x = Disjoint::new(x);
    cx.workers.for_each(rows, |row, _| {
        // SAFETY: each row is one item, and its range is its own.
        let row = unsafe { x.range(row * k, k) };
        // SAFETY: the table exists only on a CPU that has its instruction set.
        let sum = unsafe { (cx.kernels.softmax)(row) }.sum;
        row.iter_mut().for_each(|value| *value /= sum);
    });
    Ok(())
}

/// `Ok` if `cap` is a finite number above 0. Others bound nothing: what is capped by 0 or infinity may be NaN.
pub(crate) fn expect_cap(cap: f32) -> Result<(), ShapeError> {
    if cap.is_finite() && cap > 0.0 {
        return Ok(());
    }
    Err(ShapeError::new("soft caps that are not finite and above 0", 1, Needed::Exactly(0)))
}

fn binary(
    cx: &Cx<'_>,
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32 + Sync,
) -> Result<(), ShapeError> {
    expect_len("length of a", a.len(), out.len())?;
    expect_len("length of b", b.len(), out.len())?;
    in_parts(cx, out, |part, out| {
        for ((out, &a), &b) in out.iter_mut().zip(&a[part.clone()]).zip(&b[part]) {
            *out = f(a, b);
        }
    });
    Ok(())
}

fn unary(cx: &Cx<'_>, function: Unary, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    expect_len("length of out", out.len(), x.len())?;
    in_parts(cx, out, |part, out| {
        out.copy_from_slice(&x[part]);
        // SAFETY: the table exists only on a CPU that has its instruction set.
        unsafe { (cx.kernels.unary)(function, out) }
    });
    Ok(())
}

/// Calls `f` with parts of `out` and where they lie in it.
pub(crate) fn in_parts(cx: &Cx<'_>, out: &mut [f32], f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let len = out.len();
    if len <= PART_VALUES {
        f(0..len, out);
        return;
    }
    let out = Disjoint::new(out);
    cx.workers.for_each(len.div_ceil(PART_VALUES), |item, _| {
        let part = item * PART_VALUES..len.min((item + 1) * PART_VALUES);
        // SAFETY: the parts of different items do not overlap.
        f(part.clone(), unsafe { out.range(part.start, part.len()) });
    });
}

/// Values in one worker's item: 16 KiB, well above the cost of a region.
const PART_VALUES: usize = 4096;

#[cfg(test)]
mod tests;
