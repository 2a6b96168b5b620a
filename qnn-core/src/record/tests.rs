use htp_sim::{BlockOffset, WeightFormat};

use super::*;
use crate::op::{AttentionAttrs, OpKind};

/// A graph that uses every operation, every kind of extent and every encoding.
fn everything() -> Graph {
    let mut graph = Graph::new("everything");
    graph.set_metadata("architecture", "llama");
    let mut add = |name: &str, tensor_type, data_type, shape, encoding, data: Option<TensorData>| {
        graph.add_tensor(Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding, data }).unwrap()
    };
    let flat = |len: usize| Some(TensorData::Flat((0..len as u8).collect::<Vec<u8>>().into()));
    let (input, state, constant) = (TensorType::AppWrite, TensorType::AppReadWrite, TensorType::Static);
    let rows = |width: usize| Shape(vec![Dim::UpTo { max: 5, by: TensorId(0) }, Dim::Fixed(width)]);
    let row_ids = Shape(vec![Dim::UpTo { max: 5, by: TensorId(0) }]);
    let ids = add("ids", input, DataType::Int32, row_ids.clone(), None, None);
    let at = add("at", input, DataType::Int32, Shape::fixed(&[1]), None, None);
    let block = |offsets| Encoding::Block { bitwidth: 4, block_size: 4, scales: Floats::from_f16(&[0.5; 16]), offsets };
    let mins = block(BlockOffsets::Min(Floats::from_f16(&[-1.0; 16])));
    let table = add("table", constant, DataType::UFixedPoint4, Shape::fixed(&[8, 8]), Some(mins), flat(32));
    let whole = block(BlockOffsets::Integer(vec![0xf8; 16].into()));
    let w1 = add("w1", constant, DataType::UFixedPoint4, Shape::fixed(&[8, 8]), Some(whole), flat(32));
    let symmetric = block(BlockOffsets::Symmetric);
    let w2 = add("w2", constant, DataType::SFixedPoint4, Shape::fixed(&[8, 8]), Some(symmetric), flat(32));
    let axis = Encoding::AxisScaleOffset {
        bitwidth: 8,
        axis: 0,
        scales: Floats::from_f32(&[0.1; 8]),
        offsets: (-4..4).collect(),
    };
    let w3 = add("w3", constant, DataType::SFixedPoint8, Shape::fixed(&[8, 8]), Some(axis), flat(64));
    let norm = add("norm", TensorType::UpdateableStatic, DataType::Float32, Shape::fixed(&[8]), None, None);
    let freq = add("freq", constant, DataType::Float32, Shape::fixed(&[2]), None, flat(8));
    let layout = PackedLayout::new(8, 8, WeightFormat::Int4Block { block: 8, offset: BlockOffset::Min }).unwrap();
    let panels = Panels::new(layout, vec![0; layout.size_bytes()].into()).unwrap();
    let w4 = Some(TensorData::Panels(panels));
    let w4 = add("w4", constant, DataType::UFixedPoint4, Shape::fixed(&[8, 8]), None, w4);
    let cache = Some(Encoding::ScaleOffset { bitwidth: 8, scale: 0.1, offset: -3 });
    let past_k = add("past_k", state, DataType::SFixedPoint8, Shape::fixed(&[2, 16, 4]), cache, None);
    let past_v = add("past_v", state, DataType::Float32, Shape::fixed(&[2, 16, 4]), None, None);
    let out = add("out", TensorType::AppRead, DataType::Float32, rows(8), None, None);

    let float = DataType::Float32;
    let mut op = |name: &str, op, inputs: &[TensorId]| graph.op(name, op, inputs, float).unwrap();
    let x = op("embed", OpKind::Gather, &[table, ids])[0];
    let cos_sin = op("rope", OpKind::RotaryTable { scale: 0.1 }, &[ids, freq]);
    let q = op("q", OpKind::FullyConnected, &[x, w1])[0];
    let q = op("q_rotated", OpKind::RotaryEmbedding { head_dim: 4 }, &[q, cos_sin[0], cos_sin[1]])[0];
    let attrs = AttentionAttrs { heads: 2, kv_heads: 2, head_dim: 4, scale: 0.3, window: Some(7), softcap: Some(50.1) };
    let attention = op("attention", OpKind::Attention(attrs), &[q, q, q, past_k, past_v, at])[0];
    let norm_out = op("normed", OpKind::RmsNorm { epsilon: 1e-5 }, &[attention, norm])[0];
    let a = op("a", OpKind::FullyConnected, &[norm_out, w2])[0];
    let b = op("b", OpKind::FullyConnected, &[norm_out, w3])[0];
    let a = op("sigmoid", OpKind::Sigmoid, &[a])[0];
    let b = op("gelu", OpKind::Gelu, &[b])[0];
    let b = op("cap", OpKind::SoftCap { cap: 30.0 }, &[b])[0];
    let ab = op("ab", OpKind::ElementWiseMultiply, &[a, b])[0];
    let sum = op("sum", OpKind::ElementWiseAdd, &[ab, x])[0];
    let last = Node { name: "last".to_owned(), op: OpKind::FullyConnected, inputs: vec![sum, w4], outputs: vec![out] };
    graph.add_node(last).unwrap();
    graph
}

fn blobs(graph: &Graph) -> BTreeMap<(String, Part), Bytes> {
    let of = |t: &Tensor| parts(t).into_iter().map(|(part, bytes)| ((t.name.clone(), part), bytes)).collect::<Vec<_>>();
    graph.tensors().iter().flat_map(of).collect()
}

fn rebuild(record: GraphRecord, blobs: &BTreeMap<(String, Part), Bytes>) -> Result<Graph, RecordError> {
    record.into_graph(&mut |tensor, part| {
        blobs.get(&(tensor.name.clone(), part)).cloned().ok_or_else(|| RecordError::Blob {
            tensor: tensor.name.clone(),
            part,
            have: "nothing".to_owned(),
            want: "a blob".to_owned(),
        })
    })
}

/// Guards: a graph survives its JSON unchanged, blobs, extents, encodings and attributes included.
#[test]
fn json_and_back_is_the_same_graph() {
    let graph = everything();
    let json = GraphRecord::from_graph(&graph).to_json().unwrap();
    let again = rebuild(GraphRecord::from_json(json.as_bytes()).unwrap(), &blobs(&graph)).unwrap();
    assert_eq!(GraphRecord::from_graph(&again).to_json().unwrap(), json);
    assert_eq!(again.nodes(), graph.nodes());
    let bytes = |graph: &Graph| blobs(graph).into_iter().map(|(key, b)| (key, b.to_vec())).collect::<Vec<_>>();
    assert_eq!(bytes(&again), bytes(&graph));
    for (a, b) in again.tensors().iter().zip(graph.tensors()) {
        assert_eq!(a.shape, b.shape, "{}", a.name);
    }
}

/// Guards: what a record lists as its parts is what its tensor has, so that a writer and a reader agree.
#[test]
fn parts_of_record_and_tensor_agree() {
    let graph = everything();
    for tensor in graph.tensors() {
        let of_tensor: Vec<Part> = parts(tensor).into_iter().map(|(part, _)| part).collect();
        assert_eq!(TensorRecord::from_tensor(tensor, &graph).parts(), of_tensor, "{}", tensor.name);
    }
}

/// Guards: whatever is unknown or does not fit is refused by name, never skipped.
#[test]
fn strange_records_are_refused() {
    let graph = everything();
    let blobs = blobs(&graph);
    let json = GraphRecord::from_graph(&graph).to_json().unwrap();
    let check = |from: &str, to: &str, message: &str| {
        assert!(json.contains(from), "{from} is not in {json}");
        let read = GraphRecord::from_json(json.replacen(from, to, 1).as_bytes()).and_then(|r| rebuild(r, &blobs));
        let error = read.expect_err(from);
        let text = format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(text.contains(message), "{text} does not say {message}");
    };
    check(r#""op":"Sigmoid""#, r#""op":"Swish""#, "Swish");
    check(r#""epsilon""#, r#""eps""#, "eps");
    check(r#""dims":[1]"#, r#""dims":[1],"colour":3"#, "colour");
    check(r#""name":"everything""#, r#""name":"everything","extra":{}"#, "extra");
    check("INT_32", "INT_33", "INT_33");
    check("APP_WRITE", "APP_READ_TWICE", "APP_READ_TWICE");
    check(r#""by":"ids""#, r#""by":"who""#, "who");
    check(r#"["sum","w4"]"#, r#"["nobody","w4"]"#, "nobody");
    check(r#""block_size":4"#, r#""block_size":3"#, "blocks of 3");
    check(r#""block_size":4"#, r#""block_size":0"#, "blocks of 0");
    check(r#""dims":[8,8]"#, r#""dims":[8,18446744073709551615]"#, "table");
    check(r#""dims":[8,8]"#, r#""dims":[8,-1]"#, "DimRecord");
    check(r#""block":8"#, r#""block":7"#, "w4");
    check("SYMMETRIC", "INTEGER", "w2.offsets");
}
