//! Aborting a query from another thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A handle to a dialog that any thread may hold. (`GenieDialog_signal`)
#[derive(Debug, Clone)]
pub struct Signal {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Read by the engine, at every token and inside a long prompt.
    cancel: AtomicBool,
    /// Taken at the start and the end of a call only, so that an abort hits the query it was meant for or none.
    is_running: Mutex<bool>,
}

/// A query that runs, until this is dropped.
#[derive(Debug)]
pub(super) struct Running<'a> {
    shared: &'a Shared,
}

impl Signal {
    pub(super) fn new() -> Self {
        Self { shared: Arc::new(Shared { cancel: AtomicBool::new(false), is_running: Mutex::new(false) }) }
    }

    /// Ends the running query within one token, inside its prompt too, and before its prompt if that is still being made.
    /// Returns whether a query was running; if none was, nothing happens, and the next query is not touched.
    pub fn abort(&self) -> bool {
        let is_running = self.shared.lock();
        if *is_running {
            self.shared.cancel.store(true, Ordering::Relaxed);
        }
        *is_running
    }

    pub(super) fn begin(&self) -> Running<'_> {
        let mut is_running = self.shared.lock();
        self.shared.cancel.store(false, Ordering::Relaxed);
        *is_running = true;
        Running { shared: &self.shared }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running<'_> {
    pub(super) fn cancel(&self) -> &AtomicBool {
        &self.shared.cancel
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.shared.lock() = false;
    }
}
