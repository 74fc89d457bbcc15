//! The figures for spreadsheets: one per line, its name first, then its value without a unit.

use std::error::Error;

use super::Export;
use crate::Report;
use crate::compare::{Comparison, Spread, figures};

/// Comma-separated values (RFC 4180).
#[derive(Debug)]
pub(super) struct Csv;

/// The columns of a comparison: medians, and the ranges of the runs.
const COMPARISON: [&str; 13] = [
    "figure",
    "first",
    "second",
    "ratio",
    "noise",
    "difference",
    "unit",
    "first_min",
    "first_max",
    "first_runs",
    "second_min",
    "second_max",
    "second_runs",
];

impl Export for Csv {
    fn file_name(&self) -> &'static str {
        "summary.csv"
    }

    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        let rows = figures(&report.run).map(|(name, value)| [name.to_owned(), number(value)]);
        text(["figure", "value"], rows)
    }

    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        let rows = comparison.rows.iter().map(|row| {
            let [first, second] = row.values;
            let medians = [first, second].map(|side| number(side.map(|side| side.median)));
            let [ratio, noise] = [row.ratio(), row.noise()].map(number);
            let [one, two] = medians;
            let [first_min, first_max, first_runs] = ends(first);
            let [second_min, second_max, second_runs] = ends(second);
            [
                row.name.to_owned(),
                one,
                two,
                ratio,
                noise,
                row.difference().name().to_owned(),
                row.unit.name().to_owned(),
                first_min,
                first_max,
                first_runs,
                second_min,
                second_max,
                second_runs,
            ]
        });
        text(COMPARISON, rows)
    }
}

/// Minimum, maximum and number of runs.
fn ends(side: Option<Spread>) -> [String; 3] {
    let runs = side.map_or(0, |side| side.runs);
    [number(side.map(|side| side.min)), number(side.map(|side| side.max)), runs.to_string()]
}

/// Empty if it is unknown.
fn number(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn text<const N: usize>(
    heading: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Result<String, Box<dyn Error>> {
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    writer.write_record(heading)?;
    for row in rows {
        writer.write_record(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
