//! Adapter sections as files: reading them against a context, and writing them for it.
//!
//! ```text
//! UPDATABLE ─────────────► Adapter
//! UPDATABLE_QUANT_PARAM ─► AdapterGroup ─┐
//! UPDATABLE_WEIGHTS ─────────────────────┴─► Adapter, one of the group's
//! ```

use std::io::{Cursor, Seek, Write};
use std::path::Path;
use std::sync::Arc;

use super::{Context, SectionError, encodings};
use crate::{
    adapter::{Adapter, AdapterGroup, Description, Slot},
    binary::{
        Binary, BinaryError, BinaryWriter, GraphIo, SectionFile, SectionMeta, SectionType, SlotRecord, TOOL,
        TensorEncodingRecord, Verify, Written, section, write_section_file,
    },
    error::Error,
    graph::Graph,
    map::Bytes,
    record::TensorRecord,
    tensor::Panels,
    types::TensorType,
};

impl Context {
    /// Checks the section `bytes` against this context and makes an adapter of it. Values stay where they are; the
    /// adapter keeps `bytes` alive. Nothing is applied.
    ///
    /// # Errors
    /// [`SectionError`] saying what does not fit, with both values; [`SectionError::GroupMissing`] for a section without
    /// encodings, which takes [`Context::load_grouped_section`].
    pub fn load_section(&self, bytes: Bytes) -> Result<Arc<Adapter>, SectionError> {
        self.adapter_of(SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)?, None)
    }

    /// Checks the section `bytes` of type UPDATABLE_QUANT_PARAM against this context and makes a group of it. Nothing is
    /// applied.
    ///
    /// # Errors
    /// As [`Context::load_section`].
    pub fn load_group(&self, bytes: Bytes) -> Result<Arc<AdapterGroup>, SectionError> {
        self.group_of(&SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)?)
    }

    /// As [`Context::load_section`], of a section of type UPDATABLE_WEIGHTS, whose adapter runs with the encodings of
    /// `group`. Nothing is applied: [`Context::apply`] makes both effective at once.
    ///
    /// # Errors
    /// As there; [`SectionError::WrongGroup`] if the adapter belongs to another group.
    pub fn load_grouped_section(&self, bytes: Bytes, group: &Arc<AdapterGroup>) -> Result<Arc<Adapter>, SectionError> {
        self.adapter_of(SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)?, Some(group))
    }

    /// An adapter without values that runs with the encodings of `group`: the base as its members see it.
    ///
    /// # Errors
    /// [`SectionError::WrongContext`].
    pub fn base_of_group(&self, group: &Arc<AdapterGroup>) -> Result<Arc<Adapter>, SectionError> {
        self.check_group(group, group.name())?;
        let adapter = Adapter::new(group.name(), Arc::clone(&self.updatable.names), [])
            .map_err(|tensor| SectionError::UnknownTensor { tensor })?;
        let description = Description { graph: group.graph().map(str::to_owned), ..Description::default() };
        Ok(Arc::new(adapter.described(description).in_group(Arc::clone(group))))
    }

    /// The adapter in `file`: with its own encodings, or those of `group`.
    pub(super) fn adapter_of(
        &self,
        file: SectionFile,
        group: Option<&Arc<AdapterGroup>>,
    ) -> Result<Arc<Adapter>, SectionError> {
        self.check_section(&file)?;
        let meta = file.meta();
        check_membership(meta, group)?;
        let slot = |slot: &SlotRecord| Slot {
            name: slot.name.clone(),
            columns: slot.columns[0]..slot.columns[1],
            scaling: slot.scaling,
        };
        let description = Description {
            graph: meta.graph.clone(),
            rank: meta.rank,
            slots: meta.slots.iter().map(slot).collect(),
            metadata: meta.metadata.clone(),
        };
        let (name, identity) = (meta.name.clone(), file.binary().identity());
        let own = encodings::read(&self.graphs, &meta.encodings)?;
        if let Some(group) = group {
            self.check_group(group, &name)?;
        }
        let adapter = Adapter::new(name, Arc::clone(&self.updatable.names), file.into_tensors())
            .map_err(|tensor| SectionError::UnknownTensor { tensor })?
            .described(description)
            .identified(identity);
        Ok(Arc::new(match group {
            Some(group) => adapter.in_group(Arc::clone(group)),
            None => adapter.with_encodings(own).map_err(encodings::refused)?,
        }))
    }

    /// The group in `file`.
    pub(super) fn group_of(&self, file: &SectionFile) -> Result<Arc<AdapterGroup>, SectionError> {
        self.check_section(file)?;
        let meta = file.meta();
        if meta.section_type != SectionType::UpdatableQuantParam {
            let (name, have, want) = (meta.name.clone(), meta.section_type, SectionType::UpdatableQuantParam);
            return Err(SectionError::Type { name, have, want });
        }
        let own = encodings::read(&self.graphs, &meta.encodings)?;
        let group =
            AdapterGroup::new(&meta.name, Arc::clone(&self.updatable.names), own).map_err(encodings::refused)?;
        Ok(Arc::new(group.for_graph(meta.graph.clone())))
    }

    fn check_group(&self, group: &AdapterGroup, adapter: &str) -> Result<(), SectionError> {
        match Arc::ptr_eq(group.names(), &self.updatable.names) {
            true => Ok(()),
            false => Err(SectionError::WrongContext { adapter: adapter.to_owned() }),
        }
    }

    /// The adapter as a section for this context: of type UPDATABLE_WEIGHTS if it is one of a group, else UPDATABLE.
    ///
    /// # Errors
    /// [`SectionError`] if it does not fit this context.
    ///
    /// QNN: `QnnContext_getBinarySection`.
    pub fn section(&self, adapter: &Adapter) -> Result<Vec<u8>, SectionError> {
        self.in_memory(|writer| self.write_section(writer, adapter))
    }

    /// The encodings of `group` as a section of type UPDATABLE_QUANT_PARAM for this context.
    ///
    /// # Errors
    /// [`SectionError`] if they do not fit this context.
    ///
    /// QNN: `QnnContext_getBinarySection`.
    pub fn group_section(&self, group: &AdapterGroup) -> Result<Vec<u8>, SectionError> {
        self.in_memory(|writer| self.write_group(writer, group))
    }

    fn in_memory(
        &self,
        write: impl FnOnce(&mut BinaryWriter<Cursor<Vec<u8>>>) -> Result<(), SectionError>,
    ) -> Result<Vec<u8>, SectionError> {
        let failed = |why| SectionError::from(BinaryError::Io { what: "write to memory", why }.at(0));
        let mut writer = BinaryWriter::section(Cursor::new(Vec::new()), self.identity()).map_err(failed)?;
        write(&mut writer)?;
        Ok(writer.finish().map_err(failed)?.0.into_inner())
    }

    /// Writes what [`Context::section`] gives to `path`, as a whole or not at all.
    ///
    /// # Errors
    /// [`Error::Section`] if it does not fit this context, or what the system says.
    pub fn write_section_file(&self, adapter: &Adapter, path: &Path) -> Result<Written, Error> {
        write_section_file(path, self.identity(), |writer| {
            self.write_section(writer, adapter).map_err(refused_for(path))
        })
    }

    /// Writes what [`Context::group_section`] gives to `path`, as a whole or not at all.
    ///
    /// # Errors
    /// As [`Context::write_section_file`].
    pub fn write_group_file(&self, group: &AdapterGroup, path: &Path) -> Result<Written, Error> {
        write_section_file(path, self.identity(), |writer| self.write_group(writer, group).map_err(refused_for(path)))
    }

    fn write_section<W: Write + Seek>(
        &self,
        writer: &mut BinaryWriter<W>,
        adapter: &Adapter,
    ) -> Result<(), SectionError> {
        let description = adapter.description();
        let values: Vec<(String, Panels)> =
            adapter.values().map(|(name, panels)| (name.to_owned(), panels.clone())).collect();
        self.check_values(description.rank, &values)?;
        let encodings = encodings::records(adapter.encodings());
        encodings::read(&self.graphs, &encodings)?;
        let slot = |slot: &Slot| SlotRecord {
            name: slot.name.clone(),
            columns: [slot.columns.start, slot.columns.end],
            scaling: slot.scaling,
        };
        let whole = SectionMeta {
            tool: TOOL.to_owned(),
            name: adapter.name().to_owned(),
            section_type: SectionType::Updatable,
            group: None,
            graph: description.graph.clone(),
            rank: description.rank,
            slots: description.slots.iter().map(slot).collect(),
            targets: adapter.n_targets(),
            metadata: description.metadata.clone(),
            io: self.io(adapter.graph(), &encodings)?,
            encodings,
        };
        let meta = match adapter.group() {
            None => whole,
            Some(group) => SectionMeta {
                section_type: SectionType::UpdatableWeights,
                group: Some(group.name().to_owned()),
                io: Vec::new(),
                encodings: Vec::new(),
                ..whole
            },
        };
        put(writer, &meta, &values)
    }

    fn write_group<W: Write + Seek>(
        &self,
        writer: &mut BinaryWriter<W>,
        group: &AdapterGroup,
    ) -> Result<(), SectionError> {
        let encodings = encodings::records(group.encodings());
        encodings::read(&self.graphs, &encodings)?;
        let meta = SectionMeta {
            tool: TOOL.to_owned(),
            name: group.name().to_owned(),
            section_type: SectionType::UpdatableQuantParam,
            group: None,
            graph: group.graph().map(str::to_owned),
            rank: 0,
            slots: Vec::new(),
            targets: 0,
            metadata: Default::default(),
            io: self.io(group.graph(), &encodings)?,
            encodings,
        };
        put(writer, &meta, &[])
    }

    /// Everything that a checked file has to share with this context.
    fn check_section(&self, file: &SectionFile) -> Result<(), SectionError> {
        let (have, want) = (file.binary().base_identity(), self.identity());
        if have != want {
            return Err(SectionError::Base { have, want });
        }
        let (have, want) = (file.binary().sdk_version(), self.sdk_version());
        if have != want {
            return Err(SectionError::SdkVersion { have, want });
        }
        let meta = file.meta();
        let want = self.io(meta.graph.as_deref(), &meta.encodings)?;
        self.check_values(meta.rank, file.tensors())?;
        // Weights alone say nothing of inputs and outputs: their group does.
        if meta.section_type == SectionType::UpdatableWeights { Ok(()) } else { check_io(&meta.io, &want) }
    }

    /// Checks the values of an adapter that says it has `rank` columns.
    fn check_values(&self, rank: usize, values: &[(String, Panels)]) -> Result<(), SectionError> {
        self.check_rank(rank)?;
        self.updatable.check(values)?;
        let want = self.updatable.rank_of(values);
        if rank >= want { Ok(()) } else { Err(SectionError::Columns { have: rank, want }) }
    }

    fn check_rank(&self, have: usize) -> Result<(), SectionError> {
        // What a file declares is bounded: clients keep a number for each column.
        let declared = self.metadata().get(MAX_RANK).and_then(|text| text.parse().ok()).unwrap_or(0);
        let want = declared.min(MAX_LORA_RANK).max(self.max_rank());
        if have <= want { Ok(()) } else { Err(SectionError::AdapterRank { have, want }) }
    }

    /// The tensors that clients see, of one graph or of all, with the encodings they have after an apply.
    fn io(&self, graph: Option<&str>, encodings: &[TensorEncodingRecord]) -> Result<Vec<GraphIo>, SectionError> {
        let at = self.graph_numbers(graph)?;
        Ok(self.graphs[at].iter().map(|graph| graph_io(graph, encodings)).collect())
    }
}

/// Whether the section of an adapter may run with the encodings of `group`, or with its own.
fn check_membership(meta: &SectionMeta, group: Option<&Arc<AdapterGroup>>) -> Result<(), SectionError> {
    let adapter = meta.name.clone();
    let (want, group) = match (&meta.group, group) {
        (None, None) => (SectionType::Updatable, None),
        (Some(own), None) => return Err(SectionError::GroupMissing { adapter, group: own.clone() }),
        (_, Some(group)) => (SectionType::UpdatableWeights, Some(group)),
    };
    if meta.section_type != want {
        return Err(SectionError::Type { name: adapter, have: meta.section_type, want });
    }
    let (Some(group), Some(own)) = (group, &meta.group) else { return Ok(()) };
    if own != group.name() {
        return Err(SectionError::WrongGroup { adapter, have: own.clone(), want: group.name().to_owned() });
    }
    match (group.graph(), meta.graph.as_deref()) {
        (Some(of_group), own) if own != Some(of_group) => {
            let have = own.unwrap_or("every graph").to_owned();
            Err(SectionError::WrongGraph { have, want: of_group.to_owned() })
        }
        _ => Ok(()),
    }
}

/// Adds the file.
fn refused_for(path: &Path) -> impl Fn(SectionError) -> Error {
    move |why| Error::Section { path: path.to_owned(), why: Box::new(why) }
}

fn put<W: Write + Seek>(
    writer: &mut BinaryWriter<W>,
    meta: &SectionMeta,
    values: &[(String, Panels)],
) -> Result<(), SectionError> {
    section::check_meta(meta, values)
        .and_then(|()| section::write_section(writer, meta, values))
        .map_err(|why| why.at(writer.at_bytes()).into())
}

fn graph_io(graph: &Graph, encodings: &[TensorEncodingRecord]) -> GraphIo {
    let seen = graph.tensors().iter().filter(|tensor| {
        let kind = tensor.tensor_type;
        kind.is_input() || kind.is_output() || kind == TensorType::UpdateableAppReadWrite
    });
    let with_own = |tensor| {
        let mut record = TensorRecord::from_tensor(tensor, graph);
        if let Some(own) = encodings.iter().find(|own| own.tensor == tensor.name) {
            record.encoding = Some(own.encoding.clone());
        }
        record
    };
    let tensors = seen.map(with_own).collect();
    GraphIo { graph: graph.name().to_owned(), tensors }
}

/// Encodings of a graph's tensors are fixed: no backend can change them yet.
fn check_io(have: &[GraphIo], want: &[GraphIo]) -> Result<(), SectionError> {
    if have == want {
        return Ok(());
    }
    let flat = |io: &[GraphIo]| -> Vec<(String, TensorRecord)> {
        io.iter().flat_map(|io| io.tensors.iter().map(|tensor| (io.graph.clone(), tensor.clone()))).collect()
    };
    let (have, want) = (flat(have), flat(want));
    let at = (0..have.len().max(want.len())).find(|i| have.get(*i) != want.get(*i)).unwrap_or(0);
    let show = |tensor: Option<&(String, TensorRecord)>| {
        tensor.map_or("nothing".to_owned(), |(_, tensor)| serde_json::to_string(tensor).unwrap_or_default())
    };
    let (have, want) = (have.get(at), want.get(at));
    let (graph, tensor) = want.or(have).map(|(graph, tensor)| (graph.clone(), tensor.name.clone())).unwrap_or_default();
    Err(SectionError::Io { graph, tensor, have: show(have), want: show(want) })
}

/// Metadata key: most rank columns of an adapter.
pub const MAX_RANK: &str = "lora_max_rank";

/// Columns of a branch, and of an adapter, at most.
pub const MAX_LORA_RANK: usize = 512;
