//! The record of a row.

use std::path::Path;
use std::{fmt, fs, thread};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rows::Row;
use crate::bystander::Latencies;
use crate::programs::date;
use crate::record::ServerRecord;
use crate::snapshot::kernel_release;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    #[serde(rename = "holds")]
    Holds,
    #[serde(rename = "FAILS")]
    Fails,
    #[serde(rename = "skipped")]
    Skipped,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Fails => "FAILS",
            Self::Skipped => "skipped",
        }
    }
}

/// The row can't run on this machine; the text is the reason.
#[derive(Debug)]
pub(crate) struct Skipped(pub(crate) String);

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// A condition, and whether it holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Check {
    pub(crate) what: String,
    pub(crate) holds: bool,
}

impl Check {
    pub(crate) fn new(what: impl Into<String>, holds: bool) -> Self {
        Self { what: what.into(), holds }
    }
}

/// The record of a row.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) row: String,
    pub(crate) fault: String,
    pub(crate) must_hold: String,
    pub(crate) state: State,
    pub(crate) reproduce: String,
    pub(crate) date: String,
    pub(crate) machine: String,
    pub(crate) load_average: f32,
    pub(crate) seconds: f64,
    pub(crate) figures: Map<String, Value>,
    pub(crate) checks: Vec<Check>,
    pub(crate) bystander: Option<Latencies>,
    pub(crate) server_arguments: Option<Vec<String>>,
    pub(crate) server: Option<ServerRecord>,
}

impl Report {
    /// Creates the record of a row that starts now.
    pub(crate) fn new(row: &Row) -> Result<Self> {
        let (release, cpus) = (kernel_release()?, thread::available_parallelism()?);
        Ok(Self {
            row: row.name.to_owned(),
            fault: row.fault.to_owned(),
            must_hold: row.must_hold.to_owned(),
            state: State::Fails,
            reproduce: format!("scripts/faults {}", row.name),
            date: date(),
            machine: format!("{cpus} cpus, Linux {release}"),
            load_average: 0.0,
            seconds: 0.0,
            figures: Map::new(),
            checks: Vec::new(),
            bystander: None,
            server_arguments: None,
            server: None,
        })
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        Ok(fs::write(folder.join(format!("{}.json", self.row)), text)?)
    }

    /// The scalar figures and the bystander's latency.
    pub(crate) fn line(&self) -> String {
        let scalars = self.figures.iter().filter_map(|(name, value)| match value {
            Value::Array(_) | Value::Object(_) => None,
            Value::String(text) => Some(format!("{name} {text}")),
            value => Some(format!("{name} {value}")),
        });
        let mut line = scalars.collect::<Vec<_>>().join(", ");
        if let Some(latencies) = &self.bystander {
            let max = latencies.max_ms.map_or_else(|| "none".to_owned(), |max| max.to_string());
            line += &format!(
                "; bystander max {max} ms ({} ms without waits for a processor; machine {} ms late)",
                latencies.max_ms_without_waits_for_a_processor, latencies.oversleep_max_ms
            );
        }
        line
    }
}

/// Writes all records of the directory as one table, in the form of docs/reliability.md.
pub(crate) fn write_table(folder: &Path) -> Result<()> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.sort();
    let mut table =
        "| fault | what must hold | measured | record |\n| --- | --- | --- | --- |\n".to_owned();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|kind| kind == "json")) {
        let report: Report = serde_json::from_slice(&fs::read(path)?)
            .with_context(|| format!("{} is not the record of a row", path.display()))?;
        let Report { fault, must_hold, row, .. } = &report;
        let measured = format!("**{}**: {}", report.state.name(), report.line());
        table += &format!("| {fault} | {must_hold} | {measured} | [{row}]({row}.json) |\n");
    }
    Ok(fs::write(folder.join("README.md"), table)?)
}
