//! The end of a run in text for people: the verdict first, then what stands behind it.

use std::fmt::Write;

use c1000k_host::format::{count, counted, duration, rate};
use c1000k_record::{ClientRecord, Verdict};

/// Width of the names.
const NAME: usize = 16;

/// The summary, one fact a line.
pub(crate) fn render(record: &ClientRecord) -> String {
    let mut lines = vec![headline(record)];
    let mut fact = |name: &str, value: String| lines.push(format!("  {name:NAME$} {value}"));
    fact("established", format!("{} held at once", count(record.established)));
    fact("verified", verified(record));
    fact("failed", failed(record));
    fact("lost", count(record.lost));
    fact(
        "ramp",
        format!("{}, {}", duration(record.ramp_seconds), rate(record.connects_per_second)),
    );
    if let Some(latency) = latency(record) {
        fact("connect latency", latency);
    }
    fact("held for", duration(record.hold_seconds));
    if let Some(limit) = record.limit {
        fact("limit", limit.to_string());
    }
    lines.extend(record.limit_detail.iter().map(|detail| format!("  {detail}")));
    lines.push(String::new());
    lines.join("\n")
}

fn headline(record: &ClientRecord) -> String {
    let target = counted(record.target, "connection");
    let held = format!("{} of {target} held", count(record.established));
    match record.verdict {
        Verdict::Reached => {
            format!("REACHED: {held}, each proven when it opened and after the hold")
        }
        Verdict::Held => {
            format!("HELD, NOT VERIFIED: {held}; no echo was asked for on them (--no-verify)")
        }
        Verdict::Short => format!("SHORT: {held}"),
    }
}

fn verified(record: &ClientRecord) -> String {
    let [first, second] = record.verified_passes[..] else {
        return match record.verified {
            Some(first) => format!("{} when they opened, no second pass", count(first)),
            None => "not asked for".to_owned(),
        };
    };
    format!("{} after the hold, {} when they opened", count(second), count(first))
}

fn failed(record: &ClientRecord) -> String {
    let mut text = count(record.failed);
    for (index, (name, &times)) in record.failures.iter().enumerate() {
        let before = if index == 0 { "; attempts:" } else { "," };
        // Writing to a String can't fail.
        let _ = write!(text, "{before} {name} {}", count(times));
    }
    text
}

fn latency(record: &ClientRecord) -> Option<String> {
    let us = &record.connect_latency_us;
    let text = |value: Option<u64>| value.map(|us| duration(us as f64 / 1e6));
    Some(format!("median {}, p99 {}, longest {}", text(us.p50)?, text(us.p99)?, text(us.max)?))
}
