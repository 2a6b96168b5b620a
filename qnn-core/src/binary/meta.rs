//! The META section: facts about the file and the model, as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BinaryError, MAX_META_BYTES, SectionKind};

/// Facts that no graph needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// What wrote the file: `qnn-core 0.1.0`.
    pub tool: String,
    /// Facts about the model.
    pub metadata: BTreeMap<String, String>,
}

impl Meta {
    /// The facts `metadata` in a file written by this crate.
    pub fn new(metadata: BTreeMap<String, String>) -> Meta {
        Meta { tool: concat!("qnn-core ", env!("CARGO_PKG_VERSION")).to_owned(), metadata }
    }

    /// Reads the section.
    pub(crate) fn from_json(json: &[u8]) -> Result<Meta, BinaryError> {
        check_size(json)?;
        serde_json::from_slice(json).map_err(|why| BinaryError::Json { section: SectionKind::Meta.to_string(), why })
    }

    /// The section's bytes.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, BinaryError> {
        let json = serde_json::to_vec(self)
            .map_err(|why| BinaryError::Json { section: SectionKind::Meta.to_string(), why })?;
        check_size(&json)?;
        Ok(json)
    }
}

fn check_size(json: &[u8]) -> Result<(), BinaryError> {
    if json.len() <= MAX_META_BYTES {
        return Ok(());
    }
    let (section, want) = (SectionKind::Meta.to_string(), format!("at most {MAX_META_BYTES}"));
    Err(BinaryError::Entry { section, field: "size_bytes", have: json.len() as u64, want })
}
