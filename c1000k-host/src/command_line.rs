//! What the command lines of both binaries share: addresses, wrong usage, the log, and what is said at the end.
//!
//! Nothing here waits without end for someone to read it.

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

/// Exit code: the target was reached, and everything asked for was verified.
pub const REACHED: u8 = 0;
/// Exit code: the run fell short, or the system refused what it takes to begin.
pub const SHORT: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// Reads the arguments of this process, from the command line or else from the environment, and starts the log as they
/// say.
///
/// # Errors
/// The exit code, after the help, the version or what was to be generated was printed (0), or what is wrong, in clap's
/// words (2).
pub fn parse_and_start_log<A: Parser + AsRef<OutputArgs>>() -> Result<A, ExitCode> {
    let arguments = parse::<A>()?;
    common::apply::<A>(arguments.as_ref())?;
    start_log();
    Ok(arguments)
}

/// Reads the arguments of this process.
///
/// # Errors
/// The exit code, after the help or the version was printed (0), or what is wrong, in clap's words (2).
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

/// clap's error as it is, with its tips and the usage, in colour where it can be seen.
fn error_text(error: &clap::Error) -> String {
    let text = error.render();
    if common::wants_color() { text.ansi().to_string() } else { text.to_string() }
}

/// Prints one line on standard error, headed by the program's name, as its last one.
pub fn fail(code: u8, line: &str) -> ExitCode {
    warn(line);
    ExitCode::from(code)
}

/// Prints one line on standard error, headed by the program's name.
pub fn warn(line: &str) {
    // The name need not be UTF-8, and `args` panics where it is not.
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().display();
    print_error(&format!("{name}: {line}\n"));
}

/// Prints on standard error, after the log so far, without waiting for its reader.
pub fn tell(text: String) {
    STANDARD_ERROR.push(text.into_bytes());
}

/// Prints on standard error, after the log so far; without a reader it waits for a second at most.
pub fn print_error(text: &str) {
    STANDARD_ERROR.push(text.as_bytes().to_vec());
    STANDARD_ERROR.flush();
}

/// Whether the record can be written, as far as that can be known before the run.
///
/// # Errors
/// One line, where it can't.
pub fn check_output(output: &Output) -> Result<(), String> {
    output.check_writable().map_err(|error| error.to_string())?;
    if *output == Output::Stdout {
        warn_if_stdout_may_be_closed();
    }
    Ok(())
}

/// Warns that what is printed may be lost.
pub fn warn_if_stdout_may_be_closed() {
    if output::stdout_may_be_closed() {
        warn("standard output was closed at the start or is /dev/null: what goes there is lost");
    }
}

/// Prints on standard output what was asked for, and says how to exit: with `code`, or with 1 and one line where it
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

/// The line that says that standard output could not be written.
#[must_use]
pub fn not_printed(error: &io::Error) -> String {
    format!("cannot write to standard output: {error}; send it where it can be written")
}

/// Prints the summary of a run on standard output, after the log so far, or else on standard error. A reader that does
/// not read, or has gone away, is no fault.
///
/// # Errors
/// One line, where standard output could not be written.
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

/// Prints on standard output, after the log so far. A reader that does not read is waited for a second at most.
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
        // No thread is to be had: what takes text now, or within that time, gets it all the same.
        Err(_) => output::check_stdout()
            .and_then(|()| write_within(io::stdout(), text.as_bytes(), PATIENCE)),
    }
}

/// A write beyond `ulimit -f` fails with `EFBIG`, as one to a full disk fails, and does not end the process by SIGXFSZ:
/// blocked in this thread and those that it starts, the signal is of no effect.
fn make_file_size_limit_an_error() {
    let signals: SigSet = [Signal::SIGXFSZ].into_iter().collect();
    let _ = signals.thread_block();
}

/// From here on SIGINT and SIGTERM end the process, as they do by default; those that have come are forgotten.
///
/// For what may have to wait for a reader at the end, when the reactor that took the signals does not run any more.
pub fn give_signals_back() {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    if let Ok(pending) = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK) {
        while let Ok(Some(_)) = pending.read_signal() {}
    }
    let _ = signals.thread_unblock();
}

/// Starts the log: plain lines on standard error, as the arguments say unless `RUST_LOG` says otherwise.
///
/// A thread of its own writes them, so that a slow reader holds nothing up; [`flush_log`] belongs to the program's end.
/// Where no thread is to be had, a line that would have to wait for its reader is dropped.
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

/// Waits until the log is written, for a second at most.
pub fn flush_log() {
    STANDARD_ERROR.flush();
}

/// Lines of the log that were dropped, because those before them were not read.
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
