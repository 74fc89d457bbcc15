//! What is made of a report, or of a comparison, for others to read: a file for each format.
//!
//! A format is a file of this folder with an implementation of [`Export`], and its lines in [`Format`].

mod csv;
mod html;
mod json;
mod markdown;

use std::error::Error;

use clap::ValueEnum;

use crate::Report;
use crate::compare::Comparison;

pub use json::{COMPARISON_SCHEMA, SUMMARY_SCHEMA};

/// How reports and comparisons are written down.
pub trait Export {
    /// The name of a report's file in the folder of its run.
    fn file_name(&self) -> &'static str;

    /// The text of a report.
    ///
    /// # Errors
    /// It can't be expressed in this format.
    fn report(&self, report: &Report) -> Result<String, Box<dyn Error>>;

    /// The text of a comparison.
    ///
    /// # Errors
    /// It can't be expressed in this format.
    fn comparison(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>>;
}

/// The formats, by their names on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text and tables, as in summary.md
    Markdown,
    /// A page for a browser, as in report.html
    Html,
    /// One object, as in summary.json
    Json,
    /// Rows for a spreadsheet; of a run its figures over time, as in series.csv
    Csv,
}

impl Format {
    /// What writes this format.
    #[must_use]
    pub fn exporter(self) -> &'static dyn Export {
        match self {
            Self::Markdown => &markdown::Markdown,
            Self::Html => &html::Html,
            Self::Json => &json::Json,
            Self::Csv => &csv::Csv,
        }
    }
}
