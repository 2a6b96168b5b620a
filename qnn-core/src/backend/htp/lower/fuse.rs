//! The patterns that become one step.

use htp_sim::Activation;

use crate::{
    op::OpKind,
    tensor::TensorId,
    types::{DataType, TensorType},
};

use super::{super::step::Float, Lowering};

/// A linear layer with its adapter branch, if it has one. The numbers are nodes.
pub(super) struct Unit {
    pub(super) base: usize,
    pub(super) branch: Option<BranchNodes>,
    /// The result: the base's output, or the sum with the branch.
    pub(super) output: TensorId,
}

impl Unit {
    /// All nodes of the layer.
    pub(super) fn nodes(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::once(self.base).chain(self.branch.iter().flat_map(|branch| branch.nodes))
    }
}

/// The low-rank branch `B (alpha · A x)` or `alpha · B (A x)`, added to a base layer.
pub(super) struct BranchNodes {
    /// A: `[rank, k]`.
    pub(super) down: TensorId,
    /// B: `[n, rank]`.
    pub(super) up: TensorId,
    /// The strength: `[1]` or `[rank]`.
    pub(super) alpha: TensorId,
    /// A, B, the multiplication and the addition.
    nodes: [usize; 4],
}

/// `act(gate) · up` over two linear layers of one input.
pub(super) struct Gated {
    pub(super) gate: Unit,
    pub(super) up: Unit,
    /// The node whose output is the result.
    pub(super) product: usize,
    pub(super) activation: Activation,
    between: Vec<usize>,
}

impl Gated {
    /// All nodes that the pattern replaces.
    pub(super) fn nodes(&self) -> impl Iterator<Item = usize> + '_ {
        self.gate.nodes().chain(self.up.nodes()).chain([self.product]).chain(self.between.iter().copied())
    }
}

/// The layer of linear node `at` on `x`, if `at` is a base node that is not done.
pub(super) fn unit(lowering: &Lowering<'_>, at: usize, x: TensorId) -> Option<Unit> {
    if lowering.done[at] {
        return None;
    }
    let node = &lowering.graph.nodes()[at];
    if node.op != OpKind::FullyConnected || node.inputs[0] != x || is_updateable(lowering, node.inputs[1]) {
        return None;
    }
    let branch = branch(lowering, at);
    let output = match &branch {
        Some(branch) => lowering.graph.nodes()[branch.nodes[3]].outputs[0],
        None => node.outputs[0],
    };
    Some(Unit { base: at, branch, output })
}

/// The layer that linear node `at` belongs to, as its base or as the first half of its branch.
pub(super) fn owner(lowering: &Lowering<'_>, at: usize) -> Option<Unit> {
    let x = lowering.graph.nodes()[at].inputs[0];
    let mut units = lowering.readers[x.index()].iter().filter_map(|other| unit(lowering, *other, x));
    units.find(|unit| unit.nodes().any(|node| node == at))
}

/// Recognises a gated pair at base node `at`, its gate or its up half: `(gate · sigmoid(gate)) · up` (SiLU) or
/// `gelu(gate) · up`.
pub(super) fn gated(lowering: &Lowering<'_>, at: usize) -> Option<Gated> {
    let x = lowering.graph.nodes()[at].inputs[0];
    let units = || lowering.readers[x.index()].iter().filter_map(|other| unit(lowering, *other, x));
    let of_gate = |gate: Unit| {
        let (between, activated, activation) = silu(lowering, gate.output).or_else(|| gelu(lowering, gate.output))?;
        let product = only_reader(lowering, activated, &OpKind::ElementWiseMultiply)?;
        let inputs = &lowering.graph.nodes()[product].inputs;
        let other = *inputs.iter().find(|id| **id != activated)?;
        let up = units().find(|up| up.output == other && up.base != gate.base)?;
        let fusible = lowering.readers[other.index()].len() == 1
            && hidden(lowering, other)
            && width(lowering, gate.output) == width(lowering, other);
        fusible.then_some(Gated { gate, up, product, activation, between })
    };
    units().find_map(|gate| of_gate(gate).filter(|found| found.gate.base == at || found.up.base == at))
}

/// If linear output `output` is only added to a tensor that nobody needs afterwards: the addition's node and that
/// tensor's buffer. The product can then be added in place, unless its own step needs the buffer.
pub(super) fn residual(lowering: &Lowering<'_>, output: TensorId) -> Option<(usize, Float)> {
    let add = only_reader(lowering, output, &OpKind::ElementWiseAdd)?;
    let node = &lowering.graph.nodes()[add];
    let residual = *node.inputs.iter().find(|id| **id != output)?;
    let (tensor, place) = (lowering.graph.tensor(residual), lowering.places[residual.index()]);
    let dead = lowering.readers[residual.index()].iter().all(|reader| *reader == add || lowering.done[*reader]);
    let free = dead && place.quantized.is_none() && !tensor.tensor_type.is_output() && !tensor.tensor_type.is_static();
    place.float.filter(|_| free).map(|float| (add, float))
}

/// The branch that is added to the output of base node `at`.
fn branch(lowering: &Lowering<'_>, at: usize) -> Option<BranchNodes> {
    let nodes = lowering.graph.nodes();
    let (x, output) = (nodes[at].inputs[0], nodes[at].outputs[0]);
    let add = only_reader(lowering, output, &OpKind::ElementWiseAdd)?;
    let sum = *nodes[add].inputs.iter().find(|id| **id != output)?;
    let last = producer(lowering, sum)?;
    let (down, scale, up) = match nodes[last].op {
        OpKind::FullyConnected => {
            let scale = producer(lowering, nodes[last].inputs[0])?;
            (producer(lowering, nodes[scale].inputs[0])?, scale, last)
        }
        OpKind::ElementWiseMultiply => {
            let up = producer(lowering, nodes[last].inputs[0])?;
            (producer(lowering, nodes[up].inputs[0])?, last, up)
        }
        _ => return None,
    };
    let linear = |node: usize| nodes[node].op == OpKind::FullyConnected && nodes[node].inputs.len() == 2;
    let shape = linear(down) && linear(up) && nodes[scale].op == OpKind::ElementWiseMultiply;
    if !shape || nodes[down].inputs[0] != x {
        return None;
    }
    let (a, b, alpha) = (nodes[down].inputs[1], nodes[up].inputs[1], nodes[scale].inputs[1]);
    // Strengths are taken as they are bound. After B only one for all columns has the same meaning as before it.
    let strengths = lowering.graph.tensor(alpha);
    let plain = strengths.data_type == DataType::Float32 && strengths.encoding.is_none();
    let strength = plain && strengths.shape.rank() == 1 && (last == up || width(lowering, alpha) == 1);
    let private = [down, scale, up].iter().all(|node| {
        let output = nodes[*node].outputs[0];
        lowering.readers[output.index()].len() == 1 && hidden(lowering, output)
    });
    let fits = is_updateable(lowering, a) && is_updateable(lowering, b) && strength && private;
    fits.then_some(BranchNodes { down: a, up: b, alpha, nodes: [down, up, scale, add] })
}

/// `gate · sigmoid(gate)`: the nodes, the result, the activation.
fn silu(lowering: &Lowering<'_>, gate: TensorId) -> Option<(Vec<usize>, TensorId, Activation)> {
    let readers = &lowering.readers[gate.index()];
    let kind = |n: &usize| lowering.graph.nodes()[*n].op;
    let sigmoid = *readers.iter().find(|n| kind(n) == OpKind::Sigmoid)?;
    let product = *readers.iter().find(|n| kind(n) == OpKind::ElementWiseMultiply)?;
    let factor = lowering.graph.nodes()[sigmoid].outputs[0];
    let node = &lowering.graph.nodes()[product];
    let fits = readers.len() == 2
        && node.inputs.contains(&gate)
        && node.inputs.contains(&factor)
        && lowering.readers[factor.index()] == [product]
        && hidden(lowering, gate)
        && hidden(lowering, factor)
        && hidden(lowering, node.outputs[0]);
    fits.then(|| (vec![sigmoid, product], node.outputs[0], Activation::Silu))
}

/// `gelu(gate)`: the node, the result, the activation.
fn gelu(lowering: &Lowering<'_>, gate: TensorId) -> Option<(Vec<usize>, TensorId, Activation)> {
    let node = only_reader(lowering, gate, &OpKind::Gelu)?;
    let output = lowering.graph.nodes()[node].outputs[0];
    hidden(lowering, output).then(|| (vec![node], output, Activation::Gelu))
}

/// The one node that reads `id`, if it is of kind `op`, not done, and `id` is seen by nobody else.
fn only_reader(lowering: &Lowering<'_>, id: TensorId, op: &OpKind) -> Option<usize> {
    let [reader] = lowering.readers[id.index()][..] else { return None };
    let fits = lowering.graph.nodes()[reader].op == *op && !lowering.done[reader] && hidden(lowering, id);
    fits.then_some(reader)
}

/// The node that writes `id`.
fn producer(lowering: &Lowering<'_>, id: TensorId) -> Option<usize> {
    lowering.writers[id.index()]
}

/// True if `id` is a plain f32 intermediate: no client and no quantizer sees it.
fn hidden(lowering: &Lowering<'_>, id: TensorId) -> bool {
    let tensor = lowering.graph.tensor(id);
    !tensor.tensor_type.is_output() && tensor.data_type == DataType::Float32
}

fn is_updateable(lowering: &Lowering<'_>, id: TensorId) -> bool {
    lowering.graph.tensor(id).tensor_type == TensorType::UpdateableStatic
}

fn width(lowering: &Lowering<'_>, id: TensorId) -> usize {
    lowering.graph.tensor(id).shape.last()
}
