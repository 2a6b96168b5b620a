//! Which tensors are kept as codes, and in which blocks their sums are taken.

use htp_sim::ActBits;

use crate::{
    backend::PrepareError,
    op::OpKind,
    tensor::{Panels, TensorId},
    types::DataType,
};

use super::{
    super::step::{Float, Quantized, QuantizedSpec, Source, Work},
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
        let Some(spec) = self.quantized_spec(id)? else { return Ok(()) };
        let x = self.places[id.index()].float.expect("the node that writes it was lowered just now");
        let out = self.new_quantized(spec);
        self.places[id.index()].quantized = Some(out);
        let tensor = self.graph.tensor(id);
        self.push(&tensor.name, tensor.shape.0[0], Work::Quantize { x, out });
        Ok(())
    }

    /// Extents of the codes of `id`, or `None` if it stays in floats.
    pub(super) fn quantized_spec(&self, id: TensorId) -> Result<Option<QuantizedSpec>, PrepareError> {
        let tensor = self.graph.tensor(id);
        let bits = match tensor.data_type {
            DataType::SFixedPoint8 => ActBits::Eight,
            DataType::SFixedPoint16 => ActBits::Sixteen,
            _ => return Ok(None),
        };
        let mut blocks = Vec::new();
        for reader in &self.readers[id.index()] {
            let node = &self.graph.nodes()[*reader];
            let packed = node.op == OpKind::FullyConnected && self.panels.contains_key(&node.inputs[1]);
            if packed && node.inputs[0] == id {
                blocks.extend(self.panels(node, 1).layout().format().block());
            }
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
