//! Charts over the number of connections instead of over time: what changes as they become more.

use c1000k_host::format;
use c1000k_record::{ClientRecord, CpuPoint, ServerRecord};
use plotters::prelude::*;

use super::{COLOURS, Chart, Drawn, HEIGHT, Line, Scale, below_keys, draw, plot};
use crate::cost::float;
use crate::run::Run;

const CONNECTIONS: Scale =
    Scale { label: "connections", text: |value| format::count(format::rounded(value)) };
/// A share of processor time is taken over this part of the connections, so that a moment of noise does not hide the rest.
const CPU_STEPS: u32 = 20;
/// As many slab caches as there are colours beside the process and the rest.
const SLABS_MAX: usize = COLOURS.len() - 2;

/// The latency of connects, at the median and at 99%, of each client.
pub(super) fn connect_latency(run: &Run) -> Drawn<Option<Chart>> {
    let lines = run.clients.iter().flat_map(|(name, client)| {
        let line = |what: &str, figure: fn(&c1000k_record::RampPoint) -> Option<u64>| {
            let points = client
                .ramp_series
                .iter()
                .filter_map(|point| Some((float(point.established), float(figure(point)?) / 1e6)));
            (format!("{name}, {what}"), points.collect::<Vec<_>>())
        };
        [line("p50", |point| point.connect_p50_us), line("p99", |point| point.connect_p99_us)]
    });
    let lines: Vec<Line> = lines.filter(|line| line.1.len() > 1).collect();
    let scale = Scale { label: "connect latency", text: format::duration };
    over_connections("connect-latency.svg", "Connect latency against connections", &scale, &lines)
}

/// Processor time of each program, in processors.
pub(super) fn processor_time(run: &Run) -> Drawn<Option<Chart>> {
    let clients =
        run.clients.iter().map(|(name, client)| (name.clone(), shares(client_cpu(client))));
    let server = run.server.iter().map(|server| ("server".to_owned(), shares(server_cpu(server))));
    let lines: Vec<Line> = clients.chain(server).filter(|line| line.1.len() > 1).collect();
    let scale = Scale { label: "processors", text: |value| format!("{value:.2}") };
    over_connections("processors.svg", "Processor time against connections", &scale, &lines)
}

/// Connections, seconds and processor time.
type CpuLine = Vec<(u64, f64, CpuPoint)>;

fn client_cpu(client: &ClientRecord) -> CpuLine {
    let points = client.ramp_series.iter();
    points.filter_map(|point| Some((point.established, point.seconds, point.cpu?))).collect()
}

fn server_cpu(server: &ServerRecord) -> CpuLine {
    let points = server.series.iter();
    points.filter_map(|point| Some((point.open, point.seconds, point.cpu?))).collect()
}

/// The share over each step of the connections, until the most of them are there.
fn shares(points: CpuLine) -> Vec<(f64, f64)> {
    let most = points.iter().map(|point| point.0).max().unwrap_or(0);
    let Some(first) = points.iter().position(|point| point.0 > 0) else { return Vec::new() };
    let mut before = points[first.saturating_sub(1)];
    let mut line = Vec::new();
    for point in &points[first..] {
        let (connections, seconds, cpu) = *point;
        let step = float(most) / f64::from(CPU_STEPS);
        if float(connections) - float(before.0) < step && connections < most {
            continue;
        }
        let share = (cpu.process_seconds - before.2.process_seconds) / (seconds - before.1);
        if share.is_finite() && share >= 0.0 {
            line.push((float(connections), share));
        }
        before = *point;
        if connections == most {
            break;
        }
    }
    line
}

/// The server's process and the kernel's sockets, one on the other; these by slab cache where the record has them, in the
/// proportion that they have at the peak.
pub(super) fn memory(run: &Run) -> Drawn<Option<Chart>> {
    let Some(server) = &run.server else { return Ok(None) };
    let points = rising(server);
    let most = points.last().map_or(0.0, |point| point.0);
    let layers = layers(server);
    let highest = points.iter().map(|(_, process, kernel)| process + kernel).fold(0.0, f64::max);
    if points.len() < 2 || most <= 0.0 || highest <= 0.0 {
        return Ok(None);
    }
    draw("memory-growth.svg", "Memory against connections", HEIGHT + 24, |area| {
        let keys = layers.iter().map(|layer| (layer.name.as_str(), layer.colour));
        let area = below_keys(area, keys)?;
        let scale = Scale { label: "memory", text: |value| format::bytes(format::rounded(value)) };
        let plot = plot(&area, &CONNECTIONS, &scale, (most, highest))?;
        let mut below = vec![0.0; points.len()];
        for layer in &layers {
            let above: Vec<f64> = below
                .iter()
                .zip(&points)
                .map(|(below, (_, process, kernel))| {
                    below + layer.of_process * process + layer.of_kernel * kernel
                })
                .collect();
            let at = |heights: &[f64]| -> Vec<(f64, f64)> {
                points.iter().map(|point| point.0).zip(heights.iter().copied()).collect()
            };
            let outline: Vec<_> =
                at(&above).into_iter().chain(at(&below).into_iter().rev()).collect();
            plot.plotting_area().draw(&Polygon::new(outline, layer.colour.filled()))?;
            below = above;
        }
        Ok(())
    })
}

/// Connections, and the bytes of process and kernel, while they became more.
fn rising(server: &ServerRecord) -> Vec<(f64, f64, f64)> {
    let most = server.series.iter().map(|point| point.open).max().unwrap_or(0);
    let mut line: Vec<(f64, f64, f64)> = Vec::new();
    for point in &server.series {
        let Some(process) = point.rss_bytes else { continue };
        let connections = float(point.open);
        if line.last().is_none_or(|last| last.0 < connections) {
            line.push((connections, float(process), float(point.kernel_socket_bytes.unwrap_or(0))));
        }
        if point.open == most {
            break;
        }
    }
    line
}

struct Layer {
    name: String,
    colour: RGBColor,
    /// Its share in each of the two.
    of_process: f64,
    of_kernel: f64,
}

/// From the bottom up.
fn layers(server: &ServerRecord) -> Vec<Layer> {
    let [first, colours @ .., last] = COLOURS;
    let layer = |name: &str, colour, of_process, of_kernel| Layer {
        name: name.to_owned(),
        colour,
        of_process,
        of_kernel,
    };
    let process = layer("server's process", first, 1.0, 0.0);
    let slabs = server.kernel_bytes_by_slab.iter().flatten();
    // The growth of all other caches is not part of what is sampled over time.
    let mut slabs: Vec<_> = slabs.filter(|(name, _)| *name != "other").collect();
    slabs.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    let all: f64 = slabs.iter().map(|(_, bytes)| float(**bytes)).sum();
    if all <= 0.0 {
        return vec![process, layer("kernel, sockets", colours[0], 0.0, 1.0)];
    }
    let mut layers = vec![process];
    for ((name, bytes), colour) in slabs.iter().take(SLABS_MAX).zip(colours) {
        layers.push(layer(name, colour, 0.0, float(**bytes) / all));
    }
    let rest: f64 = slabs.iter().skip(SLABS_MAX).map(|(_, bytes)| float(**bytes)).sum();
    if rest > 0.0 {
        layers.push(layer("other slabs of sockets", last, 0.0, rest / all));
    }
    layers
}

fn over_connections(
    file_name: &'static str,
    title: &'static str,
    scale: &Scale,
    lines: &[Line],
) -> Drawn<Option<Chart>> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let connections = points().map(|point| point.0).fold(0.0, f64::max);
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    if connections <= 0.0 || most <= 0.0 {
        return Ok(None);
    }
    draw(file_name, title, HEIGHT, |area| {
        let keys = lines.iter().map(|(name, _)| name.as_str()).zip(COLOURS);
        let area = below_keys(area, keys)?;
        let mut plot = plot(&area, &CONNECTIONS, scale, (connections, most))?;
        for ((_, points), colour) in lines.iter().zip(COLOURS) {
            plot.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_time_between_steps_and_end_at_the_most_connections() {
        let point = |connections: u64, seconds: f64, process_seconds: f64| {
            (connections, seconds, CpuPoint { process_seconds, ..CpuPoint::default() })
        };
        let line = shares(vec![
            point(0, 0.0, 5.0),
            point(0, 1.0, 5.0),
            point(50, 2.0, 5.5),
            point(51, 2.1, 5.6),
            point(100, 3.0, 6.5),
            point(100, 9.0, 6.5),
        ]);
        assert_eq!(line, [(50.0, 0.5), (100.0, 1.0)]);
        assert!(shares(vec![]).is_empty());
        assert!(shares(vec![point(0, 0.0, 0.0), point(9, 0.0, 1.0)]).is_empty());
    }
}
