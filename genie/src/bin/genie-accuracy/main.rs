//! `genie-accuracy`: perplexity of a model on a text, as JSON.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use genie::AdapterChoice;
use genie::accuracy::{Windows, perplexity};
use genie::adapters::{Adapters, Selection};
use genie::config::DialogConfig;
use genie::engine::{Engine, qnn::QnnEngine};
use genie::tokenizer::{Specials, Tokenizer};

/// Perplexity of a model on a text, as one line of JSON.
///
/// The text's ids (no special tokens added) are cut into windows; each starts from an empty cache without BOS; the first
/// id of a window is not scored. Perplexity is exp of the mean negative log-likelihood of the scored ids.
#[derive(Parser)]
#[command(name = "genie-accuracy", version)]
struct Arguments {
    /// Dialog config (JSON).
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Text to score.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Ids per window.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Most windows to score.
    #[arg(long, default_value_t = 8)]
    windows: usize,
    /// Adapter of the config to run with, and its strengths.
    #[arg(short, long, value_name = "ADAPTER[,ALPHA,VALUE]...")]
    lora: Option<AdapterChoice>,
    /// Also print the negative log-likelihood of every scored id.
    #[arg(long)]
    nll: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("genie-accuracy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = DialogConfig::from_file(&arguments.config)?;
    let text = std::fs::read_to_string(&arguments.text).with_context(|| arguments.text.display().to_string())?;
    let tokenizer = Tokenizer::load(&config.tokenizer_path)?;
    let ids = tokenizer.encode(&text, Specials::AsText)?;
    let mut engine = QnnEngine::open(&config.engine)?;
    if let Some(choice) = &arguments.lora {
        let mut adapters = Adapters::new(&config.engine.lora, &config.engine.role);
        let selection = adapters.resolve(&mut engine, choice)?;
        engine.select_adapter(selection.as_ref().map(Selection::for_engine))?;
    }
    let cut = Windows { window: arguments.window, windows: arguments.windows };
    let show_progress = std::io::stderr().is_terminal();
    let result = perplexity(&mut engine, &ids, cut, |done, all| {
        if show_progress {
            eprint!("\rwindow {done} of {all}{}", if done == all { "\n" } else { "" });
        }
    })?;
    let mut line = serde_json::json!({
        "metric": "perplexity",
        "value": result.perplexity,
        "scored_ids": result.nll.len(),
        "window": arguments.window,
        "windows": result.window_mean_nll.len(),
        "window_mean_nll": result.window_mean_nll,
    });
    if let Some(AdapterChoice::Named { name, strengths }) = &arguments.lora {
        line["lora"] = serde_json::json!({ "adapter": name, "strengths": strengths });
    }
    if arguments.nll {
        line["nll"] = serde_json::json!(result.nll);
    }
    println!("{line}");
    Ok(())
}
