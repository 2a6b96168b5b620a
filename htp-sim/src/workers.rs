//! A resident team of threads for regions of a few microseconds.
//!
//! A region is published by raising an epoch. Threads that are awake join it and take items; the caller takes items too,
//! closes the region when none are left, and waits only for the threads that joined. A thread that is asleep or not
//! scheduled costs nothing but its help: the team works with more workers than cores.
//!
//! Each worker has a share of neighbouring items and takes those first: it streams through memory that lies together, and
//! the counter of its share stays in its own cache. Then it helps with the shares of the others. While it waits for the next region,
//! or for others to end this one, it asks for the memory that it was told it reads next (see `ahead`).
//!
//! ```text
//! caller: write job; state = (epoch + 1, open, 0 active); wake sleepers
//!         take items until none are left; state.open = false; wait until state.active = 0
//! thread: ask for memory, spin, then yield, then park until the epoch changes
//!         if state.open: state.active += 1 (one exchange with the epoch); take items; state.active -= 1
//! ```

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::{fmt, hint, io, ptr};

mod ahead;

use ahead::Ahead;
pub(crate) use ahead::{RANGES, Start};

/// A team of `n` workers: the calling thread and `n - 1` threads that wait for it.
///
/// The threads spin for up to 0.4 ms after each region and then sleep, so an idle team burns no CPU.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    region: Mutex<()>,
}

impl Workers {
    /// Starts the team. `n` counts the caller; 0 is taken as 1. Where the platform has no threads the team is the caller
    /// alone.
    ///
    /// # Errors
    /// The error of the operating system if a thread cannot be started.
    pub fn new(n: usize) -> io::Result<Self> {
        let n = n.clamp(1, MAX_WORKERS);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared::new(n, if n > cores { SPINS_OVERSUBSCRIBED } else { SPINS }));
        let mut team = Self { shared, threads: Vec::with_capacity(n - 1), region: Mutex::new(()) };
        for worker in 1..n {
            let shared = Arc::clone(&team.shared);
            let body = move || shared.serve(worker);
            match thread::Builder::new().name(format!("htp-sim-{worker}")).spawn(body) {
                Ok(thread) => team.threads.push(thread),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => break,
                Err(error) => return Err(error),
            }
        }
        // A thread allocates while it starts. When this returns all have, so that no step pays for it.
        while team.shared.started.load(Ordering::Acquire) < team.threads.len() {
            thread::yield_now();
        }
        Ok(team)
    }

    /// Workers in the team, the caller included.
    pub fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Parallel regions so far, those that ran inline not counted.
    pub fn n_regions(&self) -> u64 {
        self.shared.state.load(Ordering::Relaxed) / EPOCH
    }

    /// Calls `f(item, worker)` once for each item in `0..n_items`, on any worker in any order; returns when all are done.
    ///
    /// Allocates nothing. Calls from several threads run one after the other; a call from inside `f` runs inline on the
    /// worker that makes it. `f` may call another team, as long as nothing that runs on that one calls this: the two would
    /// wait for each other for ever.
    ///
    /// # Panics
    /// If there are more than 2^27 items. If `f` panics, the remaining items are dropped and the first panic is resumed here.
    pub fn for_each(&self, n_items: usize, f: impl Fn(usize, usize) + Sync) {
        self.for_each_then(n_items, f, || ());
    }

    /// As [`for_each`](Self::for_each); each worker calls `leave` after its last item, also if that panics.
    pub(crate) fn for_each_then(&self, n_items: usize, f: impl Fn(usize, usize) + Sync, leave: fn()) {
        if let Some(worker) = self.current_worker() {
            let _leave = Leave(leave);
            (0..n_items).for_each(|item| f(item, worker));
            return;
        }
        if n_items == 0 {
            return;
        }
        assert!(n_items <= MAX_ITEMS, "{n_items} items, at most {MAX_ITEMS}");
        // A panic in a region is resumed after the guard's region has been closed, so a poisoned lock means no harm.
        let _serialised = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        if n_items == 1 || self.threads.is_empty() {
            let (_identity, _leave) = (Identity::enter(&self.shared, 0), Leave(leave));
            (0..n_items).for_each(|item| f(item, 0));
            return;
        }
        let run = |worker: usize| {
            let (_identity, _leave) = (Identity::enter(&self.shared, worker), Leave(leave));
            self.shared.take_items(n_items, worker, |item| f(item, worker));
        };
        self.shared.open(&run);
        for (i, thread) in self.threads.iter().enumerate().take(n_items - 1) {
            self.shared.wake(i + 1, thread);
        }
        self.shared.run_caught(&run, 0);
        self.shared.close();
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Tells `worker` what it asks for while it waits, instead of what it was told before: `ranges`, then the start of its share.
    pub(crate) fn set_ahead(&self, worker: usize, ranges: [&[u8]; RANGES], start: &Start) {
        self.shared.ahead[worker].set(ranges, start);
    }

    /// Where the next lines are that `worker` would ask for.
    #[cfg(test)]
    pub(crate) fn next_ahead(&self, worker: usize) -> Option<usize> {
        self.shared.ahead[worker].next().map(|(at, _)| at)
    }

    /// The number of the worker of this team that is running this code, if any is.
    fn current_worker(&self) -> Option<usize> {
        let (team, worker) = IDENTITY.get();
        ptr::eq(team, Arc::as_ptr(&self.shared)).then_some(worker)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.shared.state.fetch_add(EPOCH, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread cannot panic outside the caught body; if it did, there is nothing left to do about it here.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("count", &self.count()).finish_non_exhaustive()
    }
}

/// What the caller and the threads share. The hot words have a cache line each.
struct Shared {
    state: Line<AtomicU64>,
    /// The share of each worker.
    shares: Box<[Line<Share>]>,
    /// What each worker reads next.
    ahead: Box<[Line<Ahead>]>,
    /// Threads that sleep or are about to: lets a busy team skip the system call.
    asleep: Line<[AtomicBool; MAX_WORKERS]>,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    quit: AtomicBool,
    started: AtomicUsize,
    spins: u32,
    #[cfg(test)]
    n_pauses: AtomicU64,
}

#[repr(align(128))]
struct Line<T>(T);

impl<T> std::ops::Deref for Line<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// How many items of a worker's share have been taken: the epoch, and the number below it. A number of another epoch is none
/// yet, so that nobody has to reset the shares of others when a region opens. Epochs repeat after 2^36
/// regions: a share would have to be without items for all of these, days of them, and get some in the very next.
struct Share(AtomicU64);

impl Share {
    /// The next of the `len` items, in a region that stays open as long as this runs.
    fn take(&self, epoch: u64, len: usize) -> Option<usize> {
        let tag = epoch << ITEM_BITS;
        let mut seen = self.0.load(Ordering::Relaxed);
        while seen & !MAX_TAKEN != tag {
            if len == 0 {
                return None;
            }
            match self.0.compare_exchange(seen, tag | 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(0),
                Err(now) => seen = now,
            }
        }
        if (seen & MAX_TAKEN) as usize >= len {
            return None;
        }
        let item = (self.0.fetch_add(1, Ordering::Relaxed) & MAX_TAKEN) as usize;
        (item < len).then_some(item)
    }

    /// Drops what is left in this epoch.
    fn abandon(&self, epoch: u64) {
        self.0.store((epoch << ITEM_BITS) | MAX_ITEMS as u64, Ordering::Relaxed);
    }
}

/// A borrowed closure without its type and lifetime.
#[derive(Clone, Copy)]
struct Job {
    closure: *const (),
    call: unsafe fn(*const (), usize),
}

// SAFETY: `job` is the only part that is not `Sync` by itself. It is written by the caller while the region is closed and
// no thread is active, and read by threads that joined an open region: `state` orders the two.
unsafe impl Sync for Shared {}
// SAFETY: as above; a `Job` points to a `Sync` closure, which may be called from any thread.
unsafe impl Send for Shared {}

impl Shared {
    fn new(n_workers: usize, spins: u32) -> Self {
        Self {
            state: Line(AtomicU64::new(0)),
            shares: (0..n_workers).map(|_| Line(Share(AtomicU64::new(0)))).collect(),
            ahead: (0..n_workers).map(|_| Line(Ahead::default())).collect(),
            asleep: Line([const { AtomicBool::new(false) }; MAX_WORKERS]),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            quit: AtomicBool::new(false),
            started: AtomicUsize::new(0),
            spins,
            #[cfg(test)]
            n_pauses: AtomicU64::new(0),
        }
    }

    /// Publishes `run` as the job of a new epoch.
    fn open<F: Fn(usize) + Sync>(&self, run: &F) {
        /// # Safety
        /// `closure` points to a live `F`.
        unsafe fn call<F: Fn(usize)>(closure: *const (), worker: usize) {
            // SAFETY: the caller's promise.
            unsafe { (*closure.cast::<F>())(worker) }
        }
        let job = Job { closure: ptr::from_ref(run).cast(), call: call::<F> };
        // SAFETY: the last region was closed and no thread is active, so nobody reads `job` now.
        unsafe { *self.job.get() = Some(job) };
        let epoch = self.state.load(Ordering::Relaxed) & !(EPOCH - 1);
        self.state.store(epoch.wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
    }

    /// Lets nobody join any more and waits for those who did.
    fn close(&self) {
        let mut state = self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while state & ACTIVE != 0 {
            if self.ahead[0].ask() {
                // Waiting was of use.
            } else if spins < self.spins.min(CLOSE_SPINS) {
                spins += 1;
                self.pause();
            } else {
                thread::yield_now();
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    fn wake(&self, worker: usize, thread: &JoinHandle<()>) {
        if self.asleep[worker].load(Ordering::SeqCst) && self.asleep[worker].swap(false, Ordering::SeqCst) {
            thread.thread().unpark();
        }
    }

    /// Runs `f` for the items of `worker`'s share, then for what is left of the others'. The caller has the region open.
    fn take_items(&self, n_items: usize, worker: usize, f: impl Fn(usize)) {
        let epoch = self.epoch();
        for owner in (worker..self.shares.len()).chain(0..worker) {
            let (first, len) = share(n_items, self.shares.len(), owner);
            while let Some(item) = self.shares[owner].take(epoch, len) {
                f(first + item);
            }
        }
    }

    /// Runs `run(worker)`; keeps the first panic and drops the remaining items. By reference: others may have the address of `run`, which
    /// has to live until the region is closed.
    fn run_caught(&self, run: &impl Fn(usize), worker: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(worker))) {
            self.shares.iter().for_each(|share| share.abandon(self.epoch()));
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// The epoch of the region that the calling thread is in, cut to what a share holds.
    fn epoch(&self) -> u64 {
        (self.state.load(Ordering::Relaxed) / EPOCH) & (u64::MAX >> ITEM_BITS)
    }

    /// A thread's life.
    fn serve(&self, worker: usize) {
        self.started.fetch_add(1, Ordering::Release);
        let mut seen = 0;
        loop {
            self.wait_for_other_epoch(seen, worker);
            // `drop` sets `quit` before it raises the epoch, so the state is read first: whoever sees that epoch sees `quit`.
            // The other way round a thread could take the last epoch for one without work and wait for another for ever.
            let state = self.state.load(Ordering::Acquire);
            if self.quit.load(Ordering::SeqCst) {
                return;
            }
            if state & OPEN == 0 {
                seen = state / EPOCH;
            } else if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                seen = state / EPOCH;
                // SAFETY: this thread is active in an open region, so `job` was written before and is not written now.
                let job = unsafe { *self.job.get() };
                if let Some(job) = job {
                    // SAFETY: the closure lives until the caller's `close` returns, which waits for this thread.
                    self.run_caught(&|worker| unsafe { (job.call)(job.closure, worker) }, worker);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Keeps the core for a moment.
    fn pause(&self) {
        #[cfg(test)]
        self.n_pauses.fetch_add(1, Ordering::Relaxed);
        hint::spin_loop();
    }

    /// Returns when the epoch is not `seen`: asks for what is read next, spins, then gives way, then sleeps.
    fn wait_for_other_epoch(&self, seen: u64, worker: usize) {
        while self.ahead[worker].ask() {
            if self.state.load(Ordering::Relaxed) / EPOCH != seen {
                return;
            }
        }
        for i in 0..self.spins + YIELDS {
            if self.state.load(Ordering::Relaxed) / EPOCH != seen {
                return;
            }
            if i < self.spins { self.pause() } else { thread::yield_now() }
        }
        loop {
            // The order of these two, and of their opposites in `open` and `wake`, is what makes a wake-up impossible to
            // miss. Said again before each sleep: a late `wake` of a region that is over takes it back.
            self.asleep[worker].store(true, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) / EPOCH != seen {
                break;
            }
            thread::park();
        }
        self.asleep[worker].store(false, Ordering::SeqCst);
    }
}

/// The first of the items that are `worker`'s in a team of `n`, and their number.
pub(crate) fn share(n_items: usize, n: usize, worker: usize) -> (usize, usize) {
    let (len, n_longer) = (n_items / n, n_items % n);
    (worker * len + worker.min(n_longer), len + usize::from(worker < n_longer))
}

/// Calls its function in the end.
struct Leave(fn());

impl Drop for Leave {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// While it lives, the current thread is known as a worker of a team.
struct Identity {
    before: (*const Shared, usize),
}

impl Identity {
    fn enter(team: &Arc<Shared>, worker: usize) -> Self {
        Self { before: IDENTITY.replace((Arc::as_ptr(team), worker)) }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        IDENTITY.set(self.before);
    }
}

thread_local! {
    static IDENTITY: Cell<(*const Shared, usize)> = const { Cell::new((ptr::null(), 0)) };
}

/// Workers in the largest team.
pub const MAX_WORKERS: usize = 256;

/// Pauses before a waiting thread gives way: 0.1 to 0.4 ms, longer than the gaps inside a decode step and that between two, where a
/// token is chosen. (To wake a thread that sleeps took the caller 40 µs on a virtual machine, and the first region was then without it.)
const SPINS: u32 = 10_000;

/// The same for the caller at the end of a region: who joined it and does not come has lost its core.
const CLOSE_SPINS: u32 = 2000;

/// The same when there are more workers than cores: whoever spins then keeps another from working.
const SPINS_OVERSUBSCRIBED: u32 = 20;

/// Times that a waiting thread gives way before it sleeps.
const YIELDS: u32 = 8;

/// `Shared::state`: threads inside the region, whether it may be joined, and the epoch above.
const ACTIVE: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
const EPOCH: u64 = 1 << 17;

/// Bits of a share's number of items: one more than [`MAX_ITEMS`] needs, so that workers who find nothing cannot overflow it.
const ITEM_BITS: u32 = 28;
const MAX_TAKEN: u64 = (1 << ITEM_BITS) - 1;

/// Items of one region.
const MAX_ITEMS: usize = 1 << 27;

#[cfg(test)]
mod tests;
