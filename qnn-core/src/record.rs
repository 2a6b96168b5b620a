//! The JSON form of a graph, without the bytes of its constants.
//!
//! Both file formats (DLC, context binary) store a [`GraphRecord`] beside named blobs. A tensor owns up to three blobs,
//! one for each [`Part`] that [`parts`] lists: a constant's elements, and the arrays of its encoding. Everything scalar
//! is in the JSON. Reading goes through [`Graph::add_tensor`] and [`Graph::add_node`], so a graph from a file has passed
//! the same checks as one that was built.

use std::collections::BTreeMap;

use htp_sim::PackedLayout;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    graph::{Graph, GraphError, Node},
    map::Bytes,
    tensor::{Dim, Panels, Shape, Tensor, TensorData, TensorId},
    types::{DataType, TensorType},
};

/// A graph without the bytes of its constants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphRecord {
    /// The graph's name.
    pub name: String,
    /// Facts about the model that no operation needs.
    pub metadata: BTreeMap<String, String>,
    /// All tensors, in the graph's order.
    pub tensors: Vec<TensorRecord>,
    /// All nodes, in the graph's order.
    pub nodes: Vec<NodeRecord>,
}

/// A tensor without its bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRecord {
    /// Unique within the graph.
    pub name: String,
    /// Input, output, state, intermediate or constant.
    #[serde(rename = "type", with = "tensor_type_name")]
    pub tensor_type: TensorType,
    /// Element type.
    #[serde(with = "data_type_name")]
    pub data_type: DataType,
    /// Extents, outermost first.
    pub dims: Vec<DimRecord>,
    /// Meaning of fixed-point numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<EncodingRecord>,
    /// Layout of a constant that is stored in panels; absent when it is stored row-major.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panels: Option<PanelsRecord>,
    /// An UPDATEABLE_STATIC tensor without a value of its own: zeros until a section brings one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_data: bool,
}

/// One extent: a number, or `{"max": 128, "by": "input_ids"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DimRecord {
    /// Known when the graph is built.
    Fixed(usize),
    /// Known at each execute.
    UpTo(UpToRecord),
}

impl DimRecord {
    /// The largest value the extent can have.
    pub fn max(&self) -> usize {
        match self {
            DimRecord::Fixed(n) => *n,
            DimRecord::UpTo(up_to) => up_to.max,
        }
    }
}

/// A dynamic extent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpToRecord {
    /// The bound.
    pub max: usize,
    /// Name of the graph input whose first dimension decides.
    pub by: String,
}

/// An encoding without its arrays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EncodingRecord {
    /// One scale and offset for the whole tensor.
    ScaleOffset {
        /// True width in bits.
        bitwidth: u8,
        /// Step between two codes.
        scale: f32,
        /// Added to the code before scaling.
        offset: i32,
    },
    /// One scale per index of an axis, in [`Part::Scales`].
    AxisScaleOffset {
        /// True width in bits.
        bitwidth: u8,
        /// The axis.
        axis: usize,
        /// Type of the scales.
        #[serde(with = "data_type_name")]
        scale_type: DataType,
        /// Whether [`Part::Offsets`] holds one i32 per index; otherwise all are 0.
        has_offsets: bool,
    },
    /// One scale per block along the last axis, in [`Part::Scales`].
    Block {
        /// True width in bits.
        bitwidth: u8,
        /// Elements that share a scale.
        block_size: usize,
        /// Type of the scales.
        #[serde(with = "data_type_name")]
        scale_type: DataType,
        /// What is added.
        offsets: BlockOffsetsRecord,
    },
    /// One scale per row, in [`Part::Scales`], and a whole step per block along the last axis, in [`Part::Offsets`].
    BlockExpansion {
        /// True width in bits.
        bitwidth: u8,
        /// Elements that share a step.
        block_size: usize,
        /// Type of the scales.
        #[serde(with = "data_type_name")]
        scale_type: DataType,
    },
}

/// What a block encoding adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum BlockOffsetsRecord {
    /// Nothing.
    Symmetric,
    /// One i8 per block, in [`Part::Offsets`].
    Integer,
    /// One float per block, of this type, in [`Part::Mins`].
    #[serde(with = "data_type_name")]
    Min(DataType),
}

/// The format of a constant that is stored in the kernels' panels; its extents are the tensor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the names are those of `htp_sim::WeightFormat`")]
pub enum PanelsRecord {
    F32,
    F16,
    Bf16,
    Int8PerChannel,
    Int4PerChannel,
    Int8Block { block: usize },
    Int4Block { block: usize, offset: PanelOffset },
    Int5Block { block: usize, offset: PanelOffset },
    Int6Block { block: usize },
    Int4Expansion { block: usize },
}

/// Where zero lies in a 4-bit or 5-bit block of a panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the names are those of `htp_sim::BlockOffset`")]
pub enum PanelOffset {
    Symmetric,
    Integer,
    Min,
}

/// A node, its tensors by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// Unique within the graph.
    pub name: String,
    /// What it does.
    pub op: OpRecord,
    /// Tensors read, in the operation's order.
    pub inputs: Vec<String>,
    /// Tensors written, in the operation's order.
    pub outputs: Vec<String>,
}

/// An operation with its attributes: `"FullyConnected"` or `{"RmsNorm": {"epsilon": 1e-5}}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of `OpKind` and `AttentionAttrs`")]
pub enum OpRecord {
    FullyConnected,
    Gather,
    RmsNorm {
        epsilon: f32,
    },
    ElementWiseAdd,
    ElementWiseMultiply,
    Sigmoid,
    Gelu,
    SoftCap {
        cap: f32,
    },
    RotaryTable {
        scale: f32,
    },
    RotaryEmbedding {
        head_dim: usize,
    },
    Attention {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        scale: f32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        window: Option<usize>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        softcap: Option<f32>,
    },
}

/// One of the blobs that belong to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The elements of a constant, row-major or in panels.
    Data,
    /// The scales of its encoding.
    Scales,
    /// The whole-number offsets of its encoding: i32 for an axis encoding, i8 for a block encoding.
    Offsets,
    /// The float offsets of its block encoding.
    Mins,
}

impl Part {
    /// What is appended to the tensor's name to name the blob: nothing, `.scales`, `.offsets`, `.mins`.
    pub fn suffix(self) -> &'static str {
        match self {
            Part::Data => "",
            Part::Scales => ".scales",
            Part::Offsets => ".offsets",
            Part::Mins => ".mins",
        }
    }
}

/// Why a record is no graph.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RecordError {
    #[error("graph JSON of {have_bytes} bytes, at most {MAX_GRAPH_JSON_BYTES} are read")]
    TooLarge { have_bytes: usize },
    #[error("graph JSON")]
    Json(#[from] serde_json::Error),
    #[error("{place} names tensor {name}, which the graph does not have")]
    UnknownTensor { place: String, name: String },
    #[error("tensor {tensor}{}: {have}, need {want}", part.suffix())]
    Blob { tensor: String, part: Part, have: String, want: String },
    #[error("tensor {tensor}: panels")]
    Panels {
        tensor: String,
        #[source]
        why: htp_sim::ShapeError,
    },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl GraphRecord {
    /// The record of `graph`.
    pub fn from_graph(graph: &Graph) -> GraphRecord {
        let names = |ids: &[TensorId]| ids.iter().map(|id| graph.tensor(*id).name.clone()).collect();
        GraphRecord {
            name: graph.name().to_owned(),
            metadata: graph.metadata().clone(),
            tensors: graph.tensors().iter().map(|t| TensorRecord::from_tensor(t, graph)).collect(),
            nodes: graph
                .nodes()
                .iter()
                .map(|node| NodeRecord {
                    name: node.name.clone(),
                    op: OpRecord::from(node.op),
                    inputs: names(&node.inputs),
                    outputs: names(&node.outputs),
                })
                .collect(),
        }
    }

    /// Reads a record from JSON.
    ///
    /// # Errors
    /// [`RecordError::TooLarge`], or [`RecordError::Json`] naming the unknown operation, field or type and its place.
    pub fn from_json(json: &[u8]) -> Result<GraphRecord, RecordError> {
        if json.len() > MAX_GRAPH_JSON_BYTES {
            return Err(RecordError::TooLarge { have_bytes: json.len() });
        }
        Ok(serde_json::from_slice(json)?)
    }

    /// The record as JSON; the same record always gives the same bytes.
    ///
    /// # Errors
    /// [`RecordError::TooLarge`] if [`GraphRecord::from_json`] would not read it again.
    pub fn to_json(&self) -> Result<String, RecordError> {
        let json = serde_json::to_string(self)?;
        if json.len() > MAX_GRAPH_JSON_BYTES {
            return Err(RecordError::TooLarge { have_bytes: json.len() });
        }
        Ok(json)
    }

    /// Builds the graph. `blob` gives the bytes of each part that [`TensorRecord::parts`] lists, and is asked once for each.
    ///
    /// # Errors
    /// What `blob` returns, or a [`RecordError`] naming the tensor or node that is not well formed.
    pub fn into_graph<E: From<RecordError>>(
        self,
        blob: &mut dyn FnMut(&TensorRecord, Part) -> Result<Bytes, E>,
    ) -> Result<Graph, E> {
        let mut graph = Graph::new(self.name);
        for (key, value) in self.metadata {
            graph.set_metadata(key, value);
        }
        for record in self.tensors {
            let tensor = record.into_tensor(&graph, blob)?;
            graph.add_tensor(tensor).map_err(RecordError::from)?;
        }
        for record in self.nodes {
            let node = record.into_node(&graph)?;
            graph.add_node(node).map_err(RecordError::from)?;
        }
        graph.finalize().map_err(RecordError::from)?;
        Ok(graph)
    }
}

/// The blobs of `tensor`, in the order of [`Part`].
pub fn parts(tensor: &Tensor) -> Vec<(Part, Bytes)> {
    let mut parts = Vec::new();
    match &tensor.data {
        Some(TensorData::Flat(bytes)) => parts.push((Part::Data, bytes.clone())),
        Some(TensorData::Panels(panels)) => parts.push((Part::Data, panels.bytes().clone())),
        None => {}
    }
    match &tensor.encoding {
        None | Some(Encoding::ScaleOffset { .. }) => {}
        Some(Encoding::AxisScaleOffset { scales, offsets, .. }) => {
            parts.push((Part::Scales, scales.bytes().clone()));
            if !offsets.is_empty() {
                let bytes: Vec<u8> = offsets.iter().flat_map(|o| o.to_le_bytes()).collect();
                parts.push((Part::Offsets, bytes.into()));
            }
        }
        Some(Encoding::Block { scales, offsets, .. }) => {
            parts.push((Part::Scales, scales.bytes().clone()));
            match offsets {
                BlockOffsets::Symmetric => {}
                BlockOffsets::Integer(bytes) => parts.push((Part::Offsets, bytes.clone())),
                BlockOffsets::Min(mins) => parts.push((Part::Mins, mins.bytes().clone())),
            }
        }
        Some(Encoding::BlockExpansion { scales, steps, .. }) => {
            parts.extend([(Part::Scales, scales.bytes().clone()), (Part::Offsets, steps.clone())]);
        }
    }
    parts
}

impl TensorRecord {
    /// The record of `tensor`, a tensor of `graph`.
    pub fn from_tensor(tensor: &Tensor, graph: &Graph) -> TensorRecord {
        let dim = |dim: &Dim| match dim {
            Dim::Fixed(n) => DimRecord::Fixed(*n),
            Dim::UpTo { max, by } => DimRecord::UpTo(UpToRecord { max: *max, by: graph.tensor(*by).name.clone() }),
        };
        let panels = match &tensor.data {
            Some(TensorData::Panels(panels)) => Some(PanelsRecord::from(panels.layout().format())),
            _ => None,
        };
        TensorRecord {
            name: tensor.name.clone(),
            tensor_type: tensor.tensor_type,
            data_type: tensor.data_type,
            dims: tensor.shape.0.iter().map(dim).collect(),
            encoding: tensor.encoding.as_ref().map(EncodingRecord::from),
            panels,
            without_data: tensor.tensor_type.is_static() && tensor.data.is_none(),
        }
    }

    /// The blobs that belong to this tensor.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        if self.tensor_type.is_static() && !self.without_data {
            parts.push(Part::Data);
        }
        match &self.encoding {
            None | Some(EncodingRecord::ScaleOffset { .. }) => {}
            Some(EncodingRecord::AxisScaleOffset { has_offsets, .. }) => {
                parts.push(Part::Scales);
                parts.extend(has_offsets.then_some(Part::Offsets));
            }
            Some(EncodingRecord::Block { offsets, .. }) => {
                parts.push(Part::Scales);
                match offsets {
                    BlockOffsetsRecord::Symmetric => {}
                    BlockOffsetsRecord::Integer => parts.push(Part::Offsets),
                    BlockOffsetsRecord::Min(_) => parts.push(Part::Mins),
                }
            }
            Some(EncodingRecord::BlockExpansion { .. }) => parts.extend([Part::Scales, Part::Offsets]),
        }
        parts
    }

    fn into_tensor<E: From<RecordError>>(
        self,
        graph: &Graph,
        blob: &mut dyn FnMut(&TensorRecord, Part) -> Result<Bytes, E>,
    ) -> Result<Tensor, E> {
        let mut blobs = Vec::new();
        for part in self.parts() {
            blobs.push((part, blob(&self, part)?));
        }
        Ok(self.join(graph, blobs)?)
    }

    /// Joins the record with its blobs.
    fn join(self, graph: &Graph, blobs: Vec<(Part, Bytes)>) -> Result<Tensor, RecordError> {
        let shape = self.shape(graph)?;
        let bytes_of = |part| blobs.iter().find(|(p, _)| *p == part).map(|(_, bytes)| bytes.clone());
        let data = match (bytes_of(Part::Data), self.panels) {
            (None, None) => None,
            (Some(bytes), None) => Some(TensorData::Flat(bytes)),
            (None, Some(_)) => {
                let have = format!("panels on {}", self.tensor_type);
                return Err(self.blob_error(Part::Data, have, "panels on constants only"));
            }
            (Some(bytes), Some(panels)) => Some(TensorData::Panels(self.panels(&shape, panels, bytes)?)),
        };
        let encoding = match &self.encoding {
            None => None,
            Some(record) => Some(self.encoding(record, &bytes_of)?),
        };
        let TensorRecord { name, tensor_type, data_type, .. } = self;
        Ok(Tensor { name, tensor_type, data_type, shape, encoding, data })
    }

    fn shape(&self, graph: &Graph) -> Result<Shape, RecordError> {
        let dim = |dim: &DimRecord| match dim {
            DimRecord::Fixed(n) => Ok(Dim::Fixed(*n)),
            // An input's own extent may be set by itself; it is the tensor that is added next.
            DimRecord::UpTo(UpToRecord { max, by }) if *by == self.name => {
                Ok(Dim::UpTo { max: *max, by: TensorId(graph.tensors().len() as u32) })
            }
            DimRecord::UpTo(UpToRecord { max, by }) => {
                let by = graph.find(by).ok_or_else(|| RecordError::UnknownTensor {
                    place: format!("extent of tensor {}", self.name),
                    name: by.clone(),
                })?;
                Ok(Dim::UpTo { max: *max, by })
            }
        };
        Ok(Shape(self.dims.iter().map(dim).collect::<Result<_, RecordError>>()?))
    }

    fn panels(&self, shape: &Shape, record: PanelsRecord, bytes: Bytes) -> Result<Panels, RecordError> {
        let [Dim::Fixed(n), Dim::Fixed(k)] = shape.0[..] else {
            return Err(self.blob_error(Part::Data, format!("panels of shape {shape}"), "two fixed extents"));
        };
        PackedLayout::new(n, k, record.into())
            .and_then(|layout| Panels::new(layout, bytes))
            .map_err(|why| RecordError::Panels { tensor: self.name.clone(), why })
    }

    fn encoding(
        &self,
        record: &EncodingRecord,
        bytes_of: &dyn Fn(Part) -> Option<Bytes>,
    ) -> Result<Encoding, RecordError> {
        let bytes = |part| bytes_of(part).ok_or_else(|| self.blob_error(part, "no bytes".to_owned(), "bytes"));
        let floats = |part, data_type: DataType| {
            let bytes = bytes(part)?;
            let have = format!("{} bytes of {data_type}", bytes.len());
            Floats::new(bytes, data_type).ok_or_else(|| self.blob_error(part, have, "whole floats"))
        };
        Ok(match *record {
            EncodingRecord::ScaleOffset { bitwidth, scale, offset } => {
                Encoding::ScaleOffset { bitwidth, scale, offset }
            }
            EncodingRecord::AxisScaleOffset { bitwidth, axis, scale_type, has_offsets } => {
                let offsets = if has_offsets { self.whole_offsets(&bytes(Part::Offsets)?)? } else { Vec::new() };
                Encoding::AxisScaleOffset { bitwidth, axis, scales: floats(Part::Scales, scale_type)?, offsets }
            }
            EncodingRecord::Block { bitwidth, block_size, scale_type, offsets } => {
                let scales = floats(Part::Scales, scale_type)?;
                let offsets = match offsets {
                    BlockOffsetsRecord::Symmetric => BlockOffsets::Symmetric,
                    BlockOffsetsRecord::Integer => BlockOffsets::Integer(bytes(Part::Offsets)?),
                    BlockOffsetsRecord::Min(data_type) => BlockOffsets::Min(floats(Part::Mins, data_type)?),
                };
                Encoding::Block { bitwidth, block_size, scales, offsets }
            }
            EncodingRecord::BlockExpansion { bitwidth, block_size, scale_type } => {
                let (scales, steps) = (floats(Part::Scales, scale_type)?, bytes(Part::Offsets)?);
                Encoding::BlockExpansion { bitwidth, block_size, scales, steps }
            }
        })
    }

    fn whole_offsets(&self, bytes: &[u8]) -> Result<Vec<i32>, RecordError> {
        let (chunks, rest) = bytes.as_chunks::<4>();
        if rest.is_empty() {
            return Ok(chunks.iter().map(|c| i32::from_le_bytes(*c)).collect());
        }
        Err(self.blob_error(Part::Offsets, format!("{} bytes", bytes.len()), "a multiple of 4"))
    }

    fn blob_error(&self, part: Part, have: String, want: &str) -> RecordError {
        RecordError::Blob { tensor: self.name.clone(), part, have, want: want.to_owned() }
    }
}

impl NodeRecord {
    fn into_node(self, graph: &Graph) -> Result<Node, RecordError> {
        let find = |names: Vec<String>| {
            let one = |name: String| {
                graph
                    .find(&name)
                    .ok_or_else(|| RecordError::UnknownTensor { place: format!("node {}", self.name), name })
            };
            names.into_iter().map(one).collect::<Result<Vec<TensorId>, RecordError>>()
        };
        let (inputs, outputs) = (find(self.inputs)?, find(self.outputs)?);
        Ok(Node { name: self.name, op: self.op.into(), inputs, outputs })
    }
}

mod from;

mod data_type_name {
    use super::*;

    pub(super) fn serialize<S: Serializer>(data_type: &DataType, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(data_type.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DataType, D::Error> {
        let name = String::deserialize(from)?;
        DataType::from_name(&name).ok_or_else(|| D::Error::custom(format!("unknown data type {name:?}")))
    }
}

mod tensor_type_name {
    use super::*;

    pub(super) fn serialize<S: Serializer>(tensor_type: &TensorType, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(tensor_type.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TensorType, D::Error> {
        let name = String::deserialize(from)?;
        TensorType::from_name(&name).ok_or_else(|| D::Error::custom(format!("unknown tensor type {name:?}")))
    }
}

/// Longest graph JSON that is read or written: some 30 times that of a large model.
pub const MAX_GRAPH_JSON_BYTES: usize = 64 << 20;

#[cfg(test)]
mod tests;
