//! From a model's files to graphs: importers, weight quantization, the DLC file, and what a context binary is made of.
//!
//! Start at [`convert`], which is `qairt-converter` as a function: [`source`] opens a Hugging Face directory or a GGUF
//! file, [`arch`] builds the graph, [`dlc`] writes it. [`calibrate`] runs a graph over text and looks at its tensors.

pub mod arch;
pub mod calibrate;
pub mod config;
pub mod convert;
pub mod dlc;
pub mod dry_run;
pub mod encodings;
pub mod equalize;
pub mod error;
pub(crate) mod fused;
pub mod generate;
pub mod gguf;
pub mod int4;
pub mod lora;
pub mod opening;
pub mod quantize;
pub mod quantize_weights;
pub mod rounding;
pub mod safetensors;
pub mod source;
mod specialize;

pub use error::ImportError;
pub use specialize::specialize;
