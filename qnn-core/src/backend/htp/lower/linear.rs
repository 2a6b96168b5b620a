//! Linear layers: q, k, v or gate, up share their input and become one step, with adapter branch, activation and
//! residual fused.

use crate::{
    backend::PrepareError,
    graph::Node,
    tensor::{Panels, TensorId},
};

use super::{
    super::step::{BranchPart, Float, LinearPart, MAX_PARTS, Source, Work},
    Lowering,
    fuse::{self, BranchNodes, Gated, Unit},
};

impl Lowering<'_> {
    pub(super) fn fully_connected(&mut self, at: usize) -> Result<(), PrepareError> {
        let unit = fuse::owner(self, at).ok_or_else(|| {
            let node = &self.graph.nodes()[at];
            let why = format!(
                "updatable weight {} is in no adapter branch (whose tensors, but for the sum, can have no encodings)",
                self.graph.tensor(node.inputs[1]).name
            );
            PrepareError::Node { node: node.name.clone(), op: node.op.name(), why }
        })?;
        match fuse::gated(self, unit.base) {
            Some(gated) => self.gated(gated),
            None => self.linear(unit),
        }
    }

    fn linear(&mut self, first: Unit) -> Result<(), PrepareError> {
        let x = self.graph.nodes()[first.base].inputs[0];
        let group = self.group(first, x);
        let weights: Vec<Panels> = group.iter().map(|unit| self.weights(unit)).collect();
        let source = self.linear_source(x, &weights)?;
        self.need_sums(x, source, &weights)?;
        let names: Vec<&str> = group.iter().map(|unit| self.graph.nodes()[unit.base].name.as_str()).collect();
        let (names, rows) = (names.join(" + "), self.rows(&self.graph.nodes()[group[0].base]));
        let branches = self.branches(x, source, &group)?;
        let (mut parts, mut sums) = (Vec::new(), Vec::new());
        for ((unit, weights), branch) in group.iter().zip(weights).zip(branches) {
            unit.nodes().for_each(|at| self.done[at] = true);
            let bias = self.bias(unit)?;
            // What this step reads, or writes for a layer before this one, is not there to be added to.
            let in_use = |float: Float| {
                let read = self.places[x.index()].float == Some(float) || source == Source::Float(float);
                read || parts.iter().any(|part: &LinearPart| part.out == float)
            };
            let (out, add) = match fuse::residual(self, unit.output).filter(|(_, float)| !in_use(*float)) {
                Some((add_node, out)) => {
                    self.done[add_node] = true;
                    let sum = self.graph.nodes()[add_node].outputs[0];
                    self.put(sum, out);
                    sums.push(sum);
                    (out, true)
                }
                None => {
                    let out = self.new_float(self.graph.tensor(unit.output));
                    self.put(unit.output, out);
                    sums.push(unit.output);
                    (out, false)
                }
            };
            parts.push(LinearPart { weights, bias, branch, out, add });
        }
        self.push(&names, rows, Work::Linear { x: source, parts });
        sums.into_iter().try_for_each(|output| self.requantize(output))
    }

    /// `first` and the other linear layers on `x` that can run in the same step.
    fn group(&self, first: Unit, x: TensorId) -> Vec<Unit> {
        let is_float = |unit: &Unit| self.weights(unit).layout().format().is_float();
        let first_is_float = is_float(&first);
        let mut group = vec![first];
        for at in &self.readers[x.index()] {
            let Some(unit) = fuse::unit(self, *at, x) else { continue };
            let fits = unit.base != group[0].base && is_float(&unit) == first_is_float;
            if fits && group.len() < MAX_PARTS && fuse::gated(self, unit.base).is_none() {
                group.push(unit);
            }
        }
        group
    }

    fn gated(&mut self, found: Gated) -> Result<(), PrepareError> {
        let product = &self.graph.nodes()[found.product];
        let x = self.graph.nodes()[found.gate.base].inputs[0];
        let name = format!("{} + {}", self.graph.nodes()[found.gate.base].name, self.graph.nodes()[found.up.base].name);
        found.nodes().for_each(|at| self.done[at] = true);
        let units = [found.gate, found.up];
        let weights = [self.weights(&units[0]), self.weights(&units[1])];
        let source = self.linear_source(x, &weights)?;
        self.need_sums(x, source, &weights)?;
        let branches = self.branches(x, source, &units)?;
        let out = self.output(product, 0);
        let mut halves = Vec::new();
        for ((unit, weights), branch) in units.iter().zip(weights).zip(branches) {
            halves.push(LinearPart { weights, bias: self.bias(unit)?, branch, out, add: false });
        }
        let halves = halves.try_into().expect("two units");
        let work = Work::Gated { x: source, halves, activation: found.activation, out };
        self.push(&name, self.rows(product), work);
        self.requantize(product.outputs[0])
    }

    /// The adapter branch of each of `units`, which read `x` from `source`.
    fn branches(
        &mut self,
        x: TensorId,
        mut source: Source,
        units: &[Unit],
    ) -> Result<Vec<Option<BranchPart>>, PrepareError> {
        let mut branches = Vec::new();
        for unit in units {
            let Some(BranchNodes { down, up, alpha, .. }) = &unit.branch else {
                branches.push(None);
                continue;
            };
            let tensor = self.graph.tensor(*down);
            if tensor.data_type.is_float() && matches!(source, Source::Quantized(_)) {
                source = Source::Float(self.float(x)?);
            }
            let alpha = self.alpha_input(*alpha)?;
            let rows = self.graph.tensor(self.graph.nodes()[unit.base].outputs[0]).shape.0[0];
            self.result.float_elements.push(rows.max().saturating_mul(tensor.shape.0[0].max()));
            let t = self.result.float_elements.len() - 1;
            let (down, up) = (self.slot(*down), self.slot(*up));
            if matches!(source, Source::Quantized(_)) && self.is_shifted(x)? {
                self.result.summed_slots.push(down);
            }
            branches.push(Some(BranchPart { x: source, down, up, alpha, t }));
        }
        Ok(branches)
    }

    /// Notes that products of `weights` with `x` may need the sums of rows.
    fn need_sums(&mut self, x: TensorId, source: Source, weights: &[Panels]) -> Result<(), PrepareError> {
        if matches!(source, Source::Quantized(_)) && self.is_shifted(x)? {
            self.result.summed.extend_from_slice(weights);
        }
        Ok(())
    }

    fn alpha_input(&self, alpha: TensorId) -> Result<usize, PrepareError> {
        self.input_numbers.get(&alpha).copied().ok_or_else(|| {
            let tensor = self.graph.tensor(alpha);
            let why = "the strength of an adapter branch has to be a graph input".to_owned();
            PrepareError::Tensor { tensor: tensor.name.clone(), why }
        })
    }

    /// The slot of updatable tensor `id`.
    fn slot(&mut self, id: TensorId) -> usize {
        let name = &self.graph.tensor(id).name;
        let slots = &mut self.result.slots;
        slots.iter().position(|slot| slot == name).unwrap_or_else(|| {
            slots.push(name.clone());
            slots.len() - 1
        })
    }

    fn weights(&self, unit: &Unit) -> Panels {
        self.panels(&self.graph.nodes()[unit.base], 1).clone()
    }

    fn bias(&self, unit: &Unit) -> Result<Option<Vec<f32>>, PrepareError> {
        let node: &Node = &self.graph.nodes()[unit.base];
        node.inputs.get(2).map(|id| super::floats_of(self.graph.tensor(*id))).transpose()
    }
}
