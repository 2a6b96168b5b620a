//! `genie-t2t-run`: a prompt in, the model's answer out.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use genie::engine::AdapterSlot;
use genie::profile::Profile;
use genie::{AdapterChoice, Dialog, DialogConfig, Finish, Flow, Message, QueryReport, SentenceCode};
use tracing::level_filters::LevelFilter;

mod args;
#[path = "../shared/exit.rs"]
mod exit;

use args::{Args, LogLevel};

fn main() -> ExitCode {
    exit::code("genie-t2t-run", Args::read().and_then(|args| args.map_or(Ok(()), |args| run(&args))))
}

/// What the model is given.
enum Input {
    Text(String),
    Ids(Vec<u32>),
}

fn run(args: &Args) -> anyhow::Result<()> {
    start_log(args.log);
    if let Some(path) = &args.profile {
        check_place(path)?;
    }
    let input = read_input(args)?;
    writeln!(io::stdout(), "Using genie version {}\n", genie::VERSION).context(exit::STDOUT)?;

    let mut profile = Profile::new();
    let started = Instant::now();
    let config = DialogConfig::from_file(&args.config)?;
    if let Some(role) = args.engine_role.as_ref().filter(|role| **role != config.engine.role) {
        bail!("--engine_role {role}: no engine has this role, there is {:?}", config.engine.role);
    }
    let role = args.engine_role.as_deref().unwrap_or("primary");
    let mut dialog = Dialog::new(config)?;
    profile.add_create(started, started.elapsed());
    if let Some(max_tokens) = args.max_tokens {
        dialog.set_max_num_tokens(max_tokens);
    }

    if args.profile.is_some() {
        dialog.start_account();
    }

    if let Some(choice) = args.lora.first() {
        apply(&mut dialog, choice, role, &mut profile)?;
    }
    profile.add_query(&ask(&mut dialog, &input, SentenceCode::Complete, args)?);
    if let Some(prompt) = &args.rewind {
        writeln!(io::stdout()).context(exit::STDOUT)?;
        if let Some(choice) = args.lora.get(1) {
            apply(&mut dialog, choice, role, &mut profile)?;
        }
        profile.add_query(&ask(&mut dialog, &Input::Text(prompt.clone()), SentenceCode::Rewind, args)?);
    }

    profile.add_operations(&dialog.take_account());
    let ended = Instant::now();
    drop(dialog);
    profile.add_free(ended, ended.elapsed());
    if let Some(path) = &args.profile {
        profile.save(path).with_context(|| format!("profile {}", path.display()))?;
    }
    Ok(())
}

/// Applies an adapter, sets its strengths and prints what it is.
fn apply(dialog: &mut Dialog, choice: &AdapterChoice, role: &str, profile: &mut Profile) -> anyhow::Result<()> {
    let AdapterChoice::Named { name, strengths } = choice else { return Ok(dialog.apply_base(role)?) };
    let applied = dialog.apply_lora(role, name)?;
    for (alpha, value) in strengths {
        dialog.set_lora_strength(role, alpha, *value)?;
    }
    profile.add_apply_lora(&applied);
    let info = &applied.info;
    let scale = |slot: &AdapterSlot| slot.scaling.map(|scale| scale.to_string());
    let scales: Option<Vec<String>> = info.slots.iter().map(scale).collect();
    let scales = scales.map_or_else(|| "per module".to_owned(), |scales| scales.join(" + "));
    let group = info.group.as_ref().map_or_else(String::new, |group| format!(", group {group}"));
    let strengths = dialog.lora_strengths(name).unwrap_or_default();
    let strengths: Vec<String> = strengths.iter().map(|(alpha, value)| format!("{alpha} {value}")).collect();
    writeln!(
        io::stdout(),
        "[LORA]: {name}: {} targets, rank {}, scale {scales}{group}, {:.1} MB, {:.2} ms; strength {}\n",
        info.targets,
        info.rank,
        info.size_bytes as f64 / 1e6,
        applied.time.as_secs_f64() * 1e3,
        strengths.join(", ")
    )
    .context(exit::STDOUT)
}

fn start_log(level: Option<LogLevel>) {
    let level = match level {
        None => return,
        Some(LogLevel::Error) => LevelFilter::ERROR,
        Some(LogLevel::Warn) => LevelFilter::WARN,
        Some(LogLevel::Info) => LevelFilter::INFO,
        Some(LogLevel::Verbose) => LevelFilter::TRACE,
    };
    let to_stderr = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr);
    to_stderr.with_ansi(io::stderr().is_terminal()).init();
}

fn read_input(args: &Args) -> anyhow::Result<Input> {
    Ok(match (&args.prompt, &args.prompt_file, &args.tokens_file) {
        (Some(prompt), ..) => Input::Text(prompt.clone()),
        (_, Some(path), _) => Input::Text(read_file(path)?),
        (.., Some(path)) => Input::Ids(read_ids(path)?),
        _ => bail!("no prompt, need --prompt, --prompt_file or --tokens_file"),
    })
}

fn read_file(path: &Path) -> anyhow::Result<String> {
    let read = || {
        let mut text = String::new();
        std::fs::File::open(path)?.take(MAX_INPUT_BYTES + 1).read_to_string(&mut text)?;
        Ok::<_, io::Error>(text)
    };
    let text = read().with_context(|| path.display().to_string())?;
    if MAX_INPUT_BYTES < text.len() as u64 {
        bail!("{}: more than {MAX_INPUT_BYTES} bytes", path.display());
    }
    Ok(text)
}

fn read_ids(path: &Path) -> anyhow::Result<Vec<u32>> {
    let text = read_file(path)?;
    let id = |(i, word): (usize, &str)| {
        let wrong = || format!("{}: token {i} is {word:?}, need an id such as 42", path.display());
        word.parse().with_context(wrong)
    };
    text.split_whitespace().enumerate().map(id).collect()
}

/// Prints the prompt, the answer as it comes, and how fast it came.
fn ask(dialog: &mut Dialog, input: &Input, code: SentenceCode, args: &Args) -> anyhow::Result<QueryReport> {
    let mut printer = Printer { broken: Ok(()) };
    let report = match input {
        Input::Ids(ids) => {
            printer.print(&format!("[PROMPT TOKENS]: {}\n\n", spaced(ids)));
            let mut is_first = true;
            dialog.token_query(ids, code, |ids, code| {
                let gap = if is_first || ids.is_empty() { "" } else { " " };
                is_first = false;
                printer.piece(&format!("{gap}{}", spaced(ids)), code)
            })?
        }
        Input::Text(text) => {
            printer.print(&format!("[PROMPT]: {text}\n\n"));
            if args.chat {
                let system = args.system.iter().map(|text| Message::new("system", text));
                let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
                tracing::debug!("rendered prompt: {:?}", dialog.render(&messages)?.text);
                dialog.chat(&messages, |piece, code| printer.piece(piece, code))?
            } else {
                dialog.query(text, code, |piece, code| printer.piece(piece, code))?
            }
        }
    };
    printer.broken.and_then(|()| print_figures(&report)).context(exit::STDOUT)?;
    if report.finish == Finish::ContextExceeded {
        let size = dialog.context_size();
        eprintln!("genie-t2t-run: the context of {size} tokens is full, the answer ends here");
    }
    Ok(report)
}

fn print_figures(report: &QueryReport) -> io::Result<()> {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let rate = |rate: Option<f64>| rate.map(|rate| format!(", {rate:.1} tokens/s")).unwrap_or_default();
    let mut out = io::stdout().lock();
    let n_computed = report.n_prompt_tokens - report.n_cached_tokens;
    let cached = match report.n_cached_tokens {
        0 => String::new(),
        n => format!(" ({n} more were cached)"),
    };
    let timings = &report.timings;
    let prompt_rate = rate(report.prompt_rate_tokens_per_s());
    let generation_rate = rate(report.generation_rate_tokens_per_s());
    writeln!(out)?;
    writeln!(
        out,
        "Prompt processing: {n_computed} tokens{cached}, {:.1} ms{prompt_rate}",
        ms(timings.prompt_processing)
    )?;
    writeln!(
        out,
        "Token generation: {} tokens, {:.1} ms{generation_rate}",
        report.n_generated,
        ms(timings.token_generation)
    )?;
    writeln!(out, "Time to first token: {:.1} ms", ms(report.time_to_first_token().unwrap_or_default()))
}

/// Prints pieces as they come. Once a write has failed it asks for no more.
struct Printer {
    broken: io::Result<()>,
}

impl Printer {
    /// Text first and tag last at the end, so that the tags enclose all of the answer.
    fn piece(&mut self, piece: &str, code: SentenceCode) -> Flow {
        match code {
            SentenceCode::Begin => self.print(&format!("[BEGIN]: {piece}")),
            SentenceCode::End => self.print(&format!("{piece}[END]\n")),
            SentenceCode::Abort => self.print(&format!("{piece}[ABORT]\n")),
            _ => self.print(piece),
        }
        if self.broken.is_ok() { Flow::Continue } else { Flow::Stop }
    }

    fn print(&mut self, text: &str) {
        if self.broken.is_ok() {
            let mut out = io::stdout().lock();
            self.broken = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
    }
}

fn spaced(ids: &[u32]) -> String {
    let words: Vec<String> = ids.iter().map(u32::to_string).collect();
    words.join(" ")
}

/// Refuses a profile that cannot be written, before the work that it tells of.
fn check_place(path: &Path) -> anyhow::Result<()> {
    // A link that leads nowhere is there, too.
    if path.symlink_metadata().is_ok() {
        bail!("profile {}: there is such a file already, need a new name", path.display());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("profile {}: {} is no folder, need one that is there", path.display(), folder.display());
    }
    qnn_core::check_place(path).with_context(|| format!("profile {}", path.display()))
}

/// Longest prompt file that is read.
const MAX_INPUT_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: an answer is not computed for a profile that cannot be written behind it.
    #[test]
    fn profile_is_checked_first() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there.json");
        std::fs::write(&there, "x").unwrap();
        let check = |path: &Path, want: &str| {
            let error = format!("{:#}", check_place(path).unwrap_err());
            assert!(error.contains(want), "{error}");
        };
        check(&there, "there is such a file");
        check(&folder.path().join("absent/profile.json"), "absent is no folder");
        check(&there.join("profile.json"), "there.json is no folder");
        #[cfg(target_os = "linux")]
        {
            let link = folder.path().join("link.json");
            std::os::unix::fs::symlink("/nowhere/profile.json", &link).unwrap();
            check(&link, "there is such a file");
            std::fs::remove_file(&link).unwrap();
            check(Path::new("/proc/profile.json"), "profile /proc/profile.json: no new file in /proc: ");
        }
        assert!(check_place(&folder.path().join("profile.json")).is_ok());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the check leaves nothing");
        assert!(check_place(Path::new("profile.json.absent")).is_ok());
    }
}
