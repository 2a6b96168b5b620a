//! Guards the calibration runner: what observers are shown are the values of the graph's tensors, whatever the number of
//! rows of a run, with and without an adapter, from the ids or from a layer on.

use std::sync::{Arc, atomic::AtomicBool};

use crate::support::{Form, HIDDEN, Rng, Tiny, random_adapter, tiny};
use qnn_core::{
    Adapter, Backend, Bindings, Context, ContextBuilder, DataType, Graph, TensorId, TensorType,
    backend::{HtpBackend, ReferenceBackend},
    binary::Verify,
    offline::calibrate::{CalibrateError, Calibrator, Feed, Probe, float_graph},
};

const WINDOW: usize = 20;
const RANK: usize = 4;

fn model(forms: &'static [Form], branch: bool) -> Graph {
    let branch = branch.then_some((RANK, DataType::Float32));
    tiny("model", Tiny { seed: 5, ar: 32, cl: 32, forms, branch, ..Tiny::default() })
}

/// Computed tensors outside of branches: those that can be looked at.
fn taps(graph: &Graph) -> Vec<TensorId> {
    let with_branch = graph.find("lora_alpha").is_some();
    let names = |id: &TensorId| graph.tensor(*id).name.clone();
    let computed = graph.nodes().iter().flat_map(|node| node.outputs.clone());
    computed
        .filter(|id| !names(id).contains("lora_") || names(id).ends_with("lora_add"))
        .filter(|id| !(with_branch && names(id).ends_with("_proj")))
        .collect()
}

fn ids() -> Vec<u32> {
    let mut rng = Rng(9);
    (0..WINDOW).map(|_| (rng.next() % crate::support::VOCAB as u64) as u32).collect()
}

/// Values of `taps` as the reference backend computes them, in one run.
fn expected(graph: &Graph, taps: &[TensorId], adapter: Option<Arc<Adapter>>) -> Vec<Vec<f32>> {
    let mut graph = graph.clone();
    taps.iter().for_each(|id| graph.mark_output(*id));
    let mut bindings = Bindings::new(&graph);
    let ids: Vec<i32> = ids().iter().map(|id| *id as i32).collect();
    let rows: Vec<i32> = (0..WINDOW as i32).collect();
    for (name, values) in
        [("input_ids", &ids[..]), ("position_ids", &rows), ("cache_index", &[0]), ("logit_indices", &rows)]
    {
        let input = bindings.find_input(name).expect("every tiny model has it");
        bindings.set_i32(input, values).expect("it fits");
    }
    if let Some(alpha) = bindings.find_input("lora_alpha") {
        bindings.set_f32(alpha, &[0.75; RANK]).expect("it fits");
    }
    bindings.set_adapter(adapter);
    let mut executable = ReferenceBackend.prepare(&graph).expect("the reference runs everything");
    let mut state = ReferenceBackend.new_state(&[&graph], WINDOW).expect("plain caches");
    executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).expect("it runs");
    let output = |id: &TensorId| bindings.find_output(&graph.tensor(*id).name).expect("marked");
    taps.iter().map(|id| bindings.output_f32(output(id)).to_vec()).collect()
}

/// What the runner shows, put together.
fn observed(calibrator: &mut Calibrator, n_taps: usize, window: Feed<'_>) -> Vec<Vec<f32>> {
    let mut all = vec![Vec::new(); n_taps];
    calibrator
        .run(window, &mut |rows| {
            assert_eq!(all[rows.tap].len(), rows.position * rows.width, "rows come in order, without gaps");
            all[rows.tap].extend_from_slice(rows.values);
        })
        .expect("it runs");
    all
}

fn assert_close(graph: &Graph, taps: &[TensorId], have: &[Vec<f32>], want: &[Vec<f32>]) {
    for ((id, have), want) in taps.iter().zip(have).zip(want) {
        assert_eq!(have.len(), want.len(), "{}", graph.tensor(*id).name);
        let worst = have.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "{}: differs by {worst}", graph.tensor(*id).name);
    }
}

fn probe(taps: &[TensorId], rows_per_run: usize) -> Probe {
    Probe { taps: taps.to_vec(), from: None, max_window: WINDOW, rows_per_run }
}

// Guards: taps of a float graph and of an integer graph show what the reference computes for it in floats.
#[test]
fn taps_show_the_values_of_the_graph() {
    let backend = HtpBackend::new(2).expect("two threads");
    for forms in [&[][..], &[Form::Int4BlockMin, Form::Int8Channel, Form::F16]] {
        let mut graph = model(forms, false);
        let taps = taps(&graph);
        let want = expected(&graph, &taps, None);
        // What a converter leaves in a graph with integer weights.
        let attention = graph.find("model.layers.0.self_attn").expect("every tiny model has it");
        graph.set_encoding(attention, DataType::SFixedPoint8, None).expect("no encoding always fits");
        for rows_per_run in [0, 1, 7, 100] {
            let mut calibrator = Calibrator::new(&graph, &probe(&taps, rows_per_run), &backend).expect("it is ready");
            let have = observed(&mut calibrator, taps.len(), Feed::Ids(&ids()));
            assert_close(&graph, &taps, &have, &want);
            assert_eq!(have, observed(&mut calibrator, taps.len(), Feed::Ids(&ids())), "every window starts afresh");
        }
    }
}

// Guards: calibration with an adapter sees the adapter's activations, and the base's again without it.
#[test]
fn taps_show_the_adapter() {
    let backend = HtpBackend::new(1).expect("one thread");
    let mut graph = model(&[], true);
    graph.set_metadata("lora_alpha_tensor", "lora_alpha");
    let context = ContextBuilder::new().graph(graph.clone()).to_binary().expect("it can be stored");
    let context = Context::from_binary(context.into(), Verify::Checksums).expect("it was written just now");
    let adapter = Arc::new(random_adapter(&context, "a", 3, RANK, &["q_proj", "up_proj", "down_proj"]));
    let taps = taps(&graph);
    let mut calibrator = Calibrator::new(&graph, &probe(&taps, 6), &backend).expect("it is ready");
    assert_eq!(calibrator.n_strengths(), RANK);
    let base = observed(&mut calibrator, taps.len(), Feed::Ids(&ids()));
    assert_close(&graph, &taps, &base, &expected(&graph, &taps, None));
    calibrator.set_adapter(Some(Arc::clone(&adapter)), &[0.75; RANK]).expect("as many as the graph has");
    let adapted = observed(&mut calibrator, taps.len(), Feed::Ids(&ids()));
    assert_close(&graph, &taps, &adapted, &expected(&graph, &taps, Some(adapter)));
    assert_ne!(adapted, base);
    let refused = calibrator.set_adapter(None, &[1.0]);
    assert!(matches!(refused, Err(CalibrateError::Strengths { have: 1, want: RANK })));
    calibrator.set_adapter(None, &[1.0; RANK]).expect("strengths without an adapter mean nothing");
    assert_eq!(observed(&mut calibrator, taps.len(), Feed::Ids(&ids())), base);
}

// Guards: running from a layer's output gives what a run from the ids gives, and computes only what the taps need.
#[test]
fn a_run_can_start_at_a_layer() {
    let backend = HtpBackend::new(1).expect("one thread");
    let graph = model(&[], false);
    let find = |name: &str| graph.find(name).expect("every tiny model has it");
    let (first, second) = (find("model.layers.0.residual_2"), find("model.layers.1.residual_2"));
    let all = [first, second];
    let mut calibrator = Calibrator::new(&graph, &probe(&all, 8), &backend).expect("it is ready");
    let want = observed(&mut calibrator, 2, Feed::Ids(&ids()));
    let from = Probe { from: Some(first), ..probe(&[second], 8) };
    let mut calibrator = Calibrator::new(&graph, &from, &backend).expect("it is ready");
    let have = observed(&mut calibrator, 1, Feed::Rows(&want[0]));
    assert_close(&graph, &[second], &have, &want[1..]);
    let wrong = calibrator.run(Feed::Rows(&want[0][..HIDDEN + 1]), &mut |_| {});
    assert!(matches!(wrong, Err(CalibrateError::Feed { .. })));
    assert!(matches!(calibrator.run(Feed::Ids(&[1]), &mut |_| {}), Err(CalibrateError::Feed { .. })));
}

// Guards: what cannot be looked at or run is refused, with the tensor's name or the numbers.
#[test]
fn impossible_probes_are_refused() {
    let backend = HtpBackend::new(1).expect("one thread");
    let graph = model(&[], false);
    let find = |name: &str| graph.find(name).expect("every tiny model has it");
    let why = |taps: &[TensorId]| match Calibrator::new(&graph, &probe(taps, 0), &backend) {
        Ok(_) => panic!("{taps:?} was taken"),
        Err(why) => why.to_string(),
    };
    assert_eq!(why(&[]), "no tensor to look at");
    assert_eq!(why(&[find("input_ids")]), "tensor input_ids cannot be looked at: no node computes it");
    assert!(why(&[find("model.embed_tokens.weight")]).contains("no node computes it"));
    assert!(why(&[find("logits"), find("logits")]).contains("twice"));
    let mut calibrator = Calibrator::new(&graph, &probe(&[find("logits")], 0), &backend).expect("it is ready");
    let mut run = |ids: &[u32]| calibrator.run(Feed::Ids(ids), &mut |_| {});
    assert!(matches!(run(&[]), Err(CalibrateError::Window { have: 0, max: WINDOW })));
    assert!(matches!(run(&[0; WINDOW + 1]), Err(CalibrateError::Window { .. })));
    assert!(matches!(run(&[u32::MAX]), Err(CalibrateError::Id { id: u32::MAX })));
    assert!(matches!(run(&[crate::support::VOCAB as u32]), Err(CalibrateError::Execute(_))));
}

// Guards: the float form of a graph has no integers left, and the values are those that the codes mean.
#[test]
fn float_graphs_mean_the_same() {
    let graph = model(&[Form::Int4BlockInteger, Form::Int8Block], false);
    let float = float_graph(&graph).expect("plain constants");
    let integers = |t: &&qnn_core::Tensor| t.data_type.is_fixed_point() || t.encoding.is_some();
    assert!(graph.tensors().iter().filter(integers).count() > 0);
    assert_eq!(float.tensors().iter().filter(integers).count(), 0);
    assert!(float.tensors().iter().all(|t| t.tensor_type != TensorType::Static || t.data.is_some()));
    let taps = taps(&graph);
    assert_close(&graph, &taps, &expected(&float, &taps, None), &expected(&graph, &taps, None));
}
