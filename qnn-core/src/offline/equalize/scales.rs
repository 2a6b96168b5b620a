//! The record of an equalization, and what it means for adapters.

use std::collections::BTreeMap;

use half::f16;
use serde::{Deserialize, Serialize};

use super::groups::{Group, Source};
use crate::{
    graph::{Graph, GraphError},
    offline::lora::Folded,
    op::OpKind,
    tensor::TensorId,
};

/// Why an equalization cannot be recorded or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ScalesError {
    #[error("metadata {SCALES_KEY}: {why}")]
    Metadata { why: String },
    #[error("the graph is equalized already")]
    Twice,
    #[error("{module}: {have} {what}, the base was equalized with {want}")]
    Extent { module: String, what: &'static str, have: usize, want: usize },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// The factors of every module of an equalized graph, as its metadata holds them under [`SCALES_KEY`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChannelScales {
    modules: BTreeMap<String, ModuleScales>,
}

/// What was done to the weight of one module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModuleScales {
    /// Its columns were divided by these; empty if they were not touched.
    pub inputs: Vec<f32>,
    /// Its rows were multiplied by these; empty if they were not touched.
    pub outputs: Vec<f32>,
}

/// The record as JSON: lists of f16 numbers in hexadecimal, each stored once, and their numbers by module.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    lists: Vec<String>,
    modules: BTreeMap<String, StoredModule>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredModule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inputs: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outputs: Option<usize>,
}

impl ChannelScales {
    /// The record in a graph's or context's metadata; empty if there is none.
    ///
    /// # Errors
    /// [`ScalesError::Metadata`] if there is something else under [`SCALES_KEY`].
    pub fn of(metadata: &BTreeMap<String, String>) -> Result<ChannelScales, ScalesError> {
        let Some(text) = metadata.get(SCALES_KEY) else { return Ok(ChannelScales::default()) };
        let refuse = |why: String| ScalesError::Metadata { why };
        let stored: Stored = serde_json::from_str(text).map_err(|why| refuse(why.to_string()))?;
        let lists: Vec<Vec<f32>> = stored.lists.iter().map(|list| from_hex(list)).collect::<Result<_, _>>()?;
        let list = |at: Option<usize>| match at {
            None => Ok(Vec::new()),
            Some(at) => lists.get(at).cloned().ok_or_else(|| refuse(format!("list {at} of {}", lists.len()))),
        };
        let module = |(name, module): (String, StoredModule)| {
            Ok((name, ModuleScales { inputs: list(module.inputs)?, outputs: list(module.outputs)? }))
        };
        Ok(ChannelScales { modules: stored.modules.into_iter().map(module).collect::<Result<_, ScalesError>>()? })
    }

    /// True if no module was touched.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// What was done to `module`.
    pub fn module(&self, module: &str) -> Option<&ModuleScales> {
        self.modules.get(module)
    }

    /// Scales an adapter as its base was: the columns of A are divided, the rows of B multiplied. The adapter then has the
    /// same effect on the equalized base as before on the base as it was trained.
    ///
    /// # Errors
    /// [`ScalesError::Extent`] naming the module that has another size.
    pub fn apply_to(&self, adapter: &mut Folded) -> Result<(), ScalesError> {
        for module in &mut adapter.modules {
            let Some(scales) = self.modules.get(&module.module) else { continue };
            let checks = [("inputs", module.k, scales.inputs.len()), ("outputs", module.n, scales.outputs.len())];
            if let Some((what, have, want)) = checks.into_iter().find(|(_, have, want)| *want > 0 && have != want) {
                return Err(ScalesError::Extent { module: module.module.clone(), what, have, want });
            }
            if !scales.inputs.is_empty() {
                let factors = scales.inputs.iter().cycle();
                module.a_values.iter_mut().zip(factors).for_each(|(value, factor)| *value /= factor);
            }
            if !scales.outputs.is_empty() {
                let rows = module.b_values.chunks_exact_mut(module.rank).zip(&scales.outputs);
                rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value *= factor));
            }
        }
        Ok(())
    }

    /// By what each channel of the computed tensors of `graph` differs from the model as it was, by tensor name: the inputs
    /// and outputs of the scaled modules. A tensor that is not here is as it was.
    pub fn of_tensors(&self, graph: &Graph) -> BTreeMap<String, Vec<f32>> {
        let name = |id: &TensorId| graph.tensor(*id).name.clone();
        let mut factors = BTreeMap::new();
        for node in graph.nodes() {
            let Some(scales) = self.modules.get(&node.name) else { continue };
            if !scales.inputs.is_empty() {
                factors.insert(name(&node.inputs[0]), scales.inputs.clone());
            }
            if !scales.outputs.is_empty() {
                // Nothing but an adapter's branch is added to an output that was scaled.
                let sums = graph.nodes().iter().filter(|other| other.op == OpKind::ElementWiseAdd);
                let sum = sums.filter(|sum| sum.inputs.contains(&node.outputs[0])).map(|sum| &sum.outputs[0]);
                for id in sum.chain(&node.outputs) {
                    factors.insert(name(id), scales.outputs.clone());
                }
            }
        }
        factors
    }

    /// Records that the channels of `group` were scaled by `factors`.
    pub(super) fn insert(&mut self, group: &Group, factors: &[f32]) {
        if let Source::Matrix { module, .. } = &group.source {
            self.modules.entry(module.clone()).or_default().outputs = factors.to_vec();
        }
        for reader in &group.readers {
            let columns = (0..group.n_columns()).map(|column| factors[group.channel(column)]).collect();
            self.modules.entry(reader.module.clone()).or_default().inputs = columns;
        }
    }

    pub(super) fn to_text(&self) -> String {
        let mut stored = Stored::default();
        let mut number = |list: &[f32]| {
            if list.is_empty() {
                return None;
            }
            let hex = to_hex(list);
            // Modules that share a list follow each other closely, so the search is short.
            let found = stored.lists.iter().rposition(|other| *other == hex);
            Some(found.unwrap_or_else(|| {
                stored.lists.push(hex);
                stored.lists.len() - 1
            }))
        };
        for (name, module) in &self.modules {
            let entry = StoredModule { inputs: number(&module.inputs), outputs: number(&module.outputs) };
            stored.modules.insert(name.clone(), entry);
        }
        serde_json::to_string(&stored).expect("strings and numbers")
    }
}

fn to_hex(values: &[f32]) -> String {
    values.iter().map(|value| format!("{:04x}", f16::from_f32(*value).to_bits())).collect()
}

fn from_hex(text: &str) -> Result<Vec<f32>, ScalesError> {
    let refuse =
        |have: &str| ScalesError::Metadata { why: format!("{have:?}, need f16 numbers above 0 in hexadecimal") };
    if !text.is_ascii() || !text.len().is_multiple_of(4) {
        return Err(refuse(text.get(..text.len().min(16)).unwrap_or("no ASCII")));
    }
    let number = |at: usize| {
        let digits = &text[at..at + 4];
        let value = u16::from_str_radix(digits, 16).map(|bits| f16::from_bits(bits).to_f32());
        value.ok().filter(|value| value.is_finite() && *value > 0.0).ok_or_else(|| refuse(digits))
    };
    (0..text.len()).step_by(4).map(number).collect()
}

/// A short name of the equalization in `metadata`, for files that hold values scaled for it; `None` if there is none.
pub fn fingerprint(metadata: &BTreeMap<String, String>) -> Option<String> {
    metadata.get(SCALES_KEY).map(|text| blake3::hash(text.as_bytes()).to_hex().to_string())
}

/// Metadata key of the record.
pub const SCALES_KEY: &str = "channel_scales";
