//! A deterministic engine for tests: its logits are a function of the token history.
//!
//! One changed, missing or stale token in the cache changes every logit that follows, so that a mistake in rewinding or
//! in the order of calls shows in the text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::{AdapterError, AdapterInfo, AdapterSlot, AdapterSource, Engine, EngineError, Logits};

/// The scripted engine.
pub struct Scripted {
    n_vocab: usize,
    context_size: usize,
    cache: Vec<u32>,
    logits: Vec<f32>,
    script: Box<Script>,
    step_delay: Duration,
    /// Names of the loaded adapters and a number that tells name and source.
    adapters: Vec<(String, u32)>,
    n_loads: u64,
    /// What the selected adapter and its strengths add to every token: as if it changed the cache row.
    mark: u32,
    on_load: Box<dyn FnMut() + Send>,
    consumed: Arc<AtomicUsize>,
}

/// Fills the logits (all zero when it is called) for the token that follows a history.
pub type Script = dyn FnMut(&[u32], &mut [f32]) + Send;

impl Scripted {
    /// An engine whose logits are pseudo-random numbers in `-4..4`, seeded with the whole history.
    pub fn hashed(n_vocab: usize, context_size: usize) -> Self {
        Self::new(n_vocab, context_size, Box::new(hashed_logits))
    }

    /// An engine that answers with `reply`, greedily, after a prompt of whatever length, and then with `eos` for ever.
    ///
    /// The place in the reply is the length of the longest part of it that the history ends with.
    pub fn replying(n_vocab: usize, context_size: usize, reply: &[u32], eos: u32) -> Self {
        let reply = reply.to_vec();
        Self::new(
            n_vocab,
            context_size,
            Box::new(move |history, logits| {
                let done = (0..=reply.len()).rev().find(|&n| history.ends_with(&reply[..n])).unwrap_or(0);
                logits[reply.get(done).copied().unwrap_or(eos) as usize] = 1.0;
            }),
        )
    }

    /// An engine with logits of the caller's own.
    pub fn new(n_vocab: usize, context_size: usize, script: Box<Script>) -> Self {
        Self {
            n_vocab,
            context_size,
            cache: Vec::new(),
            logits: Vec::new(),
            script,
            step_delay: Duration::ZERO,
            adapters: Vec::new(),
            n_loads: 0,
            mark: 0,
            on_load: Box::new(|| ()),
            consumed: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// Makes every token take `delay`, so that a test can cancel in the middle.
    pub fn with_delay(mut self, delay: Duration) -> Self {
        self.step_delay = delay;
        self
    }

    /// Calls `hook` before an adapter is loaded, so that a test can come in between.
    pub fn with_load_hook(mut self, hook: impl FnMut() + Send + 'static) -> Self {
        self.on_load = Box::new(hook);
        self
    }

    /// Counts all tokens ever consumed: what a query really cost.
    pub fn consumed(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.consumed)
    }
}

impl Engine for Scripted {
    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn context_size(&self) -> usize {
        self.context_size
    }

    fn position(&self) -> usize {
        self.cache.len()
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.cache.len(), "rewind to {position} of {}", self.cache.len());
        self.cache.truncate(position);
    }

    fn forward(&mut self, ids: &[u32], logits: Logits, cancel: &AtomicBool) -> Result<&[f32], EngineError> {
        let need = self.cache.len() + ids.len();
        if self.context_size < need {
            return Err(EngineError::ContextExceeded { have: self.context_size, need });
        }
        self.logits.clear();
        for (i, &id) in ids.iter().enumerate() {
            if self.n_vocab <= id as usize {
                return Err(EngineError::TokenOutOfRange { id, n_vocab: self.n_vocab });
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(EngineError::Cancelled);
            }
            std::thread::sleep(self.step_delay);
            self.cache.push(id ^ self.mark);
            self.consumed.fetch_add(1, Ordering::Relaxed);
            if logits == Logits::All || (logits == Logits::Last && i + 1 == ids.len()) {
                let start = self.logits.len();
                self.logits.resize(start + self.n_vocab, 0.0);
                (self.script)(&self.cache, &mut self.logits[start..]);
            }
        }
        Ok(&self.logits)
    }

    /// Anything loads but a source without any files: the adapter is its name and its source. It has two slots of one
    /// column each, `first` and `second`.
    fn load_adapter(&mut self, name: &str, source: &AdapterSource) -> Result<AdapterInfo, EngineError> {
        if *source == AdapterSource::Sections(Vec::new()) {
            let why = AdapterError::SectionCount { have: 0, want: 1 };
            return Err(EngineError::Adapter { name: name.to_owned(), path: None, why: Box::new(why) });
        }
        (self.on_load)();
        self.unload_adapter(name);
        self.n_loads += 1;
        self.adapters.push((name.to_owned(), hash(7, format!("{name} {source:?}").bytes().map(u32::from))));
        let slot = |name: &str, at: usize| AdapterSlot { name: name.to_owned(), columns: at..at + 1, scaling: None };
        Ok(AdapterInfo {
            name: name.to_owned(),
            targets: 1,
            rank: 2,
            slots: vec![slot("first", 0), slot("second", 1)],
            size_bytes: 0,
            n_encodings: 0,
            group: None,
            load_time: Duration::ZERO,
            generation: self.n_loads,
        })
    }

    fn unload_adapter(&mut self, name: &str) -> bool {
        let before = self.adapters.len();
        self.adapters.retain(|(known, _)| known != name);
        self.adapters.len() < before
    }

    fn select_adapter(&mut self, selection: Option<(&str, &[f32])>) -> Result<(), EngineError> {
        let Some((name, strengths)) = selection else {
            self.mark = 0;
            return Ok(());
        };
        let Some((_, seed)) = self.adapters.iter().find(|(known, _)| known == name) else {
            let loaded = self.adapters.iter().map(|(name, _)| name.clone()).collect();
            return Err(EngineError::UnknownAdapter { name: name.to_owned(), loaded });
        };
        let is_base = strengths.iter().all(|strength| *strength == 0.0);
        let mark = hash(*seed, strengths.iter().map(|strength| strength.to_bits()));
        self.mark = if is_base { 0 } else { mark | 1 << 31 };
        Ok(())
    }
}

fn hash(seed: u32, words: impl Iterator<Item = u32>) -> u32 {
    words.fold(seed, |hash, word| (hash ^ word).wrapping_mul(0x0100_0193).rotate_left(7))
}

/// The logits of [`Scripted::hashed`].
pub(crate) fn hashed_logits(history: &[u32], logits: &mut [f32]) {
    let seed = history.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &id| {
        (hash ^ u64::from(id)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    });
    for (i, logit) in logits.iter_mut().enumerate() {
        let mixed = (seed ^ (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53) >> 40;
        *logit = mixed as f32 / (1 << 24) as f32 * 8.0 - 4.0;
    }
}
