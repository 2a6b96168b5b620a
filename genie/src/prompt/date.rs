//! `strftime_now` of chat templates, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

/// The current time in the format of C's `strftime`.
pub(super) fn format_now(format: &str) -> Result<String, Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    format_utc(seconds, format)
}

fn format_utc(seconds: u64, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let conversion = chars.next();
        let (dash, conversion) = if conversion == Some('-') { ("-", chars.next()) } else { ("", conversion) };
        let Some(written) = conversion.and_then(|conversion| field(seconds, conversion)) else {
            let found = conversion.map(String::from).unwrap_or_default();
            let why = format!("strftime_now: %{dash}{found} is not supported");
            return Err(Error::new(ErrorKind::InvalidOperation, why));
        };
        // As in glibc: no zeros or spaces before a number.
        let is_number = written.trim_start().bytes().all(|byte| byte.is_ascii_digit());
        match written.trim_start_matches(['0', ' ']) {
            _ if dash.is_empty() || !is_number => text += &written,
            "" => text.push('0'),
            bare => text += bare,
        }
    }
    Ok(text)
}

/// What a conversion of `strftime` writes.
fn field(seconds: u64, conversion: char) -> Option<String> {
    let days = seconds / 86_400;
    let (year, month, day) = date_of(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let weekday = WEEKDAYS[(days + 4) as usize % 7];
    let month_name = MONTHS[month as usize - 1];
    Some(match conversion {
        'Y' => format!("{year:04}"),
        'y' => format!("{:02}", year % 100),
        'm' => format!("{month:02}"),
        'd' => format!("{day:02}"),
        'e' => format!("{day:2}"),
        'j' => format!("{:03}", (0..days).rev().take_while(|day| date_of(*day).0 == year).count() + 1),
        'B' => month_name.to_owned(),
        'b' | 'h' => month_name[..3].to_owned(),
        'A' => weekday.to_owned(),
        'a' => weekday[..3].to_owned(),
        'H' => format!("{hour:02}"),
        'I' => format!("{:02}", (hour + 11) % 12 + 1),
        'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
        'M' => format!("{minute:02}"),
        'S' => format!("{second:02}"),
        'F' => format!("{year:04}-{month:02}-{day:02}"),
        'T' => format!("{hour:02}:{minute:02}:{second:02}"),
        'Z' => "UTC".to_owned(),
        'z' => "+0000".to_owned(),
        '%' => "%".to_owned(),
        _ => return None,
    })
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn date_of(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: templates that print today's date print the right one, at leap days and year ends too.
    #[test]
    fn known_dates() {
        let check = |seconds, format: &str, want: &str| assert_eq!(format_utc(seconds, format).unwrap(), want);
        check(0, "%Y-%m-%d %a", "1970-01-01 Thu");
        check(951_782_400, "%d %B %Y, %A", "29 February 2000, Tuesday");
        check(1_735_689_599, "%d %b %Y %T", "31 Dec 2024 23:59:59");
        check(1_735_689_600, "%F %I%p %y %%", "2025-01-01 12AM 25 %");
        check(4_107_542_400, "%F", "2100-03-01");
        check(1_709_596_860, "%-d.%-m.%-y %-H:%-M:%-S %-I %-B %-e %j %-j", "5.3.24 0:1:0 12 March 5 065 65");
        check(1_735_689_599, "%j", "366");
        assert!(format_utc(0, "%-").is_err());
        assert!(format_utc(0, "%Q").is_err());
    }
}
