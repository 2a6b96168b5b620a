//! The promises of applied adapters: the next execute runs with exactly what was applied last, on every thread, and the
//! base comes back bit for bit.

use std::collections::BTreeMap;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::support::{Form, Rng, Runner, Tiny, random_adapter, tiny};
use qnn_core::{
    Adapter, Bytes, Context, ContextBuilder, DataType, StateError,
    adapter::Description,
    backend::{HtpBackend, ReferenceBackend},
    binary::Verify,
};

const RANK: usize = 4;
const IDS: [i32; 5] = [3, 17, 5, 30, 9];

fn builder() -> ContextBuilder {
    let forms = &[Form::Int8Block];
    let prompt = Tiny { forms, layers: 1, branch: Some((RANK, DataType::SFixedPoint8)), ..Tiny::default() };
    ContextBuilder::new().graph(tiny("prompt", prompt)).graph(tiny("token", Tiny { ar: 1, ..prompt }))
}

fn open(builder: &ContextBuilder) -> Context {
    Context::from_binary(builder.to_binary().unwrap().into(), Verify::Checksums).unwrap()
}

fn section(context: &Context, name: &str, seed: u64, rank: usize, graph: Option<&str>) -> Bytes {
    let adapter = random_adapter(context, name, seed, rank, &["layers"]);
    let description = Description { graph: graph.map(str::to_owned), ..adapter.description().clone() };
    context.section(&adapter.described(description)).unwrap().into()
}

fn default_adapter(context: &Context) -> Bytes {
    let adapter = Adapter::new("default_adapter", context.updatable().clone(), []).unwrap();
    context.section(&adapter).unwrap().into()
}

fn runner(context: &Context, graph: &str) -> Runner {
    Runner::new(&HtpBackend::new(1).unwrap(), context.graph(graph).unwrap())
}

// Broken if there is no way back to the base: strength 0 and the adapter without values each have to give its bits.
#[test]
fn both_ways_back_give_the_base_bit_for_bit() {
    let context = open(&builder());
    let mut runner = runner(&context, "prompt");
    let base = runner.run(&IDS, None, 1.0);
    for rank in 1..=RANK {
        let adapter = context.apply_section(None, section(&context, "json", rank as u64, rank, None)).unwrap();
        let with = runner.run(&IDS, context.adapter("prompt"), 1.0);
        assert!(with.iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3), "rank {rank} changes nothing");
        assert_eq!(runner.run(&IDS, context.adapter("prompt"), 0.0), base);
        context.apply_section(None, default_adapter(&context)).unwrap();
        assert_eq!(context.adapter("prompt").unwrap().name(), "default_adapter");
        assert_eq!(runner.run(&IDS, context.adapter("prompt"), 1.0), base);
        context.apply(None, &adapter).unwrap();
        assert_eq!(runner.run(&IDS, context.adapter("prompt"), 1.0), with);
        context.clear(None).unwrap();
        assert!(context.adapter("prompt").is_none());
        assert_eq!(runner.run(&IDS, context.adapter("prompt"), 1.0), base);
    }
}

// Broken if a section's values mean something else than those it was made of, on either backend.
#[test]
fn a_loaded_section_computes_what_its_values_say() {
    let context = open(&builder());
    let made = Arc::new(random_adapter(&context, "json", 7, 3, &["layers"]));
    let loaded = context.load_section(context.section(&made).unwrap().into()).unwrap();
    let graph = context.graph("prompt").unwrap();
    let mut htp = runner(&context, "prompt");
    let mut reference = Runner::new(&ReferenceBackend, graph);
    let [with_made, with_loaded] = [made, loaded.clone()].map(|adapter| htp.run(&IDS, Some(adapter), 0.7));
    assert_eq!(with_made, with_loaded);
    let want = reference.run(&IDS, Some(loaded), 0.7);
    let top = want.iter().fold(0.0f32, |top, v| top.max(v.abs()));
    for (a, b) in with_loaded.iter().zip(&want) {
        assert!((a - b).abs() <= 2e-3 * top, "{a} {b}");
    }
}

// Broken if applying to one graph reaches another, or a section for one graph does.
#[test]
fn graphs_have_adapters_of_their_own() {
    let context = open(&builder());
    let (mut prompt, mut token) = (runner(&context, "prompt"), runner(&context, "token"));
    let ids = &IDS[..1];
    let base = prompt.run(ids, None, 1.0);
    assert_eq!(token.run(ids, None, 1.0), base, "one row is the same in both graphs");
    context.apply_section(None, section(&context, "t", 5, 2, Some("token"))).unwrap();
    assert_eq!(prompt.run(ids, context.adapter("prompt"), 1.0), base);
    let of_token = token.run(ids, context.adapter("token"), 1.0);
    assert_ne!(of_token, base);
    let whole = section(&context, "w", 6, 3, None);
    context.apply_section(Some("prompt"), whole.clone()).unwrap();
    assert_eq!(token.run(ids, context.adapter("token"), 1.0), of_token);
    let of_prompt = prompt.run(ids, context.adapter("prompt"), 1.0);
    assert!(of_prompt != base && of_prompt != of_token);
    context.apply_section(None, whole).unwrap();
    assert_eq!(token.run(ids, context.adapter("token"), 1.0), of_prompt);
    context.clear(Some("prompt")).unwrap();
    assert_eq!(prompt.run(ids, context.adapter("prompt"), 1.0), base);
    assert_eq!(token.run(ids, context.adapter("token"), 1.0), of_prompt);
    assert!(context.adapter("no such graph").is_none());
}

// Broken if a context that shares its adapter weights runs before it has any, or others have to wait for some.
#[test]
fn weight_sharing_waits_for_the_first_apply() {
    let context = open(&builder().metadata("lora_weight_sharing", "true"));
    let error = context.ready("token").unwrap_err();
    assert!(matches!(error, StateError::NothingApplied { .. }), "{error}");
    assert_eq!(error.code().to_string(), "QNN_CONTEXT_ERROR_NOT_FINALIZED (5003)");
    context.apply_section(Some("token"), default_adapter(&context)).unwrap();
    context.ready("token").unwrap();
    assert!(context.ready("prompt").is_err());
    context.clear(None).unwrap();
    assert!(context.ready("token").is_err());
    open(&builder()).ready("token").unwrap();
    assert!(matches!(context.ready("no"), Err(StateError::UnknownGraph { .. })));
}

// Broken if a failed apply is half applied: the next execute has to give the previous state's bits.
#[test]
fn a_failed_apply_leaves_the_next_output_as_it_was() {
    let context = open(&builder());
    let mut runner = runner(&context, "prompt");
    context.apply_section(None, section(&context, "json", 1, 3, None)).unwrap();
    let want = runner.run(&IDS, context.adapter("prompt"), 1.0);
    for damage in damaged(&context) {
        context.apply_section(None, damage).unwrap_err();
        assert_eq!(runner.run(&IDS, context.adapter("prompt"), 1.0), want);
    }
}

/// A cut, a flipped, a foreign and a newer section.
fn damaged(context: &Context) -> [Bytes; 4] {
    let good = section(context, "bad", 99, 2, None).to_vec();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    let forms = &[Form::Int8Block];
    let other = Tiny { seed: 77, forms, layers: 1, branch: Some((RANK, DataType::SFixedPoint8)), ..Tiny::default() };
    let other = open(&ContextBuilder::new().graph(tiny("prompt", other)));
    let mut newer = good.clone();
    newer[4] = 9;
    crate::support::mend_checksums(&mut newer);
    [good[..good.len() - 1].to_vec().into(), flipped.into(), section(&other, "bad", 1, 2, None), newer.into()]
}

// Broken if an execute ever sees two adapters, another one than the context named, or none: two executables on one
// context in two threads, under random applies, failed applies and clears of both.
#[test]
fn random_interleavings_give_each_adapter_alone() {
    let context = open(&builder());
    let names = ["a", "b", "c", "d"];
    let sections =
        names.map(|name| section(&context, name, u64::from(name.as_bytes()[0]), 1 + name.len() % RANK, None));
    let damaged = damaged(&context);
    // Each adapter's output alone, from a context that never saw another.
    let alone = |graph: &str, ids: &[i32], bytes: Option<&Bytes>| {
        let fresh = open(&builder());
        let adapter = bytes.map(|bytes| fresh.load_section(bytes.clone()).unwrap());
        runner(&fresh, graph).run(ids, adapter, 1.0)
    };
    let (done, swaps) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (seed, graph, ids) in [(1u64, "prompt", &IDS[..]), (2, "token", &IDS[..1])] {
            let mut want: BTreeMap<String, Vec<f32>> = BTreeMap::new();
            want.insert(String::new(), alone(graph, ids, None));
            for (name, bytes) in names.iter().zip(&sections) {
                want.insert((*name).to_owned(), alone(graph, ids, Some(bytes)));
            }
            let distinct: std::collections::BTreeSet<String> = want.values().map(|v| format!("{v:?}")).collect();
            assert_eq!(distinct.len(), 5, "every adapter has a signature of its own");
            let (context, sections, damaged, done, swaps) = (&context, &sections, &damaged, &done, &swaps);
            scope.spawn(move || {
                let (mut rng, mut runner) = (Rng(seed), runner(context, graph));
                let loaded: Vec<Arc<Adapter>> =
                    sections.iter().map(|bytes| context.load_section(bytes.clone()).unwrap()).collect();
                for _ in 0..4000 {
                    let one = rng.next() as usize % 4;
                    let target = [None, Some("prompt"), Some("token")][rng.next() as usize % 3];
                    match rng.next() % 8 {
                        0 => _ = context.apply_section(target, sections[one].clone()).unwrap(),
                        1 | 2 => context.apply(target, &loaded[one]).unwrap(),
                        3 => context.clear(target).unwrap(),
                        4 => _ = context.apply_section(target, damaged[one].clone()).unwrap_err(),
                        _ => {
                            let adapter = context.adapter(graph);
                            let name = adapter.as_ref().map_or("", |adapter| adapter.name()).to_owned();
                            assert_eq!(runner.run(ids, adapter, 1.0), want[&name], "adapter {name:?}");
                            done.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                    }
                    swaps.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert!(done.into_inner() > 2000 && swaps.into_inner() > 4000);
}
