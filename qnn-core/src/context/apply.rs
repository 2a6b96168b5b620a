//! Adapter sections on a loaded context: load, apply, swap, back to the base.

use std::io::{Cursor, Seek, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Context, SectionError, StateError, encodings};
use crate::{
    adapter::{Adapter, Description, Slot},
    binary::{
        Binary, BinaryError, BinaryWriter, GraphIo, SectionFile, SectionMeta, SlotRecord, TOOL, TensorEncodingRecord,
        Verify, Written, section, write_section_file,
    },
    encoding::Encoding,
    error::Error,
    graph::Graph,
    map::Bytes,
    record::TensorRecord,
    tensor::Panels,
    types::TensorType,
};

/// What later executes run with, for each graph of a context.
#[derive(Debug)]
pub(super) struct Applied(Mutex<Vec<Use>>);

/// The default of one graph.
#[derive(Debug, Clone)]
enum Use {
    /// Nothing was applied yet, or it was cleared.
    Base,
    Adapter(Arc<Adapter>),
}

impl Applied {
    pub(super) fn new(n_graphs: usize) -> Applied {
        Applied(Mutex::new(vec![Use::Base; n_graphs]))
    }

    /// A panic cannot leave it half changed: a change is one assignment per graph, of values made before.
    fn lock(&self) -> MutexGuard<'_, Vec<Use>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Context {
    /// Checks the section `bytes` against this context and makes an adapter of it. Values stay where they are; the
    /// adapter keeps `bytes` alive. Nothing is applied.
    ///
    /// # Errors
    /// [`SectionError`] saying what does not fit, with both values.
    pub fn load_section(&self, bytes: Bytes) -> Result<Arc<Adapter>, SectionError> {
        let file = SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)?;
        self.check_section(&file)?;
        let meta = file.meta();
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
        let encodings = encodings::read(&self.graphs, &meta.encodings)?;
        let adapter = Adapter::new(name, Arc::clone(&self.updatable.names), file.into_tensors())
            .map_err(|tensor| SectionError::UnknownTensor { tensor })?;
        let adapter = adapter.with_encodings(encodings).map_err(encodings::refused)?;
        Ok(Arc::new(adapter.described(description).identified(identity)))
    }

    /// Loads the section `bytes` and applies it: [`Context::load_section`], then [`Context::apply`].
    ///
    /// # Errors
    /// As both. Nothing has changed then.
    ///
    /// QNN: `QnnContext_applyBinarySection`.
    pub fn apply_section(&self, graph: Option<&str>, bytes: Bytes) -> Result<Arc<Adapter>, SectionError> {
        let adapter = self.load_section(bytes)?;
        self.apply(graph, &adapter)?;
        Ok(adapter)
    }

    /// Makes `adapter` what later executes run with, in one graph or (`None`) in every graph it is for. Executes that
    /// are running keep what they started with.
    ///
    /// # Errors
    /// [`SectionError`] if it was loaded for another context, or is for another graph. Nothing has changed then.
    pub fn apply(&self, graph: Option<&str>, adapter: &Arc<Adapter>) -> Result<(), SectionError> {
        if !Arc::ptr_eq(adapter.names(), &self.updatable.names) {
            return Err(SectionError::WrongContext { adapter: adapter.name().to_owned() });
        }
        if let (Some(want), Some(have)) = (graph, adapter.graph())
            && want != have
        {
            return Err(SectionError::WrongGraph { have: have.to_owned(), want: want.to_owned() });
        }
        let at = self.graph_numbers(graph.or(adapter.graph()))?;
        self.applied.lock()[at].fill(Use::Adapter(Arc::clone(adapter)));
        Ok(())
    }

    /// Takes back what was applied to one graph or (`None`) to all: they are as after opening.
    ///
    /// # Errors
    /// [`SectionError::UnknownGraph`].
    pub fn clear(&self, graph: Option<&str>) -> Result<(), SectionError> {
        let at = self.graph_numbers(graph)?;
        self.applied.lock()[at].fill(Use::Base);
        Ok(())
    }

    /// What was applied to the graph called `graph`: to be given to [`crate::Bindings::set_adapter`] before an execute.
    /// `None` is the base.
    pub fn adapter(&self, graph: &str) -> Option<Arc<Adapter>> {
        let at = self.graphs().position(|name| name == graph)?;
        match &self.applied.lock()[at] {
            Use::Base => None,
            Use::Adapter(adapter) => Some(Arc::clone(adapter)),
        }
    }

    /// Whether the graph called `graph` may be executed. A context that was made with LoRA weight sharing may only
    /// after its first apply.
    ///
    /// # Errors
    /// [`StateError::NothingApplied`] or [`StateError::UnknownGraph`].
    pub fn ready(&self, graph: &str) -> Result<(), StateError> {
        let at = self.graphs().position(|name| name == graph);
        let at = at.ok_or_else(|| StateError::UnknownGraph { graph: graph.to_owned() })?;
        // Most contexts need no adapter: then there is nothing to look up, and no lock in a step.
        if self.metadata().get(WEIGHT_SHARING).is_none_or(|value| value != "true") {
            return Ok(());
        }
        match self.applied.lock()[at] {
            Use::Base => Err(StateError::NothingApplied { graph: graph.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Names of all updatable constants, sorted: what [`Adapter::new`] wants for an adapter of this context.
    pub fn updatable(&self) -> &Arc<[String]> {
        &self.updatable.names
    }

    /// Most rank columns that an adapter may have; 0 if the context has no low-rank branches.
    pub fn max_rank(&self) -> usize {
        self.updatable.max_rank
    }

    /// The adapter as a section for this context.
    ///
    /// # Errors
    /// [`SectionError`] if it does not fit this context.
    ///
    /// QNN: `QnnContext_getBinarySection`.
    pub fn section(&self, adapter: &Adapter) -> Result<Vec<u8>, SectionError> {
        let failed = |why| SectionError::from(BinaryError::Io { what: "write to memory", why }.at(0));
        let out = Cursor::new(Vec::new());
        let mut writer = BinaryWriter::section(out, self.identity()).map_err(failed)?;
        self.write_section(&mut writer, adapter)?;
        Ok(writer.finish().map_err(failed)?.0.into_inner())
    }

    /// Writes the adapter as a section for this context to `path`, as a whole or not at all.
    ///
    /// # Errors
    /// [`Error::Section`] if it does not fit this context, or what the system says.
    pub fn write_section_file(&self, adapter: &Adapter, path: &Path) -> Result<Written, Error> {
        write_section_file(path, self.identity(), |writer| {
            let place = |why| Error::Section { path: path.to_owned(), why: Box::new(why) };
            self.write_section(writer, adapter).map_err(place)
        })
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
        let encodings = encodings::records(adapter);
        encodings::read(&self.graphs, &encodings)?;
        let slot = |slot: &Slot| SlotRecord {
            name: slot.name.clone(),
            columns: [slot.columns.start, slot.columns.end],
            scaling: slot.scaling,
        };
        let meta = SectionMeta {
            tool: TOOL.to_owned(),
            name: adapter.name().to_owned(),
            graph: description.graph.clone(),
            rank: description.rank,
            slots: description.slots.iter().map(slot).collect(),
            targets: adapter.n_targets(),
            metadata: description.metadata.clone(),
            io: self.io(adapter.graph(), &encodings)?,
            encodings,
        };
        section::check_meta(&meta, &values)
            .and_then(|()| section::write_section(writer, &meta, &values))
            .map_err(|why| why.at(writer.at_bytes()).into())
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
        check_io(&meta.io, &want)
    }

    /// Checks the values of an adapter that says it has `rank` columns.
    fn check_values(&self, rank: usize, values: &[(String, Panels)]) -> Result<(), SectionError> {
        self.check_rank(rank)?;
        self.updatable.check(values)?;
        let want = self.updatable.rank_of(values);
        if rank >= want { Ok(()) } else { Err(SectionError::Columns { have: rank, want }) }
    }

    fn check_rank(&self, have: usize) -> Result<(), SectionError> {
        let declared = self.metadata().get(MAX_RANK).and_then(|text| text.parse().ok());
        let want = declared.unwrap_or(0).max(self.max_rank());
        if have <= want { Ok(()) } else { Err(SectionError::AdapterRank { have, want }) }
    }

    /// Numbers of the graph called `graph`, or of all.
    fn graph_numbers(&self, graph: Option<&str>) -> Result<Range<usize>, SectionError> {
        let Some(name) = graph else { return Ok(0..self.graphs.len()) };
        match self.graphs().position(|other| other == name) {
            Some(at) => Ok(at..at + 1),
            None => {
                let want = self.graphs().collect::<Vec<_>>().join(", ");
                Err(SectionError::UnknownGraph { have: name.to_owned(), want })
            }
        }
    }

    /// The tensors that clients see, of one graph or of all, with the encodings they have after an apply.
    fn io(&self, graph: Option<&str>, encodings: &[TensorEncodingRecord]) -> Result<Vec<GraphIo>, SectionError> {
        let at = self.graph_numbers(graph)?;
        Ok(self.graphs[at].iter().map(|graph| graph_io(graph, encodings)).collect())
    }

    /// The encoding that a client has to use for the input or output `tensor` of the graph called `graph` now: the
    /// applied adapter's, or the graph's own.
    pub fn encoding(&self, graph: &str, tensor: &str) -> Option<Encoding> {
        let adapter = self.adapter(graph);
        let own = adapter.as_ref().and_then(|adapter| adapter.encodings().find(|(name, _)| *name == tensor));
        match own {
            Some((_, own)) => Some(own.encoding.clone()),
            None => {
                let graph = self.graph(graph)?;
                graph.tensor(graph.find(tensor)?).encoding.clone()
            }
        }
    }
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

/// Metadata key: "true" if the graphs cannot run before a section was applied.
pub const WEIGHT_SHARING: &str = "lora_weight_sharing";
/// Metadata key: most rank columns of an adapter.
pub const MAX_RANK: &str = "lora_max_rank";
