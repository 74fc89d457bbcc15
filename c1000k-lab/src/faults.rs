//! Runs the faults of networks, peers and machines against a real server, and checks that it holds.
//!
//! A row is a function that runs one fault and records what it measures; [`rows`] has the table of them.

mod report;
mod rows;
mod run;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use c1000k_host::check::FileTableChoice;
use c1000k_host::command_line::{self, REACHED, SHORT, USAGE};
use c1000k_host::limits::raise_descriptor_limit;
use clap::Args;

use crate::patience;
use crate::programs::Programs;
use crate::server::Lab;

pub(crate) use report::{Check, Skipped};

/// Runs the faults of networks, peers and machines against a real server, and checks that it holds
///
/// Each row of docs/reliability.md that this machine allows is run against the programs on loopback or in network
/// namespaces of its own; a bystander connection sends and reads echoes all the time. For each row a record goes to DIR. Exits 1 if a row
/// does not hold, and 2 for wrong usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// All that do not take minutes if left out
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
    /// Where the records go
    #[arg(long, value_name = "DIR", default_value = "out/faults")]
    out: PathBuf,
    /// Where the server's sockets are held, in rows that do not set it
    #[arg(long, value_name = "TABLE", value_enum, default_value = "auto")]
    file_table: FileTableChoice,
    /// Print the names of the rows
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        let lines = rows::ROWS.iter().map(|row| format!("{:20} {}\n", row.name, row.fault));
        return Ok(command_line::deliver(REACHED, &lines.collect::<String>()));
    }
    let mut chosen = Vec::new();
    for name in &arguments.rows {
        match rows::ROWS.iter().find(|row| row.name == name) {
            Some(row) => chosen.push(row),
            None => {
                return Ok(command_line::fail(
                    USAGE,
                    &format!("no row is called '{name}'; --list prints them"),
                ));
            }
        }
    }
    if chosen.is_empty() {
        chosen.extend(rows::ROWS.iter().filter(|row| !row.is_long));
    }
    patience::take_interrupts()?;
    raise_descriptor_limit()?;
    fs::create_dir_all(&arguments.out)?;
    let lab = Lab {
        programs: Programs::find("FAULTS_BINARIES")?,
        file_table: arguments.file_table.as_str(),
    };
    let states = run::run_all(&lab, &chosen, &arguments.out)?;
    Ok(if states.contains(&report::State::Fails) {
        ExitCode::from(SHORT)
    } else {
        ExitCode::SUCCESS
    })
}
