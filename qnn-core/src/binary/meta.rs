//! The META section: facts about the file and the model, as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

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
        Meta { tool: TOOL.to_owned(), metadata }
    }

    /// Reads the section.
    pub(crate) fn from_json(json: &[u8]) -> Result<Meta, BinaryError> {
        from_json(json)
    }

    /// The section's bytes.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, BinaryError> {
        to_json(self)
    }
}

/// Reads a META section, of a context or of an adapter section.
pub(super) fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, BinaryError> {
    check_size(json)?;
    serde_json::from_slice(json).map_err(|why| BinaryError::Json { section: SectionKind::Meta.to_string(), why })
}

/// The bytes of a META section.
pub(super) fn to_json(meta: &impl Serialize) -> Result<Vec<u8>, BinaryError> {
    let json =
        serde_json::to_vec(meta).map_err(|why| BinaryError::Json { section: SectionKind::Meta.to_string(), why })?;
    check_size(&json)?;
    Ok(json)
}

/// What this crate writes as `tool`.
pub(crate) const TOOL: &str = concat!("qnn-core ", env!("CARGO_PKG_VERSION"));

fn check_size(json: &[u8]) -> Result<(), BinaryError> {
    if json.len() <= MAX_META_BYTES {
        return Ok(());
    }
    let (section, want) = (SectionKind::Meta.to_string(), format!("at most {MAX_META_BYTES}"));
    Err(BinaryError::Entry { section, field: "size_bytes", have: json.len() as u64, want })
}
