//! Numbers and matrices for the tests of this crate.

use crate::packed::{BlockOffset, Offsets, PackedLayout, WeightFormat, pack_float, pack_quantized};
use crate::{Cx, Kernels, Workers};

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
}

/// Weights of a layout, packed, with every kind of code and offset in them.
pub(crate) fn weights(layout: &PackedLayout, seed: u64) -> Vec<u8> {
    let mut noise = Noise(seed);
    let (n, k, format) = (layout.n(), layout.k(), layout.format());
    if format.is_float() {
        return pack_float(layout, &noise.floats(n * k)).expect("lengths match");
    }
    let (from, to) = if format.is_4bit() { (0, 15) } else { (-128, 127) };
    let codes: Vec<i8> = (0..n * k).map(|_| noise.code(from, to)).collect();
    let scales: Vec<f32> = (0..n * layout.blocks()).map(|_| noise.float() * 0.1).collect();
    let integers: Vec<i8> = scales.iter().map(|_| noise.code(-128, 127)).collect();
    let minima = noise.floats(scales.len());
    let steps: Vec<u8> = (0..n * layout.steps()).map(|_| noise.code(1, 16).cast_unsigned()).collect();
    let offsets = match format {
        WeightFormat::Int4Block { offset: BlockOffset::Integer, .. } => Offsets::Integer(&integers),
        WeightFormat::Int4Block { offset: BlockOffset::Min, .. } => Offsets::Min(&minima),
        WeightFormat::Int4Expansion { .. } => Offsets::Steps(&steps),
        _ => Offsets::None,
    };
    pack_quantized(layout, &codes, &scales, offsets).expect("lengths match")
}

/// The formats that meet quantized rows, with block sizes that divide `k`.
pub(crate) fn integer_formats(k: usize) -> Vec<WeightFormat> {
    let mut formats = vec![WeightFormat::Int8PerChannel, WeightFormat::Int4PerChannel];
    for block in [4, 8, 32, 64, 72, 256] {
        if !k.is_multiple_of(block) {
            continue;
        }
        formats.push(WeightFormat::Int8Block { block });
        if block % 8 == 0 {
            formats.push(WeightFormat::Int4Expansion { block });
            for offset in [BlockOffset::Symmetric, BlockOffset::Integer, BlockOffset::Min] {
                formats.push(WeightFormat::Int4Block { block, offset });
            }
        }
    }
    formats
}

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
