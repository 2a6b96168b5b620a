//! `qnn-context-binary-utility`: what a context binary or an adapter section contains, as JSON.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use qnn_core::{
    Bytes, Error,
    binary::{FileInfo, Verify},
    check_outputs, write_atomic,
};

#[path = "../shared/exit.rs"]
mod exit;

/// Prints what a context binary or an adapter section contains as JSON. Of a context binary: versions, identity, graphs
/// with their inputs, outputs and states, constants with their types and sizes. Of an adapter section: versions, its own
/// and its base's identity, name, rank, slots, inputs and outputs of its graphs, tensors with their types and sizes.
#[derive(Parser)]
#[command(name = "qnn-context-binary-utility", version, rename_all = "snake_case", after_help = EXAMPLES)]
struct Cli {
    /// The context binary or adapter section, as qnn-context-binary-generator writes it.
    #[arg(long, value_name = "FILE")]
    context_binary: PathBuf,

    /// Where to write the JSON. Default: standard output.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,

    /// Read the whole file and compare every checksum. Without it the constants of a context are not touched.
    #[arg(long)]
    verify: bool,
}

fn main() -> ExitCode {
    exit::code("qnn-context-binary-utility", run(&Cli::parse()))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let verify = if cli.verify { Verify::Checksums } else { Verify::Headers };
    let path = &cli.context_binary;
    if let Some(json) = &cli.json_file {
        check_outputs(&[("--json_file", json)], &[("--context_binary", path)])?;
    }
    let bytes = Bytes::map_file(path).map_err(Error::io(path))?;
    let contents = FileInfo::read(bytes, verify).map_err(Error::binary(path))?;
    let mut json = serde_json::to_vec_pretty(&contents).context("write JSON")?;
    json.push(b'\n');
    match &cli.json_file {
        Some(path) => write_atomic(path, |file| file.write_all(&json)).with_context(|| path.display().to_string()),
        None => std::io::stdout().write_all(&json).context(exit::STDOUT),
    }
}

const EXAMPLES: &str = "Examples:
  qnn-context-binary-utility --context_binary out/model.bin
  qnn-context-binary-utility --context_binary out/model_pirate.bin
  qnn-context-binary-utility --context_binary out/model.bin --json_file info.json --verify";
