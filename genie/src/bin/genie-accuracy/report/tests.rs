use std::collections::BTreeMap;

use super::*;
use crate::record::{
    AdapterFiles, DivergenceRecord, FORMAT, FileRecord, MachineRecord, PerplexityRecord, SqnrRecord, TextRecord,
    VERSION,
};

fn sqnr(db: f64) -> SqnrRecord {
    SqnrRecord { all_db: Some(db + 1.0), row_db: Some(db) }
}

/// A result whose every figure follows from `seed`, so that each can be looked for.
fn case(adapter: Option<&str>, seed: f64) -> CaseRecord {
    let places = ["embedding", "layer 0", "layer 1", "head"];
    let tensor = |(at, place): (usize, &&str)| TensorRecord {
        name: format!("tensor.{at}<i>"),
        place: (*place).to_owned(),
        ends: true,
        width: 8,
        made: sqnr(seed + 10.0 * at as f64),
        accumulated: if at == 0 { SqnrRecord { all_db: None, row_db: None } } else { sqnr(seed + 3.0 * at as f64) },
    };
    let perplexity = |perplexity: f64| PerplexityRecord { perplexity, window_mean_nll: vec![perplexity.ln()] };
    CaseRecord {
        adapter: adapter.map(str::to_owned),
        strengths: adapter.map(|name| (name.to_owned(), 0.5)).into_iter().collect(),
        adapter_files: adapter.map(|_| AdapterFiles { bytes: 4_321_000, targets: Some(2), encodings: Some(7) }),
        scored_ids: 100,
        reference: perplexity(60.0 + seed / 100.0),
        tested: perplexity(61.0 + seed / 100.0),
        ratio: 1.0 + seed / 1000.0,
        log_ratio: (seed / 1000.0).ln_1p(),
        log_ratio_error: 0.001,
        top1_agreement: 0.9 + seed / 1000.0,
        divergence: DivergenceRecord { mean: seed / 1e3, median: seed / 2e3, p99: seed / 1e2, max: seed / 1e1 },
        tensors: places.iter().enumerate().map(tensor).collect(),
    }
}

fn record(label: &str, cases: Vec<CaseRecord>) -> Record {
    let model = |name: &str| ModelRecord {
        config: format!("{name}/genie_config.json"),
        files: vec![FileRecord { name: format!("{name}.bin"), bytes: 12_345_678 }],
        weights: vec![FormatRecord { format: format!("{name} block 32"), count: 17, bytes: 11_000_000 }],
        inputs: BTreeMap::from([("16 bit, static".to_owned(), 9)]),
        cache: "8 bit".to_owned(),
    };
    Record {
        format: FORMAT.to_owned(),
        version: VERSION,
        label: label.to_owned(),
        machine: MachineRecord {
            date: "2026-01-02 03:04 UTC".to_owned(),
            cpu: "A & B".to_owned(),
            system: "linux".to_owned(),
            kernels: "portable".to_owned(),
            threads: 3,
            genie: "0.9.8".to_owned(),
        },
        command: "genie-accuracy -c x".to_owned(),
        commands: vec!["make > it".to_owned()],
        text: TextRecord { file: "a<b>.txt".to_owned(), ids: 500, window: 51, windows: 2 },
        reference: model("float"),
        model: model("int8"),
        cases,
    }
}

fn page() -> (Vec<Record>, String) {
    let hostile = "<script>alert(\"1\")</script> & 'x'";
    let records =
        vec![record(hostile, vec![case(None, 11.0), case(Some("pirate"), 17.0)]), record("w4", vec![case(None, 23.0)])];
    let page = html(&records).expect("they go together");
    (records, page)
}

/// Checks that every element is closed in its turn; gives the text outside of tags.
fn assert_well_formed(page: &str) -> String {
    let (mut open, mut text) = (Vec::new(), String::new());
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("the page says what it is");
    while let Some(at) = rest.find('<') {
        text.push_str(&rest[..at]);
        text.push('\n');
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '/', '\n']).next().unwrap_or_default();
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name), "before {:.80}", rest),
            (false, true) => {}
            (false, false) => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?}");
    text
}

// Guards: the page is whole, loads nothing, and a name from a file stays text.
#[test]
fn a_page_is_well_formed_and_self_contained() {
    let (_, page) = page();
    assert_well_formed(&page);
    for outside in ["http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;x&#39;"));
    assert!(!page.contains("NaN") && !page.contains("inf"));
}

// Guards: every figure of every result stands in a table; the plots are not the only place.
#[test]
fn a_page_holds_every_figure() {
    let (records, page) = page();
    let text = assert_well_formed(&page);
    let cells: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let holds = |figure: &str| assert!(cells.contains(&figure), "{figure}");
    for case in records.iter().flat_map(|record| &record.cases) {
        holds(&format!("{:.3}", case.reference.perplexity));
        holds(&format!("{:.3}", case.tested.perplexity));
        holds(&format!("{:.2}", 100.0 * case.top1_agreement));
        let divergence = &case.divergence;
        [divergence.mean, divergence.median, divergence.p99, divergence.max]
            .iter()
            .for_each(|v| holds(&format!("{v:.5}")));
        holds(&signed(100.0 * (case.ratio - 1.0)));
        for tensor in &case.tensors {
            for sqnr in [tensor.made, tensor.accumulated] {
                [sqnr.all_db, sqnr.row_db].into_iter().for_each(|db| holds(&decibels(db)));
            }
        }
    }
    for figure in [
        "12.3",
        "11.0",
        "4.3",
        "17",
        "int8 block 32",
        "float block 32",
        "9 × 16 bit, static",
        "own, 7 tensors",
        "3",
        "0.9.8",
    ] {
        holds(figure);
    }
    for origin in
        ["A &amp; B", "2026-01-02 03:04 UTC", "portable", "make &gt; it", "genie-accuracy -c x", "pirate, pirate 0.5"]
    {
        holds(origin);
    }
}

// Guards: results that cannot be compared are not put into one table.
#[test]
fn results_of_other_texts_and_models_are_refused() {
    let first = record("a", vec![case(None, 1.0)]);
    let mut other_text = record("b", vec![case(None, 1.0)]);
    other_text.text.windows = 3;
    let mut other_model = record("c", vec![case(None, 1.0)]);
    other_model.cases[0].tensors.pop();
    let why = |other: Record| html(&[first.clone(), other]).expect_err("they do not go together").to_string();
    let text = why(other_text);
    assert!(text.contains("on 2 windows") && text.contains("on 3") && text.contains("\"b\""), "{text}");
    assert_eq!(why(other_model), "\"a\" has 4 places, \"c\" has 3: need forms of one model");
}

// Guards: a result is read back as it was written, and another file is refused.
#[test]
fn records_survive_their_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("r.json");
    let written = record("w8", vec![case(None, 5.0), case(Some("json"), 6.0)]);
    let json = written.to_json().expect("numbers and texts");
    std::fs::write(&path, &json).expect("it can be written");
    assert_eq!(Record::read(&path).expect("it was written just now"), written);
    std::fs::write(&path, json.replace("\"version\": 1", "\"version\": 2")).expect("it can be written");
    let why = Record::read(&path).expect_err("another version").to_string();
    assert!(why.contains("version 2") && why.contains("r.json"), "{why}");
}

// Guards: small and large increases can both be read.
#[test]
fn increases_are_written_with_the_digits_they_need() {
    let check = |value: f64, want: &str| assert_eq!(signed(value), want);
    check(0.0, "0 %");
    check(0.0004, "0 %");
    check(0.013, "+0.013 %");
    check(-0.25, "−0.25 %");
    check(63.84, "+63.8 %");
    check(100.0, "+100 %");
}
