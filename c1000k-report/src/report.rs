//! A run with its checks and charts.

use std::error::Error;
use std::path::Path;

use c1000k_record::output;
use clap::ValueEnum;

use crate::chart::{self, Chart};
use crate::checks::{self, Check};
use crate::escape::visible;
use crate::export::Format;
use crate::run::Run;
use crate::verdict;

/// A run with its checks and charts.
#[derive(Debug)]
pub struct Report {
    /// The run.
    pub run: Run,
    /// Whether clients, server and kernel agree.
    pub checks: Vec<Check>,
    /// The charts for which it has figures.
    pub charts: Vec<Chart>,
}

impl Report {
    /// Checks the run and draws its charts.
    ///
    /// # Errors
    /// A chart can't be laid out.
    pub fn new(run: Run) -> Result<Self, Box<dyn Error>> {
        let (checks, charts) = (checks::all(&run), chart::charts(&run)?);
        Ok(Self { run, checks, charts })
    }

    /// The verdict in a few lines.
    #[must_use]
    pub fn verdict(&self) -> String {
        verdict::text(&self.run, &self.checks)
    }

    /// The paths of the pages that [`write`](Self::write) writes into a directory, one per line.
    #[must_use]
    pub fn pages(folder: &Path) -> String {
        let pages = [Format::Markdown, Format::Html].map(|format| {
            let page = folder.join(format.exporter().file_name());
            visible(&page.display().to_string())
        });
        pages.join("\n")
    }

    /// Writes the charts and every format into a directory.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn write(&self, folder: &Path) -> Result<(), Box<dyn Error>> {
        for chart in &self.charts {
            write(&folder.join(chart.file_name), &chart.svg)?;
        }
        for format in Format::value_variants() {
            let exporter = format.exporter();
            write(&folder.join(exporter.file_name()), &exporter.export(self)?)?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    output::replace(path, text.as_bytes())
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}
