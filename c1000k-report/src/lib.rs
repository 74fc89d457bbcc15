//! The record of a run: what client and server write as JSON, how it is read again, and how its
//! figures are shown to people.
//!
//! For client and server:
//! - [`record`] holds the two records, [`ClientRecord`] and [`ServerRecord`].
//! - [`series`] keeps figures over time in a bounded number of points.
//! - [`destination`] is where `--json PATH` points.
//!
//! For the program `c1000k-report`, from what it reads to what it writes:
//! - [`run`] and [`snapshot`] read the folder of a run.
//! - [`cost`], [`trend`] and [`agree`] draw conclusions.
//! - [`summary`], [`export`], [`chart`] and [`compare`] show them, with all text of others [escaped](escape).

pub mod agree;
pub mod chart;
pub mod compare;
pub mod cost;
pub mod destination;
pub mod escape;
pub mod export;
mod input;
mod markdown;
pub mod record;
pub mod run;
pub mod series;
pub mod snapshot;
pub mod summary;
pub mod trend;

pub use destination::Destination;
pub use record::{ClientRecord, ServerRecord};
pub use series::Series;
