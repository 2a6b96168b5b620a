//! Adapters by name: where each comes from, whether it is loaded, and at which strengths it runs.
//!
//! An adapter is loaded when it is first used, and stays loaded until it is released. Its rank columns are divided into
//! slots (one for a plain adapter, one for each part of a composed one); each slot has a strength, the user's number,
//! which is 1 until it is set. A strength is addressed by an alpha: the name that the config gives to the slot or else
//! the slot's own; the alpha tensor's name addresses all slots at once.

use std::str::FromStr;

use thiserror::Error as ThisError;

use crate::Error;
use crate::config::{AdapterConfig, LoraConfig};
use crate::engine::{AdapterInfo, AdapterSource, Engine};
use crate::kv_cache::Maker;

/// What a query runs with.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterChoice {
    /// The base alone.
    Base,
    /// An adapter.
    Named {
        /// Its name.
        name: String,
        /// Strengths by alpha, set in this order; 1 for those that are not here.
        strengths: Vec<(String, f32)>,
    },
}

/// An adapter that a dialog knows.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterStatus {
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub source: AdapterSource,
    /// What was found when it was loaded; `None` while it is not.
    pub loaded: Option<AdapterInfo>,
    /// Whether it is applied.
    pub is_applied: bool,
}

/// Why an adapter or a strength cannot be used.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum LoraError {
    /// The dialog has no engine of this role.
    #[error("no engine has the role {role:?}; there is {known:?}")]
    UnknownRole {
        /// The role asked for.
        role: String,
        /// The role that is there.
        known: String,
    },
    /// There is no adapter of this name.
    #[error("no adapter is called {name:?}; there are {known:?}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names that are there.
        known: Vec<String>,
    },
    /// An adapter has no such strength.
    #[error("no alpha is called {alpha:?}; there are {known:?}")]
    UnknownAlpha {
        /// The name asked for.
        alpha: String,
        /// The names that are there.
        known: Vec<String>,
    },
    /// A strength is not a number to compute with.
    #[error("strength of {alpha:?} is {value}, need a finite number")]
    Strength {
        /// The name of the strength.
        alpha: String,
        /// The value given.
        value: f32,
    },
    /// The strengths that the config names are not those that the adapter has.
    #[error(
        "adapter {name:?} has the slots {slots:?}, the config names the alphas {alphas:?}; need one alpha for each \
             slot, and either all of the slots' own names or none"
    )]
    Alphas {
        /// The adapter.
        name: String,
        /// Names of its slots.
        slots: Vec<String>,
        /// Names in the config.
        alphas: Vec<String>,
    },
    /// An adapter cannot be added under a name that is taken, or under none.
    #[error("an adapter cannot be added as {name:?}: the name is empty or taken; taken are {known:?}")]
    Name {
        /// The name.
        name: String,
        /// The names that are there.
        known: Vec<String>,
    },
    /// An adapter that is applied cannot be released or removed.
    #[error("adapter {name:?} is applied; apply another or the base first")]
    InUse {
        /// The adapter.
        name: String,
    },
    /// The cache holds rows of another adapter or strength, and the config says to refuse them.
    #[error("{n_rows} rows of the cache were made with another adapter or strength, and kv-reuse is \"refuse\"; reset")]
    ForeignRows {
        /// Number of rows that the query would have used.
        n_rows: usize,
    },
    /// A text does not name an adapter and strengths.
    #[error("found {found:?}, need ADAPTER[,ALPHA,VALUE]...")]
    Choice {
        /// The text.
        found: String,
    },
}

/// The adapters of one engine.
#[derive(Debug)]
pub struct Adapters {
    role: String,
    alpha_tensor: String,
    entries: Vec<Entry>,
    applied: Option<String>,
}

/// An adapter bound to an engine: its rank columns at their strengths.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    pub(crate) name: String,
    pub(crate) columns: Vec<f32>,
    pub(crate) generation: u64,
    /// It brings encodings, so that it is not the base at strength 0 either.
    pub(crate) has_encodings: bool,
}

#[derive(Debug)]
struct Entry {
    name: String,
    source: AdapterSource,
    /// Names that the config gives to the slots; none if it leaves them to the adapter.
    alphas: Vec<String>,
    strengths: Strengths,
    loaded: Option<AdapterInfo>,
}

/// Strengths by alpha.
#[derive(Debug, Clone, PartialEq)]
struct Strengths {
    /// Of every slot that has none of its own.
    all: f32,
    own: Vec<(String, f32)>,
}

impl Adapters {
    /// The adapters of the engine with this role. None is loaded or applied.
    pub fn new(config: &LoraConfig, role: &str) -> Self {
        let entry = |adapter: &AdapterConfig| {
            // The tensor's name alone says no more than no name does.
            let is_tensor = adapter.alphas == [config.alpha_tensor_name.as_str()];
            let alphas = if is_tensor { Vec::new() } else { adapter.alphas.clone() };
            Entry::new(&adapter.name, adapter.source.clone(), alphas)
        };
        Self {
            role: role.to_owned(),
            alpha_tensor: config.alpha_tensor_name.clone(),
            entries: config.adapters.iter().map(entry).collect(),
            applied: None,
        }
    }

    /// Every adapter, in the order of the config and then of addition.
    pub fn list(&self) -> Vec<AdapterStatus> {
        let status = |entry: &Entry| AdapterStatus {
            name: entry.name.clone(),
            source: entry.source.clone(),
            loaded: entry.loaded.clone(),
            is_applied: self.applied.as_ref() == Some(&entry.name),
        };
        self.entries.iter().map(status).collect()
    }

    /// Loads what `choice` names, if it is not loaded yet, and computes what the engine is to be given.
    ///
    /// # Errors
    /// [`LoraError`] for a name or a strength; what the engine says about the files.
    pub fn resolve(&mut self, engine: &mut dyn Engine, choice: &AdapterChoice) -> Result<Option<Selection>, Error> {
        let AdapterChoice::Named { name, strengths: given } = choice else { return Ok(None) };
        self.load(engine, name)?;
        let entry = self.entry(name)?;
        let mut strengths = Strengths::default();
        for (alpha, value) in given {
            entry.check(alpha, *value, &self.alpha_tensor)?;
            strengths.set(alpha, *value, &self.alpha_tensor);
        }
        Ok(entry.select(&strengths))
    }

    /// Loads an adapter unless it is loaded. Returns whether it did.
    pub(crate) fn load(&mut self, engine: &mut dyn Engine, name: &str) -> Result<bool, Error> {
        self.entry(name)?;
        let Some(entry) = self.entries.iter_mut().find(|entry| entry.name == name) else { return Ok(false) };
        if entry.loaded.is_some() {
            return Ok(false);
        }
        let info = engine.load_adapter(name, &entry.source).map_err(|why| Error::engine(&self.role, why))?;
        if !entry.alphas_fit(&info) {
            engine.unload_adapter(name);
            let slots = info.slots.into_iter().map(|slot| slot.name).collect();
            return Err(LoraError::Alphas { name: name.to_owned(), slots, alphas: entry.alphas.clone() }.into());
        }
        entry.loaded = Some(info);
        Ok(true)
    }

    /// What the engine is to be given while no query says otherwise.
    pub(crate) fn current(&self) -> Option<Selection> {
        let entry = self.entry(self.applied.as_deref()?).ok()?;
        entry.select(&entry.strengths)
    }

    pub(crate) fn applied(&self) -> Option<&str> {
        self.applied.as_deref()
    }

    /// Makes a loaded adapter, or the base, the current one.
    pub(crate) fn set_applied(&mut self, name: Option<&str>) -> Option<String> {
        std::mem::replace(&mut self.applied, name.map(str::to_owned))
    }

    /// The account of a loaded adapter and its strengths by alpha.
    pub(crate) fn account(&self, name: &str) -> Option<(AdapterInfo, Vec<(String, f32)>)> {
        let entry = self.entry(name).ok()?;
        let info = entry.loaded.clone()?;
        let strengths = entry.slot_strengths(&info, &entry.strengths);
        let alphas = entry.alphas_shown(&info, &self.alpha_tensor);
        Some((info, alphas.into_iter().zip(strengths).collect()))
    }

    /// Sets a strength of the applied adapter, or, if none is, of every adapter that has it or may turn out to.
    pub(crate) fn set_strength(&mut self, alpha: &str, value: f32) -> Result<(), LoraError> {
        let tensor = self.alpha_tensor.clone();
        if let Some(name) = self.applied.clone() {
            self.entry(&name)?.check(alpha, value, &tensor)?;
            let applied = self.entries.iter_mut().filter(|entry| entry.name == name);
            applied.for_each(|entry| entry.strengths.set(alpha, value, &tensor));
            return Ok(());
        }
        check_value(alpha, value)?;
        let mut known: Vec<String> = self.entries.iter().flat_map(|entry| entry.known_alphas(&tensor)).collect();
        known.push(tensor.clone());
        if !known.iter().any(|name| name == alpha) {
            known.sort();
            known.dedup();
            return Err(LoraError::UnknownAlpha { alpha: alpha.to_owned(), known });
        }
        for entry in &mut self.entries {
            if entry.may_have(alpha, &tensor) {
                entry.strengths.set(alpha, value, &tensor);
            }
        }
        Ok(())
    }

    pub(crate) fn add(&mut self, name: &str, source: AdapterSource) -> Result<(), LoraError> {
        if name.is_empty() || self.entries.iter().any(|entry| entry.name == name) {
            return Err(LoraError::Name { name: name.to_owned(), known: self.names() });
        }
        self.entries.push(Entry::new(name, source, Vec::new()));
        Ok(())
    }

    /// Makes the engine forget an adapter. Returns whether it was loaded.
    pub(crate) fn release(&mut self, engine: &mut dyn Engine, name: &str) -> Result<bool, LoraError> {
        self.entry(name)?;
        if self.applied.as_deref() == Some(name) {
            return Err(LoraError::InUse { name: name.to_owned() });
        }
        let entry = self.entries.iter_mut().find(|entry| entry.name == name);
        let was_loaded = entry.is_some_and(|entry| entry.loaded.take().is_some());
        if was_loaded {
            engine.unload_adapter(name);
        }
        Ok(was_loaded)
    }

    pub(crate) fn remove(&mut self, engine: &mut dyn Engine, name: &str) -> Result<(), LoraError> {
        self.release(engine, name)?;
        self.entries.retain(|entry| entry.name != name);
        Ok(())
    }

    pub(crate) fn check_role(&self, role: &str) -> Result<(), LoraError> {
        if role == self.role {
            return Ok(());
        }
        Err(LoraError::UnknownRole { role: role.to_owned(), known: self.role.clone() })
    }

    fn entry(&self, name: &str) -> Result<&Entry, LoraError> {
        let unknown = || LoraError::UnknownAdapter { name: name.to_owned(), known: self.names() };
        self.entries.iter().find(|entry| entry.name == name).ok_or_else(unknown)
    }

    fn names(&self) -> Vec<String> {
        self.entries.iter().map(|entry| entry.name.clone()).collect()
    }
}

impl Entry {
    fn new(name: &str, source: AdapterSource, alphas: Vec<String>) -> Self {
        Self { name: name.to_owned(), source, alphas, strengths: Strengths::default(), loaded: None }
    }

    /// Every name that addresses a strength of this adapter, as far as they are known before it is loaded.
    fn known_alphas(&self, tensor: &str) -> Vec<String> {
        let mut known = vec![tensor.to_owned()];
        known.extend(self.alphas.iter().cloned());
        if let Some(info) = self.loaded.as_ref().filter(|_| self.alphas.is_empty()) {
            known.extend(info.slots.iter().map(|slot| slot.name.clone()));
        }
        known
    }

    /// Whether this adapter has the strength, or may turn out to: its slots have names only once it is loaded.
    fn may_have(&self, alpha: &str, tensor: &str) -> bool {
        let is_open = self.loaded.is_none() && self.alphas.is_empty();
        is_open || self.known_alphas(tensor).iter().any(|name| name == alpha)
    }

    /// Whether the config's alphas can be told apart as names of the slots: all of their own, or as many new ones.
    fn alphas_fit(&self, info: &AdapterInfo) -> bool {
        let n_own = info.slots.iter().filter(|slot| self.alphas.contains(&slot.name)).count();
        let n_slots = info.slots.len();
        self.alphas.is_empty() || (self.alphas.len() == n_slots && (n_own == 0 || n_own == n_slots))
    }

    /// One name for each slot: the config's by name where it lists the slots' own names, else by order.
    fn alpha_names(&self, info: &AdapterInfo) -> Vec<String> {
        let own = || info.slots.iter().map(|slot| slot.name.clone()).collect::<Vec<_>>();
        match self.alphas.is_empty() || own().iter().all(|name| self.alphas.contains(name)) {
            true => own(),
            false => self.alphas.clone(),
        }
    }

    /// As [`Self::alpha_names`], but a single slot without a name in the config goes by the tensor's.
    fn alphas_shown(&self, info: &AdapterInfo, tensor: &str) -> Vec<String> {
        match self.alphas.is_empty() && info.slots.len() == 1 {
            true => vec![tensor.to_owned()],
            false => self.alpha_names(info),
        }
    }

    fn check(&self, alpha: &str, value: f32, tensor: &str) -> Result<(), LoraError> {
        check_value(alpha, value)?;
        let known = self.known_alphas(tensor);
        match known.iter().any(|name| name == alpha) {
            true => Ok(()),
            false => Err(LoraError::UnknownAlpha { alpha: alpha.to_owned(), known }),
        }
    }

    fn slot_strengths(&self, info: &AdapterInfo, strengths: &Strengths) -> Vec<f32> {
        self.alpha_names(info).iter().map(|alpha| strengths.of(alpha)).collect()
    }

    /// `None` only while the adapter is not loaded.
    fn select(&self, strengths: &Strengths) -> Option<Selection> {
        let info = self.loaded.as_ref()?;
        let mut columns = vec![0.0; info.rank];
        for (slot, strength) in info.slots.iter().zip(self.slot_strengths(info, strengths)) {
            if let Some(part) = columns.get_mut(slot.columns.clone()) {
                part.fill(strength);
            }
        }
        let has_encodings = 0 < info.n_encodings;
        Some(Selection { name: self.name.clone(), columns, generation: info.generation, has_encodings })
    }
}

impl Strengths {
    fn set(&mut self, alpha: &str, value: f32, tensor: &str) {
        // Minus zero would be another number to the account of who made which row.
        let value = value + 0.0;
        if alpha == tensor {
            *self = Self { all: value, own: Vec::new() };
            return;
        }
        self.own.retain(|(name, _)| name != alpha);
        self.own.push((alpha.to_owned(), value));
    }

    fn of(&self, alpha: &str) -> f32 {
        self.own.iter().find(|(name, _)| name == alpha).map_or(self.all, |(_, value)| *value)
    }
}

impl Default for Strengths {
    fn default() -> Self {
        Self { all: 1.0, own: Vec::new() }
    }
}

impl Selection {
    /// What [`Engine::select_adapter`] takes.
    pub fn for_engine(&self) -> (&str, &[f32]) {
        (&self.name, &self.columns)
    }

    pub(crate) fn maker(&self) -> Maker {
        if !self.has_encodings && self.columns.iter().all(|strength| *strength == 0.0) {
            return Maker::Base;
        }
        let strengths = self.columns.iter().map(|strength| strength.to_bits()).collect();
        Maker::Adapter { generation: self.generation, strengths }
    }
}

impl AdapterChoice {
    /// An adapter with all strengths 1.
    pub fn named(name: &str) -> Self {
        Self::Named { name: name.to_owned(), strengths: Vec::new() }
    }

    /// The same with a strength set.
    #[must_use]
    pub fn at(mut self, alpha: &str, value: f32) -> Self {
        if let Self::Named { strengths, .. } = &mut self {
            strengths.push((alpha.to_owned(), value));
        }
        self
    }
}

/// `ADAPTER[,ALPHA,VALUE]...`, as Genie's tools take it.
impl FromStr for AdapterChoice {
    type Err = LoraError;

    fn from_str(text: &str) -> Result<Self, LoraError> {
        let wrong = || LoraError::Choice { found: text.to_owned() };
        let words: Vec<&str> = text.split(',').map(str::trim).collect();
        let (name, pairs) = words.split_first().ok_or_else(wrong)?;
        if words.iter().any(|word| word.is_empty()) || pairs.len() % 2 != 0 {
            return Err(wrong());
        }
        let pair = |pair: &[&str]| Ok((pair[0].to_owned(), pair[1].parse().map_err(|_| wrong())?));
        let strengths = pairs.chunks_exact(2).map(pair).collect::<Result<_, _>>()?;
        Ok(Self::Named { name: (*name).to_owned(), strengths })
    }
}

fn check_value(alpha: &str, value: f32) -> Result<(), LoraError> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(LoraError::Strength { alpha: alpha.to_owned(), value }),
    }
}
