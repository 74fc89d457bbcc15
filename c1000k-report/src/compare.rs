//! Two runs, or two series of runs, side by side.
//!
//! The runs of a series differ although nothing was changed: that is the noise. If both sides have several runs, each
//! difference is within the noise or beyond it; otherwise that is unknown.

use std::error::Error;
use std::path::Path;

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, ServerRecord, Workload};

use crate::bottleneck;
use crate::chart::{self, Chart};
use crate::cost;
use crate::escape::markdown;
use crate::run::{Moment, Run, RunError, folders_in};
use crate::table::{columns, table, text_table};
use crate::targets;
use crate::trend;
use crate::verdict;

/// Two sides, and the figures that at least one of them has.
#[derive(Debug)]
pub struct Comparison {
    /// The two sides.
    pub sides: [Side; 2],
    /// The figures.
    pub rows: Vec<Row>,
}

/// One run, or a series of runs.
#[derive(Debug)]
pub struct Side {
    /// The directory, as it was given.
    pub name: String,
    /// The runs; at least one.
    pub runs: Vec<Run>,
}

/// A figure of both sides.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// Its values on each side; `None` if no run of the side has it.
    pub values: [Option<Spread>; 2],
}

/// The values of a figure in several runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median; the mean of the two middle values if their number is even.
    pub median: f64,
    /// The minimum.
    pub min: f64,
    /// The maximum.
    pub max: f64,
    /// The number of runs that have the figure.
    pub runs: usize,
}

/// Whether a difference is more than noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A side has only one value.
    Unknown,
    /// The ranges of the two sides overlap.
    Within,
    /// All values of one side are above all values of the other.
    Beyond,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A number of connections or messages.
    Count,
    /// Seconds.
    Seconds,
    /// Microseconds.
    Microseconds,
    /// Per second.
    PerSecond,
    /// Bytes in all.
    Bytes,
    /// Bytes per connection.
    BytesEach,
    /// A fraction of 1.
    Share,
    /// The quotient of two figures.
    Ratio,
}

impl Comparison {
    /// Reads two directories. Each has a run, or directories with one run each.
    ///
    /// # Errors
    /// A directory has neither, or a record can't be read.
    pub fn read(first: &Path, second: &Path) -> Result<Self, RunError> {
        let sides = [Side::read(first)?, Side::read(second)?];
        let rows = FIGURES.iter().filter_map(|figure| figure.row(&sides)).collect();
        Ok(Self { sides, rows })
    }

    /// Whether a side has several runs.
    #[must_use]
    pub fn has_noise(&self) -> bool {
        self.sides.iter().any(|side| side.runs.len() > 1)
    }

    /// A table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        self.table_of(&self.sides.each_ref().map(|side| side.name.clone()))
    }

    fn table_of(&self, [first, second]: &[String; 2]) -> String {
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        if self.has_noise() {
            let heading = ["", first, second, "ratio", "noise", "difference"];
            return columns(heading, &rows, |column| (1..5).contains(&column));
        }
        let rows: Vec<_> =
            rows.into_iter().map(|[name, one, two, ratio, ..]| [name, one, two, ratio]).collect();
        table(["", first, second, "ratio"], &rows)
    }

    /// A page in Markdown.
    #[must_use]
    pub(crate) fn page(&self) -> String {
        let [first, second] = self.sides.each_ref().map(|side| side.runs.len());
        let noise = if self.has_noise() {
            let judged = if first > 1 && second > 1 {
                "A difference is beyond the noise if all values of one side are above all values of the other."
            } else {
                "One side has a single run, so whether a difference is noise is unknown."
            };
            format!(
                "Medians of {first} and {second} runs, with minimum and maximum in brackets. The noise is the range of \
                 the runs of one side as a share of their median, the larger of the two sides. {judged}"
            )
        } else {
            "One run on each side, so whether a difference is noise is unknown. Compare directories with several runs each \
             to see the noise."
                .to_owned()
        };
        let names = self.short_names();
        let table = self.table_of(&names);
        let runs: Vec<_> = self.sides.iter().flat_map(|side| &side.runs).map(run_cells).collect();
        let runs = text_table(["run", "verdict", "limited by"], &runs);
        let [first, second] = names.each_ref().map(|name| markdown(name));
        let targets = self.sides.each_ref().map(|side| targets::section(&side.runs));
        let targets = targets.iter().zip([&first, &second]).filter(|(table, _)| !table.is_empty());
        let targets: String = targets
            .map(|(table, name)| {
                format!("\n{}", table.replacen("## Targets", &format!("## Targets of {name}"), 1))
            })
            .collect();
        format!("# {first} and {second}\n\n{noise}\n\n{table}\n## Runs\n\n{runs}{targets}")
    }

    /// The charts of both sides.
    ///
    /// # Errors
    /// A drawing can't be laid out.
    pub fn charts(&self) -> Result<Vec<Chart>, Box<dyn Error>> {
        let [first, second] = self.short_names();
        let [one, two] = self.sides.each_ref().map(|side| side.runs.as_slice());
        chart::compare(&[(&first, one), (&second, two)])
    }

    /// The last parts of the directories' names, if they differ.
    fn short_names(&self) -> [String; 2] {
        let last = |name: &str| Path::new(name).file_name().map(|name| name.display().to_string());
        let names = self.sides.each_ref().map(|side| &side.name);
        match names.map(|name| last(name)) {
            [Some(first), Some(second)] if first != second => [first, second],
            _ => names.map(Clone::clone),
        }
    }
}

fn run_cells(run: &Run) -> [String; 3] {
    let limited_by = bottleneck::find(run).map(|finding| finding.bottleneck.to_string());
    let limited_by = limited_by.unwrap_or_else(|| "unknown".to_owned());
    [run.folder.display().to_string(), verdict::headline(run), limited_by]
}

impl Side {
    /// The run in the directory, or the runs in its directories.
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
    /// The median of the second side divided by that of the first; `None` if it is not finite.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let [first, second] = self.values;
        let ratio = second?.median / first?.median;
        ratio.is_finite().then_some(ratio)
    }

    /// The range of the runs of one side as a share of their median, the larger of the two sides; `None` if neither
    /// side has several runs.
    #[must_use]
    pub fn noise(&self) -> Option<f64> {
        self.values.iter().flatten().filter_map(Spread::share).reduce(f64::max)
    }

    /// Whether the difference is more than noise.
    #[must_use]
    pub fn difference(&self) -> Difference {
        match self.values {
            [Some(first), Some(second)] if first.runs > 1 && second.runs > 1 => {
                let is_apart = first.max < second.min || second.max < first.min;
                if is_apart { Difference::Beyond } else { Difference::Within }
            }
            _ => Difference::Unknown,
        }
    }

    fn cells(&self) -> [String; 6] {
        let [first, second] = self.values.map(|spread| {
            spread.map_or_else(|| "unknown".to_owned(), |spread| spread.text(self.unit))
        });
        let ratio = self.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        let noise = self.noise().map_or_else(|| "-".to_owned(), format::percent);
        let difference = match self.difference() {
            Difference::Unknown => "unknown",
            Difference::Within => "within the noise",
            Difference::Beyond => "beyond the noise",
        };
        [self.name.to_owned(), first, second, ratio, noise, difference.to_owned()]
    }
}

impl Difference {
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

    /// A value with its unit.
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
        let [lower, upper] = [(values.len() - 1) / 2, values.len() / 2];
        let median = f64::midpoint(values[lower], values[upper]);
        Some(Self { median, min, max, runs: values.len() })
    }

    fn share(&self) -> Option<f64> {
        let has_share = self.runs > 1 && self.median != 0.0;
        has_share.then(|| (self.max - self.min) / self.median)
    }

    /// `26,239/s (25,747/s to 27,001/s)`.
    fn text(&self, unit: Unit) -> String {
        let [median, min, max] = [self.median, self.min, self.max].map(|value| unit.text(value));
        if min == max { median } else { format!("{median} ({min} to {max})") }
    }
}

/// The figures of one run.
pub(crate) fn figures(run: &Run) -> impl Iterator<Item = (&'static str, Option<f64>)> {
    FIGURES.iter().map(move |figure| (figure.name, (figure.of)(run)))
}

/// A figure, and how it is read from a run.
struct Figure {
    name: &'static str,
    of: fn(&Run) -> Option<f64>,
    unit: Unit,
}

const fn figure(name: &'static str, of: fn(&Run) -> Option<f64>, unit: Unit) -> Figure {
    Figure { name, of, unit }
}

impl Figure {
    fn row(&self, sides: &[Side; 2]) -> Option<Row> {
        let spread = |side: &Side| Spread::of(side.runs.iter().filter_map(self.of).collect());
        let values = sides.each_ref().map(spread);
        (values != [None, None]).then_some(Row { name: self.name, unit: self.unit, values })
    }
}

const FIGURES: [Figure; 24] = [
    figure("asked for", |run| summed(run, |client| client.target), Unit::Count),
    figure("held at once", |run| run.connections().map(cost::float), Unit::Count),
    figure(
        "verified, last pass",
        |run| run.verified().filter(|_| !run.clients.is_empty()).map(cost::float),
        Unit::Count,
    ),
    figure("failed", |run| summed(run, |client| client.failed), Unit::Count),
    figure("lost", |run| summed(run, |client| client.lost), Unit::Count),
    figure("ramp", ramp_seconds, Unit::Seconds),
    figure("connects per second", connects_per_second, Unit::PerSecond),
    figure("rate, last tenths over first", trend_ratio, Unit::Ratio),
    figure("connect latency, p50", |run| latency(run, |it| it.p50), Unit::Microseconds),
    figure("connect latency, p99", |run| latency(run, |it| it.p99), Unit::Microseconds),
    figure("connect latency, max", |run| latency(run, |it| it.max), Unit::Microseconds),
    figure("messages sent", |run| workload(run, |it| it.sent), Unit::Count),
    figure("messages answered", |run| workload(run, |it| it.answered), Unit::Count),
    figure("echo latency, p50", |run| echo(run, |it| it.p50), Unit::Microseconds),
    figure("echo latency, p99", |run| echo(run, |it| it.p99), Unit::Microseconds),
    figure("echo latency, p99.99", |run| echo(run, |it| it.p9999), Unit::Microseconds),
    figure("server's process at the peak", process_peak, Unit::Bytes),
    figure("server's process, a connection", process_cost, Unit::BytesEach),
    figure("kernel, one end of a connection", kernel_cost, Unit::BytesEach),
    figure("server's CPU, user", |run| server(run, user), Unit::Seconds),
    figure("server's CPU, system", |run| server(run, system), Unit::Seconds),
    figure("process memory that came back", process_back, Unit::Share),
    figure("slab memory that came back", slab_back, Unit::Share),
    figure("memory in use at the peak", memory_used, Unit::Bytes),
];

fn summed(run: &Run, figure: fn(&ClientRecord) -> u64) -> Option<f64> {
    run.sum(figure).filter(|_| !run.clients.is_empty()).map(cost::float)
}

fn ramp_seconds(run: &Run) -> Option<f64> {
    run.clients.iter().map(|(_, client)| client.ramp_seconds).reduce(f64::max)
}

/// The sum over the clients, as if they had started at the same time.
fn connects_per_second(run: &Run) -> Option<f64> {
    run.clients.iter().map(|(_, client)| client.connects_per_second).reduce(|a, b| a + b)
}

/// The ratio of the client that slowed down the most.
fn trend_ratio(run: &Run) -> Option<f64> {
    let tenths = run.clients.iter().filter_map(|(_, client)| trend::tenths(&client.ramp_series));
    tenths.map(|tenths| trend::ratio(&tenths)).reduce(f64::min)
}

/// The maximum over the clients.
fn latency(run: &Run, figure: fn(&LatencyUs) -> Option<u64>) -> Option<f64> {
    run.clients
        .iter()
        .filter_map(|(_, client)| figure(&client.connect_latency_us))
        .max()
        .map(cost::float)
}

/// The sum over the clients; `None` if none of them sent messages.
fn workload(run: &Run, figure: fn(&Workload) -> u64) -> Option<f64> {
    let workloads = run.clients.iter().filter_map(|(_, client)| client.workload.as_ref());
    workloads.map(figure).reduce(u64::saturating_add).map(cost::float)
}

/// The maximum over the clients.
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

/// The memory of one end, so that runs on one host and on three can be compared.
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
    fn the_noise_is_how_far_runs_of_one_side_lie_apart() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        let median = |values: &[f64]| spread(values).map(|spread| spread.median);
        let share = |values: &[f64]| spread(values).and_then(|spread| spread.share());
        assert_eq!(median(&[1.0, 10.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!((median(&[]), share(&[])), (None, None));
        assert_eq!(share(&[9.0, 10.0, 11.0]), Some(0.2));
        assert_eq!((share(&[5.0]), share(&[0.0, 0.0])), (None, None));
        let of = |median, min, max, runs| Some(Spread { median, min, max, runs });
        assert_eq!(spread(&[9.0, 1.0, 2.0, 4.0]), of(3.0, 1.0, 9.0, 4));
    }

    #[test]
    fn a_difference_is_beyond_the_noise_if_no_values_overlap() {
        let difference = |first: &[f64], second: &[f64]| {
            let values = [first, second].map(|values| Spread::of(values.to_vec()));
            Row { name: "", unit: Unit::Count, values }.difference()
        };
        assert_eq!(difference(&[1.0, 2.0], &[3.0, 4.0]), Difference::Beyond);
        assert_eq!(difference(&[3.0, 4.0], &[1.0, 2.0]), Difference::Beyond);
        assert_eq!(difference(&[1.0, 3.0], &[2.0, 4.0]), Difference::Within);
        assert_eq!(difference(&[1.0, 2.0], &[2.0, 4.0]), Difference::Within);
        for few in [&[][..], &[9.0]] {
            assert_eq!(difference(few, &[1.0, 2.0]), Difference::Unknown);
            assert_eq!(difference(&[1.0, 2.0], few), Difference::Unknown);
        }
    }
}
