//! Guards the promise that one graph has one meaning: `htp` gives what the f64 `reference` gives, whatever is fused.

use std::sync::{Arc, atomic::AtomicBool};

use half::f16;
use proptest::prelude::*;
use qnn_core::{
    Adapter, Backend, Bindings, BlockOffsets, DataType, Dim, Encoding, Floats, Graph, OpKind, Panels, Shape, Tensor,
    TensorData, TensorId, TensorType,
    backend::{ExecuteError, HtpBackend, ReferenceBackend, State, htp::pack_update},
    op::AttentionAttrs,
};

/// A weight's storage.
#[derive(Debug, Clone, Copy)]
enum Form {
    F32,
    F16,
    Int8Channel,
    Int8Block(usize),
    Int6Block(usize),
    Int5Block(usize),
    Int5Min(usize),
    Int4Block(usize),
    Int4Integer(usize),
    Int4Min(usize),
    /// 4 bit in blocks of 32 and 6 bit in blocks of 16, by turns: as a Q4_K_M file has them.
    Mixed,
}

/// Everything that varies from case to case.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    ffn: usize,
    vocab: usize,
    form: Form,
    activation: DataType,
    cache: DataType,
    gelu: bool,
    bias: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    prompt: usize,
    workers: usize,
    branch: Option<Branch>,
}

/// An adapter branch on every linear layer.
#[derive(Debug, Clone, Copy)]
struct Branch {
    /// Rank that the graph declares, and rank that the adapter brings.
    ranks: (usize, usize),
    /// `B (alpha · A x)` if true, `alpha · B (A x)` if false.
    alpha_first: bool,
    alpha: f32,
    int8: bool,
}

fn branches() -> impl Strategy<Value = Option<Branch>> {
    let alpha = prop_oneof![Just(0.0f32), Just(1.0), Just(-0.75), Just(0.3), Just(1.7)];
    let ranks = (1usize..65, 0usize..20).prop_map(|(real, more)| (real + more, real));
    let branch = (ranks, any::<bool>(), alpha, any::<bool>());
    proptest::option::of(branch.prop_map(|(ranks, alpha_first, alpha, int8)| Branch {
        ranks,
        alpha_first,
        alpha,
        int8,
    }))
}

fn cases() -> impl Strategy<Value = Case> {
    let form = prop_oneof![
        Just(Form::F32),
        Just(Form::F16),
        Just(Form::Int8Channel),
        Just(Form::Int8Block(32)),
        Just(Form::Int8Block(16)),
        Just(Form::Int5Block(32)),
        Just(Form::Int5Min(32)),
        Just(Form::Int4Block(32)),
        Just(Form::Int4Integer(32)),
        Just(Form::Int4Min(32)),
        Just(Form::Mixed),
    ];
    let shape = (any::<u64>(), 1usize..3, 1usize..4, 1usize..3, 1usize..4, 20usize..70);
    let kinds = (
        form,
        prop_oneof![Just(DataType::Float32), Just(DataType::SFixedPoint16), Just(DataType::SFixedPoint8)],
        prop_oneof![Just(DataType::Float32), Just(DataType::Float16), Just(DataType::SFixedPoint8)],
        any::<(bool, bool)>(),
        prop_oneof![Just(None), Just(Some(3usize)), Just(Some(17))],
        prop_oneof![Just(None), Just(Some(4.0f32))],
        (1usize..40, 1usize..4),
    );
    (shape, kinds, branches()).prop_map(|((seed, kv_heads, group, head, ffn, vocab), kinds, branch)| {
        let (form, activation, cache, (gelu, bias), window, softcap, (prompt, workers)) = kinds;
        let (head_dim, ffn) = (head * 32, ffn * 32);
        let activation = if matches!(form, Form::F32 | Form::F16) { DataType::Float32 } else { activation };
        Case {
            seed,
            kv_heads,
            group,
            head_dim,
            ffn,
            vocab,
            form,
            activation,
            cache,
            gelu,
            bias,
            window,
            softcap,
            prompt,
            workers,
            branch,
        }
    })
}

/// A static encoding of `bits` bits for values from `min` to `max`, and its element type.
fn encoding(bits: u8, min: f32, max: f32) -> (DataType, Encoding) {
    let (min, max) = (min.min(-1e-3), max.max(1e-3));
    let scale = (max - min) / ((1u32 << bits) - 1) as f32;
    let offset = (min / scale).round_ties_even() as i32;
    let data_type = if bits == 8 { DataType::UFixedPoint8 } else { DataType::UFixedPoint16 };
    (data_type, Encoding::ScaleOffset { bitwidth: bits, scale, offset })
}

/// Gives two of three computed tensors of `graph` 16-bit encodings that cut off the ends of what they hold, and the logits
/// one of 8 bits, whose step is returned.
fn with_encodings(graph: &Graph, runs: &[&[i32]], adapter: Option<Arc<Adapter>>, case: &Case) -> (Graph, f32) {
    let mut open = graph.clone();
    let computed = graph.ids_where(|t| matches!(t.tensor_type, TensorType::Native | TensorType::AppRead));
    computed.iter().for_each(|id| open.mark_output(*id));
    let mut ranges: Vec<(f32, f32)> = Vec::new();
    run_all(&ReferenceBackend, &open, runs, adapter, case, &mut |outputs| {
        ranges.resize(outputs.len(), (0.0, 0.0));
        for (range, values) in ranges.iter_mut().zip(outputs) {
            *range = values.iter().fold(*range, |(min, max), v| (min.min(*v), max.max(*v)));
        }
    });
    let (mut graph, mut step) = (graph.clone(), 0.0);
    for (i, (id, (min, max))) in open.outputs().into_iter().zip(ranges).enumerate() {
        let (name, is_output) = (&graph.tensor(id).name, graph.tensor(id).tensor_type.is_output());
        // Of a layer with a branch only the sum can have an encoding.
        let in_branch = graph.find(&format!("{name}.lora_add")).is_some()
            || name.contains(".lora_") && !name.ends_with(".lora_add");
        if in_branch || !is_output && (case.seed >> (i % 60)).is_multiple_of(3) {
            continue;
        }
        let (data_type, encoding) = encoding(if is_output { 8 } else { 16 }, min * 0.9, max * 0.8);
        if let (true, Encoding::ScaleOffset { scale, .. }) = (is_output, &encoding) {
            step = *scale;
        }
        graph.set_encoding(id, data_type, Some(encoding)).unwrap();
    }
    (graph, step)
}

/// A small f32 decoder without an adapter.
fn plain() -> Case {
    Case {
        seed: 1,
        kv_heads: 1,
        group: 1,
        head_dim: 32,
        ffn: 32,
        vocab: 20,
        form: Form::F32,
        activation: DataType::Float32,
        cache: DataType::Float32,
        gelu: false,
        bias: false,
        window: None,
        softcap: None,
        prompt: 4,
        workers: 1,
        branch: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Broken if a tensor with a static encoding is fused away, rounded otherwise than the law says, or shifted wrongly:
    /// the backends are then more than one step of the logits' encoding apart.
    #[test]
    fn static_encodings_mean_the_same(case in cases()) {
        let case = Case { activation: DataType::Float32, cache: DataType::Float32, ..case };
        let (graph, adapter) = Builder::new(&case).decoder(&case);
        let ids: Vec<i32> = (0..case.prompt + 2).map(|i| (i * 7 % case.vocab) as i32).collect();
        let runs = [&ids[..case.prompt], &ids[case.prompt..case.prompt + 1], &ids[case.prompt + 1..]];
        let (graph, step) = with_encodings(&graph, &runs, adapter.clone(), &case);
        let htp = run(&HtpBackend::new(case.workers).unwrap(), &graph, &runs, adapter.clone(), &case);
        let reference = run(&ReferenceBackend, &graph, &runs, adapter, &case);
        for (a, b) in htp.iter().zip(&reference) {
            prop_assert!((a - b).abs() <= step * 1.001, "{a} {b}: more than one step of {step}");
        }
        let on_grid = |v: &f32| (v / step - (v / step).round()).abs() < 1e-3;
        prop_assert!(htp.iter().all(on_grid), "logits off their grid");
    }

    /// Broken if lowering, fusion or placing changes a result, at a prompt or at the steps after it.
    #[test]
    fn htp_equals_reference(case in cases()) {
        let (graph, adapter) = Builder::new(&case).decoder(&case);
        let ids: Vec<i32> = (0..case.prompt + 2).map(|i| (i * 7 % case.vocab) as i32).collect();
        let runs = [&ids[..case.prompt], &ids[case.prompt..case.prompt + 1], &ids[case.prompt + 1..]];
        let htp = run(&HtpBackend::new(case.workers).unwrap(), &graph, &runs, adapter.clone(), &case);
        let reference = run(&ReferenceBackend, &graph, &runs, adapter.clone(), &case);
        let top = reference.iter().fold(0.0f32, |top, v| top.max(v.abs()));
        // Codes of activations may fall to the other side of a rounding edge: one step of the coarsest grid in use.
        let coarse = case.activation == DataType::SFixedPoint8 || case.cache == DataType::SFixedPoint8;
        let bound = if coarse { 4e-2 } else { 2e-3 } * top;
        for (i, (a, b)) in htp.iter().zip(&reference).enumerate() {
            prop_assert!((a - b).abs() <= bound, "logit {i}: htp {a}, reference {b}, bound {bound}");
        }
    }
}

/// Broken if a value that two nodes read is overwritten by a fused step, or an output is lost.
#[test]
fn shared_values_survive_fusion() {
    let case = Case { seed: 5, group: 2, ffn: 64, vocab: 33, bias: true, workers: 2, ..plain() };
    let mut b = Builder::new(&case);
    let x = b.input("x", DataType::Float32, Some(32));
    let fc = b.linear("fc", x, 32, 32);
    let sigmoid = b.op("sigmoid", OpKind::Sigmoid, &[fc]);
    let silu = b.op("silu", OpKind::ElementWiseMultiply, &[fc, sigmoid]);
    let up = b.linear("up", x, 32, 32);
    let gated = b.op("gated", OpKind::ElementWiseMultiply, &[silu, up]);
    let sum = b.op("sum", OpKind::ElementWiseAdd, &[x, gated]);
    let down = b.linear("down", sum, 32, 32);
    let residual = b.op("residual", OpKind::ElementWiseAdd, &[sum, down]);
    let late = b.op("late", OpKind::ElementWiseMultiply, &[residual, up]);
    for id in [silu, sum, residual, late] {
        b.graph.mark_output(id);
    }
    let graph = b.graph;
    let values: Vec<f32> = (0..96).map(|i| (i as f32 * 0.37).sin()).collect();
    let outputs = |backend: &dyn Backend| {
        let mut bindings = Bindings::new(&graph);
        bindings.set_f32(0, &values).unwrap();
        let mut state = backend.new_state(&[&graph], 1).unwrap();
        backend.prepare(&graph).unwrap().execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        (0..4).flat_map(|i| bindings.output_f32(i).to_vec()).collect::<Vec<f32>>()
    };
    let (htp, reference) = (outputs(&HtpBackend::new(2).unwrap()), outputs(&ReferenceBackend));
    assert_eq!(htp.len(), 4 * 96);
    for (a, b) in htp.iter().zip(&reference) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

/// Broken if a product is added to a buffer that its own step still reads or writes, that is an output or has its value as codes;
/// if an output is fused away or overwritten by what comes after it; or if one row does not stand for all.
#[test]
fn fusion_and_placing_keep_what_is_needed() {
    type Make = fn(&mut Builder, TensorId) -> TensorId;
    let two_products: Make = |b, x| {
        let (p, q) = (b.linear("p", x, 32, 32), b.linear("q", x, 32, 32));
        b.op("sum", OpKind::ElementWiseAdd, &[p, q])
    };
    let one_after_the_other: Make = |b, x| {
        let r = b.op("r", OpKind::Sigmoid, &[x]);
        let (p, q) = (b.linear("p", x, 32, 32), b.linear("q", x, 32, 32));
        let sum = b.op("sum", OpKind::ElementWiseAdd, &[r, p]);
        b.op("sums", OpKind::ElementWiseAdd, &[sum, q])
    };
    let with_its_input: Make = |b, x| {
        let p = b.linear("p", x, 32, 32);
        b.op("sum", OpKind::ElementWiseAdd, &[x, p])
    };
    let one_row_for_all: Make = |b, x| {
        let factor =
            |b: &mut Builder, name, n| b.add(name, TensorType::AppWrite, DataType::Float32, Shape::fixed(&[n]), None);
        let (row, one) = (factor(b, "row", 32), factor(b, "one", 1));
        let product = b.op("product", OpKind::ElementWiseMultiply, &[x, row]);
        b.op("products", OpKind::ElementWiseMultiply, &[product, one])
    };
    let to_an_output: Make = |b, x| {
        let r = b.op("r", OpKind::Sigmoid, &[x]);
        b.graph.mark_output(r);
        let p = b.linear("p", x, 32, 32);
        b.op("sum", OpKind::ElementWiseAdd, &[r, p])
    };
    let to_codes: Make = |b, x| {
        let r = b.graph.op("r", OpKind::Sigmoid, &[x], DataType::SFixedPoint8).unwrap()[0];
        let p = b.linear("p", x, 32, 32);
        b.op("sum", OpKind::ElementWiseAdd, &[r, p])
    };
    let early_output: Make = |b, x| {
        let early = b.op("early", OpKind::Sigmoid, &[x]);
        b.graph.mark_output(early);
        ["s", "t", "u", "v"].into_iter().fold(x, |x, name| b.op(name, OpKind::Gelu, &[x]))
    };
    let gelu_is_an_output: Make = |b, x| {
        let gate = b.linear("gate", x, 32, 32);
        let gelu = b.op("gelu", OpKind::Gelu, &[gate]);
        b.graph.mark_output(gelu);
        let up = b.linear("up", x, 32, 32);
        b.op("product", OpKind::ElementWiseMultiply, &[gelu, up])
    };
    let gate_is_read_again: Make = |b, x| {
        let gate = b.linear("gate", x, 32, 32);
        let sigmoid = b.op("sigmoid", OpKind::Sigmoid, &[gate]);
        let silu = b.op("silu", OpKind::ElementWiseMultiply, &[gate, sigmoid]);
        let up = b.linear("up", x, 32, 32);
        let product = b.op("product", OpKind::ElementWiseMultiply, &[silu, up]);
        b.graph.mark_output(product);
        b.op("again", OpKind::Gelu, &[gate])
    };
    let of_linears = [two_products, one_after_the_other, with_its_input, to_an_output, to_codes];
    let others = [one_row_for_all, early_output, gelu_is_an_output, gate_is_read_again];
    for (i, make) in of_linears.into_iter().chain(others).enumerate() {
        let mut b = Builder::new(&Case { seed: 7, bias: true, ..plain() });
        let x = b.input("x", DataType::Float32, Some(32));
        let made = make(&mut b, x);
        b.graph.mark_output(made);
        let outputs = |backend: &dyn Backend| {
            let mut bindings = Bindings::new(&b.graph);
            for (input, rows) in [3, 1, 1].into_iter().enumerate().take(bindings.inputs().len()) {
                let n = rows * bindings.inputs()[input].row_elements * if input == 1 { 32 } else { 1 };
                let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37 + 1.0).sin()).collect();
                bindings.set_f32(input, &values).unwrap();
            }
            let mut state = backend.new_state(&[&b.graph], 1).unwrap();
            backend.prepare(&b.graph).unwrap().execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
            (0..bindings.outputs().len()).flat_map(|i| bindings.output_f32(i).to_vec()).collect::<Vec<f32>>()
        };
        let (htp, reference) = (outputs(&HtpBackend::new(2).unwrap()), outputs(&ReferenceBackend));
        assert_eq!(htp.len(), 96 * b.graph.outputs().len());
        for (a, b) in htp.iter().zip(&reference) {
            assert!((a - b).abs() < 1e-4, "graph {i}: {a} {b}");
        }
    }
}

/// Broken if graphs that do not agree about a cache share it, if codes of no matrix are taken for rows of one, or if an encoding
/// inside an adapter branch is dropped.
#[test]
fn contradictory_graphs_are_refused() {
    let [int8, float] = [DataType::SFixedPoint8, DataType::Float32].map(|cache| {
        let case = Case { cache, ..plain() };
        Builder::new(&case).decoder(&case).0
    });
    for backend in [&HtpBackend::new(1).unwrap() as &dyn Backend, &ReferenceBackend] {
        assert!(backend.new_state(&[&int8, &int8], 8).is_ok());
        let refused = backend.new_state(&[&int8, &float], 8).expect_err("two types").to_string();
        assert!(refused.contains("past_key"), "{refused}");
    }
    // One key head, but other scratch memory.
    let [one_head, two_heads] = [1, 2].map(|group| {
        let case = Case { group, ..plain() };
        Builder::new(&case).decoder(&case).0
    });
    let refused = HtpBackend::new(1).unwrap().new_state(&[&one_head, &two_heads], 8).expect_err("other heads");
    assert!(refused.to_string().contains("other heads"), "{refused}");
    let branch = Branch { ranks: (4, 4), alpha_first: true, alpha: 1.0, int8: false };
    let case = Case { branch: Some(branch), ..plain() };
    let (whole, _) = Builder::new(&case).decoder(&case);
    assert!(HtpBackend::new(1).unwrap().prepare(&whole).is_ok());
    for inner in ["q.lora_A", "q.lora_scale", "q.lora_B"] {
        let mut graph = whole.clone();
        let (data_type, own) = encoding(16, -1.0, 1.0);
        graph.set_encoding(graph.find(inner).unwrap(), data_type, Some(own)).unwrap();
        let refused = HtpBackend::new(1).unwrap().prepare(&graph).err().expect(inner).to_string();
        assert!(refused.contains("in no adapter branch"), "{refused}");
    }
    let mut b = Builder::new(&plain());
    let x = b.add("x", TensorType::AppWrite, DataType::Float32, Shape::fixed(&[8]), None);
    let codes = b.graph.op("codes", OpKind::Sigmoid, &[x], DataType::SFixedPoint16).unwrap()[0];
    b.graph.mark_output(codes);
    let refused = HtpBackend::new(1).unwrap().prepare(&b.graph).err().expect("no rows").to_string();
    assert!(refused.starts_with("tensor codes: "), "{refused}");
}

/// Broken if an id or a position from outside reaches memory it must not, or a cancel is not seen.
#[test]
fn bad_inputs_are_refused() {
    let case = plain();
    let (graph, _) = Builder::new(&case).decoder(&case);
    for backend in [&HtpBackend::new(1).unwrap() as &dyn Backend, &ReferenceBackend] {
        let mut executable = backend.prepare(&graph).unwrap();
        let mut state = backend.new_state(&[&graph], 8).unwrap();
        let mut check = |ids: &[i32], at: i32, row: i32, stop: bool| {
            let mut bindings = Bindings::new(&graph);
            let positions: Vec<i32> = (at..).take(ids.len()).collect();
            bindings.set_i32(0, ids).unwrap();
            bindings.set_i32(1, &positions).unwrap();
            bindings.set_i32(2, &[at]).unwrap();
            bindings.set_i32(3, &[row]).unwrap();
            executable.execute(&mut bindings, &mut state, &AtomicBool::new(stop))
        };
        assert_eq!(check(&[1, 2], 0, 1, false), Ok(()));
        assert!(matches!(check(&[1, 20], 0, 0, false), Err(ExecuteError::Index { index: 20, len: 20, .. })));
        assert!(matches!(check(&[1, -1], 0, 0, false), Err(ExecuteError::Index { index: -1, .. })));
        assert!(matches!(check(&[1, 2], 0, 2, false), Err(ExecuteError::Index { index: 2, len: 2, .. })));
        assert!(matches!(check(&[1, 2], 7, 0, false), Err(ExecuteError::CacheFull { end: 9, capacity: 8, .. })));
        assert_eq!(check(&[1, 2], 0, 1, true), Err(ExecuteError::Cancelled));
        let mut bindings = Bindings::new(&graph);
        assert!(bindings.set_i32(0, &vec![0; 129]).is_err(), "more rows than AR-n");
        assert!(bindings.set_i32(2, &[1, 2]).is_err(), "two cache indices");
        assert!(bindings.set_f32(0, &[1.0]).is_err(), "floats for ids");
        for (input, values) in [&[1, 2][..], &[0], &[0], &[0]].into_iter().enumerate() {
            bindings.set_i32(input, values).unwrap();
        }
        let refused = executable.execute(&mut bindings, &mut state, &AtomicBool::new(false));
        assert!(matches!(&refused, Err(ExecuteError::Input { tensor, .. }) if tensor == "position_ids"), "{refused:?}");
    }
}

/// Broken if an executable reads the cache of a state that it ran with before, or takes a state that is not for it.
#[test]
fn states_take_turns() {
    let case = plain();
    let (graph, _) = Builder::new(&case).decoder(&case);
    let backend = HtpBackend::new(1).unwrap();
    let mut executable = backend.prepare(&graph).unwrap();
    let mut step = |state: &mut State, id: i32, at: i32| {
        let mut bindings = Bindings::new(&graph);
        bindings.set_i32(0, &[id]).unwrap();
        bindings.set_i32(1, &[at]).unwrap();
        bindings.set_i32(2, &[at]).unwrap();
        bindings.set_i32(3, &[0]).unwrap();
        executable.execute(&mut bindings, state, &AtomicBool::new(false))?;
        Ok::<_, ExecuteError>(bindings.output_f32(0).to_vec())
    };
    let [mut one, mut other, mut alone] = [(); 3].map(|()| backend.new_state(&[&graph], 8).unwrap());
    step(&mut alone, 1, 0).unwrap();
    let expected = step(&mut alone, 2, 1).unwrap();
    step(&mut one, 1, 0).unwrap();
    step(&mut other, 3, 0).unwrap();
    for mut wrong in [backend.new_state(&[], 8).unwrap(), ReferenceBackend.new_state(&[&graph], 8).unwrap()] {
        assert!(matches!(step(&mut wrong, 2, 1), Err(ExecuteError::State { tensor, .. }) if tensor == "past_key"));
    }
    // A state whose first cache is another graph's, of another size.
    let larger = Case { head_dim: 2 * case.head_dim, ..case.clone() };
    let (larger, _) = Builder::new(&larger).decoder(&larger);
    let mut other_name = Graph::new("other");
    for tensor in larger.tensors() {
        let name = tensor.name.replace("past_key", "other_key");
        other_name.add_tensor(Tensor { name, ..tensor.clone() }).unwrap();
    }
    larger.nodes().iter().for_each(|node| other_name.add_node(node.clone()).unwrap());
    let mut mixed = backend.new_state(&[&other_name, &graph], 8).unwrap();
    step(&mut mixed, 1, 0).unwrap();
    assert_eq!(step(&mut mixed, 2, 1).unwrap(), expected);
    assert_eq!(step(&mut one, 2, 1).unwrap(), expected);
    assert_ne!(step(&mut other, 2, 1).unwrap(), expected, "another history has to give something else");
}

/// Broken if strength 0, or no adapter at all, is not the base bit for bit; or if one column at 0 switches the others off.
#[test]
fn strength_zero_is_the_base() {
    let branch = Branch { ranks: (8, 8), alpha_first: true, alpha: 0.0, int8: true };
    let case = Case {
        seed: 9,
        group: 2,
        form: Form::Int8Block(32),
        activation: DataType::SFixedPoint16,
        cache: DataType::SFixedPoint8,
        workers: 2,
        branch: Some(branch),
        ..plain()
    };
    let backend = HtpBackend::new(2).unwrap();
    let (graph, adapter) = Builder::new(&case).decoder(&case);
    let runs: [&[i32]; 2] = [&[1, 2, 3], &[4]];
    let base = run(&backend, &graph, &runs, None, &case);
    assert_eq!(run(&backend, &graph, &runs, adapter.clone(), &case), base);
    for (seed, n_off) in [(9, 0), (10, 1), (11, 2)] {
        let strong = Case { seed, branch: Some(Branch { alpha: 1.0, ..branch }), ..case.clone() };
        let changed = run(&backend, &graph, &runs, adapter.clone(), &strong);
        assert_ne!(changed, base, "strength 1 behind {n_off} of 0 has to change something");
    }
}

/// Logits of every run, one after the other; each run asks for its last row only.
fn run(backend: &dyn Backend, graph: &Graph, runs: &[&[i32]], adapter: Option<Arc<Adapter>>, case: &Case) -> Vec<f32> {
    let mut logits = Vec::new();
    run_all(backend, graph, runs, adapter, case, &mut |outputs| logits.extend_from_slice(outputs[0]));
    logits
}

/// Shows `see` all outputs of every run.
fn run_all(
    backend: &dyn Backend,
    graph: &Graph,
    runs: &[&[i32]],
    adapter: Option<Arc<Adapter>>,
    case: &Case,
    see: &mut dyn FnMut(&[&[f32]]),
) {
    let mut executable = backend.prepare(graph).unwrap();
    let mut state = backend.new_state(&[graph], 64).unwrap();
    let mut bindings = Bindings::new(graph);
    if let (Some(branch), Some(input)) = (case.branch, bindings.find_input("lora_alpha")) {
        // Composed adapters have strengths of their own, and the first may be off alone.
        let n_off = if branch.alpha_first { case.seed as usize % 3 } else { 0 };
        let mut strengths = vec![branch.alpha; if branch.alpha_first { branch.ranks.0 } else { 1 }];
        strengths.iter_mut().take(n_off).for_each(|strength| *strength = 0.0);
        bindings.set_f32(input, &strengths).unwrap();
    }
    bindings.set_adapter(adapter);
    let mut past = 0;
    for ids in runs {
        let positions: Vec<i32> = (past..).take(ids.len()).collect();
        bindings.set_i32(0, ids).unwrap();
        bindings.set_i32(1, &positions).unwrap();
        bindings.set_i32(2, &[past]).unwrap();
        bindings.set_i32(3, &[ids.len() as i32 - 1]).unwrap();
        executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        see(&(0..bindings.outputs().len()).map(|i| bindings.output_f32(i)).collect::<Vec<_>>());
        past += ids.len() as i32;
    }
}

struct Builder {
    graph: Graph,
    seed: u64,
    form: Form,
    activation: DataType,
    bias: bool,
    branch: Option<Branch>,
    alpha: Option<TensorId>,
    adapter: Vec<(String, Panels)>,
}

impl Builder {
    fn new(case: &Case) -> Builder {
        let (seed, form, activation, bias) = (case.seed | 1, case.form, case.activation, case.bias);
        let (branch, alpha, adapter) = (case.branch, None, Vec::new());
        Builder { graph: Graph::new("test"), seed, form, activation, bias, branch, alpha, adapter }
    }

    /// One decoder layer between a tied embedding and head.
    fn decoder(mut self, case: &Case) -> (Graph, Option<Arc<Adapter>>) {
        let heads = case.kv_heads * case.group;
        let (hidden, kv_width) = (heads * case.head_dim, case.kv_heads * case.head_dim);
        let attrs = AttentionAttrs {
            heads,
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            scale: 1.0 / (case.head_dim as f32).sqrt(),
            window: case.window,
            softcap: case.softcap,
        };
        let ids = self.input("input_ids", DataType::Int32, None);
        let positions = self.input_by("position_ids", ids);
        let cache_index = self.add("cache_index", TensorType::AppWrite, DataType::Int32, Shape::fixed(&[1]), None);
        let wanted = self.input("logit_indices", DataType::Int32, None);
        if let Some(branch) = case.branch {
            let width = if branch.alpha_first { branch.ranks.0 } else { 1 };
            let shape = Shape::fixed(&[width]);
            self.alpha = Some(self.add("lora_alpha", TensorType::AppWrite, DataType::Float32, shape, None));
        }
        let embed = self.weight("embed.weight", case.vocab, hidden);
        let x = self.op("embed", OpKind::Gather, &[embed, ids]);
        let inv_freq = self.floats("inv_freq", case.head_dim / 2);
        let tables =
            self.graph.op("rope", OpKind::RotaryTable { scale: 1.0 }, &[positions, inv_freq], DataType::Float32);
        let tables = tables.unwrap();
        let normed = self.norm("norm1", x, hidden);
        let [q, k, v] =
            [("q", hidden), ("k", kv_width), ("v", kv_width)].map(|(name, n)| self.linear(name, normed, n, hidden));
        let rotate = OpKind::RotaryEmbedding { head_dim: case.head_dim };
        let q = self.op("q_rope", rotate, &[q, tables[0], tables[1]]);
        let k = self.op("k_rope", rotate, &[k, tables[0], tables[1]]);
        let cache = [case.kv_heads, 64, case.head_dim];
        let [pk, pv] = ["past_key", "past_value"]
            .map(|name| self.add(name, TensorType::AppReadWrite, case.cache, Shape::fixed(&cache), None));
        let attended = self.quantized_op("attention", OpKind::Attention(attrs), &[q, k, v, pk, pv, cache_index]);
        let o = self.linear("o", attended, hidden, hidden);
        let x = self.op("residual1", OpKind::ElementWiseAdd, &[x, o]);
        let normed = self.norm("norm2", x, hidden);
        let gate = self.linear("gate", normed, case.ffn, hidden);
        let up = self.linear("up", normed, case.ffn, hidden);
        let activated = if case.gelu {
            self.op("gelu", OpKind::Gelu, &[gate])
        } else {
            let sigmoid = self.op("sigmoid", OpKind::Sigmoid, &[gate]);
            self.op("silu", OpKind::ElementWiseMultiply, &[gate, sigmoid])
        };
        let product = self.quantized_op("product", OpKind::ElementWiseMultiply, &[activated, up]);
        let down = self.linear("down", product, hidden, case.ffn);
        let x = self.op("residual2", OpKind::ElementWiseAdd, &[x, down]);
        let last = self.op("last", OpKind::Gather, &[x, wanted]);
        let normed = self.norm("norm3", last, hidden);
        let logits = self.op("logits", OpKind::FullyConnected, &[normed, embed]);
        self.graph.mark_output(logits);
        self.graph.finalize().unwrap();
        let mut names: Vec<String> = self.adapter.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        let adapter = case.branch.map(|_| Arc::new(Adapter::new("test", names.into(), self.adapter).unwrap()));
        (self.graph, adapter)
    }

    /// Adds the branch to linear layer `name`, whose output is `base`.
    fn branched(&mut self, name: &str, base: TensorId, x: TensorId, n: usize, k: usize) -> TensorId {
        let (Some(branch), Some(alpha)) = (self.branch, self.alpha) else { return base };
        let (declared, real) = branch.ranks;
        let a = self.updatable(&format!("{name}.lora_A.weight"), [declared, k], [real, k]);
        let b = self.updatable(&format!("{name}.lora_B.weight"), [n, declared], [n, real]);
        let down = self.op(&format!("{name}.lora_A"), OpKind::FullyConnected, &[x, a]);
        let multiply = OpKind::ElementWiseMultiply;
        let sum = if branch.alpha_first {
            let scaled = self.op(&format!("{name}.lora_scale"), multiply, &[down, alpha]);
            self.op(&format!("{name}.lora_B"), OpKind::FullyConnected, &[scaled, b])
        } else {
            let up = self.op(&format!("{name}.lora_B"), OpKind::FullyConnected, &[down, b]);
            self.op(&format!("{name}.lora_scale"), multiply, &[up, alpha])
        };
        self.op(&format!("{name}.lora_add"), OpKind::ElementWiseAdd, &[base, sum])
    }

    /// An updatable tensor of extents `declared`, to which the adapter brings a value of extents `real`.
    fn updatable(&mut self, name: &str, declared: [usize; 2], real: [usize; 2]) -> TensorId {
        let form = if self.branch.is_some_and(|branch| branch.int8) { Form::Int8Channel } else { Form::F32 };
        let values: Vec<f32> = (0..real[0] * real[1]).map(|_| self.random()).collect();
        let (data_type, encoding, bytes) = store(form, real[1], real[0], &values, 1.0 / (real[1] as f32).sqrt());
        let data = Some(TensorData::Flat(bytes.into()));
        let (shape, tensor_type) = (Shape::fixed(&real), TensorType::Static);
        let value = Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding, data };
        self.adapter.push((name.to_owned(), pack_update(&value).unwrap()));
        self.add(name, TensorType::UpdateableStatic, data_type, Shape::fixed(&declared), None)
    }

    fn random(&mut self) -> f32 {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.seed >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    }

    fn add(
        &mut self,
        name: &str,
        kind: TensorType,
        data_type: DataType,
        shape: Shape,
        data: Option<Vec<u8>>,
    ) -> TensorId {
        let data = data.map(|bytes| TensorData::Flat(bytes.into()));
        let tensor = Tensor { name: name.to_owned(), tensor_type: kind, data_type, shape, encoding: None, data };
        self.graph.add_tensor(tensor).unwrap()
    }

    fn input(&mut self, name: &str, data_type: DataType, width: Option<usize>) -> TensorId {
        let own = TensorId(self.graph.tensors().len() as u32);
        let dims = std::iter::once(Dim::UpTo { max: 128, by: own }).chain(width.map(Dim::Fixed)).collect();
        self.add(name, TensorType::AppWrite, data_type, Shape(dims), None)
    }

    fn input_by(&mut self, name: &str, by: TensorId) -> TensorId {
        self.add(name, TensorType::AppWrite, DataType::Int32, Shape(vec![Dim::UpTo { max: 128, by }]), None)
    }

    fn floats(&mut self, name: &str, n: usize) -> TensorId {
        let bytes = (0..n).flat_map(|_| (0.6 + 0.4 * self.random()).to_le_bytes()).collect();
        self.add(name, TensorType::Static, DataType::Float32, Shape::fixed(&[n]), Some(bytes))
    }

    fn op(&mut self, name: &str, op: OpKind, inputs: &[TensorId]) -> TensorId {
        self.graph.op(name, op, inputs, DataType::Float32).unwrap()[0]
    }

    fn quantized_op(&mut self, name: &str, op: OpKind, inputs: &[TensorId]) -> TensorId {
        self.graph.op(name, op, inputs, self.activation).unwrap()[0]
    }

    fn norm(&mut self, name: &str, x: TensorId, k: usize) -> TensorId {
        let weight = self.floats(&format!("{name}.weight"), k);
        self.quantized_op(name, OpKind::RmsNorm { epsilon: 1e-5 }, &[x, weight])
    }

    fn linear(&mut self, name: &str, x: TensorId, n: usize, k: usize) -> TensorId {
        let weight = self.weight(&format!("{name}.weight"), n, k);
        let mut inputs = vec![x, weight];
        if self.bias {
            inputs.push(self.floats(&format!("{name}.bias"), n));
        }
        let base = self.op(name, OpKind::FullyConnected, &inputs);
        self.branched(name, base, x, n, k)
    }

    fn weight(&mut self, name: &str, n: usize, k: usize) -> TensorId {
        let spread = 1.0 / (k as f32).sqrt();
        let values: Vec<f32> = (0..n * k).map(|_| self.random()).collect();
        let form = match self.form {
            Form::Mixed if self.graph.tensors().len().is_multiple_of(2) => Form::Int6Block(16),
            Form::Mixed => Form::Int4Min(32),
            form => form,
        };
        let (data_type, encoding, bytes) = store(form, k, n, &values, spread);
        let tensor = Tensor {
            name: name.to_owned(),
            tensor_type: TensorType::Static,
            data_type,
            shape: Shape::fixed(&[n, k]),
            encoding,
            data: Some(TensorData::Flat(bytes.into())),
        };
        self.graph.add_tensor(tensor).unwrap()
    }
}

/// Random weights in `form`: codes from `values` in -1..1, scales around `spread`.
fn store(form: Form, k: usize, n: usize, values: &[f32], spread: f32) -> (DataType, Option<Encoding>, Vec<u8>) {
    let bytes8 = || values.iter().map(|v| (v * 127.0) as i8 as u8).collect::<Vec<u8>>();
    let nibbles = |f: &dyn Fn(f32) -> u8| values.chunks(2).map(|p| f(p[0]) & 15 | f(p[1]) << 4).collect::<Vec<u8>>();
    let scales = |count: usize, step: f32| {
        (0..count).map(|i| spread * step * (1.0 + 0.1 * (i % 7) as f32)).collect::<Vec<f32>>()
    };
    let block = |bitwidth, block_size: usize, step: f32, offsets: BlockOffsets| {
        let scales = Floats::from_f16(&scales(n * k / block_size, step));
        Some(Encoding::Block { bitwidth, block_size, scales, offsets })
    };
    let unsigned = |v: f32| ((v + 1.0) * 7.5) as u8;
    match form {
        Form::F32 => (DataType::Float32, None, values.iter().flat_map(|v| (v * spread).to_le_bytes()).collect()),
        Form::F16 => {
            (DataType::Float16, None, values.iter().flat_map(|v| f16::from_f32(v * spread).to_le_bytes()).collect())
        }
        Form::Int8Channel => {
            let scales = Floats::from_f32(&scales(n, 1.0 / 127.0));
            let encoding = Encoding::AxisScaleOffset { bitwidth: 8, axis: 0, scales, offsets: Vec::new() };
            (DataType::SFixedPoint8, Some(encoding), bytes8())
        }
        Form::Int8Block(size) => {
            (DataType::SFixedPoint8, block(8, size, 1.0 / 127.0, BlockOffsets::Symmetric), bytes8())
        }
        Form::Int6Block(size) => {
            let codes = values.iter().map(|v| (v * 31.9) as i8 as u8).collect();
            (DataType::SFixedPoint8, block(6, size, 1.0 / 32.0, BlockOffsets::Symmetric), codes)
        }
        Form::Int5Block(size) => {
            let codes = values.iter().map(|v| (v * 15.9) as i8 as u8).collect();
            (DataType::SFixedPoint8, block(5, size, 1.0 / 16.0, BlockOffsets::Symmetric), codes)
        }
        Form::Int5Min(size) => {
            let mins: Vec<f32> = (0..n * k / size).map(|i| -spread * (0.9 + 0.03 * (i % 5) as f32)).collect();
            let encoding = block(5, size, 1.0 / 16.0, BlockOffsets::Min(Floats::from_f16(&mins)));
            (DataType::UFixedPoint8, encoding, values.iter().map(|v| ((v + 1.0) * 15.5) as u8).collect())
        }
        Form::Int4Block(size) => {
            let codes = nibbles(&|v| (v * 7.9) as i8 as u8);
            (DataType::SFixedPoint4, block(4, size, 1.0 / 8.0, BlockOffsets::Symmetric), codes)
        }
        Form::Int4Integer(size) => {
            let offsets = (0..n * k / size).map(|i| (-8 + (i % 3) as i8) as u8).collect::<Vec<u8>>();
            let encoding = block(4, size, 1.0 / 8.0, BlockOffsets::Integer(offsets.into()));
            (DataType::UFixedPoint4, encoding, nibbles(&unsigned))
        }
        Form::Mixed => unreachable!("`weight` takes the two in turn"),
        Form::Int4Min(size) => {
            let mins: Vec<f32> = (0..n * k / size).map(|i| -spread * (0.9 + 0.03 * (i % 5) as f32)).collect();
            let encoding = block(4, size, 1.0 / 8.0, BlockOffsets::Min(Floats::from_f16(&mins)));
            (DataType::UFixedPoint4, encoding, nibbles(&unsigned))
        }
    }
}
