//! Two runs side by side.

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, ServerRecord, Workload};

use crate::cost;
use crate::run::{Moment, Run};
use crate::table::table;
use crate::trend;

/// A table of the figures that both or one of them have, with the ratio of the second to the first.
#[must_use]
pub fn table_of(first: &Run, second: &Run) -> String {
    let rows: Vec<_> = FIGURES.iter().filter_map(|figure| figure.row(first, second)).collect();
    let names = [first, second].map(|run| run.folder.display().to_string());
    table(["", &names[0], &names[1], "ratio"], &rows)
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
    fn row(&self, first: &Run, second: &Run) -> Option<[String; 4]> {
        let values = [(self.of)(first), (self.of)(second)];
        if values == [None, None] {
            return None;
        }
        let text = |value: Option<f64>| value.map_or_else(|| "not seen".to_owned(), self.text);
        let ratio = match values {
            [Some(first), Some(second)] if first != 0.0 => format!("{:.3}", second / first),
            _ => "-".to_owned(),
        };
        Some([self.name.to_owned(), text(values[0]), text(values[1]), ratio])
    }
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
