//! Projections that some models and adapters store as one matrix: the rows of the parts, one part after the other.
//!
//! A graph has the parts. Weights are split when they are imported, adapters when they meet the graph.

/// The parts of the fused projection at the path `module`: `….qkv_proj` has `….q_proj`, `….k_proj` and `….v_proj`.
/// `None` if that is no fused projection.
pub(crate) fn parts(module: &str) -> Option<Vec<String>> {
    let (parent, last) = module.rsplit_once('.')?;
    let (_, parts) = FUSED.iter().find(|(fused, _)| *fused == last)?;
    Some(parts.iter().map(|part| format!("{parent}.{part}")).collect())
}

/// The fused projection that would hold the module at the path `part`, and which of its parts that is.
pub(crate) fn whole(part: &str) -> Option<(String, usize)> {
    let (parent, last) = part.rsplit_once('.')?;
    let found = FUSED.iter().find_map(|(fused, parts)| Some((fused, parts.iter().position(|part| *part == last)?)));
    found.map(|(fused, at)| (format!("{parent}.{fused}"), at))
}

/// Phi-3's names.
const FUSED: &[(&str, &[&str])] =
    &[("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];
