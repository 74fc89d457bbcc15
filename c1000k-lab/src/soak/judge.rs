//! The checks of a soak, its record and its chart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use c1000k_host::format;
use c1000k_report::chart::{self, Panel};
use procfs::Current;
use serde::Serialize;

use super::churn::{Line, Sample, Summary};
use super::{Arguments, Observed, ServerSample};
use crate::bystander::Seen;
use crate::faults::Check;
use crate::record::ServerRecord;

/// What an allocator may still add after each connection has been replaced several times.
const GROWTH_BYTES_MAX: u64 = 512 * 1024;
const POINTS_MAX: usize = 300;

/// The record of a soak.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    minutes: f64,
    churn: u32,
    idle_seconds: u32,
    r#where: &'static str,
    load_average: f32,
    peers: Summary,
    slopes_per_hour_second_half: BTreeMap<&'static str, f64>,
    bystander: Option<Seen>,
    checks: Vec<Check>,
    server: ServerRecord,
    series: Series,
}

#[derive(Debug, Serialize)]
struct Series {
    peers: Vec<Sample>,
    server: Vec<ServerSample>,
}

pub(super) fn judge(arguments: &Arguments, observed: Observed) -> Result<Record> {
    let (points, peers) = read_peers(&observed.peers)?;
    let steady_from = peers.ramp_seconds + 5.0;
    let steady_until = peers.ramp_seconds + peers.seconds - 2.0;
    let is_steady =
        |sample: &&ServerSample| steady_from < sample.seconds && sample.seconds < steady_until;
    let steady: Vec<&ServerSample> = observed.samples.iter().filter(is_steady).collect();
    let half = &steady[steady.len() / 2..];
    let checks = checks(arguments, &peers, &steady, &observed)?;
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
        bystander: observed.bystander,
        checks,
        server: observed.server,
        series: Series { peers: thinned(points), server: thinned(observed.samples) },
    })
}

/// The samples, and the summary, which comes last.
fn read_peers(said: &str) -> Result<(Vec<Sample>, Summary)> {
    let mut samples = Vec::new();
    // Complaints may be between them.
    for line in said.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line)? {
            Line::Sample(sample) => samples.push(sample),
            Line::Summary(summary) => return Ok((samples, summary)),
        }
    }
    Err(anyhow!("the crowd printed no summary"))
}

fn checks(
    arguments: &Arguments,
    peers: &Summary,
    steady: &[&ServerSample],
    observed: &Observed,
) -> Result<Vec<Check>> {
    let (server, counts) = (&observed.server, &peers.counts);
    let (opened, closed) = (peers.opened_per_second, peers.closed_per_second);
    let count = format::count;
    let (connections, per_second) = (peers.connections as f64, f64::from(arguments.churn));
    let idle_closes = server.closed_by.get("idle").copied().unwrap_or(0);
    // They fall silent after half a life, a quarter of the time-out.
    let is_due = peers.seconds > 1.5 * f64::from(arguments.idle_seconds());
    let beside = u64::from(observed.bystander.is_some());
    let most = steady
        .iter()
        .map(|sample| sample.descriptors)
        .max()
        .context("it was too short to be judged")?;
    let least = steady.iter().map(|sample| sample.descriptors).min().unwrap_or(most);
    // In a guest the count is of all files that are open there, of both ends.
    let ends = if arguments.vm { 2.0 } else { 1.0 };
    let half = &steady[steady.len() / 2..];
    let [first, .., last] = half else { return Err(anyhow!("it was too short to be judged")) };
    let grown = last.rss_bytes.saturating_sub(first.rss_bytes);
    let all_closed = server.open == 0 && server.accepted == server.closed;
    let mut checks = vec![
        Check::new(
            format!(
                "{} were held to the end, and all of them echoed",
                count(peers.connections as u64)
            ),
            peers.held as f64 > 0.98 * connections && peers.proven == peers.connections,
        ),
        Check::new(
            format!(
                "at least {:.0} opened and closed a second ({opened:.0} and {closed:.0})",
                0.95 * per_second
            ),
            opened.min(closed) >= 0.95 * per_second,
        ),
        Check::new(
            "no connection was lost or refused, and no echo was wrong",
            counts.lost == 0 && counts.wrong == 0 && server.refused == 0,
        ),
        Check::new(
            format!(
                "the idle timeout closed those that fell silent, and no other ({})",
                count(counts.timed_out)
            ),
            idle_closes == counts.timed_out && (counts.timed_out > 0 || !is_due),
        ),
        Check::new(
            format!("accepted is what was opened ({}), and all is closed", count(server.accepted)),
            all_closed && server.accepted == counts.opened + beside,
        ),
        Check::new(
            format!("descriptors are flat ({} to {})", count(least), count(most)),
            most as f64 <= ends * connections * 1.02 + 250.0,
        ),
        Check::new(
            format!("the process did not grow in the second half ({} bytes)", count(grown)),
            grown <= GROWTH_BYTES_MAX,
        ),
    ];
    if let Some(seen) = &observed.bystander {
        checks.push(Check::new("the bystander was served to the end", seen.lost.is_none()));
    }
    Ok(checks)
}

/// The slope of the line of least squares.
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
        let drawn = chart::panels("soak.svg", "A soak over time", &panels)
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
    fn a_crowd_that_was_cut_off_is_an_error() {
        let sample =
            r#"{"sample": {"seconds": 1.0, "open": 1, "opened": 1, "closed": 0, "timed_out": 0,
            "lost": 0, "wrong": 0, "echoes": 1, "echo_max_ms": 0.1}}"#
                .replace('\n', " ");
        assert!(read_peers(&format!("{sample}\nlost connection 1 at 1.0 s: closed\n")).is_err());
        assert!(read_peers("{\"sample\": {}}").is_err());
    }
}
