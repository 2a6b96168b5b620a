//! State of a client of a context: the KV caches, written in place by every execute.

use std::collections::HashMap;

use htp_sim::{AttentionScratch, CacheFormat, CacheLayout, CacheMut, ShapeError};

use crate::{
    graph::{Graph, Node},
    map::Zeroed,
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
    /// Scratch memory of the attention kernels, one for all layers of the same extents.
    scratch: Vec<Scratch>,
}

#[derive(Debug)]
struct Scratch {
    layout: CacheLayout,
    heads: usize,
    memory: AttentionScratch,
}

/// One layer's cache, in the form that its backend reads.
#[derive(Debug)]
pub enum Cache {
    /// Key and value bytes in the layout of the kernels.
    Kernels {
        /// Heads, extents and element format.
        layout: CacheLayout,
        /// Key bytes.
        key: Zeroed,
        /// Value bytes.
        value: Zeroed,
        /// Which scratch memory of the state its attention uses.
        scratch: usize,
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
    /// For the kernels of `htp-sim`, run by so many workers.
    Kernels { n_workers: usize },
    /// For the reference backend.
    Reference,
}

impl State {
    /// Makes caches of `capacity` positions for every attention of `graphs`.
    pub(crate) fn new(graphs: &[&Graph], capacity: usize, form: CacheForm) -> Result<State, PrepareError> {
        let mut state = State { capacity, caches: HashMap::new(), scratch: Vec::new() };
        for graph in graphs {
            for node in graph.nodes() {
                let OpKind::Attention(attrs) = node.op else { continue };
                let key = &graph.tensor(node.inputs[3]).name;
                if !state.caches.contains_key(key) {
                    let cache = state.new_cache(graph, node, &attrs, form)?;
                    state.caches.insert(key.clone(), cache);
                }
            }
        }
        Ok(state)
    }

    /// Positions that each cache holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The cache whose key tensor is called `key_tensor`.
    pub(crate) fn cache_mut(&mut self, key_tensor: &str) -> Option<&mut Cache> {
        self.caches.get_mut(key_tensor)
    }

    /// The same in the kernels' form, with the scratch memory of its attention.
    pub(crate) fn kernel_cache_mut(&mut self, key_tensor: &str) -> Option<(CacheMut<'_>, &mut AttentionScratch)> {
        match self.caches.get_mut(key_tensor)? {
            Cache::Kernels { layout, key, value, scratch } => {
                Some((CacheMut { layout: *layout, key, value }, &mut self.scratch[*scratch].memory))
            }
            Cache::Reference { .. } => None,
        }
    }

    fn new_cache(
        &mut self,
        graph: &Graph,
        node: &Node,
        attrs: &AttentionAttrs,
        form: CacheForm,
    ) -> Result<Cache, PrepareError> {
        let tensor = graph.tensor(node.inputs[3]);
        let refuse = |why: String| PrepareError::Tensor { tensor: tensor.name.clone(), why };
        let format = cache_format(tensor.data_type).ok_or_else(|| {
            refuse(format!("a cache of {}, need FLOAT_32, FLOAT_16 or SFIXED_POINT_8", tensor.data_type))
        })?;
        let value = graph.tensor(node.inputs[4]);
        if value.data_type != tensor.data_type {
            return Err(refuse(format!("{}, but {} is {}", tensor.data_type, value.name, value.data_type)));
        }
        let layout = CacheLayout::new(attrs.kv_heads, attrs.head_dim, self.capacity, format)
            .map_err(|e| refuse(e.to_string()))?;
        match form {
            CacheForm::Kernels { n_workers } => {
                let scratch = self.scratch(n_workers, layout, attrs.heads).map_err(|e| refuse(e.to_string()))?;
                let (key, value) = (Zeroed::new(layout.key_bytes()), Zeroed::new(layout.value_bytes()));
                Ok(Cache::Kernels { layout, key, value, scratch })
            }
            CacheForm::Reference => {
                let elements = attrs.kv_heads * attrs.head_dim * self.capacity;
                Ok(Cache::Reference { key: vec![0.0; elements], value: vec![0.0; elements] })
            }
        }
    }

    /// Index of the scratch memory for these extents, made at first use.
    fn scratch(&mut self, n_workers: usize, layout: CacheLayout, heads: usize) -> Result<usize, ShapeError> {
        if let Some(found) = self.scratch.iter().position(|s| s.layout == layout && s.heads == heads) {
            return Ok(found);
        }
        self.scratch.push(Scratch { layout, heads, memory: AttentionScratch::new(n_workers, layout, heads)? });
        Ok(self.scratch.len() - 1)
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
