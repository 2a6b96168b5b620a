//! Strict JSON in, [`EngineConfig`] and its siblings out.

mod engine;

pub use engine::{EngineConfig, PositionalEncoding, RopeScaling};
