//! What the converter says on standard output.

use std::io::{self, Write};
use std::path::Path;

use qnn_core::offline::{
    arch::{SUPPORTED, WeightClass, WeightUse},
    convert::{ConvertReport, LoraReport},
    dry_run::DryRun,
};

/// After a conversion.
pub(crate) fn summary(report: &ConvertReport, output: &Path, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "architecture: {}", report.architecture)?;
    writeln!(out, "parameters:   {:.1} M", millions(report.parameters))?;
    weights(&report.weights, out)?;
    if let Some(lora) = &report.lora {
        branches(lora, out)?;
    }
    for warning in &report.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    if let Some(done) = &report.overrides {
        writeln!(out, "overridden: {} weights, {} computed tensors", done.weights.len(), done.activations.len())?;
        if let Some(first) = done.unknown.first() {
            writeln!(out, "  in the file but not in the graph: {} tensors, {first} the first", done.unknown.len())?;
        }
        for (name, why) in &done.passed_over {
            writeln!(out, "  left as it is: {name} ({why})")?;
        }
    }
    writeln!(out, "wrote {} ({:.1} MiB)", output.display(), mib(report.size_bytes))?;
    for path in &report.sidecars {
        writeln!(out, "wrote {}", path.display())?;
    }
    Ok(())
}

/// Instead of a conversion.
pub(crate) fn dry_run(found: &DryRun, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "architecture: {} ({} layers)", found.architecture, found.layers)?;
    writeln!(out, "parameters:   {:.1} M", millions(found.parameters))?;
    writeln!(out, "source:       {}", found.source)?;
    weights(&found.weights, out)?;
    writeln!(out, "expected size of the DLC: {:.1} MiB", mib(found.dlc_bytes))?;
    writeln!(
        out,
        "expected memory: {:.1} MiB of mapped weights, {:.1} MiB of KV cache at {} positions",
        mib(found.weights.iter().map(|w| w.size_bytes).sum()),
        mib(found.cache_bytes),
        found.cache_positions
    )?;
    writeln!(out, "adapters can attach to:")?;
    for kind in &found.attach_points {
        writeln!(out, "  {:<30} [{}, {}] in {} layers", kind.name, kind.n, kind.k, kind.layers)?;
    }
    if let Some(lora) = &found.lora {
        branches(lora, out)?;
    }
    for warning in &found.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    writeln!(out, "nothing was written (--dry_run)")
}

/// The families, a line each for their names and for what is built.
pub(crate) fn architectures(out: &mut impl Write) -> io::Result<()> {
    for architecture in SUPPORTED {
        let gguf = match architecture.gguf_names {
            [] => String::new(),
            names => format!("; GGUF: {}", names.join(", ")),
        };
        writeln!(out, "{} (config.json: {}{gguf})", architecture.title, architecture.model_types.join(", "))?;
        writeln!(out, "    {}", architecture.notes)?;
    }
    Ok(())
}

fn weights(weights: &[WeightUse], out: &mut impl Write) -> io::Result<()> {
    for weights in weights {
        let class = match weights.class {
            WeightClass::Embedding => "embedding",
            WeightClass::Linear => "linear",
            WeightClass::Vector => "vectors",
        };
        let (source, format, change) = (weights.source, &weights.format, weights.change.name());
        let (n, elements, size) = (weights.n_tensors, millions(weights.elements), mib(weights.size_bytes));
        writeln!(
            out,
            "  {class:<10} {n:>4} x {source:<6} -> {format:<39} {elements:>8.1} M {size:>9.1} MiB  {change}"
        )?;
    }
    Ok(())
}

fn branches(lora: &LoraReport, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "adapter branches: {} layers, rank up to {}, {}", lora.targets, lora.max_rank, lora.data_type)
}

fn millions(elements: u64) -> f64 {
    elements as f64 / 1e6
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
