//! How far the work is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use qnn_core::offline::quantize::Progress;

/// Both are on standard error.
pub(crate) struct Display {
    bar: Option<ProgressBar>,
}

impl Display {
    pub(crate) fn new() -> Display {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { bar }
    }

    pub(crate) fn say(&self, step: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(step.to_owned());
                bar.tick();
            }
            None => eprintln!("{step}"),
        }
    }

    pub(crate) fn show(&mut self, progress: Progress<'_>) {
        match (progress, &self.bar) {
            (Progress::Weight(name), Some(bar)) => {
                bar.set_message(name.to_owned());
                bar.tick();
            }
            (Progress::Weight(_), None) => {}
            (Progress::Adapter(name), Some(bar)) => bar.set_message(format!("calibrating with {name}")),
            (Progress::Adapter(name), None) => eprintln!("calibrating with {name}"),
            (Progress::Window(done, all), Some(bar)) => {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            }
            (Progress::Window(done, all), None) => eprintln!("calibrating: {done}/{all}"),
        }
    }

    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
