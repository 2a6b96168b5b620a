//! Whether rotary positions are what a config states: a binary has its frequencies inside, and nothing in a config changes them.

use qnn_core::offline::config::{DEFAULT_ROPE_THETA, RopeBase};
use qnn_core::{Floats, Graph, OpKind, TensorData};
use serde_json::{Value, json};

use super::EngineError;
use crate::config::{PositionalEncoding, RopeScaling};

/// Compares what is stated with the rotary embeddings of `graphs`. A model may have several, for layers of several kinds; one of
/// them has to agree.
pub(super) fn check<'a>(
    stated: &PositionalEncoding,
    graphs: impl Iterator<Item = &'a Graph>,
) -> Result<(), EngineError> {
    let tables: Vec<Vec<f32>> = graphs.flat_map(tables).collect();
    let what = if stated.rope_dim.is_some_and(|dim| tables.iter().all(|table| table.len() != dim)) {
        "rope-dim"
    } else if stated.rope_theta.is_none() && stated.rope_scaling.is_none() {
        return Ok(());
    } else if tables.iter().all(|table| !are_close(table, &frequencies(stated, table.len()))) {
        "rope-theta and rope-scaling"
    } else {
        return Ok(());
    };
    let dim = stated.rope_dim.or(tables.first().map(Vec::len)).unwrap_or(0);
    let model: Vec<String> = tables.iter().map(|table| in_words(table)).collect();
    Err(EngineError::Mismatch {
        what,
        config: in_words(&frequencies(stated, dim)),
        model: if model.is_empty() { "no rotary embedding".to_owned() } else { model.join("; ") },
    })
}

/// The frequencies of each rotary embedding.
fn tables(graph: &Graph) -> impl Iterator<Item = Vec<f32>> {
    let tables = graph.nodes().iter().filter(|node| matches!(node.op, OpKind::RotaryTable { .. }));
    tables.filter_map(|node| {
        let tensor = graph.tensor(*node.inputs.get(1)?);
        let Some(TensorData::Flat(bytes)) = &tensor.data else { return None };
        Some(Floats::new(bytes.clone(), tensor.data_type)?.to_vec())
    })
}

/// What `stated` makes of `dim` pairs; what it leaves out is as in transformers.
fn frequencies(stated: &PositionalEncoding, dim: usize) -> Vec<f32> {
    let theta = stated.rope_theta.unwrap_or(DEFAULT_ROPE_THETA);
    let base = RopeBase { theta, rotary_dim: 2 * dim, max_positions: 0, original_max_positions: None };
    let scaling = stated.rope_scaling.map_or(Value::Null, in_json);
    base.scaled("rope-scaling", &scaling).unwrap_or_else(|_| base.plain()).inv_freq
}

/// As in a model's `config.json`.
fn in_json(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Default => json!({"rope_type": "default"}),
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

/// Tables are stored as f32 or less exactly, by whatever tool made them.
fn are_close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-3 * a.abs().max(b.abs()))
}

fn in_words(frequencies: &[f32]) -> String {
    match frequencies {
        [first, .., last] => format!("{} frequencies from {first} to {last:e}", frequencies.len()),
        [one] => format!("the frequency {one}"),
        [] => "no frequencies".to_owned(),
    }
}
