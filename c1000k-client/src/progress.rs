//! Progress on standard error: a few updated lines on a terminal, plain lines in a pipe.

use std::io::{self, IsTerminal};
use std::time::Duration;

use c1000k_host::command_line;
use c1000k_host::format;
use c1000k_host::memory::memory_available;
use c1000k_host::usage::ProcessUsage;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::stats::RunStats;

/// The template of the bar.
const BAR: &str =
    "{msg:10} [{wide_bar:.cyan/blue}] {human_pos} of {human_len}  {elapsed}, {eta} left";
/// The template of a line below it.
const LINE: &str = "{msg}";

/// Lines below the bar.
const LINES: usize = 4;

/// Where progress is shown.
#[derive(Debug)]
pub enum Progress {
    /// On a terminal.
    Screen(Screen),
    /// In a pipe or a file.
    Lines,
    /// Nowhere.
    Quiet,
}

/// A bar, and figures of the run below it.
#[derive(Debug)]
pub struct Screen {
    all: MultiProgress,
    bar: ProgressBar,
    lines: [ProgressBar; LINES],
    /// Available memory before the run.
    room_before: Option<u64>,
}

impl Screen {
    fn new(target: u64, bar: ProgressStyle, line: &ProgressStyle) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let bar = all.add(ProgressBar::new(target).with_style(bar.progress_chars("=> ")));
        let lines = [(); LINES].map(|()| all.add(ProgressBar::new(0).with_style(line.clone())));
        let room_before = memory_available().map(|room| room.bytes);
        Self { all, bar, lines, room_before }
    }

    fn show(&self, line: String, stats: &RunStats, in_flight: usize) {
        self.bar.tick();
        let text =
            |us: Option<u64>| us.map_or("-".to_owned(), |us| format::duration(us as f64 / 1e6));
        let connect = stats.connect_latency.percentiles();
        let connects = format!(
            "connects: {} in flight, median {}, p99 {}",
            format::count(in_flight as u64),
            text(connect.p50),
            text(connect.p99)
        );
        let errors = match stats.failures.by_name().len() {
            0 => "errors:   none".to_owned(),
            _ => format!("errors:   {}", stats.failures),
        };
        for (place, text) in
            self.lines.iter().zip([line, connects, errors, self.memory(stats.held)])
        {
            place.set_message(text);
        }
    }

    /// This machine's memory for each connection, and how many more fit.
    fn memory(&self, held: u64) -> String {
        let own = ProcessUsage::read().map_or_else(String::new, |usage| {
            format!("this process {}", format::bytes(usage.rss_bytes))
        });
        let room = memory_available().map(|room| room.bytes);
        let spent = self.room_before.zip(room).map(|(before, now)| before.saturating_sub(now));
        match (spent, room) {
            (Some(spent @ 1..), Some(room)) if held > 0 => {
                let each = spent as f64 / held as f64;
                let more = (room as f64 / each) as u64;
                format!(
                    "memory:   {own}; this machine {} a connection, room for about {} more",
                    format::bytes_each(each),
                    format::count(more)
                )
            }
            _ => format!("memory:   {own}"),
        }
    }
}

impl Progress {
    /// Chooses by the type of standard error.
    pub fn new(target: u64) -> Self {
        if command_line::is_quiet() {
            return Self::Quiet;
        }
        match (ProgressStyle::with_template(BAR), ProgressStyle::with_template(LINE)) {
            (Ok(bar), Ok(line)) if io::stderr().is_terminal() => {
                let screen = Screen::new(target, bar, &line);
                screen.bar.set_message("opening");
                // The clock also advances between two ticks of the run.
                screen.bar.enable_steady_tick(Duration::from_millis(500));
                Self::Screen(screen)
            }
            _ => Self::Lines,
        }
    }

    /// A new stage has begun: shows `verb` beside the bar, or `line` in a pipe.
    pub(crate) fn begin(&self, verb: &'static str, line: &str) {
        match self {
            Self::Screen(screen) => screen.bar.set_message(verb),
            Self::Lines => print_line(line),
            Self::Quiet => {}
        }
    }

    /// Updates the number of connections; the bar is redrawn a few times a second at most.
    pub(crate) fn advance(&self, count: u64) {
        if let Self::Screen(screen) = self {
            screen.bar.set_position(count);
        }
    }

    /// Called about once a second; the text is only built if it is shown.
    pub(crate) fn tick(&self, stats: &RunStats, in_flight: usize, line: impl FnOnce() -> String) {
        match self {
            Self::Screen(screen) => screen.show(line(), stats, in_flight),
            Self::Lines => print_line(&line()),
            Self::Quiet => {}
        }
    }

    /// Writes a warning above the bar.
    pub(crate) fn warn(&self, text: &str) {
        match self {
            Self::Screen(screen) => screen.all.suspend(|| log::warn!("{text}")),
            Self::Lines | Self::Quiet => log::warn!("{text}"),
        }
    }

    /// Removes the bar.
    pub fn end(&self) {
        if let Self::Screen(screen) = self {
            screen.bar.finish_and_clear();
            screen.lines.iter().for_each(ProgressBar::finish_and_clear);
            // A bar that can't be cleared is harmless.
            let _ = screen.all.clear();
        }
    }
}

/// Written by the log's thread, so that a slow reader does not block the run.
fn print_line(line: &str) {
    command_line::tell(format!("{line}\n"));
}
