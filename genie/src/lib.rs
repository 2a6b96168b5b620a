//! The dialog API: query, apply_lora, set_lora_strength.
#![deny(unsafe_code)]

pub mod config;
pub mod engine;
