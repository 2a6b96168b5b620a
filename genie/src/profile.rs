//! What happened and how long it took, as Genie's profile JSON.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::QueryReport;

/// Collects events of one dialog. Times are in microseconds since it was made. (`GenieProfile`)
#[derive(Debug)]
pub struct Profile {
    origin: Instant,
    created_at: SystemTime,
    events: Vec<Event>,
}

#[derive(Debug, Serialize)]
struct Event {
    #[serde(rename = "type")]
    kind: &'static str,
    duration: u64,
    start: u64,
    stop: u64,
    #[serde(flatten)]
    kpis: serde_json::Map<String, serde_json::Value>,
}

impl Profile {
    /// A profile that begins now.
    pub fn new() -> Self {
        Self { origin: Instant::now(), created_at: SystemTime::now(), events: Vec::new() }
    }

    /// Records the creation of the dialog, which began at `started` and took `duration`.
    pub fn add_create(&mut self, started: Instant, duration: Duration) {
        self.add("GenieDialog_create", started, duration, &[("init-time", micros(duration).into(), "us")]);
    }

    /// Records a query.
    pub fn add_query(&mut self, report: &QueryReport) {
        let timings = &report.timings;
        let rate = |rate: Option<f64>| rate.unwrap_or(0.0).into();
        let first = report.time_to_first_token().unwrap_or_default();
        let kpis = [
            ("num-prompt-tokens", report.n_prompt_tokens.into(), ""),
            ("prompt-processing-rate", rate(report.prompt_rate_tokens_per_s()), "toks/sec"),
            ("time-to-first-token", micros(first).into(), "us"),
            ("num-generated-tokens", report.n_generated.into(), ""),
            ("token-generation-rate", rate(report.generation_rate_tokens_per_s()), "toks/sec"),
            ("token-generation-time", micros(timings.token_generation).into(), "us"),
        ];
        self.add("GenieDialog_query", timings.started, timings.total, &kpis);
    }

    /// Records the end of the dialog, which began at `started` and took `duration`.
    pub fn add_free(&mut self, started: Instant, duration: Duration) {
        self.add("GenieDialog_free", started, duration, &[]);
    }

    fn add(
        &mut self,
        kind: &'static str,
        started: Instant,
        duration: Duration,
        kpis: &[(&str, serde_json::Value, &str)],
    ) {
        let start = micros(started.saturating_duration_since(self.origin));
        let kpi = |(name, value, unit): &(&str, serde_json::Value, &str)| {
            ((*name).to_owned(), serde_json::json!({ "value": value, "unit": unit }))
        };
        let duration = micros(duration);
        let kpis = kpis.iter().map(kpi).collect();
        self.events.push(Event { kind, duration, start, stop: start.saturating_add(duration), kpis });
    }

    /// The profile as JSON. (`GenieProfile_getJsonData`)
    pub fn to_json(&self) -> String {
        let part = |index| crate::VERSION.split('.').nth(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let since_epoch = self.created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let json = serde_json::json!({
            "header": {
                "header_version": { "major": 0, "minor": 1, "patch": 0 },
                "version": { "major": part(0), "minor": part(1), "patch": part(2) },
                "artifact_type": "GENIE_PROFILE",
            },
            "metadata": { "timestamp": micros(since_epoch) },
            "components": [{ "name": "dialog0", "type": "dialog", "events": self.events }],
        });
        format!("{json:#}\n")
    }

    /// Writes the JSON to a file, which must not be there yet.
    ///
    /// # Errors
    /// What the system says; `AlreadyExists` for a file that is there.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(self.to_json().as_bytes())?;
        file.sync_all()
    }
}

impl Default for Profile {
    fn default() -> Self {
        Self::new()
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
