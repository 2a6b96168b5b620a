//! The account of an executable while it is kept: one entry per step of the plan, allocated before the first execute.

use std::time::{Duration, Instant};

use htp_sim::{CacheLayout, Workers};

use crate::backend::{
    Bindings, State, Value,
    account::{Account, Operation},
};

use super::{
    run::Resolved,
    step::{CacheRef, LinearPart, Step, Work},
};

/// What the steps of a plan have cost so far.
pub(super) struct Meter {
    spent: Vec<Spent>,
    n_executes: u64,
    time: Duration,
    n_regions: u64,
}

#[derive(Clone, Copy, Default)]
struct Spent {
    n_calls: u64,
    time: Duration,
    cost: Cost,
}

/// What a step has to read and to compute, whatever time it takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Cost {
    bytes: u64,
    multiply_adds: u64,
}

impl Meter {
    pub(super) fn new(n_steps: usize) -> Meter {
        Meter { spent: vec![Spent::default(); n_steps], n_executes: 0, time: Duration::ZERO, n_regions: 0 }
    }

    pub(super) fn add_step(&mut self, number: usize, time: Duration, cost: Cost) {
        let spent = &mut self.spent[number];
        spent.n_calls += 1;
        spent.time += time;
        spent.cost.bytes += cost.bytes;
        spent.cost.multiply_adds += cost.multiply_adds;
    }

    pub(super) fn add_execute(&mut self, time: Duration, n_regions: u64) {
        self.n_executes += 1;
        self.time += time;
        self.n_regions += n_regions;
    }

    /// Sums up what was spent on `steps`; asks `workers` what a region costs.
    pub(super) fn account(&self, steps: &[Step], workers: &Workers) -> Account {
        let mut operations: Vec<Operation> = Vec::new();
        for (step, spent) in steps.iter().zip(&self.spent).filter(|(_, spent)| 0 < spent.n_calls) {
            let name = format!("{} {}", step.work.kind(), place_in_layer(&step.node));
            let at = operations.iter().position(|known| known.name == name).unwrap_or_else(|| {
                let (n_calls, time, bytes, multiply_adds) = (0, Duration::ZERO, 0, 0);
                operations.push(Operation { name, n_calls, time, bytes, multiply_adds });
                operations.len() - 1
            });
            let operation = &mut operations[at];
            operation.n_calls += spent.n_calls;
            operation.time += spent.time;
            operation.bytes += spent.cost.bytes;
            operation.multiply_adds += spent.cost.multiply_adds;
        }
        let scheduling = empty_region(workers).mul_f64(self.n_regions as f64).min(self.time);
        Account { n_executes: self.n_executes, time: self.time, scheduling, operations }
    }
}

impl Cost {
    /// Of `step` in an execute with these `bindings`.
    pub(super) fn of(step: &Step, bindings: &Bindings, resolved: &Resolved<'_>, state: &mut State) -> Cost {
        let rows = bindings.rows_of(step.rows) as u64;
        match &step.work {
            Work::Linear { parts, .. } => parts.iter().map(|part| Cost::linear(part, rows, resolved)).sum(),
            Work::Gated { halves, .. } => halves.iter().map(|part| Cost::linear(part, rows, resolved)).sum(),
            Work::Attention { cache, .. } => {
                Cost::attention(cache, rows, bindings, resolved.cache_mut(cache, state).0.layout)
            }
            _ => Cost::default(),
        }
    }

    fn linear(part: &LinearPart, rows: u64, resolved: &Resolved<'_>) -> Cost {
        let branch = part.branch.as_ref().map(|branch| [branch.down, branch.up].map(|slot| resolved.panels(slot)));
        let halves = branch.into_iter().flatten().flatten();
        std::iter::once(&part.weights).chain(halves).map(|weights| panels(weights, rows)).sum()
    }

    /// Every row meets the positions before it and its own; the window of a sliding attention is not taken off.
    fn attention(cache: &CacheRef, rows: u64, bindings: &Bindings, layout: CacheLayout) -> Cost {
        let past = match &bindings.inputs()[cache.index_input].value {
            Value::I32(values) => values.first().map_or(0, |at| (*at).max(0) as u64),
            Value::F32(_) => 0,
        };
        let per_position = layout.position_bytes() as u64;
        let meetings = rows * past + rows * (rows + 1) / 2;
        let multiply_adds = 2 * meetings * (cache.attrs.heads * cache.attrs.head_dim) as u64;
        Cost { bytes: (past + rows) * per_position, multiply_adds }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |sum, cost| Cost {
            bytes: sum.bytes + cost.bytes,
            multiply_adds: sum.multiply_adds + cost.multiply_adds,
        })
    }
}

fn panels(weights: &crate::tensor::Panels, rows: u64) -> Cost {
    let layout = weights.layout();
    Cost { bytes: weights.bytes().len() as u64, multiply_adds: rows * (layout.n() * layout.k()) as u64 }
}

/// `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`, each one of several fused; a name outside the layers as it is.
fn place_in_layer(nodes: &str) -> String {
    let place = |node: &str| {
        let inside = node.split_once("layers.").and_then(|(_, rest)| rest.split_once('.'));
        inside.map_or(node, |(_, place)| place).to_owned()
    };
    nodes.split(" + ").map(place).collect::<Vec<_>>().join(" + ")
}

/// Time of a parallel region without work, on a team that is awake.
fn empty_region(workers: &Workers) -> Duration {
    let regions = |n: u32| {
        let begun = Instant::now();
        (0..n).for_each(|_| workers.for_each(workers.count(), |_, _| {}));
        begun.elapsed() / n
    };
    regions(200);
    regions(2000)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: operations of all layers are summed under the name of their place.
    #[test]
    fn names_leave_out_the_layer() {
        let check = |node: &str, place: &str| assert_eq!(place_in_layer(node), place);
        check("model.layers.3.self_attn.q_proj", "self_attn.q_proj");
        check("model.layers.29.mlp.down_proj.lora_A", "mlp.down_proj.lora_A");
        check("layers.4.mlp.gate_proj + layers.4.mlp.up_proj", "mlp.gate_proj + mlp.up_proj");
        check("lm_head", "lm_head");
        check("layers.x", "layers.x");
    }
}
