//! Shared support of the workspace-wide tests.

pub mod converted;
pub mod gguf_writer;
pub mod tiny_model;
