//! Adapter sections on a loaded context: load, apply, swap, back to the base.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Context, SectionError, StateError};
use crate::{
    adapter::{Adapter, AdapterGroup},
    binary::{Binary, SectionFile, SectionMeta, SectionType, Verify},
    encoding::Encoding,
    map::Bytes,
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
    /// Loads the section `bytes` and applies it: [`Context::load_section`], then [`Context::apply`].
    ///
    /// A section of type UPDATABLE_QUANT_PARAM takes the place of all that was applied before, values included; one of type
    /// UPDATABLE_WEIGHTS then adds the values of an adapter of that group, or takes the place of those of another one. To
    /// make both effective in one step, load them and apply the adapter.
    ///
    /// # Errors
    /// As both; [`SectionError::GroupMissing`] or [`SectionError::WrongGroup`] for weights whose group is not applied. Nothing
    /// has changed then.
    ///
    /// QNN: `QnnContext_applyBinarySection`.
    pub fn apply_section(&self, graph: Option<&str>, bytes: Bytes) -> Result<Arc<Adapter>, SectionError> {
        let file = SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)?;
        let adapter = match file.meta().section_type {
            SectionType::Updatable => self.adapter_of(file, None)?,
            SectionType::UpdatableQuantParam => self.base_of_group(&self.group_of(&file)?)?,
            SectionType::UpdatableWeights => {
                let group = self.applied_group(graph, file.meta())?;
                self.adapter_of(file, group.as_ref())?
            }
        };
        self.apply(graph, &adapter)?;
        Ok(adapter)
    }

    /// The group whose encodings are applied to every graph that weights with this META are for.
    fn applied_group(
        &self,
        graph: Option<&str>,
        meta: &SectionMeta,
    ) -> Result<Option<Arc<AdapterGroup>>, SectionError> {
        let at = self.graph_numbers(graph.or(meta.graph.as_deref()))?;
        let applied = self.applied.lock();
        let group = |applied: &Use| match applied {
            Use::Base => None,
            Use::Adapter(adapter) => adapter.group().cloned(),
        };
        let mut groups = applied[at].iter().map(group);
        let first = groups.next().flatten();
        let all_same = groups.all(|other| matches!((&first, &other), (Some(a), Some(b)) if Arc::ptr_eq(a, b)));
        Ok(first.filter(|_| all_same))
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

    /// Numbers of the graph called `graph`, or of all.
    pub(super) fn graph_numbers(&self, graph: Option<&str>) -> Result<Range<usize>, SectionError> {
        let Some(name) = graph else { return Ok(0..self.graphs.len()) };
        match self.graphs().position(|other| other == name) {
            Some(at) => Ok(at..at + 1),
            None => {
                let want = self.graphs().collect::<Vec<_>>().join(", ");
                Err(SectionError::UnknownGraph { have: name.to_owned(), want })
            }
        }
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

/// Metadata key: "true" if the graphs cannot run before a section was applied.
pub const WEIGHT_SHARING: &str = "lora_weight_sharing";
