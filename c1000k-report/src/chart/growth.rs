//! Charts over the number of connections: what each further connection changes.

use c1000k_host::format;
use c1000k_record::{RampPoint, ServerRecord};
use plotters::prelude::*;

use super::{COLOURS, Chart, Drawn, HEIGHT, Line, Scale, below_keys, draw, plot};
use crate::cost::{self, float};
use crate::run::Run;

pub(super) const CONNECTIONS: Scale =
    Scale { label: "connections", text: |value| format::count(format::rounded(value)) };

/// The median and the 99th percentile of each client's connect latency.
pub(super) fn connect_latency(run: &Run) -> Drawn<Option<Chart>> {
    let lines = run.clients.iter().flat_map(|(name, client)| {
        let line = |what: &str, figure: fn(&RampPoint) -> Option<u64>| {
            let points = client
                .ramp_series
                .iter()
                .filter_map(|point| Some((float(point.established), float(figure(point)?) / 1e6)));
            (format!("{name}, {what}"), points.collect::<Vec<_>>())
        };
        [line("p50", |point| point.connect_p50_us), line("p99", |point| point.connect_p99_us)]
    });
    let lines: Vec<Line> = lines.filter(|line| line.1.len() > 1).collect();
    let points = || lines.iter().flat_map(|(_, points)| points);
    let connections = points().map(|point| point.0).fold(0.0, f64::max);
    let longest = points().map(|point| point.1).fold(0.0, f64::max);
    if connections <= 0.0 || longest <= 0.0 {
        return Ok(None);
    }
    let title = "Connect latency against connections";
    draw("connect-latency.svg", title, HEIGHT, |area| {
        let keys = lines.iter().map(|(name, _)| name.as_str()).zip(COLOURS);
        let area = below_keys(area, keys)?;
        let scale = Scale { label: "connect latency", text: format::duration };
        let mut plot = plot(&area, &CONNECTIONS, &scale, (connections, longest))?;
        for ((_, points), colour) in lines.iter().zip(COLOURS) {
            plot.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        }
        Ok(())
    })
}

/// The server's process and the kernel's memory for sockets, stacked. The record has each slab cache only at the peak,
/// so the kernel's memory is divided in that proportion throughout.
pub(super) fn memory(run: &Run) -> Drawn<Option<Chart>> {
    let points = run.server.as_ref().map(rising).unwrap_or_default();
    let most = points.last().map_or(0.0, |point| point.connections);
    let highest = points.iter().map(|point| point.process + point.kernel).fold(0.0, f64::max);
    if points.len() < 2 || most <= 0.0 || highest <= 0.0 {
        return Ok(None);
    }
    let layers = layers(run);
    draw("memory-growth.svg", "Memory against connections, stacked", HEIGHT + 24, |area| {
        let keys = layers.iter().map(|layer| (layer.name.as_str(), layer.colour));
        let area = below_keys(area, keys)?;
        let scale = Scale { label: "memory", text: |value| format::bytes(format::rounded(value)) };
        let plot = plot(&area, &CONNECTIONS, &scale, (most, highest))?;
        let mut below = vec![0.0; points.len()];
        for layer in &layers {
            let above: Vec<f64> = below
                .iter()
                .zip(&points)
                .map(|(below, point)| below + layer.bytes(point))
                .collect();
            let edge = |heights: &[f64]| -> Vec<(f64, f64)> {
                let connections = points.iter().map(|point| point.connections);
                connections.zip(heights.iter().copied()).collect()
            };
            let outline: Vec<_> =
                edge(&above).into_iter().chain(edge(&below).into_iter().rev()).collect();
            plot.plotting_area().draw(&Polygon::new(outline, layer.colour.filled()))?;
            // Without the thin line, neighbours of similar brightness could not be distinguished.
            plot.plotting_area().draw(&PathElement::new(edge(&above), WHITE.stroke_width(1)))?;
            below = above;
        }
        Ok(())
    })
}

/// Memory at a number of connections, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    pub(super) connections: f64,
    pub(super) process: f64,
    pub(super) kernel: f64,
}

/// The server's samples while its connections increased: from the last one before them until their maximum.
pub(super) fn rising(server: &ServerRecord) -> Vec<Growth> {
    let most = server.series.iter().map(|point| point.open).max().unwrap_or(0);
    let mut line: Vec<Growth> = Vec::new();
    let first = server.series.iter().position(|point| point.open > 0).unwrap_or(0);
    for point in server.series.iter().skip(first.saturating_sub(1)) {
        let Some(process) = point.rss_bytes else { continue };
        let connections = float(point.open);
        if line.last().is_none_or(|last| last.connections < connections) {
            let kernel = float(point.kernel_socket_bytes.unwrap_or(0));
            line.push(Growth { connections, process: float(process), kernel });
        }
        if point.open == most {
            break;
        }
    }
    line
}

/// A band of the stacked chart.
struct Layer {
    name: String,
    colour: RGBColor,
    /// Its part of the process, and of the kernel's memory.
    of_process: f64,
    of_kernel: f64,
}

impl Layer {
    fn bytes(&self, point: &Growth) -> f64 {
        self.of_process * point.process + self.of_kernel * point.kernel
    }
}

/// The bands from the bottom to the top.
fn layers(run: &Run) -> Vec<Layer> {
    let [first, colours @ .., last] = COLOURS;
    let kernel = |name: &str, colour, of_kernel| Layer {
        name: name.to_owned(),
        colour,
        of_process: 0.0,
        of_kernel,
    };
    let process = "server's process".to_owned();
    let mut layers = vec![Layer { name: process, colour: first, of_process: 1.0, of_kernel: 0.0 }];
    let slabs = cost::recorded_slabs(run);
    let all: f64 = slabs.iter().map(|(_, bytes)| bytes).sum();
    if all <= 0.0 {
        layers.push(kernel("kernel, sockets", last, 1.0));
        return layers;
    }
    for ((name, bytes), colour) in slabs.iter().zip(colours) {
        layers.push(kernel(name, colour, bytes / all));
    }
    let rest: f64 = slabs.iter().skip(colours.len()).map(|(_, bytes)| bytes).sum();
    if rest > 0.0 {
        layers.push(kernel("other slabs", last, rest / all));
    }
    layers
}

#[cfg(test)]
mod tests {
    use c1000k_record::ServerPoint;
    use serde_json::json;

    use super::*;

    fn server(points: &[(u64, u64, u64)]) -> ServerRecord {
        let record = json!({
            "schema": "c1000k.server/1", "accepted": 9, "peak": 9, "open": 0, "refused": 0,
            "closed": 9, "stale_events": 0, "accept_errors": {}, "bytes_in": 0, "bytes_out": 0,
            "user_bytes_per_connection": null, "kernel_bytes_per_connection": null,
            "rss_peak_bytes": null, "cpu_user_seconds": 1.0, "cpu_system_seconds": 1.0
        });
        let point = |&(open, process, kernel): &(u64, u64, u64)| ServerPoint {
            open,
            rss_bytes: Some(process),
            kernel_socket_bytes: Some(kernel),
            ..ServerPoint::default()
        };
        let mut server: ServerRecord = serde_json::from_value(record).expect("a record");
        server.series = points.iter().map(point).collect();
        server
    }

    #[test]
    fn memory_is_shown_while_the_connections_increase() {
        let points =
            [(0, 1, 999), (0, 1, 0), (5, 2, 50), (4, 3, 60), (9, 4, 90), (9, 5, 95), (0, 6, 10)];
        let line = rising(&server(&points));
        let shown: Vec<_> =
            line.iter().map(|point| (point.connections, point.process, point.kernel)).collect();
        assert_eq!(shown, [(0.0, 1.0, 0.0), (5.0, 2.0, 50.0), (9.0, 4.0, 90.0)]);
    }

    #[test]
    fn the_bands_add_up_to_the_process_and_the_kernel() {
        let mut record = server(&[]);
        let slabs = (1..=9).map(|index| (format!("slab-{index}"), 10 * index));
        record.kernel_bytes_by_slab = Some(slabs.chain([("other".to_owned(), 7)]).collect());
        let mut run = Run::default();
        run.server = Some(record);
        let bands = layers(&run);
        assert_eq!(bands.len(), COLOURS.len());
        assert_eq!(
            (bands[0].name.as_str(), bands[1].name.as_str()),
            ("server's process", "slab-9")
        );
        assert_eq!(bands[bands.len() - 1].name, "other slabs");
        let point = Growth { connections: 9.0, process: 100.0, kernel: 900.0 };
        let sum: f64 = bands.iter().map(|band| band.bytes(&point)).sum();
        assert!((sum - 1_000.0).abs() < 1e-6, "{sum}");
        assert!(layers(&Run::default())[1].name.contains("sockets"));
    }
}
