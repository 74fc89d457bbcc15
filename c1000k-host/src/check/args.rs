//! The arguments of `--check`, the same for both programs.

use {
    super::{Machine, Requirements, fits, render, render_settings, settings, table},
    crate::command_line::{self, REACHED, SHORT},
    clap::{Args, ValueEnum},
    std::{path::PathBuf, process::ExitCode},
};

/// `--check`, and what it prints.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct CheckArgs {
    /// Compare the limits of this machine with what the requested connections need, and exit
    #[arg(long)]
    pub check: bool,
    /// With --check: print the settings that the connections need instead, as a drop-in for sysctl.d
    #[arg(
        long,
        value_enum,
        requires = "check",
        hide_possible_values = true,
        value_name = "sysctl"
    )]
    pub print: Option<Format>,
    /// For tests: the directory that contains the kernel's settings
    #[arg(long, hide = true, requires = "print", default_value = "/", value_name = "DIR")]
    pub root: PathBuf,
}

/// What is printed instead of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines of a drop-in.
    Sysctl,
}

impl CheckArgs {
    /// Prints the table, or the settings. The exit code says whether the connections fit; with the settings it is always 0.
    pub fn report(&self, machine: &Machine, requirements: &Requirements) -> ExitCode {
        if self.print == Some(Format::Sysctl) {
            return command_line::deliver(
                REACHED,
                &render_settings(&settings(machine, requirements)),
            );
        }
        let rows = table(machine, requirements);
        command_line::deliver(if fits(&rows) { REACHED } else { SHORT }, &render(&rows))
    }
}
