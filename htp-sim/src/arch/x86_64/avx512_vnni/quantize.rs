//! Quantization of a row, the portable function step for step, with its division by the scale made of products.

use std::arch::x86_64::*;

use super::vector::{bytes, high_plane, planes};
use crate::arch::portable::vector::{self, ROUND};
use crate::arch::x86_64::quantize::{PLANES_SHIFT, usual_steps};
use crate::kernels::{QuantizedRowMut, RowValues};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn quantize(row: RowValues<'_>, out: QuantizedRowMut<'_>) {
    let whole = row.x.len().is_multiple_of(LANES) && out.sum_block.is_multiple_of(LANES);
    let found = if whole { absmax(&row) } else { f32::NAN };
    let Some(steps) = usual_steps(found, &out) else { return vector::quantize(row, out) };
    *out.scale = steps.scale;
    let codes = Codes {
        divisor: Divisor::new(steps.scale),
        low: steps.low as f32,
        high: steps.high as f32,
        center: steps.center,
    };
    match (row.norm, out.lo.is_empty()) {
        (None, true) => codes.write::<false, true>(&row, out),
        (None, false) => codes.write::<false, false>(&row, out),
        (Some(_), true) => codes.write::<true, true>(&row, out),
        (Some(_), false) => codes.write::<true, false>(&row, out),
    }
}

/// The largest magnitude, or infinity, or NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn absmax(row: &RowValues<'_>) -> f32 {
    // Several, so that no comparison waits for the one before.
    let mut tops = [_mm512_setzero_si512(); 4];
    for at in (0..row.x.len()).step_by(LANES) {
        let value = match row.norm {
            None => load(row.x, at),
            Some(_) => normalized(row, at),
        };
        // As integers the magnitudes of floats keep their order, and anything not finite is above all that is.
        let magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fff_ffff));
        tops = [tops[1], tops[2], tops[3], _mm512_max_epu32(tops[0], magnitude)];
    }
    let top = _mm512_max_epu32(_mm512_max_epu32(tops[0], tops[1]), _mm512_max_epu32(tops[2], tops[3]));
    f32::from_bits(_mm512_reduce_max_epu32(top))
}

/// How floats become codes.
struct Codes {
    divisor: Divisor,
    low: f32,
    high: f32,
    center: i32,
}

impl Codes {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn write<const NORM: bool, const EIGHT: bool>(&self, row: &RowValues<'_>, out: QuantizedRowMut<'_>) {
        assert!(out.hi.len() == row.x.len() && (EIGHT || out.lo.len() == row.x.len()));
        let is_wide = out.sum_block.is_multiple_of(WIDE) || out.sum_block == WIDE / 2;
        if row.x.len().is_multiple_of(WIDE) && is_wide {
            self.write_wide::<NORM, EIGHT>(row, out);
        } else {
            self.write_narrow::<NORM, EIGHT>(row, out);
        }
    }

    /// Sixty-four codes at a time.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn write_wide<const NORM: bool, const EIGHT: bool>(&self, row: &RowValues<'_>, out: QuantizedRowMut<'_>) {
        let (zero, ones) = (_mm512_setzero_si512(), _mm512_set1_epi8(1));
        let (mut total, mut block_sums, mut hi_totals) = (0_i32, zero, zero);
        assert_eq!(out.sums.len() * out.sum_block, row.x.len());
        let mut sums = out.sums.iter_mut();
        let mut end_block = |sum: i32| {
            if let Some(to) = sums.next() {
                *to = sum;
            }
            total = total.wrapping_add(sum);
        };
        for at in (0..row.x.len()).step_by(WIDE) {
            let mut codes = [zero; 4];
            for (i, code) in codes.iter_mut().enumerate() {
                *code = self.code::<NORM>(row, at + i * LANES, if EIGHT { 0 } else { PLANES_SHIFT });
            }
            // Each lane has the sum of four codes.
            let four_sums = if EIGHT {
                let codes = bytes(codes);
                store_wide(&mut out.hi[at..], codes);
                _mm512_dpbusd_epi32(zero, ones, codes)
            } else {
                let [hi, lo] = planes(codes);
                store_wide(&mut out.hi[at..], hi);
                store_wide(&mut out.lo[at..], lo);
                let hi_sums = _mm512_dpbusd_epi32(zero, ones, hi);
                hi_totals = _mm512_add_epi32(hi_totals, hi_sums);
                _mm512_dpbusd_epi32(_mm512_slli_epi32::<8>(hi_sums), ones, lo)
            };
            if out.sum_block < WIDE {
                end_block(_mm512_mask_reduce_add_epi32(0x00ff, four_sums));
                end_block(_mm512_mask_reduce_add_epi32(0xff00, four_sums));
                continue;
            }
            block_sums = _mm512_add_epi32(block_sums, four_sums);
            if (at + WIDE).is_multiple_of(out.sum_block) {
                end_block(_mm512_reduce_add_epi32(std::mem::replace(&mut block_sums, zero)));
            }
        }
        *out.plane_sums = plane_sums::<EIGHT>(total, hi_totals);
    }

    /// Sixteen codes at a time.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn write_narrow<const NORM: bool, const EIGHT: bool>(&self, row: &RowValues<'_>, out: QuantizedRowMut<'_>) {
        let (mut total, mut hi_totals) = (0_i32, _mm512_setzero_si512());
        for (block, sum) in out.sums.iter_mut().enumerate() {
            let mut sums = _mm512_setzero_si512();
            for at in (block * out.sum_block..(block + 1) * out.sum_block).step_by(LANES) {
                let code = self.code::<NORM>(row, at, 0);
                sums = _mm512_add_epi32(sums, code);
                if EIGHT {
                    store(&mut out.hi[at..], code);
                    continue;
                }
                let hi = high_plane(code);
                hi_totals = _mm512_add_epi32(hi_totals, hi);
                store(&mut out.hi[at..], hi);
                store(&mut out.lo[at..], code);
            }
            *sum = _mm512_reduce_add_epi32(sums);
            total = total.wrapping_add(*sum);
        }
        *out.plane_sums = plane_sums::<EIGHT>(total, hi_totals);
    }

    /// The codes of sixteen values, plus `shift`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn code<const NORM: bool>(&self, row: &RowValues<'_>, at: usize, shift: i32) -> __m512i {
        let value = if NORM { normalized(row, at) } else { load(row.x, at) };
        let (low, high) = (_mm512_set1_ps(self.low), _mm512_set1_ps(self.high));
        let quotient = _mm512_min_ps(_mm512_max_ps(self.divisor.divide(value), low), high);
        let rounded = _mm512_castps_si512(_mm512_add_ps(quotient, _mm512_set1_ps(ROUND)));
        _mm512_sub_epi32(rounded, _mm512_set1_epi32(ROUND.to_bits().cast_signed() + self.center - shift))
    }
}

/// The sums of both planes, from that of all codes, which may have wrapped: what is made of it here does fit.
#[inline]
#[target_feature(enable = "avx512f")]
fn plane_sums<const EIGHT: bool>(total: i32, hi_totals: __m512i) -> [i32; 2] {
    if EIGHT {
        return [total, 0];
    }
    let hi = _mm512_reduce_add_epi32(hi_totals);
    [hi, total.wrapping_sub(hi.wrapping_mul(256))]
}

/// Divides by one number, correctly rounded.
struct Divisor {
    divisor: __m512,
    inverse: __m512,
}

impl Divisor {
    #[target_feature(enable = "avx512f")]
    fn new(divisor: f32) -> Self {
        Self { divisor: _mm512_set1_ps(divisor), inverse: _mm512_set1_ps(1.0 / divisor) }
    }

    /// The first step gives a quotient with an error below one unit in the last place, whatever the product's is; from such a
    /// one, and a correctly rounded inverse, the second gives the correctly rounded quotient (Markstein 1990). A third of the
    /// time of a division.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn divide(&self, x: __m512) -> __m512 {
        let mut quotient = _mm512_mul_ps(x, self.inverse);
        for _ in 0..2 {
            let rest = _mm512_fnmadd_ps(quotient, self.divisor, x);
            quotient = _mm512_fmadd_ps(rest, self.inverse, quotient);
        }
        quotient
    }
}

/// `x · inv · weight`.
#[inline]
#[target_feature(enable = "avx512f")]
fn normalized(row: &RowValues<'_>, at: usize) -> __m512 {
    let (inv, weight) = row.norm.unwrap_or((1.0, row.x));
    _mm512_mul_ps(_mm512_mul_ps(load(row.x, at), _mm512_set1_ps(inv)), load(weight, at))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32], at: usize) -> __m512 {
    // SAFETY: the slice has sixteen values (checked here), unaligned.
    unsafe { _mm512_loadu_ps(from[at..][..LANES].as_ptr()) }
}

/// The low bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [i8], codes: __m512i) {
    // SAFETY: the slice has sixteen bytes (checked here), unaligned.
    unsafe { _mm_storeu_si128(to[..LANES].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(codes)) }
}

/// Sixty-four bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_wide(to: &mut [i8], codes: __m512i) {
    // SAFETY: the slice has as many bytes (checked here), unaligned.
    unsafe { _mm512_storeu_si512(to[..WIDE].as_mut_ptr().cast(), codes) }
}

const LANES: usize = vector::LANES;

/// Codes that fill a register as bytes.
const WIDE: usize = 4 * LANES;
