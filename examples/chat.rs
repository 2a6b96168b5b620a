//! A conversation in a terminal: every line is a turn, the model remembers the turns before it.
//!
//!     cargo run --release --example chat -- models/smollm2-135m-instruct-q4_1/genie_config.json
//!
//! The whole conversation is handed over each time; the dialog computes only what is new since the last turn.

use std::io::{BufRead, Write, stdin, stdout};

use anyhow::Context;
use genie::{Dialog, DialogConfig, Finish, Flow, Message};

fn main() -> anyhow::Result<()> {
    let config = std::env::args().nth(1).context("usage: chat CONFIG.json")?;
    let mut dialog = Dialog::new(DialogConfig::from_file(config)?)?;
    let mut messages = Vec::new();
    print!("> ");
    stdout().flush()?;
    for line in stdin().lock().lines() {
        messages.push(Message::new("user", &line?));
        let answer = answer(&mut dialog, &messages)?;
        messages.push(Message::new("assistant", &answer));
        print!("> ");
        stdout().flush()?;
    }
    Ok(())
}

/// Streams the answer to the terminal and returns it.
fn answer(dialog: &mut Dialog, messages: &[Message]) -> anyhow::Result<String> {
    let mut answer = String::new();
    let report = dialog.chat(messages, |piece, _| {
        answer.push_str(piece);
        print!("{piece}");
        match stdout().flush() {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::Stop, // nobody is reading any more
        }
    })?;
    let cut = if report.finish == Finish::Eos { "" } else { " (cut short)" };
    let (new, kept) = (report.n_prompt_tokens - report.n_cached_tokens, report.n_cached_tokens);
    println!("{cut}\n[{new} new prompt tokens, {kept} from the cache, {} of the answer]", report.n_generated);
    Ok(answer)
}
