//! Plots as inline SVG. Colours come from the page's style, so that they follow light and dark.

use std::fmt::Write;

use super::html::escape;

/// Lines over places that have names, one line for each series. A gap is a place without a value.
pub(super) struct Lines<'a> {
    pub(super) title: &'a str,
    pub(super) x_label: &'a str,
    pub(super) y_label: &'a str,
    pub(super) places: Vec<&'a str>,
    pub(super) series: Vec<(String, Vec<Option<f64>>)>,
}

/// Values with their intervals along an axis in percent, in rows; every series has a colour.
pub(super) struct Dots<'a> {
    pub(super) title: &'a str,
    pub(super) x_label: &'a str,
    /// Names of the series; with one alone there is no legend.
    pub(super) series: Vec<String>,
    pub(super) rows: Vec<Row>,
}

/// One row of dots.
pub(super) struct Row {
    pub(super) name: String,
    pub(super) dots: Vec<Dot>,
}

/// A value in percent.
pub(super) struct Dot {
    pub(super) series: usize,
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Lines<'_> {
    pub(super) fn svg(&self) -> String {
        let values = || self.series.iter().flat_map(|(_, values)| values.iter().flatten().copied());
        let Some((low, high)) = bounds(values()) else {
            return format!("<p>{}: nothing differs anywhere.</p>\n", escape(self.title));
        };
        let ticks = nice_ticks(low, high);
        let (low, high) = (ticks[0].min(low), ticks[ticks.len() - 1].max(high));
        let (left, right, top, bottom) = (62.0, WIDTH - 30.0, 14.0, LINES_HEIGHT - 50.0);
        let x = |at: usize| left + (right - left) * at as f64 / (self.places.len().max(2) - 1) as f64;
        let y = |value: f64| bottom - (bottom - top) * (value - low) / (high - low).max(f64::MIN_POSITIVE);
        let mut body = String::new();
        for tick in ticks {
            let at = y(tick);
            let _ = write!(body, "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
            let _ = write!(body, "<text class=\"end\" x=\"{}\" y=\"{:.1}\">{tick}</text>", left - 8.0, at + 4.0);
        }
        for at in label_places(&self.places) {
            let name = escape(self.places[at]);
            let (at, below) = (x(at), bottom + 18.0);
            let _ = write!(
                body,
                "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\"/>",
                bottom + 5.0
            );
            let _ = write!(body, "<text class=\"middle\" x=\"{at:.1}\" y=\"{below}\">{name}</text>");
        }
        let _ = write!(body, "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>");
        for (number, (name, values)) in self.series.iter().enumerate() {
            let points = |at: usize| values.get(at).copied().flatten().map(|value| (x(at), y(value), value));
            line(&mut body, number, (0..values.len()).map(|at| points(at).map(|(x, y, _)| (x, y))));
            for (at, (x, y, value)) in (0..values.len()).filter_map(|at| Some((at, points(at)?))) {
                let tip = format!("{name}, {}: {value:.1}", self.places.get(at).copied().unwrap_or_default());
                mark(&mut body, number, (x, y), &tip);
            }
        }
        body.push_str(&axis_titles(self.x_label, (left + right) / 2.0, LINES_HEIGHT - 8.0));
        let middle = (top + bottom) / 2.0;
        let turned = escape(self.y_label);
        let _ = write!(body, "<text class=\"middle\" transform=\"translate(14 {middle}) rotate(-90)\">{turned}</text>");
        figure(self.title, LINES_HEIGHT, &body, &self.series.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>())
    }
}

impl Dots<'_> {
    pub(super) fn svg(&self) -> String {
        let dots = || self.rows.iter().flat_map(|row| &row.dots);
        let ends = dots().flat_map(|dot| [dot.low, dot.high, 0.0]);
        let Some((low, high)) = bounds(ends) else { return String::new() };
        let (low, high) = (stretched(low) - 0.15, stretched(high) + 0.15);
        let longest = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).min(LONGEST_NAME);
        let (left, right) = (20.0 + 7.2 * longest as f64, WIDTH - 30.0);
        let x = |value: f64| left + (right - left) * (stretched(value) - low) / (high - low);
        let heights: Vec<f64> = self.rows.iter().map(|row| 16.0 + 15.0 * row.dots.len().max(1) as f64).collect();
        let (top, mut body) = (10.0, String::new());
        let bottom = top + heights.iter().sum::<f64>();
        let mut last_label = f64::NEG_INFINITY;
        for tick in TICKS_PERCENT.into_iter().filter(|tick| (low..=high).contains(&stretched(*tick))) {
            let (at, class) = (x(tick), if tick == 0.0 { "axis" } else { "grid" });
            let _ =
                write!(body, "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>");
            if at - last_label > 34.0 {
                let _ = write!(
                    body,
                    "<text class=\"middle\" x=\"{at:.1}\" y=\"{}\">{}</text>",
                    bottom + 18.0,
                    signed(tick)
                );
                last_label = at;
            }
        }
        let mut y = top;
        for (row, height) in self.rows.iter().zip(heights) {
            let (name, middle) = (escape(&shortened(&row.name)), y + height / 2.0 + 4.0);
            let _ = write!(
                body,
                "<text class=\"end\" x=\"{}\" y=\"{middle:.1}\">{name}<title>{}</title></text>",
                left - 10.0,
                escape(&row.name)
            );
            for (at, dot) in row.dots.iter().enumerate() {
                let y = y + 8.0 + 15.0 * (at as f64 + 0.5);
                let (from, to, color) = (x(dot.low), x(dot.high), dot.series % N_COLORS);
                let _ = write!(
                    body,
                    "<line class=\"s{color}\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
                );
                let series = self.series.get(dot.series).map_or("", String::as_str);
                let tip = format!(
                    "{} {series}: {} ({} to {})",
                    row.name,
                    signed(dot.value),
                    signed(dot.low),
                    signed(dot.high)
                );
                mark(&mut body, dot.series, (x(dot.value), y), &tip);
            }
            y += height;
        }
        body.push_str(&axis_titles(self.x_label, (left + right) / 2.0, bottom + 38.0));
        let legend: Vec<&str> = self.series.iter().map(String::as_str).collect();
        figure(self.title, bottom + 46.0, &body, if legend.len() > 1 { &legend } else { &[] })
    }
}

/// A plot with its title and legend, for those who see it and those who hear it.
fn figure(title: &str, height: f64, body: &str, legend: &[&str]) -> String {
    let entry = |(number, name): (usize, &&str)| {
        let mut swatch = String::new();
        let _ = write!(
            swatch,
            "<line class=\"s{} {}\" x1=\"1\" x2=\"27\" y1=\"7\" y2=\"7\"/>",
            number % N_COLORS,
            dashes(number)
        );
        mark(&mut swatch, number, (14.0, 7.0), "");
        format!("<li><svg width=\"28\" height=\"14\" aria-hidden=\"true\">{swatch}</svg> {}</li>", escape(name))
    };
    let legend: String = legend.iter().enumerate().map(entry).collect();
    let legend = if legend.is_empty() { legend } else { format!("<ul class=\"legend\">{legend}</ul>") };
    let title = escape(title);
    format!(
        "<figure><figcaption>{title}</figcaption>{legend}<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"{title}; the figures are in the table below\">{body}</svg></figure>\n"
    )
}

/// The parts of a line between its gaps.
fn line(body: &mut String, number: usize, points: impl Iterator<Item = Option<(f64, f64)>>) {
    let mut path = String::new();
    let mut pen = 'M';
    for point in points {
        match point {
            Some((x, y)) => {
                let _ = write!(path, "{pen}{x:.1} {y:.1}");
                pen = 'L';
            }
            None => pen = 'M',
        }
    }
    let _ = write!(body, "<path class=\"s{} {}\" d=\"{path}\"/>", number % N_COLORS, dashes(number));
}

/// The mark of series `number` at a point: its shape tells it apart where colours do not.
fn mark(body: &mut String, number: usize, (x, y): (f64, f64), tip: &str) {
    let title = if tip.is_empty() { String::new() } else { format!("<title>{}</title>", escape(tip)) };
    let color = number % N_COLORS;
    let shape = match number % 4 {
        0 => format!("<circle class=\"m{color}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.4\">{title}</circle>"),
        1 => format!(
            "<rect class=\"m{color}\" x=\"{:.1}\" y=\"{:.1}\" width=\"6.4\" height=\"6.4\">{title}</rect>",
            x - 3.2,
            y - 3.2
        ),
        2 => format!("<path class=\"m{color}\" d=\"M{x:.1} {:.1}l4.2 7.4h-8.4z\">{title}</path>", y - 4.6),
        _ => {
            format!("<path class=\"m{color}\" d=\"M{x:.1} {:.1}l4.4 4.4l-4.4 4.4l-4.4 -4.4z\">{title}</path>", y - 4.4)
        }
    };
    body.push_str(&shape);
}

fn axis_titles(text: &str, x: f64, y: f64) -> String {
    format!("<text class=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(text))
}

/// Series beyond the number of colours are dashed.
fn dashes(number: usize) -> &'static str {
    if number < N_COLORS { "solid" } else { "dashed" }
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(LONGEST_NAME) {
        None => name.to_owned(),
        Some((at, _)) => format!("{}…", name[..at].trim_end()),
    }
}

/// Small losses are as interesting as large ones: even steps up to a tenth of a percent, then ever wider ones.
fn stretched(percent: f64) -> f64 {
    (percent / 0.1).asinh()
}

/// `+0.3 %`, with as many digits as it takes to see something.
pub(super) fn signed(percent: f64) -> String {
    let digits = if percent == 0.0 || percent.abs() >= 1.0 {
        1
    } else if percent.abs() >= 0.1 {
        2
    } else {
        3
    };
    let text = format!("{:.digits$}", percent.abs());
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    let sign = if text == "0" {
        ""
    } else if percent < 0.0 {
        "−"
    } else {
        "+"
    };
    format!("{sign}{text} %")
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |bounds, value| {
        let (low, high) = bounds.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// Four to eight round numbers that span `low` to `high`.
fn nice_ticks(low: f64, high: f64) -> Vec<f64> {
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|step| (high - low) / step <= 7.0).unwrap_or(100.0);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last.max(first + 1)).map(|tick| tick as f64 * step).collect()
}

/// The places to write names at: all, or if there are many, of the numbered layers every fifth, without the first, which
/// has no room beside what is before it.
fn label_places(places: &[&str]) -> Vec<usize> {
    let few = places.len() <= 12;
    let is_fifth = |number: usize| 0 < number && number.is_multiple_of(5);
    let shown = |at: &usize| few || places[*at].parse().map_or(true, is_fifth);
    (0..places.len()).filter(shown).collect()
}

const WIDTH: f64 = 860.0;
const LINES_HEIGHT: f64 = 330.0;
const LONGEST_NAME: usize = 44;
/// Colours of the style sheet: classes s0, m0 and so on.
const N_COLORS: usize = 7;
const TICKS_PERCENT: [f64; 19] =
    [-30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5, 1e6];
