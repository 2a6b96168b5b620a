//! The promise that AIMET's files mean here what they mean there: files that aimet-onnx wrote (`aimet/make.py`) make a graph
//! compute what aimet-onnx's simulation computed, in every version; files for other models are refused by name.

use std::sync::atomic::AtomicBool;

use qnn_core::{
    Backend, Bindings, BlockOffsets, DataType, Dim, Encoding, Floats, Graph, OpKind, Shape, Tensor, TensorData,
    TensorId, TensorType,
    backend::{HtpBackend, ReferenceBackend, reference::dequantize_constant},
    offline::encodings::{EncodingsError, EncodingsFile, FileVersion, dump, override_encodings},
};
use serde_json::Value;

const FILES: [(FileVersion, &[u8]); 3] = [
    (FileVersion::V0_6_1, include_bytes!("../aimet/aimet_0.6.1.encodings")),
    (FileVersion::V1_0_0, include_bytes!("../aimet/aimet_1.0.0.encodings")),
    (FileVersion::V2_0_0, include_bytes!("../aimet/aimet_2.0.0.encodings")),
];

fn floats(tiny: &Value, key: &str) -> Vec<f32> {
    tiny[key].as_array().expect("a list").iter().map(|v| v.as_f64().expect("numbers") as f32).collect()
}

fn tiny() -> Value {
    serde_json::from_slice(include_bytes!("../aimet/tiny.json")).expect("it is JSON")
}

/// The model of `make.py`, in floats.
fn graph() -> Graph {
    let (tiny, mut graph) = (tiny(), Graph::new("tiny"));
    let input = Tensor {
        name: "x".to_owned(),
        tensor_type: TensorType::AppWrite,
        data_type: DataType::Float32,
        shape: Shape(vec![Dim::UpTo { max: 4, by: TensorId(0) }, Dim::Fixed(32)]),
        encoding: None,
        data: None,
    };
    let mut x = graph.add_tensor(input).expect("an input");
    for (name, n, k) in [("first", 16, 32), ("second", 32, 16)] {
        let name_of = format!("{name}.weight");
        let bytes: Vec<u8> = floats(&tiny, &name_of).iter().flat_map(|v| v.to_le_bytes()).collect();
        let weight = Tensor {
            name: name_of,
            tensor_type: TensorType::Static,
            data_type: DataType::Float32,
            shape: Shape::fixed(&[n, k]),
            encoding: None,
            data: Some(TensorData::Flat(bytes.into())),
        };
        let weight = graph.add_tensor(weight).expect("a weight");
        x = graph.op(name, OpKind::FullyConnected, &[x, weight], DataType::Float32).expect("it fits")[0];
        if name == "first" {
            x = graph.op("sigmoid", OpKind::Sigmoid, &[x], DataType::Float32).expect("it fits")[0];
        }
    }
    graph.mark_output(x);
    graph
}

fn run(backend: &dyn Backend, graph: &Graph) -> Vec<f32> {
    let mut executable = backend.prepare(graph).expect("it can run");
    let mut state = backend.new_state(&[graph], 1).expect("no caches");
    let mut bindings = Bindings::new(graph);
    bindings.set_f32(0, &floats(&tiny(), "x")).expect("it fits");
    executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).expect("it runs");
    bindings.output_f32(0).to_vec()
}

// Broken if a sign, an origin of offsets, a rounding or a width is read otherwise than AIMET means it: the result is then
// off by many steps of its encoding. A sum whose last rounding went the other way is one step off, of the hidden tensor
// too, so two steps are allowed.
#[test]
fn files_of_aimet_give_its_results() {
    let want = floats(&tiny(), "second");
    for (version, json) in FILES {
        let file = EncodingsFile::parse(json).expect("AIMET wrote it");
        assert_eq!(file.version, version);
        let (graph, report) = override_encodings(&graph(), &file).expect("it is for this model");
        assert_eq!((report.weights.len(), report.activations.len()), (2, 4), "{report:?}");
        assert_eq!((&report.unknown[..], &report.passed_over[..]), (&[][..], &[][..]));
        let output = graph.tensor(graph.find("second").expect("it is there"));
        let Some(Encoding::ScaleOffset { bitwidth: 16, scale, .. }) = output.encoding else {
            panic!("{version:?}: {:?}", output.encoding)
        };
        for backend in [&ReferenceBackend as &dyn Backend, &HtpBackend::new(2).expect("two threads")] {
            for (i, (have, want)) in run(backend, &graph).iter().zip(&want).enumerate() {
                assert!((have - want).abs() <= 2.01 * scale, "{version:?}, value {i}: {have}, AIMET has {want}");
            }
        }
        // What we write of it means the same.
        let (again, left_out) = dump(&graph, version);
        assert!(left_out.is_empty());
        let json = again.to_json().to_string();
        let (same, _) = override_encodings(&graph, &EncodingsFile::parse(json.as_bytes()).expect("our own file"))
            .expect("it is for this model");
        assert_eq!(run(&ReferenceBackend, &same), run(&ReferenceBackend, &graph), "{version:?}");
    }
}

// Broken if a weight of five or six bits, as GGUF files have them, changes on its way through a file, or if its blocks are
// written to one that cannot say them.
#[test]
fn odd_widths_come_back() {
    let of_blocks = |weights: [(&str, u8, usize); 2]| {
        let mut odd = graph();
        for (name, bitwidth, block_size) in weights {
            let (id, least) = (odd.find(name).expect("it is there"), -(1 << (bitwidth - 1)));
            let codes: Vec<u8> = (0..16 * 32).map(|i| (least + i * 7 % (1 << bitwidth)) as u8).collect();
            let scales = (0..16 * 32 / block_size).map(|i| 0.5 + i as f32 / 64.0).collect::<Vec<f32>>();
            let (scales, offsets) = (Floats::from_f16(&scales), BlockOffsets::Symmetric);
            let encoding = Encoding::Block { bitwidth, block_size, scales, offsets };
            odd.replace_constant(id, DataType::SFixedPoint8, Some(encoding), TensorData::Flat(codes.into()))
                .expect("it fits");
        }
        odd
    };
    // The second has one block in a row, and so a scale per channel.
    let (oldest, left_out) = dump(&of_blocks([("first.weight", 5, 16), ("second.weight", 6, 16)]), FileVersion::V0_6_1);
    assert!(left_out == ["first.weight"] && oldest.find("second.weight").is_some(), "{left_out:?}");
    assert!(oldest.find("first.weight").is_none());
    let odd = of_blocks([("first.weight", 5, 32), ("second.weight", 6, 16)]);
    for version in [FileVersion::V1_0_0, FileVersion::V2_0_0] {
        let json = dump(&odd, version).0.to_json().to_string();
        let file = EncodingsFile::parse(json.as_bytes()).expect("our own file");
        let (again, report) = override_encodings(&odd, &file).expect("it is for this model");
        assert_eq!(report.weights.len(), 2);
        for (have, want) in again.tensors().iter().zip(odd.tensors()).filter(|(_, want)| want.data.is_some()) {
            let (Some(TensorData::Flat(have_codes)), Some(TensorData::Flat(codes))) = (&have.data, &want.data) else {
                panic!("{}: no codes", want.name)
            };
            assert_eq!(have_codes[..], codes[..], "{}", want.name);
            assert_eq!(format!("{:?}", have.encoding), format!("{:?}", want.encoding));
            assert_eq!(dequantize_constant(have), dequantize_constant(want));
        }
    }
}

// Broken if an encoding that does not fit is applied or lost without a word.
#[test]
fn misfits_are_listed_by_name() {
    let parse = |json: Value| EncodingsFile::parse(json.to_string().as_bytes()).expect("well formed");
    let entry = |name: &str, kind: &str, scale: Value| serde_json::json!({"name": name, "output_dtype": kind, "y_scale": scale});
    let other = parse(serde_json::json!({"encodings": [entry("conv1.weight", "int8", 0.1.into())]}));
    let error = override_encodings(&graph(), &other).expect_err("another model's");
    assert!(matches!(error, EncodingsError::OtherModel { have: 1, .. }), "{error}");
    assert!(error.to_string().contains("conv1.weight") && error.to_string().contains("first.weight"), "{error}");

    let bad = [
        entry("first.weight", "int8", vec![0.1; 15].into()),
        entry("second.weight", "int6", 0.1.into()),
        entry("first", "uint32", 0.1.into()),
        entry("sigmoid", "uint8", vec![0.1, 0.2].into()),
    ];
    let error = override_encodings(&graph(), &parse(serde_json::json!({"encodings": bad}))).expect_err("none fits");
    let text = error.to_string();
    for part in
        ["4 tensors", "first.weight: 15 scales, need 16", "second.weight: 6 bits", "first: 32 bits", "sigmoid: "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let mixed = [entry("first.weight", "int8", 0.1.into()), entry("/model/Pow_output_0", "uint16", 0.1.into())];
    let (_, report) = override_encodings(&graph(), &parse(serde_json::json!({"encodings": mixed}))).expect("one fits");
    assert_eq!(report.unknown, ["/model/Pow_output_0"]);
    // A range that starts above zero cannot hold the zeros of padding.
    let above = serde_json::json!({"name": "first", "output_dtype": "uint8", "y_scale": 0.1, "y_zero_point": -5});
    let error = override_encodings(&graph(), &parse(serde_json::json!({"encodings": [above]}))).expect_err("no zero");
    assert!(error.to_string().contains("so that zero is a code"), "{error}");
}
