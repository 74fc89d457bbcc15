//! The results of a run: the records of client and server, and how they are written as JSON and read again.
//!
//! - [`ClientRecord`] and [`ServerRecord`] are the two records.
//! - [`schema`] describes both as JSON Schema.
//! - [`series`] keeps a time series in a bounded number of points.
//! - [`endpoint`] serves metrics to Prometheus while a program runs.
//! - [`histogram`] writes and reads the histograms in them.
//! - [`output`] writes them to the file of `--json PATH`.
//! - [`input`] reads the files of a run, which any user may have put there.

pub mod endpoint;
pub mod histogram;
pub mod input;
pub mod output;
mod record;
pub mod schema;
pub mod series;

pub use output::Output;
pub use record::{
    CLIENT_SCHEMA, Churn, ClientRecord, ConnectionBytes, Descriptors, FileTable, Head, LatencyUs,
    Limit, MemoryGuard, Prediction, RampPoint, ReadError, SERVER_SCHEMA, ServerPoint, ServerRecord,
    Storm, TargetRecord, Threshold, Verdict, Workload, per_second, time_text,
};
pub use series::Series;
