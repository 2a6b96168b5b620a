use super::*;
use crate::norm::{rms_norm, rms_norm_quantize};
use crate::testing::{Noise, bits, each_tier, portable, team};

const BITS: [ActBits; 2] = [ActBits::Eight, ActBits::Sixteen];

/// Codes and scales of all rows.
fn contents(rows: &QuantizedRows) -> (Vec<i32>, Vec<u32>, Vec<i32>, Vec<[i32; 2]>) {
    let codes = (0..rows.rows()).flat_map(|row| (0..rows.k()).map(move |k| rows.code(row, k))).collect();
    let sums = rows.sums[..rows.rows() * (rows.k() / rows.sum_block())].to_vec();
    (codes, bits(&rows.scales[..rows.rows()]), sums, rows.plane_sums[..rows.rows()].to_vec())
}

/// Codes are the rounded quotients, sums are the sums of codes, and every tier says the same.
#[test]
fn codes_are_rounded_quotients() {
    let workers = team(2);
    let mut noise = Noise(1);
    for (m, k, block) in
        [(1, 1, 1), (3, 7, 7), (2, 64, 32), (5, 80, 16), (2, 96, 96), (3, 192, 32), (5, 576, 64), (40, 576, 576)]
    {
        let x = noise.floats(m * k);
        for act in BITS {
            let mut expected = QuantizedRows::new(m, k, act, block).expect("sizes are fine");
            quantize_rows(&portable(&workers), &x, &mut expected).expect("lengths match");
            for (row, x) in x.chunks(k).enumerate() {
                let absmax = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                let scale = absmax / act.limit() as f32;
                assert_eq!(expected.scale(row), scale);
                for (i, x) in x.iter().enumerate() {
                    assert_eq!(expected.code(row, i), (x / scale).round_ties_even() as i32, "{act:?} {x}");
                }
                for b in 0..k / block {
                    let sum: i32 = (b * block..(b + 1) * block).map(|i| expected.code(row, i)).sum();
                    assert_eq!(expected.sums[row * (k / block) + b], sum);
                }
            }
            each_tier(&workers, |cx| {
                let mut found = QuantizedRows::new(m + 1, k, act, block).expect("sizes are fine");
                quantize_rows(cx, &x, &mut found).expect("lengths match");
                assert_eq!(contents(&found), contents(&expected), "{} {m}x{k} {act:?}", cx.kernels.name);
            });
        }
    }
}

/// Zeros, subnormals, ties, NaN and infinities do what the doc says, on every tier.
#[test]
fn odd_rows_are_defined() {
    let workers = team(1);
    each_tier(&workers, |cx| {
        for act in BITS {
            let mut rows = QuantizedRows::new(1, 4, act, 4).expect("sizes are fine");
            let mut run = |x: [f32; 4]| {
                quantize_rows(cx, &x, &mut rows).expect("lengths match");
                ([0, 1, 2, 3].map(|k| rows.code(0, k)), rows.scale(0))
            };
            assert_eq!(run([0.0, -0.0, 0.0, 0.0]), ([0; 4], 0.0));
            let limit = act.limit();
            assert_eq!(run([limit as f32, 0.5, 1.5, -2.5]), ([limit, 0, 2, -2], 1.0));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (codes, scale) = run([1.0, bad, -3.0, 0.0]);
                assert!(codes == [0; 4] && scale.is_nan());
            }
            // The smallest subnormal has no scale; a few hundred of them have a coarse one, and codes stay in range.
            assert_eq!(run([f32::from_bits(1), 0.0, 0.0, 0.0]), ([0; 4], 0.0));
            let (codes, _) = run([f32::from_bits(limit.cast_unsigned() * 3 / 2), 0.0, 0.0, 0.0]);
            assert!((0..=limit).contains(&codes[0]), "{codes:?}");
        }
    });
}

/// The norm is the f64 formula within a few ulp, the same bits on every tier, and fuses with quantization exactly.
#[test]
fn rms_norm_is_the_formula() {
    let workers = team(2);
    let mut noise = Noise(2);
    for (m, k) in [(0, 5), (1, 1), (3, 17), (2, 576), (20, 576)] {
        let (x, weight) = (noise.floats(m * k), noise.floats(k));
        let mut expected = vec![0.0; m * k];
        rms_norm(&portable(&workers), &x, &weight, 1e-5, &mut expected).expect("lengths match");
        for (x, found) in x.chunks(k).zip(expected.chunks(k)) {
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / k as f64;
            for ((x, w), found) in x.iter().zip(&weight).zip(found) {
                let exact = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(*found) - exact).abs() <= 4e-6 * exact.abs(), "{found} {exact}");
            }
        }
        each_tier(&workers, |cx| {
            let mut found = vec![0.0; m * k];
            rms_norm(cx, &x, &weight, 1e-5, &mut found).expect("lengths match");
            assert_eq!(bits(&found), bits(&expected), "{}", cx.kernels.name);
            let mut in_turn = QuantizedRows::new(m, k, ActBits::Sixteen, k).expect("sizes are fine");
            quantize_rows(cx, &found, &mut in_turn).expect("lengths match");
            let mut fused = QuantizedRows::new(m, k, ActBits::Sixteen, k).expect("sizes are fine");
            rms_norm_quantize(cx, &x, &weight, 1e-5, &mut fused).expect("lengths match");
            assert_eq!(contents(&fused), contents(&in_turn), "{}", cx.kernels.name);
        });
    }
}

/// Buffers of impossible shapes and rows that do not fit are refused, and what was in the buffer stays.
#[test]
fn wrong_shapes_are_refused() {
    let workers = team(1);
    let cx = portable(&workers);
    for (rows, k, block) in [(1, 0, 1), (1, 8, 0), (1, 8, 3), (1, 65537, 65537), (usize::MAX, 64, 64)] {
        assert!(QuantizedRows::new(rows, k, ActBits::Eight, block).is_err(), "{rows}x{k} {block}");
    }
    let mut rows = QuantizedRows::new(2, 4, ActBits::Eight, 4).expect("sizes are fine");
    quantize_rows(&cx, &[1.0; 4], &mut rows).expect("lengths match");
    assert!(quantize_rows(&cx, &[2.0; 12], &mut rows).is_err());
    assert!(quantize_rows(&cx, &[2.0; 5], &mut rows).is_err());
    assert!(rms_norm_quantize(&cx, &[2.0; 8], &[1.0; 2], 1e-5, &mut rows).is_err());
    assert_eq!((rows.rows(), rows.scale(0)), (1, 1.0 / 127.0));
    assert!(rms_norm(&cx, &[2.0; 8], &[], 1e-5, &mut [0.0; 8]).is_err());
    assert!(rms_norm(&cx, &[2.0; 8], &[1.0; 3], 1e-5, &mut [0.0; 8]).is_err());
    assert!(rms_norm(&cx, &[2.0; 8], &[1.0; 4], 1e-5, &mut [0.0; 7]).is_err());
}

/// On a fixed grid every value becomes the nearest float of the grid, ties to even, the ends beyond it, on every tier and
/// whether or not the codes had to be moved into range; NaN stays NaN.
#[test]
fn rows_on_a_grid_hold_its_floats() {
    let workers = team(2);
    let mut noise = Noise(3);
    let ends = [(-32768, 32767), (0, 65535), (-65535, 0), (-20000, 45535), (-128, 127), (0, 255), (-255, 0), (-3, 200)];
    for (low, high) in ends {
        let grid = Grid::new(0.0078125, low, high).expect("zero is on it");
        for act in BITS {
            let mut rows = QuantizedRows::new(4, 64, act, 32).expect("sizes are fine");
            if act == ActBits::Eight && high - low > 255 {
                assert!(rows.set_grid(Some(grid)).is_err(), "{low}..{high}");
                continue;
            }
            let mut x: Vec<f32> = noise.floats(4 * 64).iter().map(|x| x * 300.0).collect();
            // A tie, both infinities, and more than the grid has.
            x[..5].copy_from_slice(&[0.00390625, f32::INFINITY, f32::NEG_INFINITY, 1e9, 0.01171875]);
            each_tier(&workers, |cx| {
                rows.set_grid(Some(grid)).expect("the grid fits");
                quantize_rows(cx, &x, &mut rows).expect("lengths match");
                let mut snapped = x.clone();
                snap(cx, &mut snapped, grid);
                for (i, x) in x.iter().enumerate() {
                    let steps = (f64::from(*x) / 0.0078125).round_ties_even().clamp(f64::from(low), f64::from(high));
                    let want = steps * 0.0078125;
                    assert_eq!(f64::from(rows.value(i / 64, i % 64)), want, "{low}..{high} {act:?} {x}");
                    assert_eq!((f64::from(snapped[i]), grid.nearest_f64(f64::from(*x))), (want, want));
                }
                let sum: i32 = (0..32).map(|k| rows.code(1, k)).sum();
                assert_eq!(rows.sums[2], sum);
                quantize_rows(cx, &[f32::NAN; 64], &mut rows).expect("lengths match");
                assert!(rows.value(0, 3).is_nan());
            });
            assert_eq!(rows.bits(), if high - low > 255 { act } else { ActBits::Eight }, "{low}..{high}");
            rows.set_grid(None).expect("no grid always fits");
            assert_eq!((rows.bits(), rows.shift()), (act, 0.0));
        }
    }
    for (scale, low, high) in
        [(0.0, -1, 1), (f32::NAN, -1, 1), (-1.0, -1, 1), (1.0, 1, 2), (1.0, -2, -1), (1.0, -1, 65535)]
    {
        assert!(Grid::new(scale, low, high).is_none(), "{scale} {low} {high}");
    }
}

/// The longest rows of the lowest code, whose sum is no 32-bit number, get the right codes and sums of planes on every tier.
#[test]
fn the_longest_rows_of_the_lowest_code_do_not_overflow() {
    let workers = team(1);
    let k = MAX_INTEGER_K;
    let grid = Grid::new(1.0, 0, 65535).expect("zero is on it");
    for (block, first) in [(k, 0), (k, 1), (32, 0), (32, 1)] {
        let mut x = vec![0.0; k];
        x[0] = first as f32;
        each_tier(&workers, |cx| {
            let rows = QuantizedRows::new(1, k, ActBits::Sixteen, block).and_then(|rows| rows.with_sums_over(k));
            let mut rows = rows.expect("sizes are fine");
            rows.set_grid(Some(grid)).expect("the grid fits");
            quantize_rows(cx, &x, &mut rows).expect("lengths match");
            let what = format!("{} {block} {first}", cx.kernels.name);
            assert_eq!([rows.code(0, 0), rows.code(0, k - 1)], [first - 32896, -32896], "{what}");
            assert_eq!([rows.value(0, 0), rows.value(0, k - 1)], [first as f32, 0.0], "{what}");
            let plane_sum = -128 * k as i32;
            assert_eq!(rows.plane_sums[0], [plane_sum, plane_sum + first], "{what}");
        });
    }
}
