//! The importer's YAML.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};

use super::{Group, LoraError, groups};

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoraConfig {
    pub(super) use_case: Vec<UseCase>,
    /// Use cases that share encodings of activations.
    #[serde(default)]
    pub(super) group: Vec<Group>,
}

/// One entry: an adapter, or several in one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UseCase {
    /// Becomes the name of the files.
    pub(super) name: String,
    /// What the adapter is for. Not looked at: the DLC says what the base is.
    #[allow(dead_code, reason = "accepted because QAIRT's files have it")]
    #[serde(default)]
    pub(super) model_name: Option<String>,
    pub(super) lora_weights: OneOrMany,
    #[serde(default)]
    pub(super) quant_overrides: Option<PathBuf>,
    #[serde(default)]
    pub(super) output_path: Option<PathBuf>,
}

/// A path, or a list of paths.
#[derive(Debug)]
pub(super) struct OneOrMany(pub(super) Vec<PathBuf>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = OneOrMany;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path or a list of paths")
            }
            fn visit_str<E: de::Error>(self, path: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![PathBuf::from(path)]))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany, A::Error> {
                let mut paths = Vec::new();
                while let Some(path) = list.next_element::<String>()? {
                    paths.push(PathBuf::from(path));
                }
                Ok(OneOrMany(paths))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Reads the file.
///
/// # Errors
/// [`LoraError::Yaml`] with line and column, or [`LoraError::Config`] for what cannot be a use case.
pub(super) fn read(text: &str) -> Result<LoraConfig, LoraError> {
    let config: LoraConfig = serde_saphyr::from_str(text).map_err(|why| LoraError::Yaml { why: why.to_string() })?;
    if config.use_case.is_empty() {
        return Err(LoraError::config("use_case", "an empty list", "at least one use case"));
    }
    for (i, case) in config.use_case.iter().enumerate() {
        let name = case.name.as_str();
        let plain = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '+'));
        if !plain || name.starts_with('.') {
            let want = "letters, digits, _ - . +: it becomes a file name";
            return Err(LoraError::config("use_case name", format!("{name:?}"), want));
        }
        if config.use_case[..i].iter().any(|other| other.name == case.name) {
            return Err(LoraError::config("use_case name", format!("{name} twice"), "each name once"));
        }
        if name == "default_adapter" {
            return Err(LoraError::config("use_case name", name, "another: that of the adapter without weights"));
        }
        if case.lora_weights.0.is_empty() {
            return Err(LoraError::config("lora_weights", format!("an empty list in {name}"), "at least one adapter"));
        }
    }
    let names: Vec<&str> = config.use_case.iter().map(|case| case.name.as_str()).collect();
    match groups::check(&config.group, &names) {
        Ok(_) => Ok(config),
        Err((name, why)) => Err(LoraError::Yaml { why: format!("group {name:?} {why}") }),
    }
}
