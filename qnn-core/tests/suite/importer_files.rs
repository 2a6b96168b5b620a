//! Damaged and foreign model files are refused with file, place and reason; nothing panics.

use std::path::Path;

use qnn_core::offline::arch::{ActivationBits, Precision, WeightType, build};
use qnn_core::offline::{dlc, gguf::GgufFile, safetensors::SafetensorsFile, source::Source};
use qnn_core::{Bytes, Graph, TensorData};

const SHAPES: [(&str, &[usize]); 11] = [
    ("model.embed_tokens.weight", &[11, 8]),
    ("model.layers.0.input_layernorm.weight", &[8]),
    ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
    ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
    ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
    ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
    ("model.layers.0.post_attention_layernorm.weight", &[8]),
    ("model.layers.0.mlp.gate_proj.weight", &[16, 8]),
    ("model.layers.0.mlp.up_proj.weight", &[16, 8]),
    ("model.layers.0.mlp.down_proj.weight", &[8, 16]),
    ("model.norm.weight", &[8]),
];

/// Name, shape and values of a tensor.
type Named = (&'static str, Vec<usize>, Vec<f32>);

/// One layer of width 8, as `config.json` and a safetensors file.
fn write_model(folder: &Path) -> Vec<u8> {
    let tensors = SHAPES.map(|(name, shape)| (name, shape.to_vec(), values(shape)));
    write_tensors(folder, &tensors)
}

fn values(shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product::<usize>()).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect()
}

/// As [`write_model`], with these tensors.
fn write_tensors(folder: &Path, tensors: &[Named]) -> Vec<u8> {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": [2, 3],
    });
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), &file).unwrap();
    file
}

fn import(folder: &Path) -> Result<Graph, String> {
    let precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };
    let chain = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text += &format!(": {error}");
            source = error.source();
        }
        text
    };
    let source = Source::open(folder).map_err(|e| chain(&e))?;
    let workers = htp_sim::Workers::new(1).unwrap();
    build(&source, precision, &workers, &mut |_| {}).map(|(graph, _)| graph).map_err(|e| chain(&e))
}

/// A GGUF of metadata of every kind and two tensors; where its parts end comes second.
fn gguf() -> (Vec<u8>, Vec<usize>) {
    let (mut file, mut edges) = (b"GGUF".to_vec(), vec![4]);
    let text = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    file.extend(3u32.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend(5u64.to_le_bytes());
    edges.push(file.len());
    text(&mut file, "general.architecture");
    file.extend(8u32.to_le_bytes());
    text(&mut file, "llama");
    edges.push(file.len());
    text(&mut file, "general.alignment");
    file.extend(4u32.to_le_bytes());
    file.extend(32u32.to_le_bytes());
    edges.push(file.len());
    text(&mut file, "strings");
    file.extend([9u32, 8].iter().flat_map(|v| v.to_le_bytes()));
    file.extend(3u64.to_le_bytes());
    ["a", "", "ü"].iter().for_each(|t| text(&mut file, t));
    edges.push(file.len());
    text(&mut file, "numbers");
    file.extend([9u32, 5].iter().flat_map(|v| v.to_le_bytes()));
    file.extend(2u64.to_le_bytes());
    file.extend([-1i32, 7].iter().flat_map(|v| v.to_le_bytes()));
    edges.push(file.len());
    text(&mut file, "nested");
    file.extend([9u32, 9].iter().flat_map(|v| v.to_le_bytes()));
    file.extend(1u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend([1, 2]);
    edges.push(file.len());
    for (name, offset) in [("token_embd.weight", 0u64), ("output_norm.weight", 128)] {
        text(&mut file, name);
        file.extend(1u32.to_le_bytes());
        file.extend(8u64.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(offset.to_le_bytes());
        edges.push(file.len());
    }
    file.resize(file.len().next_multiple_of(32), 0);
    edges.push(file.len());
    file.resize(file.len() + 160, 1);
    (file, edges)
}

/// Guards: a safetensors file that is cut anywhere is refused.
#[test]
fn safetensors_cut_at_every_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_model(folder.path());
    assert!(import(folder.path()).is_ok());
    for len in 0..file.len() {
        let error = SafetensorsFile::parse(file[..len].to_vec().into()).map(|_| ()).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
    std::fs::write(folder.path().join("model.safetensors"), &file[..file.len() - 1]).unwrap();
    let error = import(folder.path()).unwrap_err();
    assert!(error.contains("model.safetensors") && error.contains("bytes of tensors"), "{error}");
}

/// Guards: no flipped header byte makes the importer panic, and sizes that overflow are refused.
#[test]
fn safetensors_with_flipped_or_huge_numbers_does_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_model(folder.path());
    let header_end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    for at in 0..header_end {
        for flip in [1, 0x80] {
            let mut damaged = file.clone();
            damaged[at] ^= flip;
            let _ = SafetensorsFile::parse(damaged.into());
        }
    }
    let huge = format!("{}", usize::MAX / 8 * 4);
    let eight = (0..9).map(|i| {
        let (start, end) = ((usize::MAX / 8).wrapping_mul(i), (usize::MAX / 8).wrapping_mul(i + 1));
        format!("\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{start},{end}]}}", usize::MAX / 8)
    });
    let headers = [
        format!("{{\"t\":{{\"dtype\":\"F32\",\"shape\":[{huge}],\"data_offsets\":[0,{huge}]}}}}"),
        format!("{{\"t\":{{\"dtype\":\"F32\",\"shape\":[{huge},{huge}],\"data_offsets\":[0,4]}}}}"),
        format!("{{{}}}", eight.collect::<Vec<_>>().join(",")),
        "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}".to_owned(),
    ];
    for header in headers {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 4]);
        assert!(SafetensorsFile::parse(file.into()).is_err(), "{header}");
    }
    for length in [u64::MAX, 1 << 40, 100_000_001] {
        let mut damaged = file.clone();
        damaged[..8].copy_from_slice(&length.to_le_bytes());
        assert!(SafetensorsFile::parse(damaged.into()).is_err(), "{length}");
    }
}

/// Guards: an index may name neither a file elsewhere nor a tensor that its shard lacks.
#[test]
fn shard_index_that_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("shard.safetensors")).unwrap();
    let check = |map: serde_json::Value, words: &str| {
        let index = serde_json::json!({ "weight_map": map });
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = import(folder.path()).unwrap_err();
        assert!(error.contains("index.json") && error.contains(words), "{error}");
    };
    check(serde_json::json!({ "x": "../shard.safetensors" }), "not a plain file name");
    check(serde_json::json!({ "x": "/etc/passwd" }), "not a plain file name");
    check(serde_json::json!({ "x": "shard.safetensors" }), "tensor x is not in shard.safetensors");
    check(serde_json::json!({ "x": 3 }), "JSON");
}

/// Guards: weights cut into shards give the graph that one file gives.
#[test]
fn shards_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_model(folder.path());
    let whole = import(folder.path()).unwrap();
    let names: Vec<String> = SafetensorsFile::parse(file.into()).unwrap().names().map(str::to_owned).collect();
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("a.safetensors")).unwrap();
    std::fs::copy(folder.path().join("a.safetensors"), folder.path().join("b.safetensors")).unwrap();
    let shard = |i: usize| if i.is_multiple_of(2) { "a.safetensors" } else { "b.safetensors" };
    let map: serde_json::Map<String, serde_json::Value> =
        names.into_iter().enumerate().map(|(i, name)| (name, shard(i).into())).collect();
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_eq!(import(folder.path()).unwrap().nodes(), whole.nodes());
}

/// Guards: a weight that is not finite is refused by tensor and row where floats stay floats, as where they become integers.
#[test]
fn weights_that_are_not_finite_are_refused() {
    for (tensor, at, row) in [(0, 80, 10), (2, 17, 2), (10, 3, 0)] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let folder = tempfile::tempdir().unwrap();
            let mut tensors = SHAPES.map(|(name, shape)| (name, shape.to_vec(), values(shape)));
            tensors[tensor].2[at] = value;
            write_tensors(folder.path(), &tensors);
            let error = import(folder.path()).unwrap_err();
            let want = format!("tensor {}, row {row}: a value that is not finite", SHAPES[tensor].0);
            assert!(error.contains(&want), "{error}");
        }
    }
}

/// Guards: a user with a pickle is told what it is and what to do, and one without weights what was looked for.
#[test]
fn pickles_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("other")).unwrap();
    let error = import(folder.path()).unwrap_err();
    assert!(error.contains("no weights: looked for model.safetensors"), "{error}");
    std::fs::write(folder.path().join("pytorch_model.bin"), "PK").unwrap();
    let error = import(folder.path()).unwrap_err();
    assert!(error.contains("pytorch_model.bin (a pickle) is not supported; supported: model.safetensors"), "{error}");
}

/// Guards: an index that is left over does not hide `model.safetensors`, which transformers takes first.
#[test]
fn one_file_goes_before_an_index() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    std::fs::write(folder.path().join("model.safetensors.index.json"), r#"{"weight_map":{"x":"gone.safetensors"}}"#)
        .unwrap();
    import(folder.path()).unwrap();
}

/// Guards: a trained head is not dropped because the configuration ties it to the embedding; an equal one is no second matrix, and a
/// checkpoint that has only the head reads as one that has only the embedding.
#[test]
fn a_head_of_its_own_stays_in_a_tied_checkpoint() {
    let import_with = |change: &dyn Fn(&mut Vec<Named>)| {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = SHAPES.map(|(name, shape)| (name, shape.to_vec(), values(shape))).to_vec();
        change(&mut tensors);
        write_tensors(folder.path(), &tensors);
        import(folder.path())
    };
    let head = "lm_head.weight";
    let tied = import_with(&|_| {}).unwrap();
    let equal = import_with(&|tensors| tensors.push((head, vec![11, 8], values(&[11, 8])))).unwrap();
    let only_head = import_with(&|tensors| tensors[0].0 = head).unwrap();
    for graph in [&tied, &equal, &only_head] {
        assert_eq!(graph.nodes(), tied.nodes());
        assert!(graph.find(head).is_none() && graph.find("model.embed_tokens.weight").is_some());
    }
    let mut other = values(&[11, 8]);
    other[87] += 0.5;
    let own = import_with(&|tensors| tensors.push((head, vec![11, 8], other.clone()))).unwrap();
    let Some(TensorData::Flat(bytes)) = &own.tensor(own.find(head).unwrap()).data else { panic!("no values") };
    assert_eq!(bytes[87 * 4..], other[87].to_le_bytes());
}

/// Guards: matrices that were looked at before they are used have the shape that their use asks for.
#[test]
fn matrices_of_other_shapes_are_refused() {
    for (name, shape, want) in [
        ("lm_head.weight", vec![12, 8], "[11, 8]"),
        ("model.layers.0.self_attn.q_proj.weight", vec![12, 8], "[8, 8]"),
        ("model.layers.0.self_attn.o_proj.weight", vec![8, 4], "[8, 8]"),
        ("model.layers.0.mlp.down_proj.weight", vec![4, 16], "[8, 16]"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = SHAPES.map(|(name, shape)| (name, shape.to_vec(), values(shape))).to_vec();
        tensors.retain(|(other, ..)| *other != name);
        let filled = values(&shape);
        tensors.push((name, shape.clone(), filled));
        write_tensors(folder.path(), &tensors);
        let error = import(folder.path()).unwrap_err();
        assert!(error.contains(&format!("{name}: shape {shape:?}, need {want}")), "{error}");
    }
}

/// Guards: a GGUF cut inside its header, metadata or table is refused with the place.
#[test]
fn gguf_cut_anywhere_is_refused() {
    let (file, edges) = gguf();
    let whole = GgufFile::parse(file.clone().into()).unwrap();
    assert_eq!(whole.strings("strings").unwrap().unwrap(), ["a", "", "ü"]);
    assert_eq!(whole.integers("numbers").unwrap().unwrap(), [-1, 7]);
    let table_end = edges[edges.len() - 2];
    for len in 0..table_end {
        let error = GgufFile::parse(file[..len].to_vec().into()).unwrap_err().to_string();
        assert!(error.contains("at byte") || error.contains("not a GGUF"), "cut at {len}: {error}");
    }
    for edge in edges {
        let _ = GgufFile::parse(file[..edge].to_vec().into());
    }
}

/// Guards: no flipped byte and no huge number in a GGUF's header, metadata or table makes the reader panic.
#[test]
fn gguf_with_flipped_or_huge_numbers_does_not_panic() {
    let (file, edges) = gguf();
    let table_end = edges[edges.len() - 2];
    for at in 0..table_end {
        for flip in [0x01, 0x08, 0x80, 0xff] {
            let mut damaged = file.clone();
            damaged[at] ^= flip;
            if let Ok(file) = GgufFile::parse(damaged.into()) {
                let _ = (file.strings("strings"), file.integers("numbers"), file.unsigned("general.alignment"));
            }
        }
        if at + 8 <= table_end {
            for huge in [u64::MAX, u64::MAX / 8 + 1, 1 << 40] {
                let mut damaged = file.clone();
                damaged[at..at + 8].copy_from_slice(&huge.to_le_bytes());
                let _ = GgufFile::parse(damaged.into());
            }
        }
    }
    for count_at in [8, 16] {
        let mut damaged = file.clone();
        damaged[count_at..count_at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = GgufFile::parse(damaged.into()).unwrap_err().to_string();
        assert!(error.contains(&format!("at byte {count_at}")) && error.contains("at most"), "{error}");
    }
}

/// Guards: a GGUF of another byte order or version, or another file, is named as such.
#[test]
fn foreign_files_are_refused_as_such() {
    let (file, _) = gguf();
    let check = |at: usize, bytes: &[u8], words: &str| {
        let mut foreign = file.clone();
        foreign[at..at + bytes.len()].copy_from_slice(bytes);
        let error = GgufFile::parse(foreign.into()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    check(0, b"PK\x03\x04", "not a GGUF file");
    check(4, &3u32.to_be_bytes(), "version 50331648");
    check(4, &1u32.to_le_bytes(), "version 1, supported: 2, 3");
    let folder = tempfile::tempdir().unwrap();
    let onnx = folder.path().join("model.onnx");
    std::fs::write(&onnx, b"\x08\x09").unwrap();
    let error = import(&onnx).unwrap_err();
    assert!(
        error.contains("model.onnx") && error.contains("\"onnx\" is not supported") && error.contains(".gguf"),
        "{error}"
    );
    let error = import(folder.path()).unwrap_err();
    assert!(error.contains("config.json"), "{error}");
}

/// Guards: a DLC gives back the graph that was written, and the same graph always gives the same bytes.
#[test]
fn dlc_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let graph = import(folder.path()).unwrap();
    let (a, b) = (folder.path().join("a.dlc"), folder.path().join("b.dlc"));
    dlc::write_dlc(&a, &graph).unwrap();
    let again = dlc::read_dlc(&a).unwrap();
    assert_eq!((again.nodes(), again.metadata()), (graph.nodes(), graph.metadata()));
    dlc::write_dlc(&b, &again).unwrap();
    assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
    assert_eq!(again.metadata()["eos_token_ids"], "2,3");
}

/// Guards: a DLC cut anywhere or with a flipped header byte is refused or reads, and never panics; a foreign one is named.
#[test]
fn damaged_dlc_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let path = folder.path().join("a.dlc");
    dlc::write_dlc(&path, &import(folder.path()).unwrap()).unwrap();
    let file = std::fs::read(&path).unwrap();
    let header_end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let parse = |bytes: Vec<u8>| dlc::parse(&Bytes::from(bytes));
    for len in (0..file.len()).step_by(7).chain([7, 8, header_end, file.len() - 1]) {
        assert!(parse(file[..len].to_vec()).is_err(), "cut at {len}");
    }
    for at in 0..header_end {
        let mut damaged = file.clone();
        damaged[at] ^= 1;
        let _ = parse(damaged);
    }
    let replace = |from: &str, to: &str| {
        let header = String::from_utf8(file[8..header_end].to_vec()).unwrap();
        assert!(header.contains(from), "{from}");
        let header = header.replacen(from, to, 1);
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend(header.as_bytes());
        changed.extend(&file[header_end..]);
        parse(changed).unwrap_err().to_string()
    };
    assert!(replace("genie-dlc", "genie-abc").contains("genie-abc"));
    assert!(replace("\"version\":\"1\"", "\"version\":\"2\"").contains("\"2\""));
    assert!(replace("\"model.norm.weight\":", "\"model.Norm.weight\":").contains("model.norm.weight"));
    assert!(replace("\"graph\":", "\"grape\":").contains("graph"));
    let shape = replace("\"dtype\":\"F32\",\"shape\":[11,8]", "\"dtype\":\"F32\",\"shape\":[8,11]");
    assert!(shape.contains("model.embed_tokens.weight: F32 [8, 11], need F32 [11, 8]"), "{shape}");
}
