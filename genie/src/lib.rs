//! The dialog API: query, apply_lora, set_lora_strength.
