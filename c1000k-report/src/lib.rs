//! Reports on a run: its figures, charts, and whether client, server and kernel agree.
//!
//! In the order from input to output of the program `c1000k-report`:
//! - [`run`] and [`snapshot`] read the directory of a run.
//! - [`cost`], [`trend`], [`bottleneck`] and [`checks`] evaluate it; a [`Report`] has the results and the charts.
//! - [`verdict`], [`export`], [`chart`] and [`compare`] present them, with untrusted text [escaped](escape).

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
mod targets;
pub mod trend;
pub mod verdict;

pub use report::Report;
