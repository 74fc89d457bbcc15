//! The checks, the record and the chart of a soak test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use c1000k_host::format;
use c1000k_report::chart::{self, Panel};
use procfs::Current;
use serde::Serialize;

use super::churn::{Line, Sample, Summary};
use super::{Arguments, Measurements, ServerSample};
use crate::bystander::Latencies;
use crate::faults::Check;
use crate::record::ServerRecord;

/// Growth of the process by its allocator, after each connection has been replaced several times.
const GROWTH_BYTES_MAX: u64 = 512 * 1024;
const POINTS_MAX: usize = 300;

/// The record of a soak test.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    minutes: f64,
    churn: u32,
    idle_seconds: u32,
    r#where: &'static str,
    load_average: f32,
    peers: Summary,
    slopes_per_hour_second_half: BTreeMap<&'static str, f64>,
    bystander: Option<Latencies>,
    checks: Vec<Check>,
    server: ServerRecord,
    series: Series,
}

#[derive(Debug, Serialize)]
struct Series {
    peers: Vec<Sample>,
    server: Vec<ServerSample>,
}

pub(super) fn evaluate(arguments: &Arguments, measurements: Measurements) -> Result<Record> {
    let (points, peers) = read_peers(&measurements.peers)?;
    let steady_from = peers.ramp_seconds + 5.0;
    let steady_until = peers.ramp_seconds + peers.seconds - 2.0;
    let is_steady =
        |sample: &&ServerSample| steady_from < sample.seconds && sample.seconds < steady_until;
    let steady: Vec<&ServerSample> = measurements.samples.iter().filter(is_steady).collect();
    let half = &steady[steady.len() / 2..];
    let checks = checks(arguments, &peers, &steady, &measurements)?;
    let slope = |value: fn(&ServerSample) -> Option<u64>| {
        let points = half.iter().filter_map(|sample| Some((sample.seconds, value(sample)? as f64)));
        (slope_of(&points.collect::<Vec<_>>()) * 3600.0).round()
    };
    let mut slopes = BTreeMap::from([
        ("descriptors", slope(|sample| Some(sample.descriptors))),
        ("rss_bytes", slope(|sample| Some(sample.rss_bytes))),
    ]);
    if arguments.vm {
        slopes.insert("kernel_slab_bytes", slope(|sample| sample.kernel_slab_bytes));
    }
    Ok(Record {
        minutes: arguments.minutes,
        churn: arguments.churn,
        idle_seconds: arguments.idle_seconds(),
        r#where: if arguments.vm { "guest" } else { "native" },
        load_average: procfs::LoadAverage::current()?.one,
        peers,
        slopes_per_hour_second_half: slopes,
        bystander: measurements.bystander,
        checks,
        server: measurements.server,
        series: Series { peers: thinned(points), server: thinned(measurements.samples) },
    })
}

/// Returns the samples, and the summary that follows them.
fn read_peers(output: &str) -> Result<(Vec<Sample>, Summary)> {
    let mut samples = Vec::new();
    // Lost connections are reported in between.
    for line in output.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line)? {
            Line::Sample(sample) => samples.push(sample),
            Line::Summary(summary) => return Ok((samples, summary)),
        }
    }
    Err(anyhow!("the peers printed no summary"))
}

fn checks(
    arguments: &Arguments,
    peers: &Summary,
    steady: &[&ServerSample],
    measurements: &Measurements,
) -> Result<Vec<Check>> {
    let (server, counts) = (&measurements.server, &peers.counts);
    let (opened, closed) = (peers.opened_per_second, peers.closed_per_second);
    let count = format::count;
    let (connections, per_second) = (peers.connections as f64, f64::from(arguments.churn));
    let idle_closes = server.closed_by.get("idle").copied().unwrap_or(0);
    // A connection becomes silent at half of its life, which is a quarter of the timeout.
    let is_due = peers.seconds > 1.5 * f64::from(arguments.idle_seconds());
    let bystanders = u64::from(measurements.bystander.is_some());
    let descriptors = || steady.iter().map(|sample| sample.descriptors);
    let most = descriptors().max().context("the soak test was too short")?;
    let least = descriptors().min().unwrap_or(most);
    // In a guest the open files of both ends are counted.
    let ends = if arguments.vm { 2.0 } else { 1.0 };
    let half = &steady[steady.len() / 2..];
    let [first, .., last] = half else { bail!("the soak test was too short") };
    let grown = last.rss_bytes.saturating_sub(first.rss_bytes);
    let all_closed = server.open == 0 && server.accepted == server.closed;
    let mut checks = Vec::new();
    let mut check = |what: String, holds| checks.push(Check::new(what, holds));
    check(
        format!("{} were held to the end, and all echoed", count(peers.connections as u64)),
        peers.held as f64 > 0.98 * connections && peers.proven == peers.connections,
    );
    let least_churn = 0.95 * per_second;
    check(
        format!(
            "at least {least_churn:.0} opened and closed per second ({opened:.0} and {closed:.0})"
        ),
        opened.min(closed) >= least_churn,
    );
    check(
        "no connection was lost or refused, and no echo was wrong".to_owned(),
        counts.lost == 0 && counts.wrong == 0 && server.refused == 0,
    );
    check(
        format!(
            "the idle timeout closed the silent ones, and no other ({})",
            count(counts.timed_out)
        ),
        idle_closes == counts.timed_out && (counts.timed_out > 0 || !is_due),
    );
    check(
        format!("as many were accepted as opened ({}), and all are closed", count(server.accepted)),
        all_closed && server.accepted == counts.opened + bystanders,
    );
    check(
        format!("descriptors are flat ({} to {})", count(least), count(most)),
        most as f64 <= ends * connections * 1.02 + 250.0,
    );
    check(
        format!("the process did not grow in the second half ({} bytes)", count(grown)),
        grown <= GROWTH_BYTES_MAX,
    );
    if let Some(latencies) = &measurements.bystander {
        check("the bystander was served to the end".to_owned(), latencies.lost.is_none());
    }
    Ok(checks)
}

/// The slope of the least-squares line.
fn slope_of(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let across: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let along: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if along > 0.0 { across / along } else { 0.0 }
}

fn thinned<T>(points: Vec<T>) -> Vec<T> {
    let stride = 1 + points.len() / POINTS_MAX;
    points.into_iter().step_by(stride).collect()
}

impl Record {
    pub(super) fn checks(&self) -> &[Check] {
        &self.checks
    }

    pub(super) fn draw(&self, folder: &Path) -> Result<()> {
        let bytes: fn(f64) -> String = |value| format::bytes(format::rounded(value));
        let count: fn(f64) -> String = |value| format::count(format::rounded(value));
        let server = |value: fn(&ServerSample) -> Option<u64>| {
            let points = self.series.server.iter();
            points.filter_map(|sample| Some((sample.seconds, value(sample)? as f64))).collect()
        };
        let peers = |value: fn(&Sample) -> u64| {
            self.series.peers.iter().map(|sample| (sample.seconds, value(sample) as f64)).collect()
        };
        let panel = |label, text, points| Panel { label, text, points };
        let panels = [
            panel("process's memory", bytes, server(|sample| Some(sample.rss_bytes))),
            panel("descriptors", count, server(|sample| Some(sample.descriptors))),
            panel("open", count, peers(|sample| sample.open as u64)),
            panel("opened in all", count, peers(|sample| sample.counts.opened)),
            panel("kernel's slabs", bytes, server(|sample| sample.kernel_slab_bytes)),
        ];
        let drawn = chart::panels("soak.svg", "A soak test over time", &panels)
            .map_err(|why| anyhow!("{why}"))?;
        match drawn {
            Some(chart) => Ok(fs::write(folder.join(chart.file_name), chart.svg)?),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_is_that_of_the_line() {
        assert_eq!(slope_of(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), 2.0);
        assert_eq!(slope_of(&[(1.0, 7.0)]), 0.0);
        assert_eq!(slope_of(&[]), 0.0);
    }

    #[test]
    fn output_without_a_summary_is_an_error() {
        let sample =
            r#"{"sample": {"seconds": 1.0, "open": 1, "opened": 1, "closed": 0, "timed_out": 0,
            "lost": 0, "wrong": 0, "echoes": 1, "echo_max_ms": 0.1}}"#
                .replace('\n', " ");
        assert!(read_peers(&format!("{sample}\nlost connection 1 at 1.0 s: closed\n")).is_err());
        assert!(read_peers("{\"sample\": {}}").is_err());
    }
}
