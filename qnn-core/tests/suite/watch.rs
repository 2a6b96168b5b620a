//! Guards watched runs: what is shown is what the graph computes, looking changes nothing, and what is put in the place of
//! a tensor is what all that follows is computed from.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use crate::support::{Form, HIDDEN, Rng, Tiny, VOCAB, tiny};
use qnn_core::{
    Backend, Bindings, DataType, Encoding, Executable, Graph, State,
    backend::{HtpBackend, ReferenceBackend, Seen, Watched, htp::surviving_tensors},
    offline::calibrate::{Calibrator, Feed, Probe},
};

const ROWS: usize = 6;
const BOUNDARY: &str = "model.layers.0.residual_2";

/// Integer weights whose inputs are codes: with a scale for each row before q, k, v, on a fixed grid before `down`; `o`
/// reads floats.
fn quantized() -> Graph {
    let forms = &[Form::Int8Block, Form::Int4BlockMin];
    let mut graph = tiny("model", Tiny { seed: 11, ar: 8, cl: 16, forms, ..Tiny::default() });
    for layer in 0..2 {
        let find = |name: &str| graph.find(&format!("model.layers.{layer}.{name}")).expect("every tiny model has it");
        let (normed, product) = (find("input_layernorm"), find("mlp.product"));
        let grid = Encoding::ScaleOffset { bitwidth: 16, scale: 1e-4, offset: -20000 };
        graph.set_encoding(normed, DataType::SFixedPoint16, None).expect("no encoding always fits");
        graph.set_encoding(product, DataType::UFixedPoint16, Some(grid)).expect("a grid of 16 bits");
    }
    graph
}

fn float() -> Graph {
    tiny("model", Tiny { seed: 11, ar: 8, cl: 16, ..Tiny::default() })
}

struct Run {
    executable: Box<dyn Executable>,
    bindings: Bindings,
    state: State,
}

impl Run {
    fn new(backend: &dyn Backend, graph: &Graph) -> Run {
        let executable = backend.prepare(graph).expect("it can run");
        let state = backend.new_state(&[graph], 16).expect("its caches are plain");
        let mut bindings = Bindings::new(graph);
        let mut rng = Rng(3);
        let ids: Vec<i32> = (0..ROWS).map(|_| (rng.next() % VOCAB as u64) as i32).collect();
        let rows: Vec<i32> = (0..ROWS as i32).collect();
        let inputs =
            [("input_ids", &ids[..]), ("position_ids", &rows), ("cache_index", &[0]), ("logit_indices", &rows)];
        for (name, values) in inputs {
            let input = bindings.find_input(name).expect("every tiny model has it");
            bindings.set_i32(input, values).expect("it fits");
        }
        Run { executable, bindings, state }
    }

    fn logits(&mut self, watch: Option<&mut dyn FnMut(Watched<'_>) -> Seen>) -> Vec<f32> {
        let never = AtomicBool::new(false);
        let Run { executable, bindings, state } = self;
        match watch {
            Some(watch) => executable.execute_watched(bindings, state, &never, watch),
            None => executable.execute(bindings, state, &never),
        }
        .expect("it runs");
        self.bindings.output_f32(0).to_vec()
    }

    /// Everything shown, and the logits.
    fn shown(&mut self) -> (Vec<(String, Vec<f32>)>, Vec<f32>) {
        let mut all = Vec::new();
        let logits = self.logits(Some(&mut |tensor: Watched<'_>| {
            assert_eq!(tensor.values.len(), ROWS * tensor.width, "{}", tensor.name);
            all.push((tensor.name.to_owned(), tensor.values.to_vec()));
            Seen::Kept
        }));
        (all, logits)
    }
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

// Guards: every tensor that survives fusion is shown once, with the value that the reference computes; looking changes
// no bit of the result, in either backend.
#[test]
fn what_is_shown_is_what_is_computed() {
    let backend = HtpBackend::new(2).expect("two threads");
    for graph in [float(), quantized()] {
        let mut fast = Run::new(&backend, &graph);
        let (shown, logits) = fast.shown();
        assert_eq!(logits, fast.logits(None));
        let mut slow = Run::new(&ReferenceBackend, &graph);
        let (reference, slow_logits) = slow.shown();
        assert_eq!(slow_logits, slow.logits(None));

        let survives = surviving_tensors(&graph).expect("it can run");
        let computed: Vec<&str> = graph.nodes().iter().flat_map(|n| &n.outputs).map(|id| name(&graph, *id)).collect();
        let mut want: Vec<&str> =
            computed.iter().copied().filter(|n| survives[graph.find(n).expect("it is").index()]).collect();
        let mut have: Vec<&str> = shown.iter().map(|(name, _)| name.as_str()).collect();
        want.sort_unstable();
        have.sort_unstable();
        assert_eq!(have, want);
        assert!(have.len() < computed.len(), "something is fused");
        assert_eq!(reference.len(), computed.len(), "the reference fuses nothing");

        let reference: HashMap<String, Vec<f32>> = reference.into_iter().collect();
        for (name, values) in &shown {
            let off = worst(values, &reference[name]);
            assert!(off < 2e-3, "{name}: differs by {off}");
        }
    }
}

fn name(graph: &Graph, id: qnn_core::TensorId) -> &str {
    &graph.tensor(id).name
}

// Guards: a replaced tensor is what the rest of the model is computed from: as if the run had started there.
#[test]
fn a_replaced_tensor_is_what_the_rest_is_computed_from() {
    let backend = HtpBackend::new(1).expect("one thread");
    let graph = float();
    let mut rng = Rng(8);
    let rows: Vec<f32> = (0..ROWS * HIDDEN).map(|_| rng.float()).collect();
    let find = |name: &str| graph.find(name).expect("every tiny model has it");
    let probe = Probe { taps: vec![find("logits")], from: Some(find(BOUNDARY)), max_window: 8, rows_per_run: 8 };
    let mut want = Vec::new();
    Calibrator::new(&graph, &probe, &backend)
        .expect("it is ready")
        .run(Feed::Rows(&rows), &mut |rows| want.extend_from_slice(rows.values))
        .expect("it runs");
    let mut replace = |tensor: Watched<'_>| {
        if tensor.name != BOUNDARY {
            return Seen::Kept;
        }
        tensor.values.copy_from_slice(&rows);
        Seen::Replaced
    };
    for backend in [&backend as &dyn Backend, &ReferenceBackend] {
        let mut run = Run::new(backend, &graph);
        let own = run.logits(None);
        let have = run.logits(Some(&mut replace));
        assert!(worst(&have, &want) < 2e-4 && worst(&have, &own) > 1e-2);
    }
}

// Guards: a tensor in codes takes what is put in its place as the nearest codes, with a scale for each row and on a grid.
#[test]
fn a_replaced_tensor_in_codes_is_rounded_to_its_grid() {
    let backend = HtpBackend::new(1).expect("one thread");
    let graph = quantized();
    for target in ["model.layers.1.input_layernorm", "model.layers.1.mlp.product"] {
        let mut replace = |tensor: Watched<'_>| {
            if tensor.name != target {
                return Seen::Kept;
            }
            tensor.values.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 37) as f32 * 0.031 - 0.5);
            Seen::Replaced
        };
        let logits = |backend: &dyn Backend, replace: &mut dyn FnMut(Watched<'_>) -> Seen| {
            let mut run = Run::new(backend, &graph);
            (run.logits(None), run.logits(Some(replace)))
        };
        let (own, have) = logits(&backend, &mut replace);
        let (_, want) = logits(&ReferenceBackend, &mut replace);
        assert!(worst(&have, &want) < 2e-3 && worst(&have, &own) > 1e-2, "{target}");
    }
}
