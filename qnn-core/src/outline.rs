//! Where in a model its computed tensors are: before the layers, in one of them, or behind them.

use std::collections::HashMap;

use crate::{
    graph::Graph,
    offline::generate::LAYER_OUTPUTS,
    op::OpKind,
    tensor::{Tensor, TensorId},
};

/// A part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// What turns ids into the input of the first layer.
    Embedding,
    /// A layer, from 0 on.
    Layer(usize),
    /// What turns the output of the last layer into logits.
    Head,
}

/// A computed tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// True for the result of its place: what the next one is computed from.
    pub ends: bool,
    /// Elements of a row.
    pub width: usize,
}

/// Number of layers of the model that `graph` is, or is a part of; `None` if it does not say.
pub fn n_layers(graph: &Graph) -> Option<usize> {
    Some(graph.metadata().get(LAYER_OUTPUTS)?.split(',').count())
}

/// The computed tensors of `graph`, in the order in which they are computed, without the tables that depend on positions
/// only. `None` if the graph does not say where its layers end.
///
/// A part of a model that was split has the layers of that part, counted as in the whole.
pub fn outline(graph: &Graph) -> Option<Vec<Point>> {
    let ends: Vec<&str> = graph.metadata().get(LAYER_OUTPUTS)?.split(',').collect();
    let layer_of: HashMap<&str, usize> = ends.iter().enumerate().map(|(layer, name)| (*name, layer)).collect();
    let behind = |layer: usize| if layer + 1 < ends.len() { Place::Layer(layer + 1) } else { Place::Head };
    let name = |id: &TensorId| graph.tensor(*id).name.as_str();
    let begin = graph.inputs().iter().filter_map(|id| layer_of.get(name(id)).copied()).max();
    let mut place = begin.map_or(Place::Embedding, behind);
    let mut points: Vec<Point> = Vec::new();
    for node in graph.nodes().iter().filter(|node| !matches!(node.op, OpKind::RotaryTable { .. })) {
        // Every layer begins with a norm; what feeds the first one ends the embedding.
        if place == Place::Embedding && matches!(node.op, OpKind::RmsNorm { .. }) {
            place = Place::Layer(0);
            points.iter_mut().rev().take(1).for_each(|point| point.ends = true);
        }
        for id in &node.outputs {
            let ended = layer_of.get(name(id)).copied();
            points.push(point(graph.tensor(*id), place, ended.is_some()));
            place = ended.map_or(place, behind);
        }
    }
    if let Some(last) = points.last_mut().filter(|last| last.place == Place::Head) {
        last.ends = true;
    }
    Some(points)
}

fn point(tensor: &Tensor, place: Place, ends: bool) -> Point {
    Point { name: tensor.name.clone(), place, ends, width: tensor.shape.row_elements().unwrap_or(0) }
}
