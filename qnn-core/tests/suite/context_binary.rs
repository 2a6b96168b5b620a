//! The promises of a context binary: what was written is what is read, from one mapping, whatever number of graphs.

use std::path::Path;

use crate::support::{FORMS, Tiny, tiny};
use qnn_core::{
    Bytes, Context, ContextBuilder, DataType, Graph, GraphError, OpenOptions, Shape, Tensor, TensorData, TensorType,
    binary::{BinaryError, SdkVersion, Verify},
    record::{self, GraphRecord},
};

fn two_graphs() -> ContextBuilder {
    let prompt = tiny("prompt_ar8_cl32_1_of_1", Tiny { forms: &FORMS, ..Tiny::default() });
    let token = tiny("token_ar1_cl32_1_of_1", Tiny { forms: &FORMS, ar: 1, ..Tiny::default() });
    ContextBuilder::new().graph(prompt).graph(token).metadata("architecture", "tiny")
}

fn data<'a>(graph: &'a Graph, name: &str) -> &'a [u8] {
    match &graph.tensor(graph.find(name).expect("the tensor is there")).data {
        Some(TensorData::Flat(bytes)) => bytes,
        Some(TensorData::Panels(panels)) => panels.bytes(),
        None => &[],
    }
}

// Broken if a context changes by being written and read: a graph, an encoding, an order, a fact.
#[test]
fn write_read_write_is_byte_identical() {
    let first = two_graphs().to_binary().unwrap();
    let context = Context::from_binary(first.clone().into(), Verify::Checksums).unwrap();
    assert_eq!(context.to_binary().unwrap(), first);
    assert_eq!(context.graphs().collect::<Vec<_>>(), ["prompt_ar8_cl32_1_of_1", "token_ar1_cl32_1_of_1"]);
    assert_eq!(context.metadata()["architecture"], "tiny");
    assert_eq!(context.sdk_version(), SdkVersion::CURRENT);

    let original = tiny("prompt_ar8_cl32_1_of_1", Tiny { forms: &FORMS, ..Tiny::default() });
    let read = context.graph("prompt_ar8_cl32_1_of_1").unwrap();
    assert_eq!(GraphRecord::from_graph(read), GraphRecord::from_graph(&original));
    for (have, want) in read.tensors().iter().zip(original.tensors()) {
        let bytes = |t| record::parts(t).into_iter().map(|(part, b)| (part, b.to_vec())).collect::<Vec<_>>();
        assert_eq!(bytes(have), bytes(want), "{}", want.name);
    }
}

// Broken if a weight is stored or held twice because two graphs use it.
#[test]
fn graphs_share_the_bytes_of_their_constants() {
    let bytes = Bytes::from(two_graphs().to_binary().unwrap());
    let file = bytes.as_ptr_range();
    let context = Context::from_binary(bytes.clone(), Verify::Checksums).unwrap();
    let (prompt, token) =
        (context.graph("prompt_ar8_cl32_1_of_1").unwrap(), context.graph("token_ar1_cl32_1_of_1").unwrap());
    let mut n_constants = 0;
    for tensor in prompt.tensors().iter().filter(|t| t.tensor_type.is_static()) {
        let (a, b) = (data(prompt, &tensor.name), data(token, &tensor.name));
        assert_eq!(a.as_ptr(), b.as_ptr(), "{}", tensor.name);
        assert!(file.contains(&a.as_ptr()), "{} was copied", tensor.name);
        assert_eq!((a.as_ptr() as usize - file.start as usize) % 64, 0, "{} is not aligned", tensor.name);
        n_constants += 1;
    }
    let one = ContextBuilder::new().graph(tiny("a", Tiny { forms: &FORMS, ..Tiny::default() })).to_binary().unwrap();
    assert!(
        n_constants > 10 && bytes.len() < one.len() * 3 / 2,
        "{} bytes for two, {} for one",
        bytes.len(),
        one.len()
    );
}

// Broken if an adapter could be applied to a base with other weights: the identity must see every bit.
#[test]
fn identity_is_of_graphs_and_weights_alone() {
    let identity = |builder: &ContextBuilder| {
        Context::from_binary(builder.to_binary().unwrap().into(), Verify::Checksums).unwrap().identity()
    };
    let base = identity(&two_graphs());
    assert_eq!(base, identity(&two_graphs()));
    assert_eq!(base, identity(&two_graphs().metadata("made", "elsewhere")));
    assert_eq!(base.to_string().len(), 64);

    let original = tiny("g", Tiny::default());
    let base = identity(&ContextBuilder::new().graph(original.clone()));
    for tensor in original.tensors().iter().filter(|t| t.tensor_type.is_static()) {
        let changed = rebuild(&original, &tensor.name);
        assert_ne!(base, identity(&ContextBuilder::new().graph(changed)), "{}", tensor.name);
    }
    assert_ne!(base, identity(&ContextBuilder::new().graph(tiny("h", Tiny::default()))));
}

/// `graph` with the lowest bit of the last byte of constant `name` flipped.
fn rebuild(graph: &Graph, name: &str) -> Graph {
    let mut blob = |tensor: &record::TensorRecord, part| {
        let own = graph.tensor(graph.find(&tensor.name).expect("the record is of this graph"));
        let parts = record::parts(own);
        let mut bytes = parts.iter().find(|(p, _)| *p == part).expect("the part is listed").1.to_vec();
        if tensor.name == name {
            *bytes.last_mut().expect("a constant has bytes") ^= 1;
        }
        Ok::<Bytes, record::RecordError>(bytes.into())
    };
    GraphRecord::from_graph(graph).into_graph(&mut blob).unwrap()
}

// Broken if `open` ignores its options, or a file differs from the bytes in memory.
#[test]
fn files_open_mapped_and_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bin");
    let written = two_graphs().write(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), two_graphs().to_binary().unwrap());
    assert_eq!(written.size_bytes, std::fs::metadata(&path).unwrap().len());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file stayed behind");
    for use_mmap in [true, false] {
        for verify in [Verify::Checksums, Verify::Headers] {
            let context = Context::open(&path, &OpenOptions { use_mmap, verify }).unwrap();
            assert_eq!((context.identity(), context.graphs().len()), (written.identity, 2));
        }
    }
    let context = std::sync::Arc::new(Context::open(&path, &OpenOptions::default()).unwrap());
    let other = std::sync::Arc::clone(&context);
    let in_thread = std::thread::spawn(move || other.graph("token_ar1_cl32_1_of_1").unwrap().nodes().len());
    assert_eq!(in_thread.join().unwrap(), context.graph("prompt_ar8_cl32_1_of_1").unwrap().nodes().len());
}

// Broken if a graph that waits for an adapter's values cannot be stored, or a constant can lose its value silently.
#[test]
fn updateable_tensors_may_have_no_value_and_others_must() {
    let stored = |tensor_type| {
        let mut graph = tiny("g", Tiny::default());
        let (data_type, shape) = (DataType::Float32, Shape::fixed(&[8, crate::support::HIDDEN]));
        let name = "lora_A.weight".to_owned();
        graph.add_tensor(Tensor { name, tensor_type, data_type, shape, encoding: None, data: None })?;
        Ok::<_, GraphError>(ContextBuilder::new().graph(graph).to_binary().unwrap())
    };
    let file = stored(TensorType::UpdateableStatic).unwrap();
    let context = Context::from_binary(file.clone().into(), Verify::Checksums).unwrap();
    let graph = context.graph("g").unwrap();
    assert!(graph.tensor(graph.find("lora_A.weight").unwrap()).data.is_none());
    assert_eq!(context.to_binary().unwrap(), file);
    assert_eq!(context.info().graphs[0].updateable_tensors, ["lora_A.weight"]);
    assert!(stored(TensorType::Static).is_err());
}

// Broken if an existing file is lost or half replaced when writing fails.
#[test]
fn a_failed_write_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bin");
    std::fs::write(&path, b"old").unwrap();
    let clash =
        ContextBuilder::new().graph(tiny("a", Tiny::default())).graph(tiny("b", Tiny { seed: 2, ..Tiny::default() }));
    let error = crate::support::chain(&clash.write(&path).unwrap_err());
    assert!(error.contains("model.bin") && error.contains("graphs a and b have different constants"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file stayed behind");
    let nowhere = two_graphs().write(Path::new("/no/such/folder/model.bin")).unwrap_err();
    assert!(crate::support::chain(&nowhere).starts_with("/no/such/folder/model.bin"), "{nowhere}");
}

// Broken if a builder makes a file that no reader takes.
#[test]
fn impossible_contexts_are_refused() {
    let none = ContextBuilder::new().to_binary().unwrap_err();
    assert!(matches!(none, BinaryError::GraphCount { have: 0 }), "{none}");
    let twice = ContextBuilder::new().graph(tiny("a", Tiny::default())).graph(tiny("a", Tiny::default()));
    let twice = twice.to_binary().unwrap_err();
    assert!(matches!(twice, BinaryError::Duplicate { .. }), "{twice}");
    let long = "x".repeat(2000);
    let long = ContextBuilder::new().graph(tiny(&long, Tiny::default())).to_binary().unwrap_err();
    assert!(matches!(long, BinaryError::Entry { field: "name_bytes", have: 2000, .. }), "{long}");
}

// Broken if the utility's answer does not describe the file.
#[test]
fn info_describes_the_file() {
    let bytes = two_graphs().to_binary().unwrap();
    let context = Context::from_binary(bytes.clone().into(), Verify::Headers).unwrap();
    let info = context.info();
    assert_eq!((info.size_bytes, info.graphs.len()), (bytes.len() as u64, 2));
    assert_eq!(info.identity, context.identity().to_string());
    let names = |tensors: &[record::TensorRecord]| tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
    let graph = &info.graphs[1];
    assert_eq!(names(&graph.inputs), ["input_ids", "position_ids", "cache_index", "logit_indices"]);
    assert_eq!(names(&graph.outputs), ["logits"]);
    assert_eq!(graph.states.len(), 4);
    assert_eq!(graph.operations["FullyConnected"], 15);
    assert!(info.constants.iter().all(|c| c.n_graphs == 2));
    let embedding = info.constants.iter().find(|c| c.tensor.name == "model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.size_bytes, (crate::support::VOCAB * crate::support::HIDDEN * 4) as u64);
    let json = serde_json::to_value(&info).unwrap();
    assert_eq!(json["graphs"][0]["inputs"][0]["dims"][0]["max"], 8);
}

// Broken if a file that an earlier release wrote cannot be read any more. The file is of format version 1 and is never
// made again.
#[test]
fn version_1_still_reads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/context_v1.bin");
    let context = Context::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(context.graphs().collect::<Vec<_>>(), ["prompt_ar8_cl32_1_of_1", "token_ar1_cl32_1_of_1"]);
    assert_eq!(context.identity().to_string(), "27b9914b5f7224c07de4e15d284770b659c94a016e956f3c939b7e116c5fedfb");
    let token = context.graph("token_ar1_cl32_1_of_1").unwrap();
    assert_eq!((token.states().len(), token.nodes().len()), (2, 22));
    let panels = token.tensors().iter().filter(|t| matches!(t.data, Some(TensorData::Panels(_))));
    assert_eq!(panels.count(), 8);
}
