//! State of a client of a context: the KV caches, written in place by every execute.

use std::sync::Arc;

use htp_sim::{AttentionScratch, CacheFormat, CacheLayout, CacheMut, ShapeError};

use crate::{graph::Graph, map::Zeroed, op::OpKind, types::DataType};

use super::PrepareError;

/// The KV caches of one dialog in one context, shared by all graphs that it runs there (prompt and token graph).
///
/// In the kernels' form all layers share one memory, in which their ranges of 256 positions take turns:
///
/// ```text
/// positions 0..256                     256..512
/// layer 0 | layer 1 | … | layer n - 1  layer 0 | layer 1 | …
/// ```
///
/// It is asked for as zeroes and touched only where rows are written, so a long context costs what it holds, in steps of 256
/// positions; and it is on large pages where the system has them, which fill up one after the other. (On small ones attention over 1900 positions took a tenth
/// longer on Zen 4. With all of a layer in one piece it would take another tenth less, and a page for each layer from the first
/// token on.)
#[derive(Debug)]
pub struct State {
    capacity: usize,
    /// Names of the key tensors, which name the caches.
    names: Arc<[String]>,
    /// In the order of `names`.
    caches: Vec<Cache>,
    /// Of all caches in the kernels' form.
    memory: Zeroed,
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
    /// In the layout of the kernels.
    Kernels {
        /// Heads, extents and element format.
        layout: CacheLayout,
        /// Where it starts in the memory of all.
        at: usize,
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
        let layers = layers(graphs, capacity)?;
        // Where that is more than there can be, `with_range_stride` says so.
        let stride = layers.iter().fold(0, |sum: usize, layer| sum.saturating_add(layer.layout.range_bytes()));
        let ranges = layers.first().map_or(0, |layer| layer.layout.ranges());
        let mut names = Vec::new();
        let (mut caches, mut scratch, mut at) = (Vec::new(), Vec::new(), 0);
        for Layer { key, layout, heads } in layers {
            let cache = match form {
                CacheForm::Kernels { n_workers } => {
                    let refuse = |why: ShapeError| PrepareError::Tensor { tensor: key.clone(), why: why.to_string() };
                    let layout = layout.with_range_stride(stride).map_err(refuse)?;
                    let scratch = scratch_for(&mut scratch, n_workers, layout, heads).map_err(refuse)?;
                    Cache::Kernels { layout, at, scratch }
                }
                CacheForm::Reference => {
                    let elements = layout.kv_heads() * layout.head_dim() * capacity;
                    Cache::Reference { key: vec![0.0; elements], value: vec![0.0; elements] }
                }
            };
            at += layout.range_bytes();
            names.push(key);
            caches.push(cache);
        }
        // `with_range_stride` checked the product.
        let bytes = if let CacheForm::Kernels { .. } = form { stride * ranges } else { 0 };
        let need_mib = (bytes >> 20) as u64;
        let memory = Zeroed::new(bytes).ok_or(PrepareError::Caches { capacity, need_mib })?;
        Ok(State { capacity, names: names.into(), caches, memory, scratch })
    }

    /// Positions that each cache holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Names of the caches' key tensors; one list as long as the state lives.
    pub(crate) fn names(&self) -> &Arc<[String]> {
        &self.names
    }

    /// The cache whose key tensor is called `key_tensor`.
    pub(crate) fn cache_mut(&mut self, key_tensor: &str) -> Option<&mut Cache> {
        let number = self.names.iter().position(|name| name == key_tensor)?;
        self.caches.get_mut(number)
    }

    /// Number of the cache whose key tensor is called `key_tensor`, if it is in the kernels' form.
    pub(crate) fn kernel_cache_number(&self, key_tensor: &str) -> Option<usize> {
        let mut caches = self.names.iter().zip(&self.caches);
        caches.position(|(name, cache)| name == key_tensor && matches!(cache, Cache::Kernels { .. }))
    }

    /// Cache number `number` in the kernels' form, with the scratch memory of its attention.
    pub(crate) fn kernel_cache_mut(&mut self, number: usize) -> Option<(CacheMut<'_>, &mut AttentionScratch)> {
        match self.caches.get(number)? {
            &Cache::Kernels { layout, at, scratch } => {
                let bytes = &mut self.memory[at..][..layout.size_bytes()];
                Some((CacheMut { layout, bytes }, &mut self.scratch[scratch].memory))
            }
            Cache::Reference { .. } => None,
        }
    }
}

/// A layer with a cache.
struct Layer {
    /// Name of the key tensor.
    key: String,
    layout: CacheLayout,
    heads: usize,
}

/// The layers of all graphs, each once.
fn layers(graphs: &[&Graph], capacity: usize) -> Result<Vec<Layer>, PrepareError> {
    let mut layers: Vec<Layer> = Vec::new();
    let nodes = graphs.iter().flat_map(|graph| graph.nodes().iter().map(move |node| (graph, node)));
    for (graph, node) in nodes {
        let OpKind::Attention(attrs) = node.op else { continue };
        let [key, value] = [3, 4].map(|input| graph.tensor(node.inputs[input]));
        let refuse = |why: String| PrepareError::Tensor { tensor: key.name.clone(), why };
        let format = cache_format(key.data_type).ok_or_else(|| {
            refuse(format!("a cache of {}, need FLOAT_32, FLOAT_16 or SFIXED_POINT_8", key.data_type))
        })?;
        if value.data_type != key.data_type {
            return Err(refuse(format!("{}, but {} is {}", key.data_type, value.name, value.data_type)));
        }
        let layout = CacheLayout::new(attrs.kv_heads, attrs.head_dim, capacity, format)
            .map_err(|why| refuse(why.to_string()))?;
        match layers.iter().find(|layer| layer.key == key.name) {
            Some(same) if same.layout == layout && same.heads == attrs.heads => {}
            Some(_) => return Err(refuse(format!("graph {} has it with other heads or another type", graph.name()))),
            None => layers.push(Layer { key: key.name.clone(), layout, heads: attrs.heads }),
        }
    }
    Ok(layers)
}

/// Index of the scratch memory for these extents, made at first use.
fn scratch_for(
    all: &mut Vec<Scratch>,
    n_workers: usize,
    layout: CacheLayout,
    heads: usize,
) -> Result<usize, ShapeError> {
    if let Some(found) = all.iter().position(|s| s.layout == layout && s.heads == heads) {
        return Ok(found);
    }
    all.push(Scratch { layout, heads, memory: AttentionScratch::new(n_workers, layout, heads)? });
    Ok(all.len() - 1)
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
