use super::*;
use crate::kernels::{Peak, WeightsMut};
use crate::testing::{Noise, bits, each_tier, team};
use crate::{Kernels, Workers};

/// A case: shapes, the cache's contents and the queries.
struct Case {
    layout: CacheLayout,
    params: AttentionParams,
    past: usize,
    m: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

impl Case {
    fn new(layout: CacheLayout, params: AttentionParams, past: usize, m: usize) -> Self {
        let mut noise = Noise((past * 31 + m) as u64);
        let row = layout.kv_heads() * layout.head_dim();
        let k = noise.floats((past + m) * row).iter().map(|k| k * 3.0).collect();
        let v = noise.floats((past + m) * row);
        let q = noise.floats(m * params.heads * layout.head_dim()).iter().map(|q| q * 3.0).collect();
        Self { layout, params, past, m, k, v, q }
    }

    /// The cache with all rows in it; what was never written is NaN.
    fn cache(&self, cx: &Cx<'_>) -> Vec<u8> {
        let mut bytes = vec![0xff; self.layout.size_bytes()];
        let mut cache = CacheMut { layout: self.layout, bytes: &mut bytes };
        let split = self.past * self.layout.kv_heads() * self.layout.head_dim();
        append(cx, &mut cache, 0, &self.k[..split], &self.v[..split]).expect("fits");
        append(cx, &mut cache, self.past, &self.k[split..], &self.v[split..]).expect("fits");
        bytes
    }

    fn run(&self, cx: &Cx<'_>) -> Vec<f32> {
        let bytes = self.cache(cx);
        let cache = Cache { layout: self.layout, bytes: &bytes };
        let workers = cx.workers.count();
        let mut scratch = AttentionScratch::new(workers, self.layout, self.params.heads).expect("fits");
        let mut out = vec![0.0; self.q.len()];
        attention(cx, &cache, self.past, &self.q, &self.params, &mut scratch, &mut out).expect("fits");
        out
    }

    /// The formula in f64, on what the cache's format makes of keys, values and queries.
    fn oracle(&self) -> Vec<f64> {
        let (d, kv_heads, heads) = (self.layout.head_dim(), self.layout.kv_heads(), self.params.heads);
        let mut out = vec![0.0; self.q.len()];
        for (at, out) in out.chunks_mut(d).enumerate() {
            let (row, head) = (at / heads, at % heads);
            let kv_head = head / (heads / kv_heads);
            let q = self.stored(&self.q[at * d..][..d], 127.0 * 256.0);
            let end = self.past + row + 1;
            let start = self.params.window.map_or(0, |window| end.saturating_sub(window));
            let scores: Vec<f64> = (start..end)
                .map(|position| {
                    let k = self.stored(&self.k[(position * kv_heads + kv_head) * d..][..d], 127.0);
                    let score = q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() * f64::from(self.params.scale);
                    self.params.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
            for (position, score) in (start..end).zip(&scores) {
                let v = self.stored(&self.v[(position * kv_heads + kv_head) * d..][..d], 127.0);
                out.iter_mut().zip(v).for_each(|(out, v)| *out += (score - max).exp() / sum * v);
            }
        }
        out
    }

    /// `x` as the cache's format stores it, with `limit` as the largest code.
    fn stored(&self, x: &[f32], limit: f32) -> Vec<f64> {
        let absmax = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let scale = absmax / limit;
        x.iter()
            .map(|&x| match (self.layout.format(), limit == 127.0) {
                (CacheFormat::F32, _) | (CacheFormat::F16, false) => f64::from(x),
                (CacheFormat::F16, true) => f64::from(half::f16::from_f32(x).to_f32()),
                (CacheFormat::Int8, _) => f64::from((x / scale).round_ties_even()) * f64::from(scale),
            })
            .collect()
    }
}

fn params(heads: usize, head_dim: usize) -> AttentionParams {
    AttentionParams { heads, scale: 1.0 / (head_dim as f32).sqrt(), window: None, softcap: None }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Int8] {
        let layout = |kv_heads, head_dim, capacity| {
            CacheLayout::new(kv_heads, head_dim, capacity, format).expect("sizes are fine")
        };
        for (past, m) in [(0, 1), (0, 5), (15, 1), (16, 3), (255, 2), (300, 1), (530, 18), (0, 70), (0, 0)] {
            cases.push(Case::new(layout(3, 64, 600), params(9, 64), past, m));
        }
        for between in [64, 4096] {
            let layout = layout(3, 64, 600);
            let layout = layout.with_range_stride(layout.range_bytes() + between).expect("it is more");
            cases.push(Case::new(layout, params(9, 64), 250, 20));
        }
        for head_dim in [1, 7, 36, 80, 128, 192] {
            cases.push(Case::new(layout(1, head_dim, 100), params(2, head_dim), 33, 4));
        }
        // More query heads than rows in a tile, in tiles of few rows and of many; more KV heads than workers.
        cases.push(Case::new(layout(1, 16, 300), params(60, 16), 270, 2));
        cases.push(Case::new(layout(1, 16, 300), params(60, 16), 270, 20));
        cases.push(Case::new(layout(13, 8, 300), params(13, 8), 270, 1));
        let window = |window| AttentionParams { window: Some(window), ..params(4, 32) };
        for (past, m, size) in [(0, 40, 8), (500, 1, 300), (500, 20, 17), (600, 1, 1), (100, 3, 1000)] {
            cases.push(Case::new(layout(2, 32, 700), window(size), past, m));
        }
        // Ranges shared out that not every tile of a head sees.
        let narrow = AttentionParams { window: Some(17), ..params(8, 16) };
        cases.push(Case::new(layout(1, 16, 16384), narrow, 260, 20));
        let capped = AttentionParams { softcap: Some(2.0), ..params(4, 32) };
        cases.push(Case::new(layout(2, 32, 300), capped, 280, 6));
    }
    cases
}

/// Asking for a position ahead of time stays inside the cache for every format and position, and beyond the capacity too.
#[test]
fn prefetch_stays_inside() {
    let workers = team(1);
    for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Int8] {
        for (kv_heads, head_dim, capacity) in [(1, 1, 1), (3, 64, 300), (2, 30, RANGE), (1, MAX_HEAD_DIM, 17)] {
            let layout = CacheLayout::new(kv_heads, head_dim, capacity, format).expect("sizes are fine");
            let bytes = vec![0; layout.size_bytes()];
            each_tier(&workers, |cx| {
                for at in (0..capacity).chain([capacity, usize::MAX]) {
                    prefetch(cx, &Cache { layout, bytes: &bytes }, at);
                    prefetch(cx, &Cache { layout, bytes: &bytes[1..] }, at);
                }
            });
        }
    }
}

/// What lies between the ranges of a cache is not written.
#[test]
fn ranges_of_other_layers_stay() {
    let workers = team(2);
    for case in cases() {
        let (stride, range) = (case.layout.range_stride(), case.layout.range_bytes());
        each_tier(&workers, |cx| {
            for range in case.cache(cx).chunks(stride).map(|chunk| chunk.get(range..).unwrap_or_default()) {
                assert!(range.iter().all(|byte| *byte == 0xff), "{} {:?}", cx.kernels.name, case.layout);
            }
        });
    }
}

/// Attention is the f64 formula on what the cache stores, for every format, tier and mask.
#[test]
fn attention_is_the_formula() {
    let workers = team(2);
    for case in cases() {
        let expected = case.oracle();
        each_tier(&workers, |cx| {
            for (i, (found, expected)) in case.run(cx).iter().zip(&expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                let (past, m) = (case.past, case.m);
                // Probabilities of 15 bits meet values up to 1: 256 roundings of half a step each have this spread, times 4.
                let bound = if case.layout.format() == CacheFormat::Int8 { 3e-4 } else { 1e-5 };
                assert!(
                    error < bound,
                    "{} {:?} past {past} m {m}: {i}: {found} {expected}",
                    cx.kernels.name,
                    case.layout
                );
            }
        });
    }
}

/// With an int8 cache every tier gives the bits of `portable`.
#[test]
fn integer_attention_is_the_same_on_every_tier() {
    let workers = team(2);
    for case in cases().iter().filter(|case| case.layout.format() == CacheFormat::Int8) {
        let expected = bits(&case.run(&crate::testing::portable(&workers)));
        each_tier(&workers, |cx| {
            assert_eq!(bits(&case.run(cx)), expected, "{} {:?} past {}", cx.kernels.name, case.layout, case.past);
        });
    }
}

/// In an int8 cache what is not finite spoils the rows that see it, and no other.
#[test]
fn broken_rows_stay_in_their_rows() {
    let workers = team(2);
    let layout = CacheLayout::new(1, 20, 600, CacheFormat::Int8).expect("sizes are fine");
    let windowed = AttentionParams { window: Some(5), ..params(2, 20) };
    let clean = Case::new(layout, windowed, 270, 20);
    for (broken_key, broken_value) in [(f32::NAN, 0.0), (0.0, f32::NAN), (0.0, f32::INFINITY)] {
        let mut case = Case::new(layout, windowed, 270, 20);
        // Position 275 is seen by the rows 5..10.
        case.k[275 * 20 + 3] += broken_key;
        case.v[275 * 20 + 3] += broken_value;
        each_tier(&workers, |cx| {
            let (found, clean) = (case.run(cx), clean.run(cx));
            for (row, (found, clean)) in found.chunks(40).zip(clean.chunks(40)).enumerate() {
                let finite = found.iter().all(|y| y.is_finite());
                assert_eq!(finite, !(5..10).contains(&row), "{} row {row}", cx.kernels.name);
                assert!(!finite || bits(found) == bits(clean), "{} row {row}", cx.kernels.name);
            }
        });
    }
}

/// The codes of probabilities times scales use at least nine tenths of 127 · 256 (with scores of millions, which are rounded to
/// quarters, less), and never leave their planes, whatever the size of scores and scales.
#[test]
fn weights_fill_their_codes() {
    let mut noise = Noise(7);
    for (spread, scale) in [(1.0, 1.0), (30.0, 1e-3), (1e4, 1e-20), (3e6, 1e20), (0.0, 1e30), (8.0, 3e-33)] {
        let scores: Vec<f32> = (0..77).map(|_| noise.float() * spread + 0.3 * spread).collect();
        let scales: Vec<[u8; 4]> = (0..77).map(|_| (noise.float().abs() * scale).to_le_bytes()).collect();
        each_tier(&team(1), |Cx { kernels, .. }| {
            let (mut logs, mut found) = ([0.0; 77], [0.0; 2]);
            let ([mut hi, mut lo], [code_scale, factor]) = ([[0_i8; 77]; 2], &mut found.each_mut());
            let mut plane_sums = [0; 2];
            // SAFETY: the tier is of this CPU; all slices have a value for each score.
            let sum = unsafe {
                (kernels.log_scales)(&scales, &mut logs);
                let Peak { max, log_top } = (kernels.peak)(&scores, &logs);
                let to = [std::slice::from_mut(&mut **code_scale), std::slice::from_mut(&mut **factor)];
                (kernels.weight_scales)([&[max], &[log_top]], to);
                let out = WeightsMut { hi: &mut hi, lo: &mut lo, scale: code_scale, plane_sums: &mut plane_sums };
                (kernels.weigh)(&scores, &scales, [max, **factor], out)
            };
            let codes: Vec<i32> = hi.iter().zip(lo).map(|(&hi, lo)| 256 * i32::from(hi) + i32::from(lo)).collect();
            let top = codes.iter().copied().fold(0, i32::max);
            let (name, least) = (kernels.name, if spread < 1e6 { 29_260 } else { 1 });
            assert!((least..=32_520).contains(&top), "{name} {spread} {scale}: {top}");
            assert!(codes.iter().all(|code| *code >= 0), "{name} {spread} {scale}: {codes:?}");
            assert_eq!(plane_sums, [hi, lo].map(|plane| plane.iter().map(|&code| i32::from(code)).sum()), "{name}");
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exact: f64 = scores.iter().map(|score| f64::from(score - max).exp()).sum();
            assert!((f64::from(sum) / exact - 1.0).abs() < 1e-5, "{name} {spread} {scale}: {sum} {exact}");
        });
    }
}

/// Values of 0, and values too small for a scale, give 0 and no NaN.
#[test]
fn vanishing_values_give_zero() {
    let workers = team(2);
    for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Int8] {
        let layout = CacheLayout::new(1, 20, 600, format).expect("sizes are fine");
        for tiny in [0.0, 1e-39] {
            let mut case = Case::new(layout, params(2, 20), 270, 3);
            case.v.iter_mut().for_each(|v| *v *= tiny);
            each_tier(&workers, |cx| assert!(case.run(cx).iter().all(|y| y.abs() <= 1e-38), "{}", cx.kernels.name));
        }
    }
}

/// A result depends neither on the number of workers nor on which rows are computed together.
#[test]
fn results_do_not_depend_on_the_split() {
    let teams: Vec<Workers> = (1..=3).map(team).collect();
    for case in cases() {
        for kernels in Kernels::available() {
            let expected = bits(&case.run(&Cx { kernels, workers: &teams[0] }));
            for workers in &teams[1..] {
                let found = bits(&case.run(&Cx { kernels, workers }));
                assert_eq!(found, expected, "{} workers {} past {}", kernels.name, workers.count(), case.past);
            }
            let cx = Cx { kernels, workers: &teams[1] };
            let bytes = case.cache(&cx);
            let cache = Cache { layout: case.layout, bytes: &bytes };
            let mut scratch = AttentionScratch::new(2, case.layout, case.params.heads).expect("fits");
            let width = case.params.heads * case.layout.head_dim();
            for (row, q) in case.q.chunks(width).enumerate() {
                let mut out = vec![0.0; width];
                attention(&cx, &cache, case.past + row, q, &case.params, &mut scratch, &mut out).expect("fits");
                assert_eq!(
                    bits(&out),
                    expected[row * width..][..width],
                    "{} row {row} past {}",
                    kernels.name,
                    case.past
                );
            }
        }
    }
}

/// What does not fit is refused before anything is written.
#[test]
fn wrong_shapes_are_refused() {
    let workers = team(2);
    let cx = crate::testing::portable(&workers);
    let layout = CacheLayout::new(2, 8, 20, CacheFormat::Int8).expect("sizes are fine");
    let mut bytes = vec![1; layout.size_bytes()];
    let mut cache = CacheMut { layout, bytes: &mut bytes };
    let rows = vec![1.0; 3 * 16];
    let error = append(&cx, &mut cache, 18, &rows, &rows).expect_err("one too many");
    assert_eq!(error.to_string(), "positions after this step: found 21, need at most 20");
    assert!(append(&cx, &mut cache, usize::MAX, &rows, &rows).is_err());
    assert!(append(&cx, &mut cache, 0, &rows[1..], &rows).is_err());
    assert!(append(&cx, &mut cache, 0, &rows, &rows[16..]).is_err());
    assert!(cache.bytes.iter().all(|&byte| byte == 1));
    let mut scratch = AttentionScratch::new(2, layout, 4).expect("fits");
    let q = vec![1.0; 3 * 32];
    let good = params(4, 8);
    let mut refused = |past: usize, q: &[f32], params: AttentionParams, out_len: usize| {
        let mut out = vec![7.0; out_len];
        let error = attention(&cx, &cache.as_ref(), past, q, &params, &mut scratch, &mut out);
        assert!(error.is_err() && out.iter().all(|&y| y == 7.0), "past {past}, {params:?}");
    };
    refused(18, &q, good, 96);
    refused(0, &q[1..], good, 95);
    refused(0, &q, good, 95);
    refused(0, &q, AttentionParams { heads: 3, ..good }, 96);
    refused(0, &q, AttentionParams { heads: 6, ..good }, 96);
    refused(0, &q, AttentionParams { window: Some(0), ..good }, 96);
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(0, &q, AttentionParams { softcap: Some(cap), ..good }, 96);
    }
    for (kv_heads, head_dim, capacity, format) in [
        (1, 8, 20, CacheFormat::Int8),
        (2, 4, 20, CacheFormat::Int8),
        (2, 8, 300, CacheFormat::Int8),
        (2, 8, 20, CacheFormat::F32),
    ] {
        let other = CacheLayout::new(kv_heads, head_dim, capacity, format).expect("sizes are fine");
        let mut scratch = AttentionScratch::new(2, other, 4).expect("fits");
        let mut out = vec![7.0; 96];
        let error = attention(&cx, &cache.as_ref(), 0, &q, &good, &mut scratch, &mut out).expect_err("another layout");
        assert_eq!(error.what(), "capacity of scratch", "{other:?}");
        assert!(out.iter().all(|&y| y == 7.0), "{other:?}");
    }
    let range = layout.range_bytes();
    for stride in [0, range - 64, range + 4, usize::MAX / 64 * 64] {
        let refused = CacheLayout::new(2, 8, 600, CacheFormat::Int8).expect("sizes are fine").with_range_stride(stride);
        assert!(refused.is_err(), "stride {stride}");
    }
    assert!(CacheLayout::new(2, 1024, 20, CacheFormat::F32).is_err());
    assert!(CacheLayout::new(usize::MAX, 512, usize::MAX, CacheFormat::F32).is_err());
    assert!(CacheLayout::new(0, 8, 20, CacheFormat::F32).is_err());
}
