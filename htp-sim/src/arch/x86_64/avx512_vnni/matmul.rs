//! Matrix products of one tile. A register holds the 16 outputs of a panel; up to eight rows of x share each load of
//! weights, and `vpdpbusd` takes x straight from memory as a broadcast of four inputs. Where there are more rows and scales allow
//! it, `many_rows` and `block_rows` do better, and where there are few rows and inputs, `few_rows`.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes, so codes are the unsigned operand: 4-bit codes as they are, 8-bit codes
//! plus 128. What that adds, `128 · Σx`, is taken off again: exact, since all sums are modulo 2^32 and the true ones fit.

mod block_rows;
mod few_rows;
mod float;
mod many_rows;
mod one_row;

use std::arch::x86_64::*;

use crate::arch::x86_64::{INTEGER, MIN, SYMMETRIC, ask_ahead, ask_ahead_of_bytes};
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, PANEL};
pub(crate) use float::{f32_bf16, f32_f16, f32_f32, f32_w8c};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if many_rows::fits(tile) {
        return many_rows::product::<{ many_rows::EIGHT_BIT }>(tile, out);
    }
    if few_rows::fits(tile) {
        return few_rows::product(tile, out);
    }
    per_channel::<8>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if many_rows::fits(tile) {
        return many_rows::product::<{ many_rows::FOUR_BIT }>(tile, out);
    }
    per_channel::<4>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<8, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<6, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<5, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    integer::<4, BLOCKS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if one_row::fits(tile) {
        return match tile.lo.is_empty() {
            true => one_row::product::<1>(tile, out),
            false => one_row::product::<2>(tile, out),
        };
    }
    if many_rows::fits(tile) {
        return many_rows::product::<{ many_rows::FOUR_BIT_STEPS }>(tile, out);
    }
    integer::<4, STEPS>(tile, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn per_channel<const BITS: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if tile.width == PANEL {
        integer::<BITS, CHANNELS>(tile, out);
    } else {
        integer::<BITS, NARROW_CHANNELS>(tile, out);
    }
}

/// Cuts the rows of a tile into groups that the kernels were compiled for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn integer<const BITS: usize, const SCALES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    if tile.lo.is_empty() {
        integer_rows::<BITS, SCALES, 1>(tile, out);
    } else {
        integer_rows::<BITS, SCALES, 2>(tile, out);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn integer_rows<const BITS: usize, const SCALES: u8, const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let mut row = 0;
        while row < tile.rows {
            let at = Place { panel, row };
            row += match tile.rows - row {
                8.. => panel_rows::<BITS, SCALES, PLANES, 8>(tile, at, out),
                4.. => panel_rows::<BITS, SCALES, PLANES, 4>(tile, at, out),
                3 => panel_rows::<BITS, SCALES, PLANES, 3>(tile, at, out),
                2 => panel_rows::<BITS, SCALES, PLANES, 2>(tile, at, out),
                _ => panel_rows::<BITS, SCALES, PLANES, 1>(tile, at, out),
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
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_rows<const BITS: usize, const SCALES: u8, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    out: &mut [f32],
) -> usize {
    let values = match SCALES {
        BLOCKS => block_floats::<BITS, PLANES, ROWS>(tile, at),
        STEPS => step_floats::<PLANES, ROWS>(tile, at),
        CHANNELS => channel_floats::<BITS, false, PLANES, ROWS>(tile, at),
        _ => channel_floats::<BITS, true, PLANES, ROWS>(tile, at),
    };
    for (i, values) in values.into_iter().enumerate() {
        store(&mut out[((at.row + i) * tile.panels + at.panel) * PANEL..], values);
    }
    ROWS
}

/// The finished floats of one panel and `ROWS` rows, per-channel weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn channel_floats<const BITS: usize, const NARROW: bool, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
) -> [__m512; ROWS] {
    let zero = 1 << (BITS - 1);
    let planes = Planes::<PLANES>::new(tile, at.row);
    let codes = Codes::new::<BITS, NARROW>(tile, at.panel);
    let start = channel_start(tile, at, zero);
    // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise).
    let dots = unsafe { dots::<BITS, NARROW, PLANES, ROWS>(codes, &planes, 0, start) };
    channel_finish(tile, at, dots)
}

/// What takes the `zero` off that unsigned codes have too much.
#[inline]
#[target_feature(enable = "avx512f")]
fn channel_start<const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    zero: i32,
) -> [[__m512i; PLANES]; ROWS] {
    let mut start = [[_mm512_setzero_si512(); PLANES]; ROWS];
    for (row, start) in start.iter_mut().enumerate() {
        for (plane, start) in start.iter_mut().enumerate() {
            *start = _mm512_set1_epi32(tile.plane_sums[at.row + row][plane].wrapping_mul(-zero));
        }
    }
    start
}

/// The floats of the planes' integers, with a scale per output.
#[inline]
#[target_feature(enable = "avx512f")]
fn channel_finish<const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    dots: [[__m512i; PLANES]; ROWS],
) -> [__m512; ROWS] {
    let scales = load_f32(&tile.scales[at.panel * PANEL * 4..]);
    let mut values = [_mm512_setzero_ps(); ROWS];
    for (row, value) in values.iter_mut().enumerate() {
        let scale = _mm512_mul_ps(scales, _mm512_set1_ps(tile.x_scales[at.row + row]));
        let mut dot = _mm512_cvtepi32_ps(dots[row][0]);
        if PLANES == 2 {
            // The product is exact, so that one rounding makes no difference.
            dot = _mm512_fmadd_ps(dot, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(dots[row][PLANES - 1]));
        }
        *value = _mm512_mul_ps(dot, scale);
    }
    values
}

/// The finished floats of one panel and `ROWS` rows, weights with a step per block.
///
/// `u · step` is at most 240, so that a 16-bit product multiplies two codes at once; `128 - 8 · step` more makes it the code
/// plus 128, what `vpdpbusd` takes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn step_floats<const PLANES: usize, const ROWS: usize>(tile: &IntegerTile<'_>, at: Place) -> [__m512; ROWS] {
    let planes = Planes::<PLANES>::new(tile, at.row);
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<4>(tile.block);
    let codes = &tile.codes[at.panel * tile.panel_bytes..][..blocks * block_bytes];
    let steps = &tile.offsets[at.panel * blocks * PANEL..][..blocks * PANEL];
    let mut acc = channel_start::<PLANES, ROWS>(tile, at, 128);
    // As in `dots`.
    let mut odd = [[_mm512_setzero_si512(); PLANES]; ROWS];
    let low_mask = _mm512_set1_epi8(15);
    let mut k = 0;
    for (codes, steps) in codes.chunks_exact(block_bytes).zip(steps.chunks_exact(PANEL)) {
        let step = load_i8(steps);
        let step = _mm512_or_si512(step, _mm512_slli_epi32::<16>(step));
        let bias = _mm512_sub_epi16(_mm512_set1_epi16(128), _mm512_slli_epi16::<3>(step));
        let bias = _mm512_or_si512(bias, _mm512_slli_epi16::<8>(bias));
        for row in codes.as_chunks::<64>().0 {
            if ROWS == 1 {
                ask_ahead(row.as_ptr());
            }
            let codes = load_bytes(row);
            let first = _mm512_mullo_epi16(_mm512_and_si512(codes, low_mask), step);
            let second = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_mask), step);
            let (first, second) = (_mm512_add_epi8(first, bias), _mm512_add_epi8(second, bias));
            for r in 0..ROWS {
                for plane in 0..PLANES {
                    // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are eight of them.
                    let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                    acc[r][plane] = _mm512_dpbusd_epi32(acc[r][plane], first, x);
                    let second_acc = if ROWS <= 2 { &mut odd[r][plane] } else { &mut acc[r][plane] };
                    *second_acc = _mm512_dpbusd_epi32(*second_acc, second, next_x);
                }
            }
            k += 8;
        }
    }
    if ROWS <= 2 {
        for (acc, odd) in acc.as_flattened_mut().iter_mut().zip(odd.as_flattened()) {
            *acc = _mm512_add_epi32(*acc, *odd);
        }
    }
    channel_finish(tile, at, acc)
}

/// The finished floats of one panel and `ROWS` rows, block weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn block_floats<const BITS: usize, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
) -> [__m512; ROWS] {
    match tile.offset {
        BlockOffset::Integer if BITS < 6 => offset_floats::<BITS, INTEGER, PLANES, ROWS>(tile, at),
        BlockOffset::Min if BITS < 6 => offset_floats::<BITS, MIN, PLANES, ROWS>(tile, at),
        // Codes of 6 and 8 bits have no other.
        _ => offset_floats::<BITS, SYMMETRIC, PLANES, ROWS>(tile, at),
    }
}

/// As [`block_floats`], for one kind of offsets.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn offset_floats<const BITS: usize, const OFFSET: u8, const PLANES: usize, const ROWS: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
) -> [__m512; ROWS] {
    if BITS == 4 && ROWS == 8 && block_rows::fits(tile) {
        return block_rows::floats::<OFFSET, PLANES, ROWS>(tile, at);
    }
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
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for (block, (codes, scales)) in codes.chunks_exact(block_bytes).zip(scales.chunks_exact(PANEL * 2)).enumerate() {
        let k = block * tile.block;
        // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise), and this block is inside them.
        let dots = unsafe {
            match BITS {
                6 => split_dots::<2, PLANES, ROWS>(codes, &planes, k),
                5 => split_dots::<1, PLANES, ROWS>(codes, &planes, k),
                _ => {
                    let start = [[_mm512_setzero_si512(); PLANES]; ROWS];
                    dots::<BITS, false, PLANES, ROWS>(Codes { bytes: codes, row_bytes: 64 }, &planes, k, start)
                }
            }
        };
        let scale = load_f16(scales);
        for row in 0..ROWS {
            let sum = _mm512_set1_epi32(sums[row][block]);
            let mut dot = match PLANES {
                1 => dots[row][0],
                _ => _mm512_add_epi32(_mm512_slli_epi32::<8>(dots[row][0]), dots[row][PLANES - 1]),
            };
            // Codes are unsigned here, and too large by half of what they can be: 8-bit codes were made so, others are stored
            // so. An offset is that of the stored codes.
            if OFFSET == SYMMETRIC {
                dot = _mm512_sub_epi32(dot, _mm512_sll_epi32(sum, _mm_cvtsi32_si128(BITS as i32 - 1)));
            }
            if OFFSET == INTEGER {
                let offset = load_i8(&tile.offsets[first + block * PANEL..]);
                dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(offset, sum));
            }
            acc[row] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), acc[row]);
            if OFFSET == MIN {
                let min = load_f16(&tile.offsets[(first + block * PANEL) * 2..]);
                acc[row] = _mm512_fmadd_ps(min, _mm512_cvtepi32_ps(sum), acc[row]);
            }
        }
    }
    for (row, acc) in acc.iter_mut().enumerate() {
        *acc = _mm512_mul_ps(*acc, _mm512_set1_ps(tile.x_scales[at.row + row]));
    }
    acc
}

/// The planes of x from some row on.
struct Planes<const PLANES: usize> {
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

    /// Four inputs of a row, sixteen times.
    ///
    /// # Safety
    /// The plane has bytes `k..k + 4` of this row.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn broadcast(&self, plane: usize, row: usize, k: usize) -> __m512i {
        // SAFETY: the caller's promise; the read is unaligned.
        unsafe { _mm512_set1_epi32(self.start[plane].add(row * self.stride + k).cast::<i32>().read_unaligned()) }
    }
}

/// Codes of one panel for some inputs, in rows of 64 bytes, or of fewer where the panel is narrow.
#[derive(Clone, Copy)]
struct Codes<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
}

impl<'a> Codes<'a> {
    fn new<const BITS: usize, const NARROW: bool>(tile: &IntegerTile<'a>, panel: usize) -> Self {
        let width = if NARROW { tile.width } else { PANEL };
        let bytes = &tile.codes[panel * tile.panel_bytes..][..code_bytes::<BITS>(tile.k) / PANEL * width];
        Self { bytes, row_bytes: width * 4 }
    }
}

/// `start + Σ x · (unsigned code)` over the inputs that `codes` holds; the first of them is input `k` of x.
///
/// # Safety
/// Each plane of each row has the inputs from `k` on that `codes` holds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dots<const BITS: usize, const NARROW: bool, const PLANES: usize, const ROWS: usize>(
    codes: Codes<'_>,
    planes: &Planes<PLANES>,
    mut k: usize,
    start: [[__m512i; PLANES]; ROWS],
) -> [[__m512i; PLANES]; ROWS] {
    let mut acc = start;
    // With few rows the four cycles of `vpdpbusd` show: a second set of sums makes the chains half as long.
    let mut odd = [[_mm512_setzero_si512(); PLANES]; ROWS];
    let (low_mask, flip) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-128));
    let row_bytes = if NARROW { codes.row_bytes } else { 64 };
    let lanes = (u32::from(u16::MAX) >> (PANEL - row_bytes / 4)) as u16;
    let mut rows = codes.bytes.chunks_exact(row_bytes);
    while let Some(row) = rows.next() {
        if ROWS <= 4 {
            // A decode step reads weights once, and so do the few query heads that share keys and values.
            if BITS == 8 && ROWS == 1 {
                ask_ahead_of_bytes(row.as_ptr());
                ask_ahead_of_bytes(row.as_ptr().wrapping_add(64));
            } else {
                ask_ahead(row.as_ptr());
                if BITS == 8 {
                    ask_ahead(row.as_ptr().wrapping_add(64));
                }
            }
        }
        let codes = load_lanes::<NARROW>(row, lanes);
        let (first, second) = if BITS == 4 {
            (_mm512_and_si512(codes, low_mask), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_mask))
        } else {
            let Some(next) = rows.next() else {
                let codes = _mm512_xor_si512(codes, flip);
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (plane, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: the caller's promise: `codes` still holds these four inputs.
                        *acc = _mm512_dpbusd_epi32(*acc, codes, unsafe { planes.broadcast(plane, r, k) });
                    }
                }
                break;
            };
            (_mm512_xor_si512(codes, flip), _mm512_xor_si512(load_lanes::<NARROW>(next, lanes), flip))
        };
        for r in 0..ROWS {
            for plane in 0..PLANES {
                // SAFETY: the caller's promise: `codes` still holds these eight inputs.
                let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                acc[r][plane] = _mm512_dpbusd_epi32(acc[r][plane], first, x);
                if ROWS <= 2 {
                    odd[r][plane] = _mm512_dpbusd_epi32(odd[r][plane], second, next_x);
                } else {
                    acc[r][plane] = _mm512_dpbusd_epi32(acc[r][plane], second, next_x);
                }
            }
        }
        k += 8;
    }
    if ROWS <= 2 {
        for r in 0..ROWS {
            for plane in 0..PLANES {
                acc[r][plane] = _mm512_add_epi32(acc[r][plane], odd[r][plane]);
            }
        }
    }
    acc
}

/// `Σ x · code` for codes of `4 + HIGH` bits, see [`crate::packed`]; the first of them meets input `k` of x.
///
/// # Safety
/// As for [`dots`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn split_dots<const HIGH: usize, const PLANES: usize, const ROWS: usize>(
    codes: &[u8],
    planes: &Planes<PLANES>,
    mut k: usize,
) -> [[__m512i; PLANES]; ROWS] {
    let mut acc = [[_mm512_setzero_si512(); PLANES]; ROWS];
    // As in `dots`.
    let mut odd = acc;
    for rows in codes.as_chunks::<64>().0.chunks_exact(4 / HIGH + 1) {
        for (i, pair) in rows[..4 / HIGH].chunks_exact(2 / HIGH).enumerate() {
            let mut high = upper_bits::<HIGH>(rows, i);
            for row in pair {
                if ROWS <= 4 {
                    ask_ahead(row.as_ptr());
                }
                let (first, second) = join::<HIGH>(load_bytes(row), &mut high);
                for r in 0..ROWS {
                    for plane in 0..PLANES {
                        // SAFETY: the caller's promise: `codes` still holds these eight inputs.
                        let (x, next_x) = unsafe { (planes.broadcast(plane, r, k), planes.broadcast(plane, r, k + 4)) };
                        acc[r][plane] = _mm512_dpbusd_epi32(acc[r][plane], first, x);
                        let second_acc = if ROWS <= 2 { &mut odd[r][plane] } else { &mut acc[r][plane] };
                        *second_acc = _mm512_dpbusd_epi32(*second_acc, second, next_x);
                    }
                }
                k += 8;
            }
        }
        if ROWS <= 4 {
            ask_ahead(rows[4 / HIGH].as_ptr());
        }
    }
    if ROWS <= 2 {
        for (acc, odd) in acc.as_flattened_mut().iter_mut().zip(odd.as_flattened()) {
            *acc = _mm512_add_epi32(*acc, *odd);
        }
    }
    acc
}

/// The upper bits of codes that share a row of them: those of the first half of their groups come to bit 4 from above, those of the
/// second from below.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::arch::x86_64) fn upper_bits<const HIGH: usize>(rows: &[[u8; 64]], half_of_groups: usize) -> __m512i {
    let row = load_bytes(&rows[4 / HIGH]);
    if half_of_groups == 0 { row } else { _mm512_slli_epi16::<4>(row) }
}

/// The codes of two groups: a row of nibbles, and their upper bits, whose turn it is at bit 4 of `high`. What follows them moves
/// there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::arch::x86_64) fn join<const HIGH: usize>(nibbles: __m512i, high: &mut __m512i) -> (__m512i, __m512i) {
    let (low_mask, high_mask) = (_mm512_set1_epi8(15), _mm512_set1_epi8(if HIGH == 1 { 0x10 } else { 0x30 }));
    let mut next = || {
        let bits = _mm512_and_si512(*high, high_mask);
        *high = if HIGH == 1 { _mm512_srli_epi16::<1>(*high) } else { _mm512_srli_epi16::<2>(*high) };
        bits
    };
    let first = _mm512_or_si512(_mm512_and_si512(nibbles, low_mask), next());
    (first, _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low_mask), next()))
}

/// Bytes of 16 outputs' codes for `k` inputs.
fn code_bytes<const BITS: usize>(k: usize) -> usize {
    k * PANEL * BITS / 8
}

/// 64 bytes, or 4 for each of the first `lanes`.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_lanes<const NARROW: bool>(from: &[u8], lanes: __mmask16) -> __m512i {
    if !NARROW {
        return load_bytes(from.first_chunk().expect("a row of a full panel has 64 bytes"));
    }
    assert!(from.len() >= 4 * lanes.count_ones() as usize);
    // SAFETY: the first lanes are in the slice (checked here), the others are not read; unaligned.
    unsafe { _mm512_maskz_loadu_epi32(lanes, from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::arch::x86_64) fn load_bytes(from: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes, unaligned.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::arch::x86_64) fn load_f32(from: &[u8]) -> __m512 {
    // SAFETY: the slice has 64 bytes (checked here), unaligned.
    unsafe { _mm512_loadu_ps(from[..64].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::arch::x86_64) fn load_f16(from: &[u8]) -> __m512 {
    // SAFETY: the slice has 32 bytes (checked here), unaligned.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from[..32].as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::arch::x86_64) fn load_i8(from: &[u8]) -> __m512i {
    // SAFETY: the slice has 16 bytes (checked here), unaligned.
    _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from[..16].as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::arch::x86_64) fn store(to: &mut [f32], values: __m512) {
    // SAFETY: the slice has sixteen values (checked here), unaligned.
    unsafe { _mm512_storeu_ps(to[..PANEL].as_mut_ptr(), values) }
}

/// What scales the codes have: one for each output, the same in a narrow panel, one for each block, or one
/// for each output and a step for each block.
const CHANNELS: u8 = 0;
const NARROW_CHANNELS: u8 = 1;
const BLOCKS: u8 = 2;
const STEPS: u8 = 3;
