//! `c1000k-report`: summarizes the directory of a run, compares runs, or prints the JSON Schema of a record.

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use c1000k_host::command_line::{self, SHORT, USAGE, fail};
use c1000k_record::{Verdict, input, output, schema};
use c1000k_report::checks::{Check, CheckOutcome};
use c1000k_report::compare::Comparison;
use c1000k_report::escape::visible;
use c1000k_report::export::Format;
use c1000k_report::run::{Run, RunError};
use c1000k_report::{Report, verdict};
use clap::{Parser, Subcommand, ValueEnum};

/// Summarize a run, or compare runs, from their directories.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = false)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write summary.md, report.html, summary.json, summary.csv, series.csv and the charts into the directory of a run,
    /// and print its verdict.
    ///
    /// Exits with 0 if all requested connections were held and no check disagrees, with 1 if the run fell short, if a
    /// client's or the server's record is missing, or if clients, server and kernel disagree. Snapshots of the kernel
    /// may be missing, which is reported; if all of them are, an existing summary.md with more checks is kept.
    Summarize {
        /// The directory of the run
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Print this on standard output instead, and write nothing
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
        /// Also exit with 1 if a check could not be made because a record or a snapshot is missing
        #[arg(long)]
        check: bool,
        /// The server is another program than c1000k-server: do not exit with 1 because its record is missing
        #[arg(long)]
        client_only: bool,
    },
    /// Compare two runs, or two series of runs, side by side.
    ///
    /// A directory may have several runs instead, each in its own directory. Then medians are compared, each with its
    /// minimum and maximum, and each difference is within the noise or beyond it.
    Compare {
        /// The directory of the first run, or of several runs
        #[arg(value_name = "DIR")]
        first: PathBuf,
        /// The directory of the second; ratios are second to first
        #[arg(value_name = "DIR")]
        second: PathBuf,
        /// Print this format instead of a text table
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
    },
    /// Print the JSON Schema of a record.
    Schema {
        /// The program that writes the record
        program: Program,
    },
}

/// A program that writes a record.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Program {
    /// c1000k-client
    Client,
    /// c1000k-server
    Server,
}

fn main() -> ExitCode {
    let arguments = match command_line::parse::<Arguments>() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let outcome = match arguments.command {
        Command::Summarize { folder, format, check, client_only } => {
            summarize(&folder, format, check, client_only)
        }
        Command::Compare { first, second, format } => compare(&first, &second, format),
        Command::Schema { program } => print_schema(program),
    };
    outcome.unwrap_or_else(|error| {
        // The argument is not a run; other errors come from the system.
        let code = if error.is::<RunError>() { USAGE } else { SHORT };
        fail(code, &visible(&error.to_string()))
    })
}

fn summarize(
    folder: &Path,
    format: Option<Format>,
    is_strict: bool,
    is_client_only: bool,
) -> Result<ExitCode, Box<dyn Error>> {
    let report = Report::new(Run::read(folder)?)?;
    match format {
        Some(format) => {
            warn_of_missing_snapshots(&report, "");
            deliver(&format.exporter().export(&report)?)?;
        }
        None => conclude(folder, &report)?,
    }
    let Report { run, checks, .. } = &report;
    // With `--no-verify`, held is what was requested.
    let is_reached = run.verdict().is_some_and(|verdict| verdict != Verdict::Short);
    let is_complete = run.missing().iter().all(|&name| is_client_only && name == "server");
    let is_good = is_reached && is_complete;
    let passes = is_good && pass(checks, is_strict);
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the verdict, and writes the charts and every format into the directory, unless the existing ones have more
/// checks.
fn conclude(folder: &Path, report: &Report) -> Result<(), Box<dyn Error>> {
    let page = folder.join(Format::Markdown.exporter().file_name());
    // If one of the two fails, the other is still done.
    let printed = print(&format!("{}\n", report.verdict()));
    if has_more_checks(&page, report) {
        warn_of_missing_snapshots(
            report,
            "; summary.md is kept, because it has more checks: remove it to write a new one",
        );
        return Ok(printed?);
    }
    warn_of_missing_snapshots(report, "");
    report.write(folder)?;
    printed?;
    Ok(print(&format!("{}\n", Report::pages(folder)))?)
}

/// Whether the existing page was made with snapshots that have been removed since.
fn has_more_checks(page: &Path, report: &Report) -> bool {
    let made = input::text(page).and_then(|page| verdict::checks_made_with_snapshots(&page));
    let has_snapshots = report.run.hosts().next().is_some();
    !has_snapshots && made.is_some_and(|made| made > verdict::checks_made(&report.checks))
}

fn warn_of_missing_snapshots(report: &Report, consequence: &str) {
    let Report { run, checks, .. } = report;
    if let Some(missing) = verdict::missing_snapshots(run, checks) {
        let folder = visible(&run.folder.display().to_string());
        command_line::warn(&format!("missing in {folder}: {missing}{consequence}"));
    }
}

fn pass(checks: &[Check], is_strict: bool) -> bool {
    checks.iter().filter(|check| !check.is_speed).all(|check| match check.outcome {
        CheckOutcome::Agrees | CheckOutcome::NotJudged => true,
        CheckOutcome::Disagrees => false,
        CheckOutcome::Unknown => !is_strict,
    })
}

fn compare(
    first: &Path,
    second: &Path,
    format: Option<Format>,
) -> Result<ExitCode, Box<dyn Error>> {
    let comparison = Comparison::read(first, second)?;
    let text = match format {
        Some(format) => format.exporter().compare(&comparison)?,
        None => comparison.table(),
    };
    deliver(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn print_schema(program: Program) -> Result<ExitCode, Box<dyn Error>> {
    let schema = match program {
        Program::Client => schema::client(),
        Program::Server => schema::server(),
    };
    deliver(&format!("{:#}\n", schema.as_value()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the requested output; an error if it can't be written.
fn deliver(text: &str) -> Result<(), String> {
    command_line::warn_if_stdout_may_be_closed();
    output::check_stdout().map_err(|error| command_line::not_printed(&error))?;
    print(text)
}

/// Prints; it is no error if the reader has closed the pipe, as `head` does.
fn print(text: &str) -> Result<(), String> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.map_err(|error| command_line::not_printed(&error)),
    }
}
