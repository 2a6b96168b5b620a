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
