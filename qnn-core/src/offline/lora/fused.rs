//! Adapters of fused projections, for a graph that has the parts: `B (A x)` of the whole is `B` cut by rows over one `A`.

use std::collections::{BTreeMap, BTreeSet};

use super::{AttachPoint, LoraError, LoraPlan, PeftAdapter, PeftModule, b_name, peft::natural};
use crate::offline::fused;

impl PeftAdapter {
    /// Replaces each pair of a fused projection that is none of `points`, while its parts are, by a pair for each part.
    ///
    /// # Errors
    /// [`LoraError::Tensor`] if B has not as many rows as the parts have outputs together.
    pub fn split_fused(&mut self, points: &[AttachPoint]) -> Result<(), LoraError> {
        let outputs: BTreeMap<&str, usize> = points.iter().map(|point| (point.module.as_str(), point.n)).collect();
        let mut modules = Vec::with_capacity(self.modules.len());
        for module in std::mem::take(&mut self.modules) {
            match parts(&module.name, &outputs) {
                None => modules.push(module),
                Some(parts) => modules.extend(split(&module, &parts)?),
            }
        }
        modules.sort_by_cached_key(|module| natural(&module.name));
        if let Some(pair) = modules.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let why = "stands for the same as a part of a fused projection".to_owned();
            return Err(LoraError::Key { tensor: b_name(&pair[0].name), why });
        }
        self.modules = modules;
        Ok(())
    }
}

impl LoraPlan {
    /// Replaces each fused projection that is none of `points`, while its parts are, by its parts.
    pub fn split_fused(&mut self, points: &[AttachPoint]) {
        let outputs: BTreeMap<&str, usize> = points.iter().map(|point| (point.module.as_str(), point.n)).collect();
        let split = |target: &String| match parts(target, &outputs) {
            None => vec![target.clone()],
            Some(parts) => parts.into_iter().map(|(name, _)| name).collect(),
        };
        self.targets = self.targets.iter().flat_map(split).collect::<BTreeSet<_>>();
    }
}

/// The parts of `module` and their outputs, if it is fused and the model has only its parts.
fn parts(module: &str, outputs: &BTreeMap<&str, usize>) -> Option<Vec<(String, usize)>> {
    if outputs.contains_key(module) {
        return None;
    }
    let with_outputs = |part: String| outputs.get(part.as_str()).map(|n| (part.clone(), *n));
    fused::parts(module)?.into_iter().map(with_outputs).collect()
}

fn split(module: &PeftModule, parts: &[(String, usize)]) -> Result<Vec<PeftModule>, LoraError> {
    let want: usize = parts.iter().map(|(_, n)| n).sum();
    if module.n != want {
        let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
        return Err(LoraError::Tensor {
            tensor: b_name(&module.name),
            have: format!("{} outputs", module.n),
            want: format!("{want}, as {} have together", names.join(", ")),
        });
    }
    let mut row = 0;
    let mut part = |(name, n): &(String, usize)| {
        let rows = row * module.rank..(row + n) * module.rank;
        row += n;
        let (rank, k, scaling) = (module.rank, module.k, module.scaling);
        PeftModule { name: name.clone(), rank, n: *n, k, scaling, a: module.a.clone(), b: module.b[rows].to_vec() }
    };
    Ok(parts.iter().map(&mut part).collect())
}
