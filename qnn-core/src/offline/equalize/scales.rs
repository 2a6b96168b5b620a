//! The record of an equalization, and what it means for adapters.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::f16;
use serde::{Deserialize, Serialize};

use super::groups::{Group, Partner, Source};
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
    pub inputs: Arc<[f32]>,
    /// Its rows were multiplied by these; empty if they were not touched.
    pub outputs: Arc<[f32]>,
    /// Which of its columns came to each place, after they were divided; empty if they kept their places.
    pub input_order: Arc<[u32]>,
    /// Which of its rows came to each place, after they were multiplied; empty if they kept their places.
    pub output_order: Arc<[u32]>,
}

/// The record as JSON: lists of f16 numbers, and of places as 16-bit integers, in hexadecimal, each stored once; and their
/// numbers by module.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    lists: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    orders: Vec<String>,
    modules: BTreeMap<String, StoredModule>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredModule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inputs: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outputs: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input_order: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output_order: Option<usize>,
}

impl ChannelScales {
    /// The record in a graph's or context's metadata; empty if there is none.
    ///
    /// # Errors
    /// [`ScalesError::Metadata`] if there is something else under [`SCALES_KEY`].
    pub fn of(metadata: &BTreeMap<String, String>) -> Result<ChannelScales, ScalesError> {
        let Some(text) = metadata.get(SCALES_KEY) else { return Ok(ChannelScales::default()) };
        let stored: Stored = serde_json::from_str(text).map_err(|why| refuse(why.to_string()))?;
        // Shared by the modules: a file may name one list as often as it likes.
        let lists: Vec<Arc<[f32]>> =
            stored.lists.iter().map(|list| from_hex(list).map(Arc::from)).collect::<Result<_, _>>()?;
        let orders: Vec<Arc<[u32]>> =
            stored.orders.iter().map(|order| order_from_hex(order).map(Arc::from)).collect::<Result<_, _>>()?;
        let module = |(name, module): (String, StoredModule)| {
            let (inputs, outputs) = (pick(&lists, module.inputs)?, pick(&lists, module.outputs)?);
            let (input_order, output_order) = (pick(&orders, module.input_order)?, pick(&orders, module.output_order)?);
            Ok((name, ModuleScales { inputs, outputs, input_order, output_order }))
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

    /// Scales an adapter as its base was: the columns of A are divided and change places as the base's did, the rows of B
    /// are multiplied and change places. The adapter then has the same effect on the changed base as before on the base as
    /// it was trained.
    ///
    /// # Errors
    /// [`ScalesError::Extent`] naming the module that has another size.
    pub fn apply_to(&self, adapter: &mut Folded) -> Result<(), ScalesError> {
        for module in &mut adapter.modules {
            let Some(scales) = self.modules.get(&module.module) else { continue };
            scales.apply_to_a(&module.module, module.k, &mut module.a_values)?;
            scales.apply_to_b(&module.module, module.rank, &mut module.b_values)?;
        }
        Ok(())
    }

    /// By what the channels of the computed tensors of `graph` differ from the model as it was, by tensor name: the inputs and
    /// outputs of the changed modules, and activations of their outputs. A tensor that is not here is as it was.
    pub fn of_tensors(&self, graph: &Graph) -> BTreeMap<String, ChannelMap> {
        let mut maps: BTreeMap<TensorId, ChannelMap> = BTreeMap::new();
        for node in graph.nodes() {
            if let Some(scales) = self.modules.get(&node.name) {
                let (inputs, outputs) = (scales.of_inputs(), scales.of_outputs());
                if !inputs.is_identity() {
                    maps.insert(node.inputs[0], inputs);
                }
                if !outputs.is_identity() {
                    // Nothing but an adapter's branch is added to an output that was changed.
                    let sums = graph.nodes().iter().filter(|other| other.op == OpKind::ElementWiseAdd);
                    let sum = sums.filter(|sum| sum.inputs.contains(&node.outputs[0])).map(|sum| sum.outputs[0]);
                    sum.chain(node.outputs.iter().copied()).for_each(|id| {
                        maps.insert(id, outputs.clone());
                    });
                }
            } else if matches!(node.op, OpKind::Sigmoid | OpKind::Gelu | OpKind::ElementWiseMultiply) {
                // Activations of outputs that changed places, but not factors: these are inside an activation.
                let map = node.inputs.iter().find_map(|id| maps.get(id)).filter(|map| map.factors.is_empty()).cloned();
                map.into_iter().for_each(|map| {
                    maps.entry(node.outputs[0]).or_insert(map);
                });
            }
        }
        maps.into_iter().map(|(id, map)| (graph.tensor(id).name.clone(), map)).collect()
    }

    /// Records that the channels of `group` were scaled by `factors` and then put in `order`.
    pub(super) fn insert(&mut self, group: &Group, factors: &[f32], order: Option<&[u32]>) {
        if let Source::Matrix(Partner { module, .. }) = &group.source {
            self.modules.entry(module.clone()).or_default().outputs = factors.into();
        }
        for reader in &group.readers {
            let columns = (0..group.n_columns()).map(|column| factors[group.channel(column)]).collect();
            self.modules.entry(reader.module.clone()).or_default().inputs = columns;
        }
        let Some(order) = order else { return };
        for partner in &group.partners {
            self.modules.entry(partner.module.clone()).or_default().output_order = order.into();
        }
        for reader in &group.readers {
            self.modules.entry(reader.module.clone()).or_default().input_order = order.into();
        }
    }

    pub(super) fn to_text(&self) -> String {
        let mut stored = Stored::default();
        for (name, module) in &self.modules {
            let lists = [&module.inputs, &module.outputs].map(|list| number(&mut stored.lists, to_hex(list)));
            let orders = [&module.input_order, &module.output_order];
            let orders = orders.map(|order| number(&mut stored.orders, order_to_hex(order)));
            let ([inputs, outputs], [input_order, output_order]) = (lists, orders);
            stored.modules.insert(name.clone(), StoredModule { inputs, outputs, input_order, output_order });
        }
        serde_json::to_string(&stored).expect("strings and numbers")
    }
}

/// What was done to the channels of a computed tensor.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChannelMap {
    /// Each channel was multiplied by its factor; empty if they were not.
    pub factors: Arc<[f32]>,
    /// Which channel then came to each place; empty if they kept their places.
    pub order: Arc<[u32]>,
}

impl ChannelMap {
    /// True if nothing was done.
    pub fn is_identity(&self) -> bool {
        self.factors.is_empty() && self.order.is_empty()
    }

    /// Rows of the changed tensor as they were in the model as it was.
    pub fn undo(&self, rows: &mut [f32]) {
        if !self.order.is_empty() {
            for row in rows.chunks_exact_mut(self.order.len()) {
                let changed = row.to_vec();
                changed.iter().zip(&*self.order).for_each(|(value, at)| row[*at as usize] = *value);
            }
        }
        if !self.factors.is_empty() {
            rows.iter_mut().zip(self.factors.iter().cycle()).for_each(|(value, factor)| *value /= factor);
        }
    }

    /// Rows of the model as it was as they are in the changed one.
    pub fn redo(&self, rows: &mut [f32]) {
        if !self.factors.is_empty() {
            rows.iter_mut().zip(self.factors.iter().cycle()).for_each(|(value, factor)| *value *= factor);
        }
        if !self.order.is_empty() {
            for row in rows.chunks_exact_mut(self.order.len()) {
                let plain = row.to_vec();
                row.iter_mut().zip(&*self.order).for_each(|(value, at)| *value = plain[*at as usize]);
            }
        }
    }
}

impl ModuleScales {
    /// What was done to the inputs of the module: what its columns were divided by, its inputs were multiplied by.
    fn of_inputs(&self) -> ChannelMap {
        ChannelMap { factors: self.inputs.clone(), order: self.input_order.clone() }
    }

    /// What was done to its outputs.
    fn of_outputs(&self) -> ChannelMap {
        ChannelMap { factors: self.outputs.clone(), order: self.output_order.clone() }
    }

    /// Scales the values of A, `[rank, k]`, of the adapter's branch beside `module`.
    ///
    /// # Errors
    /// [`ScalesError::Extent`] if the module has another number of inputs.
    pub fn apply_to_a(&self, module: &str, k: usize, values: &mut [f32]) -> Result<(), ScalesError> {
        check_extent(module, "inputs", k, [self.inputs.len(), self.input_order.len()])?;
        if !self.inputs.is_empty() {
            values.iter_mut().zip(self.inputs.iter().cycle()).for_each(|(value, factor)| *value /= factor);
        }
        if !self.input_order.is_empty() {
            for row in values.chunks_exact_mut(k) {
                let before = row.to_vec();
                row.iter_mut().zip(&*self.input_order).for_each(|(value, at)| *value = before[*at as usize]);
            }
        }
        Ok(())
    }

    /// Scales the values of B, `[n, rank]`.
    ///
    /// # Errors
    /// [`ScalesError::Extent`] if the module has another number of outputs.
    pub fn apply_to_b(&self, module: &str, rank: usize, values: &mut [f32]) -> Result<(), ScalesError> {
        let n = values.len() / rank.max(1);
        check_extent(module, "outputs", n, [self.outputs.len(), self.output_order.len()])?;
        for (row, factor) in values.chunks_exact_mut(rank.max(1)).zip(&*self.outputs) {
            row.iter_mut().for_each(|value| *value *= factor);
        }
        if !self.output_order.is_empty() {
            let before = values.to_vec();
            for (row, at) in values.chunks_exact_mut(rank).zip(&*self.output_order) {
                row.copy_from_slice(&before[*at as usize * rank..][..rank]);
            }
        }
        Ok(())
    }
}

/// Refuses a module of `have` channels where one of the lists in `want` has another number; an empty list says nothing.
fn check_extent(module: &str, what: &'static str, have: usize, want: [usize; 2]) -> Result<(), ScalesError> {
    match want.into_iter().find(|want| *want > 0 && *want != have) {
        Some(want) => Err(ScalesError::Extent { module: module.to_owned(), what, have, want }),
        None => Ok(()),
    }
}

/// The number of `hex` among `lists`, to which it is added if it is not there; `None` for an empty one.
fn number(lists: &mut Vec<String>, hex: String) -> Option<usize> {
    if hex.is_empty() {
        return None;
    }
    // Modules that share a list follow each other closely, so the search is short.
    let found = lists.iter().rposition(|other| *other == hex);
    Some(found.unwrap_or_else(|| {
        lists.push(hex);
        lists.len() - 1
    }))
}

/// The list of this number; an empty one for `None`.
fn pick<T>(lists: &[Arc<[T]>], at: Option<usize>) -> Result<Arc<[T]>, ScalesError> {
    match at {
        None => Ok(Arc::new([])),
        Some(at) => lists.get(at).cloned().ok_or_else(|| refuse(format!("list {at} of {}", lists.len()))),
    }
}

fn refuse(why: String) -> ScalesError {
    ScalesError::Metadata { why }
}

fn order_to_hex(order: &[u32]) -> String {
    order.iter().map(|at| format!("{at:04x}")).collect()
}

/// Each place from 0 on has to be there once.
fn order_from_hex(text: &str) -> Result<Vec<u32>, ScalesError> {
    let order: Vec<u32> = words(text)?.into_iter().map(u32::from).collect();
    let mut seen = vec![false; order.len()];
    for at in &order {
        match seen.get_mut(*at as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(refuse(format!("place {at} in an order of {}, need each once", order.len()))),
        }
    }
    Ok(order)
}

fn to_hex(values: &[f32]) -> String {
    values.iter().map(|value| format!("{:04x}", f16::from_f32(*value).to_bits())).collect()
}

fn from_hex(text: &str) -> Result<Vec<f32>, ScalesError> {
    let number = |bits: u16| {
        let value = f16::from_bits(bits).to_f32();
        let usable = value.is_finite() && value > 0.0;
        usable.then_some(value).ok_or_else(|| refuse(format!("factor {value}, need one above 0")))
    };
    words(text)?.into_iter().map(number).collect()
}

/// 16-bit numbers of four hexadecimal digits each.
fn words(text: &str) -> Result<Vec<u16>, ScalesError> {
    let refuse = |have: &str| refuse(format!("{have:?}, need numbers of four hexadecimal digits"));
    if !text.is_ascii() || !text.len().is_multiple_of(4) {
        return Err(refuse(text.get(..text.len().min(16)).unwrap_or("no ASCII")));
    }
    let word = |at: usize| u16::from_str_radix(&text[at..at + 4], 16).map_err(|_| refuse(&text[at..at + 4]));
    (0..text.len()).step_by(4).map(word).collect()
}

/// A short name of the equalization in `metadata`, for files that hold values scaled for it; `None` if there is none.
pub fn fingerprint(metadata: &BTreeMap<String, String>) -> Option<String> {
    metadata.get(SCALES_KEY).map(|text| blake3::hash(text.as_bytes()).to_hex().to_string())
}

/// Metadata key of the record.
pub const SCALES_KEY: &str = "channel_scales";
