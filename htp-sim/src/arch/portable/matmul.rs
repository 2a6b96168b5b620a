//! Matrix products of one tile, in plain Rust. These define the bits that the integer kernels of every tier give.

use half::{bf16, f16};

use crate::kernels::{FloatTile, IntegerTile};
use crate::matmul::Write;
use crate::packed::{BlockOffset, PANEL, code_places};

/// 8-bit codes, one scale per output.
pub(crate) fn q_w8c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Bits8>(tile, out);
}

/// 4-bit codes, one scale per output.
pub(crate) fn q_w4c(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_channel::<Bits4>(tile, out);
}

/// 8-bit codes, one scale per block.
pub(crate) fn q_w8b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Bits8>(tile, out);
}

/// 6-bit codes, one scale per block.
pub(crate) fn q_w6b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Split<2>>(tile, out);
}

/// 5-bit codes, one scale per block.
pub(crate) fn q_w5b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Split<1>>(tile, out);
}

/// 4-bit codes, one scale per block.
pub(crate) fn q_w4b(tile: &IntegerTile<'_>, out: &mut [f32]) {
    per_block::<Bits4>(tile, out);
}

/// 4-bit codes, a step per block, one scale per output.
pub(crate) fn q_w4e(tile: &IntegerTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        for row in 0..tile.rows {
            let hi = expanded_dot(tile, panel, &tile.hi[row * tile.x_stride..]);
            let lo = match tile.lo {
                [] => [0; PANEL],
                lo => expanded_dot(tile, panel, &lo[row * tile.x_stride..]),
            };
            finish_channels(tile, (panel, row), [hi, lo], out);
        }
    }
}

/// f32 weights.
pub(crate) fn f32_f32(tile: &FloatTile<'_>, out: &mut [f32]) {
    floats::<4>(tile, out, f32::from_le_bytes);
}

/// f16 weights.
pub(crate) fn f32_f16(tile: &FloatTile<'_>, out: &mut [f32]) {
    floats::<2>(tile, out, |bytes| f16::from_le_bytes(bytes).to_f32());
}

/// bf16 weights.
pub(crate) fn f32_bf16(tile: &FloatTile<'_>, out: &mut [f32]) {
    floats::<2>(tile, out, |bytes| bf16::from_le_bytes(bytes).to_f32());
}

/// 8-bit weights with one scale per output, float rows: `(Σ x · code) · scale`, written or added.
pub(crate) fn f32_w8c(tile: &FloatTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..];
        for row in 0..tile.rows {
            let mut acc = [0.0_f32; PANEL];
            for (k, &x) in tile.x[row * tile.x_stride..][..tile.k].iter().enumerate() {
                for (lane, acc) in acc.iter_mut().enumerate() {
                    *acc += x * f32::from(codes[k / 4 * 64 + lane * 4 + k % 4].cast_signed());
                }
            }
            let target = &mut out[(row * tile.panels + panel) * PANEL..][..PANEL];
            for (lane, (target, acc)) in target.iter_mut().zip(acc).enumerate() {
                let value = acc * f32_at(tile.scales, panel * PANEL + lane);
                *target = if tile.write == Write::Add { *target + value } else { value };
            }
        }
    }
}

/// How the codes of a panel lie, in rows of 64 bytes, or fewer where it is narrow.
trait CodeBits {
    /// Where zero lies in a symmetric encoding.
    const ZERO: i32;
    /// The codes of group `group` of four inputs, `WIDTH` outputs.
    fn group<const WIDTH: usize>(codes: &[u8], group: usize) -> [[i32; 4]; WIDTH];
}

struct Bits8;
struct Bits4;
/// 4-bit codes with their zero taken off.
struct Signed4;
/// Codes of `4 + HIGH` bits.
struct Split<const HIGH: usize>;

impl CodeBits for Bits8 {
    const ZERO: i32 = 0;
    #[inline(always)]
    fn group<const WIDTH: usize>(codes: &[u8], group: usize) -> [[i32; 4]; WIDTH] {
        let row = fours::<WIDTH>(codes, group);
        std::array::from_fn(|lane| row[lane].map(|code| i32::from(code.cast_signed())))
    }
}

impl CodeBits for Bits4 {
    const ZERO: i32 = 8;
    #[inline(always)]
    fn group<const WIDTH: usize>(codes: &[u8], group: usize) -> [[i32; 4]; WIDTH] {
        let row = fours::<WIDTH>(codes, group / 2);
        std::array::from_fn(|lane| row[lane].map(|pair| i32::from(pair >> (group % 2 * 4) & 15)))
    }
}

impl CodeBits for Signed4 {
    const ZERO: i32 = 0;
    #[inline(always)]
    fn group<const WIDTH: usize>(codes: &[u8], group: usize) -> [[i32; 4]; WIDTH] {
        Bits4::group(codes, group).map(|codes: [i32; 4]| codes.map(|code| code - Bits4::ZERO))
    }
}

impl<const HIGH: usize> CodeBits for Split<HIGH> {
    const ZERO: i32 = 8 << HIGH;
    #[inline(always)]
    fn group<const WIDTH: usize>(codes: &[u8], group: usize) -> [[i32; 4]; WIDTH] {
        let [low, high] = code_places(group, HIGH);
        let (lows, highs) = (fours::<WIDTH>(codes, low.row), fours::<WIDTH>(codes, high.row));
        let code = |low_byte: u8, high_byte: u8| {
            i32::from(low_byte >> low.shift & 15 | (high_byte >> high.shift & ((1 << HIGH) - 1)) << 4)
        };
        std::array::from_fn(|lane| std::array::from_fn(|i| code(lows[lane][i], highs[lane][i])))
    }
}

/// Row `row` of some codes, four bytes for each output.
#[inline(always)]
fn fours<const WIDTH: usize>(codes: &[u8], row: usize) -> &[[u8; 4]] {
    &codes[row * WIDTH * 4..].as_chunks().0[..WIDTH]
}

/// `Σ x · code` of one row of x and one panel, `WIDTH` outputs wide, over the groups of four inputs from `from` to `to`.
#[inline(always)]
fn dot<B: CodeBits, const WIDTH: usize>(codes: &[u8], plane: &[i8], from: usize, to: usize) -> [i32; PANEL] {
    let mut acc = [0_i32; PANEL];
    for group in from..to {
        let x = &plane[group * 4..group * 4 + 4];
        for (acc, codes) in acc.iter_mut().zip(B::group::<WIDTH>(codes, group)) {
            let mut sum = 0;
            for (code, &x) in codes.into_iter().zip(x) {
                sum += i32::from(x) * code;
            }
            *acc = acc.wrapping_add(sum);
        }
    }
    acc
}

fn per_channel<B: CodeBits>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match tile.width {
        4 => per_channel_wide::<B, 4>(tile, out),
        8 => per_channel_wide::<B, 8>(tile, out),
        12 => per_channel_wide::<B, 12>(tile, out),
        _ => per_channel_wide::<B, PANEL>(tile, out),
    }
}

fn per_channel_wide<B: CodeBits, const WIDTH: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..];
        for row in 0..tile.rows {
            let [hi_sum, lo_sum] = tile.plane_sums[row];
            let hi = dot::<B, WIDTH>(codes, &tile.hi[row * tile.x_stride..], 0, tile.k / 4);
            let lo = match tile.lo {
                [] => [0; PANEL],
                lo => dot::<B, WIDTH>(codes, &lo[row * tile.x_stride..], 0, tile.k / 4),
            };
            let hi = hi.map(|hi| hi.wrapping_sub(B::ZERO.wrapping_mul(hi_sum)));
            let lo = lo.map(|lo| lo.wrapping_sub(B::ZERO.wrapping_mul(lo_sum)));
            finish_channels(tile, (panel, row), [hi, lo], out);
        }
    }
}

/// `Σ x · (code - 8) · step` of one row of x and one panel.
fn expanded_dot(tile: &IntegerTile<'_>, panel: usize, plane: &[i8]) -> [i32; PANEL] {
    let codes = &tile.codes[panel * tile.panel_bytes..];
    let blocks = tile.k / tile.block;
    let mut acc = [0_i32; PANEL];
    for (block, steps) in tile.offsets[panel * blocks * PANEL..].chunks_exact(PANEL).take(blocks).enumerate() {
        let (from, to) = (block * tile.block / 4, (block + 1) * tile.block / 4);
        let dots = dot::<Signed4, PANEL>(codes, plane, from, to);
        for ((acc, dot), &step) in acc.iter_mut().zip(dots).zip(steps) {
            *acc = acc.wrapping_add(dot.wrapping_mul(i32::from(step)));
        }
    }
    acc
}

/// Writes the floats of one row and one panel with a scale per output, given the planes' integers.
#[inline(always)]
fn finish_channels(tile: &IntegerTile<'_>, (panel, row): (usize, usize), [hi, lo]: [[i32; PANEL]; 2], out: &mut [f32]) {
    for lane in 0..PANEL {
        let scale = f32_at(tile.scales, panel * PANEL + lane) * tile.x_scales[row];
        let dot = if tile.lo.is_empty() { hi[lane] as f32 } else { hi[lane] as f32 * 256.0 + lo[lane] as f32 };
        out[(row * tile.panels + panel) * PANEL + lane] = dot * scale;
    }
}

fn per_block<B: CodeBits>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let blocks = tile.k / tile.block;
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..];
        for row in 0..tile.rows {
            let mut acc = [0.0_f32; PANEL];
            for block in 0..blocks {
                let (from, to) = (block * tile.block / 4, (block + 1) * tile.block / 4);
                let mut dots = dot::<B, PANEL>(codes, &tile.hi[row * tile.x_stride..], from, to);
                if !tile.lo.is_empty() {
                    let lo = dot::<B, PANEL>(codes, &tile.lo[row * tile.x_stride..], from, to);
                    for (dot, lo) in dots.iter_mut().zip(lo) {
                        *dot = dot.wrapping_mul(256).wrapping_add(lo);
                    }
                }
                let at = (panel * blocks + block) * PANEL;
                drain::<B>(tile, at, tile.sums[row * blocks + block], &dots, &mut acc);
            }
            for (lane, acc) in acc.iter().enumerate() {
                out[(row * tile.panels + panel) * PANEL + lane] = acc * tile.x_scales[row];
            }
        }
    }
}

/// Adds one block to the floats; `at` is the index of its first scale.
#[inline(always)]
fn drain<B: CodeBits>(tile: &IntegerTile<'_>, at: usize, sum: i32, dots: &[i32; PANEL], acc: &mut [f32; PANEL]) {
    for (lane, acc) in acc.iter_mut().enumerate() {
        let scale = f16_at(tile.scales, at + lane);
        let offset = match tile.offset {
            BlockOffset::Symmetric => -B::ZERO,
            BlockOffset::Integer => i32::from(tile.offsets[at + lane].cast_signed()),
            BlockOffset::Min => 0,
        };
        let dot = dots[lane].wrapping_add(offset.wrapping_mul(sum));
        *acc = scale.mul_add(dot as f32, *acc);
        if tile.offset == BlockOffset::Min {
            *acc = f16_at(tile.offsets, at + lane).mul_add(sum as f32, *acc);
        }
    }
}

#[inline(always)]
fn floats<const BYTES: usize>(tile: &FloatTile<'_>, out: &mut [f32], value: impl Fn([u8; BYTES]) -> f32) {
    for panel in 0..tile.panels {
        let codes = &tile.codes[panel * tile.panel_bytes..][..tile.k * PANEL * BYTES];
        for row in 0..tile.rows {
            let mut acc = [0.0_f32; PANEL];
            let x = &tile.x[row * tile.x_stride..][..tile.k];
            for (w, &x) in codes.chunks_exact(PANEL * BYTES).zip(x) {
                for (acc, w) in acc.iter_mut().zip(w.as_chunks().0) {
                    *acc += x * value(*w);
                }
            }
            out[(row * tile.panels + panel) * PANEL..][..PANEL].copy_from_slice(&acc);
        }
    }
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let bytes = &bytes[i * 4..i * 4 + 4];
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn f16_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[i * 2], bytes[i * 2 + 1]]).to_f32()
}
