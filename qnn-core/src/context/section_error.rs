//! Why a section cannot be loaded, applied or made, with QNN's numbers.

use crate::{
    backend::PrepareError,
    binary::{BinaryError, BinaryFault, Identity, SdkVersion, SectionType},
    error::Code,
    types::{DataType, TensorType},
};

/// Why a section does not fit a context.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SectionError {
    #[error("at byte {at_bytes} of the section")]
    Damaged {
        at_bytes: u64,
        #[source]
        why: BinaryError,
    },
    #[error("section belongs to base {have}, this context is {want}")]
    Base { have: Identity, want: Identity },
    #[error("section was written by SDK {have}, its context by SDK {want}; both have to be of one version")]
    SdkVersion { have: SdkVersion, want: SdkVersion },
    #[error("graph {have:?} is not in the context, which has {want}")]
    UnknownGraph { have: String, want: String },
    #[error("section is for graph {have:?}, asked for {want:?}")]
    WrongGraph { have: String, want: String },
    #[error("adapter {adapter:?} was loaded for another context")]
    WrongContext { adapter: String },
    #[error("section {name:?} is of type {have}, need {want}")]
    Type { name: String, have: SectionType, want: SectionType },
    #[error(
        "section {adapter:?} has weights only: it needs the encodings of group {group:?}, whose section is not loaded"
    )]
    GroupMissing { adapter: String, group: String },
    #[error("adapter {adapter:?} belongs to group {have:?}, the encodings are those of group {want:?}")]
    WrongGroup { adapter: String, have: String, want: String },
    #[error("tensor {tensor} is not an updatable tensor of the context")]
    UnknownTensor { tensor: String },
    #[error("tensor {tensor}: rank {have}, the graph has room for {want}")]
    Rank { tensor: String, have: usize, want: usize },
    #[error("adapter of rank {have}, the context has room for {want}")]
    AdapterRank { have: usize, want: usize },
    #[error("adapter says that it has {have} rank columns, its tensors have {want}")]
    Columns { have: usize, want: usize },
    #[error("tensor {tensor}: extents {have:?}, need {want:?}")]
    Extents { tensor: String, have: [usize; 2], want: Vec<usize> },
    #[error("tensor {tensor}: values of {have}, need {want}")]
    DataType { tensor: String, have: String, want: DataType },
    #[error("tensor {tensor} has a value, its partner {missing} has none")]
    HalfPair { tensor: String, missing: String },
    #[error("tensor {tensor}: rank {have}, its partner {partner} has {want}")]
    PairRank { tensor: String, have: usize, partner: String, want: usize },
    #[error("encoding of tensor {tensor}: {have}, need {want}")]
    Encoding { tensor: String, have: String, want: String },
    #[error("graph {graph:?}, tensor {tensor}: {have}, need {want}")]
    Io { graph: String, tensor: String, have: String, want: String },
}

impl SectionError {
    /// QNN's status for it.
    pub fn code(&self) -> Code {
        match self {
            SectionError::Damaged { why: BinaryError::Version { .. }, .. } | SectionError::SdkVersion { .. } => {
                Code::CONTEXT_BINARY_VERSION
            }
            SectionError::Damaged { .. } => Code::CONTEXT_CREATE_FROM_BINARY,
            SectionError::Base { .. }
            | SectionError::UnknownGraph { .. }
            | SectionError::WrongGraph { .. }
            | SectionError::WrongContext { .. }
            | SectionError::Type { .. }
            | SectionError::GroupMissing { .. }
            | SectionError::WrongGroup { .. } => Code::CONTEXT_INVALID_ARGUMENT,
            SectionError::UnknownTensor { .. } => Code::TENSOR_DOES_NOT_EXIST,
            SectionError::Rank { .. }
            | SectionError::AdapterRank { .. }
            | SectionError::Columns { .. }
            | SectionError::Extents { .. }
            | SectionError::DataType { .. }
            | SectionError::HalfPair { .. }
            | SectionError::PairRank { .. }
            | SectionError::Encoding { .. }
            | SectionError::Io { .. } => Code::TENSOR_INCOMPATIBLE_TENSOR_UPDATE,
        }
    }
}

impl From<BinaryFault> for SectionError {
    fn from(BinaryFault { at_bytes, why }: BinaryFault) -> SectionError {
        SectionError::Damaged { at_bytes, why }
    }
}

/// Why a context cannot do something in the state it is in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum StateError {
    #[error("graph {graph:?} cannot run yet: the context shares its adapter weights, and no section has been applied")]
    NothingApplied { graph: String },
    #[error("not finalized: {what} needs the graphs to be finalized after the last change")]
    NotFinalized { what: &'static str },
    #[error("graph {graph:?} is not in the context")]
    UnknownGraph { graph: String },
    #[error("two graphs are called {graph:?}")]
    DuplicateGraph { graph: String },
    #[error("a context made from a binary is closed: no graphs can be added")]
    Closed,
    #[error("tensor {tensor} is not in {place}")]
    UnknownTensor { tensor: String, place: String },
    #[error("tensor {tensor} is {have}, which no update may change; need {}", TensorType::UpdateableStatic)]
    NotUpdateable { tensor: String, have: TensorType },
    #[error("update of tensor {tensor}: {have}, need {want}")]
    Incompatible { tensor: String, have: String, want: String },
    #[error("graph {graph:?} has values of its own: ask for its section, not for that of the whole context")]
    PerGraph { graph: String },
    #[error("value of a tensor")]
    Pack(#[from] PrepareError),
    #[error(transparent)]
    Section(#[from] SectionError),
    #[error("context binary")]
    Binary(#[from] BinaryError),
    #[error(transparent)]
    Graph(#[from] crate::graph::GraphError),
}

impl StateError {
    /// QNN's status for it. QNN does not publish the one for executing before the first apply; ours is the context's
    /// "not finalized".
    pub fn code(&self) -> Code {
        match self {
            StateError::NothingApplied { .. } | StateError::NotFinalized { .. } => Code::CONTEXT_NOT_FINALIZED,
            StateError::UnknownGraph { .. }
            | StateError::DuplicateGraph { .. }
            | StateError::Closed
            | StateError::PerGraph { .. }
            | StateError::Binary(_) => Code::CONTEXT_INVALID_ARGUMENT,
            StateError::UnknownTensor { .. } => Code::TENSOR_DOES_NOT_EXIST,
            StateError::NotUpdateable { .. } | StateError::Incompatible { .. } => {
                Code::TENSOR_INCOMPATIBLE_TENSOR_UPDATE
            }
            StateError::Pack(_) | StateError::Graph(_) => Code::TENSOR_INVALID_TENSOR_PARAM,
            StateError::Section(why) => why.code(),
        }
    }
}
