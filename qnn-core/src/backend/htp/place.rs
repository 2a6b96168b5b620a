//! Placing: many virtual buffers, each written once, onto few real ones.

use htp_sim::AttentionParams;

use crate::{backend::PrepareError, op::AttentionAttrs};

use super::{
    lower::Lowered,
    step::{QuantizedSpec, Shown, Source, Step, Work},
};

/// A plan over real buffers.
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// Elements to reserve in each float buffer.
    pub(super) float_capacity: Vec<usize>,
    /// Extents of each buffer of quantized rows.
    pub(super) quantized: Vec<QuantizedSpec>,
    /// Buffer and output number of each graph output.
    pub(super) outputs: Vec<(usize, usize)>,
    /// Names of the updatable tensors that steps read, by slot.
    pub(super) slots: Vec<String>,
    /// Names of the computed tensors whose encodings an adapter may replace, by slot.
    pub(super) grid_slots: Vec<String>,
    /// Slots of the updatable tensors that meet inputs on a static grid: their sums of rows may be needed.
    pub(super) summed_slots: Vec<usize>,
    /// Names of the key tensors, which name the caches, by slot.
    pub(super) cache_names: Vec<String>,
    /// The computed tensors, in the order of the steps.
    pub(super) shown: Vec<Shown>,
}

impl Plan {
    /// Refuses buffers that the system does not have: numbers in a file decide how large they are, and an allocation that fails
    /// ends the process.
    pub(super) fn check_memory(&self, graph: &str) -> Result<(), PrepareError> {
        let floats = self.float_capacity.iter().map(|elements| *elements as u128 * 4);
        let planes = self.quantized.iter().map(|rows| rows.max_rows as u128 * rows.k as u128 * 2);
        let need_bytes: u128 = floats.chain(planes).sum();
        let given = |bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        match usize::try_from(need_bytes) {
            Ok(bytes) if given(bytes) => Ok(()),
            _ => Err(PrepareError::Memory { graph: graph.to_owned(), need_mib: (need_bytes >> 20) as u64 }),
        }
    }
}

/// The kernels' form of the attributes.
pub(super) fn attention_params(attrs: &AttentionAttrs) -> AttentionParams {
    AttentionParams { heads: attrs.heads, scale: attrs.scale, window: attrs.window, softcap: attrs.softcap }
}

/// Gives every virtual buffer a real one. Two virtual buffers share a real one if their lives do not overlap.
pub(super) fn place(mut lowered: Lowered) -> Plan {
    let n_steps = lowered.steps.len();
    let mut float_life = vec![Life::NONE; lowered.float_elements.len()];
    let mut quantized_life = vec![Life::NONE; lowered.quantized.len()];
    for (at, step) in lowered.steps.iter_mut().enumerate() {
        step.work.floats(&mut |f| float_life[*f].touch(at));
        step.work.quantized(&mut |q| quantized_life[*q].touch(at));
    }
    for (float, _) in &lowered.outputs {
        float_life[*float].touch(n_steps);
    }
    for tensor in &lowered.shown {
        match tensor.place {
            Source::Float(f) => float_life[f].touch(tensor.after),
            Source::Quantized(q) => quantized_life[q].touch(tensor.after),
        }
    }
    let (float_home, float_owners) = assign(&float_life, |_, _| true);
    let (quantized_home, quantized_owners) =
        assign(&quantized_life, |a, b| lowered.quantized[a] == lowered.quantized[b]);
    for step in &mut lowered.steps {
        step.work.floats(&mut |f| *f = float_home[*f]);
        step.work.quantized(&mut |q| *q = quantized_home[*q]);
    }
    for tensor in &mut lowered.shown {
        match &mut tensor.place {
            Source::Float(f) => *f = float_home[*f],
            Source::Quantized(q) => *q = quantized_home[*q],
        }
    }
    plan_prefetches(&mut lowered.steps);
    plan_next_products(&mut lowered.steps);
    let largest = |owners: &Vec<usize>| owners.iter().map(|v| lowered.float_elements[*v]).max().unwrap_or(0);
    Plan {
        float_capacity: float_owners.iter().map(largest).collect(),
        quantized: quantized_owners.iter().map(|owners| lowered.quantized[owners[0]].clone()).collect(),
        outputs: lowered.outputs.iter().map(|(float, output)| (float_home[*float], *output)).collect(),
        steps: lowered.steps,
        slots: lowered.slots,
        grid_slots: lowered.grid_slots,
        summed_slots: lowered.summed_slots,
        cache_names: lowered.cache_names,
        shown: lowered.shown,
    }
}

/// In a graph for single rows, where there is time to fetch a cache but no other work to hide it behind: each attention's
/// cache is asked for before the product that makes its rows.
fn plan_prefetches(steps: &mut [Step]) {
    for attention in 0..steps.len() {
        if !matches!(steps[attention].work, Work::Attention { .. }) || steps[attention].rows.max() > 1 {
            continue;
        }
        let product = steps[..attention].iter().rposition(|step| matches!(step.work, Work::Linear { .. }));
        if let Some(product) = product {
            steps[product].prefetch = Some(attention);
        }
    }
}

/// In a graph for single rows, which wait for memory: each product is told which comes after it, the last one which is first when
/// the graph is run again.
fn plan_next_products(steps: &mut [Step]) {
    let is_product = |step: &Step| !step.work.parts().is_empty() && step.rows.max() <= 1;
    let products: Vec<usize> = (0..steps.len()).filter(|i| is_product(&steps[*i])).collect();
    for (product, next) in products.iter().zip(products.iter().cycle().skip(1)) {
        steps[*product].next_product = Some(*next);
    }
}

/// First and last step that touches a buffer.
#[derive(Clone, Copy)]
struct Life {
    first: usize,
    last: usize,
}

impl Life {
    const NONE: Life = Life { first: usize::MAX, last: 0 };

    fn touch(&mut self, at: usize) {
        self.first = self.first.min(at);
        self.last = self.last.max(at);
    }
}

/// The home of each virtual buffer, and the virtual buffers of each home.
fn assign(lives: &[Life], may_share: impl Fn(usize, usize) -> bool) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|v| lives[*v].first);
    let mut owners: Vec<Vec<usize>> = Vec::new();
    let mut home = vec![0; lives.len()];
    for v in order {
        let free = |home: &Vec<usize>| {
            let last = *home.last().expect("a home is made with its first owner");
            lives[last].last < lives[v].first && may_share(last, v)
        };
        home[v] = owners.iter().position(free).unwrap_or_else(|| {
            owners.push(Vec::new());
            owners.len() - 1
        });
        owners[home[v]].push(v);
    }
    (home, owners)
}
