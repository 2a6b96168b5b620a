//! Quantization: of a row, the portable function step for step, with its division by the scale made of products; and of
//! probabilities. Thirty-two codes at a time.

use std::arch::x86_64::*;

use crate::arch::portable::vector::{self, ROUND};
use crate::arch::portable::weights;
use crate::arch::x86_64::quantize::{PLANES_SHIFT, usual_steps};
use crate::kernels::{QuantizedRowMut, RowValues, WeightsMut};

#[target_feature(enable = "avx2,fma")]
pub(crate) fn quantize(row: RowValues<'_>, out: QuantizedRowMut<'_>) {
    let whole = row.x.len().is_multiple_of(STEP) && out.sum_block.is_multiple_of(STEP);
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

/// As in `portable`.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn weigh(scores: &[f32], scales: &[[u8; 4]], [max, factor]: [f32; 2], mut out: WeightsMut<'_>) -> f32 {
    let factor = _mm256_set1_ps(factor);
    let mut sums = [0.0; vector::LANES];
    let mut plane_sums = [_mm256_setzero_si256(); 2];
    let mut quantize = |weights: &[f32; STEP], hi: &mut [i8; STEP], lo: &mut [i8; STEP]| {
        let mut codes = [_mm256_setzero_si256(); STEP / LANES];
        for (i, codes) in codes.iter_mut().enumerate() {
            let rounded = _mm256_fmadd_ps(load(weights, i * LANES), factor, _mm256_set1_ps(ROUND));
            *codes = from_rounded(rounded, -PLANES_SHIFT);
        }
        let [high, low] = planes(codes);
        for (sum, plane) in plane_sums.iter_mut().zip([high, low]) {
            *sum = _mm256_add_epi32(*sum, four_sums(plane));
        }
        store(hi, high);
        store(lo, low);
    };
    let ((scores, score_rest), (scales, scale_rest)) = (scores.as_chunks::<STEP>(), scales.as_chunks::<STEP>());
    let ((hi, hi_rest), (lo, lo_rest)) = (out.hi.as_chunks_mut(), out.lo.as_chunks_mut());
    for (((scores, scales), hi), lo) in scores.iter().zip(scales).zip(hi).zip(lo) {
        let mut weights = [0.0; STEP];
        for at in [0, vector::LANES] {
            let (scores, scales) = (&scores[at..][..vector::LANES], &scales[at..][..vector::LANES]);
            weights::products(scores, scales, max, &mut sums, &mut weights[at..]);
        }
        quantize(&weights, hi, lo);
    }
    if !score_rest.is_empty() {
        let (mut weights, mut hi, mut lo) = ([0.0; STEP], [0; STEP], [0; STEP]);
        let pieces = score_rest.chunks(vector::LANES).zip(scale_rest.chunks(vector::LANES));
        for ((scores, scales), weights) in pieces.zip(weights.chunks_mut(vector::LANES)) {
            weights::products(scores, scales, max, &mut sums, weights);
        }
        quantize(&weights, &mut hi, &mut lo);
        hi_rest.copy_from_slice(&hi[..hi_rest.len()]);
        lo_rest.copy_from_slice(&lo[..lo_rest.len()]);
    }
    *out.plane_sums = plane_sums.map(|sum| add_lanes(sum));
    let sum = vector::fold(sums, |a, b| a + b);
    weights::erase_unless_finite(sum, &mut out);
    sum
}

/// The largest magnitude, or infinity, or NaN.
#[target_feature(enable = "avx2,fma")]
fn absmax(row: &RowValues<'_>) -> f32 {
    // Several, so that no comparison waits for the one before.
    let mut tops = [_mm256_setzero_si256(); STEP / LANES];
    for at in (0..row.x.len()).step_by(STEP) {
        for (i, top) in tops.iter_mut().enumerate() {
            let at = at + i * LANES;
            let value = if row.norm.is_some() { normalized(row, at) } else { load(row.x, at) };
            // As integers the magnitudes of floats keep their order, and anything not finite is above all that is.
            let magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fff_ffff));
            *top = _mm256_max_epu32(*top, magnitude);
        }
    }
    let top = _mm256_max_epu32(_mm256_max_epu32(tops[0], tops[1]), _mm256_max_epu32(tops[2], tops[3]));
    let top = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    let top = _mm_max_epu32(top, _mm_unpackhi_epi64(top, top));
    f32::from_bits(_mm_cvtsi128_si32(_mm_max_epu32(top, _mm_srli_epi64::<32>(top))).cast_unsigned())
}

/// How floats become codes.
struct Codes {
    divisor: Divisor,
    low: f32,
    high: f32,
    center: i32,
}

impl Codes {
    #[target_feature(enable = "avx2,fma")]
    fn write<const NORM: bool, const EIGHT: bool>(&self, row: &RowValues<'_>, out: QuantizedRowMut<'_>) {
        let (mut total, mut block_sums, mut hi_totals) = (0_i32, _mm256_setzero_si256(), _mm256_setzero_si256());
        let mut sums = out.sums.iter_mut();
        let mut lo = out.lo.as_chunks_mut().0.iter_mut();
        for (i, hi) in out.hi.as_chunks_mut().0.iter_mut().enumerate() {
            let at = i * STEP;
            let mut codes = [_mm256_setzero_si256(); STEP / LANES];
            for (i, code) in codes.iter_mut().enumerate() {
                *code = self.code::<NORM>(row, at + i * LANES, if EIGHT { 0 } else { PLANES_SHIFT });
            }
            if EIGHT {
                let codes = bytes(codes);
                store(hi, codes);
                block_sums = _mm256_add_epi32(block_sums, four_sums(codes));
            } else {
                let [high, low] = planes(codes);
                store(hi, high);
                if let Some(lo) = lo.next() {
                    store(lo, low);
                }
                let hi_sums = four_sums(high);
                hi_totals = _mm256_add_epi32(hi_totals, hi_sums);
                let both = _mm256_add_epi32(_mm256_slli_epi32::<8>(hi_sums), four_sums(low));
                block_sums = _mm256_add_epi32(block_sums, both);
            }
            if (at + STEP).is_multiple_of(out.sum_block) {
                let sum = add_lanes(std::mem::replace(&mut block_sums, _mm256_setzero_si256()));
                if let Some(to) = sums.next() {
                    *to = sum;
                }
                total = total.wrapping_add(sum);
            }
        }
        // The sum of all may have wrapped: what is made of it here does fit.
        let hi = add_lanes(hi_totals);
        *out.plane_sums = if EIGHT { [total, 0] } else { [hi, total.wrapping_sub(hi.wrapping_mul(256))] };
    }

    /// The codes of eight values, plus `shift`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn code<const NORM: bool>(&self, row: &RowValues<'_>, at: usize, shift: i32) -> __m256i {
        let value = if NORM { normalized(row, at) } else { load(row.x, at) };
        let (low, high) = (_mm256_set1_ps(self.low), _mm256_set1_ps(self.high));
        let quotient = _mm256_min_ps(_mm256_max_ps(self.divisor.divide(value), low), high);
        from_rounded(_mm256_add_ps(quotient, _mm256_set1_ps(ROUND)), self.center - shift)
    }
}

/// Divides by one number, correctly rounded.
struct Divisor {
    divisor: __m256,
    inverse: __m256,
}

impl Divisor {
    #[target_feature(enable = "avx2")]
    fn new(divisor: f32) -> Self {
        Self { divisor: _mm256_set1_ps(divisor), inverse: _mm256_set1_ps(1.0 / divisor) }
    }

    /// The first step gives a quotient with an error below one unit in the last place, whatever the product's is; from such a
    /// one, and a correctly rounded inverse, the second gives the correctly rounded quotient (Markstein 1990).
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn divide(&self, x: __m256) -> __m256 {
        let mut quotient = _mm256_mul_ps(x, self.inverse);
        for _ in 0..2 {
            let rest = _mm256_fnmadd_ps(quotient, self.divisor, x);
            quotient = _mm256_fmadd_ps(rest, self.inverse, quotient);
        }
        quotient
    }
}

/// The whole numbers that were rounded by adding [`ROUND`], less `less`.
#[inline]
#[target_feature(enable = "avx2")]
fn from_rounded(sums: __m256, less: i32) -> __m256i {
    _mm256_sub_epi32(_mm256_castps_si256(sums), _mm256_set1_epi32(ROUND.to_bits().cast_signed() + less))
}

/// The high and the low bytes of codes, `code = 256 · hi + lo`, both signed, from the codes plus [`PLANES_SHIFT`].
#[inline]
#[target_feature(enable = "avx2")]
fn planes(shifted: [__m256i; 4]) -> [__m256i; 2] {
    let words = [_mm256_packs_epi32(shifted[0], shifted[1]), _mm256_packs_epi32(shifted[2], shifted[3])];
    let low = words.map(|words| _mm256_and_si256(words, _mm256_set1_epi16(0xff)));
    let hi = _mm256_packs_epi16(_mm256_srai_epi16::<8>(words[0]), _mm256_srai_epi16::<8>(words[1]));
    let lo = _mm256_xor_si256(_mm256_packus_epi16(low[0], low[1]), _mm256_set1_epi8(i8::MIN));
    [in_order(hi), in_order(lo)]
}

/// Codes of 8 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(codes: [__m256i; 4]) -> __m256i {
    let words = [_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3])];
    in_order(_mm256_packs_epi16(words[0], words[1]))
}

/// Undoes the order of packing, which works in halves of a register and leaves four bytes of each operand in turn.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(packed: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Sums of four bytes each.
#[inline]
#[target_feature(enable = "avx2")]
fn four_sums(bytes: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1))
}

/// The sum of all lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_lanes(sums: __m256i) -> i32 {
    let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
    _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_srli_epi64::<32>(sums)))
}

/// `x · inv · weight`.
#[inline]
#[target_feature(enable = "avx2")]
fn normalized(row: &RowValues<'_>, at: usize) -> __m256 {
    let (inv, weight) = row.norm.unwrap_or((1.0, row.x));
    _mm256_mul_ps(_mm256_mul_ps(load(row.x, at), _mm256_set1_ps(inv)), load(weight, at))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(from: &[f32], at: usize) -> __m256 {
    // SAFETY: the slice has eight values (checked here), unaligned.
    unsafe { _mm256_loadu_ps(from[at..][..LANES].as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [i8; STEP], bytes: __m256i) {
    // SAFETY: 32 bytes, unaligned.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), bytes) }
}

const LANES: usize = 8;

/// Codes that fill a register as bytes.
const STEP: usize = 32;
