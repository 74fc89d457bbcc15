//! Runs the programs on real sockets: faults, soaks, and counts of system calls; and tries the tune scripts.

mod bystander;
mod cgroup;
mod crowd;
mod faults;
mod namespace;
mod patience;
mod peers;
mod process;
mod programs;
mod record;
mod server;
mod skipped;
mod soak;
mod sockets;
mod syn;
mod syscalls;
mod trace;
mod tune_test;

use std::process::ExitCode;

use anyhow::Result;
use c1000k_host::command_line::{self, SHORT};
use clap::{Parser, Subcommand};

/// Runs the programs on real sockets, and checks what comes of it
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Faults(faults::Arguments),
    Soak(soak::Arguments),
    Syscalls(syscalls::Arguments),
    TuneTest(tune_test::Arguments),
    #[command(hide = true)]
    Churn(soak::churn::Arguments),
    #[command(hide = true)]
    Inside(process::Inside),
}

fn main() -> ExitCode {
    let command = match command_line::parse::<Arguments>() {
        Ok(arguments) => arguments.command,
        Err(code) => return code,
    };
    match run(&command) {
        Ok(code) => code,
        Err(why) => command_line::fail(SHORT, &format!("{why:#}")),
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Inside(arguments) => {
            process::run_inside(arguments)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Churn(arguments) => soak::churn::run(arguments),
        Command::Faults(arguments) => faults::run(arguments),
        Command::Soak(arguments) => soak::run(arguments),
        Command::Syscalls(arguments) => syscalls::run(arguments),
        Command::TuneTest(arguments) => tune_test::run(arguments),
    }
}
