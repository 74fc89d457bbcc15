//! The charts of a run, as SVG. Drawing them needs no fonts.

mod growth;
mod sides;
mod timeline;

use std::error::Error;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use c1000k_host::format;
use c1000k_record::{RampPoint, histogram};

use crate::cost::{self, HostCost, float};
use crate::escape::visible;
use crate::run::Run;
use crate::trend;

pub use sides::{Sides, compare};

/// A chart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chart {
    /// The name of its file.
    pub file_name: &'static str,
    /// The title.
    pub title: &'static str,
    /// The SVG.
    pub svg: String,
}

/// The charts for which the run has figures.
///
/// # Errors
/// A drawing can't be laid out.
pub fn charts(run: &Run) -> Result<Vec<Chart>, Box<dyn Error>> {
    let drawn = [
        connections(run)?,
        rate(run)?,
        growth::connect_latency(run)?,
        latency(run)?,
        timeline::errors(run)?,
        timeline::processors(run)?,
        cost_per_connection(run)?,
        growth::memory(run)?,
        memory(run)?,
    ];
    Ok(drawn.into_iter().flatten().collect())
}

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T> = Result<T, Box<dyn Error>>;

const WIDTH: u32 = 860;
const HEIGHT: u32 = 440;
const PANEL_HEIGHT: u32 = 200;
const LABEL_SIZE: i32 = 16;
const TEXT: RGBColor = RGBColor(32, 36, 40);
const GRID: RGBColor = RGBColor(226, 229, 233);
/// Distinct in print and to most people with colour blindness (Okabe and Ito; with a darker yellow, which is visible on
/// white). `report.html` replaces them in a dark colour scheme.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(138, 123, 0),
    RGBColor(150, 150, 150),
];

/// The server's connections over its whole run; without its record, those of each client over its ramp.
fn connections(run: &Run) -> Drawn<Option<Chart>> {
    let server = run.server.iter().map(|server| {
        let points = server.series.iter().map(|point| (point.seconds, float(point.open)));
        ("server".to_owned(), points.collect::<Vec<_>>())
    });
    let ramp = |ramp: &[RampPoint]| {
        ramp.iter().map(|point| (point.seconds, float(point.established))).collect()
    };
    let clients =
        run.clients.iter().map(|(name, client)| (name.clone(), ramp(&client.ramp_series)));
    let is_drawable = |line: &Line| line.1.len() > 1;
    let mut lines: Vec<Line> = server.filter(is_drawable).collect();
    let mut time = SERVER_TIME;
    if lines.is_empty() {
        lines = clients.filter(is_drawable).collect();
        time = CLIENT_TIME;
    }
    let scale = Scale { label: "connections", text: |value| format::count(format::rounded(value)) };
    over_time("connections.svg", "Connections over time", (time, scale), &lines)
}

/// The memory of the server's process and of the kernel's sockets over time.
fn memory(run: &Run) -> Drawn<Option<Chart>> {
    let Some(server) = &run.server else { return Ok(None) };
    let process = server.series.iter();
    let process = process.filter_map(|point| Some((point.seconds, float(point.rss_bytes?))));
    let kernel = server.series.iter();
    let kernel =
        kernel.filter_map(|point| Some((point.seconds, float(point.kernel_socket_bytes?))));
    let mut lines: Vec<Line> = vec![
        ("server's process, resident".to_owned(), process.collect()),
        ("kernel, sockets".to_owned(), kernel.collect()),
    ];
    lines.retain(|line| line.1.len() > 1);
    let scale = Scale { label: "memory", text: |value| format::bytes(format::rounded(value)) };
    over_time("memory.svg", "Memory over time", (SERVER_TIME, scale), &lines)
}

/// A name, and points of seconds and value.
type Line = (String, Vec<(f64, f64)>);

/// The label of an axis, and its values as text.
struct Scale {
    label: &'static str,
    text: fn(f64) -> String,
}

fn over_time(
    file_name: &'static str,
    title: &'static str,
    (time, scale): (Scale, Scale),
    lines: &[Line],
) -> Drawn<Option<Chart>> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let seconds = points().map(|point| point.0).fold(0.0, f64::max);
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    if seconds <= 0.0 || most <= 0.0 {
        return Ok(None);
    }
    draw(file_name, title, HEIGHT, |area| {
        let area = below_keys(area, lines.iter().map(|(name, _)| name.as_str()).zip(COLOURS))?;
        draw_lines(
            &area,
            (&time, &scale),
            (seconds, most),
            lines.iter().map(|(_, points)| points.as_slice()),
        )
    })
}

/// Draws lines over time.
fn draw_lines<'a>(
    area: &Drawing<'_>,
    (time, scale): (&Scale, &Scale),
    (seconds, most): (f64, f64),
    lines: impl Iterator<Item = &'a [(f64, f64)]>,
) -> Drawn<()> {
    let mut plot = plot(area, time, scale, (seconds, most))?;
    for (points, colour) in lines.zip(COLOURS) {
        plot.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
    }
    Ok(())
}

const TIME: Scale = Scale { label: "time, s", text: |value| format!("{value}") };
const SERVER_TIME: Scale = Scale { label: "time since the start of the server, s", ..TIME };
const CLIENT_TIME: Scale = Scale { label: "time since the first connect, s", ..TIME };

type Plot<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws axes and grid, both from zero.
fn plot<'a, 'b>(
    area: &'a Drawing<'b>,
    across: &Scale,
    upright: &Scale,
    (right, top): (f64, f64),
) -> Drawn<Plot<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(40)
        .x_label_area_size(46)
        .y_label_area_size(98)
        .build_cartesian_2d(0.0..right, 0.0..top * 1.08)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(TEXT)
        .label_style(text(LABEL_SIZE))
        .axis_desc_style(text(LABEL_SIZE + 1))
        .x_labels(9)
        .x_desc(across.label)
        .y_desc(upright.label)
        .x_label_formatter(&|value| (across.text)(*value))
        .y_label_formatter(&|value| (upright.text)(*value))
        .draw()?;
    Ok(chart)
}

/// One of several figures over the same time.
#[derive(Debug, Clone)]
pub struct Panel {
    /// The label.
    pub label: &'static str,
    /// A value as text.
    pub text: fn(f64) -> String,
    /// Points of seconds and value.
    pub points: Vec<(f64, f64)>,
}

/// Figures over the same time, each in its own panel; those without points are omitted. `None` if all are.
///
/// # Errors
/// The drawing can't be laid out.
pub fn panels(
    file_name: &'static str,
    title: &'static str,
    panels: &[Panel],
) -> Result<Option<Chart>, Box<dyn Error>> {
    let highest = |panel: &Panel| panel.points.iter().map(|point| point.1).fold(0.0, f64::max);
    let shown: Vec<&Panel> = panels.iter().filter(|panel| highest(panel) > 0.0).collect();
    let seconds =
        shown.iter().flat_map(|panel| &panel.points).map(|point| point.0).fold(0.0, f64::max);
    if shown.is_empty() || seconds <= 0.0 {
        return Ok(None);
    }
    draw(file_name, title, 40 + PANEL_HEIGHT * u32::try_from(shown.len())?, |area| {
        for (area, panel) in area.split_evenly((shown.len(), 1)).iter().zip(&shown) {
            let scale = Scale { label: panel.label, text: panel.text };
            let line = panel.points.as_slice();
            draw_lines(area, (&TIME, &scale), (seconds, highest(panel)), std::iter::once(line))?;
        }
        Ok(())
    })
}

/// Bars of the rate over each tenth of the connections, with one bar for each client.
fn rate(run: &Run) -> Drawn<Option<Chart>> {
    let rates: Vec<(&str, [f64; 10])> = run
        .clients
        .iter()
        .filter_map(|(name, client)| Some((name.as_str(), trend::tenths(&client.ramp_series)?)))
        .collect();
    let most = rates.iter().flat_map(|(_, tenths)| *tenths).fold(0.0, f64::max);
    if most <= 0.0 {
        return Ok(None);
    }
    draw("rate.svg", "Connects per second over each tenth of the connections", HEIGHT, |area| {
        let area = below_keys(area, rates.iter().map(|(name, _)| *name).zip(COLOURS))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .margin_right(28)
            .x_label_area_size(46)
            .y_label_area_size(98)
            .build_cartesian_2d(0.5..10.5, 0.0..most * 1.08)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(TEXT)
            .label_style(text(LABEL_SIZE))
            .axis_desc_style(text(LABEL_SIZE + 1))
            .x_labels(10)
            .x_desc("tenth of the connections")
            .y_desc("connects per second")
            .x_label_formatter(&|value| format!("{value:.0}"))
            .y_label_formatter(&|value| format::count(format::rounded(*value)))
            .draw()?;
        let width = 0.8 / float(rates.len() as u64);
        for (index, ((_, tenths), colour)) in (0_u32..).zip(rates.iter().zip(COLOURS)) {
            let bar = |(tenth, rate): (u32, f64)| {
                let left = f64::from(tenth) - 0.4 + f64::from(index) * width;
                Rectangle::new([(left, 0.0), (left + width * 0.94, rate)], colour.filled())
            };
            chart.draw_series((1_u32..).zip(*tenths).map(bar))?;
        }
        Ok(())
    })
}

/// The latency at each percentile, for connects and messages of each client. Both axes are logarithmic: the distance
/// from 100% shrinks to a tenth with each step to the right.
fn latency(run: &Run) -> Drawn<Option<Chart>> {
    let lines: Vec<Line> = run
        .clients
        .iter()
        .flat_map(|(name, client)| {
            let workload =
                client.workload.as_ref().and_then(|workload| workload.histogram.as_ref());
            let storm = client.storm.as_ref().and_then(|storm| storm.histogram.as_ref());
            [
                ("connects", client.connect_histogram.as_ref()),
                ("storm", storm),
                ("messages", workload),
            ]
            .into_iter()
            .filter_map(move |(what, text)| Some((format!("{name}, {what}"), percentiles(text?)?)))
        })
        .collect();
    let points = || lines.iter().flat_map(|(_, points)| points);
    if points().next().is_none() {
        return Ok(None);
    }
    let most = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min).floor();
    let high = points().map(|point| point.1).fold(low + 1.0, f64::max).ceil();
    draw("latency.svg", "Latency at each percentile", HEIGHT, |area| {
        let area = below_keys(area, lines.iter().map(|(name, _)| name.as_str()).zip(COLOURS))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .margin_right(40)
            .x_label_area_size(46)
            .y_label_area_size(98)
            .build_cartesian_2d((0.0..most).step(1.0), (low..high + 0.05).step(1.0))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(TEXT)
            .label_style(text(LABEL_SIZE))
            .axis_desc_style(text(LABEL_SIZE + 1))
            .x_desc("percentile")
            .y_desc("latency")
            .x_label_formatter(&|nines| percentile_name(*nines))
            .y_label_formatter(&|exponent| format::duration(10_f64.powf(*exponent) / 1e6))
            .draw()?;
        for ((_, points), colour) in lines.iter().zip(COLOURS) {
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        }
        Ok(())
    })
}

/// For each percentile the number of its nines, and the logarithm of the latency in microseconds.
fn percentiles(text: &str) -> Option<Vec<(f64, f64)>> {
    let histogram = histogram::decode(text)?;
    // The maximum is at the percentile of one in all latencies.
    let nines_max = float(histogram.len()).log10();
    let point = |share: f64, us: u64| (-(1.0 - share).log10(), float(us.max(1)).log10());
    let steps = (0..).map(|step| f64::from(step) / 10.0).take_while(|nines| *nines < nines_max);
    let mut points: Vec<(f64, f64)> = steps
        .map(|nines| 1.0 - 10_f64.powf(-nines))
        .map(|share| point(share, histogram.value_at_quantile(share)))
        .collect();
    points.push((nines_max, float(histogram.max().max(1)).log10()));
    (!histogram.is_empty()).then_some(points)
}

/// `0%`, `90%`, `99%`, `99.9%`.
fn percentile_name(nines: f64) -> String {
    let places = format::rounded((nines - 2.0).max(0.0));
    format!("{:.*}%", usize::try_from(places).unwrap_or(0), 100.0 - 100.0 * 10_f64.powf(-nines))
}

/// One bar for each kernel, stacked by slab cache; that of the server's kernel begins with the server's process.
fn cost_per_connection(run: &Run) -> Drawn<Option<Chart>> {
    let process = cost::process(run).bytes_each;
    let bars: Vec<Bar> = cost::kernels(run)
        .into_iter()
        .map(|cost| {
            let is_server = cost.host == run.server_host();
            Bar::of(cost, process.filter(|_| is_server))
        })
        .collect();
    let most = bars.iter().map(Bar::bytes).fold(0.0, f64::max);
    if most <= 0.0 {
        return Ok(None);
    }
    let height = u32::try_from(bars.len())? * BAR_HEIGHT + 52;
    draw("cost.svg", "What a connection costs", height, |area| {
        let blocks = area.split_evenly((bars.len(), 1));
        for (bar, block) in bars.iter().zip(blocks) {
            draw_bar(bar, most, &block)?;
        }
        Ok(())
    })
}

const BAR_HEIGHT: u32 = 210;

/// The memory of a connection in one kernel.
struct Bar {
    heading: String,
    parts: Vec<Part>,
}

struct Part {
    name: String,
    bytes: f64,
    colour: RGBColor,
}

impl Bar {
    fn of(cost: HostCost, process: Option<f64>) -> Self {
        let [first, caches @ .., last] = COLOURS;
        let mut heading = format!("{}: {}", cost.name(), format::bytes_each(cost.bytes()));
        let mut parts = Vec::new();
        if let Some(bytes) = process {
            heading += &format!("; server's process: {}", format::bytes_each(bytes));
            parts.push(Part { name: "server's process".to_owned(), bytes, colour: first });
        }
        let mut others = cost.bytes();
        for (cache, colour) in cost.caches.into_iter().zip(caches) {
            others -= cache.bytes;
            parts.push(Part { name: cache.name, bytes: cache.bytes, colour });
        }
        let name = "all other caches".to_owned();
        parts.push(Part { name, bytes: others.max(0.0), colour: last });
        Self { heading, parts }
    }

    fn bytes(&self) -> f64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

fn draw_bar(bar: &Bar, most: f64, area: &Drawing<'_>) -> Drawn<()> {
    area.draw(&Text::new(visible(&bar.heading), (16, 8), text(LABEL_SIZE + 1)))?;
    let (_, below) = area.split_vertically(30);
    let keys: Vec<_> = bar
        .parts
        .iter()
        .map(|part| (format!("{}, {}", part.name, format::bytes_each(part.bytes)), part.colour))
        .collect();
    let below = below_keys(&below, keys.iter().map(|(key, colour)| (key.as_str(), *colour)))?;
    let mut chart = ChartBuilder::on(&below)
        .margin_left(16)
        .margin_right(28)
        .margin_bottom(18)
        .x_label_area_size(46)
        .build_cartesian_2d(0.0..most * 1.02, 0.0..1.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(TEXT)
        .label_style(text(LABEL_SIZE))
        .axis_desc_style(text(LABEL_SIZE + 1))
        .x_desc("bytes per connection")
        .x_label_formatter(&|value| format::count(format::rounded(*value)))
        .draw()?;
    let mut left = 0.0;
    for part in &bar.parts {
        let corners = [(left, 0.12), (left + part.bytes, 0.88)];
        chart.plotting_area().draw(&Rectangle::new(corners, part.colour.filled()))?;
        left += part.bytes;
    }
    Ok(())
}

/// Draws the legend and returns the area below it.
fn below_keys<'a, 'b>(
    area: &Drawing<'a>,
    keys: impl Iterator<Item = (&'b str, RGBColor)>,
) -> Drawn<Drawing<'a>> {
    const LEFT: i32 = 16;
    const LINE: i32 = 24;
    let right = i32::try_from(WIDTH)? - LEFT;
    let (mut x, mut y) = (LEFT, 4);
    for (name, colour) in keys {
        let name = visible(name);
        // The text is measured when it is shown; these are the width of a letter, and the space between entries.
        let width = 20 + 7 * i32::try_from(name.chars().count())? + 20;
        if x > LEFT && x + width > right {
            (x, y) = (LEFT, y + LINE);
        }
        area.draw(&Rectangle::new([(x, y), (x + 14, y + 14)], colour.filled()))?;
        area.draw(&Text::new(name, (x + 20, y + 1), text(LABEL_SIZE)))?;
        x += width;
    }
    Ok(area.split_vertically(y + LINE).1)
}

fn text(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&TEXT)
}

/// Draws a chart with its title.
fn draw(
    file_name: &'static str,
    title: &'static str,
    height: u32,
    content: impl FnOnce(&Drawing<'_>) -> Drawn<()>,
) -> Drawn<Option<Chart>> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let heading = text(21).pos(Pos::new(HPos::Left, VPos::Top));
        area.draw(&Text::new(title, (16, 14), heading))?;
        let (_, below) = area.split_vertically(40);
        content(&below)?;
        area.present()?;
    }
    Ok(Some(Chart { file_name, title, svg }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(label: &'static str, points: &[(f64, f64)]) -> Panel {
        let text = |value| format::count(format::rounded(value));
        Panel { label, text, points: points.to_vec() }
    }

    #[test]
    fn the_page_replaces_colours_of_the_charts_in_a_dark_scheme() {
        let sheet = include_str!("export/html/style.css");
        let name =
            |colour: &RGBColor| format!("\"#{:02X}{:02X}{:02X}\"", colour.0, colour.1, colour.2);
        let used: Vec<String> = [TEXT, GRID, WHITE].iter().chain(&COLOURS).map(name).collect();
        for colour in &used[..3] {
            assert!(sheet.contains(colour), "{colour}");
        }
        let replaced = sheet.split('[').skip(1).filter_map(|selector| selector.split_once('='));
        let replaced: Vec<_> = replaced.filter(|(name, _)| *name != "style*").collect();
        assert!(replaced.len() > used.len());
        for (_, value) in replaced {
            let colour = value.split(']').next().unwrap();
            assert!(used.iter().any(|used| used == colour), "{colour} is not in a chart");
        }
    }

    #[test]
    fn a_legend_that_is_too_long_continues_on_the_next_line() {
        let lines = |names: &[&str]| {
            let mut svg = String::new();
            let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
            let keys = names.iter().copied().zip(COLOURS);
            let below = below_keys(&area, keys).unwrap();
            (HEIGHT - below.dim_in_pixel().1) / 24
        };
        assert_eq!(lines(&["client"]), 1);
        assert_eq!(lines(&["client, p50", "client, p99", "server", "machine, busy"]), 1);
        let long = "machine of client-1, soft interrupts";
        assert_eq!(lines(&[long, long]), 1);
        assert_eq!(lines(&[long, long, long, long]), 2);
        assert_eq!(lines(&[&"x".repeat(500), "server"]), 2);
    }

    #[test]
    fn each_figure_has_a_panel_and_one_without_points_has_none() {
        let shown = [
            panel("open", &[(0.0, 1.0), (9.0, 3.0)]),
            panel("lost", &[]),
            panel("closed", &[(4.0, 2.0)]),
        ];
        let chart = panels("soak.svg", "A soak", &shown).unwrap().unwrap();
        for (label, is_there) in [("open", true), ("closed", true), ("lost", false)] {
            assert_eq!(chart.svg.contains(&format!("\n{label}\n")), is_there, "{label}");
        }
        let nothing = [panel("lost", &[]), panel("wrong", &[(0.0, 0.0), (1.0, 0.0)])];
        assert_eq!(panels("soak.svg", "A soak", &nothing).unwrap(), None);
    }
}
