use half::f16;

use super::*;
use crate::packed::{BlockOffset, PackedLayout, WeightFormat};
use crate::quantize::{ActBits, quantize_rows};
use crate::testing::{
    FLOAT_FORMATS, Noise, bits, block_formats, each_tier, integer_formats, portable, rounded_product, rounding_unit,
    rounds, team, weights,
};
use crate::{Kernels, Workers};

mod branches;

/// Makes a layout of `n`, `k` and a format.
type LayoutOf = fn(usize, usize, WeightFormat) -> Result<PackedLayout, ShapeError>;
const NEW: LayoutOf = PackedLayout::new;
const TIGHT: LayoutOf = PackedLayout::tight;

const BITS: [ActBits; 2] = [ActBits::Eight, ActBits::Sixteen];

fn part<'a>(weights: PackedWeights<'a>, out: &'a mut [f32]) -> Part<'a> {
    Part { weights, bias: None, branch: None, write: Write::Store, out }
}

/// Quantizes `x` for weights of `layout`.
fn quantized(cx: &Cx<'_>, x: &[f32], layout: &PackedLayout, act: ActBits) -> QuantizedRows {
    let sum_block = layout.format().block().unwrap_or(layout.k());
    let mut rows = QuantizedRows::new(x.len() / layout.k(), layout.k(), act, sum_block).expect("sizes are fine");
    quantize_rows(cx, x, &mut rows).expect("lengths match");
    rows
}

/// `x · Wᵀ` by one weight.
fn product(cx: &Cx<'_>, x: Rows<'_>, weights: PackedWeights<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.count() * weights.layout().n()];
    linear(cx, x, &mut [part(weights, &mut out)]).expect("lengths match");
    out
}

/// Asserts that every tier gives the bits of `portable`, or, where it rounds weights, those of the definition.
fn assert_tiers_agree(workers: &Workers, rows: &QuantizedRows, weights: PackedWeights<'_>, what: &str) {
    let expected = bits(&product(&portable(workers), Rows::Quantized(rows), weights));
    let mut rounded = None;
    each_tier(workers, |cx| {
        let expected = match rounds(cx.kernels, weights, rows.rows()) {
            true => rounded.get_or_insert_with(|| bits(&rounded_product(rows, weights))),
            false => &expected,
        };
        let found = bits(&product(cx, Rows::Quantized(rows), weights));
        assert!(found == *expected, "{} {}x{:?} {what}", cx.kernels.name, rows.rows(), weights.layout());
    });
}

/// `x · Wᵀ` in f64, and the sum of the products' magnitudes.
fn oracle(x: impl Fn(usize, usize) -> f64, m: usize, weights: PackedWeights<'_>) -> Vec<(f64, f64)> {
    let (n, k) = (weights.layout().n(), weights.layout().k());
    let mut w = vec![0.0; k];
    let mut out = vec![(0.0, 0.0); m * n];
    for column in 0..n {
        weights.dequantize_row(column, &mut w);
        for row in 0..m {
            let products = w.iter().enumerate().map(|(i, &w)| x(row, i) * f64::from(w));
            out[row * n + column] = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
        }
    }
    out
}

fn assert_near(found: &[f32], expected: &[(f64, f64)], bound: f64, what: &str) {
    for (i, (&found, &(expected, size))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= bound * size + 1e-30, "{what}: value {i} is {found}, expected {expected} (size {size})");
    }
}

/// Quantized products are the f64 products of what codes and scales stand for, up to f32 rounding.
#[test]
fn integer_products_mean_what_the_encoding_says() {
    let workers = team(2);
    let mut noise = Noise(1);
    for (m, n, k) in [(1, 1, 32), (3, 17, 64), (2, 40, 36), (5, 33, 576), (1, 16, 7)] {
        for format in integer_formats(k) {
            let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
            let blob = weights(&layout, 7);
            let w = layout.view(&blob).expect("length matches");
            let x = noise.floats(m * k);
            for act in BITS {
                let cx = portable(&workers);
                let rows = quantized(&cx, &x, &layout, act);
                let expected = oracle(|r, i| f64::from(rows.code(r, i)) * f64::from(rows.scale(r)), m, w);
                let found = product(&cx, Rows::Quantized(&rows), w);
                // Minima and offsets make large terms that cancel; the bound is relative to the terms, not the sum.
                let bound = if format.block().is_some() && format.bits() < 8 { 4e-5 } else { 2e-6 };
                assert_near(&found, &expected, bound, &format!("{m}x{n}x{k} {format:?} {act:?}"));
            }
        }
    }
}

/// Products by weights that a tier rounds are within the stated bound of what the encoding says.
#[test]
fn rounded_products_are_within_the_bound() {
    let workers = team(2);
    let mut noise = Noise(31);
    for (m, n, k) in [(16, 17, 32), (33, 40, 576), (16, 16, 1536)] {
        for format in integer_formats(k).into_iter().filter(|format| format.block().is_some()) {
            let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
            let blob = weights(&layout, 7);
            let w = layout.view(&blob).expect("length matches");
            let units: Vec<f64> = (0..n).map(|output| f64::from(rounding_unit(w, output))).collect();
            let x = noise.floats(m * k);
            for act in BITS {
                let rows = quantized(&portable(&workers), &x, &layout, act);
                let value = |row: usize, i: usize| f64::from(rows.value(row, i));
                let expected = oracle(value, m, w);
                let sums: Vec<f64> = (0..m).map(|row| (0..k).map(|i| value(row, i).abs()).sum()).collect();
                each_tier(&workers, |cx| {
                    let found = product(cx, Rows::Quantized(&rows), w);
                    // Minima and offsets make large terms that cancel where nothing is rounded.
                    let floats = if rounds(cx.kernels, w, m) || format.bits() == 8 { 2e-6 } else { 4e-5 };
                    for (i, (&found, &(expected, size))) in found.iter().zip(&expected).enumerate() {
                        let row = i / n;
                        let low = if act == ActBits::Eight { 0.0 } else { 16384.0 * f64::from(rows.scale(row)) };
                        let bound = units[i % n] * (1.5 * sums[row] + k as f64 * low) + floats * size;
                        let error = (f64::from(found) - expected).abs();
                        assert!(error <= bound, "{} {format:?} {act:?}: {found}, expected {expected}", cx.kernels.name);
                    }
                });
            }
        }
    }
}

/// Products with rows on a grid whose code 0 is not 0 are those of the floats that the codes stand for, in every format and
/// tier, and are refused without the sums of the weights' rows.
#[test]
fn products_on_a_shifted_grid_mean_what_the_grid_says() {
    let workers = team(2);
    let mut noise = Noise(11);
    let (m, n, k) = (19, 37, 64);
    for format in integer_formats(k) {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 7);
        let w = layout.view(&blob).expect("length matches");
        let sums = sum_rows(&portable(&workers), w).expect("integer weights");
        for (act, low, high) in
            [(ActBits::Sixteen, 0, 65535), (ActBits::Sixteen, -60000, 5535), (ActBits::Eight, -10, 245)]
        {
            let x: Vec<f32> = noise.floats(m * k).iter().map(|x| (x + 0.4) * high as f32 * 0.7).collect();
            each_tier(&workers, |cx| {
                let sum_block = format.block().unwrap_or(k);
                let mut rows = QuantizedRows::new(m, k, act, sum_block).expect("sizes are fine");
                rows.set_grid(crate::Grid::new(0.01, low, high)).expect("the grid fits");
                quantize_rows(cx, &x.iter().map(|x| x * 0.01).collect::<Vec<f32>>(), &mut rows).expect("lengths match");
                assert!(linear(cx, Rows::Quantized(&rows), &mut [part(w, &mut vec![0.0; m * n])]).is_err());
                let found = product(cx, Rows::Quantized(&rows), w.with_row_sums(&sums).expect("one for each row"));
                let value = |r: usize, i: usize| f64::from(rows.value(r, i));
                // The products of the codes and of the shift are large and cancel.
                let expected: Vec<(f64, f64)> = oracle(value, m, w)
                    .into_iter()
                    .zip(oracle(|_, _| 660.0, m, w))
                    .map(|((sum, size), (_, shifted))| (sum, size + shifted))
                    .collect();
                assert_near(&found, &expected, 4e-5, &format!("{format:?} {act:?} {low}..{high} {}", cx.kernels.name));
            });
        }
    }
}

/// Rows with room for 16 bits that are on a grid of 256 steps give the bits of rows with room for 8, also right after rows of
/// 16 bits.
#[test]
fn few_steps_are_eight_bits_wherever_they_are_kept() {
    let workers = team(2);
    let (m, n, k) = (5, 40, 96);
    let layout = PackedLayout::new(n, k, WeightFormat::Int4Expansion { block: 32 }).expect("sizes are fine");
    let blob = weights(&layout, 7);
    let w = layout.view(&blob).expect("length matches");
    let sums = sum_rows(&portable(&workers), w).expect("integer weights");
    let w = w.with_row_sums(&sums).expect("one for each row");
    let x = Noise(13).floats(m * k);
    each_tier(&workers, |cx| {
        let few = crate::Grid::new(0.01, -60, 195).expect("zero is on it");
        let products = [ActBits::Eight, ActBits::Sixteen].map(|act| {
            let mut rows = QuantizedRows::new(m, k, act, 32).expect("sizes are fine");
            quantize_rows(cx, &x, &mut rows).expect("lengths match");
            assert_eq!(rows.bits(), act);
            rows.set_grid(Some(few)).expect("the grid fits");
            quantize_rows(cx, &x, &mut rows).expect("lengths match");
            bits(&product(cx, Rows::Quantized(&rows), w))
        });
        assert_eq!(products[0], products[1], "{}", cx.kernels.name);
    });
}

/// Every tier gives the bits of `portable` for integer weights, or those of the rounding that it states, at every edge of a tile.
#[test]
fn tiers_agree_on_integer_products() {
    // One worker has tiles of many panels.
    let (one, two) = (team(1), team(2));
    let mut noise = Noise(2);
    let rows_and_columns = [
        (0, 5),
        (1, 1),
        (1, 15),
        (1, 112),
        (2, 16),
        (3, 17),
        (4, 31),
        (5, 67),
        (7, 48),
        (8, 16),
        (9, 33),
        (2, 130),
        (7, 130),
        (13, 130),
        (131, 19),
    ];
    for k in [32, 36, 72, 100, 256, 576] {
        for format in integer_formats(k) {
            for (m, n) in rows_and_columns {
                let workers = if m == 1 || n == 130 { &one } else { &two };
                let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
                let blob = weights(&layout, 11);
                let w = layout.view(&blob).expect("length matches");
                let x: Vec<f32> = (0..m * k).map(|_| f32::from(noise.code(-1, 1)) * 2.0 + noise.float()).collect();
                for act in BITS {
                    let rows = quantized(&portable(workers), &x, &layout, act);
                    assert_tiers_agree(workers, &rows, w, &format!("{act:?}"));
                }
            }
        }
    }
}

/// A tight layout changes where weights lie and nothing else: every tier gives the bits of the padded layout.
#[test]
fn tight_layouts_give_the_same_bits() {
    let workers = team(2);
    let mut noise = Noise(12);
    for k in [1, 4, 5, 12, 36, 64, 100, 576] {
        let formats = [WeightFormat::Int8PerChannel, WeightFormat::Int4PerChannel];
        for (format, n) in formats.into_iter().flat_map(|f| [1, 4, 5, 8, 12, 13, 16, 24, 28, 140].map(|n| (f, n))) {
            let padded = PackedLayout::new(n, k, format).expect("sizes are fine");
            let tight = PackedLayout::tight(n, k, format).expect("sizes are fine");
            let blobs = [weights(&padded, 59), weights(&tight, 59)];
            let padded = padded.view(&blobs[0]).expect("length matches");
            let tight = tight.view(&blobs[1]).expect("length matches");
            for (m, act) in [1, 2, 3, 5, 9, 33].into_iter().flat_map(|m| BITS.map(|act| (m, act))) {
                let x = noise.floats(m * k);
                let rows = quantized(&portable(&workers), &x, &padded.layout(), act);
                let expected = bits(&product(&portable(&workers), Rows::Quantized(&rows), padded));
                each_tier(&workers, |cx| {
                    let found = bits(&product(cx, Rows::Quantized(&rows), tight));
                    assert_eq!(found, expected, "{} {m}x{n}x{k} {format:?} {act:?}", cx.kernels.name);
                });
            }
        }
    }
}

/// The largest codes everywhere, in both signs, do not overflow or saturate on any tier, in one row or several.
#[test]
fn extreme_codes_do_not_saturate() {
    let workers = team(1);
    for (m, k) in [(1, 512), (1, 1536), (3, 480), (13, 512), (13, 1536), (33, 512)] {
        for (format, code) in
            integer_formats(k).into_iter().flat_map(|f| [(f, *f.codes().start()), (f, *f.codes().end())])
        {
            let layout = PackedLayout::new(16, k, format).expect("sizes are fine");
            let blob = extreme_weights(&layout, code);
            let w = layout.view(&blob).expect("length matches");
            // Dynamic scales, and the widest grids that have their zero at code 0.
            let widest = |act| match act {
                ActBits::Eight => (crate::Grid::new(1.0, -128, 127), [-128.0, 127.0]),
                ActBits::Sixteen => (crate::Grid::new(1.0, -32896, 32639), [-32896.0, 32639.0]),
            };
            for act in BITS {
                let (grid, ends) = widest(act);
                // The scale comes out as exactly 1, so codes are the values.
                let limit = act.limit() as f32;
                for (grid, x) in [(None, limit), (None, -limit), (grid, ends[0]), (grid, ends[1])] {
                    let mut rows = quantized(&portable(&workers), &vec![x; m * k], &layout, act);
                    rows.set_grid(grid).expect("the grid fits");
                    quantize_rows(&portable(&workers), &vec![x; m * k], &mut rows).expect("lengths match");
                    let expected = oracle(|_, _| f64::from(x), m, w);
                    let portable = product(&portable(&workers), Rows::Quantized(&rows), w);
                    assert_near(&portable, &expected, 1e-5, &format!("{format:?} {act:?} {x}"));
                    assert_tiers_agree(&workers, &rows, w, &format!("{act:?} {x}"));
                }
            }
        }
    }
}

/// One output of many whose sum is as large as 32 bits hold, or just larger, comes out right wherever it lies in the tile.
#[test]
fn the_largest_sums_are_exact() {
    let workers = team(1);
    let (m, n, k) = (7, 48, 512);
    let widest = crate::Grid::new(1.0, -32896, 32639);
    let steps = vec![crate::packed::MAX_STEP; n * k / 32];
    for (format, low, high) in
        [(WeightFormat::Int8PerChannel, -128, 127), (WeightFormat::Int4Expansion { block: 32 }, 0, 15)]
    {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let offsets = if layout.steps() > 0 { crate::Offsets::Steps(&steps) } else { crate::Offsets::None };
        // The last with codes that differ, so that a sum with signs would be small.
        for (zeros, mixed, output) in [(1, false, 29), (2, false, 20), (4, false, 47), (0, true, 29), (3, true, 1)] {
            let code = |i: usize| if mixed && i % 2 == 1 { high } else { low };
            let mut codes = vec![format.zero_code(); n * k];
            (0..k - zeros).for_each(|i| codes[output * k + i] = code(i));
            let blob = crate::pack_quantized(&layout, &codes, &vec![1.0; n], offsets).expect("lengths match");
            let w = layout.view(&blob).expect("length matches");
            let x: Vec<f32> = (0..m * k).map(|i| if code(i % k) == low { -32896.0 } else { 32639.0 }).collect();
            let mut rows = QuantizedRows::new(m, k, ActBits::Sixteen, k).expect("sizes are fine");
            rows.set_grid(widest).expect("the grid fits");
            quantize_rows(&portable(&workers), &x, &mut rows).expect("lengths match");
            let expected = bits(&product(&portable(&workers), Rows::Quantized(&rows), w));
            each_tier(&workers, |cx| {
                let found = bits(&product(cx, Rows::Quantized(&rows), w));
                assert_eq!(found, expected, "{} {format:?} {zeros} {mixed} {output}", cx.kernels.name);
            });
        }
    }
}

/// Where the low bytes of x alone sum to more than a float holds, all of it is rounded as `portable` rounds it.
#[test]
fn sums_of_low_bytes_round_alike() {
    let workers = team(1);
    let (n, k) = (64, 4096);
    let layout = PackedLayout::new(n, k, WeightFormat::Int8PerChannel).expect("sizes are fine");
    let mut noise = Noise(61);
    let codes: Vec<i8> = noise.floats(n * k).into_iter().map(|noise| 113 + (noise * 12.0) as i8).collect();
    let blob = crate::pack_quantized(&layout, &codes, &vec![1.0; n], crate::Offsets::None).expect("lengths match");
    let w = layout.view(&blob).expect("length matches");
    for m in [1, 3] {
        let x = |(i, noise): (usize, f32)| if i.is_multiple_of(512) { 32000.0 } else { 113.0 + (noise * 12.0).round() };
        let x: Vec<f32> = noise.floats(m * k).into_iter().enumerate().map(x).collect();
        let mut rows = QuantizedRows::new(m, k, ActBits::Sixteen, k).expect("sizes are fine");
        rows.set_grid(crate::Grid::new(1.0, -32896, 32639)).expect("the grid fits");
        quantize_rows(&portable(&workers), &x, &mut rows).expect("lengths match");
        let expected = bits(&product(&portable(&workers), Rows::Quantized(&rows), w));
        each_tier(&workers, |cx| {
            assert_eq!(bits(&product(cx, Rows::Quantized(&rows), w)), expected, "{} {m}", cx.kernels.name);
        });
    }
}

/// The longest rows that are allowed give the bits of `portable`: several with the smallest blocks, and one, which has more
/// inputs and blocks than some kernels for one row have room for.
#[test]
fn the_longest_rows_agree() {
    let workers = team(1);
    let (n, k) = (16, crate::packed::MAX_INTEGER_K);
    let x = Noise(18).floats(16 * k);
    for (m, format) in [
        (16, WeightFormat::Int8Block { block: 256 }),
        (5, WeightFormat::Int4Expansion { block: 8 }),
        (1, WeightFormat::Int4Expansion { block: 32 }),
        (1, WeightFormat::Int8Block { block: 32 }),
        (1, WeightFormat::Int8PerChannel),
    ] {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 17);
        let w = layout.view(&blob).expect("length matches");
        for act in BITS {
            let rows = quantized(&portable(&workers), &x[..m * k], &layout, act);
            assert_tiers_agree(&workers, &rows, w, &format!("{act:?}"));
        }
    }
}

/// The largest sums of the longest rows fit where weights are rounded, too: the lowest codes of x by weights of either sign.
#[test]
fn the_largest_rounded_sums_fit() {
    let workers = team(1);
    let (m, n, k) = (16, 16, crate::packed::MAX_INTEGER_K);
    let layout = PackedLayout::new(n, k, WeightFormat::Int8Block { block: 256 }).expect("sizes are fine");
    let mut rows = QuantizedRows::new(m, k, ActBits::Sixteen, 256).expect("sizes are fine");
    rows.set_grid(crate::Grid::new(1.0, -32896, 32639)).expect("the grid fits");
    quantize_rows(&portable(&workers), &vec![-32896.0; m * k], &mut rows).expect("lengths match");
    for scale in [1.0, -1.0] {
        let scales = vec![scale; n * layout.blocks()];
        let blob = crate::pack_quantized(&layout, &vec![-128; n * k], &scales, crate::Offsets::None);
        let blob = blob.expect("lengths match");
        assert_tiers_agree(&workers, &rows, layout.view(&blob).expect("length matches"), "");
    }
}

/// Weights that are all one code, with the largest steps or offsets.
fn extreme_weights(layout: &PackedLayout, code: i8) -> Vec<u8> {
    let (n, format) = (layout.n(), layout.format());
    let scales = vec![1.0; n * layout.blocks()];
    let integers = vec![if code == 0 { -128 } else { 127 }; scales.len()];
    let steps = vec![crate::packed::MAX_STEP; n * layout.steps()];
    let offsets = match format.block_offset() {
        BlockOffset::Integer => crate::Offsets::Integer(&integers),
        BlockOffset::Min => crate::Offsets::Min(&scales),
        BlockOffset::Symmetric if layout.steps() > 0 => crate::Offsets::Steps(&steps),
        BlockOffset::Symmetric => crate::Offsets::None,
    };
    crate::pack_quantized(layout, &vec![code; n * layout.k()], &scales, offsets).expect("lengths match")
}

/// Float rows by any weights stay within the stated bound of the f64 product, on every tier.
#[test]
fn float_products_are_within_the_bound() {
    let workers = team(2);
    let mut noise = Noise(3);
    for (m, n, k) in
        [(0, 3, 8), (1, 1, 1), (1, 15, 8), (3, 8, 129), (2, 130, 64), (5, 65, 129), (17, 64, 96), (6, 33, 576)]
    {
        let mut formats = FLOAT_FORMATS.to_vec();
        formats.extend(integer_formats(k));
        for (format, layout_of) in formats.into_iter().flat_map(|f| [(f, NEW), (f, TIGHT)]) {
            let layout = layout_of(n, k, format).expect("sizes are fine");
            let blob = weights(&layout, 13);
            let w = layout.view(&blob).expect("length matches");
            let x = noise.floats(m * k);
            let expected = oracle(|row, i| f64::from(x[row * k + i]), m, w);
            each_tier(&workers, |cx| {
                let found = product(cx, Rows::F32 { x: &x, m }, w);
                let bound = (k + 2) as f64 * f64::from(f32::EPSILON);
                assert_near(&found, &expected, bound, &format!("{} {m}x{n}x{k} {format:?}", cx.kernels.name));
            });
        }
    }
}

/// A result depends neither on the number of workers nor on which rows and parts are computed together, as far as these do not decide
/// whether weights are rounded.
#[test]
fn results_do_not_depend_on_the_split() {
    let teams: Vec<Workers> = (1..=4).map(team).collect();
    let k = 96;
    // Four workers leave the last of their tiles 17 rows, one worker has 65 there; or they have tiles of other panels.
    let shapes = [(257, 35), (33, 400)];
    let formats = integer_formats(k).into_iter().chain(FLOAT_FORMATS);
    for (format, (m, n)) in formats.flat_map(|format| shapes.map(|shape| (format, shape))) {
        let x = Noise(4).floats(m * k);
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 17);
        let w = layout.view(&blob).expect("length matches");
        for kernels in Kernels::available() {
            let run = |workers: &Workers, x: &[f32]| {
                let cx = Cx { kernels, workers };
                let rows = quantized(&cx, x, &layout, ActBits::Sixteen);
                let float = Rows::F32 { x, m: x.len() / k };
                product(&cx, if format.is_float() { float } else { Rows::Quantized(&rows) }, w)
            };
            let expected = bits(&run(&teams[0], &x));
            for workers in &teams {
                assert_eq!(
                    bits(&run(workers, &x)),
                    expected,
                    "{} {format:?} {} workers",
                    kernels.name,
                    workers.count()
                );
            }
            // Few rows are not rounded.
            let rows_at_once = if rounds(kernels, w, m) { m.div_ceil(3).max(17) } else { 1 };
            let in_parts: Vec<f32> = x.chunks(rows_at_once * k).flat_map(|x| run(&teams[1], x)).collect();
            assert_eq!(bits(&in_parts), expected, "{} {format:?} {rows_at_once} at once", kernels.name);
        }
    }
}

/// A tile of few rows that is what many leave over is rounded as they are.
#[test]
fn rows_left_over_are_rounded_too() {
    let workers = team(2);
    // Seven tiles of 128 rows, and one.
    let (m, n, k) = (897, 16, 64);
    let x = Noise(33).floats(m * k);
    for format in block_formats(32).into_iter().filter(|format| format.block().is_some()) {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 83);
        let rows = quantized(&portable(&workers), &x, &layout, ActBits::Sixteen);
        assert_tiers_agree(&workers, &rows, layout.view(&blob).expect("length matches"), "");
    }
}

/// Real layers: every tier agrees, on one row and on some.
#[test]
fn real_layers_agree() {
    let workers = team(2);
    let formats = [
        WeightFormat::Int4Block { block: 32, offset: BlockOffset::Symmetric },
        WeightFormat::Int5Block { block: 32, offset: BlockOffset::Symmetric },
        WeightFormat::Int6Block { block: 16 },
        WeightFormat::Int4Expansion { block: 32 },
        WeightFormat::Int8PerChannel,
    ];
    for (format, (m, n, k)) in
        formats.into_iter().flat_map(|f| [(1, 1536, 576), (30, 576, 1536), (1, 49152, 576)].map(|shape| (f, shape)))
    {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 19);
        let w = layout.view(&blob).expect("length matches");
        let x = Noise(5).floats(m * k);
        let rows = quantized(&portable(&workers), &x, &layout, ActBits::Sixteen);
        assert_tiers_agree(&workers, &rows, w, "");
    }
}

/// Rows longer than any buffer that a kernel unpacks them to give the same bits too, also where the buffer ends inside a block.
#[test]
fn long_rows_agree() {
    // One worker gets all panels as one tile: some kernels take two at a time, and the last one alone.
    let workers = team(1);
    let (m, n) = (37, 40);
    let long = integer_formats(4168).into_iter().filter(|format| format.block().is_none()).map(|format| (format, 4168));
    for (format, k) in long.chain([(WeightFormat::Int4Expansion { block: 72 }, 1224)]) {
        let x = Noise(14).floats(m * k);
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let blob = weights(&layout, 61);
        let w = layout.view(&blob).expect("length matches");
        for act in BITS {
            let rows = quantized(&portable(&workers), &x, &layout, act);
            let expected = bits(&product(&portable(&workers), Rows::Quantized(&rows), w));
            each_tier(&workers, |cx| {
                assert!(bits(&product(cx, Rows::Quantized(&rows), w)) == expected, "{} {format:?}", cx.kernels.name)
            });
        }
    }
}

/// Blocks of one tile of a matrix unit and of several, one in a row and more than a kernel takes at a time, give the same bits
/// too: with two panels at a time and a last one alone, with rows that fill whole tiles and not, and with the most that a tile has.
#[test]
fn rows_of_few_and_many_blocks_agree() {
    // One worker gets all panels as one tile.
    let workers = team(1);
    for (block, blocks) in [(16, 81), (32, 2), (32, 15), (32, 39), (64, 21), (128, 11), (256, 1), (256, 5)] {
        let k = block * blocks;
        let x = Noise(15).floats(128 * k);
        for format in block_formats(block).into_iter().filter(|format| format.block().is_some()) {
            for (m, n) in [(53, 40), (13, 48), (34, 16), (128, 16)] {
                let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
                let blob = weights(&layout, 73);
                let w = layout.view(&blob).expect("length matches");
                for act in BITS {
                    let rows = quantized(&portable(&workers), &x[..m * k], &layout, act);
                    assert_tiers_agree(&workers, &rows, w, &format!("{act:?}"));
                }
            }
        }
    }
}

/// The fused gate gives the bits of its three steps, in every format, also with biases and on a shifted grid, and where only one
/// of the halves lies tight.
#[test]
fn gated_linear_is_gate_times_up() {
    let workers = team(2);
    let (m, n) = (21, 70);
    let bias = Noise(8).floats(n);
    let layouts = [(64, [NEW, NEW]), (20, [NEW, TIGHT]), (20, [TIGHT, NEW])];
    for (k, layout_of, format) in
        layouts.into_iter().flat_map(|(k, layout_of)| integer_formats(k).into_iter().map(move |f| (k, layout_of, f)))
    {
        let x = Noise(9).floats(m * k);
        let layouts = layout_of.map(|layout_of| layout_of(n, k, format).expect("sizes are fine"));
        let blobs = [weights(&layouts[0], 41), weights(&layouts[1], 43)];
        let halves = [0, 1].map(|i| layouts[i].view(&blobs[i]).expect("length matches"));
        let sums = halves.map(|half| sum_rows(&portable(&workers), half).expect("integer weights"));
        let [gate, up] = [0, 1].map(|i| halves[i].with_row_sums(&sums[i]).expect("one for each row"));
        let grids = [
            (ActBits::Eight, None),
            (ActBits::Sixteen, None),
            (ActBits::Sixteen, crate::Grid::new(1e-4, -9000, 20000)),
        ];
        for (i, (act, grid)) in grids.into_iter().enumerate() {
            each_tier(&workers, |cx| {
                let mut rows = QuantizedRows::new(m, k, act, format.block().unwrap_or(k)).expect("sizes are fine");
                rows.set_grid(grid).expect("the grid fits");
                quantize_rows(cx, &x, &mut rows).expect("lengths match");
                let rows = Rows::Quantized(&rows);
                let bias = (i > 0).then_some(&bias[..]);
                for activation in [Activation::Silu, Activation::Gelu] {
                    let mut gates = vec![0.0; m * n];
                    linear(cx, rows, &mut [Part { bias, ..part(gate, &mut gates) }]).expect("lengths match");
                    let mut expected = vec![0.0; m * n];
                    match activation {
                        Activation::Silu => crate::elementwise::silu(cx, &gates, &mut expected),
                        Activation::Gelu => crate::elementwise::gelu_tanh(cx, &gates, &mut expected),
                    }
                    .expect("lengths match");
                    crate::elementwise::mul_assign(cx, &mut expected, &product(cx, rows, up)).expect("lengths match");
                    let mut found = vec![0.0; m * n];
                    let halves = GateUp {
                        gate: Gate { weights: gate, bias, branch: None },
                        up: Gate { weights: up, bias: None, branch: None },
                    };
                    gated_linear(cx, rows, halves, activation, &mut found).expect("lengths match");
                    assert_eq!(bits(&found), bits(&expected), "{} {format:?} {k} {activation:?}", cx.kernels.name);
                }
            });
        }
    }
}

/// A scale of a block that is no number makes its output one that is none in every row, and leaves other outputs alone.
#[test]
fn broken_scales_are_contained() {
    let workers = team(1);
    let (m, n, k) = (17, 20, 64);
    let x = Noise(35).floats(m * k);
    for format in block_formats(32).into_iter().filter(|format| format.block().is_some()) {
        let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
        let codes = vec![3; n * k];
        // Scale 5, that of block 1 of output 2, is another one, so that its place shows: packing itself refuses what is no number.
        let mut scales = vec![0.5; n * layout.blocks()];
        scales[5] = 0.4375;
        let (integers, minima) = (vec![-8; scales.len()], vec![-1.0; scales.len()]);
        let offsets = match format.block_offset() {
            BlockOffset::Integer => crate::Offsets::Integer(&integers),
            BlockOffset::Min => crate::Offsets::Min(&minima),
            BlockOffset::Symmetric => crate::Offsets::None,
        };
        let sound = crate::pack_quantized(&layout, &codes, &scales, offsets).expect("lengths match");
        let is_scale = |bytes: &[u8]| bytes == f16::from_f32(0.4375).to_le_bytes();
        let at = sound.chunks(2).position(is_scale).expect("it is there") * 2;
        let rows = quantized(&portable(&workers), &x, &layout, ActBits::Sixteen);
        for broken in [f16::NAN, f16::INFINITY] {
            let mut blob = sound.clone();
            blob[at..at + 2].copy_from_slice(&broken.to_le_bytes());
            each_tier(&workers, |cx| {
                let [sound, found] = [&sound, &blob]
                    .map(|blob| product(cx, Rows::Quantized(&rows), layout.view(blob).expect("length matches")));
                for (i, (found, sound)) in found.iter().zip(sound).enumerate() {
                    let is_as_it_should =
                        if i % n == 2 { !found.is_finite() } else { found.to_bits() == sound.to_bits() };
                    assert!(is_as_it_should, "{} {format:?} {broken}: {i} is {found}, not {sound}", cx.kernels.name);
                }
            });
        }
    }
}

/// Rows with a NaN or an infinity give NaN and leave other rows alone.
#[test]
fn broken_rows_are_contained() {
    let workers = team(1);
    let layout = PackedLayout::new(16, 32, WeightFormat::Int8PerChannel).expect("sizes are fine");
    let blob = weights(&layout, 47);
    let mut x = Noise(10).floats(3 * 32);
    x[3] = f32::NAN;
    x[64 + 5] = f32::NEG_INFINITY;
    each_tier(&workers, |cx| {
        let rows = quantized(cx, &x, &layout, ActBits::Sixteen);
        let out = product(cx, Rows::Quantized(&rows), layout.view(&blob).expect("length matches"));
        assert!(out[..16].iter().chain(&out[32..]).all(|y| y.is_nan()));
        assert!(out[16..32].iter().all(|y| y.is_finite()));
    });
}

/// What does not fit is refused, and the outputs stay as they were.
#[test]
fn wrong_shapes_are_refused() {
    let workers = team(1);
    let cx = portable(&workers);
    let block = WeightFormat::Int8Block { block: 16 };
    let layout = PackedLayout::new(16, 32, block).expect("sizes are fine");
    let blob = weights(&layout, 53);
    let w = layout.view(&blob).expect("length matches");
    let float = PackedLayout::new(16, 32, WeightFormat::F32).expect("sizes are fine");
    let float_blob = weights(&float, 53);
    let x = vec![1.0; 64];
    let rows = quantized(&cx, &x, &layout, ActBits::Eight);
    let other_sums = quantized(&cx, &x, &float, ActBits::Eight);
    let up = PackedLayout::new(16, 16, WeightFormat::F32).expect("sizes are fine");
    let shorter = quantized(&cx, &x[..32], &up, ActBits::Eight);
    let check = |x: Rows<'_>, w: PackedWeights<'_>, out_len: usize, bias: Option<&[f32]>, message: &str| {
        let mut out = vec![7.0; out_len];
        let error = linear(&cx, x, &mut [Part { bias, ..part(w, &mut out) }]).expect_err(message);
        assert_eq!(error.to_string(), message);
        assert!(out.iter().all(|&y| y == 7.0));
    };
    check(Rows::Quantized(&rows), w, 31, None, "length of out: found 31, need 32");
    check(Rows::Quantized(&rows), w, 32, Some(&[0.0; 3]), "length of bias: found 3, need 16");
    check(Rows::F32 { x: &x[1..], m: 2 }, w, 32, None, "length of x: found 63, need 64");
    check(Rows::Quantized(&other_sums), w, 32, None, "block of sums in x: found 32, need 16");
    check(Rows::Quantized(&shorter), w, 32, None, "values in a row of x: found 16, need 32");
    let float = float.view(&float_blob).expect("length matches");
    check(Rows::Quantized(&rows), float, 32, None, "outputs of a float weight: found 16, need rows of floats");
    let mut outs = vec![vec![0.0; 32]; MAX_PARTS + 1];
    let mut parts: Vec<Part<'_>> = outs.iter_mut().map(|out| part(w, out)).collect();
    assert!(linear(&cx, Rows::Quantized(&rows), &mut parts).is_err());
    let check = |x: Rows<'_>, up: PackedWeights<'_>, alpha: &[f32], len: usize, message: &str| {
        let (mut out, mut t) = (vec![7.0; 32], vec![7.0; len]);
        let branch = Branch { x, down: w, alpha, up, t: &mut t };
        let part = Part { branch: Some(branch), ..part(w, &mut out) };
        let error = linear(&cx, Rows::Quantized(&rows), &mut [part]).expect_err(message);
        assert_eq!(error.to_string(), message);
        assert!(out.iter().chain(&t).all(|&y| y == 7.0));
    };
    let narrow = PackedLayout::new(8, 16, WeightFormat::F32).expect("sizes are fine");
    let (up_blob, narrow_blob) = (weights(&up, 53), weights(&narrow, 53));
    let up = up.view(&up_blob).expect("length matches");
    let narrow = narrow.view(&narrow_blob).expect("length matches");
    let x = Rows::Quantized(&rows);
    check(x, w, &[1.0], 32, "inputs of a branch's second half: found 32, need 16");
    check(x, narrow, &[1.0], 32, "outputs of a branch: found 8, need 16");
    check(x, up, &[1.0], 31, "length of out: found 31, need 32");
    check(x, up, &[], 32, "strengths of a branch: found 0, need at least 1");
    check(Rows::F32 { x: &[0.0; 32], m: 1 }, up, &[1.0], 32, "rows of x of a branch: found 1, need 2");
}

/// Halves of a gated layer with different outputs are refused, and the output stays as it was: with rows its length fits one of
/// them only, without any it fits both.
#[test]
fn halves_with_other_outputs_are_refused() {
    let workers = team(1);
    let cx = portable(&workers);
    let layouts = [16, 32].map(|n| PackedLayout::new(n, 32, WeightFormat::Int8PerChannel).expect("sizes are fine"));
    let blobs = layouts.map(|layout| weights(&layout, 53));
    let [gate, up] = [0, 1].map(|i| layouts[i].view(&blobs[i]).expect("length matches"));
    let x = vec![1.0; 64];
    for (m, message) in [(2, "length of out: found 32, need 64"), (0, "outputs of up: found 32, need 16")] {
        let halves = GateUp {
            gate: Gate { weights: gate, bias: None, branch: None },
            up: Gate { weights: up, bias: None, branch: None },
        };
        let mut out = vec![7.0; m * 16];
        let error =
            gated_linear(&cx, Rows::F32 { x: &x[..m * 32], m }, halves, Activation::Silu, &mut out).expect_err(message);
        assert_eq!(error.to_string(), message);
        assert!(out.iter().all(|&y| y == 7.0));
    }
}
