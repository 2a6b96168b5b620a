//! Plots as inline SVG. Colours come from the page's style, so that they follow light and dark.

use std::fmt::Write as _;

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
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        let (left, right, top, bottom) = (62.0, WIDTH - 30.0, 14.0, LINES_HEIGHT - 50.0);
        let x = |at: usize| left + (right - left) * at as f64 / (self.places.len().max(2) - 1) as f64;
        let y = |value: f64| bottom - (bottom - top) * (value - low) / (high - low);
        let mut canvas = Canvas::default();
        for tick in ticks {
            canvas.line("grid", (left, y(tick)), (right, y(tick)));
            canvas.text("end", (left - 8.0, y(tick) + 4.0), &tick.to_string());
        }
        for at in label_places(&self.places) {
            canvas.line("axis", (x(at), bottom), (x(at), bottom + 5.0));
            canvas.text("middle", (x(at), bottom + 18.0), self.places[at]);
        }
        canvas.line("axis", (left, bottom), (right, bottom));
        for (number, (name, values)) in self.series.iter().enumerate() {
            let points = |at: usize| Some((x(at), y((*values.get(at)?)?)));
            canvas.path(number, (0..values.len()).map(points));
            for (at, value) in values.iter().enumerate().filter_map(|(at, value)| Some((at, (*value)?))) {
                let place = self.places.get(at).copied().unwrap_or_default();
                canvas.mark(number, (x(at), y(value)), &format!("{name}, {place}: {value:.1}"));
            }
        }
        canvas.text("middle", ((left + right) / 2.0, LINES_HEIGHT - 8.0), self.x_label);
        canvas.upward((14.0, (top + bottom) / 2.0), self.y_label);
        let legend: Vec<&str> = self.series.iter().map(|(name, _)| name.as_str()).collect();
        canvas.figure(self.title, LINES_HEIGHT, &legend)
    }
}

impl Dots<'_> {
    pub(super) fn svg(&self) -> String {
        let ends = self.rows.iter().flat_map(|row| &row.dots).flat_map(|dot| [dot.low, dot.high, 0.0]);
        let Some((low, high)) = bounds(ends) else { return String::new() };
        let (low, high) = (stretched(low) - 0.15, stretched(high) + 0.15);
        let longest = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).min(LONGEST_NAME);
        let (left, right, top) = (20.0 + 7.2 * longest as f64, WIDTH - 30.0, 10.0);
        let x = |percent: f64| left + (right - left) * (stretched(percent) - low) / (high - low);
        let bottom = top + self.rows.iter().map(Row::height).sum::<f64>();
        let mut canvas = Canvas::default();
        let mut last_label = f64::NEG_INFINITY;
        for tick in TICKS_PERCENT.into_iter().filter(|tick| (low..=high).contains(&stretched(*tick))) {
            canvas.line(if tick == 0.0 { "axis" } else { "grid" }, (x(tick), top), (x(tick), bottom));
            // Ticks that are too near to the one before go without a name.
            if x(tick) - last_label > 44.0 {
                canvas.text("middle", (x(tick), bottom + 18.0), &signed(tick));
                last_label = x(tick);
            }
        }
        let mut y = top;
        for row in &self.rows {
            canvas.text("end", (left - 10.0, y + row.height() / 2.0 + 4.0), &shortened(&row.name));
            for (at, dot) in row.dots.iter().enumerate() {
                let y = y + 8.0 + ROW_STEP * (at as f64 + 0.5);
                let tip = format!("{}: {} ({} to {})", row.name, signed(dot.value), signed(dot.low), signed(dot.high));
                canvas.line(&format!("s{}", dot.series % N_COLORS), (x(dot.low), y), (x(dot.high), y));
                canvas.mark(dot.series, (x(dot.value), y), &tip);
            }
            y += row.height();
        }
        canvas.text("middle", ((left + right) / 2.0, bottom + 38.0), self.x_label);
        let legend: Vec<&str> = self.series.iter().map(String::as_str).collect();
        canvas.figure(self.title, bottom + 46.0, if legend.len() > 1 { &legend } else { &[] })
    }
}

impl Row {
    fn height(&self) -> f64 {
        16.0 + ROW_STEP * self.dots.len().max(1) as f64
    }
}

/// A drawing in the making. Classes are those of the style sheet.
#[derive(Default)]
struct Canvas(String);

impl Canvas {
    fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(format_args!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"));
    }

    fn text(&mut self, class: &str, (x, y): (f64, f64), text: &str) {
        self.add(format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(text)));
    }

    /// Text that is read from below.
    fn upward(&mut self, (x, y): (f64, f64), text: &str) {
        let turn = format!("translate({x:.1} {y:.1}) rotate(-90)");
        self.add(format_args!("<text class=\"middle\" transform=\"{turn}\">{}</text>", escape(text)));
    }

    /// The line of series `number`, in parts between the gaps.
    fn path(&mut self, number: usize, points: impl Iterator<Item = Option<(f64, f64)>>) {
        let (mut path, mut pen) = (String::new(), 'M');
        for point in points {
            if let Some((x, y)) = point {
                path.push_str(&format!("{pen}{x:.1} {y:.1}"));
            }
            pen = if point.is_some() { 'L' } else { 'M' };
        }
        self.add(format_args!("<path class=\"s{} {}\" d=\"{path}\"/>", number % N_COLORS, dashes(number)));
    }

    /// The mark of series `number`: its shape tells it apart where colours do not. `tip` shows under a pointer.
    fn mark(&mut self, number: usize, (x, y): (f64, f64), tip: &str) {
        let shape = match number % 4 {
            0 => format!("circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.4\""),
            1 => format!("rect x=\"{:.1}\" y=\"{:.1}\" width=\"6.4\" height=\"6.4\"", x - 3.2, y - 3.2),
            2 => format!("path d=\"M{x:.1} {:.1}l4.2 7.4h-8.4z\"", y - 4.6),
            _ => format!("path d=\"M{x:.1} {:.1}l4.4 4.4l-4.4 4.4l-4.4 -4.4z\"", y - 4.4),
        };
        let element = shape.split(' ').next().unwrap_or_default();
        let color = number % N_COLORS;
        self.add(format_args!("<{shape} class=\"m{color}\"><title>{}</title></{element}>", escape(tip)));
    }

    /// The drawing with its title and legend, for those who see it and those who hear it.
    fn figure(self, title: &str, height: f64, legend: &[&str]) -> String {
        let entry = |(number, name): (usize, &&str)| {
            let mut swatch = Canvas::default();
            swatch.path(number, [Some((1.0, 7.0)), Some((27.0, 7.0))].into_iter());
            swatch.mark(number, (14.0, 7.0), name);
            let swatch = format!("<svg width=\"28\" height=\"14\" aria-hidden=\"true\">{}</svg>", swatch.0);
            format!("<li>{swatch} {}</li>", escape(name))
        };
        let entries: String = legend.iter().enumerate().map(entry).collect();
        let legend = if entries.is_empty() { entries } else { format!("<ul class=\"legend\">{entries}</ul>") };
        let title = escape(title);
        format!(
            "<figure><figcaption>{title}</figcaption>{legend}<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
             aria-label=\"{title}; the figures are in the table below\">{}</svg></figure>\n",
            self.0
        )
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // A String takes everything.
        let _ = self.0.write_fmt(element);
    }
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
/// Height of a dot in its row.
const ROW_STEP: f64 = 15.0;
/// Colours of the style sheet: classes s0, m0 and so on.
const N_COLORS: usize = 7;
const TICKS_PERCENT: [f64; 19] =
    [-30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5, 1e6];
