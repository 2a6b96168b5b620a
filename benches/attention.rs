//! Attention of one layer at several depths, for every tier and cache format.
//!
//! One row is decode: read it in bytes of cache per second. Many rows are prefill: read it in multiply-adds per second.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use htp_sim::{
    AttentionParams, AttentionScratch, Cache, CacheFormat, CacheLayout, CacheMut, Cx, Kernels, Workers, append,
    attention,
};

const FORMATS: [(&str, CacheFormat); 3] =
    [("f32", CacheFormat::F32), ("f16", CacheFormat::F16), ("i8", CacheFormat::Int8)];

/// A cache that holds `positions` rows.
struct Filled {
    layout: CacheLayout,
    bytes: Vec<u8>,
}

impl Filled {
    fn new(cx: &Cx<'_>, layout: CacheLayout, positions: usize) -> Self {
        let mut bytes = vec![0; layout.size_bytes()];
        let rows = noise(positions * layout.kv_heads() * layout.head_dim());
        let mut cache = CacheMut { layout, bytes: &mut bytes };
        append(cx, &mut cache, 0, &rows, &rows).expect("fits");
        Self { layout, bytes }
    }

    fn view(&self) -> Cache<'_> {
        Cache { layout: self.layout, bytes: &self.bytes }
    }
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// `m` new rows on top of `past`, for two models' heads.
fn depth(criterion: &mut Criterion, past: usize, m: usize) {
    let mut group = criterion.benchmark_group("attention");
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (12, 2, 128)] {
        for (name, format) in FORMATS {
            let layout = CacheLayout::new(kv_heads, head_dim, past + m, format).expect("sizes are fine");
            let bytes = (past + m) * kv_heads * head_dim * 2 * format.element_bytes();
            let products = 2 * heads * head_dim * (m * past + m * (m + 1) / 2);
            let decode = Throughput::Bytes(bytes as u64);
            group.throughput(if m == 1 { decode } else { Throughput::Elements(products as u64) });
            for threads in [1, 2] {
                let workers = Workers::new(threads).expect("threads can be started");
                for kernels in Kernels::available() {
                    let cx = Cx { kernels, workers: &workers };
                    let filled = Filled::new(&cx, layout, past + m);
                    let q = noise(m * heads * head_dim);
                    let mut out = vec![0.0; q.len()];
                    let scale = 1.0 / (head_dim as f32).sqrt();
                    let params = AttentionParams { heads, scale, window: None, softcap: None };
                    let mut scratch = AttentionScratch::new(threads, layout, heads).expect("fits");
                    let shape = format!("m{m}_past{past}_h{heads}_kv{kv_heads}_d{head_dim}");
                    group.bench_function(format!("{name}/{shape}/{}/t{threads}", kernels.name), |bencher| {
                        bencher.iter(|| {
                            attention(&cx, &filled.view(), past, &q, &params, &mut scratch, &mut out).expect("fits");
                        });
                    });
                }
            }
        }
    }
}

fn decode(criterion: &mut Criterion) {
    for past in [0, 512, 2048, 8192] {
        depth(criterion, past, 1);
    }
}

fn prefill(criterion: &mut Criterion) {
    for past in [0, 1920] {
        depth(criterion, past, 128);
    }
}

criterion_group!(benches, decode, prefill);
criterion_main!(benches);
