//! `Graph`: the one description of a model. Importers build it, passes rewrite it, files store it, backends run it.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use crate::{
    encoding::{BlockOffsets, Encoding, MAX_BLOCK_STEP},
    op::OpKind,
    tensor::{Dim, Shape, Tensor, TensorData, TensorId},
    types::{DataType, TensorType},
};

/// Most tensors a graph may have.
pub const MAX_TENSORS: usize = 1 << 20;
/// Most dimensions a tensor may have.
pub const MAX_RANK: usize = 8;

/// Most rows a tensor may have, and most elements a graph input: what no data stands behind may not decide how much memory is
/// asked for.
pub const MAX_ROWS: usize = 1 << 20;
const MAX_INPUT_ELEMENTS: usize = 1 << 28;

/// An operation applied to tensors of its graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Unique within the graph.
    pub name: String,
    /// What it does.
    pub op: OpKind,
    /// Tensors read, in the operation's order.
    pub inputs: Vec<TensorId>,
    /// Tensors written, in the operation's order.
    pub outputs: Vec<TensorId>,
}

/// What is wrong with a graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum GraphError {
    #[error("graph {graph}: two tensors are called {name}")]
    DuplicateTensor { graph: String, name: String },
    #[error("graph {graph}: two nodes are called {name}")]
    DuplicateNode { graph: String, name: String },
    #[error("graph {graph}: {have} tensors, at most {MAX_TENSORS} are possible")]
    TooManyTensors { graph: String, have: usize },
    #[error("tensor {tensor}: {have}, need {want}")]
    Tensor { tensor: String, have: String, want: String },
    #[error("node {node} ({op}): {have} inputs, need {} to {}", want.start(), want.end())]
    InputCount { node: String, op: &'static str, have: usize, want: RangeInclusive<usize> },
    #[error("node {node} ({op}): input {tensor} is {have}, need {want}")]
    Input { node: String, op: &'static str, tensor: String, have: String, want: String },
    #[error("node {node} ({op}): output {tensor} is {have}, need {want}")]
    Output { node: String, op: &'static str, tensor: String, have: String, want: String },
    #[error("node {node}: tensor number {id} is not in the graph")]
    NoSuchTensor { node: String, id: u32 },
    #[error("node {node}: reads {tensor}, which no earlier node writes")]
    NotProduced { node: String, tensor: String },
    #[error("node {node}: writes {tensor}, which is {why}")]
    NotWritable { node: String, tensor: String, why: &'static str },
    #[error("graph {graph}: output {tensor} is written by no node")]
    OutputNotProduced { graph: String, tensor: String },
}

/// A model, or a split of one: tensors, and nodes in an order in which they can run.
#[derive(Debug, Clone)]
pub struct Graph {
    name: String,
    tensors: Vec<Tensor>,
    nodes: Vec<Node>,
    produced: Vec<bool>,
    by_name: HashMap<String, TensorId>,
    node_names: std::collections::HashSet<String>,
    metadata: BTreeMap<String, String>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph {
            name: name.into(),
            tensors: Vec::new(),
            nodes: Vec::new(),
            produced: Vec::new(),
            by_name: HashMap::new(),
            node_names: Default::default(),
            metadata: BTreeMap::new(),
        }
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All tensors; a [`TensorId`] is an index here.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All nodes, in an order in which they can run.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Facts about the model that no operation needs (architecture, source, token ids).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Records a fact about the model.
    pub fn set_metadata(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.metadata.insert(key.into(), value.into());
    }

    /// The tensor with index `id`.
    ///
    /// # Panics
    /// If `id` is of another graph and too large for this one.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.index()]
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.by_name.get(name).copied()
    }

    /// Tensors of which `wanted` holds, in order of definition.
    pub fn ids_where(&self, wanted: impl Fn(&Tensor) -> bool) -> Vec<TensorId> {
        (0..self.tensors.len() as u32).map(TensorId).filter(|id| wanted(self.tensor(*id))).collect()
    }

    /// Graph inputs, in order of definition.
    pub fn inputs(&self) -> Vec<TensorId> {
        self.ids_where(|t| t.tensor_type.is_input())
    }

    /// Graph outputs, in order of definition.
    pub fn outputs(&self) -> Vec<TensorId> {
        self.ids_where(|t| t.tensor_type.is_output())
    }

    /// State tensors (the KV cache), in order of definition.
    pub fn states(&self) -> Vec<TensorId> {
        self.ids_where(|t| t.tensor_type.is_state())
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// [`GraphError`] if the name is taken, the shape impossible, or a constant's bytes or encoding do not fit it.
    pub fn add_tensor(&mut self, tensor: Tensor) -> Result<TensorId, GraphError> {
        if self.tensors.len() >= MAX_TENSORS {
            return Err(GraphError::TooManyTensors { graph: self.name.clone(), have: self.tensors.len() + 1 });
        }
        check_tensor(&tensor, &self.tensors)?;
        let id = TensorId(self.tensors.len() as u32);
        if self.by_name.contains_key(&tensor.name) {
            return Err(GraphError::DuplicateTensor { graph: self.name.clone(), name: tensor.name });
        }
        self.by_name.insert(tensor.name.clone(), id);
        self.produced.push(!matches!(
            tensor.tensor_type,
            TensorType::Native | TensorType::UpdateableNative | TensorType::AppRead | TensorType::UpdateableAppRead
        ));
        self.tensors.push(tensor);
        Ok(id)
    }

    /// Adds a node whose output tensors exist already.
    ///
    /// # Errors
    /// [`GraphError`] if the name is taken, a tensor is missing, read before it is written, written twice, or of
    /// another shape than the operation gives.
    pub fn add_node(&mut self, node: Node) -> Result<(), GraphError> {
        let shapes = self.infer(&node)?;
        if shapes.len() != node.outputs.len() {
            let (have, want) = (format!("{} outputs", node.outputs.len()), format!("{}", shapes.len()));
            return Err(GraphError::Tensor { tensor: node.name, have, want });
        }
        for (id, want) in node.outputs.iter().zip(&shapes) {
            self.check_output(&node, *id, want)?;
        }
        if !self.node_names.insert(node.name.clone()) {
            return Err(GraphError::DuplicateNode { graph: self.name.clone(), name: node.name });
        }
        for id in &node.outputs {
            self.produced[id.index()] = true;
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Adds a node called `name` and its output tensors, whose shapes follow from the operation. The first output is
    /// called as the node, further ones get `.1`, `.2` …; all have type NATIVE and element type `data_type`.
    ///
    /// # Errors
    /// As [`Graph::add_node`].
    pub fn op(
        &mut self,
        name: &str,
        op: OpKind,
        inputs: &[TensorId],
        data_type: DataType,
    ) -> Result<Vec<TensorId>, GraphError> {
        let mut node = Node { name: name.to_owned(), op, inputs: inputs.to_vec(), outputs: Vec::new() };
        for (i, shape) in self.infer(&node)?.into_iter().enumerate() {
            let name = if i == 0 { name.to_owned() } else { format!("{name}.{i}") };
            let tensor_type = TensorType::Native;
            node.outputs.push(self.add_tensor(Tensor {
                name,
                tensor_type,
                data_type,
                shape,
                encoding: None,
                data: None,
            })?);
        }
        let outputs = node.outputs.clone();
        self.add_node(node)?;
        Ok(outputs)
    }

    /// Makes intermediate tensor `id` a graph output.
    pub fn mark_output(&mut self, id: TensorId) {
        let tensor = &mut self.tensors[id.index()];
        tensor.tensor_type = match tensor.tensor_type {
            TensorType::UpdateableNative => TensorType::UpdateableAppRead,
            TensorType::Native => TensorType::AppRead,
            other => other,
        };
    }

    /// Makes intermediate tensor `id` a graph output that is called `name`; nodes keep their names.
    ///
    /// # Errors
    /// [`GraphError::DuplicateTensor`] if the name is taken; the graph is then unchanged.
    pub fn name_output(&mut self, id: TensorId, name: &str) -> Result<(), GraphError> {
        if self.by_name.contains_key(name) {
            return Err(GraphError::DuplicateTensor { graph: self.name.clone(), name: name.to_owned() });
        }
        let old = std::mem::replace(&mut self.tensors[id.index()].name, name.to_owned());
        self.by_name.remove(&old);
        self.by_name.insert(name.to_owned(), id);
        self.mark_output(id);
        Ok(())
    }

    /// Sets the element type and encoding of a computed tensor, as a quantizer does.
    ///
    /// # Errors
    /// [`GraphError::Tensor`] if a computed tensor cannot have that encoding. Nothing has changed then.
    pub fn set_encoding(
        &mut self,
        id: TensorId,
        data_type: DataType,
        encoding: Option<Encoding>,
    ) -> Result<(), GraphError> {
        let changed = Tensor { data_type, encoding, ..self.tensors[id.index()].clone() };
        check_tensor(&changed, &self.tensors[..id.index()])?;
        self.tensors[id.index()] = changed;
        Ok(())
    }

    /// Replaces the value of constant `id`, with its element type and encoding, as a quantizer does.
    ///
    /// # Errors
    /// [`GraphError::Tensor`] if it is no constant, or the bytes or the encoding do not fit it; the graph is then unchanged.
    pub fn replace_constant(
        &mut self,
        id: TensorId,
        data_type: DataType,
        encoding: Option<Encoding>,
        data: TensorData,
    ) -> Result<(), GraphError> {
        let tensor = Tensor { data_type, encoding, data: Some(data), ..self.tensor(id).clone() };
        check_tensor(&tensor, &self.tensors)?;
        self.tensors[id.index()] = tensor;
        Ok(())
    }

    /// Gives node number `node` a copy of the constant that it reads as input number `input`, called `name`, for itself.
    ///
    /// # Errors
    /// As [`Graph::add_tensor`]. Nothing has changed then.
    pub(crate) fn untie(&mut self, node: usize, input: usize, name: &str) -> Result<TensorId, GraphError> {
        let shared = self.tensor(self.nodes[node].inputs[input]);
        let own = self.add_tensor(Tensor { name: name.to_owned(), ..shared.clone() })?;
        self.nodes[node].inputs[input] = own;
        Ok(own)
    }

    /// Lets weights that lie in the same bytes as those of `other` share what a backend makes of them.
    pub(crate) fn share_weights(&mut self, other: &Graph) {
        for tensor in &mut self.tensors {
            let theirs = other.by_name.get(&tensor.name).map(|id| &other.tensor(*id).data);
            if let (Some(TensorData::Panels(mine)), Some(Some(TensorData::Panels(theirs)))) = (&mut tensor.data, theirs)
                && mine.is_same(theirs)
            {
                *mine = theirs.clone();
            }
        }
    }

    /// Checks what can only be checked when the graph is complete.
    ///
    /// # Errors
    /// [`GraphError::OutputNotProduced`].
    pub fn finalize(&self) -> Result<(), GraphError> {
        match self.outputs().into_iter().find(|id| !self.produced[id.index()]) {
            None => Ok(()),
            Some(id) => {
                Err(GraphError::OutputNotProduced { graph: self.name.clone(), tensor: self.tensor(id).name.clone() })
            }
        }
    }

    fn infer(&self, node: &Node) -> Result<Vec<Shape>, GraphError> {
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for id in &node.inputs {
            let tensor = self
                .tensors
                .get(id.index())
                .ok_or_else(|| GraphError::NoSuchTensor { node: node.name.clone(), id: id.0 })?;
            if !self.produced[id.index()] {
                return Err(GraphError::NotProduced { node: node.name.clone(), tensor: tensor.name.clone() });
            }
            inputs.push(tensor);
        }
        node.op.output_shapes(&node.name, &inputs)
    }

    fn check_output(&self, node: &Node, id: TensorId, want: &Shape) -> Result<(), GraphError> {
        let tensor = self
            .tensors
            .get(id.index())
            .ok_or_else(|| GraphError::NoSuchTensor { node: node.name.clone(), id: id.0 })?;
        let refuse = |why| Err(GraphError::NotWritable { node: node.name.clone(), tensor: tensor.name.clone(), why });
        if tensor.tensor_type.is_static() {
            return refuse("a constant");
        }
        if tensor.tensor_type.is_input() || tensor.tensor_type.is_state() {
            return refuse("written by the client");
        }
        if self.produced[id.index()] {
            return refuse("written by an earlier node");
        }
        if tensor.shape != *want {
            return Err(GraphError::Output {
                node: node.name.clone(),
                op: node.op.name(),
                tensor: tensor.name.clone(),
                have: tensor.shape.to_string(),
                want: want.to_string(),
            });
        }
        Ok(())
    }
}

/// Checks a tensor on its own: rank, dynamic extents, and that a constant's bytes and encoding fit.
fn check_tensor(tensor: &Tensor, earlier: &[Tensor]) -> Result<(), GraphError> {
    let refuse =
        |have: String, want: &str| Err(GraphError::Tensor { tensor: tensor.name.clone(), have, want: want.to_owned() });
    if tensor.shape.rank() > MAX_RANK {
        return refuse(format!("{} dimensions", tensor.shape.rank()), "at most 8");
    }
    let is_empty = tensor.shape.rank() == 0 || tensor.shape.0.iter().any(|dim| dim.max() == 0);
    if is_empty && !tensor.tensor_type.is_static() {
        return refuse(
            format!("shape {}", tensor.shape),
            "one dimension or more, none of them 0, of what is no constant",
        );
    }
    let Some(elements) = tensor.shape.max_elements() else {
        return refuse(format!("shape {}", tensor.shape), "a number of elements that fits the address space");
    };
    if tensor.tensor_type.is_input() && elements > MAX_INPUT_ELEMENTS {
        return refuse(format!("input of {elements} elements"), &format!("at most {MAX_INPUT_ELEMENTS}"));
    }
    for (axis, dim) in tensor.shape.0.iter().enumerate() {
        let Dim::UpTo { by, max } = dim else { continue };
        if *max > MAX_ROWS {
            return refuse(format!("up to {max} rows"), &format!("at most {MAX_ROWS}"));
        }
        let itself = by.index() == earlier.len() && tensor.tensor_type.is_input();
        let input = earlier.get(by.index()).is_some_and(|t| t.tensor_type.is_input());
        if axis != 0 || !(itself || input) || tensor.tensor_type.is_static() {
            return refuse(
                format!("dynamic extent on axis {axis}"),
                "dynamic extents on axis 0 only, set by an input, never on a constant",
            );
        }
    }
    match (&tensor.data, tensor.tensor_type.is_static()) {
        (None, true) if tensor.tensor_type == TensorType::UpdateableStatic => Ok(()),
        (Some(_), true) if tensor.tensor_type == TensorType::UpdateableStatic => refuse(
            format!("{} with data", tensor.tensor_type),
            "none: it is all zeros until an adapter brings its values",
        ),
        (None, true) => refuse("a constant without data".to_owned(), "data"),
        (Some(_), false) => refuse(format!("{} with data", tensor.tensor_type), "data on constants only"),
        (Some(TensorData::Flat(bytes)), true) => {
            let want = elements.checked_mul(tensor.data_type.bits()).map(|bits| bits.div_ceil(8));
            if want != Some(bytes.len()) {
                return refuse(
                    format!("{} bytes", bytes.len()),
                    &format!("{want:?} bytes for {} {}", tensor.data_type, tensor.shape),
                );
            }
            check_encoding(tensor, elements)
        }
        (Some(TensorData::Panels(panels)), true) => {
            let layout = panels.layout();
            if tensor.shape != Shape::fixed(&[layout.n(), layout.k()]) {
                return refuse(format!("panels [{}, {}]", layout.n(), layout.k()), &format!("{}", tensor.shape));
            }
            Ok(())
        }
        (None, false) => check_computed(tensor),
    }
}

/// Checks the static encoding of a computed tensor.
fn check_computed(tensor: &Tensor) -> Result<(), GraphError> {
    let Some(encoding) = &tensor.encoding else { return Ok(()) };
    let want = || "an encoding that a computed tensor can have".to_owned();
    let refused = |have| GraphError::Tensor { tensor: tensor.name.clone(), have, want: want() };
    encoding.grid(tensor.data_type).map(|_| ()).map_err(refused)
}

/// Checks that a flat constant's encoding has as many scales and offsets as its shape asks for.
fn check_encoding(tensor: &Tensor, elements: usize) -> Result<(), GraphError> {
    let refuse = |have: String, want: String| Err(GraphError::Tensor { tensor: tensor.name.clone(), have, want });
    match &tensor.encoding {
        None if tensor.data_type.is_fixed_point() => {
            refuse(format!("constant {} without encoding", tensor.data_type), "an encoding".to_owned())
        }
        None | Some(Encoding::ScaleOffset { .. }) => Ok(()),
        Some(Encoding::AxisScaleOffset { axis, scales, offsets, .. }) => {
            let want = tensor.shape.0.get(*axis).map_or(0, |d| d.max());
            let fits = scales.len() == want && (offsets.is_empty() || offsets.len() == want);
            if fits && want > 0 {
                return Ok(());
            }
            refuse(format!("{} scales and {} offsets", scales.len(), offsets.len()), format!("{want} on axis {axis}"))
        }
        Some(Encoding::Block { block_size, scales, offsets, .. }) => {
            let k = tensor.shape.last();
            if tensor.shape.rank() != 2 || *block_size == 0 || !k.is_multiple_of(*block_size) {
                return refuse(
                    format!("blocks of {block_size} in shape {}", tensor.shape),
                    "two dimensions and a block size that divides the last".to_owned(),
                );
            }
            let want = elements / block_size;
            let n_offsets = match offsets {
                BlockOffsets::Symmetric => want,
                BlockOffsets::Integer(bytes) => bytes.len(),
                BlockOffsets::Min(floats) => floats.len(),
            };
            if scales.len() == want && n_offsets == want {
                return Ok(());
            }
            refuse(format!("{} scales and {n_offsets} offsets", scales.len()), format!("{want} of each"))
        }
        Some(Encoding::BlockExpansion { block_size, scales, steps, .. }) => {
            let k = tensor.shape.last();
            if tensor.shape.rank() != 2 || *block_size == 0 || !k.is_multiple_of(*block_size) {
                return refuse(
                    format!("blocks of {block_size} in shape {}", tensor.shape),
                    "two dimensions and a block size that divides the last".to_owned(),
                );
            }
            let (n, blocks) = (tensor.shape.0[0].max(), elements / block_size);
            if scales.len() != n || steps.len() != blocks {
                return refuse(
                    format!("{} scales and {} steps", scales.len(), steps.len()),
                    format!("{n} and {blocks}"),
                );
            }
            match steps.iter().find(|step| !(1..=MAX_BLOCK_STEP).contains(*step)) {
                None => Ok(()),
                Some(step) => refuse(format!("a step of {step}"), format!("1 to {MAX_BLOCK_STEP}")),
            }
        }
    }
}
