//! What a context binary contains, in a form to print: QNN's `QnnSystemContext_BinaryInfo_t`, ours.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Binary, BinaryFault, FileKind, Meta, SectionFile, SectionKind, SectionMeta, Verify};
use crate::{context::Context, graph::Graph, map::Bytes, record::TensorRecord, tensor::TensorId};

/// Contents of a file of either kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum FileInfo {
    /// Of a context binary.
    Context(BinaryInfo),
    /// Of an adapter section.
    Section(SectionInfo),
}

impl FileInfo {
    /// Reads what `bytes` contains, without a context for it. An adapter section is always read as a whole.
    ///
    /// # Errors
    /// [`BinaryFault`]: what is wrong and where.
    ///
    /// QNN: `QnnSystemContext_getBinaryInfo`.
    pub fn read(bytes: Bytes, verify: Verify) -> Result<FileInfo, BinaryFault> {
        let binary = Binary::parse_any(bytes, Verify::Headers)?;
        Ok(match binary.kind() {
            FileKind::Context => FileInfo::Context(Context::of(binary, verify)?.info()),
            FileKind::AdapterSection => {
                binary.verify_beside(|| ())?;
                FileInfo::Section(SectionInfo::of(&SectionFile::of(binary)?))
            }
        })
    }
}

/// Contents of an adapter section, without the bytes of its tensors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SectionInfo {
    /// Version of the container.
    pub format_version: u16,
    /// Version of the crate that wrote it.
    pub sdk_version: String,
    /// Hash of the values, in hexadecimal.
    pub identity: String,
    /// Identity of the context that it is for.
    pub base_identity: String,
    /// Size of the file.
    pub size_bytes: u64,
    /// Size of all values together, as the kernels read them.
    pub values_bytes: u64,
    /// Name, rank, slots, encodings of inputs and outputs.
    #[serde(flatten)]
    pub meta: SectionMeta,
    /// All tensors, in the order of the file.
    pub updated_tensors: Vec<SectionTensorInfo>,
}

/// One tensor of an adapter section.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SectionTensorInfo {
    /// Its name.
    pub name: String,
    /// Its extents.
    pub dims: [usize; 2],
    /// Element type of its value.
    pub data_type: &'static str,
    /// Place of its value in the file.
    pub at_bytes: u64,
    /// Size of its value in the file.
    pub size_bytes: u64,
}

impl SectionInfo {
    fn of(file: &SectionFile) -> SectionInfo {
        let binary = file.binary();
        let tensor = |(i, (name, panels)): (usize, &(String, crate::Panels))| SectionTensorInfo {
            name: name.clone(),
            dims: [panels.layout().n(), panels.layout().k()],
            data_type: crate::context::data_type_of(panels.layout().format()).map_or("?", |t| t.name()),
            at_bytes: file.section(i).at_bytes,
            size_bytes: file.section(i).size_bytes,
        };
        SectionInfo {
            format_version: binary.format_version(),
            sdk_version: binary.sdk_version().to_string(),
            identity: binary.identity().to_string(),
            base_identity: binary.base_identity().to_string(),
            size_bytes: binary.size_bytes(),
            values_bytes: file.tensors().iter().map(|(_, panels)| panels.bytes().len() as u64).sum(),
            meta: file.meta().clone(),
            updated_tensors: file.tensors().iter().enumerate().map(tensor).collect(),
        }
    }
}

/// Contents of a context binary, without the bytes of constants.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BinaryInfo {
    /// Version of the container.
    pub format_version: u16,
    /// Version of the crate that wrote it.
    pub sdk_version: String,
    /// Hash of graphs and constants, in hexadecimal.
    pub identity: String,
    /// Size of the file.
    pub size_bytes: u64,
    /// Size of all constants together.
    pub constants_bytes: u64,
    /// Tool and metadata.
    #[serde(flatten)]
    pub meta: Meta,
    /// All graphs, in the order of the file.
    pub graphs: Vec<GraphInfo>,
    /// All constants, in the order of the file.
    pub constants: Vec<ConstantInfo>,
}

/// One graph.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GraphInfo {
    /// Its name.
    pub name: String,
    /// Tensors that the client writes.
    pub inputs: Vec<TensorRecord>,
    /// Tensors that the client reads.
    pub outputs: Vec<TensorRecord>,
    /// Tensors that both sides keep between executes.
    pub states: Vec<TensorRecord>,
    /// Names of the tensors that a binary section may change.
    pub updateable_tensors: Vec<String>,
    /// Number of nodes for each operation.
    pub operations: BTreeMap<&'static str, usize>,
    /// Facts about the model.
    pub metadata: BTreeMap<String, String>,
}

/// One constant.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConstantInfo {
    /// Name, type, extents, encoding or panels.
    #[serde(flatten)]
    pub tensor: TensorRecord,
    /// Place of its value in the file.
    pub at_bytes: u64,
    /// Size of its value in the file.
    pub size_bytes: u64,
    /// Number of graphs that use it.
    pub n_graphs: usize,
}

impl BinaryInfo {
    pub(crate) fn of(context: &Context) -> BinaryInfo {
        let binary = context.binary();
        let sections = binary.sections();
        let is_part = |kind| !matches!(kind, SectionKind::Meta | SectionKind::Graph);
        BinaryInfo {
            format_version: binary.format_version(),
            sdk_version: binary.sdk_version().to_string(),
            identity: binary.identity().to_string(),
            size_bytes: binary.size_bytes(),
            constants_bytes: sections.iter().filter(|s| is_part(s.kind)).map(|s| s.size_bytes).sum(),
            meta: context.meta().clone(),
            graphs: context.all_graphs().iter().map(GraphInfo::of).collect(),
            constants: sections
                .iter()
                .filter(|section| section.kind == SectionKind::Tensor)
                .filter_map(|section| {
                    let users = || context.all_graphs().iter().filter_map(|g| Some((g, g.find(&section.name)?)));
                    let (graph, id) = users().next()?;
                    Some(ConstantInfo {
                        tensor: TensorRecord::from_tensor(graph.tensor(id), graph),
                        at_bytes: section.at_bytes,
                        size_bytes: section.size_bytes,
                        n_graphs: users().count(),
                    })
                })
                .collect(),
        }
    }
}

impl GraphInfo {
    fn of(graph: &Graph) -> GraphInfo {
        let records =
            |ids: Vec<TensorId>| ids.into_iter().map(|id| TensorRecord::from_tensor(graph.tensor(id), graph)).collect();
        let mut operations = BTreeMap::new();
        for node in graph.nodes() {
            *operations.entry(node.op.name()).or_default() += 1;
        }
        let updateable = graph.tensors().iter().filter(|t| t.tensor_type.name().starts_with("UPDATEABLE"));
        GraphInfo {
            name: graph.name().to_owned(),
            inputs: records(graph.inputs()),
            outputs: records(graph.outputs()),
            states: records(graph.states()),
            updateable_tensors: updateable.map(|t| t.name.clone()).collect(),
            operations,
            metadata: graph.metadata().clone(),
        }
    }
}
