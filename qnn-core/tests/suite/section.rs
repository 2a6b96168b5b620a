//! The promises of adapter sections: what goes in comes out, byte for byte, and what does not fit is told apart.

use std::sync::Arc;

use crate::support::{
    FORMS, Form, Rng, Tiny, chain, mend_checksums, random_adapter, random_values, random_weight, replace, splice, tiny,
};
use qnn_core::{
    Adapter, Bytes, Context, ContextBuilder, DataType, Graph, OpKind, SectionError, Shape, Tensor, TensorData,
    TensorId, TensorType,
    adapter::{Description, Slot},
    binary::{BinaryError, FileInfo, FileKind, SdkVersion, SectionFile, SectionKind, Verify},
};

const RANK: usize = 6;

fn model(branch: (usize, DataType)) -> Tiny {
    Tiny { forms: &FORMS, branch: Some(branch), ..Tiny::default() }
}

/// A prompt and a token graph over one set of weights.
fn context(branch: (usize, DataType), seed: u64) -> Context {
    let prompt = Tiny { seed, ..model(branch) };
    let builder = ContextBuilder::new().graph(tiny("prompt", prompt)).graph(tiny("token", Tiny { ar: 1, ..prompt }));
    Context::from_binary(builder.to_binary().unwrap().into(), Verify::Checksums).unwrap()
}

fn int8() -> Context {
    context((RANK, DataType::SFixedPoint8), 1)
}

fn bytes(section: &[u8]) -> Bytes {
    Bytes::from(section.to_vec())
}

// Broken if a section loses or changes anything on its way: values, rank, slots, scaling, origin.
#[test]
fn write_read_write_is_identical() {
    for data_type in [DataType::Float32, DataType::Float16, DataType::SFixedPoint8, DataType::SFixedPoint4] {
        let context = context((RANK, data_type), 1);
        for (rank, modules) in [(RANK, &["layers"][..]), (1, &["q_proj", "v_proj"]), (3, &["layers.1.mlp"])] {
            for graph in [None, Some("token".to_owned())] {
                let adapter = random_adapter(&context, "json", 5, rank, modules);
                let description = Description { graph, ..adapter.description().clone() };
                let adapter = adapter.described(description);
                let section = context.section(&adapter).unwrap();
                let loaded = context.load_section(bytes(&section)).unwrap();
                assert_eq!(context.section(&loaded).unwrap(), section);
                assert_eq!((loaded.name(), loaded.description()), (adapter.name(), adapter.description()));
                assert_eq!((loaded.rank(), loaded.scaling(), loaded.graph()), (rank, Some(2.0), adapter.graph()));
                assert_eq!((loaded.n_tensors(), loaded.n_targets()), (adapter.n_tensors(), adapter.n_tensors() / 2));
                assert!(loaded.n_tensors() > 0);
                for ((name, a), (other, b)) in loaded.values().zip(adapter.values()) {
                    assert_eq!((name, a.layout(), &**a.bytes()), (other, b.layout(), &**b.bytes()));
                }
                assert!(Arc::ptr_eq(loaded.names(), context.updatable()));
            }
        }
        let empty = Adapter::new("default_adapter", context.updatable().clone(), []).unwrap();
        let section = context.section(&empty).unwrap();
        let loaded = context.load_section(bytes(&section)).unwrap();
        assert_eq!((loaded.n_tensors(), loaded.rank(), loaded.size_bytes()), (0, 0, 0));
        assert_eq!(context.section(&loaded).unwrap(), section);
    }
}

/// The seven projections of some layers with SmolLM2-135M's extents, each with a branch of 8-bit numbers.
fn projections(layers: usize, max_rank: usize) -> Context {
    let mut graph = Graph::new("projections");
    let mut rng = Rng(3);
    let rows = |graph: &mut Graph, name: &str, width| {
        let shape = Shape::fixed(&[1, width]);
        let (tensor_type, data_type) = (TensorType::AppWrite, DataType::Float32);
        let input = Tensor { name: name.to_owned(), tensor_type, data_type, shape, encoding: None, data: None };
        graph.add_tensor(input).unwrap()
    };
    let alpha = rows(&mut graph, "lora_alpha", max_rank);
    let inputs = [(576, rows(&mut graph, "hidden", 576)), (1536, rows(&mut graph, "product", 1536))];
    for layer in 0..layers {
        for (part, n, k) in [
            ("self_attn.q_proj", 576, 576),
            ("self_attn.k_proj", 192, 576),
            ("self_attn.v_proj", 192, 576),
            ("self_attn.o_proj", 576, 576),
            ("mlp.gate_proj", 1536, 576),
            ("mlp.up_proj", 1536, 576),
            ("mlp.down_proj", 576, 1536),
        ] {
            let name = format!("model.layers.{layer}.{part}");
            let (data_type, encoding, bytes) = random_weight(&mut rng, n, k, Form::Int4Channel);
            let constant = |name: String, dims: &[usize], tensor_type, data_type, encoding, data: Option<Vec<u8>>| {
                let data = data.map(|bytes| TensorData::Flat(bytes.into()));
                Tensor { name, tensor_type, data_type, shape: Shape::fixed(dims), encoding, data }
            };
            let base =
                constant(format!("{name}.weight"), &[n, k], TensorType::Static, data_type, encoding, Some(bytes));
            let half = |half: &str, dims: &[usize]| {
                let name = format!("base_model.model.{name}.{half}.weight");
                constant(name, dims, TensorType::UpdateableStatic, DataType::SFixedPoint8, None, None)
            };
            let tensors = [base, half("lora_A", &[max_rank, k]), half("lora_B", &[n, max_rank])];
            let [weight, a, b] = tensors.map(|tensor| graph.add_tensor(tensor).unwrap());
            let x = inputs.iter().find(|(width, _)| *width == k).unwrap().1;
            let mut op = |suffix: &str, op, inputs: &[TensorId]| {
                graph.op(&format!("{name}{suffix}"), op, inputs, DataType::Float32).unwrap()[0]
            };
            let base = op("", OpKind::FullyConnected, &[x, weight]);
            let down = op(".lora_A", OpKind::FullyConnected, &[x, a]);
            let scaled = op(".lora_scale", OpKind::ElementWiseMultiply, &[down, alpha]);
            let up = op(".lora_B", OpKind::FullyConnected, &[scaled, b]);
            let sum = op(".lora_add", OpKind::ElementWiseAdd, &[base, up]);
            graph.mark_output(sum);
        }
    }
    graph.finalize().unwrap();
    let binary = ContextBuilder::new().graph(graph).to_binary().unwrap();
    Context::from_binary(binary.into(), Verify::Headers).unwrap()
}

// Broken if padding makes an adapter of a small or odd rank larger than its numbers, in the file or in memory.
#[test]
fn a_section_is_hardly_larger_than_its_weights() {
    let context = projections(4, 64);
    for rank in [4, 8, 12, 16, 24, 32, 64] {
        let adapter = random_adapter(&context, "json", 5, rank, &["layers"]);
        let extents = adapter.values().map(|(_, panels)| (panels.layout().n(), panels.layout().k()));
        let weights: usize = extents.map(|(n, k)| n * k + 4 * n).sum();
        let section = context.section(&adapter).unwrap();
        let ratio = section.len() as f64 / weights as f64;
        assert!((1.0..1.05).contains(&ratio), "rank {rank}: {} bytes of {weights}: {ratio:.3}", section.len());
        let loaded = context.load_section(section.into()).unwrap();
        assert!(loaded.size_bytes() as usize <= weights * 105 / 100);
    }
}

// Broken if loading copies values: memory per adapter has to be its file.
#[test]
fn values_lie_in_the_file() {
    let context = int8();
    let file = bytes(&context.section(&random_adapter(&context, "json", 5, RANK, &["layers"])).unwrap());
    let range = file.as_ptr_range();
    let loaded = context.load_section(file.clone()).unwrap();
    assert!(loaded.values().all(|(_, panels)| range.contains(&panels.bytes().as_ptr())));
}

// Broken if a section tells something else about itself than what is in it, or needs its base for that.
#[test]
fn a_section_describes_itself() {
    let context = int8();
    let adapter = random_adapter(&context, "json", 5, 2, &["q_proj"]);
    let section = context.section(&adapter).unwrap();
    let FileInfo::Section(info) = FileInfo::read(bytes(&section), Verify::Headers).unwrap() else {
        panic!("a section")
    };
    assert_eq!((info.size_bytes, info.values_bytes), (section.len() as u64, adapter.size_bytes()));
    assert_eq!(info.base_identity, context.identity().to_string());
    assert_eq!((info.meta.rank, info.meta.targets, info.updated_tensors.len()), (2, 2, 4));
    assert_eq!(info.updated_tensors[0].name, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    assert_eq!((info.updated_tensors[0].dims, info.updated_tensors[0].data_type), ([2, 32], "SFIXED_POINT_8"));
    let of_context = context.info();
    for (io, graph) in info.meta.io.iter().zip(&of_context.graphs) {
        let want: Vec<_> = graph.inputs.iter().chain(&graph.outputs).cloned().collect();
        assert_eq!((&io.graph, &io.tensors), (&graph.name, &want));
    }
    assert_eq!(info.meta.io.len(), 2);
    let whole = FileInfo::read(context.to_binary().unwrap().into(), Verify::Headers).unwrap();
    assert_eq!(whole, FileInfo::Context(of_context));
}

type Change = fn(&mut Vec<(SectionKind, String, Vec<u8>)>);

// Broken if a user cannot tell which of base, version, rank, precision or file is wrong, or what would be right.
#[test]
fn what_does_not_fit_is_told_apart() {
    let context = int8();
    let section =
        |context: &Context, rank| context.section(&random_adapter(context, "json", 5, rank, &["layers"])).unwrap();
    let good = section(&context, RANK);
    let same = |_: &mut Vec<_>| {};
    let other_base = self::context((RANK, DataType::SFixedPoint8), 2);
    let larger = section(&self::context((RANK + 2, DataType::SFixedPoint8), 1), RANK + 2);
    let floats = section(&self::context((RANK, DataType::Float16), 1), RANK);
    let mut newer_sdk = good.clone();
    newer_sdk[10] ^= 1;
    mend_checksums(&mut newer_sdk);
    let with = |change: Change| splice(&context, &good, change);
    let io_of = |section: &[u8]| SectionFile::parse(bytes(section)).unwrap().meta().io.clone();
    assert_eq!(io_of(&good), io_of(&floats), "so that only the values differ");
    let [base, other] = [context.identity(), other_base.identity()].map(|identity| identity.to_string());
    let sdk = SdkVersion::CURRENT;
    let newer = SdkVersion { minor: sdk.minor ^ 1, ..sdk };
    let first = "base_model.model.model.layers.0.mlp.down_proj.lora_";
    let cases: Vec<(Vec<u8>, u32, String)> = vec![
        (section(&other_base, RANK), 5000, format!("section belongs to base {other}, this context is {base}")),
        (newer_sdk, 5004, format!("section was written by SDK {newer}, its context by SDK {sdk}")),
        (
            splice(&context, &larger, |parts| {
                replace(&mut parts[0].2, "\"dims\":[8]", "\"dims\":[6]");
                replace(&mut parts[0].2, "\"dims\":[8]", "\"dims\":[6]");
            }),
            7007,
            "adapter of rank 8, the context has room for 6".to_owned(),
        ),
        (
            splice(&context, &larger, |parts| {
                replace(&mut parts[0].2, "\"dims\":[8]", "\"dims\":[6]");
                replace(&mut parts[0].2, "\"dims\":[8]", "\"dims\":[6]");
                replace(&mut parts[0].2, "\"rank\":8", "\"rank\":6");
                replace(&mut parts[0].2, "[0,8]", "[0,6]");
            }),
            7007,
            format!("tensor {first}A.weight: rank 8, the graph has room for 6"),
        ),
        (
            splice(&context, &floats, same),
            7007,
            format!("tensor {first}A.weight: values of FLOAT_16, need SFIXED_POINT_8"),
        ),
        (
            // 64 columns as the layout of 60: the padding of the panels takes as many bytes.
            with(|parts| parts[1].2[4] = 60),
            7007,
            format!("tensor {first}A.weight: extents [6, 60], need [6, 64]"),
        ),
        (
            with(|parts| parts.last_mut().unwrap().1 = "zzz.lora_B.weight".to_owned()),
            7002,
            "tensor zzz.lora_B.weight is not an updatable tensor of the context".to_owned(),
        ),
        (
            with(|parts| {
                parts.pop();
                let len = parts[1].2.len() - 16;
                parts[1].2.truncate(len);
            }),
            7007,
            "v_proj.lora_A.weight has a value, its partner ".to_owned(),
        ),
        (
            // B of rank 5: k of int8 panels is padded to 8, so the size stays.
            with(|parts| parts[1].2[16 + 4] = 5),
            7007,
            format!("tensor {first}B.weight: rank 5, its partner {first}A.weight has 6"),
        ),
        (
            with(|parts| replace(&mut parts[0].2, "\"graph\":null", "\"graph\":\"other\"")),
            5000,
            "graph \"other\" is not in the context, which has prompt, token".to_owned(),
        ),
        (
            with(|parts| replace(&mut parts[0].2, "FLOAT_32", "FLOAT_16")),
            7007,
            "graph \"prompt\", tensor lora_alpha: {\"name\":\"lora_alpha\",\"type\":\"APP_WRITE\"".to_owned(),
        ),
        (context.to_binary().unwrap(), 5005, "at byte 6 is a context binary, need an adapter section".to_owned()),
    ];
    for (i, (section, code, want)) in cases.into_iter().enumerate() {
        let error = context.load_section(section.into()).expect_err(&want);
        let text = chain(&error).replace("of the section: ", "");
        assert!(text.contains(&want), "case {i}: {text}\nneed {want}");
        assert_eq!(error.code().number, code, "case {i}: {text}");
    }
    let fault = Context::from_binary(good.clone().into(), Verify::Headers).unwrap_err();
    let want = (FileKind::AdapterSection, FileKind::Context);
    assert!(matches!(fault.why, BinaryError::Kind { have, want: w } if (have, w) == want), "{fault:?}");

    let adapter = context.load_section(bytes(&good)).unwrap();
    let error = other_base.apply(None, &adapter).unwrap_err();
    assert!(matches!(error, SectionError::WrongContext { .. }), "{error}");
    let for_token = adapter.description().clone();
    let for_token = random_adapter(&context, "t", 1, 2, &["layers"])
        .described(Description { graph: Some("token".to_owned()), ..for_token });
    let for_token = context.section(&for_token).unwrap();
    let error = context.apply_section(Some("prompt"), for_token.into()).unwrap_err();
    assert_eq!(error.to_string(), "section is for graph \"token\", asked for \"prompt\"");
    assert!(matches!(context.apply(Some("no"), &adapter), Err(SectionError::UnknownGraph { .. })));
}

// Broken if values that no context would take can be written.
#[test]
fn what_does_not_fit_is_not_written() {
    let context = int8();
    let make = |values, description| {
        let adapter = Adapter::new("bad", context.updatable().clone(), values).unwrap().described(description);
        chain(&context.section(&adapter).unwrap_err())
    };
    let values = |rank| random_values(&context, 3, rank, &["q_proj"]);
    let of_rank = |rank| Description { rank, ..Description::default() };
    assert!(make(values(7), of_rank(7)).contains("adapter of rank 7, the context has room for 6"));
    assert!(make(values(2)[..1].to_vec(), of_rank(2)).contains("has a value, its partner"));
    assert!(make(values(2), of_rank(1)).contains("says that it has 1 rank columns, its tensors have 2"));
    let slot = Slot { name: "a".to_owned(), columns: 1..3, scaling: None };
    let text = make(values(2), Description { rank: 2, slots: vec![slot], ..Description::default() });
    assert!(text.contains("slots"), "{text}");
}

fn table_at(file: &[u8]) -> usize {
    u64::from_le_bytes(file[24..32].try_into().expect("eight bytes")) as usize
}

// Broken if a section that is not all there, changed by one bit, newer or somebody else's is applied, or if a failed
// apply takes away what was applied before.
#[test]
fn damaged_sections_are_refused_and_change_nothing() {
    let context = int8();
    let before = context.section(&random_adapter(&context, "before", 1, 3, &["layers"])).unwrap();
    let before = context.apply_section(None, before.into()).unwrap();
    let good = context.section(&random_adapter(&context, "json", 5, RANK, &["q_proj", "up_proj"])).unwrap();
    let refused = |section: &[u8], what: &str| {
        let error = context.apply_section(None, bytes(section)).expect_err(what);
        assert!(matches!(error, SectionError::Damaged { .. }), "{what}: {error}");
        for graph in ["prompt", "token"] {
            assert!(Arc::ptr_eq(&context.adapter(graph).unwrap(), &before), "{what}");
        }
        chain(&error)
    };
    let mut rng = Rng(3);
    let cuts = (0..300).chain(table_at(&good)..good.len()).chain((0..300).map(|_| rng.next() as usize % good.len()));
    for cut in cuts.collect::<Vec<_>>() {
        refused(&good[..cut], "a cut");
    }
    refused(&[&good[..], &[0]].concat(), "one byte more");
    let mut file = good.clone();
    let everywhere = (0..128).chain(table_at(&good)..good.len()).map(|at| (at, at % 8));
    let inside = (0..1500).map(|_| (128 + rng.next() as usize % (good.len() - 128), rng.next() as usize % 8));
    for (at, bit) in everywhere.chain(inside).collect::<Vec<_>>() {
        file[at] ^= 1 << bit;
        refused(&file, "a flipped bit");
        file[at] ^= 1 << bit;
    }
    let header = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        mend_checksums(&mut file);
        file
    };
    assert!(refused(&header(4, &[3, 0]), "newer").contains("format version 3, written by SDK"));
    assert!(refused(b"\x7fELF and so on", "foreign").contains("not a genie context binary"));
    assert!(refused(&header(6, &[3, 0]), "a kind").contains("kind: found 3"));
    for at in [16, 24, 32, 36] {
        for value in [0u32, 1, 0x7fff_ffff, 0xffff_ffff] {
            refused(&header(at, &value.to_le_bytes()), "a count");
        }
    }
    context.apply_section(None, good.into()).expect("the file is whole");
}

// Broken if parts that contradict each other, or hostile numbers with true checksums, get through or panic.
#[test]
fn contradictory_parts_are_refused() {
    let context = int8();
    let good = context.section(&random_adapter(&context, "json", 5, RANK, &["q_proj"])).unwrap();
    let cases: Vec<(Change, &str)> = vec![
        (|p| _ = p.remove(0), "section META \"\" is missing"),
        (|p| _ = p.remove(1), "section LAYOUTS \"\" is missing"),
        (
            |p| (2..=3).for_each(|i| p[i].1 = format!("name{}", 9 - i)),
            "comes after name7, need the order of their names",
        ),
        (|p| p.truncate(3), "size_bytes is 64, need 16"),
        (|p| p[1].2.truncate(60), "size_bytes is 60, need 64"),
        (|p| p[1].2.fill(255), "format is 4294967295, need 1 to 5"),
        (|p| p[1].2[8] = 0, "format is 0, need 1 to 5"),
        (|p| p[1].2[12] = 2, "tight is 2, need 0 or 1"),
        (|p| p[1].2[12] = 0, "bytes of packed weights"),
        (|p| p[1].2[0..4].fill(0), "panels"),
        (|p| p[1].2[0..4].fill(255), "panels"),
        (|p| p[1].2[4..8].fill(255), "panels"),
        (|p| p[1].2[0] = 17, "bytes of packed weights"),
        (|p| p[3].0 = SectionKind::Scales, "SCALES"),
        (|p| p.push((SectionKind::Graph, "token".to_owned(), b"{}".to_vec())), "need"),
        (|p| p[0].2 = b"{}".to_vec(), "missing field `tool`"),
        (|p| replace(&mut p[0].2, "\"targets\":2", "\"targets\":3"), "targets: found 3, need 2"),
        (|p| replace(&mut p[0].2, "\"rank\":6", "\"rank\":5"), "slots: columns: found 6"),
        (|p| replace(&mut p[0].2, "[0,6]", "[0,0]"), "slots: columns: found 0, need more than 0"),
        (|p| replace(&mut p[0].2, "[0,6]", "[1,6]"), "slots: columns: found 1, need 0"),
        (|p| replace(&mut p[0].2, "[0,6]", "[0,5]"), "slots: columns: found 5, need 6"),
        (|p| replace(&mut p[0].2, "[0,6]", "[0,4]},{\"name\":\"b\",\"columns\":[3,6]"), "found 3, need 4"),
        (|p| replace(&mut p[0].2, "[0,6]", "[0,4]},{\"name\":\"b\",\"columns\":[5,6]"), "found 5, need 4"),
        (|p| replace(&mut p[0].2, "\"rank\":6", "\"rank\":18446744073709551615"), "rank"),
        (|p| replace(&mut p[0].2, "\"rank\":6", "\"rank\":-1"), "invalid value"),
    ];
    for (i, (change, want)) in cases.into_iter().enumerate() {
        let error = chain(&context.load_section(splice(&context, &good, change).into()).expect_err("a contradiction"));
        assert!(error.contains(want), "case {i}: {error}");
    }
    let mut rng = Rng(8);
    for _ in 0..400 {
        let damaged = splice(&context, &good, |parts| {
            let part = &mut parts[rng.next() as usize % 2].2;
            let at = rng.next() as usize % part.len();
            part[at] ^= 1 << (rng.next() % 8);
        });
        // Some changes make another well-formed section (a name, a fact). None may panic.
        let _ = context.load_section(damaged.into());
    }
}

// Broken if a section that an earlier release wrote cannot be read any more. The file is of format version 1 and is never
// made again.
#[test]
fn a_version_1_section_still_reads() {
    let section = SectionFile::parse(bytes(include_bytes!("../corpus/section_v1.bin"))).unwrap();
    let meta = section.meta();
    assert_eq!((meta.name.as_str(), meta.rank, meta.targets, meta.slots[0].scaling), ("old", 2, 1, Some(2.0)));
    assert_eq!(meta.io.iter().map(|io| io.graph.as_str()).collect::<Vec<_>>(), ["prompt", "token"]);
    let names: Vec<_> =
        section.tensors().iter().map(|(name, p)| (&name[42..], p.layout().n(), p.layout().k())).collect();
    assert_eq!(names, [("v_proj.lora_A.weight", 2, 32), ("v_proj.lora_B.weight", 16, 2)]);
    assert_eq!(
        section.binary().identity().to_string(),
        "17dc9373086fc5938d966f925912b23e38ca2864d226e1ba9d6b24c4e10945cb"
    );
}
