//! What quantization is like on both AVX2 and AVX-512.

use crate::kernels::{QuantizedRowMut, Steps};

/// The steps of a row whose largest magnitude is `found`, or nothing if quotients by products may not be exact: NaN, zeros, and
/// numbers far from any activation.
pub(super) fn usual_steps(found: f32, out: &QuantizedRowMut<'_>) -> Option<Steps> {
    let limit = if out.lo.is_empty() { 127 } else { 127 * 256 };
    let own = Steps { scale: found / limit as f32, low: -limit, high: limit, center: 0 };
    let steps = out.steps.unwrap_or(own);
    let usual = SMALLEST..LARGEST;
    (usual.contains(&steps.scale) && usual.contains(&(found / steps.scale))).then_some(steps)
}

/// Codes of two planes reach from -32896 to 32639: with this added they fit 16 bits, the high byte of which is `hi`.
pub(super) const PLANES_SHIFT: i32 = 128;

/// 2^-100 and 2^100: with a scale and a largest quotient between them nothing overflows, and what underflows is far below half a
/// code.
const SMALLEST: f32 = 7.888_609e-31;
const LARGEST: f32 = 1.267_650_6e30;
