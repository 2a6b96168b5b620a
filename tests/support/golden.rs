//! The golden runs of `tests/golden`, and how an engine is measured against them.

use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use genie::engine::{Engine, Logits};
use serde_json::Value;

/// One golden run: a prompt and its greedy continuation.
pub struct Golden<'a> {
    /// Name of the prompt.
    pub name: &'a str,
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// Ids of the continuation.
    pub ids: Vec<u32>,
    /// Largest minus second largest logit of each step.
    pub margins: Vec<f64>,
    top: &'a Value,
}

/// A continuation and the largest error of the top ten logits at its first positions.
pub struct Continuation {
    /// The ids chosen.
    pub ids: Vec<u32>,
    /// The error, while the ids are the golden ones.
    pub top_error: f64,
}

impl<'a> Golden<'a> {
    /// The run of `prompt` in the golden config `config`, such as `base` or `pirate@0.5`.
    ///
    /// # Errors
    /// If the file has no such run.
    pub fn new(prompt: &'a Value, config: &str) -> Result<Golden<'a>> {
        let run = prompt["runs"].get(config).with_context(|| format!("no golden run {config:?}"))?;
        Ok(Golden {
            name: prompt["name"].as_str().context("name")?,
            prompt: integers(&prompt["prompt_ids"]),
            ids: integers(&run["ids"]),
            margins: run["margin"].as_array().context("margin")?.iter().filter_map(Value::as_f64).collect(),
            top: &run["top"],
        })
    }

    /// Decodes as many ids as the golden run has, always feeding its own choice.
    ///
    /// # Errors
    /// What the engine says.
    pub fn continue_greedily(&self, engine: &mut dyn Engine) -> Result<Continuation> {
        engine.rewind(0);
        let (mut fed, mut ids, mut top_error) = (self.prompt.clone(), Vec::new(), 0.0f64);
        for step in 0..self.ids.len() {
            let logits = engine.forward(&fed, Logits::Last, &AtomicBool::new(false))?;
            if self.ids[..step] == ids[..] && step < self.top.as_array().map_or(0, Vec::len) {
                let golden = self.top[step]["logits"].as_array().context("logits")?;
                for (id, golden) in integers(&self.top[step]["ids"]).iter().zip(golden) {
                    let error = f64::from(logits[*id as usize]) - golden.as_f64().context("a logit")?;
                    top_error = top_error.max(error.abs());
                }
            }
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0) as u32;
            ids.push(best);
            fed = vec![best];
        }
        Ok(Continuation { ids, top_error })
    }
}

/// `generate.json`.
pub fn generations() -> Value {
    serde_json::from_str(include_str!("../golden/generate.json")).expect("the golden file is JSON")
}

/// `ppl.json`.
pub fn perplexities() -> Value {
    serde_json::from_str(include_str!("../golden/ppl.json")).expect("the golden file is JSON")
}

/// The ids in a JSON array.
pub fn integers(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}
