//! The figures for spreadsheets: a line each, the name first, with the bare number in seconds, bytes or pieces.

use std::error::Error;

use super::Export;
use crate::Report;
use crate::compare::{Comparison, figures};

/// Comma-separated values, as RFC 4180 has them.
#[derive(Debug)]
pub(super) struct Csv;

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
            let numbers = [first, second, row.ratio(), row.noise].map(number);
            let [first, second, ratio, noise] = numbers;
            [row.name.to_owned(), first, second, ratio, noise]
        });
        text(["figure", "first", "second", "ratio", "noise"], rows)
    }
}

/// Empty where there is none.
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
