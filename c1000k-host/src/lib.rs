//! What a machine allows a process that holds very many TCP connections, and what they cost it.
//!
//! - [`quantity`] reads counts, sizes and durations as people type them.
//! - [`mod@format`] turns counts, bytes, durations and rates into text for people.
//! - [`limits`] knows descriptor limits and raises them.
//! - [`ports`] does the 5-tuple arithmetic of outbound connections.
//! - [`memory`] tells how much room is left, in the machine and in every enclosing cgroup.
//! - [`usage`] samples what this process, its sockets and the kernel's slabs use.
//! - [`command_line`] and [`errno_name`] are what both programs say in the same words.
//! - [`check`] holds a target against all of this, and names what caps it.
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
