//! Weights with a scale per block, on one grid per output: integers of 16 bits in two planes of signed bytes, `[k/4][16][4]` each.
//!
//! ```text
//! w = scale · (code - half) + middle             half of the codes are below the middle one
//! unit = (half · largest |scale| + largest |middle|) / 32512, over the blocks of the output
//! 256 · high + low = round((code - half) · step / half) + round(middle / unit),  step = round(half · scale / unit)
//! ```
//! A weight is off by at most 1.5 units, or 1 where the middle is 0.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{EIGHT_BIT_BLOCKS, FIVE_BIT_BLOCKS, FOUR_BIT_BLOCKS, PANELS, SIX_BIT_BLOCKS};
use crate::arch::x86_64::avx512_vnni::matmul::{join, load_bytes, load_f16, load_i8, upper_bits};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, MAX_INTEGER_K, PANEL};

/// The grid of a panel's outputs.
pub(super) struct WeightGrid<'a> {
    tile: &'a IntegerTile<'a>,
    panel: usize,
    unit: __m512,
    /// `1 / unit`, or 0.
    per_unit: __m512,
}

impl<'a> WeightGrid<'a> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn new<const CODES: u8>(tile: &'a IntegerTile<'a>, panel: usize) -> Self {
        let blocks = tile.k / tile.block;
        // As integers, so that what is not finite is the largest.
        let (mut scales, mut middles) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        for block in panel * blocks..(panel + 1) * blocks {
            let (scale, middle) = scale_and_middle::<CODES>(tile, block);
            scales = _mm512_max_epu32(scales, _mm512_castps_si512(_mm512_abs_ps(scale)));
            middles = _mm512_max_epu32(middles, _mm512_castps_si512(_mm512_abs_ps(middle)));
        }
        let (scales, middles) = (_mm512_castsi512_ps(scales), _mm512_castsi512_ps(middles));
        let bound = _mm512_fmadd_ps(scales, _mm512_set1_ps(half::<CODES>() as f32), middles);
        let is_some = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(bound, _mm512_setzero_ps());
        let largest = _mm512_set1_ps(LARGEST);
        Self {
            tile,
            panel,
            unit: _mm512_div_ps(bound, largest),
            per_unit: _mm512_maskz_div_ps(is_some, largest, bound),
        }
    }

    /// What products are multiplied with, beside the scale of x.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn scale<const PLANES: usize>(&self) -> __m512 {
        if PLANES == 2 { _mm512_mul_ps(self.unit, _mm512_set1_ps(256.0)) } else { self.unit }
    }

    /// What makes integers of the codes of a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn block<const CODES: u8>(&self, block: usize) -> Block {
        let (scale, middle) =
            scale_and_middle::<CODES>(self.tile, self.panel * (self.tile.k / self.tile.block) + block);
        let per_half = _mm512_mul_ps(self.per_unit, _mm512_set1_ps(half::<CODES>() as f32));
        let step = _mm512_cvtps_epi32(_mm512_mul_ps(scale, per_half));
        let middle = _mm512_cvtps_epi32(_mm512_mul_ps(middle, self.per_unit));
        let middle = _mm512_add_epi32(middle, _mm512_set1_epi32(128));
        let twice = _mm512_set4_epi32(0x0d0c_0d0c, 0x0908_0908, 0x0504_0504, 0x0100_0100);
        Block { step: _mm512_shuffle_epi8(step, twice), middle: _mm512_shuffle_epi8(middle, twice) }
    }
}

/// The step of a block and its middle in units, the latter with 128 more, for all outputs, twice in 32 bits.
struct Block {
    step: __m512i,
    middle: __m512i,
}

impl Block {
    /// Writes the high and low bytes of weights whose codes, with `half` less, are the upper bits of 16: those of inputs 0 and 2, and
    /// of 1 and 3.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn write(&self, codes: [__m512i; 2], high: &mut MaybeUninit<[u8; 64]>, low: &mut MaybeUninit<[u8; 64]>) {
        let even = _mm512_add_epi16(_mm512_mulhrs_epi16(codes[0], self.step), self.middle);
        let odd = _mm512_add_epi16(_mm512_mulhrs_epi16(codes[1], self.step), self.middle);
        let (mask, sign) = (_mm512_set1_epi16(0xff), _mm512_set1_epi8(i8::MIN));
        // Of the second where the mask has ones, else of the third.
        let high_bytes = _mm512_ternarylogic_epi32::<0xca>(mask, _mm512_srli_epi16::<8>(even), odd);
        let low_bytes = _mm512_ternarylogic_epi32::<0xca>(mask, even, _mm512_slli_epi16::<8>(odd));
        // SAFETY: 64 bytes each, unaligned.
        unsafe {
            _mm512_storeu_si512(high.as_mut_ptr().cast(), high_bytes);
            // Less the 128 more.
            _mm512_storeu_si512(low.as_mut_ptr().cast(), _mm512_xor_si512(low_bytes, sign));
        }
    }
}

/// High and low bytes of the panels that are computed together.
#[repr(align(64))]
pub(super) struct Planes([[Plane; 2]; PANELS]);

type Plane = [MaybeUninit<[u8; 64]>; Planes::INPUTS / 4];

impl Planes {
    /// Inputs that there is room for: four planes of them are 30 KiB, which leaves the first cache room for 16 rows of x. A piece is
    /// whole tiles and whole rows of upper bits: no tile, of up to 64 inputs, has a least common multiple with the 32 of 5-bit codes
    /// that is larger than that of 60.
    pub(super) const INPUTS: usize = 480;

    #[inline]
    pub(super) fn uninit() -> Self {
        Self([const { [const { [const { MaybeUninit::uninit() }; Self::INPUTS / 4] }; 2] }; PANELS])
    }

    /// What the inputs of a [`fill`](Self::fill) start and end at multiples of: what shares rows of codes.
    pub(super) fn inputs_step<const CODES: u8>() -> usize {
        match CODES {
            FIVE_BIT_BLOCKS => 32,
            SIX_BIT_BLOCKS => 16,
            EIGHT_BIT_BLOCKS => 4,
            _ => 8,
        }
    }

    /// Both planes of some inputs of one panel or two. Of one, they are given twice.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn fill<const CODES: u8>(
        &mut self,
        grids: &[WeightGrid<'_>],
        inputs: Range<usize>,
    ) -> [[*const u8; 2]; PANELS] {
        for (planes, grid) in self.0.iter_mut().zip(grids) {
            fill::<CODES>(grid, inputs.clone(), planes);
        }
        std::array::from_fn(|i| self.0[i.min(grids.len() - 1)].each_ref().map(|plane| plane.as_ptr().cast()))
    }
}

/// Writes the high and low bytes of some inputs of a panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn fill<const CODES: u8>(grid: &WeightGrid<'_>, inputs: Range<usize>, [high, low]: &mut [Plane; 2]) {
    let tile = grid.tile;
    let (high, low) = (&mut high[..inputs.len() / 4], &mut low[..inputs.len() / 4]);
    let codes = tile.codes[grid.panel * tile.panel_bytes..].as_chunks::<64>().0;
    match CODES {
        SIX_BIT_BLOCKS => unpack_split::<2>(codes, inputs.start, low),
        FIVE_BIT_BLOCKS => unpack_split::<1>(codes, inputs.start, low),
        _ => {}
    }
    // Groups of four inputs.
    let (mut block, mut group) = (inputs.start / tile.block, 0);
    while group < high.len() {
        let end = high.len().min(((block + 1) * tile.block - inputs.start) / 4);
        let factors = grid.block::<CODES>(block);
        match CODES {
            FOUR_BIT_BLOCKS => {
                for group in (group..end).step_by(2) {
                    let [first, second] = nibbles(&codes[(inputs.start / 4 + group) / 2]);
                    factors.write(first, &mut high[group], &mut low[group]);
                    factors.write(second, &mut high[group + 1], &mut low[group + 1]);
                }
            }
            EIGHT_BIT_BLOCKS => {
                for group in group..end {
                    let codes = bytes::<CODES>(&codes[inputs.start / 4 + group]);
                    factors.write(codes, &mut high[group], &mut low[group]);
                }
            }
            _ => {
                for group in group..end {
                    // SAFETY: `unpack_split` wrote it.
                    let codes = bytes::<CODES>(unsafe { low[group].assume_init_ref() });
                    factors.write(codes, &mut high[group], &mut low[group]);
                }
            }
        }
        (group, block) = (end, block + 1);
    }
}

/// The codes of two groups of four inputs, as [`Block::write`] wants them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibbles(codes: &[u8; 64]) -> [[__m512i; 2]; 2] {
    let codes = load_bytes(codes);
    [
        [less_half::<4>(_mm512_slli_epi16::<12>(codes)), less_half::<4>(_mm512_slli_epi16::<4>(codes))],
        [less_half::<4>(_mm512_slli_epi16::<8>(codes)), less_half::<4>(codes)],
    ]
}

/// The same of one group whose codes have bytes: without a sign, but for those of 8 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn bytes<const CODES: u8>(codes: &[u8; 64]) -> [__m512i; 2] {
    let codes = load_bytes(codes);
    match CODES {
        SIX_BIT_BLOCKS => {
            [less_half::<6>(_mm512_slli_epi16::<10>(codes)), less_half::<6>(_mm512_slli_epi16::<2>(codes))]
        }
        FIVE_BIT_BLOCKS => {
            [less_half::<5>(_mm512_slli_epi16::<11>(codes)), less_half::<5>(_mm512_slli_epi16::<3>(codes))]
        }
        _ => [_mm512_slli_epi16::<8>(codes), _mm512_and_si512(codes, _mm512_set1_epi16(-0x100))],
    }
}

/// The upper bits of 16, less half of what they can be.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn less_half<const BITS: u32>(codes: __m512i) -> __m512i {
    let (upper, sign) = (_mm512_set1_epi16(-1 << (16 - BITS)), _mm512_set1_epi16(i16::MIN));
    // `codes & upper ^ sign`.
    _mm512_ternarylogic_epi32::<0x78>(sign, codes, upper)
}

/// Writes codes of `4 + HIGH` bits, see [`crate::packed`], as bytes: of as many inputs as `to` has room for, from `from` on. Both
/// are multiples of those that share a row of upper bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack_split<const HIGH: usize>(codes: &[[u8; 64]], from: usize, to: &mut [MaybeUninit<[u8; 64]>]) {
    let (rows, groups) = (4 / HIGH + 1, 8 / HIGH);
    let codes = &codes[from / 4 / groups * rows..];
    assert!(to.len() / groups * rows <= codes.len() && to.len().is_multiple_of(groups));
    for (to, rows) in to.chunks_exact_mut(groups).zip(codes.chunks_exact(rows)) {
        for (i, to) in to.chunks_exact_mut(groups / 2).enumerate() {
            let mut high = upper_bits::<HIGH>(rows, i);
            for (pair, row) in to.as_chunks_mut::<2>().0.iter_mut().zip(&rows[i * 2 / HIGH..]) {
                let (first, second) = join::<HIGH>(load_bytes(row), &mut high);
                for (to, codes) in pair.iter_mut().zip([first, second]) {
                    // SAFETY: 64 bytes, unaligned.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), codes) };
                }
            }
        }
    }
}

/// Half of the numbers that a code can be.
const fn half<const CODES: u8>() -> i32 {
    match CODES {
        EIGHT_BIT_BLOCKS => 128,
        SIX_BIT_BLOCKS => 32,
        FIVE_BIT_BLOCKS => 16,
        _ => 8,
    }
}

/// The scale of a block of each output, and what its middle code stands for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn scale_and_middle<const CODES: u8>(tile: &IntegerTile<'_>, block: usize) -> (__m512, __m512) {
    let scale = load_f16(&tile.scales.as_chunks::<{ PANEL * 2 }>().0[block]);
    // Codes of 8 bits have a sign, so that their middle one is 0.
    let half = _mm512_set1_ps(if CODES == EIGHT_BIT_BLOCKS { 0.0 } else { half::<CODES>() as f32 });
    let middle = match tile.offset {
        BlockOffset::Symmetric => _mm512_setzero_ps(),
        BlockOffset::Integer => {
            let offset = _mm512_cvtepi32_ps(load_i8(&tile.offsets[block * PANEL..]));
            _mm512_mul_ps(_mm512_add_ps(offset, half), scale)
        }
        BlockOffset::Min => _mm512_fmadd_ps(scale, half, load_f16(&tile.offsets.as_chunks::<{ PANEL * 2 }>().0[block])),
    };
    (scale, middle)
}

/// Units that no weight exceeds by more than rounding: with 128 more it is still a number of 16 bits, and a high byte is never -128.
const LARGEST: f32 = 32512.0;

// So the sums of two mixed products for each input are inside i32, whatever the bytes of x.
const _: () = assert!(MAX_INTEGER_K as i64 * 128 * (128 + 127) <= i32::MAX as i64);
