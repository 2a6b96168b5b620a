//! Running one step: buffers in, `htp-sim` call, buffers out. Nothing here allocates once buffers have their size.

use std::slice;

use htp_sim::{
    AttentionScratch, Branch, CacheMut, Cx, Gate, GateUp, Grid, Next, PackedWeights, Part, Rows, ShapeError, Starts,
    Write, elementwise,
};

use crate::{
    adapter::Adapter,
    backend::{Bindings, ExecuteError, Seen, State, Value, Watch, Watched},
    tensor::Panels,
};

use super::{
    Floats, Memory,
    place::attention_params,
    step::{Binary, BranchPart, CacheRef, GridRef, LinearPart, MAX_PARTS, NormOut, Shown, Source, Step, Unary, Work},
};

/// Runs `step`. Steps of no rows are skipped.
pub(super) fn run(
    cx: &Cx<'_>,
    step: &Step,
    (bindings, resolved): (&Bindings, &Resolved<'_>),
    state: &mut State,
    memory: &mut Memory,
) -> Result<(), ExecuteError> {
    let rows = bindings.rows_of(step.rows);
    let run = Run { cx, step, bindings, resolved, rows };
    match &step.work {
        Work::Load { input, out } => run.load(memory, *input, *out),
        Work::Lookup { table, indices, out } => run.lookup(memory, table, *indices, *out),
        Work::Select { x, width, indices, out } => run.select(memory, (*x, *out), *width, *indices),
        Work::Linear { x, parts } => run.linear(memory, *x, parts),
        Work::Gated { .. } => run.gated(memory),
        Work::Attention { q, k, v, out, cache } => run.attention(memory, state, [*q, *k, *v, *out], cache),
        _ => run.elementwise(memory),
    }
}

/// Shows `watch` a tensor of `rows` rows that was computed just now, and takes over what it writes.
pub(super) fn show(
    cx: &Cx<'_>,
    tensor: &Shown,
    rows: usize,
    memory: &mut Memory,
    watch: &mut Watch<'_>,
) -> Result<(), ExecuteError> {
    let (name, width) = (&tensor.name[..], tensor.width);
    match tensor.place {
        _ if rows == 0 => Ok(()),
        Source::Float(x) => {
            watch(Watched { name, width, values: &mut memory.floats[x][..rows * width] });
            Ok(())
        }
        Source::Quantized(x) => {
            let codes = &mut memory.quantized[x];
            let mut values: Vec<f32> = (0..rows * width).map(|i| codes.value(i / width, i % width)).collect();
            match watch(Watched { name, width, values: &mut values }) {
                Seen::Kept => Ok(()),
                Seen::Replaced => htp_sim::quantize_rows(cx, &values, codes)
                    .map_err(|e| ExecuteError::Kernel { node: name.to_owned(), why: e.to_string() }),
            }
        }
    }
}

/// Asks for the cache rows that attention step `step` will write and read first.
pub(super) fn prefetch(cx: &Cx<'_>, step: &Step, (bindings, resolved): (&Bindings, &Resolved<'_>), state: &mut State) {
    let Work::Attention { cache, .. } = &step.work else { return };
    let Value::I32(at) = &bindings.inputs()[cache.index_input].value else { return };
    if let Some(at) = at.first().and_then(|at| usize::try_from(*at).ok()) {
        htp_sim::attention::prefetch(cx, &resolved.cache_mut(cache, state).0.as_ref(), at);
    }
}

/// Adds `step` to what workers can be told to expect, if it is a product.
pub(super) fn push_start(starts: &mut Starts, step: &Step) {
    let parts = step.work.parts();
    let [first, ..] = parts else { return starts.push(None) };
    let mut weights = [first.weights.view(); MAX_PARTS];
    parts.iter().zip(&mut weights).for_each(|(part, weights)| *weights = part.weights.view());
    let next = match step.work {
        Work::Gated { .. } => Next::Gated(&[weights[0], weights[1]]),
        _ => Next::Linear(&weights[..parts.len()]),
    };
    starts.push(Some(next));
}

/// Tells the workers that the product `next` of `steps` comes after the one that is run now.
///
/// Asks for its operands' descriptions, too, and for the step after it, which says where those of that are: between two visits a
/// step of one row goes through more memory than caches hold, and whatever it looks at first it waits for.
pub(super) fn expect(cx: &Cx<'_>, steps: &[Step], next: usize, starts: &Starts, resolved: &Resolved<'_>) {
    let parts = steps[next].work.parts();
    htp_sim::prefetch(parts);
    if let Some(after) = steps[next].next_product {
        htp_sim::prefetch(slice::from_ref(&steps[after]));
        starts.prefetch(after);
    }
    let mut firsts = [None; MAX_PARTS];
    if let Some(adapter) = resolved.adapter {
        for (part, first) in parts.iter().zip(&mut firsts) {
            let Some(branch) = &part.branch else { continue };
            *first = resolved.panels(branch.down).map(Panels::view);
            adapter.prefetch(resolved.slots[branch.up]);
        }
    }
    htp_sim::expect(cx, starts, next, &firsts);
}

/// One step being run.
struct Run<'a> {
    cx: &'a Cx<'a>,
    step: &'a Step,
    bindings: &'a Bindings,
    resolved: &'a Resolved<'a>,
    rows: usize,
}

/// The adapter and the caches of an execute, seen through the slots of a plan.
pub(super) struct Resolved<'a> {
    pub(super) adapter: Option<&'a Adapter>,
    /// Index in the adapter of each slot.
    pub(super) slots: &'a [usize],
    /// The adapter's own grid of each updatable encoding.
    pub(super) grids: &'a [Option<Grid>],
    /// Index in the state of each cache.
    pub(super) caches: &'a [usize],
}

impl Resolved<'_> {
    pub(super) fn panels(&self, slot: usize) -> Option<&Panels> {
        self.adapter?.tensor(self.slots[slot])
    }

    pub(super) fn cache_mut<'a>(
        &self,
        cache: &CacheRef,
        state: &'a mut State,
    ) -> (CacheMut<'a>, &'a mut AttentionScratch) {
        state.kernel_cache_mut(self.caches[cache.slot]).expect("it was looked up in this state")
    }

    /// The grid that holds now.
    fn grid(&self, grid: Option<GridRef>) -> Option<Grid> {
        let grid = grid?;
        let own = grid.slot.filter(|_| self.adapter.is_some()).and_then(|slot| self.grids[slot]);
        Some(own.unwrap_or(grid.base))
    }
}

/// `a · b`, where one row or one number of `b` may stand for all.
fn multiply(cx: &Cx<'_>, a: &[f32], b: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    if let [factor] = b {
        return elementwise::scale(cx, a, *factor, out);
    }
    let width = b.len().max(1);
    let mut rows = a.chunks(width).zip(out.chunks_mut(width));
    rows.try_for_each(|(a, out)| elementwise::mul(cx, a, b, out))
}

impl Run<'_> {
    fn elementwise(&self, memory: &mut Memory) -> Result<(), ExecuteError> {
        let (cx, rows) = (self.cx, self.rows);
        match &self.step.work {
            Work::RmsNorm { x, weight, epsilon, out: NormOut::Quantized(out, grid), .. } => {
                let (x, out) = (&memory.floats[*x], &mut memory.quantized[*out]);
                self.check(out.set_grid(self.resolved.grid(*grid)))?;
                self.check(htp_sim::rms_norm_quantize(cx, &x[..rows * weight.len()], weight, *epsilon, out))
            }
            Work::RmsNorm { x, width, weight, epsilon, out: NormOut::Float(out) } => {
                self.with_out(memory, *out, *width, |memory, out| {
                    htp_sim::rms_norm(cx, &memory.floats[*x], weight, *epsilon, out)
                })
            }
            Work::Quantize { x, out, grid } => {
                let (x, out) = (&memory.floats[*x], &mut memory.quantized[*out]);
                self.check(out.set_grid(self.resolved.grid(*grid)))?;
                self.check(htp_sim::quantize_rows(cx, &x[..rows * out.k()], out))
            }
            Work::Snap { x, grid } => {
                let grid = self.resolved.grid(Some(*grid)).unwrap_or(grid.base);
                htp_sim::snap(cx, &mut memory.floats[*x], grid);
                Ok(())
            }
            Work::Dequantize { x, out } => {
                let k = memory.quantized[*x].k();
                self.with_out(memory, *out, k, |memory, out| {
                    let codes = &memory.quantized[*x];
                    for (i, value) in out.iter_mut().enumerate() {
                        *value = codes.value(i / k, i % k);
                    }
                    Ok(())
                })
            }
            Work::RotaryTable { .. } => self.rotary_table(memory),
            Work::Rotate { x, heads, head_dim, cos, sin } => {
                self.with_out(memory, *x, heads * head_dim, |memory, x| {
                    htp_sim::rotate(cx, x, *heads, *head_dim, &memory.floats[*cos], &memory.floats[*sin])
                })
            }
            Work::Binary { op, a, b, out } => {
                let width = memory.floats[*a].len() / rows.max(1);
                self.with_out(memory, *out, width, |memory, out| {
                    let (a, b) = (&memory.floats[*a], &memory.floats[*b]);
                    match op {
                        Binary::Add => elementwise::add(cx, a, b, out),
                        Binary::Multiply => multiply(cx, a, b, out),
                    }
                })
            }
            Work::Unary { op, x, out } => {
                let width = memory.floats[*x].len() / rows.max(1);
                self.with_out(memory, *out, width, |memory, out| match op {
                    Unary::Sigmoid => elementwise::sigmoid(cx, &memory.floats[*x], out),
                    Unary::Gelu => elementwise::gelu_tanh(cx, &memory.floats[*x], out),
                    Unary::SoftCap { cap } => elementwise::soft_cap(cx, &memory.floats[*x], *cap, out),
                    Unary::Scale { factor } => elementwise::scale(cx, &memory.floats[*x], *factor, out),
                })
            }
            Work::Copy { x, out } => {
                let width = memory.floats[*x].len() / rows.max(1);
                self.with_out(memory, *out, width, |memory, out| {
                    out.copy_from_slice(&memory.floats[*x]);
                    Ok(())
                })
            }
            other => unreachable!("`run` handles {other:?} itself"),
        }
    }

    fn rotary_table(&self, memory: &mut Memory) -> Result<(), ExecuteError> {
        let Work::RotaryTable { positions, inv_freq, scale, cos, sin } = &self.step.work else { return Ok(()) };
        let positions = self.integers(*positions);
        let mut table = std::mem::take(&mut memory.floats[*sin]);
        table.set_len(self.rows * inv_freq.len());
        let done = self.with_out(memory, *cos, inv_freq.len(), |_, cos| {
            htp_sim::rotary_table(positions, inv_freq, *scale, cos, &mut table)
        });
        memory.floats[*sin] = table;
        done
    }

    fn load(&self, memory: &mut Memory, input: usize, out: usize) -> Result<(), ExecuteError> {
        let Value::F32(values) = &self.bindings.inputs()[input].value else { return Ok(()) };
        let out = &mut memory.floats[out];
        out.set_len(values.len());
        out.copy_from_slice(values);
        Ok(())
    }

    fn lookup(&self, memory: &mut Memory, table: &Panels, indices: usize, out: usize) -> Result<(), ExecuteError> {
        let (n, width) = (table.layout().n(), table.layout().k());
        let (indices, view) = (self.integers(indices), table.view());
        self.check_indices(indices, n)?;
        self.with_out(memory, out, width, |_, out| {
            for (index, row) in indices.iter().zip(out.chunks_exact_mut(width)) {
                view.dequantize_row(*index as usize, row);
            }
            Ok(())
        })
    }

    fn select(
        &self,
        memory: &mut Memory,
        (x, out): (usize, usize),
        width: usize,
        indices: usize,
    ) -> Result<(), ExecuteError> {
        let indices = self.integers(indices);
        self.check_indices(indices, memory.floats[x].len() / width)?;
        self.with_out(memory, out, width, |memory, out| {
            for (index, row) in indices.iter().zip(out.chunks_exact_mut(width)) {
                row.copy_from_slice(&memory.floats[x][*index as usize * width..][..width]);
            }
            Ok(())
        })
    }

    fn linear(&self, memory: &mut Memory, x: Source, parts: &[LinearPart]) -> Result<(), ExecuteError> {
        let mut outs: [Floats; MAX_PARTS] = Default::default();
        let mut firsts: [Floats; MAX_PARTS] = Default::default();
        for ((part, out), first) in parts.iter().zip(&mut outs).zip(&mut firsts) {
            *out = std::mem::take(&mut memory.floats[part.out]);
            out.set_len(self.rows * part.weights.layout().n());
            *first = self.take_first(memory, part);
        }
        let lent: &Memory = memory;
        let x = source(lent, x, self.rows);
        let mut views = parts.iter().zip(&mut outs).zip(&mut firsts).map(|((part, out), t)| Part {
            weights: view(&part.weights, x),
            bias: part.bias.as_deref(),
            branch: self.branch(lent, part, t),
            write: if part.add { Write::Add } else { Write::Store },
            out,
        });
        let done = call_linear(self.cx, x, &mut views);
        drop(views);
        for ((part, out), first) in parts.iter().zip(&mut outs).zip(&mut firsts) {
            memory.floats[part.out] = std::mem::take(out);
            give_first(memory, part, std::mem::take(first));
        }
        self.check(done)
    }

    fn gated(&self, memory: &mut Memory) -> Result<(), ExecuteError> {
        let Work::Gated { x, halves, activation, out } = &self.step.work else { return Ok(()) };
        let [gate, up] = &**halves;
        let [mut of_gate, mut of_up] = [gate, up].map(|half| self.take_first(memory, half));
        let done = self.with_out(memory, *out, up.weights.layout().n(), |memory, out| {
            let x = source(memory, *x, self.rows);
            let [gate, up] = [(gate, &mut of_gate), (up, &mut of_up)].map(|(half, t)| Gate {
                weights: view(&half.weights, x),
                bias: half.bias.as_deref(),
                branch: self.branch(memory, half, t),
            });
            htp_sim::gated_linear(self.cx, x, GateUp { gate, up }, *activation, out)
        });
        give_first(memory, gate, of_gate);
        give_first(memory, up, of_up);
        done
    }

    /// The room for the first half of `part`'s branch; empty if it has none that counts.
    fn take_first(&self, memory: &mut Memory, part: &LinearPart) -> Floats {
        let Some(branch) = &part.branch else { return Floats::default() };
        let mut t = std::mem::take(&mut memory.floats[branch.t]);
        t.set_len(self.active(branch).map_or(0, |(down, _)| self.rows * down.layout().n()));
        t
    }

    /// The branch of `part`, whose first half `t` has room for.
    fn branch<'a>(&'a self, memory: &'a Memory, part: &LinearPart, t: &'a mut [f32]) -> Option<Branch<'a>> {
        let branch = part.branch.as_ref()?;
        let (down, up) = self.active(branch)?;
        let (x, alpha) = (source(memory, branch.x, self.rows), self.alpha(branch.alpha));
        Some(Branch { x, down: view(down, x), alpha, up: up.view(), t })
    }

    /// A and B of a branch, if the adapter has both and a strength that is not 0.
    fn active(&self, branch: &BranchPart) -> Option<(&Panels, &Panels)> {
        let (down, up) = (self.resolved.panels(branch.down)?, self.resolved.panels(branch.up)?);
        let columns = self.alpha(branch.alpha).iter().take(down.layout().n());
        columns.into_iter().any(|alpha| *alpha != 0.0).then_some((down, up))
    }

    fn alpha(&self, input: usize) -> &[f32] {
        match &self.bindings.inputs()[input].value {
            Value::F32(values) => values,
            Value::I32(_) => &[],
        }
    }

    fn attention(
        &self,
        memory: &mut Memory,
        state: &mut State,
        [q, k, v, out]: [usize; 4],
        cache: &CacheRef,
    ) -> Result<(), ExecuteError> {
        let capacity = state.capacity();
        let at = self.integers(cache.index_input)[0];
        let full = || ExecuteError::CacheFull {
            node: self.step.node.clone(),
            at: at.max(0) as usize,
            end: at.max(0) as usize + self.rows,
            capacity,
        };
        let past = usize::try_from(at).ok().filter(|at| at + self.rows <= capacity).ok_or_else(full)?;
        let (mut target, scratch) = self.resolved.cache_mut(cache, state);
        self.check(htp_sim::append(self.cx, &mut target, past, &memory.floats[k], &memory.floats[v]))?;
        let params = attention_params(&cache.attrs);
        self.with_out(memory, out, cache.attrs.heads * cache.attrs.head_dim, |memory, out| {
            htp_sim::attention(self.cx, &target.as_ref(), past, &memory.floats[q], &params, scratch, out)
        })
    }

    /// Lends buffer `out`, `rows · width` long, to `work` together with the rest of the memory.
    fn with_out(
        &self,
        memory: &mut Memory,
        out: usize,
        width: usize,
        work: impl FnOnce(&mut Memory, &mut [f32]) -> Result<(), ShapeError>,
    ) -> Result<(), ExecuteError> {
        let mut buffer = std::mem::take(&mut memory.floats[out]);
        buffer.set_len(self.rows * width);
        let done = work(memory, &mut buffer);
        memory.floats[out] = buffer;
        self.check(done)
    }

    fn integers(&self, input: usize) -> &[i32] {
        match &self.bindings.inputs()[input].value {
            Value::I32(values) => values,
            Value::F32(_) => &[],
        }
    }

    fn check_indices(&self, indices: &[i32], len: usize) -> Result<(), ExecuteError> {
        match indices.iter().find(|i| usize::try_from(**i).map_or(true, |i| i >= len)) {
            None => Ok(()),
            Some(index) => Err(ExecuteError::Index { node: self.step.node.clone(), index: i64::from(*index), len }),
        }
    }

    fn check(&self, done: Result<(), ShapeError>) -> Result<(), ExecuteError> {
        done.map_err(|e| ExecuteError::Kernel { node: self.step.node.clone(), why: e.to_string() })
    }
}

fn source(memory: &Memory, x: Source, rows: usize) -> Rows<'_> {
    match x {
        Source::Float(x) => Rows::F32 { x: &memory.floats[x], m: rows },
        Source::Quantized(x) => Rows::Quantized(&memory.quantized[x]),
    }
}

/// Weights that meet `x`: those on a grid that is shifted need sums of rows.
fn view<'a>(weights: &'a Panels, x: Rows<'_>) -> PackedWeights<'a> {
    match x {
        Rows::Quantized(rows) if rows.shift() != 0.0 => weights.view_with_sums(),
        _ => weights.view(),
    }
}

/// Puts back what [`Run::take_first`] took.
fn give_first(memory: &mut Memory, part: &LinearPart, t: Floats) {
    if let Some(branch) = &part.branch {
        memory.floats[branch.t] = t;
    }
}

/// Calls `linear` with up to [`MAX_PARTS`] parts, or not at all if there are none.
fn call_linear<'a>(cx: &Cx<'_>, x: Rows<'_>, parts: &mut dyn Iterator<Item = Part<'a>>) -> Result<(), ShapeError> {
    match [parts.next(), parts.next(), parts.next(), parts.next()] {
        [Some(a), None, ..] => htp_sim::linear(cx, x, &mut [a]),
        [Some(a), Some(b), None, _] => htp_sim::linear(cx, x, &mut [a, b]),
        [Some(a), Some(b), Some(c), None] => htp_sim::linear(cx, x, &mut [a, b, c]),
        [Some(a), Some(b), Some(c), Some(d)] => htp_sim::linear(cx, x, &mut [a, b, c, d]),
        [None, ..] => Ok(()),
    }
}
