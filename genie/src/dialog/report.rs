//! What goes into a query besides the prompt, and what comes out besides the answer.

use std::time::{Duration, Instant};

use crate::Code;
use crate::adapters::AdapterChoice;
use crate::engine::AdapterInfo;

/// Which part of a prompt or of an answer this is. (`GenieDialog_SentenceCode_t`)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum SentenceCode {
    /// In: the whole prompt.
    Complete = 0,
    /// In: the first part of a prompt. Out: the first piece of an answer.
    Begin = 1,
    /// In: a further part. Out: a further piece.
    Continue = 2,
    /// In: the last part. Out: the last piece.
    End = 3,
    /// In: gives up the parts so far. Out: the answer was aborted.
    Abort = 4,
    /// In: the whole conversation anew.
    Rewind = 5,
    /// In: goes on with a paused query. Not supported yet.
    Resume = 6,
}

/// What holds for one query only.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct QueryOptions {
    /// What it runs with; `None` is what is applied to the dialog.
    pub adapter: Option<AdapterChoice>,
}

/// What was applied. (`GenieDialog_applyLora`)
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AppliedLora {
    /// The account of the adapter: targets, rank, scale of each slot, bytes, time to load.
    pub info: AdapterInfo,
    /// Its strengths by alpha, one for each slot.
    pub strengths: Vec<(String, f32)>,
    /// Whether it had to be loaded first.
    pub was_loaded: bool,
    /// When the call came.
    pub started: Instant,
    /// How long it took, loading included.
    pub time: Duration,
}

/// What a callback wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// More.
    Continue,
    /// No more. What was said so far stays in the conversation.
    Stop,
}

/// Why a query ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Finish {
    /// The model chose an end token.
    Eos,
    /// The answer has as many tokens as it may have.
    Length,
    /// A stop sequence appeared.
    StopSequence,
    /// The callback wanted no more.
    Stopped,
    /// A signal aborted it.
    Aborted,
    /// The context is full: the last token has no room in it.
    ContextExceeded,
    /// Nothing was to be generated.
    PrefillOnly,
}

/// How a query went.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct QueryReport {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub n_prompt_tokens: usize,
    /// Those of them that were in the cache already.
    pub n_cached_tokens: usize,
    /// Tokens of the conversation that were computed again because another adapter or strength had made their rows.
    pub n_recomputed_tokens: usize,
    /// Rows that another adapter or strength made and that this query went on behind.
    pub n_foreign_rows: usize,
    /// Tokens of the answer, an end token included.
    pub n_generated: usize,
    /// How long it took.
    pub timings: Timings,
}

/// How long a query took. All by a clock that never goes back.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Timings {
    /// When the query was called.
    pub started: Instant,
    /// From the call to the end.
    pub total: Duration,
    /// From the call to the first token, or to the end of a query that only fills the cache.
    pub prompt_processing: Duration,
    /// From the first token to the last.
    pub token_generation: Duration,
}

impl QueryOptions {
    /// With this adapter, or with the base, whatever is applied to the dialog.
    #[must_use]
    pub fn with_adapter(mut self, adapter: AdapterChoice) -> Self {
        self.adapter = Some(adapter);
        self
    }
}

impl QueryReport {
    pub(crate) fn new(started: Instant) -> Self {
        Self {
            finish: Finish::PrefillOnly,
            n_prompt_tokens: 0,
            n_cached_tokens: 0,
            n_recomputed_tokens: 0,
            n_foreign_rows: 0,
            n_generated: 0,
            timings: Timings {
                started,
                total: Duration::ZERO,
                prompt_processing: Duration::ZERO,
                token_generation: Duration::ZERO,
            },
        }
    }

    /// The status code of this end: a warning for an abort and for a full context.
    pub fn code(&self) -> Code {
        self.finish.code()
    }

    /// From the call to the first token, if there is one.
    pub fn time_to_first_token(&self) -> Option<Duration> {
        (0 < self.n_generated).then_some(self.timings.prompt_processing)
    }

    /// Tokens that were computed before the first one was chosen, per second.
    pub fn prompt_rate_tokens_per_s(&self) -> Option<f64> {
        rate(self.n_prompt_tokens - self.n_cached_tokens + self.n_recomputed_tokens, self.timings.prompt_processing)
    }

    /// Tokens behind the first one, per second.
    pub fn generation_rate_tokens_per_s(&self) -> Option<f64> {
        rate(self.n_generated.saturating_sub(1), self.timings.token_generation)
    }
}

impl Timings {
    pub(super) fn token(&mut self, first_at: Instant, at: Instant) {
        self.prompt_processing = first_at - self.started;
        self.token_generation = at - first_at;
    }
}

fn rate(n: usize, time: Duration) -> Option<f64> {
    (0 < n && !time.is_zero()).then(|| n as f64 / time.as_secs_f64())
}
