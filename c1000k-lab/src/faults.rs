//! Injects faults of networks, peers and machines into a real server, and checks the result.
//!
//! A row is a function that injects one fault and records what it measures; [`rows`] has the table of them.

mod report;
mod rows;
mod run;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use c1000k_host::check::FileTableChoice;
use c1000k_host::command_line::{self, REACHED, SHORT};
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::server::Lab;

pub(crate) use report::{Check, Skipped};

/// Injects faults of networks, peers and machines into a real server, and checks the result
///
/// Each row of docs/reliability.md that this machine allows runs against the programs on loopback or in separate
/// network namespaces, while a bystander connection continuously sends and reads echoes. Each row writes a record to
/// DIR. Exits with 1 if a row fails, and with 2 for wrong usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// By default all rows that do not take minutes
    #[arg(value_name = "ROW", hide_possible_values = true, value_parser = PossibleValuesParser::new(rows::ROWS.iter().map(|row| row.name)))]
    rows: Vec<String>,
    /// The directory for the records
    #[arg(long, value_name = "DIR", default_value = "out/faults")]
    out: PathBuf,
    /// The table that holds the server's sockets, in rows that do not set it
    #[arg(long, value_name = "TABLE", value_enum, default_value = "auto")]
    file_table: FileTableChoice,
    /// Print the names of the rows and exit
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        let lines = rows::ROWS.iter().map(|row| format!("{:20} {}\n", row.name, row.fault));
        return Ok(command_line::deliver(REACHED, &lines.collect::<String>()));
    }
    let is_chosen = |row: &&rows::Row| match arguments.rows.is_empty() {
        true => !row.is_long,
        false => arguments.rows.iter().any(|name| name == row.name),
    };
    let chosen: Vec<_> = rows::ROWS.iter().filter(is_chosen).collect();
    fs::create_dir_all(&arguments.out)?;
    let states = run::run_all(&Lab::new(arguments.file_table)?, &chosen, &arguments.out)?;
    let has_failed = states.contains(&report::State::Fails);
    Ok(ExitCode::from(if has_failed { SHORT } else { REACHED }))
}
