//! The same question to the base and to every adapter of a config, and to one adapter at several strengths.
//!
//!     cargo run --release --example swap_adapters -- genie_config.json "Who are you?"
//!     cargo run --release --example swap_adapters -- genie_config.json "Who are you?" pirate 0 0.25 0.5 0.75 1 1.5
//!
//! The base is loaded once. An adapter is loaded at its first use; going over to one that is loaded, or to another
//! strength, costs microseconds.

use std::io::{Write, stdout};
use std::time::Instant;

use anyhow::{Context, ensure};
use genie::{Dialog, DialogConfig, Flow, Message};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: swap_adapters CONFIG.json QUESTION [ADAPTER STRENGTH...]";
    let [config, question, sweep @ ..] = &arguments[..] else { anyhow::bail!(usage) };
    ensure!(sweep.len() != 1, "an adapter without a strength; {usage}");
    let config = DialogConfig::from_file(config)?;
    let (role, alpha) = (config.engine.role.clone(), config.engine.lora.alpha_tensor_name.clone());
    let mut dialog = Dialog::new(config)?;
    let names: Vec<String> = dialog.adapters().into_iter().map(|adapter| adapter.name).collect();
    ensure!(!names.is_empty(), "the config has no adapters: engine/model/binary/lora/adapters");

    match sweep.split_first() {
        None => {
            ask(&mut dialog, "base", question)?;
            for name in names {
                let applied = dialog.apply_lora(&role, &name)?;
                let (info, ms) = (&applied.info, applied.time.as_secs_f64() * 1e3);
                ask(
                    &mut dialog,
                    &format!("{name}: {} layers, rank {}, {ms:.2} ms", info.targets, info.rank),
                    question,
                )?;
            }
        }
        Some((name, strengths)) => {
            dialog.apply_lora(&role, name)?;
            for strength in strengths {
                let value = strength.parse().with_context(|| format!("strength {strength:?}"))?;
                let started = Instant::now();
                dialog.set_lora_strength(&role, &alpha, value)?;
                let us = started.elapsed().as_secs_f64() * 1e6;
                ask(&mut dialog, &format!("{name} at {value}, set in {us:.1} µs"), question)?;
            }
        }
    }
    Ok(())
}

/// Prints the answer to a conversation of this question only.
fn ask(dialog: &mut Dialog, title: &str, question: &str) -> anyhow::Result<()> {
    print!("[{title}]\n  ");
    dialog.chat(&[Message::new("user", question)], |piece, _| {
        print!("{}", piece.replace('\n', "\n  "));
        match stdout().flush() {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::Stop, // nobody is reading any more
        }
    })?;
    println!("\n");
    Ok(())
}
