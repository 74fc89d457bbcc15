//! Writes a report in several formats.
//!
//! A format is a file in this directory with an implementation of [`Export`], and a variant of [`Format`].

mod csv;
mod html;
mod json;
mod markdown;
mod series;

use std::error::Error;

use clap::ValueEnum;

use crate::Report;
use crate::compare::Comparison;

pub use json::SUMMARY_SCHEMA;

/// A format of a report.
pub trait Export {
    /// The name of the file in the directory of the run.
    fn file_name(&self) -> &'static str;

    /// The text of the file.
    ///
    /// # Errors
    /// The report can't be expressed in this format.
    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>>;

    /// Two runs, or two series of runs, side by side.
    ///
    /// # Errors
    /// The comparison can't be expressed in this format.
    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>>;
}

/// The formats, by their names on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The page of summary.md
    Markdown,
    /// The page of report.html
    Html,
    /// The object of summary.json
    Json,
    /// The figures of summary.csv
    Csv,
    /// The figures over time of series.csv
    Series,
}

impl Format {
    /// The implementation of this format.
    #[must_use]
    pub fn exporter(self) -> &'static dyn Export {
        match self {
            Self::Markdown => &markdown::Markdown,
            Self::Html => &html::Html,
            Self::Json => &json::Json,
            Self::Csv => &csv::Csv,
            Self::Series => &series::Series,
        }
    }
}
