//! The patterns that become one step.

use htp_sim::Activation;

use crate::{op::OpKind, tensor::TensorId, types::DataType};

use super::Lowering;

/// `act(gate) · up` over two linear layers of one input; the numbers are nodes.
pub(super) struct Gated {
    pub(super) gate: usize,
    pub(super) up: usize,
    /// The node whose output is the result.
    pub(super) product: usize,
    pub(super) activation: Activation,
    between: Vec<usize>,
}

impl Gated {
    /// All nodes that the pattern replaces.
    pub(super) fn nodes(&self) -> impl Iterator<Item = usize> + '_ {
        [self.gate, self.up, self.product].into_iter().chain(self.between.iter().copied())
    }
}

/// Recognises the gate or the up half of a gated pair at linear node `at`:
/// `(gate · sigmoid(gate)) · up` (SiLU) or `gelu(gate) · up`.
pub(super) fn gated(lowering: &Lowering<'_>, at: usize) -> Option<Gated> {
    let x = lowering.graph.nodes()[at].inputs[0];
    let of_gate = |gate: usize| {
        let (between, activated, activation) = silu(lowering, gate).or_else(|| gelu(lowering, gate))?;
        let product = only_reader(lowering, activated, &OpKind::ElementWiseMultiply)?;
        let node = &lowering.graph.nodes()[product];
        let other = *node.inputs.iter().find(|id| **id != activated)?;
        let up = producer(lowering, other, x)?;
        let fusible =
            up != gate && !lowering.done[product] && private(lowering, other) && same_width(lowering, gate, up);
        fusible.then_some(Gated { gate, up, product, activation, between })
    };
    let mut candidates = lowering.readers[x.index()].iter().copied().filter(|n| lowering.is_linear_on(*n, x));
    candidates.find_map(|gate| of_gate(gate).filter(|found| found.gate == at || found.up == at))
}

/// If the output of linear node `at` is only added to a tensor that nobody needs afterwards: the addition's node and
/// that tensor. The product can then be added in place.
pub(super) fn residual(lowering: &Lowering<'_>, at: usize) -> Option<(usize, TensorId)> {
    let output = lowering.graph.nodes()[at].outputs[0];
    let add = only_reader(lowering, output, &OpKind::ElementWiseAdd)?;
    let node = &lowering.graph.nodes()[add];
    let residual = *node.inputs.iter().find(|id| **id != output)?;
    let tensor = lowering.graph.tensor(residual);
    let dead = lowering.readers[residual.index()].iter().all(|reader| *reader == add || lowering.done[*reader]);
    let floats = lowering.places[residual.index()].float.is_some()
        && lowering.places[residual.index()].quantized.is_none()
        && lowering.graph.tensor(node.outputs[0]).data_type == DataType::Float32;
    (dead && floats && !tensor.tensor_type.is_output() && !tensor.tensor_type.is_static()).then_some((add, residual))
}

/// The tensor whose value stands in the buffer that linear node `at` wrote.
pub(super) fn written_tensor(lowering: &Lowering<'_>, at: usize) -> TensorId {
    let output = lowering.graph.nodes()[at].outputs[0];
    match lowering.places[output.index()].float {
        Some(_) => output,
        None => lowering.graph.nodes()[lowering.readers[output.index()][0]].outputs[0],
    }
}

/// `gate · sigmoid(gate)`: the nodes, the result, the activation.
fn silu(lowering: &Lowering<'_>, gate: usize) -> Option<(Vec<usize>, TensorId, Activation)> {
    let value = lowering.graph.nodes()[gate].outputs[0];
    let readers = &lowering.readers[value.index()];
    let kind = |n: &usize| lowering.graph.nodes()[*n].op;
    let sigmoid = *readers.iter().find(|n| kind(n) == OpKind::Sigmoid)?;
    let product = *readers.iter().find(|n| kind(n) == OpKind::ElementWiseMultiply)?;
    let factor = lowering.graph.nodes()[sigmoid].outputs[0];
    let node = &lowering.graph.nodes()[product];
    let fits = readers.len() == 2
        && node.inputs.contains(&value)
        && node.inputs.contains(&factor)
        && lowering.readers[factor.index()] == [product]
        && hidden(lowering, value)
        && hidden(lowering, factor)
        && hidden(lowering, node.outputs[0]);
    fits.then(|| (vec![sigmoid, product], node.outputs[0], Activation::Silu))
}

/// `gelu(gate)`: the node, the result, the activation.
fn gelu(lowering: &Lowering<'_>, gate: usize) -> Option<(Vec<usize>, TensorId, Activation)> {
    let value = lowering.graph.nodes()[gate].outputs[0];
    let node = only_reader(lowering, value, &OpKind::Gelu)?;
    let output = lowering.graph.nodes()[node].outputs[0];
    hidden(lowering, output).then(|| (vec![node], output, Activation::Gelu))
}

/// The one node that reads `id`, if it is of kind `op`, not done, and `id` is seen by nobody else.
fn only_reader(lowering: &Lowering<'_>, id: TensorId, op: &OpKind) -> Option<usize> {
    let [reader] = lowering.readers[id.index()][..] else { return None };
    let fits = lowering.graph.nodes()[reader].op == *op && !lowering.done[reader] && hidden(lowering, id);
    fits.then_some(reader)
}

/// The linear node on `x` that writes `id`, if it is not done.
fn producer(lowering: &Lowering<'_>, id: TensorId, x: TensorId) -> Option<usize> {
    let mut nodes = lowering.readers[x.index()].iter().copied();
    nodes.find(|n| lowering.is_linear_on(*n, x) && !lowering.done[*n] && lowering.graph.nodes()[*n].outputs[0] == id)
}

fn private(lowering: &Lowering<'_>, id: TensorId) -> bool {
    lowering.readers[id.index()].len() == 1 && hidden(lowering, id)
}

/// True if `id` is a plain f32 intermediate: no client and no quantizer sees it.
fn hidden(lowering: &Lowering<'_>, id: TensorId) -> bool {
    let tensor = lowering.graph.tensor(id);
    !tensor.tensor_type.is_output() && tensor.data_type == DataType::Float32
}

fn same_width(lowering: &Lowering<'_>, a: usize, b: usize) -> bool {
    let width = |at: usize| lowering.graph.tensor(lowering.graph.nodes()[at].outputs[0]).shape.last();
    width(a) == width(b)
}
