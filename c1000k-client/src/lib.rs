//! Opens many connections to a server, verifies each of them, holds them, and reports what limited their number.
//!
//! The program is [`run_command`]. For other programs a [`Client`] is the handler of a [`reactor::Reactor`]: it runs the
//! phases over the routes of a [`Plan`], with a [`Protocol`](protocols::Protocol), and counts in a [`RunStats`].
//!
//! - A new protocol is a file in `protocols/` and a line in its `mod.rs`; its URL scheme is in `address.rs`.
//! - A new phase is a file in `phases/` and a line in the list of its `mod.rs`; a workload of the hold is a file in
//!   `phases/hold/`. `CONTRIBUTING.md` names the other places.

mod address;
mod alarm;
mod args;
mod command;
mod destination;
mod exposition;
mod failures;
mod hdr;
mod latency;
mod opening;
mod pacing;
mod phases;
mod plan;
mod progress;
pub mod protocols;
mod run;
mod schedule;
mod stateless;
mod stats;
mod summary;
mod target;
mod target_stats;
mod threshold;
mod usage;
mod verdict;

pub use command::run_command;
pub use destination::Destination;
pub use failures::Failures;
pub use pacing::Stage;
pub use plan::Plan;
pub use progress::Progress;
pub use run::{Client, Conn, Server, Settings};
pub use schedule::{Pace, Workload};
pub use stats::{RunStats, Stop};
pub use target_stats::TargetStats;

/// For the fuzz target of stateless clients.
#[cfg(fuzzing)]
pub use stateless::fuzz::play_packets;

/// The code in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct ReadmeExample;
