//! Numbers and matrices for the tests of this crate.

use crate::packed::{BlockOffset, Offsets, PackedLayout, WeightFormat, pack_float, pack_quantized};
use crate::{Cx, Kernels, PackedWeights, QuantizedRows, Workers};

/// A small generator of reproducible noise (splitmix64).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-1.0..1.0`.
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Uniform in `from..=to`, with the ends more often than their share.
    pub(crate) fn code(&mut self, from: i32, to: i32) -> i8 {
        let code = match self.bits() % 16 {
            0 => from,
            1 => to,
            _ => from + (self.bits() % (to - from + 1) as u64) as i32,
        };
        i8::try_from(code).expect("codes are i8")
    }

    /// One of the codes of an integer format.
    pub(crate) fn code_of(&mut self, format: WeightFormat) -> i8 {
        self.code(i32::from(*format.codes().start()), i32::from(*format.codes().end()))
    }
}

/// Weights of a layout, packed, with every kind of code and offset in them.
pub(crate) fn weights(layout: &PackedLayout, seed: u64) -> Vec<u8> {
    let mut noise = Noise(seed);
    let (n, k, format) = (layout.n(), layout.k(), layout.format());
    if format.is_float() {
        return pack_float(layout, &noise.floats(n * k)).expect("lengths match");
    }
    let codes: Vec<i8> = (0..n * k).map(|_| noise.code_of(format)).collect();
    let scales: Vec<f32> = (0..n * layout.blocks()).map(|_| noise.float() * 0.1).collect();
    let integers: Vec<i8> = scales.iter().map(|_| noise.code(-128, 127)).collect();
    let minima = noise.floats(scales.len());
    let steps: Vec<u8> = (0..n * layout.steps()).map(|_| noise.code(1, 16).cast_unsigned()).collect();
    let offsets = match format.block_offset() {
        BlockOffset::Integer => Offsets::Integer(&integers),
        BlockOffset::Min => Offsets::Min(&minima),
        BlockOffset::Symmetric if layout.steps() > 0 => Offsets::Steps(&steps),
        BlockOffset::Symmetric => Offsets::None,
    };
    pack_quantized(layout, &codes, &scales, offsets).expect("lengths match")
}

/// The formats that meet quantized rows, with block sizes that divide `k`.
pub(crate) fn integer_formats(k: usize) -> Vec<WeightFormat> {
    let blocks = [4, 8, 16, 32, 64, 72, 256].into_iter().filter(|block| k.is_multiple_of(*block));
    [WeightFormat::Int8PerChannel, WeightFormat::Int4PerChannel]
        .into_iter()
        .chain(blocks.flat_map(block_formats))
        .collect()
}

/// The integer formats that have a scale or step for each block of this size.
pub(crate) fn block_formats(block: usize) -> Vec<WeightFormat> {
    let mut formats = vec![WeightFormat::Int8Block { block }];
    if block.is_multiple_of(8) {
        formats.push(WeightFormat::Int4Expansion { block });
        formats.extend(BLOCK_OFFSETS.map(|offset| WeightFormat::Int4Block { block, offset }));
    }
    if block.is_multiple_of(16) {
        formats.push(WeightFormat::Int6Block { block });
    }
    if block.is_multiple_of(32) {
        formats.extend(BLOCK_OFFSETS.map(|offset| WeightFormat::Int5Block { block, offset }));
    }
    formats
}

const BLOCK_OFFSETS: [BlockOffset; 3] = [BlockOffset::Symmetric, BlockOffset::Integer, BlockOffset::Min];

/// The float formats.
pub(crate) const FLOAT_FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];

/// Calls `f` with every tier of this CPU, `portable` included.
pub(crate) fn each_tier(workers: &Workers, mut f: impl FnMut(&Cx<'_>)) {
    for kernels in Kernels::available() {
        f(&Cx { kernels, workers });
    }
}

/// The tier that the others are compared with.
pub(crate) fn portable(workers: &Workers) -> Cx<'_> {
    Cx { kernels: Kernels::named("portable").expect("portable is always there"), workers }
}

/// A team of `n`.
pub(crate) fn team(n: usize) -> Workers {
    Workers::new(n).expect("threads can be started")
}

/// The bits of floats: comparisons that see the sign of zero and equal NaNs.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Whether a tier rounds these weights to 16 bits in a product of `m` rows.
pub(crate) fn rounds(kernels: &Kernels, weights: PackedWeights<'_>, m: usize) -> bool {
    let (k, block) = (weights.layout().k(), weights.layout().format().block());
    block.is_some() && kernels.straight.is_some_and(|kernels| (kernels.fits_blocks)(m, k))
}

/// `x · Wᵀ` by weights rounded to 16 bits, to the bit: what tiers that [`rounds`] says make.
pub(crate) fn rounded_product(x: &QuantizedRows, weights: PackedWeights<'_>) -> Vec<f32> {
    let (n, k) = (weights.layout().n(), weights.layout().k());
    let mut out = vec![0.0; x.rows() * n];
    for column in 0..n {
        let (unit, codes) = rounded_weights(weights, column);
        for row in 0..x.rows() {
            let (mut high, mut mixed) = (0, 0);
            for (i, &w) in codes.iter().enumerate() {
                let ([x_high, x_low], [w_high, w_low]) = (planes(x.code(row, i)), planes(w));
                let (x_high, x_low) = if x.bits() == crate::ActBits::Eight { (x_low, 0) } else { (x_high, x_low) };
                high += x_high * w_high;
                mixed += x_high * w_low + x_low * w_high;
            }
            assert!(k <= 65536);
            // With one rounding where both fit 32 bits.
            let sum = if k <= 508 { (256 * high + mixed) as f32 } else { (high as f32).mul_add(256.0, mixed as f32) };
            let scale = if x.bits() == crate::ActBits::Eight { unit } else { unit * 256.0 };
            out[row * n + column] = sum * (scale * x.scale(row));
        }
    }
    out
}

/// How far apart the rounded weights of an output are.
pub(crate) fn rounding_unit(weights: PackedWeights<'_>, output: usize) -> f32 {
    rounded_weights(weights, output).0
}

/// The unit of a row of weights, and its values in units.
fn rounded_weights(weights: PackedWeights<'_>, row: usize) -> (f32, Vec<i64>) {
    let format = weights.layout().format();
    let (k, zero, half) = (weights.layout().k(), format.zero_code(), 1_i32 << (format.bits() - 1));
    let middle = |i: usize| {
        let (scale, min) = (weights.scale(row, i), weights.min(row, i));
        match format.block_offset() {
            BlockOffset::Integer if scale != 0.0 => ((min / scale).round() + f32::from(zero)) * scale,
            BlockOffset::Min => scale.mul_add(f32::from(zero), min),
            _ => 0.0,
        }
    };
    let largest = |of: &dyn Fn(usize) -> f32| (0..k).map(|i| of(i).abs()).fold(0.0, f32::max);
    let bound = largest(&|i| weights.scale(row, i)).mul_add(half as f32, largest(&middle));
    let per_unit = if bound == 0.0 { 0.0 } else { 32512.0 / bound };
    let code = |i: usize| {
        let step = (weights.scale(row, i) * (per_unit * half as f32)).round_ties_even() as i32;
        let code = (weights.code(row, i) - i32::from(zero)) * (32768 / half);
        let product = (code * step + (1 << 14)) >> 15;
        i64::from(product + (middle(i) * per_unit).round_ties_even() as i32)
    };
    (bound / 32512.0, (0..k).map(code).collect())
}

/// The two signed bytes of a number of 16 bits.
fn planes(code: impl Into<i64>) -> [i64; 2] {
    let code = code.into();
    let high = (code + 128) >> 8;
    [high, code - high * 256]
}
