//! The seam between a graph and what runs it.

use std::sync::{Arc, atomic::AtomicBool};

use crate::{
    adapter::Adapter,
    graph::{Graph, Node},
    op::OpKind,
    tensor::{Dim, TensorId},
    types::DataType,
};

pub mod account;
pub mod htp;
pub mod reference;
pub mod state;
pub mod watch;

pub use account::Account;
pub use htp::HtpBackend;
pub use reference::ReferenceBackend;
pub use state::State;
pub(crate) use state::cache_format;
pub use watch::{Seen, Watch, Watched};

/// Turns a graph into something that runs.
pub trait Backend {
    /// Checks that every operation is supported and plans the execution.
    ///
    /// # Errors
    /// [`PrepareError`] naming the node or tensor that cannot be run.
    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Executable>, PrepareError>;

    /// Makes the caches that executables of `graphs` share, for `capacity` positions.
    ///
    /// # Errors
    /// [`PrepareError::Tensor`] for a cache of a type that cannot be kept.
    fn new_state(&self, graphs: &[&Graph], capacity: usize) -> Result<State, PrepareError>;
}

/// A graph ready to run, with its own scratch memory. Constants are shared with the graph it was made from.
pub trait Executable: Send {
    /// Runs the graph once: reads the inputs of `bindings`, updates `state` in place, fills the outputs.
    ///
    /// `cancel` is looked at between operations.
    ///
    /// # Errors
    /// [`ExecuteError`]. Outputs are then unspecified; of the state only rows at and after `cache_index` can differ.
    fn execute(&mut self, bindings: &mut Bindings, state: &mut State, cancel: &AtomicBool) -> Result<(), ExecuteError>;

    /// As [`Executable::execute`], and shows `watch` every tensor that is computed as such (not what fusion leaves out), which
    /// it may change.
    ///
    /// # Errors
    /// As [`Executable::execute`].
    fn execute_watched(
        &mut self,
        bindings: &mut Bindings,
        state: &mut State,
        cancel: &AtomicBool,
        watch: &mut Watch<'_>,
    ) -> Result<(), ExecuteError>;

    /// Keeps an account of where the time goes, from zero and from now on. A backend that cannot does nothing.
    fn start_account(&mut self) {}

    /// Ends the account and gives it, if one was kept.
    fn take_account(&mut self) -> Option<Account> {
        None
    }
}

/// Why a graph cannot be prepared.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PrepareError {
    #[error("node {node} ({op}): {why}")]
    Node { node: String, op: &'static str, why: String },
    #[error("tensor {tensor}: {why}")]
    Tensor { tensor: String, why: String },
    #[error("graph {graph}: computed tensors take {need_mib} MiB, more than the system has")]
    Memory { graph: String, need_mib: u64 },
    #[error("KV caches of {capacity} positions take {need_mib} MiB, more than the system has")]
    Caches { capacity: usize, need_mib: u64 },
}

/// Why an execute failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ExecuteError {
    #[error("cancelled")]
    Cancelled,
    #[error("input {tensor}: {have}, need {want}")]
    Input { tensor: String, have: String, want: String },
    #[error("node {node}: index {index} is outside 0..{len}")]
    Index { node: String, index: i64, len: usize },
    #[error("node {node}: rows {at}..{end} do not fit a cache of {capacity} positions")]
    CacheFull { node: String, at: usize, end: usize, capacity: usize },
    #[error("state {tensor}: {why}")]
    State { tensor: String, why: String },
    #[error("node {node}: {why}")]
    Kernel { node: String, why: String },
}

/// Values of a graph's inputs and outputs. Buffers are kept between executes, so a steady loop allocates nothing.
#[derive(Debug)]
pub struct Bindings {
    inputs: Vec<Binding>,
    outputs: Vec<Binding>,
    adapter: Option<Arc<Adapter>>,
}

/// One bound tensor. Fixed-point and float tensors are exchanged as f32.
#[derive(Debug, Clone)]
pub struct Binding {
    /// The tensor's name.
    pub name: String,
    /// Its index in the graph.
    pub id: TensorId,
    /// Elements of one index of the first dimension.
    pub row_elements: usize,
    /// Bound of the first dimension; a fixed one takes exactly this many rows.
    pub max_rows: usize,
    /// True if the first dimension is given at each execute.
    pub dynamic: bool,
    /// The input that has as many rows, where the graph says so: the tensor itself or another one.
    by: Option<TensorId>,
    /// The value.
    pub value: Value,
}

/// Elements of a bound tensor.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Value {
    I32(Vec<i32>),
    F32(Vec<f32>),
}

impl Bindings {
    /// Empty bindings for the inputs and outputs of `graph`.
    pub fn new(graph: &Graph) -> Bindings {
        let bind = |ids: Vec<TensorId>| ids.into_iter().map(|id| Binding::new(graph, id)).collect();
        Bindings { inputs: bind(graph.inputs()), outputs: bind(graph.outputs()), adapter: None }
    }

    /// Index of the input called `name`.
    pub fn find_input(&self, name: &str) -> Option<usize> {
        self.inputs.iter().position(|b| b.name == name)
    }

    /// Index of the output called `name`.
    pub fn find_output(&self, name: &str) -> Option<usize> {
        self.outputs.iter().position(|b| b.name == name)
    }

    /// Copies `values` into input number `index`; their count decides the number of rows.
    ///
    /// # Errors
    /// [`ExecuteError::Input`] if the element type or count does not fit.
    pub fn set_i32(&mut self, index: usize, values: &[i32]) -> Result<(), ExecuteError> {
        let binding = &mut self.inputs[index];
        binding.check_len(values.len())?;
        match &mut binding.value {
            Value::I32(own) => {
                own.clear();
                own.extend_from_slice(values);
                Ok(())
            }
            Value::F32(_) => Err(binding.wrong_type("i32 values")),
        }
    }

    /// Copies `values` into input number `index`; their count decides the number of rows.
    ///
    /// # Errors
    /// [`ExecuteError::Input`] if the element type or count does not fit.
    pub fn set_f32(&mut self, index: usize, values: &[f32]) -> Result<(), ExecuteError> {
        let binding = &mut self.inputs[index];
        binding.check_len(values.len())?;
        match &mut binding.value {
            Value::F32(own) => {
                own.clear();
                own.extend_from_slice(values);
                Ok(())
            }
            Value::I32(_) => Err(binding.wrong_type("f32 values")),
        }
    }

    /// Names the adapter that the next executes run with; `None` is the base.
    pub fn set_adapter(&mut self, adapter: Option<Arc<Adapter>>) {
        self.adapter = adapter;
    }

    /// The adapter that the next execute runs with.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// All inputs.
    pub fn inputs(&self) -> &[Binding] {
        &self.inputs
    }

    /// All outputs.
    pub fn outputs(&self) -> &[Binding] {
        &self.outputs
    }

    /// All outputs, for a backend to fill.
    pub fn outputs_mut(&mut self) -> &mut [Binding] {
        &mut self.outputs
    }

    /// Sets the values of float output number `index`.
    pub(crate) fn set_output(&mut self, index: usize, values: &[f32]) {
        if let Value::F32(own) = &mut self.outputs[index].value {
            own.clear();
            own.extend_from_slice(values);
        }
    }

    /// Elements of output number `index`, row-major, or an empty slice if it holds integers.
    pub fn output_f32(&self, index: usize) -> &[f32] {
        match &self.outputs[index].value {
            Value::F32(values) => values,
            Value::I32(_) => &[],
        }
    }

    /// Number of rows that extent `dim` has in this execute.
    pub fn rows_of(&self, dim: Dim) -> usize {
        match dim {
            Dim::Fixed(n) => n,
            Dim::UpTo { by, .. } => self.inputs.iter().find(|b| b.id == by).map_or(0, Binding::rows),
        }
    }

    /// Checks that every fixed-shape input has been set, and that inputs which go together have as many rows.
    ///
    /// # Errors
    /// [`ExecuteError::Input`] naming the input.
    pub fn check_complete(&self) -> Result<(), ExecuteError> {
        self.inputs.iter().try_for_each(|input| {
            input.check_len(input.len())?;
            match self.inputs.iter().find(|other| input.by == Some(other.id)) {
                Some(other) if other.rows() != input.rows() => Err(ExecuteError::Input {
                    tensor: input.name.clone(),
                    have: format!("{} rows", input.rows()),
                    want: format!("{}, as {} has", other.rows(), other.name),
                }),
                _ => Ok(()),
            }
        })
    }
}

impl Binding {
    fn new(graph: &Graph, id: TensorId) -> Binding {
        let tensor = graph.tensor(id);
        let first = tensor.shape.0.first().copied().unwrap_or(Dim::Fixed(1));
        let value = if tensor.data_type == DataType::Int32 { Value::I32(Vec::new()) } else { Value::F32(Vec::new()) };
        Binding {
            name: tensor.name.clone(),
            id,
            row_elements: tensor.shape.row_elements().unwrap_or(usize::MAX),
            max_rows: first.max(),
            dynamic: matches!(first, Dim::UpTo { .. }),
            by: if let Dim::UpTo { by, .. } = first { Some(by) } else { None },
            value,
        }
    }

    /// Number of elements now held.
    pub fn len(&self) -> usize {
        match &self.value {
            Value::I32(v) => v.len(),
            Value::F32(v) => v.len(),
        }
    }

    /// True if nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of rows now held.
    pub fn rows(&self) -> usize {
        self.len().checked_div(self.row_elements).unwrap_or(0)
    }

    fn check_len(&self, have: usize) -> Result<(), ExecuteError> {
        let most = self.max_rows.saturating_mul(self.row_elements);
        let whole = if self.dynamic { have <= most && have.is_multiple_of(self.row_elements) } else { have == most };
        if whole {
            return Ok(());
        }
        let bound = if self.dynamic { "at most" } else { "exactly" };
        Err(ExecuteError::Input {
            tensor: self.name.clone(),
            have: format!("{have} elements"),
            want: format!("{bound} {} rows of {}", self.max_rows, self.row_elements),
        })
    }

    fn wrong_type(&self, have: &str) -> ExecuteError {
        let want = match self.value {
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
        };
        ExecuteError::Input { tensor: self.name.clone(), have: have.to_owned(), want: want.to_owned() }
    }
}

/// Refuses a graph that is not bound to a context length, where that decides the frequencies of rotations.
fn check_frequencies(graph: &Graph) -> Result<(), PrepareError> {
    let is_open = |node: &&Node| matches!(node.op, OpKind::RotaryTable { .. }) && node.inputs.len() > 2;
    graph.nodes().iter().find(is_open).map_or(Ok(()), |node| {
        let why = "frequencies for short and for long contexts, need those of one context length (see `specialize`)";
        Err(PrepareError::Node { node: node.name.clone(), op: node.op.name(), why: why.to_owned() })
    })
}

/// Why a cache with an encoding is refused.
const STATIC_CACHE: &str = "a cache with a static encoding; its rows have scales of their own";
