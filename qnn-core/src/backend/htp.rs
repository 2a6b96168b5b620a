//! The fast backend: lowers a graph to a list of steps, fuses, places buffers, and calls `htp-sim`.
//!
//! ```text
//! Graph ──lower──► steps over virtual buffers ──place──► steps over few real buffers ──run──► htp-sim
//!          fuse: norm + quantize · q,k,v in one call · gate·up · residual add · rope in place
//! ```

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering},
};
use std::time::Instant;

use htp_sim::{Cx, Grid, Kernels, QuantizedRows, ShapeError, Starts, Workers};

use crate::{
    adapter::{Adapter, AdapterGroup},
    graph::Graph,
};

use super::{
    Account, Backend, Bindings, Executable, ExecuteError, PrepareError, State, check_frequencies, state::CacheForm,
    watch::Watch,
};

mod floats;
mod lower;
mod meter;
mod pack;
mod place;
mod run;
mod step;

pub(crate) use pack::Packing;
pub use pack::{pack_constant, pack_update};

use floats::Floats;
use meter::{Cost, Meter};
use place::Plan;
use run::Resolved;

/// The backend over the kernels of `htp-sim`. Clones share one worker team.
#[derive(Clone)]
pub struct HtpBackend {
    kernels: &'static Kernels,
    workers: Arc<Workers>,
}

impl HtpBackend {
    /// A backend with a team of `n_threads` workers, the calling thread included, and the best kernels of this CPU
    /// (`HTP_SIM_ISA` may lower that).
    ///
    /// # Errors
    /// Whatever the system says when a thread cannot be started; kernels that `HTP_SIM_ISA` names and this CPU does not have.
    pub fn new(n_threads: usize) -> std::io::Result<HtpBackend> {
        let unsupported = |why| std::io::Error::new(std::io::ErrorKind::Unsupported, why);
        HtpBackend::with_kernels(n_threads, Kernels::selected().map_err(unsupported)?)
    }

    /// As [`HtpBackend::new`], with kernels of choice.
    ///
    /// # Errors
    /// Whatever the system says when a thread cannot be started.
    pub fn with_kernels(n_threads: usize, kernels: &'static Kernels) -> std::io::Result<HtpBackend> {
        Ok(HtpBackend { kernels, workers: Arc::new(Workers::new(n_threads)?) })
    }

    /// The kernels and workers, for offline work outside of a graph.
    pub(crate) fn cx(&self) -> Cx<'_> {
        Cx { kernels: self.kernels, workers: &self.workers }
    }

    /// Name of the kernels in use.
    pub fn kernels(&self) -> &'static str {
        self.kernels.name
    }
}

/// Which tensors of `graph` this backend computes as such, by their index: the others are fused away, and static encodings
/// on them would only undo that.
///
/// # Errors
/// [`PrepareError`] naming the node or tensor that this backend cannot run.
pub fn surviving_tensors(graph: &Graph) -> Result<Vec<bool>, PrepareError> {
    lower::surviving(graph)
}

impl Backend for HtpBackend {
    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Executable>, PrepareError> {
        check_frequencies(graph)?;
        let lowered = lower::lower(graph)?;
        for weights in &lowered.summed {
            let refused = |why: ShapeError| PrepareError::Tensor {
                tensor: format!("sums of weights {:?}", weights.layout()),
                why: why.to_string(),
            };
            weights.sum_rows(&self.cx()).map_err(refused)?;
        }
        let plan = place::place(lowered);
        plan.check_memory(graph.name())?;
        Ok(Box::new(Htp::new(self.clone(), plan)?))
    }

    fn new_state(&self, graphs: &[&Graph], capacity: usize) -> Result<State, PrepareError> {
        State::new(graphs, capacity, CacheForm::Kernels { n_workers: self.workers.count() })
    }
}

/// A plan with the memory it runs in.
struct Htp {
    backend: HtpBackend,
    plan: Plan,
    memory: Memory,
    /// Index of each of the plan's slots among `names`, the updatable tensors of the context last run with.
    slots: Vec<usize>,
    names: Option<Arc<[String]>>,
    /// The adapter that `grids` belong to, and its group. Weak, so that what nobody else holds gives its memory back; as long as
    /// these are here no other one gets their addresses.
    adapter: Weak<Adapter>,
    group: Weak<AdapterGroup>,
    /// Its own grid of each of the plan's updatable encodings.
    grids: Vec<Option<Grid>>,
    /// Index in the state of each of the plan's caches, and the names of the state last run with.
    caches: Vec<usize>,
    cache_names: Option<Arc<[String]>>,
    /// Where workers start to read, by the number of the step.
    starts: Starts,
    /// The account, while one is kept.
    meter: Option<Meter>,
}

/// Scratch memory of one executable, allocated when it is prepared.
struct Memory {
    floats: Vec<Floats>,
    quantized: Vec<QuantizedRows>,
}

impl Htp {
    fn new(backend: HtpBackend, plan: Plan) -> Result<Htp, PrepareError> {
        let floats = plan.float_capacity.iter().map(|n| Floats::with_capacity(*n)).collect();
        let quantized = plan.quantized.iter().map(|q| q.allocate()).collect::<Result<_, _>>()?;
        let (slots, names, grids) = (Vec::new(), None, vec![None; plan.grid_slots.len()]);
        let memory = Memory { floats, quantized };
        let mut starts = Starts::new(&backend.workers);
        plan.steps.iter().for_each(|step| run::push_start(&mut starts, step));
        let (adapter, group) = (Weak::new(), Weak::new());
        let (caches, cache_names, meter) = (Vec::new(), None, None);
        Ok(Htp { backend, plan, memory, slots, names, adapter, group, grids, caches, cache_names, starts, meter })
    }
}

impl Htp {
    /// Looks the slots up in the list of an adapter's tensors. Adapters of one context share their list, so this is
    /// done once, not at every swap.
    fn resolve(&mut self, names: &Arc<[String]>) -> Result<(), ExecuteError> {
        if self.names.as_ref().is_some_and(|known| Arc::ptr_eq(known, names)) {
            return Ok(());
        }
        let find = |slot: &String| {
            names.binary_search(slot).map_err(|_| ExecuteError::State {
                tensor: slot.clone(),
                why: "the adapter belongs to a context without this tensor".to_owned(),
            })
        };
        self.slots = self.plan.slots.iter().map(find).collect::<Result<_, _>>()?;
        self.names = Some(Arc::clone(names));
        Ok(())
    }

    /// Looks the caches up in a state, when it is another than before.
    fn find_caches(&mut self, state: &State) -> Result<(), ExecuteError> {
        if self.cache_names.as_ref().is_some_and(|known| Arc::ptr_eq(known, state.names())) {
            return Ok(());
        }
        let find = |name: &String| {
            state.kernel_cache_number(name).ok_or_else(|| ExecuteError::State {
                tensor: name.clone(),
                why: "no cache of this backend has this name".to_owned(),
            })
        };
        self.caches = self.plan.cache_names.iter().map(find).collect::<Result<_, _>>()?;
        self.cache_names = Some(Arc::clone(state.names()));
        Ok(())
    }

    /// Takes over what an adapter has of its own beside its values, when it is another than before.
    fn adopt(&mut self, adapter: &Arc<Adapter>) -> Result<(), ExecuteError> {
        let nothing = self.plan.grid_slots.is_empty() && self.plan.summed_slots.is_empty();
        if nothing || self.adapter.as_ptr() == Arc::as_ptr(adapter) {
            return Ok(());
        }
        for slot in &self.plan.summed_slots {
            let panels = adapter.tensor(self.slots[*slot]).filter(|panels| !panels.layout().format().is_float());
            let refused =
                |why: ShapeError| ExecuteError::State { tensor: self.plan.slots[*slot].clone(), why: why.to_string() };
            panels.map_or(Ok(()), |panels| panels.sum_rows(&self.backend.cx())).map_err(refused)?;
        }
        // Inside a group a switch changes values only.
        if adapter.group().is_none_or(|group| self.group.as_ptr() != Arc::as_ptr(group)) {
            for (grid, name) in self.grids.iter_mut().zip(&self.plan.grid_slots) {
                *grid = adapter.grid(name);
            }
        }
        self.adapter = Arc::downgrade(adapter);
        self.group = adapter.group().map_or_else(Weak::new, Arc::downgrade);
        Ok(())
    }
}

impl Htp {
    fn run(
        &mut self,
        bindings: &mut Bindings,
        state: &mut State,
        cancel: &AtomicBool,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<(), ExecuteError> {
        bindings.check_complete()?;
        if let Some(adapter) = bindings.adapter() {
            self.resolve(adapter.names())?;
            self.adopt(adapter)?;
        }
        self.find_caches(state)?;
        let adapter = bindings.adapter().map(|adapter| &**adapter);
        let resolved = Resolved { adapter, slots: &self.slots, grids: &self.grids, caches: &self.caches };
        let cx = Cx { kernels: self.backend.kernels, workers: &self.backend.workers };
        let begun = self.meter.as_ref().map(|_| (Instant::now(), self.backend.workers.n_regions()));
        let steps = &self.plan.steps[..];
        for (i, step) in steps.iter().enumerate() {
            if cancel.load(Ordering::Relaxed) {
                return Err(ExecuteError::Cancelled);
            }
            if let Some(attention) = step.prefetch {
                run::prefetch(&cx, &steps[attention], (bindings, &resolved), state);
            }
            if let Some(next) = step.next_product {
                run::expect(&cx, steps, next, &self.starts, &resolved);
            }
            let step_begun = self.meter.as_ref().map(|_| Instant::now());
            run::run(&cx, step, (bindings, &resolved), state, &mut self.memory)?;
            if let (Some(meter), Some(begun)) = (&mut self.meter, step_begun) {
                meter.add_step(i, begun.elapsed(), Cost::of(step, bindings, &resolved, state));
            }
            if let Some(watch) = watch.as_deref_mut() {
                for tensor in self.plan.shown.iter().filter(|tensor| tensor.after == i) {
                    run::show(&cx, tensor, bindings.rows_of(tensor.rows), &mut self.memory, watch)?;
                }
            }
        }
        for (buffer, output) in &self.plan.outputs {
            bindings.set_output(*output, &self.memory.floats[*buffer]);
        }
        if let (Some(meter), Some((begun, n_regions))) = (&mut self.meter, begun) {
            meter.add_execute(begun.elapsed(), self.backend.workers.n_regions() - n_regions);
        }
        Ok(())
    }
}

impl Executable for Htp {
    fn execute(&mut self, bindings: &mut Bindings, state: &mut State, cancel: &AtomicBool) -> Result<(), ExecuteError> {
        self.run(bindings, state, cancel, None)
    }

    fn execute_watched(
        &mut self,
        bindings: &mut Bindings,
        state: &mut State,
        cancel: &AtomicBool,
        watch: &mut Watch<'_>,
    ) -> Result<(), ExecuteError> {
        self.run(bindings, state, cancel, Some(watch))
    }

    fn start_account(&mut self) {
        self.meter = Some(Meter::new(self.plan.steps.len()));
    }

    fn take_account(&mut self) -> Option<Account> {
        Some(self.meter.take()?.account(&self.plan.steps, &self.backend.workers))
    }
}
