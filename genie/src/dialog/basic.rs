//! Dialog type `basic`: one token at a time.
//!
//! ```text
//! repeat: feed what the cache lacks (first the prompt, then one token)
//!         choose a token, append it to the history
//!         until it is an end token, completes a stop sequence, is the last allowed, or has no room in the context
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::Error;
use crate::engine::{EngineError, Logits};

use super::output::Output;
use super::{Dialog, Finish, Flow, QueryReport};

impl Dialog {
    /// Fills the cache with what it lacks of the history.
    pub(super) fn prefill(&mut self, cancel: &AtomicBool, report: &mut QueryReport) -> Result<(), Error> {
        let pending = &self.history[self.cache.position()..];
        if !pending.is_empty() {
            let fail = |why| Error::engine(&self.role, why);
            self.cache.forward(pending, Logits::None, cancel).map_err(fail)?;
        }
        report.finish = Finish::PrefillOnly;
        report.timings.prompt_processing = report.timings.started.elapsed();
        Ok(())
    }

    /// Answers. `Err` with `Cancelled` means that not even the first token was reached.
    pub(super) fn generate(
        &mut self,
        cancel: &AtomicBool,
        output: &mut Output<'_>,
        report: &mut QueryReport,
    ) -> Result<(), Error> {
        let max_num_tokens = self.settings.max_num_tokens.max(1) as usize;
        let mut first_token_at = None;
        loop {
            let id = match self.step(cancel) {
                Err(error) if error.is_cancelled() && first_token_at.is_some() => {
                    report.finish = Finish::Aborted;
                    output.abort();
                    return Ok(());
                }
                chosen => chosen?,
            };
            let now = Instant::now();
            let first_token_at = *first_token_at.get_or_insert(now);
            report.timings.token(first_token_at, now);
            report.n_generated += 1;
            self.history.push(id);

            let is_eos = self.settings.context.eos_tokens.contains(&id);
            if !is_eos {
                output.add(id, &self.tokenizer);
            }
            let finish = if is_eos {
                Some(Finish::Eos)
            } else if output.is_stopped() || self.stop_tokens.contains(&id) {
                Some(Finish::StopSequence)
            } else if max_num_tokens <= report.n_generated {
                Some(Finish::Length)
            } else if self.context_size() < self.history.len() {
                Some(Finish::ContextExceeded)
            } else {
                None
            };
            if let Some(finish) = finish {
                report.finish = finish;
                output.finish(id);
                return Ok(());
            }
            if output.flush(id) == Flow::Stop {
                report.finish = Finish::Stopped;
                return Ok(());
            }
        }
    }

    /// Feeds what the cache lacks and chooses the next token.
    fn step(&mut self, cancel: &AtomicBool) -> Result<u32, Error> {
        let fail = |why| Error::engine(&self.role, why);
        if cancel.load(Ordering::Relaxed) {
            return Err(fail(EngineError::Cancelled));
        }
        let pending = &self.history[self.cache.position()..];
        let logits = self.cache.forward(pending, Logits::Last, cancel).map_err(fail)?;
        Ok(self.sampler.sample(logits, &self.history)?)
    }
}
