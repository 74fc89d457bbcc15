//! What a target needs against what this machine allows, each row with its remedy.
//!
//! ```
//! use c1000k_host::check::{Machine, Need, Role, fits, render, table};
//!
//! let need = Need::new(Role::Server, 15_000);
//! let rows = table(&Machine::read(), &need);
//! print!("{}", render(&rows));
//! let exit_code = if fits(&rows) { 0 } else { 1 };
//! # let _ = exit_code;
//! ```

mod args;
mod file_table;
mod limits;
mod machine;
mod need;
mod render;
mod settings;

pub use {
    args::{CheckArgs, Format},
    file_table::{FileTable, FileTableArgs, FileTableChoice},
    limits::{Cap, CapKind, caps, largest_target, settings, table},
    machine::{Conntrack, Machine},
    need::{KERNEL_BYTES_PER_SOCKET, Need, Role, predict},
    render::render,
    settings::{Setting, render_settings},
};

/// One limit: what the target needs of it, and what there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The limit by the name that its manual uses.
    pub name: &'static str,
    /// What the target needs, with its unit.
    pub needed: String,
    /// What there is, with its unit; `-` where it can't be read.
    pub present: String,
    /// Whether it is enough.
    pub status: RowStatus,
    /// What mends it, mostly a command; for a row that passes, what is worth knowing. One thought
    /// per line.
    pub remedy: Option<String>,
}

/// Whether a limit is high enough for the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// Enough.
    Pass,
    /// Too little: the target can't be reached.
    Fail,
    /// The target can be reached, but something suffers: the remedy tells what and how to help.
    Advice,
    /// It can't be read here.
    Unknown,
    /// This role or this machine has no use for it.
    NotNeeded,
}

/// Whether the target fits: no row fails.
pub fn fits(rows: &[Row]) -> bool {
    rows.iter().all(|row| row.status != RowStatus::Fail)
}
