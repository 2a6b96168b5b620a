//! Shared support of the workspace-wide tests.

pub mod gguf_writer;
pub mod tiny_model;
pub mod real_model;
