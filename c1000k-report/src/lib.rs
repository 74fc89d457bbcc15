//! How the figures of a run are shown to people, and whether its client, its server and the kernel agree on them.
//!
//! From what the program `c1000k-report` reads to what it writes:
//! - [`run`] and [`snapshot`] read the folder of a run.
//! - [`cost`], [`trend`] and [`checks`] draw conclusions, which a [`Report`] has together with the charts.
//! - [`verdict`], [`export`], [`chart`] and [`compare`] show them, with all text of others [escaped](escape).

pub mod bottleneck;
pub mod chart;
pub mod checks;
pub mod compare;
pub mod cost;
pub mod escape;
pub mod export;
mod report;
pub mod run;
pub mod snapshot;
mod table;
pub mod trend;
pub mod verdict;

pub use report::Report;
