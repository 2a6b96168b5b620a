//! State of a client of a context: the KV caches, written in place by every execute.

use std::collections::HashMap;

use htp_sim::{CacheFormat, CacheLayout};

use crate::{
    graph::{Graph, Node},
    op::{AttentionAttrs, OpKind},
    types::DataType,
};

use super::PrepareError;

/// The KV caches of one dialog, shared by all graphs it runs (prompt and token graph, every split).
///
/// Memory is asked for as zeroes and touched only where rows are written, so a long context costs what it holds.
#[derive(Debug)]
pub struct State {
    capacity: usize,
    caches: HashMap<String, Cache>,
}

/// One layer's cache, in the form that its backend reads.
#[derive(Debug)]
pub enum Cache {
    /// Key and value bytes in the layout of the kernels.
    Kernels {
        /// Heads, extents and element format.
        layout: CacheLayout,
        /// Key bytes.
        key: Vec<u8>,
        /// Value bytes.
        value: Vec<u8>,
    },
    /// `[position][kv_heads · head_dim]` as f64.
    Reference {
        /// Keys.
        key: Vec<f64>,
        /// Values.
        value: Vec<f64>,
    },
}

/// Which form of cache to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheForm {
    /// For the kernels of `htp-sim`.
    Kernels,
    /// For the reference backend.
    Reference,
}

impl State {
    /// Makes caches of `capacity` positions for every attention of `graphs`.
    pub(crate) fn new(graphs: &[&Graph], capacity: usize, form: CacheForm) -> Result<State, PrepareError> {
        let mut caches = HashMap::new();
        for graph in graphs {
            for node in graph.nodes() {
                let OpKind::Attention(attrs) = node.op else { continue };
                let key = &graph.tensor(node.inputs[3]).name;
                if !caches.contains_key(key) {
                    caches.insert(key.clone(), new_cache(graph, node, &attrs, capacity, form)?);
                }
            }
        }
        Ok(State { capacity, caches })
    }

    /// Positions that each cache holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The cache whose key tensor is called `key_tensor`.
    pub(crate) fn cache_mut(&mut self, key_tensor: &str) -> Option<&mut Cache> {
        self.caches.get_mut(key_tensor)
    }
}

/// The kernels' format of a cache of element type `data_type`.
pub(crate) fn cache_format(data_type: DataType) -> Option<CacheFormat> {
    match data_type {
        DataType::Float32 => Some(CacheFormat::F32),
        DataType::Float16 => Some(CacheFormat::F16),
        DataType::SFixedPoint8 => Some(CacheFormat::Int8),
        _ => None,
    }
}

fn new_cache(
    graph: &Graph,
    node: &Node,
    attrs: &AttentionAttrs,
    capacity: usize,
    form: CacheForm,
) -> Result<Cache, PrepareError> {
    let tensor = graph.tensor(node.inputs[3]);
    let refuse = |why: String| PrepareError::Tensor { tensor: tensor.name.clone(), why };
    let format = cache_format(tensor.data_type)
        .ok_or_else(|| refuse(format!("a cache of {}, need FLOAT_32, FLOAT_16 or SFIXED_POINT_8", tensor.data_type)))?;
    let value = graph.tensor(node.inputs[4]);
    if value.data_type != tensor.data_type {
        return Err(refuse(format!("{}, but {} is {}", tensor.data_type, value.name, value.data_type)));
    }
    let layout = CacheLayout::new(attrs.kv_heads, attrs.head_dim, capacity, format).map_err(|e| refuse(e.to_string()))?;
    Ok(match form {
        CacheForm::Kernels => {
            Cache::Kernels { key: vec![0; layout.key_bytes()], value: vec![0; layout.value_bytes()], layout }
        }
        CacheForm::Reference => {
            let elements = attrs.kv_heads * attrs.head_dim * capacity;
            Cache::Reference { key: vec![0.0; elements], value: vec![0.0; elements] }
        }
    })
}
