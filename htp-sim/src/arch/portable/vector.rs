//! Functions of one vector. Other tiers compile these same bodies for their registers: sums run in sixteen lanes, and products
//! and sums have one rounding where `mul_add` says so and nowhere else, so every tier gives the same bits. (Where a CPU has no such
//! instruction, or the tier does not ask for it, each is a call: this tier is to be right, not fast.)

use crate::elementwise::{Activation, Unary};
use crate::kernels::{QuantizedRowMut, RowValues, RowsMut, SoftmaxTotals};
use crate::matmul::Write;

/// Replaces scores by `exp(score - max)`; returns the maximum and the sum of the results.
///
/// Scores of `-inf` become 0. If all are `-inf` (or there are none) the sum is 0. A NaN stays, and makes the sum NaN.
#[inline(always)]
pub(crate) fn softmax(scores: &mut [f32]) -> SoftmaxTotals {
    let max = max(scores);
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = exp(*score - shift);
            *sum += *score;
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp(*score - shift);
        *sum += *score;
    }
    SoftmaxTotals { max, sum: fold(sums, |a, b| a + b) }
}

/// `cap · tanh(x / cap)` of each.
#[inline(always)]
pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

/// `Σ x²`.
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (x, sum) in chunk.iter().zip(&mut sums) {
            *sum += x * x;
        }
    }
    for (x, sum) in rest.iter().zip(&mut sums) {
        *sum += x * x;
    }
    fold(sums, |a, b| a + b)
}

/// `out = x · inv · weight`.
#[inline(always)]
pub(crate) fn normalize(x: &[f32], inv: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inv * weight;
    }
}

/// Quantizes one row; see [`crate::QuantizedRows`].
#[inline(always)]
pub(crate) fn quantize(row: RowValues<'_>, out: QuantizedRowMut<'_>) {
    match row.norm {
        None => quantize_values(row.x, row.x, |x, _| x, out),
        Some((inv, weight)) => quantize_values(row.x, weight, |x, weight| x * inv * weight, out),
    }
}

/// Applies `function` to each value.
#[inline(always)]
pub(crate) fn unary(function: Unary, x: &mut [f32]) {
    match function {
        Unary::Sigmoid => x.iter_mut().for_each(|x| *x = logistic(*x)),
        Unary::Silu => x.iter_mut().for_each(|x| *x = silu(*x)),
        Unary::GeluTanh => x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
        Unary::GeluErf => x.iter_mut().for_each(|x| *x = gelu_erf(*x)),
    }
}

/// `gate = activation(gate) · up`.
#[inline(always)]
pub(crate) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = silu(*gate) * up),
        Activation::Gelu => gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = gelu_tanh(*gate) * up),
    }
}

/// Rotates the pairs `(first[i], second[i])`.
#[inline(always)]
pub(crate) fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// `values += factor · row` for each row.
#[inline(always)]
pub(crate) fn add_row(values: &mut [f32], width: usize, row: &[f32], factor: f32) {
    for values in values.chunks_exact_mut(width) {
        in_lanes(values, row, |value, x| *value += factor * x);
    }
}

/// Writes or adds rows of a tile to their places.
#[inline(always)]
pub(crate) fn store_rows(values: &[f32], width: usize, to: RowsMut<'_>) {
    for (i, values) in values.chunks_exact(width).enumerate() {
        // SAFETY: the ranges of a tile are its own.
        let out = unsafe { to.out.range(to.first + i * to.stride, to.columns) };
        match to.write {
            Write::Store => in_lanes(out, values, |out, value| *out = value),
            Write::Add => in_lanes(out, values, |out, value| *out += value),
        }
    }
}

/// Adds to the maximum and the sum of each row those of a part; writes the factors that bring what was made with each to the larger
/// maximum.
#[inline(always)]
pub(crate) fn merge_totals(
    [maxima, sums]: [&mut [f32]; 2],
    new: [&[f32]; 2],
    [old_factors, new_factors]: [&mut [f32]; 2],
) {
    let rows = maxima.iter_mut().zip(sums).zip(new[0].iter().zip(new[1]));
    for (((max, sum), (new_max, new_sum)), (old_factor, new_factor)) in
        rows.zip(old_factors.iter_mut().zip(new_factors))
    {
        // Of two powers one is that of 0. Which one is as good as random, so there is no branch for the CPU to guess.
        let is_old = *max >= *new_max;
        let power = exp(-(*max - *new_max).abs());
        (*old_factor, *new_factor) = if is_old { (1.0, power) } else { (power, 1.0) };
        *max = if is_old { *max } else { *new_max };
        let merged = *sum * *old_factor + new_sum * *new_factor;
        // Of two parts without anything the factors are no numbers.
        *sum = if *new_sum == 0.0 { *sum } else { merged };
    }
}

/// Adds a part to what is there, each times its factor.
#[inline(always)]
pub(crate) fn merge(acc: &mut [f32], part: &[f32], [old, new]: [f32; 2]) {
    in_lanes(acc, part, |acc, part| *acc = *acc * old + part * new);
}

/// `out = x · factor`.
#[inline(always)]
pub(crate) fn scale(x: &[f32], factor: f32, out: &mut [f32]) {
    in_lanes(out, x, |out, x| *out = x * factor);
}

/// Calls `f` for each pair, sixteen at a time: rows of a tile are too short for loops that the compiler cuts itself.
#[inline(always)]
fn in_lanes(to: &mut [f32], from: &[f32], f: impl Fn(&mut f32, f32)) {
    let len = to.len().min(from.len());
    let (to, rest) = to[..len].as_chunks_mut::<LANES>();
    let (from, from_rest) = from[..len].as_chunks::<LANES>();
    for (to, from) in to.iter_mut().zip(from) {
        to.iter_mut().zip(from).for_each(|(to, from)| f(to, *from));
    }
    rest.iter_mut().zip(from_rest).for_each(|(to, from)| f(to, *from));
}

/// Quantizes `f(x, w)` of each pair.
#[inline(always)]
fn quantize_values(x: &[f32], w: &[f32], f: impl Fn(f32, f32) -> f32, out: QuantizedRowMut<'_>) {
    // As integers the magnitudes of floats keep their order, and anything not finite is above all that is.
    let magnitudes = x.iter().zip(w).map(|(&x, &w)| f(x, w).to_bits() & 0x7fff_ffff);
    let absmax = magnitudes.fold(0, u32::max);
    let (scale, [low, high], center) = match out.steps {
        Some(steps) if absmax <= f32::INFINITY.to_bits() => {
            (steps.scale, [steps.low as f32, steps.high as f32], steps.center)
        }
        None if absmax < f32::INFINITY.to_bits() => {
            let limit = if out.lo.is_empty() { 127.0 } else { 127.0 * 256.0 };
            (f32::from_bits(absmax) / limit, [-limit, limit], 0)
        }
        _ => (f32::NAN, [0.0; 2], 0),
    };
    *out.scale = scale;
    if scale == 0.0 || scale.is_nan() {
        out.hi.fill(0);
        out.lo.fill(0);
        out.sums.fill(0);
        *out.plane_sums = [0; 2];
        return;
    }
    // With a subnormal scale the quotient can pass the limit, so it is clamped.
    let code = |x: f32, w: f32| round_to_i32((f(x, w) / scale).clamp(low, high)) - center;
    if out.lo.is_empty() {
        for ((hi, &x), &w) in out.hi.iter_mut().zip(x).zip(w) {
            *hi = code(x, w) as i8;
        }
    } else {
        for (((hi, lo), &x), &w) in out.hi.iter_mut().zip(&mut *out.lo).zip(x).zip(w) {
            let code = code(x, w);
            *lo = code as i8;
            *hi = ((code - i32::from(*lo)) >> 8) as i8;
        }
    }
    let mut totals = [0; 2];
    for (i, sum) in out.sums.iter_mut().enumerate() {
        let block = i * out.sum_block..(i + 1) * out.sum_block;
        let hi: i32 = out.hi[block.clone()].iter().map(|&code| i32::from(code)).sum();
        let lo: i32 = if out.lo.is_empty() { 0 } else { out.lo[block].iter().map(|&code| i32::from(code)).sum() };
        // Sums over blocks of weights fit. That of the longest rows may not, and is read by nobody: weights without blocks need
        // those of the planes.
        *sum = if out.lo.is_empty() { hi } else { hi.wrapping_mul(256).wrapping_add(lo) };
        totals = [totals[0] + hi, totals[1] + lo];
    }
    *out.plane_sums = totals;
}

/// `e^x` within 2 ulp; 0 where the result would be subnormal, infinity above 88.72.
///
/// `e^x = 2^n · e^r` with `n = round(x / ln 2)`, `|r| <= ln 2 / 2`, and a polynomial for `e^r`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.5, 88.8);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = remainder(clamped, shifted - ROUND);
    let p = EXP_REST[1..].iter().fold(EXP_REST[0], |p, c| p.mul_add(r, *c));
    let e_r = p.mul_add(r * r, r) + 1.0;
    // Two factors, since 2^128 alone is not a float. `n` is in -126..=128, so both exponents are in range.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23).cast_unsigned());
    let result = e_r * power(half) * power(n - half);
    let result = if x < -87.33 { 0.0 } else { result };
    let result = if x > 88.722_84 { f32::INFINITY } else { result };
    // NaN passed through the clamp and the polynomial, but its exponent bits are meaningless.
    if x.is_nan() { x } else { result }
}

/// `e^x` within 3 ulp for `x` from -87 to 87, or NaN.
///
/// As [`exp`], with what the logistic function needs and no more: half the work.
#[inline(always)]
fn exp_within(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = remainder(x, shifted - ROUND);
    let p = EXP[1..].iter().fold(EXP[0], |p, c| p.mul_add(r, *c));
    // The low bits of `shifted` hold n, and the rest falls out at the top.
    p * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23)
}

/// `x - n · ln 2`.
#[inline(always)]
fn remainder(x: f32, n: f32) -> f32 {
    (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x))
}

/// `1 / (1 + e^-x)` within 4 ulp, 0 below -87.
#[inline(always)]
pub(crate) fn logistic(x: f32) -> f32 {
    // Written so that NaN stays.
    let at_most = if x > 87.0 { 87.0 } else { x };
    let within = if at_most < -87.0 { -87.0 } else { at_most };
    let result = inverse(1.0 + exp_within(-within));
    if x < -87.0 { 0.0 } else { result }
}

/// `1 / d` within 1 ulp for `d` from 1 to 2^126, or NaN: a division takes as long as the rest of [`logistic`].
///
/// The bits of a float are nearly its logarithm, so a difference of bits is an inverse within 13 % at worst. Each step takes the
/// error to its third power.
#[inline(always)]
fn inverse(d: f32) -> f32 {
    let mut r = f32::from_bits(INVERSE.wrapping_sub(d.to_bits()));
    for _ in 0..2 {
        let error = (-d).mul_add(r, 1.0);
        r = r.mul_add(error.mul_add(error, error), r);
    }
    r
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x * logistic(x)
}

/// `x / 2 · (1 + tanh(u)) = x · sigmoid(2u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 1.595_769; // 2 · √(2/π)
    x * logistic(TWICE_ROOT * (x + 0.044_715 * x * x * x))
}

#[inline(always)]
fn gelu_erf(x: f32) -> f32 {
    // x / 2 · (1 + erf(x/√2)) = x / 2 · erfc(-x/√2), which keeps its digits where the result is small.
    0.5 * x * erfc(-x * std::f32::consts::FRAC_1_SQRT_2)
}

/// `erfc(x)` with a relative error below 1.2e-7 in exact arithmetic (Numerical Recipes, `erfcc`).
#[inline(always)]
fn erfc(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let tail = t * exp(-z * z + p);
    if x < 0.0 { 2.0 - tail } else { tail }
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let small = x - x * x * x * (1.0 / 3.0);
    let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < 0.02 { small } else { large }
}

/// The nearest integer, ties to even, for `|x| < 2^22`.
#[inline(always)]
fn round_to_i32(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed()
}

/// The largest value; `-inf` if there is none. NaN is passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (&x, top) in chunk.iter().zip(&mut tops) {
            *top = larger(x, *top);
        }
    }
    for (&x, top) in rest.iter().zip(&mut tops) {
        *top = larger(x, *top);
    }
    fold(tops, larger)
}

/// Sixteen values to one, halving.
#[inline(always)]
pub(crate) fn fold<T: Copy>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// A polynomial for `e^r`, highest power first: minimax of degree 5 for the relative error, 9.2e-8.
pub(crate) const EXP: [f32; 6] = [8.290_272e-3, 4.189_816e-2, 1.666_763_9e-1, 4.999_914_8e-1, 9.999_997e-1, 1.0];

/// ln 2 in two parts: the first has few bits, so that its product with an exponent is exact.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;

/// [`inverse`] starts with this less the bits.
pub(crate) const INVERSE: u32 = 0x7ef3_11c7;

/// Cephes' coefficients for (e^r - 1 - r) / r².
pub(crate) const EXP_REST: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// Adding and subtracting this rounds a float below 2^22 to an integer, which its low bits then hold.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Partial results of a reduction, on every tier.
pub(crate) const LANES: usize = 16;
