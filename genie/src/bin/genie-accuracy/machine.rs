//! Where and when a result was made.

use std::time::{SystemTime, UNIX_EPOCH};

use genie::engine::qnn::QnnEngine;

use crate::record::MachineRecord;

/// What this program knows about the machine, `engine` and itself.
pub(crate) fn read(engine: &QnnEngine) -> MachineRecord {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    MachineRecord {
        date: date(seconds),
        cpu: cpu(),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        kernels: engine.kernels().to_owned(),
        threads: engine.n_threads(),
        genie: genie::VERSION.to_owned(),
    }
}

/// This program's command line, quoted where a shell would need it.
pub(crate) fn command_line() -> String {
    let mut words = std::env::args_os().map(|word| quoted(&word.to_string_lossy()));
    let program = words.next().unwrap_or_default();
    let program = program.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
    std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Linux says it in a file; elsewhere it stays unknown.
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    model.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

/// Date and time (UTC) of so many seconds since 1970.
fn date(seconds: u64) -> String {
    let (days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    let (mut year, mut day) = (1970, days);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02} {:02}:{:02} UTC", month + 1, day + 1, minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: the date of a result, over leap years and their exceptions.
    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds, want: &str| assert_eq!(date(seconds), want);
        check(0, "1970-01-01 00:00 UTC");
        check(951_782_399, "2000-02-28 23:59 UTC");
        check(951_782_400, "2000-02-29 00:00 UTC");
        check(1_709_251_199, "2024-02-29 23:59 UTC");
        check(1_735_689_599, "2024-12-31 23:59 UTC");
        check(4_107_542_400, "2100-03-01 00:00 UTC");
    }

    // Guards: a command line of a result can be pasted into a shell.
    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a/b-c.json"), "a/b-c.json");
        assert_eq!(quoted("it's a $label"), r"'it'\''s a $label'");
        assert_eq!(quoted(""), "''");
    }
}
