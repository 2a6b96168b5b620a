//! `lora_output_files.yaml`: the use cases and groups of a model, and where their files are.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{AdapterError, read_text, refused};
use crate::{
    graph::Graph,
    offline::{
        generate::GenerateError,
        lora::{Group, groups},
    },
};

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OutputFiles {
    pub(super) use_case: Vec<UseCase>,
    #[serde(default)]
    pub(super) group: Vec<Group>,
    #[serde(default)]
    pub(super) share_adapters_between_graphs: bool,
}

/// One adapter, or several composed ones.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UseCase {
    pub(super) name: String,
    graph: Option<String>,
    pub(super) weights: PathBuf,
    pub(super) encodings: Option<PathBuf>,
    #[serde(default)]
    weights_only: bool,
    #[serde(default)]
    enable_weights_updates: bool,
}

impl OutputFiles {
    pub(super) fn read(yaml: &Path) -> Result<OutputFiles, AdapterError> {
        OutputFiles::parse(&read_text(yaml)?)
    }

    fn parse(text: &[u8]) -> Result<OutputFiles, AdapterError> {
        serde_saphyr::from_slice(text).map_err(|why| AdapterError::Yaml(why.to_string()))
    }

    /// The group of each use case that is in one.
    pub(super) fn group_of(&self) -> Result<HashMap<&str, &Group>, AdapterError> {
        let names: Vec<&str> = self.use_case.iter().map(|case| case.name.as_str()).collect();
        groups::check(&self.group, &names).map_err(|(name, why)| AdapterError::Group { name, why })
    }

    pub(super) fn check_names(&self, model: &Graph) -> Result<(), AdapterError> {
        let mut seen = HashSet::new();
        for case in &self.use_case {
            let name = case.name.clone();
            let refuse = |why| Err(AdapterError::Name { name: name.clone(), why });
            if let Some(why) = groups::bad_name(&name) {
                return refuse(why);
            }
            if !seen.insert(name.clone()) {
                return refuse("is there twice");
            }
            if case.weights_only {
                return Err(AdapterError::Key { key: "weights_only" });
            }
            if case.enable_weights_updates {
                return Err(AdapterError::Key { key: "enable_weights_updates" });
            }
            if let Some(have) = case.graph.as_ref().filter(|graph| *graph != model.name()) {
                return Err(AdapterError::Graph { name, have: have.clone(), want: model.name().to_owned() });
            }
        }
        Ok(())
    }
}

/// Name, weights and encodings of each adapter that `lora_output_files.yaml` lists, and the groups.
///
/// # Errors
/// The file and what is wrong with it.
pub(in crate::offline) fn listed_adapters(yaml: &Path) -> Result<Listed, GenerateError> {
    listed_in(yaml, &read_text(yaml).map_err(refused(yaml))?)
}

/// The same of a list that has the content `text`, or will have it.
///
/// # Errors
/// The file and what is wrong with it.
pub(in crate::offline) fn listed_in(yaml: &Path, text: &[u8]) -> Result<Listed, GenerateError> {
    let in_yaml = refused(yaml);
    let files = OutputFiles::parse(text).map_err(&in_yaml)?;
    let group_of = files.group_of().map_err(&in_yaml)?;
    let folder = yaml.parent().unwrap_or(Path::new(""));
    let listed = |case: &UseCase| {
        let weights = folder.join(&case.weights);
        let encodings = case.encodings.as_ref().map(|path| folder.join(path));
        let group = group_of.get(case.name.as_str()).map(|group| group.name.clone());
        ListedAdapter { name: case.name.clone(), weights, encodings, group }
    };
    let adapters = files.use_case.iter().map(listed).collect();
    let groups = files.group.iter().map(|group| (group.name.clone(), group.file(folder))).collect();
    Ok(Listed { adapters, groups })
}

/// The adapters and groups of `lora_output_files.yaml`.
pub(in crate::offline) struct Listed {
    pub(in crate::offline) adapters: Vec<ListedAdapter>,
    /// Names and encodings files.
    pub(in crate::offline) groups: Vec<(String, PathBuf)>,
}

/// One adapter of `lora_output_files.yaml`.
pub(in crate::offline) struct ListedAdapter {
    pub(in crate::offline) name: String,
    pub(in crate::offline) weights: PathBuf,
    /// `None`: it has none, whatever lies beside the weights.
    pub(in crate::offline) encodings: Option<PathBuf>,
    /// Name of its group.
    pub(in crate::offline) group: Option<String>,
}
