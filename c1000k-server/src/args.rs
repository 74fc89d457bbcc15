//! The arguments: as typed, and as checked.

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

/// The connections that everything here is about.
const MILLION: u64 = 1_000_000;

/// What the kernel takes.
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);
const USER_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_millis(i32::MAX as u64);

/// The kernel gives up on a peer that acknowledges nothing this much later than the server does: so the server's own rule
/// applies first and is counted, and the kernel's is for connections that the server has closed already.
const USER_TIMEOUT_BEYOND_SLOW_READER: Duration = Duration::from_secs(10);

/// More frequent status lines can't be read, and cost what they measure.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// An hour is more than any queue takes.
const GRACE_MAX: Duration = Duration::from_secs(3_600);

/// Fewer bytes than these are no reserve of memory.
const BARE_BYTES_MIN: u64 = 1 << 20;

/// The most reactors of a server.
const THREADS_MAX: u64 = 256;

const EXAMPLES: &str = "\
Examples:
  c1000k-server                               echo on 0.0.0.0, ports 9900 to 9999
  c1000k-server --bind ::1 --first-port 7000 --ports 1 --mode sink
  c1000k-server --max-connections 500k --idle-timeout 5m --memory-reserve 10%
  c1000k-server --check -c 1M                 what this machine allows, without a server
  c1000k-server --check -c 1M --print sysctl  what to set for it";

/// Holds a million TCP connections on one thread, and shows what each of them costs.
#[derive(Debug, Parser)]
#[command(name = "c1000k-server", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Address to listen on, IPv4 or IPv6
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0", value_parser = parse_bind)]
    bind: ZonedIp,
    /// The first listening port
    #[arg(long, value_name = "PORT", default_value = "9900", value_parser = parse_port, allow_hyphen_values = true)]
    first_port: u16,
    /// How many ports to listen on
    #[arg(long, value_name = "N", default_value = "100", value_parser = parse_count, allow_hyphen_values = true)]
    ports: u64,
    /// Reactors, each on a thread of its own with its own listeners on all ports
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_count, allow_hyphen_values = true)]
    threads: u64,
    /// The most connections to hold; more are refused [default: what the limits allow]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    max_connections: Option<u64>,
    #[command(flatten)]
    file_table: FileTableArgs,
    /// Send back what arrives, or read and drop it
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Close a connection that has sent nothing for this time [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    idle_timeout: Option<Duration>,
    /// The most connections to hold from one source, an IPv4 address or an IPv6 /64 [default: no limit]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    max_per_source: Option<u64>,
    /// Memory to keep free: below it no connection is admitted [default: 10%, at most 1G]
    #[arg(long, value_name = "SIZE|PERCENT", value_parser = parse_reserve, allow_hyphen_values = true)]
    memory_reserve: Option<Reserve>,
    /// While memory is short: reset new connections, or let them wait
    #[arg(long, value_enum, default_value_t = Overload::Refuse)]
    overload: Overload,
    /// Reset a connection that does not read within this time what waits for it
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration, allow_hyphen_values = true)]
    slow_reader_timeout: Duration,
    /// Probe a peer that has been silent for this time, by TCP keepalive [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    keepalive: Option<Duration>,
    /// Give up a connection whose peer acknowledges nothing for this time; 0s: the kernel's default [default: 10s more
    /// than --slow-reader-timeout, or the time that --keepalive takes]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_hyphen_values = true)]
    tcp_user_timeout: Option<Duration>,
    /// Connections that may wait at each port [default: as many as the kernel allows]
    #[arg(long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    backlog: Option<u64>,
    /// Time between two status lines
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration, allow_hyphen_values = true)]
    interval: Duration,
    /// At the end: time for connections to send what is queued
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration, allow_hyphen_values = true)]
    grace: Duration,
    /// Write the record of the run on exit (`-` is standard output)
    #[arg(long, value_name = "PATH", value_parser = Output::parse)]
    json: Option<Output>,
    /// Serve figures for Prometheus at /metrics of this address; a port alone is one of 127.0.0.1
    #[arg(long, value_name = "ADDR", value_parser = Endpoint::parse_address)]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    check: CheckArgs,
    /// The connections that --check is about [default: 1M]
    #[arg(short = 'c', long, value_name = "N", value_parser = parse_count, allow_hyphen_values = true)]
    connections: Option<u64>,
    /// Not a flag of this program, but of many others
    #[arg(long, hide = true, value_name = "PORT", num_args = 0..=1, default_missing_value = "9900")]
    port: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// What the server does with what it reads.
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

/// What was asked for, and makes sense.
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
    /// `None`: the kernel's own.
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
    /// One line: what is wrong, and what would be right.
    pub(crate) fn check(self) -> Result<Command, String> {
        if let Some(port) = self.port {
            return Err(format!(
                "--port is no flag here: give --first-port {port}, and the number of ports by --ports"
            ));
        }
        let ports = ports(self.first_port, self.ports)?;
        if !(1..=THREADS_MAX).contains(&self.threads) {
            return Err(format!(
                "--threads {} is out of range: give 1 to {THREADS_MAX}; more than there are processors serve no faster",
                self.threads
            ));
        }
        if self.check.check {
            let connections = self.connections.unwrap_or(MILLION);
            if connections == 0 {
                return Err("--connections is 0: give at least 1, or leave it out".into());
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
                "--connections (-c) is for --check: to bound the server give --max-connections {connections}, \
                 else add --check"
            ));
        }
        if self.max_connections == Some(0) {
            return Err("--max-connections is 0, so no peer could connect: give at least 1".into());
        }
        if is_of_many(self.bind.ip) {
            return Err(format!(
                "--bind {} is no address of one machine: give one that this machine has, or 0.0.0.0",
                self.bind
            ));
        }
        if self.interval < INTERVAL_MIN {
            return Err(
                "--interval takes 100ms or more: give the time between two status lines, as 1s"
                    .into(),
            );
        }
        if self.idle_timeout == Some(Duration::ZERO) {
            return Err("--idle-timeout is 0, which would close everything: leave it out".into());
        }
        if self.max_per_source == Some(0) {
            return Err("--max-per-source is 0, so no peer could connect: leave it out".into());
        }
        if self.slow_reader_timeout.is_zero() {
            return Err("--slow-reader-timeout is 0: give the time to read in, as 60s".into());
        }
        if self.keepalive.is_some_and(|idle| !KEEPALIVE.contains(&idle)) {
            return Err(
                "--keepalive takes 1s to 32767s, as TCP does: give a time within, as 60s".into()
            );
        }
        let is_off = self.tcp_user_timeout == Some(Duration::ZERO);
        if !is_off && self.tcp_user_timeout.is_some_and(|most| !USER_TIMEOUT.contains(&most)) {
            return Err(
                "--tcp-user-timeout takes 1ms to 24 days, or 0s for the kernel's own: give a time within, as 30s"
                    .into(),
            );
        }
        let keepalive = self.keepalive.map(keepalive);
        let user_timeout = self
            .tcp_user_timeout
            .unwrap_or_else(|| user_timeout(self.slow_reader_timeout, keepalive.as_ref()));
        if self.grace > GRACE_MAX {
            return Err("--grace is more than 1h: give how long the end may take, as 5s".into());
        }
        if self.backlog == Some(0) {
            return Err(
                "--backlog is 0, so no connection could wait: leave it out, or give 1".into()
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

/// With a short idle time the probes are as close to each other as that time.
fn keepalive(idle: Duration) -> Keepalive {
    let usual = Keepalive::default();
    Keepalive { idle, interval: usual.interval.min(idle), ..usual }
}

/// Where none is given. With keepalive the kernel takes the user timeout in place of the number of probes, so it is the
/// time of these: any other would change when a silent peer is given up.
fn user_timeout(slow_reader_timeout: Duration, keepalive: Option<&Keepalive>) -> Duration {
    let most = match keepalive {
        Some(keepalive) => keepalive.idle + keepalive.interval * keepalive.probes_max,
        None => slow_reader_timeout.saturating_add(USER_TIMEOUT_BEYOND_SLOW_READER),
    };
    most.clamp(*USER_TIMEOUT.start(), *USER_TIMEOUT.end())
}

/// Reads the address to listen on. Ports have flags of their own.
fn parse_bind(text: &str) -> Result<ZonedIp, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) => Err(format!(
            "an address with a port: give the address alone, and the port as --first-port {}",
            address.port()
        )),
        Err(_) if text.starts_with('[') => {
            Err("brackets are for an address with a port: leave them out".to_owned())
        }
        Err(_) => parse_ip(text),
    }
}

/// Reads a reserve of memory. A small number without a unit may have been meant in per cent or in megabytes.
fn parse_reserve(text: &str) -> Result<Reserve, String> {
    match text.trim().parse::<u64>() {
        Ok(1..BARE_BYTES_MIN) => {
            Err(format!("{text} of what? Give a unit, as {text}%, {text}M or {text}G"))
        }
        _ => Reserve::parse(text),
    }
}

/// The number of ports, if that many follow the first one.
fn ports(first: u16, count: u64) -> Result<u16, String> {
    let room = u64::from(u16::MAX - first) + 1;
    match u16::try_from(count) {
        Ok(0) => Err("--ports is 0, so there is nothing to listen on: give at least 1".into()),
        Ok(ports) if count <= room => Ok(ports),
        _ => Err(format!(
            "{} from {first} on go past 65535: give at most --ports {room}, or a lower --first-port",
            format::counted(count, "port")
        )),
    }
}

/// Descriptors to listen with: each reactor has its own listeners, and each one more three descriptors of its own.
fn listening(ports: u16, threads: u64) -> u64 {
    u64::from(ports) * threads + (threads - 1) * 3
}

impl Settings {
    /// Descriptors that are not for connections, beside what any process needs and what is open at the start.
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

    /// The connections that limits are compared with.
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
    fn without_arguments_it_serves_on_the_hundred_ports() {
        let Ok(Command::Serve(settings)) = checked(&[]) else { panic!("no argument is needed") };
        let addresses: Vec<_> = settings.addresses().collect();
        assert_eq!(addresses.len(), 100);
        assert_eq!(addresses[0], "0.0.0.0:9900".parse().unwrap());
        assert_eq!(addresses[99], "0.0.0.0:9999".parse().unwrap());
        assert_eq!(settings.last_port(), 9999);
    }

    #[test]
    fn what_makes_no_sense_is_one_line_with_its_remedy() {
        for (arguments, part) in [
            (&["--ports", "0"][..], "at least 1"),
            (&["--first-port", "65500", "--ports", "37"], "--ports 36"),
            (&["--ports", "99999999999"], "past 65535"),
            (&["--threads", "0"], "--threads 0 is out of range: give 1 to 256"),
            (&["--threads", "257"], "--threads 257 is out of range: give 1 to 256"),
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
    fn what_a_peer_does_not_take_is_given_up_unless_told_otherwise() {
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
            _ => panic!("{arguments:?} are right"),
        };
        assert_eq!(listening(&["--ports", "7"]), 7);
        assert_eq!(listening(&["--ports", "7", "--threads", "4"]), 28 + 9);
    }

    #[test]
    fn a_value_that_cannot_be_read_is_told_with_its_flag() {
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
            (&["--first-port", "-1"], ["--first-port", "\"-1\" is no port"]),
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
            panic!("lo is everywhere")
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
