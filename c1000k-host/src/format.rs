//! Figures as text for people: counts, bytes, durations, rates and shares; and text of others, made harmless.
//!
//! Sizes are decimal (1 GB is 1,000,000,000 bytes), as the records count in bytes.

use std::fmt::Write;

/// A count with its thousands set apart: `1,000,000`.
#[must_use]
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count of things, by a noun whose plural ends in s: `1 connection`, `1,000 connections`.
#[must_use]
pub fn counted(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(value), if value == 1 { "" } else { "s" })
}

/// Bytes, to the byte where they are few: `3,848 B`, `24.1 MB`, `2.6 GB`.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "one decimal place is shown")]
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    // As many bytes are still read at a glance, and a connection's cost is exact.
    if value < 10_000 {
        return format!("{} B", count(value));
    }
    let mut scaled = value as f64 / 1e3;
    let mut unit = 0;
    // 999.95 would be shown as 1000.0.
    while scaled >= 999.95 && unit + 1 < UNITS.len() {
        scaled /= 1e3;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

/// Bytes of one of many, to the byte, and to a tenth of one where they are few: `24.6 B`.
#[must_use]
pub fn bytes_each(value: f64) -> String {
    if value.abs() < 100.0 {
        // A sum that comes to nothing has a sign of no meaning.
        return format!("{:.1} B", if value.abs() < 0.05 { 0.0 } else { value });
    }
    let sign = if value < 0.0 { "-" } else { "" };
    format!("{sign}{} B", count(rounded(value.abs())))
}

/// A span of time in the unit that fits: `850 us`, `12.5 ms`, `5.02 s`, `5 min 41 s`, `2 h 05 min`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds == 0.0 {
        return "0 s".to_owned();
    }
    if seconds < 0.001 {
        return format!("{:.0} us", seconds * 1e6);
    }
    if seconds < 1.0 {
        return format!("{:.1} ms", seconds * 1e3);
    }
    if seconds < 59.995 {
        return format!("{seconds:.2} s");
    }
    let whole = rounded(seconds);
    if whole < 3_600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3_600, whole / 60 % 60)
    }
}

/// A rate: `3,250/s`, and below ten with one decimal place, `0.5/s`.
#[must_use]
pub fn rate(per_second: f64) -> String {
    if per_second < 10.0 {
        format!("{:.1}/s", per_second.max(0.0))
    } else {
        format!("{}/s", count(rounded(per_second)))
    }
}

/// A share of one in per cent: `percent(0.983)` is `98.3%`.
#[must_use]
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast from float saturates, and none below zero gets here"
)]
/// A figure to the nearest count.
#[must_use]
pub fn rounded(value: f64) -> u64 {
    value.round() as u64
}

/// More of one text than a person reads is cut off.
const CHARS_MAX: usize = 4_000;

/// The text in one line, in which each character that is not seen, or that moves others, is written as its escape.
#[must_use]
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(CHARS_MAX));
    let mut characters = text.chars();
    for character in characters.by_ref().take(CHARS_MAX) {
        if is_unseen(character) {
            let _ = write!(shown, "{}", character.escape_default());
        } else {
            shown.push(character);
        }
    }
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

/// Control codes, line breaks, and what Unicode has to turn the direction of text or to hide in it.
#[must_use]
pub fn is_unseen(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_sets_its_thousands_apart() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (19_999, "19,999"),
            (1_000_000, "1,000,000"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ];
        for (value, text) in cases {
            assert_eq!(count(value), text);
        }
    }

    #[test]
    fn one_of_a_kind_has_no_plural() {
        assert_eq!(counted(0, "port"), "0 ports");
        assert_eq!(counted(1, "port"), "1 port");
        assert_eq!(counted(1_000, "port"), "1,000 ports");
    }

    #[test]
    fn bytes_choose_their_unit() {
        let cases = [
            (0, "0 B"),
            (3_848, "3,848 B"),
            (9_999, "9,999 B"),
            (10_000, "10.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (2_600_000_000, "2.6 GB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn bytes_of_one_of_many_are_told_closely() {
        let cases = [
            (-0.0, "0.0 B"),
            (-0.04, "0.0 B"),
            (24.64, "24.6 B"),
            (3_848.4, "3,848 B"),
            (-1_200.0, "-1,200 B"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes_each(value), text);
        }
    }

    #[test]
    fn a_duration_chooses_its_unit() {
        let cases = [
            (-1.0, "0 s"),
            (0.0, "0 s"),
            (0.000_85, "850 us"),
            (0.0125, "12.5 ms"),
            (5.02, "5.02 s"),
            (59.999, "1 min 00 s"),
            (341.0, "5 min 41 s"),
            (7_500.0, "2 h 05 min"),
        ];
        for (value, text) in cases {
            assert_eq!(duration(value), text);
        }
    }

    #[test]
    fn rates_and_shares_are_short() {
        assert_eq!(rate(0.49), "0.5/s");
        assert_eq!(rate(3_249.6), "3,250/s");
        assert_eq!(rate(f64::NAN), "0/s");
        assert_eq!(percent(0.983), "98.3%");
        assert_eq!(percent(1.0), "100.0%");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(
            visible("\u{1b}[2J\r\nok\t\u{9b}1m\u{7f}"),
            "\\u{1b}[2J\\r\\nok\\t\\u{9b}1m\\u{7f}"
        );
        assert_eq!(visible("evil\u{202e}txt.exe"), "evil\\u{202e}txt.exe");
        assert_eq!(
            visible("10,000 Verbindungen, 0 Ähnliches · µs"),
            "10,000 Verbindungen, 0 Ähnliches · µs"
        );
    }

    #[test]
    fn a_text_without_end_is_cut_off() {
        let shown = visible(&"x".repeat(CHARS_MAX + 1));
        assert_eq!(shown.chars().count(), CHARS_MAX + 1);
        assert!(shown.ends_with("x…"));
    }
}
