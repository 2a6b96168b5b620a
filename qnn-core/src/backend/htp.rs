//! The fast backend: lowers a graph to a list of steps, fuses, places buffers, and calls `htp-sim`.
//!
//! ```text
//! Graph ──lower──► steps over virtual buffers ──place──► steps over few real buffers ──run──► htp-sim
//!          fuse: norm + quantize · q,k,v in one call · gate·up · residual add · rope in place
//! ```

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use htp_sim::{Cx, Kernels, QuantizedRows, Workers};

use crate::graph::Graph;

use super::{Backend, Bindings, Executable, ExecuteError, PrepareError, State, state::CacheForm};

mod lower;
mod pack;
mod place;
mod run;
mod step;

pub use pack::pack_constant;

use place::Plan;

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
    /// Whatever the system says when a thread cannot be started.
    pub fn new(n_threads: usize) -> std::io::Result<HtpBackend> {
        HtpBackend::with_kernels(n_threads, Kernels::best())
    }

    /// As [`HtpBackend::new`], with kernels of choice.
    ///
    /// # Errors
    /// Whatever the system says when a thread cannot be started.
    pub fn with_kernels(n_threads: usize, kernels: &'static Kernels) -> std::io::Result<HtpBackend> {
        Ok(HtpBackend { kernels, workers: Arc::new(Workers::new(n_threads)?) })
    }

    /// Name of the kernels in use.
    pub fn kernels(&self) -> &'static str {
        self.kernels.name
    }
}

impl Backend for HtpBackend {
    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Executable>, PrepareError> {
        let lowered = lower::lower(graph)?;
        let plan = place::place(lowered);
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
}

/// Scratch memory of one executable, allocated when it is prepared.
struct Memory {
    floats: Vec<Vec<f32>>,
    quantized: Vec<QuantizedRows>,
}

impl Htp {
    fn new(backend: HtpBackend, plan: Plan) -> Result<Htp, PrepareError> {
        let floats = plan.float_capacity.iter().map(|n| Vec::with_capacity(*n)).collect();
        let quantized = plan.quantized.iter().map(|q| q.allocate()).collect::<Result<_, _>>()?;
        Ok(Htp { backend, plan, memory: Memory { floats, quantized } })
    }
}

impl Executable for Htp {
    fn execute(&mut self, bindings: &mut Bindings, state: &mut State, cancel: &AtomicBool) -> Result<(), ExecuteError> {
        bindings.check_complete()?;
        let cx = Cx { kernels: self.backend.kernels, workers: &self.backend.workers };
        for step in &self.plan.steps {
            if cancel.load(Ordering::Relaxed) {
                return Err(ExecuteError::Cancelled);
            }
            run::run(&cx, step, bindings, state, &mut self.memory)?;
        }
        for (buffer, output) in &self.plan.outputs {
            bindings.swap_output(*output, &mut self.memory.floats[*buffer]);
        }
        Ok(())
    }
}
