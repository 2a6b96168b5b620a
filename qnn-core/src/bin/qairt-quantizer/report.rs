//! What was done, for people to read.

use qnn_core::{
    encoding::Encoding,
    offline::{
        equalize::SmoothReport,
        quantize::{QuantizeReport, TensorReport},
    },
};

/// Prints what became of the inputs' channels.
pub(crate) fn print_smoothing(reports: &[SmoothReport]) {
    let scaled: Vec<&SmoothReport> = reports.iter().filter(|group| group.error_after < group.error_before).collect();
    let sorted = scaled.iter().filter(|group| group.is_sorted).count();
    println!("inputs smoothed: {} of {} groups, channels sorted in {sorted}", scaled.len(), reports.len());
    let mean = |error: fn(&SmoothReport) -> f64| {
        scaled.iter().map(|group| error(group)).sum::<f64>() / scaled.len().max(1) as f64
    };
    if !scaled.is_empty() {
        let (before, after) = (mean(|group| group.error_before), mean(|group| group.error_after));
        println!("  mean relative error of the matrices' results {before:.2e} before, {after:.2e} after");
    }
}

/// Prints which encodings the inputs of matrices got.
pub(crate) fn print_quantization(report: &QuantizeReport, windows: usize) {
    println!("weights made integers: {}", report.weights);
    if let Some(done) = &report.overrides {
        println!("overridden: {} weights, {} computed tensors", done.weights.len(), done.activations.len());
        for (why, names) in [("in the file but not in the graph", &done.unknown)] {
            if let Some(first) = names.first() {
                println!("  {why}: {} tensors, {first} the first", names.len());
            }
        }
        for (name, why) in &done.passed_over {
            println!("  left as it is: {name} ({why})");
        }
    }
    if report.tensors.is_empty() {
        return;
    }
    println!("calibrated: {} tensors over {windows} windows; worst signal to noise first:", report.tensors.len());
    let mut tensors: Vec<&TensorReport> = report.tensors.iter().collect();
    tensors.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    for tensor in tensors.iter().take(WORST) {
        let Encoding::ScaleOffset { bitwidth, scale, offset } = tensor.encoding.1 else { continue };
        let ((min, max), name, db) = (tensor.range, &tensor.name, tensor.sqnr_db);
        println!("  {db:>6.1} dB  {name}: {min:.3} to {max:.3}, {bitwidth} bits, scale {scale:.3e}, offset {offset}");
    }
    let wide =
        report.tensors.iter().filter(|t| matches!(t.encoding.1, Encoding::ScaleOffset { bitwidth: 16, .. })).count();
    println!("  16 bits: {wide}, 8 bits: {}", report.tensors.len() - wide);
}

/// Tensors that a summary lists.
pub(crate) const WORST: usize = 8;
