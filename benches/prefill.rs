//! A prompt: its tokens per second are the elements, and twice its products per second the operations of the table at the
//! end, to be read against the multipliers' peak.

use std::hint::black_box;
use std::sync::atomic::AtomicBool;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use genie::engine::{Engine, Logits};
use genie::profile::operations_table;
use genie_workspace::bench_model::{ids, open};

fn prefill(criterion: &mut Criterion) {
    let (name, model) = open().expect("there is a model");
    let mut engine = model.engine().expect("the model opened");
    let place = format!("{name}/{}/t{}", engine.kernels(), engine.n_threads());
    let never = AtomicBool::new(false);
    let prompt = ids(512, engine.n_vocab());
    let mut group = criterion.benchmark_group("prefill");
    group.sample_size(10);
    for n in [16, 128, 512] {
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(format!("p{n}/{place}"), |bencher| {
            bencher.iter(|| {
                engine.rewind(0);
                black_box(engine.forward(&prompt[..n], Logits::Last, &never).expect("it fits")[0])
            });
        });
    }
    group.finish();
    engine.rewind(0);
    engine.start_account();
    engine.forward(&prompt, Logits::Last, &never).expect("it fits");
    print!("{}", operations_table(&engine.take_account()));
}

criterion_group!(benches, prefill);
criterion_main!(benches);
