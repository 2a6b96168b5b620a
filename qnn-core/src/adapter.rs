//! An applied adapter: an immutable set of values for a context's updatable tensors.

use std::sync::Arc;

use crate::tensor::Panels;

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
        Ok(Adapter { name: name.into(), names, tensors })
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

    /// The value of the tensor called `name`, or `None` if it is all zeros.
    pub fn find(&self, name: &str) -> Option<&Panels> {
        let index = self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()?;
        self.tensor(index)
    }

    /// Number of tensors that have values.
    pub fn n_tensors(&self) -> usize {
        self.tensors.iter().flatten().count()
    }
}
