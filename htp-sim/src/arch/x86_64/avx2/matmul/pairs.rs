//! Several rows of 16-bit x: both bytes of a value are multiplied at once, by codes that were widened to 16 bits. On AVX2 many rows of
//! 8-bit x, too, by codes of more bits than [`super::bytes`] takes.
//!
//! `vpmaddwd` multiplies 16 bits by 16: as much at a time as bytes of x by bytes in two instructions, or in four if codes have 8 bits.
//! Sums come out whole. Codes are widened once for all rows, a piece of k at a time, so that they stay in the first cache. Their
//! zero is taken off then, so that sums need no correction. Both halves of a panel share each load of x.
//!
//! A value of x can be less than 16 bits hold: `256 · hi + lo` with both signed. Plus 128 it never is. What the 128 adds,
//! `128 · Σ code`, is the same for all rows and taken off where sums start.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::split::{join, upper_bits};
use super::{
    BLOCKS, CHANNELS, Dot, LANES, NARROW_CHANNELS, STEPS, code_bytes, load_f16, load_f32, load_half, load_i8,
    load_steps, nibbles, store,
};
use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, prefetch};
use crate::kernels::{IntegerTile, MAX_TILE_ROWS};
use crate::packed::{BlockOffset, MAX_BLOCK, PANEL};

/// Computes the tile, if it is one for these kernels. Says whether it did.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product<D: Dot, const BITS: usize, const SCALES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) -> bool {
    // Constants first: what they rule out is not compiled.
    if SCALES == NARROW_CHANNELS || tile.rows < fewest_rows::<BITS, SCALES>() {
        return false;
    }
    if tile.lo.is_empty() && (BITS == 4 || !D::WIDENS_X || tile.rows < FEWEST_ROWS_OF_BYTES) {
        return false;
    }
    if SCALES != BLOCKS && !tile.lo.is_empty() && !sums_fit::<BITS, SCALES>(tile) {
        return false;
    }
    match tile.offset {
        BlockOffset::Integer if SCALES == BLOCKS && BITS < 6 => pieces::<D, BITS, SCALES, INTEGER>(tile, out),
        BlockOffset::Min if SCALES == BLOCKS && BITS < 6 => pieces::<D, BITS, SCALES, MIN>(tile, out),
        _ => pieces::<D, BITS, SCALES, SYMMETRIC>(tile, out),
    }
    true
}

/// Whether sums over all of k fit 32 bits: then those of each byte of x fit a float, and both make the same float.
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_fit<const BITS: usize, const SCALES: u8>(tile: &IntegerTile<'_>) -> bool {
    // With a step of at most `MAX_STEP` 4 bits come to 128, too.
    let largest = if BITS == 4 && SCALES == CHANNELS { 8 } else { 128 };
    tile.k * largest <= MAX_CODE_SUM || (0..tile.panels).all(|panel| panel_sums_fit::<BITS, SCALES>(tile, panel))
}

/// As [`sums_fit`], one panel: with its steps, if it has some, and the largest codes, else with its codes.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_sums_fit<const BITS: usize, const SCALES: u8>(tile: &IntegerTile<'_>, panel: usize) -> bool {
    if SCALES == STEPS && steps_fit(tile, panel) {
        return true;
    }
    let (one, ones) = (_mm256_set1_epi16(1), _mm256_set1_epi8(1));
    let block = if SCALES == STEPS { tile.block } else { tile.k };
    let codes = &tile.codes[panel * tile.panel_bytes..][..code_bytes::<BITS>(tile.k)];
    let mut sums = [_mm256_setzero_si256(); 2];
    for (i, codes) in codes.chunks_exact(code_bytes::<BITS>(block)).enumerate() {
        let mut steps = [one; 2];
        if SCALES == STEPS {
            let at = (panel * (tile.k / block) + i) * PANEL;
            steps = [load_steps(&tile.offsets[at..]), load_steps(&tile.offsets[at + LANES..])];
        }
        for row in codes.as_chunks::<64>().0 {
            for half in 0..2 {
                let codes = load_half::<false>(&row[half * LANES * 4..]);
                let magnitudes = if BITS == 8 {
                    _mm256_abs_epi8(codes)
                } else {
                    let (zero, [first, second]) = (_mm256_set1_epi8(8), nibbles(codes));
                    let (first, second) = (_mm256_sub_epi8(first, zero), _mm256_sub_epi8(second, zero));
                    _mm256_add_epi8(_mm256_abs_epi8(first), _mm256_abs_epi8(second))
                };
                let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, ones), steps[half]);
                sums[half] = _mm256_add_epi32(sums[half], pairs);
            }
        }
    }
    let too_large = _mm256_cmpgt_epi32(_mm256_max_epi32(sums[0], sums[1]), _mm256_set1_epi32(MAX_CODE_SUM as i32));
    _mm256_testz_si256(too_large, too_large) == 1
}

/// Whether the sums of a panel with steps fit whatever its codes are: there are many codes to a step.
#[target_feature(enable = "avx2,fma,f16c")]
fn steps_fit(tile: &IntegerTile<'_>, panel: usize) -> bool {
    let blocks = tile.k / tile.block;
    let mut sums = [0_u32; PANEL];
    for steps in tile.offsets[panel * blocks * PANEL..].as_chunks::<PANEL>().0.iter().take(blocks) {
        sums.iter_mut().zip(steps).for_each(|(sum, step)| *sum += u32::from(*step));
    }
    sums.iter().all(|sum| *sum as usize * tile.block * 8 <= MAX_CODE_SUM)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn pieces<D: Dot, const BITS: usize, const SCALES: u8, const OFFSET: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let (mut x, mut codes) = (Values::uninit(), Widened::uninit());
    let whole_blocks = if SCALES == CHANNELS { PIECE } else { PIECE / tile.block * tile.block };
    let block = if SCALES == BLOCKS { tile.block } else { PIECE };
    for from in (0..tile.k).step_by(whole_blocks) {
        let inputs = from..tile.k.min(from + whole_blocks);
        x.load::<BITS>(tile, &inputs);
        let (blocks, first_block) = (tile.k / tile.block, from / tile.block);
        for panel in 0..tile.panels {
            codes.load::<BITS, SCALES, OFFSET>(tile, panel, &inputs);
            // Memory is read while this panel is multiplied.
            codes_of::<BITS>(tile, panel + 1, &inputs).into_iter().for_each(prefetch);
            let piece = Piece { tile, panel, inputs: inputs.clone(), block, blocks, first_block, x: &x, codes: &codes };
            let mut row = 0;
            while row < tile.rows {
                row += match tile.rows - row {
                    4.. => piece.rows::<D, SCALES, OFFSET, 4>(row, out),
                    3 => piece.rows::<D, SCALES, OFFSET, 3>(row, out),
                    2 => piece.rows::<D, SCALES, OFFSET, 2>(row, out),
                    _ => piece.rows::<D, SCALES, OFFSET, 1>(row, out),
                };
            }
        }
    }
}

/// The codes of a panel for some inputs; `None` behind the last panel of the weights.
pub(super) fn codes_of<'a, const BITS: usize>(
    tile: &IntegerTile<'a>,
    panel: usize,
    inputs: &Range<usize>,
) -> Option<&'a [u8]> {
    tile.codes.get(panel * tile.panel_bytes..)?.get(code_bytes::<BITS>(inputs.start)..code_bytes::<BITS>(inputs.end))
}

/// Some inputs of one panel, and of all rows.
struct Piece<'a, 't> {
    tile: &'a IntegerTile<'t>,
    panel: usize,
    inputs: Range<usize>,
    /// Inputs after which sums start anew: a block's, or all of the piece.
    block: usize,
    /// Blocks in all, and before this piece.
    blocks: usize,
    first_block: usize,
    x: &'a Values,
    codes: &'a Widened,
}

impl Piece<'_, '_> {
    /// Adds the piece to `ROWS` rows of `out`, which has the sums of those before: floats of block weights, else integers. The last
    /// piece makes it the product. Returns `ROWS`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rows<D: Dot, const SCALES: u8, const OFFSET: u8, const ROWS: usize>(
        &self,
        row: usize,
        out: &mut [f32],
    ) -> usize {
        let tile = self.tile;
        let place = |r: usize, half: usize| ((row + r) * tile.panels + self.panel) * PANEL + half * LANES;
        let mut totals = [[_mm256_setzero_ps(); 2]; ROWS];
        if self.inputs.start > 0 {
            for (r, totals) in totals.iter_mut().enumerate() {
                for (half, total) in totals.iter_mut().enumerate() {
                    *total = load(&out[place(r, half)..]);
                }
            }
        }
        let x: [_; ROWS] = std::array::from_fn(|r| self.x.row(row + r));
        let codes = &self.codes.codes[..self.inputs.len() / 4];
        for (segment, codes) in codes.chunks(self.block / 4).enumerate() {
            let mut sums = [self.codes.start(segment); ROWS];
            for (group, codes) in codes.iter().enumerate() {
                // SAFETY: `Widened::load` wrote all inputs of the piece.
                let [even, odd] = unsafe { codes.assume_init_ref() };
                let at = segment * self.block / 2 + group * 2;
                for (x, sums) in x.iter().zip(&mut sums) {
                    // SAFETY: `Values::load` wrote two pairs for each four inputs; the table's `D` is one that the CPU has.
                    unsafe {
                        let pair = _mm256_set1_epi32(*x.add(at));
                        sums[0] = D::pairs(sums[0], even[0], pair);
                        sums[1] = D::pairs(sums[1], even[1], pair);
                        let pair = _mm256_set1_epi32(*x.add(at + 1));
                        sums[0] = D::pairs(sums[0], odd[0], pair);
                        sums[1] = D::pairs(sums[1], odd[1], pair);
                    }
                }
            }
            if SCALES == BLOCKS {
                let block = self.first_block + segment;
                let at = (self.panel * self.blocks + block) * PANEL;
                let scales = load_f16s(&tile.scales[at * 2..]);
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    totals[0] = _mm256_fmadd_ps(scales[0], _mm256_cvtepi32_ps(sums[0]), totals[0]);
                    totals[1] = _mm256_fmadd_ps(scales[1], _mm256_cvtepi32_ps(sums[1]), totals[1]);
                }
                if OFFSET == MIN {
                    let mins = load_f16s(&tile.offsets[at * 2..]);
                    for (r, totals) in totals.iter_mut().enumerate() {
                        let x_sum = _mm256_cvtepi32_ps(_mm256_set1_epi32(tile.sums[(row + r) * self.blocks + block]));
                        totals[0] = _mm256_fmadd_ps(mins[0], x_sum, totals[0]);
                        totals[1] = _mm256_fmadd_ps(mins[1], x_sum, totals[1]);
                    }
                }
            } else {
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    for (total, sum) in totals.iter_mut().zip(sums) {
                        *total = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(*total), sum));
                    }
                }
            }
        }
        for (r, totals) in totals.into_iter().enumerate() {
            for (half, total) in totals.into_iter().enumerate() {
                let last = self.inputs.end == tile.k;
                let value = if last { finish::<SCALES>(tile, self.panel, row + r, half, total) } else { total };
                store(&mut out[place(r, half)..], value);
            }
        }
        ROWS
    }
}

/// Values of x plus 128, of some rows and the inputs of a piece: of each four inputs the first and third, then the others.
struct Values([[MaybeUninit<i32>; PIECE / 2]; MAX_TILE_ROWS]);

impl Values {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PIECE / 2] }; MAX_TILE_ROWS])
    }

    /// Joins the planes of all rows of the tile.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load<const BITS: usize>(&mut self, tile: &IntegerTile<'_>, inputs: &Range<usize>) {
        const EVEN: u32 = 0x00ff_00ff;
        // The only plane of 8-bit x has the low bytes.
        let only = BITS != 4 && tile.lo.is_empty();
        let hi_bits = if only { 0 } else { u32::MAX };
        for (row, to) in self.0[..tile.rows].iter_mut().enumerate() {
            let plane = |plane: &[i8]| plane[row * tile.x_stride..][inputs.clone()].as_ptr().cast::<u32>();
            let (hi, lo) = (plane(tile.hi), plane(if only { tile.hi } else { tile.lo }));
            for (four, to) in to[..inputs.len() / 2].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                // SAFETY: `plane` has the inputs, four for each of these; the reads are unaligned.
                let (hi, lo) =
                    unsafe { (hi.add(four).read_unaligned() & hi_bits, lo.add(four).read_unaligned() ^ 0x8080_8080) };
                let (even, odd) = ((hi & EVEN) << 8 | lo & EVEN, hi & !EVEN | lo >> 8 & EVEN);
                to[0].write(even.cast_signed());
                to[1].write(odd.cast_signed());
            }
        }
    }

    /// Pairs of a row's values.
    #[inline]
    fn row(&self, row: usize) -> *const i32 {
        self.0[row].as_ptr().cast()
    }
}

/// Codes of a panel for the inputs of a piece, widened to 16 bits: of each four inputs the first and third, then the others; of
/// each both halves of the panel. And what sums start with.
struct Widened {
    codes: [Group; PIECE / 4],
    starts: [MaybeUninit<[__m256i; 2]>; PIECE / SMALLEST_BLOCK],
}

impl Widened {
    #[inline]
    fn uninit() -> Self {
        Self {
            codes: [const { MaybeUninit::uninit() }; PIECE / 4],
            starts: [const { MaybeUninit::uninit() }; PIECE / SMALLEST_BLOCK],
        }
    }

    /// Widens the codes of some inputs of a panel.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load<const BITS: usize, const SCALES: u8, const OFFSET: u8>(
        &mut self,
        tile: &IntegerTile<'_>,
        panel: usize,
        inputs: &Range<usize>,
    ) {
        let codes = codes_of::<BITS>(tile, panel, inputs).expect("the tile has the codes of its panels");
        let block = if SCALES == CHANNELS { inputs.len() } else { tile.block };
        let (blocks, first) = (tile.k / block, inputs.start / block);
        let mut total = [_mm256_setzero_si256(); 2];
        for (i, codes) in codes.chunks_exact(code_bytes::<BITS>(block)).enumerate() {
            let at = (panel * blocks + first + i) * PANEL;
            let mut widener = Widener::new::<BITS, SCALES, OFFSET>(tile, at);
            widener.widen::<BITS, SCALES, OFFSET>(codes, &mut self.codes[i * block / 4..][..block / 4]);
            if SCALES == BLOCKS {
                self.starts[i].write(widener.start);
            } else {
                total[0] = _mm256_add_epi32(total[0], widener.start[0]);
                total[1] = _mm256_add_epi32(total[1], widener.start[1]);
            }
        }
        if SCALES != BLOCKS {
            self.starts[0].write(total);
        }
    }

    #[inline]
    fn start(&self, segment: usize) -> [__m256i; 2] {
        // SAFETY: `load` wrote one for each block of the piece, or one.
        unsafe { self.starts[segment].assume_init() }
    }
}

/// What it takes to widen the codes of a block.
struct Widener {
    /// What the codes of each output have too much.
    zeros: [__m256i; 2],
    steps: [__m256i; 2],
    /// `-128 · Σ code` so far.
    start: [__m256i; 2],
}

impl Widener {
    /// For the block whose first scale, of all panels', is scale `at`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new<const BITS: usize, const SCALES: u8, const OFFSET: u8>(tile: &IntegerTile<'_>, at: usize) -> Self {
        let none = _mm256_setzero_si256();
        let mut widener = Self { zeros: [none; 2], steps: [none; 2], start: [none; 2] };
        for half in 0..2 {
            let at = at + half * LANES;
            widener.zeros[half] = match OFFSET {
                INTEGER => {
                    let offset = _mm256_sub_epi32(none, load_i8(&tile.offsets[at..]));
                    _mm256_blend_epi16::<0b1010_1010>(offset, _mm256_slli_epi32::<16>(offset))
                }
                _ => _mm256_set1_epi16(1 << (BITS - 1)),
            };
            if SCALES == STEPS {
                widener.steps[half] = load_steps(&tile.offsets[at..]);
            }
        }
        widener
    }

    /// Widens all codes of the block.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn widen<const BITS: usize, const SCALES: u8, const OFFSET: u8>(&mut self, codes: &[u8], to: &mut [Group]) {
        let rows = codes.as_chunks::<64>().0;
        match BITS {
            8 => {
                for (to, row) in to.iter_mut().zip(rows) {
                    let codes = [load_half::<false>(row), load_half::<false>(&row[32..])];
                    self.put::<BITS, SCALES, OFFSET>(codes, to);
                }
            }
            4 => {
                for (to, row) in to.as_chunks_mut::<2>().0.iter_mut().zip(rows) {
                    let (left, right) = (nibbles(load_half::<false>(row)), nibbles(load_half::<false>(&row[32..])));
                    self.put::<BITS, SCALES, OFFSET>([left[0], right[0]], &mut to[0]);
                    self.put::<BITS, SCALES, OFFSET>([left[1], right[1]], &mut to[1]);
                }
            }
            5 => self.widen_split::<BITS, 1, SCALES, OFFSET>(rows, to),
            _ => self.widen_split::<BITS, 2, SCALES, OFFSET>(rows, to),
        }
    }

    /// As [`widen`](Self::widen), for codes of `4 + HIGH` bits.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn widen_split<const BITS: usize, const HIGH: usize, const SCALES: u8, const OFFSET: u8>(
        &mut self,
        rows: &[[u8; 64]],
        to: &mut [Group],
    ) {
        let mut to = to.as_chunks_mut::<2>().0.iter_mut();
        for rows in rows.chunks_exact(4 / HIGH + 1) {
            for (i, pair) in rows[..4 / HIGH].chunks_exact(2 / HIGH).enumerate() {
                let (mut left, mut right) = (upper_bits::<HIGH>(rows, 0, i), upper_bits::<HIGH>(rows, 32, i));
                for (row, to) in pair.iter().zip(&mut to) {
                    let left = join::<HIGH>(load_half::<false>(row), &mut left);
                    let right = join::<HIGH>(load_half::<false>(&row[32..]), &mut right);
                    self.put::<BITS, SCALES, OFFSET>([left.0, right.0], &mut to[0]);
                    self.put::<BITS, SCALES, OFFSET>([left.1, right.1], &mut to[1]);
                }
            }
        }
    }

    /// Widens the codes of four inputs, both halves of the panel.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn put<const BITS: usize, const SCALES: u8, const OFFSET: u8>(&mut self, codes: [__m256i; 2], to: &mut Group) {
        let mut widened = [[_mm256_setzero_si256(); 2]; 2];
        for half in 0..2 {
            let codes = codes[half];
            let (mut even, mut odd) = if BITS == 8 {
                (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(codes)), _mm256_srai_epi16::<8>(codes))
            } else {
                (_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(codes))
            };
            if BITS < 8 && OFFSET != MIN {
                even = _mm256_sub_epi16(even, self.zeros[half]);
                odd = _mm256_sub_epi16(odd, self.zeros[half]);
            }
            if SCALES == STEPS {
                even = _mm256_mullo_epi16(even, self.steps[half]);
                odd = _mm256_mullo_epi16(odd, self.steps[half]);
            }
            let excess = _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(128));
            self.start[half] = _mm256_sub_epi32(self.start[half], excess);
            widened[0][half] = even;
            widened[1][half] = odd;
        }
        to.write(widened);
    }
}

/// The product of a row and half a panel, of the sums of all inputs: floats of block weights, else integers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn finish<const SCALES: u8>(
    tile: &IntegerTile<'_>,
    panel: usize,
    row: usize,
    half: usize,
    total: __m256,
) -> __m256 {
    let x_scale = _mm256_set1_ps(tile.x_scales[row]);
    if SCALES == BLOCKS {
        return _mm256_mul_ps(total, x_scale);
    }
    let scale = load_f32(&tile.scales[(panel * PANEL + half * LANES) * 4..]);
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(total)), _mm256_mul_ps(scale, x_scale))
}

/// Codes of four inputs, see [`Widened`].
type Group = MaybeUninit<[[__m256i; 2]; 2]>;

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(from: &[f32]) -> __m256 {
    // SAFETY: the slice has eight values (checked here), unaligned.
    unsafe { _mm256_loadu_ps(from[..LANES].as_ptr()) }
}

/// The sixteen half floats of a panel.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn load_f16s(from: &[u8]) -> [__m256; 2] {
    let from = &from[..PANEL * 2];
    [load_f16(from), load_f16(&from[LANES * 2..])]
}

/// Magnitudes of an output's codes, added up, at most: none of x is above `128 · 257`.
pub(super) const MAX_CODE_SUM: usize = (i32::MAX / (128 * 257)) as usize;

// So the sums of either byte of x are exact as floats, of 24 bits.
const _: () = assert!(MAX_CODE_SUM * 128 <= 1 << 24);

/// Inputs of a piece: 8 KiB of codes.
const PIECE: usize = MAX_BLOCK;

/// Inputs of a block, at least.
const SMALLEST_BLOCK: usize = 4;

/// With fewer rows widening takes longer than it saves: 8 rows with Q4_1 and 4 with LPBQ weights of SmolLM2-135M, measured by
/// `genie-bench` on Zen 4, were as fast without.
const fn fewest_rows<const BITS: usize, const SCALES: u8>() -> usize {
    match (BITS, SCALES) {
        (8, _) => 2,
        (_, BLOCKS) => 12,
        _ => 6,
    }
}

/// The same for 8-bit x and codes of more than 4 bits, measured on Zen 3: by 4 rows it was 1.1 to 1.2 times slower, by 12 as fast or
/// 1.2 times faster.
const FEWEST_ROWS_OF_BYTES: usize = 12;
