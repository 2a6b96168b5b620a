//! What engines over one model share: its context binaries, the worker team, and the adapters that are loaded.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use qnn_core::{Adapter, Bytes, Context, Graph, backend::HtpBackend, context::OpenOptions};

use super::super::{AdapterError, AdapterSource, EngineError};
use super::graph_name::GraphName;
use crate::config::EngineConfig;

/// A model's context binaries, open. Immutable, but for the account of the adapters that engines have loaded.
///
/// Engines that run at the same time share the worker team: they take turns, one operation after the other.
pub struct QnnModel {
    config: EngineConfig,
    contexts: Vec<Context>,
    /// The graphs to run of each context, by ascending AR-n, which is the same in every context.
    chosen: Vec<Vec<(GraphName, String)>>,
    backend: HtpBackend,
    n_threads: usize,
    loaded: Mutex<Vec<Loaded>>,
}

/// One adapter that engines hold or held.
struct Loaded {
    key: Key,
    parts: Vec<Option<Weak<Adapter>>>,
}

/// What makes two loads the same: the name, the source, and the state of its files.
#[derive(PartialEq)]
struct Key {
    name: String,
    source: AdapterSource,
    stamps: Vec<(u64, Option<SystemTime>)>,
}

impl QnnModel {
    /// Number of adapters that engines hold, each counted once however many hold it.
    pub fn n_loaded_adapters(&self) -> usize {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.iter().filter(|known| known.is_held()).count()
    }

    /// Opens the context binaries of `config` and chooses the graphs to run.
    ///
    /// # Errors
    /// [`EngineError`]: a file that cannot be opened or is damaged, graphs that are missing.
    pub fn open(config: &EngineConfig) -> Result<QnnModel, EngineError> {
        let n_threads = match config.n_threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let backend = HtpBackend::new(n_threads).map_err(EngineError::Threads)?;
        let options = OpenOptions { use_mmap: config.use_mmap, ..OpenOptions::default() };
        let mut contexts = Vec::new();
        for path in &config.ctx_bins {
            contexts.push(Context::open(path, &options).map_err(EngineError::from)?);
        }
        let chosen = choose_graphs(&contexts, config)?;
        Ok(QnnModel { config: config.clone(), contexts, chosen, backend, n_threads, loaded: Mutex::default() })
    }

    /// The context binaries, in split order.
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    pub(super) fn config(&self) -> &EngineConfig {
        &self.config
    }

    pub(super) fn backend(&self) -> &HtpBackend {
        &self.backend
    }

    pub(super) fn n_threads(&self) -> usize {
        self.n_threads
    }

    pub(super) fn context(&self, split: usize) -> &Context {
        &self.contexts[split]
    }

    /// Tokens that the graphs take in one run, ascending; every split has the same.
    pub(super) fn ar(&self) -> Vec<usize> {
        self.chosen[0].iter().map(|(name, _)| name.ar).collect()
    }

    /// The graphs to run of each split, in the order of [`Self::ar`].
    pub(super) fn graphs(&self) -> impl Iterator<Item = Vec<&Graph>> {
        self.contexts.iter().zip(&self.chosen).map(|(context, chosen)| {
            chosen.iter().map(|(_, name)| context.graph(name).expect("it was chosen among these")).collect()
        })
    }

    /// The adapter of each split, or `None` where a split has no branches. What another engine has under this name from
    /// the same files is not loaded again.
    pub(super) fn load_adapter(
        &self,
        name: &str,
        source: &AdapterSource,
    ) -> Result<Vec<Option<Arc<Adapter>>>, EngineError> {
        let key = Key::of(name, source);
        if let Some(found) = key.as_ref().and_then(|key| self.find(key)) {
            return Ok(found);
        }
        let parts = match source {
            AdapterSource::Sections(paths) => self.load_sections(name, paths)?,
            AdapterSource::Peft(folder) => self.load_peft(folder, name).map_err(fail(name, Some(folder)))?,
        };
        let Some(key) = key else { return Ok(parts) };
        // Another engine may have been faster: then its adapter is the one to keep.
        if let Some(found) = self.find(&key) {
            return Ok(found);
        }
        let weak = parts.iter().map(|part| part.as_ref().map(Arc::downgrade)).collect();
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).push(Loaded { key, parts: weak });
        Ok(parts)
    }

    /// An adapter that some engine still holds; forgets those that none does.
    fn find(&self, key: &Key) -> Option<Vec<Option<Arc<Adapter>>>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(Loaded::is_held);
        let found = loaded.iter().find(|known| known.key == *key)?;
        let alive = |part: &Option<Weak<Adapter>>| match part {
            None => Some(None),
            Some(part) => part.upgrade().map(Some),
        };
        found.parts.iter().map(alive).collect()
    }

    fn load_sections(&self, name: &str, paths: &[Option<PathBuf>]) -> Result<Vec<Option<Arc<Adapter>>>, EngineError> {
        if paths.len() != self.contexts.len() {
            let why = Box::new(AdapterError::SectionCount { have: paths.len(), want: self.contexts.len() });
            return Err(EngineError::Adapter { name: name.to_owned(), path: None, why });
        }
        let load = |(context, path): (&Context, &Option<PathBuf>)| {
            let Some(path) = path else { return Ok(None) };
            let read = || Ok(Some(context.load_section(Bytes::map_file(path)?)?));
            read().map_err(fail(name, Some(path)))
        };
        self.contexts.iter().zip(paths).map(load).collect()
    }

    fn load_peft(&self, folder: &Path, name: &str) -> Result<Vec<Option<Arc<Adapter>>>, AdapterError> {
        let contexts: Vec<&Context> = self.contexts.iter().collect();
        Ok(qnn_core::offline::lora::adapters_from_peft(&contexts, folder, name)?.into_iter().map(Some).collect())
    }
}

impl Loaded {
    fn is_held(&self) -> bool {
        self.parts.iter().flatten().any(|part| part.strong_count() > 0)
    }
}

impl Key {
    /// `None` if the files cannot be looked at; loading them will say why.
    fn of(name: &str, source: &AdapterSource) -> Option<Key> {
        let stamp = |file: Metadata| (file.len(), file.modified().ok());
        let stamps = match source {
            AdapterSource::Sections(paths) => {
                paths.iter().flatten().map(|path| std::fs::metadata(path).map(stamp)).collect::<Result<_, _>>().ok()?
            }
            AdapterSource::Peft(folder) => {
                let mut files: Vec<_> = std::fs::read_dir(folder).ok()?.collect::<Result<_, _>>().ok()?;
                files.sort_by_key(|file| file.file_name());
                files.iter().map(|file| std::fs::metadata(file.path()).map(stamp)).collect::<Result<_, _>>().ok()?
            }
        };
        Some(Key { name: name.to_owned(), source: source.clone(), stamps })
    }
}

fn fail(name: &str, path: Option<&Path>) -> impl FnOnce(AdapterError) -> EngineError {
    let (name, path) = (name.to_owned(), path.map(Path::to_owned));
    move |why| EngineError::Adapter { name, path, why: Box::new(why) }
}

/// For each context the graphs to run, by ascending AR-n: those of the smallest CL-n that holds the config's context.
fn choose_graphs(contexts: &[Context], config: &EngineConfig) -> Result<Vec<Vec<(GraphName, String)>>, EngineError> {
    let mut chosen: Vec<Vec<(GraphName, String)>> = Vec::new();
    for (i, context) in contexts.iter().enumerate() {
        let mut graphs: Vec<(GraphName, String)> = context
            .graphs()
            .filter_map(|name| Some((GraphName::parse(name)?, name.to_owned())))
            .filter(|(name, _)| name.split == i + 1 && name.n_splits == contexts.len())
            .collect();
        let wanted_cl = graphs.iter().map(|(name, _)| name.cl).filter(|cl| *cl >= config.context_size).min();
        graphs.retain(|(name, _)| Some(name.cl) == wanted_cl);
        graphs.sort_by_key(|(name, _)| name.ar);
        let ars = |list: &[(GraphName, String)]| list.iter().map(|(name, _)| name.ar).collect::<Vec<_>>();
        if graphs.is_empty() || chosen.first().is_some_and(|first| ars(first) != ars(&graphs)) {
            let found: Vec<&str> = context.graphs().collect();
            return Err(EngineError::MissingGraph {
                wanted: format!(
                    "graphs of split {} of {} with a context of at least {} (and the same AR-n in every split)",
                    i + 1,
                    contexts.len(),
                    config.context_size
                ),
                found: format!("{} ({})", found.join(", "), config.ctx_bins[i].display()),
            });
        }
        chosen.push(graphs);
    }
    Ok(chosen)
}
