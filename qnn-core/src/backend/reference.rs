//! The oracle: slow, obvious, in f64. Dequantizes everything exactly as the encodings say.

use std::sync::atomic::{AtomicBool, Ordering};

use htp_sim::Grid;

use crate::{
    adapter::Adapter,
    graph::{Graph, Node},
    op::{AttentionAttrs, OpKind},
    tensor::{Tensor, TensorId},
    types::{DataType, TensorType},
};

use super::{
    Backend, Bindings, Executable, ExecuteError, PrepareError, STATIC_CACHE, Seen, State, Value, Watch, Watched,
    check_frequencies,
    state::{Cache, CacheForm},
};

mod constant;

pub use constant::dequantize_constant;

/// The reference backend.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReferenceBackend;

impl Backend for ReferenceBackend {
    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Executable>, PrepareError> {
        check_frequencies(graph)?;
        let constants = graph.tensors().iter().map(dequantize_constant).collect();
        Ok(Box::new(Reference { graph: graph.clone(), values: constants, grids: base_grids(graph)? }))
    }

    fn new_state(&self, graphs: &[&Graph], capacity: usize) -> Result<State, PrepareError> {
        State::new(graphs, capacity, CacheForm::Reference)
    }
}

struct Reference {
    graph: Graph,
    /// Row-major value of every tensor: constants from the start, the rest as the nodes run.
    values: Vec<Vec<f64>>,
    /// The grid of every computed tensor with a static encoding.
    grids: Vec<Option<Grid>>,
}

/// The static encodings of `graph` itself, by tensor.
fn base_grids(graph: &Graph) -> Result<Vec<Option<Grid>>, PrepareError> {
    let grid = |tensor: &Tensor| match &tensor.encoding {
        Some(_) if tensor.tensor_type.is_state() => {
            Err(PrepareError::Tensor { tensor: tensor.name.clone(), why: STATIC_CACHE.to_owned() })
        }
        Some(encoding) if !tensor.tensor_type.is_static() => encoding
            .grid(tensor.data_type)
            .map(Some)
            .map_err(|why| PrepareError::Tensor { tensor: tensor.name.clone(), why }),
        _ => Ok(None),
    };
    graph.tensors().iter().map(grid).collect()
}

impl Executable for Reference {
    fn execute(&mut self, bindings: &mut Bindings, state: &mut State, cancel: &AtomicBool) -> Result<(), ExecuteError> {
        self.run_nodes(bindings, state, cancel, None)
    }

    fn execute_watched(
        &mut self,
        bindings: &mut Bindings,
        state: &mut State,
        cancel: &AtomicBool,
        watch: &mut Watch<'_>,
    ) -> Result<(), ExecuteError> {
        self.run_nodes(bindings, state, cancel, Some(watch))
    }
}

impl Reference {
    fn run_nodes(
        &mut self,
        bindings: &mut Bindings,
        state: &mut State,
        cancel: &AtomicBool,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<(), ExecuteError> {
        bindings.check_complete()?;
        let adapter = bindings.adapter().map(|adapter| &**adapter);
        self.load_adapter(adapter);
        let grids = self.grids_with(adapter);
        for input in bindings.inputs() {
            let values = match &input.value {
                Value::I32(values) => values.iter().map(|v| f64::from(*v)).collect(),
                Value::F32(values) => values.iter().map(|v| f64::from(*v)).collect(),
            };
            let id = input.id;
            self.values[id.index()] = as_stored(self.graph.tensor(id), grids[id.index()], values);
        }
        for i in 0..self.graph.nodes().len() {
            if cancel.load(Ordering::Relaxed) {
                return Err(ExecuteError::Cancelled);
            }
            let node = self.graph.nodes()[i].clone();
            let outputs = self.run(&node, state)?;
            for (id, value) in node.outputs.iter().zip(outputs) {
                let tensor = self.graph.tensor(*id);
                let value = as_stored(tensor, grids[id.index()], value);
                let other = watch.as_deref_mut().and_then(|watch| shown(tensor, &value, watch));
                self.values[id.index()] = match other {
                    None => value,
                    Some(other) => as_stored(tensor, grids[id.index()], other),
                };
            }
        }
        for output in bindings.outputs_mut() {
            let value = &self.values[output.id.index()];
            output.value = Value::F32(value.iter().map(|v| *v as f32).collect());
        }
        Ok(())
    }

    /// The grids of an execute: the base's, where `adapter` does not bring its own.
    fn grids_with(&self, adapter: Option<&Adapter>) -> Vec<Option<Grid>> {
        let own = |(tensor, base): (&Tensor, &Option<Grid>)| {
            base.map(|base| adapter.and_then(|adapter| adapter.grid(&tensor.name)).unwrap_or(base))
        };
        self.graph.tensors().iter().zip(&self.grids).map(own).collect()
    }

    /// Gives every updatable constant its value of `adapter`, filled up with zeros to the extents of the graph.
    fn load_adapter(&mut self, adapter: Option<&Adapter>) {
        for id in self.graph.ids_where(|t| t.tensor_type == TensorType::UpdateableStatic) {
            let tensor = self.graph.tensor(id);
            let width = tensor.shape.last();
            let mut value = vec![0.0; tensor.shape.max_elements().unwrap_or(0)];
            if let Some(panels) = adapter.and_then(|adapter| adapter.find(&tensor.name)) {
                let k = panels.layout().k();
                for (n, row) in constant::dequantize_panels(panels).chunks_exact(k).enumerate() {
                    value[n * width..][..k].copy_from_slice(row);
                }
            }
            self.values[id.index()] = value;
        }
    }

    fn run(&self, node: &Node, state: &mut State) -> Result<Vec<Vec<f64>>, ExecuteError> {
        let x = self.value(node, 0);
        Ok(match &node.op {
            OpKind::FullyConnected => vec![self.fully_connected(node)],
            OpKind::Gather => vec![self.gather(node)?],
            OpKind::RmsNorm { epsilon } => vec![rms_norm(x, self.value(node, 1), f64::from(*epsilon))],
            OpKind::ElementWiseAdd => vec![zip(x, self.value(node, 1), |a, b| a + b)],
            OpKind::ElementWiseMultiply => {
                let factors = self.value(node, 1).iter().cycle();
                vec![x.iter().zip(factors).map(|(a, b)| a * b).collect()]
            }
            OpKind::Sigmoid => vec![x.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect()],
            OpKind::Gelu => vec![x.iter().map(|v| gelu(*v)).collect()],
            OpKind::SoftCap { cap } => vec![x.iter().map(|v| soft_cap(*v, *cap)).collect()],
            OpKind::RotaryTable { scale } => {
                let angles: Vec<f64> = x.iter().flat_map(|p| self.value(node, 1).iter().map(move |f| p * f)).collect();
                let scaled = |f: fn(f64) -> f64| angles.iter().map(|a| f(*a) * f64::from(*scale)).collect();
                vec![scaled(f64::cos), scaled(f64::sin)]
            }
            OpKind::RotaryEmbedding { head_dim } => vec![self.rotate(node, *head_dim)],
            OpKind::Attention(attrs) => vec![self.attention(node, attrs, state)?],
        })
    }

    fn tensor(&self, id: TensorId) -> &Tensor {
        self.graph.tensor(id)
    }

    fn value(&self, node: &Node, input: usize) -> &[f64] {
        node.inputs.get(input).map_or(&[], |id| &self.values[id.index()])
    }

    fn fully_connected(&self, node: &Node) -> Vec<f64> {
        let (x, weight, bias) = (self.value(node, 0), self.value(node, 1), self.value(node, 2));
        let k = self.tensor(node.inputs[1]).shape.last();
        let mut out = Vec::new();
        for row in x.chunks_exact(k) {
            for (n, w) in weight.chunks_exact(k).enumerate() {
                let dot: f64 = row.iter().zip(w).map(|(a, b)| a * b).sum();
                out.push(dot + bias.get(n).copied().unwrap_or(0.0));
            }
        }
        out
    }

    fn gather(&self, node: &Node) -> Result<Vec<f64>, ExecuteError> {
        let (data, indices) = (self.value(node, 0), self.value(node, 1));
        let width = self.tensor(node.inputs[0]).shape.last();
        let len = data.len() / width.max(1);
        let mut out = Vec::with_capacity(indices.len() * width);
        for index in indices {
            let at = *index as i64;
            if at < 0 || at >= len as i64 {
                return Err(ExecuteError::Index { node: node.name.clone(), index: at, len });
            }
            out.extend_from_slice(&data[at as usize * width..][..width]);
        }
        Ok(out)
    }

    fn rotate(&self, node: &Node, head_dim: usize) -> Vec<f64> {
        let (x, cos, sin) = (self.value(node, 0), self.value(node, 1), self.value(node, 2));
        let half = self.tensor(node.inputs[1]).shape.last();
        let width = self.tensor(node.inputs[0]).shape.last();
        let mut out = x.to_vec();
        for (row, values) in out.chunks_exact_mut(width).enumerate() {
            for head in values.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (c, s) = (cos[row * half + i], sin[row * half + i]);
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * c - b * s;
                    head[i + half] = b * c + a * s;
                }
            }
        }
        out
    }

    fn attention(&self, node: &Node, a: &AttentionAttrs, state: &mut State) -> Result<Vec<f64>, ExecuteError> {
        let key_tensor = self.tensor(node.inputs[3]);
        let int8 = key_tensor.data_type == DataType::SFixedPoint8;
        let width = a.kv_heads * a.head_dim;
        let q = self.value(node, 0);
        let rows = q.len() / (a.heads * a.head_dim);
        let past = self.value(node, 5)[0] as usize;
        let capacity = state.capacity();
        if past + rows > capacity {
            return Err(ExecuteError::CacheFull { node: node.name.clone(), at: past, end: past + rows, capacity });
        }
        let Some(Cache::Reference { key, value }) = state.cache_mut(&key_tensor.name) else {
            let why = "no cache of the reference backend has this name".to_owned();
            return Err(ExecuteError::State { tensor: key_tensor.name.clone(), why });
        };
        for (cache, new) in [(&mut *key, self.value(node, 1)), (&mut *value, self.value(node, 2))] {
            let stored: Vec<f64> = match int8 {
                true => new.chunks_exact(a.head_dim).flat_map(|row| dynamic(row, 127.0)).collect(),
                false if key_tensor.data_type == DataType::Float16 => {
                    new.iter().map(|v| half::f16::from_f64(*v).to_f64()).collect()
                }
                false => new.to_vec(),
            };
            cache[past * width..][..new.len()].copy_from_slice(&stored);
        }
        let mut out = Vec::with_capacity(q.len());
        for (row, heads) in q.chunks_exact(a.heads * a.head_dim).enumerate() {
            let end = past + row + 1;
            let start = a.window.map_or(0, |w| end.saturating_sub(w));
            for (h, query) in heads.chunks_exact(a.head_dim).enumerate() {
                let at = (h / (a.heads / a.kv_heads)) * a.head_dim;
                out.extend(attend(a, query, start..end, |p| {
                    let range = p * width + at..p * width + at + a.head_dim;
                    (&key[range.clone()], &value[range])
                }));
            }
        }
        Ok(out)
    }
}

/// One query head over the positions `seen`: softmax of the scaled scores, then the weighted sum of the values.
fn attend<'c>(
    a: &AttentionAttrs,
    query: &[f64],
    seen: std::ops::Range<usize>,
    row: impl Fn(usize) -> (&'c [f64], &'c [f64]),
) -> Vec<f64> {
    let score = |p: usize| {
        let s = f64::from(a.scale) * query.iter().zip(row(p).0).map(|(x, y)| x * y).sum::<f64>();
        a.softcap.map_or(s, |cap| soft_cap(s, cap))
    };
    let scores: Vec<f64> = seen.clone().map(score).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; query.len()];
    for (p, weight) in seen.zip(&weights) {
        for (o, v) in out.iter_mut().zip(row(p).1) {
            *o += weight / total * v;
        }
    }
    out
}

/// Shows `watch` the value of `tensor`; what it puts in its place, if it does.
fn shown(tensor: &Tensor, value: &[f64], watch: &mut Watch<'_>) -> Option<Vec<f64>> {
    if value.is_empty() {
        return None;
    }
    let mut values: Vec<f32> = value.iter().map(|v| *v as f32).collect();
    let width = tensor.shape.row_elements().unwrap_or(value.len());
    match watch(Watched { name: &tensor.name, width, values: &mut values }) {
        Seen::Kept => None,
        Seen::Replaced => Some(values.into_iter().map(f64::from).collect()),
    }
}

/// What a computed tensor really holds: its value on the grid of its type and encoding.
fn as_stored(tensor: &Tensor, grid: Option<Grid>, value: Vec<f64>) -> Vec<f64> {
    if let Some(grid) = grid {
        return value.iter().map(|v| grid.nearest_f64(*v)).collect();
    }
    let most = match tensor.data_type {
        // One row's scale; 16 bit stops at 127 · 256, so that both byte planes of a code are signed bytes.
        DataType::SFixedPoint8 => 127.0,
        DataType::SFixedPoint16 => 32512.0,
        _ => return value,
    };
    let width = tensor.shape.last().max(1);
    value.chunks_exact(width).flat_map(|row| dynamic(row, most)).collect()
}

/// A row on its own symmetric grid, whose largest code is `most`.
fn dynamic(row: &[f64], most: f64) -> Vec<f64> {
    let scale = row.iter().fold(0.0f64, |top, v| top.max(v.abs())) / most;
    if scale == 0.0 {
        return row.to_vec();
    }
    row.iter().map(|v| (v / scale).round_ties_even() * scale).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let k = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(k) {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / k as f64;
        out.extend(row.iter().zip(weight).map(|(v, w)| v / (mean_square + epsilon).sqrt() * w));
    }
    out
}

fn zip(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
}

fn soft_cap(x: f64, cap: f32) -> f64 {
    f64::from(cap) * (x / f64::from(cap)).tanh()
}

fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}
