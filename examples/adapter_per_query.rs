//! A chat in which every turn may have its own adapter.
//!
//!     cargo run --release --example adapter_per_query -- genie_config.json
//!     > Who are you?
//!     > @pirate Who are you?
//!     > @pirate,lora_alpha,0.5 And what do you like?
//!     > @base Thank you.
//!
//! `@` names an adapter of the config, with strengths behind it if you like, or `base`, for this turn only. `+NAME PATH`
//! adds a PEFT directory while the chat runs.
//!
//! Rows of the cache are reused only as far as this turn's adapter made them. So a change costs the prompt once more,
//! and no answer is a mix of two adapters.

use std::io::{BufRead, Write, stdin, stdout};

use anyhow::Context;
use genie::engine::AdapterSource;
use genie::{AdapterChoice, Dialog, DialogConfig, Flow, Message, QueryOptions};

fn main() -> anyhow::Result<()> {
    let config = std::env::args().nth(1).context("usage: adapter_per_query CONFIG.json")?;
    let mut dialog = Dialog::new(DialogConfig::from_file(config)?)?;
    let mut messages = Vec::new();
    prompt()?;
    for line in stdin().lock().lines() {
        let line = line?;
        let outcome = match line.strip_prefix('+').and_then(|rest| rest.split_once(' ')) {
            Some((name, path)) => dialog.add_adapter(name, AdapterSource::Peft(path.trim().into())).map_err(Into::into),
            None => turn(&mut dialog, &mut messages, &line),
        };
        if let Err(error) = outcome {
            eprintln!("{error:#}");
        }
        prompt()?;
    }
    Ok(())
}

/// One turn. If it fails, it is as if it had not been said.
fn turn(dialog: &mut Dialog, messages: &mut Vec<Message>, line: &str) -> anyhow::Result<()> {
    let (adapter, text) = match line.strip_prefix('@') {
        Some(rest) => rest.split_once(' ').unwrap_or((rest, "")),
        None => ("base", line),
    };
    let choice = if adapter == "base" { AdapterChoice::Base } else { adapter.parse()? };
    let options = QueryOptions::default().with_adapter(choice);
    messages.push(Message::new("user", text));
    let mut answer = String::new();
    let report = dialog.chat_with(messages, &options, |piece, _| {
        answer.push_str(piece);
        print!("{piece}");
        match stdout().flush() {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::Stop, // nobody is reading any more
        }
    });
    match report {
        Ok(report) => {
            println!("\n[{} of {} prompt tokens from the cache]", report.n_cached_tokens, report.n_prompt_tokens);
            messages.push(Message::new("assistant", &answer));
            Ok(())
        }
        Err(error) => {
            messages.pop();
            Err(error.into())
        }
    }
}

fn prompt() -> std::io::Result<()> {
    print!("> ");
    stdout().flush()
}
