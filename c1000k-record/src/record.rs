//! The records that client and server write at the end of a run, one JSON object each.
//!
//! The names of the fields are stable, because scripts and dashboards read them. Fields may be added, and older records
//! without them can still be read. A figure that is not known is `null`: it is never omitted, and never 0.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::input;

/// The value of `schema` in a client's record.
pub const CLIENT_SCHEMA: &str = "c1000k.client/1";
/// The value of `schema` in a server's record.
pub const SERVER_SCHEMA: &str = "c1000k.server/1";

/// The fields that both records have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Head {
    /// The kind of record and its version: `c1000k.client/1` or `c1000k.server/1`.
    pub schema: String,
    /// The version of the program.
    #[serde(default)]
    pub version: String,
    /// The command line.
    #[serde(default)]
    pub argv: Vec<String>,
    /// The start of the run: RFC 3339, in UTC, to the second.
    #[serde(default)]
    pub started_at: String,
}

/// The result of a client's run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClientRecord {
    /// The common fields; `schema` is [`CLIENT_SCHEMA`].
    #[serde(flatten)]
    pub head: Head,
    /// The requested connections, or the number that the limits allow.
    pub target: u64,
    /// Connects that were started, including retries.
    pub attempted: u64,
    /// The maximum of connections held at once.
    pub established: u64,
    /// Connections whose complete echo was received in the last pass; null with `--no-verify`.
    pub verified: Option<u64>,
    /// Connections that failed permanently.
    pub failed: u64,
    /// Failed connects, including retried ones: errno name to count.
    pub failures: BTreeMap<String, u64>,
    /// Connections that were established and ended before the hold did.
    pub lost: u64,
    /// What limited the run; null if nothing did.
    pub limit: Option<Limit>,
    /// Time from the first connect until the last connection was established.
    pub ramp_seconds: f64,
    /// Established connections per second of the ramp.
    pub connects_per_second: f64,
    /// Time from a connect until it was established, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// Whether the target was reached and verified.
    pub verdict: Verdict,

    /// The server's address and first port, or its Unix-domain socket (`unix:/run/server.sock`); several are separated
    /// by a comma and a space.
    #[serde(default)]
    pub destination: String,
    /// The number of destination ports, of all targets together; 0 for a Unix-domain socket.
    #[serde(default)]
    pub ports: u64,
    /// The source addresses; empty if the kernel chose.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Connections that each pass of echoes verified, in order.
    #[serde(default)]
    pub verified_passes: Vec<u64>,
    /// Connects that were retried.
    #[serde(default)]
    pub retried: u64,
    /// Connections that the server refused or reset before they were verified.
    #[serde(default)]
    pub refused_by_server: u64,
    /// How long all connections were held after the ramp.
    #[serde(default)]
    pub hold_seconds: f64,
    /// How long each pass of echoes took, in order.
    #[serde(default)]
    pub verify_seconds: Vec<f64>,
    /// The client over the time of the ramp; at most 3,600 points.
    #[serde(default)]
    pub ramp_series: Vec<RampPoint>,
    /// RLIMIT_NOFILE during the run; null if it could not be read.
    #[serde(default)]
    pub descriptors: Option<Descriptors>,
    /// A sentence about what limited the run, and the remedy.
    #[serde(default)]
    pub limit_detail: Option<String>,
    /// The time at which the maximum was first held: RFC 3339, in UTC, to the millisecond; null if no connection was
    /// held.
    #[serde(default)]
    pub held_from: Option<String>,
    /// The time until which they were held: the end of the last pass of echoes, or of the hold.
    #[serde(default)]
    pub held_until: Option<String>,
    /// The table that held its sockets; null in older records and for clients without sockets.
    #[serde(default)]
    pub file_table: Option<FileTable>,
    /// The protocol, as the scheme of the URL; empty in older records.
    #[serde(default)]
    pub protocol: String,
    /// All connect latencies, as a compressed HdrHistogram V2 in base64; null if nothing connected.
    #[serde(default)]
    pub connect_histogram: Option<String>,
    /// The messages during the hold; null if none were requested.
    #[serde(default)]
    pub workload: Option<Workload>,
    /// Connections that were closed and reopened during the hold; null without `--churn`.
    #[serde(default)]
    pub churn: Option<Churn>,
    /// Connections that were closed together after the hold and reopened; null without `--storm`.
    #[serde(default)]
    pub storm: Option<Storm>,
    /// The thresholds of `--fail-if`, in order.
    #[serde(default)]
    pub thresholds: Vec<Threshold>,
    /// Whether the clients had no sockets: the program itself was their TCP, over a tun device.
    #[serde(default)]
    pub stateless: bool,
    /// Segments that stateless clients retransmitted; null for clients with sockets.
    #[serde(default)]
    pub retransmitted: Option<u64>,
    /// Memory of stateless clients: of all connections, and of the maximum that waited for an answer at once; null
    /// for clients with sockets.
    #[serde(default)]
    pub state_bytes: Option<u64>,
    /// The maximum resident memory of the client; null if it could not be read.
    #[serde(default)]
    pub rss_peak_bytes: Option<u64>,
    /// Processor time of the client in user mode; null if it could not be read.
    #[serde(default)]
    pub cpu_user_seconds: Option<f64>,
    /// Processor time of the client in the kernel.
    #[serde(default)]
    pub cpu_system_seconds: Option<f64>,
    /// Processor time of both kinds during the ramp; null if it could not be read.
    #[serde(default)]
    pub ramp_cpu_seconds: Option<f64>,
    /// The maximum of connects in flight; null in older records.
    #[serde(default)]
    pub in_flight_max: Option<u64>,
    /// Whether a rate was given (`--rate`, `--stages`).
    #[serde(default)]
    pub has_rate: bool,
    /// The memory of one connection at the client's end, by layer; null for clients without sockets, and in older
    /// records.
    #[serde(default)]
    pub connection_bytes: Option<ConnectionBytes>,
    /// Growth of the client's process during the ramp, per connection; null if it could not be read.
    #[serde(default)]
    pub process_bytes_per_connection: Option<f64>,
    /// The client over the time after the ramp, until the end; at most 3,600 points.
    #[serde(default)]
    pub hold_series: Vec<RampPoint>,
    /// The processors of its machine; null if they could not be counted.
    #[serde(default)]
    pub processors: Option<u64>,
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
    /// The connections that failed permanently.
    pub failed: u64,
    /// The connections that were established and lost before the hold ended.
    pub lost: u64,
}

/// The memory of one connection at the client's end, by layer.
///
/// The layers of the process are the sizes of their types, so what they allocate is not included: TLS keeps its keys
/// and buffers on the heap. `process_bytes_per_connection` includes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ConnectionBytes {
    /// The kernel: growth of the slabs that connections use, per socket; null if the slabs can't be read.
    pub kernel: Option<f64>,
    /// The TLS session; 0 without TLS.
    pub tls: u64,
    /// The state of the protocol.
    pub protocol: u64,
    /// The reactor's slot, and the client's own state.
    pub client: u64,
}

/// Messages sent during the hold, on a fixed schedule.
///
/// Each message that was sent is answered, mismatched or unanswered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Workload {
    /// The connections that sent messages.
    pub connections: u64,
    /// The time between two messages of one connection.
    pub period_seconds: f64,
    /// Time from the first message until the last answer, or until it timed out.
    pub seconds: f64,
    /// The messages sent.
    pub sent: u64,
    /// Messages whose complete answer was received in time.
    pub answered: u64,
    /// Messages that were answered with other bytes.
    pub mismatched: u64,
    /// Messages whose connection ended, or that timed out, before the answer was complete.
    pub unanswered: u64,
    /// Messages sent after they were due, because the connection still waited for the previous answer.
    pub late: u64,
    /// Messages never sent, because the connection waited for the previous answer until the end of the hold.
    #[serde(default)]
    pub skipped: u64,
    /// Time from when a message was due until its answer, in microseconds.
    pub latency_us: LatencyUs,
    /// All latencies, as a compressed HdrHistogram V2 in base64; null if nothing was answered.
    pub histogram: Option<String>,
}

/// Connections that the client closed one by one during the hold and reopened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Churn {
    /// The connections closed, by reset.
    pub closed: u64,
    /// Connections that were established again, and verified unless `--no-verify` was given.
    pub reopened: u64,
    /// Time from a connect until it was established, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// All latencies, as a compressed HdrHistogram V2 in base64; null if nothing connected.
    pub histogram: Option<String>,
}

/// Connections that the client closed together after the hold and reopened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Storm {
    /// The connections closed, by reset.
    pub dropped: u64,
    /// Connections that were established again, and verified unless `--no-verify` was given.
    pub back: u64,
    /// Time from the first reset to the last.
    pub drop_seconds: f64,
    /// Time from then until the last connection was established again.
    pub reopen_seconds: f64,
    /// Time from a connect until it was established, in microseconds.
    pub connect_latency_us: LatencyUs,
    /// All latencies, as a compressed HdrHistogram V2 in base64; null if nothing connected.
    pub histogram: Option<String>,
}

/// A condition under which a run fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Threshold {
    /// The condition as it was given: `echo.p99>50ms`.
    pub expression: String,
    /// The measured value, latencies in microseconds; null if nothing was measured, which does not pass.
    pub value: Option<f64>,
    /// Whether the run passed: the condition is false.
    pub passed: bool,
}

/// The result of a server's run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServerRecord {
    /// The common fields; `schema` is [`SERVER_SCHEMA`].
    #[serde(flatten)]
    pub head: Head,
    /// Connections that were accepted and admitted.
    pub accepted: u64,
    /// The maximum of connections open at once.
    pub peak: u64,
    /// Connections open when the record was written.
    pub open: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// Connections that were closed by either side.
    pub closed: u64,
    /// Events for connections that had already ended, which were dropped.
    pub stale_events: u64,
    /// Failed accepts: errno name to count.
    pub accept_errors: BTreeMap<String, u64>,
    /// Bytes of payload received.
    pub bytes_in: u64,
    /// Bytes of payload sent.
    pub bytes_out: u64,
    /// Growth of the process from start to peak, per connection: (`rss_at_peak_bytes` - `rss_at_start_bytes`) /
    /// connections open then. Null if it could not be measured.
    pub user_bytes_per_connection: Option<f64>,
    /// Kernel memory of one end of a connection: growth of the slabs per added socket, so that it is the same whether
    /// the other end is in this kernel or not. Null if it could not be measured.
    pub kernel_bytes_per_connection: Option<f64>,
    /// The maximum resident memory of the process, at least the largest sample; null if it could not be measured.
    pub rss_peak_bytes: Option<u64>,
    /// Processor time in user mode.
    pub cpu_user_seconds: f64,
    /// Processor time in the kernel on behalf of the process.
    pub cpu_system_seconds: f64,

    /// How long the server ran.
    #[serde(default)]
    pub uptime_seconds: f64,
    /// The address that the server listened on.
    #[serde(default)]
    pub bind: String,
    /// The first port.
    #[serde(default)]
    pub first_port: u16,
    /// The number of ports.
    #[serde(default)]
    pub ports: u64,
    /// `echo` or `sink`.
    #[serde(default)]
    pub mode: String,
    /// The maximum of connections that the server would admit.
    #[serde(default)]
    pub connections_max: u64,
    /// The number of reactor threads.
    #[serde(default)]
    pub threads: u64,
    /// How often accepting paused because descriptors, memory or epoll watches ran out.
    #[serde(default)]
    pub accept_pauses: u64,
    /// Connections that were refused: reason to count.
    #[serde(default)]
    pub refused_by: BTreeMap<String, u64>,
    /// Connections that ended before both sides had finished, because of the server's rules or TCP: reason to count.
    #[serde(default)]
    pub closed_by: BTreeMap<String, u64>,
    /// Log lines that were dropped because they were not read in time.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// The memory guard; null if memory could not be read.
    #[serde(default)]
    pub memory_guard: Option<MemoryGuard>,
    /// How often `epoll_wait` returned.
    #[serde(default)]
    pub wakeups: u64,
    /// Growth of each slab cache from start to peak: cache to bytes in all. The other ends of the connections are
    /// included if they are in this kernel. Null if the slabs can't be read.
    #[serde(default)]
    pub kernel_bytes_by_slab: Option<BTreeMap<String, u64>>,
    /// Slab caches that the kernel has merged and shows under another name: original name to the name in
    /// `/proc/slabinfo`.
    #[serde(default)]
    pub slabs_shown_as: BTreeMap<String, String>,
    /// Resident memory before the first connection.
    #[serde(default)]
    pub rss_at_start_bytes: Option<u64>,
    /// Resident memory when the record was written.
    #[serde(default)]
    pub rss_now_bytes: Option<u64>,
    /// Resident memory with the most connections.
    #[serde(default)]
    pub rss_at_peak_bytes: Option<u64>,
    /// The predicted memory; null in older records.
    #[serde(default)]
    pub prediction: Option<Prediction>,
    /// Growth of the kernel's counters during the run, by the kernel's names (`ListenOverflows`, `ListenDrops`);
    /// without those that could not be read.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
    /// The server over time, at most 3,600 points.
    #[serde(default)]
    pub series: Vec<ServerPoint>,
    /// The table that held its sockets; null in older records.
    #[serde(default)]
    pub file_table: Option<FileTable>,
    /// The processors of its machine; null if they could not be counted.
    #[serde(default)]
    pub processors: Option<u64>,
}

/// The table that holds the sockets of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileTable {
    /// The descriptor table of the process, which RLIMIT_NOFILE bounds.
    Process,
    /// Tables of registered files of io_uring.
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

/// Percentiles of a latency in microseconds; null if nothing was measured.
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
    /// The maximum.
    pub max: Option<u64>,
}

/// What limited a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Limit {
    /// RLIMIT_NOFILE of the client, or the system's file table.
    Descriptors,
    /// 5-tuples: local ports times source addresses times destination ports.
    Ports,
    /// The kernel's memory for sockets.
    Memory,
    /// fs.epoll.max_user_watches.
    Watches,
    /// The server refused connections, or went away.
    Server,
    /// Connects timed out, or there was no route to the server.
    Network,
    /// A signal ended the run early.
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
    /// The target was reached and verified.
    Reached,
    /// The target was held, and not verified (`--no-verify`).
    Held,
    /// The run did not reach its target, or connections were lost or not verified.
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
    /// The soft limit.
    pub soft: u64,
    /// The hard limit, to which the soft one may be raised.
    pub hard: u64,
}

/// One point of a client's ramp, or of the time after it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RampPoint {
    /// Time since the first connect.
    pub seconds: f64,
    /// Connections held.
    pub established: u64,
    /// Failed attempts so far: errno name to count; null in older records.
    #[serde(default)]
    pub failures: Option<BTreeMap<String, u64>>,
    /// Connections lost so far; null in older records.
    #[serde(default)]
    pub lost: Option<u64>,
    /// The median latency of the connects that completed just before, in microseconds; null if there were none.
    #[serde(default)]
    pub connect_p50_us: Option<u64>,
    /// The latency that 99% of them did not exceed.
    #[serde(default)]
    pub connect_p99_us: Option<u64>,
    /// Processor time of the process so far, in user mode and in the kernel; null if unknown.
    #[serde(default)]
    pub cpu_seconds: Option<f64>,
    /// Time that the processors of the machine have been busy since it started, in all; null if unknown.
    #[serde(default)]
    pub machine_busy_seconds: Option<f64>,
    /// The part of it in soft interrupts, in which the kernel handles packets.
    #[serde(default)]
    pub machine_softirq_seconds: Option<f64>,
}

/// One point of a server's life.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServerPoint {
    /// Time since the server started.
    pub seconds: f64,
    /// Open connections.
    pub open: u64,
    /// Resident memory of the process.
    pub rss_bytes: Option<u64>,
    /// Kernel memory of sockets and their files; if the slabs can't be read, only of queued data.
    pub kernel_socket_bytes: Option<u64>,
    /// Processor time of the process so far, in user mode and in the kernel; null if unknown.
    #[serde(default)]
    pub cpu_seconds: Option<f64>,
    /// Time that the processors of the machine have been busy since it started, in all; null if unknown.
    #[serde(default)]
    pub machine_busy_seconds: Option<f64>,
    /// The part of it in soft interrupts, in which the kernel handles packets.
    #[serde(default)]
    pub machine_softirq_seconds: Option<f64>,
    /// Connections refused so far: reason to count; null in older records.
    #[serde(default)]
    pub refused_by: Option<BTreeMap<String, u64>>,
}

/// The memory guard, which keeps a server from running out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryGuard {
    /// Whether it admitted no connections at the end.
    pub closed: bool,
    /// How often it stopped admitting connections.
    pub closings: u64,
    /// For how long, in all.
    pub closed_seconds: f64,
    /// The number of samples.
    pub looks: u64,
    /// The memory to be kept free.
    pub reserve_bytes: u64,
    /// Free memory at the last sample.
    pub room_bytes: u64,
    /// The minimum of free memory in all samples.
    pub room_min_bytes: u64,
    /// The memory of a connection, as measured.
    pub bytes_per_connection: u64,
}

/// The memory that a number of connections was expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Prediction {
    /// The number of connections.
    pub connections: u64,
    /// Growth of the processes.
    pub process_bytes: u64,
    /// Growth of the kernel's memory for their ends on this machine, without queued data.
    pub kernel_bytes: u64,
}

impl Prediction {
    /// The sum of both.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.kernel_bytes.saturating_add(self.process_bytes)
    }
}

impl Head {
    /// The head of this process's record.
    #[must_use]
    pub fn new(schema: &str, version: &str, started_at: SystemTime) -> Self {
        // Arguments need not be UTF-8, and `args` panics if one is not.
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
    /// The file can't be read, is not such a record, or has another `schema`.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let record: Self = read(path, CLIENT_SCHEMA)?;
        let times = [record.ramp_seconds, record.hold_seconds];
        let cpu = [record.cpu_user_seconds, record.cpu_system_seconds, record.ramp_cpu_seconds];
        let passes = record.verify_seconds.iter().copied();
        check_times(path, times.into_iter().chain(cpu.into_iter().flatten()).chain(passes))?;
        Ok(record)
    }

    /// The time from and until which the connections were held; `None` if it is not known.
    ///
    /// For older records it is calculated to the second.
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

/// A time as a record has it, to the millisecond.
#[must_use]
pub fn time_text(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

impl ServerRecord {
    /// Reads a server's record from a file.
    ///
    /// # Errors
    /// The file can't be read, is not such a record, or has another `schema`.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let record: Self = read(path, SERVER_SCHEMA)?;
        let times = [record.uptime_seconds, record.cpu_user_seconds, record.cpu_system_seconds];
        check_times(path, times)?;
        Ok(record)
    }
}

/// `count / seconds`; 0 if no time has passed.
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
    /// The file is not JSON, or a field is missing or of another type.
    Malformed(PathBuf, serde_json::Error),
    /// A time is negative or not finite.
    Implausible(PathBuf, f64),
    /// The record is of another program or a later version.
    Schema {
        /// The file.
        path: PathBuf,
        /// Its `schema`.
        found: String,
        /// The expected `schema`.
        expected: &'static str,
    },
}

impl ReadError {
    /// Whether the file does not exist.
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
                "{} is not a complete record: {error}; it was truncated or changed, run again",
                path.display()
            ),
            Self::Implausible(path, found) => write!(
                f,
                "{} is not a valid record: it has a time of {found:e} s; it was changed, run again",
                path.display()
            ),
            Self::Schema { path, found, expected } => write!(
                f,
                "{} has schema {found:?} instead of {expected:?}; \
                 use the record of the other program, or use a version that supports it",
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
            Self::Implausible(..) | Self::Schema { .. } => None,
        }
    }
}

/// Refuses times that no run has.
fn check_times(path: &Path, times: impl IntoIterator<Item = f64>) -> Result<(), ReadError> {
    let is_plausible = |time: &f64| time.is_finite() && *time >= 0.0;
    match times.into_iter().find(|time| !is_plausible(time)) {
        Some(time) => Err(ReadError::Implausible(path.to_owned(), time)),
        None => Ok(()),
    }
}

fn read<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<T, ReadError> {
    let malformed = |error| ReadError::Malformed(path.to_owned(), error);
    let text = input::read(path, input::RECORD_BYTES_MAX)
        .map_err(|error| ReadError::Io(path.to_owned(), error))?;
    let is_object = text.trim_ascii_start().starts_with(b"{");
    if !is_object && serde_json::from_slice::<serde::de::IgnoredAny>(&text).is_ok() {
        return Err(malformed(serde::de::Error::custom("it is not a JSON object")));
    }
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
        assert_eq!((record.connection_bytes, record.process_bytes_per_connection), (None, None));
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
    fn a_missing_file_a_truncated_one_and_one_of_another_schema_are_distinguished() {
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
    fn impossible_times_are_refused_in_one_line() {
        for new in [
            r#""ramp_seconds": -0.5"#,
            r#""ramp_seconds": 0.5, "hold_seconds": -1"#,
            r#""ramp_seconds": 0.5, "verify_seconds": [0.1, -1]"#,
        ] {
            let text = OLD_CLIENT.replace(r#""ramp_seconds": 0.5"#, new);
            let error = ClientRecord::read(file(&text).path()).unwrap_err();
            assert!(matches!(error, ReadError::Implausible(..)), "{new}: {error}");
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        let text = OLD_SERVER.replace(r#""cpu_user_seconds": 0.1"#, r#""cpu_user_seconds": -1"#);
        let error = ServerRecord::read(file(&text).path()).unwrap_err();
        assert!(matches!(error, ReadError::Implausible(..)), "{error}");
    }

    #[test]
    fn json_that_is_no_object_is_refused_without_a_types_name() {
        for text in ["[]", "7", "null", "\"x\""] {
            let error = ClientRecord::read(file(text).path()).unwrap_err().to_string();
            assert!(
                error.contains("it is not a JSON object") && !error.contains("struct"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_timestamp_is_rfc_3339_in_utc() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        assert_eq!(Head::new(CLIENT_SCHEMA, "1", at).started_at, "2001-09-09T01:46:40Z");
    }

    #[test]
    fn the_hold_is_known_by_its_fields_and_else_to_the_second() {
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
