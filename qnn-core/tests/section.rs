//! The promises of adapter sections: what goes in comes out, byte for byte, and what does not fit is told apart.

mod support;

use std::sync::Arc;

use qnn_core::{
    Adapter, Bytes, Context, ContextBuilder, DataType, SectionError, StateError,
    adapter::Description,
    binary::{BinaryError, FileInfo, FileKind, SectionFile, Verify},
};
use support::{FORMS, Tiny, chain, mend_checksums, random_adapter, random_values, tiny};

const RANK: usize = 6;

fn model(branch: (usize, DataType)) -> Tiny {
    Tiny { forms: &FORMS, branch: Some(branch), ..Tiny::default() }
}

fn context_of(models: &[(&str, Tiny)]) -> Context {
    let builder = models.iter().fold(ContextBuilder::new(), |builder, (name, model)| builder.graph(tiny(name, *model)));
    let builder = builder.metadata("lora_max_rank", RANK.to_string());
    Context::from_binary(builder.to_binary().unwrap().into(), Verify::Checksums).unwrap()
}

/// A prompt and a token graph over one set of weights.
fn context(data_type: DataType) -> Context {
    let prompt = model((RANK, data_type));
    context_of(&[("prompt", prompt), ("token", Tiny { ar: 1, ..prompt })])
}

fn bytes(section: &[u8]) -> Bytes {
    Bytes::from(section.to_vec())
}

// Broken if a section loses or changes anything on its way: values, rank, slots, scaling, origin.
#[test]
fn write_read_write_is_identical() {
    for data_type in [DataType::Float32, DataType::Float16, DataType::SFixedPoint8, DataType::SFixedPoint4] {
        let context = context(data_type);
        for (rank, modules) in [(RANK, &["layers"][..]), (1, &["q_proj", "v_proj"]), (3, &["layers.1.mlp"])] {
            let adapter = random_adapter(&context, "json", 5, rank, modules);
            let section = context.section(&adapter).unwrap();
            let loaded = context.load_section(bytes(&section)).unwrap();
            assert_eq!(context.section(&loaded).unwrap(), section);
            assert_eq!((loaded.name(), loaded.description()), (adapter.name(), adapter.description()));
            assert_eq!((loaded.rank(), loaded.scaling(), loaded.graph()), (rank, Some(2.0), None));
            assert_eq!((loaded.n_tensors(), loaded.n_targets()), (adapter.n_tensors(), adapter.n_tensors() / 2));
            assert!(loaded.n_tensors() > 0);
            for ((name, a), (other, b)) in loaded.values().zip(adapter.values()) {
                assert_eq!((name, a.layout(), &**a.bytes()), (other, b.layout(), &**b.bytes()));
            }
            assert!(Arc::ptr_eq(loaded.names(), context.updatable()));
        }
        let empty = Adapter::new("default_adapter", context.updatable().clone(), []).unwrap();
        let section = context.section(&empty).unwrap();
        let loaded = context.load_section(bytes(&section)).unwrap();
        assert_eq!((loaded.n_tensors(), loaded.rank(), loaded.size_bytes()), (0, 0, 0));
        assert_eq!(context.section(&loaded).unwrap(), section);
    }
}
