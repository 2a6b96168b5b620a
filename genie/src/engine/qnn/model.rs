//! What engines over one model share: its context binaries, the worker team, and the adapters that are loaded.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use qnn_core::{Adapter, AdapterGroup, Bytes, Context, Graph, backend::HtpBackend, context::OpenOptions};

use super::super::{AdapterError, AdapterSource, EngineError, GroupSource};
use super::graph_name::GraphName;
use super::positions;
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
    adapters: Loaded<Adapter>,
    /// Of adapters that are held.
    groups: Loaded<AdapterGroup>,
}

/// What somebody holds or held of a kind: one part for each split, `None` where a split has none.
struct Loaded<T>(Mutex<Vec<(Key, WeakParts<T>)>>);

type Parts<T> = Vec<Option<Arc<T>>>;
type WeakParts<T> = Vec<Option<Weak<T>>>;

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
        self.adapters.n_held()
    }

    /// Opens the context binaries of `config` and chooses the graphs to run.
    ///
    /// # Errors
    /// [`EngineError`]: a file that cannot be opened or is damaged, graphs that are missing, positions that are encoded in
    /// another way than the config says.
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
        let (adapters, groups) = (Loaded(Mutex::default()), Loaded(Mutex::default()));
        let model = QnnModel { config: config.clone(), contexts, chosen, backend, n_threads, adapters, groups };
        if let Some(stated) = &config.positional_encoding {
            // All graphs of a split compute the same.
            positions::check(stated, model.graphs().filter_map(|graphs| graphs.first().copied()))?;
        }
        Ok(model)
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
    pub(super) fn load_adapter(&self, name: &str, source: &AdapterSource) -> Result<Parts<Adapter>, EngineError> {
        self.adapters.get_or_load(Key::of(name, source), || match source {
            AdapterSource::Sections(paths) => self.load_sections(name, paths),
            AdapterSource::Grouped { sections, group } => self.load_grouped(name, sections, group),
            AdapterSource::Peft(folder) => self.load_peft(folder, name).map_err(fail(name, Some(folder))),
        })
    }

    fn load_sections(&self, name: &str, paths: &[Option<PathBuf>]) -> Result<Parts<Adapter>, EngineError> {
        let load = |(context, path): (&Context, &Option<PathBuf>)| {
            let Some(path) = path else { return Ok(None) };
            let read = || Ok(Some(context.load_section(Bytes::map_file(path)?)?));
            read().map_err(fail(name, Some(path)))
        };
        let parts = self.each_split(name, paths)?.map(load).collect::<Result<_, _>>()?;
        self.check_parts(name, paths, &parts)?;
        Ok(parts)
    }

    /// The group first, unless another member has brought it; then the weights, which have to be of a member.
    fn load_grouped(
        &self,
        name: &str,
        paths: &[Option<PathBuf>],
        group: &GroupSource,
    ) -> Result<Parts<Adapter>, EngineError> {
        let key = Key::of(&group.name, &AdapterSource::Sections(group.sections.clone()));
        let groups = self.groups.get_or_load(key, || self.load_group(name, group))?;
        let load = |((context, path), group): ((&Context, &Option<PathBuf>), Option<Arc<AdapterGroup>>)| {
            let read = || -> Result<_, AdapterError> {
                Ok(match (path, &group) {
                    (None, None) => None,
                    (None, Some(group)) => Some(context.base_of_group(group)?),
                    (Some(path), None) => Some(context.load_section(Bytes::map_file(path)?)?),
                    (Some(path), Some(group)) => Some(context.load_grouped_section(Bytes::map_file(path)?, group)?),
                })
            };
            read().map_err(fail(name, path.as_deref()))
        };
        let parts = self.each_split(name, paths)?.zip(groups).map(load).collect::<Result<_, _>>()?;
        self.check_parts(name, paths, &parts)?;
        Ok(parts)
    }

    /// The encodings of a group, for its member `name`.
    fn load_group(&self, name: &str, group: &GroupSource) -> Result<Parts<AdapterGroup>, EngineError> {
        let load = |(context, path): (&Context, &Option<PathBuf>)| {
            let Some(path) = path else { return Ok(None) };
            let read = || {
                let loaded = context.load_group(Bytes::map_file(path)?)?;
                if loaded.name() != group.name {
                    let (have, want) = (loaded.name().to_owned(), group.name.clone());
                    return Err(AdapterError::Group { have, want });
                }
                Ok(Some(loaded))
            };
            read().map_err(fail(name, Some(path)))
        };
        self.each_split(name, &group.sections)?.map(load).collect()
    }

    /// Each context with its section of the adapter `name`.
    fn each_split<'a>(
        &'a self,
        name: &str,
        paths: &'a [Option<PathBuf>],
    ) -> Result<impl Iterator<Item = (&'a Context, &'a Option<PathBuf>)>, EngineError> {
        let (have, want) = (paths.len(), self.contexts.len());
        match have == want {
            true => Ok(self.contexts.iter().zip(paths)),
            false => Err(fail(name, None)(AdapterError::SectionCount { have, want })),
        }
    }

    /// Refuses parts that were read from `paths` and are no adapter together. Sections of several adapters would each fit their own
    /// split, and one for another graph than those that run would be applied to them all.
    fn check_parts(&self, name: &str, paths: &[Option<PathBuf>], parts: &Parts<Adapter>) -> Result<(), EngineError> {
        let mut first: Option<&str> = None;
        for ((path, part), chosen) in paths.iter().zip(parts).zip(&self.chosen) {
            let (Some(path), Some(part)) = (path, part) else { continue };
            let want = *first.get_or_insert(part.name());
            if part.name() != want {
                let (have, want) = (part.name().to_owned(), want.to_owned());
                return Err(fail(name, Some(path))(AdapterError::OtherAdapter { have, want }));
            }
            let other = |graph: &&str| chosen.iter().any(|(_, running)| running != graph);
            if let Some(graph) = part.graph().filter(other) {
                return Err(fail(name, Some(path))(AdapterError::OneGraph { graph: graph.to_owned() }));
            }
        }
        Ok(())
    }

    fn load_peft(&self, folder: &Path, name: &str) -> Result<Parts<Adapter>, AdapterError> {
        let contexts: Vec<&Context> = self.contexts.iter().collect();
        Ok(qnn_core::offline::lora::adapters_from_peft(&contexts, folder, name)?.into_iter().map(Some).collect())
    }
}

impl<T> Loaded<T> {
    /// What somebody holds under `key`, or what `load` gives. Without a key nothing is shared.
    fn get_or_load<E>(&self, key: Option<Key>, load: impl FnOnce() -> Result<Parts<T>, E>) -> Result<Parts<T>, E> {
        if let Some(found) = key.as_ref().and_then(|key| self.find(key)) {
            return Ok(found);
        }
        let parts = load()?;
        let Some(key) = key else { return Ok(parts) };
        // Another engine may have been faster: then its parts are the ones to keep.
        if let Some(found) = self.find(&key) {
            return Ok(found);
        }
        let weak = parts.iter().map(|part| part.as_ref().map(Arc::downgrade)).collect();
        self.known().push((key, weak));
        Ok(parts)
    }

    /// What somebody still holds, all parts of it; forgets what nobody does. There may be several under one key, as some parts of
    /// one may outlive the others, and two engines may load at the same time.
    fn find(&self, key: &Key) -> Option<Parts<T>> {
        let mut known = self.known();
        known.retain(|(_, parts)| is_held(parts));
        let alive = |part: &Option<Weak<T>>| match part {
            None => Some(None),
            Some(part) => part.upgrade().map(Some),
        };
        known.iter().filter(|(other, _)| other == key).find_map(|(_, parts)| parts.iter().map(alive).collect())
    }

    fn n_held(&self) -> usize {
        self.known().iter().filter(|(_, parts)| is_held(parts)).count()
    }

    fn known(&self) -> MutexGuard<'_, Vec<(Key, WeakParts<T>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether there are parts, and somebody holds each of them: with one gone they are no adapter any more.
fn is_held<T>(parts: &WeakParts<T>) -> bool {
    let mut held = parts.iter().flatten().map(|part| part.strong_count() > 0);
    held.next() == Some(true) && held.all(|held| held)
}

impl Key {
    /// `None` if the files cannot be looked at; loading them will say why.
    fn of(name: &str, source: &AdapterSource) -> Option<Key> {
        let stamp = |file: Metadata| (file.len(), file.modified().ok());
        let of_files = |paths: &[Option<PathBuf>]| -> Option<Vec<_>> {
            paths.iter().flatten().map(|path| std::fs::metadata(path).map(stamp).ok()).collect()
        };
        let stamps = match source {
            AdapterSource::Sections(paths) => of_files(paths)?,
            AdapterSource::Grouped { sections, group } => [of_files(sections)?, of_files(&group.sections)?].concat(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key { name: name.to_owned(), source: AdapterSource::Sections(Vec::new()), stamps: Vec::new() }
    }

    // Guards: what is held whole is loaded once, also while a part of an earlier load lives on; a part alone is nothing.
    #[test]
    fn parts_that_live_on_hide_nothing() {
        let loaded = Loaded(Mutex::default());
        let load = |name: &str, value: u32| {
            let parts = || Ok::<_, ()>(vec![Some(Arc::new(value)), None, Some(Arc::new(value))]);
            loaded.get_or_load(Some(key(name)), parts).unwrap()
        };
        let of = |parts: &Parts<u32>| parts.iter().flatten().map(|part| **part).collect::<Vec<_>>();
        let mut first = load("a", 1);
        assert_eq!((of(&load("a", 2)), loaded.n_held()), (vec![1, 1], 1));
        first[2] = None;
        assert_eq!(loaded.n_held(), 0);
        let second = load("a", 2);
        assert_eq!((of(&second), of(&load("a", 3)), loaded.n_held()), (vec![2, 2], vec![2, 2], 1));
        assert_eq!((of(&load("b", 4)), of(&first)), (vec![4, 4], vec![1]));
        drop((first, second));
        assert_eq!(loaded.n_held(), 0);
        assert_eq!(of(&load("a", 5)), [5, 5]);
    }
}
