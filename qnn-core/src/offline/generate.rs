//! From a DLC to context binaries: split, bound, pack, write.
//!
//! ```text
//! DLC ─► split at layer outputs ─► for each split: one graph per AR and CL ─► weights to panels ─► <name>_1_of_2.bin …
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use htp_sim::{WeightFormat, Workers};

use crate::{
    atomic_file,
    backend::{PrepareError, htp::Packing},
    binary::{BinaryError, BinaryWriter, Identity, MAX_GRAPHS, Meta, SectionKind, write_file},
    context::{WEIGHT_SHARING, kind_of, write_records},
    error::Error,
    graph::{Graph, GraphError},
    offline::{dlc::read_dlc, equalize::SCALES_KEY, source, specialize},
    op::OpKind,
    record::{self, GraphRecord},
    tensor::{Tensor, TensorId, format_name},
};

mod adapters;
mod config_file;
mod split;

pub use adapters::{AdapterError, SectionReport};
pub use config_file::ConfigFile;

use adapters::Adapters;
pub(in crate::offline) use adapters::{Listed, ListedAdapter, is_computed, listed_adapters, listed_in};
pub(crate) use split::{LAYER_OUTPUTS, between};

/// What to make of a DLC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateOptions {
    /// The model.
    pub dlc_path: PathBuf,
    /// Folder of the context binaries; made if it is not there.
    pub output_dir: PathBuf,
    /// File name of the context binary, with or without `.bin`.
    pub binary_file: String,
    /// Rows that the graphs take at most (AR-n), one graph for each. 1 gives a token graph, more a prompt graph.
    pub ar: Vec<usize>,
    /// Positions that the graphs' KV caches have (CL-n), one graph for each. Empty: as the DLC has it.
    pub cl: Vec<usize>,
    /// Number of files to spread the layers over.
    pub num_splits: usize,
    /// The importer's `lora_output_files.yaml`: each of its adapters becomes a section of each context binary.
    pub adapter_weight_config: Option<PathBuf>,
    /// The contexts do not run before a section was applied to them.
    pub lora_weight_sharing: bool,
}

/// What was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// One context binary per split.
    pub files: Vec<FileReport>,
    /// The section files of each context binary, `default_adapter` first.
    pub sections: Vec<SectionReport>,
    /// The files copied beside them (tokenizer, generation config).
    pub sidecars: Vec<PathBuf>,
}

/// One context binary.
#[derive(Debug, Clone, PartialEq)]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Hash of its graphs and constants.
    pub identity: Identity,
    /// Names of its graphs.
    pub graphs: Vec<String>,
    /// Number and bytes of its packed weights by format.
    pub weights: BTreeMap<String, (usize, u64)>,
}

/// How far the work is. Told after each batch of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file being written.
    pub file: &'a Path,
    /// Bytes of constants written, over all files.
    pub done_bytes: u64,
    /// Bytes of constants to write, over all files.
    pub total_bytes: u64,
}

/// Why a DLC cannot be made a context binary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum GenerateError {
    #[error("tensor {tensor}: {have}, the kernels need {want}")]
    Unpackable { tensor: String, have: String, want: String },
    #[error(transparent)]
    Pack(#[from] PrepareError),
    #[error("{have} splits of a model with {layers} layers that can be told apart, need 1 to {}", layers.max(&1))]
    TooManySplits { have: usize, layers: usize },
    #[error("cannot cut at tensor {tensor}: {why}")]
    Cut { tensor: String, why: String },
    #[error("{path}{}{pointer}: {have}, need {want}", if pointer.is_empty() { "" } else { ", " })]
    ConfigFile { path: PathBuf, pointer: String, have: String, want: String },
    #[error("{option}: {have}, need {want}")]
    Option { option: &'static str, have: String, want: String },
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error("{path}")]
    Adapter {
        path: PathBuf,
        #[source]
        why: Box<AdapterError>,
    },
    #[error("metadata of the model")]
    Meta(#[source] BinaryError),
    #[error(transparent)]
    Output(std::io::Error),
    #[error("start the worker threads")]
    Threads(#[source] std::io::Error),
}

/// Makes context binaries of a DLC and sections of its adapters, and copies the tokenizer and its companions beside them.
///
/// The context binaries do not depend on the adapters: theirs are sections of every context binary made of the same DLC.
/// Weights of matrix products and embeddings are packed for the kernels; other constants stay as they are. At most one
/// packed tensor per core is in memory at a time. Each file is written as a whole or not at all.
///
/// # Errors
/// [`Error::Generate`] naming the option or tensor that cannot be; or what reading the DLC or writing a file says.
pub fn generate(options: &GenerateOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report, Error> {
    let refuse = |why| Error::Generate { path: options.dlc_path.clone(), why: Box::new(why) };
    check(options).map_err(refuse)?;
    let graph = read_dlc(&options.dlc_path)?;
    let splits = plan(&graph, options).map_err(refuse)?;
    let adapters = options.adapter_weight_config.as_ref().map(|yaml| Adapters::read(yaml, &graph));
    let adapters = adapters.transpose().map_err(refuse)?;
    if options.lora_weight_sharing && adapters.is_none() {
        let have = "no adapters".to_owned();
        let want = "--adapter_weight_config: without a section the context could never run".to_owned();
        return Err(refuse(GenerateError::Option { option: "lora_weight_sharing", have, want }));
    }
    check_outputs(options, &splits, adapters.as_ref()).map_err(|why| refuse(GenerateError::Output(why)))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::new(cores).map_err(|why| refuse(GenerateError::Threads(why)))?;
    let meta = meta_of(&graph, options.lora_weight_sharing);
    meta.to_json().map_err(|why| refuse(GenerateError::Meta(why)))?;
    std::fs::create_dir_all(&options.output_dir).map_err(Error::io(&options.output_dir))?;

    let total_bytes = splits.iter().map(Split::constants_bytes).sum();
    let mut done_bytes = 0;
    let mut files = Vec::with_capacity(splits.len());
    for split in &splits {
        let written = write_file(&split.path, |writer| {
            let mut tell = |more_bytes| {
                done_bytes += more_bytes;
                progress(Progress { file: &split.path, done_bytes, total_bytes });
            };
            let in_file = |why: BinaryError, at_bytes| Error::binary(&split.path)(why.at(at_bytes));
            write_records(writer, &meta, &split.records).map_err(|why| in_file(why, writer.at_bytes()))?;
            split.write_constants(writer, &workers, &mut tell).map_err(|failed| match failed {
                Failed::Binary(why) => in_file(why, writer.at_bytes()),
                Failed::Generate(why) => refuse(why),
            })
        })?;
        files.push(FileReport {
            path: split.path.clone(),
            size_bytes: written.size_bytes,
            identity: written.identity,
            graphs: split.records.iter().map(|record| record.name.clone()).collect(),
            weights: split.weights(),
        });
    }
    let mut sections = Vec::new();
    for (file, adapters) in files.iter().zip(adapters.iter().cycle()) {
        sections.extend(adapters.write(&file.path)?);
    }
    let sidecars = copy_sidecars(&options.dlc_path, &options.output_dir)?;
    Ok(Report { files, sections, sidecars })
}

/// Refuses to write over what is read.
fn check_outputs(options: &GenerateOptions, splits: &[Split], adapters: Option<&Adapters>) -> std::io::Result<()> {
    let sections = splits.iter().zip(adapters.iter().cycle()).flat_map(|(split, adapters)| {
        adapters.places(&split.path, split.records.iter().map(|record| record.name.as_str()))
    });
    let sections: Vec<PathBuf> = sections.collect();
    let files = splits.iter().map(|split| ("context binary", split.path.as_path()));
    let outputs: Vec<_> = files.chain(sections.iter().map(|path| ("section", path.as_path()))).collect();
    let list = options.adapter_weight_config.iter().map(|path| ("the list of adapters", path.as_path()));
    let inputs: Vec<_> = [("the DLC", options.dlc_path.as_path())].into_iter().chain(list).collect();
    atomic_file::check_outputs(&outputs, &inputs)
}

/// What the META section says of a model. Channel scales are in the graphs' records, which have room for those of large models.
fn meta_of(graph: &Graph, weight_sharing: bool) -> Meta {
    let mut metadata = graph.metadata().clone();
    metadata.remove(SCALES_KEY);
    if weight_sharing {
        metadata.insert(WEIGHT_SHARING.to_owned(), "true".to_owned());
    }
    Meta::new(metadata)
}

/// Copies the files that a dialog needs beside the context binaries, those that lie beside the DLC, to `output_dir`, unless
/// they lie there already. A `chat_template.jinja` there goes into the copy of `tokenizer_config.json`. Gives the paths of the
/// copies.
///
/// # Errors
/// [`Error::Io`] if a file cannot be copied; [`Error::Import`] if a template has to go into a file that is no JSON.
pub fn copy_sidecars(dlc_path: &Path, output_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let from_dir = atomic_file::folder_of(dlc_path);
    let to_dir = if output_dir.as_os_str().is_empty() { Path::new(".") } else { output_dir };
    let same_dir = from_dir.canonicalize().is_ok_and(|from| to_dir.canonicalize().is_ok_and(|to| from == to));
    // As a file of its own it would outlive a later model's copies in that folder, and come before their template.
    let puts_template = !same_dir && from_dir.join(source::CHAT_TEMPLATE).is_file();
    let mut copies = Vec::new();
    for name in SIDECARS {
        let (from, to) = (from_dir.join(name), output_dir.join(name));
        if puts_template && name == source::TOKENIZER_CONFIG {
            let config = source::tokenizer_config(from_dir)?.unwrap_or_default();
            atomic_file::write(&to, |file| file.write_all(&config)).map_err(Error::io(&to))?;
            copies.push(to);
            continue;
        }
        if !from.is_file() {
            continue;
        }
        let same = to.exists() && from.canonicalize().ok() == to.canonicalize().ok();
        if !same {
            let mut from_file = File::open(&from).map_err(Error::io(&from))?;
            atomic_file::write(&to, |file| std::io::copy(&mut from_file, file).map(|_| ())).map_err(Error::io(&to))?;
            copies.push(to);
        }
    }
    Ok(copies)
}

/// One file to write.
struct Split {
    path: PathBuf,
    /// The part of the model, constants as in the DLC.
    graph: Graph,
    /// Its graphs, constants described as they will be stored.
    records: Vec<GraphRecord>,
    /// Formats of the constants that are packed.
    packed: HashMap<TensorId, WeightFormat>,
}

/// Everything that can be refused is refused here, before anything is written.
fn plan(graph: &Graph, options: &GenerateOptions) -> Result<Vec<Split>, GenerateError> {
    let cl = if options.cl.is_empty() { vec![capacity(graph)?] } else { options.cl.clone() };
    check_positions(graph, &cl)?;
    let parts = split::split(graph, options.num_splits)?;
    check_rows(&options.ar, &cl)?;
    let n = parts.len();
    let stem = options.binary_file.strip_suffix(".bin").unwrap_or(&options.binary_file);
    let mut splits = Vec::with_capacity(n);
    for (i, graph) in parts.into_iter().enumerate() {
        let file = if n == 1 { format!("{stem}.bin") } else { format!("{stem}_{}_of_{n}.bin", i + 1) };
        let packed = packed(&graph)?;
        let mut records = Vec::new();
        for cl in &cl {
            for ar in &options.ar {
                let role = if *ar == 1 { "token" } else { "prompt" };
                let name = format!("{role}_ar{ar}_cl{cl}_{}_of_{n}", i + 1);
                records.push(stored_record(&specialize(&graph, &name, *ar, *cl)?, &packed));
            }
        }
        splits.push(Split { path: options.output_dir.join(file), graph, records, packed });
    }
    Ok(splits)
}

impl Split {
    /// Tensors with bytes to store: constants, and whatever has an encoding with arrays.
    fn constants(&self) -> impl Iterator<Item = (TensorId, &Tensor)> {
        let tensors = self.graph.tensors().iter().enumerate();
        let stored = tensors.filter(|(_, tensor)| !record::parts(tensor).is_empty());
        stored.map(|(i, tensor)| (TensorId(i as u32), tensor))
    }

    /// Bytes of the constants in the DLC: what progress counts in.
    fn constants_bytes(&self) -> u64 {
        self.constants().map(|(_, tensor)| size_bytes(tensor)).sum()
    }

    fn weights(&self) -> BTreeMap<String, (usize, u64)> {
        let mut weights: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (id, format) in &self.packed {
            let shape = &self.graph.tensor(*id).shape.max_dims();
            let layout = htp_sim::PackedLayout::new(shape[0], shape[1], *format);
            let entry = weights.entry(format_name(*format)).or_default();
            entry.0 += 1;
            entry.1 += layout.map_or(0, |layout| layout.size_bytes() as u64);
        }
        weights
    }

    /// Packs a few tensors at a time, one per worker, and writes them in the graph's order.
    fn write_constants<W: Write + Seek>(
        &self,
        writer: &mut BinaryWriter<W>,
        workers: &Workers,
        tell: &mut dyn FnMut(u64),
    ) -> Result<(), Failed> {
        let constants: Vec<(TensorId, &Tensor)> = self.constants().collect();
        for batch in constants.chunks(workers.count()) {
            let packed: Vec<Mutex<Option<Packed>>> = batch.iter().map(|_| Mutex::new(None)).collect();
            workers.for_each(batch.len(), |i, _| {
                let (id, tensor) = batch[i];
                if self.packed.contains_key(&id) {
                    let result = Packing::of(tensor).and_then(|packing| packing.pack());
                    *packed[i].lock().expect("nobody else holds it") = Some(result);
                }
            });
            for ((_, tensor), packed) in batch.iter().zip(packed) {
                match packed.into_inner().expect("no worker panicked") {
                    Some(panels) => {
                        writer.add(SectionKind::Tensor, &tensor.name, &panels.map_err(GenerateError::Pack)?)?
                    }
                    None => record::parts(tensor)
                        .into_iter()
                        .try_for_each(|(part, bytes)| writer.add(kind_of(part), &tensor.name, &bytes))?,
                }
            }
            tell(batch.iter().map(|(_, tensor)| size_bytes(tensor)).sum());
        }
        Ok(())
    }
}

/// The panels of one constant.
type Packed = Result<Vec<u8>, PrepareError>;

/// Why constants could not be written.
enum Failed {
    Binary(BinaryError),
    Generate(GenerateError),
}

impl From<BinaryError> for Failed {
    fn from(why: BinaryError) -> Failed {
        Failed::Binary(why)
    }
}

impl From<GenerateError> for Failed {
    fn from(why: GenerateError) -> Failed {
        Failed::Generate(why)
    }
}

/// The constants that become panels: weights of matrix products and tables of `Gather`.
fn packed(graph: &Graph) -> Result<HashMap<TensorId, WeightFormat>, GenerateError> {
    let mut packed = HashMap::new();
    let mut otherwise = Vec::new();
    for node in graph.nodes() {
        for (i, id) in node.inputs.iter().enumerate() {
            let tensor = graph.tensor(*id);
            let is_matrix = matches!((&node.op, i), (OpKind::FullyConnected, 1) | (OpKind::Gather, 0));
            match (tensor.data.is_some(), is_matrix) {
                (true, true) if !packed.contains_key(id) => {
                    packed.insert(*id, Packing::of(tensor)?.layout().format());
                }
                (true, false) => otherwise.push((*id, node)),
                _ => {}
            }
        }
    }
    match otherwise.into_iter().find(|(id, _)| packed.contains_key(id)) {
        None => Ok(packed),
        Some((id, node)) => Err(GenerateError::Unpackable {
            tensor: graph.tensor(id).name.clone(),
            have: format!("a matrix that node {} ({}) uses too", node.name, node.op.name()),
            want: "one used by FullyConnected and Gather only".to_owned(),
        }),
    }
}

/// The record of `graph` with packed constants described as panels, which hold their scales themselves.
fn stored_record(graph: &Graph, packed: &HashMap<TensorId, WeightFormat>) -> GraphRecord {
    let mut record = GraphRecord::from_graph(graph);
    for (id, format) in packed {
        let tensor = &mut record.tensors[id.index()];
        tensor.encoding = None;
        tensor.panels = Some((*format).into());
    }
    record
}

fn check(options: &GenerateOptions) -> Result<(), GenerateError> {
    let refuse = |option, have: String, want: &str| Err(GenerateError::Option { option, have, want: want.to_owned() });
    let name = options.binary_file.as_str();
    if name.trim_end_matches(".bin").is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
        return refuse("binary file", format!("{name:?}"), "a file name without folders");
    }
    if options.ar.is_empty() {
        return refuse("ar", "an empty list".to_owned(), "at least one number of rows");
    }
    for (option, list) in [("ar", &options.ar), ("cl", &options.cl)] {
        if let Some((_, twice)) = list.iter().enumerate().find(|(i, n)| list[..*i].contains(n)) {
            return refuse(option, format!("{twice} twice"), "each number once");
        }
    }
    if options.cl.contains(&0) {
        return refuse("cl", "0".to_owned(), "at least 1 position");
    }
    let n_graphs = options.ar.len().saturating_mul(options.cl.len().max(1));
    if n_graphs > MAX_GRAPHS {
        return refuse("ar and cl", format!("{n_graphs} graphs"), &format!("at most {MAX_GRAPHS} graphs in a context"));
    }
    Ok(())
}

/// Positions of the KV caches as the DLC has them.
fn capacity(graph: &Graph) -> Result<usize, GenerateError> {
    let states = graph.states();
    let shape = states.first().map(|id| graph.tensor(*id).shape.max_dims());
    shape.and_then(|dims| dims.get(1).copied()).ok_or_else(|| GenerateError::Option {
        option: "cl",
        have: "none given, and the model has no KV cache to take it from".to_owned(),
        want: "a number of positions".to_owned(),
    })
}

/// A model knows no positions beyond those that it was trained for.
fn check_positions(graph: &Graph, cl: &[usize]) -> Result<(), GenerateError> {
    let most = graph.metadata().get(MAX_POSITIONS).and_then(|text| text.parse::<usize>().ok());
    match cl.iter().find(|cl| most.is_some_and(|most| **cl > most)) {
        None => Ok(()),
        Some(cl) => Err(GenerateError::Option {
            option: "cl",
            have: cl.to_string(),
            want: format!("at most {}, the positions that the model knows", most.unwrap_or_default()),
        }),
    }
}

/// A graph takes no more rows than its caches have positions.
fn check_rows(ar: &[usize], cl: &[usize]) -> Result<(), GenerateError> {
    let least = cl.iter().copied().min().unwrap_or_default();
    match ar.iter().find(|ar| **ar == 0 || **ar > least) {
        None => Ok(()),
        Some(ar) => Err(GenerateError::Option {
            option: "ar",
            have: ar.to_string(),
            want: format!("1 to {least} rows, no more than the smallest context (cl) has positions"),
        }),
    }
}

/// Bytes of a constant in the DLC.
fn size_bytes(tensor: &Tensor) -> u64 {
    record::parts(tensor).iter().map(|(_, bytes)| bytes.len() as u64).sum()
}

/// Metadata key: positions that the model was trained for.
const MAX_POSITIONS: &str = "max_position_embeddings";

/// Files beside a DLC that belong to the model.
pub(super) const SIDECARS: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
