//! What comes before the first prompt, part by part, with files that the system has cached: the context binaries (mapped and
//! checked), the tokenizer, both side by side, and one more dialog over a model that is open.

use criterion::{Criterion, criterion_group, criterion_main};
use genie::Model;
use genie::engine::qnn::QnnModel;
use genie::tokenizer::Tokenizer;
use genie_workspace::bench_model::open;

fn load(criterion: &mut Criterion) {
    let (name, model) = open().expect("there is a model");
    let config = model.config();
    let mut group = criterion.benchmark_group("load");
    group.sample_size(10);
    group.bench_function(format!("contexts/{name}"), |bencher| {
        bencher.iter(|| QnnModel::open(&config.engine).expect("it opened before"));
    });
    group.bench_function(format!("tokenizer/{name}"), |bencher| {
        bencher.iter(|| Tokenizer::load(&config.tokenizer_path).expect("it opened before"));
    });
    group.bench_function(format!("model/{name}"), |bencher| {
        bencher.iter(|| Model::open(config.clone()).expect("it opened before"));
    });
    group.bench_function(format!("dialog/{name}"), |bencher| {
        bencher.iter(|| model.dialog().expect("it opened before"));
    });
    group.finish();
}

criterion_group!(benches, load);
criterion_main!(benches);
