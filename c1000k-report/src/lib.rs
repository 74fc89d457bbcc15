//! The record of a run: what client and server write as JSON, how it is read again, and how its
//! figures are shown to people.
//!
//! - [`record`] holds the two records, [`ClientRecord`] and [`ServerRecord`].
//! - [`series`] keeps figures over time in a bounded number of points.
//! - [`destination`] is where `--json PATH` points.
//! - [`format`] turns counts, bytes, durations and rates into text.

pub mod destination;
pub mod format;
pub mod record;
pub mod series;

pub use destination::Destination;
pub use record::{ClientRecord, ServerRecord};
pub use series::Series;
