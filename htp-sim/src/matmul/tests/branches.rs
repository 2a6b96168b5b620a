//! Branches of adapters, beside products.

use super::*;

/// Bias, branch and residual are added to the product; several parts and weights of different formats share x.
#[test]
fn epilogue_adds_bias_branch_and_residual() {
    let workers = team(3);
    let (m, k, r) = (5, 64, 20);
    let mut noise = Noise(6);
    let x = noise.floats(m * k);
    let block = WeightFormat::Int4Block { block: 32, offset: BlockOffset::Symmetric };
    let columns = [70, 33];
    let layout = |n: usize, k: usize, format: WeightFormat| PackedLayout::new(n, k, format).expect("sizes are fine");
    let layouts = [layout(columns[0], k, block), layout(columns[1], k, WeightFormat::Int8PerChannel)];
    let downs = [layout(r, k, WeightFormat::Int8PerChannel), layout(r, k, WeightFormat::F32)];
    let ups = [layout(columns[0], r, WeightFormat::F16), layout(columns[1], r, WeightFormat::Int8PerChannel)];
    let (blobs, down_blobs) = ([0, 1].map(|i| weights(&layouts[i], 23)), [0, 1].map(|i| weights(&downs[i], 27)));
    let up_blobs = [0, 1].map(|i| weights(&ups[i], 29));
    let w = [0, 1].map(|i| layouts[i].view(&blobs[i]).expect("length matches"));
    let down = [0, 1].map(|i| downs[i].view(&down_blobs[i]).expect("length matches"));
    let up = [0, 1].map(|i| ups[i].view(&up_blobs[i]).expect("length matches"));
    let alphas = [noise.floats(r), vec![0.5]];
    let biases = columns.map(|n| noise.floats(n));
    let before = columns.map(|n| noise.floats(m * n));
    each_tier(&workers, |cx| {
        let rows = quantized(cx, &x, &layouts[0], ActBits::Sixteen);
        let base = [0, 1].map(|i| product(cx, Rows::Quantized(&rows), w[i]));
        let branch_x = [Rows::Quantized(&rows), Rows::F32 { x: &x, m }];
        let mut outs = before.clone();
        let mut firsts = [vec![0.0; m * r], vec![0.0; m * r]];
        let mut parts: Vec<Part<'_>> = outs
            .iter_mut()
            .zip(&mut firsts)
            .enumerate()
            .map(|(i, (out, t))| Part {
                weights: w[i],
                bias: Some(&biases[i]),
                branch: Some(Branch { x: branch_x[i], down: down[i], alpha: &alphas[i], up: up[i], t }),
                write: [Write::Add, Write::Store][i],
                out,
            })
            .collect();
        linear(cx, Rows::Quantized(&rows), &mut parts).expect("lengths match");
        for i in [0, 1] {
            let mut t = product(cx, branch_x[i], down[i]);
            t.iter_mut().zip(alphas[i].iter().cycle()).for_each(|(t, alpha)| *t *= alpha);
            assert_eq!(bits(&firsts[i]), bits(&t), "{}", cx.kernels.name);
            let branch = oracle(|row, j| f64::from(t[row * r + j]), m, up[i]);
            let expected: Vec<(f64, f64)> = (0..m * columns[i])
                .map(|at| {
                    let old = if i == 0 { before[i][at] } else { 0.0 };
                    let sum =
                        f64::from(base[i][at]) + f64::from(biases[i][at % columns[i]]) + branch[at].0 + f64::from(old);
                    (sum, 1.0 + f64::from(base[i][at].abs()) + branch[at].1)
                })
                .collect();
            assert_near(&outs[i], &expected, 1e-5, cx.kernels.name);
        }
    });
}

/// A branch whose first half is zero leaves the base bit for bit, signs of zeros included.
#[test]
fn zero_branch_is_the_base() {
    let workers = team(2);
    let (n, k, r) = (20, 32, 4);
    let layout = PackedLayout::new(n, k, WeightFormat::Int8PerChannel).expect("sizes are fine");
    let blob = weights(&layout, 31);
    let [down, up] = [(r, k), (n, r)].map(|(n, k)| PackedLayout::new(n, k, WeightFormat::F32).expect("sizes are fine"));
    let (down_blob, up_blob) = (weights(&down, 33), weights(&up, 37));
    let mut x = Noise(7).floats(3 * k);
    x[..k].fill(-0.0);
    // Row 1 has a live branch, so the tile as a whole cannot be skipped.
    let mut branch_x = vec![0.0; 3 * k];
    branch_x[k..2 * k].fill(1.0);
    branch_x[0] = -0.0;
    each_tier(&workers, |cx| {
        let w = layout.view(&blob).expect("length matches");
        let rows = quantized(cx, &x, &layout, ActBits::Sixteen);
        let base = product(cx, Rows::Quantized(&rows), w);
        let (mut out, mut t) = (vec![0.0; 3 * n], vec![0.0; 3 * r]);
        let branch = Branch {
            x: Rows::F32 { x: &branch_x, m: 3 },
            down: down.view(&down_blob).expect("length matches"),
            alpha: &[1.0],
            up: up.view(&up_blob).expect("length matches"),
            t: &mut t,
        };
        linear(cx, Rows::Quantized(&rows), &mut [Part { branch: Some(branch), ..part(w, &mut out) }])
            .expect("lengths match");
        assert_eq!(bits(&out[..n]), bits(&base[..n]));
        assert_ne!(bits(&out[n..2 * n]), bits(&base[n..2 * n]));
        assert_eq!(bits(&out[2 * n..]), bits(&base[2 * n..]));
    });
}

/// Second halves wait for the first ones: with more workers than cores, one row or many, the bits are those of one worker.
#[test]
fn branches_do_not_depend_on_workers() {
    branches_with_workers(64, WeightFormat::Int4Expansion { block: 32 });
    branches_with_workers(128, WeightFormat::Int4Block { block: 32, offset: BlockOffset::Min });
}

fn branches_with_workers(k: usize, format: WeightFormat) {
    let (n, r) = (320, 8);
    let layout = PackedLayout::new(n, k, format).expect("sizes are fine");
    let down = PackedLayout::new(r, k, WeightFormat::Int8PerChannel).expect("sizes are fine");
    let up = PackedLayout::new(n, r, WeightFormat::Int8PerChannel).expect("sizes are fine");
    let (blob, down_blob, up_blob) = (weights(&layout, 61), weights(&down, 67), weights(&up, 71));
    let x = Noise(11).floats(130 * k);
    let [one, many] = [1, 4].map(team);
    for m in [1, 130] {
        let run = |workers: &Workers| {
            let cx = Cx { kernels: crate::Kernels::selected().expect("a tier of this CPU"), workers };
            let rows = quantized(&cx, &x[..m * k], &layout, ActBits::Sixteen);
            let (mut outs, mut firsts) = (vec![vec![0.0; m * n]; 3], vec![vec![f32::NAN; m * r]; 3]);
            let mut parts: Vec<Part<'_>> = outs
                .iter_mut()
                .zip(&mut firsts)
                .map(|(out, t)| {
                    let branch = Branch {
                        x: Rows::Quantized(&rows),
                        down: down.view(&down_blob).expect("length matches"),
                        alpha: &[2.0],
                        up: up.view(&up_blob).expect("length matches"),
                        t,
                    };
                    Part { branch: Some(branch), ..part(layout.view(&blob).expect("length matches"), out) }
                })
                .collect();
            linear(&cx, Rows::Quantized(&rows), &mut parts).expect("lengths match");
            drop(parts);
            bits(&outs.concat())
        };
        let expected = run(&one);
        for _ in 0..if m == 1 { 200 } else { 10 } {
            assert!(run(&many) == expected, "{m} rows");
        }
    }
}

/// A branch adds the rounded product of its second half to each finished value, in one addition, and nothing in rows whose first
/// half is all zeros: whatever the layout, rank and number of rows, and whatever becomes of the output; also in a gated layer.
/// Where x has integers the first half is quantized with 16 bits a row, up to the largest rank that is.
#[test]
fn a_branch_is_added_last() {
    let workers = team(2);
    let check = |added: &Added<'_>| {
        for (m, has_zeros) in [(1, false), (3, true), (17, false), (17, true), (130, true)] {
            added.check(m, has_zeros);
        }
    };
    for (n, r) in [(13, 4), (33, 65), (165, 128), (20, 129)] {
        for (layout_of, integers) in [(NEW, false), (TIGHT, false), (NEW, true), (TIGHT, true)] {
            check(&Added::new(&workers, (n, r, 64), WeightFormat::Int8PerChannel, layout_of, integers));
        }
    }
    // Kernels that go straight to the output add it there: with one panel left over, with ranks of one tile and of two.
    let blocks = WeightFormat::Int4Block { block: 32, offset: BlockOffset::Min };
    for format in [WeightFormat::Int8PerChannel, WeightFormat::Int4Expansion { block: 64 }, blocks] {
        for size in [(80, 16, 128), (48, 20, 576), (176, 128, 192), (16, 65, 640), (32, 129, 128), (32, 8, 36 * 32)] {
            check(&Added::new(&workers, size, format, TIGHT, true));
        }
    }
}

/// A layer with a branch.
struct Added<'a> {
    workers: &'a Workers,
    n: usize,
    /// Rank.
    r: usize,
    k: usize,
    /// Of the base, the first half and the second.
    layouts: [PackedLayout; 3],
    blobs: [Vec<u8>; 3],
    /// Whether the branch's x has integers.
    integers: bool,
    /// Whether its first half gets them, too.
    quantizes: bool,
}

impl Added<'_> {
    fn new(
        workers: &Workers,
        (n, r, k): (usize, usize, usize),
        format: WeightFormat,
        layout_of: LayoutOf,
        integers: bool,
    ) -> Added<'_> {
        let w8c = WeightFormat::Int8PerChannel;
        let down = if integers { w8c } else { WeightFormat::F32 };
        let layouts = [(n, k, format), (r, k, down), (n, r, w8c)]
            .map(|(n, k, format)| layout_of(n, k, format).expect("sizes are fine"));
        Added {
            workers,
            n,
            r,
            k,
            layouts,
            blobs: layouts.map(|layout| weights(&layout, 79)),
            integers,
            quantizes: integers && r <= 128,
        }
    }

    fn check(&self, m: usize, has_zeros: bool) {
        let Added { n, r, k, layouts, blobs, integers, .. } = self;
        let (n, r, k) = (*n, *r, *k);
        let [w, down, second] = [0, 1, 2].map(|i| layouts[i].view(&blobs[i]).expect("length matches"));
        let mut noise = Noise(17);
        let bias = noise.floats(n);
        let (mut x, mut branch_x) = (noise.floats(m * k), noise.floats(m * k));
        if has_zeros {
            // Zeros of both signs in the base of row 0, and no branch there.
            x[..k].fill(-0.0);
            branch_x[..k].fill(-0.0);
        }
        let before: Vec<f32> = (0..m * n).map(|i| if i % 3 == 0 { -0.0 } else { noise.float() }).collect();
        let mut bits_of_tiers = Vec::new();
        each_tier(self.workers, |cx| {
            let name = format!("{} {m}x{n} rank {r}, integers {integers}", cx.kernels.name);
            let rows = quantized(cx, &x, &layouts[0], ActBits::Sixteen);
            let branch_rows = quantized(cx, &branch_x, &layouts[1], ActBits::Sixteen);
            let rows = Rows::Quantized(&rows);
            let branch_x = if *integers { Rows::Quantized(&branch_rows) } else { Rows::F32 { x: &branch_x, m } };
            let t = product(cx, branch_x, down);
            let products = self.second_half(cx, &t, second);
            assert_near(&products, &oracle(|row, j| f64::from(t[row * r + j]), m, second), 2e-4, &name);
            let zeros: Vec<bool> = t.chunks(r).map(|t| t.iter().all(|&t| t == 0.0)).collect();
            assert_eq!(zeros.iter().filter(|&&zero| zero).count(), usize::from(has_zeros));
            let with_branch = |write, bias, alpha: f32| {
                let mut out = before.clone();
                linear(cx, rows, &mut [Part { write, bias, ..part(w, &mut out) }]).expect("lengths match");
                let added = out.iter_mut().zip(&products).enumerate().filter(|(i, _)| !zeros[i / n]);
                added.for_each(|(_, (out, product))| *out += alpha * product);
                out
            };
            for (write, bias) in [(Write::Store, None), (Write::Add, Some(&bias[..]))] {
                let (mut found, mut t) = (before.clone(), vec![f32::NAN; m * r]);
                let branch = Some(Branch { x: branch_x, down, alpha: &[1.0], up: second, t: &mut t });
                linear(cx, rows, &mut [Part { write, bias, branch, ..part(w, &mut found) }]).expect("lengths match");
                assert!(bits(&found) == bits(&with_branch(write, bias, 1.0)), "{name} {write:?}");
                bits_of_tiers.push(bits(&found));
            }
            let mut gates = vec![0.0; m * n];
            crate::elementwise::silu(cx, &with_branch(Write::Store, Some(&bias[..]), 1.0), &mut gates)
                .expect("lengths match");
            for both in [true, false] {
                // A power of two, which changes no other bit.
                let ups = if both { with_branch(Write::Store, None, 2.0) } else { product(cx, rows, w) };
                let mut expected = gates.clone();
                crate::elementwise::mul_assign(cx, &mut expected, &ups).expect("lengths match");
                let (mut found, mut ts) = (vec![f32::NAN; m * n], [vec![f32::NAN; m * r], vec![f32::NAN; m * r]]);
                let [gate_t, up_t] = &mut ts;
                let branch = Branch { x: branch_x, down, alpha: &[1.0], up: second, t: gate_t };
                let gate = Gate { weights: w, bias: Some(&bias), branch: Some(branch) };
                let branch = Branch { x: branch_x, down, alpha: &[2.0], up: second, t: up_t };
                let up = Gate { weights: w, bias: None, branch: both.then_some(branch) };
                gated_linear(cx, rows, GateUp { gate, up }, Activation::Silu, &mut found).expect("lengths match");
                assert!(bits(&found) == bits(&expected), "{name} gated, both: {both}");
            }
        });
        if self.quantizes && layouts[0].format().block().is_none() {
            // The same on every tier.
            assert!(bits_of_tiers.iter().skip(2).zip(&bits_of_tiers).all(|(a, b)| a == b), "{m}x{n} rank {r}");
        }
    }

    /// The product of each row of `t` with the second half.
    fn second_half(&self, cx: &Cx<'_>, t: &[f32], up: PackedWeights<'_>) -> Vec<f32> {
        if !self.quantizes {
            return t.chunks(self.r).flat_map(|t| product(cx, Rows::F32 { x: t, m: 1 }, up)).collect();
        }
        let t = quantized(cx, t, &self.layouts[2], ActBits::Sixteen);
        product(cx, Rows::Quantized(&t), up)
    }
}
