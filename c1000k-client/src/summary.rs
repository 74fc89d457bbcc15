//! The summary of a run as text: the verdict first, then the figures.

use std::fmt::Write;

use c1000k_host::format::{bytes, bytes_each, count, counted, duration, rate, visible};
use c1000k_record::{
    ClientRecord, ConnectionBytes, LatencyUs, TargetRecord, Threshold, Verdict, Workload,
    per_second,
};

use crate::run::some;

/// Width of the names.
const NAME: usize = 16;

/// The summary, one fact per line.
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
    if let Some(latency) = latency(&record.connect_latency_us) {
        fact("connect latency", latency);
    }
    if let Some(layers) = &record.connection_bytes {
        fact("per connection", memory(layers, record.process_bytes_per_connection));
    }
    fact("held for", duration(record.hold_seconds));
    if let Some(workload) = &record.workload {
        fact("messages", messages(workload));
        if let Some(latency) = echo_latency(&workload.latency_us) {
            fact("echo latency", latency);
        }
    }
    if let Some(churn) = &record.churn {
        let counts = format!("{} closed, {} reopened", count(churn.closed), count(churn.reopened));
        fact("churn", with_latency(counts, &churn.connect_latency_us));
    }
    if let Some(storm) = &record.storm {
        let counts = format!(
            "{} of {} back in {}",
            count(storm.back),
            count(storm.dropped),
            duration(storm.reopen_seconds)
        );
        fact("storm", with_latency(counts, &storm.connect_latency_us));
    }
    if record.targets.len() > 1 {
        record.targets.iter().for_each(|target| fact("target", part_of(target)));
    }
    for threshold in &record.thresholds {
        fact("fail if", judged(threshold));
    }
    if let Some(limit) = record.limit {
        fact("limit", limit.to_string());
    }
    lines.extend(record.limit_detail.iter().map(|detail| format!("  {detail}")));
    lines.push(String::new());
    lines.join("\n")
}

/// One target's part.
fn part_of(target: &TargetRecord) -> String {
    format!(
        "{}: {} established, {} attempted, {} failed, {} lost",
        visible(&target.target),
        count(target.established),
        count(target.attempted),
        count(target.failed),
        count(target.lost)
    )
}

fn headline(record: &ClientRecord) -> String {
    let target = counted(record.target, "connection");
    let held = format!("{} of {target} held", count(record.established));
    match record.verdict {
        Verdict::Reached => {
            format!("REACHED: {held}, each verified when it opened and after the hold")
        }
        Verdict::Held => {
            format!("HELD, NOT VERIFIED: {held}; none was verified (--no-verify)")
        }
        Verdict::Short => format!("SHORT: {held}"),
    }
}

fn verified(record: &ClientRecord) -> String {
    let [first, second] = record.verified_passes[..] else {
        return match record.verified {
            Some(first) => format!("{} when they opened, no second pass", count(first)),
            None => "not requested".to_owned(),
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

/// Faults are only shown if there are any.
fn messages(workload: &Workload) -> String {
    let mut text = format!(
        "{} sent, {}, {} answered",
        count(workload.sent),
        rate(per_second(workload.sent, workload.seconds)),
        count(workload.answered),
    );
    for (count, what) in [
        (workload.mismatched, "mismatched"),
        (workload.unanswered, "unanswered"),
        (workload.late, "sent late"),
        (workload.skipped, "skipped"),
    ] {
        text += &some(count, what);
    }
    text
}

/// Measured from the time that a message was due.
fn echo_latency(us: &LatencyUs) -> Option<String> {
    let text = |value: Option<u64>| value.map(|us| duration(us as f64 / 1e6));
    Some(format!(
        "median {}, p99 {}, p99.9 {}, p99.99 {}, longest {}",
        text(us.p50)?,
        text(us.p99)?,
        text(us.p999)?,
        text(us.p9999)?,
        text(us.max)?
    ))
}

/// The memory of a connection by layer, and the growth of the whole process.
fn memory(layers: &ConnectionBytes, process: Option<f64>) -> String {
    let kernel = layers.kernel.map(|kernel| format!("kernel {}", bytes_each(kernel)));
    let tls = (layers.tls > 0).then(|| format!("TLS {}", bytes(layers.tls)));
    let protocol = (layers.protocol > 0).then(|| format!("protocol {}", bytes(layers.protocol)));
    let client = format!("client {}", bytes(layers.client));
    let process = process.map(|process| format!("process in all {}", bytes_each(process)));
    let parts: Vec<_> =
        [kernel, tls, protocol, Some(client), process].into_iter().flatten().collect();
    parts.join(", ")
}

fn judged(threshold: &Threshold) -> String {
    let outcome = if threshold.passed { "pass" } else { "FAIL" };
    let value = match threshold.value {
        None => "not measured".to_owned(),
        Some(us) if is_latency(&threshold.expression) => duration(us / 1e6),
        Some(value) => count(value as u64),
    };
    format!("{}: {outcome}, {value}", threshold.expression)
}

fn is_latency(expression: &str) -> bool {
    ["echo.", "connect."].iter().any(|of| expression.trim_start().starts_with(of))
}

fn with_latency(text: String, us: &LatencyUs) -> String {
    latency(us).map_or_else(|| text.clone(), |latency| format!("{text}; connects: {latency}"))
}

fn latency(us: &LatencyUs) -> Option<String> {
    let text = |value: Option<u64>| value.map(|us| duration(us as f64 / 1e6));
    Some(format!("median {}, p99 {}, longest {}", text(us.p50)?, text(us.p99)?, text(us.max)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_connection_is_shown_by_layer() {
        let tls = ConnectionBytes { kernel: Some(4_035.2), tls: 1_312, protocol: 24, client: 40 };
        assert_eq!(
            memory(&tls, Some(3_991.0)),
            "kernel 4,035 B, TLS 1,312 B, protocol 24 B, client 40 B, process in all 3,991 B"
        );
        let plain = ConnectionBytes { client: 40, ..ConnectionBytes::default() };
        assert_eq!(memory(&plain, None), "client 40 B");
    }
}
