//! What a person sees while it runs, on standard error: a bar on a terminal, plain lines in a pipe.

use std::io::{self, IsTerminal};

use c1000k_host::command_line;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What the bar looks like.
const TEMPLATE: &str = "{msg} [{wide_bar}] {human_pos} of {human_len} {elapsed}";

/// Where progress is shown.
#[derive(Debug)]
pub enum Progress {
    /// On a terminal.
    Bar(ProgressBar),
    /// In a pipe or a file.
    Lines,
    /// Nowhere.
    Quiet,
}

impl Progress {
    /// Chooses by what standard error is.
    pub fn new(target: u64) -> Self {
        let style = ProgressStyle::with_template(TEMPLATE);
        match style {
            _ if command_line::is_quiet() => Self::Quiet,
            Ok(style) if io::stderr().is_terminal() => {
                let bar = ProgressBar::with_draw_target(Some(target), ProgressDrawTarget::stderr());
                bar.set_style(style.progress_chars("=> "));
                bar.set_message("opening");
                Self::Bar(bar)
            }
            _ => Self::Lines,
        }
    }

    /// A new stage has begun: `verb` stands beside the bar, `line` in a pipe.
    pub(crate) fn begin(&self, verb: &'static str, line: &str) {
        match self {
            Self::Bar(bar) => bar.set_message(verb),
            Self::Lines => print_line(line),
            Self::Quiet => {}
        }
    }

    /// So far of the target; the bar draws itself again a few times a second at the most.
    pub(crate) fn advance(&self, count: u64) {
        if let Self::Bar(bar) = self {
            bar.set_position(count);
        }
    }

    /// About once a second; the line is made only where it is shown.
    pub(crate) fn tick(&self, line: impl FnOnce() -> String) {
        match self {
            Self::Bar(bar) => bar.tick(),
            Self::Lines => print_line(&line()),
            Self::Quiet => {}
        }
    }

    /// Writes a warning without tearing the bar.
    pub(crate) fn warn(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| log::warn!("{text}")),
            Self::Lines | Self::Quiet => log::warn!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// By the way that the log takes: nobody waits for who reads it.
fn print_line(line: &str) {
    command_line::tell(format!("{line}\n"));
}
