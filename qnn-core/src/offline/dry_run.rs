//! `qairt-converter --dry_run` as a function: what a conversion would give, without the work.
//!
//! The graph is built as [`super::convert`] builds it, over weights of which only some rows were converted. So everything
//! that depends on names, shapes and formats is found here already, an adapter that does not fit included.

use htp_sim::{CacheLayout, Workers};

use crate::{
    backend::cache_format,
    error::Error,
    graph::Graph,
    offline::{
        arch::{self, WeightUse},
        convert::{ConvertOptions, LoraReport, check_output, with_branches},
        dlc,
        lora::{self, AttachPoint, LoraOptions},
        source::Source,
    },
    op::OpKind,
};

/// What a conversion would give.
#[derive(Debug, Clone, PartialEq)]
pub struct DryRun {
    /// Family of the model.
    pub architecture: String,
    /// What the source is: `hf` or `gguf`.
    pub source: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Elements of all weights.
    pub parameters: u64,
    /// The graph's weights, by use and by their formats in the source and in the graph.
    pub weights: Vec<WeightUse>,
    /// Size of the DLC. A 4-bit weight whose kind of offset follows from its values may make it differ a little.
    pub dlc_bytes: u64,
    /// Positions of the KV cache, unless the generator is told another number.
    pub cache_positions: usize,
    /// Memory of the KV cache at that many positions.
    pub cache_bytes: u64,
    /// Layers that an adapter can attach to, those of one kind and shape together.
    pub attach_points: Vec<AttachKind>,
    /// The branches that the graph would get.
    pub lora: Option<LoraReport>,
    /// What a user should know.
    pub warnings: Vec<String>,
}

/// Attach points that differ in their layer only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachKind {
    /// Path inside a layer: `self_attn.q_proj`.
    pub name: String,
    /// Layers that have it.
    pub layers: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Finds out what [`super::convert::convert_with_lora`] would do with the same arguments. Writes nothing.
///
/// # Errors
/// As that function, as far as they follow from the model's and the adapters' names, shapes and formats.
pub fn dry_run(options: &ConvertOptions, lora: Option<&LoraOptions>) -> Result<DryRun, Error> {
    let import_error = |why| Error::import(&options.input)(why);
    let plan = lora.map(lora::plan).transpose()?;
    let source = Source::open(&options.input)?;
    check_output(&options.output, &source, None)?;
    let workers = Workers::new(options.threads.max(1)).map_err(Error::io("worker threads"))?;
    let (graph, weights) = arch::outline(&source, options.precision, &workers).map_err(import_error)?;
    let mut warnings = source.config.warnings.clone();
    let adapters = plan.iter().flat_map(|(_, adapters)| adapters);
    warnings.extend(adapters.flat_map(|adapter| adapter.config.warnings.iter().cloned()));
    let attach_points = kinds(&lora::attach_points(&graph));
    let (graph, lora) = with_branches(options, graph, plan)?;
    let (cache_positions, cache_bytes) = cache(&graph);
    Ok(DryRun {
        architecture: source.config.model_type.clone(),
        source: source.kind,
        layers: source.config.layers.len(),
        parameters: weights.iter().map(|w| w.elements).sum(),
        weights,
        dlc_bytes: dlc::size_bytes(&graph).map_err(Error::dlc(&options.output))?,
        cache_positions,
        cache_bytes,
        attach_points,
        lora,
        warnings,
    })
}

/// In the order of the first layer that has them.
fn kinds(points: &[AttachPoint]) -> Vec<AttachKind> {
    let mut kinds: Vec<AttachKind> = Vec::new();
    for point in points {
        let name = point.module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let name = name.map_or(point.module.as_str(), |(_, name)| name);
        match kinds.iter_mut().find(|kind| kind.name == name && (kind.n, kind.k) == (point.n, point.k)) {
            Some(kind) => kind.layers += 1,
            None => kinds.push(AttachKind { name: name.to_owned(), layers: 1, n: point.n, k: point.k }),
        }
    }
    kinds
}

/// Positions and bytes of all caches, as the kernels lay them out.
fn cache(graph: &Graph) -> (usize, u64) {
    let (mut positions, mut bytes) = (0, 0);
    for node in graph.nodes() {
        let OpKind::Attention(attrs) = node.op else { continue };
        let state = graph.tensor(node.inputs[3]);
        positions = state.shape.max_dims()[1];
        let format = cache_format(state.data_type);
        let layout = format.and_then(|format| CacheLayout::new(attrs.kv_heads, attrs.head_dim, positions, format).ok());
        bytes += layout.map_or(0, |layout| (layout.ranges() * layout.range_bytes()) as u64);
    }
    (positions, bytes)
}
