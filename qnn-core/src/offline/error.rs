//! Why a model cannot be imported.

use crate::{
    graph::GraphError,
    offline::{gguf::GgufError, quantize_weights::QuantizeError, safetensors::LayoutError},
};

/// Why a model cannot be imported. The file is named by the [`crate::Error`] around it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ImportError {
    #[error("{what} is not supported; supported: {supported}")]
    Unsupported { what: String, supported: String },
    #[error("no weights: looked for {}", files.join(" and "))]
    NoWeights { files: Vec<&'static str> },
    #[error("file of {have_bytes} bytes, at most {limit_bytes} are read")]
    FileTooLarge { have_bytes: u64, limit_bytes: u64 },
    #[error("not the JSON expected here")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Safetensors(#[from] LayoutError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("the output is a file that the model is read from, need another one")]
    OutputIsInput,
    #[error("shard {shard:?} is not a plain file name")]
    ShardPath { shard: String },
    #[error("tensor {tensor} is not in {shard}, where the index says it is")]
    NotInShard { tensor: String, shard: String },
    #[error("{key} is {have}, need {want}")]
    Config { key: String, have: String, want: String },
    #[error("tensor {name} is missing")]
    MissingTensor { name: String },
    #[error("tensor {name} is used by nothing in architecture {architecture}")]
    UnusedTensor { name: String, architecture: String },
    #[error("tensor {name}: {have}, need {want}")]
    Tensor { name: String, have: String, want: String },
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    #[error(transparent)]
    Graph(#[from] GraphError),
}
