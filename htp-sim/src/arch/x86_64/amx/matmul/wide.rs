//! 4-bit codes with a float scale per block as weights of 16 bits with one scale per output, in two planes of bytes.
//!
//! Sums with a scale per block would have to leave the tiles after every block, which takes longer than the products. Instead
//! each weight is rounded once more, to a whole number of steps of 1/30720 of the largest that its output can have:
//!
//! ```text
//! step = max over blocks of |weight of code 0 or 15| / 30720
//! weight / step = floor(code · |scale| / step) + round(weight of code 0 / step + 1/2)        (codes from the other end if scale < 0)
//! ```
//! The first product has four bits behind the point, so that a weight moves by less than two steps.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::arch::x86_64::avx512_vnni::matmul::{load_bytes, load_f16, load_i8};
use crate::arch::x86_64::{INTEGER, SYMMETRIC};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// The blocks of a panel, and how large a step of the 16-bit weights of each of its outputs is.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a, const OFFSET: u8> {
    scales: &'a [u8],
    offsets: &'a [u8],
    /// Inputs of a block.
    block: usize,
    /// NaN where a scale is not finite.
    pub(super) step: __m512,
    inverse: __m512,
}

impl<'a, const OFFSET: u8> Blocks<'a, OFFSET> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn of(tile: &IntegerTile<'a>, panel: usize) -> Self {
        let n_blocks = tile.k / tile.block;
        let bytes = |bytes: usize| panel * n_blocks * PANEL * bytes..(panel + 1) * n_blocks * PANEL * bytes;
        let offset_bytes = [0, 1, 2][usize::from(OFFSET)];
        let (scales, offsets) = (&tile.scales[bytes(2)], &tile.offsets[bytes(offset_bytes)]);
        let least = _mm512_set1_ps(f32::MIN_POSITIVE * LIMIT);
        let mut blocks = Self { scales, offsets, block: tile.block, step: least, inverse: least };
        let mut most = least;
        for block in 0..n_blocks {
            let (scale, zero) = blocks.get(block);
            let last = _mm512_fmadd_ps(scale, _mm512_set1_ps(15.0), zero);
            // As integers the magnitudes of floats keep their order, and NaN is above all others.
            for end in [zero, last] {
                most = _mm512_castsi512_ps(_mm512_max_epu32(
                    _mm512_castps_si512(most),
                    _mm512_castps_si512(_mm512_abs_ps(end)),
                ));
            }
        }
        blocks.step = _mm512_mul_ps(most, _mm512_set1_ps(1.0 / LIMIT));
        blocks.inverse = _mm512_div_ps(_mm512_set1_ps(1.0), blocks.step);
        blocks
    }

    /// Scale and weight of code 0 of a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn get(&self, block: usize) -> (__m512, __m512) {
        let scale = load_f16(&self.scales[block * PANEL * 2..]);
        let zero = match OFFSET {
            SYMMETRIC => _mm512_mul_ps(scale, _mm512_set1_ps(-8.0)),
            INTEGER => _mm512_mul_ps(scale, _mm512_cvtepi32_ps(load_i8(&self.offsets[block * PANEL..]))),
            _ => load_f16(&self.offsets[block * PANEL * 2..]),
        };
        (scale, zero)
    }

    /// What the codes of a block become: `weight / step + 128 = ((code ^ flip) << 12) · factor >> 16 + zero`, in 16 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rule(&self, block: usize) -> Rule {
        let (scale, zero) = self.get(block);
        let is_negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(scale, _mm512_setzero_ps());
        let zero = _mm512_mask3_fmadd_ps(scale, _mm512_set1_ps(15.0), zero, is_negative);
        let factor = _mm512_mul_ps(_mm512_abs_ps(scale), _mm512_mul_ps(self.inverse, _mm512_set1_ps(16.0)));
        let factor = _mm512_min_epu32(_mm512_cvtps_epu32(factor), _mm512_set1_epi32(0xffff));
        let zero = _mm512_cvtps_epi32(_mm512_fmadd_ps(zero, self.inverse, _mm512_set1_ps(128.5)));
        let low = _mm512_and_si512(zero, _mm512_set1_epi32(0xffff));
        Rule {
            flip: _mm512_maskz_set1_epi32(is_negative, -1),
            factor: _mm512_or_si512(factor, _mm512_slli_epi32::<16>(factor)),
            zero: _mm512_or_si512(low, _mm512_slli_epi32::<16>(zero)),
        }
    }
}

struct Rule {
    flip: __m512i,
    factor: __m512i,
    zero: __m512i,
}

/// Writes inputs `inputs` of a panel as high and low bytes, both signed, `[k/4][16][4]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn unpack<'a, const OFFSET: u8>(
    tile: &IntegerTile<'_>,
    panel: usize,
    blocks: &Blocks<'_, OFFSET>,
    inputs: Range<usize>,
    [hi, lo]: [&'a mut [MaybeUninit<[u8; 64]>]; 2],
) -> [&'a [[u8; 64]]; 2] {
    let codes = &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[inputs.start / 8..][..inputs.len() / 8];
    assert!(inputs.len().is_multiple_of(8) && hi.len() == codes.len() * 2 && lo.len() == codes.len() * 2);
    // Rows of codes up to the end of the block, which may have begun in another piece.
    let mut block = inputs.start / blocks.block;
    let mut left = ((block + 1) * blocks.block - inputs.start) / 8;
    let mut rule = blocks.rule(block);
    let places = hi.as_chunks_mut::<2>().0.iter_mut().zip(lo.as_chunks_mut::<2>().0);
    for (codes, (hi, lo)) in codes.iter().zip(places) {
        if left == 0 {
            (block, left) = (block + 1, blocks.block / 8);
            rule = blocks.rule(block);
        }
        left -= 1;
        let codes = _mm512_xor_si512(load_bytes(codes), rule.flip);
        let top = |codes: __m512i| _mm512_and_si512(codes, _mm512_set1_epi16(0xf000_u16.cast_signed()));
        // The even inputs of a four and the odd ones: first of the low nibbles' four, then of the high ones'.
        let even = [_mm512_slli_epi16::<12>(codes), top(_mm512_slli_epi16::<8>(codes))];
        let odd = [top(_mm512_slli_epi16::<4>(codes)), top(codes)];
        for i in 0..2 {
            let [even, odd] =
                [even[i], odd[i]].map(|codes| _mm512_add_epi16(_mm512_mulhi_epu16(codes, rule.factor), rule.zero));
            // 128 more than the weight: the high byte is that of the plane, the low one has another sign.
            let high = _mm512_ternarylogic_epi32::<OR_AND>(
                _mm512_srli_epi16::<8>(even),
                odd,
                _mm512_set1_epi16(0xff00_u16.cast_signed()),
            );
            let low = _mm512_ternarylogic_epi32::<OR_AND>(_mm512_slli_epi16::<8>(odd), even, _mm512_set1_epi16(0xff));
            let low = _mm512_xor_si512(low, _mm512_set1_epi8(-128));
            // SAFETY: 64 bytes each, unaligned.
            unsafe {
                _mm512_storeu_si512(hi[i].as_mut_ptr().cast(), high);
                _mm512_storeu_si512(lo[i].as_mut_ptr().cast(), low);
            }
        }
    }
    // SAFETY: the loop wrote every element, as the assertion says.
    unsafe { [hi.assume_init_ref(), lo.assume_init_ref()] }
}

/// `a | (b & c)`.
const OR_AND: i32 = 0xf8;

/// Steps in the largest weight: with the 128 that are added it fits 16 bits, and so does 16 times the product's factor.
const LIMIT: f32 = 30720.0;
