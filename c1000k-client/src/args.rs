//! The command line: [`Typed`] as clap reads it, [`Arguments`] after validation.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use c1000k_host::check::{CheckArgs, FileTableArgs, FileTableChoice};
use c1000k_host::command_line::{
    self, OutputArgs, SHORT, USAGE, ZonedIp, is_of_many, parse_port, split_zone, with_zone,
};
use c1000k_host::format;
use c1000k_host::quantity::{parse_bytes, parse_count, parse_duration, parse_rate};
use c1000k_record::endpoint::Endpoint;
use c1000k_record::{Output, input};
use clap::Parser;
use ipnet::{IpAddrRange, IpNet, Ipv4AddrRange, Ipv4Net, Ipv6AddrRange};

use crate::address::{Host, Scheme, TargetAddress};
use crate::destination::Destination;
use crate::pacing::Stage;
use crate::protocols::{Message, Trust};
use crate::schedule::{Pace, STEP, Workload};
use crate::stateless;
use crate::threshold::Condition;

/// The maximum number of targets.
const TARGETS_MAX: usize = 256;
/// The maximum number of source addresses.
const SOURCES_MAX: usize = 65_536;
/// The maximum of source addresses times destination ports: the plan keeps a few bytes for each pair.
const PAIRS_MAX: usize = 1 << 22;
/// The maximum of `--in-flight`.
const IN_FLIGHT_MAX: u64 = 65_536;
/// The default of `--in-flight` for each destination port.
const IN_FLIGHT_PER_PORT: u64 = 64;
/// The maximum of the default of `--in-flight`.
const IN_FLIGHT_DEFAULT_MAX: u64 = 1_024;
/// The default first port.
const FIRST_PORT: u16 = 9900;
/// The default number of destination ports.
const PORTS: u64 = 100;
/// The default duration of the hold.
const HOLD: Duration = Duration::from_secs(5);
/// The client's timestamps wrap around after 71 minutes.
const HEARTBEAT_MAX: Duration = Duration::from_secs(3600);
/// The bound of a connection's write queue.
const MESSAGE_BYTES_MAX: u64 = 256 * 1024;
/// The maximum of most durations: a day.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// The arguments after validation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Arguments {
    /// At least one.
    pub(crate) targets: Vec<TargetArgs>,
    pub(crate) scheme: Scheme,
    /// Which certificates are accepted, for a scheme with TLS.
    pub(crate) trust: Trust,
    /// Ports of each target that has ports.
    pub(crate) ports: u16,
    /// `None`: up to 1,000,000, as the limits allow.
    pub(crate) connections: Option<u64>,
    /// Empty: the kernel chooses.
    pub(crate) sources: Vec<ZonedIp>,
    /// Empty: as fast as possible.
    pub(crate) stages: Vec<Stage>,
    pub(crate) in_flight_max: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) hold: Duration,
    pub(crate) verify: bool,
    /// The messages sent during the hold.
    pub(crate) workload: Option<Workload>,
    pub(crate) churn_per_second: Option<u64>,
    pub(crate) storm: bool,
    /// `None`: the protocol's own heartbeat.
    pub(crate) message: Option<MessageChoice>,
    pub(crate) fail_if: Vec<Condition>,
    pub(crate) hdr: Option<PathBuf>,
    pub(crate) file_table: FileTableChoice,
    pub(crate) json: Option<Output>,
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) check: CheckArgs,
    /// The number of sources that a check assumes.
    pub(crate) sources_unlisted: Option<u64>,
    /// For clients without sockets.
    pub(crate) stateless: Option<stateless::Setup>,
}

/// One target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TargetArgs {
    /// As typed.
    pub(crate) text: String,
    /// `tcp`, `unix`, `http+unix`.
    pub(crate) protocol: String,
    pub(crate) destination: Destination,
    /// Host and port, for HTTP requests.
    pub(crate) authority: String,
    /// The host as typed, without the port.
    pub(crate) host: String,
    /// Path and query of a request.
    pub(crate) path: String,
}

impl Arguments {
    pub(crate) fn destinations(&self) -> impl Iterator<Item = &Destination> {
        self.targets.iter().map(|target| &target.destination)
    }

    /// Number of addresses to connect to: each port of an IP address is one.
    pub(crate) fn endpoints(&self) -> u64 {
        self.destinations().map(|to| u64::from(to.endpoints())).sum()
    }

    /// The protocol for the record.
    pub(crate) fn protocol(&self) -> &str {
        let first = self.targets.first().map_or("", |target| target.protocol.as_str());
        let is_same = self.targets.iter().all(|target| target.protocol == first);
        if is_same { first } else { self.scheme.name() }
    }
}

/// Reads the command line.
///
/// # Errors
/// The exit code, after the help, the version or an error was printed.
pub(crate) fn parse() -> Result<Arguments, ExitCode> {
    let typed = command_line::parse_and_start_log::<Typed>()?;
    typed.validate().map_err(|refusal| command_line::fail(refusal.code, &refusal.line))
}

/// Why the run is refused, and the exit code.
#[derive(Debug)]
pub(crate) struct Refusal {
    code: u8,
    line: String,
}

impl From<String> for Refusal {
    fn from(line: String) -> Self {
        Self { code: USAGE, line }
    }
}

/// A check needs no target, which clap can't show.
const USAGES: &str = "\
c1000k-client [OPTIONS] <TARGET>... [FIRST_PORT]
       c1000k-client [OPTIONS] --check [TARGET]... [FIRST_PORT]";

const EXAMPLES: &str = "\
Examples:
  c1000k-client 192.0.2.1                     1M connections, to ports 9900 to 9999
  c1000k-client localhost:9900 --ports 1 -c 10k --hold 1m
  c1000k-client 192.0.2.1 -c 1M --source 192.0.2.16-192.0.2.31 --rate 20k/s
  c1000k-client tcp://[fe80::1%eth0]:9900 -c 1000 --json run.json
  c1000k-client 192.0.2.1 --heartbeat 60s --hold 5m --fail-if 'echo.p99>50ms'
  c1000k-client wss://chat.example.com/room -c 100k --heartbeat 30s --churn 100/s
  c1000k-client unix:/run/server.sock -c 100k
  c1000k-client 192.0.2.1 192.0.2.2 192.0.2.3 -c 3M
  c1000k-client 192.0.2.1 --check -c 1M       what this machine allows, without a run";

/// Opens many connections to a server, verifies each by an echo, holds them, verifies them again, and names the limit
/// that it reached.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
#[command(override_usage = USAGES)]
struct Typed {
    #[arg(
        help = "The server: an address or a name, HOST:PORT, [IPV6]:PORT, a Unix-domain socket (unix:PATH), or a URL \
                  with the protocol: tcp, tls, http, https, ws, wss, mqtt, mqtts, redis (over a Unix-domain socket: \
                  http+unix:PATH). Several targets share the connections evenly. A number after the last one is \
                  FIRST_PORT, the first of the server's ports [default: 9900]. May be left out with --check"
    )]
    #[arg(value_name = "TARGET", value_parser = Word::parse, num_args = 1..)]
    #[arg(required_unless_present_any = ["check", "generate", "port"])]
    words: Vec<Word>,

    /// Connections to open, such as 15000, 10k or 1M [default: 1M, or what the limits allow]
    #[arg(short, long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    connections: Option<u64>,

    /// Number of destination ports, from FIRST_PORT on [default: 100; 1 if the URL's protocol has a standard port]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    ports: Option<u64>,

    /// Source addresses: single addresses, ranges a-b and CIDR blocks, separated by commas [default: the kernel chooses]
    #[arg(long, value_name = "LIST")]
    source: Option<String>,

    /// Maximum rate of new connections, per second [default: unlimited]
    #[arg(long, value_name = "N", value_parser = parse_rate, allow_hyphen_values = true)]
    rate: Option<u64>,

    /// The rates of the ramp, such as 10k/s:1m,0:30s,20k/s:1m; the last rate continues until all connections are open
    #[arg(long, value_name = "RATE:DURATION,...", value_parser = parse_stage, value_delimiter = ',')]
    #[arg(conflicts_with = "rate")]
    stages: Vec<Stage>,

    /// Maximum number of connects in flight [default: 64 per port, at most 1024]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    in_flight: Option<u64>,

    /// How long a connect, or an echo, may take
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration, allow_hyphen_values = true)]
    connect_timeout: Duration,

    /// How long all connections are held after the ramp [default: 5s; with --heartbeat, one interval]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    hold: Option<Duration>,

    /// Skip the echo that verifies each connection
    #[arg(long)]
    no_verify: bool,

    /// The server's certificate authority, for protocols over TLS [default: those that this machine trusts]
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    ca: Option<PathBuf>,

    /// Accept any certificate
    #[arg(long)]
    insecure: bool,

    #[command(flatten)]
    file_table: FileTableArgs,

    /// Write the record of the run to this file on exit (- is standard output)
    #[arg(long, value_name = "PATH", value_parser = Output::parse)]
    json: Option<Output>,

    /// Serve metrics for Prometheus at /metrics of this address; a port alone means 127.0.0.1:PORT
    #[arg(long, value_name = "ADDR", value_parser = Endpoint::parse_address)]
    metrics: Option<SocketAddr>,

    #[command(flatten)]
    check: CheckArgs,

    /// With --check: the number of source addresses, which need not exist, instead of --source
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    #[arg(requires = "check", conflicts_with = "source")]
    sources: Option<u64>,

    /// A flag of many other programs, which the error explains
    #[arg(long, hide = true, value_name = "PORT", num_args = 0..=1, default_missing_value = "9900")]
    port: Option<String>,

    #[command(flatten)]
    workload: WorkloadArgs,

    #[command(flatten)]
    stateless: StatelessArgs,

    #[command(flatten)]
    output: OutputArgs,
}

/// TARGET or FIRST_PORT: no target consists of digits alone.
#[derive(Clone, Debug)]
enum Word {
    Target { text: String, address: TargetAddress },
    FirstPort(u16),
}

impl Word {
    fn parse(text: &str) -> Result<Self, String> {
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            return parse_port(text).map(Self::FirstPort);
        }
        let address = TargetAddress::parse(text)?;
        Ok(Self::Target { text: text.to_owned(), address })
    }
}

impl AsRef<OutputArgs> for Typed {
    fn as_ref(&self) -> &OutputArgs {
        &self.output
    }
}

/// The messages that are sent during the hold.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Workload")]
struct WorkloadArgs {
    /// During the hold, each connection sends one message per interval, spread evenly over the connections
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    #[arg(conflicts_with_all = ["message_rate", "no_verify"])]
    heartbeat: Option<Duration>,

    /// Messages per second during the hold, sent by the connections in turn
    #[arg(long, value_name = "N", value_parser = parse_rate, allow_hyphen_values = true)]
    #[arg(conflicts_with = "no_verify")]
    message_rate: Option<u64>,

    /// Percentage of the connections that send messages during the hold [default: 100%]
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, allow_hyphen_values = true)]
    active: Option<f64>,

    /// Send messages of this size, to a server that echoes them
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, allow_hyphen_values = true)]
    #[arg(conflicts_with_all = ["message", "no_verify"])]
    message_size: Option<u64>,

    /// Send this text, or the contents of a file, as each message; \r, \n, \t, \0, \xHH and \\ are escapes
    #[arg(long, value_name = "TEXT|@FILE", value_parser = parse_text)]
    #[arg(conflicts_with = "no_verify")]
    message: Option<Text>,

    /// The server's answer to --message [default: the same text]
    #[arg(long, value_name = "TEXT|@FILE", value_parser = parse_text, requires = "message")]
    expect: Option<Text>,

    /// Connections per second that are closed by reset and reopened during the hold
    #[arg(long, value_name = "N", value_parser = parse_rate, allow_hyphen_values = true)]
    churn: Option<u64>,

    /// After the hold, close all connections at once and reopen them
    #[arg(long)]
    storm: bool,

    /// Exit with 1 if this is true at the end: 'echo.p99>50ms', 'connect.p999>1s', 'lost>0'; repeatable
    #[arg(long, value_name = "EXPR", value_parser = Condition::parse, allow_hyphen_values = true)]
    fail_if: Vec<Condition>,

    /// Write the latencies to this file: as a log of HdrHistogram with one interval per second, or with the extension
    /// .hgrm as percentiles
    #[arg(long, value_name = "FILE")]
    hdr: Option<PathBuf>,
}

/// Clients without sockets.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Stateless clients")]
struct StatelessArgs {
    /// Simulate the clients over a tun device, without sockets; needs root, or a user and network namespace
    #[arg(long, conflicts_with_all = ["source", "sources"])]
    stateless: bool,

    /// The clients' addresses; the first one is the device's, where a server on this machine is reached
    #[arg(long, value_name = "CIDR", requires = "stateless", default_value = "198.18.0.0/15")]
    stateless_prefix: Ipv4Net,

    /// For tests: the percentage of packets that are dropped, in both directions
    #[arg(long, hide = true, value_name = "PERCENT", requires = "stateless", value_parser = parse_percent)]
    stateless_loss: Option<f64>,
}

impl StatelessArgs {
    /// The addresses of server and clients.
    fn setup(
        &self,
        scheme: Scheme,
        targets: &[TargetArgs],
        ports: u16,
        connections: Option<u64>,
    ) -> Result<Option<stateless::Setup>, String> {
        if !self.stateless {
            return Ok(None);
        }
        let [target] = targets else {
            return Err(
                "--stateless takes one target: run one client for each, with separate values of \
                        --stateless-prefix"
                    .to_owned(),
            );
        };
        let Some(ip) = target.destination.ip() else {
            return Err(format!(
                "--stateless is for TCP, not for {}: leave it out",
                target.destination
            ));
        };
        if !matches!(scheme, Scheme::Tcp | Scheme::Http | Scheme::Redis) {
            return Err(format!(
                "--stateless is for tcp, http and redis, not for {}: leave it out",
                scheme.name()
            ));
        }
        let SocketAddr::V4(destination) = ip.socket_addr(target.destination.first_port()) else {
            return Err("--stateless supports IPv4 only: use the server's IPv4 address".to_owned());
        };
        let prefix = self.stateless_prefix.trunc();
        if !(8..=30).contains(&prefix.prefix_len()) {
            return Err(format!(
                "--stateless-prefix {prefix} is out of range: use /8 to /30, such as 198.18.0.0/15"
            ));
        }
        if !is_of_hosts(prefix) {
            return Err(format!(
                "--stateless-prefix {prefix} contains addresses that no host can have: use another \
                 block, such as 198.18.0.0/15"
            ));
        }
        let own = stateless::device_address(prefix);
        if prefix.contains(destination.ip()) && *destination.ip() != own {
            return Err(format!(
                "the server's address {} is one of the clients' ({prefix}): use another block with \
                 --stateless-prefix",
                destination.ip()
            ));
        }
        let is_here =
            prefix.contains(destination.ip()) || UdpSocket::bind((*destination.ip(), 0)).is_ok();
        // A packet from outside may not go to 127.x.y.z.
        let is_any_of_here = destination.ip().is_loopback() || destination.ip().is_unspecified();
        let ip = if is_any_of_here { own } else { *destination.ip() };
        let server = SocketAddrV4::new(ip, destination.port());
        let room = stateless::Tuples::new(prefix, server, ports).room();
        if connections.is_some_and(|connections| connections > room) {
            return Err(format!(
                "--stateless-prefix {prefix} has room for {} over {}: use a shorter prefix",
                format::counted(room, "connection"),
                format::counted(u64::from(ports), "port"),
            ));
        }
        let loss = self.stateless_loss;
        Ok(Some(stateless::Setup { prefix, server, ports, is_here, loss }))
    }
}

/// Whether hosts can have all addresses of a block.
fn is_of_hosts(block: Ipv4Net) -> bool {
    let not = ["0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"];
    let mut not = not.into_iter().filter_map(|text| text.parse::<Ipv4Net>().ok());
    !not.any(|other| other.contains(&block) || block.contains(&other))
}

impl WorkloadArgs {
    fn pace(&self) -> Result<Option<Pace>, String> {
        at_least_one("--message-rate", self.message_rate)?;
        if let Some(period) = self.heartbeat {
            if period < STEP {
                return Err("--heartbeat must be at least 1ms: use 100ms, 10s or 1m, for example"
                    .to_owned());
            }
            if period > HEARTBEAT_MAX {
                return Err("--heartbeat must be at most 1h".to_owned());
            }
        }
        let heartbeat = self.heartbeat.map(Pace::Heartbeat);
        Ok(heartbeat.or(self.message_rate.map(Pace::PerSecond)))
    }

    fn workload(&self) -> Result<Option<Workload>, String> {
        let Some(pace) = self.pace()? else {
            if self.active.is_some() {
                return Err(
                    "--active is the percentage of the connections that send messages during the \
                            hold: use it with --heartbeat or --message-rate"
                        .to_owned(),
                );
            }
            return match self.fail_if.iter().find(|condition| condition.needs_workload()) {
                Some(condition) => Err(format!(
                    "--fail-if {:?} is about the messages during the hold: use it with --heartbeat or \
                     --message-rate",
                    condition.expression
                )),
                None => Ok(None),
            };
        };
        Ok(Some(Workload { pace, active_share: self.active.unwrap_or(1.0) }))
    }

    fn message(&self) -> Result<Option<MessageChoice>, String> {
        let size = |flag: &str, bytes: u64| match bytes {
            0 => Err(format!("{flag} is empty: use at least 1 byte")),
            1..=MESSAGE_BYTES_MAX => Ok(()),
            _ => Err(format!("{flag} must be at most 256KiB")),
        };
        if let Some(bytes) = self.message_size {
            size("--message-size", bytes)?;
            return Ok(Some(MessageChoice::OfSize(bytes as usize)));
        }
        let Some(Text(message)) = &self.message else { return Ok(None) };
        size("--message", message.len() as u64)?;
        let expected = self.expect.as_ref().map(|Text(expected)| expected.clone());
        size("--expect", expected.as_ref().unwrap_or(message).len() as u64)?;
        Ok(Some(MessageChoice::Text { message: message.clone(), expected }))
    }
}

/// The messages of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MessageChoice {
    /// This many bytes.
    OfSize(usize),
    /// This, and the server's answer if it differs.
    Text { message: Vec<u8>, expected: Option<Vec<u8>> },
}

impl MessageChoice {
    /// The bytes, and the server's answer if it differs.
    pub(crate) fn into_text(self) -> (Vec<u8>, Option<Vec<u8>>) {
        match self {
            Self::OfSize(bytes) => (Message::of_size(bytes).into_bytes(), None),
            Self::Text { message, expected } => (message, expected),
        }
    }
}

/// Refuses messages that the protocol does not support.
fn check_message(scheme: Scheme, message: Option<&MessageChoice>) -> Result<(), String> {
    let name = scheme.name();
    match (scheme, message) {
        (Scheme::Http | Scheme::Https | Scheme::Redis, Some(_)) => Err(format!(
            "--message and --message-size are for tcp, tls, ws, wss, mqtt and mqtts, not for {name}"
        )),
        (Scheme::Mqtt | Scheme::Mqtts, Some(MessageChoice::Text { expected: Some(_), .. })) => {
            Err(format!("--expect is not for {name}: the broker acknowledges each message"))
        }
        _ => Ok(()),
    }
}

/// Refuses a message that does not fit into one segment.
fn check_segment(message: Option<&MessageChoice>) -> Result<(), String> {
    let length = match message {
        None => 0,
        Some(MessageChoice::OfSize(bytes)) => *bytes,
        Some(MessageChoice::Text { message, .. }) => message.len(),
    };
    if length <= stateless::PAYLOAD_MAX {
        return Ok(());
    }
    Err(format!(
        "with --stateless a message is one segment: use at most {}",
        format::counted(stateless::PAYLOAD_MAX as u64, "byte")
    ))
}

/// Bytes from the command line or from a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Text(Vec<u8>);

/// Reads `@FILE`, or a text with escapes.
fn parse_text(text: &str) -> Result<Text, String> {
    match text.strip_prefix('@') {
        Some(path) => input::read(Path::new(path), MESSAGE_BYTES_MAX)
            .map(Text)
            .map_err(|error| format!("{path} can't be read: {error}; use another file")),
        None => unescape(text).map(Text),
    }
}

fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let plain = match byte {
            b'\\' => match rest.next() {
                Some(b'r') => b'\r',
                Some(b'n') => b'\n',
                Some(b't') => b'\t',
                Some(b'0') => 0,
                Some(b'\\') => b'\\',
                Some(b'x') => {
                    hex(&mut rest).ok_or("\\x needs two hexadecimal digits, as in \\x0a")?
                }
                _ => return Err("\\ must be followed by r, n, t, 0, xHH or \\".to_owned()),
            },
            byte => byte,
        };
        bytes.push(plain);
    }
    Ok(bytes)
}

fn hex(bytes: &mut impl Iterator<Item = u8>) -> Option<u8> {
    let mut digit = || char::from(bytes.next()?).to_digit(16);
    u8::try_from(digit()? * 16 + digit()?).ok()
}

/// Reads `RATE:DURATION`.
fn parse_stage(text: &str) -> Result<Stage, String> {
    let (rate, duration) = text.split_once(':').ok_or_else(|| {
        format!("{text:?} is not a stage; write it as 10k/s:1m, or 0:30s for a pause")
    })?;
    let stage = Stage { per_second: parse_rate(rate)?, duration: parse_duration(duration)? };
    if stage.duration.is_zero() {
        return Err(format!("{text:?} has no duration: use at least 1s, as in 10k/s:1m"));
    }
    at_most(stage.duration, "a stage").map(|()| stage)
}

/// The number of connections of all stages; `None` without stages, or if the last one has no end.
fn opened_by(stages: &[Stage]) -> Option<u64> {
    let is_rate = |stage: &Stage| stage.duration == DURATION_MAX;
    if stages.is_empty() || stages.iter().any(is_rate) {
        return None;
    }
    let opened = stages.iter().map(|stage| stage.per_second as f64 * stage.duration.as_secs_f64());
    Some((opened.sum::<f64>() as u64).max(1))
}

/// Reads a part of a whole: `1%`, `0.5%`, `100`.
fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.trim().trim_end_matches('%').trim();
    match number.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err(format!(
            "{text:?} is not a percentage of the connections; write it as 1%, 0.5% or 100%"
        )),
    }
}

impl Typed {
    fn validate(self) -> Result<Arguments, Refusal> {
        if let Some(port) = self.port {
            let line = format!(
                "--port is not a flag of this program: specify the first port after the server's address, as in \
                 `192.0.2.1 {port}`, and the number of ports with --ports"
            );
            return Err(line.into());
        }
        let (given, first_port) = targets_and_first_port(self.words)?;
        let scheme = scheme_of(&given)?;
        if !given.is_empty() && given.iter().all(|target| target.address.is_unix()) {
            let flags = [
                (first_port.is_some(), "FIRST_PORT"),
                (self.ports.is_some(), "--ports"),
                (self.source.is_some(), "--source"),
                (self.sources.is_some(), "--sources"),
            ];
            if let Some((_, flag)) = flags.into_iter().find(|&(is_given, _)| is_given) {
                let line = format!(
                    "{flag} is for TCP: a Unix-domain socket has no ports and no source addresses"
                );
                return Err(line.into());
            }
        }
        let ports_default = if scheme.port().is_some() { 1 } else { PORTS };
        let ports = self.ports.unwrap_or(ports_default);
        if self.no_verify && scheme != Scheme::Tcp {
            let line =
                format!("--no-verify is for tcp and unix: {} begins with an answer", scheme.name());
            return Err(line.into());
        }
        if (self.ca.is_some() || self.insecure) && !scheme.is_tls() {
            let line = "--ca and --insecure are for TLS: write the server as tls://, https://, wss:// or mqtts://";
            return Err(line.to_owned().into());
        }
        let trust = match self.ca {
            Some(path) => Trust::File(path),
            None if self.insecure => Trust::Anyone,
            None => Trust::System,
        };
        trust.check()?;
        check_output_files(self.json.as_ref(), self.workload.hdr.as_deref())?;
        at_least_one("--connections", self.connections)?;
        at_least_one("--sources", self.sources)?;
        at_least_one("--rate", self.rate)?;
        at_least_one("--in-flight", self.in_flight)?;
        at_most(self.connect_timeout, "--connect-timeout")?;
        at_least_one("--churn", self.workload.churn)?;
        let stages = match self.rate {
            Some(per_second) => vec![Stage { per_second, duration: DURATION_MAX }],
            None => self.stages,
        };
        if !stages.is_empty() && stages.iter().all(|stage| stage.per_second == 0) {
            return Err("--stages opens no connections: use a stage with a rate, such as 10k/s:1m"
                .to_owned()
                .into());
        }
        let connections = self.connections.or_else(|| opened_by(&stages));
        let workload = self.workload.workload()?;
        let message = self.workload.message()?;
        check_message(scheme, message.as_ref())?;
        let hold = self.hold.or(self.workload.heartbeat).unwrap_or(HOLD);
        at_most(hold, "--hold")?;
        if self.connect_timeout < Duration::from_millis(1) {
            let line = "--connect-timeout must be at least 1ms: use 500ms or 10s, for example";
            return Err(line.to_owned().into());
        }
        let sources = self.source.map_or(Ok(Vec::new()), |list| sources(&list))?;
        let targets = resolve(given, first_port, ports, &sources)?;
        // Each target with ports has as many.
        let ports = targets.iter().map(|target| target.destination.endpoints()).max().unwrap_or(1);
        let stateless = self.stateless.setup(scheme, &targets, ports, connections)?;
        if stateless.is_some() {
            check_segment(message.as_ref())?;
        }
        let endpoints: u64 =
            targets.iter().map(|target| u64::from(target.destination.endpoints())).sum();
        check_pairs(sources.len(), endpoints)?;
        let in_flight_default = (IN_FLIGHT_PER_PORT * endpoints).min(IN_FLIGHT_DEFAULT_MAX);
        let in_flight = self.in_flight.unwrap_or(in_flight_default).min(IN_FLIGHT_MAX);
        Ok(Arguments {
            targets,
            scheme,
            trust,
            ports,
            connections,
            sources,
            stages,
            in_flight_max: in_flight as usize,
            connect_timeout: self.connect_timeout,
            hold,
            verify: !self.no_verify,
            workload,
            message,
            churn_per_second: self.workload.churn,
            storm: self.workload.storm,
            fail_if: self.workload.fail_if,
            hdr: self.workload.hdr,
            file_table: self.file_table.choice,
            json: self.json,
            metrics: self.metrics,
            check: self.check,
            sources_unlisted: self.sources,
            stateless,
        })
    }
}

/// Refuses what can't be a file of `--json` or `--hdr`, and one file for both.
fn check_output_files(json: Option<&Output>, hdr: Option<&Path>) -> Result<(), String> {
    let json = json.and_then(|output| match output {
        Output::Path(path) => Some(path.as_path()),
        Output::Stdout => None,
    });
    for (flag, path) in [("--json", json), ("--hdr", hdr)] {
        if let Some(path) = path.filter(|path| path.is_dir()) {
            return Err(format!("{flag} {} is a directory: name a file in it", path.display()));
        }
    }
    let Some(hdr) = hdr else { return Ok(()) };
    if hdr == Path::new("-") {
        return Err("--hdr writes to a file, not to standard output: name a file".to_owned());
    }
    if json.is_some_and(|json| is_same_file(json, hdr)) {
        return Err(format!("--json and --hdr are the same file ({}): use two", hdr.display()));
    }
    Ok(())
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let resolved = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let in_folder = || {
            let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
            Some(folder.join(path.file_name()?))
        };
        path.canonicalize().ok().or_else(in_folder)
    };
    one == other || resolved(one).is_some_and(|one| Some(one) == resolved(other))
}

/// A target as typed, before its name is resolved.
struct Given {
    text: String,
    address: TargetAddress,
}

/// FIRST_PORT is the last word.
fn targets_and_first_port(mut words: Vec<Word>) -> Result<(Vec<Given>, Option<u16>), String> {
    let first_port = match words.last() {
        Some(&Word::FirstPort(port)) if words.len() > 1 => {
            words.pop();
            Some(port)
        }
        _ => None,
    };
    if words.len() > TARGETS_MAX {
        return Err(format!(
            "{} are too many: use at most {TARGETS_MAX}",
            format::counted(words.len() as u64, "target")
        ));
    }
    let given = |word| match word {
        Word::Target { text, address } => Ok(Given { text, address }),
        Word::FirstPort(port) => Err(match first_port {
            Some(last) => format!(
                "{port} is not a target, and FIRST_PORT, the last argument, is {last}: leave one out"
            ),
            None => format!(
                "{port} is not a target: specify the server first, then the port, as in `192.0.2.1 {port}`"
            ),
        }),
    };
    Ok((words.into_iter().map(given).collect::<Result<_, _>>()?, first_port))
}

/// A run has one protocol.
fn scheme_of(given: &[Given]) -> Result<Scheme, String> {
    let Some(first) = given.first() else { return Ok(Scheme::Tcp) };
    let scheme = first.address.scheme;
    match given.iter().find(|target| target.address.scheme != scheme) {
        Some(other) => Err(format!(
            "{} and {} have different protocols ({} and {}): run one client for each",
            format::visible(&first.text),
            format::visible(&other.text),
            scheme.name(),
            other.address.scheme.name()
        )),
        None => Ok(scheme),
    }
}

fn first_port(target: &TargetAddress, given: Option<u16>) -> Result<u16, String> {
    match (target.port, given) {
        (Some(port), Some(given)) => Err(format!(
            "the target contains port {port}, and FIRST_PORT is {given}: specify only one of them"
        )),
        (port, given) => Ok(port.or(given).or(target.scheme.port()).unwrap_or(FIRST_PORT)),
    }
}

/// The targets, with their names resolved. Without any, as for a check, the default server on this machine.
fn resolve(
    given: Vec<Given>,
    port: Option<u16>,
    ports: u64,
    sources: &[ZonedIp],
) -> Result<Vec<TargetArgs>, Refusal> {
    let mut targets: Vec<TargetArgs> = Vec::with_capacity(given.len());
    let mut files: Vec<Option<PathBuf>> = Vec::with_capacity(given.len());
    let default = || Given {
        text: Ipv4Addr::LOCALHOST.to_string(),
        address: TargetAddress {
            scheme: Scheme::Tcp,
            host: Host::Ip(Ipv4Addr::LOCALHOST.into()),
            port: None,
            path: String::new(),
        },
    };
    let given = if given.is_empty() { vec![default()] } else { given };
    for Given { text, address } in given {
        let port = first_port(&address, port)?;
        let ports = if address.is_unix() { 1 } else { port_count(port, ports)? };
        let destination = destination(&address, port, ports, sources.first().copied())?;
        // One socket has many paths: through links, and through `..`.
        let file = destination.path().and_then(|path| path.canonicalize().ok());
        let is_same = |other: &TargetArgs, others_file: &Option<PathBuf>| {
            other.destination.overlaps(&destination) || (file.is_some() && file == *others_file)
        };
        let mut known = targets.iter().zip(&files);
        if let Some((other, _)) = known.find(|(other, file)| is_same(other, file)) {
            let line = format!(
                "{} and {} are the same server ({destination}): specify each once, and --ports if \
                 their ports overlap",
                format::visible(&other.text),
                format::visible(&text)
            );
            return Err(line.into());
        }
        files.push(file);
        targets.push(TargetArgs {
            protocol: address.protocol(),
            authority: address.authority(port),
            host: address.host.name(),
            path: address.path,
            destination,
            text,
        });
    }
    Ok(targets)
}

fn destination(
    target: &TargetAddress,
    port: u16,
    ports: u16,
    source: Option<ZonedIp>,
) -> Result<Destination, Refusal> {
    let is_ipv4 = source.map(|source| source.ip.is_ipv4());
    let resolved = target.resolve(port, is_ipv4).map_err(|line| Refusal { code: SHORT, line })?;
    let destination = Destination::new(resolved, ports);
    let Some(ip) = destination.ip() else { return Ok(destination) };
    if let Host::Name(name) = &target.host {
        log::info!("{name} is {ip}");
    }
    if is_of_many(ip.ip) {
        let line = format!("{ip} is not the address of one machine: use the server's own address");
        return Err(line.into());
    }
    match source {
        Some(source) if is_ipv4 != Some(ip.ip.is_ipv4()) => {
            let line = format!(
                "--source {source} and the destination {ip} are of different families: use sources \
                 of the destination's family"
            );
            Err(line.into())
        }
        _ => Ok(destination),
    }
}

fn port_count(first_port: u16, ports: u64) -> Result<u16, String> {
    let room = u64::from(u16::MAX - first_port) + 1;
    match u16::try_from(ports) {
        Ok(0) => Err("--ports is 0: use at least 1".to_owned()),
        Ok(count) if ports <= room => Ok(count),
        _ => Err(format!(
            "{} from {first_port} on exceed port 65535: \
             use at most --ports {room}, or a lower FIRST_PORT",
            format::counted(ports, "port")
        )),
    }
}

fn at_least_one(flag: &str, value: Option<u64>) -> Result<(), String> {
    match value {
        Some(0) => Err(format!("{flag} is 0: use at least 1, or leave it out")),
        _ => Ok(()),
    }
}

fn at_most(value: Duration, flag: &str) -> Result<(), String> {
    if value <= DURATION_MAX { Ok(()) } else { Err(format!("{flag} must be at most 24h")) }
}

/// The addresses of a list, each once, in its order.
fn sources(list: &str) -> Result<Vec<ZonedIp>, String> {
    let mut seen = HashSet::new();
    let mut addresses: Vec<ZonedIp> = Vec::new();
    for item in list.split(',') {
        let (range, zone) = source_range(item.trim())?;
        for ip in range {
            let address = with_zone(ip, zone).map_err(|line| format!("--source: {line}"))?;
            if addresses.first().is_some_and(|first| first.ip.is_ipv4() != ip.is_ipv4()) {
                return Err(format!(
                    "--source {address} and those before it are of different families: use \
                     sources of the destination's family"
                ));
            }
            if is_of_many(ip) || ip.is_unspecified() {
                return Err(format!(
                    "--source {address} is not the address of one machine: use addresses of this \
                     machine, such as 127.0.0.2"
                ));
            }
            if seen.insert(address) {
                addresses.push(address);
            }
            if addresses.len() > SOURCES_MAX {
                return Err(format!(
                    "--source has more than {} addresses: use fewer",
                    format::count(SOURCES_MAX as u64)
                ));
            }
        }
    }
    Ok(addresses)
}

/// The port plan has a few bytes for each pair of a source and a port.
fn check_pairs(sources: usize, ports: u64) -> Result<(), String> {
    if sources as u64 * ports <= PAIRS_MAX as u64 {
        return Ok(());
    }
    Err(format!(
        "{} sources x {ports} ports exceed {} pairs: use fewer of either",
        format::count(sources as u64),
        format::count(PAIRS_MAX as u64)
    ))
}

/// The addresses of one item, and their zone: `a`, `a-b` or `a/bits`, each with its zone at the end. A block excludes
/// its network and broadcast addresses.
fn source_range(item: &str) -> Result<(IpAddrRange, u32), String> {
    let wrong = || {
        format!(
            "--source {item:?} is not an address: write 127.0.0.2, 127.0.0.2-127.0.0.9 or \
             127.1.0.0/24, separated by commas"
        )
    };
    let (addresses, zone) = split_zone(item).map_err(|line| format!("--source {item}: {line}"))?;
    if addresses.contains('/') {
        return Ok((addresses.parse::<IpNet>().map_err(|_| wrong())?.hosts(), zone));
    }
    let (first, last) = addresses.split_once('-').unwrap_or((addresses, addresses));
    let range = match (first.trim().parse(), last.trim().parse()) {
        (Ok(IpAddr::V4(first)), Ok(IpAddr::V4(last))) if first <= last => {
            IpAddrRange::V4(Ipv4AddrRange::new(first, last))
        }
        (Ok(IpAddr::V6(first)), Ok(IpAddr::V6(last))) if first <= last => {
            IpAddrRange::V6(Ipv6AddrRange::new(first, last))
        }
        _ => return Err(wrong()),
    };
    Ok((range, zone))
}

/// Parses the arguments in a line of text; the error is one line.
#[cfg(test)]
pub(crate) fn of(line: &str) -> Result<Arguments, String> {
    Typed::try_parse_from(format!("c1000k-client {line}").split_whitespace())
        .map_err(|error| error.to_string())?
        .validate()
        .map_err(|refusal| refusal.line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(first: &str, ports: u16) -> Destination {
        Destination::new(first.parse::<SocketAddr>().unwrap(), ports)
    }

    /// Of the first target.
    fn address_of(arguments: &Arguments) -> String {
        arguments.targets[0].destination.first()
    }

    fn wrong(line: &str) -> String {
        of(line).expect_err(line)
    }

    #[test]
    fn address_and_port_are_enough() {
        let arguments = of("192.0.2.1 9900").unwrap();
        assert_eq!(
            arguments,
            Arguments {
                targets: vec![TargetArgs {
                    text: "192.0.2.1".to_owned(),
                    protocol: "tcp".to_owned(),
                    destination: to("192.0.2.1:9900", 100),
                    authority: "192.0.2.1:9900".to_owned(),
                    host: "192.0.2.1".to_owned(),
                    path: String::new(),
                }],
                scheme: Scheme::Tcp,
                trust: Trust::System,
                ports: 100,
                connections: None,
                sources: vec![],
                stages: vec![],
                in_flight_max: 1_024,
                connect_timeout: Duration::from_secs(10),
                hold: Duration::from_secs(5),
                verify: true,
                workload: None,
                churn_per_second: None,
                storm: false,
                message: None,
                fail_if: vec![],
                hdr: None,
                file_table: FileTableChoice::Auto,
                stateless: None,
                json: None,
                metrics: None,
                check: CheckArgs { check: false, print: None, root: "/".into() },
                sources_unlisted: None,
            }
        );
        assert_eq!(of("::1 9900 --ports 2 -c 10k").unwrap().in_flight_max, 128);
        assert_eq!(of("::1 65535 --ports 1 -c 1M").unwrap().connections, Some(1_000_000));
    }

    #[test]
    fn wrong_usage_is_explained_with_the_remedy() {
        for (line, part) in [
            ("", "<TARGET>"),
            ("127.0.0.1:9900 9901", "specify only one of them"),
            ("ftp://localhost 9900", "supported: tcp, tls"),
            ("wss://localhost --no-verify", "--no-verify is for tcp"),
            ("ws://localhost --insecure", "wss://"),
            ("http://localhost --message x", "not for http"),
            ("mqtt://localhost --message x --expect y", "not for mqtt"),
            ("127.0.0.1 --port 9900", "`192.0.2.1 9900`"),
            ("--port 9900", "`192.0.2.1 9900`"),
            ("127.0.0.1 --port", "`192.0.2.1 9900`"),
            ("127.0.0.1 --connection 5", "a similar argument exists: '--connections'"),
            ("127.0.0.1 9900 --rate -1/s", "must be positive"),
            ("127.0.0.1 9900 --hold -5s", "must be positive"),
            ("127.0.0.1 9900 --source fe80::1", "a link-local address: specify its zone"),
            ("127.0.0.1 9900 --source fe80::1%nowhere", "no interface"),
            ("127.0.0.1 9900 --source ::1,127.0.0.1", "families"),
            ("224.0.0.1 9900", "224.0.0.1 is not the address of one machine"),
            ("255.255.255.255", "is not the address of one machine"),
            ("ff02::1%lo", "ff02::1%lo is not the address of one machine"),
            ("fe80::1 9900", "a link-local address: specify its zone"),
            ("127.0.0.1 0", "1 to 65535"),
            ("127.0.0.1 70000", "port 70000 is out of range: a port is a number from 1 to 65535"),
            ("127.0.0.1 65500", "at most --ports 36"),
            ("127.0.0.1 1 --ports 70000", "exceed port 65535"),
            ("127.0.0.1 9900 --ports 0", "at least 1"),
            ("127.0.0.1 9900 -c 0", "at least 1"),
            ("127.0.0.1 9900 -c many", "10k"),
            ("127.0.0.1 9900 -c 1e99", "\"1e99\" is too large"),
            ("127.0.0.1 9900 -c -5", "must be positive"),
            ("127.0.0.1 9900 --rate 0", "at least 1"),
            ("127.0.0.1 9900 --in-flight 0", "at least 1"),
            ("127.0.0.1 --stages 10:0s", "\"10:0s\" has no duration"),
            ("127.0.0.1 --stages 10:1s,0:0s", "\"0:0s\" has no duration"),
            ("127.0.0.1 --stages 0:1s", "opens no connections"),
            ("127.0.0.1 9900 --hold 5", "500ms"),
            ("127.0.0.1 9900 --hold 9000h", "24h"),
            ("127.0.0.1 9900 --connect-timeout 0s", "at least 1ms"),
            ("127.0.0.1 9900 --source ::1", "families"),
            ("127.0.0.1 9900 --source 127.0.0.9-127.0.0.2", "127.1.0.0/24"),
            ("127.0.0.1 9900 --source 224.0.0.1", "of one machine"),
            ("127.0.0.1 9900 --source 127.0.0.2,255.255.255.255", "of one machine"),
            ("127.0.0.1 9900 --source 0.0.0.0", "of one machine"),
            ("::1 9900 --source ::", "of one machine"),
            ("::1 9900 --source ff02::1", "of one machine"),
            ("127.0.0.1 9900 --source 127.0.0.0/8", "more than 65,536 addresses"),
            ("127.0.0.1 9900 --source 127.0.0.1,,127.0.0.2", "not an address"),
            ("127.0.0.1 9900 --source 127.0.0.0/16", "pairs"),
            ("127.0.0.1 --print sysctl", "--check"),
            ("127.0.0.1 --sources 2", "--check"),
            ("--check --sources 2 --source 127.0.0.1", "cannot be used with"),
            ("--check --sources 0", "at least 1"),
            ("--check --print toml", "[possible values: sysctl]"),
            ("127.0.0.1 9900 --frobnicate", "--frobnicate"),
            ("127.0.0.1 9900 9901", "9901"),
            ("9900", "9900 is not a target: specify the server first"),
            ("unix:/run/a 9900", "FIRST_PORT is for TCP"),
            ("unix:/run/a --ports 2", "--ports is for TCP"),
            ("unix:/run/a --source 127.0.0.2", "--source is for TCP"),
            ("unix:/run/a --stateless", "--stateless is for TCP, not for unix:/run/a"),
            ("redis+unix:/run/a --no-verify", "--no-verify is for tcp and unix"),
            ("unix:", "the path of the socket is missing"),
            ("127.0.0.1 127.0.0.2 --stateless", "--stateless takes one target"),
            ("127.0.0.1 redis://127.0.0.2", "different protocols (tcp and redis)"),
            ("http://127.0.0.1 https://127.0.0.1", "different protocols (http and https)"),
            ("127.0.0.1 127.0.0.2 localhost", "127.0.0.1 and localhost are the same server"),
            ("127.0.0.1:9900 127.0.0.1:9901", "--ports if their ports overlap"),
            ("unix:/run/a unix:/run/a", "are the same server (unix:/run/a)"),
            ("127.0.0.1 127.0.0.2:80 9900", "specify only one of them"),
            ("127.0.0.1 ::1 --source 127.0.0.9", "families"),
            ("127.0.0.1 127.0.0.2 --source 127.0.0.0/17", "32,766 sources x 200 ports"),
        ] {
            let message = wrong(line);
            assert!(message.contains(part), "{line}: {message}");
        }
    }

    #[test]
    fn files_are_read_up_to_a_bound_and_only_if_they_are_regular() {
        let folder = tempfile::tempdir().unwrap();
        let [long, enough, pipe, empty] =
            ["long", "enough", "pipe", "empty"].map(|name| folder.path().join(name));
        std::fs::write(&enough, vec![b'x'; MESSAGE_BYTES_MAX as usize]).unwrap();
        std::fs::write(&long, vec![b'x'; MESSAGE_BYTES_MAX as usize + 1]).unwrap();
        std::fs::write(&empty, "").unwrap();
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let bytes = vec![b'x'; MESSAGE_BYTES_MAX as usize];
        assert_eq!(parse_text(&format!("@{}", enough.display())), Ok(Text(bytes)));
        for (path, part) in [
            (long.as_path(), "longer than 262144 bytes"),
            (&pipe, "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (folder.path(), "not a regular file"),
        ] {
            let line = parse_text(&format!("@{}", path.display())).unwrap_err();
            assert!(line.contains(part), "{line}");
        }
        for (path, part) in [
            (pipe.as_path(), "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (&folder.path().join("gone"), "No such file"),
            (&empty, "no certificate"),
        ] {
            let line = wrong(&format!("tls://127.0.0.1 --ca {}", path.display()));
            assert!(line.contains("--ca ") && line.contains(part), "{line}");
        }
    }

    #[test]
    fn outputs_are_two_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        for (words, part) in [
            (format!("--json {path}"), "--json"),
            (format!("--hdr {path}"), "is a directory"),
            ("--hdr -".to_owned(), "not to standard output"),
            (format!("--hdr {path}/x --json {path}/x"), "the same file"),
            (format!("--hdr {path}/x --json {path}/./x"), "the same file"),
        ] {
            let line = wrong(&format!("127.0.0.1 {words}"));
            assert!(line.contains(part), "{words}: {line}");
        }
        assert!(of(&format!("127.0.0.1 --hdr {path}/x --json {path}/y")).is_ok());
    }

    #[test]
    fn a_socket_is_one_target_by_all_its_paths() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, link) = (folder.path().join("socket"), folder.path().join("link"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        let socket = socket.display();
        for other in [link, folder.path().join("sub/../socket")] {
            let line = wrong(&format!("unix:{socket} unix:{}", other.display()));
            assert!(line.contains("are the same server"), "{line}");
        }
        let gone = folder.path().join("gone");
        assert!(of(&format!("unix:{socket} unix:{}", gone.display())).is_ok());
    }

    #[test]
    fn a_check_needs_no_destination() {
        assert!(of("--check -c 10k").unwrap().check.check);
    }

    #[test]
    fn sources_are_named_once_each_in_their_order() {
        let found =
            of("127.0.0.1 9900 --source 127.0.0.7,127.0.0.2-127.0.0.4,127.0.0.4/30").unwrap();
        let expected: Vec<ZonedIp> =
            [7, 2, 3, 4, 5, 6].map(|last| Ipv4Addr::new(127, 0, 0, last).into()).into();
        assert_eq!(found.sources, expected);
        let found = of("::1 9900 --source fd00::1-fd00::3").unwrap();
        assert_eq!(found.sources.len(), 3);
    }

    #[test]
    fn link_local_sources_and_targets_have_a_zone() {
        for (list, count) in
            [("fe80::2%lo", 1), ("fe80::2-fe80::4%lo", 3), ("fe80::/126%lo,fe80::9%lo", 5)]
        {
            let found = of(&format!("fe80::1%lo 9900 --source {list}")).unwrap();
            assert_eq!(found.sources.len(), count, "{list}");
            let zone = found.targets[0].destination.ip().unwrap().zone;
            assert!(zone != 0 && found.sources.iter().all(|source| source.zone == zone), "{list}");
        }
    }

    #[test]
    fn the_port_may_be_in_the_target_or_be_left_out() {
        for (line, destination) in [
            ("127.0.0.1", "127.0.0.1:9900"),
            ("localhost", "127.0.0.1:9900"),
            ("localhost 80", "127.0.0.1:80"),
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("[::1]", "[::1]:9900"),
            ("[::1]:80", "[::1]:80"),
            ("tcp://127.0.0.1:80", "127.0.0.1:80"),
        ] {
            assert_eq!(address_of(&of(line).unwrap()), destination, "{line}");
        }
    }

    #[test]
    fn several_targets_have_the_same_ports_and_their_own_paths() {
        let found = of("127.0.0.1 [::1] unix:/run/a 80 --ports 2").unwrap();
        let all: Vec<String> = found.destinations().map(ToString::to_string).collect();
        assert_eq!(all, ["127.0.0.1:80-81", "[::1]:80-81", "unix:/run/a"]);
        assert_eq!((found.endpoints(), found.ports, found.protocol()), (5, 2, "tcp"));
        assert_eq!(found.in_flight_max, 5 * 64);
        let found = of("127.0.0.1:9900 127.0.0.1:9901 --ports 1").unwrap();
        assert_eq!(found.endpoints(), 2);
        let found = of("http://127.0.0.1/a http+unix:/run/a:/b").unwrap();
        let paths: Vec<&str> = found.targets.iter().map(|target| target.path.as_str()).collect();
        assert_eq!((paths.as_slice(), found.protocol()), (&["/a", "/b"][..], "http"));
        let found = of("http+unix:/run/a http+unix:/run/b").unwrap();
        assert_eq!((found.protocol(), found.ports, found.in_flight_max), ("http+unix", 1, 128));
        let many: Vec<String> = (1..=257).map(|last| format!("unix:{last}")).collect();
        assert!(wrong(&many.join(" ")).contains("257 targets are too many"));
        assert_eq!(of(&many[1..].join(" ")).unwrap().targets.len(), 256);
    }

    #[test]
    fn counts_and_rates_may_have_units() {
        let arguments = of("127.0.0.1 -c 1e6 --rate 1000/s").unwrap();
        assert_eq!(
            (arguments.connections, arguments.stages[0].per_second),
            (Some(1_000_000), 1_000)
        );
    }

    #[test]
    fn the_help_shows_examples() {
        use clap::CommandFactory;
        let help = Typed::command().render_help().to_string();
        for part in [
            "Examples:\n",
            "Usage: c1000k-client [OPTIONS] <TARGET>... [FIRST_PORT]\n",
            "\n       c1000k-client [OPTIONS] --check [TARGET]... [FIRST_PORT]\n",
            "--source 192.0.2.16-192.0.2.31",
        ] {
            assert!(help.contains(part), "{help}");
        }
        let words: Vec<&str> = help.split_whitespace().collect();
        assert!(words.join(" ").contains("May be left out with --check"), "{help}");
        assert!(!help.contains("--port "), "{help}");
    }
}
