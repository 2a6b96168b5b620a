//! The tutorial's call flow, step by step, with QNN's state errors.

use crate::support::{FORMS, Form, Rng, Tiny, random_weight, tiny};
use qnn_core::{
    Context, ContextBuilder, ContextEditor, DataType, Shape, StateError, Tensor, TensorData, TensorType, binary::Verify,
};

fn model() -> Tiny {
    Tiny { forms: &FORMS, branch: Some((4, DataType::SFixedPoint8)), ..Tiny::default() }
}

fn editor() -> ContextEditor {
    let mut editor = ContextEditor::new();
    editor.set_metadata("architecture", "tiny").unwrap();
    editor.add_graph(tiny("prompt", model())).unwrap();
    editor.add_graph(tiny("token", Tiny { ar: 1, ..model() })).unwrap();
    editor
}

/// Both halves of one layer's branch, of rank `rank`.
fn pair(module: &str, dims: [usize; 2], rank: usize, seed: u64) -> [Tensor; 2] {
    let mut rng = Rng(seed);
    [("lora_A", [rank, dims[1]]), ("lora_B", [dims[0], rank])].map(|(half, [n, k])| {
        let (data_type, encoding, bytes) = random_weight(&mut rng, n, k, Form::Int8Channel);
        Tensor {
            name: format!("base_model.model.{module}.{half}.weight"),
            tensor_type: TensorType::UpdateableStatic,
            data_type,
            shape: Shape::fixed(&[n, k]),
            encoding,
            data: Some(TensorData::Flat(bytes.into())),
        }
    })
}

fn q_proj(rank: usize, seed: u64) -> [Tensor; 2] {
    pair("model.layers.0.self_attn.q_proj", [32, 32], rank, seed)
}

// Broken if the tutorial cannot be followed: create, finalize, binary, then update, finalize, size, section, again and
// again; from graphs and from a binary alike.
#[test]
fn the_tutorial_works_from_graphs_and_from_a_binary() {
    let mut from_graphs = editor();
    from_graphs.finalize().unwrap();
    let binary = from_graphs.binary().unwrap();
    let want = ContextBuilder::new().graph(tiny("prompt", model())).graph(tiny("token", Tiny { ar: 1, ..model() }));
    assert_eq!(binary, want.metadata("architecture", "tiny").to_binary().unwrap());
    let from_binary = ContextEditor::from_binary(binary.clone().into()).unwrap();
    let context = Context::from_binary(binary.clone().into(), Verify::Checksums).unwrap();

    let mut sections = Vec::new();
    for mut editor in [from_graphs, from_binary] {
        let empty = context.load_section(editor.section(None, "default_adapter").unwrap().into()).unwrap();
        assert_eq!((empty.n_tensors(), empty.rank()), (0, 0));
        for (name, rank) in [("first", 3), ("second", 2)] {
            editor.update_context_tensors(&q_proj(rank, rank as u64)).unwrap();
            editor.finalize().unwrap();
            let section = editor.section(None, name).unwrap();
            assert_eq!(editor.section_size(None, name).unwrap(), section.len() as u64);
            let loaded = context.load_section(section.clone().into()).unwrap();
            assert_eq!((loaded.name(), loaded.rank(), loaded.n_tensors()), (name, rank, 2));
            assert_eq!(editor.binary().unwrap(), binary, "the base does not depend on adapters");
            sections.push(section);
        }
        // Without data a tensor is zeros again.
        let zeros = q_proj(2, 1).map(|tensor| Tensor { data: None, ..tensor });
        editor.update_context_tensors(&zeros).unwrap();
        editor.finalize().unwrap();
        let empty = context.load_section(editor.section(None, "empty").unwrap().into()).unwrap();
        assert_eq!(empty.n_tensors(), 0);
    }
    assert_eq!(sections[..2], sections[2..], "both ways give the same sections");
}

// Broken if one graph's update reaches another graph's section, or is lost in that of the whole context.
#[test]
fn graph_tensors_are_for_their_graph_only() {
    let mut editor = editor();
    editor.update_context_tensors(&q_proj(2, 1)).unwrap();
    editor.update_graph_tensors("token", &q_proj(4, 2)).unwrap();
    editor.finalize().unwrap();
    let context = Context::from_binary(editor.binary().unwrap().into(), Verify::Checksums).unwrap();
    let load = |graph| context.load_section(editor.section(Some(graph), "x").unwrap().into()).unwrap();
    assert_eq!((load("prompt").rank(), load("prompt").graph()), (2, Some("prompt")));
    assert_eq!((load("token").rank(), load("token").graph()), (4, Some("token")));
    assert!(matches!(editor.section(None, "x"), Err(StateError::PerGraph { graph }) if graph == "token"));
}

// Broken if a call in the wrong state does something, or its error has not QNN's number.
#[test]
fn calls_in_the_wrong_state_have_their_code() {
    let code = |error: StateError| error.code().number;
    let mut editor = editor();
    assert_eq!(code(editor.binary().unwrap_err()), 5003);
    assert_eq!(code(editor.section_size(None, "x").unwrap_err()), 5003);
    editor.finalize().unwrap();
    let before = editor.section(None, "x").unwrap();

    // An update shows only after the next finalize; until then there is no section.
    editor.update_context_tensors(&q_proj(2, 1)).unwrap();
    let error = editor.section(None, "x").unwrap_err();
    assert!(matches!(error, StateError::NotFinalized { .. }), "{error}");
    assert_eq!(error.code().name, "QNN_CONTEXT_ERROR_NOT_FINALIZED");
    editor.finalize().unwrap();
    let after = editor.section(None, "x").unwrap();
    assert_ne!(after, before);

    let [a, b] = q_proj(2, 9);
    let named = |name: &str| Tensor { name: name.to_owned(), ..a.clone() };
    let cases = [
        (named("model.norm.weight"), 7007, "is STATIC, which no update may change"),
        (named("logits"), 7007, "is APP_READ, which no update may change"),
        (named("no such tensor"), 7002, "is not in the context"),
        (Tensor { tensor_type: TensorType::Static, ..a.clone() }, 7007, "STATIC, need UPDATEABLE_STATIC"),
        (q_proj(5, 1)[0].clone(), 7007, "rank 5, the graph has room for 4"),
        (pair("model.layers.0.self_attn.q_proj", [32, 16], 2, 1)[0].clone(), 7007, "extents [2, 16], need [4, 32]"),
    ];
    for (tensor, number, want) in cases {
        let error = editor.update_context_tensors(&[b.clone(), tensor]).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
        assert_eq!(code(error), number, "{want}");
    }
    assert_eq!(code(editor.update_graph_tensors("no", &q_proj(1, 1)).unwrap_err()), 5000);
    assert_eq!(editor.section(None, "x").unwrap(), after, "a refused update changes nothing, its good tensors neither");

    // One half alone is refused by finalize, and nothing of it takes effect.
    editor.update_context_tensors(&[Tensor { data: None, ..a.clone() }]).unwrap();
    assert_eq!(code(editor.finalize().unwrap_err()), 7007);
    assert_eq!(code(editor.section(None, "x").unwrap_err()), 5003);
    editor.update_context_tensors(&[a, b]).unwrap();
    editor.finalize().unwrap();

    let mut closed = ContextEditor::from_binary(editor.binary().unwrap().into()).unwrap();
    assert!(matches!(closed.add_graph(tiny("more", model())), Err(StateError::Closed)));
    let again = tiny("token", model());
    assert!(matches!(editor.add_graph(again), Err(StateError::DuplicateGraph { graph }) if graph == "token"));
}
