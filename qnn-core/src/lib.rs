//! Tensors, encodings, graphs, contexts, context binaries, and the offline tools that make them.
//!
//! What this crate knows: a model is a [`Graph`] of QNN operations over tensors. Importers build graphs, files store
//! them, a [`Backend`] runs them. What it does not know: text, sampling, stop strings, dialog configs (crate `genie`),
//! and how a kernel works (crate `htp-sim`).
//!
//! Start reading at [`graph`], then [`op`] (the operations), [`backend`] (what runs them), [`offline`] (from a model's
//! files to a context binary).
#![deny(unsafe_code)]

pub mod adapter;
mod atomic_file;
pub mod backend;
pub mod binary;
pub mod context;
pub mod encoding;
pub mod error;
pub mod graph;
pub mod map;
pub mod offline;
pub mod op;
pub mod outline;
pub mod record;
pub mod tensor;
pub mod types;

pub use adapter::{Adapter, AdapterGroup};
pub use atomic_file::{check_outputs, check_place, write as write_atomic};
pub use backend::{Backend, Bindings, Executable, State};
pub use context::{Context, ContextBuilder, ContextEditor, OpenOptions, SectionError, StateError};
pub use encoding::{BlockOffsets, Encoding, Floats};
pub use error::Error;
pub use graph::{Graph, GraphError, Node};
pub use map::Bytes;
pub use op::OpKind;
pub use tensor::{Dim, Panels, Shape, Tensor, TensorData, TensorId};
pub use types::{DataType, TensorType};
