//! What it costs to change the adapter, on a base and on one ten times larger: the swap itself, and what comes before it
//! once per adapter (check and load), against reading the same bytes.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qnn_core::{
    Adapter, Bytes, Context, ContextBuilder, DataType, Dim, Encoding, Floats, Graph, OpKind, OpenOptions, Shape,
    Tensor, TensorData, TensorId, TensorType,
    adapter::{Description, Slot},
    binary::Verify,
    offline::lora::values::{Matrix, constant, panels},
};

/// Layers with a branch, as SmolLM2-135M has them, and their width.
const TARGETS: usize = 210;
const WIDTH: usize = 288;
const RANK: usize = 16;

/// A base of `TARGETS` int8 layers with branches, and enough further weights to make it `times` as large.
fn base(times: usize) -> Graph {
    let mut graph = Graph::new("token");
    let add =
        |graph: &mut Graph, name: &str, tensor_type, data_type, shape: Shape, constant: Option<(usize, usize)>| {
            let scales = |n| Floats::from_f32(&vec![0.01; n]);
            let axis = |n| Encoding::AxisScaleOffset { bitwidth: 8, axis: 0, scales: scales(n), offsets: Vec::new() };
            let data = constant.map(|(n, k)| TensorData::Flat(Bytes::from(vec![0; n * k])));
            let encoding = constant.map(|(n, _)| axis(n));
            let tensor = Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding, data };
            graph.add_tensor(tensor).expect("the base is well formed")
        };
    let (float, int8) = (DataType::Float32, DataType::SFixedPoint8);
    let rows = Dim::UpTo { max: 1, by: TensorId(0) };
    let shape = Shape(vec![rows, Dim::Fixed(WIDTH)]);
    let mut x = add(&mut graph, "x", TensorType::AppWrite, float, shape, None);
    let alpha = add(&mut graph, "lora_alpha", TensorType::AppWrite, float, Shape::fixed(&[RANK]), None);
    let op = |graph: &mut Graph, name: String, op, inputs: &[TensorId]| {
        graph.op(&name, op, inputs, float).expect("the base is well formed")[0]
    };
    for i in 0..TARGETS * times {
        let name = format!("model.layers.{}.linear{}", i / 7, i % 7);
        let weight = format!("{name}.weight");
        let shape = Shape::fixed(&[WIDTH, WIDTH]);
        let weight = add(&mut graph, &weight, TensorType::Static, int8, shape, Some((WIDTH, WIDTH)));
        let mut y = op(&mut graph, name.clone(), OpKind::FullyConnected, &[x, weight]);
        if i < TARGETS {
            let [a, b] = [("lora_A", [RANK, WIDTH]), ("lora_B", [WIDTH, RANK])].map(|(half, dims)| {
                let name = format!("base_model.model.{name}.{half}.weight");
                add(&mut graph, &name, TensorType::UpdateableStatic, int8, Shape::fixed(&dims), None)
            });
            let down = op(&mut graph, format!("{name}.lora_A"), OpKind::FullyConnected, &[x, a]);
            let scaled = op(&mut graph, format!("{name}.lora_scale"), OpKind::ElementWiseMultiply, &[down, alpha]);
            let up = op(&mut graph, format!("{name}.lora_B"), OpKind::FullyConnected, &[scaled, b]);
            y = op(&mut graph, format!("{name}.lora_add"), OpKind::ElementWiseAdd, &[y, up]);
        }
        x = y;
    }
    graph.mark_output(x);
    graph
}

/// The section of an adapter with every target.
fn section(context: &Context, name: &str) -> Vec<u8> {
    let mut values = Vec::new();
    for tensor in context.updatable().iter() {
        let (n, k) = if tensor.contains("lora_A") { (RANK, WIDTH) } else { (WIDTH, RANK) };
        let floats: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let matrix = Matrix { name: tensor.clone(), n, k, values: &floats };
        let quantized = constant(&matrix, DataType::SFixedPoint8, None).expect("the values are finite");
        values.push((tensor.clone(), panels(&quantized).expect("it was quantized just now")));
    }
    let slot = Slot { name: name.to_owned(), columns: 0..RANK, scaling: Some(2.0) };
    let description = Description { rank: RANK, slots: vec![slot], ..Description::default() };
    let adapter = Adapter::new(name, context.updatable().clone(), values).expect("names of the context");
    context.section(&adapter.described(description)).expect("it fits")
}

fn map(path: &Path) -> Bytes {
    Bytes::map_file(path).expect("the file was just written")
}

fn swap(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let mut group = criterion.benchmark_group("adapter_swap");
    for times in [1, 10] {
        let path = folder.path().join(format!("base{times}.bin"));
        ContextBuilder::new().graph(base(times)).write(&path).expect("there is room for the base");
        let context =
            Context::open(&path, &OpenOptions { use_mmap: true, verify: Verify::Headers }).expect("just written");
        let paths = ["one", "two"].map(|name| {
            let path = folder.path().join(format!("{name}{times}.bin"));
            std::fs::write(&path, section(&context, name)).expect("there is room for sections");
            path
        });
        let bytes = paths.each_ref().map(|path| map(path));
        let loaded: [Arc<Adapter>; 2] = bytes.clone().map(|bytes| context.load_section(bytes).expect("it fits"));
        let id = format!("base_{}mb", context.size_bytes() / 1_000_000);
        let mut turn = 0;
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("mapped/{id}"), |bencher| {
            bencher.iter(|| {
                turn ^= 1;
                context.apply(None, &loaded[turn]).expect("it fits");
                black_box(context.adapter("token"))
            })
        });
        group.throughput(Throughput::Bytes(bytes[0].len() as u64));
        group.bench_function(format!("load/{id}"), |bencher| {
            bencher.iter(|| context.load_section(bytes[0].clone()).expect("it fits"))
        });
        group.bench_function(format!("file/{id}"), |bencher| {
            bencher.iter(|| context.apply_section(None, map(&paths[0])).expect("it fits"))
        });
        group.bench_function(format!("read/{id}"), |bencher| {
            bencher.iter(|| std::fs::read(&paths[0]).expect("the file is there"))
        });
    }
    group.finish();
}

criterion_group!(benches, swap);
criterion_main!(benches);
