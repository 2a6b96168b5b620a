//! Groups of adapters that share encodings (LoRA v3), as the importer's and the generator's YAML name them.
//!
//! ```yaml
//! group:
//!   - {name: chat, members: [json, pirate], encodings: chat.encodings}
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// One entry of `group`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Becomes the name of its section.
    pub name: String,
    /// Names of its use cases.
    pub members: Vec<String>,
    /// AIMET's encodings of computed tensors. The importer's default: NAME.encodings in the output folder, which
    /// qairt-quantizer writes.
    #[serde(default)]
    pub encodings: Option<PathBuf>,
}

impl Group {
    /// Its encodings file, for a YAML in `folder`.
    pub(in crate::offline) fn file(&self, folder: &Path) -> PathBuf {
        match &self.encodings {
            Some(path) => folder.join(path),
            None => folder.join(format!("{}.encodings", self.name)),
        }
    }
}

/// Checks groups against the names of the use cases, and gives the group of each use case that is in one.
///
/// # Errors
/// The group's name, and what about it cannot be.
pub(in crate::offline) fn check<'a>(
    groups: &'a [Group],
    use_cases: &[&str],
) -> Result<HashMap<&'a str, &'a Group>, (String, String)> {
    let mut group_of: HashMap<&str, &Group> = HashMap::new();
    for (i, group) in groups.iter().enumerate() {
        let refuse = |why: String| Err((group.name.clone(), why));
        if let Some(why) = bad_name(&group.name) {
            return refuse(why.to_owned());
        }
        if groups[..i].iter().any(|other| other.name == group.name) {
            return refuse("is there twice".to_owned());
        }
        if use_cases.contains(&group.name.as_str()) {
            return refuse("has the name of a use case, and so its files".to_owned());
        }
        if group.members.is_empty() {
            return refuse("has no members".to_owned());
        }
        for member in &group.members {
            if !use_cases.contains(&member.as_str()) {
                return refuse(format!("has the member {member:?}, need one of {}", use_cases.join(", ")));
            }
            if let Some(other) = group_of.insert(member, group) {
                return refuse(format!("has the member {member:?}, which is in group {:?} already", other.name));
            }
        }
    }
    Ok(group_of)
}

/// Why a name cannot become part of a file's.
pub(in crate::offline) fn bad_name(name: &str) -> Option<&'static str> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | ' ');
    if name.is_empty() || name.starts_with('.') || name.len() > 128 || !name.chars().all(plain) {
        return Some("becomes part of a file name: letters, digits, '-', '_', '+', '.' and spaces only");
    }
    (name == DEFAULT_ADAPTER).then_some("is that of the adapter without values")
}

/// Name of the adapter without values.
pub(in crate::offline) const DEFAULT_ADAPTER: &str = "default_adapter";
