//! The tests of the library and its tools from outside, in one program: each program would be built with all that is tested.

#[path = "../support/peft.rs"]
mod peft;
#[path = "../support/mod.rs"]
mod support;

mod adapter_apply;
mod adapter_groups;
mod backends_agree;
mod calibrate;
mod context_binary;
mod context_binary_damaged;
mod context_editor;
mod context_tools;
mod dry_run;
mod encodings_aimet;
mod families;
mod generate;
mod generate_adapters;
mod importer_files;
mod int4;
mod lora_branches;
mod lora_importer;
mod lora_peft;
mod models_md;
mod qairt_converter;
mod quantizer;
mod rounding;
mod section;
mod watch;
mod weight_grids;
