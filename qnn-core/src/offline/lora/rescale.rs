//! Imported adapters for a base whose channels were scaled after the import: the same adapters, scaled with it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Component, Path, PathBuf};

use super::{
    Folded, FoldedModule, LoraError, PREFIX, Slot, attach_points,
    import::{LIST_FILE, OVERRIDES_KEY, Origin, encodings, safetensors_of},
    on_base,
};
use crate::{
    atomic_file::{AtomicFile, folder_of},
    error::Error,
    graph::Graph,
    map::Bytes,
    offline::{
        equalize::{SCALES_KEY, fingerprint},
        generate::listed_adapters,
        safetensors::{SafetensorsFile, read_text},
        source::{ElementFormat, SourceTensor},
    },
    types::DataType,
};

/// Adapters that fit a graph, and what is still to be written of them.
#[derive(Debug, Clone)]
pub struct PlacedAdapters {
    /// Their `lora_output_files.yaml`.
    pub list: PathBuf,
    /// Whether they were scaled; then the list is a new one.
    pub are_scaled: bool,
    /// The list that they come from.
    origin: PathBuf,
    /// Contents of the files to write.
    pending: BTreeMap<PathBuf, Bytes>,
}

impl PlacedAdapters {
    /// The adapters of `list` (`lora_output_files.yaml`) as they are.
    pub fn as_imported(list: &Path) -> PlacedAdapters {
        PlacedAdapters { list: list.to_owned(), are_scaled: false, origin: list.to_owned(), pending: BTreeMap::new() }
    }

    /// The list that the user has of them.
    pub(in crate::offline) fn origin(&self) -> &Path {
        &self.origin
    }

    /// What [`PlacedAdapters::write`] will write to `path`.
    pub(in crate::offline) fn pending(&self, path: &Path) -> Option<&Bytes> {
        self.pending.get(path)
    }

    /// Has `bytes` written to `path`, instead of what was to be written there.
    pub(in crate::offline) fn add(&mut self, path: &Path, bytes: Vec<u8>) {
        self.pending.insert(path.to_owned(), bytes.into());
    }

    /// Has a scaled adapter written, in the form in which the importer writes it.
    fn add_adapter(
        &mut self,
        graph: &Graph,
        folded: &Folded,
        weights: &Path,
        encoded: Option<&Path>,
    ) -> Result<(), Error> {
        let origin = Origin { base_scales: fingerprint(graph.metadata()), ..Origin::default() };
        self.add(weights, safetensors_of(folded, &origin).map_err(Error::lora(weights))?);
        let Some(encoded) = encoded else { return Ok(()) };
        let data_type = attach_points(graph).iter().find_map(|point| Some(point.branch?.data_type));
        let json = encodings(folded, data_type.unwrap_or(DataType::Float32)).to_json();
        self.add(encoded, format!("{json}\n").into_bytes());
        Ok(())
    }

    /// Writes the files that changed or are new, and makes their folders.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub fn write(&self) -> Result<(), Error> {
        let mut files = Vec::new();
        for (path, bytes) in &self.pending {
            let folder = folder_of(path);
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            let file = AtomicFile::create(path).map_err(Error::io(path))?;
            file.file().write_all(bytes).map_err(Error::io(path))?;
            files.push((path, file));
        }
        // All have found room on the disk before the first one takes its name.
        files.into_iter().try_for_each(|(path, file)| file.commit().map_err(Error::io(path)))
    }
}

/// The adapters of `list` (`lora_output_files.yaml`) for `graph`: as they are where they were imported with its channel
/// scales, else scaled, to be written, with a list, to `folder`. What was imported is left as it is; nothing is written before
/// [`PlacedAdapters::write`].
///
/// # Errors
/// [`Error::Lora`] naming the file: an adapter that does not fit the graph or was imported for other scales, one to be
/// scaled that was imported with quant_overrides, or one that would have to be written over itself.
pub fn place_adapters(graph: &Graph, list: &Path, folder: &Path) -> Result<PlacedAdapters, Error> {
    let want = fingerprint(graph.metadata());
    let home = list.parent().unwrap_or(Path::new(""));
    let listed = listed_adapters(list).map_err(|why| Error::Generate { path: list.to_owned(), why: Box::new(why) })?;
    let adapters = listed.adapters;
    let mut scaled = Vec::new();
    for adapter in &adapters {
        let refused = |why| Error::lora(&adapter.weights)(why);
        let file = open(&adapter.weights)?;
        let have = file.metadata(SCALES_KEY).map(str::to_owned);
        let folded = read(&adapter.name, &file).and_then(|folded| {
            folded.land(graph.name(), &attach_points(graph))?;
            Ok(folded)
        });
        let folded = folded.map_err(refused)?;
        if have == want {
            continue;
        }
        if have.is_some() {
            return Err(refused(LoraError::OtherScales));
        }
        if let Some(overrides) = file.metadata(OVERRIDES_KEY) {
            return Err(refused(LoraError::NotSupported {
                what: format!(
                    "scaling an adapter with the encodings of {overrides}, which are for its weights as they are"
                ),
                instead: "leave the base's channels as they are (--equalize_channels false, --smooth_inputs false), or \
                          import the adapter without quant_overrides",
            }));
        }
        let folded = on_base(&folded, Some(graph.metadata())).map_err(refused)?.into_owned();
        let place = |path: &PathBuf| below(path, home, folder).map_err(refused);
        let encodings = adapter.encodings.as_ref().map(place).transpose()?;
        scaled.push((folded, place(&adapter.weights)?, encodings));
    }
    if scaled.is_empty() {
        return Ok(PlacedAdapters::as_imported(list));
    }
    if scaled.len() < adapters.len() {
        return Err(Error::lora(list)(LoraError::OtherScales));
    }
    let is_home = |folder: PathBuf| folder_of(list).canonicalize().is_ok_and(|home| home == folder);
    if folder.canonicalize().is_ok_and(is_home) {
        return Err(Error::lora(list)(LoraError::NotSupported {
            what: format!("writing scaled adapters over the imported ones in {}", folder.display()),
            instead: "name another folder",
        }));
    }
    let copy = PlacedAdapters::as_imported(&folder.join(LIST_FILE));
    let mut placed = PlacedAdapters { are_scaled: true, origin: list.to_owned(), ..copy };
    for (folded, weights, encodings) in &scaled {
        placed.add_adapter(graph, folded, weights, encodings.as_deref())?;
    }
    // Its paths are relative, so it is true of the new files as well.
    let text = read_text(list, MAX_LIST_BYTES)?;
    placed.pending.insert(placed.list.clone(), text.into());
    Ok(placed)
}

/// The place below `folder` that `path` has below `home`.
fn below(path: &Path, home: &Path, folder: &Path) -> Result<PathBuf, LoraError> {
    let relative = path.strip_prefix(home).ok();
    let plain = |path: &&Path| path.components().all(|part| matches!(part, Component::Normal(_)));
    relative.filter(plain).map(|path| folder.join(path)).ok_or_else(|| LoraError::NotSupported {
        what: format!("scaling an adapter outside of the folder of its list, {}", path.display()),
        instead: "keep adapters below it, or import them with the DLC that comes out",
    })
}

fn open(path: &Path) -> Result<SafetensorsFile, Error> {
    let bytes = Bytes::map_file(path).map_err(Error::io(path))?;
    SafetensorsFile::parse(bytes).map_err(|why| Error::lora(path)(LoraError::Safetensors(why)))
}

/// What the importer wrote as `file`.
fn read(name: &str, file: &SafetensorsFile) -> Result<Folded, LoraError> {
    let slots: Vec<Slot> = match file.metadata("slots") {
        Some(text) => serde_json::from_str(text).map_err(LoraError::Json)?,
        None => Vec::new(),
    };
    let mut modules = Vec::new();
    for a_name in file.names() {
        let Some(module) = a_name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(".lora_A.weight")) else {
            continue;
        };
        let (rank, k, a_values) = floats(file, a_name)?;
        let (n, columns, b_values) = floats(file, &super::b_name(module))?;
        if rank != columns {
            let (have, want) = (format!("{columns} columns"), format!("{rank}, as A has rows"));
            return Err(LoraError::Tensor { tensor: super::b_name(module), have, want });
        }
        modules.push(FoldedModule { module: module.to_owned(), rank, n, k, a_values, b_values });
    }
    if modules.len() * 2 != file.names().count() {
        let have = format!("{} tensors for {} modules", file.names().count(), modules.len());
        return Err(LoraError::config("tensors", have, "lora_A.weight and lora_B.weight of each module"));
    }
    let rank = modules.iter().map(|module| module.rank).max().unwrap_or(0);
    Ok(Folded { name: name.to_owned(), rank, slots, modules })
}

/// Rows, columns and values of a tensor.
fn floats(file: &SafetensorsFile, name: &str) -> Result<(usize, usize, Vec<f32>), LoraError> {
    let Some(stored) = file.tensor(name) else { return Err(LoraError::Unpaired { have: name.to_owned() }) };
    if stored.dtype != "F32" {
        let (have, want) = (format!("type {}", stored.dtype), "F32, as qairt-lora-importer writes it".to_owned());
        return Err(LoraError::Tensor { tensor: name.to_owned(), have, want });
    }
    let tensor = SourceTensor::new(name, stored.shape, ElementFormat::F32, stored.bytes)
        .map_err(|why| LoraError::Import(Box::new(why)))?;
    Ok((tensor.n(), tensor.k(), tensor.to_f32()))
}

/// Longest list that is read.
const MAX_LIST_BYTES: u64 = 4 << 20;
