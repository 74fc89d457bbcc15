//! The records that client and server write at the end of a run, one JSON object each.
//!
//! The names of the fields are stable: scripts and dashboards read them. Fields may be added, and
//! a record without the later ones still reads. A figure that could not be had is `null`, never
//! left out and never a made-up zero.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::input;

/// What `schema` says in a client's record.
pub const CLIENT_SCHEMA: &str = "c1000k.client/1";
/// What `schema` says in a server's record.
pub const SERVER_SCHEMA: &str = "c1000k.server/1";

/// What both records begin with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Head {
    /// The kind of record and its version: `c1000k.client/1` or `c1000k.server/1`.
    pub schema: String,
    /// The version of the program.
    #[serde(default)]
    pub version: String,
    /// The command as it was given.
    #[serde(default)]
    pub argv: Vec<String>,
    /// When the run began, in UTC, as RFC 3339 to the second.
    #[serde(default)]
    pub started_at: String,
}

/// What a client asked for, what it held and what stopped it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClientRecord {
    /// Its schema is [`CLIENT_SCHEMA`].
    #[serde(flatten)]
    pub head: Head,
    /// The connections asked for.
    pub target: u64,
    /// The connects that were started, retries included.
    pub attempted: u64,
    /// The most connections held at once.
    pub established: u64,
    /// The connections whose echo came back whole in the last pass; null where none was asked for.
    pub verified: Option<u64>,
    /// The connections given up.
    pub failed: u64,
    /// Failed connects, retried ones included: errno name to count.
    pub failures: BTreeMap<String, u64>,
    /// The connections that were established and then gone before the hold ended.
    pub lost: u64,
    /// What capped the run; null where nothing did.
    pub limit: Option<Limit>,
    /// From the first connect to the last connection established.
    pub ramp_seconds: f64,
    /// Established connections per second of the ramp.
    pub connects_per_second: f64,
    /// From a connect to its connection, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// Whether the target was reached and all that was asked for was proven.
    pub verdict: Verdict,

    /// The server's address and first port, or its Unix-domain socket (`unix:/run/server.sock`); several are separated
    /// by a comma and a space.
    #[serde(default)]
    pub destination: String,
    /// How many destination ports were used, of all targets together; 0 for a Unix-domain socket.
    #[serde(default)]
    pub ports: u64,
    /// The source addresses asked for; empty where the choice was the kernel's.
    #[serde(default)]
    pub sources: Vec<String>,
    /// How many connections each pass of echoes proved, in order.
    #[serde(default)]
    pub verified_passes: Vec<u64>,
    /// Connects that were tried again.
    #[serde(default)]
    pub retried: u64,
    /// Connections that the server refused or reset while they were being opened.
    #[serde(default)]
    pub refused_by_server: u64,
    /// How long all connections were held after the ramp.
    #[serde(default)]
    pub hold_seconds: f64,
    /// How long each pass of echoes took, in order.
    #[serde(default)]
    pub verify_seconds: Vec<f64>,
    /// Connections held over the time of the ramp, at most 3,600 points.
    #[serde(default)]
    pub ramp_series: Vec<RampPoint>,
    /// RLIMIT_NOFILE as the run had it; null where it could not be read.
    #[serde(default)]
    pub descriptors: Option<Descriptors>,
    /// A sentence for people on what capped the run and what raises it.
    #[serde(default)]
    pub limit_detail: Option<String>,
    /// When the most connections were held first, in UTC, as RFC 3339 to the millisecond; null where
    /// none were.
    #[serde(default)]
    pub held_from: Option<String>,
    /// Until when they were held at least: the end of the last pass of echoes, or of the hold.
    #[serde(default)]
    pub held_until: Option<String>,
    /// Where its sockets lived; null where it did not say.
    #[serde(default)]
    pub file_table: Option<FileTable>,
    /// The protocol that was spoken; empty where it did not say.
    #[serde(default)]
    pub protocol: String,
    /// Every connect latency, as a compressed HdrHistogram V2 in base64; null where nothing connected.
    #[serde(default)]
    pub connect_histogram: Option<String>,
    /// The messages during the hold; null where none were asked for.
    #[serde(default)]
    pub workload: Option<Workload>,
    /// What was closed and opened anew during the hold; null where none was asked for.
    #[serde(default)]
    pub churn: Option<Churn>,
    /// What was closed at once after the hold, and came back; null where none was asked for.
    #[serde(default)]
    pub storm: Option<Storm>,
    /// The thresholds that were asked for, in order.
    #[serde(default)]
    pub thresholds: Vec<Threshold>,
    /// The clients had no sockets: the program was their TCP, over a tun device.
    #[serde(default)]
    pub stateless: bool,
    /// Segments that stateless clients sent again; null where the kernel is the clients' TCP.
    #[serde(default)]
    pub retransmitted: Option<u64>,
    /// Bytes that stateless clients took: those of all connections, and of the most that ever waited for an answer
    /// at once; null for clients with sockets.
    #[serde(default)]
    pub state_bytes: Option<u64>,
    /// The most memory that the client ever had resident; null where it could not be read.
    #[serde(default)]
    pub rss_peak_bytes: Option<u64>,
    /// Processor time that the client spent in the program; null where it could not be read.
    #[serde(default)]
    pub cpu_user_seconds: Option<f64>,
    /// Processor time that it spent in the kernel.
    #[serde(default)]
    pub cpu_system_seconds: Option<f64>,
    /// Processor time of either kind that the ramp took; null where it could not be read.
    #[serde(default)]
    pub ramp_cpu_seconds: Option<f64>,
    /// The connects that could be under way at once; null where the record does not say.
    #[serde(default)]
    pub in_flight_max: Option<u64>,
    /// Whether a rate was asked for (`--rate`, `--stages`).
    #[serde(default)]
    pub has_rate: bool,
    /// The targets in the order of the command line, and the part of each; empty in records of earlier versions.
    #[serde(default)]
    pub targets: Vec<TargetRecord>,
}

/// One target's part of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TargetRecord {
    /// As it was given: `192.0.2.1`, `unix:/run/server.sock`, `wss://example.com/chat`.
    pub target: String,
    /// The connects that were started, retries included.
    pub attempted: u64,
    /// The most connections held at once.
    pub established: u64,
    /// The connections given up.
    pub failed: u64,
    /// The connections that were established and then gone before the hold ended.
    pub lost: u64,
}

/// Messages sent during the hold, at times that were fixed before.
///
/// Each message that was sent is answered, mismatched or unanswered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Workload {
    /// The connections that sent messages.
    pub connections: u64,
    /// The time between two messages of one connection.
    pub period_seconds: f64,
    /// How long messages were sent, and the last ones waited for.
    pub seconds: f64,
    /// The messages sent.
    pub sent: u64,
    /// Those whose answer came whole and in time.
    pub answered: u64,
    /// Those that were answered by other bytes.
    pub mismatched: u64,
    /// Those whose connection ended, or whose time ran out, before the answer was whole.
    pub unanswered: u64,
    /// Those sent after their time, because the connection still waited for the answer before.
    pub late: u64,
    /// Those never sent, because the connection waited for the answer before until the hold was over.
    #[serde(default)]
    pub skipped: u64,
    /// From the time a message was due to its answer, in microseconds.
    pub latency_us: LatencyUs,
    /// Every latency, as a compressed HdrHistogram V2 in base64; null where nothing was answered.
    pub histogram: Option<String>,
}

/// Connections that the client closed during the hold, one after the other, and opened anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Churn {
    /// The connections closed, by reset.
    pub closed: u64,
    /// Those of them that came back, verified where that was asked for.
    pub reopened: u64,
    /// From a connect to its connection, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// Every latency, as a compressed HdrHistogram V2 in base64; null where nothing connected.
    pub histogram: Option<String>,
}

/// Connections that the client closed all at once after the hold, and opened anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Storm {
    /// The connections closed, by reset.
    pub dropped: u64,
    /// Those of them that came back, verified where that was asked for.
    pub back: u64,
    /// From the first reset to the last.
    pub drop_seconds: f64,
    /// From then until the last connection was back.
    pub reopen_seconds: f64,
    /// From a connect to its connection, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// Every latency, as a compressed HdrHistogram V2 in base64; null where nothing connected.
    pub histogram: Option<String>,
}

/// A condition under which a run fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Threshold {
    /// As it was given: `echo.p99>50ms`.
    pub expression: String,
    /// What was measured, latencies in microseconds; null where nothing was, which does not pass.
    pub value: Option<f64>,
    /// Whether the condition did not hold.
    pub passed: bool,
}

/// What a server accepted, held and spent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServerRecord {
    /// Its schema is [`SERVER_SCHEMA`].
    #[serde(flatten)]
    pub head: Head,
    /// The connections accepted and kept.
    pub accepted: u64,
    /// The most connections open at once.
    pub peak: u64,
    /// The connections open when the record was made.
    pub open: u64,
    /// The connections turned away.
    pub refused: u64,
    /// The connections closed, by whichever side.
    pub closed: u64,
    /// Events that came for a connection already gone, and were dropped.
    pub stale_events: u64,
    /// Failed accepts: errno name to count.
    pub accept_errors: BTreeMap<String, u64>,
    /// Bytes of payload received.
    pub bytes_in: u64,
    /// Bytes of payload sent.
    pub bytes_out: u64,
    /// What the process grew by from start to peak, per connection: `rss_at_peak_bytes` less
    /// `rss_at_start_bytes`, by the connections open then. Null where it can't be determined.
    pub user_bytes_per_connection: Option<f64>,
    /// What one end of a connection costs the kernel: what its slabs grew by, per socket added, so
    /// that it is the same whether the other end lies in this kernel or not. Null where it can't be
    /// told.
    pub kernel_bytes_per_connection: Option<f64>,
    /// The most memory the process ever had resident, and at least each other figure of it here; null
    /// where it can't be determined.
    pub rss_peak_bytes: Option<u64>,
    /// Processor time spent in the program.
    pub cpu_user_seconds: f64,
    /// Processor time spent in the kernel on its behalf.
    pub cpu_system_seconds: f64,

    /// How long it ran.
    #[serde(default)]
    pub uptime_seconds: f64,
    /// The address it listened on.
    #[serde(default)]
    pub bind: String,
    /// The first of its ports.
    #[serde(default)]
    pub first_port: u16,
    /// How many ports it listened on.
    #[serde(default)]
    pub ports: u64,
    /// `echo` or `sink`.
    #[serde(default)]
    pub mode: String,
    /// The connections it was ready to hold.
    #[serde(default)]
    pub connections_max: u64,
    /// The reactor threads.
    #[serde(default)]
    pub threads: u64,
    /// How often accepting paused, for want of descriptors, memory or watches.
    #[serde(default)]
    pub accept_pauses: u64,
    /// The connections turned away: reason to count.
    #[serde(default)]
    pub refused_by: BTreeMap<String, u64>,
    /// The connections that ended before both sides had finished, by the server's rules or by TCP: reason to count.
    #[serde(default)]
    pub closed_by: BTreeMap<String, u64>,
    /// Lines of the log that were not read in time.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// What the memory guard saw and did; null where memory could not be read.
    #[serde(default)]
    pub memory_guard: Option<MemoryGuard>,
    /// How often the reactor woke from waiting.
    #[serde(default)]
    pub wakeups: u64,
    /// What each slab cache grew by from start to peak, in bytes in all: cache to bytes. The other
    /// ends are in it where they lie in this kernel. Null where the slabs may not be read.
    #[serde(default)]
    pub kernel_bytes_by_slab: Option<BTreeMap<String, u64>>,
    /// Those caches of a connection that the kernel shows under another's name: own name to the one
    /// in `/proc/slabinfo`.
    #[serde(default)]
    pub slabs_shown_as: BTreeMap<String, String>,
    /// Resident memory once all ports listened.
    #[serde(default)]
    pub rss_at_start_bytes: Option<u64>,
    /// Resident memory when the record was made.
    #[serde(default)]
    pub rss_now_bytes: Option<u64>,
    /// Resident memory when the most connections were open.
    #[serde(default)]
    pub rss_at_peak_bytes: Option<u64>,
    /// What the server expected to spend; null where it did not say.
    #[serde(default)]
    pub prediction: Option<Prediction>,
    /// What the kernel's own counters grew by during the run, under the kernel's names
    /// (`ListenOverflows`, `ListenDrops`); a counter that could not be read is not in it.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
    /// The server over time, at most 3,600 points.
    #[serde(default)]
    pub series: Vec<ServerPoint>,
    /// Where its sockets lived; null where it did not say.
    #[serde(default)]
    pub file_table: Option<FileTable>,
}

/// Where the sockets of a program live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileTable {
    /// Among the descriptors of the process, which RLIMIT_NOFILE bounds.
    Process,
    /// Among the registered files of an io_uring.
    Registered,
    /// A name that this version does not know.
    #[serde(other)]
    Other,
}

impl fmt::Display for FileTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Process => "process",
            Self::Registered => "registered",
            Self::Other => "other",
        })
    }
}

/// Percentiles of a latency in microseconds; null where nothing was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LatencyUs {
    /// The median.
    pub p50: Option<u64>,
    /// 90% were at most this.
    pub p90: Option<u64>,
    /// 99% were at most this.
    pub p99: Option<u64>,
    /// 99.9% were at most this.
    pub p999: Option<u64>,
    /// 99.99% were at most this.
    #[serde(default)]
    pub p9999: Option<u64>,
    /// The longest.
    pub max: Option<u64>,
}

/// What capped a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Limit {
    /// RLIMIT_NOFILE of the client, or the system's file table.
    Descriptors,
    /// No 5-tuple was left: ports times sources times destinations.
    Ports,
    /// The kernel had no memory for more sockets.
    Memory,
    /// fs.epoll.max_user_watches.
    Watches,
    /// The server refused more, or went away.
    Server,
    /// Connects timed out, or no route led to the server.
    Network,
    /// A person or a supervisor ended the run early.
    Interrupted,
    /// A name that this version does not know.
    #[serde(other)]
    Other,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Descriptors => "descriptors",
            Self::Ports => "ports",
            Self::Memory => "memory",
            Self::Watches => "watches",
            Self::Server => "server",
            Self::Network => "network",
            Self::Interrupted => "interrupted",
            Self::Other => "other",
        })
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The target was reached and everything asked for was verified.
    Reached,
    /// The target was held, and nothing was verified, as asked (`--no-verify`).
    Held,
    /// The run fell short of its target, or lost or could not prove a part of it.
    Short,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Reached => "reached",
            Self::Held => "held",
            Self::Short => "short",
        })
    }
}

/// RLIMIT_NOFILE; "unlimited" is the largest number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Descriptors {
    /// The limit in force.
    pub soft: u64,
    /// What it may be raised to.
    pub hard: u64,
}

/// One point of a client's ramp.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RampPoint {
    /// Since the first connect.
    pub seconds: f64,
    /// Connections held then.
    pub established: u64,
}

/// One point of a server's life.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServerPoint {
    /// Since the server began.
    pub seconds: f64,
    /// Connections open then.
    pub open: u64,
    /// Resident memory of the process.
    pub rss_bytes: Option<u64>,
    /// Memory of the kernel in sockets and what belongs to them.
    pub kernel_socket_bytes: Option<u64>,
    /// Processor time spent so far, in the program and in the kernel on its behalf.
    #[serde(default)]
    pub cpu_seconds: Option<f64>,
}

/// How a server kept from running out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryGuard {
    /// Whether it refused all new connections at the end.
    pub closed: bool,
    /// How often it stopped admitting.
    pub closings: u64,
    /// For how long in all.
    pub closed_seconds: f64,
    /// How often memory was looked at.
    pub looks: u64,
    /// What was to be kept free.
    pub reserve_bytes: u64,
    /// What was free at the last look.
    pub room_bytes: u64,
    /// The least that was free at any look.
    pub room_min_bytes: u64,
    /// What a connection was seen to take of it.
    pub bytes_per_connection: u64,
}

/// What a number of connections was expected to cost before the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Prediction {
    /// For this many connections.
    pub connections: u64,
    /// What the processes grow by.
    pub process_bytes: u64,
    /// What the kernel grows by for their ends on this machine; queued data comes on top.
    pub kernel_bytes: u64,
}

impl Prediction {
    /// Both together.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.kernel_bytes.saturating_add(self.process_bytes)
    }
}

impl Head {
    /// The head of this process's record.
    #[must_use]
    pub fn new(schema: &str, version: &str, started_at: SystemTime) -> Self {
        // Arguments need not be UTF-8, and `args` panics where one is not.
        let argv = std::env::args_os();
        Self {
            schema: schema.to_owned(),
            version: version.to_owned(),
            argv: argv.map(|argument| argument.to_string_lossy().into_owned()).collect(),
            started_at: humantime::format_rfc3339_seconds(started_at).to_string(),
        }
    }
}

impl ClientRecord {
    /// Reads a client's record from a file.
    ///
    /// # Errors
    /// The file can't be read, is no such record, or its `schema` is another.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let record: Self = read(path, CLIENT_SCHEMA)?;
        Ok(record)
    }

    /// From when until when the connections were held, at least; `None` where it can't be determined.
    ///
    /// A record without these fields says it to the second.
    #[must_use]
    pub fn held_between(&self) -> Option<(SystemTime, SystemTime)> {
        let time = |text: &str| humantime::parse_rfc3339(text).ok();
        if let (Some(from), Some(until)) = (&self.held_from, &self.held_until) {
            return Some((time(from)?, time(until)?));
        }
        let after = |time: SystemTime, seconds: f64| {
            time.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
        };
        let peak = after(time(&self.head.started_at)?, self.ramp_seconds)?;
        Some((after(peak, 1.0)?, after(peak, self.hold_seconds)?))
    }
}

/// A time of a record's, to the millisecond.
#[must_use]
pub fn time_text(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

impl ServerRecord {
    /// Reads a server's record from a file.
    ///
    /// # Errors
    /// The file can't be read, is no such record, or its `schema` is another.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let record: Self = read(path, SERVER_SCHEMA)?;
        Ok(record)
    }
}

/// `count / seconds`, and 0 where no time has passed.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a count below 2^53 is exact")]
pub fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// A record that could not be read.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// The file could not be read.
    Io(PathBuf, io::Error),
    /// The file is no JSON, or a field is missing or of another type.
    Malformed(PathBuf, serde_json::Error),
    /// The record is of another kind or a later version.
    Schema {
        /// The file.
        path: PathBuf,
        /// What its `schema` says.
        found: String,
        /// What was looked for.
        expected: &'static str,
    },
}

impl ReadError {
    /// Whether the file is simply not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io(_, error) if error.kind() == io::ErrorKind::NotFound)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(path, error) => write!(f, "cannot read {}: {error}", path.display()),
            Self::Malformed(path, error) => write!(
                f,
                "{} is not a whole record: {error}; it was cut off or changed, run again",
                path.display()
            ),
            Self::Schema { path, found, expected } => write!(
                f,
                "{} has schema {found:?} where {expected:?} is needed; \
                 give the file of the other program, or read it with a version that knows it",
                path.display()
            ),
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Malformed(_, error) => Some(error),
            Self::Schema { .. } => None,
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<T, ReadError> {
    let malformed = |error| ReadError::Malformed(path.to_owned(), error);
    let text = input::read(path, input::RECORD_BYTES_MAX)
        .map_err(|error| ReadError::Io(path.to_owned(), error))?;
    let head: Head = serde_json::from_slice(&text).map_err(malformed)?;
    if head.schema != expected {
        let path = path.to_owned();
        return Err(ReadError::Schema { path, found: head.schema, expected });
    }
    serde_json::from_slice(&text).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const OLD_CLIENT: &str = r#"{"schema": "c1000k.client/1", "target": 10, "attempted": 10,
        "established": 9, "verified": 9, "failed": 1, "failures": {"ECONNREFUSED": 1}, "lost": 0,
        "limit": "server", "ramp_seconds": 0.5, "connects_per_second": 18.0,
        "connect_latency_us": {"p50": 1, "p90": 2, "p99": 3, "p999": 4, "max": 5},
        "verdict": "short"}"#;
    const OLD_SERVER: &str = r#"{"schema": "c1000k.server/1", "accepted": 9, "peak": 9, "open": 0,
        "refused": 1, "closed": 9, "stale_events": 0, "accept_errors": {"EMFILE": 1},
        "bytes_in": 90, "bytes_out": 90, "user_bytes_per_connection": 24,
        "kernel_bytes_per_connection": null, "rss_peak_bytes": 2000000, "cpu_user_seconds": 0.1,
        "cpu_system_seconds": 0.2}"#;

    fn keys(text: &str) -> Vec<String> {
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).unwrap();
        object.keys().cloned().collect()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_client_record_of_the_contract_alone_reads() {
        let record = ClientRecord::read(file(OLD_CLIENT).path()).unwrap();
        assert_eq!(record.limit, Some(Limit::Server));
        assert_eq!(record.verdict, Verdict::Short);
        assert_eq!(record.ramp_series, []);
        assert_eq!(record.file_table, None);
        assert_eq!(record.descriptors, None);
    }

    #[test]
    fn a_server_record_of_the_contract_alone_reads() {
        let record = ServerRecord::read(file(OLD_SERVER).path()).unwrap();
        assert_eq!(record.user_bytes_per_connection, Some(24.0));
        assert_eq!(record.kernel_bytes_per_connection, None);
        assert_eq!(record.prediction, None);
        assert_eq!(record.file_table, None);
    }

    #[test]
    fn file_tables_have_their_stable_names_and_an_unknown_one_still_reads() {
        for table in [FileTable::Process, FileTable::Registered] {
            let name = serde_json::to_string(&table).unwrap();
            assert_eq!(name, format!("\"{table}\""));
            assert_eq!(serde_json::from_str::<FileTable>(&name).unwrap(), table);
        }
        assert_eq!(serde_json::from_str::<FileTable>("\"cloud\"").unwrap(), FileTable::Other);
    }

    #[test]
    fn every_field_is_written_and_an_absent_one_is_null() {
        let client: ClientRecord = serde_json::from_str(OLD_CLIENT).unwrap();
        let text = serde_json::to_string(&client).unwrap();
        for key in keys(OLD_CLIENT) {
            assert!(keys(&text).contains(&key), "{key}");
        }
        assert!(text.contains(r#""descriptors":null"#), "{text}");
        assert!(text.contains(r#""limit_detail":null"#), "{text}");

        let server: ServerRecord = serde_json::from_str(OLD_SERVER).unwrap();
        let text = serde_json::to_string(&server).unwrap();
        for key in keys(OLD_SERVER) {
            assert!(keys(&text).contains(&key), "{key}");
        }
        assert!(text.contains(r#""kernel_bytes_by_slab":null"#), "{text}");
        assert!(text.contains(r#""prediction":null"#), "{text}");
    }

    #[test]
    fn limits_have_their_stable_names_and_an_unknown_one_still_reads() {
        let all = [
            Limit::Descriptors,
            Limit::Ports,
            Limit::Memory,
            Limit::Watches,
            Limit::Server,
            Limit::Network,
            Limit::Interrupted,
        ];
        for limit in all {
            let name = serde_json::to_string(&limit).unwrap();
            assert_eq!(name, format!("\"{limit}\""));
            assert_eq!(serde_json::from_str::<Limit>(&name).unwrap(), limit);
        }
        assert_eq!(serde_json::from_str::<Limit>("\"moonlight\"").unwrap(), Limit::Other);
    }

    #[test]
    fn a_missing_file_a_cut_one_and_a_foreign_one_are_told_apart() {
        let missing = ClientRecord::read(Path::new("/nonexistent/client.json")).unwrap_err();
        assert!(missing.is_not_found(), "{missing}");

        let cut = ClientRecord::read(file(&OLD_CLIENT[..100]).path()).unwrap_err();
        assert!(matches!(cut, ReadError::Malformed(..)), "{cut}");
        assert_eq!(cut.to_string().lines().count(), 1);

        let foreign = ClientRecord::read(file(OLD_SERVER).path()).unwrap_err();
        assert!(matches!(foreign, ReadError::Schema { .. }), "{foreign}");
    }

    #[test]
    fn a_field_of_the_contract_that_is_missing_is_an_error() {
        let text = OLD_CLIENT.replace(r#""lost": 0,"#, "");
        let error = ClientRecord::read(file(&text).path()).unwrap_err();
        assert!(error.to_string().contains("lost"), "{error}");
    }

    #[test]
    fn a_timestamp_is_rfc_3339_in_utc() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        assert_eq!(Head::new(CLIENT_SCHEMA, "1", at).started_at, "2001-09-09T01:46:40Z");
    }

    #[test]
    fn the_hold_is_told_by_its_fields_and_else_to_the_second() {
        let mut record: ClientRecord = serde_json::from_str(OLD_CLIENT).unwrap();
        assert_eq!(record.held_between(), None, "it does not say when it began");
        record.head.started_at = "2001-09-09T01:46:40Z".to_owned();
        record.hold_seconds = 5.0;
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs_f64(1e9 + seconds);
        assert_eq!(record.held_between(), Some((at(1.5), at(5.5))));
        record.held_from = Some(time_text(at(0.75)));
        record.held_until = Some(time_text(at(6.25)));
        assert_eq!(record.held_between(), Some((at(0.75), at(6.25))));
        for absurd in [f64::NAN, -1.0, 1e300] {
            record.held_from = None;
            record.ramp_seconds = absurd;
            assert_eq!(record.held_between(), None);
        }
    }

    #[test]
    fn a_rate_over_no_time_is_zero() {
        assert!(per_second(5, 0.0).abs() < f64::EPSILON);
        assert!((per_second(5, 2.0) - 2.5).abs() < f64::EPSILON);
    }
}
