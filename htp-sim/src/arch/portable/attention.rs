//! Probabilities by float value rows, in plain Rust.

use half::f16;

use crate::kernels::ValuesTile;

/// f32 values.
pub(crate) fn values_f32(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<4>(tile, out, f32::from_le_bytes);
}

/// f16 values.
pub(crate) fn values_f16(tile: &ValuesTile<'_>, out: &mut [f32]) {
    values::<2>(tile, out, |bytes| f16::from_le_bytes(bytes).to_f32());
}

#[inline(always)]
fn values<const BYTES: usize>(tile: &ValuesTile<'_>, out: &mut [f32], value: impl Fn([u8; BYTES]) -> f32) {
    for position in 0..tile.positions {
        let v = &tile.values[position * tile.head_dim * BYTES..][..tile.head_dim * BYTES];
        for row in 0..tile.rows {
            let p = tile.p[row * tile.p_stride + position];
            for (out, v) in out[row * tile.head_dim..][..tile.head_dim].iter_mut().zip(v.as_chunks().0) {
                *out += p * value(*v);
            }
        }
    }
}
