//! Results as one page of HTML with all it needs: tables, plots drawn from the same figures, how it was made.
//!
//! Nothing on the page is written by hand but the words around the figures.

use anyhow::ensure;

use crate::record::{CaseRecord, FormatRecord, ModelRecord, Record, TensorRecord};
use crate::table::decibels;

mod html;
mod plot;
#[cfg(test)]
mod tests;

use html::{Table, escape};
use plot::{Dot, Dots, Lines, Row, signed};

/// The page.
///
/// # Errors
/// Results that cannot stand in one table: of different texts, or models with another number of layers.
pub(crate) fn html(records: &[Record]) -> anyhow::Result<String> {
    check(records)?;
    let title = "How close to the float model";
    let sections = [perplexity(records), layers(records), adapters(records), sizes(records), origin(records)];
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>{title}</title>\
         <style>\n{STYLE}</style></head>\n<body><main><h1>{title}</h1>\n{}{}</main></body></html>\n",
        lead(records),
        sections.concat()
    ))
}

fn check(records: &[Record]) -> anyhow::Result<()> {
    let Some(first) = records.first() else { return Ok(()) };
    for other in records {
        let (a, b) = (&first.text, &other.text);
        ensure!(
            (&a.file, a.ids, a.window, a.windows) == (&b.file, b.ids, b.window, b.windows),
            "{:?} was scored on {} windows of {} of the {} ids of {}, {:?} on {} of {} of {} of {}: need the same text",
            first.label,
            a.windows,
            a.window,
            a.ids,
            a.file,
            other.label,
            b.windows,
            b.window,
            b.ids,
            b.file
        );
        let places = |record: &Record| record.cases.first().map_or(0, |case| case.layers().count());
        let (a, b) = (places(first), places(other));
        ensure!(a == b, "{:?} has {a} places, {:?} has {b}: need forms of one model", first.label, other.label);
    }
    Ok(())
}

fn lead(records: &[Record]) -> String {
    let Some(record) = records.first() else { return String::new() };
    let text = &record.text;
    format!(
        "<p class=\"lead\">{} windows of {} ids of {}, each from an empty cache; the first id of a window is not scored. \
         Every model is compared with its reference id by id, in the same run.</p>\n",
        text.windows,
        text.window,
        escape(&text.file)
    )
}

fn perplexity(records: &[Record]) -> String {
    let cases: Vec<(&Record, &CaseRecord)> =
        records.iter().filter_map(|record| Some((record, record.base()?))).collect();
    if cases.is_empty() {
        return String::new();
    }
    let rows = cases.iter().map(|(record, case)| Row { name: record.label.clone(), dots: vec![dot(0, case)] });
    let plot = Dots {
        title: "Increase of perplexity over the reference",
        x_label: "increase in percent, with its 95 % interval; steps widen beyond ±0.1 %",
        series: vec!["base".to_owned()],
        rows: rows.collect(),
    };
    let mut table = Table::new(
        "Perplexity, agreement of the most probable token, and Kullback-Leibler divergence in nats, base model",
        &[&["model", "MB"], &FIGURES[..]].concat(),
    );
    for (record, case) in cases {
        let mut row = vec![record.label.clone(), megabytes(record.model.bytes())];
        row.extend(figures(case));
        table.row(row);
    }
    format!(
        "<h2>Perplexity</h2><p>The interval is that of the mean log-ratio over the scored ids, taken as independent. \
         Divergence is that of the model's distribution from the reference's, averaged over all scored ids; the rarer and \
         larger misses show at its 99th percentile.</p>\n{}{}",
        plot.svg(),
        table.html()
    )
}

/// The cells of a case under [`FIGURES`].
fn figures(case: &CaseRecord) -> Vec<String> {
    let divergence = &case.divergence;
    let dot = dot(0, case);
    let mut figures = vec![
        format!("{:.3}", case.reference.perplexity),
        format!("{:.3}", case.tested.perplexity),
        signed(dot.value),
        format!("{} to {}", signed(dot.low), signed(dot.high)),
        format!("{:.2}", 100.0 * case.top1_agreement),
    ];
    let nats = [divergence.mean, divergence.median, divergence.p99, divergence.max];
    figures.extend(nats.map(|value| format!("{value:.5}")));
    figures
}

/// The increase of perplexity in percent, with its interval.
fn dot(series: usize, case: &CaseRecord) -> Dot {
    let percent = |log_ratio: f64| 100.0 * log_ratio.exp_m1();
    let half = INTERVAL * case.log_ratio_error;
    Dot {
        series,
        value: percent(case.log_ratio),
        low: percent(case.log_ratio - half),
        high: percent(case.log_ratio + half),
    }
}

fn layers(records: &[Record]) -> String {
    let cases: Vec<(&str, &CaseRecord)> =
        records.iter().filter_map(|record| Some((record.label.as_str(), record.base()?))).collect();
    if cases.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "<h2>Where the error is made</h2><p>Signal to quantization noise of what each layer gives to the next, in decibels: \
         6 dB more is half the error. <em>Made here</em>: the layer is given exactly what the reference gave to its own. \
         <em>Accumulated</em>: with all that went wrong before. Plotted is the mean of the rows' (tokens') own ratios; the \
         ratio of all rows together, which a few rows with massive values can decide, is in the tables.</p>\n{}{}{}",
        layer_plot("Made here", &cases, |tensor| tensor.made.row_db),
        layer_plot("Accumulated", &cases, |tensor| tensor.accumulated.row_db),
        layer_table("Signal to noise by layer, dB", &cases).folded()
    );
    for (label, case) in cases {
        out.push_str(&worst_table(label, case).folded());
    }
    out
}

fn layer_plot(title: &str, cases: &[(&str, &CaseRecord)], value: impl Fn(&TensorRecord) -> Option<f64>) -> String {
    let places =
        cases.first().map_or_else(Vec::new, |(_, case)| case.layers().map(TensorRecord::short_place).collect());
    let series = cases.iter().map(|(name, case)| ((*name).to_owned(), case.layers().map(&value).collect()));
    let title = format!("{title}: signal to noise by layer");
    let plot =
        Lines { title: &title, x_label: "layer", y_label: "signal to noise, dB", places, series: series.collect() };
    plot.svg()
}

/// A row for each place, four columns for each case.
fn layer_table(caption: &str, cases: &[(&str, &CaseRecord)]) -> Table {
    let mut table = Table::new(caption, &["place"]);
    for (name, _) in cases {
        for column in ["made, rows", "made, all", "accumulated, rows", "accumulated, all"] {
            table.column(&format!("{name}: {column}"));
        }
    }
    for (at, first) in cases.first().into_iter().flat_map(|(_, case)| case.layers().enumerate()) {
        let mut row = vec![first.place.clone()];
        for tensor in cases.iter().filter_map(|(_, case)| case.layers().nth(at)) {
            let (made, accumulated) = (tensor.made, tensor.accumulated);
            row.extend([made.row_db, made.all_db, accumulated.row_db, accumulated.all_db].map(decibels));
        }
        table.row(row);
    }
    table
}

fn worst_table(label: &str, case: &CaseRecord) -> Table {
    let caption = format!("{label}: the {N_WORST} tensors that are worst off in their layer, dB");
    let mut table = Table::new(&caption, &["tensor", "place", "made, rows", "made, all", "accumulated, rows"]);
    for tensor in case.worst().into_iter().take(N_WORST) {
        let cells = [tensor.made.row_db, tensor.made.all_db, tensor.accumulated.row_db].map(decibels);
        let mut row = vec![tensor.name.clone(), tensor.place.clone()];
        row.extend(cells);
        table.row(row);
    }
    table
}

fn adapters(records: &[Record]) -> String {
    let records: Vec<&Record> = records.iter().filter(|record| record.adapters().next().is_some()).collect();
    if records.is_empty() {
        return String::new();
    }
    let mut names: Vec<String> = Vec::new();
    for name in records.iter().flat_map(|record| &record.cases).map(CaseRecord::name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let dots = |name: &String| {
        let of =
            |(series, record): (usize, &&Record)| Some(dot(series, record.cases.iter().find(|c| c.name() == *name)?));
        records.iter().enumerate().filter_map(of).collect()
    };
    let plot = Dots {
        title: "Increase of perplexity over the reference with the same adapter",
        x_label: "increase in percent, with its 95 % interval; steps widen beyond ±0.1 %",
        series: records.iter().map(|record| record.label.clone()).collect(),
        rows: names.iter().map(|name| Row { name: name.clone(), dots: dots(name) }).collect(),
    };
    let mut table = Table::new(
        "The base and each adapter, against the reference with the same adapter",
        &[&["adapter", "model", "encodings", "MB"], &FIGURES[..]].concat(),
    );
    for name in &names {
        for record in &records {
            for case in record.cases.iter().filter(|case| case.name() == *name) {
                let mut row = vec![name.clone(), record.label.clone(), encodings(case)];
                row.push(case.adapter_files.as_ref().map_or_else(String::new, |files| megabytes(files.bytes)));
                row.extend(figures(case));
                table.row(row);
            }
        }
    }
    let mut out = format!(
        "<h2>Adapters</h2><p>An adapter shares the encodings of activations with the base, or brings its own, tailored to \
         what it makes of them.</p>\n{}{}",
        plot.svg(),
        table.html()
    );
    for record in records {
        let named: Vec<(String, &CaseRecord)> = record.cases.iter().map(|case| (case.name(), case)).collect();
        let cases: Vec<(&str, &CaseRecord)> = named.iter().map(|(name, case)| (name.as_str(), *case)).collect();
        out.push_str(&layer_plot(&format!("{}, made here", record.label), &cases, |tensor| tensor.made.row_db));
        out.push_str(&layer_table(&format!("{}: signal to noise by layer, dB", record.label), &cases).folded());
    }
    out
}

fn encodings(case: &CaseRecord) -> String {
    match case.adapter_files.as_ref().map(|files| files.encodings) {
        None => String::new(),
        Some(None) => "not stated".to_owned(),
        Some(Some(0)) => "the base's".to_owned(),
        Some(Some(n)) => format!("own, {n} tensors"),
    }
}

fn sizes(records: &[Record]) -> String {
    let mut table = Table::new(
        "Files and weights, what the weights multiply, and the KV cache",
        &["model", "files, MB", "weights", "format", "MB of these", "inputs of matrices", "KV cache"],
    );
    let models = records.iter().flat_map(|record| {
        let reference = (format!("reference of {}", record.label), &record.reference);
        [(record.label.clone(), &record.model), reference]
    });
    let mut seen: Vec<&ModelRecord> = Vec::new();
    for (label, model) in models {
        // One reference of several models is told once.
        if seen.contains(&model) {
            continue;
        }
        seen.push(model);
        for (at, format) in model.weights.iter().enumerate() {
            let first = |text: String| if at == 0 { text } else { String::new() };
            let FormatRecord { format, count, bytes } = format;
            let cells = [first(label.clone()), first(megabytes(model.bytes())), count.to_string(), format.clone()];
            let more = [megabytes(*bytes), first(inputs(model)), first(model.cache.clone())];
            table.row([&cells[..], &more].concat());
        }
    }
    format!("<h2>Sizes</h2>{}", table.html())
}

fn origin(records: &[Record]) -> String {
    let mut table = Table::new("Runs", &["model", "date", "genie", "CPU", "kernels", "threads", "system"]);
    let mut commands = String::new();
    for record in records {
        let m = &record.machine;
        let cells = [&record.label, &m.date, &m.genie, &m.cpu, &m.kernels, &m.threads.to_string(), &m.system];
        table.row(cells.map(|cell| cell.clone()).to_vec());
        let lines: Vec<String> = record.commands.iter().chain([&record.command]).map(|line| escape(line)).collect();
        commands.push_str(&format!("<h3>{}</h3><pre>{}</pre>\n", escape(&record.label), lines.join("\n")));
    }
    format!("<h2>How it was made</h2>{}{commands}", table.html())
}

fn inputs(model: &ModelRecord) -> String {
    model.inputs.iter().map(|(kind, count)| format!("{count} × {kind}")).collect::<Vec<_>>().join("; ")
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Columns of what a comparison measures.
const FIGURES: [&str; 9] =
    ["reference", "perplexity", "increase", "95 % interval", "top-1 %", "KL mean", "KL median", "KL 99 %", "KL max"];
const STYLE: &str = include_str!("report/style.css");
/// Standard errors to either side of a mean.
const INTERVAL: f64 = 1.96;
const N_WORST: usize = 12;
