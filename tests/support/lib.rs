//! Shared support of the workspace-wide tests.

pub mod converted;
pub mod effects;
pub mod gguf_writer;
pub mod golden;
pub mod tiny_model;
