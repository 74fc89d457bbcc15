//! Charts over the time of a run, counted from its first connection: errors and CPU time of clients and server.

use std::collections::BTreeMap;

use c1000k_host::format;
use c1000k_record::{ClientRecord, RampPoint, ServerPoint, ServerRecord};

use super::{CLIENT_TIME, COLOURS, Chart, Drawn, Line, Scale, over_time};
use crate::cost::float;
use crate::run::Run;

/// Shares of CPU time are averages over this fraction of the time shown; over less, the resolution of the
/// kernel's clock would be visible.
const STEPS: f64 = 60.0;
/// The minimum time of an average.
const STEP_SECONDS_MIN: f64 = 0.1;

/// Failed attempts and lost connections of each client, and what the server refused, by name: totals until each moment.
pub(super) fn errors(run: &Run) -> Drawn<Option<Chart>> {
    let mut lines = Vec::new();
    for (name, client) in &run.clients {
        let counts = points(client).map(|point| {
            let mut counts = point.failures.clone().unwrap_or_default();
            counts.extend(point.lost.map(|lost| ("lost".to_owned(), lost)));
            (point.seconds, counts)
        });
        lines.extend(by_name(name, counts));
    }
    if let Some(server) = &run.server {
        let begin = begin(server);
        let counts = server.series.iter().map(|point| {
            let refused = point.refused_by.iter().flatten();
            let counts = refused.map(|(why, count)| (format!("refused, {why}"), *count)).collect();
            (point.seconds - begin, counts)
        });
        lines.extend(by_name("server", counts));
    }
    // The names with most errors, if there are more names than colours.
    lines.sort_by(|first, second| last(second).total_cmp(&last(first)));
    lines.truncate(COLOURS.len());
    let scale = Scale { label: "total", text: |value| format::count(format::rounded(value)) };
    over_time("errors.svg", "Errors over time, by name", (CLIENT_TIME, scale), &lines)
}

/// How many processors each program, and the machine, kept busy.
pub(super) fn processors(run: &Run) -> Drawn<Option<Chart>> {
    type OfClient = fn(&RampPoint) -> Option<f64>;
    type OfServer = fn(&ServerPoint) -> Option<f64>;
    let client = |client: &ClientRecord, figure: OfClient| {
        shares(points(client).filter_map(|point| Some((point.seconds, figure(point)?))))
    };
    let server = |server: &ServerRecord, figure: OfServer| {
        let begin = begin(server);
        let points = server.series.iter();
        let points = points.filter_map(|point| Some((point.seconds - begin, figure(point)?)));
        shares(points.filter(|point| point.0 >= 0.0))
    };
    let mut lines: Vec<Line> = Vec::new();
    for (name, record) in &run.clients {
        lines.push((name.clone(), client(record, |point| point.cpu_seconds)));
    }
    if let Some(record) = &run.server {
        lines.push(("server".to_owned(), server(record, |point| point.cpu_seconds)));
    }
    // A server's record of an older version does not have the machine's figures.
    let of_server = run.server.as_ref().map(|record| {
        let busy = server(record, |point| point.machine_busy_seconds);
        ("server", busy, server(record, |point| point.machine_softirq_seconds))
    });
    let of_client = run.clients.first().map(|(name, record)| {
        let busy = client(record, |point| point.machine_busy_seconds);
        (name.as_str(), busy, client(record, |point| point.machine_softirq_seconds))
    });
    let machine = of_server.filter(|(_, busy, _)| !busy.is_empty()).or(of_client);
    if let Some((program, busy, softirq)) = machine {
        let machine = if run.is_one_kernel() {
            "machine".to_owned()
        } else {
            format!("machine of {program}")
        };
        lines.push((format!("{machine}, busy"), busy));
        lines.push((format!("{machine}, soft interrupts"), softirq));
    }
    lines.retain(|line| line.1.len() > 1);
    let scale = Scale { label: "processors", text: |value| format!("{value:.2}") };
    over_time("processors.svg", "Processors in use over time", (CLIENT_TIME, scale), &lines)
}

/// The points of the ramp and of the time after it.
fn points(client: &ClientRecord) -> impl Iterator<Item = &RampPoint> {
    client.ramp_series.iter().chain(&client.hold_series)
}

/// The time of a server's first connection, with which a client's time begins. Until then samples are far apart, so it
/// is calculated from the rate after the first sample with connections.
pub(super) fn begin(server: &ServerRecord) -> f64 {
    let points = &server.series;
    let Some(first) = points.iter().position(|point| point.open > 0) else { return 0.0 };
    let (at, before) = (&points[first], &points[first.saturating_sub(1)]);
    let rate = points
        .get(first + 1)
        .map_or(0.0, |next| float(next.open.saturating_sub(at.open)) / (next.seconds - at.seconds));
    // With no rate the connections count as opened just after the sample before.
    let begin = at.seconds - float(at.open) / rate;
    if begin.is_finite() { begin.max(before.seconds) } else { before.seconds }
}

/// A line for each name that was counted.
fn by_name(program: &str, counts: impl Iterator<Item = (f64, BTreeMap<String, u64>)>) -> Vec<Line> {
    let counts: Vec<_> = counts.filter(|(seconds, _)| *seconds >= 0.0).collect();
    let names: BTreeMap<&str, u64> = counts
        .iter()
        .flat_map(|(_, counts)| counts)
        .map(|(name, count)| (name.as_str(), *count))
        .filter(|(_, count)| *count > 0)
        .collect();
    let line = |name: &str| {
        let at = |(seconds, counts): &(f64, BTreeMap<String, u64>)| {
            (*seconds, float(counts.get(name).copied().unwrap_or(0)))
        };
        (format!("{program}, {name}"), counts.iter().map(at).collect())
    };
    names.into_keys().map(line).collect()
}

fn last(line: &Line) -> f64 {
    line.1.last().map_or(0.0, |point| point.1)
}

/// From seconds and CPU time so far, the processors in use over each step.
fn shares(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.collect();
    let (Some(&first), Some(&end)) = (points.first(), points.last()) else { return Vec::new() };
    let step = ((end.0 - first.0) / STEPS).max(STEP_SECONDS_MIN);
    let mut before = first;
    let mut line = Vec::new();
    for &(seconds, cpu) in &points[1..] {
        if seconds - before.0 < step {
            continue;
        }
        let share = (cpu - before.1) / (seconds - before.0);
        if share.is_finite() && share >= 0.0 {
            if line.is_empty() {
                line.push((before.0, share));
            }
            line.push((seconds, share));
        }
        before = (seconds, cpu);
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_share_is_of_the_time_of_its_step() {
        let points = [(0.0, 5.0), (0.05, 5.05), (1.0, 5.5), (1.02, 5.6), (2.0, 6.5)];
        assert_eq!(shares(points.into_iter()), [(0.0, 0.5), (1.0, 0.5), (2.0, 1.0)]);
        assert!(shares(std::iter::empty()).is_empty());
        let broken = [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (2.0, f64::INFINITY)];
        assert!(shares(broken.into_iter()).iter().all(|point| point.1.is_finite()));
    }

    #[test]
    fn the_time_begins_with_the_first_connection() {
        let begin_of = |points: &[(f64, u64)]| {
            let points = points.iter().map(|&(seconds, open)| {
                json!({"seconds": seconds,
                "open": open, "rss_bytes": null, "kernel_socket_bytes": null})
            });
            let record = json!({
                "schema": "c1000k.server/1", "accepted": 9, "peak": 9, "open": 0, "refused": 0,
                "closed": 9, "stale_events": 0, "accept_errors": {}, "bytes_in": 0, "bytes_out": 0,
                "user_bytes_per_connection": null, "kernel_bytes_per_connection": null,
                "rss_peak_bytes": null, "cpu_user_seconds": 1.0, "cpu_system_seconds": 1.0,
                "series": points.collect::<Vec<_>>()
            });
            begin(&serde_json::from_value(record).expect("a record"))
        };
        assert_eq!(begin_of(&[(0.0, 0), (1.0, 0), (2.0, 50), (2.5, 150), (3.0, 150)]), 1.75);
        assert_eq!(begin_of(&[(0.0, 0), (1.0, 0), (2.0, 50), (3.0, 60)]), 1.0, "not before it");
        for points in [&[(0.0, 0), (1.0, 0), (2.0, 50)][..], &[(1.0, 0), (2.0, 50), (3.0, 50)]] {
            assert_eq!(begin_of(points), 1.0, "no rate is known");
        }
        assert_eq!(begin_of(&[(4.0, 7)]), 4.0);
        assert_eq!((begin_of(&[]), begin_of(&[(1.0, 0)])), (0.0, 0.0));
    }

    #[test]
    fn each_name_that_was_counted_has_a_line() {
        let counts = [
            (-1.0, BTreeMap::new()),
            (0.0, BTreeMap::from([("lost".to_owned(), 0)])),
            (1.0, BTreeMap::from([("ETIMEDOUT".to_owned(), 3), ("lost".to_owned(), 0)])),
        ];
        let lines = by_name("client", counts.into_iter());
        assert_eq!(lines, [("client, ETIMEDOUT".to_owned(), vec![(0.0, 0.0), (1.0, 3.0)])]);
    }
}
