//! An applied adapter: an immutable set of values for a context's updatable tensors, and the encodings it runs with.

use std::collections::BTreeMap;
use std::ops::Range;
use std::slice;
use std::sync::Arc;

use htp_sim::Grid;

use crate::{binary::Identity, encoding::Encoding, tensor::Panels, types::DataType};

/// Values for the updatable tensors of a context. Shared and immutable: an execute that runs with it is not disturbed
/// by whatever is applied meanwhile.
///
/// A tensor may have fewer rank columns than its graph declares; the missing ones are zeros, and cost nothing.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    /// Names of all updatable tensors of the context, sorted; one list for all adapters of a context.
    names: Arc<[String]>,
    /// Values in the order of `names`; `None` is all zeros.
    tensors: Vec<Option<Panels>>,
    /// Its own; empty in a group.
    encodings: Encodings,
    group: Option<Arc<AdapterGroup>>,
    description: Description,
    identity: Option<Identity>,
}

/// Encodings that the adapters of a group share: what a section of type UPDATABLE_QUANT_PARAM holds. In memory once for all
/// of them.
#[derive(Debug)]
pub struct AdapterGroup {
    name: String,
    /// As of [`Adapter`].
    names: Arc<[String]>,
    /// The one graph that they are for.
    graph: Option<String>,
    encodings: Encodings,
}

/// Static encodings of computed tensors that replace those of the graphs, sorted by name.
#[derive(Debug, Default)]
struct Encodings(Vec<(String, TensorEncoding, Grid)>);

/// What is known about an adapter beside its values.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Description {
    /// The one graph that it is for; `None` is every graph of the context.
    pub graph: Option<String>,
    /// Columns of the strength tensor that it uses.
    pub rank: usize,
    /// What the columns belong to; empty if that is not known.
    pub slots: Vec<Slot>,
    /// Where the values come from.
    pub metadata: BTreeMap<String, String>,
}

/// Columns of the strength tensor that belong together: all of them, or those of one of several composed adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// The adapter's name.
    pub name: String,
    /// Its columns.
    pub columns: Range<usize>,
    /// The factor `lora_alpha / r` (or `/ sqrt(r)`) that its values contain, if it was one for all.
    pub scaling: Option<f32>,
}

/// The static encoding that an adapter brings for a computed tensor.
#[derive(Debug, Clone)]
pub struct TensorEncoding {
    /// Element type: that of the graph.
    pub data_type: DataType,
    /// One scale and offset.
    pub encoding: Encoding,
}

impl Adapter {
    /// Puts together the adapter `name` for a context whose updatable tensors are `names` (sorted).
    ///
    /// # Errors
    /// The first name of `values` that is not among `names`.
    pub fn new(
        name: impl Into<String>,
        names: Arc<[String]>,
        values: impl IntoIterator<Item = (String, Panels)>,
    ) -> Result<Adapter, String> {
        let mut tensors = vec![None; names.len()];
        for (name, panels) in values {
            let Ok(index) = names.binary_search(&name) else { return Err(name) };
            tensors[index] = Some(panels);
        }
        let (encodings, description) = (Encodings::default(), Description::default());
        Ok(Adapter { name: name.into(), names, tensors, encodings, group: None, description, identity: None })
    }

    /// The same values with a description.
    #[must_use]
    pub fn described(self, description: Description) -> Adapter {
        Adapter { description, ..self }
    }

    /// The same values with encodings of their own for computed tensors, by name. A context that the adapter is applied to
    /// has to declare these tensors as updatable.
    ///
    /// # Errors
    /// The first name that is there twice or whose encoding no computed tensor can have, and why.
    pub fn with_encodings(
        self,
        encodings: impl IntoIterator<Item = (String, TensorEncoding)>,
    ) -> Result<Adapter, (String, String)> {
        Ok(Adapter { encodings: Encodings::new(encodings)?, group: None, ..self })
    }

    /// The same values with the encodings of `group`, in place of any of their own.
    #[must_use]
    pub fn in_group(self, group: Arc<AdapterGroup>) -> Adapter {
        Adapter { encodings: Encodings::default(), group: Some(group), ..self }
    }

    pub(crate) fn identified(self, identity: Identity) -> Adapter {
        Adapter { identity: Some(identity), ..self }
    }

    /// The adapter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of all updatable tensors of the context, sorted.
    pub fn names(&self) -> &Arc<[String]> {
        &self.names
    }

    /// The value of tensor number `index` of [`Adapter::names`], or `None` if it is all zeros.
    pub fn tensor(&self, index: usize) -> Option<&Panels> {
        self.tensors.get(index)?.as_ref()
    }

    /// Asks for what [`Adapter::tensor`] reads, without a look at it.
    pub(crate) fn prefetch(&self, index: usize) {
        self.tensors.get(index).into_iter().for_each(|tensor| htp_sim::prefetch(slice::from_ref(tensor)));
    }

    /// The value of the tensor called `name`, or `None` if it is all zeros.
    pub fn find(&self, name: &str) -> Option<&Panels> {
        let index = self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()?;
        self.tensor(index)
    }

    /// Names and values of the tensors that have values, in the order of their names.
    pub fn values(&self) -> impl Iterator<Item = (&str, &Panels)> {
        let named = self.names.iter().zip(&self.tensors);
        named.filter_map(|(name, value)| Some((name.as_str(), value.as_ref()?)))
    }

    /// Names and encodings of the computed tensors whose encoding is not the graph's with this adapter, in the order of
    /// their names.
    pub fn encodings(&self) -> impl Iterator<Item = (&str, &TensorEncoding)> {
        self.in_force().iter()
    }

    /// The group whose encodings it runs with.
    pub fn group(&self) -> Option<&Arc<AdapterGroup>> {
        self.group.as_ref()
    }

    /// The grid of computed tensor `name` with this adapter, if it is not the graph's.
    pub(crate) fn grid(&self, name: &str) -> Option<Grid> {
        self.in_force().grid(name)
    }

    fn in_force(&self) -> &Encodings {
        self.group.as_ref().map_or(&self.encodings, |group| &group.encodings)
    }

    /// Number of tensors that have values.
    pub fn n_tensors(&self) -> usize {
        self.tensors.iter().flatten().count()
    }

    /// Number of layers that it changes: pairs A, B that have values.
    pub fn n_targets(&self) -> usize {
        self.n_tensors().div_ceil(2)
    }

    /// Bytes of all values as they are kept.
    pub fn size_bytes(&self) -> u64 {
        self.tensors.iter().flatten().map(|panels| panels.bytes().len() as u64).sum()
    }

    /// The one graph that it is for; `None` is every graph of the context.
    pub fn graph(&self) -> Option<&str> {
        self.description.graph.as_deref()
    }

    /// Columns of the strength tensor that it uses; 0 if it has no values.
    pub fn rank(&self) -> usize {
        self.description.rank
    }

    /// What the columns belong to.
    pub fn slots(&self) -> &[Slot] {
        &self.description.slots
    }

    /// The factor that the values contain, if there is one slot and one factor for all its layers.
    pub fn scaling(&self) -> Option<f32> {
        match self.slots() {
            [slot] => slot.scaling,
            _ => None,
        }
    }

    /// Everything that is known beside the values.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Hash of the values, as the section states it; `None` for an adapter that was made in memory.
    pub fn identity(&self) -> Option<Identity> {
        self.identity
    }
}

impl AdapterGroup {
    /// Puts together the group `name` for a context whose updatable tensors are `names` (sorted).
    ///
    /// # Errors
    /// As [`Adapter::with_encodings`].
    pub fn new(
        name: impl Into<String>,
        names: Arc<[String]>,
        encodings: impl IntoIterator<Item = (String, TensorEncoding)>,
    ) -> Result<AdapterGroup, (String, String)> {
        Ok(AdapterGroup { name: name.into(), names, graph: None, encodings: Encodings::new(encodings)? })
    }

    /// The same encodings for one graph only.
    #[must_use]
    pub fn for_graph(self, graph: Option<String>) -> AdapterGroup {
        AdapterGroup { graph, ..self }
    }

    /// The group's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of all updatable tensors of the context, sorted.
    pub fn names(&self) -> &Arc<[String]> {
        &self.names
    }

    /// The one graph that it is for; `None` is every graph of the context.
    pub fn graph(&self) -> Option<&str> {
        self.graph.as_deref()
    }

    /// Names and encodings, in the order of the names.
    pub fn encodings(&self) -> impl Iterator<Item = (&str, &TensorEncoding)> {
        self.encodings.iter()
    }
}

impl Encodings {
    fn new(encodings: impl IntoIterator<Item = (String, TensorEncoding)>) -> Result<Encodings, (String, String)> {
        let mut own = Vec::new();
        for (name, encoding) in encodings {
            match encoding.encoding.grid(encoding.data_type) {
                Ok(grid) => own.push((name, encoding, grid)),
                Err(why) => return Err((name, why)),
            }
        }
        own.sort_by(|a, b| a.0.cmp(&b.0));
        match own.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err((pair[0].0.clone(), "two encodings".to_owned())),
            None => Ok(Encodings(own)),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&str, &TensorEncoding)> {
        self.0.iter().map(|(name, encoding, _)| (name.as_str(), encoding))
    }

    fn grid(&self, name: &str) -> Option<Grid> {
        let index = self.0.binary_search_by(|(own, ..)| own.as_str().cmp(name)).ok()?;
        Some(self.0[index].2)
    }
}
