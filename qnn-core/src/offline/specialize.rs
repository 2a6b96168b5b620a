//! One graph, other bounds.

use crate::{
    graph::{Graph, GraphError},
    tensor::{Dim, Shape, Tensor},
};

/// The graph called `name` that takes at most `ar` rows and keeps `cl` positions: `graph` with the bound of every dynamic
/// extent and the capacity (second extent) of every KV cache replaced. Constants are shared, not copied.
///
/// # Errors
/// [`GraphError::Tensor`] if `ar` or `cl` is 0, `ar` is more than `cl`, or a state is no `[kv_heads, capacity, head_dim]`.
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
        result.add_node(node.clone())?;
    }
    result.finalize()?;
    Ok(result)
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
