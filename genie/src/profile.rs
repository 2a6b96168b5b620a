//! What happened and how long it took, as Genie's profile JSON.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::engine::GraphAccount;
use crate::{AppliedLora, QueryReport};

mod operations;

pub use operations::operations_table;

/// Collects events of one dialog. Times are in microseconds since it was made. (`GenieProfile`)
#[derive(Debug)]
pub struct Profile {
    origin: Instant,
    created_at: SystemTime,
    events: Vec<Event>,
    graphs: Vec<serde_json::Value>,
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
        Self { origin: Instant::now(), created_at: SystemTime::now(), events: Vec::new(), graphs: Vec::new() }
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
        let mut kpis = vec![
            ("num-prompt-tokens", report.n_prompt_tokens.into(), ""),
            ("prompt-processing-rate", rate(report.prompt_rate_tokens_per_s()), "toks/sec"),
            ("time-to-first-token", micros(first).into(), "us"),
            ("num-generated-tokens", report.n_generated.into(), ""),
            ("token-generation-rate", rate(report.generation_rate_tokens_per_s()), "toks/sec"),
            ("token-generation-time", micros(timings.token_generation).into(), "us"),
        ];
        // Not in Genie's profiles: what a change of adapter did to the cache.
        for (name, n) in
            [("kv-foreign-rows", report.n_foreign_rows), ("kv-recomputed-tokens", report.n_recomputed_tokens)]
        {
            if 0 < n {
                kpis.push((name, n.into(), ""));
            }
        }
        self.add("GenieDialog_query", timings.started, timings.total, &kpis);
    }

    /// Records that an adapter was applied.
    pub fn add_apply_lora(&mut self, applied: &AppliedLora) {
        let time = ("lora-adapter-switching-time", micros(applied.time).into(), "us");
        self.add("GenieDialog_applyLora", applied.started, applied.time, &[time]);
    }

    /// Records where the time of the dialog's engine went. Not in Genie's profiles: a component of its own.
    pub fn add_operations(&mut self, graphs: &[GraphAccount]) {
        self.graphs.extend(operations::to_json(graphs));
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
        let mut components = vec![serde_json::json!({ "name": "dialog0", "type": "dialog", "events": self.events })];
        if !self.graphs.is_empty() {
            components.push(serde_json::json!({ "name": "engine0", "type": "engine", "graphs": self.graphs }));
        }
        let json = serde_json::json!({
            "header": {
                "header_version": { "major": 0, "minor": 1, "patch": 0 },
                "version": { "major": part(0), "minor": part(1), "patch": part(2) },
                "artifact_type": "GENIE_PROFILE",
            },
            "metadata": { "timestamp": micros(since_epoch) },
            "components": components,
        });
        format!("{json:#}\n")
    }

    /// Writes the JSON to a file, which must not be there yet.
    ///
    /// # Errors
    /// What the system says; `AlreadyExists` for a file that is there.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let written = file.write_all(self.to_json().as_bytes()).and_then(|()| file.sync_all());
        if written.is_err() {
            // Half a file would be taken for a profile, and be in the way of the next.
            std::fs::remove_file(path)?;
        }
        written
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // Guards: events and KPIs have the names, units and nesting that readers of Genie's profiles look for; and a file
    // that is there is never overwritten.
    #[test]
    fn shape_of_the_json() {
        let mut profile = Profile::new();
        let started = Instant::now();
        profile.add_create(started, Duration::from_micros(1500));
        let mut report = QueryReport::new(started);
        (report.n_prompt_tokens, report.n_cached_tokens, report.n_generated) = (30, 10, 5);
        report.timings.prompt_processing = Duration::from_millis(100);
        report.timings.token_generation = Duration::from_millis(400);
        report.timings.total = Duration::from_millis(600);
        profile.add_query(&report);
        let info = crate::engine::AdapterInfo {
            name: "a".to_owned(),
            targets: 1,
            rank: 1,
            slots: Vec::new(),
            size_bytes: 1,
            n_encodings: 0,
            group: None,
            load_time: Duration::ZERO,
            generation: 1,
        };
        let time = Duration::from_micros(70);
        profile.add_apply_lora(&AppliedLora { info, strengths: Vec::new(), was_loaded: true, started, time });
        (report.n_foreign_rows, report.n_recomputed_tokens) = (7, 8);
        profile.add_query(&report);
        profile.add_free(started, Duration::ZERO);
        let operation = qnn_core::backend::account::Operation {
            name: "linear lm_head".to_owned(),
            n_calls: 4,
            time: Duration::from_millis(100),
            bytes: 3_000_000_000,
            multiply_adds: 500_000_000,
        };
        let account = qnn_core::backend::Account {
            n_executes: 4,
            time: Duration::from_millis(400),
            scheduling: Duration::from_millis(200),
            operations: vec![operation],
        };
        let graphs = [GraphAccount { graph: "token".to_owned(), account }];
        profile.add_operations(&graphs);
        let table = operations_table(&graphs);
        assert!(table.contains("linear lm_head") && table.contains("25.0%") && table.contains("30.0"), "{table}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        profile.save(&path).unwrap();
        assert_eq!(profile.save(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert!(json["header"]["version"]["major"].is_u64() && json["metadata"]["timestamp"].is_u64());
        let graph = &json["components"][1]["graphs"][0];
        assert_eq!((&graph["graph"], &graph["scheduling-share"]), (&json!("token"), &json!(0.5)));
        let rates = json!([{"name": "linear lm_head", "calls": 4, "share": 0.25,
            "time": {"value": 100_000, "unit": "us"}, "read-rate": {"value": 3e10, "unit": "bytes/sec"},
            "operation-rate": {"value": 1e10, "unit": "ops/sec"}}]);
        assert_eq!(graph["operations"], rates);
        let component = &json["components"][0];
        assert_eq!(component["type"], "dialog");
        let events = component["events"].as_array().unwrap();
        let kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
        let want = ["create", "query", "applyLora", "query", "free"].map(|kind| format!("GenieDialog_{kind}"));
        assert_eq!(kinds, want);
        assert_eq!(events[2]["lora-adapter-switching-time"], serde_json::json!({"value": 70, "unit": "us"}));
        assert_eq!((&events[1]["kv-foreign-rows"], &events[1]["kv-recomputed-tokens"]), (&json!(null), &json!(null)));
        assert_eq!(
            (&events[3]["kv-foreign-rows"]["value"], &events[3]["kv-recomputed-tokens"]["value"]),
            (&json!(7), &json!(8))
        );
        assert_eq!(events[0]["init-time"], serde_json::json!({"value": 1500, "unit": "us"}));
        let query = &events[1];
        assert_eq!(query["stop"].as_u64().unwrap() - query["start"].as_u64().unwrap(), 600_000);
        for (kpi, value, unit) in [
            ("num-prompt-tokens", 30.0, ""),
            ("prompt-processing-rate", 200.0, "toks/sec"),
            ("time-to-first-token", 100_000.0, "us"),
            ("num-generated-tokens", 5.0, ""),
            ("token-generation-rate", 10.0, "toks/sec"),
            ("token-generation-time", 400_000.0, "us"),
        ] {
            assert_eq!((query[kpi]["value"].as_f64(), query[kpi]["unit"].as_str()), (Some(value), Some(unit)), "{kpi}");
        }
    }
}
