//! `qairt-lora-importer`: PEFT adapters in, weights and encodings for the context binary generator out.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use qnn_core::offline::lora::{
    Slot,
    import::{ImportOptions, ImportReport, UseCaseReport, import},
};

#[path = "../shared/exit.rs"]
mod exit;

/// Turns PEFT adapters into weights and encodings that fit a converted model.
///
/// For each use case of the YAML it writes its weights (NAME.safetensors) and encodings (NAME.encodings), and a list of
/// all of them, lora_output_files.yaml. Next step: qnn-context-binary-generator --adapter_weight_config lora_output_files.yaml.
///
/// Use cases of a `group` share one set of activation encodings: qairt-quantizer --lora_output_files finds it, or `encodings`
/// of the group names an AIMET file.
#[derive(Parser)]
#[command(name = "qairt-lora-importer", version, rename_all = "snake_case", after_help = EXAMPLE)]
struct Cli {
    /// YAML with the use cases; its paths are relative to its folder.
    #[arg(long, value_name = "FILE")]
    lora_config: PathBuf,

    /// The model, converted with adapter branches (qairt-converter --lora_adapter or --lora_weight_list).
    #[arg(long, value_name = "FILE")]
    input_dlc: PathBuf,

    /// Folder of the output; made if it is not there. A use case may name another with output_path.
    #[arg(long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
}

fn main() -> ExitCode {
    exit::code("qairt-lora-importer", run(Cli::parse()))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let config = cli.lora_config.display().to_string();
    let options = ImportOptions { lora_config: cli.lora_config, input_dlc: cli.input_dlc, output_dir: cli.output_dir };
    let report = import(&options).with_context(|| format!("cannot import {config}"))?;
    print(&report, &mut io::stdout().lock()).context(exit::STDOUT)
}

fn print(report: &ImportReport, out: &mut impl Write) -> io::Result<()> {
    report.use_cases.iter().try_for_each(|case| print_use_case(case, out))?;
    for group in &report.groups {
        writeln!(out, "group {}: {}", group.name, group.members.join(", "))?;
        if let Some(missing) = group.encodings.as_ref().filter(|path| !path.exists()) {
            writeln!(out, "  next:     qairt-quantizer --lora_output_files writes {}", missing.display())?;
        }
    }
    writeln!(out, "wrote {}", report.list.display())
}

fn print_use_case(case: &UseCaseReport, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{}:", case.name)?;
    writeln!(out, "  targets:  {} of {} layers with a branch", case.targets, case.branches)?;
    writeln!(out, "  rank:     {} of {}, {}", case.rank, case.max_rank, case.data_type)?;
    for slot in &case.slots {
        let columns = if case.slots.len() > 1 { columns(slot) } else { String::new() };
        writeln!(out, "  scaling:  {}{columns}, folded into B", scaling(slot))?;
    }
    for warning in &case.warnings {
        writeln!(out, "  warning:  {warning}")?;
    }
    writeln!(out, "  wrote {}", case.weights.display())?;
    writeln!(out, "  wrote {}", case.encodings.display())
}

fn columns(slot: &Slot) -> String {
    format!(" ({}, columns {} to {})", slot.name, slot.columns[0], slot.columns[1] - 1)
}

fn scaling(slot: &Slot) -> String {
    match slot.scaling.modules.len() {
        0 => format!("{}", slot.scaling.default),
        n => format!("{} ({n} layers differ)", slot.scaling.default),
    }
}

const EXAMPLE: &str = "Example of a lora_config:
  use_case:
    - name: json
      lora_weights: adapters/json
    - name: both
      lora_weights: [adapters/json, adapters/pirate]
      output_path: out
  group:
    - {name: chat, members: [json, both]}";
