//! Runs the programs on real sockets: a million connections, faults, soak tests, and counts of system calls; and tests
//! the tune scripts.

mod bystander;
mod cgroup;
mod faults;
mod guest;
mod load;
mod million;
mod namespace;
mod process;
mod programs;
mod record;
mod scenarios;
mod server;
mod snapshot;
mod soak;
mod sockets;
mod syn;
mod syscalls;
mod trace;
mod tune_test;
mod wait;

use std::fmt::Display;
use std::hint::black_box;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use c1000k_host::command_line::{self, SHORT, USAGE};
use clap::{Parser, Subcommand};

/// Runs the programs on real sockets, and checks the outcome
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Faults(faults::Arguments),
    Million(million::Arguments),
    Scenarios(scenarios::Arguments),
    Soak(soak::Arguments),
    Syscalls(syscalls::Arguments),
    TuneTest(tune_test::Arguments),
    #[command(hide = true)]
    Churn(soak::churn::Arguments),
    #[command(hide = true)]
    Guest(guest::init::Arguments),
    #[command(hide = true)]
    Isolated(process::Isolated),
    /// Writes this many bytes of memory, and ends
    #[command(hide = true)]
    Touch {
        bytes: usize,
    },
}

fn main() -> ExitCode {
    let command = match Arguments::try_parse() {
        Ok(arguments) => arguments.command,
        Err(error) if error.exit_code() == 0 => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return command_line::fail(USAGE, &one_line(&error)),
    };
    match run(&command) {
        Ok(code) => code,
        Err(why) => command_line::fail(SHORT, &format!("{why:#}")),
    }
}

/// The error without clap's tips and usage.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let what = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    format!("{}; see --help", what.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Isolated(arguments) => process::run_isolated(arguments),
        Command::Churn(arguments) => soak::churn::run(arguments),
        Command::Faults(arguments) => faults::run(arguments),
        Command::Million(arguments) => million::run(arguments),
        Command::Guest(arguments) => guest::init::run(arguments),
        Command::Scenarios(arguments) => scenarios::run(arguments),
        Command::Soak(arguments) => soak::run(arguments),
        Command::Syscalls(arguments) => syscalls::run(arguments),
        Command::TuneTest(arguments) => tune_test::run(arguments),
        Command::Touch { bytes } => {
            black_box(vec![1_u8; *bytes]);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints a line on standard output, and ignores a closed pipe: a run does not end because its reader has.
fn print_line(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}
