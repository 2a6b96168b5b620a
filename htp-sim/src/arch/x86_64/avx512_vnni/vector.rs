//! The portable vector functions, compiled for this tier's registers; the one that attention is made of by hand.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use crate::arch::portable::vector::{self, EXP, EXP_REST, LANES, LN2_HIGH, LN2_LOW, ROUND, fold};
use crate::elementwise::{Activation, Unary};
use crate::kernels::{RowsMut, SoftmaxTotals, WeightsMut};
use crate::matmul::Write;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn softmax(scores: &mut [f32]) -> SoftmaxTotals {
    vector::softmax(scores)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    vector::soft_cap(x, cap);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    vector::sum_squares(x)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn normalize(x: &[f32], inv: f32, weight: &[f32], out: &mut [f32]) {
    vector::normalize(x, inv, weight, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn unary(function: Unary, x: &mut [f32]) {
    vector::unary(function, x);
}

/// The portable function, step for step, with the power of two in one instruction. It takes a quarter of a gated layer's time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    if activation != Activation::Silu {
        return vector::gate(activation, gate, up);
    }
    let len = gate.len().min(up.len());
    let (gate, up) = (gate.as_mut_ptr(), up.as_ptr());
    for at in (0..len).step_by(LANES) {
        let mask = mask(len - at);
        // SAFETY: `mask` names the values from `at` on that exist.
        let (x, up) = unsafe { (_mm512_maskz_loadu_ps(mask, gate.add(at)), _mm512_maskz_loadu_ps(mask, up.add(at))) };
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_ps(gate.add(at), mask, _mm512_mul_ps(silu(x), up)) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::rotate(first, second, cos, sin);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn add_row(values: &mut [f32], width: usize, row: &[f32], factor: f32) {
    vector::add_row(values, width, row, factor);
}

/// The portable function, by hand: compiled from there, each row became a call of `memcpy`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn store_rows(values: &[f32], width: usize, to: RowsMut<'_>) {
    assert!(to.columns <= width);
    for (i, values) in values.chunks_exact(width).enumerate() {
        // SAFETY: the ranges of a tile are its own.
        let out = unsafe { to.out.range(to.first + i * to.stride, to.columns) }.as_mut_ptr();
        let values = values.as_ptr();
        for at in (0..to.columns).step_by(LANES) {
            let mask = mask(to.columns - at);
            // SAFETY: `mask` names the columns from `at` on that exist, in both rows (asserted).
            unsafe {
                let mut value = _mm512_maskz_loadu_ps(mask, values.add(at));
                if to.write == Write::Add {
                    value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out.add(at)), value);
                }
                _mm512_mask_storeu_ps(out.add(at), mask, value);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn merge(acc: &mut [f32], part: &[f32], factors: [f32; 2]) {
    vector::merge(acc, part, factors);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn divide(x: &[f32], divisor: f32, out: &mut [f32]) {
    vector::divide(x, divisor, out);
}

/// The portable function, step for step: compiled from there, half of it came out in smaller registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn softmax_quantize(scores: &mut [f32], scales: &[[u8; 4]], out: WeightsMut<'_>) -> SoftmaxTotals {
    let len = scores.len();
    assert!(scales.len() >= len && out.hi.len() == len && out.lo.len() == len);
    let (scores, scales) = (scores.as_mut_ptr(), scales.as_ptr().cast::<f32>());
    // Whole registers first: with a mask that is known to be full, the compiler leaves it out.
    let (whole, rest) = (len / LANES * LANES, len % LANES);
    let mut tops = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut top = |at: usize, mask: u16| {
        // SAFETY: `mask` names the scores from `at` on that exist.
        tops = _mm512_max_ps(unsafe { _mm512_mask_loadu_ps(tops, mask, scores.add(at)) }, tops);
    };
    (0..whole).step_by(LANES).for_each(|at| top(at, u16::MAX));
    if rest > 0 {
        top(whole, mask(rest));
    }
    let max = fold(floats(tops), |a, b| if a > b { a } else { b });

    let (mut sums, mut tops) = (_mm512_setzero_ps(), _mm512_setzero_si512());
    let mut weigh = |at: usize, mask: u16| {
        // SAFETY: as above; there are as many scales, and they need no alignment.
        let (score, scale) =
            unsafe { (_mm512_maskz_loadu_ps(mask, scores.add(at)), _mm512_maskz_loadu_ps(mask, scales.add(at))) };
        let p = exp_nonpositive(_mm512_sub_ps(score, _mm512_set1_ps(max)));
        sums = _mm512_mask_add_ps(sums, mask, sums, p);
        let weight = _mm512_mul_ps(p, scale);
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_ps(scores.add(at), mask, weight) };
        let magnitude = _mm512_maskz_and_epi32(mask, _mm512_castps_si512(weight), _mm512_set1_epi32(0x7fff_ffff));
        tops = _mm512_max_epu32(tops, magnitude);
    };
    (0..whole).step_by(LANES).for_each(|at| weigh(at, u16::MAX));
    if rest > 0 {
        weigh(whole, mask(rest));
    }
    let totals = SoftmaxTotals { max, sum: fold(floats(sums), |a, b| a + b) };

    let top = f32::from_bits(_mm512_reduce_max_epu32(tops));
    *out.plane_sums = [0; 2];
    let Some(factor) = vector::weight_factor(top, out.scale) else {
        out.hi.fill(0);
        out.lo.fill(0);
        return totals;
    };
    let round = _mm512_set1_ps(ROUND);
    let (mut sums, mut hi_sums) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let mut quantize = |at: usize, mask: u16| {
        // SAFETY: as above; what is masked out reads as 0 and gets the code 0.
        let weight = unsafe { _mm512_maskz_loadu_ps(mask, scores.add(at)) };
        let rounded = _mm512_add_ps(_mm512_mul_ps(weight, _mm512_set1_ps(factor)), round);
        let code = _mm512_sub_epi32(_mm512_castps_si512(rounded), _mm512_castps_si512(round));
        let hi = high_plane(code);
        (sums, hi_sums) = (_mm512_add_epi32(sums, code), _mm512_add_epi32(hi_sums, hi));
        // SAFETY: both planes are as long as the scores (checked above).
        unsafe {
            _mm512_mask_cvtepi32_storeu_epi8(out.hi.as_mut_ptr().add(at), mask, hi);
            _mm512_mask_cvtepi32_storeu_epi8(out.lo.as_mut_ptr().add(at), mask, code);
        }
    };
    (0..whole).step_by(LANES).for_each(|at| quantize(at, u16::MAX));
    if rest > 0 {
        quantize(whole, mask(rest));
    }
    let hi = _mm512_reduce_add_epi32(hi_sums);
    *out.plane_sums = [hi, _mm512_reduce_add_epi32(sums) - 256 * hi];
    totals
}

/// `hi` of `code = 256 · hi + lo`, where `lo` is the code's lowest byte with its sign: what a store of bytes keeps of it.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn high_plane(code: __m512i) -> __m512i {
    _mm512_srai_epi32::<8>(_mm512_add_epi32(code, _mm512_set1_epi32(128)))
}

/// As in `portable`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn silu(x: __m512) -> __m512 {
    let minus_x = _mm512_xor_ps(x, _mm512_set1_ps(-0.0));
    _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0), exp(minus_x)))
}

/// As in `portable`.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    // In this order NaN stays.
    let clamped = _mm512_min_ps(_mm512_set1_ps(88.8), _mm512_max_ps(_mm512_set1_ps(-87.5), x));
    let round = _mm512_set1_ps(ROUND);
    let n = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(LOG2_E)), round), round);
    // The product is exact, so that one rounding makes no difference.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), clamped);
    let r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(LN2_LOW)));
    let mut p = _mm512_set1_ps(EXP_REST[0]);
    for c in &EXP_REST[1..] {
        p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(*c));
    }
    let e_r = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r), _mm512_set1_ps(1.0));
    let is_small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(-87.33));
    let is_large = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(88.722_84));
    let result = _mm512_mask_mov_ps(_mm512_scalef_ps(e_r, n), is_small, _mm512_setzero_ps());
    _mm512_mask_mov_ps(result, is_large, _mm512_set1_ps(f32::INFINITY))
}

/// As in `portable`.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp_nonpositive(x: __m512) -> __m512 {
    // In this order NaN stays.
    let x = _mm512_max_ps(_mm512_set1_ps(-87.0), x);
    let shifted = _mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)), _mm512_set1_ps(ROUND));
    let n = _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND));
    // As in `exp`.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
    let r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(LN2_LOW)));
    let mut p = _mm512_set1_ps(EXP[0]);
    for c in &EXP[1..] {
        p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(*c));
    }
    let exponent = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
    _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
}

/// The first `n` lanes.
fn mask(n: usize) -> u16 {
    u16::MAX >> (LANES - n.min(LANES))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn floats(register: __m512) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: sixteen values, unaligned.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), register) };
    lanes
}
