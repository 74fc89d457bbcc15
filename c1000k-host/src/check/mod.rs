//! Compares what a target needs with the limits of this machine, each row with its remedy.
//!
//! ```
//! use c1000k_host::check::{Machine, Requirements, Role, fits, render, table};
//!
//! let requirements = Requirements::new(Role::Server, 15_000);
//! let rows = table(&Machine::read(), &requirements);
//! print!("{}", render(&rows));
//! let exit_code = if fits(&rows) { 0 } else { 1 };
//! # let _ = exit_code;
//! ```

mod args;
mod file_table;
mod limits;
mod machine;
mod render;
mod requirements;
mod settings;

pub use {
    args::{CheckArgs, Format},
    file_table::{FileTable, FileTableArgs, FileTableChoice},
    limits::{Cap, CapKind, caps, largest_target, settings, table},
    machine::{Conntrack, Machine},
    render::render,
    requirements::{
        KERNEL_BYTES_PER_SOCKET, KERNEL_BYTES_PER_UNIX_SOCKET, Requirements, Role,
        TLS_BYTES_PER_CONNECTION, Transport, predict,
    },
    settings::{Setting, render_settings},
};

/// One limit: the value that the target needs, and the present value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The name of the limit in its manual.
    pub name: &'static str,
    /// The value that the target needs, with its unit.
    pub needed: String,
    /// The present value, with its unit; `-` if it can't be read.
    pub present: String,
    /// Whether it is enough.
    pub status: RowStatus,
    /// The remedy, usually a command; for a row that passes, a note. One statement per line.
    pub remedy: Option<String>,
}

/// Whether a limit is high enough for the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// Enough.
    Pass,
    /// Too little: the target can't be reached.
    Fail,
    /// The target can be reached with a disadvantage, which the remedy describes.
    Advice,
    /// It can't be read here.
    Unknown,
    /// This role or this machine does not need it.
    NotNeeded,
}

/// Whether the target fits: no row fails.
pub fn fits(rows: &[Row]) -> bool {
    rows.iter().all(|row| row.status != RowStatus::Fail)
}
