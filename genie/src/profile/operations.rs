//! Where an engine's time went, operation by operation: as JSON for a profile, as a table for people.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::engine::GraphAccount;

/// One object per graph that ran.
pub(super) fn to_json(graphs: &[GraphAccount]) -> Vec<Value> {
    let graph = |GraphAccount { graph, account }: &GraphAccount| {
        let operations = account.operations.iter().map(|operation| {
            json!({
                "name": operation.name,
                "calls": operation.n_calls,
                "time": { "value": super::micros(operation.time), "unit": "us" },
                "share": share(operation.time, account.time),
                "read-rate": { "value": operation.rate_bytes_per_s(), "unit": "bytes/sec" },
                "operation-rate": { "value": operation.rate_operations_per_s(), "unit": "ops/sec" },
            })
        });
        json!({
            "graph": graph,
            "executes": account.n_executes,
            "time": { "value": super::micros(account.time), "unit": "us" },
            "scheduling-share": share(account.scheduling, account.time),
            "operations": operations.collect::<Vec<Value>>(),
        })
    };
    graphs.iter().map(graph).collect()
}

/// A table for each graph that ran: the costliest operations first, then the share of scheduling, which is part of theirs.
pub fn operations_table(graphs: &[GraphAccount]) -> String {
    let mut table = String::new();
    for GraphAccount { graph, account } in graphs {
        let per_execute = account.time.as_secs_f64() * 1e6 / account.n_executes.max(1) as f64;
        let mut row = |line: std::fmt::Arguments<'_>| writeln!(table, "{line}").expect("a text takes everything");
        row(format_args!("{graph}: {} executes of {per_execute:.0} µs", account.n_executes));
        row(format_args!("  {:<60} {:>7} {:>9} {:>8} {:>9}", "operation", "share", "µs/run", "GB/s", "Gop/s"));
        let mut operations: Vec<_> = account.operations.iter().collect();
        operations.sort_by_key(|operation| std::cmp::Reverse(operation.time));
        for operation in operations {
            row(format_args!(
                "  {:<60} {:>6.1}% {:>9.1} {:>8.1} {:>9.1}",
                operation.name,
                100.0 * share(operation.time, account.time),
                operation.time.as_secs_f64() * 1e6 / account.n_executes.max(1) as f64,
                operation.rate_bytes_per_s() / 1e9,
                operation.rate_operations_per_s() / 1e9,
            ));
        }
        row(format_args!("  of all this, scheduling {:>42.1}%\n", 100.0 * share(account.scheduling, account.time)));
    }
    table
}

fn share(part: Duration, whole: Duration) -> f64 {
    if whole.is_zero() { 0.0 } else { part.as_secs_f64() / whole.as_secs_f64() }
}
