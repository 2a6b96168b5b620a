//! The dialog API: text in, an on-device model's answer out.
//!
//! Start at [`Dialog`]: [`Dialog::chat`] takes messages, [`Dialog::query`] a raw prompt. Several dialogs share one [`Model`]. On the way down a prompt passes
//! [`prompt`] (chat template), [`tokenizer`] and the decode loop in `dialog/basic.rs`; what runs the model is behind the
//! trait [`engine::Engine`]; on the way up an id comes out of the [`sampler`] and becomes text in `text_stream.rs`.
//! [`config`] reads Genie's JSON, strictly. [`adapters`] are named there or added later; `kv_cache.rs` knows which of them
//! made which cache row.
//!
//! Names, codes and the JSON schema are those of Qualcomm's Genie; the code is not. This crate knows no kernels and no
//! instruction sets: below the engine it ends.
#![deny(unsafe_code)]

pub mod accuracy;
pub mod adapters;
pub mod config;
mod dialog;
pub mod engine;
mod error;
mod kv_cache;
mod model;
pub mod profile;
pub mod prompt;
pub mod sampler;
#[cfg(test)]
mod testing;
mod text_stream;
pub mod tokenizer;

pub use adapters::AdapterChoice;
pub use config::DialogConfig;
pub use dialog::{AppliedLora, Dialog, Finish, Flow, QueryOptions, QueryReport, SentenceCode, Signal, Timings};
pub use error::{Code, Error};
pub use model::Model;
pub use prompt::Message;

/// Version of this library, as `major.minor.patch`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
