//! Which tensors are kept as codes, and in which blocks their sums are taken.

use htp_sim::ActBits;

use crate::{
    backend::PrepareError,
    op::OpKind,
    tensor::{Panels, TensorId},
    types::DataType,
};

use super::{
    super::step::{Float, GridRef, Quantized, QuantizedSpec, Source, Work},
    Lowering,
};

impl Lowering<'_> {
    /// The buffer that holds `id` as floats, made from its codes if it has only these.
    pub(super) fn float(&mut self, id: TensorId) -> Result<Float, PrepareError> {
        let place = self.places[id.index()];
        let tensor = self.graph.tensor(id);
        match (place.float, place.quantized) {
            (_, Some(x)) => {
                let out = self.new_float(tensor);
                self.push(&tensor.name, tensor.shape.0[0], Work::Dequantize { x, out });
                Ok(out)
            }
            (Some(float), None) => Ok(float),
            (None, None) => {
                let why = format!("{} {} cannot be read by a float operation", tensor.tensor_type, tensor.data_type);
                Err(PrepareError::Tensor { tensor: tensor.name.clone(), why })
            }
        }
    }

    /// After `id` was written as floats: quantizes it if its type says so.
    pub(super) fn requantize(&mut self, id: TensorId) -> Result<(), PrepareError> {
        let grid = self.grid(id)?;
        let Some(x) = self.places[id.index()].float else {
            unreachable!("the node that writes {id:?} was lowered just now");
        };
        let tensor = self.graph.tensor(id);
        let work = match (self.quantized_spec(id)?, grid) {
            (Some(spec), grid) => {
                let out = self.new_quantized(spec);
                self.places[id.index()].quantized = Some(out);
                Work::Quantize { x, out, grid }
            }
            (None, Some(grid)) => Work::Snap { x, grid },
            (None, None) => return Ok(()),
        };
        self.push(&tensor.name, tensor.shape.0[0], work);
        Ok(())
    }

    /// The grid of `id`, if it has a static encoding.
    pub(super) fn grid(&mut self, id: TensorId) -> Result<Option<GridRef>, PrepareError> {
        let tensor = self.graph.tensor(id);
        let Some(encoding) = &tensor.encoding else { return Ok(None) };
        let refuse = |why| PrepareError::Tensor { tensor: tensor.name.clone(), why };
        let base = encoding.grid(tensor.data_type).map_err(refuse)?;
        let slot = tensor.tensor_type.is_updateable().then(|| {
            let slots = &mut self.result.grid_slots;
            slots.iter().position(|slot| *slot == tensor.name).unwrap_or_else(|| {
                slots.push(tensor.name.clone());
                slots.len() - 1
            })
        });
        Ok(Some(GridRef { base, slot }))
    }

    /// Whether products with the codes of `id` may need the sums of the weights' rows: code 0 is not 0, or an adapter may
    /// make it so.
    pub(super) fn is_shifted(&mut self, id: TensorId) -> Result<bool, PrepareError> {
        let bits = self.act_bits(id);
        Ok(self.grid(id)?.zip(bits).is_some_and(|(grid, bits)| grid.slot.is_some() || !grid.base.is_centered(bits)))
    }

    fn act_bits(&self, id: TensorId) -> Option<ActBits> {
        match self.graph.tensor(id).data_type {
            DataType::SFixedPoint8 | DataType::UFixedPoint8 => Some(ActBits::Eight),
            DataType::SFixedPoint16 | DataType::UFixedPoint16 => Some(ActBits::Sixteen),
            _ => None,
        }
    }

    /// Extents of the codes of `id`, or `None` if it stays in floats. With a static encoding it is kept as codes only where
    /// a product takes them.
    pub(super) fn quantized_spec(&self, id: TensorId) -> Result<Option<QuantizedSpec>, PrepareError> {
        let tensor = self.graph.tensor(id);
        let Some(bits) = self.act_bits(id) else { return Ok(None) };
        let mut taken = tensor.encoding.is_none();
        let mut blocks = Vec::new();
        for reader in &self.readers[id.index()] {
            let node = &self.graph.nodes()[*reader];
            let packed = node.op == OpKind::FullyConnected && self.panels.contains_key(&node.inputs[1]);
            if packed && node.inputs[0] == id {
                let format = self.panels(node, 1).layout().format();
                taken |= !format.is_float();
                blocks.extend(format.block());
            }
        }
        if !taken {
            return Ok(None);
        }
        if tensor.shape.rank() != 2 {
            let why = format!("codes of shape {}, need rows of a matrix", tensor.shape);
            return Err(PrepareError::Tensor { tensor: tensor.name.clone(), why });
        }
        let k = tensor.shape.last();
        let sum_block = blocks.iter().copied().reduce(gcd).unwrap_or(k);
        blocks.sort_unstable();
        blocks.dedup();
        blocks.retain(|block| *block != sum_block);
        let max_rows = tensor.shape.0[0].max();
        Ok(Some(QuantizedSpec { max_rows, k, bits, sum_block, coarser: blocks }))
    }

    pub(super) fn new_quantized(&mut self, spec: QuantizedSpec) -> Quantized {
        self.result.quantized.push(spec);
        self.result.quantized.len() - 1
    }

    /// What the linear layers over `weights` read: codes if they can take them, floats otherwise.
    pub(super) fn linear_source(&mut self, id: TensorId, weights: &[Panels]) -> Result<Source, PrepareError> {
        match self.places[id.index()].quantized {
            Some(quantized) if weights.iter().all(|w| !w.layout().format().is_float()) => {
                Ok(Source::Quantized(quantized))
            }
            _ => Ok(Source::Float(self.float(id)?)),
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
