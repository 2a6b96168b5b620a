//! `model.dlc`: a graph as a safetensors file, with the graph's JSON in the metadata.
//!
//! Constants are tensors of the file under their own names; the arrays of an encoding are companions `<name>.scales`,
//! `<name>.offsets`, `<name>.mins`. Four-bit constants are `U8`, two elements to a byte, the first in the low half. The
//! first tensor starts at a multiple of 64 bytes.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::{
    atomic_file,
    error::Error,
    graph::Graph,
    map::Bytes,
    offline::{
        generate::SIDECARS,
        safetensors::{LayoutError, MAX_HEADER_BYTES, SafetensorsFile},
    },
    record::{self, BlockOffsetsRecord, DimRecord, EncodingRecord, GraphRecord, Part, RecordError, TensorRecord},
    types::DataType,
};

/// Why a file is no DLC, or a graph cannot be stored as one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DlcError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("not a genie DLC: metadata \"format\" is {have:?}, need {FORMAT:?}")]
    Format { have: Option<String> },
    #[error("DLC version {have:?}, this program reads version {VERSION:?}")]
    Version { have: Option<String> },
    #[error("no \"graph\" in the metadata")]
    NoGraph,
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("tensor {name} is not in the file")]
    Missing { name: String },
    #[error("tensor {name} belongs to no tensor of the graph")]
    Unclaimed { name: String },
    #[error("tensor {name}: {have}, need {want}")]
    Tensor { name: String, have: String, want: String },
    #[error("two blobs are called {name}")]
    Duplicate { name: String },
    #[error("it is a folder; name the file, as in model.dlc")]
    Folder,
    #[error("the name of a file that is written beside a DLC, need another one, as model.dlc")]
    SidecarName,
}

/// Refuses a path where no DLC can be written, before the work that it is for: a folder, a file that the tokenizer's would
/// replace at once, or a folder that takes no new files.
///
/// # Errors
/// [`Error::Dlc`]; [`Error::Io`] with what the system says.
pub fn check_output(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        return Err(Error::dlc(path)(DlcError::Folder));
    }
    if SIDECARS.iter().any(|name| path.file_name() == Some(name.as_ref())) {
        return Err(Error::dlc(path)(DlcError::SidecarName));
    }
    atomic_file::check_place(path).map_err(Error::io(path))
}

/// Writes `graph` to `path`: into a temporary file beside it, which takes its name when complete and on disk.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dlc`] if a constant is in panels or the graph's JSON is too large. `path` is then unchanged.
pub fn write_dlc(path: &Path, graph: &Graph) -> Result<(), Error> {
    let (header, blobs) = layout(graph).map_err(Error::dlc(path))?;
    atomic_file::write(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        blobs.iter().try_for_each(|blob| file.write_all(blob))
    })
    .map_err(Error::io(path))
}

/// Bytes that [`write_dlc`] would write.
///
/// # Errors
/// [`DlcError`] if a constant is in panels or the graph's JSON is too large.
pub fn size_bytes(graph: &Graph) -> Result<u64, DlcError> {
    let (header, blobs) = layout(graph)?;
    Ok(8 + header.len() as u64 + blobs.iter().map(|blob| blob.len() as u64).sum::<u64>())
}

/// Reads the graph in the file at `path`. Constants are parts of the mapped file: nothing is copied.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dlc`] naming what is wrong, and the tensor or node where it is.
pub fn read_dlc(path: &Path) -> Result<Graph, Error> {
    let bytes = Bytes::map_file(path).map_err(Error::io(path))?;
    parse(&bytes).map_err(Error::dlc(path))
}

/// Reads the graph in the bytes of a DLC. Constants are parts of `bytes`.
///
/// # Errors
/// [`DlcError`] naming what is wrong, and the tensor or node where it is.
pub fn parse(bytes: &Bytes) -> Result<Graph, DlcError> {
    let file = SafetensorsFile::parse(bytes.clone())?;
    let field = |key: &str| file.metadata(key);
    if field("format") != Some(FORMAT) {
        return Err(DlcError::Format { have: field("format").map(str::to_owned) });
    }
    if field("version") != Some(VERSION) {
        return Err(DlcError::Version { have: field("version").map(str::to_owned) });
    }
    let record = GraphRecord::from_json(field("graph").ok_or(DlcError::NoGraph)?.as_bytes())?;
    let mut claimed = HashSet::new();
    let graph = record.into_graph::<DlcError>(&mut |tensor, part| {
        let name = format!("{}{}", tensor.name, part.suffix());
        let found = file.tensor(&name).ok_or_else(|| DlcError::Missing { name: name.clone() })?;
        let (have, want) = ((found.dtype, found.shape), stored_as(tensor, part)?);
        if have != want {
            return Err(DlcError::Tensor { name, have: describe(&have), want: describe(&want) });
        }
        claimed.insert(name);
        Ok(found.bytes)
    })?;
    match file.names().find(|name| !claimed.contains(*name)) {
        Some(name) => Err(DlcError::Unclaimed { name: name.to_owned() }),
        None => Ok(graph),
    }
}

/// Header, and blobs in the order in which they lie in the file.
fn layout(graph: &Graph) -> Result<(Vec<u8>, Vec<Bytes>), DlcError> {
    let mut entries: BTreeMap<String, (&'static str, Vec<usize>, Bytes)> = BTreeMap::new();
    for tensor in graph.tensors() {
        let record = TensorRecord::from_tensor(tensor, graph);
        for (part, bytes) in record::parts(tensor) {
            let name = format!("{}{}", tensor.name, part.suffix());
            let (dtype, shape) = stored_as(&record, part)?;
            if entries.insert(name.clone(), (dtype, shape, bytes)).is_some() {
                return Err(DlcError::Duplicate { name });
            }
        }
    }
    // The widest elements first, then by name: everything is aligned to its own size.
    let mut order: Vec<_> = entries.into_iter().collect();
    order.sort_by_key(|(_, (dtype, ..))| std::cmp::Reverse(dtype_size(dtype)));
    let mut header = serde_json::Map::new();
    let graph_json = GraphRecord::from_graph(graph).to_json()?;
    header.insert("__metadata__".into(), json!({ "format": FORMAT, "version": VERSION, "graph": graph_json }));
    let mut at = 0;
    let mut blobs = Vec::with_capacity(order.len());
    for (name, (dtype, shape, bytes)) in order {
        let end = at + bytes.len();
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] }));
        at = end;
        blobs.push(bytes);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize((header.len() + 8).next_multiple_of(ALIGN_BYTES) - 8, b' ');
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(LayoutError::HeaderTooLong { have_bytes: header.len() as u64 }.into());
    }
    Ok((header, blobs))
}

/// The safetensors type and shape of a blob.
fn stored_as(tensor: &TensorRecord, part: Part) -> Result<(&'static str, Vec<usize>), DlcError> {
    let refuse = |have: String, want: &str| {
        let name = format!("{}{}", tensor.name, part.suffix());
        Err(DlcError::Tensor { name, have, want: want.to_owned() })
    };
    if tensor.panels.is_some() {
        return refuse("stored in panels".to_owned(), "row-major elements");
    }
    let mut dims: Vec<usize> = tensor.dims.iter().map(DimRecord::max).collect();
    if part != Part::Data {
        return match companion(tensor, part, &dims) {
            Some((data_type, shape)) => Ok((dtype_of(data_type), shape)),
            None => refuse(format!("{:?} on shape {dims:?}", tensor.encoding), "an encoding that fits"),
        };
    }
    if tensor.data_type.bits() == 4 {
        match dims.last_mut() {
            Some(last) if last.is_multiple_of(2) => *last /= 2,
            _ => match dims.iter().try_fold(1usize, |product, n| product.checked_mul(*n)) {
                Some(elements) => dims = vec![elements.div_ceil(2)],
                None => return refuse(format!("shape {dims:?}"), "fewer elements"),
            },
        }
    }
    Ok((dtype_of(tensor.data_type), dims))
}

/// Element type and shape of an encoding's array, on a tensor of extents `dims`.
fn companion(tensor: &TensorRecord, part: Part, dims: &[usize]) -> Option<(DataType, Vec<usize>)> {
    match (tensor.encoding.as_ref()?, part) {
        (EncodingRecord::AxisScaleOffset { axis, scale_type, .. }, _) => {
            let data_type = if part == Part::Scales { *scale_type } else { DataType::Int32 };
            Some((data_type, vec![*dims.get(*axis)?]))
        }
        (EncodingRecord::Block { block_size, scale_type, offsets, .. }, _) => {
            let mut shape = dims.to_vec();
            let last = shape.last_mut()?;
            *last = last.checked_div(*block_size)?;
            let data_type = match (part, offsets) {
                (Part::Offsets, _) => DataType::Int8,
                (Part::Mins, BlockOffsetsRecord::Min(data_type)) => *data_type,
                _ => *scale_type,
            };
            Some((data_type, shape))
        }
        (EncodingRecord::BlockExpansion { block_size, scale_type, .. }, part) => {
            let [n, k] = dims else { return None };
            match part {
                Part::Offsets => Some((DataType::UInt8, vec![*n, k.checked_div(*block_size)?])),
                _ => Some((*scale_type, vec![*n])),
            }
        }
        (EncodingRecord::ScaleOffset { .. }, _) => None,
    }
}

fn describe((dtype, shape): &(&'static str, Vec<usize>)) -> String {
    format!("{dtype} {shape:?}")
}

/// The safetensors type that holds elements of `data_type`.
fn dtype_of(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Float32 => "F32",
        DataType::Float16 => "F16",
        DataType::BFloat16 => "BF16",
        DataType::Int8 | DataType::SFixedPoint8 => "I8",
        DataType::Int16 | DataType::SFixedPoint16 => "I16",
        DataType::Int32 | DataType::SFixedPoint32 => "I32",
        DataType::UInt16 | DataType::UFixedPoint16 => "U16",
        DataType::UInt32 | DataType::UFixedPoint32 => "U32",
        DataType::UInt8 | DataType::UFixedPoint8 | DataType::SFixedPoint4 | DataType::UFixedPoint4 => "U8",
        DataType::Bool8 => "BOOL",
    }
}

fn dtype_size(name: &str) -> usize {
    match name {
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        _ => 1,
    }
}

/// Value of "format" in the metadata.
pub const FORMAT: &str = "genie-dlc";
/// Value of "version" in the metadata.
pub const VERSION: &str = "1";
const ALIGN_BYTES: usize = 64;
