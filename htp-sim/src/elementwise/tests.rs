use super::*;
use crate::rope::{rotary_table, rotate};
use crate::testing::{Noise, bits, each_tier, portable, team};

/// Values from -limit to limit, zeros and the ends of f32 included.
fn values(limit: f32) -> Vec<f32> {
    let mut values: Vec<f32> = Noise(1).floats(10_000).iter().map(|x| x * limit).collect();
    values.extend([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 100.0, -100.0, 1e30, -1e30, f32::MAX, f32::MIN]);
    values
}

/// `erf` in f64 by its series, for arguments up to 6.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

/// Each activation function is near its f64 formula, and has the same bits on every tier.
#[test]
fn activations_are_their_formulas() {
    type Function = fn(&Cx<'_>, &[f32], &mut [f32]) -> Result<(), ShapeError>;
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu = |x: f64| x * logistic(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x));
    let exact_gelu = |x: f64| x / 2.0 * (1.0 + if x.abs() < 6.0 { erf(x / 2f64.sqrt()) } else { x.signum() });
    let table: [(Function, &dyn Fn(f64) -> f64); 5] = [
        (sigmoid, &logistic),
        (silu, &|x| x * logistic(x)),
        (gelu_tanh, &gelu),
        (gelu_erf, &exact_gelu),
        (|cx, x, out| soft_cap(cx, x, 3.0, out), &|x| 3.0 * (x / 3.0).tanh()),
    ];
    let workers = team(2);
    let x = values(12.0);
    for (i, (function, formula)) in table.into_iter().enumerate() {
        let mut expected = vec![0.0; x.len()];
        function(&portable(&workers), &x, &mut expected).expect("lengths match");
        for (&x, &found) in x.iter().zip(&expected) {
            let exact = formula(f64::from(x));
            let error = (f64::from(found) - exact).abs();
            assert!(error <= 1e-6 * exact.abs() + 2e-7, "function {i} at {x}: {found}, expected {exact}");
        }
        each_tier(&workers, |cx| {
            let mut found = vec![0.0; x.len()];
            function(cx, &x, &mut found).expect("lengths match");
            assert_eq!(bits(&found), bits(&expected), "function {i} {}", cx.kernels.name);
        });
    }
}

/// The largest error of `f` against `e^x` at `steps` hundred-thousandths, in units of the last place.
fn worst_ulp(f: impl Fn(f32) -> f32, steps: std::ops::RangeInclusive<i32>) -> f64 {
    let errors = steps.map(|i| {
        let x = i as f32 * 1e-5;
        let exact = f64::from(x).exp();
        let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        (f64::from(f(x)) - exact).abs() / ulp
    });
    errors.fold(0.0, f64::max)
}

/// `exp` is within 2 ulp where it is not subnormal, and its ends are 0, infinity and NaN; the variant for codes is within
/// 5 millionths down to -87, and below all but 0.
#[test]
fn exp_is_within_its_bound() {
    use crate::arch::portable::{vector::exp, weights::exp_nonpositive};
    let worst = worst_ulp(exp, -8_733_000..=8_872_000);
    assert!(worst <= 2.0, "{worst} ulp");
    let relative = (-8_700_000..=0)
        .map(|i| f64::from(i as f32 * 1e-5))
        .map(|x| f64::from(exp_nonpositive(x as f32)) / x.exp() - 1.0);
    let worst = relative.map(f64::abs).fold(0.0, f64::max);
    assert!(worst <= 5e-6, "{worst}");
    assert!(exp_nonpositive(f32::NEG_INFINITY) < 2e-38 && exp_nonpositive(f32::NAN).is_nan());
    assert_eq!(exp_nonpositive(0.0), 1.0);
    assert_eq!(
        bits(&[exp(f32::NEG_INFINITY), exp(-200.0), exp(f32::INFINITY), exp(89.0)]),
        bits(&[0.0, 0.0, f32::INFINITY, f32::INFINITY])
    );
    assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    assert_eq!(exp(0.0), 1.0);
}

/// The logistic function is within 4 ulp of its f64 formula, 0 far below and 1 far above.
#[test]
fn logistic_is_within_its_bound() {
    use crate::arch::portable::vector::logistic;
    for i in -8_700_000..=8_700_000 {
        let x = i as f32 * 1e-5;
        let exact = 1.0 / (1.0 + f64::from(-x).exp());
        let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        let error = (f64::from(logistic(x)) - exact).abs() / ulp;
        assert!(error <= 4.0, "{x}: {error} ulp");
    }
    let ends = [f32::NEG_INFINITY, f32::MIN, -88.0, 88.0, f32::MAX, f32::INFINITY].map(logistic);
    assert_eq!(ends, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    assert!(logistic(f32::NAN).is_nan() && logistic(-f32::NAN).is_nan());
}

/// Rows of softmax are the f64 formula and sum to one; a NaN stays in its row.
#[test]
fn softmax_is_the_formula() {
    let workers = team(2);
    for k in [1, 2, 15, 16, 17, 100] {
        let x: Vec<f32> = Noise(5).floats(3 * k).iter().map(|x| x * 20.0).collect();
        each_tier(&workers, |cx| {
            let mut found = x.clone();
            softmax_rows(cx, &mut found, k).expect("lengths match");
            for (x, found) in x.chunks(k).zip(found.chunks(k)) {
                let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
                for (&x, &found) in x.iter().zip(found) {
                    assert!((f64::from(found) - f64::from(x).exp() / sum).abs() < 1e-6, "{} {k}", cx.kernels.name);
                }
            }
            let mut broken = x.clone();
            broken[k] = f32::NAN;
            softmax_rows(cx, &mut broken, k).expect("lengths match");
            assert!(broken[k..2 * k].iter().all(|y| y.is_nan()));
            assert_eq!(bits(&broken[..k]), bits(&found[..k]));
        });
    }
}

/// Sums, products and scalings are those of f32, across the cuts between workers.
#[test]
fn arithmetic_is_elementwise() {
    let workers = team(3);
    let cx = portable(&workers);
    for len in [0, 1, 4096, 4097, 20_000] {
        let (a, b) = (Noise(1).floats(len), Noise(2).floats(len));
        let mut out = vec![0.0; len];
        let mut check = |f: &dyn Fn(&mut [f32]) -> Result<(), ShapeError>, expected: &dyn Fn(f32, f32) -> f32| {
            out.copy_from_slice(&a);
            f(&mut out).expect("lengths match");
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(&out, (&a, &b))| out == expected(a, b)));
        };
        check(&|out| add(&cx, &a, &b, out), &|a, b| a + b);
        check(&|out| mul(&cx, &a, &b, out), &|a, b| a * b);
        check(&|out| add_assign(&cx, out, &b), &|a, b| a + b);
        check(&|out| mul_assign(&cx, out, &b), &|a, b| a * b);
        check(&|out| scale(&cx, &a, 0.3, out), &|a, _| a * 0.3);
    }
}

/// The rotation is the complex product, leaves the rest of a head alone, and has the same bits on every tier.
#[test]
fn rotation_is_the_formula() {
    let workers = team(2);
    for (m, heads, head_dim, half) in [(1, 1, 2, 1), (3, 2, 8, 4), (2, 3, 80, 16), (130, 9, 64, 32)] {
        let positions: Vec<i32> = (0..m).map(|i| 3 * i as i32).collect();
        let inv_freq: Vec<f32> = (0..half).map(|i| 10_000_f32.powf(-(i as f32) / half as f32)).collect();
        let (mut cos, mut sin) = (vec![0.0; m * half], vec![0.0; m * half]);
        rotary_table(&positions, &inv_freq, 1.5, &mut cos, &mut sin).expect("lengths match");
        let x = Noise(7).floats(m * heads * head_dim);
        let mut expected = x.clone();
        rotate(&portable(&workers), &mut expected, heads, head_dim, &cos, &sin).expect("lengths match");
        for (at, (x, found)) in x.chunks(head_dim).zip(expected.chunks(head_dim)).enumerate() {
            for i in 0..half {
                let angle = f64::from(positions[at / heads] as f32 * inv_freq[i]);
                let (s, c) = angle.sin_cos();
                let (a, b) = (f64::from(x[i]) * 1.5, f64::from(x[i + half]) * 1.5);
                assert!((f64::from(found[i]) - (a * c - b * s)).abs() < 1e-6);
                assert!((f64::from(found[i + half]) - (b * c + a * s)).abs() < 1e-6);
            }
            assert_eq!(bits(&found[2 * half..]), bits(&x[2 * half..]));
        }
        each_tier(&workers, |cx| {
            let mut found = x.clone();
            rotate(cx, &mut found, heads, head_dim, &cos, &sin).expect("lengths match");
            assert_eq!(bits(&found), bits(&expected), "{}", cx.kernels.name);
        });
        assert!(rotate(&portable(&workers), &mut expected[1..], heads, head_dim, &cos, &sin).is_err());
        assert!(rotate(&portable(&workers), &mut expected, heads, head_dim, &cos[1..], &sin).is_err());
    }
}

/// Lengths that differ are refused, and so are soft caps that are not finite and above 0.
#[test]
fn wrong_lengths_are_refused() {
    let workers = team(1);
    let cx = portable(&workers);
    let (three, mut two) = ([1.0; 3], [7.0; 2]);
    assert!(add(&cx, &three, &three, &mut two).is_err());
    assert!(mul_assign(&cx, &mut two, &three).is_err());
    assert!(silu(&cx, &three, &mut two).is_err());
    assert!(softmax_rows(&cx, &mut two, 0).is_err());
    assert!(softmax_rows(&cx, &mut two, 3).is_err());
    assert!(soft_cap(&cx, &three, 1.0, &mut two).is_err());
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(soft_cap(&cx, &three[..2], cap, &mut two).is_err(), "{cap}");
    }
    assert_eq!(two, [7.0; 2]);
}
