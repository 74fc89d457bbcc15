//! The limits of a machine for a process that holds very many TCP connections, and the resources that these take.
//!
//! - [`quantity`] parses counts, sizes and durations that users type.
//! - [`mod@format`] formats counts, bytes, durations and rates for users.
//! - [`limits`] reads and raises descriptor limits.
//! - [`ports`] does the 5-tuple arithmetic of outbound connections.
//! - [`memory`] reads how much memory is left, in the machine and in every enclosing cgroup.
//! - [`usage`] samples the resources of this process, its sockets and the kernel's slabs.
//! - [`command_line`] and [`errno_name`] are shared by the command lines of both programs.
//! - [`check`] compares a target with all of this, and names the limit that binds.
//!
//! Everything is read from `/proc` and `/sys`. A file that is missing or can't be read (no root, a
//! container, another kernel) is `None`, never a panic. A sample costs the same for one connection
//! and for a million.

pub mod check;
pub mod command_line;
mod errno;
pub mod format;
pub mod limits;
pub mod memory;
pub mod ports;
pub mod quantity;
mod text;
pub mod usage;

pub use errno::errno_name;
