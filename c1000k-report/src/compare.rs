//! Two runs side by side.

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, ServerRecord, Workload};

use crate::cost;
use crate::escape::markdown;
use crate::run::{Moment, Run};
use crate::table::table;
use crate::trend;

/// Two runs, or two series of them, side by side.
#[derive(Debug)]
pub struct Comparison {
    /// The folders.
    pub names: [String; 2],
    /// How many runs each side has.
    pub runs: [usize; 2],
    /// The figures that both or one of them have.
    pub rows: Vec<Row>,
}

/// One figure of both sides: where a side has several runs, their median.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is.
    pub name: &'static str,
    /// In seconds, bytes or pieces; `None` where it was not seen.
    pub values: [Option<f64>; 2],
    /// How far the runs of one side lie apart, as a share of their median: the larger of both; `None` where there is but
    /// one run each.
    pub noise: Option<f64>,
    text: fn(f64) -> String,
}

impl Comparison {
    /// Of the runs of two sides; neither is empty.
    #[must_use]
    pub fn new(names: [String; 2], sides: [&[Run]; 2]) -> Self {
        let rows = FIGURES.iter().filter_map(|figure| figure.row(sides)).collect();
        Self { names, runs: sides.map(<[Run]>::len), rows }
    }

    /// Whether a side has several runs.
    #[must_use]
    pub fn has_noise(&self) -> bool {
        self.runs.iter().any(|&runs| runs > 1)
    }

    /// As a table of text or Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let [first, second] = &self.names;
        if self.has_noise() {
            let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
            return table(["", first, second, "ratio", "noise"], &rows);
        }
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        let rows: Vec<_> =
            rows.into_iter().map(|[name, one, two, ratio, _]| [name, one, two, ratio]).collect();
        table(["", first, second, "ratio"], &rows)
    }

    /// As a page.
    #[must_use]
    pub(crate) fn page(&self) -> String {
        let noise = if self.has_noise() {
            let [first, second] = self.runs;
            format!(
                "Medians of {first} and {second} runs. The noise is how far the runs of one side lie apart, as a share \
                 of their median: a ratio that is closer to 1 than that shows nothing."
            )
        } else {
            "One run each: how much of a difference is noise is not known. Give folders with several runs to see it."
                .to_owned()
        };
        let names = self.names.each_ref().map(|name| markdown(name));
        format!("# {} and {}\n\n{noise}\n\n{}", names[0], names[1], self.table())
    }
}

impl Row {
    /// The second to the first.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        match self.values {
            [Some(first), Some(second)] if first != 0.0 => Some(second / first),
            _ => None,
        }
    }

    fn cells(&self) -> [String; 5] {
        let text = |value: Option<f64>| value.map_or_else(|| "not seen".to_owned(), self.text);
        let ratio = self.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        let noise = self.noise.map_or_else(|| "-".to_owned(), format::percent);
        [self.name.to_owned(), text(self.values[0]), text(self.values[1]), ratio, noise]
    }
}

/// The figures of a run that were seen, in seconds, bytes or pieces.
pub(crate) fn figures(run: &Run) -> impl Iterator<Item = (&'static str, Option<f64>)> {
    FIGURES.iter().map(move |figure| (figure.name, (figure.of)(run)))
}

/// A figure, how it is read from a run and how it is shown.
struct Figure {
    name: &'static str,
    of: fn(&Run) -> Option<f64>,
    text: fn(f64) -> String,
}

const FIGURES: [Figure; 24] = [
    Figure { name: "asked for", of: |run| summed(run, |client| client.target), text: whole },
    Figure { name: "held at once", of: |run| run.connections().map(cost::float), text: whole },
    Figure {
        name: "verified, last pass",
        of: |run| run.verified().filter(|_| !run.clients.is_empty()).map(cost::float),
        text: whole,
    },
    Figure { name: "failed", of: |run| summed(run, |client| client.failed), text: whole },
    Figure { name: "lost", of: |run| summed(run, |client| client.lost), text: whole },
    Figure { name: "ramp", of: ramp_seconds, text: format::duration },
    Figure { name: "connects per second", of: connects_per_second, text: format::rate },
    Figure { name: "rate, last tenths over first", of: trend_ratio, text: two_places },
    Figure { name: "connect latency, p50", of: |run| latency(run, |it| it.p50), text: span_us },
    Figure { name: "connect latency, p99", of: |run| latency(run, |it| it.p99), text: span_us },
    Figure { name: "connect latency, max", of: |run| latency(run, |it| it.max), text: span_us },
    Figure { name: "messages sent", of: |run| workload(run, |it| it.sent), text: whole },
    Figure { name: "messages answered", of: |run| workload(run, |it| it.answered), text: whole },
    Figure { name: "echo latency, p50", of: |run| echo(run, |it| it.p50), text: span_us },
    Figure { name: "echo latency, p99", of: |run| echo(run, |it| it.p99), text: span_us },
    Figure { name: "echo latency, p99.99", of: |run| echo(run, |it| it.p9999), text: span_us },
    Figure { name: "server's process at the peak", of: process_peak, text: size },
    Figure { name: "server's process, a connection", of: process_cost, text: format::bytes_each },
    Figure { name: "kernel, one end of a connection", of: kernel_cost, text: format::bytes_each },
    Figure { name: "server's CPU, user", of: |run| server(run, user), text: format::duration },
    Figure { name: "server's CPU, system", of: |run| server(run, system), text: format::duration },
    Figure { name: "process memory that came back", of: process_back, text: format::percent },
    Figure { name: "slab memory that came back", of: slab_back, text: format::percent },
    Figure { name: "memory in use at the peak", of: memory_used, text: size },
];

impl Figure {
    fn row(&self, sides: [&[Run]; 2]) -> Option<Row> {
        let seen = sides.map(|runs| {
            let mut values: Vec<f64> = runs.iter().filter_map(|run| (self.of)(run)).collect();
            values.sort_by(f64::total_cmp);
            values
        });
        let values = seen.each_ref().map(|values| median(values));
        let noise = seen.iter().filter_map(|values| spread(values)).reduce(f64::max);
        (values != [None, None]).then_some(Row { name: self.name, values, noise, text: self.text })
    }
}

/// Of values in order.
fn median(values: &[f64]) -> Option<f64> {
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// How far values in order lie apart, as a share of their median.
fn spread(values: &[f64]) -> Option<f64> {
    let (first, last) = (values.first()?, values.last()?);
    let median = median(values).filter(|median| values.len() > 1 && *median != 0.0)?;
    Some((last - first) / median)
}

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
    let told = || run.server.as_ref().and_then(|server| server.kernel_bytes_per_connection);
    cost::server_end_bytes(run).or_else(told)
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

fn whole(value: f64) -> String {
    format::count(format::rounded(value))
}

fn size(value: f64) -> String {
    format::bytes(format::rounded(value))
}

fn two_places(value: f64) -> String {
    format!("{value:.2}")
}

fn span_us(value: f64) -> String {
    format::duration(value / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_is_how_far_runs_of_one_side_lie_apart() {
        assert_eq!(median(&[1.0, 2.0, 10.0]), Some(2.0));
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!((median(&[]), spread(&[])), (None, None));
        assert_eq!(spread(&[9.0, 10.0, 11.0]), Some(0.2));
        assert_eq!((spread(&[5.0]), spread(&[0.0, 0.0])), (None, None));
    }
}
