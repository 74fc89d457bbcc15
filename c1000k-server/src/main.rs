//! The server: holds what arrives on its ports from one thread, and shows what it costs.
//!
//! It only wires: [`args`] to settings, settings to a reactor with its [`service`], and what came of
//! it to a [`summary`]. How the reactor works stands in the `reactor` crate.

mod args;
mod closings;
mod guard;
mod meter;
mod service;
mod sources;
mod summary;

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::SystemTime;

use c1000k_host::check::{CapKind, Machine, Need, Role, fits, largest_target, render, table};
use c1000k_host::command_line::{self, REACHED, SHORT, USAGE, fail};
use c1000k_host::limits::{connections_within, raise_descriptor_limit};
use c1000k_host::memory::{MemoryBound, MemoryReader, MemoryRoom};
use c1000k_report::{Destination, format};
use reactor::{Config, Keepalive, ListenOptions, Reactor, Signal};

use args::{Args, Command, Settings};
use guard::Guard;
use meter::Meter;
use service::Service;

/// A connection's output queue holds one read at the most; the rest is room for what is being sent.
const WRITE_QUEUE_BYTES_MAX: usize = 128 * 1024;

/// A second signal ends the process as the signal itself would.
const fn ended_by(signal: Signal) -> u8 {
    match signal {
        Signal::Terminate => 143,
        _ => 130,
    }
}

fn main() -> ExitCode {
    let args = match command_line::parse::<Args>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    command_line::start_log();
    match args.check() {
        Err(line) => fail(USAGE, &line),
        Ok(Command::Check { connections, ports }) => check(connections, ports),
        Ok(Command::Serve(settings)) => match serve(&settings) {
            Ok(code) => code,
            Err(line) => fail(SHORT, &line),
        },
    }
}

/// Prints what this machine allows.
fn check(connections: u64, ports: u64) -> ExitCode {
    let rows = table(&Machine::read(), &Need { ports, ..Need::new(Role::Server, connections) });
    print(&render(&rows));
    ExitCode::from(if fits(&rows) { REACHED } else { SHORT })
}

fn serve(settings: &Settings) -> Result<ExitCode, String> {
    let started_at = SystemTime::now();
    if let Some(destination) = &settings.json {
        destination.check_writable().map_err(|error| error.to_string())?;
    }
    let connections_max = connections_max(settings)?;
    let guard = Guard::new(settings.memory_reserve);
    let mut reactor = listening(settings, connections_max, queues_bytes_max(&guard))?;
    let mut service = Service::new(settings, connections_max, guard, Meter::start());
    service.start(reactor.context()).map_err(|error| error.to_string())?;
    log::info!(
        "ready: listening on {} ports, {} to {}, for {} connections",
        settings.ports,
        SocketAddr::new(settings.bind, settings.first_port),
        settings.last_port(),
        format::count(connections_max),
    );
    reactor.run(&mut service).map_err(|error| format!("the reactor can't go on: {error}"))?;
    if let Some(signal) = service.left_by {
        return Ok(ExitCode::from(ended_by(signal)));
    }
    let stats = reactor.context().stats();
    let record = summary::record(settings, connections_max, started_at, &stats, &mut service);
    let text = summary::text(&record);
    if settings.json == Some(Destination::Stdout) {
        let _ = std::io::stderr().write_all(text.as_bytes());
    } else {
        print(&text);
    }
    if let Some(destination) = &settings.json {
        destination.write(&record).map_err(|error| error.to_string())?;
    }
    Ok(ExitCode::from(REACHED))
}

/// Raises the descriptor limit as far as it goes, and says how many connections may come.
fn connections_max(settings: &Settings) -> Result<u64, String> {
    let limit = raise_descriptor_limit().map_err(|error| {
        format!("the descriptor limit can't be read or raised: {error}; see `ulimit -n`")
    })?;
    let ports = u64::from(settings.ports);
    let room = connections_within(limit.soft, ports);
    if room == 0 {
        return Err(format!(
            "RLIMIT_NOFILE is {}, which is too low for {ports} listening ports: raise it with `ulimit -n`, or give fewer --ports",
            format::count(limit.soft)
        ));
    }
    let need = Need { ports, ..Need::new(Role::Server, settings.target()) };
    let cap = largest_target(&machine_with_all_its_memory(), &need);
    let allowed = match (&settings.max_connections, &cap) {
        (None, Some(cap)) => room.min(cap.connections.max(1)),
        (None, None) => room,
        (Some(asked), _) => room.min(*asked),
    };
    if allowed < settings.target() {
        match cap.filter(|cap| cap.connections <= allowed || cap.kind == CapKind::Descriptors) {
            Some(cap) => log::info!(
                "{} connections are allowed here, of {}: {}; to go further: {}",
                format::count(allowed),
                format::count(settings.target()),
                cap.reason,
                cap.remedy
            ),
            None => log::info!("{} connections are allowed here", format::count(allowed)),
        }
    }
    Ok(allowed)
}

/// What is left of the memory changes, and the guard watches it; all that there is bounds the connections for good.
fn machine_with_all_its_memory() -> Machine {
    let rooms = MemoryReader::new().rooms();
    let whole = rooms.into_iter().find(|room| room.bound_by == MemoryBound::Machine);
    let memory = whole.map(|room| MemoryRoom { bytes: room.total_bytes, ..room });
    Machine { memory, ..Machine::read() }
}

/// All output queues together take a quarter of the memory that is free at the start, at the most.
fn queues_bytes_max(guard: &Guard) -> usize {
    let most = Config::default().write_queues_bytes_max;
    let quarter = guard.spare_bytes().map(|bytes| usize::try_from(bytes / 4).unwrap_or(most));
    quarter.unwrap_or(most).clamp(WRITE_QUEUE_BYTES_MAX, most)
}

/// A reactor that listens on all ports, or on none.
fn listening(
    settings: &Settings,
    connections_max: u64,
    write_queues_bytes_max: usize,
) -> Result<Reactor<()>, String> {
    let refused = |error: reactor::Error| format!("the reactor can't be set up: {error}");
    let config = Config {
        connections_max: usize::try_from(connections_max).unwrap_or(usize::MAX).saturating_add(1),
        listeners_max: usize::from(settings.ports),
        write_queue_bytes_max: WRITE_QUEUE_BYTES_MAX,
        write_queues_bytes_max,
        ..Config::default()
    };
    let mut reactor = Reactor::new(&config).map_err(refused)?;
    let cx = reactor.context();
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate]).map_err(refused)?;
    let options = ListenOptions {
        backlog: settings.backlog,
        keepalive: settings.keepalive.map(|idle| Keepalive { idle, ..Default::default() }),
        user_timeout: settings.tcp_user_timeout,
        ..Default::default()
    };
    for address in settings.addresses() {
        cx.listen(address, &options).map_err(|error| {
            format!("can't listen on {address}: {error}; {}", listen_remedy(&error))
        })?;
    }
    Ok(reactor)
}

fn listen_remedy(error: &reactor::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::AddrInUse => "end what listens there, or give another --first-port",
        ErrorKind::PermissionDenied => "ports below 1024 are for root: give a --first-port above",
        ErrorKind::AddrNotAvailable => "give a --bind that is an address of this machine",
        _ => "give another --bind or --first-port",
    }
}

/// Prints; a reader that has gone away is no fault.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
