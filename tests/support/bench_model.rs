//! The model that benches run: a real one if its config is there, since a step's time is that of its bytes.

use std::path::PathBuf;

use anyhow::{Context, Result};
use genie::engine::{Engine, Logits};
use genie::{DialogConfig, Model};

use crate::converted::models_folder;

/// Opens the model of the config `$GENIE_BENCH_CONFIG`, or else the quickstart's; its name is that of the config's folder.
///
/// # Errors
/// What is missing, and where it would come from.
pub fn open() -> Result<(String, Model)> {
    let quickstart = || models_folder().join("smollm2-135m-instruct-q4_1/genie_config.json");
    let path = std::env::var_os("GENIE_BENCH_CONFIG").map_or_else(quickstart, PathBuf::from);
    let config = DialogConfig::from_file(&path)
        .with_context(|| format!("{}: run examples/quickstart.sh, or set GENIE_BENCH_CONFIG", path.display()))?;
    let folder = path.parent().and_then(|folder| folder.file_name()).unwrap_or_default();
    Ok((folder.to_string_lossy().into_owned(), Model::open(config)?))
}

/// `n` ids that are the same in every run.
pub fn ids(n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i * 7919 + 13) % n_vocab as u64) as u32).collect()
}

/// Bytes that one more token makes the engine read, and the products that it makes it compute, by its own account.
///
/// # Errors
/// What the engine says.
pub fn cost(engine: &mut dyn Engine, ids: &[u32]) -> Result<(u64, u64)> {
    let position = engine.position();
    engine.start_account();
    engine.forward(ids, Logits::Last, &std::sync::atomic::AtomicBool::new(false))?;
    let graphs = engine.take_account();
    engine.rewind(position);
    let operations = graphs.iter().flat_map(|graph| &graph.account.operations);
    Ok(operations
        .fold((0, 0), |(bytes, products), operation| (bytes + operation.bytes, products + operation.multiply_adds)))
}
