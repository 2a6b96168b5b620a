//! Lowering: nodes to steps over virtual buffers, fusing what one kernel call can do.

use std::collections::{HashMap, hash_map::Entry};

use crate::{
    backend::{PrepareError, STATIC_CACHE},
    graph::{Graph, Node},
    op::{AttentionAttrs, OpKind},
    tensor::{Dim, Panels, Shape, Tensor, TensorId},
    types::{DataType, TensorType},
};

use super::{
    pack::{floats_of, pack_constant},
    step::{Binary, CacheRef, Float, NormOut, Quantized, QuantizedSpec, Shown, Source, Step, Unary, Work},
};

mod fuse;
mod linear;
mod quantized;

/// Steps over virtual buffers.
pub(super) struct Lowered {
    pub(super) steps: Vec<Step>,
    /// Most elements of each float buffer.
    pub(super) float_elements: Vec<usize>,
    pub(super) quantized: Vec<QuantizedSpec>,
    /// Float buffer and output number of each graph output.
    pub(super) outputs: Vec<(Float, usize)>,
    /// Names of the updatable tensors that steps read, by slot.
    pub(super) slots: Vec<String>,
    /// Names of the computed tensors whose encodings an adapter may replace, by slot.
    pub(super) grid_slots: Vec<String>,
    /// Weights that meet inputs on a static grid: the sums of their rows are needed.
    pub(super) summed: Vec<Panels>,
    /// Slots of the updatable tensors that do.
    pub(super) summed_slots: Vec<usize>,
    /// Names of the key tensors, which name the caches, by slot.
    pub(super) cache_names: Vec<String>,
    /// The computed tensors, in the order of the steps.
    pub(super) shown: Vec<Shown>,
}

/// Lowers `graph`.
///
/// # Errors
/// [`PrepareError`] naming the node or tensor that this backend cannot run.
pub(super) fn lower(graph: &Graph) -> Result<Lowered, PrepareError> {
    let mut lowering = Lowering::new(graph)?;
    lowering.nodes()?;
    lowering.finish()
}

/// Which tensors of `graph` are computed as such: all but constants, caches, and what a fused operation never writes out.
///
/// # Errors
/// As [`lower`].
pub(super) fn surviving(graph: &Graph) -> Result<Vec<bool>, PrepareError> {
    let mut lowering = Lowering::new(graph)?;
    lowering.nodes()?;
    Ok(lowering.places.iter().map(|place| place.float.is_some() || place.quantized.is_some()).collect())
}

/// Where a tensor's value is.
#[derive(Clone, Copy, Default)]
struct Place {
    float: Option<Float>,
    quantized: Option<Quantized>,
}

struct Lowering<'g> {
    graph: &'g Graph,
    /// Nodes that read each tensor.
    readers: Vec<Vec<usize>>,
    /// Node that writes each tensor.
    writers: Vec<Option<usize>>,
    done: Vec<bool>,
    places: Vec<Place>,
    /// The tensors that were given a place since the last node.
    placed: Vec<TensorId>,
    /// Weights in the kernels' layout.
    panels: HashMap<TensorId, Panels>,
    /// Graph input number of each input tensor.
    input_numbers: HashMap<TensorId, usize>,
    result: Lowered,
}

impl<'g> Lowering<'g> {
    fn new(graph: &'g Graph) -> Result<Lowering<'g>, PrepareError> {
        let mut readers = vec![Vec::new(); graph.tensors().len()];
        let mut writers = vec![None; graph.tensors().len()];
        for (at, node) in graph.nodes().iter().enumerate() {
            node.inputs.iter().for_each(|id| readers[id.index()].push(at));
            node.outputs.iter().for_each(|id| writers[id.index()] = Some(at));
        }
        let input_numbers = graph.inputs().into_iter().enumerate().map(|(number, id)| (id, number)).collect();
        let result = Lowered {
            steps: Vec::new(),
            float_elements: Vec::new(),
            quantized: Vec::new(),
            outputs: Vec::new(),
            slots: Vec::new(),
            grid_slots: Vec::new(),
            summed: Vec::new(),
            summed_slots: Vec::new(),
            cache_names: Vec::new(),
            shown: Vec::new(),
        };
        let places = vec![Place::default(); graph.tensors().len()];
        let done = vec![false; graph.nodes().len()];
        let panels = pack_weights(graph)?;
        let placed = Vec::new();
        let mut lowering = Lowering { graph, readers, writers, done, places, placed, panels, input_numbers, result };
        lowering.check_types()?;
        lowering.load_inputs()?;
        Ok(lowering)
    }

    fn finish(mut self) -> Result<Lowered, PrepareError> {
        for (number, id) in self.graph.outputs().into_iter().enumerate() {
            let float = self.float(id)?;
            self.result.outputs.push((float, number));
        }
        Ok(self.result)
    }

    /// Refuses element types and encodings of computed tensors that the steps do not know.
    fn check_types(&self) -> Result<(), PrepareError> {
        if let Some(state) = self.graph.tensors().iter().find(|t| t.tensor_type.is_state() && t.encoding.is_some()) {
            return Err(PrepareError::Tensor { tensor: state.name.clone(), why: STATIC_CACHE.to_owned() });
        }
        for tensor in self.graph.tensors().iter().filter(|t| !t.tensor_type.is_static() && !t.tensor_type.is_state()) {
            // A fixed-point tensor without an encoding is quantized dynamically; a client's cannot be.
            let known = match (tensor.data_type, &tensor.encoding) {
                (DataType::Float32, None) => true,
                (DataType::Int32, None) => tensor.tensor_type.is_input(),
                (DataType::SFixedPoint8 | DataType::SFixedPoint16, None) => !tensor.tensor_type.is_input(),
                (data_type, Some(_)) => data_type.is_fixed_point(),
                _ => false,
            };
            if !known {
                return Err(PrepareError::Tensor { tensor: tensor.name.clone(), why: unsupported(tensor) });
            }
        }
        Ok(())
    }

    fn load_inputs(&mut self) -> Result<(), PrepareError> {
        for (number, id) in self.graph.inputs().into_iter().enumerate() {
            let tensor = self.graph.tensor(id);
            if tensor.data_type != DataType::Int32 {
                let out = self.new_float(tensor);
                self.put(id, out);
                self.push(&tensor.name, tensor.shape.0[0], Work::Load { input: number, out });
                self.requantize(id)?;
            }
        }
        Ok(())
    }

    fn nodes(&mut self) -> Result<(), PrepareError> {
        // Graph inputs have places too, but nothing computes them.
        self.placed.clear();
        for at in 0..self.graph.nodes().len() {
            if !self.done[at] {
                self.node(at)?;
                self.show_placed();
            }
        }
        Ok(())
    }

    /// After the steps of a node: its tensors are there now.
    fn show_placed(&mut self) {
        for id in std::mem::take(&mut self.placed) {
            let (tensor, place) = (self.graph.tensor(id), self.places[id.index()]);
            // Where there are codes, they are what counts.
            let place = place.quantized.map(Source::Quantized).or(place.float.map(Source::Float));
            if let Some(place) = place {
                let (rows, width) = (tensor.shape.0[0], tensor.shape.row_elements().unwrap_or(0));
                let after = self.result.steps.len() - 1;
                self.result.shown.push(Shown { name: tensor.name.clone(), rows, width, place, after });
            }
        }
    }

    fn node(&mut self, at: usize) -> Result<(), PrepareError> {
        let node = &self.graph.nodes()[at];
        if node.op != OpKind::FullyConnected {
            self.done[at] = true;
        }
        match &node.op {
            OpKind::FullyConnected => self.fully_connected(at),
            OpKind::Gather => self.gather(node),
            OpKind::RmsNorm { epsilon } => self.rms_norm(node, *epsilon),
            OpKind::ElementWiseAdd => self.binary(node, Binary::Add),
            OpKind::ElementWiseMultiply => match self.constant_factor(node) {
                Some(factor) => self.unary(node, Unary::Scale { factor }),
                None => self.binary(node, Binary::Multiply),
            },
            OpKind::Sigmoid => self.unary(node, Unary::Sigmoid),
            OpKind::Gelu => self.unary(node, Unary::Gelu),
            OpKind::SoftCap { cap } => self.unary(node, Unary::SoftCap { cap: *cap }),
            OpKind::RotaryTable { scale } => self.rotary_table(node, *scale),
            OpKind::RotaryEmbedding { head_dim } => self.rotate(at, node, *head_dim),
            OpKind::Attention(attrs) => self.attention(node, attrs),
        }
    }

    fn gather(&mut self, node: &Node) -> Result<(), PrepareError> {
        let indices = self.input_number(node, 1)?;
        let data = self.graph.tensor(node.inputs[0]);
        let out = self.output(node, 0);
        let work = if data.tensor_type.is_static() {
            Work::Lookup { table: self.panels(node, 0).clone(), indices, out }
        } else {
            Work::Select { x: self.float(node.inputs[0])?, width: data.shape.last(), indices, out }
        };
        self.push(&node.name, self.rows(node), work);
        self.requantize(node.outputs[0])
    }

    fn rms_norm(&mut self, node: &Node, epsilon: f32) -> Result<(), PrepareError> {
        let x = self.float(node.inputs[0])?;
        let weight = floats_of(self.graph.tensor(node.inputs[1]))?;
        let output = node.outputs[0];
        let width = self.graph.tensor(output).shape.last();
        let whole_rows = weight.len() == width;
        let spec = self.quantized_spec(output)?.filter(|_| whole_rows);
        let out = match &spec {
            Some(spec) => {
                let quantized = self.new_quantized(spec.clone());
                self.places[output.index()].quantized = Some(quantized);
                self.placed.push(output);
                NormOut::Quantized(quantized, self.grid(output)?)
            }
            None => NormOut::Float(self.output(node, 0)),
        };
        self.push(&node.name, self.rows(node), Work::RmsNorm { x, width, weight, epsilon, out });
        if spec.is_some() { Ok(()) } else { self.requantize(output) }
    }

    fn binary(&mut self, node: &Node, op: Binary) -> Result<(), PrepareError> {
        let (a, b) = (self.float(node.inputs[0])?, self.float(node.inputs[1])?);
        let out = self.output(node, 0);
        self.push(&node.name, self.rows(node), Work::Binary { op, a, b, out });
        self.requantize(node.outputs[0])
    }

    /// The number that a multiplication by a constant of one element multiplies by.
    fn constant_factor(&self, node: &Node) -> Option<f32> {
        let factor = self.graph.tensor(node.inputs[1]);
        let one = factor.tensor_type == TensorType::Static && factor.shape == Shape::fixed(&[1]);
        one.then(|| floats_of(factor).ok()?.first().copied()).flatten()
    }

    fn unary(&mut self, node: &Node, op: Unary) -> Result<(), PrepareError> {
        let x = self.float(node.inputs[0])?;
        let out = self.output(node, 0);
        self.push(&node.name, self.rows(node), Work::Unary { op, x, out });
        self.requantize(node.outputs[0])
    }

    fn rotary_table(&mut self, node: &Node, scale: f32) -> Result<(), PrepareError> {
        let positions = self.input_number(node, 0)?;
        let inv_freq = floats_of(self.graph.tensor(node.inputs[1]))?;
        let (cos, sin) = (self.output(node, 0), self.output(node, 1));
        self.push(&node.name, self.rows(node), Work::RotaryTable { positions, inv_freq, scale, cos, sin });
        node.outputs.iter().try_for_each(|output| self.requantize(*output))
    }

    /// Rotates in place when nobody else reads the input, else in a copy.
    fn rotate(&mut self, at: usize, node: &Node, head_dim: usize) -> Result<(), PrepareError> {
        let (input, output) = (node.inputs[0], node.outputs[0]);
        let (cos, sin) = (self.float(node.inputs[1])?, self.float(node.inputs[2])?);
        let from = self.float(input)?;
        let alone = self.readers[input.index()] == [at] && !self.graph.tensor(input).tensor_type.is_output();
        let x = if alone {
            self.put(output, from);
            from
        } else {
            let out = self.output(node, 0);
            self.push(&node.name, self.rows(node), Work::Copy { x: from, out });
            out
        };
        let heads = self.graph.tensor(input).shape.last() / head_dim;
        self.push(&node.name, self.rows(node), Work::Rotate { x, heads, head_dim, cos, sin });
        self.requantize(output)
    }

    fn attention(&mut self, node: &Node, attrs: &AttentionAttrs) -> Result<(), PrepareError> {
        let [q, k, v] = [self.float(node.inputs[0])?, self.float(node.inputs[1])?, self.float(node.inputs[2])?];
        let rows = self.rows(node);
        let index_input = self.input_number(node, 5)?;
        let name = self.graph.tensor(node.inputs[3]).name.clone();
        let out = self.output(node, 0);
        let cache = CacheRef { slot: self.result.cache_names.len(), index_input, attrs: *attrs };
        self.result.cache_names.push(name);
        self.push(&node.name, rows, Work::Attention { q, k, v, out, cache });
        self.requantize(node.outputs[0])
    }

    fn rows(&self, node: &Node) -> Dim {
        self.graph.tensor(node.outputs[0]).shape.0[0]
    }

    fn panels(&self, node: &Node, input: usize) -> &Panels {
        self.panels.get(&node.inputs[input]).expect("`pack_weights` packed the constant of every such node")
    }

    fn input_number(&self, node: &Node, input: usize) -> Result<usize, PrepareError> {
        self.input_numbers.get(&node.inputs[input]).copied().ok_or_else(|| {
            let why = format!("{} has to be a graph input", self.graph.tensor(node.inputs[input]).name);
            PrepareError::Node { node: node.name.clone(), op: node.op.name(), why }
        })
    }

    /// A new buffer for output number `number` of `node`.
    fn output(&mut self, node: &Node, number: usize) -> Float {
        let id = node.outputs[number];
        let float = self.new_float(self.graph.tensor(id));
        self.put(id, float);
        float
    }

    /// Notes that the value of `id` is in buffer `float`.
    fn put(&mut self, id: TensorId, float: Float) {
        self.places[id.index()].float = Some(float);
        self.placed.push(id);
    }

    fn new_float(&mut self, tensor: &Tensor) -> Float {
        self.result.float_elements.push(tensor.shape.max_elements().unwrap_or(0));
        self.result.float_elements.len() - 1
    }

    fn push(&mut self, node: &str, rows: Dim, work: Work) {
        self.result.steps.push(Step { node: node.to_owned(), rows, work, prefetch: None, next_product: None });
    }
}

/// Every constant that a linear layer or a lookup reads, packed; those of a context binary already are.
fn pack_weights(graph: &Graph) -> Result<HashMap<TensorId, Panels>, PrepareError> {
    let mut panels = HashMap::new();
    for node in graph.nodes() {
        let id = match node.op {
            OpKind::FullyConnected if graph.tensor(node.inputs[1]).data.is_some() => node.inputs[1],
            OpKind::Gather if graph.tensor(node.inputs[0]).tensor_type.is_static() => node.inputs[0],
            _ => continue,
        };
        if let Entry::Vacant(place) = panels.entry(id) {
            place.insert(pack_constant(graph.tensor(id))?);
        }
    }
    Ok(panels)
}

fn unsupported(tensor: &Tensor) -> String {
    let encoding = if tensor.encoding.is_some() { " with a static encoding" } else { "" };
    format!("{} {}{encoding} is not supported by this backend yet", tensor.tensor_type, tensor.data_type)
}
