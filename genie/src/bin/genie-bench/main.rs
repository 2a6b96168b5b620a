//! `genie-bench`: speed and memory of a model, one JSON line per figure or a table on a terminal.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;
use genie::AdapterChoice;
use genie::config::DialogConfig;

#[path = "../shared/exit.rs"]
mod exit;
mod lora;
mod measure;
mod report;

use measure::Bench;
use report::Report;

/// Speed and memory of a model: prefill of random ids, decode at a depth, load, start to first token, resident memory.
///
/// Metrics: load_model, start_to_first_token_p128 and ttft_p128 (ms; `_p<N>` with the size of a context below 128), `pp<N>`
/// and `tg<n>_d<depth>` (tok/s), and where the system tells, as Linux does, rss_after_first and peak_rss (MB) and large_pages
/// (MB of all that lie on pages of 2 MiB: weights are read fastest from them). With --lora also the rates with the adapter
/// (`pp<N>_lora1`, `tg<n>_d<depth>_lora1`), switch (ms to go over to another loaded adapter; needs two in the config),
/// alpha_change (ms to set another strength), adapter_load (ms, files cached by the system), adapter_load_cold (ms, files
/// not cached; adapter_read_cold is the time to do no more than read them) and rss_per_adapter (MB of each adapter of the
/// config, loaded and used). Each is the median of the rounds, with the least and the greatest; in JSON, rates also have the
/// bytes that a token reads, its products with weights, and the kernels in use.
#[derive(Parser)]
#[command(name = "genie-bench", version, rename_all = "snake_case")]
struct Arguments {
    /// Dialog config (JSON).
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Prompt lengths to measure prefill at.
    #[arg(short, long, value_delimiter = ',', default_value = "128,512")]
    prompts: Vec<usize>,
    /// Cache depths to measure decode at.
    #[arg(short, long, value_delimiter = ',', default_value = "0,512")]
    depths: Vec<usize>,
    /// Tokens of one decode measurement.
    #[arg(short, long, default_value_t = 48)]
    n_tokens: usize,
    /// Worker threads; the config's if absent.
    #[arg(short, long)]
    threads: Option<usize>,
    /// Rounds of each measurement.
    #[arg(short, long, default_value_t = 5)]
    rounds: usize,
    /// Adapter of the config to measure with, and its strengths.
    #[arg(short, long, value_name = "ADAPTER[,ALPHA,VALUE]...")]
    lora: Option<AdapterChoice>,
    /// Print at last where the time of a prompt and of decoding goes, operation by operation.
    #[arg(short, long)]
    operations: bool,
    /// JSON lines even on a terminal.
    #[arg(long)]
    json: bool,
    /// Internal: load, answer a prompt of so many ids with one token, print resident memory, end.
    #[arg(long, hide = true)]
    first_token: Option<usize>,
}

fn main() -> ExitCode {
    exit::code("genie-bench", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds is 0, need at least 1");
    ensure!(arguments.n_tokens > 0, "--n_tokens is 0, need at least 1");
    let mut config = DialogConfig::from_file(&arguments.config)?;
    if let Some(threads) = arguments.threads {
        config.engine.n_threads = threads;
    }
    // The second process is told none of the other lengths: their defaults need not fit the context.
    if let Some(prompt) = arguments.first_token {
        return measure::first_token_child(&config, prompt);
    }
    check_lengths(arguments, config.engine.context_size)?;
    let mut report = Report::new(std::io::stdout().is_terminal() && !arguments.json);
    let child = measure::Child { config: &arguments.config, threads: arguments.threads };
    let first = FIRST_PROMPT.min(config.engine.context_size);
    report.add("load_model", "ms", measure::load(&config, arguments.rounds)?)?;
    let (start, rss) = child.start_to_first_token(first, arguments.rounds)?;
    report.add(&format!("start_to_first_token_p{first}"), "ms", start)?;
    let mut bench = Bench::open(&config)?;
    report.add(&format!("ttft_p{first}"), "ms", bench.time_to_first_token(first, arguments.rounds)?)?;
    rates(arguments, &mut bench, &mut report, "")?;
    if let Some(choice) = &arguments.lora {
        let mut lora = lora::LoraBench::new(&mut bench, &config.engine, choice)?;
        lora.apply()?;
        rates(arguments, lora.bench(), &mut report, "_lora1")?;
        lora.measure(arguments.rounds, &mut report)?;
    }
    if arguments.operations {
        let (prompt, depth) = (arguments.prompts.iter().max(), arguments.depths.iter().min());
        eprint!("{}", bench.operations(*prompt.unwrap_or(&0), *depth.unwrap_or(&0), arguments.n_tokens)?);
    }
    // Not every system tells.
    if let Some(rss) = rss {
        report.add("rss_after_first", "MB", rss)?;
    }
    for (metric, found) in [("large_pages", measure::large_pages_mb()), ("peak_rss", measure::memory_mb("VmHWM:"))] {
        if let Ok(found) = found {
            report.add(metric, "MB", vec![found])?;
        }
    }
    report.finish()
}

/// Refuses lengths that measure nothing or that the context does not hold.
fn check_lengths(arguments: &Arguments, context: usize) -> anyhow::Result<()> {
    for prompt in &arguments.prompts {
        ensure!((1..=context).contains(prompt), "--prompts is {prompt}, need 1 to {context}, the size of the context");
    }
    let (n, most) = (arguments.n_tokens, context.saturating_sub(arguments.n_tokens));
    for depth in &arguments.depths {
        ensure!(
            n <= context && *depth <= most,
            "--depths is {depth}, need at most {most} before {n} tokens in {context}"
        );
    }
    Ok(())
}

/// Prefill and decode rates with what is bound to the engine.
fn rates(arguments: &Arguments, bench: &mut Bench, report: &mut Report, suffix: &str) -> anyhow::Result<()> {
    let kernels = bench.engine.kernels();
    for prompt in &arguments.prompts {
        report.add_rates(&format!("pp{prompt}{suffix}"), bench.prefill(*prompt, arguments.rounds)?, kernels)?;
    }
    for depth in &arguments.depths {
        let rates = bench.decode(*depth, arguments.n_tokens, arguments.rounds)?;
        report.add_rates(&format!("tg{}_d{depth}{suffix}", arguments.n_tokens), rates, kernels)?;
    }
    Ok(())
}

/// Prompt length of the first-token figures, where the context holds as many.
const FIRST_PROMPT: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: a model whose context does not hold the default lengths can be measured: the process that measures the start is
    // not refused for lengths that it does not use, and comes as far as the model; others are refused before any work.
    #[test]
    fn small_context() {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({"dialog": {"version": 1, "type": "basic",
            "context": {"version": 1, "size": 64, "n-vocab": 300, "bos-token": 1, "eos-token": 2},
            "tokenizer": {"version": 1, "path": "broken.json"},
            "engine": {"version": 1, "n-threads": 1,
                "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": {"version": 1, "use-mmap": true, "poll": false,
                    "spill-fill-bufsize": 0, "mmap-budget": 0, "cpu-mask": "0xe0", "allow-async-init": true,
                    "enable-graph-switching": true}},
                "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": ["broken.bin"]}}}}});
        for file in ["broken.json", "broken.bin"] {
            std::fs::write(folder.path().join(file), "x").unwrap();
        }
        let path = folder.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let error = |more: &[&str]| {
            let start = ["genie-bench", "--config", path.to_str().unwrap()];
            format!("{:#}", run(&Arguments::parse_from(start.iter().chain(more))).unwrap_err())
        };
        let child = error(&["--first_token", "64"]);
        assert!(child.contains("broken."), "{child}");
        let parent = error(&[]);
        assert!(parent.contains("--prompts is 128, need 1 to 64"), "{parent}");
    }
}
