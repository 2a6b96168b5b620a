//! From a file to a graph and back.

use htp_sim::round_to_f16;

use super::{EncodingsError, EncodingsFile, FileEncoding, FileVersion, Integers, Layout, Numbers};
use crate::{
    backend::{htp::surviving_tensors, reference::dequantize_constant},
    encoding::{BlockOffsets, Encoding, Floats},
    graph::{Graph, GraphError},
    offline::{
        lora::ALPHA_KEY,
        quantize_weights::{Bits, block_sizes},
    },
    tensor::{Tensor, TensorData, TensorId},
    types::DataType,
};

/// What a file did to a graph.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OverrideReport {
    /// Weights that have the file's encodings now.
    pub weights: Vec<String>,
    /// Computed tensors that have them.
    pub activations: Vec<String>,
    /// Names in the file that the graph does not have.
    pub unknown: Vec<String>,
    /// Tensors of both that keep what they have, and why.
    pub passed_over: Vec<(String, &'static str)>,
    /// Those of them that the file has as floats, by their names in the graph.
    pub floats: Vec<String>,
}

/// `graph` with the encodings of `file`: weights as integers of its scales, whatever they were before, and static encodings
/// for computed tensors.
///
/// Names that the graph does not have are reported, not refused: an export has many tensors that are one operation here.
/// So are tensors that fusion removes, vectors (which stay floats) and caches (whose rows have scales of their own).
/// An encoding of a layer's result goes to the sum with its adapter branch, where there is one.
///
/// # Errors
/// [`EncodingsError::OtherModel`] if no name fits; [`EncodingsError::Misfits`] listing the tensors whose width, number of
/// scales or block size does not fit.
pub fn override_encodings(graph: &Graph, file: &EncodingsFile) -> Result<(Graph, OverrideReport), EncodingsError> {
    let mut report = OverrideReport::default();
    let mut changes: Vec<(TensorId, Tensor)> = Vec::new();
    let mut misfits = Vec::new();
    // Which tensors survive is asked only where the file has encodings for computed ones.
    let mut surviving: Option<Vec<bool>> = None;
    for entry in &file.tensors {
        let Some(id) = find(graph, &entry.name) else {
            report.unknown.push(entry.name.clone());
            continue;
        };
        let tensor = graph.tensor(id);
        let pass = |why, report: &mut OverrideReport| report.passed_over.push((entry.name.clone(), why));
        let Numbers::Integer(integers) = &entry.numbers else {
            let is_rounded = tensor.tensor_type.is_static() && !tensor.data_type.is_float();
            let why = if is_rounded { ROUNDED_ALREADY } else { "the file has it as floats" };
            pass(why, &mut report);
            report.floats.push(tensor.name.clone());
            continue;
        };
        let changed = if tensor.tensor_type.is_static() {
            if tensor.shape.rank() != 2 {
                pass("a vector: it stays in floats", &mut report);
                continue;
            }
            if tensor.data.is_none() {
                pass("an adapter's weight: its encodings come with its values", &mut report);
                continue;
            }
            report.weights.push(entry.name.clone());
            weight(tensor, integers)
        } else if tensor.tensor_type.is_state() {
            pass("a cache: its rows have scales of their own", &mut report);
            continue;
        } else if tensor.data_type == DataType::Int32 {
            pass("whole numbers", &mut report);
            continue;
        } else if graph.metadata().get(ALPHA_KEY) == Some(&tensor.name) {
            pass("strengths of adapters: they are taken as they are set", &mut report);
            continue;
        } else {
            let survive = surviving.get_or_insert_with(|| surviving_tensors(graph).unwrap_or_default());
            if survive.get(id.index()) == Some(&false) {
                pass("fused into the operation that reads it", &mut report);
                continue;
            }
            report.activations.push(entry.name.clone());
            activation(tensor, integers)
        };
        match changed {
            Ok(changed) => changes.push((id, changed)),
            Err(why) => misfits.push(format!("{}: {why}", entry.name)),
        }
    }
    if !misfits.is_empty() {
        return Err(EncodingsError::Misfits { list: misfits });
    }
    let Some(first) = file.tensors.first() else {
        return Err(EncodingsError::Form { have: "no encodings in the file".to_owned(), want: "at least one" });
    };
    if report.unknown.len() == file.tensors.len() {
        let like = graph.tensors().iter().find(|t| t.data.is_some()).map_or("none", |t| &t.name).to_owned();
        let first = first.name.clone();
        return Err(EncodingsError::OtherModel { have: file.tensors.len(), first, want: graph.tensors().len(), like });
    }
    Ok((replaced(graph, changes)?, report))
}

/// The tensor that an encoding called `name` is for.
fn find(graph: &Graph, name: &str) -> Option<TensorId> {
    graph.find(&format!("{name}.lora_add")).or_else(|| graph.find(name))
}

/// `graph` with other versions of some of its tensors.
///
/// # Errors
/// What the graph says of a tensor that does not fit.
pub(in crate::offline) fn replaced(graph: &Graph, changes: Vec<(TensorId, Tensor)>) -> Result<Graph, GraphError> {
    let mut changes: std::collections::HashMap<TensorId, Tensor> = changes.into_iter().collect();
    let mut result = Graph::new(graph.name());
    for (key, value) in graph.metadata() {
        result.set_metadata(key, value);
    }
    for (i, tensor) in graph.tensors().iter().enumerate() {
        result.add_tensor(changes.remove(&TensorId(i as u32)).unwrap_or_else(|| tensor.clone()))?;
    }
    for node in graph.nodes() {
        result.add_node(node.clone())?;
    }
    result.finalize()?;
    Ok(result)
}

fn activation(tensor: &Tensor, integers: &Integers) -> Result<Tensor, String> {
    let (data_type, encoding) = computed_encoding(integers, integers.is_symmetric() || integers.signed)?;
    Ok(Tensor { data_type, encoding: Some(encoding), ..tensor.clone() })
}

/// `integers` as the encoding of a computed tensor with signed or unsigned codes.
///
/// # Errors
/// What a computed tensor cannot have, in words.
pub(in crate::offline) fn computed_encoding(integers: &Integers, signed: bool) -> Result<(DataType, Encoding), String> {
    if integers.layout != Layout::PerTensor {
        return Err("scales per channel, need one for a computed tensor".to_owned());
    }
    if !matches!(integers.bits, 8 | 16) {
        return Err(format!("{} bits, need 8 or 16 for a computed tensor", integers.bits));
    }
    let integers = integers.clone().with_signed(signed);
    let data_type = match (integers.signed, integers.bits) {
        (true, 8) => DataType::SFixedPoint8,
        (true, _) => DataType::SFixedPoint16,
        (false, 8) => DataType::UFixedPoint8,
        (false, _) => DataType::UFixedPoint16,
    };
    let offset = i32::try_from(integers.offsets[0]).map_err(|_| format!("offset {}", integers.offsets[0]))?;
    let encoding = Encoding::ScaleOffset { bitwidth: integers.bits, scale: integers.scales[0] as f32, offset };
    encoding.grid(data_type)?;
    Ok((data_type, encoding))
}

/// `tensor`, `[n, k]`, as integers of the given scales.
fn weight(tensor: &Tensor, integers: &Integers) -> Result<Tensor, String> {
    let grid = WeightGrid::of(integers, tensor.shape.max_dims()[0], tensor.shape.last())?;
    let codes = grid.codes(&dequantize_constant(tensor));
    let bytes = match grid.bits {
        Bits::Eight => codes,
        Bits::Four => codes.chunks(2).map(|pair| pair[0] & 15 | pair.get(1).map_or(0, |code| code << 4)).collect(),
    };
    let data_type = match (grid.bits, grid.is_symmetric) {
        (Bits::Eight, _) => DataType::SFixedPoint8,
        (Bits::Four, true) => DataType::SFixedPoint4,
        (Bits::Four, false) => DataType::UFixedPoint4,
    };
    let data = Some(TensorData::Flat(bytes.into()));
    Ok(Tensor { data_type, encoding: Some(grid.encoding()?), data, ..tensor.clone() })
}

/// The grid of a weight `[n, k]`, as it will be stored.
struct WeightGrid {
    bits: Bits,
    bitwidth: u8,
    is_symmetric: bool,
    /// Whether each row has one scale, which is then kept in 32 bits.
    per_channel: bool,
    /// Inputs of a row.
    k: usize,
    /// Inputs of a scale.
    block: usize,
    scales: Vec<f32>,
    offsets: Vec<i64>,
    /// The least code and the largest.
    ends: (i64, i64),
}

impl WeightGrid {
    fn of(integers: &Integers, n: usize, k: usize) -> Result<Self, String> {
        let bits = match integers.bits {
            4 => Bits::Four,
            5..=8 => Bits::Eight,
            other => return Err(format!("{other} bits, need 4 to 8 for a weight")),
        };
        let is_symmetric = integers.is_symmetric();
        let (block, scales) = scales_of_blocks(integers, n, k)?;
        let per_channel = block == k && matches!(integers.layout, Layout::PerTensor | Layout::PerChannel);
        if per_channel && matches!(integers.bits, 5..8) {
            return Err(format!("{} bits with a scale per row, need 4 or 8, or blocks", integers.bits));
        }
        if !per_channel && !block_sizes(bits, k).contains(&block) {
            return Err(format!("blocks of {block} in rows of {k}, need one of {:?}", block_sizes(bits, k)));
        }
        let want = n * (k / block);
        let scales = if scales.len() == 1 { vec![scales[0]; want] } else { scales };
        if scales.len() != want {
            return Err(format!("{} scales, need {want}", scales.len()));
        }
        if !is_symmetric && (per_channel || bits == Bits::Eight) {
            return Err("offsets, need a symmetric encoding or blocks of 4 bits".to_owned());
        }
        // Blocks have f16 scales: rounded first, so that the codes are chosen for what is stored.
        let stored = |scale: &f64| {
            let scale = *scale as f32;
            if per_channel { Some(scale) } else { round_to_f16(scale) }
                .ok_or_else(|| format!("scale {scale}, too large"))
        };
        let scales = scales.iter().map(stored).collect::<Result<Vec<f32>, String>>()?;
        let integers = integers.clone().with_signed(is_symmetric);
        let offset = |i: usize| integers.offsets.get(i).or(integers.offsets.first()).copied().unwrap_or(0);
        let offsets = (0..want).map(|i| if is_symmetric { 0 } else { offset(i) }).collect();
        Ok(Self {
            bits,
            bitwidth: integers.bits,
            is_symmetric,
            per_channel,
            k,
            block,
            scales,
            offsets,
            ends: integers.codes(),
        })
    }

    /// The nearest codes of `values`, a byte each.
    fn codes(&self, values: &[f64]) -> Vec<u8> {
        let code = |(i, value): (usize, &f64)| {
            let at = i / self.k * (self.k / self.block) + i % self.k / self.block;
            let scale = f64::from(self.scales[at]);
            let steps = if scale == 0.0 { 0.0 } else { (value / scale).round_ties_even() };
            (steps as i64).saturating_sub(self.offsets[at]).clamp(self.ends.0, self.ends.1) as u8
        };
        values.iter().enumerate().map(code).collect()
    }

    fn encoding(&self) -> Result<Encoding, String> {
        let bitwidth = self.bitwidth;
        if self.per_channel {
            let scales = Floats::from_f32(&self.scales);
            return Ok(Encoding::AxisScaleOffset { bitwidth, axis: 0, scales, offsets: Vec::new() });
        }
        let offsets = match self.is_symmetric {
            true => BlockOffsets::Symmetric,
            false => BlockOffsets::Integer(whole_offsets(&self.offsets)?.into()),
        };
        Ok(Encoding::Block { bitwidth, block_size: self.block, scales: Floats::from_f16(&self.scales), offsets })
    }
}

/// Inputs of a scale in rows of `k`, and the scales: LPBQ's steps multiplied out.
fn scales_of_blocks(integers: &Integers, n: usize, k: usize) -> Result<(usize, Vec<f64>), String> {
    Ok(match &integers.layout {
        Layout::PerTensor | Layout::PerChannel => (k, integers.scales.clone()),
        Layout::PerBlock { block_size } => (*block_size, integers.scales.clone()),
        Layout::Lpbq { block_size, block_scales, .. } => {
            let blocks = block_scales.len().checked_div(n).filter(|b| b * n == block_scales.len());
            let blocks = blocks.filter(|_| integers.scales.len() == n);
            let blocks = blocks.ok_or_else(|| format!("{} scales of blocks in {n} rows", block_scales.len()))?;
            let scale = |(i, whole): (usize, &u32)| integers.scales[i / blocks] * f64::from(*whole);
            (*block_size, block_scales.iter().enumerate().map(scale).collect())
        }
    })
}

fn whole_offsets(offsets: &[i64]) -> Result<Vec<u8>, String> {
    let byte = |offset: &i64| i8::try_from(*offset).map(i8::cast_unsigned);
    offsets.iter().map(|o| byte(o).map_err(|_| format!("offset {o} of a block, need -128 to 127"))).collect()
}

/// The encodings of `graph` as a file, and the names of weights whose encodings such a file cannot say: blocks with float
/// minima, in 0.6.1 all blocks.
pub fn dump(graph: &Graph, version: FileVersion) -> (EncodingsFile, Vec<String>) {
    let (mut tensors, mut left_out) = (Vec::new(), Vec::new());
    for tensor in graph.tensors() {
        let Some(encoding) = &tensor.encoding else { continue };
        // Read from a list, scales of blocks would be those of channels; where a block is a whole row they are.
        let has_place = |integers: &Integers| match integers.layout {
            Layout::PerBlock { block_size } => version != FileVersion::V0_6_1 || block_size == tensor.shape.last(),
            _ => true,
        };
        match integers(tensor, encoding).filter(has_place) {
            None => left_out.push(tensor.name.clone()),
            Some(integers) => tensors.push(FileEncoding {
                name: tensor.name.clone(),
                is_param: Some(tensor.tensor_type.is_static()),
                numbers: Numbers::Integer(integers),
            }),
        }
    }
    (EncodingsFile { version, tensors }, left_out)
}

fn integers(tensor: &Tensor, encoding: &Encoding) -> Option<Integers> {
    let signed = tensor.data_type.name().starts_with('S');
    let wide = |floats: &Floats| floats.to_vec().into_iter().map(f64::from).collect::<Vec<f64>>();
    Some(match encoding {
        Encoding::ScaleOffset { bitwidth, scale, offset } => Integers {
            bits: *bitwidth,
            signed,
            layout: Layout::PerTensor,
            scales: vec![f64::from(*scale)],
            offsets: vec![i64::from(*offset)],
        },
        Encoding::AxisScaleOffset { bitwidth, scales, offsets, .. } => {
            let offset = |i| offsets.get(i).map_or(0, |offset| i64::from(*offset));
            let offsets = (0..scales.len()).map(offset).collect();
            Integers { bits: *bitwidth, signed, layout: Layout::PerChannel, scales: wide(scales), offsets }
        }
        Encoding::Block { bitwidth, block_size, scales, offsets } => {
            let offsets = match offsets {
                BlockOffsets::Symmetric => vec![0; scales.len()],
                BlockOffsets::Integer(bytes) => bytes.iter().map(|b| i64::from(b.cast_signed())).collect(),
                BlockOffsets::Min(_) => return None,
            };
            let layout = Layout::PerBlock { block_size: *block_size };
            Integers { bits: *bitwidth, signed, layout, scales: wide(scales), offsets }
        }
        Encoding::BlockExpansion { bitwidth, block_size, scales, steps } => {
            let row_blocks = (steps.len() / scales.len().max(1)).max(1);
            let scale = |(i, step): (usize, &u8)| f64::from(scales.get(i / row_blocks)) * f64::from(*step);
            let scales = steps.iter().enumerate().map(scale).collect();
            let layout = Layout::PerBlock { block_size: *block_size };
            Integers { bits: *bitwidth, signed, layout, scales, offsets: vec![0; steps.len()] }
        }
    })
}

/// Said of weights that were floats once.
const ROUNDED_ALREADY: &str =
    "the file has it as floats, here it is integers; convert with --weights_bitwidth 32 and then use qairt-quantizer";
