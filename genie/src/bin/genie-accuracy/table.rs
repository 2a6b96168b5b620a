//! A result as text, for people.

use std::fmt::Write;

use crate::record::{CaseRecord, Record};

/// The tables of a record.
pub(crate) fn text(record: &Record) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    let text = &record.text;
    line(format!("{} against {}", record.model.config, record.reference.config));
    line(format!("{} windows of {} ids of {}", text.windows, text.window, text.file));
    line(String::new());
    line(format!(
        "{:<16} {:>10} {:>10} {:>8} {:>8} {:>7} {:>9} {:>9} {:>9}",
        "", "reference", "perplexity", "ratio", "± s.e.", "top-1 %", "KL mean", "median", "99 %"
    ));
    record.cases.iter().for_each(|case| line(summary(case)));
    for case in &record.cases {
        line(String::new());
        line(format!(
            "{}: signal to quantization noise, dB (all rows together, and the mean of the rows)",
            case.name()
        ));
        line(format!(
            "{:<10} {:>9} {:>9} {:>12} {:>9}  {}",
            "", "made here", "row", "accumulated", "row", "worst tensor"
        ));
        layers(case).for_each(&mut line);
    }
    out
}

fn summary(case: &CaseRecord) -> String {
    let divergence = &case.divergence;
    format!(
        "{:<16} {:>10.4} {:>10.4} {:>8.5} {:>8.5} {:>7.2} {:>9.6} {:>9.6} {:>9.6}",
        case.name(),
        case.reference.perplexity,
        case.tested.perplexity,
        case.ratio,
        case.ratio * case.log_ratio_error,
        100.0 * case.top1_agreement,
        divergence.mean,
        divergence.median,
        divergence.p99,
    )
}

/// A line for each place: its result, and the tensor inside it that is worst off.
fn layers(case: &CaseRecord) -> impl Iterator<Item = String> {
    let worst = case.worst();
    case.layers().map(move |layer| {
        let mut line = format!(
            "{:<10} {:>9} {:>9} {:>12} {:>9}",
            layer.place,
            decibels(layer.made.all_db),
            decibels(layer.made.row_db),
            decibels(layer.accumulated.all_db),
            decibels(layer.accumulated.row_db),
        );
        if let Some(tensor) = worst.iter().find(|tensor| tensor.place == layer.place) {
            let _ = write!(line, "  {} {}", tensor.name, decibels(tensor.made.row_db));
        }
        line
    })
}

/// One decimal; `exact` where nothing differs.
pub(crate) fn decibels(db: Option<f64>) -> String {
    db.map_or_else(|| "exact".to_owned(), |db| format!("{db:.1}"))
}
