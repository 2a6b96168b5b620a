//! Shared support of the workspace-wide tests.

pub mod bench_model;
pub mod converted;
pub mod effects;
pub mod gguf_writer;
pub mod golden;
pub mod tiny_model;
