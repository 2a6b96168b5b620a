//! One graph, other bounds.

use crate::{
    graph::{Graph, GraphError, Node},
    op::OpKind,
    tensor::{Dim, Shape, Tensor},
};

/// The graph called `name` that takes at most `ar` rows and keeps `cl` positions: `graph` with the bound of every dynamic
/// extent and the capacity (second extent) of every KV cache replaced. Constants are shared, not copied. Where a rotary table
/// has frequencies for long contexts, `cl` decides for all positions which it uses: keys that are in the cache cannot be
/// rotated anew when a context grows.
///
/// # Errors
/// [`GraphError::Tensor`] if `ar` or `cl` is 0, `ar` is more than `cl`, a state is no `[kv_heads, capacity, head_dim]`, or
/// the metadata do not say how long a long context is.
pub fn specialize(graph: &Graph, name: &str, ar: usize, cl: usize) -> Result<Graph, GraphError> {
    if ar == 0 || ar > cl {
        let (have, want) = (format!("{ar} rows in {cl} positions"), format!("1 to {cl} rows"));
        return Err(GraphError::Tensor { tensor: format!("graph {name}"), have, want });
    }
    let mut result = Graph::new(name);
    for (key, value) in graph.metadata() {
        result.set_metadata(key, value);
    }
    for tensor in graph.tensors() {
        let mut tensor = tensor.clone();
        tensor.shape = with_bounds(&tensor, ar, cl)?;
        result.add_tensor(tensor)?;
    }
    for node in graph.nodes() {
        result.add_node(with_frequencies(graph, node, cl)?)?;
    }
    result.finalize()?;
    Ok(result)
}

/// `node`; a rotary table with one set of frequencies, that for contexts of `cl` positions.
fn with_frequencies(graph: &Graph, node: &Node, cl: usize) -> Result<Node, GraphError> {
    let mut node = node.clone();
    if !matches!(node.op, OpKind::RotaryTable { .. }) || node.inputs.len() < 3 {
        return Ok(node);
    }
    let above = graph.metadata().get(LONG_CONTEXT_ABOVE);
    let Some(above) = above.and_then(|text| text.parse::<usize>().ok()) else {
        let (have, want) = (format!("{LONG_CONTEXT_ABOVE} is {above:?}"), "a number of positions".to_owned());
        return Err(GraphError::Tensor { tensor: "metadata".to_owned(), have, want });
    };
    let long = node.inputs.remove(2);
    if cl > above {
        node.inputs[1] = long;
    }
    Ok(node)
}

fn with_bounds(tensor: &Tensor, ar: usize, cl: usize) -> Result<Shape, GraphError> {
    let bound = |dim: &Dim| match dim {
        Dim::UpTo { by, .. } => Dim::UpTo { max: ar, by: *by },
        Dim::Fixed(n) => Dim::Fixed(*n),
    };
    let mut shape = Shape(tensor.shape.0.iter().map(bound).collect());
    if tensor.tensor_type.is_state() {
        if shape.rank() != 3 {
            let (have, want) = (format!("state of shape {shape}"), "[kv_heads, capacity, head_dim]".to_owned());
            return Err(GraphError::Tensor { tensor: tensor.name.clone(), have, want });
        }
        shape.0[1] = Dim::Fixed(cl);
    }
    Ok(shape)
}

/// Metadata key: the most positions of a context that is not long.
pub(in crate::offline) const LONG_CONTEXT_ABOVE: &str = "long_context_above";
