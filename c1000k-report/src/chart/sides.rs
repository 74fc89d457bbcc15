//! Charts of a comparison: the runs of each side in one colour.

use c1000k_host::format;
use plotters::prelude::*;

use super::growth::{CONNECTIONS, rising};
use super::timeline::begin;
use super::{CLIENT_TIME, COLOURS, Chart, Drawn, HEIGHT, Scale, below_keys, draw, plot};
use crate::cost::float;
use crate::run::Run;

/// The maximum of runs that are drawn for each side.
const RUNS_MAX: usize = 20;

/// The names of two sides, and their runs.
pub type Sides<'a> = [(&'a str, &'a [Run]); 2];

/// Points from left to right.
type Points = Vec<(f64, f64)>;

/// The charts for which a side has figures.
///
/// # Errors
/// A drawing can't be laid out.
pub fn compare(sides: &Sides<'_>) -> Drawn<Vec<Chart>> {
    let count = |value| format::count(format::rounded(value));
    let bytes = |value| format::bytes(format::rounded(value));
    let drawn = [
        draw_sides(
            ("connections.svg", "Connections over time"),
            [&CLIENT_TIME, &Scale { label: "connections", text: count }],
            sides,
            connections,
        )?,
        draw_sides(
            ("connect-latency.svg", "99th percentile of the connect latency against connections"),
            [&CONNECTIONS, &Scale { label: "connect latency", text: format::duration }],
            sides,
            connect_latency,
        )?,
        draw_sides(
            (
                "memory-growth.svg",
                "Memory of the server's process and the kernel against connections",
            ),
            [&CONNECTIONS, &Scale { label: "memory", text: bytes }],
            sides,
            memory,
        )?,
    ];
    Ok(drawn.into_iter().flatten().collect())
}

/// Draws the lines of each run. `None` if there are none.
fn draw_sides(
    (file_name, title): (&'static str, &'static str),
    [across, upright]: [&Scale; 2],
    sides: &Sides<'_>,
    of: fn(&Run) -> Vec<Points>,
) -> Drawn<Option<Chart>> {
    let lines = sides.map(|(_, runs)| {
        let lines = runs.iter().take(RUNS_MAX).flat_map(of);
        lines.filter(|points| points.len() > 1).collect::<Vec<_>>()
    });
    let points = || lines.iter().flatten().flatten();
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    if right <= 0.0 || top <= 0.0 {
        return Ok(None);
    }
    let names = sides.map(|(name, runs)| match runs.len() {
        ..=RUNS_MAX => name.to_owned(),
        count => format!("{name}, {RUNS_MAX} of {} runs", format::count(count as u64)),
    });
    draw(file_name, title, HEIGHT, |area| {
        let area = below_keys(area, names.iter().map(String::as_str).zip(COLOURS))?;
        let mut plot = plot(&area, across, upright, (right, top))?;
        for (lines, colour) in lines.iter().zip(COLOURS) {
            for points in lines {
                let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
                plot.draw_series(line)?;
            }
        }
        Ok(())
    })
}

/// The server's connections, or else those of each client.
fn connections(run: &Run) -> Vec<Points> {
    if let Some(server) = run.server.as_ref().filter(|server| server.series.len() > 1) {
        let begin = begin(server);
        let points = server.series.iter().map(|point| (point.seconds - begin, float(point.open)));
        return vec![points.filter(|point| point.0 >= 0.0).collect()];
    }
    let clients = run.clients.iter().map(|(_, client)| {
        let points = client.ramp_series.iter().chain(&client.hold_series);
        points.map(|point| (point.seconds, float(point.established))).collect()
    });
    clients.collect()
}

fn connect_latency(run: &Run) -> Vec<Points> {
    let clients = run.clients.iter().map(|(_, client)| {
        let points = client.ramp_series.iter();
        let point = points.filter_map(|point| {
            Some((float(point.established), float(point.connect_p99_us?) / 1e6))
        });
        point.collect()
    });
    clients.collect()
}

fn memory(run: &Run) -> Vec<Points> {
    let server = run.server.iter().map(|server| {
        let points = rising(server).into_iter();
        points.map(|point| (point.connections, point.process + point.kernel)).collect()
    });
    server.collect()
}

#[cfg(test)]
mod tests {
    use c1000k_record::ServerPoint;
    use serde_json::json;

    use super::*;

    fn run(seconds: f64) -> Run {
        let mut server: c1000k_record::ServerRecord = serde_json::from_value(json!({
            "schema": "c1000k.server/1", "accepted": 9, "peak": 9, "open": 0, "refused": 0,
            "closed": 9, "stale_events": 0, "accept_errors": {}, "bytes_in": 0, "bytes_out": 0,
            "user_bytes_per_connection": null, "kernel_bytes_per_connection": null,
            "rss_peak_bytes": null, "cpu_user_seconds": 1.0, "cpu_system_seconds": 1.0
        }))
        .expect("a record");
        let point = |(share, open)| ServerPoint {
            seconds: seconds * share,
            open,
            rss_bytes: Some(1_000),
            kernel_socket_bytes: Some(9 * open),
            ..ServerPoint::default()
        };
        server.series = [(0.0, 0), (0.5, 4), (1.0, 9)].map(point).into();
        let mut run = Run::default();
        run.server = Some(server);
        run
    }

    fn lines(chart: &Chart, colour: &str) -> usize {
        let is_one = |line: &&str| line.starts_with("<polyline") && line.contains(colour);
        chart.svg.lines().filter(is_one).count()
    }

    #[test]
    fn each_run_has_a_line_in_the_colour_of_its_side() {
        let (first, second) = ([run(9.0), run(10.0)], [run(20.0)]);
        let charts = compare(&[("a<b>", &first), ("second", &second)]).unwrap();
        let names: Vec<_> = charts.iter().map(|chart| chart.file_name).collect();
        assert_eq!(names, ["connections.svg", "memory-growth.svg"], "there are no latencies");
        for chart in &charts {
            assert_eq!(lines(chart, "#0072B2"), 2, "{}", chart.svg);
            assert_eq!(lines(chart, "#E69F00"), 1, "{}", chart.svg);
            assert!(chart.svg.contains("a&lt;b&gt;") && !chart.svg.contains("<b>"));
        }
    }

    #[test]
    fn the_lines_of_many_runs_are_bounded_and_no_figures_give_no_chart() {
        let many: Vec<_> = (0..30).map(|_| run(9.0)).collect();
        let charts = compare(&[("many", &many), ("none", &[])]).unwrap();
        assert_eq!(lines(&charts[0], "#0072B2"), RUNS_MAX, "{}", charts[0].svg);
        assert!(charts[0].svg.contains("many, 20 of 30 runs"));
        assert_eq!(compare(&[("a", &[Run::default()]), ("b", &[])]).unwrap(), []);
    }
}
