//! Figures as they come: JSON lines, or a table at the end.

use std::io::{self, Write};

use anyhow::Context;

use crate::exit::STDOUT;
use crate::measure::{Cost, Rates};

/// Collects figures.
pub(crate) struct Report {
    table: bool,
    rows: Vec<[String; 5]>,
}

impl Report {
    pub(crate) fn new(table: bool) -> Report {
        Report { table, rows: Vec::new() }
    }

    /// Adds the figure `metric`, in `unit`, measured as `values`.
    pub(crate) fn add(&mut self, metric: &str, unit: &str, values: Vec<f64>) -> anyhow::Result<()> {
        self.add_with(metric, unit, values, serde_json::json!({}))
    }

    /// Adds rates; in JSON with what a token costs and the kernels that computed it, for shares of the machine's limits.
    pub(crate) fn add_rates(&mut self, metric: &str, rates: Rates, kernels: &str) -> anyhow::Result<()> {
        let Cost { bytes, weight_products } = rates.cost;
        let more = serde_json::json!({
            "bytes_per_token": bytes, "weight_products_per_token": weight_products, "kernels": kernels
        });
        self.add_with(metric, "tok/s", rates.tokens_per_s, more)
    }

    fn add_with(
        &mut self,
        metric: &str,
        unit: &str,
        mut values: Vec<f64>,
        more: serde_json::Value,
    ) -> anyhow::Result<()> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (values[0], values[values.len() - 1]);
        let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
        if self.table {
            // Times of microseconds are given in ms too.
            let number = |v: f64| if v.abs() < 1.0 { format!("{v:.4}") } else { format!("{v:.1}") };
            self.rows.push([metric.to_owned(), number(median), number(min), number(max), unit.to_owned()]);
            eprintln!("{metric}: {} {unit}", number(median));
        } else {
            let figure = serde_json::json!({"metric": metric, "unit": unit, "median": median, "min": min, "max": max});
            let both = [figure, more].map(|json| json.as_object().cloned().unwrap_or_default());
            let line: serde_json::Map<_, _> = both.into_iter().flatten().collect();
            writeln!(io::stdout(), "{}", serde_json::Value::Object(line)).context(STDOUT)?;
        }
        Ok(())
    }

    /// Prints the table, if there is one.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        if !self.table {
            return Ok(());
        }
        self.print(&mut io::stdout().lock()).context(STDOUT)
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{:<28} {:>10} {:>10} {:>10}  unit", "metric", "median", "min", "max")?;
        for [metric, median, min, max, unit] in &self.rows {
            writeln!(out, "{metric:<28} {median:>10} {min:>10} {max:>10}  {unit}")?;
        }
        Ok(())
    }
}
