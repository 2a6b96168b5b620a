//! `Context`: the graphs of one file over one set of weights, and how it is made from graphs.
//!
//! Constants are slices of the mapped file. Two graphs that name the same constant hold the same slice.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Seek, Write};
use std::path::Path;

use crate::{
    binary::{
        Binary, BinaryError, BinaryFault, BinaryInfo, BinaryWriter, FileKind, Identity, MAX_GRAPHS, Meta, SdkVersion,
        SectionKind, Verify, Written, write_file,
    },
    error::Error,
    graph::Graph,
    map::Bytes,
    record::{self, GraphRecord, Part, RecordError, TensorRecord},
};

mod apply;
mod editor;
pub(crate) mod encodings;
mod section_error;
mod sections;
mod updatable;

pub use apply::WEIGHT_SHARING;
pub use editor::ContextEditor;
pub use section_error::{SectionError, StateError};
pub use sections::{MAX_LORA_RANK, MAX_RANK};

use apply::Applied;
pub(crate) use updatable::{Updatable, data_type_of};

/// A loaded context binary. Share it with an `Arc`: all that ever changes is which adapter later executes run with.
#[derive(Debug)]
pub struct Context {
    binary: Binary,
    meta: Meta,
    graphs: Vec<Graph>,
    updatable: Updatable,
    applied: Applied,
}

/// How [`Context::open`] reads a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// Map the file (fast, pages shared between processes; a process that truncates the file kills this one) instead of
    /// reading it into memory.
    pub use_mmap: bool,
    /// How much is checked.
    pub verify: Verify,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { use_mmap: true, verify: Verify::Checksums }
    }
}

impl Context {
    /// Opens the context binary at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Binary`] naming the place and what is wrong there.
    ///
    /// QNN: `QnnContext_createFromBinary`.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Context, Error> {
        let bytes = if options.use_mmap { Bytes::map_file(path) } else { Bytes::read_file(path) };
        let bytes = bytes.map_err(Error::io(path))?;
        Context::from_binary(bytes, options.verify).map_err(Error::binary(path))
    }

    /// Makes a context of the bytes of a context binary. Constants stay where they are.
    ///
    /// # Errors
    /// [`BinaryFault`]: the place and what is wrong there.
    ///
    /// QNN: `QnnContext_createFromBinary`.
    pub fn from_binary(bytes: Bytes, verify: Verify) -> Result<Context, BinaryFault> {
        Context::of(Binary::parse(bytes, Verify::Headers)?, verify)
    }

    /// The context of a file whose headers are checked. What else `verify` wants is checked while graphs are made.
    pub(crate) fn of(binary: Binary, verify: Verify) -> Result<Context, BinaryFault> {
        binary.expect_kind(FileKind::Context)?;
        let read = || -> Result<_, BinaryFault> {
            let (meta, graphs) = (read_meta(&binary)?, read_graphs(&binary)?);
            let updatable = Updatable::of(&graphs).map_err(|why| why.at(binary.sections()[0].at_bytes))?;
            Ok((meta, graphs, updatable))
        };
        let (meta, graphs, updatable) = match verify {
            Verify::Headers => read(),
            Verify::Checksums => binary.verify_beside(read)?,
        }?;
        let applied = Applied::new(graphs.len());
        Ok(Context { binary, meta, graphs, updatable, applied })
    }

    /// Names of the graphs, in the order of the file.
    pub fn graphs(&self) -> impl ExactSizeIterator<Item = &str> {
        self.graphs.iter().map(Graph::name)
    }

    /// The graph called `name`.
    ///
    /// QNN: `QnnGraph_retrieve`.
    pub fn graph(&self, name: &str) -> Option<&Graph> {
        self.graphs.iter().find(|graph| graph.name() == name)
    }

    /// Hash of graphs and constants: what an adapter section names as its base.
    pub fn identity(&self) -> Identity {
        self.binary.identity()
    }

    /// Version of the crate that wrote the file.
    pub fn sdk_version(&self) -> SdkVersion {
        self.binary.sdk_version()
    }

    /// Facts about the model: architecture, source, token ids.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.meta.metadata
    }

    /// Size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.binary.size_bytes()
    }

    /// What the context contains, to print.
    ///
    /// QNN: `QnnSystemContext_getBinaryInfo`.
    pub fn info(&self) -> BinaryInfo {
        BinaryInfo::of(self)
    }

    /// The context as a context binary. For an unchanged file of this version: the same bytes.
    ///
    /// # Errors
    /// [`BinaryError`] if a graph's JSON is too large to be read again.
    ///
    /// QNN: `QnnContext_getBinary`.
    pub fn to_binary(&self) -> Result<Vec<u8>, BinaryError> {
        to_binary(&self.meta, &self.graphs)
    }

    pub(crate) fn binary(&self) -> &Binary {
        &self.binary
    }

    pub(crate) fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn all_graphs(&self) -> &[Graph] {
        &self.graphs
    }
}

/// Makes a context of graphs.
///
/// Constants of the same name in several graphs must be the same, and are stored once. They are stored as they are:
/// [`crate::offline::generate`] packs them for the kernels first.
#[derive(Debug, Default)]
pub struct ContextBuilder {
    graphs: Vec<Graph>,
    metadata: BTreeMap<String, String>,
}

impl ContextBuilder {
    /// A builder without graphs.
    pub fn new() -> ContextBuilder {
        ContextBuilder::default()
    }

    /// Adds a graph.
    #[must_use]
    pub fn graph(mut self, graph: Graph) -> ContextBuilder {
        self.graphs.push(graph);
        self
    }

    /// Records a fact about the model.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> ContextBuilder {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// The context binary in memory.
    ///
    /// # Errors
    /// [`BinaryError`] if there are no graphs or too many, two of one name, or two different constants of one name.
    pub fn to_binary(&self) -> Result<Vec<u8>, BinaryError> {
        to_binary(&Meta::new(self.metadata.clone()), &self.graphs)
    }

    /// Writes the context binary to `path`, as a whole or not at all.
    ///
    /// # Errors
    /// As [`ContextBuilder::to_binary`], or what the system says.
    pub fn write(&self, path: &Path) -> Result<Written, Error> {
        write_file(path, |writer| {
            write_all(writer, &Meta::new(self.metadata.clone()), &self.graphs)
                .map_err(|why| Error::binary(path)(why.at(writer.at_bytes())))
        })
    }
}

/// Writes META and one GRAPH section per record: the part of a context before its constants.
pub(crate) fn write_records<W: Write + Seek>(
    writer: &mut BinaryWriter<W>,
    meta: &Meta,
    records: &[GraphRecord],
) -> Result<(), BinaryError> {
    check_count(records.len())?;
    writer.add(SectionKind::Meta, "", &meta.to_json()?)?;
    for (i, record) in records.iter().enumerate() {
        if records[..i].iter().any(|earlier| earlier.name == record.name) {
            return Err(BinaryError::Duplicate { section: label(SectionKind::Graph, &record.name) });
        }
        let json = record.to_json().map_err(|why| graph_error(&record.name, why))?;
        writer.add(SectionKind::Graph, &record.name, json.as_bytes())?;
    }
    Ok(())
}

/// The kind of section that holds a part of a tensor.
pub(crate) fn kind_of(part: Part) -> SectionKind {
    match part {
        Part::Data => SectionKind::Tensor,
        Part::Scales => SectionKind::Scales,
        Part::Offsets => SectionKind::Offsets,
        Part::Mins => SectionKind::Mins,
    }
}

fn to_binary(meta: &Meta, graphs: &[Graph]) -> Result<Vec<u8>, BinaryError> {
    let failed = |why| BinaryError::Io { what: "write to memory", why };
    let mut writer = BinaryWriter::new(Cursor::new(Vec::new())).map_err(failed)?;
    write_all(&mut writer, meta, graphs)?;
    let (out, _) = writer.finish().map_err(failed)?;
    Ok(out.into_inner())
}

fn write_all<W: Write + Seek>(writer: &mut BinaryWriter<W>, meta: &Meta, graphs: &[Graph]) -> Result<(), BinaryError> {
    let records: Vec<GraphRecord> = graphs.iter().map(GraphRecord::from_graph).collect();
    write_records(writer, meta, &records)?;
    let mut written: HashMap<(SectionKind, &str), (&Graph, Bytes)> = HashMap::new();
    for graph in graphs {
        for tensor in graph.tensors() {
            for (part, bytes) in record::parts(tensor) {
                let key = (kind_of(part), tensor.name.as_str());
                match written.get(&key) {
                    None => {
                        writer.add(key.0, key.1, &bytes)?;
                        written.insert(key, (graph, bytes));
                    }
                    Some((_, earlier)) if same(earlier, &bytes) => {}
                    Some((first, _)) => {
                        let (first, second) = (first.name().to_owned(), graph.name().to_owned());
                        return Err(BinaryError::Conflict { first, second, tensor: tensor.name.clone() });
                    }
                }
            }
        }
    }
    Ok(())
}

/// Equal contents; the same memory is seen without reading it.
fn same(a: &Bytes, b: &Bytes) -> bool {
    a.len() == b.len() && (a.as_ptr() == b.as_ptr() || **a == **b)
}

fn read_meta(binary: &Binary) -> Result<Meta, BinaryFault> {
    let first = &binary.sections()[0];
    if first.kind != SectionKind::Meta || !first.name.is_empty() {
        return Err(BinaryError::Missing { section: label(SectionKind::Meta, "") }.at(first.at_bytes));
    }
    if let Some(second) = binary.sections()[1..].iter().find(|s| s.kind == SectionKind::Meta) {
        return Err(BinaryError::Duplicate { section: second.label() }.at(second.at_bytes));
    }
    Meta::from_json(&binary.bytes(0)).map_err(|why| why.at(first.at_bytes))
}

fn read_graphs(binary: &Binary) -> Result<Vec<Graph>, BinaryFault> {
    let sections = binary.sections();
    let mut used: Vec<bool> =
        sections.iter().map(|s| matches!(s.kind, SectionKind::Meta | SectionKind::Graph)).collect();
    let at: Vec<usize> = (0..sections.len()).filter(|i| sections[*i].kind == SectionKind::Graph).collect();
    check_count(at.len()).map_err(|why| why.at(sections[0].at_bytes))?;
    let mut graphs = Vec::with_capacity(at.len());
    for i in at {
        let mut graph = read_graph(binary, i, &mut used).map_err(|why| why.at(sections[i].at_bytes))?;
        graphs.iter().for_each(|other| graph.share_weights(other));
        graphs.push(graph);
    }
    match used.iter().position(|used| !used) {
        None => Ok(graphs),
        Some(i) => Err(BinaryError::Unused { section: sections[i].label() }.at(sections[i].at_bytes)),
    }
}

fn read_graph(binary: &Binary, index: usize, used: &mut [bool]) -> Result<Graph, BinaryError> {
    let name = &binary.sections()[index].name;
    let record = GraphRecord::from_json(&binary.bytes(index)).map_err(|why| graph_error(name, why))?;
    if record.name != **name {
        let section = format!("{} (in its JSON {:?})", label(SectionKind::Graph, name), record.name);
        return Err(BinaryError::Missing { section });
    }
    let mut blob = |tensor: &TensorRecord, part: Part| {
        let kind = kind_of(part);
        let found = binary.find(kind, &tensor.name).ok_or_else(|| Refused::Missing(label(kind, &tensor.name)))?;
        used[found] = true;
        Ok(binary.bytes(found))
    };
    record.into_graph::<Refused>(&mut blob).map_err(|refused| match refused {
        Refused::Missing(section) => BinaryError::Missing { section },
        Refused::Record(why) => graph_error(name, why),
    })
}

/// Why a record did not become a graph.
enum Refused {
    Missing(String),
    Record(RecordError),
}

impl From<RecordError> for Refused {
    fn from(why: RecordError) -> Refused {
        Refused::Record(why)
    }
}

fn check_count(have: usize) -> Result<(), BinaryError> {
    if (1..=MAX_GRAPHS).contains(&have) { Ok(()) } else { Err(BinaryError::GraphCount { have }) }
}

fn graph_error(name: &str, why: RecordError) -> BinaryError {
    BinaryError::Graph { section: label(SectionKind::Graph, name), why: Box::new(why) }
}

fn label(kind: SectionKind, name: &str) -> String {
    format!("{kind} {name:?}")
}
