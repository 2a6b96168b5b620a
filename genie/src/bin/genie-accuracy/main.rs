//! `genie-accuracy`: perplexity of a model on a text; how far it is from a float model, and where; a report of such results.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use genie::accuracy::{Comparer, Windows, perplexity, shared_ids, summary::Summary};
use genie::adapters::{Adapters, Selection};
use genie::engine::Engine;
use genie::tokenizer::Specials;
use genie::{AdapterChoice, DialogConfig, Model};
use qnn_core::{check_outputs, write_atomic};

mod adapters;
#[path = "../shared/exit.rs"]
mod exit;
mod machine;
mod record;
mod report;
mod table;

use record::{CaseRecord, ModelRecord, Record, TextRecord};

/// Perplexity of a model on a text, or how far the model is from another form of it.
///
/// The text's ids (no special tokens added) are cut into windows; each starts from an empty cache without BOS; the first
/// id of a window is not scored. Perplexity is exp of the mean negative log-likelihood of the scored ids, printed as one
/// line of JSON for the base or for each adapter named.
///
/// With --reference (the same model in floats, say) both run over the same windows, and the result is a table: perplexities
/// and their ratio, how often the most probable token is the same, the Kullback-Leibler divergence, and for each layer the
/// ratio of signal to quantization noise in decibels, of the error that the layer makes when it is given what the reference
/// gave to it, and of the error that has accumulated by then.
#[derive(Parser)]
#[command(name = "genie-accuracy", version, rename_all = "snake_case", after_help = EXAMPLES)]
struct Arguments {
    /// Dialog config (JSON).
    #[arg(short, long, value_name = "FILE", required_unless_present = "results", requires = "text")]
    config: Option<PathBuf>,
    /// Text to score.
    #[arg(long, value_name = "FILE", requires = "config")]
    text: Option<PathBuf>,
    /// Dialog config of the model to compare with.
    #[arg(long, value_name = "FILE", requires = "config")]
    reference: Option<PathBuf>,
    /// Ids per window.
    #[arg(long, default_value_t = 512, requires = "config")]
    window: usize,
    /// Most windows to score.
    #[arg(long, default_value_t = 8, requires = "config")]
    windows: usize,
    /// Adapter of the config to run with instead of the base, and its strengths; repeatable. A reference needs it too.
    #[arg(short, long, value_name = "ADAPTER[,ALPHA,VALUE]...", requires = "config")]
    lora: Vec<AdapterChoice>,
    /// Run the base and then with each adapter of the config.
    #[arg(long, conflicts_with = "lora", requires = "config")]
    all_adapters: bool,
    /// Also print the negative log-likelihood of every scored id.
    #[arg(long, conflicts_with = "reference", requires = "config")]
    nll: bool,
    /// Write what a comparison found to this file (JSON).
    #[arg(short, long, value_name = "FILE", requires = "reference")]
    output: Option<PathBuf>,
    /// Write a report of the comparison, and of those in --results, to this file (HTML, one file with all it needs).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Results of earlier comparisons (files of --output), for the report.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "report")]
    results: Vec<PathBuf>,
    /// Name of the model in the result. Default: that of the config's folder.
    #[arg(long, value_name = "TEXT", requires = "reference")]
    label: Option<String>,
    /// Commands that made the model, one a line, to be kept with the result.
    #[arg(long, value_name = "FILE", requires = "reference")]
    commands: Option<PathBuf>,
}

const EXAMPLES: &str = "Examples:
  genie-accuracy -c w8/genie_config.json --text book.txt
  genie-accuracy -c w8/genie_config.json --text book.txt --reference float/genie_config.json --all_adapters
  genie-accuracy -c w8/genie_config.json --text book.txt --reference float/genie_config.json -o w8.json --report w8.html
  genie-accuracy --results w8.json w4.json --report all.html";

fn main() -> ExitCode {
    exit::code("genie-accuracy", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.report.is_some() && arguments.reference.is_none() && arguments.results.is_empty() {
        bail!("--report has nothing to report: it needs --reference or --results");
    }
    if arguments.window < 2 {
        bail!("--window {}, need at least 2: the first id is not scored", arguments.window);
    }
    if arguments.windows == 0 {
        bail!("--windows 0, need at least 1");
    }
    arguments.check_outputs()?;
    let mut records = arguments.results.iter().map(|path| Record::read(path)).collect::<Result<Vec<_>, _>>()?;
    let mut table = String::new();
    if let (Some(config), Some(text)) = (&arguments.config, &arguments.text) {
        let model = Model::open(DialogConfig::from_file(config)?)?;
        let text_path = text;
        let text = std::fs::read_to_string(text).with_context(|| text.display().to_string())?;
        match &arguments.reference {
            None => perplexities(arguments, &model, &text)?,
            Some(reference) => {
                let reference = Side { config: reference, model: Model::open(DialogConfig::from_file(reference)?)? };
                let tested = Side { config, model };
                let record = compare(arguments, &reference, &tested, (text_path, &text))?;
                table = table::text(&record);
                records.push(record);
            }
        }
    }
    // What took long to find is kept in one place where the other one fails.
    let written = write_results(arguments, &records);
    let printed = io::stdout().write_all(table.as_bytes()).context(exit::STDOUT);
    written.and(printed)
}

/// Writes the files that were asked for; the last record is the one of this run.
fn write_results(arguments: &Arguments, records: &[Record]) -> anyhow::Result<()> {
    let output = match (&arguments.output, records.last()) {
        (Some(path), Some(record)) => write_file(path, &record.to_json()?),
        _ => Ok(()),
    };
    let report = match &arguments.report {
        Some(path) => write_file(path, &report::html(records)?),
        None => Ok(()),
    };
    output.and(report)
}

/// A model of a comparison and the config that it was opened with.
struct Side<'a> {
    config: &'a Path,
    model: Model,
}

/// Prints one line of JSON for each adapter asked for.
fn perplexities(arguments: &Arguments, model: &Model, text: &str) -> anyhow::Result<()> {
    let ids = model.tokenizer().encode(text, Specials::AsText)?;
    let config = &model.config().engine;
    let mut engine = model.engine()?;
    let mut adapters = Adapters::new(&config.lora, &config.role);
    for choice in adapters::choices(arguments.all_adapters, &arguments.lora, &config.lora)? {
        let selection = adapters.resolve(&mut engine, &choice)?;
        engine.select_adapter(selection.as_ref().map(Selection::for_engine))?;
        let result = perplexity(&mut engine, &ids, arguments.cut(), progress(&choice))?;
        let mut line = serde_json::json!({
            "metric": "perplexity",
            "value": result.perplexity,
            "scored_ids": result.nll.len(),
            "window": arguments.window,
            "windows": result.window_mean_nll.len(),
            "window_mean_nll": result.window_mean_nll,
        });
        if let AdapterChoice::Named { name, strengths } = &choice {
            line["lora"] = serde_json::json!({ "adapter": name, "strengths": strengths });
        }
        if arguments.nll {
            line["nll"] = serde_json::json!(result.nll);
        }
        writeln!(io::stdout(), "{line}").context(exit::STDOUT)?;
    }
    Ok(())
}

/// Compares the two with the base and the adapters asked for.
fn compare(
    arguments: &Arguments,
    reference: &Side<'_>,
    tested: &Side<'_>,
    (text_path, text): (&Path, &str),
) -> anyhow::Result<Record> {
    let ids = shared_ids(reference.model.tokenizer(), tested.model.tokenizer(), text)?;
    let commands = match &arguments.commands {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => String::new(),
    };
    let lora = &tested.model.config().engine.lora;
    let choices = adapters::choices(arguments.all_adapters, &arguments.lora, lora)?;
    let mut comparer = Comparer::new(&reference.model, &tested.model)?;
    let mut cases = Vec::with_capacity(choices.len());
    for choice in &choices {
        let found = comparer.run(choice, &ids, arguments.cut(), progress(choice))?;
        cases.push(CaseRecord::new(choice, adapters::files(choice, lora)?, &found));
    }
    let n_windows = cases.first().map_or(0, |case| case.reference.window_mean_nll.len());
    Ok(Record {
        format: record::FORMAT.to_owned(),
        version: record::VERSION,
        label: arguments.label.clone().unwrap_or_else(|| folder_name(tested.config)),
        machine: machine::read(comparer.engine()),
        command: machine::command_line(),
        commands: commands.lines().map(str::to_owned).filter(|line| !line.trim().is_empty()).collect(),
        text: TextRecord {
            file: text_path.display().to_string(),
            ids: ids.len(),
            window: arguments.window,
            windows: n_windows,
        },
        reference: ModelRecord::new(reference.config, &Summary::of(&reference.model)),
        model: ModelRecord::new(tested.config, &Summary::of(&tested.model)),
        cases,
    })
}

impl Arguments {
    /// Refuses files that cannot be written, and those that would replace what is read.
    fn check_outputs(&self) -> anyhow::Result<()> {
        let outputs = given(&[("--output", &self.output), ("--report", &self.report)]);
        outputs.iter().try_for_each(|(flag, path)| check_place(flag, path))?;
        let mut inputs = given(&[
            ("--config", &self.config),
            ("--text", &self.text),
            ("--reference", &self.reference),
            ("--commands", &self.commands),
        ]);
        inputs.extend(self.results.iter().map(|path| ("--results", path.as_path())));
        Ok(check_outputs(&outputs, &inputs)?)
    }

    fn cut(&self) -> Windows {
        Windows { window: self.window, windows: self.windows }
    }
}

/// The files that were named.
fn given<'a>(files: &[(&'a str, &'a Option<PathBuf>)]) -> Vec<(&'a str, &'a Path)> {
    files.iter().filter_map(|(flag, path)| Some((*flag, path.as_deref()?))).collect()
}

/// Shows how far the work with `choice` is: window by window on a terminal, else when it is done.
fn progress(choice: &AdapterChoice) -> impl FnMut(usize, usize) {
    let name = adapters::name(choice).unwrap_or("base").to_owned();
    let is_terminal = std::io::stderr().is_terminal();
    move |done, all| match (is_terminal, done == all) {
        (true, _) => eprint!("\r{name}: window {done} of {all}{}", if done == all { "\n" } else { "" }),
        (false, true) => eprintln!("{name}: {all} windows"),
        (false, false) => {}
    }
}

fn folder_name(config: &Path) -> String {
    let folder = config.canonicalize().ok().and_then(|path| Some(path.parent()?.file_name()?.to_owned()));
    folder.map_or_else(|| config.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// Refuses a file that cannot be written, before the work whose result it is for.
fn check_place(flag: &str, path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        bail!("{flag} {}: it is a folder, need the name of a file", path.display());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("{flag} {}: {} is no folder, need one that is there", path.display(), folder.display());
    }
    qnn_core::check_place(path).with_context(|| format!("{flag} {}", path.display()))
}

fn write_file(path: &Path, content: &str) -> anyhow::Result<()> {
    write_atomic(path, |file| file.write_all(content.as_bytes())).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: flags of a run are refused where there is none, and a report alone needs none of them.
    #[test]
    fn flags_of_a_run_need_a_config() {
        let parse = |flags: &[&str]| {
            let words = ["genie-accuracy", "--results", "a.json", "--report", "b.html"];
            Arguments::try_parse_from(words.iter().chain(flags).copied()).map(|_| ())
        };
        for flags in [
            &["--text", "a"][..],
            &["--window", "512"],
            &["--windows", "8"],
            &["--lora", "a"],
            &["--all_adapters"],
            &["--nll"],
            &["--reference", "a"],
        ] {
            let refused = parse(flags).unwrap_err().to_string();
            assert!(refused.contains("--config <FILE>"), "{flags:?}: {refused}");
            assert!(parse(&[flags, &["-c", "a", "--text", "a"][..]].concat()).is_ok() || flags[0] == "--text");
        }
        parse(&[]).unwrap();
    }

    // Guards: a number of nothing is refused by its flag, before the model is looked for.
    #[test]
    fn no_windows_are_refused_by_their_flags() {
        for (flag, value, want) in [("--window", "1", "need at least 2"), ("--windows", "0", "need at least 1")] {
            let words = ["genie-accuracy", "-c", "nowhere.json", "--text", "nowhere", flag, value];
            let error = run(&Arguments::try_parse_from(words).unwrap()).unwrap_err().to_string();
            assert!(error.contains(&format!("{flag} {value}, {want}")), "{error}");
        }
    }

    // Guards: a result that cannot be written is refused before the model is looked for, and leaves nothing behind.
    #[test]
    fn places_are_checked_first() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name).display().to_string();
        let refused = |flag: &str, path: &str| {
            let words = ["genie-accuracy", "-c", "nowhere.json", "--text", "nowhere", "--reference", "nowhere.json"];
            let arguments = Arguments::try_parse_from(words.into_iter().chain([flag, path])).unwrap();
            format!("{:#}", run(&arguments).unwrap_err())
        };
        for flag in ["--output", "--report"] {
            let error = refused(flag, &place(""));
            assert!(error.starts_with(flag) && error.ends_with("it is a folder, need the name of a file"), "{error}");
            let error = refused(flag, &place("none/result"));
            assert!(error.starts_with(flag) && error.ends_with("none is no folder, need one that is there"), "{error}");
            let error = refused(flag, &place("result"));
            assert!(error.contains("nowhere.json"), "{error}");
            for (input, name) in [("nowhere.json", "--reference"), ("nowhere", "--text")] {
                let error = refused(flag, &format!("./{input}"));
                assert!(error.starts_with(flag) && error.contains(&format!("it is the file of {name} too")), "{error}");
            }
        }
        let words = ["genie-accuracy", "--results", "a.json", "--report", "./a.json"];
        let error = run(&Arguments::try_parse_from(words).unwrap()).unwrap_err().to_string();
        assert!(error.contains("--report ./a.json: it is the file of --results too"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
