//! Rows for a spreadsheet: of a run its figures over time, of a comparison its figures.

use std::error::Error;

use c1000k_record::{CpuPoint, RampPoint, ServerPoint};

use super::Export;
use crate::Report;
use crate::compare::{Comparison, Spread};
use crate::escape::visible;

/// Comma-separated values (RFC 4180), with a heading. What is not known is empty.
#[derive(Debug)]
pub(super) struct Csv;

const SERIES: [&str; 12] = [
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
    "process_cpu_seconds",
    "machine_busy_seconds",
];

const FIGURES: [&str; 12] = [
    "figure",
    "unit",
    "first_median",
    "first_min",
    "first_max",
    "first_runs",
    "second_median",
    "second_min",
    "second_max",
    "second_runs",
    "ratio",
    "noise",
];

impl Export for Csv {
    fn file_name(&self) -> &'static str {
        "series.csv"
    }

    fn report(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        let mut text = line(SERIES.map(str::to_owned));
        for (name, client) in &report.run.clients {
            text.extend(client.ramp_series.iter().map(|point| line(of_client(name, point))));
        }
        if let Some(server) = &report.run.server {
            text.extend(server.series.iter().map(|point| line(of_server(point))));
        }
        Ok(text)
    }

    fn comparison(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        let mut text = line(FIGURES.map(str::to_owned));
        for row in &comparison.rows {
            let [first, second] = row.values.map(spread);
            let [a, b, c, d] = first;
            let [e, f, g, h] = second;
            let (name, unit) = (quoted(row.name), row.unit.name().to_owned());
            let (ratio, noise) = (value(row.ratio()), row.noise().name().to_owned());
            text.push_str(&line([name, unit, a, b, c, d, e, f, g, h, ratio, noise]));
        }
        Ok(text)
    }
}

/// Seconds since the first connect.
fn of_client(name: &str, point: &RampPoint) -> [String; 12] {
    let [process, machine] = cpu(point.cpu);
    [
        quoted(name),
        point.seconds.to_string(),
        point.established.to_string(),
        value(point.failed_attempts),
        value(point.lost),
        String::new(),
        value(point.connect_p50_us),
        value(point.connect_p99_us),
        String::new(),
        String::new(),
        process,
        machine,
    ]
}

/// Seconds since the server began.
fn of_server(point: &ServerPoint) -> [String; 12] {
    let [process, machine] = cpu(point.cpu);
    let [failed, lost, p50, p99] = [const { String::new() }; 4];
    [
        "server".to_owned(),
        point.seconds.to_string(),
        point.open.to_string(),
        failed,
        lost,
        value(point.refused),
        p50,
        p99,
        value(point.rss_bytes),
        value(point.kernel_socket_bytes),
        process,
        machine,
    ]
}

fn cpu(point: Option<CpuPoint>) -> [String; 2] {
    [
        value(point.map(|cpu| cpu.process_seconds)),
        value(point.and_then(|cpu| cpu.machine_busy_seconds)),
    ]
}

fn spread(spread: Option<Spread>) -> [String; 4] {
    [
        value(spread.map(|spread| spread.median)),
        value(spread.map(|spread| spread.min)),
        value(spread.map(|spread| spread.max)),
        value(spread.map(|spread| spread.runs)),
    ]
}

fn value<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// Text of others: in quotes where it must be, and never a formula of the spreadsheet.
fn quoted(text: &str) -> String {
    let text = visible(text);
    let text = if text.starts_with(['=', '+', '-', '@']) { format!("'{text}") } else { text };
    if text.contains([',', '"']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn line<const N: usize>(cells: [String; N]) -> String {
    cells.join(",") + "\r\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_stays_in_its_cell() {
        let cases = [
            ("client-1", "client-1"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("=1+1", "'=1+1"),
            ("a\nb", "a\\nb"),
        ];
        for (text, cell) in cases {
            assert_eq!(quoted(text), cell);
        }
    }
}
