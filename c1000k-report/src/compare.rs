//! Two runs, or two folders of runs, side by side.
//!
//! A folder of several runs of the same thing shows how far its figures spread by themselves. Where both sides have
//! several, a difference is within that noise or beyond it; else the noise is unknown.

use std::path::Path;

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, ServerRecord, Workload};

use crate::cost;
use crate::run::{Moment, Run, RunError, folders_in};
use crate::trend;

/// Two sides and the figures that both or one of them have.
#[derive(Debug)]
pub struct Comparison {
    /// The one and the other.
    pub sides: [Side; 2],
    /// The figures.
    pub rows: Vec<Row>,
}

/// One run, or several of the same thing.
#[derive(Debug)]
pub struct Side {
    /// The folder as it was given.
    pub name: String,
    /// The runs, at least one.
    pub runs: Vec<Run>,
}

/// A figure of both sides.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What it is.
    pub name: &'static str,
    /// What it is counted in.
    pub unit: Unit,
    /// The one side and the other; `None` where no run of it has the figure.
    pub values: [Option<Spread>; 2],
}

/// The values of a figure over several runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
    /// How many runs have it.
    pub runs: usize,
}

/// What a difference is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noise {
    /// One of the sides is a single run.
    Unknown,
    /// The values of the two sides overlap.
    Within,
    /// Each value of one side lies above all of the other.
    Beyond,
}

/// What a figure is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    /// Seconds.
    Seconds,
    /// Microseconds.
    Microseconds,
    /// Times a second.
    PerSecond,
    /// Bytes of something large.
    Bytes,
    /// Bytes of one of many.
    BytesEach,
    /// A part of one.
    Share,
    /// One figure over another.
    Ratio,
}

impl Comparison {
    /// Reads both folders.
    ///
    /// # Errors
    /// One of them is no run and has none in it.
    pub fn read(first: &Path, second: &Path) -> Result<Self, RunError> {
        let sides = [Side::read(first)?, Side::read(second)?];
        let rows = FIGURES.iter().filter_map(|figure| figure.row(&sides)).collect();
        Ok(Self { sides, rows })
    }

    /// Whether neither side has more than one run.
    #[must_use]
    pub fn is_of_single_runs(&self) -> bool {
        self.sides.iter().all(|side| side.runs.len() == 1)
    }
}

impl Side {
    /// A run, or else the runs in the folders of this one.
    fn read(folder: &Path) -> Result<Self, RunError> {
        let runs = match Run::read(folder) {
            Err(RunError::Empty(_)) => runs_in(folder)?,
            run => vec![run?],
        };
        Ok(Self { name: folder.display().to_string(), runs })
    }
}

fn runs_in(folder: &Path) -> Result<Vec<Run>, RunError> {
    let mut runs = Vec::new();
    for path in folders_in(folder) {
        match Run::read(&path) {
            Err(RunError::Empty(_)) => {}
            run => runs.push(run?),
        }
    }
    if runs.is_empty() { Err(RunError::Empty(folder.to_owned())) } else { Ok(runs) }
}

impl Row {
    /// The second side over the first, by their medians.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let [first, second] = self.values;
        first.zip(second).filter(|(first, _)| first.median != 0.0).map(|(a, b)| b.median / a.median)
    }

    /// What the difference is worth.
    #[must_use]
    pub fn noise(&self) -> Noise {
        match self.values {
            [Some(first), Some(second)] if first.runs > 1 && second.runs > 1 => {
                let is_apart = first.max < second.min || second.max < first.min;
                if is_apart { Noise::Beyond } else { Noise::Within }
            }
            _ => Noise::Unknown,
        }
    }
}

impl Noise {
    /// The name in JSON and CSV.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Within => "within",
            Self::Beyond => "beyond",
        }
    }
}

impl Unit {
    /// The name in JSON and CSV.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Seconds => "seconds",
            Self::Microseconds => "microseconds",
            Self::PerSecond => "per_second",
            Self::Bytes | Self::BytesEach => "bytes",
            Self::Share => "share",
            Self::Ratio => "ratio",
        }
    }

    /// A value for people.
    #[must_use]
    pub fn text(self, value: f64) -> String {
        match self {
            Self::Count => format::count(format::rounded(value)),
            Self::Seconds => format::duration(value),
            Self::Microseconds => format::duration(value / 1e6),
            Self::PerSecond => format::rate(value),
            Self::Bytes => format::bytes(format::rounded(value)),
            Self::BytesEach => format::bytes_each(value),
            Self::Share => format::percent(value),
            Self::Ratio => format!("{value:.2}"),
        }
    }
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = values.len() / 2;
        let lower = (values.len() - 1) / 2;
        Some(Self { median: (values[lower] + values[upper]) / 2.0, min, max, runs: values.len() })
    }
}

/// A figure, and how it is read from a run.
struct Figure {
    name: &'static str,
    of: fn(&Run) -> Option<f64>,
    unit: Unit,
}

impl Figure {
    fn row(&self, sides: &[Side; 2]) -> Option<Row> {
        let spread = |side: &Side| Spread::of(side.runs.iter().filter_map(self.of).collect());
        let values = sides.each_ref().map(spread);
        (values != [None, None]).then_some(Row { name: self.name, unit: self.unit, values })
    }
}

const FIGURES: [Figure; 24] = [
    Figure { name: "asked for", of: |run| summed(run, |client| client.target), unit: Unit::Count },
    Figure {
        name: "held at once",
        of: |run| run.connections().map(cost::float),
        unit: Unit::Count,
    },
    Figure {
        name: "verified, last pass",
        of: |run| run.verified().filter(|_| !run.clients.is_empty()).map(cost::float),
        unit: Unit::Count,
    },
    Figure { name: "failed", of: |run| summed(run, |client| client.failed), unit: Unit::Count },
    Figure { name: "lost", of: |run| summed(run, |client| client.lost), unit: Unit::Count },
    Figure { name: "ramp", of: ramp_seconds, unit: Unit::Seconds },
    Figure { name: "connects per second", of: connects_per_second, unit: Unit::PerSecond },
    Figure { name: "rate, last tenths over first", of: trend_ratio, unit: Unit::Ratio },
    Figure {
        name: "connect latency, p50",
        of: |run| latency(run, |it| it.p50),
        unit: Unit::Microseconds,
    },
    Figure {
        name: "connect latency, p99",
        of: |run| latency(run, |it| it.p99),
        unit: Unit::Microseconds,
    },
    Figure {
        name: "connect latency, max",
        of: |run| latency(run, |it| it.max),
        unit: Unit::Microseconds,
    },
    Figure { name: "messages sent", of: |run| workload(run, |it| it.sent), unit: Unit::Count },
    Figure {
        name: "messages answered",
        of: |run| workload(run, |it| it.answered),
        unit: Unit::Count,
    },
    Figure {
        name: "echo latency, p50",
        of: |run| echo(run, |it| it.p50),
        unit: Unit::Microseconds,
    },
    Figure {
        name: "echo latency, p99",
        of: |run| echo(run, |it| it.p99),
        unit: Unit::Microseconds,
    },
    Figure {
        name: "echo latency, p99.99",
        of: |run| echo(run, |it| it.p9999),
        unit: Unit::Microseconds,
    },
    Figure { name: "server's process at the peak", of: process_peak, unit: Unit::Bytes },
    Figure { name: "server's process, a connection", of: process_cost, unit: Unit::BytesEach },
    Figure { name: "kernel, one end of a connection", of: kernel_cost, unit: Unit::BytesEach },
    Figure { name: "server's CPU, user", of: |run| server(run, user), unit: Unit::Seconds },
    Figure { name: "server's CPU, system", of: |run| server(run, system), unit: Unit::Seconds },
    Figure { name: "process memory that came back", of: process_back, unit: Unit::Share },
    Figure { name: "slab memory that came back", of: slab_back, unit: Unit::Share },
    Figure { name: "memory in use at the peak", of: memory_used, unit: Unit::Bytes },
];

fn summed(run: &Run, figure: fn(&ClientRecord) -> u64) -> Option<f64> {
    run.sum(figure).filter(|_| !run.clients.is_empty()).map(cost::float)
}

fn ramp_seconds(run: &Run) -> Option<f64> {
    run.clients.iter().map(|(_, client)| client.ramp_seconds).reduce(f64::max)
}

/// Of all clients together, as if they had begun at once.
fn connects_per_second(run: &Run) -> Option<f64> {
    run.clients.iter().map(|(_, client)| client.connects_per_second).reduce(|a, b| a + b)
}

/// That of the client that slowed down the most.
fn trend_ratio(run: &Run) -> Option<f64> {
    let tenths = run.clients.iter().filter_map(|(_, client)| trend::tenths(&client.ramp_series));
    tenths.map(|tenths| trend::ratio(&tenths)).reduce(f64::min)
}

/// That of the client with the longest.
fn latency(run: &Run, figure: fn(&LatencyUs) -> Option<u64>) -> Option<f64> {
    run.clients
        .iter()
        .filter_map(|(_, client)| figure(&client.connect_latency_us))
        .max()
        .map(cost::float)
}

/// Of all clients together; nothing where none of them sent messages.
fn workload(run: &Run, figure: fn(&Workload) -> u64) -> Option<f64> {
    let workloads = run.clients.iter().filter_map(|(_, client)| client.workload.as_ref());
    workloads.map(figure).reduce(u64::saturating_add).map(cost::float)
}

/// That of the client with the longest.
fn echo(run: &Run, figure: fn(&LatencyUs) -> Option<u64>) -> Option<f64> {
    let workloads = run.clients.iter().filter_map(|(_, client)| client.workload.as_ref());
    workloads.filter_map(|workload| figure(&workload.latency_us)).max().map(cost::float)
}

fn process_peak(run: &Run) -> Option<f64> {
    cost::process(run).peak_bytes.map(cost::float)
}

fn process_cost(run: &Run) -> Option<f64> {
    cost::process(run).bytes_each
}

/// Of one end, so that runs on one host and on three compare.
fn kernel_cost(run: &Run) -> Option<f64> {
    let reported = || run.server.as_ref().and_then(|server| server.kernel_bytes_per_connection);
    cost::server_end_bytes(run).or_else(reported)
}

fn server(run: &Run, figure: fn(&ServerRecord) -> f64) -> Option<f64> {
    run.server.as_ref().map(figure)
}

fn user(server: &ServerRecord) -> f64 {
    server.cpu_user_seconds
}

fn system(server: &ServerRecord) -> f64 {
    server.cpu_system_seconds
}

fn process_back(run: &Run) -> Option<f64> {
    cost::process(run).share_returned()
}

fn slab_back(run: &Run) -> Option<f64> {
    cost::slab_share_returned(run, run.server_host())
}

fn memory_used(run: &Run) -> Option<f64> {
    run.snapshot(run.server_host(), Moment::Peak)?.memory_used_bytes.map(cost::float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_its_median_and_its_ends() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[]), None);
        let of = |median, min, max, runs| Some(Spread { median, min, max, runs });
        assert_eq!(spread(&[3.0]), of(3.0, 3.0, 3.0, 1));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), of(2.0, 1.0, 9.0, 3));
        assert_eq!(spread(&[9.0, 1.0, 2.0, 4.0]), of(3.0, 1.0, 9.0, 4));
    }

    #[test]
    fn a_difference_is_beyond_the_noise_where_no_values_overlap() {
        let noise = |first: &[f64], second: &[f64]| {
            let values = [first, second].map(|values| Spread::of(values.to_vec()));
            Row { name: "", unit: Unit::Count, values }.noise()
        };
        assert_eq!(noise(&[1.0, 2.0], &[3.0, 4.0]), Noise::Beyond);
        assert_eq!(noise(&[3.0, 4.0], &[1.0, 2.0]), Noise::Beyond);
        assert_eq!(noise(&[1.0, 3.0], &[2.0, 4.0]), Noise::Within);
        assert_eq!(noise(&[1.0, 2.0], &[2.0, 4.0]), Noise::Within);
        for few in [&[][..], &[9.0]] {
            assert_eq!(noise(few, &[1.0, 2.0]), Noise::Unknown);
            assert_eq!(noise(&[1.0, 2.0], few), Noise::Unknown);
        }
    }
}
