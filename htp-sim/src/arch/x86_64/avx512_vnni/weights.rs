//! As [`portable::weights`](crate::arch::portable::weights), step for step.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use super::vector::{fold, mask, planes};
use crate::arch::portable::vector::{LANES, ROUND};
use crate::arch::portable::weights::{self, EXP2, INFINITE, LOG_BOUND, LOG_STEP, erase_unless_finite};
use crate::arch::x86_64::quantize::PLANES_SHIFT;
use crate::kernels::{Peak, WeightsMut};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn log_scales(scales: &[[u8; 4]], logs: &mut [f32]) {
    let len = logs.len().min(scales.len());
    let (scales, logs) = (scales.as_ptr().cast::<i32>(), logs.as_mut_ptr());
    for at in (0..len).step_by(LANES) {
        let mask = mask(len - at);
        // SAFETY: `mask` names the scales from `at` on that exist; unaligned.
        let scale = unsafe { _mm512_maskz_loadu_epi32(mask, scales.add(at)) };
        let magnitude = _mm512_and_si512(scale, _mm512_set1_epi32(i32::MAX));
        let (step, bound) = (_mm512_set1_ps(LOG_STEP), _mm512_set1_ps(LOG_BOUND));
        let log = _mm512_fmadd_ps(_mm512_cvtepi32_ps(magnitude), step, bound);
        let is_infinite = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(INFINITE));
        let log = _mm512_mask_mov_ps(log, is_infinite, _mm512_set1_ps(f32::INFINITY));
        // SAFETY: as above; there are as many logarithms.
        unsafe { _mm512_mask_storeu_ps(logs.add(at), mask, log) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn peak(scores: &[f32], logs: &[f32]) -> Peak {
    let len = scores.len();
    assert!(logs.len() >= len);
    let (scores, logs) = (scores.as_ptr(), logs.as_ptr());
    let mut maxima = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut tops = maxima;
    let mut compare = |at: usize, mask: u16| {
        // SAFETY: `mask` names the scores from `at` on that exist; there are as many logarithms. Unaligned.
        let (score, log) =
            unsafe { (_mm512_maskz_loadu_ps(mask, scores.add(at)), _mm512_maskz_loadu_ps(mask, logs.add(at))) };
        // In this order NaN is passed over.
        maxima = _mm512_mask_max_ps(maxima, mask, score, maxima);
        tops = _mm512_mask_max_ps(tops, mask, _mm512_fmadd_ps(score, _mm512_set1_ps(LOG2_E), log), tops);
    };
    // Whole registers first: with a mask that is known to be full, the compiler leaves it out.
    let whole = len / LANES * LANES;
    (0..whole).step_by(LANES).for_each(|at| compare(at, u16::MAX));
    if whole < len {
        compare(whole, mask(len - whole));
    }
    let larger = |a, b| _mm256_max_ps(a, b);
    Peak { max: fold(maxima, larger), log_top: fold(tops, larger) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn weight_scales(peaks: [&[f32]; 2], to: [&mut [f32]; 2]) {
    weights::weight_scales(peaks, to);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn weigh(scores: &[f32], scales: &[[u8; 4]], [max, factor]: [f32; 2], mut out: WeightsMut<'_>) -> f32 {
    let len = scores.len();
    assert!(scales.len() >= len && out.hi.len() == len && out.lo.len() == len);
    let (max, factor, round) = (_mm512_set1_ps(max), _mm512_set1_ps(factor), _mm512_set1_ps(ROUND));
    let mut sums = _mm512_setzero_ps();
    let mut plane_sums = [_mm512_setzero_si512(); 2];
    let (from, scales) = (scores.as_ptr(), scales.as_ptr().cast::<f32>());
    let (hi, lo) = (out.hi.as_mut_ptr(), out.lo.as_mut_ptr());
    let mut weigh = |at: usize, left: usize| {
        let mut p = [_mm512_setzero_ps(); 4];
        for (i, p) in p.iter_mut().enumerate() {
            let (at, mask) = (at + i * LANES, mask(left.saturating_sub(i * LANES)));
            // SAFETY: `mask` names the scores from `at` on that exist; unaligned.
            *p = _mm512_sub_ps(unsafe { _mm512_maskz_loadu_ps(mask, from.wrapping_add(at)) }, max);
        }
        exp_nonpositive(&mut p);
        let mut codes = [_mm512_set1_epi32(PLANES_SHIFT); 4];
        for (i, (codes, p)) in codes.iter_mut().zip(p).enumerate() {
            let (at, mask) = (at + i * LANES, mask(left.saturating_sub(i * LANES)));
            // SAFETY: as above; there are as many scales.
            let scale = unsafe { _mm512_maskz_loadu_ps(mask, scales.wrapping_add(at)) };
            sums = _mm512_mask_add_ps(sums, mask, sums, p);
            // Where there is no score the scale is 0, and the code too.
            let rounded = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_mul_ps(p, scale), factor, round));
            *codes = _mm512_sub_epi32(rounded, _mm512_set1_epi32(ROUND.to_bits().cast_signed() - PLANES_SHIFT));
        }
        let mask = u64::MAX >> (64 - left);
        let [high, low] = planes(codes);
        plane_sums[0] = _mm512_dpbusd_epi32(plane_sums[0], _mm512_set1_epi8(1), high);
        plane_sums[1] = _mm512_dpbusd_epi32(plane_sums[1], _mm512_set1_epi8(1), low);
        // SAFETY: both planes are as long as the scores (asserted), and `mask` names those from `at` on.
        unsafe {
            _mm512_mask_storeu_epi8(hi.add(at), mask, high);
            _mm512_mask_storeu_epi8(lo.add(at), mask, low);
        }
    };
    // Whole ones first, as in `peak`.
    let whole = len / (4 * LANES) * (4 * LANES);
    (0..whole).step_by(4 * LANES).for_each(|at| weigh(at, 4 * LANES));
    if whole < len {
        weigh(whole, len - whole);
    }
    *out.plane_sums = plane_sums.map(|sums| _mm512_reduce_add_epi32(sums));
    let sum = fold(sums, |a, b| _mm256_add_ps(a, b));
    erase_unless_finite(sum, &mut out);
    sum
}

/// As in `portable`, side by side: what is multiplied by a power of two there is scaled here, and no result is so small that it makes
/// a difference.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp_nonpositive<const N: usize>(x: &mut [__m512; N]) {
    let (log2_e, round) = (_mm512_set1_ps(LOG2_E), _mm512_set1_ps(ROUND));
    let (mut n, mut p) = (*x, [_mm512_set1_ps(EXP2[0]); N]);
    for (x, n) in x.iter_mut().zip(&mut n) {
        // In this order NaN stays.
        *x = _mm512_max_ps(_mm512_set1_ps(-87.0), *x);
        *n = _mm512_sub_ps(_mm512_fmadd_ps(*x, log2_e, round), round);
        *x = _mm512_fmsub_ps(*x, log2_e, *n);
    }
    for c in &EXP2[1..] {
        for (p, r) in p.iter_mut().zip(*x) {
            *p = _mm512_fmadd_ps(*p, r, _mm512_set1_ps(*c));
        }
    }
    for ((x, p), n) in x.iter_mut().zip(p).zip(n) {
        *x = _mm512_scalef_ps(p, n);
    }
}
