//! One model, several dialogs: the base and every adapter of a config answer the same question, each in a dialog and a
//! thread of its own.
//!
//!     cargo run --release --example shared_model -- genie_config.json "Who are you?"
//!
//! The weights are in memory once, however many dialogs there are. A dialog costs its cache and some scratch memory.

use std::time::Instant;

use anyhow::Context;
use genie::{DialogConfig, Flow, Message, Model};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, question] = &arguments[..] else { anyhow::bail!("usage: shared_model CONFIG.json QUESTION") };
    let model = Model::open(DialogConfig::from_file(config)?)?;
    let adapters = model.config().engine.lora.adapters.iter().map(|adapter| Some(adapter.name.as_str()));
    let speakers: Vec<Option<&str>> = std::iter::once(None).chain(adapters).collect();

    let started = Instant::now();
    let answers = std::thread::scope(|scope| {
        let model = &model;
        let threads: Vec<_> =
            speakers.iter().map(|adapter| scope.spawn(move || answer(model, *adapter, question))).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer does not panic")).collect::<Vec<_>>()
    });
    for (adapter, answer) in speakers.iter().zip(answers) {
        let name = adapter.unwrap_or("base");
        println!("[{name}]\n  {}\n", answer.context(name.to_owned())?.replace('\n', "\n  "));
    }
    println!("{} dialogs over one model, {:.1} s", speakers.len(), started.elapsed().as_secs_f64());
    Ok(())
}

fn answer(model: &Model, adapter: Option<&str>, question: &str) -> anyhow::Result<String> {
    let mut dialog = model.dialog()?;
    if let Some(adapter) = adapter {
        dialog.apply_lora(&model.config().engine.role, adapter)?;
    }
    let mut text = String::new();
    dialog.chat(&[Message::new("user", question)], |piece, _| {
        text.push_str(piece);
        Flow::Continue
    })?;
    Ok(text)
}
