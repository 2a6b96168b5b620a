//! Codes of a panel as the unit's second operand: signed bytes, `[k/4][16][4]`.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{EIGHT_BIT, FOUR_BIT_STEPS, PANELS};
use crate::arch::x86_64::avx512_vnni::matmul::{load_bytes, load_i8};
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// Room for the unpacked codes of the panels that are computed together.
#[repr(align(64))]
pub(super) struct Unpacked([[MaybeUninit<[u8; 64]>; PIECE / 4]; PANELS]);

impl Unpacked {
    #[inline]
    pub(super) fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PIECE / 4] }; PANELS])
    }

    /// Inputs `inputs`, at most [`PIECE`], of the first `n` panels of a pair. 8-bit codes are read where they lie, others are
    /// unpacked here. Panels beyond `n` are the last one.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn fill<'a, const CODES: u8>(
        &'a mut self,
        pair: &[(&IntegerTile<'a>, usize); PANELS],
        n: usize,
        inputs: Range<usize>,
    ) -> [&'a [[u8; 64]]; PANELS] {
        let fours = inputs.len() / 4;
        if CODES == EIGHT_BIT {
            return std::array::from_fn(|i| {
                let (tile, panel) = pair[i.min(n - 1)];
                &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[inputs.start / 4..][..fours]
            });
        }
        let mut filled: [&[[u8; 64]]; PANELS] = [&[]; PANELS];
        for (i, (to, (tile, panel))) in self.0.iter_mut().zip(pair).enumerate().take(n) {
            let to = &mut to[..fours];
            filled[i] = unpack::<CODES>(tile, *panel, inputs.start, to);
        }
        (n..PANELS).for_each(|i| filled[i] = filled[n - 1]);
        filled
    }
}

/// Writes the codes of inputs `from..` of a panel as signed bytes, steps included: as many inputs as `to` has room for, a
/// multiple of 8.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<'a, const CODES: u8>(
    tile: &IntegerTile<'_>,
    panel: usize,
    from: usize,
    to: &'a mut [MaybeUninit<[u8; 64]>],
) -> &'a [[u8; 64]] {
    let codes = &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[from / 8..];
    let blocks = tile.k / tile.block;
    let (low_mask, mut zero, mut step) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8), _mm512_set1_epi16(1));
    assert!(to.len() <= codes.len() * 2 && to.len().is_multiple_of(2));
    let (mut k, mut next_block) = (from, from);
    for (pair, codes) in to.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        if CODES == FOUR_BIT_STEPS && k == next_block {
            let block = k / tile.block;
            next_block = (block + 1) * tile.block;
            let steps = load_i8(&tile.offsets[(panel * blocks + block) * PANEL..]);
            step = _mm512_or_si512(steps, _mm512_slli_epi32::<16>(steps));
            zero = _mm512_slli_epi16::<3>(step);
            zero = _mm512_or_si512(zero, _mm512_slli_epi16::<8>(zero));
        }
        let codes = load_bytes(codes);
        let nibbles = [_mm512_and_si512(codes, low_mask), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_mask)];
        for (to, mut nibbles) in pair.iter_mut().zip(nibbles) {
            if CODES == FOUR_BIT_STEPS {
                // At most 240: the product of the lower byte does not reach the upper one.
                nibbles = _mm512_mullo_epi16(nibbles, step);
            }
            // SAFETY: 64 bytes, unaligned.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_sub_epi8(nibbles, zero)) };
        }
        k += 8;
    }
    // SAFETY: the loop wrote every element, as the assertion says.
    unsafe { to.assume_init_ref() }
}

/// Inputs of a panel that are unpacked at a time: two panels and 16 rows of two planes of them are 40 KiB, which leaves the first
/// cache room for sums and results.
pub(super) const PIECE: usize = 640;
