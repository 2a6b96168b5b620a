//! Cutting a graph at the outputs of layers, so that each part fits a context binary of its own.
//!
//! ```text
//! cuts = the tensors after which a new part begins, chosen so that every part has as many layers
//! for each part: walk back from what it must give (its cut; the graph's outputs for the last)
//!                to what it is given (the cut before it, the graph's inputs, constants, states)
//! the cut is an output of one part and an input of the next, under the same name
//! ```
//!
//! A node that a part reaches without passing the cut before it (it depends on inputs and constants only, as the rotary
//! table) is in every part that needs it. A state that two parts reach is an error: the graph cannot be cut there.

use std::collections::HashMap;

use super::GenerateError;
use crate::{
    graph::{Graph, Node},
    tensor::{Dim, Shape, Tensor, TensorId},
    types::TensorType,
};

/// Cuts `graph` into `n` parts, each with the name of `graph`.
///
/// # Errors
/// [`GenerateError`] if the graph does not say where layers end, has fewer layers than parts, or cannot be cut there.
pub(crate) fn split(graph: &Graph, n: usize) -> Result<Vec<Graph>, GenerateError> {
    if n == 1 {
        return Ok(vec![graph.clone()]);
    }
    let cuts = cuts(graph, n)?;
    let producers = producers(graph);
    let mut owner_of_state = HashMap::new();
    let mut parts = Vec::with_capacity(n);
    for i in 0..n {
        let begin = i.checked_sub(1).map(|before| cuts[before]);
        let roots = match cuts.get(i) {
            Some(cut) => vec![*cut],
            None => graph.outputs(),
        };
        let needed = reach(graph, &producers, &roots, begin);
        for (index, _) in needed.tensors.iter().enumerate().filter(|(_, needed)| **needed) {
            let tensor = &graph.tensors()[index];
            if tensor.tensor_type.is_state() && *owner_of_state.entry(index).or_insert(i) != i {
                return Err(GenerateError::Cut {
                    tensor: graph.tensor(cuts[i - 1]).name.clone(),
                    why: format!("state {} is needed on both sides", tensor.name),
                });
            }
        }
        parts.push(part(graph, &needed, begin, cuts.get(i..=i).unwrap_or_default())?);
    }
    Ok(parts)
}

/// The part of `graph` that gives the computed tensors `ends`, which become outputs, from its inputs and, if there is one,
/// the tensor `begin`, which becomes an input.
///
/// # Errors
/// [`GenerateError::Cut`] if an extent is set by an input that the part does not have.
pub(crate) fn between(graph: &Graph, begin: Option<TensorId>, ends: &[TensorId]) -> Result<Graph, GenerateError> {
    let needed = reach(graph, &producers(graph), ends, begin);
    part(graph, &needed, begin, ends)
}

/// The tensors after which parts 1, 2 … begin.
fn cuts(graph: &Graph, n: usize) -> Result<Vec<TensorId>, GenerateError> {
    let list = graph.metadata().get(LAYER_OUTPUTS).map_or("", String::as_str);
    let names: Vec<&str> = list.split(',').filter(|name| !name.is_empty()).collect();
    if n == 0 || n > names.len() {
        return Err(GenerateError::TooManySplits { have: n, layers: names.len() });
    }
    let cut = |i: usize| {
        let name = names[i * names.len() / n - 1];
        let refuse = |why: &str| GenerateError::Cut { tensor: name.to_owned(), why: why.to_owned() };
        let id = graph.find(name).ok_or_else(|| refuse("is not in the graph"))?;
        match graph.tensor(id).tensor_type {
            TensorType::Native | TensorType::UpdateableNative => Ok(id),
            _ => Err(refuse("is no intermediate result")),
        }
    };
    (1..n).map(cut).collect()
}

/// Number of the node that writes each tensor.
fn producers(graph: &Graph) -> Vec<Option<usize>> {
    let mut producers = vec![None; graph.tensors().len()];
    for (i, node) in graph.nodes().iter().enumerate() {
        for id in &node.outputs {
            producers[id.index()] = Some(i);
        }
    }
    producers
}

/// What a part consists of, by index in the whole graph.
struct Needed {
    tensors: Vec<bool>,
    nodes: Vec<bool>,
}

fn reach(graph: &Graph, producers: &[Option<usize>], roots: &[TensorId], begin: Option<TensorId>) -> Needed {
    let mut needed = Needed { tensors: vec![false; graph.tensors().len()], nodes: vec![false; graph.nodes().len()] };
    let mut stack = roots.to_vec();
    while let Some(id) = stack.pop() {
        needed.tensors[id.index()] = true;
        let Some(node) = producers[id.index()].filter(|_| Some(id) != begin) else { continue };
        if std::mem::replace(&mut needed.nodes[node], true) {
            continue;
        }
        let node = &graph.nodes()[node];
        stack.extend(&node.inputs);
        // A node writes all its outputs, wanted or not.
        node.outputs.iter().for_each(|id| needed.tensors[id.index()] = true);
    }
    needed
}

/// Builds one part: the needed tensors and nodes, `begin` as an input and `ends` as outputs.
fn part(graph: &Graph, needed: &Needed, begin: Option<TensorId>, ends: &[TensorId]) -> Result<Graph, GenerateError> {
    let mut result = Graph::new(graph.name());
    for (key, value) in graph.metadata() {
        result.set_metadata(key, value);
    }
    let mut ids: HashMap<TensorId, TensorId> = HashMap::new();
    // The number of rows was set by an input that this part may not have: then the cut before it sets its own.
    if let Some(begin) = begin
        && let Some(Dim::UpTo { by, .. }) = graph.tensor(begin).shape.0.first()
        && !needed.tensors[by.index()]
    {
        ids.insert(*by, TensorId(0));
        add(graph, &mut result, begin, TensorType::AppWrite, &mut ids)?;
    }
    for (index, _) in needed.tensors.iter().enumerate().filter(|(_, needed)| **needed) {
        let id = TensorId(index as u32);
        let own = graph.tensor(id).tensor_type;
        let tensor_type = match own {
            _ if Some(id) == begin => TensorType::AppWrite,
            _ if ends.contains(&id) => TensorType::AppRead,
            _ => own,
        };
        if !(Some(id) == begin && ids.contains_key(&id)) {
            add(graph, &mut result, id, tensor_type, &mut ids)?;
        }
    }
    for (node, _) in graph.nodes().iter().zip(&needed.nodes).filter(|(_, needed)| **needed) {
        let map = |list: &[TensorId]| list.iter().map(|id| ids[id]).collect();
        let (inputs, outputs) = (map(&node.inputs), map(&node.outputs));
        result.add_node(Node { name: node.name.clone(), op: node.op, inputs, outputs })?;
    }
    result.finalize()?;
    Ok(result)
}

/// Copies tensor `id` as `tensor_type`, its dynamic extents set by the same input as before, or what stands for it.
fn add(
    graph: &Graph,
    result: &mut Graph,
    id: TensorId,
    tensor_type: TensorType,
    ids: &mut HashMap<TensorId, TensorId>,
) -> Result<(), GenerateError> {
    let own = graph.tensor(id);
    let next = TensorId(result.tensors().len() as u32);
    ids.insert(id, next);
    let mut dims = Vec::with_capacity(own.shape.rank());
    for dim in &own.shape.0 {
        dims.push(match dim {
            Dim::Fixed(n) => Dim::Fixed(*n),
            Dim::UpTo { max, by } => {
                let by = ids.get(by).copied().ok_or_else(|| GenerateError::Cut {
                    tensor: own.name.clone(),
                    why: format!("its extent is set by {}, which this part does not have", graph.tensor(*by).name),
                })?;
                Dim::UpTo { max: *max, by }
            }
        });
    }
    let tensor_type = match (own.tensor_type, tensor_type) {
        (TensorType::UpdateableNative, TensorType::AppWrite) => TensorType::UpdateableAppWrite,
        (TensorType::UpdateableNative, TensorType::AppRead) => TensorType::UpdateableAppRead,
        (_, wanted) => wanted,
    };
    result.add_tensor(Tensor { tensor_type, shape: Shape(dims), ..own.clone() })?;
    Ok(())
}

/// Metadata key: names of the tensors at which a layer ends, separated by commas.
pub(crate) const LAYER_OUTPUTS: &str = "layer_outputs";
