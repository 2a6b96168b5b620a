//! The dialog: control flow of a conversation.
//!
//! A dialog keeps the tokens of its conversation in `history`. The engine's cache holds rows for the first
//! [`Engine::position`] of them, never for anything else; the rest is pending and is fed before anything is predicted.
//! So the last token of an answer, the end token among them, is part of the conversation at once and costs nothing
//! until the next query, which continues behind it, as chat templates expect. Going back is two truncations.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::Error;
use crate::adapters::{Adapters, LoraError};
use crate::config::{self, DialogConfig, KvReuse, LoraConfig, Settings};
use crate::engine::{Engine, EngineError, GraphAccount};
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::prompt::{ChatTemplate, Message, Prompt};
use crate::sampler::{Random, Sampler};
use crate::tokenizer::{Specials, Tokenizer};

mod basic;
mod lora;
mod output;
mod report;
mod signal;

use output::Output;
pub use report::{AppliedLora, Finish, Flow, QueryOptions, QueryReport, SentenceCode, Timings};
use signal::Running;
pub use signal::Signal;

/// A conversation with one model.
///
/// A call that fails, that is aborted before its first token or whose callback panics leaves the conversation as it was before
/// the call. A call that is aborted later keeps what was said up to then.
pub struct Dialog {
    settings: Settings,
    role: String,
    cache: KvCache,
    adapters: Adapters,
    kv_reuse: KvReuse,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    /// Where a template would have been, for the error that there is none.
    template_path: PathBuf,
    sampler: Sampler,
    /// Stop sequences that are control tokens: these have no text to be found in.
    stop_tokens: Vec<u32>,
    history: Vec<u32>,
    /// Length of the history before the open sentence, while one is open.
    open_from: Option<usize>,
    /// How to undo the call that runs.
    checkpoint: Option<Checkpoint>,
    signal: Signal,
}

/// The way back to the state before a call.
struct Checkpoint {
    /// Length of the part of the history that the call does not touch.
    kept: usize,
    /// What followed it.
    removed: Vec<u32>,
    random: Random,
}

/// What a call is given.
struct Call<'a> {
    ids: Vec<u32>,
    code: SentenceCode,
    options: &'a QueryOptions,
    started: Instant,
    /// From before the prompt is made into ids: whoever sees a call under way can end it.
    running: Running<'a>,
}

impl Dialog {
    /// Opens the model, the tokenizer and the chat template that `config` names, for this dialog alone: see [`Model`] for
    /// several over one. (`GenieDialog_create`)
    ///
    /// # Errors
    /// [`Error`] with what cannot be opened and why.
    pub fn new(config: DialogConfig) -> Result<Self, Error> {
        Model::open(config)?.dialog()
    }

    /// A dialog over a model that is open.
    pub(crate) fn over(model: &Model, settings: Settings) -> Result<Self, Error> {
        let config = model.config();
        let (engine, tokenizer) = (Box::new(model.engine()?), Arc::clone(model.tokenizer()));
        let mut dialog = Self::with_engine(settings, engine, tokenizer, model.template().cloned())?;
        dialog.set_lora(&config.engine.lora, config.engine.role.clone());
        dialog.template_path = ChatTemplate::config_path(&config.tokenizer_path);
        Ok(dialog)
    }

    /// A dialog over an engine that is open already, without adapters: see [`Dialog::add_adapter`].
    ///
    /// # Errors
    /// [`Error::Config`] if a setting is out of its range, [`Error::Engine`] if the engine's vocabulary is not the one that the
    /// settings state.
    pub fn with_engine(
        settings: Settings,
        engine: Box<dyn Engine>,
        tokenizer: Arc<Tokenizer>,
        template: Option<Arc<ChatTemplate>>,
    ) -> Result<Self, Error> {
        let role = "primary".to_owned();
        config::check_stop_sequences(&settings.stop_sequences).map_err(config::in_settings)?;
        if engine.n_vocab() != settings.context.n_vocab {
            let (config, model) = (settings.context.n_vocab.to_string(), engine.n_vocab().to_string());
            let why = EngineError::Mismatch { what: "context/n-vocab", config, model };
            return Err(Error::engine(&role, why));
        }
        let mut dialog = Self {
            sampler: Sampler::new(settings.sampler.clone()).map_err(config::in_settings)?,
            stop_tokens: Vec::new(),
            settings,
            adapters: Adapters::new(&LoraConfig::default(), &role),
            kv_reuse: KvReuse::Keep,
            role,
            cache: KvCache::new(engine),
            tokenizer,
            template,
            template_path: Path::new("tokenizer_config.json").to_owned(),
            history: Vec::new(),
            open_from: None,
            checkpoint: None,
            signal: Signal::new(),
        };
        dialog.find_stop_tokens();
        Ok(dialog)
    }

    /// Gives the model a raw prompt and streams its answer. (`GenieDialog_query`)
    ///
    /// Raw means as it is: no chat template is applied, and the text of a control token is that token. Only what the
    /// tokenizer opens every text with ([`Tokenizer::opening`], BOS with many models) is put before a prompt that opens a
    /// conversation, unless the prompt has it already. Text from people belongs into [`Dialog::chat`]. `callback` gets
    /// the answer in pieces of whole characters and may stop it.
    ///
    /// `code` says which part of a prompt this is:
    /// - [`SentenceCode::Complete`]: all of it; the conversation goes on behind what it holds.
    /// - [`SentenceCode::Begin`], [`SentenceCode::Continue`]: the first part, a further part. Only the cache is
    ///   filled; the callback is not called. The parts are encoded one by one.
    /// - [`SentenceCode::End`]: the last part; the model answers.
    /// - [`SentenceCode::Rewind`]: the whole conversation anew; what it has in common with the old one stays in the
    ///   cache, the rest of the old one is forgotten.
    /// - [`SentenceCode::Abort`]: gives the parts since `Begin` up; `prompt` is not looked at.
    ///
    /// The callback gets `Begin` with the first piece, `Continue` with further ones, `End` with the last, which may be
    /// empty, and `Abort` after an abort, with the text that was held back as a possible stop sequence. After it has
    /// returned [`Flow::Stop`] it is not called again.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] before any work if the prompt does not fit, [`Error::SentenceOrder`] for a code out
    /// of order, [`Error::EmptyPrompt`] if there is nothing to answer to, and what the tokenizer, the engine and the
    /// sampler report. The conversation is then as it was before the call.
    pub fn query(
        &mut self,
        prompt: &str,
        code: SentenceCode,
        callback: impl FnMut(&str, SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        self.query_with(prompt, code, &QueryOptions::default(), callback)
    }

    /// As [`Dialog::query`], with options for this query only.
    ///
    /// # Errors
    /// As [`Dialog::query`], and what [`Dialog::apply_lora`] reports for an adapter that the options name.
    pub fn query_with(
        &mut self,
        prompt: &str,
        code: SentenceCode,
        options: &QueryOptions,
        mut callback: impl FnMut(&str, SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        let (started, signal) = (Instant::now(), self.signal());
        let running = signal.begin();
        let ids = match code {
            SentenceCode::Abort => Vec::new(),
            _ => self.raw_ids(prompt, code)?,
        };
        let mut output = Output::text(&mut callback, &self.settings.stop_sequences);
        if self.ends_in_text(&ids) {
            output.go_on();
        }
        self.run(Call { ids, code, options, started, running }, output)
    }

    /// Gives the model a prompt of token ids and streams the ids of its answer. (`GenieDialog_tokenQuery`)
    ///
    /// As [`Dialog::query`], in ids: each id as soon as it is chosen, the end token and the tokens of a stop sequence
    /// included.
    ///
    /// # Errors
    /// As [`Dialog::query`], and [`Error::TokenOutOfRange`].
    pub fn token_query(
        &mut self,
        ids: &[u32],
        code: SentenceCode,
        callback: impl FnMut(&[u32], SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        self.token_query_with(ids, code, &QueryOptions::default(), callback)
    }

    /// As [`Dialog::token_query`], with options for this query only.
    ///
    /// # Errors
    /// As [`Dialog::token_query`] and [`Dialog::query_with`].
    pub fn token_query_with(
        &mut self,
        ids: &[u32],
        code: SentenceCode,
        options: &QueryOptions,
        mut callback: impl FnMut(&[u32], SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        let (started, signal) = (Instant::now(), self.signal());
        let running = signal.begin();
        let ids = ids.to_vec();
        let mut output = Output::ids(&mut callback, &self.settings.stop_sequences);
        if self.ends_in_text(&ids) {
            output.go_on();
        }
        self.run(Call { ids, code, options, started, running }, output)
    }

    /// Renders a whole conversation with the model's chat template and streams the answer to it.
    ///
    /// `messages` is everything said so far. What the conversation in the cache has in common with it is not computed
    /// again, so that one more turn costs that turn only. Text in a message never becomes a control token; what markup the
    /// role `assistant` may use is in [`ChatTemplate::render`]. The callback is that of [`Dialog::query`].
    ///
    /// # Errors
    /// As [`Dialog::query`], and [`Error::NoTemplate`], [`Error::Prompt`].
    pub fn chat(
        &mut self,
        messages: &[Message],
        callback: impl FnMut(&str, SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        self.chat_with(messages, &QueryOptions::default(), callback)
    }

    /// As [`Dialog::chat`], with options for this answer only.
    ///
    /// # Errors
    /// As [`Dialog::chat`] and [`Dialog::query_with`].
    pub fn chat_with(
        &mut self,
        messages: &[Message],
        options: &QueryOptions,
        mut callback: impl FnMut(&str, SentenceCode) -> Flow,
    ) -> Result<QueryReport, Error> {
        let (started, signal) = (Instant::now(), self.signal());
        let running = signal.begin();
        let ids = self.render(messages)?.ids;
        let output = Output::text(&mut callback, &self.settings.stop_sequences);
        self.run(Call { ids, code: SentenceCode::Rewind, options, started, running }, output)
    }

    /// The prompt that [`Dialog::chat`] would give the model.
    ///
    /// # Errors
    /// [`Error::NoTemplate`], [`Error::Prompt`].
    pub fn render(&self, messages: &[Message]) -> Result<Prompt, Error> {
        match &self.template {
            Some(template) => Ok(template.render(messages, &self.tokenizer)?),
            None => Err(Error::NoTemplate { wanted: self.template_path.clone() }),
        }
    }

    /// Forgets the conversation. The dialog is then as a new one with the same settings and the same adapter applied.
    /// (`GenieDialog_reset`)
    pub fn reset(&mut self) {
        self.history.clear();
        self.cache.rewind(0);
        self.open_from = None;
        self.sampler.reset();
    }

    /// A handle that aborts a running query from any thread.
    pub fn signal(&self) -> Signal {
        self.signal.clone()
    }

    /// Sets the most tokens of an answer. `u32::MAX` means no limit; 0 gives one token. (`GenieDialog_setMaxNumTokens`)
    pub fn set_max_num_tokens(&mut self, max_num_tokens: u32) {
        self.settings.max_num_tokens = max_num_tokens;
    }

    /// Sets the stop sequences: `{"stop-sequence": ["…"]}`. An empty text or `{}` gives none.
    /// (`GenieDialog_setStopSequence`)
    ///
    /// # Errors
    /// [`Error::Config`]; the old ones then stay.
    pub fn set_stop_sequence(&mut self, json: &str) -> Result<(), Error> {
        self.settings.stop_sequences = config::stop_sequences_from_json(json)?;
        self.find_stop_tokens();
        Ok(())
    }

    /// Changes the sampler: `{"sampler": {…}}`. Keys that are absent keep their value; a new seed takes effect at once.
    /// (`GenieSampler_applyConfig`)
    ///
    /// # Errors
    /// [`Error::Config`]; nothing has changed then.
    pub fn apply_sampler(&mut self, json: &str) -> Result<(), Error> {
        let sampler = config::sampler_from_json(json, &self.settings.sampler)?;
        self.sampler.apply(sampler.clone()).map_err(config::in_settings)?;
        self.settings.sampler = sampler;
        Ok(())
    }

    /// Keeps an account of where the engine's time goes, from zero and from now on; it costs a little time itself.
    pub fn start_account(&mut self) {
        self.cache.engine_mut().start_account();
    }

    /// Ends the account and gives it, one for each graph that ran.
    pub fn take_account(&mut self) -> Vec<GraphAccount> {
        self.cache.engine_mut().take_account()
    }

    /// Number of tokens of the conversation. (`GENIE_DIALOG_PARAM_CONTEXT_OCCUPANCY`)
    pub fn context_occupancy(&self) -> usize {
        self.history.len()
    }

    /// Number of tokens that a conversation may have: the config's `context/size`, or less if the model holds less.
    pub fn context_size(&self) -> usize {
        self.settings.context.size.min(self.cache.engine().context_size())
    }

    /// The tokens of the conversation.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// How the dialog behaves now.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The dialog's tokenizer. (`GenieDialog_getTokenizer`)
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    fn find_stop_tokens(&mut self) {
        let stops = self.settings.stop_sequences.iter();
        self.stop_tokens = stops.filter_map(|stop| self.tokenizer.control_token(stop)).collect();
    }

    /// The ids of a raw prompt.
    fn raw_ids(&self, prompt: &str, code: SentenceCode) -> Result<Vec<u32>, Error> {
        let mut ids = self.tokenizer.encode(prompt, Specials::Recognise)?;
        let is_first = match code {
            SentenceCode::Rewind => true,
            SentenceCode::Complete | SentenceCode::Begin => self.history.is_empty(),
            _ => false,
        };
        let opening = self.tokenizer.opening();
        if is_first && !ids.starts_with(opening) {
            ids.splice(0..0, opening.iter().copied());
        }
        Ok(ids)
    }

    /// Whether an answer to `ids` goes on in the middle of a text: no control token is before it. Not asked for a chat, where an
    /// answer begins whatever the template ends with.
    fn ends_in_text(&self, ids: &[u32]) -> bool {
        ids.last().or(self.history.last()).is_some_and(|id| !self.tokenizer.is_control(*id))
    }

    /// One call, from ids to report.
    fn run(&mut self, call: Call<'_>, mut output: Output<'_>) -> Result<QueryReport, Error> {
        let Call { ids, code, options, started, running } = call;
        self.check_order(code)?;
        if code == SentenceCode::Abort {
            return Ok(self.give_up(&mut output, started));
        }
        self.bind(options.adapter.as_ref())?;
        let mut report = QueryReport::new(started);
        self.append(ids, code, &mut report)?;
        let done = catch_unwind(AssertUnwindSafe(|| match code {
            SentenceCode::Begin | SentenceCode::Continue => self.prefill(running.cancel(), &mut report),
            _ => self.generate(running.cancel(), &mut output, &mut report),
        }));
        let done = done.unwrap_or_else(|panic| {
            // Most likely the callback's, and somebody may catch it and go on with the dialog.
            self.undo();
            resume_unwind(panic)
        });
        drop(running);
        report.timings.total = started.elapsed();
        match done {
            Err(error) if error.is_cancelled() => {
                self.undo();
                report.finish = Finish::Aborted;
                output.abort();
            }
            Err(error) => {
                self.undo();
                return Err(error);
            }
            Ok(()) => {
                let checkpoint = self.checkpoint.take();
                self.open_from = match code {
                    SentenceCode::Begin => checkpoint.map(|checkpoint| checkpoint.kept),
                    SentenceCode::Continue => self.open_from,
                    _ => None,
                };
            }
        }
        Ok(report)
    }

    fn check_order(&self, code: SentenceCode) -> Result<(), Error> {
        let problem = match (code, self.open_from) {
            (SentenceCode::Resume, _) => "is not supported yet",
            (SentenceCode::Continue | SentenceCode::End | SentenceCode::Abort, None) => "needs a Begin before it",
            (SentenceCode::Complete | SentenceCode::Begin | SentenceCode::Rewind, Some(_)) => {
                "came while a sentence is open, need Continue, End or Abort"
            }
            _ => return Ok(()),
        };
        Err(Error::SentenceOrder { code, problem })
    }

    /// Makes `ids` the end of the conversation, or all of it, and says in `report` what of it need not be computed.
    fn append(&mut self, ids: Vec<u32>, code: SentenceCode, report: &mut QueryReport) -> Result<(), Error> {
        let n_vocab = self.cache.engine().n_vocab();
        if let Some((index, &id)) = ids.iter().enumerate().find(|(_, id)| n_vocab <= **id as usize) {
            return Err(Error::TokenOutOfRange { index, id, n_vocab });
        }
        let common = match code {
            SentenceCode::Rewind => self.history.iter().zip(&ids).take_while(|(old, new)| old == new).count(),
            _ => 0,
        };
        let kept = if code == SentenceCode::Rewind { common } else { self.history.len() };
        let prompt = ids.len() - common;
        let (have, need) = (self.context_size(), kept + prompt);
        if have < need {
            return Err(Error::ContextExceeded { have, need, occupied: kept, prompt });
        }
        let will_generate = !matches!(code, SentenceCode::Begin | SentenceCode::Continue);
        if will_generate && need == 0 {
            return Err(Error::EmptyPrompt);
        }
        // To predict, at least one token must be fed, even if the cache has it.
        let cached = self.cache.position().min(if will_generate { kept.min(need - 1) } else { kept });
        let usable = self.usable_rows(cached, code)?;
        let removed = self.history.split_off(kept);
        self.checkpoint = Some(Checkpoint { kept, removed, random: self.sampler.random() });
        self.history.extend_from_slice(&ids[common..]);
        self.cache.rewind(usable);
        report.n_prompt_tokens = ids.len();
        report.n_cached_tokens = usable.min(common);
        report.n_recomputed_tokens = if common == 0 { cached - usable } else { 0 };
        report.n_foreign_rows = self.cache.foreign_rows();
        Ok(())
    }

    /// How many of the first `cached` rows a call may use, given what made them.
    fn usable_rows(&self, cached: usize, code: SentenceCode) -> Result<usize, Error> {
        let own = self.cache.own_rows().min(cached);
        match self.kv_reuse {
            KvReuse::Keep if code != SentenceCode::Rewind => Ok(cached),
            KvReuse::Keep | KvReuse::Prefill => Ok(own),
            KvReuse::Refuse if own == cached => Ok(own),
            KvReuse::Refuse => Err(LoraError::ForeignRows { n_rows: cached - own }.into()),
        }
    }

    /// Back to the state before a call that did not come to its end.
    fn undo(&mut self) {
        if let Some(Checkpoint { kept, removed, random }) = self.checkpoint.take() {
            self.history.truncate(kept);
            self.history.extend(removed);
            self.cache.rewind(kept);
            self.sampler.restore(random);
        }
    }

    /// Drops the open sentence.
    fn give_up(&mut self, output: &mut Output<'_>, started: Instant) -> QueryReport {
        let kept = self.open_from.take().unwrap_or(self.history.len());
        self.history.truncate(kept);
        self.cache.rewind(kept);
        output.abort();
        let mut report = QueryReport::new(started);
        report.finish = Finish::Aborted;
        report.timings.total = started.elapsed();
        report
    }
}

impl std::fmt::Debug for Dialog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Dialog");
        shown.field("settings", &self.settings).field("role", &self.role);
        shown.field("context_occupancy", &self.history.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
