//! One more token: a step at several depths of the cache, in bytes of weights and cache per second, and what is done with
//! its logits besides, sampling and text, which must not show beside it. Ends with a table of the step's operations.

use std::hint::black_box;
use std::sync::atomic::AtomicBool;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use genie::config::{SamplerConfig, TokenPenalty};
use genie::engine::{Engine, Logits};
use genie::profile::operations_table;
use genie::sampler::Sampler;
use genie::tokenizer::Specials;
use genie_workspace::bench_model::{cost, ids, open};

fn decode(criterion: &mut Criterion) {
    let (name, model) = open().expect("there is a model");
    let mut engine = model.engine().expect("the model opened");
    let place = format!("{name}/{}/t{}", engine.kernels(), engine.n_threads());
    let never = AtomicBool::new(false);
    let prompt = ids(2048.min(engine.context_size() - 1), engine.n_vocab());

    let mut group = criterion.benchmark_group("decode");
    for depth in [0, 512, 2047].into_iter().filter(|depth| *depth <= prompt.len()) {
        engine.rewind(0);
        engine.forward(&prompt[..depth], Logits::None, &never).expect("it fits");
        let (bytes, _) = cost(&mut engine, &[42]).expect("it fits");
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(format!("step/d{depth}/{place}"), |bencher| {
            bencher.iter(|| {
                engine.rewind(depth);
                black_box(engine.forward(&[42], Logits::Last, &never).expect("it fits")[0])
            });
        });
    }

    engine.rewind(0);
    // Pseudo-random ids leave the model with no idea what follows, which no text does.
    let text =
        model.tokenizer().encode("The old man walked down to the sea, and", Specials::AsText).expect("it is short");
    let logits = engine.forward(&text, Logits::Last, &never).expect("it fits").to_vec();
    group.throughput(Throughput::Elements(1));
    let penalty = TokenPenalty { last_n: 64, repetition: 1.1, presence: 0.1, frequency: 0.1 };
    let random = SamplerConfig { greedy: false, temp: 0.8, seed: Some(1), ..SamplerConfig::default() };
    for (kind, config) in [
        ("greedy", SamplerConfig { greedy: true, ..random.clone() }),
        ("top_k40_p95", SamplerConfig { top_k: 40, top_p: 0.95, ..random.clone() }),
        ("penalties_top_k40_p95", SamplerConfig { top_k: 40, top_p: 0.95, penalty, ..random.clone() }),
        ("top_p95", SamplerConfig { top_k: 0, top_p: 0.95, ..random.clone() }),
        ("all", SamplerConfig { top_k: 0, top_p: 1.0, ..random }),
    ] {
        let mut sampler = Sampler::new(config).expect("the config is one");
        group.bench_function(format!("sampler/{kind}/v{}", logits.len()), |bencher| {
            bencher.iter(|| sampler.sample(&logits, &prompt[..64]).expect("the logits are finite"));
        });
    }
    let tokenizer = model.tokenizer();
    let mut at = 0;
    group.bench_function("text", |bencher| {
        bencher.iter(|| {
            at = (at + 1) % prompt.len();
            black_box(tokenizer.decode(&prompt[at..=at]))
        });
    });
    group.finish();

    engine.rewind(0);
    engine.start_account();
    for _ in 0..64 {
        engine.rewind(0);
        engine.forward(&[42], Logits::Last, &never).expect("it fits");
    }
    print!("{}", operations_table(&engine.take_account()));
}

criterion_group!(benches, decode);
criterion_main!(benches);
