//! `ContextEditor`: the offline call flow of QNN's LoRA tutorial, step by step.
//!
//! ```text
//! graphs or a binary ─► finalize ─► binary
//! for each adapter: update tensors ─► finalize ─► section size ─► section
//! ```
//!
//! Values stay until they are updated again: an adapter that leaves a tensor alone which the one before it had gives it
//! the value "no data", all zeros.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Context, ContextBuilder, SectionError, StateError, Updatable};
use crate::{
    adapter::{Adapter, Description, Slot},
    backend::htp::pack_update,
    binary::{BinaryFault, Verify},
    graph::Graph,
    map::Bytes,
    tensor::{Panels, Tensor},
    types::TensorType,
};

/// A context being made or changed offline.
#[derive(Debug, Default)]
pub struct ContextEditor {
    graphs: Vec<Graph>,
    metadata: BTreeMap<String, String>,
    /// The context without values; `None` until the first finalize.
    base: Option<Context>,
    /// Made from a binary: no graphs can be added.
    closed: bool,
    /// Values since the last finalize.
    staged: Values,
    /// Values that sections are made of.
    values: Values,
    /// Nothing has changed since the last finalize.
    finalized: bool,
}

/// Values by the graph they are for (`None`: all) and tensor name; `None` is all zeros.
type Values = BTreeMap<(Option<String>, String), Option<Panels>>;

impl ContextEditor {
    /// An editor without graphs.
    ///
    /// QNN: `QnnContext_create`.
    pub fn new() -> ContextEditor {
        ContextEditor::default()
    }

    /// An editor of the context binary `bytes`. QNN leaves it to the backend whether updates and sections are possible
    /// then; here they are. The graphs are finalized, and no graph can be added.
    ///
    /// # Errors
    /// [`BinaryFault`]: what is wrong with `bytes` and where.
    ///
    /// QNN: `QnnContext_createFromBinary`.
    pub fn from_binary(bytes: Bytes) -> Result<ContextEditor, BinaryFault> {
        let base = Context::from_binary(bytes, Verify::Checksums)?;
        let (graphs, metadata) = (base.all_graphs().to_vec(), base.metadata().clone());
        let editor = ContextEditor { graphs, metadata, base: Some(base), closed: true, ..ContextEditor::default() };
        Ok(ContextEditor { finalized: true, ..editor })
    }

    /// Records a fact about the model.
    ///
    /// # Errors
    /// [`StateError::Closed`] after `from_binary`.
    pub fn set_metadata(&mut self, key: impl Into<String>, value: impl Into<String>) -> Result<(), StateError> {
        self.change_graphs()?.metadata.insert(key.into(), value.into());
        Ok(())
    }

    /// Adds a graph.
    ///
    /// # Errors
    /// [`StateError`] after `from_binary`, or if the name is taken.
    ///
    /// QNN: `QnnGraph_create`, with its tensors and nodes.
    pub fn add_graph(&mut self, graph: Graph) -> Result<(), StateError> {
        if self.graphs.iter().any(|other| other.name() == graph.name()) {
            return Err(StateError::DuplicateGraph { graph: graph.name().to_owned() });
        }
        self.change_graphs()?.graphs.push(graph);
        Ok(())
    }

    /// Gives tensors of one graph new values, from the next [`ContextEditor::finalize`] on. A tensor brings its element
    /// type and extents, which may have fewer rank columns than the graph declares; without data it becomes all zeros.
    ///
    /// # Errors
    /// [`StateError`] naming the tensor that is not there, must not be updated, or does not fit. No value has changed then.
    ///
    /// QNN: `QnnTensor_updateGraphTensors`.
    pub fn update_graph_tensors(&mut self, graph: &str, tensors: &[Tensor]) -> Result<(), StateError> {
        self.update(Some(graph), tensors)
    }

    /// As [`ContextEditor::update_graph_tensors`], for all graphs that have the tensors.
    ///
    /// # Errors
    /// As there.
    ///
    /// QNN: `QnnTensor_updateContextTensors`.
    pub fn update_context_tensors(&mut self, tensors: &[Tensor]) -> Result<(), StateError> {
        self.update(None, tensors)
    }

    /// Makes what was added and updated take effect.
    ///
    /// # Errors
    /// [`StateError`] if a graph is not complete, or of a pair only one half has a value, or their ranks differ. Nothing has
    /// taken effect then.
    ///
    /// QNN: `QnnGraph_finalize`, of all graphs.
    pub fn finalize(&mut self) -> Result<(), StateError> {
        let base = match self.base.take() {
            Some(base) => base,
            None => self.make_base()?,
        };
        let mut values = self.values.clone();
        values.extend(self.staged.clone());
        let mut scopes = std::iter::once(None).chain(self.graphs.iter().map(|graph| Some(graph.name())));
        let checked = scopes.try_for_each(|scope| base.updatable.check(&seen(&values, scope)));
        self.base = Some(base);
        checked?;
        (self.values, self.finalized) = (values, true);
        self.staged.clear();
        Ok(())
    }

    /// The context, without any adapter's values.
    ///
    /// # Errors
    /// [`StateError::NotFinalized`].
    ///
    /// QNN: `QnnContext_getBinary`; its length is `QnnContext_getBinarySize`.
    pub fn binary(&self) -> Result<Vec<u8>, StateError> {
        Ok(self.ready("the context binary")?.to_binary()?)
    }

    /// Size of the section that [`ContextEditor::section`] gives.
    ///
    /// # Errors
    /// As there.
    ///
    /// QNN: `QnnContext_getBinarySectionSize`.
    pub fn section_size(&self, graph: Option<&str>, name: &str) -> Result<u64, StateError> {
        self.section(graph, name).map(|section| section.len() as u64)
    }

    /// The values as the adapter section `name`, of one graph or of the whole context.
    ///
    /// # Errors
    /// [`StateError`] if the graphs are not finalized, the graph is not there, or the whole context is asked for while a
    /// graph has values of its own.
    ///
    /// QNN: `QnnContext_getBinarySection`.
    pub fn section(&self, graph: Option<&str>, name: &str) -> Result<Vec<u8>, StateError> {
        let base = self.ready("a section")?;
        match graph {
            Some(graph) => _ = self.graph(graph)?,
            None => {
                let mut own = self.values.iter().filter(|(_, value)| value.is_some());
                if let Some(graph) = own.find_map(|((graph, _), _)| graph.clone()) {
                    return Err(StateError::PerGraph { graph });
                }
            }
        }
        let values = seen(&self.values, graph);
        let rank = base.updatable.rank_of(&values);
        let slot = Slot { name: name.to_owned(), columns: 0..rank, scaling: None };
        let slots = if rank == 0 { Vec::new() } else { vec![slot] };
        let description = Description { graph: graph.map(str::to_owned), rank, slots, ..Description::default() };
        let adapter = Adapter::new(name, Arc::clone(base.updatable()), values)
            .map_err(|tensor| SectionError::UnknownTensor { tensor })?;
        Ok(base.section(&adapter.described(description))?)
    }

    fn change_graphs(&mut self) -> Result<&mut ContextEditor, StateError> {
        if self.closed {
            return Err(StateError::Closed);
        }
        (self.base, self.finalized) = (None, false);
        Ok(self)
    }

    fn make_base(&self) -> Result<Context, StateError> {
        let mut builder = ContextBuilder::new();
        for graph in &self.graphs {
            graph.finalize()?;
            builder = builder.graph(graph.clone());
        }
        for (key, value) in &self.metadata {
            builder = builder.metadata(key, value);
        }
        let bytes = Bytes::from(builder.to_binary()?);
        Ok(Context::from_binary(bytes, Verify::Headers).map_err(|fault| fault.why)?)
    }

    fn ready(&self, what: &'static str) -> Result<&Context, StateError> {
        self.base.as_ref().filter(|_| self.finalized).ok_or(StateError::NotFinalized { what })
    }

    fn graph(&self, name: &str) -> Result<&Graph, StateError> {
        let found = self.graphs.iter().find(|graph| graph.name() == name);
        found.ok_or_else(|| StateError::UnknownGraph { graph: name.to_owned() })
    }

    fn update(&mut self, graph: Option<&str>, tensors: &[Tensor]) -> Result<(), StateError> {
        let graphs = match graph {
            Some(name) => std::slice::from_ref(self.graph(name)?),
            None => &self.graphs,
        };
        let updatable = Updatable::of(graphs)?;
        let mut staged = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            check_kind(graphs, graph, tensor)?;
            let value = match &tensor.data {
                None => None,
                Some(_) => {
                    let panels = pack_update(tensor)?;
                    updatable.check_one(&tensor.name, &panels)?;
                    Some(panels)
                }
            };
            staged.push(((graph.map(str::to_owned), tensor.name.clone()), value));
        }
        self.staged.extend(staged);
        self.finalized = false;
        Ok(())
    }
}

/// Only UPDATEABLE tensors may be updated, and of those only constants have values.
fn check_kind(graphs: &[Graph], graph: Option<&str>, tensor: &Tensor) -> Result<(), StateError> {
    let name = tensor.name.clone();
    let Some(own) = graphs.iter().find_map(|graph| Some(graph.tensor(graph.find(&name)?))) else {
        let place = graph.map_or("the context".to_owned(), |graph| format!("graph {graph:?}"));
        return Err(StateError::UnknownTensor { tensor: name, place });
    };
    match own.tensor_type {
        TensorType::UpdateableStatic if tensor.tensor_type != own.tensor_type => {
            let (have, want) = (tensor.tensor_type.to_string(), own.tensor_type.to_string());
            Err(StateError::Incompatible { tensor: name, have, want })
        }
        TensorType::UpdateableStatic => Ok(()),
        TensorType::UpdateableNative
        | TensorType::UpdateableAppWrite
        | TensorType::UpdateableAppRead
        | TensorType::UpdateableAppReadWrite => {
            let have = format!("an encoding of {}", own.tensor_type);
            Err(StateError::Incompatible {
                tensor: name,
                have,
                want: "a value: encodings cannot be changed yet".to_owned(),
            })
        }
        have => Err(StateError::NotUpdateable { tensor: name, have }),
    }
}

/// What a graph sees (its own values before those of the context), or the context as a whole; sorted by name.
fn seen(values: &Values, graph: Option<&str>) -> Vec<(String, Panels)> {
    let mut seen: BTreeMap<&str, &Option<Panels>> = BTreeMap::new();
    for scope in [None, graph] {
        let own = values.iter().filter(|((of, _), _)| of.as_deref() == scope);
        seen.extend(own.map(|((_, name), value)| (name.as_str(), value)));
    }
    seen.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))).collect()
}
