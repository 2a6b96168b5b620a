//! Which adapters are run, and what their files say.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use genie::AdapterChoice;
use genie::config::LoraConfig;
use genie::engine::AdapterSource;
use qnn_core::Bytes;
use qnn_core::binary::{FileInfo, SectionInfo, Verify};

use crate::record::AdapterFiles;

/// The base alone, the adapters that are named, or (`all`) the base and every adapter of the config that changes something.
pub(crate) fn choices(all: bool, named: &[AdapterChoice], config: &LoraConfig) -> anyhow::Result<Vec<AdapterChoice>> {
    if !all {
        return Ok(if named.is_empty() { vec![AdapterChoice::Base] } else { named.to_vec() });
    }
    if config.adapters.is_empty() {
        bail!("--all_adapters: the config has none");
    }
    let mut choices = vec![AdapterChoice::Base];
    for adapter in &config.adapters {
        let choice = AdapterChoice::Named { name: adapter.name.clone(), strengths: Vec::new() };
        if files(&choice, config)?.is_some_and(|files| files.targets == Some(0)) {
            eprintln!("{}: it changes no layer, as the base; left out", adapter.name);
        } else {
            choices.push(choice);
        }
    }
    Ok(choices)
}

/// Name of the adapter; `None` for the base.
pub(crate) fn name(choice: &AdapterChoice) -> Option<&str> {
    match choice {
        AdapterChoice::Named { name, .. } => Some(name),
        _ => None,
    }
}

/// What the files of an adapter of the config say; `None` for the base and for an adapter that is not there.
pub(crate) fn files(choice: &AdapterChoice, config: &LoraConfig) -> anyhow::Result<Option<AdapterFiles>> {
    let adapter = config.adapters.iter().find(|adapter| Some(adapter.name.as_str()) == name(choice));
    match adapter.map(|adapter| &adapter.source) {
        Some(AdapterSource::Sections(paths)) => in_sections(paths.iter().flatten()).map(Some),
        // What the group has counts for each of its members: an adapter does not run without it.
        Some(AdapterSource::Grouped { sections, group }) => {
            in_sections(sections.iter().chain(&group.sections).flatten()).map(Some)
        }
        Some(AdapterSource::Peft(folder)) => {
            let at = || folder.display().to_string();
            let mut bytes = 0;
            for entry in std::fs::read_dir(folder).with_context(at)? {
                bytes += entry.and_then(|entry| entry.metadata()).with_context(at)?.len();
            }
            Ok(Some(AdapterFiles { bytes, targets: None, encodings: None }))
        }
        _ => Ok(None),
    }
}

fn in_sections<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<AdapterFiles> {
    let (mut bytes, mut targets, mut encodings) = (0, 0, 0);
    for path in paths {
        let section = section(path)?;
        bytes += section.size_bytes;
        targets += section.meta.targets;
        encodings += section.meta.encodings.len();
    }
    Ok(AdapterFiles { bytes, targets: Some(targets), encodings: Some(encodings) })
}

fn section(path: &Path) -> anyhow::Result<SectionInfo> {
    let at = || path.display().to_string();
    match FileInfo::read(Bytes::map_file(path).with_context(at)?, Verify::Checksums).with_context(at)? {
        FileInfo::Section(section) => Ok(section),
        FileInfo::Context(_) => bail!("{}: a context binary, need an adapter section", path.display()),
    }
}
