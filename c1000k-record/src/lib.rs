//! What a run writes down: the records of client and server, how they are written as JSON, and how they are read again.
//!
//! - [`ClientRecord`] and [`ServerRecord`] are the two records.
//! - [`schema`] has the shape of both as JSON Schema.
//! - [`series`] keeps figures over time in a bounded number of points.
//! - [`endpoint`] serves figures to Prometheus while a program runs.
//! - [`histogram`] writes and reads the histograms in them.
//! - [`output`] is where `--json PATH` points.
//! - [`input`] reads the files of a run, which anybody may have put there.

pub mod endpoint;
pub mod histogram;
pub mod input;
pub mod output;
mod record;
pub mod schema;
pub mod series;

pub use output::Output;
pub use record::{
    CLIENT_SCHEMA, Churn, ClientRecord, Descriptors, FileTable, Head, LatencyUs, Limit,
    MemoryGuard, Prediction, RampPoint, ReadError, SERVER_SCHEMA, ServerPoint, ServerRecord, Storm,
    TargetRecord, Threshold, Verdict, Workload, per_second, time_text,
};
pub use series::Series;
