//! The shared parts of both command lines: addresses, wrong usage, the log, and the output at the end.
//!
//! No output waits indefinitely for its reader.

mod address;
mod common;
mod outlet;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use c1000k_record::{Output, output};
use clap::Parser;
use clap::error::ErrorKind;
use env_logger::{Target, WriteStyle};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

pub use address::{ZonedIp, is_of_many, parse_ip, parse_port, split_zone, with_zone};
pub use common::{Color, Generated, OutputArgs, is_quiet};

use outlet::{LogLines, PATIENCE, STANDARD_ERROR, write_within};

/// Exit code: the target was reached, and every requested verification succeeded.
pub const REACHED: u8 = 0;
/// Exit code: the run fell short, or the system refused something that is needed to start.
pub const SHORT: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// Parses the arguments of this process, from the command line or the environment, and starts the log accordingly.
///
/// # Errors
/// The exit code, after printing the help, the version or the generated text (0), or clap's error (2).
pub fn parse_and_start_log<A: Parser + AsRef<OutputArgs>>() -> Result<A, ExitCode> {
    let arguments = parse::<A>()?;
    common::apply::<A>(arguments.as_ref())?;
    start_log();
    Ok(arguments)
}

/// Parses the arguments of this process.
///
/// # Errors
/// The exit code, after printing the help or the version (0), or clap's error (2).
pub fn parse<A: Parser>() -> Result<A, ExitCode> {
    make_file_size_limit_an_error();
    common::read::<A>().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            warn_if_stdout_may_be_closed();
            conclude(REACHED, output::check_stdout().and_then(|()| error.print()))
        }
        _ => {
            print_error(&error_text(&error));
            ExitCode::from(USAGE)
        }
    })
}

/// clap's error, with its tips and the usage, in colour on a terminal.
fn error_text(error: &clap::Error) -> String {
    let text = error.render();
    if common::wants_color() { text.ansi().to_string() } else { text.to_string() }
}

/// Prints a last line on standard error, which begins with the program's name.
pub fn fail(code: u8, line: &str) -> ExitCode {
    warn(line);
    ExitCode::from(code)
}

/// Prints a line on standard error, which begins with the program's name.
pub fn warn(line: &str) {
    // The name need not be UTF-8, and `args` panics if it is not.
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().display();
    print_error(&format!("{name}: {line}\n"));
}

/// Prints on standard error, after the log so far, without waiting.
pub fn tell(text: String) {
    STANDARD_ERROR.push(text.into_bytes());
}

/// Prints on standard error, after the log so far; waits at most one second for a reader.
pub fn print_error(text: &str) {
    STANDARD_ERROR.push(text.as_bytes().to_vec());
    STANDARD_ERROR.flush();
}

/// Checks whether the record can be written, as far as possible before the run.
///
/// # Errors
/// One line, if it can't.
pub fn check_output(output: &Output) -> Result<(), String> {
    output.check_writable().map_err(|error| error.to_string())?;
    if *output == Output::Stdout {
        warn_if_stdout_may_be_closed();
    }
    Ok(())
}

/// Warns that printed output may be lost.
pub fn warn_if_stdout_may_be_closed() {
    if output::stdout_may_be_closed() {
        warn("standard output was closed at the start or is /dev/null: its output is lost");
    }
}

/// Prints the requested output on standard output, and returns how to exit: with `code`, or with 1 and one line if it
/// can't be written.
pub fn deliver(code: u8, text: &str) -> ExitCode {
    warn_if_stdout_may_be_closed();
    conclude(code, print(text))
}

fn conclude(code: u8, printed: io::Result<()>) -> ExitCode {
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(SHORT, &not_printed(&error))
        }
        _ => ExitCode::from(code),
    }
}

/// The error line for an unwritable standard output.
#[must_use]
pub fn not_printed(error: &io::Error) -> String {
    format!(
        "cannot write to standard output: {error}; send it to a file or pipe that can be written"
    )
}

/// Prints the summary of a run on standard output, after the log so far, or else on standard error. A reader that does
/// not read, or has closed the pipe, is not an error.
///
/// # Errors
/// One line, if standard output could not be written.
pub fn print_summary(text: &str) -> Result<(), String> {
    match print(text) {
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::BrokenPipe) =>
        {
            print_error(text);
            Err(format!("{}; it was printed on standard error instead", not_printed(&error)))
        }
        _ => Ok(()),
    }
}

/// Prints on standard output, after the log so far. Waits at most one second for a reader that does not read.
fn print(text: &str) -> io::Result<()> {
    STANDARD_ERROR.flush();
    let (done, is_done) = mpsc::sync_channel(1);
    let copy = text.as_bytes().to_vec();
    let write = move || {
        let mut out = io::stdout();
        let write = |()| out.write_all(&copy).and_then(|()| out.flush());
        let _ = done.send(output::check_stdout().and_then(write));
    };
    match thread::Builder::new().spawn(write) {
        Ok(_) => is_done.recv_timeout(PATIENCE).unwrap_or(Err(io::ErrorKind::TimedOut.into())),
        // No thread can be started: text that can be written now, or within that time, is still written.
        Err(_) => output::check_stdout()
            .and_then(|()| write_within(io::stdout(), text.as_bytes(), PATIENCE)),
    }
}

/// Makes a write beyond `ulimit -f` fail with `EFBIG`, like one to a full disk, instead of ending the process by
/// SIGXFSZ: the signal is blocked in this thread and those that it starts.
fn make_file_size_limit_an_error() {
    let signals: SigSet = [Signal::SIGXFSZ].into_iter().collect();
    let _ = signals.thread_block();
}

/// Restores the default of SIGINT and SIGTERM, which ends the process; pending ones are discarded.
///
/// For output at the end that may wait for a reader, when the reactor that handled the signals no longer runs.
pub fn give_signals_back() {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    if let Ok(pending) = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK) {
        while let Ok(Some(_)) = pending.read_signal() {}
    }
    let _ = signals.thread_unblock();
}

/// Starts the log: plain lines on standard error, set by the arguments unless `RUST_LOG` overrides them.
///
/// A separate thread writes them, so that the program does not wait for their reader; call [`flush_log`] at its end. If
/// no thread can be started, a line that would wait for its reader is dropped.
fn start_log() {
    make_file_size_limit_an_error();
    let default = env_logger::Env::default().default_filter_or(common::log_level().as_str());
    let mut builder = env_logger::Builder::from_env(default);
    builder.format_target(false);
    let _ = STANDARD_ERROR.start(io::stderr());
    builder.target(Target::Pipe(Box::new(LogLines)));
    if common::wants_color() {
        builder.write_style(WriteStyle::Always);
    }
    let _ = builder.try_init();
}

/// Waits until the log is written, at most one second.
pub fn flush_log() {
    STANDARD_ERROR.flush();
}

/// Log lines that were dropped because earlier ones were not read.
#[must_use]
pub fn log_lines_dropped() -> u64 {
    STANDARD_ERROR.dropped()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "probe")]
    struct Probe {
        #[arg(long, value_parser = crate::quantity::parse_count)]
        ports: Option<u64>,
    }

    #[test]
    fn wrong_usage_is_claps_own_error_with_its_tips() {
        let error = Probe::try_parse_from(["probe", "--port", "1"]).expect_err("it is --ports");
        let text = error_text(&error);
        assert!(text.contains("a similar argument exists: '--ports'"), "{text}");
        assert!(text.contains("Usage: probe --ports"), "{text}");
        let error = Probe::try_parse_from(["probe", "--ports", "ten"]).expect_err("no number");
        assert!(error_text(&error).contains("'ten' for '--ports <PORTS>'"));
    }
}
