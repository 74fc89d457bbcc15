//! The figures over time for spreadsheets and plots: one line for each point of each program.

use std::collections::BTreeSet;
use std::error::Error;

use c1000k_record::{ClientRecord, RampPoint, ServerPoint};

use super::Export;
use crate::Report;
use crate::compare::Comparison;
use crate::escape::visible;
use crate::run::{Run, total};

/// Comma-separated values. A figure that is not known is empty.
#[derive(Debug)]
pub(super) struct Series;

/// Seconds are counted from a client's first connect, and from the start of the server.
const COLUMNS: [&str; 13] = [
    "program",
    "seconds",
    "connections",
    "failed_attempts",
    "lost",
    "refused",
    "connect_p50_us",
    "connect_p99_us",
    "resident_bytes",
    "kernel_socket_bytes",
    "cpu_seconds",
    "machine_busy_seconds",
    "machine_softirq_seconds",
];

/// The maximum of errors with their own column; others are only in the totals.
const NAMES_MAX: usize = 50;

impl Export for Series {
    fn file_name(&self) -> &'static str {
        "series.csv"
    }

    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        let names = Names::of(std::iter::once(&report.run));
        let mut writer = ::csv::Writer::from_writer(Vec::new());
        writer.write_record(names.heading())?;
        for row in rows(&report.run, &names) {
            writer.write_record(row)?;
        }
        Ok(String::from_utf8(writer.into_inner()?)?)
    }

    /// All runs of both sides, the directory of the run first in each line.
    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        let runs = || comparison.sides.iter().flat_map(|side| &side.runs);
        let names = Names::of(runs());
        let mut writer = ::csv::Writer::from_writer(Vec::new());
        writer.write_record(std::iter::once("run".to_owned()).chain(names.heading()))?;
        for run in runs() {
            let folder = visible(&run.folder.display().to_string());
            for row in rows(run, &names) {
                writer.write_record(std::iter::once(folder.clone()).chain(row))?;
            }
        }
        Ok(String::from_utf8(writer.into_inner()?)?)
    }
}

/// The names of errors that the series of some runs have.
#[derive(Debug, Default)]
struct Names {
    failures: BTreeSet<String>,
    refusals: BTreeSet<String>,
}

impl Names {
    fn of<'a>(runs: impl Iterator<Item = &'a Run>) -> Self {
        let mut names = Self::default();
        for run in runs {
            let points = run.clients.iter().flat_map(|(_, client)| points(client));
            let failures = points.filter_map(|point| point.failures.as_ref());
            names.failures.extend(failures.flat_map(|counts| counts.keys().cloned()));
            let points = run.server.iter().flat_map(|server| &server.series);
            let refusals = points.filter_map(|point| point.refused_by.as_ref());
            names.refusals.extend(refusals.flat_map(|counts| counts.keys().cloned()));
        }
        Self {
            failures: names.failures.into_iter().take(NAMES_MAX).collect(),
            refusals: names.refusals.into_iter().take(NAMES_MAX).collect(),
        }
    }

    fn heading(&self) -> Vec<String> {
        let failures = self.failures.iter().map(|name| format!("failed_{}", visible(name)));
        let refusals = self.refusals.iter().map(|name| format!("refused_{}", visible(name)));
        COLUMNS.map(str::to_owned).into_iter().chain(failures).chain(refusals).collect()
    }
}

fn points(client: &ClientRecord) -> impl Iterator<Item = &RampPoint> {
    client.ramp_series.iter().chain(&client.hold_series)
}

fn rows(run: &Run, names: &Names) -> Vec<Vec<String>> {
    let clients = run.clients.iter().flat_map(|(name, client)| {
        points(client).map(move |point| of_client(&visible(name), point, names))
    });
    let server = run.server.iter().flat_map(|server| &server.series);
    clients.chain(server.map(|point| of_server(point, names))).collect()
}

fn of_client(name: &str, point: &RampPoint, names: &Names) -> Vec<String> {
    let count = |name| point.failures.as_ref().map(|counts| counts.get(name).copied().unwrap_or(0));
    let failed = point.failures.as_ref().map(|counts| total(counts.values().copied()));
    let mut row = vec![
        name.to_owned(),
        point.seconds.to_string(),
        point.established.to_string(),
        text(failed),
        text(point.lost),
        String::new(),
        text(point.connect_p50_us),
        text(point.connect_p99_us),
        String::new(),
        String::new(),
        text(point.cpu_seconds),
        text(point.machine_busy_seconds),
        text(point.machine_softirq_seconds),
    ];
    row.extend(names.failures.iter().map(|name| text(count(name))));
    row.extend(names.refusals.iter().map(|_| String::new()));
    row
}

fn of_server(point: &ServerPoint, names: &Names) -> Vec<String> {
    let counts = || point.refused_by.as_ref();
    let count = |name| counts().map(|counts| counts.get(name).copied().unwrap_or(0));
    let mut row = vec![
        "server".to_owned(),
        point.seconds.to_string(),
        point.open.to_string(),
        String::new(),
        String::new(),
        text(counts().map(|counts| total(counts.values().copied()))),
        String::new(),
        String::new(),
        text(point.rss_bytes),
        text(point.kernel_socket_bytes),
        text(point.cpu_seconds),
        text(point.machine_busy_seconds),
        text(point.machine_softirq_seconds),
    ];
    row.extend(names.failures.iter().map(|_| String::new()));
    row.extend(names.refusals.iter().map(|name| text(count(name))));
    row
}

fn text<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}
