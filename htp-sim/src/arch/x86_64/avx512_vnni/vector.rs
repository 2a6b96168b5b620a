//! The portable vector functions, compiled for this tier's registers; those that take time, or that the compiler made little of,
//! by hand.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use crate::arch::portable::vector::{self, EXP, INVERSE, LANES, LN2_HIGH, LN2_LOW, ROUND};
use crate::elementwise::{Activation, Unary};
use crate::kernels::{RowsMut, SoftmaxTotals};
use crate::matmul::Write;

/// `$a = $value` for each `$a` of `$to` and `$b` of `$from`, in whole registers. Compiled from the portable functions it became
/// gathers and scatters, or calls of `memcpy`.
macro_rules! in_registers {
    ($to:expr, $from:expr, |$a:ident, $b:ident| $value:expr) => {{
        let (to, from): (&mut [f32], &[f32]) = ($to, $from);
        let len = to.len().min(from.len());
        let (to, from) = (to.as_mut_ptr(), from.as_ptr());
        for at in (0..len).step_by(LANES) {
            let mask = mask(len - at);
            // SAFETY: `mask` names the values from `at` on that exist, in both slices.
            let $a = unsafe { _mm512_maskz_loadu_ps(mask, to.add(at)) };
            // SAFETY: as above.
            let $b = unsafe { _mm512_maskz_loadu_ps(mask, from.add(at)) };
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(to.add(at), mask, $value) };
        }
    }};
}

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

/// The portable function, step for step, in whole registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    if activation != Activation::Silu {
        return vector::gate(activation, gate, up);
    }
    in_registers!(gate, up, |x, up| {
        let [x] = silu([x]);
        _mm512_mul_ps(x, up)
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::rotate(first, second, cos, sin);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn add_row(values: &mut [f32], width: usize, row: &[f32], factor: f32) {
    let factor = _mm512_set1_ps(factor);
    for values in values.chunks_exact_mut(width) {
        in_registers!(values, row, |value, x| _mm512_add_ps(value, _mm512_mul_ps(factor, x)));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn store_rows(values: &[f32], width: usize, to: RowsMut<'_>) {
    assert!(to.columns <= width);
    for (i, values) in values.chunks_exact(width).enumerate() {
        // SAFETY: the ranges of a tile are its own.
        let out = unsafe { to.out.range(to.first + i * to.stride, to.columns) };
        match to.write {
            Write::Store => in_registers!(out, values, |_out, value| value),
            Write::Add => in_registers!(out, values, |out, value| _mm512_add_ps(out, value)),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn merge_totals(totals: [&mut [f32]; 2], new: [&[f32]; 2], factors: [&mut [f32]; 2]) {
    vector::merge_totals(totals, new, factors);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn merge(acc: &mut [f32], part: &[f32], factors: [f32; 2]) {
    let [old, new] = factors.map(|factor| _mm512_set1_ps(factor));
    in_registers!(acc, part, |acc, part| _mm512_add_ps(_mm512_mul_ps(acc, old), _mm512_mul_ps(part, new)));
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn scale(x: &[f32], factor: f32, out: &mut [f32]) {
    let factor = _mm512_set1_ps(factor);
    in_registers!(out, x, |_out, x| _mm512_mul_ps(x, factor));
}

/// The high and the low bytes of 64 codes, `code = 256 · hi + lo`, both signed, from the codes plus [`PLANES_SHIFT`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn planes(shifted: [__m512i; 4]) -> [__m512i; 2] {
    let words = [_mm512_packs_epi32(shifted[0], shifted[1]), _mm512_packs_epi32(shifted[2], shifted[3])];
    let low = |words| _mm512_and_si512(words, _mm512_set1_epi16(0xff));
    let hi = _mm512_packs_epi16(_mm512_srai_epi16::<8>(words[0]), _mm512_srai_epi16::<8>(words[1]));
    let lo = _mm512_packus_epi16(low(words[0]), low(words[1]));
    [in_order(hi), in_order(_mm512_xor_si512(lo, _mm512_set1_epi8(i8::MIN)))]
}

/// 64 codes of 8 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn bytes(codes: [__m512i; 4]) -> __m512i {
    let words = [_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3])];
    in_order(_mm512_packs_epi16(words[0], words[1]))
}

/// Undoes the order of packing, which works in quarters of a register and leaves four bytes of each operand in turn.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order(packed: __m512i) -> __m512i {
    _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed)
}

/// `hi` of `code = 256 · hi + lo`, where `lo` is the code's lowest byte with its sign: what a store of bytes keeps of it.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn high_plane(code: __m512i) -> __m512i {
    _mm512_srai_epi32::<8>(_mm512_add_epi32(code, _mm512_set1_epi32(128)))
}

/// As in `portable`, of `N` registers. Each waits for the result of one operation after the other, and a core looks ahead over no more
/// than two such chains: they go side by side.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn silu<const N: usize>(x: [__m512; N]) -> [__m512; N] {
    let (least, most) = (_mm512_set1_ps(-87.0), _mm512_set1_ps(87.0));
    let mut y = x;
    for y in &mut y {
        // In this order NaN stays.
        *y = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(least, _mm512_min_ps(most, *y)));
    }
    exp_within(&mut y);
    for y in &mut y {
        *y = _mm512_add_ps(_mm512_set1_ps(1.0), *y);
    }
    inverse(&mut y);
    for (y, x) in y.iter_mut().zip(x) {
        let is_above = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
        *y = _mm512_mul_ps(x, _mm512_maskz_mov_ps(is_above, *y));
    }
    y
}

/// As in `portable`.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp_within<const N: usize>(x: &mut [__m512; N]) {
    let (mut shifted, mut p) = (*x, [_mm512_set1_ps(EXP[0]); N]);
    for (x, shifted) in x.iter_mut().zip(&mut shifted) {
        *shifted = _mm512_fmadd_ps(*x, _mm512_set1_ps(LOG2_E), _mm512_set1_ps(ROUND));
        let n = _mm512_sub_ps(*shifted, _mm512_set1_ps(ROUND));
        *x = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), *x));
    }
    for c in &EXP[1..] {
        for (p, r) in p.iter_mut().zip(*x) {
            *p = _mm512_fmadd_ps(*p, r, _mm512_set1_ps(*c));
        }
    }
    for ((x, p), shifted) in x.iter_mut().zip(p).zip(shifted) {
        let exponent = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
        *x = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)));
    }
}

/// As in `portable`.
#[inline]
#[target_feature(enable = "avx512f")]
fn inverse<const N: usize>(d: &mut [__m512; N]) {
    let mut r = *d;
    for r in &mut r {
        let bits = _mm512_sub_epi32(_mm512_set1_epi32(INVERSE.cast_signed()), _mm512_castps_si512(*r));
        *r = _mm512_castsi512_ps(bits);
    }
    for _ in 0..2 {
        for (r, d) in r.iter_mut().zip(*d) {
            let error = _mm512_fnmadd_ps(d, *r, _mm512_set1_ps(1.0));
            *r = _mm512_fmadd_ps(*r, _mm512_fmadd_ps(error, error, error), *r);
        }
    }
    *d = r;
}

/// The first `n` lanes.
pub(super) fn mask(n: usize) -> u16 {
    u16::MAX.checked_shr((LANES - n.min(LANES)) as u32).unwrap_or(0)
}

/// Sixteen values to one, halving: in the order of [`vector::fold`]. `f` is applied to halves of a register.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
pub(super) fn fold(lanes: __m512, f: impl Fn(__m256, __m256) -> __m256) -> f32 {
    let eight = f(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
    let four = f(eight, _mm256_permute2f128_ps::<1>(eight, eight));
    let two = f(four, _mm256_permute_ps::<0b00_00_11_10>(four));
    _mm256_cvtss_f32(f(two, _mm256_permute_ps::<1>(two)))
}
