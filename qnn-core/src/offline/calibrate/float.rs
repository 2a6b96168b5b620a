//! A graph without integers: what they mean, computed in floats.

use crate::{
    backend::reference::dequantize_constant,
    encoding::Floats,
    graph::Graph,
    offline::calibrate::CalibrateError,
    tensor::{Tensor, TensorData},
    types::DataType,
};

/// `graph` with every fixed-point tensor in f32: constants as the values that their codes mean, computed tensors and caches
/// without encodings. Float constants keep their type and are shared.
///
/// # Errors
/// [`CalibrateError::Graph`]; no valid graph gives it.
pub fn float_graph(graph: &Graph) -> Result<Graph, CalibrateError> {
    let mut result = Graph::new(graph.name());
    for (key, value) in graph.metadata() {
        result.set_metadata(key, value);
    }
    for tensor in graph.tensors() {
        result.add_tensor(float_tensor(tensor))?;
    }
    for node in graph.nodes() {
        result.add_node(node.clone())?;
    }
    result.finalize()?;
    Ok(result)
}

fn float_tensor(tensor: &Tensor) -> Tensor {
    let panels = matches!(tensor.data, Some(TensorData::Panels(_)));
    if !tensor.data_type.is_fixed_point() && !panels {
        let computed_float = tensor.data_type.is_float() && tensor.data.is_none();
        let data_type = if computed_float { DataType::Float32 } else { tensor.data_type };
        return Tensor { data_type, encoding: None, ..tensor.clone() };
    }
    let data = match &tensor.data {
        None => None,
        Some(_) => {
            let values: Vec<f32> = dequantize_constant(tensor).into_iter().map(|value| value as f32).collect();
            Some(TensorData::Flat(Floats::from_f32(&values).bytes().clone()))
        }
    };
    Tensor { data_type: DataType::Float32, encoding: None, data, ..tensor.clone() }
}
