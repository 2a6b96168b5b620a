//! Where a graph's layers begin and end, and which matrices they have.

use super::is_roundable;
use crate::{
    graph::{Graph, GraphError},
    offline::generate::{LAYER_OUTPUTS, between},
    op::OpKind,
    tensor::TensorId,
    types::TensorType,
};

/// The nodes between two cuts.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// What it reads; `None` is the token ids.
    pub(super) begin: Option<TensorId>,
    /// What it gives; `None` if it is not a layer but the whole graph.
    pub(super) end: Option<TensorId>,
    pub(super) weights: Vec<LayerWeight>,
}

/// A float matrix of a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerWeight {
    pub(super) id: TensorId,
    /// What it multiplies.
    pub(super) input: TensorId,
}

/// The layers of `graph`, cut where its metadata says that layers end. A graph that does not say it, or cannot be cut
/// there, is one layer.
pub(super) fn layers(graph: &Graph) -> Vec<Layer> {
    let names = graph.metadata().get(LAYER_OUTPUTS).map_or("", String::as_str);
    let ends = names.split(',').filter(|name| !name.is_empty()).map(|name| graph.find(name));
    let ends: Option<Vec<TensorId>> = ends.collect();
    let mut layers = Vec::new();
    let mut begin = None;
    for end in ends.unwrap_or_default() {
        let native = graph.tensor(end).tensor_type == TensorType::Native;
        let Some(part) = between(graph, begin, &[end]).ok().filter(|_| native) else { return vec![whole(graph)] };
        let matrices = part.nodes().iter().filter(|node| node.op == OpKind::FullyConnected);
        let weights = matrices.filter_map(|node| {
            let id = |at: usize| graph.find(&part.tensor(node.inputs[at]).name);
            Some(LayerWeight { id: id(1)?, input: id(0)? })
        });
        let weights = weights.filter(|weight| is_layer_weight(graph, *weight)).collect();
        layers.push(Layer { begin, end: Some(end), weights });
        begin = Some(end);
    }
    if layers.is_empty() { vec![whole(graph)] } else { layers }
}

fn whole(graph: &Graph) -> Layer {
    let matrices = graph.nodes().iter().filter(|node| node.op == OpKind::FullyConnected);
    let weights = matrices.map(|node| LayerWeight { id: node.inputs[1], input: node.inputs[0] });
    Layer { begin: None, end: None, weights: weights.filter(|weight| is_layer_weight(graph, *weight)).collect() }
}

/// True for a float matrix that is neither the head nor shared with the embedding.
fn is_layer_weight(graph: &Graph, weight: LayerWeight) -> bool {
    let tensor = graph.tensor(weight.id);
    let readers = graph.nodes().iter().filter(|node| node.inputs.contains(&weight.id)).count();
    is_roundable(graph, weight.id)
        && readers == 1
        && tensor.name != HEAD
        && graph.tensor(weight.input).tensor_type == TensorType::Native
}

/// The head as a layer of its own that reads what the last of `layers` gives. A weight that it shares with the embedding
/// becomes its own. `None` if the graph has no head of floats.
pub(super) fn head(graph: &mut Graph, layers: &[Layer]) -> Result<Option<Layer>, GraphError> {
    let Some(at) = head_node(graph) else { return Ok(None) };
    let (input, mut id) = (graph.nodes()[at].inputs[0], graph.nodes()[at].inputs[1]);
    if is_table(graph, id) {
        id = graph.untie(at, 1, HEAD)?;
    }
    let begin = layers.last().and_then(|layer| layer.end);
    Ok(Some(Layer { begin, end: None, weights: vec![LayerWeight { id, input }] }))
}

/// Number of the node that multiplies with the head, if that is of floats.
pub(super) fn head_node(graph: &Graph) -> Option<usize> {
    let is_head = |id: TensorId| is_roundable(graph, id) && (is_table(graph, id) || graph.tensor(id).name == HEAD);
    graph.nodes().iter().position(|node| node.op == OpKind::FullyConnected && is_head(node.inputs[1]))
}

/// True for what rows are looked up in: an embedding.
fn is_table(graph: &Graph, id: TensorId) -> bool {
    graph.nodes().iter().any(|node| node.op == OpKind::Gather && node.inputs[0] == id)
}

/// Name of an untied head's weight.
pub(in crate::offline) const HEAD: &str = "lm_head.weight";
