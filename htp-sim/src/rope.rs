//! Rotary position embedding, half-split: the pairs are `(i, i + d/2)` of the first `d` values of a head.

use crate::Cx;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::scratch::Disjoint;

/// Fills `cos` and `sin`, each `[m, d/2]`, for `m` positions: `cos(position · inv_freq) · scale`, likewise `sin`.
///
/// `inv_freq` is `[d/2]`. The angle is a product of f32, as model code computes it. `scale` is 1 except for scaled
/// variants (YaRN's attention factor).
///
/// # Errors
/// [`ShapeError`] if `cos` or `sin` is not `positions.len() · inv_freq.len()` long.
pub fn rotary_table(
    positions: &[i32],
    inv_freq: &[f32],
    scale: f32,
    cos: &mut [f32],
    sin: &mut [f32],
) -> Result<(), ShapeError> {
    let len = size("rotary table", &[positions.len(), inv_freq.len()])?;
    expect_len("length of cos", cos.len(), len)?;
    expect_len("length of sin", sin.len(), len)?;
    for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
        let angle = positions[i / inv_freq.len()] as f32 * inv_freq[i % inv_freq.len()];
        let (s, c) = angle.sin_cos();
        (*cos, *sin) = (c * scale, s * scale);
    }
    Ok(())
}

/// Rotates the heads of `x`, `[m, heads · head_dim]`, in place.
///
/// `cos` and `sin` are `[m, d/2]`, from [`rotary_table`]; `d/2` is their length over `m`. Values of a head from `d` on
/// pass through.
///
/// # Errors
/// [`ShapeError`] if `x` is not a whole number of rows, `cos` and `sin` differ in length or are no multiple of `m`, or
/// `d > head_dim`. `x` is then unchanged.
///
/// Source: Su et al. 2021, eq. 34, in the half-split arrangement.
pub fn rotate(
    cx: &Cx<'_>,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
) -> Result<(), ShapeError> {
    let width = size("width of x", &[heads, head_dim])?;
    if width == 0 {
        return Err(ShapeError::new("width of x", 0, Needed::AtLeast(1)));
    }
    if !x.len().is_multiple_of(width) {
        return Err(ShapeError::new("length of x", x.len(), Needed::MultipleOf(width)));
    }
    let rows = x.len() / width;
    expect_len("length of sin", sin.len(), cos.len())?;
    if rows == 0 {
        return Ok(());
    }
    if !cos.len().is_multiple_of(rows) {
        return Err(ShapeError::new("length of cos", cos.len(), Needed::MultipleOf(rows)));
    }
    let half = cos.len() / rows;
    expect_at_most("rotated values of a head", 2 * half, head_dim)?;
    let parallel = x.len() >= PARALLEL_VALUES;
    let x = Disjoint::new(x);
    let rotate_row = |row: usize| {
        // SAFETY: each row is one item, and its range is its own.
        let x = unsafe { x.range(row * width, width) };
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        for head in x.chunks_exact_mut(head_dim) {
            let (first, rest) = head.split_at_mut(half);
            // SAFETY: the table exists only on a CPU that has its instruction set; all four slices are `half` long.
            unsafe { (cx.kernels.rotate)(first, &mut rest[..half], cos, sin) }
        }
    };
    if parallel {
        cx.workers.for_each(rows, |row, _| rotate_row(row))
    } else {
        (0..rows).for_each(rotate_row)
    }
    Ok(())
}

/// Below this many values a region costs more than it saves.
const PARALLEL_VALUES: usize = 8192;
