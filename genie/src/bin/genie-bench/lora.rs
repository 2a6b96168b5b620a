//! What adapters cost: rates with one, and the time and memory to have, change and adjust them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use genie::AdapterChoice;
use genie::adapters::{Adapters, Selection};
use genie::config::EngineConfig;
use genie::engine::{AdapterSource, Engine, EngineError, Logits};

use crate::measure::{Bench, memory_mb, milliseconds};
use crate::report::Report;

/// An open model with the adapters of its config.
pub(crate) struct LoraBench<'a> {
    bench: &'a mut Bench,
    config: &'a EngineConfig,
    adapters: Adapters,
    choice: &'a AdapterChoice,
}

impl<'a> LoraBench<'a> {
    pub(crate) fn new(
        bench: &'a mut Bench,
        config: &'a EngineConfig,
        choice: &'a AdapterChoice,
    ) -> anyhow::Result<LoraBench<'a>> {
        let adapters = Adapters::new(&config.lora, &config.role);
        Ok(LoraBench { bench, config, adapters, choice })
    }

    pub(crate) fn bench(&mut self) -> &mut Bench {
        self.bench
    }

    /// Binds the chosen adapter.
    pub(crate) fn apply(&mut self) -> anyhow::Result<()> {
        let chosen = self.selection(self.choice)?;
        self.bind(&chosen)
    }

    /// Everything but the rates.
    pub(crate) fn measure(&mut self, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
        let chosen = self.selection(self.choice)?;
        let AdapterChoice::Named { name, .. } = self.choice else { return Ok(()) };
        let other = self.config.lora.adapters.iter().find(|adapter| adapter.name != *name);
        match other {
            Some(other) => {
                let other = self.selection(&AdapterChoice::named(&other.name))?;
                report.add("switch", "ms", self.alternate(&other, &chosen, rounds)?)?;
            }
            None => eprintln!("switch is left out: it needs two adapters in the config, there is one"),
        }
        let half = AdapterChoice::named(name).at(&self.config.lora.alpha_tensor_name, 0.5);
        let half = self.selection(&half)?;
        report.add("alpha_change", "ms", self.alternate(&half, &chosen, rounds)?)?;
        report.add("adapter_load", "ms", self.load(name, rounds)?)?;
        match self.load_cold(name, rounds) {
            Ok((load, read)) => {
                report.add("adapter_load_cold", "ms", load)?;
                report.add("adapter_read_cold", "ms", read)?;
            }
            Err(why) => eprintln!("adapter_load_cold is left out: {why:#}"),
        }
        let (before, n) = (memory_mb("VmRSS:"), self.config.lora.adapters.len());
        self.use_all()?;
        // Not every system tells.
        if let (Ok(before), Ok(after)) = (before, memory_mb("VmRSS:")) {
            report.add("rss_per_adapter", "MB", vec![(after - before) / n as f64])?;
        }
        // What is measured next is to be with the chosen one.
        self.bind(&chosen)
    }

    fn selection(&mut self, choice: &AdapterChoice) -> anyhow::Result<Selection> {
        self.adapters.resolve(&mut self.bench.engine, choice)?.context("a benchmark of adapters needs one")
    }

    fn bind(&mut self, selection: &Selection) -> anyhow::Result<()> {
        Ok(self.bench.engine.select_adapter(Some(selection.for_engine()))?)
    }

    /// Milliseconds to go over to one of two selections and back, halved. All that a change costs counts, up to the first
    /// kernel of the next step.
    fn alternate(&mut self, one: &Selection, other: &Selection, rounds: usize) -> anyhow::Result<Vec<f64>> {
        self.bind(one)?;
        self.bench.engine.rewind(0);
        let mut round = || {
            let start = Instant::now();
            for _ in 0..SWITCHES_PER_ROUND {
                for selection in [other, one] {
                    self.bind(selection)?;
                    self.start_step()?;
                }
            }
            Ok(milliseconds(start) / (2 * SWITCHES_PER_ROUND) as f64)
        };
        let times = (0..rounds).map(|_| round()).collect();
        self.bind(other)?;
        times
    }

    /// Begins a step that is cancelled before its first kernel.
    fn start_step(&mut self) -> anyhow::Result<()> {
        match self.bench.engine.forward(&[0], Logits::Last, &AtomicBool::new(true)) {
            Err(EngineError::Cancelled) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => bail!("a cancelled step was run"),
        }
    }

    /// Milliseconds to read an adapter's files and check them against the model.
    fn load(&mut self, name: &str, rounds: usize) -> anyhow::Result<Vec<f64>> {
        let adapters = &self.config.lora.adapters;
        let adapter = adapters.iter().find(|adapter| adapter.name == name).context("the adapter is in the config")?;
        (0..rounds)
            .map(|_| {
                let start = Instant::now();
                self.bench.engine.load_adapter("genie-bench", &adapter.source)?;
                let time = milliseconds(start);
                self.bench.engine.unload_adapter("genie-bench");
                Ok(time)
            })
            .collect()
    }

    /// Milliseconds to load an adapter whose files the system has not cached, and to do no more than read them.
    fn load_cold(&mut self, name: &str, rounds: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        let adapter = self.config.lora.adapters.iter().find(|adapter| adapter.name == name);
        let (paths, group) = match adapter.map(|adapter| &adapter.source) {
            Some(AdapterSource::Sections(paths)) => (paths, None),
            Some(AdapterSource::Grouped { sections, group }) => (sections, Some(group.clone())),
            _ => bail!("it needs an adapter in section files"),
        };
        let copies: Vec<Option<Copy>> =
            paths.iter().map(|path| path.as_deref().map(Copy::beside).transpose()).collect::<anyhow::Result<_>>()?;
        let sections = copies.iter().map(|c| c.as_ref().map(|c| c.0.clone())).collect();
        let source = match group {
            Some(group) => AdapterSource::Grouped { sections, group },
            None => AdapterSource::Sections(sections),
        };
        let (mut load, mut read) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            copies.iter().flatten().try_for_each(Copy::forget_pages)?;
            let start = Instant::now();
            for copy in copies.iter().flatten() {
                std::fs::read(&copy.0)?;
            }
            read.push(milliseconds(start));
            copies.iter().flatten().try_for_each(Copy::forget_pages)?;
            let start = Instant::now();
            self.bench.engine.load_adapter("genie-bench", &source)?;
            load.push(milliseconds(start));
            self.bench.engine.unload_adapter("genie-bench");
        }
        Ok((load, read))
    }

    /// Loads each adapter of the config anew and runs a token with it, so that all its pages are there.
    fn use_all(&mut self) -> anyhow::Result<()> {
        for adapter in &self.config.lora.adapters {
            let name = format!("genie-bench {}", adapter.name);
            let info = self.bench.engine.load_adapter(&name, &adapter.source)?;
            self.bench.engine.select_adapter(Some((&name, &vec![1.0; info.rank])))?;
            self.bench.first_token(&[0])?;
        }
        Ok(())
    }
}

/// A copy of a file that nobody has mapped, so that the system can forget its pages. Removed when this is dropped.
struct Copy(PathBuf);

impl Copy {
    /// Copies the file into its own folder: what counts is the disk that it lies on.
    fn beside(path: &Path) -> anyhow::Result<Copy> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let copy = Copy(path.with_file_name(format!(".{name}.cold{}", std::process::id())));
        std::fs::copy(path, &copy.0).with_context(|| copy.0.display().to_string())?;
        std::fs::File::open(&copy.0)?.sync_all()?;
        Ok(copy)
    }

    /// Has the system forget the cached pages of the file: `dd` gives the advice that the standard library lacks.
    fn forget_pages(&self) -> anyhow::Result<()> {
        let mut input = std::ffi::OsString::from("if=");
        input.push(&self.0);
        let mut dd = Command::new("dd");
        dd.arg(input).args(["iflag=nocache", "count=0", "status=none"]);
        let status = dd.status().context("starting dd")?;
        ensure!(status.success(), "dd ended with {status}");
        Ok(())
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // It is only a copy: one that stays behind does no harm.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Changes of one measured round: one alone is below the clock's grain.
const SWITCHES_PER_ROUND: usize = 100;
