//! Adapter branches in a graph: adding them, and finding them again.
//!
//! ```text
//! x ─┬─► base (q_proj) ───────────────────────────────────────► + (q_proj.lora_add) ─► whoever read q_proj
//!    └─► A (q_proj.lora_A) ─► · lora_alpha (.lora_scale) ─► B (.lora_B) ─┘
//! ```
//!
//! A and B are UPDATEABLE_STATIC tensors without a value, which is all zeros: without an adapter the result is the base's.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{ALPHA_TENSOR, LoraError, a_name, b_name};
use crate::{
    graph::{Graph, Node},
    op::OpKind,
    tensor::{Shape, Tensor, TensorId},
    types::{DataType, TensorType},
};

/// Which encodings a section may replace (`--quant_updatable_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdatableMode {
    /// None: the adapters' weights are floats.
    None,
    /// Those of the branches.
    AdapterOnly,
    /// Those of every computed tensor that has one, too.
    All,
}

impl UpdatableMode {
    /// Name in options and metadata.
    pub fn name(self) -> &'static str {
        match self {
            UpdatableMode::None => "none",
            UpdatableMode::AdapterOnly => "adapter_only",
            UpdatableMode::All => "all",
        }
    }
}

/// Storage of the adapters' weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum LoraBits {
    Four,
    Eight,
    Sixteen,
    ThirtyTwo,
}

impl LoraBits {
    /// The storage of `bits` bits.
    pub fn from_bits(bits: u8) -> Option<LoraBits> {
        [LoraBits::Four, LoraBits::Eight, LoraBits::Sixteen, LoraBits::ThirtyTwo].into_iter().find(|b| b.bits() == bits)
    }

    /// Width of a weight.
    pub fn bits(self) -> u8 {
        match self {
            LoraBits::Four => 4,
            LoraBits::Eight => 8,
            LoraBits::Sixteen => 16,
            LoraBits::ThirtyTwo => 32,
        }
    }

    /// Element type: symmetric integers per channel, or floats.
    pub fn data_type(self) -> DataType {
        match self {
            LoraBits::Four => DataType::SFixedPoint4,
            LoraBits::Eight => DataType::SFixedPoint8,
            LoraBits::Sixteen => DataType::Float16,
            LoraBits::ThirtyTwo => DataType::Float32,
        }
    }
}

/// Which branches to add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraPlan {
    /// Modules that get a branch: `model.layers.0.self_attn.q_proj`.
    pub targets: BTreeSet<String>,
    /// Columns of the branches, the same for all.
    pub max_rank: usize,
    /// Storage of the adapters' weights. By default 8 bits where a target has integer weights (16 with mode none), else 32.
    pub bits: Option<LoraBits>,
    /// Which encodings a section may replace.
    pub mode: UpdatableMode,
}

/// A linear layer that can have, or has, a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachPoint {
    /// Path of its module, which is its node's name.
    pub module: String,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Its branch, if it has one.
    pub branch: Option<BranchTensors>,
}

/// What a branch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchTensors {
    /// Columns; an adapter may have fewer.
    pub max_rank: usize,
    /// Element type of A and B.
    pub data_type: DataType,
}

/// The linear layers of `graph` that can have or have a branch: all but the head.
pub fn attach_points(graph: &Graph) -> Vec<AttachPoint> {
    let point = |node: &Node| {
        let weight = graph.tensor(*node.inputs.get(1)?);
        let named = weight.name.strip_suffix(".weight") == Some(&node.name);
        let hidden = graph.tensor(*node.outputs.first()?).tensor_type;
        let fits = node.op == OpKind::FullyConnected
            && weight.tensor_type == TensorType::Static
            && named
            && node.name != "lm_head"
            && matches!(hidden, TensorType::Native | TensorType::UpdateableNative);
        let dims = weight.shape.max_dims();
        fits.then(|| AttachPoint {
            n: dims[0],
            k: dims[1],
            branch: branch(graph, &node.name),
            module: node.name.clone(),
        })
    };
    graph.nodes().iter().filter_map(point).collect()
}

fn branch(graph: &Graph, module: &str) -> Option<BranchTensors> {
    let a = graph.tensor(graph.find(&a_name(module))?);
    let b = graph.tensor(graph.find(&b_name(module))?);
    let updatable = [a, b].iter().all(|t| t.tensor_type == TensorType::UpdateableStatic);
    updatable.then(|| BranchTensors { max_rank: b.shape.last(), data_type: a.data_type })
}

/// `graph` with a branch at every target of `plan`, and what they are recorded in the metadata.
///
/// # Errors
/// [`LoraError`] if a target is no linear layer of the graph, the rank is out of range, the graph has branches already, or
/// the mode asks for what the storage cannot be.
pub fn add_branches(graph: &Graph, plan: &LoraPlan) -> Result<Graph, LoraError> {
    let points: BTreeMap<String, AttachPoint> =
        attach_points(graph).into_iter().map(|point| (point.module.clone(), point)).collect();
    check(graph, plan, &points)?;
    let bits = bits(graph, plan)?;
    let mut result = Graph::new(graph.name());
    for (key, value) in graph.metadata() {
        result.set_metadata(key, value);
    }
    // Old tensors come first and in their order, so their numbers stay.
    for tensor in graph.tensors() {
        result.add_tensor(Tensor { tensor_type: updatable_type(tensor, plan.mode), ..tensor.clone() })?;
    }
    let alpha = result.add_tensor(Tensor {
        name: ALPHA_TENSOR.to_owned(),
        tensor_type: TensorType::AppWrite,
        data_type: DataType::Float32,
        shape: Shape::fixed(&[plan.max_rank]),
        encoding: None,
        data: None,
    })?;
    let mut sums: HashMap<TensorId, TensorId> = HashMap::new();
    for node in graph.nodes() {
        let inputs = node.inputs.iter().map(|id| *sums.get(id).unwrap_or(id)).collect();
        result.add_node(Node { inputs, ..node.clone() })?;
        if let Some(point) = points.get(&node.name).filter(|point| plan.targets.contains(&point.module)) {
            let x = result.nodes().last().map(|node| node.inputs[0]).expect("it was just added");
            let values = Weights { alpha, max_rank: plan.max_rank, data_type: bits.data_type() };
            sums.insert(node.outputs[0], values.add_branch(&mut result, point, x, node.outputs[0])?);
        }
    }
    result.set_metadata(MAX_RANK_KEY, plan.max_rank.to_string());
    result.set_metadata(BITWIDTH_KEY, bits.bits().to_string());
    result.set_metadata(ALPHA_KEY, ALPHA_TENSOR);
    result.set_metadata(MODE_KEY, plan.mode.name());
    result.finalize()?;
    Ok(result)
}

/// What all branches of a graph share.
struct Weights {
    alpha: TensorId,
    max_rank: usize,
    data_type: DataType,
}

impl Weights {
    /// Adds the branch of `point`, from its input `x` to the sum with its output `base`. Gives the sum.
    fn add_branch(
        &self,
        graph: &mut Graph,
        point: &AttachPoint,
        x: TensorId,
        base: TensorId,
    ) -> Result<TensorId, LoraError> {
        let a = self.constant(graph, a_name(&point.module), [self.max_rank, point.k])?;
        let b = self.constant(graph, b_name(&point.module), [point.n, self.max_rank])?;
        let mut op = |part: &str, op, inputs: &[TensorId]| {
            let name = format!("{}.{part}", point.module);
            graph.op(&name, op, inputs, DataType::Float32).map(|outputs| outputs[0])
        };
        let down = op("lora_A", OpKind::FullyConnected, &[x, a])?;
        let scaled = op("lora_scale", OpKind::ElementWiseMultiply, &[down, self.alpha])?;
        let up = op("lora_B", OpKind::FullyConnected, &[scaled, b])?;
        let sum = op("lora_add", OpKind::ElementWiseAdd, &[base, up])?;
        // What was said of the layer's result now holds for the sum.
        let own = graph.tensor(base).clone();
        graph.set_encoding(sum, own.data_type, own.encoding)?;
        graph.set_encoding(base, DataType::Float32, None)?;
        Ok(sum)
    }

    fn constant(&self, graph: &mut Graph, name: String, dims: [usize; 2]) -> Result<TensorId, LoraError> {
        Ok(graph.add_tensor(Tensor {
            name,
            tensor_type: TensorType::UpdateableStatic,
            data_type: self.data_type,
            shape: Shape::fixed(&dims),
            encoding: None,
            data: None,
        })?)
    }
}

fn check(graph: &Graph, plan: &LoraPlan, points: &BTreeMap<String, AttachPoint>) -> Result<(), LoraError> {
    if graph.find(ALPHA_TENSOR).is_some() || points.values().any(|point| point.branch.is_some()) {
        return Err(LoraError::HasBranches { graph: graph.name().to_owned() });
    }
    if plan.max_rank == 0 || plan.max_rank > MAX_LORA_RANK {
        return Err(LoraError::config("maximum rank", plan.max_rank.to_string(), format!("1 to {MAX_LORA_RANK}")));
    }
    if plan.targets.is_empty() {
        return Err(LoraError::NothingLands { tensors: 0, points: points.len() });
    }
    match plan.targets.iter().find(|target| !points.contains_key(*target)) {
        None => Ok(()),
        Some(target) => Err(LoraError::no_point(&a_name(target), target, points.keys())),
    }
}

fn bits(graph: &Graph, plan: &LoraPlan) -> Result<LoraBits, LoraError> {
    let is_integer = |module: &String| {
        let weight = graph.find(&format!("{module}.weight"));
        weight.is_some_and(|id| graph.tensor(id).data_type.is_fixed_point())
    };
    let bits = plan.bits.unwrap_or(match (plan.targets.iter().any(is_integer), plan.mode) {
        (false, _) => LoraBits::ThirtyTwo,
        (true, UpdatableMode::None) => LoraBits::Sixteen,
        (true, _) => LoraBits::Eight,
    });
    if plan.mode == UpdatableMode::None && !bits.data_type().is_float() {
        let have = format!("{} bits with quant_updatable_mode none", bits.bits());
        let want = "16 or 32: integer weights need an encoding of their own for each adapter";
        return Err(LoraError::config("lora_weights_bitwidth", have, want));
    }
    Ok(bits)
}

/// With mode all, computed tensors that have an encoding become updatable.
fn updatable_type(tensor: &Tensor, mode: UpdatableMode) -> TensorType {
    if mode != UpdatableMode::All || tensor.encoding.is_none() || tensor.tensor_type.is_static() {
        return tensor.tensor_type;
    }
    tensor.tensor_type.updateable()
}

pub use crate::context::MAX_LORA_RANK;
/// Metadata key: columns of the branches.
pub const MAX_RANK_KEY: &str = "lora_max_rank";
/// Metadata key: bits of the adapters' weights.
pub const BITWIDTH_KEY: &str = "lora_weights_bitwidth";
/// Metadata key: name of the input with the strengths.
pub const ALPHA_KEY: &str = "lora_alpha_tensor";
/// Metadata key: which encodings a section may replace.
pub const MODE_KEY: &str = "quant_updatable_mode";
