//! The measurements. All times are wall clock; ids are pseudo-random but the same in every run.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, ensure};
use genie::Model;
use genie::config::{DialogConfig, SamplerConfig};
use genie::engine::{Engine, GraphAccount, Logits, qnn::QnnEngine};
use genie::profile::operations_table;
use genie::sampler::Sampler;

/// An open model.
pub(crate) struct Bench {
    pub(crate) engine: QnnEngine,
    greedy: Sampler,
    never: AtomicBool,
}

/// How fast several rounds were, and what each token cost.
pub(crate) struct Rates {
    pub(crate) tokens_per_s: Vec<f64>,
    pub(crate) cost: Cost,
}

/// What the engine has to read and to multiply for one token, by its own account.
pub(crate) struct Cost {
    /// Bytes of weights and cache.
    pub(crate) bytes: f64,
    /// Products of weights; those of attention are not counted.
    pub(crate) weight_products: f64,
}

impl Cost {
    fn per_token(graphs: &[GraphAccount], n_tokens: usize) -> Cost {
        let operations = || graphs.iter().flat_map(|graph| &graph.account.operations);
        let bytes: u64 = operations().map(|operation| operation.bytes).sum();
        let of_weights = operations().filter(|operation| !operation.name.starts_with("attention"));
        let products: u64 = of_weights.map(|operation| operation.multiply_adds).sum();
        Cost { bytes: bytes as f64 / n_tokens as f64, weight_products: products as f64 / n_tokens as f64 }
    }
}

impl Bench {
    pub(crate) fn open(config: &DialogConfig) -> anyhow::Result<Bench> {
        Bench::of(QnnEngine::open(&config.engine)?)
    }

    fn of(engine: QnnEngine) -> anyhow::Result<Bench> {
        let greedy = Sampler::new(SamplerConfig { greedy: true, ..SamplerConfig::default() })?;
        Ok(Bench { engine, greedy, never: AtomicBool::new(false) })
    }

    /// Milliseconds from a prompt to the id of its first answer token.
    pub(crate) fn time_to_first_token(&mut self, prompt: usize, rounds: usize) -> anyhow::Result<Vec<f64>> {
        let ids = self.ids(prompt);
        self.rounds(rounds, |bench| {
            let start = Instant::now();
            bench.first_token(&ids)?;
            Ok(milliseconds(start))
        })
    }

    /// A prompt, the logits of its last id included.
    pub(crate) fn prefill(&mut self, prompt: usize, rounds: usize) -> anyhow::Result<Rates> {
        let ids = self.ids(prompt);
        self.rates(prompt, rounds, |_| Ok(()), |bench| bench.first_token(&ids).map(drop))
    }

    /// Greedy decoding behind a cache of `depth` ids.
    pub(crate) fn decode(&mut self, depth: usize, n_tokens: usize, rounds: usize) -> anyhow::Result<Rates> {
        let ids = self.ids(depth + 1);
        let fill = |bench: &mut Bench| {
            bench.engine.rewind(0);
            bench.engine.forward(&ids[..depth], Logits::None, &bench.never)?;
            Ok(())
        };
        self.rates(n_tokens, rounds, fill, |bench| {
            let mut next = ids[depth];
            for _ in 0..n_tokens {
                next = bench.next(&[next])?;
            }
            Ok(())
        })
    }

    /// Runs `run`, which computes `n_tokens`, each time after `before`: once to warm up and to keep the account, then `rounds`
    /// times that count.
    fn rates(
        &mut self,
        n_tokens: usize,
        rounds: usize,
        before: impl Fn(&mut Bench) -> anyhow::Result<()>,
        run: impl Fn(&mut Bench) -> anyhow::Result<()>,
    ) -> anyhow::Result<Rates> {
        before(self)?;
        self.engine.start_account();
        run(self)?;
        let cost = Cost::per_token(&self.engine.take_account(), n_tokens);
        let mut one = || {
            before(self)?;
            let start = Instant::now();
            run(self)?;
            Ok(n_tokens as f64 / start.elapsed().as_secs_f64())
        };
        let tokens_per_s = (0..rounds).map(|_| one()).collect::<anyhow::Result<_>>()?;
        Ok(Rates { tokens_per_s, cost })
    }

    /// Tables of where the time goes: of prompts of `prompt` ids, and of decoding behind `depth` ids.
    pub(crate) fn operations(&mut self, prompt: usize, depth: usize, n_tokens: usize) -> anyhow::Result<String> {
        let ids = self.ids(prompt);
        self.engine.start_account();
        self.first_token(&ids)?;
        let mut tables = operations_table(&self.engine.take_account());
        let ids = self.ids(depth + 1);
        self.engine.rewind(0);
        self.engine.forward(&ids[..depth], Logits::None, &self.never)?;
        self.engine.start_account();
        for _ in 0..n_tokens {
            self.engine.forward(&ids[depth..], Logits::Last, &self.never)?;
        }
        tables += &operations_table(&self.engine.take_account());
        Ok(tables)
    }

    /// One round to warm up, then `rounds` that count.
    fn rounds(
        &mut self,
        rounds: usize,
        mut one: impl FnMut(&mut Bench) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Vec<f64>> {
        one(self)?;
        (0..rounds).map(|_| one(self)).collect()
    }

    pub(crate) fn first_token(&mut self, ids: &[u32]) -> anyhow::Result<u32> {
        self.engine.rewind(0);
        self.next(ids)
    }

    /// The likeliest token behind what is in the cache and `ids`.
    fn next(&mut self, ids: &[u32]) -> anyhow::Result<u32> {
        let logits = self.engine.forward(ids, Logits::Last, &self.never)?;
        Ok(self.greedy.sample(logits, &[])?)
    }

    fn ids(&self, n: usize) -> Vec<u32> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % self.engine.n_vocab() as u32
        };
        (0..n).map(|_| next()).collect()
    }
}

/// Milliseconds to open the model and its tokenizer.
pub(crate) fn load(config: &DialogConfig, rounds: usize) -> anyhow::Result<Vec<f64>> {
    let one = || -> anyhow::Result<f64> {
        let start = Instant::now();
        Model::open(config.clone())?.engine()?;
        Ok(milliseconds(start))
    };
    (0..rounds).map(|_| one()).collect()
}

/// How to start this program again, for figures that need a fresh process.
pub(crate) struct Child<'a> {
    pub(crate) config: &'a Path,
    pub(crate) threads: Option<usize>,
}

impl Child<'_> {
    /// Milliseconds from the start of a process to its first token, and its resident memory (MB) then, where the system tells.
    pub(crate) fn start_to_first_token(
        &self,
        prompt: usize,
        rounds: usize,
    ) -> anyhow::Result<(Vec<f64>, Option<Vec<f64>>)> {
        let both: Vec<_> = (0..rounds).map(|_| self.once(prompt)).collect::<anyhow::Result<_>>()?;
        let (times, memory): (Vec<f64>, Vec<Option<f64>>) = both.into_iter().unzip();
        Ok((times, memory.into_iter().collect()))
    }

    fn once(&self, prompt: usize) -> anyhow::Result<(f64, Option<f64>)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--config").arg(self.config).arg("--first_token").arg(prompt.to_string());
        if let Some(threads) = self.threads {
            command.arg("--threads").arg(threads.to_string());
        }
        let start = Instant::now();
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting a second process")?;
        let mut line = String::new();
        let output = child.stdout.take().expect("stdout was asked for");
        BufReader::new(output).read_line(&mut line)?;
        let elapsed = milliseconds(start);
        let status = child.wait()?;
        ensure!(status.success(), "the process that measures the start ended with {status}");
        Ok((elapsed, told(&line).context("reading the second process")?))
    }
}

/// What the second process says in its line: a number, or nothing where its system does not tell.
fn told(line: &str) -> Result<Option<f64>, std::num::ParseFloatError> {
    let number = line.trim();
    if number.is_empty() { Ok(None) } else { number.parse().map(Some) }
}

/// The other side of [`Child`]: everything a chat does up to its first token.
pub(crate) fn first_token_child(config: &DialogConfig, prompt: usize) -> anyhow::Result<()> {
    let model = Model::open(config.clone())?;
    let mut bench = Bench::of(model.engine()?)?;
    let ids = bench.ids(prompt);
    bench.first_token(&ids)?;
    let memory = memory_mb("VmRSS:").map_or_else(|_| String::new(), |mb| mb.to_string());
    let printed = writeln!(io::stdout(), "{memory}").context(crate::exit::STDOUT);
    drop(model);
    printed
}

/// A field of the kernel's account of this process, in MB (10⁶ bytes).
pub(crate) fn memory_mb(field: &str) -> anyhow::Result<f64> {
    account_mb("/proc/self/status", field)
}

/// MB of this process that are on pages of 2 MiB, of files and of its own memory.
pub(crate) fn large_pages_mb() -> anyhow::Result<f64> {
    let of = |field| account_mb("/proc/self/smaps_rollup", field);
    Ok(of("FilePmdMapped:")? + of("AnonHugePages:")?)
}

fn account_mb(file: &str, field: &str) -> anyhow::Result<f64> {
    let account = std::fs::read_to_string(file).with_context(|| file.to_owned())?;
    let line = account.lines().find_map(|line| line.strip_prefix(field)).context(field.to_owned())?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().context(field.to_owned())?;
    Ok(kibibytes * 1024.0 / 1e6)
}

pub(crate) fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: a system that tells no memory costs that figure, not all others; a broken line is not taken for such a system.
    #[test]
    fn memory_is_left_out_where_nobody_tells() {
        assert_eq!(told("12.5\n"), Ok(Some(12.5)));
        assert_eq!(told("\n"), Ok(None));
        assert!(told("12.5 MB\n").is_err());
        assert!(account_mb("/nowhere/status", "VmRSS:").is_err());
    }
}
