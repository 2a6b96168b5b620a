//! Adapters as the graph takes them: scaling folded into B, several of them side by side.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{AttachPoint, LoraError, PeftAdapter, PeftModule, a_name, b_name, peft::natural, values::Matrix};
use crate::adapter::{self, Description};

/// One use case: an adapter, or several in one, ready to be stored. Strength 1 is what PEFT computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// The use case's name.
    pub name: String,
    /// Columns of all slots together.
    pub rank: usize,
    /// Its adapters, each with columns of its own.
    pub slots: Vec<Slot>,
    /// Values, in natural order of the names.
    pub modules: Vec<FoldedModule>,
}

/// One adapter of a use case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Name of the adapter.
    pub name: String,
    /// Its columns, the first and the one after the last; the same for every module.
    pub columns: [usize; 2],
    /// What was folded into its B.
    pub scaling: Scaling,
    /// Hash of its PEFT files.
    pub source_hash: String,
}

/// The factor on an adapter's product that its config asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    /// Of all modules that are not named.
    pub default: f64,
    /// Of modules that have another.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub modules: BTreeMap<String, f64>,
}

/// The pair of one module. It has the columns up to the last slot that targets the module.
#[derive(Debug, Clone, PartialEq)]
pub struct FoldedModule {
    /// Path of the module in the model.
    pub module: String,
    /// Columns of the pair.
    pub rank: usize,
    /// Outputs of the module.
    pub n: usize,
    /// Inputs of the module.
    pub k: usize,
    /// A: `[rank, k]`.
    pub a_values: Vec<f32>,
    /// B: `[n, rank]`, scaled.
    pub b_values: Vec<f32>,
}

impl FoldedModule {
    /// A under the name of its tensor.
    pub fn a(&self) -> Matrix<'_> {
        Matrix { name: a_name(&self.module), n: self.rank, k: self.k, values: &self.a_values }
    }

    /// B under the name of its tensor.
    pub fn b(&self) -> Matrix<'_> {
        Matrix { name: b_name(&self.module), n: self.n, k: self.rank, values: &self.b_values }
    }
}

/// Puts `parts` (name and adapter of each slot) side by side: `y += Σ strength · scaling · B (A x)`.
///
/// # Errors
/// [`LoraError`] if there are no parts, two have one name, or two were trained on modules of different sizes.
pub fn fold<'a>(name: &str, parts: &[(String, &'a PeftAdapter)]) -> Result<Folded, LoraError> {
    if parts.is_empty() {
        return Err(LoraError::Empty);
    }
    let mut slots: Vec<Slot> = Vec::new();
    for (name, peft) in parts {
        if slots.iter().any(|slot| slot.name == *name) {
            let want = "adapters whose directories have different names";
            return Err(LoraError::config("lora_weights", format!("{name} twice"), want));
        }
        let begin = slots.last().map_or(0, |slot| slot.columns[1]);
        slots.push(Slot {
            name: name.clone(),
            columns: [begin, begin + peft.rank()],
            scaling: scaling(peft),
            source_hash: peft.hash.clone(),
        });
    }
    let names: BTreeSet<&str> = parts.iter().flat_map(|(_, p)| p.modules.iter().map(|m| m.name.as_str())).collect();
    let mut names: Vec<&str> = names.into_iter().collect();
    names.sort_by_cached_key(|name| natural(name));
    let by_name = |peft: &'a PeftAdapter| peft.modules.iter().map(|module| (module.name.as_str(), module)).collect();
    let by_name: Vec<BTreeMap<&str, &PeftModule>> = parts.iter().map(|(_, peft)| by_name(peft)).collect();
    let mut modules = Vec::with_capacity(names.len());
    for module in names {
        let own = slots.iter().zip(&by_name).filter_map(|(slot, own)| Some((slot.columns[0], *own.get(module)?)));
        let found: Vec<(usize, &PeftModule)> = own.collect();
        modules.push(join(module, &found)?);
    }
    Ok(Folded { name: name.to_owned(), rank: slots.last().map_or(0, |slot| slot.columns[1]), slots, modules })
}

/// The pair of `module` out of the pairs in `found`, each with its first column.
fn join(module: &str, found: &[(usize, &PeftModule)]) -> Result<FoldedModule, LoraError> {
    let first = found.first().expect("its name was found in an adapter").1;
    if let Some((_, other)) = found.iter().find(|(_, other)| (other.n, other.k) != (first.n, first.k)) {
        return Err(LoraError::Tensor {
            tensor: a_name(module),
            have: format!("for a weight [{}, {}]", other.n, other.k),
            want: format!("[{}, {}], as in the adapter before it", first.n, first.k),
        });
    }
    let (n, k) = (first.n, first.k);
    let rank = found.iter().map(|(begin, part)| begin + part.rank).max().unwrap_or(0);
    let (mut a_values, mut b_values) = (vec![0.0; rank * k], vec![0.0; n * rank]);
    for (begin, part) in found {
        a_values[begin * k..(begin + part.rank) * k].copy_from_slice(&part.a);
        for (out, row) in b_values.chunks_exact_mut(rank).zip(part.b.chunks_exact(part.rank)) {
            for (out, value) in out[*begin..].iter_mut().zip(row) {
                *out = (f64::from(*value) * part.scaling) as f32;
            }
        }
    }
    if let Some(at) = b_values.iter().position(|value| !value.is_finite()) {
        return Err(LoraError::Tensor {
            tensor: b_name(module),
            have: format!("{} in row {} after scaling", b_values[at], at / rank),
            want: "finite values".to_owned(),
        });
    }
    Ok(FoldedModule { module: module.to_owned(), rank, n, k, a_values, b_values })
}

/// The commonest scaling of an adapter's modules, and those that differ.
fn scaling(peft: &PeftAdapter) -> Scaling {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    peft.modules.iter().for_each(|m| *counts.entry(m.scaling.to_bits()).or_default() += 1);
    let default = peft.modules.iter().map(|m| m.scaling).max_by_key(|s| counts[&s.to_bits()]).unwrap_or(1.0);
    let others = peft.modules.iter().filter(|m| m.scaling != default);
    Scaling { default, modules: others.map(|m| (m.name.clone(), m.scaling)).collect() }
}

impl Folded {
    /// What an [`crate::Adapter`] with these values says of itself.
    pub fn description(&self) -> Description {
        describe(self.rank, &self.slots)
    }

    /// Checks that every tensor lands on a branch of one of `points`, the attach points of graph `graph`, and fits there.
    ///
    /// # Errors
    /// [`LoraError`] naming the first tensor that does not.
    pub fn land(&self, graph: &str, points: &[AttachPoint]) -> Result<(), LoraError> {
        let branches = points.iter().filter_map(|point| point.branch);
        let Some(max) = branches.map(|branch| branch.max_rank).min() else {
            return Err(LoraError::NoBranches { graph: graph.to_owned() });
        };
        let by_name: BTreeMap<&String, &AttachPoint> = points.iter().map(|point| (&point.module, point)).collect();
        let on_branch = |m: &&FoldedModule| by_name.get(&m.module).is_some_and(|point| point.branch.is_some());
        if !self.modules.iter().any(|module| on_branch(&module)) {
            return Err(LoraError::NothingLands { tensors: self.modules.len() * 2, points: by_name.len() });
        }
        if self.rank > max {
            return Err(LoraError::Rank { adapter: self.name.clone(), have: self.rank, max });
        }
        for module in &self.modules {
            let Some(point) = by_name.get(&module.module) else {
                return Err(LoraError::no_point(&a_name(&module.module), &module.module, by_name.keys().copied()));
            };
            if point.branch.is_none() {
                let why = format!("the graph has no adapter branch at {}; convert the model with it", module.module);
                return Err(LoraError::NoPoint { tensor: a_name(&module.module), why });
            }
            check_shape(point, &module.module, module.n, module.k)?;
        }
        Ok(())
    }
}

impl PeftAdapter {
    /// Checks that every module is one of `points` and has its extents.
    ///
    /// # Errors
    /// [`LoraError`] naming the first tensor that has no place.
    pub fn fits(&self, points: &[AttachPoint]) -> Result<(), LoraError> {
        let by_name: BTreeMap<&String, &AttachPoint> = points.iter().map(|point| (&point.module, point)).collect();
        if !self.modules.iter().any(|module| by_name.contains_key(&module.name)) {
            return Err(LoraError::NothingLands { tensors: self.modules.len() * 2, points: points.len() });
        }
        for module in &self.modules {
            let Some(point) = by_name.get(&module.name) else {
                return Err(LoraError::no_point(&a_name(&module.name), &module.name, by_name.keys().copied()));
            };
            check_shape(point, &module.name, module.n, module.k)?;
        }
        Ok(())
    }
}

/// What an adapter of these slots says of itself.
pub(crate) fn describe(rank: usize, slots: &[Slot]) -> Description {
    let slot = |slot: &Slot| adapter::Slot {
        name: slot.name.clone(),
        columns: slot.columns[0]..slot.columns[1],
        scaling: slot.scaling.modules.is_empty().then_some(slot.scaling.default as f32),
    };
    let hash = |slot: &Slot| (format!("source_hash.{}", slot.name), slot.source_hash.clone());
    let mut metadata: BTreeMap<String, String> = slots.iter().map(hash).collect();
    for slot in slots.iter().filter(|slot| !slot.scaling.modules.is_empty()) {
        let json = serde_json::to_string(&slot.scaling).expect("numbers and strings");
        metadata.insert(format!("scaling.{}", slot.name), json);
    }
    Description { graph: None, rank, slots: slots.iter().map(slot).collect(), metadata }
}

fn check_shape(point: &AttachPoint, module: &str, n: usize, k: usize) -> Result<(), LoraError> {
    let refuse = |tensor, have: String, want: String| Err(LoraError::Tensor { tensor, have, want });
    let weight = format!("as the weight [{}, {}] has", point.n, point.k);
    if k != point.k {
        return refuse(a_name(module), format!("{k} inputs"), format!("{}, {weight}", point.k));
    }
    if n != point.n {
        return refuse(b_name(module), format!("{n} outputs"), format!("{}, {weight}", point.n));
    }
    Ok(())
}
