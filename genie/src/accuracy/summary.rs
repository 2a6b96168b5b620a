//! What a model consists of, as its context binaries say: sizes, formats of weights, widths of what they multiply.

use std::collections::{BTreeMap, HashSet};

use qnn_core::{Graph, OpKind, Tensor, TensorData, TensorType};

use crate::Model;

/// What a model consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// File name and size in bytes of each context binary.
    pub files: Vec<(String, u64)>,
    /// Number and bytes of the weights of each format.
    pub weights: BTreeMap<String, (usize, u64)>,
    /// Number of tensors that matrices multiply, by what they are: `16 bit, static`.
    pub inputs: BTreeMap<String, usize>,
    /// What the KV cache holds: `8 bit`.
    pub cache: String,
}

impl Summary {
    /// Of an open model.
    pub fn of(model: &Model) -> Summary {
        let config = &model.config().engine;
        let (mut weights, mut inputs, mut caches) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut files = Vec::new();
        for (context, path) in model.contexts().contexts().iter().zip(&config.ctx_bins) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push((name, context.size_bytes()));
            // All graphs of a context are over the same weights.
            let Some(graph) = context.graphs().next().and_then(|name| context.graph(name)) else { continue };
            count(graph, &mut weights, &mut inputs);
            caches.extend(graph.states().into_iter().map(|id| kind(graph.tensor(id))));
        }
        caches.sort();
        caches.dedup();
        Summary { files, weights, inputs, cache: caches.join(", ") }
    }
}

/// Adds the weights of `graph` and the tensors that they multiply.
fn count(graph: &Graph, weights: &mut BTreeMap<String, (usize, u64)>, inputs: &mut BTreeMap<String, usize>) {
    let mut seen = HashSet::new();
    for tensor in graph.tensors() {
        if let Some(TensorData::Panels(panels)) = &tensor.data {
            let entry = weights.entry(panels.format_name()).or_default();
            *entry = (entry.0 + 1, entry.1 + panels.bytes().len() as u64);
        }
    }
    for node in graph.nodes().iter().filter(|node| node.op == OpKind::FullyConnected) {
        let is_base = graph.tensor(node.inputs[1]).tensor_type == TensorType::Static;
        if is_base && seen.insert(node.inputs[0]) {
            let input = graph.tensor(node.inputs[0]);
            let how = match (input.data_type.is_float(), &input.encoding) {
                (true, _) => "",
                (false, Some(_)) => ", static",
                (false, None) => ", a scale for each row",
            };
            *inputs.entry(format!("{}{how}", kind(input))).or_default() += 1;
        }
    }
}

fn kind(tensor: &Tensor) -> String {
    let bits = tensor.data_type.bits();
    if tensor.data_type.is_float() { format!("float{bits}") } else { format!("{bits} bit") }
}
