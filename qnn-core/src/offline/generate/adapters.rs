//! Adapters beside context binaries: `lora_output_files.yaml` in, one section file per adapter and context out.
//!
//! ```text
//! yaml ─► for each use case: weights (safetensors) + encodings (AIMET JSON) ─► panels, checked against the model
//! context binaries ─► for each: default_adapter and every use case ─► the tensors that it has ─► <context>_<name>.bin
//! ```
//!
//! Use cases of a group have weights only; the encodings of the group are a section of their own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::GenerateError;
use crate::{
    adapter::{Adapter, AdapterGroup, Description, Slot, TensorEncoding},
    binary::{BinaryError, SectionType, Verify},
    context::{Context, OpenOptions, SectionError, Updatable, encodings::fits},
    encoding::Encoding,
    error::Error,
    graph::Graph,
    map::Bytes,
    offline::{
        ImportError,
        encodings::{EncodingsError, EncodingsFile, Numbers, computed_encoding},
        equalize::{SCALES_KEY, fingerprint},
        lora::{
            self, Group, LoraError, MODE_KEY, ParamEncodings, WeightEncoding,
            groups::DEFAULT_ADAPTER,
            values::{self, Matrix},
        },
        safetensors::{LayoutError, SafetensorsFile},
        source::{ElementFormat, SourceTensor},
    },
    tensor::{Panels, Tensor},
    types::DataType,
};

mod list;

pub(in crate::offline) use list::{Listed, ListedAdapter, listed_adapters, listed_in};
use list::{OutputFiles, UseCase};

/// Why adapters cannot be made sections.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum AdapterError {
    #[error("{0}")]
    Yaml(String),
    #[error("cannot be read")]
    Io(#[from] std::io::Error),
    #[error("{have_bytes} bytes, at most {MAX_TEXT_BYTES} are read")]
    TooLarge { have_bytes: usize },
    #[error("use case {name:?}: the name {why}")]
    Name { name: String, why: &'static str },
    #[error("group {name:?} {why}")]
    Group { name: String, why: String },
    #[error(
        "group {group:?} needs encodings that sections can update, the DLC has quant_updatable_mode {mode}: convert it with all"
    )]
    GroupMode { group: String, mode: String },
    #[error(
        "use case {name:?} is in group {group:?} and brings its own encoding of {tensor}: make the group's with qairt-quantizer --lora_output_files"
    )]
    OwnEncodings { name: String, group: String, tensor: String },
    #[error("group {group:?} has the encoding of {tensor}, a weight, which is its adapter's own")]
    GroupWeight { group: String, tensor: String },
    #[error("use case {name:?} is for graph {have:?}, the DLC has {want:?}")]
    Graph { name: String, have: String, want: String },
    #[error("the DLC has no updatable tensors: convert it with --lora_weight_list")]
    NothingUpdatable,
    #[error("no tensors: an adapter has to change something")]
    Empty,
    #[error("key {key} is not supported")]
    Key { key: &'static str },
    #[error("metadata {key} is {have:?}, need {want}")]
    Metadata { key: &'static str, have: String, want: &'static str },
    #[error("encoding of {tensor}: {have}, need {want}")]
    Encoding { tensor: String, have: String, want: DataType },
    #[error("two encodings of {tensor}")]
    Twice { tensor: String },
    #[error("encoding of computed tensor {tensor}: {have}, need {want}")]
    Computed { tensor: String, have: String, want: String },
    #[error(transparent)]
    Encodings(#[from] EncodingsError),
    #[error(transparent)]
    Lora(Box<LoraError>),
    #[error(transparent)]
    Safetensors(#[from] LayoutError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Section(#[from] SectionError),
    #[error(transparent)]
    Binary(#[from] BinaryError),
}

impl From<LoraError> for AdapterError {
    fn from(why: LoraError) -> AdapterError {
        AdapterError::Lora(Box::new(why))
    }
}

/// A section file that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct SectionReport {
    /// Where it is.
    pub path: PathBuf,
    /// The adapter's name, or the group's.
    pub adapter: String,
    /// What is in it.
    pub section_type: SectionType,
    /// The one graph that it is for; `None` is the whole context.
    pub graph: Option<String>,
    /// Columns of the strength tensor that the adapter uses.
    pub rank: usize,
    /// Layers that it changes in this context.
    pub n_targets: usize,
    /// Size of the file.
    pub size_bytes: u64,
    /// What the numbers and their scales take by themselves: the part of the size that cannot be avoided.
    pub weights_bytes: u64,
    /// The same in the kernels' panels, whose rows come in sixteens.
    pub panels_bytes: u64,
}

/// All adapters of a model, ready to be spread over its context binaries.
pub(super) struct Adapters {
    share: bool,
    groups: Vec<PreparedGroup>,
    adapters: Vec<Prepared>,
}

/// The encodings of a group for the whole model.
struct PreparedGroup {
    name: String,
    encodings: Vec<(String, TensorEncoding)>,
}

/// One adapter for the whole model.
struct Prepared {
    name: String,
    description: Description,
    values: Vec<(String, Panels)>,
    encodings: Vec<(String, TensorEncoding)>,
    /// Name of its group.
    group: Option<String>,
}

impl Adapters {
    /// Reads the files that `yaml` names and packs their values for `model`. Everything that can be refused is refused here.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub(super) fn read(yaml: &Path, model: &Graph) -> Result<Adapters, GenerateError> {
        let in_yaml = refused(yaml);
        let files = OutputFiles::read(yaml).map_err(&in_yaml)?;
        let updatable = Updatable::of(std::slice::from_ref(model)).map_err(|why| in_yaml(why.into()))?;
        if updatable.names.is_empty() {
            return Err(in_yaml(AdapterError::NothingUpdatable));
        }
        files.check_names(model).map_err(&in_yaml)?;
        let group_of = files.group_of().map_err(&in_yaml)?;
        let folder = yaml.parent().unwrap_or(Path::new(""));
        let none = Prepared {
            name: DEFAULT_ADAPTER.to_owned(),
            description: Description::default(),
            values: Vec::new(),
            encodings: Vec::new(),
            group: None,
        };
        let mut adapters = vec![none];
        for case in &files.use_case {
            let prepared = prepare(case, folder, &updatable, model)?;
            let group = group_of.get(case.name.as_str()).map(|group| group.name.clone());
            if let (Some(group), Some((tensor, _))) = (&group, prepared.encodings.first()) {
                let (name, group, tensor) = (case.name.clone(), group.clone(), tensor.clone());
                return Err(in_yaml(AdapterError::OwnEncodings { name, group, tensor }));
            }
            adapters.push(Prepared { group, ..prepared });
        }
        let groups = files.group.iter().map(|group| prepare_group(group, folder, model)).collect::<Result<_, _>>()?;
        Ok(Adapters { share: files.share_adapters_between_graphs, groups, adapters })
    }

    /// Writes the sections of one context binary beside it.
    ///
    /// # Errors
    /// What reading the context or writing a file says.
    pub(super) fn write(&self, context_path: &Path) -> Result<Vec<SectionReport>, Error> {
        let options = OpenOptions { use_mmap: true, verify: Verify::Headers };
        let context = Context::open(context_path, &options)?;
        let mut reports = Vec::new();
        for graph in &self.graphs(context.graphs()) {
            let place = |name: &str| place(context_path, *graph, name);
            let mut groups = Vec::new();
            for prepared in &self.groups {
                let path = place(&prepared.name);
                let group = prepared
                    .part(&context, *graph)
                    .map_err(|why| Error::Section { path: path.clone(), why: Box::new(why) })?;
                let size_bytes = context.write_group_file(&group, &path)?.size_bytes;
                reports.push(SectionReport::of_group(&group, path, size_bytes));
                groups.push(Arc::new(group));
            }
            for prepared in &self.adapters {
                let path = place(&prepared.name);
                let adapter = prepared
                    .part(&context, *graph, &groups)
                    .map_err(|why| Error::Section { path: path.clone(), why: Box::new(why) })?;
                let size_bytes = context.write_section_file(&adapter, &path)?.size_bytes;
                reports.push(SectionReport::of(&adapter, path, size_bytes));
            }
        }
        Ok(reports)
    }

    /// Where the sections of a context binary with these graphs go.
    pub(super) fn places<'a>(&self, context_path: &Path, graphs: impl Iterator<Item = &'a str>) -> Vec<PathBuf> {
        let groups = self.groups.iter().map(|group| &group.name);
        let names: Vec<&String> = groups.chain(self.adapters.iter().map(|adapter| &adapter.name)).collect();
        let graphs = self.graphs(graphs);
        graphs.iter().flat_map(|graph| names.iter().map(|name| place(context_path, *graph, name))).collect()
    }

    /// The graphs that have sections of their own; `None` is one section for all.
    fn graphs<'a>(&self, graphs: impl Iterator<Item = &'a str>) -> Vec<Option<&'a str>> {
        if self.share { vec![None] } else { graphs.map(Some).collect() }
    }
}

/// Where a section of the context binary at `context_path`, or of one of its graphs, goes.
fn place(context_path: &Path, graph: Option<&str>, name: &str) -> PathBuf {
    let stem = context_path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("context");
    context_path.with_file_name(format!("{}_{name}.bin", graph.unwrap_or(stem)))
}

impl SectionReport {
    fn of(adapter: &Adapter, path: PathBuf, size_bytes: u64) -> SectionReport {
        let in_group = adapter.group().is_some();
        SectionReport {
            path,
            adapter: adapter.name().to_owned(),
            section_type: if in_group { SectionType::UpdatableWeights } else { SectionType::Updatable },
            graph: adapter.graph().map(str::to_owned),
            rank: adapter.rank(),
            n_targets: adapter.n_targets(),
            size_bytes,
            weights_bytes: adapter.values().map(|(_, panels)| weights_bytes(panels)).sum(),
            panels_bytes: adapter.size_bytes(),
        }
    }

    fn of_group(group: &AdapterGroup, path: PathBuf, size_bytes: u64) -> SectionReport {
        SectionReport {
            path,
            adapter: group.name().to_owned(),
            section_type: SectionType::UpdatableQuantParam,
            graph: group.graph().map(str::to_owned),
            rank: 0,
            n_targets: 0,
            size_bytes,
            weights_bytes: 0,
            panels_bytes: 0,
        }
    }
}

impl PreparedGroup {
    /// The encodings of the tensors that `context` has, for one graph of it or all.
    fn part(&self, context: &Context, graph: Option<&str>) -> Result<AdapterGroup, SectionError> {
        let group = AdapterGroup::new(&self.name, Arc::clone(context.updatable()), present(&self.encodings, context))
            .map_err(impossible)?;
        Ok(group.for_graph(graph.map(str::to_owned)))
    }
}

/// Those of `encodings` whose tensor a graph of `context` has.
fn present(encodings: &[(String, TensorEncoding)], context: &Context) -> Vec<(String, TensorEncoding)> {
    let has = |tensor: &str| context.graphs().filter_map(|name| context.graph(name)).any(|g| g.find(tensor).is_some());
    encodings.iter().filter(|(name, _)| has(name)).cloned().collect()
}

fn impossible((tensor, have): (String, String)) -> SectionError {
    SectionError::Encoding { tensor, have, want: "one that a computed tensor can have".to_owned() }
}

impl Prepared {
    /// The part of the adapter that `context` has, for one graph of it or all; `groups` are those of the context.
    fn part(
        &self,
        context: &Context,
        graph: Option<&str>,
        groups: &[Arc<AdapterGroup>],
    ) -> Result<Adapter, SectionError> {
        let names = Arc::clone(context.updatable());
        let values = self.values.iter().filter(|(name, _)| names.binary_search(name).is_ok());
        let adapter = Adapter::new(&self.name, Arc::clone(&names), values.cloned())
            .map_err(|tensor| SectionError::UnknownTensor { tensor })?;
        let graph = graph.map(str::to_owned);
        let adapter = adapter.described(Description { graph, ..self.description.clone() });
        let own_group = |name: &String| groups.iter().find(|group| group.name() == name);
        match self.group.as_ref().and_then(own_group) {
            Some(group) => Ok(adapter.in_group(Arc::clone(group))),
            None => adapter.with_encodings(present(&self.encodings, context)).map_err(impossible),
        }
    }
}

fn prepare(case: &UseCase, folder: &Path, updatable: &Updatable, model: &Graph) -> Result<Prepared, GenerateError> {
    let encodings_path = case.encodings.as_ref().map(|path| folder.join(path));
    let (scales, encodings) = match &encodings_path {
        None => (HashMap::new(), Vec::new()),
        Some(path) => read_encodings(path, updatable, model).map_err(refused(path))?,
    };
    let path = folder.join(&case.weights);
    let read = || -> Result<Prepared, AdapterError> {
        let file = SafetensorsFile::parse(Bytes::map_file(&path)?)?;
        if file.metadata(SCALES_KEY).map(str::to_owned) != fingerprint(model.metadata()) {
            return Err(LoraError::OtherScales.into());
        }
        let mut values = Vec::new();
        for name in file.names() {
            values.push((name.to_owned(), read_value(&file, name, updatable, scales.get(name).map(Vec::as_slice))?));
        }
        values.sort_by(|a, b| a.0.cmp(&b.0));
        if values.is_empty() {
            return Err(AdapterError::Empty);
        }
        updatable.check(&values)?;
        let rank = updatable.rank_of(&values);
        let description = description(&file, &case.name, rank)?;
        if description.rank > updatable.max_rank {
            return Err(SectionError::AdapterRank { have: description.rank, want: updatable.max_rank }.into());
        }
        Ok(Prepared { name: case.name.clone(), description, values, encodings, group: None })
    };
    read().map_err(refused(&path))
}

/// The encodings of a group, which has to bring some and nothing else.
fn prepare_group(group: &Group, folder: &Path, model: &Graph) -> Result<PreparedGroup, GenerateError> {
    let path = group.file(folder);
    let read = || -> Result<PreparedGroup, AdapterError> {
        let name = group.name.clone();
        let updatable = model.ids_where(fits_any);
        if updatable.is_empty() {
            let mode = model.metadata().get(MODE_KEY).map_or("none", String::as_str).to_owned();
            return Err(AdapterError::GroupMode { group: name, mode });
        }
        let text = read_text(&path)?;
        let weights = ParamEncodings::from_json(&text, &|name| !is_computed(model, name))?;
        if let Some((tensor, _)) = weights.0.into_iter().next() {
            return Err(AdapterError::GroupWeight { group: name, tensor });
        }
        Ok(PreparedGroup { name, encodings: computed_encodings(&text, model)? })
    };
    read().map_err(refused(&path))
}

/// Whether a section may replace the encoding of `tensor` at all.
fn fits_any(tensor: &Tensor) -> bool {
    matches!(tensor.encoding, Some(Encoding::ScaleOffset { bitwidth, .. }) if fits(tensor, bitwidth).is_ok())
}

/// Adds the file.
fn refused(path: &Path) -> impl Fn(AdapterError) -> GenerateError {
    move |why| GenerateError::Adapter { path: path.to_owned(), why: Box::new(why) }
}

fn read_value(
    file: &SafetensorsFile,
    name: &str,
    updatable: &Updatable,
    scales: Option<&[f32]>,
) -> Result<Panels, AdapterError> {
    let unknown = || SectionError::UnknownTensor { tensor: name.to_owned() };
    let declared = updatable.data_type(name).ok_or_else(unknown)?;
    let stored = file.tensor(name).ok_or_else(unknown)?;
    let format = match stored.dtype {
        "F32" => ElementFormat::F32,
        "F16" => ElementFormat::F16,
        "BF16" => ElementFormat::Bf16,
        other => {
            let (what, supported) = (format!("tensor {name} of type {other}"), "F32, F16, BF16".to_owned());
            return Err(ImportError::Unsupported { what, supported }.into());
        }
    };
    let tensor = SourceTensor::new(name, stored.shape, format, stored.bytes)?;
    let (n, k, values) = (tensor.n(), tensor.k(), tensor.to_f32());
    let scales = match scales {
        Some([one]) => Some(vec![*one; n]),
        other => other.map(<[f32]>::to_vec),
    };
    let matrix = Matrix { name: name.to_owned(), n, k, values: &values };
    Ok(values::panels(&values::constant(&matrix, declared, scales.as_deref())?)?)
}

/// What the importer recorded about the adapter, or one slot for all columns.
fn description(file: &SafetensorsFile, name: &str, rank: usize) -> Result<Description, AdapterError> {
    let Some(text) = file.metadata(SLOTS) else {
        let slots = vec![Slot { name: name.to_owned(), columns: 0..rank, scaling: None }];
        return Ok(Description { rank, slots, ..Description::default() });
    };
    let refuse = |want| AdapterError::Metadata { key: SLOTS, have: text.to_owned(), want };
    let slots: Vec<lora::Slot> =
        serde_json::from_str(text).map_err(|_| refuse("a list of slots as qairt-lora-importer writes it"))?;
    if slots.iter().any(|slot| slot.columns[0] >= slot.columns[1] || slot.columns[1] > u32::MAX as usize) {
        return Err(refuse("columns that begin before they end"));
    }
    let rank = slots.iter().map(|slot| slot.columns[1]).fold(rank, usize::max);
    Ok(lora::describe(rank, &slots))
}

/// What an encodings file says of an adapter: scales of its weights by their names, and encodings of computed tensors.
type AdapterEncodings = (HashMap<String, Vec<f32>>, Vec<(String, TensorEncoding)>);

fn read_encodings(path: &Path, updatable: &Updatable, model: &Graph) -> Result<AdapterEncodings, AdapterError> {
    let text = read_text(path)?;
    let encodings = ParamEncodings::from_json(&text, &|name| !is_computed(model, name))?;
    let mut scales = HashMap::new();
    for (name, encoding) in encodings.0 {
        let Some(declared) = updatable.data_type(&name) else {
            return Err(SectionError::UnknownTensor { tensor: name }.into());
        };
        if encoding.data_type() != Some(declared) {
            let have = match encoding {
                WeightEncoding::Float { bits } => format!("floats of {bits} bits"),
                WeightEncoding::Integer { bits, .. } => format!("integers of {bits} bits"),
            };
            return Err(AdapterError::Encoding { tensor: name, have, want: declared });
        }
        if let WeightEncoding::Integer { scales: own, .. } = encoding
            && scales.insert(name.clone(), own).is_some()
        {
            return Err(AdapterError::Twice { tensor: name });
        }
    }
    Ok((scales, computed_encodings(&text, model)?))
}

/// The encodings of computed tensors, checked against what the model declares.
fn computed_encodings(text: &[u8], model: &Graph) -> Result<Vec<(String, TensorEncoding)>, AdapterError> {
    let mut found = Vec::new();
    for entry in EncodingsFile::parse(text)?.tensors {
        let name = entry.name;
        if entry.is_param == Some(true) || entry.is_param.is_none() && !is_computed(model, &name) {
            continue;
        }
        let refuse = |have, want| AdapterError::Computed { tensor: name.clone(), have, want };
        let Some(tensor) = model.find(&name).map(|id| model.tensor(id)) else {
            return Err(SectionError::UnknownTensor { tensor: name }.into());
        };
        let Numbers::Integer(integers) = entry.numbers else {
            return Err(refuse("floats".to_owned(), "integers, as the model has it".to_owned()));
        };
        fits(tensor, integers.bits).map_err(|(have, want)| refuse(have, want))?;
        let signed = matches!(tensor.data_type, DataType::SFixedPoint8 | DataType::SFixedPoint16);
        let (data_type, encoding) = computed_encoding(&integers, signed)
            .map_err(|have| refuse(have, format!("an encoding of {}", tensor.data_type)))?;
        found.push((name, TensorEncoding { data_type, encoding }));
    }
    Ok(found)
}

/// Whether `name` is a tensor that `model` computes, not one of its constants.
pub(in crate::offline) fn is_computed(model: &Graph, name: &str) -> bool {
    model.find(name).is_some_and(|id| !model.tensor(id).tensor_type.is_static())
}

fn read_text(path: &Path) -> Result<Bytes, AdapterError> {
    let bytes = Bytes::map_file(path)?;
    if bytes.len() > MAX_TEXT_BYTES {
        return Err(AdapterError::TooLarge { have_bytes: bytes.len() });
    }
    Ok(Bytes::from(bytes.to_vec()))
}

/// Bytes of the numbers and scales without any padding.
fn weights_bytes(panels: &Panels) -> u64 {
    let layout = panels.layout();
    let bits = crate::context::data_type_of(layout.format()).map_or(0, |data_type| data_type.bits());
    let scales = if layout.format().is_float() { 0 } else { layout.n() * 4 };
    ((layout.n() * layout.k() * bits).div_ceil(8) + scales) as u64
}

/// Metadata key of the importer's weights: the slots as JSON.
const SLOTS: &str = "slots";
/// Longest YAML or encodings file that is read.
const MAX_TEXT_BYTES: usize = 256 << 20;
