//! The softmax of attention over an int8 cache: scores become codes of 16 bits of the probability times the scale of the value.
//!
//! The scale of a row's codes follows from the largest of these products. `e^score · scale` is largest where `score + ln scale` is, so
//! a bound is known before any power is, and each score is made a code as soon as its power is there. As in
//! [`vector`](super::vector) every tier gives the same bits.

use std::f32::consts::LOG2_E;

use super::vector::{LANES, ROUND, fold};
use crate::kernels::{Peak, WeightsMut};

/// A bound of `log2` of the magnitude of each scale, by at most 0.09 too large; infinity for what is not finite.
#[inline(always)]
pub(crate) fn log_scales(scales: &[[u8; 4]], logs: &mut [f32]) {
    for (log, scale) in logs.iter_mut().zip(scales) {
        let magnitude = i32::from_le_bytes(*scale) & i32::MAX;
        let bound = (magnitude as f32).mul_add(LOG_STEP, LOG_BOUND);
        *log = if magnitude >= INFINITE { f32::INFINITY } else { bound };
    }
}

/// The largest score, and of `log2(e^score · scale)` a bound of the largest. NaN is passed over.
#[inline(always)]
pub(crate) fn peak(scores: &[f32], logs: &[f32]) -> Peak {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let mut tops = maxima;
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut compare = |scores: &[f32], logs: &[f32]| {
        for (((&score, &log), max), top) in scores.iter().zip(logs).zip(&mut maxima).zip(&mut tops) {
            *max = larger(score, *max);
            *top = larger(score.mul_add(LOG2_E, log), *top);
        }
    };
    let ((scores, score_rest), (logs, log_rest)) = (scores.as_chunks::<LANES>(), logs.as_chunks::<LANES>());
    scores.iter().zip(logs).for_each(|(scores, logs)| compare(scores, logs));
    compare(score_rest, log_rest);
    Peak { max: fold(maxima, larger), log_top: fold(tops, larger) }
}

/// The scale of the codes of each row, from what [`peak`] found, and its inverse, or 0 if all codes are to be 0.
#[inline(always)]
pub(crate) fn weight_scales([maxima, log_tops]: [&[f32]; 2], [scales, factors]: [&mut [f32]; 2]) {
    for (((max, log_top), scale), factor) in maxima.iter().zip(log_tops).zip(scales).zip(factors) {
        // More than the roundings of both logarithms, which grow with the scores, can be together.
        let slack = (max.abs() + 256.0) * SLACK;
        let top = exp2(max.mul_add(-LOG2_E, *log_top) + slack);
        // Where nothing is seen both are infinite.
        let top = if *log_top == f32::NEG_INFINITY { 0.0 } else { top };
        let found = top / (127.0 * 256.0);
        // The inverse of less may be infinite; such weights are as good as 0.
        let is_usual = (f32::MIN_POSITIVE..=f32::MAX).contains(&found);
        *factor = if is_usual { 1.0 / found } else { 0.0 };
        *scale = if found < f32::MIN_POSITIVE { 0.0 } else { found };
    }
}

/// Writes the codes of `exp(score - max) · scale · factor`, at most 127 · 256 and a little more; returns the sum of the powers.
///
/// If a score or a scale is not finite, the scale of the codes is NaN and they are 0.
#[inline(always)]
pub(crate) fn weigh(scores: &[f32], scales: &[[u8; 4]], [max, factor]: [f32; 2], mut out: WeightsMut<'_>) -> f32 {
    let mut sums = [0.0; LANES];
    let mut plane_sums = [[0; LANES]; 2];
    let mut weigh = |scores: &[f32], scales: &[[u8; 4]], hi: &mut [i8], lo: &mut [i8]| {
        let mut weights = [0.0; LANES];
        products(scores, scales, max, &mut sums, &mut weights);
        for (i, ((hi, lo), weight)) in hi.iter_mut().zip(lo).zip(weights).enumerate() {
            let code = weight.mul_add(factor, ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
            *lo = code as i8;
            *hi = ((code - i32::from(*lo)) >> 8) as i8;
            plane_sums[0][i] += i32::from(*hi);
            plane_sums[1][i] += i32::from(*lo);
        }
    };
    let ((scores, score_rest), (scales, scale_rest)) = (scores.as_chunks::<LANES>(), scales.as_chunks::<LANES>());
    let ((hi, hi_rest), (lo, lo_rest)) = (out.hi.as_chunks_mut::<LANES>(), out.lo.as_chunks_mut::<LANES>());
    for (((scores, scales), hi), lo) in scores.iter().zip(scales).zip(hi).zip(lo) {
        weigh(scores, scales, hi, lo);
    }
    weigh(score_rest, scale_rest, hi_rest, lo_rest);
    *out.plane_sums = plane_sums.map(|sums| sums.iter().sum());
    let sum = fold(sums, |a, b| a + b);
    erase_unless_finite(sum, &mut out);
    sum
}

/// `exp(score - max) · scale` of up to sixteen scores; adds the powers to `sums`.
#[inline(always)]
pub(crate) fn products(scores: &[f32], scales: &[[u8; 4]], max: f32, sums: &mut [f32; LANES], weights: &mut [f32]) {
    for (((score, scale), sum), weight) in scores.iter().zip(scales).zip(sums).zip(weights) {
        let p = exp_nonpositive(*score - max);
        *sum += p;
        *weight = p * f32::from_le_bytes(*scale);
    }
}

/// Makes all codes 0 if the scale or the sum of the powers says that something was not finite.
#[inline(always)]
pub(crate) fn erase_unless_finite(sum: f32, out: &mut WeightsMut<'_>) {
    if !(sum.is_finite() && out.scale.is_finite()) {
        out.hi.fill(0);
        out.lo.fill(0);
        (*out.scale, *out.plane_sums) = (f32::NAN, [0; 2]);
    }
}

/// `e^x` for `x <= 0` within 5e-6 of it, a third of what rounding to codes of 16 bits adds; what is below -87 counts as -87. NaN
/// gives NaN.
#[inline(always)]
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    // In this order NaN stays.
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    power(x.mul_add(LOG2_E, ROUND - shifted), shifted)
}

/// `2^x`, as exact; 0 below -125, and NaN from 127 on.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    let shifted = x + ROUND;
    let result = power(x - (shifted - ROUND), shifted);
    let result = if x < 127.0 { result } else { f32::NAN };
    if x < -125.0 { 0.0 } else { result }
}

/// `2^(r + n)`, where the low bits of `shifted` hold `n`: the rest falls out at the top.
#[inline(always)]
fn power(r: f32, shifted: f32) -> f32 {
    let p = EXP2[1..].iter().fold(EXP2[0], |p, c| p.mul_add(r, *c));
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// A polynomial for `2^r`, highest power first: minimax of degree 4 for the relative error among those that are 1 at 0, 2.8e-6.
pub(crate) const EXP2: [f32; 5] = [9.582_853e-3, 5.590_642_6e-2, 2.402_409_9e-1, 6.931_242e-1, 1.0];

/// Of a logarithm, two roundings and more.
const SLACK: f32 = 1.0 / (1 << 22) as f32;

/// The bits of a float as an integer, times this: its logarithm plus 127, of which it lacks at most 0.0861.
pub(crate) const LOG_STEP: f32 = 1.0 / (1 << 23) as f32;
pub(crate) const LOG_BOUND: f32 = -127.0 + 0.0862;

/// The bits of infinity.
pub(crate) const INFINITE: i32 = f32::INFINITY.to_bits().cast_signed();
