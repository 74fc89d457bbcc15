//! The result of a run: the record for programs, and a summary for users.

use std::time::SystemTime;

use c1000k_host::check::{FileTable, Requirements, Role, predict};
use c1000k_host::command_line::log_lines_dropped;
use c1000k_host::errno_name;
use c1000k_host::format;
use c1000k_host::usage::processors;
use c1000k_record::{Head, MemoryGuard, Prediction, SERVER_SCHEMA, ServerRecord};

use crate::args::Settings;
use crate::counts::by_name;
use crate::echo::RESET;
use crate::metrics::{Metrics, Sampler};
use crate::plan::Plan;

/// The process's memory per connection without an idle timeout, and the memory of a timeout, as the reactor guarantees.
const USER_BYTES_PER_CONNECTION: u64 = 24;
const IDLE_TIMEOUT_BYTES: u64 = 24;

pub(crate) fn record(
    settings: &Settings,
    plan: Plan,
    started_at: SystemTime,
    metrics: &Metrics,
    sampler: &mut Sampler,
    memory_guard: Option<MemoryGuard>,
) -> ServerRecord {
    let usage = metrics.process;
    let rss_at_start_bytes = sampler.rss_at_start_bytes();
    let peak = sampler.peak().cloned();
    let errors = metrics.accept_errors.iter();
    ServerRecord {
        head: Head::new(SERVER_SCHEMA, env!("CARGO_PKG_VERSION"), started_at),
        accepted: metrics.accepted,
        // A connection that is being removed and its replacement may be counted at the same time.
        peak: metrics.connections_max.min(plan.connections_max),
        open: metrics.connections,
        refused: metrics.refused,
        closed: metrics.closed,
        stale_events: metrics.stale_events,
        accept_errors: errors.map(|(&errno, &times)| (errno_name(errno), times)).collect(),
        bytes_in: metrics.bytes_in,
        bytes_out: metrics.bytes_out,
        user_bytes_per_connection: peak
            .as_ref()
            .and_then(|peak| peak.user_bytes_per_connection(rss_at_start_bytes)),
        kernel_bytes_per_connection: peak
            .as_ref()
            .and_then(|peak| Some(peak.kernel.as_ref()?.slab_bytes())),
        rss_peak_bytes: usage.and_then(|usage| usage.rss_peak_bytes).max(sampler.rss_max_bytes()),
        cpu_user_seconds: usage.map_or(0.0, |usage| usage.cpu_user_seconds),
        cpu_system_seconds: usage.map_or(0.0, |usage| usage.cpu_system_seconds),
        uptime_seconds: metrics.uptime.as_secs_f64(),
        bind: settings.bind.to_string(),
        first_port: settings.first_port,
        ports: u64::from(settings.ports),
        mode: settings.mode.name().to_owned(),
        connections_max: plan.connections_max,
        threads: settings.threads,
        accept_pauses: metrics.accept_pauses,
        refused_by: by_name(&metrics.refused_by),
        closed_by: by_name(&metrics.closed_by),
        log_lines_dropped: log_lines_dropped(),
        memory_guard,
        wakeups: metrics.wakeups,
        kernel_bytes_by_slab: peak.as_ref().and_then(|peak| peak.bytes_by_slab()),
        slabs_shown_as: sampler.slabs_shown_as(),
        rss_at_start_bytes,
        rss_now_bytes: metrics.rss_bytes(),
        rss_at_peak_bytes: peak.as_ref().and_then(|peak| peak.rss_bytes),
        prediction: Some(prediction(settings, plan.file_table, metrics.connections_max)),
        counters: sampler.counters(),
        series: sampler.take_series(),
        file_table: Some(plan.file_table.into()),
        processors: processors(),
    }
}

/// The predicted memory of this number of connections.
pub(crate) fn prediction(
    settings: &Settings,
    file_table: FileTable,
    connections: u64,
) -> Prediction {
    let mut requirements =
        Requirements { file_table, ..Requirements::new(Role::Server, connections) };
    let idle_timeout_bytes = if settings.idle_timeout.is_some() { IDLE_TIMEOUT_BYTES } else { 0 };
    requirements.user_bytes_per_connection = USER_BYTES_PER_CONNECTION + idle_timeout_bytes;
    predict(&requirements)
}

/// The summary for users.
pub(crate) fn text(record: &ServerRecord) -> String {
    let count = |label: &str, value: u64| (label.to_owned(), format::count(value));
    let mut rows = vec![
        count("connections at the peak", record.peak),
        count("accepted", record.accepted),
        count("refused", record.refused),
        count("still open at the end", record.open),
        (
            "bytes in and out".to_owned(),
            format!("{} and {}", format::bytes(record.bytes_in), format::bytes(record.bytes_out)),
        ),
        (
            "CPU time".to_owned(),
            format!(
                "{:.2} s in the program, {:.2} s in the kernel",
                record.cpu_user_seconds, record.cpu_system_seconds
            ),
        ),
    ];
    // If other programs freed more than a few connections took, the figure is meaningless.
    let each = |label: &str, bytes: Option<f64>| {
        let bytes = bytes.filter(|&bytes| bytes > 0.0)?;
        Some((label.to_owned(), format!("{} a connection", format::bytes_each(bytes))))
    };
    rows.extend(each("memory of the process", record.user_bytes_per_connection));
    rows.extend(each("memory of the kernel", record.kernel_bytes_per_connection));
    rows.extend(
        (record.stale_events > 0).then(|| count("stale events dropped", record.stale_events)),
    );
    rows.extend(
        record.refused_by.iter().map(|(why, &times)| count(&format!("refused, {why}"), times)),
    );
    rows.extend(
        record.closed_by.iter().map(|(why, &times)| (format!("closed, {why}"), closed(why, times))),
    );
    rows.extend(
        (record.log_lines_dropped > 0)
            .then(|| count("lines of log dropped", record.log_lines_dropped)),
    );
    rows.extend(
        record
            .accept_errors
            .iter()
            .map(|(name, &times)| (format!("accept failed, {name}"), format::count(times))),
    );
    let lines = rows.iter().map(|(label, value)| format!("  {label:<24}  {value}\n"));
    format!(
        "c1000k-server held {}\n{}",
        format::counted(record.peak, "connection"),
        lines.collect::<String>()
    )
}

/// The count; for resets by the peer, with a note that they are usually expected.
fn closed(reason: &str, times: u64) -> String {
    let times = format::count(times);
    match reason {
        RESET => format!(
            "{times} by the peers; c1000k-client ends its own connections so, to leave no TIME_WAIT"
        ),
        _ => times,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_per_connection_are_shown_only_if_positive() {
        let text_of = |bytes: f64| {
            text(
                &serde_json::from_value(serde_json::json!({
                    "schema": SERVER_SCHEMA, "accepted": 3, "peak": 3, "open": 0, "refused": 0,
                    "closed": 3, "stale_events": 0, "accept_errors": {}, "bytes_in": 0,
                    "bytes_out": 0, "user_bytes_per_connection": bytes,
                    "kernel_bytes_per_connection": bytes, "rss_peak_bytes": 0,
                    "cpu_user_seconds": 0.0, "cpu_system_seconds": 0.0,
                }))
                .unwrap(),
            )
        };
        assert_eq!(text_of(24.5).matches("24.5 B a connection").count(), 2);
        for bytes in [0.0, -32.0] {
            assert!(!text_of(bytes).contains("a connection"), "{}", text_of(bytes));
        }
    }
}
