//! Parses and checks the arguments.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use c1000k_host::check::{CheckArgs, FileTableArgs, FileTableChoice};
use c1000k_host::command_line::{OutputArgs, ZonedIp, is_of_many, parse_ip, parse_port};
use c1000k_host::format;
use c1000k_host::quantity::{parse_count, parse_duration};
use c1000k_record::Output;
use c1000k_record::endpoint::Endpoint;
use clap::{Parser, ValueEnum};
use reactor::Keepalive;

use crate::admission::{Overload, Reserve};

/// The default target.
const MILLION: u64 = 1_000_000;

/// The range that the kernel accepts.
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);
const USER_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_millis(i32::MAX as u64);

/// The kernel drops a peer that acknowledges nothing this much later than the server does. So the server's rule applies
/// first and is counted, and the kernel's applies to connections that the server has closed already.
const USER_TIMEOUT_BEYOND_SLOW_READER: Duration = Duration::from_secs(10);

/// More frequent status lines are unreadable, and their cost would affect the measurement.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// An hour is longer than any queue needs.
const GRACE_MAX: Duration = Duration::from_secs(3_600);

/// A number below this needs a unit.
const BARE_BYTES_MIN: u64 = 1 << 20;

/// The maximum number of reactors of a server.
const THREADS_MAX: u64 = 256;

const EXAMPLES: &str = "\
Examples:
  c1000k-server                               echo on 0.0.0.0, ports 9900 to 9999
  c1000k-server --bind ::1 --first-port 7000 --ports 1 --mode sink
  c1000k-server --max-connections 500k --idle-timeout 5m --memory-reserve 10%
  c1000k-server --check -c 1M                 check the limits of this machine for 1M connections
  c1000k-server --check -c 1M --print sysctl  print the settings that are needed";

/// Holds a million TCP connections on one thread, and shows the memory that each of them takes.
#[derive(Debug, Parser)]
#[command(name = "c1000k-server", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Address to listen on, IPv4 or IPv6
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0", value_parser = parse_bind)]
    bind: ZonedIp,
    /// First listening port
    #[arg(long, value_name = "PORT", default_value = "9900", value_parser = parse_port, allow_hyphen_values = true)]
    first_port: u16,
    /// Number of ports to listen on
    #[arg(long, value_name = "N", default_value = "100", value_parser = parse_count, allow_hyphen_values = true)]
    ports: u64,
    /// Number of reactors, each on its own thread with its own listeners on all ports
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_count, allow_hyphen_values = true)]
    threads: u64,
    /// Maximum number of connections; further ones are refused [default: what the limits allow]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    max_connections: Option<u64>,
    #[command(flatten)]
    file_table: FileTableArgs,
    /// Send received data back, or discard it
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Close a connection that has sent nothing for this time [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    idle_timeout: Option<Duration>,
    /// Maximum number of connections from one source, an IPv4 address or an IPv6 /64 [default: no limit]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    max_per_source: Option<u64>,
    /// Memory to keep free: below it no connection is admitted [default: 10%, at most 1G]
    #[arg(long, value_name = "SIZE|PERCENT", value_parser = parse_reserve, allow_hyphen_values = true)]
    memory_reserve: Option<Reserve>,
    /// While memory is short: reset new connections, or leave them in the backlog
    #[arg(long, value_enum, default_value_t = Overload::Refuse)]
    overload: Overload,
    /// Reset a connection that does not read queued data within this time
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration, allow_hyphen_values = true)]
    slow_reader_timeout: Duration,
    /// Probe a peer that has been silent for this time, with TCP keepalive [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    keepalive: Option<Duration>,
    /// Drop a connection whose peer acknowledges nothing for this time; 0s: the kernel's default [default: 10s more
    /// than --slow-reader-timeout, or the duration of the --keepalive probes]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    tcp_user_timeout: Option<Duration>,
    /// Backlog of each port: connections that are not accepted yet [default: the kernel's maximum]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    backlog: Option<u64>,
    /// Time between two status lines
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration, allow_hyphen_values = true)]
    interval: Duration,
    /// Time for connections to send queued data at a shutdown
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration, allow_hyphen_values = true)]
    grace: Duration,
    /// Write the record of the run on exit (`-` is standard output)
    #[arg(long, value_name = "PATH", value_parser = Output::parse)]
    json: Option<Output>,
    /// Serve metrics for Prometheus at /metrics of this address; a port alone is on 127.0.0.1
    #[arg(long, value_name = "ADDR", value_parser = Endpoint::parse_address)]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    check: CheckArgs,
    /// Target of --check [default: 1M]
    #[arg(short = 'c', long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    connections: Option<u64>,
    /// Not a flag of this program, but common in others
    #[arg(long, hide = true, value_name = "PORT", num_args = 0..=1, default_missing_value = "9900")]
    port: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// What the server does with received data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Send it back.
    Echo,
    /// Drop it.
    Sink,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Echo => "echo",
            Mode::Sink => "sink",
        }
    }
}

/// The checked command.
#[derive(Debug)]
pub(crate) enum Command {
    /// `--check`: a server with this many connections and descriptors to listen with.
    Check {
        args: CheckArgs,
        file_table: FileTableChoice,
        connections: u64,
        listening: u64,
    },
    Serve(Box<Settings>),
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) bind: ZonedIp,
    pub(crate) first_port: u16,
    pub(crate) ports: u16,
    /// The listeners come from the service manager.
    pub(crate) are_sockets_passed: bool,
    pub(crate) threads: u64,
    /// `None`: what the limits allow.
    pub(crate) max_connections: Option<u64>,
    pub(crate) file_table: FileTableChoice,
    pub(crate) mode: Mode,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_per_source: Option<u32>,
    pub(crate) memory_reserve: Reserve,
    pub(crate) overload: Overload,
    pub(crate) slow_reader_timeout: Duration,
    pub(crate) keepalive: Option<Keepalive>,
    /// `None`: the kernel's default.
    pub(crate) tcp_user_timeout: Option<Duration>,
    pub(crate) backlog: Option<u32>,
    pub(crate) interval: Duration,
    pub(crate) grace: Duration,
    pub(crate) json: Option<Output>,
    pub(crate) metrics: Option<SocketAddr>,
}

impl AsRef<OutputArgs> for Args {
    fn as_ref(&self) -> &OutputArgs {
        &self.output
    }
}

impl Args {
    /// # Errors
    /// One line: the error and its remedy.
    pub(crate) fn check(self) -> Result<Command, String> {
        if let Some(port) = self.port {
            return Err(format!(
                "--port is not a flag of this program: use --first-port {port}, and --ports for the number of ports"
            ));
        }
        let ports = ports(self.first_port, self.ports)?;
        if !(1..=THREADS_MAX).contains(&self.threads) {
            return Err(format!(
                "--threads {} is out of range: use 1 to {THREADS_MAX}; more threads than processors are not faster",
                self.threads
            ));
        }
        if self.check.check {
            let connections = self.connections.unwrap_or(MILLION);
            if connections == 0 {
                return Err("--connections is 0: use at least 1, or leave it out".into());
            }
            return Ok(Command::Check {
                args: self.check,
                file_table: self.file_table.choice,
                connections,
                listening: listening(ports, self.threads),
            });
        }
        if let Some(connections) = self.connections {
            return Err(format!(
                "--connections (-c) is for --check: to bound the server use --max-connections {connections}, \
                 otherwise add --check"
            ));
        }
        if self.max_connections == Some(0) {
            return Err("--max-connections is 0, so no peer could connect: use at least 1".into());
        }
        if is_of_many(self.bind.ip) {
            return Err(format!(
                "--bind {} is not the address of one machine: use an address of this machine, or 0.0.0.0",
                self.bind
            ));
        }
        if self.interval < INTERVAL_MIN {
            return Err(
                "--interval, the time between two status lines, must be at least 100ms: use 1s, for example"
                    .into(),
            );
        }
        if self.idle_timeout == Some(Duration::ZERO) {
            return Err(
                "--idle-timeout is 0, which would close every connection: leave it out".into()
            );
        }
        if self.max_per_source == Some(0) {
            return Err("--max-per-source is 0, so no peer could connect: leave it out".into());
        }
        if self.slow_reader_timeout.is_zero() {
            return Err("--slow-reader-timeout is 0: use a time such as 60s".into());
        }
        if self.keepalive.is_some_and(|idle| !KEEPALIVE.contains(&idle)) {
            return Err(
                "--keepalive must be 1s to 32767s, the range of TCP: use a time such as 60s".into(),
            );
        }
        let is_off = self.tcp_user_timeout == Some(Duration::ZERO);
        if !is_off && self.tcp_user_timeout.is_some_and(|most| !USER_TIMEOUT.contains(&most)) {
            return Err(
                "--tcp-user-timeout must be 1ms to 24 days, or 0s for the kernel's default: use a time such as 30s"
                    .into(),
            );
        }
        let keepalive = self.keepalive.map(keepalive);
        let user_timeout = self
            .tcp_user_timeout
            .unwrap_or_else(|| user_timeout(self.slow_reader_timeout, keepalive.as_ref()));
        if self.grace > GRACE_MAX {
            return Err("--grace must be at most 1h: use a time such as 5s".into());
        }
        if self.backlog == Some(0) {
            return Err(
                "--backlog is 0, so no connection could wait: leave it out, or use 1".into()
            );
        }
        Ok(Command::Serve(Box::new(Settings {
            bind: self.bind,
            first_port: self.first_port,
            ports,
            are_sockets_passed: false,
            threads: self.threads,
            max_connections: self.max_connections,
            file_table: self.file_table.choice,
            mode: self.mode,
            idle_timeout: self.idle_timeout,
            max_per_source: self.max_per_source.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
            memory_reserve: self.memory_reserve.unwrap_or(Reserve::Default),
            overload: self.overload,
            slow_reader_timeout: self.slow_reader_timeout,
            keepalive,
            tcp_user_timeout: (!is_off).then_some(user_timeout),
            backlog: self.backlog.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
            interval: self.interval,
            grace: self.grace,
            json: self.json,
            metrics: self.metrics,
        })))
    }
}

/// The interval of the probes is at most the idle time.
fn keepalive(idle: Duration) -> Keepalive {
    let usual = Keepalive::default();
    Keepalive { idle, interval: usual.interval.min(idle), ..usual }
}

/// The default. With keepalive the kernel uses the user timeout instead of the number of probes, so it is the duration
/// of the probes: any other value would change when a silent peer is dropped.
fn user_timeout(slow_reader_timeout: Duration, keepalive: Option<&Keepalive>) -> Duration {
    let most = match keepalive {
        Some(keepalive) => keepalive.idle + keepalive.interval * keepalive.probes_max,
        None => slow_reader_timeout.saturating_add(USER_TIMEOUT_BEYOND_SLOW_READER),
    };
    most.clamp(*USER_TIMEOUT.start(), *USER_TIMEOUT.end())
}

/// Parses the address to listen on. Ports have separate flags.
fn parse_bind(text: &str) -> Result<ZonedIp, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) => Err(format!(
            "an address with a port: use only the address, and specify the port as --first-port {}",
            address.port()
        )),
        Err(_) if text.starts_with('[') => {
            Err("brackets are for an address with a port: leave them out".to_owned())
        }
        Err(_) => parse_ip(text),
    }
}

/// Parses a reserve of memory. A small number without a unit may be meant as per cent or as megabytes.
fn parse_reserve(text: &str) -> Result<Reserve, String> {
    match text.trim().parse::<u64>() {
        Ok(1..BARE_BYTES_MIN) => {
            Err(format!("the unit of {text} is missing: use {text}%, {text}M or {text}G"))
        }
        _ => Reserve::parse(text),
    }
}

/// The number of ports, if the range ends at or below 65535.
fn ports(first: u16, count: u64) -> Result<u16, String> {
    let room = u64::from(u16::MAX - first) + 1;
    match u16::try_from(count) {
        Ok(0) => Err("--ports is 0, so there is nothing to listen on: use at least 1".into()),
        Ok(ports) if count <= room => Ok(ports),
        _ => Err(format!(
            "{} from {first} on exceed 65535: use at most --ports {room}, or a lower --first-port",
            format::counted(count, "port")
        )),
    }
}

/// Descriptors for listening: each reactor has its own listeners, and each reactor after the first three more
/// descriptors.
fn listening(ports: u16, threads: u64) -> u64 {
    u64::from(ports) * threads + (threads - 1) * 3
}

impl Settings {
    /// Descriptors that are not for connections, besides those that any process needs and those open at the start.
    pub(crate) fn listening(&self) -> u64 {
        if self.are_sockets_passed { 0 } else { listening(self.ports, self.threads) }
    }

    /// The addresses to listen on.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        (0..self.ports).map(|offset| self.bind.socket_addr(self.first_port + offset))
    }

    /// The last of the ports.
    pub(crate) fn last_port(&self) -> u16 {
        self.first_port + (self.ports - 1)
    }

    /// The number of connections that is compared with the limits.
    pub(crate) fn target(&self) -> u64 {
        self.max_connections.unwrap_or(MILLION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(arguments: &[&str]) -> Result<Command, String> {
        let words = ["c1000k-server"].iter().chain(arguments);
        Args::try_parse_from(words).map_err(|error| error.to_string())?.check()
    }

    #[test]
    fn by_default_it_listens_on_the_hundred_ports() {
        let Ok(Command::Serve(settings)) = checked(&[]) else { panic!("no argument is needed") };
        let addresses: Vec<_> = settings.addresses().collect();
        assert_eq!(addresses.len(), 100);
        assert_eq!(addresses[0], "0.0.0.0:9900".parse().unwrap());
        assert_eq!(addresses[99], "0.0.0.0:9999".parse().unwrap());
        assert_eq!(settings.last_port(), 9999);
    }

    #[test]
    fn an_invalid_value_is_one_line_with_its_remedy() {
        for (arguments, part) in [
            (&["--ports", "0"][..], "at least 1"),
            (&["--first-port", "65500", "--ports", "37"], "--ports 36"),
            (&["--ports", "99999999999"], "exceed 65535"),
            (&["--threads", "0"], "--threads 0 is out of range: use 1 to 256"),
            (&["--threads", "257"], "--threads 257 is out of range: use 1 to 256"),
            (&["--max-connections", "0"], "at least 1"),
            (&["--check", "--connections", "0"], "at least 1"),
            (&["--interval", "0s"], "100ms"),
            (&["--interval", "1us"], "100ms"),
            (&["--idle-timeout", "0s"], "leave it out"),
            (&["--backlog", "0"], "leave it out"),
            (&["--max-per-source", "0"], "leave it out"),
            (&["--keepalive", "10h"], "32767s"),
            (&["--tcp-user-timeout", "100us"], "30s"),
            (&["--tcp-user-timeout", "25days"], "30s"),
            (&["--slow-reader-timeout", "0s"], "60s"),
            (&["--grace", "1h 1ms"], "5s"),
            (&["--bind", "224.0.0.1"], "0.0.0.0"),
            (&["-c", "1000"], "--max-connections 1000"),
            (&["--port", "7000"], "--first-port 7000"),
            (&["--port"], "--first-port 9900"),
            (&["--bind", "255.255.255.255"], "0.0.0.0"),
        ] {
            let Err(line) = checked(arguments) else { panic!("{arguments:?} passed") };
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn the_user_timeout_has_a_default_unless_it_is_given() {
        for (arguments, seconds) in [
            (&[][..], Some(70)),
            (&["--slow-reader-timeout", "2s"], Some(12)),
            (&["--keepalive", "60s"], Some(90)),
            (&["--keepalive", "1s"], Some(4)),
            (&["--keepalive", "1s", "--tcp-user-timeout", "30s"], Some(30)),
            (&["--tcp-user-timeout", "0s"], None),
        ] {
            let Ok(Command::Serve(settings)) = checked(arguments) else { panic!("{arguments:?}") };
            assert_eq!(
                settings.tcp_user_timeout,
                seconds.map(Duration::from_secs),
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn each_thread_has_its_own_listeners() {
        let listening = |arguments| match checked(arguments) {
            Ok(Command::Serve(settings)) => settings.listening(),
            _ => panic!("{arguments:?} are valid"),
        };
        assert_eq!(listening(&["--ports", "7"]), 7);
        assert_eq!(listening(&["--ports", "7", "--threads", "4"]), 28 + 9);
    }

    #[test]
    fn a_value_that_cannot_be_parsed_is_reported_with_its_flag() {
        for (arguments, parts) in [
            (&["--max-connections", "-5"][..], ["--max-connections", "must be positive"]),
            (&["--idle-timeout", "-5s"], ["--idle-timeout", "must be positive"]),
            (&["--memory-reserve", "10"], ["--memory-reserve", "10%"]),
            (&["--memory-reserve", "-1G"], ["--memory-reserve", "must be positive"]),
            (&["--bind", "fe80::1"], ["--bind", "fe80::1%eth0"]),
            (&["--bind", "fe80::1%nowhere"], ["--bind", "no interface \"nowhere\""]),
            (&["--bind", "[::1]"], ["--bind", "leave them out"]),
            (&["--bind", "127.0.0.1:80"], ["--bind", "--first-port 80"]),
            (&["--first-port", "0"], ["--first-port", "port 0 is out of range"]),
            (&["--first-port", "70000"], ["--first-port", "port 70000 is out of range"]),
            (&["--first-port", "-1"], ["--first-port", "\"-1\" is not a port"]),
            (&["--max-connections", "1e99"], ["--max-connections", "\"1e99\" is too large"]),
            (&["--first-ports", "1"], ["--first-ports", "a similar argument exists"]),
            (&["--print", "sysctl"], ["were not provided", "--check"]),
        ] {
            let Err(text) = checked(arguments) else { panic!("{arguments:?} passed") };
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        for reserve in ["0", "10%", "10M", "1073741824"] {
            assert!(checked(&["--memory-reserve", reserve]).is_ok(), "{reserve}");
        }
    }

    #[test]
    fn an_address_to_listen_on_may_have_a_zone() {
        let Ok(Command::Serve(settings)) = checked(&["--bind", "fe80::1%lo", "--ports", "1"])
        else {
            panic!("every machine has lo")
        };
        assert_eq!(settings.bind.to_string(), "fe80::1%lo");
        let addresses: Vec<SocketAddr> = settings.addresses().collect();
        assert!(matches!(addresses[..], [SocketAddr::V6(address)] if address.scope_id() != 0));
    }

    #[test]
    fn the_help_shows_examples() {
        use clap::CommandFactory;
        let help = Args::command().render_help().to_string();
        assert!(help.contains("Examples:\n") && !help.contains("--port "), "{help}");
    }

    #[test]
    fn the_last_port_may_be_65535() {
        assert!(checked(&["--first-port", "65500", "--ports", "36"]).is_ok());
        assert!(checked(&["--bind", "::1", "--first-port", "65535", "--ports", "1"]).is_ok());
    }
}
