//! Matrix products on layer shapes of small language models, for every tier.
//!
//! One row is decode: read it in bytes of weights per second, against `matmul/read`. Many rows are prefill: read it in
//! multiply-adds per second, 16-bit activations counting twice (two 8-bit products each).
//! Weights are copied until they exceed the caches, where the id ends in `_cold`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use htp_sim::{
    ActBits, BlockOffset, Cx, Kernels, Offsets, PackedLayout, Part, QuantizedRows, Rows, WeightFormat, Workers, Write,
    linear, pack_quantized, quantize_rows,
};

const INT4: WeightFormat = WeightFormat::Int4Block { block: 32, offset: BlockOffset::Symmetric };

/// What GGUF's Q4_1 becomes.
const INT4_MIN: WeightFormat = WeightFormat::Int4Block { block: 32, offset: BlockOffset::Min };

/// Name in the id, format, bits of the activations.
const FORMATS: [(&str, WeightFormat, ActBits); 8] = [
    ("i16_w4b", INT4, ActBits::Sixteen),
    ("i16_w4bm", INT4_MIN, ActBits::Sixteen),
    ("i8_w4b", INT4, ActBits::Eight),
    ("i16_w4e", WeightFormat::Int4Expansion { block: 64 }, ActBits::Sixteen),
    ("i8_w4e", WeightFormat::Int4Expansion { block: 64 }, ActBits::Eight),
    ("i16_w4c", WeightFormat::Int4PerChannel, ActBits::Sixteen),
    ("i16_w8c", WeightFormat::Int8PerChannel, ActBits::Sixteen),
    ("i8_w8c", WeightFormat::Int8PerChannel, ActBits::Eight),
];

/// `copies` of a weight, packed.
fn weights(layout: &PackedLayout, copies: usize) -> Vec<Vec<u8>> {
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) >> 16 & 15) as i8;
    let codes: Vec<i8> = (0..layout.n() * layout.k()).map(noise).collect();
    let scales = vec![0.01; layout.n() * layout.blocks()];
    let steps: Vec<u8> = (0..layout.n() * layout.steps()).map(|i| noise(i).cast_unsigned() + 1).collect();
    let minima = vec![-0.075; scales.len()];
    let offsets = match layout.format() {
        WeightFormat::Int4Block { offset: BlockOffset::Min, .. } => Offsets::Min(&minima),
        _ if steps.is_empty() => Offsets::None,
        _ => Offsets::Steps(&steps),
    };
    let blob = pack_quantized(layout, &codes, &scales, offsets).expect("lengths match");
    vec![blob; copies]
}

/// A quantized x of `m` rows for weights of `layout`.
fn rows(cx: &Cx<'_>, layout: &PackedLayout, m: usize, act: ActBits) -> QuantizedRows {
    let x: Vec<f32> = (0..m * layout.k()).map(|i| (i as f32 * 0.37).sin()).collect();
    let sum_block = layout.format().block().unwrap_or(layout.k());
    let mut rows = QuantizedRows::new(m, layout.k(), act, sum_block).expect("sizes are fine");
    quantize_rows(cx, &x, &mut rows).expect("lengths match");
    rows
}

fn product(cx: &Cx<'_>, rows: &QuantizedRows, layout: &PackedLayout, blob: &[u8], out: &mut [f32]) {
    let weights = layout.view(blob).expect("length matches");
    let part = Part { weights, bias: None, branch: None, write: Write::Store, out };
    linear(cx, Rows::Quantized(rows), &mut [part]).expect("lengths match");
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul");
    for (n, k, copies) in [(1536, 576, 1), (576, 1536, 1), (49152, 576, 1), (8960, 1536, 12)] {
        for (name, format, act) in FORMATS {
            let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
            let blobs = weights(&layout, copies);
            let mut out = vec![0.0; n];
            group.throughput(Throughput::Bytes((layout.size_bytes() * copies) as u64));
            let cold = if copies > 1 { "_cold" } else { "" };
            for threads in [1, 2] {
                let workers = Workers::new(threads).expect("threads can be started");
                for kernels in Kernels::available() {
                    let cx = Cx { kernels, workers: &workers };
                    let rows = rows(&cx, &layout, 1, act);
                    let id = format!("{name}/m1_n{n}_k{k}{cold}/{}/t{threads}", kernels.name);
                    group.bench_function(id, |bencher| {
                        bencher.iter(|| blobs.iter().for_each(|blob| product(&cx, &rows, &layout, blob, &mut out)));
                    });
                }
            }
        }
    }
}

fn prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul");
    let (n, k) = (1536, 576);
    for m in [4, 128] {
        for (name, format, act) in FORMATS {
            let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
            let blobs = weights(&layout, 1);
            let mut out = vec![0.0; m * n];
            let planes = if act == ActBits::Sixteen { 2 } else { 1 };
            group.throughput(Throughput::Elements((m * n * k * planes) as u64));
            for threads in [1, 2] {
                let workers = Workers::new(threads).expect("threads can be started");
                for kernels in Kernels::available() {
                    let cx = Cx { kernels, workers: &workers };
                    let rows = rows(&cx, &layout, m, act);
                    group.bench_function(format!("{name}/m{m}_n{n}_k{k}/{}/t{threads}", kernels.name), |bencher| {
                        bencher.iter(|| product(&cx, &rows, &layout, &blobs[0], &mut out));
                    });
                }
            }
        }
    }
}

/// The yardstick of decode: the same team reads a buffer and does nothing with it.
fn read(criterion: &mut Criterion) {
    const PARTS: usize = 64;
    let mut group = criterion.benchmark_group("matmul");
    for mebibytes in [16, 96] {
        let buffer = vec![1_u64; mebibytes << 17];
        group.throughput(Throughput::Bytes(mebibytes as u64 * 1024 * 1024));
        for threads in [1, 2] {
            let workers = Workers::new(threads).expect("threads can be started");
            group.bench_function(format!("read/{mebibytes}mib/t{threads}"), |bencher| {
                bencher.iter(|| {
                    workers.for_each(PARTS, |part, _| {
                        let len = buffer.len() / PARTS;
                        let mut sums = [0_u64; 32];
                        for chunk in buffer[part * len..][..len].as_chunks::<32>().0 {
                            sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum ^= value);
                        }
                        black_box(sums);
                    });
                });
            });
        }
    }
}

criterion_group!(benches, read, decode, prefill);
criterion_main!(benches);
