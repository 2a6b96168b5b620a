//! The engine over `qnn-core`: context binaries, one per split, each with a prompt graph and a token graph.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, atomic::AtomicBool};
use std::time::{Duration, Instant};

use qnn_core::{
    Adapter, Backend, Bindings, Executable, Graph, State,
    adapter::Slot,
    backend::{ExecuteError, HtpBackend, Watch},
};

use super::{AdapterInfo, AdapterSlot, AdapterSource, Engine, EngineError, GraphAccount, Logits};
use crate::config::EngineConfig;

mod graph_name;
mod model;
mod outline;
mod positions;

pub use model::QnnModel;
pub use outline::Spot;

/// A model in context binaries, run by the `htp` backend. Several engines may run over one [`QnnModel`].
///
/// Every split keeps its graphs by the most tokens they take in one run (AR-n). A run of m tokens takes the smallest
/// graph that holds m, or the largest there is, again and again.
pub struct QnnEngine {
    model: Arc<QnnModel>,
    splits: Vec<Split>,
    /// AR-n of the graphs, the same for every split, ascending.
    ar: Vec<usize>,
    context_size: usize,
    n_vocab: usize,
    position: usize,
    integers: Integers,
    all_logits: Vec<f32>,
    n_loads: u64,
}

/// This engine's part of one context binary: its graphs, its cache and the adapters loaded for it.
struct Split {
    runners: Vec<Runner>,
    state: State,
    adapters: HashMap<String, Arc<Adapter>>,
}

/// One graph ready to run.
struct Runner {
    graph: String,
    executable: Box<dyn Executable>,
    bindings: Bindings,
    /// What each graph input is fed with.
    feeds: Vec<Feed>,
    logits: Option<usize>,
}

/// Where the value of a graph input comes from.
#[derive(Clone, Copy)]
enum Feed {
    TokenIds,
    Positions,
    CacheIndex,
    LogitIndices,
    /// Strengths of the adapter, one per rank column; bound when an adapter is selected.
    Strengths,
    /// Output of this number of the split before.
    Previous(usize),
}

/// Integer inputs of a run; kept, so that a step allocates nothing.
#[derive(Default)]
struct Integers {
    ids: Vec<i32>,
    positions: Vec<i32>,
    cache_index: [i32; 1],
    logit_indices: Vec<i32>,
}

impl QnnEngine {
    /// Opens a model for this engine alone: [`QnnModel::open`], then [`QnnEngine::over`].
    ///
    /// # Errors
    /// As both.
    pub fn open(config: &EngineConfig) -> Result<QnnEngine, EngineError> {
        QnnEngine::over(Arc::new(QnnModel::open(config)?))
    }

    /// An engine over a model that is open: a cache, bindings and scratch memory of its own over shared weights.
    ///
    /// # Errors
    /// [`EngineError`]: graphs that do not fit together, a vocabulary of another size than the config says.
    pub fn over(model: Arc<QnnModel>) -> Result<QnnEngine, EngineError> {
        let config = model.config();
        let mut splits: Vec<Split> = Vec::new();
        for (graphs, path) in model.graphs().zip(&config.ctx_bins) {
            let before = splits.last().map(|split| &split.runners[..]);
            let (runners, state) = prepare(model.backend(), &graphs, before, config.context_size, path)?;
            splits.push(Split { runners, state, adapters: HashMap::new() });
        }
        let n_vocab = logits_width(&splits, config)?;
        Ok(QnnEngine {
            splits,
            ar: model.ar(),
            context_size: config.context_size,
            n_vocab,
            position: 0,
            integers: Integers::default(),
            all_logits: Vec::new(),
            n_loads: 0,
            model,
        })
    }

    /// Name of the instruction set in use.
    pub fn kernels(&self) -> &'static str {
        self.model.backend().kernels()
    }

    /// Number of workers, the calling thread included.
    pub fn n_threads(&self) -> usize {
        self.model.n_threads()
    }

    /// The model.
    pub fn model(&self) -> &QnnModel {
        &self.model
    }

    /// As [`Engine::forward`] for ids that fit one run (see [`QnnModel::max_rows`]), with all their logits; shows `watch`
    /// each computed tensor of every split, which it may change.
    ///
    /// # Errors
    /// As [`Engine::forward`], and [`EngineError::RunTooLong`].
    pub fn forward_watched(&mut self, ids: &[u32], watch: &mut Watch<'_>) -> Result<&[f32], EngineError> {
        self.check(ids)?;
        let (have, max) = (ids.len(), self.model.max_rows());
        if have > max {
            return Err(EngineError::RunTooLong { have, max });
        }
        self.run(ids, Logits::All, &AtomicBool::new(false), Some(watch))?;
        Ok(self.logits(ids.len()))
    }

    /// Refuses ids that are no tokens or do not fit behind what is in the cache.
    fn check(&self, ids: &[u32]) -> Result<(), EngineError> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.n_vocab) {
            return Err(EngineError::TokenOutOfRange { id: *id, n_vocab: self.n_vocab });
        }
        let need = self.position + ids.len();
        if need > self.context_size {
            return Err(EngineError::ContextExceeded { have: self.context_size, need });
        }
        Ok(())
    }

    /// Runs one chunk through every split; `wanted` are the rows whose logits are computed.
    fn run(
        &mut self,
        ids: &[u32],
        wanted: Logits,
        cancel: &AtomicBool,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<(), EngineError> {
        self.integers.set(ids, self.position, wanted);
        let graph = self.ar.iter().position(|ar| ids.len() <= *ar).expect("chunks are at most the largest AR-n");
        for i in 0..self.splits.len() {
            let (before, rest) = self.splits.split_at_mut(i);
            let Split { runners, state, .. } = &mut rest[0];
            let runner = &mut runners[graph];
            // A split without branches is the same with any adapter.
            if runner.bindings.adapter().is_none() && !self.model.context(i).updatable().is_empty() {
                self.model.context(i).ready(&runner.graph).map_err(EngineError::NotReady)?;
            }
            runner.feed(&self.integers, before.last().map(|split| &split.runners[graph].bindings))?;
            match watch.as_deref_mut() {
                None => runner.executable.execute(&mut runner.bindings, state, cancel)?,
                Some(watch) => runner.executable.execute_watched(&mut runner.bindings, state, cancel, watch)?,
            }
        }
        self.position += ids.len();
        Ok(())
    }

    fn logits(&self, rows: usize) -> &[f32] {
        let graph = self.ar.iter().position(|ar| rows <= *ar).unwrap_or(self.ar.len() - 1);
        let runner = &self.splits[self.splits.len() - 1].runners[graph];
        runner.logits.map_or(&[], |output| runner.bindings.output_f32(output))
    }
}

impl Engine for QnnEngine {
    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn context_size(&self) -> usize {
        self.context_size
    }

    fn position(&self) -> usize {
        self.position
    }

    fn rewind(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    fn forward(&mut self, ids: &[u32], logits: Logits, cancel: &AtomicBool) -> Result<&[f32], EngineError> {
        self.check(ids)?;
        self.all_logits.clear();
        let largest = self.ar[self.ar.len() - 1];
        let n_chunks = ids.len().div_ceil(largest);
        let mut last_rows = 0;
        for (i, chunk) in ids.chunks(largest).enumerate() {
            let wanted = if logits == Logits::Last && i + 1 < n_chunks { Logits::None } else { logits };
            self.run(chunk, wanted, cancel, None)?;
            last_rows = chunk.len();
            if logits == Logits::All {
                let mut all = std::mem::take(&mut self.all_logits);
                all.extend_from_slice(self.logits(last_rows));
                self.all_logits = all;
            }
        }
        Ok(match logits {
            _ if ids.is_empty() => &[],
            Logits::None => &[],
            Logits::Last => self.logits(last_rows),
            Logits::All => &self.all_logits,
        })
    }

    fn load_adapter(&mut self, name: &str, source: &AdapterSource) -> Result<AdapterInfo, EngineError> {
        let start = Instant::now();
        let loaded = self.model.load_adapter(name, source)?;
        self.n_loads += 1;
        let info = describe(name, &loaded, start.elapsed(), self.n_loads);
        for (split, adapter) in self.splits.iter_mut().zip(loaded) {
            match adapter {
                Some(adapter) => split.adapters.insert(name.to_owned(), adapter),
                None => split.adapters.remove(name),
            };
        }
        Ok(info)
    }

    fn unload_adapter(&mut self, name: &str) -> bool {
        self.splits.iter_mut().filter_map(|split| split.adapters.remove(name)).count() > 0
    }

    fn select_adapter(&mut self, selection: Option<(&str, &[f32])>) -> Result<(), EngineError> {
        if let Some((name, _)) = selection
            && !self.splits.iter().any(|split| split.adapters.contains_key(name))
        {
            let mut loaded: Vec<String> = self.splits.iter().flat_map(|split| split.adapters.keys().cloned()).collect();
            loaded.sort();
            loaded.dedup();
            return Err(EngineError::UnknownAdapter { name: name.to_owned(), loaded });
        }
        self.splits.iter_mut().try_for_each(|split| split.select(selection))
    }

    fn start_account(&mut self) {
        self.splits
            .iter_mut()
            .flat_map(|split| &mut split.runners)
            .for_each(|runner| runner.executable.start_account());
    }

    fn take_account(&mut self) -> Vec<GraphAccount> {
        let runners = self.splits.iter_mut().flat_map(|split| &mut split.runners);
        let accounts = runners.filter_map(|runner| {
            let account = runner.executable.take_account()?;
            Some(GraphAccount { graph: runner.graph.clone(), account })
        });
        accounts.filter(|graph| 0 < graph.account.n_executes).collect()
    }
}

/// The account of an adapter loaded for every split.
fn describe(name: &str, loaded: &[Option<Arc<Adapter>>], load_time: Duration, generation: u64) -> AdapterInfo {
    let parts = || loaded.iter().flatten();
    let slot =
        |slot: &Slot| AdapterSlot { name: slot.name.clone(), columns: slot.columns.clone(), scaling: slot.scaling };
    let rank = parts().map(|part| part.rank()).max().unwrap_or(0);
    let slots = parts().map(|part| part.slots()).max_by_key(|slots| slots.len()).unwrap_or(&[]);
    let whole = AdapterSlot { name: name.to_owned(), columns: 0..rank, scaling: None };
    AdapterInfo {
        name: name.to_owned(),
        targets: parts().map(|part| part.n_targets()).sum(),
        rank,
        slots: if slots.is_empty() { vec![whole] } else { slots.iter().map(slot).collect() },
        size_bytes: parts().map(|part| part.size_bytes()).sum(),
        n_encodings: parts().map(|part| part.encodings().count()).sum(),
        group: parts().find_map(|part| Some(part.group()?.name().to_owned())),
        load_time,
        generation,
    }
}

/// Plans the graphs of one context binary and makes their cache.
fn prepare(
    backend: &HtpBackend,
    graphs: &[&Graph],
    before: Option<&[Runner]>,
    context_size: usize,
    path: &Path,
) -> Result<(Vec<Runner>, State), EngineError> {
    let core = |why| EngineError::from(qnn_core::Error::Prepare { path: path.to_owned(), why });
    let mut runners = Vec::new();
    for (i, graph) in graphs.iter().enumerate() {
        let executable = backend.prepare(graph).map_err(core)?;
        let mut bindings = Bindings::new(graph);
        let feeds = feeds(graph, &bindings, before.map(|runners| &runners[i].bindings))?;
        for (input, _) in feeds.iter().enumerate().filter(|(_, feed)| matches!(feed, Feed::Strengths)) {
            let columns = bindings.inputs()[input].max_rows;
            bindings.set_f32(input, &vec![0.0; columns])?;
        }
        let logits = bindings.find_output("logits");
        runners.push(Runner { graph: graph.name().to_owned(), executable, bindings, feeds, logits });
    }
    Ok((runners, backend.new_state(graphs, context_size).map_err(core)?))
}

impl Split {
    /// Selects the loaded adapter `name`, if this split has it, else the base.
    fn select(&mut self, selection: Option<(&str, &[f32])>) -> Result<(), EngineError> {
        let adapter = selection.and_then(|(name, _)| self.adapters.get(name));
        let strengths = selection.map_or(&[][..], |(_, strengths)| strengths);
        for runner in &mut self.runners {
            runner.bindings.set_adapter(adapter.cloned());
            runner.set_strengths(strengths)?;
        }
        Ok(())
    }
}

impl Runner {
    /// Binds `strengths`; columns without one get 0.
    fn set_strengths(&mut self, strengths: &[f32]) -> Result<(), ExecuteError> {
        for (input, feed) in self.feeds.iter().enumerate() {
            if matches!(feed, Feed::Strengths) {
                let columns = self.bindings.inputs()[input].max_rows;
                let padded: Vec<f32> = strengths.iter().copied().chain(std::iter::repeat(0.0)).take(columns).collect();
                self.bindings.set_f32(input, &padded)?;
            }
        }
        Ok(())
    }

    fn feed(&mut self, integers: &Integers, before: Option<&Bindings>) -> Result<(), ExecuteError> {
        for (input, feed) in self.feeds.iter().enumerate() {
            match feed {
                Feed::TokenIds => self.bindings.set_i32(input, &integers.ids)?,
                Feed::Positions => self.bindings.set_i32(input, &integers.positions)?,
                Feed::CacheIndex => self.bindings.set_i32(input, &integers.cache_index)?,
                Feed::LogitIndices => self.bindings.set_i32(input, &integers.logit_indices)?,
                Feed::Strengths => {}
                Feed::Previous(output) => {
                    let values = before.map_or(&[][..], |bindings| bindings.output_f32(*output));
                    self.bindings.set_f32(input, values)?;
                }
            }
        }
        Ok(())
    }
}

impl Integers {
    fn set(&mut self, ids: &[u32], position: usize, wanted: Logits) {
        let rows = ids.len() as i32;
        self.ids.clear();
        self.ids.extend(ids.iter().map(|id| *id as i32));
        self.positions.clear();
        self.positions.extend((position as i32..).take(ids.len()));
        self.cache_index = [position as i32];
        self.logit_indices.clear();
        match wanted {
            Logits::None => {}
            Logits::Last => self.logit_indices.push(rows - 1),
            Logits::All => self.logit_indices.extend(0..rows),
        }
    }
}

/// Decides what each input of `graph` is fed with, by its name.
fn feeds(graph: &Graph, bindings: &Bindings, before: Option<&Bindings>) -> Result<Vec<Feed>, EngineError> {
    let feed = |name: &str| {
        Some(match name {
            "input_ids" => Feed::TokenIds,
            "position_ids" => Feed::Positions,
            "cache_index" => Feed::CacheIndex,
            "logit_indices" => Feed::LogitIndices,
            name if Some(name) == graph.metadata().get(ALPHA_TENSOR).map(String::as_str) => Feed::Strengths,
            other => Feed::Previous(before?.find_output(other)?),
        })
    };
    let unknown = |name: &str| EngineError::Mismatch {
        what: "graph inputs",
        config: "input_ids, position_ids, cache_index, logit_indices or an output of the split before".to_owned(),
        model: format!("{name} in {}", graph.name()),
    };
    bindings.inputs().iter().map(|input| feed(&input.name).ok_or_else(|| unknown(&input.name))).collect()
}

/// Width of the logits of the last split, which has to be the config's vocabulary.
fn logits_width(splits: &[Split], config: &EngineConfig) -> Result<usize, EngineError> {
    let runner = splits.last().and_then(|split| split.runners.first());
    let width = runner.and_then(|r| r.logits.map(|output| r.bindings.outputs()[output].row_elements));
    match width {
        Some(width) if width == config.n_vocab => Ok(width),
        model => Err(EngineError::Mismatch {
            what: "context/n-vocab",
            config: config.n_vocab.to_string(),
            model: model.map_or_else(|| "no output called logits".to_owned(), |n| n.to_string()),
        }),
    }
}

impl From<ExecuteError> for EngineError {
    fn from(why: ExecuteError) -> EngineError {
        match why {
            ExecuteError::Cancelled => EngineError::Cancelled,
            other => EngineError::from(qnn_core::Error::Execute(other)),
        }
    }
}

/// Key of the graph's metadata that names the input with the adapter's strengths.
const ALPHA_TENSOR: &str = "lora_alpha_tensor";
