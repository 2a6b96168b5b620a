//! Matrix products of one tile, half a panel (8 outputs) to a register.
//!
//! `vpmaddubsw` adds two products in 16 bits and saturates, so the codes are cut to 4 bits: `15 · 128 · 2 = 3840`, and
//! eight such sums still fit. 8-bit codes plus 128 are `16 · high + low`, each 4 bits. What the 128 adds, `128 · Σx`, is
//! taken off again: exact, since all sums are modulo 2^32 and the true ones fit.

use std::arch::x86_64::*;

use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, ask_ahead};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, PANEL};

mod bytes;
mod few_rows;
mod float;
mod one_row;
mod pairs;
pub(crate) mod split;
mod steps;

pub(crate) use float::{f32_bf16, f32_f16, f32_f32, f32_w8c};

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if one_row::bytes::product::<false>(tile, out) {
        return;
    }
    per_channel::<Maddubs, 8>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Maddubs, 4>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if one_row::bytes::product::<true>(tile, out) {
        return;
    }
    integer::<Maddubs, 8, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Maddubs, 6, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<Maddubs, 5, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if one_row::product(tile, out) || bytes::product::<BLOCKS>(tile, out) {
        return;
    }
    integer::<Maddubs, 4, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if bytes::product::<STEPS>(tile, out) {
        return;
    }
    integer::<Maddubs, 4, STEPS>(tile, out);
}

/// How a tier multiplies bytes.
pub(crate) trait Dot {
    /// Whether 8-bit x is better made 16-bit than multiplied by [`dots`](Self::dots), unless codes have 4 bits.
    const WIDENS_X: bool;

    /// `start + Σ x · (unsigned code)` over the inputs that `codes` holds; the first of them is input `k` of x. An unsigned
    /// code is the stored one, or the 8-bit one plus 128. `NARROW` panels have 8 or 4 bits.
    ///
    /// # Safety
    /// Each plane of each row has the inputs from `k` on that `codes` holds, and the CPU has the instructions of the tier.
    unsafe fn dots<const BITS: usize, const NARROW: bool, const HALVES: usize, const PLANES: usize, const ROWS: usize>(
        codes: Codes<'_>,
        planes: &Planes<PLANES>,
        k: usize,
        start: Sums<HALVES, PLANES, ROWS>,
    ) -> Sums<HALVES, PLANES, ROWS>;

    /// Adds to each sum the products of two 16-bit integers by two others.
    ///
    /// # Safety
    /// The CPU has the instructions of the tier.
    unsafe fn pairs(sums: __m256i, a: __m256i, b: __m256i) -> __m256i;
}

/// Sums of some halves of a panel, planes and rows.
pub(crate) type Sums<const HALVES: usize, const PLANES: usize, const ROWS: usize> = [[[__m256i; HALVES]; PLANES]; ROWS];

/// Plain AVX2.
struct Maddubs;

impl Dot for Maddubs {
    const WIDENS_X: bool = true;

    #[inline(always)]
    unsafe fn dots<
        const BITS: usize,
        const NARROW: bool,
        const HALVES: usize,
        const PLANES: usize,
        const ROWS: usize,
    >(
        codes: Codes<'_>,
        planes: &Planes<PLANES>,
        k: usize,
        start: Sums<HALVES, PLANES, ROWS>,
    ) -> Sums<HALVES, PLANES, ROWS> {
        // SAFETY: the caller's promise.
        unsafe {
            match BITS {
                6 => split::dots::<2, HALVES, PLANES, ROWS>(codes, planes, k, start),
                5 => split::dots::<1, HALVES, PLANES, ROWS>(codes, planes, k, start),
                _ => dots::<BITS, NARROW, HALVES, PLANES, ROWS>(codes, planes, k, start),
            }
        }
    }

    #[inline(always)]
    unsafe fn pairs(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn per_channel<D: Dot, const BITS: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if BITS == 8 && few_rows::product::<D>(tile, out) {
        return;
    }
    if tile.width == PANEL {
        integer::<D, BITS, CHANNELS>(tile, out);
    } else {
        integer::<D, BITS, NARROW_CHANNELS>(tile, out);
    }
}

/// Cuts the rows of a tile into groups that the kernels were compiled for.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn integer<D: Dot, const BITS: usize, const SCALES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if pairs::product::<D, BITS, SCALES>(tile, out) {
        return;
    }
    if SCALES == STEPS {
        return steps::product(tile, out);
    }
    for panel in 0..tile.panels {
        let mut row = 0;
        while row < tile.rows {
            let at = Place { panel, row };
            row += match (tile.lo.is_empty(), tile.rows - row) {
                (true, 4..) => panel_rows::<D, BITS, SCALES, 1, 4>(tile, at, out),
                (true, 2..) => panel_rows::<D, BITS, SCALES, 1, 2>(tile, at, out),
                (true, _) => panel_rows::<D, BITS, SCALES, 1, 1>(tile, at, out),
                (false, 2..) => panel_rows::<D, BITS, SCALES, 2, 2>(tile, at, out),
                (false, _) => panel_rows::<D, BITS, SCALES, 2, 1>(tile, at, out),
            };
        }
    }
}

/// A panel of the tile and the first of some rows.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    row: usize,
}

/// One panel by `ROWS` rows; returns `ROWS`.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_rows<D: Dot, const BITS: usize, const SCALES: u8, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    out: &mut [f32],
) -> usize {
    // One row leaves room for the sums of both halves, which then share the loads of x.
    if ROWS == 1 && tile.width > LANES {
        panel_halves::<D, BITS, SCALES, 2, PLANES, ROWS>(tile, at, 0, out);
    } else {
        for half in 0..tile.width.div_ceil(LANES) {
            panel_halves::<D, BITS, SCALES, 1, PLANES, ROWS>(tile, at, half, out);
        }
    }
    ROWS
}

/// As [`panel_rows`], some halves of the panel from `half` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel_halves<
    D: Dot,
    const BITS: usize,
    const SCALES: u8,
    const HALVES: usize,
    const PLANES: usize,
    const ROWS: usize,
>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
    out: &mut [f32],
) {
    let values = match SCALES {
        BLOCKS => block_floats::<D, BITS, HALVES, PLANES, ROWS>(tile, at, half),
        CHANNELS => channel_floats::<D, BITS, false, HALVES, PLANES, ROWS>(tile, at, half),
        _ => channel_floats::<D, BITS, true, HALVES, PLANES, ROWS>(tile, at, half),
    };
    store_rows(tile, at, half, values, out);
}

/// Writes some halves of a panel, from half `half` on, of `ROWS` rows.
#[inline]
#[target_feature(enable = "avx2")]
fn store_rows<const HALVES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
    values: [[__m256; HALVES]; ROWS],
    out: &mut [f32],
) {
    for (i, values) in values.into_iter().enumerate() {
        for (half, values) in (half..).zip(values) {
            store(&mut out[((at.row + i) * tile.panels + at.panel) * PANEL + half * LANES..], values);
        }
    }
}

/// The finished floats of some halves of a panel and `ROWS` rows, per-channel weights.
#[target_feature(enable = "avx2,fma,f16c")]
fn channel_floats<
    D: Dot,
    const BITS: usize,
    const NARROW: bool,
    const HALVES: usize,
    const PLANES: usize,
    const ROWS: usize,
>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
) -> [[__m256; HALVES]; ROWS] {
    let zero = 1 << (BITS - 1);
    let planes = Planes::<PLANES>::new(tile, at.row);
    let width = if NARROW { tile.width } else { PANEL };
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..code_bytes::<BITS>(tile.k) / PANEL * width];
    let codes = Codes { bytes: codes, row_bytes: width * 4, half };
    let mut start = [[[_mm256_setzero_si256(); HALVES]; PLANES]; ROWS];
    for (row, start) in start.iter_mut().enumerate() {
        for (plane, start) in start.iter_mut().enumerate() {
            *start = [_mm256_set1_epi32(tile.plane_sums[at.row + row][plane].wrapping_mul(-zero)); HALVES];
        }
    }
    // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); the table's `D` is one that the CPU has.
    let dots = unsafe { D::dots::<BITS, NARROW, HALVES, PLANES, ROWS>(codes, &planes, 0, start) };
    channel_finish(tile, at, half, dots)
}

/// The floats of the planes' integers, with a scale per output.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn channel_finish<const HALVES: usize, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
    dots: Sums<HALVES, PLANES, ROWS>,
) -> [[__m256; HALVES]; ROWS] {
    let mut values = [[_mm256_setzero_ps(); HALVES]; ROWS];
    for h in 0..HALVES {
        let scales = load_f32(&tile.scales[(at.panel * PANEL + (half + h) * LANES) * 4..]);
        for (row, values) in values.iter_mut().enumerate() {
            let scale = _mm256_mul_ps(scales, _mm256_set1_ps(tile.x_scales[at.row + row]));
            let mut dot = _mm256_cvtepi32_ps(dots[row][0][h]);
            if PLANES == 2 {
                let low = _mm256_cvtepi32_ps(dots[row][PLANES - 1][h]);
                dot = _mm256_add_ps(_mm256_mul_ps(dot, _mm256_set1_ps(256.0)), low);
            }
            values[h] = _mm256_mul_ps(dot, scale);
        }
    }
    values
}

/// The finished floats of some halves of a panel and `ROWS` rows, block weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_floats<D: Dot, const BITS: usize, const HALVES: usize, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
) -> [[__m256; HALVES]; ROWS] {
    match tile.offset {
        BlockOffset::Integer if BITS < 6 => offset_floats::<D, BITS, INTEGER, HALVES, PLANES, ROWS>(tile, at, half),
        BlockOffset::Min if BITS < 6 => offset_floats::<D, BITS, MIN, HALVES, PLANES, ROWS>(tile, at, half),
        // Codes of 6 and 8 bits have no other.
        _ => offset_floats::<D, BITS, SYMMETRIC, HALVES, PLANES, ROWS>(tile, at, half),
    }
}

/// As [`block_floats`], for one kind of offsets.
#[target_feature(enable = "avx2,fma,f16c")]
fn offset_floats<
    D: Dot,
    const BITS: usize,
    const OFFSET: u8,
    const HALVES: usize,
    const PLANES: usize,
    const ROWS: usize,
>(
    tile: &IntegerTile<'_>,
    at: Place,
    half: usize,
) -> [[__m256; HALVES]; ROWS] {
    let planes = Planes::<PLANES>::new(tile, at.row);
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<BITS>(tile.block);
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..blocks * block_bytes];
    let first = at.panel * blocks * PANEL;
    let scales = &tile.scales[first * 2..][..blocks * PANEL * 2];
    let mut sums = [&tile.sums[..0]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = &tile.sums[(at.row + row) * blocks..][..blocks];
    }
    let mut acc = [[_mm256_setzero_ps(); HALVES]; ROWS];
    for (block, (codes, scales)) in codes.chunks_exact(block_bytes).zip(scales.chunks_exact(PANEL * 2)).enumerate() {
        let codes = Codes { bytes: codes, row_bytes: 64, half };
        let start = [[[_mm256_setzero_si256(); HALVES]; PLANES]; ROWS];
        // SAFETY: as in `channel_floats`; this block is inside these bytes.
        let dots = unsafe { D::dots::<BITS, false, HALVES, PLANES, ROWS>(codes, &planes, block * tile.block, start) };
        for h in 0..HALVES {
            let lane = (half + h) * LANES;
            let scale = load_f16(&scales[lane * 2..]);
            let lanes_at = first + block * PANEL + lane;
            for row in 0..ROWS {
                let sum = _mm256_set1_epi32(sums[row][block]);
                let mut dot = match PLANES {
                    1 => dots[row][0][h],
                    _ => _mm256_add_epi32(_mm256_slli_epi32::<8>(dots[row][0][h]), dots[row][PLANES - 1][h]),
                };
                // Codes are unsigned here, and too large by half of what they can be: 8-bit codes were made so, others are
                // stored so. An offset is that of the stored codes.
                if OFFSET == SYMMETRIC {
                    dot = _mm256_sub_epi32(dot, _mm256_sll_epi32(sum, _mm_cvtsi32_si128(BITS as i32 - 1)));
                }
                if OFFSET == INTEGER {
                    dot = _mm256_add_epi32(dot, _mm256_mullo_epi32(load_i8(&tile.offsets[lanes_at..]), sum));
                }
                let acc = &mut acc[row][h];
                *acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), *acc);
                if OFFSET == MIN {
                    let min = load_f16(&tile.offsets[lanes_at * 2..]);
                    *acc = _mm256_fmadd_ps(min, _mm256_cvtepi32_ps(sum), *acc);
                }
            }
        }
    }
    for (row, acc) in acc.iter_mut().enumerate() {
        for acc in acc {
            *acc = _mm256_mul_ps(*acc, _mm256_set1_ps(tile.x_scales[at.row + row]));
        }
    }
    acc
}

/// The planes of x from some row on.
pub(crate) struct Planes<const PLANES: usize> {
    start: [*const i8; PLANES],
    stride: usize,
}

impl<const PLANES: usize> Planes<PLANES> {
    fn new(tile: &IntegerTile<'_>, row: usize) -> Self {
        let at = row * tile.x_stride;
        let mut start = [tile.hi[at..].as_ptr(); PLANES];
        if PLANES == 2 {
            start[PLANES - 1] = tile.lo[at..].as_ptr();
        }
        Self { start, stride: tile.x_stride }
    }

    /// Four inputs of a row, eight times.
    ///
    /// # Safety
    /// The plane has bytes `k..k + 4` of this row.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) unsafe fn broadcast(&self, plane: usize, row: usize, k: usize) -> __m256i {
        // SAFETY: the caller's promise; the read is unaligned.
        unsafe { _mm256_set1_epi32(self.start[plane].add(row * self.stride + k).cast::<i32>().read_unaligned()) }
    }

    /// The inputs of the first row, from input `k` on.
    fn at_input(&self, k: usize) -> [*const i8; PLANES] {
        let mut from = self.start;
        for from in &mut from {
            *from = from.wrapping_add(k);
        }
        from
    }

    /// Eight inputs of a row, and eight zeros.
    ///
    /// # Safety
    /// The plane has bytes `k..k + 8` of this row.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn eight(&self, plane: usize, row: usize, k: usize) -> __m128i {
        // SAFETY: the caller's promise; the read is unaligned.
        unsafe { _mm_loadl_epi64(self.start[plane].add(row * self.stride + k).cast()) }
    }
}

/// Codes of one panel for some inputs, in rows of 64 bytes, or of fewer where the panel is narrow; and the first half that is meant.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) row_bytes: usize,
    pub(crate) half: usize,
}

/// `start + Σ x · (unsigned code)` over the inputs that `codes` holds; the first of them is input `k` of x.
///
/// # Safety
/// Each plane of each row has the inputs from `k` on that `codes` holds.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const BITS: usize, const NARROW: bool, const HALVES: usize, const PLANES: usize, const ROWS: usize>(
    codes: Codes<'_>,
    planes: &Planes<PLANES>,
    mut k: usize,
    start: Sums<HALVES, PLANES, ROWS>,
) -> Sums<HALVES, PLANES, ROWS> {
    let mut acc = start;
    // The top bit of an 8-bit code is the top bit of its high nibble: adding 128 flips it.
    let flip = _mm256_set1_epi8(8);
    let (step, high_weight) = if BITS == 4 { (8, 1) } else { (4, 16) };
    let row_bytes = if NARROW { codes.row_bytes } else { 64 };
    let half = codes.half;
    // 32 inputs: as many sums as 16 bits hold.
    for codes in codes.bytes.chunks(32 / step * row_bytes) {
        let mut low = [[[_mm256_setzero_si256(); HALVES]; PLANES]; ROWS];
        let mut high = [[[_mm256_setzero_si256(); HALVES]; PLANES]; ROWS];
        for codes in codes.chunks_exact(row_bytes) {
            if ROWS == 1 && half == 0 {
                ask_ahead(codes.as_ptr());
            }
            let (mut first, mut second) = ([_mm256_setzero_si256(); HALVES], [_mm256_setzero_si256(); HALVES]);
            for h in 0..HALVES {
                [first[h], second[h]] = nibbles(load_half::<NARROW>(&codes[(half + h) * LANES * 4..]));
                if BITS == 8 {
                    second[h] = _mm256_xor_si256(second[h], flip);
                }
            }
            for r in 0..ROWS {
                for plane in 0..PLANES {
                    // SAFETY: the caller's promise: `codes` still holds these inputs, eight or four.
                    let x = unsafe { planes.broadcast(plane, r, k) };
                    // SAFETY: as above.
                    let second_x = if BITS == 4 { unsafe { planes.broadcast(plane, r, k + 4) } } else { x };
                    for h in 0..HALVES {
                        let (low, high) = (&mut low[r][plane][h], &mut high[r][plane][h]);
                        *low = _mm256_add_epi16(*low, _mm256_maddubs_epi16(first[h], x));
                        let products = _mm256_maddubs_epi16(second[h], second_x);
                        let second_sum = if BITS == 4 { low } else { high };
                        *second_sum = _mm256_add_epi16(*second_sum, products);
                    }
                }
            }
            k += step;
        }
        for r in 0..ROWS {
            for plane in 0..PLANES {
                for h in 0..HALVES {
                    let acc = &mut acc[r][plane][h];
                    *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(low[r][plane][h], _mm256_set1_epi16(1)));
                    if BITS == 8 {
                        let high = _mm256_madd_epi16(high[r][plane][h], _mm256_set1_epi16(high_weight));
                        *acc = _mm256_add_epi32(*acc, high);
                    }
                }
            }
        }
    }
    acc
}

/// The low and the high four bits of each byte.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn nibbles(codes: __m256i) -> [__m256i; 2] {
    let low_mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(codes, low_mask), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_mask)]
}

/// Bytes of 16 outputs' codes for `k` inputs.
fn code_bytes<const BITS: usize>(k: usize) -> usize {
    k * PANEL * BITS / 8
}

/// The first 32 bytes, or 16 and zeros where a narrow panel has no more.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_half<const NARROW: bool>(from: &[u8]) -> __m256i {
    match from.first_chunk() {
        Some(from) => load_bytes(from),
        None if NARROW => {
            // SAFETY: the slice has 16 bytes (checked here), unaligned.
            _mm256_zextsi128_si256(unsafe { _mm_loadu_si128(from[..16].as_ptr().cast()) })
        }
        None => unreachable!("half a row of a full panel has 32 bytes"),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes(from: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes, unaligned.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(from: &[u8]) -> __m256 {
    // SAFETY: the slice has 32 bytes (checked here), unaligned.
    unsafe { _mm256_loadu_ps(from[..32].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_f16(from: &[u8]) -> __m256 {
    // SAFETY: the slice has 16 bytes (checked here), unaligned.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from[..16].as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i8(from: &[u8]) -> __m256i {
    // SAFETY: the slice has 8 bytes (checked here), unaligned.
    _mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from[..8].as_ptr().cast()) })
}

/// The steps of eight outputs, each in both halves of its lane.
#[inline]
#[target_feature(enable = "avx2")]
fn load_steps(from: &[u8]) -> __m256i {
    let steps = load_i8(from);
    _mm256_or_si256(steps, _mm256_slli_epi32::<16>(steps))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [f32], values: __m256) {
    // SAFETY: the slice has eight values (checked here), unaligned.
    unsafe { _mm256_storeu_ps(to[..LANES].as_mut_ptr(), values) }
}

/// Outputs in a register.
pub(crate) const LANES: usize = 8;

/// What scales the codes have: one for each output, the same in a narrow panel, one for each block, or one
/// for each output and a step for each block.
const CHANNELS: u8 = 0;
const NARROW_CHANNELS: u8 = 1;
pub(crate) const BLOCKS: u8 = 2;
pub(crate) const STEPS: u8 = 3;
