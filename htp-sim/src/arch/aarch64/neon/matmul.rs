//! Matrix products of one tile. A register holds 4 outputs, and a panel is four of them; the integer products of all three
//! tiers are here, but for the one step in which they differ.
//!
//! Vectors of x are taken in pairs: the two planes of a row, or two rows of 8 bits. Codes are used as they lie, signed or from 0. What
//! the latter are too large by, `8 · Σx` where they have 4 bits, is taken off afterwards: exact, since all sums are modulo 2^32 and
//! the true ones fit.

mod float;

use std::arch::aarch64::*;

use crate::arch::aarch64::insn::widen_f16;
use crate::kernels::IntegerTile;
use crate::packed::{BlockOffset, PANEL};
pub(crate) use float::{f32_bf16, f32_f16, f32_f32, f32_w8c};

#[target_feature(enable = "neon")]
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Smull, CODES_8>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Smull, CODES_4>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smull, CODES_8>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smull, CODES_6>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smull, CODES_5>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Smull, CODES_4>(tile, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_step::<Smull>(tile, out);
}

/// How a tier multiplies bytes.
pub(crate) trait Dot {
    /// The sums of 4 outputs for each vector of a pair.
    type Sums: Copy;
    /// Pairs whose sums, for a panel, fit in the registers.
    const MAX_PAIRS: usize;

    fn zero() -> Self::Sums;

    /// Adds the products of 4 outputs by 8 inputs: `codes` has inputs 0 to 3 of each output, then 4 to 7; `x` has the
    /// inputs of the pair's first vector, then those of the second.
    fn add(sums: Self::Sums, codes: [int8x16_t; 2], x: int8x16_t) -> Self::Sums;

    /// The 4 outputs for the first vector and for the second.
    fn finish(sums: Self::Sums) -> [int32x4_t; 2];
}

/// Plain NEON: products of 16 bits, added in pairs to sums of 32.
struct Smull;

impl Dot for Smull {
    /// For each vector: the outputs 0 and 1, then 2 and 3, two partial sums each.
    type Sums = [[int32x4_t; 2]; 2];
    const MAX_PAIRS: usize = 1;

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM CPU has NEON.
        [[unsafe { vdupq_n_s32(0) }; 2]; 2]
    }

    #[inline(always)]
    fn add(mut sums: Self::Sums, [first, second]: [int8x16_t; 2], x: int8x16_t) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let x = vreinterpretq_s32_s8(x);
            let fours =
                [[vdup_laneq_s32::<0>(x), vdup_laneq_s32::<1>(x)], [vdup_laneq_s32::<2>(x), vdup_laneq_s32::<3>(x)]];
            for (sums, fours) in sums.iter_mut().zip(fours) {
                for (codes, x) in [first, second].into_iter().zip(fours) {
                    let x = vreinterpret_s8_s32(x);
                    sums[0] = vpadalq_s16(sums[0], vmull_s8(vget_low_s8(codes), x));
                    sums[1] = vpadalq_s16(sums[1], vmull_s8(vget_high_s8(codes), x));
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish(sums: Self::Sums) -> [int32x4_t; 2] {
        // SAFETY: as above.
        sums.map(|[low, high]| unsafe { vpaddq_s32(low, high) })
    }
}

/// Per-channel weights.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn per_channel<D: Dot, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    each_piece(tile, D::MAX_PAIRS, |piece| {
        if tile.width < PANEL {
            for quarter in 0..tile.width / LANES {
                channel_quarters::<D, CODES, 1, 1>(tile, piece, quarter, out);
            }
        } else if piece.pairs == 2 {
            channel_quarters::<D, CODES, 2, 4>(tile, piece, 0, out);
        } else {
            channel_quarters::<D, CODES, 1, 4>(tile, piece, 0, out);
        }
    });
}

/// Block weights.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn per_block<D: Dot, const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    each_piece(tile, D::MAX_PAIRS, |piece| {
        if piece.pairs == 2 {
            block_quarters::<D, CODES, 2>(tile, piece, out);
        } else {
            block_quarters::<D, CODES, 1>(tile, piece, out);
        }
    });
}

/// Weights with a step per block.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn per_step<D: Dot>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    each_piece(tile, D::MAX_PAIRS, |piece| {
        if piece.pairs == 2 {
            step_quarters::<D, 2>(tile, piece, out);
        } else {
            step_quarters::<D, 1>(tile, piece, out);
        }
    });
}

/// One panel and the rows of one or two pairs.
#[derive(Clone, Copy)]
struct Piece {
    panel: usize,
    row: usize,
    pairs: usize,
}

/// Cuts a tile into pieces. Narrow panels get one pair at a time.
#[inline(always)]
fn each_piece(tile: &IntegerTile<'_>, max_pairs: usize, mut f: impl FnMut(Piece)) {
    let max_pairs = if tile.width < PANEL { 1 } else { max_pairs };
    let rows_per_pair = if tile.lo.is_empty() { 2 } else { 1 };
    for panel in 0..tile.panels {
        let mut row = 0;
        while row < tile.rows {
            let pairs = (tile.rows - row).div_ceil(rows_per_pair).min(max_pairs);
            f(Piece { panel, row, pairs });
            row += pairs * rows_per_pair;
        }
    }
}

/// Where the vectors of some pairs start, and of which rows they are.
struct Pairs<const PAIRS: usize> {
    start: [[*const i8; 2]; PAIRS],
    /// The rows of the pair, the last one twice if it has none to go with: the same row if its vectors are its planes.
    rows: [[usize; 2]; PAIRS],
}

impl<const PAIRS: usize> Pairs<PAIRS> {
    #[inline(always)]
    fn new(tile: &IntegerTile<'_>, row: usize) -> Self {
        let mut pairs = Self { start: [[tile.hi.as_ptr(); 2]; PAIRS], rows: [[row; 2]; PAIRS] };
        for (i, (start, rows)) in pairs.start.iter_mut().zip(&mut pairs.rows).enumerate() {
            if tile.lo.is_empty() {
                *rows = [row + 2 * i, (row + 2 * i + 1).min(tile.rows - 1)];
                *start = rows.map(|row| tile.hi[row * tile.x_stride..][..tile.k].as_ptr());
            } else {
                *rows = [row + i; 2];
                let at = (row + i) * tile.x_stride;
                *start = [tile.hi[at..][..tile.k].as_ptr(), tile.lo[at..][..tile.k].as_ptr()];
            }
        }
        pairs
    }

    /// Inputs `k..k + 8` of both vectors of a pair; `k..k + 4` and zeros if only so many are left.
    ///
    /// # Safety
    /// Both have these inputs.
    #[inline(always)]
    unsafe fn load(&self, pair: usize, k: usize, only_four: bool) -> int8x16_t {
        let [a, b] = self.start[pair];
        // SAFETY: the caller's promise; the reads are unaligned.
        unsafe {
            if only_four {
                let four = |from: *const i8| u64::from(from.add(k).cast::<u32>().read_unaligned());
                return vreinterpretq_s8_u64(vcombine_u64(vcreate_u64(four(a)), vcreate_u64(four(b))));
            }
            vcombine_s8(vld1_s8(a.add(k)), vld1_s8(b.add(k)))
        }
    }
}

/// Codes for some inputs: rows of `row_bytes`, of which the 16 bytes of each quarter of a panel from `at` on are meant.
#[derive(Clone, Copy)]
struct Codes<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    at: usize,
}

/// `Σ x · code` for both vectors of each pair and each quarter of a panel, over the inputs that `codes` holds; the first of
/// them is input `k` of x.
///
/// # Safety
/// Each vector has the inputs from `k` on that `codes` holds.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots<D: Dot, const CODES: u8, const PAIRS: usize, const QUARTERS: usize>(
    codes: Codes<'_>,
    pairs: &Pairs<PAIRS>,
    mut k: usize,
) -> [[[int32x4_t; 2]; QUARTERS]; PAIRS] {
    let mut sums = [[D::zero(); QUARTERS]; PAIRS];
    let mut rows = codes.bytes.chunks_exact(codes.row_bytes);
    while let Some(row) = rows.next() {
        let next = if CODES == CODES_8 { rows.next() } else { Some(row) };
        for pair in 0..PAIRS {
            // SAFETY: the caller's promise: `codes` still holds these inputs, eight or four.
            let x = unsafe { pairs.load(pair, k, next.is_none()) };
            for quarter in 0..QUARTERS {
                let from = codes.at + quarter * 16;
                let first = load_bytes(&row[from..]);
                let codes = if CODES == CODES_8 {
                    [first, next.map_or(vdupq_n_s8(0), |next| load_bytes(&next[from..]))]
                } else {
                    let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s8(first)));
                    let codes = [vandq_s8(first, vdupq_n_s8(15)), high];
                    if CODES == CODES_4_SIGNED { codes.map(|codes| vsubq_s8(codes, vdupq_n_s8(8))) } else { codes }
                };
                sums[pair][quarter] = D::add(sums[pair][quarter], codes, x);
            }
        }
        k += 8;
    }
    sums.map(|sums| sums.map(D::finish))
}

/// The same for whole panels and codes of `4 + HIGH` bits, see [`crate::packed`].
///
/// # Safety
/// As for [`dots`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn split_dots<D: Dot, const HIGH: usize, const PAIRS: usize>(
    codes: &[u8],
    pairs: &Pairs<PAIRS>,
    mut k: usize,
) -> [[[int32x4_t; 2]; 4]; PAIRS] {
    let mut sums = [[D::zero(); 4]; PAIRS];
    let high_mask = vdupq_n_u8(if HIGH == 1 { 0x10 } else { 0x30 });
    for rows in codes.as_chunks::<64>().0.chunks_exact(4 / HIGH + 1) {
        for (i, row) in rows[..4 / HIGH].iter().enumerate() {
            // What moves the upper bits of the two groups to bit 4.
            let shifts = [2 * i, 2 * i + 1].map(|group| vdupq_n_s8(4 - ((4 + group * HIGH) % 8) as i8));
            for quarter in 0..4 {
                let nibbles = vreinterpretq_u8_s8(load_bytes(&row[quarter * 16..]));
                let upper = vreinterpretq_u8_s8(load_bytes(&rows[4 / HIGH][quarter * 16..]));
                let lower = [vandq_u8(nibbles, vdupq_n_u8(15)), vshrq_n_u8::<4>(nibbles)];
                let join = |i: usize| vorrq_u8(lower[i], vandq_u8(vshlq_u8(upper, shifts[i]), high_mask));
                let codes = [vreinterpretq_s8_u8(join(0)), vreinterpretq_s8_u8(join(1))];
                for (pair, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's promise: `codes` still holds these eight inputs.
                    sums[quarter] = D::add(sums[quarter], codes, unsafe { pairs.load(pair, k, false) });
                }
            }
            k += 8;
        }
    }
    sums.map(|sums| sums.map(D::finish))
}

/// `QUARTERS` quarters of a panel, from quarter `first` on, by `PAIRS` pairs, per-channel weights.
#[inline]
#[target_feature(enable = "neon")]
fn channel_quarters<D: Dot, const CODES: u8, const PAIRS: usize, const QUARTERS: usize>(
    tile: &IntegerTile<'_>,
    piece: Piece,
    first: usize,
    out: &mut [f32],
) {
    let pairs = Pairs::<PAIRS>::new(tile, piece.row);
    let bytes = &tile.codes[piece.panel * tile.panel_bytes..][..code_bytes::<CODES>(tile.k) / PANEL * tile.width];
    let codes = Codes { bytes, row_bytes: tile.width * 4, at: first * 16 };
    // SAFETY: `Pairs::new` checked that each vector has `tile.k` bytes.
    let dots = unsafe { dots::<D, CODES, PAIRS, QUARTERS>(codes, &pairs, 0) };
    let zero = if CODES == CODES_4 { 8 } else { 0 };
    for (dots, rows) in dots.into_iter().zip(pairs.rows) {
        let [a, b] = rows.map(|row| tile.plane_sums[row]);
        let sums = if tile.lo.is_empty() { [a[0], b[0]] } else { a };
        for (i, dots) in dots.into_iter().enumerate() {
            let dot = |i: usize| vsubq_s32(dots[i], vdupq_n_s32(sums[i].wrapping_mul(zero)));
            let column = piece.panel * PANEL + (first + i) * LANES;
            channel_finish(tile, rows, column, [dot(0), dot(1)], out);
        }
    }
}

/// Writes 4 outputs from `column` on of a pair's rows, with a scale per output.
#[inline]
#[target_feature(enable = "neon")]
fn channel_finish(tile: &IntegerTile<'_>, rows: [usize; 2], column: usize, dots: [int32x4_t; 2], out: &mut [f32]) {
    let scales = load_f32(&tile.scales[column * 4..]);
    let mut put = |row: usize, dot: float32x4_t| {
        let scale = vmulq_n_f32(scales, tile.x_scales[row]);
        store(&mut out[row * tile.panels * PANEL + column..], vmulq_f32(dot, scale));
    };
    let [a, b] = dots.map(|dot| vcvtq_f32_s32(dot));
    if tile.lo.is_empty() {
        put(rows[0], a);
        put(rows[1], b);
    } else {
        put(rows[0], vaddq_f32(vmulq_n_f32(a, 256.0), b));
    }
}

/// One panel by `PAIRS` pairs, weights with a step per block: whole numbers, so the floats begin after the last block.
#[inline]
#[target_feature(enable = "neon")]
fn step_quarters<D: Dot, const PAIRS: usize>(tile: &IntegerTile<'_>, piece: Piece, out: &mut [f32]) {
    let pairs = Pairs::<PAIRS>::new(tile, piece.row);
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<CODES_4_SIGNED>(tile.block);
    let codes = &tile.codes[piece.panel * tile.panel_bytes..][..blocks * block_bytes];
    let steps = &tile.offsets[piece.panel * blocks * PANEL..][..blocks * PANEL];
    let mut acc = [[[vdupq_n_s32(0); 2]; 4]; PAIRS];
    for (block, (bytes, steps)) in codes.chunks_exact(block_bytes).zip(steps.chunks_exact(PANEL)).enumerate() {
        let codes = Codes { bytes, row_bytes: 64, at: 0 };
        // SAFETY: `Pairs::new` checked that each vector has `tile.k` bytes, and this block is inside them.
        let dots = unsafe { dots::<D, CODES_4_SIGNED, PAIRS, 4>(codes, &pairs, block * tile.block) };
        for (acc, dots) in acc.iter_mut().zip(dots) {
            for (quarter, (acc, dots)) in acc.iter_mut().zip(dots).enumerate() {
                let step = load_u8(&steps[quarter * LANES..]);
                *acc = [vmlaq_s32(acc[0], dots[0], step), vmlaq_s32(acc[1], dots[1], step)];
            }
        }
    }
    for (acc, rows) in acc.into_iter().zip(pairs.rows) {
        for (quarter, acc) in acc.into_iter().enumerate() {
            channel_finish(tile, rows, piece.panel * PANEL + quarter * LANES, acc, out);
        }
    }
}

/// One panel by `PAIRS` pairs, block weights.
#[inline]
#[target_feature(enable = "neon")]
fn block_quarters<D: Dot, const CODES: u8, const PAIRS: usize>(tile: &IntegerTile<'_>, piece: Piece, out: &mut [f32]) {
    let pairs = Pairs::<PAIRS>::new(tile, piece.row);
    let blocks = tile.k / tile.block;
    let block_bytes = code_bytes::<CODES>(tile.block);
    let codes = &tile.codes[piece.panel * tile.panel_bytes..][..blocks * block_bytes];
    let mut acc = [[[vdupq_n_f32(0.0); 2]; 4]; PAIRS];
    for (block, bytes) in codes.chunks_exact(block_bytes).enumerate() {
        let codes = Codes { bytes, row_bytes: 64, at: 0 };
        let k = block * tile.block;
        // SAFETY: `Pairs::new` checked that each vector has `tile.k` bytes, and this block is inside them.
        let dots = unsafe {
            match CODES {
                CODES_6 => split_dots::<D, 2, PAIRS>(bytes, &pairs, k),
                CODES_5 => split_dots::<D, 1, PAIRS>(bytes, &pairs, k),
                _ => dots::<D, CODES, PAIRS, 4>(codes, &pairs, k),
            }
        };
        for (pair, dots) in dots.into_iter().enumerate() {
            let sums = pairs.rows[pair].map(|row| tile.sums[row * blocks + block]);
            for (quarter, dots) in dots.into_iter().enumerate() {
                let at = (piece.panel * blocks + block) * PANEL + quarter * LANES;
                let dots = if tile.lo.is_empty() { dots } else { [vaddq_s32(vshlq_n_s32::<8>(dots[0]), dots[1]); 2] };
                for i in 0..2 {
                    let acc = &mut acc[pair][quarter][i];
                    *acc = drain::<CODES>(tile, at, sums[i], dots[i], *acc);
                }
            }
        }
    }
    for (acc, rows) in acc.into_iter().zip(pairs.rows) {
        for (quarter, acc) in acc.into_iter().enumerate() {
            for (row, acc) in rows.into_iter().zip(acc) {
                let out = &mut out[(row * tile.panels + piece.panel) * PANEL + quarter * LANES..];
                store(out, vmulq_n_f32(acc, tile.x_scales[row]));
            }
        }
    }
}

/// Adds one block to the floats; `at` is the index of its first scale.
#[inline]
#[target_feature(enable = "neon")]
fn drain<const CODES: u8>(
    tile: &IntegerTile<'_>,
    at: usize,
    sum: i32,
    dot: int32x4_t,
    acc: float32x4_t,
) -> float32x4_t {
    let offset = match tile.offset {
        BlockOffset::Symmetric => vdupq_n_s32(if CODES == CODES_8 { 0 } else { -(1 << (bits::<CODES>() - 1)) }),
        BlockOffset::Integer => load_i8(&tile.offsets[at..]),
        BlockOffset::Min => vdupq_n_s32(0),
    };
    let dot = vmlaq_s32(dot, offset, vdupq_n_s32(sum));
    let acc = vfmaq_f32(acc, load_f16(&tile.scales[at * 2..]), vcvtq_f32_s32(dot));
    if tile.offset == BlockOffset::Min {
        return vfmaq_n_f32(acc, load_f16(&tile.offsets[at * 2..]), sum as f32);
    }
    acc
}

/// Bytes of 16 outputs' codes for `k` inputs.
fn code_bytes<const CODES: u8>(k: usize) -> usize {
    k * PANEL * bits::<CODES>() / 8
}

/// Bits of a code.
const fn bits<const CODES: u8>() -> usize {
    match CODES {
        CODES_8 => 8,
        CODES_6 => 6,
        CODES_5 => 5,
        _ => 4,
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bytes(from: &[u8]) -> int8x16_t {
    // SAFETY: the slice has 16 bytes (checked here), unaligned.
    unsafe { vld1q_s8(from[..16].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(from: &[u8]) -> float32x4_t {
    // SAFETY: the slice has 16 bytes (checked here); the load is of bytes, unaligned.
    vreinterpretq_f32_u8(unsafe { vld1q_u8(from[..16].as_ptr()) })
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f16(from: &[u8]) -> float32x4_t {
    // SAFETY: the slice has 8 bytes (checked here); the load is of bytes, unaligned.
    widen_f16(vreinterpret_u16_u8(unsafe { vld1_u8(from[..8].as_ptr()) }))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(from: &[u8]) -> int32x4_t {
    let lanes = from[..LANES].as_chunks::<LANES>().0[0].map(|byte| i32::from(byte.cast_signed()));
    // SAFETY: four values.
    unsafe { vld1q_s32(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_u8(from: &[u8]) -> int32x4_t {
    let lanes = from[..LANES].as_chunks::<LANES>().0[0].map(i32::from);
    // SAFETY: four values.
    unsafe { vld1q_s32(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(to: &mut [f32], values: float32x4_t) {
    // SAFETY: the slice has four values (checked here).
    unsafe { vst1q_f32(to[..LANES].as_mut_ptr(), values) }
}

/// Codes: of 8 bits, of 4 as they lie, of 4 with their zero taken off, and of 5 and 6.
pub(crate) const CODES_8: u8 = 0;
pub(crate) const CODES_4: u8 = 1;
const CODES_4_SIGNED: u8 = 2;
pub(crate) const CODES_5: u8 = 3;
pub(crate) const CODES_6: u8 = 4;

/// Outputs in a register.
const LANES: usize = 4;
