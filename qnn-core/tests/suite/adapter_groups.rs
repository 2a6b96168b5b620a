//! The promises of grouped sections (LoRA v3): the encodings of a group and the weights of a member are together what a whole
//! section with the same encodings is; nothing else can be put together; and the tools make such sections.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{Rng, Runner, Tiny, VOCAB, chain, random_adapter, random_values, replace, splice, tiny};
use htp_sim::Workers;
use qnn_core::{
    Adapter, AdapterGroup, Backend, Bytes, Context, ContextBuilder, DataType, Encoding, Error, Graph, Panels,
    SectionError, Tensor,
    adapter::TensorEncoding,
    backend::{HtpBackend, ReferenceBackend},
    binary::{FileInfo, SectionType, Verify},
    offline::{
        arch::{CacheType, Grouping, WeightType},
        dlc::write_dlc,
        encodings::{EncodingsFile, Numbers},
        generate::{GenerateOptions, Report, generate},
        lora::PlacedAdapters,
        quantize::{
            Activations, Calibration, QuantizeOptions, Schema, Tools,
            adapters::{AdapterReport, calibrate_adapters},
            quantize,
        },
        quantize_weights::Bits,
    },
};

const RANK: usize = 4;
const IDS: [i32; 5] = [7, 2, 11, 30, 4];

const OPTIONS: QuantizeOptions = QuantizeOptions {
    weights: WeightType::Int { bits: Bits::Eight, grouping: Grouping::Default },
    activations: Activations {
        bits: 16,
        calibration: Calibration::MinMax,
        schema: Schema::Asymmetric,
        least_sqnr_db: None,
    },
    cache: Some(CacheType::F32),
};

fn float(mode: &str, seed: u64) -> Graph {
    let branch = Some((RANK, DataType::SFixedPoint8));
    let mut graph = tiny("model", Tiny { seed, ar: 32, cl: 32, branch, ..Tiny::default() });
    graph.set_metadata("lora_alpha_tensor", "lora_alpha");
    graph.set_metadata("quant_updatable_mode", mode);
    graph
}

fn with_tools<T>(work: impl FnOnce(&mut Tools<'_>, &[&[u32]]) -> T) -> T {
    let (backend, workers) = (HtpBackend::new(1).unwrap(), Workers::new(1).unwrap());
    let mut rng = Rng(1);
    let text: Vec<u32> = (0..64).map(|_| (rng.next() % VOCAB as u64) as u32).collect();
    let windows: Vec<&[u32]> = text.chunks(32).collect();
    work(&mut Tools { backend: &backend, workers: &workers, progress: &mut |_| {} }, &windows)
}

fn quantized(float: &Graph) -> Graph {
    quantized_with(float, &OPTIONS)
}

fn quantized_with(float: &Graph, options: &QuantizeOptions) -> Graph {
    with_tools(|tools, windows| quantize(float, windows, options, None, tools)).unwrap().0
}

fn context(graphs: impl IntoIterator<Item = Graph>) -> Context {
    let builder = graphs.into_iter().fold(ContextBuilder::new(), ContextBuilder::graph);
    Context::from_binary(builder.to_binary().unwrap().into(), Verify::Checksums).unwrap()
}

/// The encodings of every tensor that a section may change, for `shrink` of their ranges: what lies outside is cut off.
fn encodings(graph: &Graph, shrink: f32) -> Vec<(String, TensorEncoding)> {
    let own = |tensor: &Tensor| {
        let Some(Encoding::ScaleOffset { bitwidth, scale, offset }) = tensor.encoding else { return None };
        let encoding = Encoding::ScaleOffset { bitwidth, scale: scale * shrink, offset };
        let updatable = tensor.tensor_type.is_updateable() && !tensor.tensor_type.is_static();
        updatable.then(|| (tensor.name.clone(), TensorEncoding { data_type: tensor.data_type, encoding }))
    };
    let found: Vec<_> = graph.tensors().iter().filter_map(own).collect();
    assert_eq!(found.len(), 9, "four inputs of matrices in each layer and the head's");
    found
}

fn member(context: &Context, seed: u64) -> Adapter {
    random_adapter(context, &format!("adapter {seed}"), seed, RANK, &["layers"])
}

fn group(context: &Context, name: &str, encodings: Vec<(String, TensorEncoding)>) -> Vec<u8> {
    let group = AdapterGroup::new(name, Arc::clone(context.updatable()), encodings).unwrap();
    context.group_section(&group).unwrap()
}

/// The weights of an adapter of the group called `name`.
fn weights(context: &Context, seed: u64, name: &str) -> Vec<u8> {
    let group = AdapterGroup::new(name, Arc::clone(context.updatable()), []).unwrap();
    context.section(&member(context, seed).in_group(Arc::new(group))).unwrap()
}

fn bytes(section: &[u8]) -> Bytes {
    Bytes::from(section.to_vec())
}

fn logits(backend: &dyn Backend, graph: &Graph, adapter: &Arc<Adapter>) -> Vec<f32> {
    Runner::new(backend, graph).run(&IDS, Some(Arc::clone(adapter)), 1.0)
}

// Broken if an adapter in two parts computes anything else than the same adapter in one, if a part has something of the
// other, or if each member brings the group's encodings again.
#[test]
fn group_and_weights_are_the_whole_adapter() {
    let graph = quantized(&float("all", 3));
    let context = context([graph.clone()]);
    let own = encodings(&graph, 0.5);
    let shared = group(&context, "chat", own.clone());
    let loaded = context.load_group(bytes(&shared)).unwrap();
    assert_eq!((loaded.name(), loaded.encodings().count()), ("chat", own.len()));
    assert_eq!(context.group_section(&loaded).unwrap(), shared);
    for seed in [3, 4] {
        let whole = context.section(&member(&context, seed).with_encodings(own.clone()).unwrap()).unwrap();
        let alone = weights(&context, seed, "chat");
        let grouped = context.load_grouped_section(bytes(&alone), &loaded).unwrap();
        assert_eq!(context.section(&grouped).unwrap(), alone);
        assert!(Arc::ptr_eq(grouped.group().unwrap(), &loaded));
        let whole = context.load_section(bytes(&whole)).unwrap();
        let htp = logits(&HtpBackend::new(2).unwrap(), &graph, &whole);
        assert_eq!(logits(&HtpBackend::new(2).unwrap(), &graph, &grouped), htp);
        assert_eq!(logits(&ReferenceBackend, &graph, &grouped), logits(&ReferenceBackend, &graph, &whole));
        let with_base_encodings = Arc::new(member(&context, seed));
        assert_ne!(logits(&HtpBackend::new(2).unwrap(), &graph, &with_base_encodings), htp, "the cut has to show");

        let FileInfo::Section(info) = FileInfo::read(bytes(&alone), Verify::Headers).unwrap() else { panic!() };
        assert_eq!((info.meta.section_type, info.meta.group.as_deref()), (SectionType::UpdatableWeights, Some("chat")));
        assert!(info.meta.encodings.is_empty() && info.meta.io.is_empty() && !info.updated_tensors.is_empty());
    }
    let FileInfo::Section(info) = FileInfo::read(bytes(&shared), Verify::Headers).unwrap() else { panic!() };
    assert_eq!((info.meta.section_type, info.meta.name.as_str()), (SectionType::UpdatableQuantParam, "chat"));
    assert_eq!((info.meta.encodings.len(), info.updated_tensors.len()), (own.len(), 0));
}

// Broken if a switch inside a group, out of it or into another one leaves anything of what ran before.
#[test]
fn a_switch_leaves_nothing_behind() {
    let graph = quantized(&float("all", 3));
    let context = context([graph.clone()]);
    let [chat, code] = [("chat", 0.5), ("code", 0.25)]
        .map(|(name, shrink)| context.load_group(group(&context, name, encodings(&graph, shrink)).into()).unwrap());
    let of = |seed, group: &Arc<AdapterGroup>| {
        context.load_grouped_section(weights(&context, seed, group.name()).into(), group).unwrap()
    };
    let own = Arc::new(member(&context, 7).with_encodings(encodings(&graph, 0.75)).unwrap());
    let some = Arc::new(member(&context, 8).with_encodings(encodings(&graph, 0.6).drain(..4)).unwrap());
    // Without encodings, and of a context that lists its tensors otherwise.
    let names = std::iter::once("a tensor".to_owned()).chain(context.updatable().iter().cloned()).collect();
    let values = random_values(&context, 9, RANK, &["layers"]);
    let elsewhere = Arc::new(Adapter::new("elsewhere", names, values).unwrap());
    let of_groups = [of(3, &chat), of(4, &chat), of(3, &code), context.base_of_group(&code).unwrap()];
    let all: Vec<Arc<Adapter>> = of_groups.into_iter().chain([own, some, elsewhere]).collect();
    let backend = HtpBackend::new(1).unwrap();
    let alone: Vec<Vec<f32>> = all.iter().map(|adapter| logits(&backend, &graph, adapter)).collect();
    assert!((1..all.len()).all(|i| alone[..i].iter().all(|other| *other != alone[i])), "each shows");
    let base = Runner::new(&backend, &graph).run(&IDS, None, 1.0);
    let mut runner = Runner::new(&backend, &graph);
    let mut rng = Rng(5);
    for i in 0..300 {
        let next = (rng.next() % (all.len() as u64 + 1)) as usize;
        let adapter = all.get(next).cloned();
        assert_eq!(&runner.run(&IDS, adapter, 1.0), alone.get(next).unwrap_or(&base), "switch {i} to {next}");
    }
}

// Broken if a runner keeps what it ran with alive, or takes another adapter or group for one that is gone.
#[test]
fn what_ran_before_gives_its_memory_back() {
    let graph = quantized(&float("all", 3));
    let context = context([graph.clone()]);
    let own = |shrink| Arc::new(member(&context, 7).with_encodings(encodings(&graph, shrink)).unwrap());
    let of_group = |shrink| {
        let group = AdapterGroup::new("chat", Arc::clone(context.updatable()), encodings(&graph, shrink)).unwrap();
        Arc::new(member(&context, 7).in_group(Arc::new(group)))
    };
    let backend = HtpBackend::new(1).unwrap();
    let mut runner = Runner::new(&backend, &graph);
    for shrink in [0.75, 0.5, 0.25] {
        for adapter in [own(shrink), of_group(shrink)] {
            let (alone, weak) = (logits(&backend, &graph, &adapter), Arc::downgrade(&adapter));
            let group = adapter.group().map(Arc::downgrade);
            assert_eq!(runner.run(&IDS, Some(adapter), 1.0), alone);
            runner.run(&IDS, None, 1.0);
            assert!(weak.upgrade().is_none() && group.is_none_or(|group| group.upgrade().is_none()));
        }
    }
}

// Broken if parts that are applied one after the other mean something else than loaded together, if weights run with the
// base's encodings or another group's, or if what is refused changes what was applied.
#[test]
fn parts_are_applied_in_their_order() {
    let graph = quantized(&float("all", 3));
    let context = context([graph.clone(), renamed(&graph, "token")]);
    let name = "model.layers.0.input_layernorm";
    let scale = |of: &str| match context.encoding(of, name) {
        Some(Encoding::ScaleOffset { scale, .. }) => scale,
        other => panic!("{other:?}"),
    };
    let base = [scale("model"), scale("token")];
    let chat = group(&context, "chat", encodings(&graph, 0.5));
    let refused = |graph, section: Vec<u8>, want: &str| {
        let before = ["model", "token"].map(|graph| context.adapter(graph).map(|adapter| Arc::as_ptr(&adapter)));
        let error = context.apply_section(graph, section.into()).expect_err(want);
        assert_eq!(error.to_string(), want);
        assert_eq!(["model", "token"].map(|graph| context.adapter(graph).map(|a| Arc::as_ptr(&a))), before);
    };
    let missing =
        "section \"adapter 3\" has weights only: it needs the encodings of group \"chat\", whose section is not loaded";
    refused(None, weights(&context, 3, "chat"), missing);

    let applied = context.apply_section(Some("model"), bytes(&chat)).unwrap();
    assert_eq!((applied.n_tensors(), scale("model"), scale("token")), (0, base[0] * 0.5, base[1]));
    refused(None, weights(&context, 3, "chat"), missing);
    let first = context.apply_section(Some("model"), weights(&context, 3, "chat").into()).unwrap();
    assert_eq!((first.n_targets() > 0, scale("model"), scale("token")), (true, base[0] * 0.5, base[1]));
    assert!(context.adapter("token").is_none());

    let group = Arc::clone(context.apply_section(None, bytes(&chat)).unwrap().group().unwrap());
    for seed in [3, 4] {
        let member = context.apply_section(None, weights(&context, seed, "chat").into()).unwrap();
        assert!(Arc::ptr_eq(member.group().unwrap(), &group), "a switch inside a group touches no encoding");
        assert_eq!(scale("token"), base[1] * 0.5);
    }
    let foreign = "adapter \"adapter 3\" belongs to group \"code\", the encodings are those of group \"chat\"";
    refused(None, weights(&context, 3, "code"), foreign);
    context.apply_section(None, context.section(&member(&context, 3)).unwrap().into()).unwrap();
    assert_eq!(scale("model"), base[0]);
    refused(None, weights(&context, 3, "chat"), missing);
}

/// `graph` under another name.
fn renamed(graph: &Graph, name: &str) -> Graph {
    changed(graph, name, |tensor| tensor)
}

/// `graph` under the name `name`, its tensors changed by `change`.
fn changed(graph: &Graph, name: &str, change: impl Fn(Tensor) -> Tensor) -> Graph {
    let mut other = Graph::new(name);
    graph.tensors().iter().for_each(|tensor| _ = other.add_tensor(change(tensor.clone())).unwrap());
    graph.nodes().iter().for_each(|node| other.add_node(node.clone()).unwrap());
    graph.metadata().iter().for_each(|(key, value)| other.set_metadata(key, value));
    other
}

// Broken if an output lies on another grid than the one the library tells the client, whoever brings the encoding.
#[test]
fn outputs_are_on_the_grid_that_the_context_names() {
    let own = |scale: f32| {
        let encoding = Encoding::ScaleOffset { bitwidth: 16, scale, offset: -32768 };
        TensorEncoding { data_type: DataType::UFixedPoint16, encoding }
    };
    let graph = changed(&quantized(&float("all", 3)), "model", |tensor| match tensor.name.as_str() {
        "logits" => {
            let TensorEncoding { data_type, encoding } = own(0.01);
            let tensor_type = tensor.tensor_type.updateable();
            Tensor { tensor_type, data_type, encoding: Some(encoding), ..tensor }
        }
        _ => tensor,
    });
    let context = context([graph.clone()]);
    let with_own = member(&context, 3).with_encodings([("logits".to_owned(), own(0.07))]).unwrap();
    let chat = group(&context, "chat", vec![("logits".to_owned(), own(0.11))]);
    let sections = [context.section(&with_own).unwrap(), chat, weights(&context, 3, "chat")];
    for (section, want) in sections.into_iter().zip([0.07_f32, 0.11, 0.11]) {
        let adapter = context.apply_section(None, section.into()).unwrap();
        let Some(Encoding::ScaleOffset { scale, .. }) = context.encoding("model", "logits") else { panic!() };
        assert_eq!(scale, want);
        let backend = HtpBackend::new(1).unwrap();
        for values in [logits(&backend, &graph, &adapter), logits(&ReferenceBackend, &graph, &adapter)] {
            let off = |value: &f32| (value / scale - (value / scale).round()).abs();
            assert!(values.iter().all(|value| off(value) < 1e-3), "{values:?} is not on steps of {scale}");
            assert!(values.iter().any(|value| *value != 0.0));
        }
    }
}

// Broken if a section replaces encodings that the model's quant_updatable_mode fixes, or if an adapter's weights then run with
// other encodings than the base's.
#[test]
fn the_mode_decides_what_a_section_may_replace() {
    let encodings = encodings(&quantized(&float("all", 3)), 0.5);
    for mode in ["none", "adapter_only"] {
        let graph = quantized(&float(mode, 3));
        let context = context([graph.clone()]);
        let bring = member(&context, 3).with_encodings(encodings.clone()).unwrap();
        let error = chain(&context.section(&bring).unwrap_err());
        assert!(error.contains("encoding of tensor model.") && error.contains("quant_updatable_mode all"), "{error}");
        let shared = AdapterGroup::new("chat", Arc::clone(context.updatable()), encodings.clone()).unwrap();
        assert!(matches!(context.group_section(&shared), Err(SectionError::Encoding { .. })));
        let section = context.section(&member(&context, 3)).unwrap();
        let adapter = context.apply_section(None, section.into()).unwrap();
        for tensor in graph.tensors() {
            let now = context.encoding("model", &tensor.name);
            assert_eq!(format!("{now:?}"), format!("{:?}", tensor.encoding));
        }
        assert_backends_agree(&graph, &adapter);
    }
}

fn assert_backends_agree(graph: &Graph, adapter: &Arc<Adapter>) {
    let (htp, reference) =
        (logits(&HtpBackend::new(1).unwrap(), graph, adapter), logits(&ReferenceBackend, graph, adapter));
    let distance: f32 = htp.iter().zip(&reference).map(|(a, b)| (a - b).powi(2)).sum();
    assert!(distance < 1e-6 * reference.iter().map(|v| v * v).sum::<f32>(), "{distance}");
}

// Broken if an adapter cannot shift a grid that lies around zero in the base, so that the base alone needs no sums of rows.
#[test]
fn an_adapter_may_shift_what_the_base_has_around_zero() {
    let activations = Activations { bits: 8, schema: Schema::Symmetric, ..OPTIONS.activations };
    let graph = quantized_with(&float("all", 3), &QuantizeOptions { activations, ..OPTIONS });
    let shifted = encodings(&graph, 1.0).into_iter().map(|(name, own)| {
        let Encoding::ScaleOffset { bitwidth: 8, scale, offset: 0 } = own.encoding else { panic!("{own:?}") };
        let encoding = Encoding::ScaleOffset { bitwidth: 16, scale: scale / 256.0, offset: 9000 };
        (name, TensorEncoding { encoding, ..own })
    });
    let adapter = Arc::new(member(&context([graph.clone()]), 3).with_encodings(shifted).unwrap());
    assert_backends_agree(&graph, &adapter);
}

// Broken if parts that do not belong together run, or the message does not name both.
#[test]
fn what_does_not_belong_together_is_refused() {
    let graph = quantized(&float("all", 3));
    let context = context([graph.clone()]);
    let own = encodings(&graph, 0.5);
    let whole = context.section(&member(&context, 3).with_encodings(own.clone()).unwrap()).unwrap();
    let (chat, of_chat) = (group(&context, "chat", own.clone()), weights(&context, 3, "chat"));
    let loaded = context.load_group(bytes(&chat)).unwrap();
    let code = context.load_group(group(&context, "code", own.clone()).into()).unwrap();
    let narrow = AdapterGroup::new("chat", Arc::clone(context.updatable()), own.clone()).unwrap();
    let narrow = context.group_section(&narrow.for_graph(Some("model".to_owned()))).unwrap();
    let narrow = context.load_group(narrow.into()).unwrap();
    let text = |error: SectionError| chain(&error);
    let load = |section: &[u8]| text(context.load_section(bytes(section)).unwrap_err());
    let with = |section: &[u8], group| text(context.load_grouped_section(bytes(section), group).unwrap_err());
    let as_group = |section: &[u8]| text(context.load_group(bytes(section)).unwrap_err());
    let edited =
        |section: &[u8], from: &str, to: &str| splice(&context, section, |parts| replace(&mut parts[0].2, from, to));
    let cases = [
        (load(&of_chat), "needs the encodings of group \"chat\""),
        (load(&chat), "section \"chat\" is of type UPDATABLE_QUANT_PARAM, need UPDATABLE"),
        (with(&whole, &loaded), "section \"adapter 3\" is of type UPDATABLE, need UPDATABLE_WEIGHTS"),
        (with(&chat, &loaded), "is of type UPDATABLE_QUANT_PARAM, need UPDATABLE_WEIGHTS"),
        (as_group(&whole), "is of type UPDATABLE, need UPDATABLE_QUANT_PARAM"),
        (as_group(&of_chat), "is of type UPDATABLE_WEIGHTS, need UPDATABLE_QUANT_PARAM"),
        (with(&of_chat, &code), "belongs to group \"chat\", the encodings are those of group \"code\""),
        (with(&of_chat, &narrow), "section is for graph \"every graph\", asked for \"model\""),
        (load(&edited(&of_chat, "UPDATABLE_WEIGHTS", "UPDATABLE")), "group: found 1, need 0 with UPDATABLE"),
        (load(&edited(&of_chat, "\"group\":\"chat\",", "")), "group: found 0, need 1 with UPDATABLE_WEIGHTS"),
        (load(&edited(&of_chat, "UPDATABLE_WEIGHTS", "UPDATABLE_QUANT_PARAM")), "group: found 1, need 0"),
        (
            load(&edited(&whole, "\"graph\":null", "\"section_type\":\"UPDATABLE_QUANT_PARAM\",\"graph\":null")),
            "tensors",
        ),
        (load(&edited(&whole, "\"graph\":null", "\"group\":\"chat\",\"graph\":null")), "group: found 1, need 0"),
        (as_group(&edited(&chat, "\"rank\":0", "\"rank\":1")), "rank: found 1, need 0 with UPDATABLE_QUANT_PARAM"),
        (as_group(&edited(&chat, "UPDATABLE_QUANT_PARAM", "UPDATABLE_ALL")), "unknown variant `UPDATABLE_ALL`"),
        (as_group(&edited(&chat, "model.layers.0.input_layernorm\",\"encoding", "nowhere\",\"encoding")), "nowhere"),
    ];
    for (i, (error, want)) in cases.into_iter().enumerate() {
        assert!(error.contains(want), "case {i}: {error}\nneed {want}");
    }
    let with_encodings = splice(&context, &of_chat, |parts| {
        let json = String::from_utf8(parts[0].2.clone()).unwrap();
        let whole = FileInfo::read(bytes(&whole), Verify::Headers).unwrap();
        let FileInfo::Section(whole) = whole else { panic!() };
        let own = serde_json::to_string(&whole.meta.encodings).unwrap();
        parts[0].2 = json.replacen("\"io\":[]", &format!("\"io\":[],\"encodings\":{own}"), 1).into_bytes();
    });
    assert!(with(&with_encodings, &loaded).contains("encodings: found 9, need 0 with UPDATABLE_WEIGHTS"));

    // Of another context: another base, and the same base opened twice.
    let other = self::context([quantized(&float("all", 4))]);
    assert!(matches!(other.load_group(bytes(&chat)), Err(SectionError::Base { .. })));
    assert!(matches!(other.load_grouped_section(bytes(&of_chat), &loaded), Err(SectionError::Base { .. })));
    let again = self::context([graph.clone()]);
    assert!(matches!(again.load_grouped_section(bytes(&of_chat), &loaded), Err(SectionError::WrongContext { .. })));
    assert!(matches!(again.base_of_group(&loaded), Err(SectionError::WrongContext { .. })));
}

/// A folder with a float model, its quantized version as the DLC, and the weights of three adapters.
struct Project {
    dir: tempfile::TempDir,
    float: Graph,
    quantized: Graph,
}

const LIST: &str = "
use_case:
  - {name: one, weights: one.safetensors, encodings: one.encodings}
  - {name: two, weights: two.safetensors, encodings: two.encodings}
  - {name: three, weights: three.safetensors, encodings: three.encodings}
group:
  - {name: chat, members: [two, one]}
share_adapters_between_graphs: Yes
";

impl Project {
    fn new(mode: &str) -> Project {
        let dir = tempfile::tempdir().unwrap();
        let float = float(mode, 3);
        let quantized = quantized(&float);
        write_dlc(&dir.path().join("model.dlc"), &quantized).unwrap();
        let context = context([float.clone()]);
        for (seed, name, module) in [(1, "one", "q_proj"), (2, "two", "down_proj"), (3, "three", "layers")] {
            write_weights(&dir.path().join(format!("{name}.safetensors")), &context, seed, module);
            let none = r#"{"version": "1.0.0", "param_encodings": []}"#;
            std::fs::write(dir.path().join(format!("{name}.encodings")), none).unwrap();
        }
        std::fs::write(dir.path().join("list.yaml"), LIST).unwrap();
        Project { dir, float, quantized }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn calibrate(&self, list: &str) -> Vec<(String, Vec<String>, usize)> {
        std::fs::write(self.path("list.yaml"), list).unwrap();
        let mut placed = PlacedAdapters::as_imported(&self.path("list.yaml"));
        let reports = self.observe(&mut placed).unwrap();
        placed.write().unwrap();
        reports.into_iter().map(|report| (report.name, report.members, report.tensors)).collect()
    }

    /// All of calibration but the writing.
    fn observe(&self, placed: &mut PlacedAdapters) -> Result<Vec<AdapterReport>, Error> {
        with_tools(|tools, windows| {
            calibrate_adapters(&self.float, &self.quantized, placed, windows, OPTIONS.activations, tools)
        })
    }

    fn generate(&self) -> Result<Report, String> {
        let options = GenerateOptions {
            dlc_path: self.path("model.dlc"),
            output_dir: self.path("out"),
            binary_file: "tiny".to_owned(),
            ar: vec![8, 1],
            cl: vec![32],
            num_splits: 1,
            adapter_weight_config: Some(self.path("list.yaml")),
            lora_weight_sharing: false,
        };
        generate(&options, &mut |_| {}).map_err(|error| chain(&error))
    }

    fn section(&self, name: &str) -> Bytes {
        std::fs::read(self.path("out").join(name)).unwrap().into()
    }
}

fn write_weights(path: &Path, context: &Context, seed: u64, module: &str) {
    let values = random_values(context, seed, RANK, &[module]);
    let floats = |(name, panels): &(String, Panels)| {
        let (n, k) = (panels.layout().n(), panels.layout().k());
        let mut floats = vec![0.0; n * k];
        floats.chunks_exact_mut(k).enumerate().for_each(|(i, row)| panels.view().dequantize_row(i, row));
        (name.clone(), [n, k], floats.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    };
    let parts: Vec<(String, [usize; 2], Vec<u8>)> = values.iter().map(floats).collect();
    let views = parts.iter().map(|(name, dims, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, dims.to_vec(), bytes).unwrap())
    });
    let metadata: Option<HashMap<String, String>> = None;
    std::fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

/// From the smallest to the largest value that an encoding holds.
fn range(encoding: &Encoding) -> (f64, f64) {
    let Encoding::ScaleOffset { bitwidth, scale, offset } = *encoding else { panic!("one scale") };
    let (scale, offset) = (f64::from(scale), f64::from(offset));
    (offset * scale, (f64::from((1u32 << bitwidth) - 1) + offset) * scale)
}

// Broken if the encodings of a group do not hold what its members hold, are wider than that, leave the members' own behind,
// or do not arrive in the sections; or if an adapter outside of the group loses its own.
#[test]
fn a_group_is_calibrated_together_and_stored_once() {
    let project = Project::new("all");
    let done = project.calibrate(&LIST.replace("group:\n  - {name: chat, members: [two, one]}\n", ""));
    assert_eq!(done, ["one", "two", "three"].map(|name| (name.to_owned(), vec![], 9)));
    project.generate().unwrap();
    let context = Context::open(&project.path("out/tiny.bin"), &Default::default()).unwrap();
    let [one, two, three] =
        ["one", "two", "three"].map(|name| context.load_section(project.section(&format!("tiny_{name}.bin"))).unwrap());
    let sizes = |report: &Report| report.sections.iter().map(|s| (s.adapter.clone(), s.size_bytes)).collect();
    let separate: HashMap<String, u64> = sizes(&project.generate().unwrap());

    let done = project.calibrate(LIST);
    let members = ["one", "two"].map(str::to_owned).to_vec();
    assert_eq!(done, [("three".to_owned(), vec![], 9), ("chat".to_owned(), members, 9)]);
    let report = project.generate().unwrap();
    let types: Vec<_> = report.sections.iter().map(|s| (s.adapter.as_str(), s.section_type)).collect();
    let (whole, part) = (SectionType::Updatable, SectionType::UpdatableWeights);
    let quant = SectionType::UpdatableQuantParam;
    assert_eq!(types, [("chat", quant), ("default_adapter", whole), ("one", part), ("two", part), ("three", whole)]);
    let together = sizes(&report);
    assert!(together["one"] + together["two"] + together["chat"] < separate["one"] + separate["two"]);

    let chat = context.load_group(project.section("tiny_chat.bin")).unwrap();
    let mut differ = 0;
    for ((name, group), ((_, one), (_, two))) in chat.encodings().zip(one.encodings().zip(two.encodings())) {
        let [group, one, two] = [group, one, two].map(|own| range(&own.encoding));
        let union = (one.0.min(two.0), one.1.max(two.1));
        let step = 2.0 * (union.1 - union.0) / 65535.0;
        assert!((group.0 - union.0).abs() <= step && (group.1 - union.1).abs() <= step, "{name}: {group:?} {union:?}");
        differ += usize::from(one != two);
    }
    assert!(differ > 4, "the members have to differ for the union to be something");
    for name in ["one", "two"] {
        let member = context.load_grouped_section(project.section(&format!("tiny_{name}.bin")), &chat).unwrap();
        assert_eq!((member.name(), member.n_targets() > 0), (name, true));
    }
    let again = context.load_section(project.section("tiny_three.bin")).unwrap();
    assert_eq!(context.section(&again).unwrap(), context.section(&three).unwrap());
}

// Guards: calibration keeps what an encodings file says of weights, also in 2.0.0, which does not tell them from computed
// tensors, and replaces what it says of these.
#[test]
fn weights_keep_their_encodings() {
    let project = Project::new("all");
    let weight = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let scales = [0.5, 0.25, 0.125, 0.0625];
    let json = serde_json::json!({"version": "2.0.0", "encodings": [
        {"name": weight, "output_dtype": "int8", "axis": 0, "y_scale": scales},
        {"name": "model.layers.0.input_layernorm", "output_dtype": "uint16", "y_scale": 0.5, "y_zero_point": 7},
    ]});
    // A member of a group, whose computed tensors are in the group's file, and an adapter of its own.
    for (name, n_computed) in [("one", 0), ("three", 9)] {
        let path = project.path(&format!("{name}.encodings"));
        std::fs::write(&path, json.to_string()).unwrap();
        project.calibrate(LIST);
        let file = EncodingsFile::open(&path).unwrap();
        let kept = file.find(weight).unwrap();
        let Numbers::Integer(integers) = &kept.numbers else { panic!("{kept:?}") };
        assert_eq!((kept.is_param, integers.bits, &integers.scales[..]), (Some(true), 8, &scales[..]));
        let computed = file.tensors.iter().filter(|tensor| tensor.is_param == Some(false)).count();
        assert_eq!((computed, file.tensors.len()), (n_computed, n_computed + 1), "{name}");
    }
}

// Guards: an adapter that cannot be calibrated leaves the files of those before it as they are.
#[test]
fn nothing_is_written_before_all_are_calibrated() {
    let project = Project::new("all");
    let files =
        || ["one", "two", "three", "chat"].map(|name| std::fs::read(project.path(&format!("{name}.encodings"))).ok());
    let before = files();
    let weights = std::fs::read(project.path("three.safetensors")).unwrap();
    std::fs::write(project.path("three.safetensors"), "nothing").unwrap();
    let mut placed = PlacedAdapters::as_imported(&project.path("list.yaml"));
    let error = chain(&project.observe(&mut placed).unwrap_err());
    assert!(error.contains("three.safetensors"), "{error}");
    assert!(files() == before);

    std::fs::write(project.path("three.safetensors"), weights).unwrap();
    project.observe(&mut placed).unwrap();
    assert!(files() == before);
    placed.write().unwrap();
    assert!(files().iter().zip(&before).all(|(now, before)| now.is_some() && now != before));
}

// Guards: what is found for an adapter is not written where the generator does not look; a member of a group needs no file.
#[test]
fn an_adapter_without_a_place_for_encodings_is_refused() {
    let project = Project::new("all");
    for (name, fits) in [("three", false), ("one", true)] {
        let list = LIST.replace(&format!(", encodings: {name}.encodings"), "");
        std::fs::write(project.path("list.yaml"), list).unwrap();
        let done = project.observe(&mut PlacedAdapters::as_imported(&project.path("list.yaml")));
        let refused = done.map_err(|error| chain(&error)).err();
        assert_eq!(refused.is_none(), fits, "{name}: {refused:?}");
        assert!(refused.is_none_or(|error| error.contains("adapter three has no key encodings")), "{name}");
    }
}

// Guards: the encodings of a group that the user keeps elsewhere are not replaced; the message names group and file.
#[test]
fn a_file_outside_of_the_lists_folder_is_not_replaced() {
    let project = Project::new("all");
    std::fs::create_dir(project.path("lists")).unwrap();
    for name in
        ["one", "two", "three"].iter().flat_map(|name| [format!("{name}.safetensors"), format!("{name}.encodings")])
    {
        std::fs::copy(project.path(&name), project.path("lists").join(name)).unwrap();
    }
    let own = project.path("own.encodings");
    std::fs::write(&own, "the user's").unwrap();
    let list = project.path("lists/list.yaml");
    for (path, is_own) in
        [(own.as_path(), true), (Path::new("../own.encodings"), true), (&project.path("lists/chat.encodings"), false)]
    {
        std::fs::write(&list, LIST.replace("[two, one]", &format!("[two, one], encodings: {path:?}"))).unwrap();
        let done = project.observe(&mut PlacedAdapters::as_imported(&list));
        let refused = done.map_err(|error| chain(&error)).err();
        assert_eq!(refused.is_some(), is_own, "{path:?}: {refused:?}");
        assert!(
            refused.is_none_or(|error| error.contains("group chat") && error.contains("own.encodings")),
            "{path:?}"
        );
    }
}

// Broken if a group that cannot be right becomes a file, or the message does not say which and why.
#[test]
fn groups_that_cannot_be_are_refused() {
    let project = Project::new("all");
    let refused = |project: &Project, from: &str, to: &str, want: &str| {
        assert!(LIST.contains(from), "{from}");
        std::fs::write(project.path("list.yaml"), LIST.replacen(from, to, 1)).unwrap();
        let error = project.generate().expect_err(want);
        assert!(error.contains(want), "{error}\nneed {want}");
        assert!(!project.path("out").exists(), "{want}: something was written");
    };
    refused(&project, "name: chat", "name: chat", "chat.encodings: cannot be read");
    refused(&project, "name: chat", "name: one", "group \"one\" has the name of a use case");
    refused(&project, "name: chat", "name: a/b", "group \"a/b\" becomes part of a file name");
    refused(&project, "[two, one]", "[two, on]", "group \"chat\" has the member \"on\", need one of one, two, three");
    refused(&project, "[two, one]", "[]", "group \"chat\" has no members");
    refused(&project, "[two, one]", "[two, two]", "the member \"two\", which is in group \"chat\" already");
    refused(&project, "share", "  - {name: chat, members: [three]}\nshare", "group \"chat\" is there twice");
    refused(&project, "share", "  - {name: x, members: [one]}\nshare", "\"one\", which is in group \"chat\" already");
    refused(&project, "members", "member", "member");
    project.calibrate(LIST);
    let text = std::fs::read_to_string(project.path("chat.encodings")).unwrap();
    std::fs::copy(project.path("chat.encodings"), project.path("one.encodings")).unwrap();
    let own = "use case \"one\" is in group \"chat\" and brings its own encoding of model.layers.0.input_layernorm";
    refused(&project, "name: chat", "name: chat", own);
    std::fs::copy(project.path("two.encodings"), project.path("one.encodings")).unwrap();
    std::fs::write(project.path("chat.encodings"), text.replace("model.norm", "model.nerm")).unwrap();
    refused(&project, "name: chat", "name: chat", "model.nerm");

    let fixed = Project::new("adapter_only");
    refused(&fixed, "name: chat", "name: chat", "group \"chat\" needs encodings that sections can update, the DLC has");
}
