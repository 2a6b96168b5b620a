//! Encodings per adapter or group of adapters: calibration with each one applied.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{Activations, Observer, Progress, QuantizeError, Schema, Tools, encode, observe};
use crate::{
    adapter::Adapter,
    atomic_file::folder_of,
    encoding::Encoding,
    error::Error,
    graph::Graph,
    map::Bytes,
    offline::{
        encodings::{EncodingsFile, FileEncoding, FileVersion, Integers, Layout, Numbers},
        equalize::{SCALES_KEY, fingerprint},
        generate::{Listed, ListedAdapter, is_computed, listed_adapters, listed_in},
        lora::{
            LoraError, MODE_KEY, PlacedAdapters,
            values::{self, Matrix},
        },
        safetensors::SafetensorsFile,
        source::{ElementFormat, SourceTensor},
    },
    tensor::TensorId,
    types::{DataType, TensorType},
};

/// What became of one adapter, or of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterReport {
    /// Its name.
    pub name: String,
    /// Members of a group; empty for an adapter with encodings of its own.
    pub members: Vec<String>,
    /// Computed tensors that have encodings of its own.
    pub tensors: usize,
    /// Those of 16 bits.
    pub wide: usize,
    /// Its encodings file.
    pub path: PathBuf,
}

/// Runs `graph` over `windows` with each adapter of `placed` at strength 1, and adds encodings for the computed tensors that
/// `quantized`, its quantized version, declares as updatable to the adapter's encodings file. What the file says of weights
/// stays. The adapters of a group get one set of encodings, for all that they hold together, in the file of the group.
/// [`PlacedAdapters::write`] writes the files: until then what may still fail leaves them as they are.
///
/// A tensor of 8 bits gets 16 with an adapter where `wanted.least_sqnr_db` asks for them: such an adapter makes the products
/// with it slower, and no other one.
///
/// # Errors
/// [`Error`] with the file, or [`QuantizeError`] naming what the DLC lacks, or the adapter or group whose encodings have
/// no place below the list's folder.
pub fn calibrate_adapters(
    graph: &Graph,
    quantized: &Graph,
    placed: &mut PlacedAdapters,
    windows: &[&[u32]],
    wanted: Activations,
    tools: &mut Tools<'_>,
) -> Result<Vec<AdapterReport>, Error> {
    let (list, origin) = (placed.list.clone(), placed.origin().to_owned());
    let refused = |why| Error::quantize(&origin)(why);
    let taps: Vec<TensorId> =
        quantized.ids_where(|t| !t.tensor_type.is_static() && t.tensor_type.is_updateable() && t.encoding.is_some());
    if taps.is_empty() {
        let mode = graph.metadata().get(MODE_KEY).map_or("none", String::as_str).to_owned();
        return Err(refused(QuantizeError::NothingUpdatable { mode }));
    }
    if windows.is_empty() {
        let missing = taps.iter().map(|id| quantized.tensor(*id).name.clone()).collect();
        return Err(refused(QuantizeError::NoText { missing }));
    }
    let listed = match placed.pending(&list) {
        Some(text) => listed_in(&list, text),
        None => listed_adapters(&list),
    };
    let listed = listed.map_err(|why| Error::Generate { path: list.clone(), why: Box::new(why) })?;
    check_places(&list, &listed).map_err(refused)?;
    let mut shared: Vec<(Vec<Observer>, AdapterReport)> = Vec::new();
    for (name, path) in listed.groups {
        shared.push((Vec::new(), AdapterReport { name, members: Vec::new(), tensors: 0, wide: 0, path }));
    }
    let mut reports = Vec::new();
    for adapter in listed.adapters {
        (tools.progress)(Progress::Adapter(&adapter.name));
        let values = Arc::new(read_adapter(graph, &adapter.name, &adapter.weights, placed)?);
        let observers = observe(graph, &taps, windows, Some(&values), tools).map_err(refused)?;
        match shared.iter_mut().find(|(_, group)| adapter.group.as_ref() == Some(&group.name)) {
            Some((seen, group)) => {
                if let Some(own) = &adapter.encodings {
                    add_to_file(placed, own, quantized, Vec::new())?;
                }
                group.members.push(adapter.name);
                merge(seen, observers);
            }
            None => {
                let entries = entries(quantized, &taps, &observers, wanted).map_err(refused)?;
                let path = adapter.encodings.expect("`check_places` refused adapters without");
                let (tensors, wide) = (entries.len(), n_wide(&entries));
                add_to_file(placed, &path, quantized, entries)?;
                reports.push(AdapterReport { name: adapter.name, members: Vec::new(), tensors, wide, path });
            }
        }
    }
    for (observers, group) in shared {
        let entries = entries(quantized, &taps, &observers, wanted).map_err(refused)?;
        let (tensors, wide) = (entries.len(), n_wide(&entries));
        add_to_file(placed, &group.path, quantized, entries)?;
        reports.push(AdapterReport { tensors, wide, ..group });
    }
    Ok(reports)
}

/// Refuses an adapter without a place for its encodings, and a group whose encodings file lies elsewhere than the files of
/// its list: it is the user's own.
fn check_places(list: &Path, listed: &Listed) -> Result<(), QuantizeError> {
    let has_none = |adapter: &&ListedAdapter| adapter.encodings.is_none() && adapter.group.is_none();
    if let Some(adapter) = listed.adapters.iter().find(has_none) {
        return Err(QuantizeError::NoFile { adapter: adapter.name.clone() });
    }
    let home = list.parent().unwrap_or(Path::new(""));
    let is_below = |path: &Path| {
        let plain = |rest: &Path| rest.components().all(|part| matches!(part, Component::Normal(_)));
        let real = |path: &Path| folder_of(path).canonicalize().ok();
        path.strip_prefix(home).is_ok_and(plain)
            || real(path).zip(real(list)).is_some_and(|(path, list)| path.starts_with(list))
    };
    match listed.groups.iter().find(|(_, path)| !is_below(path)) {
        Some((group, path)) => Err(QuantizeError::OwnFile { group: group.clone(), path: path.display().to_string() }),
        None => Ok(()),
    }
}

/// Adds what another adapter of a group showed to what those before it did.
fn merge(seen: &mut Vec<Observer>, observers: Vec<Observer>) {
    if seen.is_empty() {
        *seen = observers;
        return;
    }
    seen.iter_mut().zip(&observers).for_each(|(seen, more)| seen.merge(more));
}

fn n_wide(entries: &[FileEncoding]) -> usize {
    entries.iter().filter(|entry| matches!(&entry.numbers, Numbers::Integer(integers) if integers.bits == 16)).count()
}

/// Encodings of `taps` by what was seen there, of the widths that `quantized` has or, where the type holds them, more.
fn entries(
    quantized: &Graph,
    taps: &[TensorId],
    observers: &[Observer],
    wanted: Activations,
) -> Result<Vec<FileEncoding>, QuantizeError> {
    let mut entries = Vec::new();
    for (id, observer) in taps.iter().zip(observers) {
        let tensor = quantized.tensor(*id);
        let Some(Encoding::ScaleOffset { bitwidth, .. }) = tensor.encoding else { continue };
        let signed = matches!(tensor.data_type, DataType::SFixedPoint8 | DataType::SFixedPoint16);
        let schema = if signed { Schema::Symmetric } else { Schema::Asymmetric };
        let least_sqnr_db = wanted.least_sqnr_db.filter(|_| tensor.data_type.bits() == 16);
        let own = Activations { bits: bitwidth, schema, least_sqnr_db, ..wanted };
        entries.push(entry(&tensor.name, &encode(&tensor.name, observer, own)?.encoding));
    }
    Ok(entries)
}

/// The adapter in a file of `qairt-lora-importer`, in floats.
fn read_adapter(graph: &Graph, name: &str, path: &Path, placed: &PlacedAdapters) -> Result<Adapter, Error> {
    let refused = |why: LoraError| Error::lora(path)(why);
    let bytes = match placed.pending(path) {
        Some(bytes) => bytes.clone(),
        None => Bytes::map_file(path).map_err(Error::io(path))?,
    };
    let file = SafetensorsFile::parse(bytes).map_err(|why| refused(LoraError::Safetensors(why)))?;
    if file.metadata(SCALES_KEY).map(str::to_owned) != fingerprint(graph.metadata()) {
        return Err(refused(LoraError::OtherScales));
    }
    let mut values: HashMap<String, crate::Panels> = HashMap::new();
    for tensor_name in file.names() {
        let Some(stored) = file.tensor(tensor_name) else { continue };
        let format = match stored.dtype {
            "F32" => ElementFormat::F32,
            "F16" => ElementFormat::F16,
            "BF16" => ElementFormat::Bf16,
            other => {
                let (tensor, have) = (tensor_name.to_owned(), format!("type {other}"));
                return Err(refused(LoraError::Tensor { tensor, have, want: "F32, F16 or BF16".to_owned() }));
            }
        };
        let tensor = SourceTensor::new(tensor_name, stored.shape, format, stored.bytes)
            .map_err(|why| refused(LoraError::Import(Box::new(why))))?;
        let floats = tensor.to_f32();
        let matrix = Matrix { name: tensor_name.to_owned(), n: tensor.n(), k: tensor.k(), values: &floats };
        values.insert(tensor_name.to_owned(), values::pack(&matrix, DataType::Float32).map_err(refused)?);
    }
    let updatable = graph.tensors().iter().filter(|t| t.tensor_type == TensorType::UpdateableStatic);
    let mut names: Vec<String> = updatable.map(|tensor| tensor.name.clone()).collect();
    names.sort_unstable();
    Adapter::new(name, names.into(), values).map_err(|tensor| {
        let why = "the graph has no adapter branch with it".to_owned();
        refused(LoraError::NoPoint { tensor, why })
    })
}

fn entry(name: &str, (data_type, encoding): &(DataType, Encoding)) -> FileEncoding {
    let (bits, scale, offset) = match *encoding {
        Encoding::ScaleOffset { bitwidth, scale, offset } => (bitwidth, scale, offset),
        _ => unreachable!("`range::encoding` makes one scale and offset"),
    };
    let integers = Integers {
        bits,
        signed: matches!(data_type, DataType::SFixedPoint8 | DataType::SFixedPoint16),
        layout: Layout::PerTensor,
        scales: vec![f64::from(scale)],
        offsets: vec![i64::from(offset)],
    };
    FileEncoding { name: name.to_owned(), is_param: Some(false), numbers: Numbers::Integer(integers) }
}

/// Has `entries` written as the computed tensors of the file, beside the weights that it has. It need not be there.
fn add_to_file(
    placed: &mut PlacedAdapters,
    path: &Path,
    quantized: &Graph,
    entries: Vec<FileEncoding>,
) -> Result<(), Error> {
    let mut tensors = match placed.pending(path) {
        Some(json) => EncodingsFile::parse(json).map_err(Error::encodings(path))?.tensors,
        None if path.is_file() => EncodingsFile::open(path)?.tensors,
        None => Vec::new(),
    };
    tensors.retain(|tensor| tensor.is_param != Some(false) && !is_computed(quantized, &tensor.name));
    // Version 2.0.0 does not tell weights from computed tensors, the one that is written does.
    tensors.iter_mut().for_each(|tensor| tensor.is_param = Some(true));
    tensors.extend(entries);
    let json = EncodingsFile { version: FileVersion::V1_0_0, tensors }.to_json();
    placed.add(path, format!("{json}\n").into_bytes());
    Ok(())
}
