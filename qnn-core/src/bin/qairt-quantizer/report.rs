//! What was done, for people to read.

use std::io::{self, Write};

use qnn_core::{
    encoding::Encoding,
    offline::{
        encodings::FileVersion,
        equalize::SmoothReport,
        quantize::{QuantizeReport, TensorReport, adapters::AdapterReport},
    },
};

use crate::{Cli, Done, Dump, Written, weights};

/// Prints what was written and what was done with `windows` windows.
pub(crate) fn print(cli: &Cli, done: &Done, written: &Written, windows: usize, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "wrote {}", cli.output_dlc.display())?;
    for path in &written.sidecars {
        writeln!(out, "wrote {}", path.display())?;
    }
    if let Some(dump) = &written.dump {
        print_dump(dump, out)?;
    }
    if let Some(smoothing) = &done.smoothing {
        print_smoothing(smoothing, out)?;
    }
    if let Some(rounding) = &done.rounding {
        weights::print(rounding, out)?;
    }
    print_quantization(&done.report, windows, out)?;
    for adapter in &done.adapters {
        print_adapter(adapter, out)?;
    }
    match done.placed.as_ref().filter(|placed| placed.are_scaled) {
        Some(placed) => writeln!(out, "adapters scaled as the model is; their list: {}", placed.list.display()),
        None => Ok(()),
    }
}

fn print_dump(dump: &Dump, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "wrote {} ({} tensors)", dump.path.display(), dump.tensors)?;
    let Some(first) = dump.left_out.first() else { return Ok(()) };
    let what = match dump.version {
        FileVersion::V0_6_1 => "with scales per block, which version 0.6.1 has no place for",
        _ => "whose blocks have float minima",
    };
    writeln!(out, "  without {} weights {what}, {first} the first", dump.left_out.len())
}

fn print_adapter(adapter: &AdapterReport, out: &mut impl Write) -> io::Result<()> {
    let what = match adapter.members.is_empty() {
        true => format!("adapter {}", adapter.name),
        false => format!("group {} ({})", adapter.name, adapter.members.join(", ")),
    };
    let (all, wide, path) = (adapter.tensors, adapter.wide, adapter.path.display());
    writeln!(out, "{what}: encodings of {all} tensors, {wide} of them 16 bits, in {path}")
}

/// Prints what became of the inputs' channels.
fn print_smoothing(reports: &[SmoothReport], out: &mut impl Write) -> io::Result<()> {
    let scaled: Vec<&SmoothReport> = reports.iter().filter(|group| group.error_after < group.error_before).collect();
    let sorted = scaled.iter().filter(|group| group.is_sorted).count();
    writeln!(out, "inputs smoothed: {} of {} groups, channels sorted in {sorted}", scaled.len(), reports.len())?;
    let mean = |error: fn(&SmoothReport) -> f64| {
        scaled.iter().map(|group| error(group)).sum::<f64>() / scaled.len().max(1) as f64
    };
    if !scaled.is_empty() {
        let (before, after) = (mean(|group| group.error_before), mean(|group| group.error_after));
        writeln!(out, "  mean relative error of the matrices' results {before:.2e} before, {after:.2e} after")?;
    }
    Ok(())
}

/// Prints which encodings the inputs of matrices got.
fn print_quantization(report: &QuantizeReport, windows: usize, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "weights made integers: {}", report.weights)?;
    if let Some(done) = &report.overrides {
        writeln!(out, "overridden: {} weights, {} computed tensors", done.weights.len(), done.activations.len())?;
        for (why, names) in [("in the file but not in the graph", &done.unknown)] {
            if let Some(first) = names.first() {
                writeln!(out, "  {why}: {} tensors, {first} the first", names.len())?;
            }
        }
        for (name, why) in &done.passed_over {
            writeln!(out, "  left as it is: {name} ({why})")?;
        }
    }
    if report.tensors.is_empty() {
        return Ok(());
    }
    writeln!(out, "calibrated: {} tensors over {windows} windows; worst signal to noise first:", report.tensors.len())?;
    let mut tensors: Vec<&TensorReport> = report.tensors.iter().collect();
    tensors.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    for tensor in tensors.iter().take(WORST) {
        let Encoding::ScaleOffset { bitwidth, scale, offset } = tensor.encoding.1 else { continue };
        let ((min, max), name, db) = (tensor.range, &tensor.name, tensor.sqnr_db);
        writeln!(
            out,
            "  {db:>6.1} dB  {name}: {min:.3} to {max:.3}, {bitwidth} bits, scale {scale:.3e}, offset {offset}"
        )?;
    }
    let wide =
        report.tensors.iter().filter(|t| matches!(t.encoding.1, Encoding::ScaleOffset { bitwidth: 16, .. })).count();
    writeln!(out, "  16 bits: {wide}, 8 bits: {}", report.tensors.len() - wide)
}

/// Tensors that a summary lists.
pub(crate) const WORST: usize = 8;
