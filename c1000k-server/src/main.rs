//! The server: holds what arrives on its ports, from one thread unless told otherwise, and shows what it costs.
//!
//! It only wires: [`args`] to settings, settings to a reactor with its [`echo`], and what came of
//! it to a [`summary`]. How the reactor works stands in the `reactor` crate.

mod admission;
mod args;
mod closings;
mod echo;
mod metrics;
mod slow;
mod summary;
mod workers;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use c1000k_host::check::{
    CapKind, FileTable, FileTableChoice, Machine, Need, Role, fits, largest_target, render, table,
};
use c1000k_host::command_line::{self, REACHED, SHORT, USAGE, fail, print, print_error};
use c1000k_host::format;
use c1000k_host::limits::raise_descriptor_limit;
use c1000k_host::memory::{MemoryBound, MemoryReader, MemoryRoom};
use c1000k_host::ports::{PortHolder, port_holder};
use c1000k_record::{Destination, ServerRecord};
use reactor::{Config, ListenOptions, Reactor, Signal, Status};

use admission::memory::Guard;
use args::{Args, Command, Settings};
use echo::{Echo, SHUT_DOWN};
use metrics::Sampler;
use workers::{Lead, Shared, Workers};

/// A connection's output queue holds one read at the most; the rest is room for what is being sent.
const WRITE_QUEUE_BYTES_MAX: usize = 128 * 1024;

/// A second signal ends the process as the signal itself would.
const fn exit_code(left_by: Option<Signal>) -> u8 {
    match left_by {
        None => REACHED,
        Some(Signal::Terminate) => 143,
        Some(_) => 130,
    }
}

fn main() -> ExitCode {
    let code = run_command();
    command_line::flush_log();
    code
}

fn run_command() -> ExitCode {
    let args = match command_line::parse::<Args>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    command_line::start_log();
    match args.check() {
        Err(line) => fail(USAGE, &line),
        Ok(Command::Check { file_table, connections, listening }) => {
            check(file_table, connections, listening)
        }
        Ok(Command::Serve(settings)) => {
            let guard = Guard::new(settings.memory_reserve, settings.threads);
            if let Err(line) = guard.check_reserve() {
                return fail(USAGE, &line);
            }
            serve(&settings, guard).unwrap_or_else(|line| fail(SHORT, &line))
        }
    }
}

/// Prints what this machine allows.
fn check(choice: FileTableChoice, connections: u64, listening: u64) -> ExitCode {
    let machine = machine();
    let need = match need(choice, connections, listening, &machine) {
        Ok(need) => need,
        Err(line) => return fail(SHORT, &line),
    };
    let rows = table(&machine, &need);
    print(&render(&rows));
    ExitCode::from(if fits(&rows) { REACHED } else { SHORT })
}

fn serve(settings: &Settings, guard: Guard) -> Result<ExitCode, String> {
    let started_at = SystemTime::now();
    if let Some(destination) = &settings.json {
        destination.check_writable().map_err(|error| error.to_string())?;
    }
    let room = room(settings)?;
    let connections_max = room.connections_max;
    let (mut reactor, others) = listening(settings, room, queues_bytes_max(&guard))?;
    let shared = Arc::new(Shared::new(settings, connections_max, guard));
    let sampler = Sampler::start();
    let workers = Workers::start(others, settings, &shared, &reactor.context().waker())?;
    let mut service = Echo::new(settings, &shared, Lead { sampler, workers });
    service.start(reactor.context()).map_err(|error| error.to_string())?;
    for blind_spot in shared.guard().blind_spots() {
        log::warn!("{blind_spot}");
    }
    tell_ready(settings, room);
    if let Some(bytes) = shared.guard().lacking_bytes().filter(|&bytes| bytes > 0) {
        log::warn!("nobody can be admitted until {} more are free", format::bytes(bytes));
    }
    run(&mut reactor, &mut service).map_err(|error| format!("the reactor can't go on: {error}"))?;
    service.duty.workers.join()?;
    let totals = service.duty.totals(service.totals(reactor.context()), &shared);
    let sampler = &mut service.duty.sampler;
    let memory_guard = shared.guard().record(Instant::now());
    let record = summary::record(settings, room, started_at, &totals, sampler, memory_guard);
    tell_losses(&record);
    let code = exit_code(service.left_by);
    conclude(settings, &record).map(|()| ExitCode::from(code))
}

/// Output that was lost is told of where people look first.
fn tell_losses(record: &ServerRecord) {
    let lost = |reason| record.closed_by.get(reason).copied().unwrap_or(0);
    let cut_off = lost(SHUT_DOWN) + record.open;
    if cut_off > 0 {
        log::warn!(
            "cut off at the end: {}, and what the peers had not taken is lost: a longer --grace gives them time",
            format::counted(cut_off, "connection")
        );
    }
}

/// The record, and the summary. Neither holds the end up: signals that come while a pipe is not read end the program.
fn conclude(settings: &Settings, record: &ServerRecord) -> Result<(), String> {
    let write = |destination: &Destination| destination.write(record);
    let (waiting, prompt) = match &settings.json {
        Some(destination) if destination.may_wait() => (Some(destination), None),
        prompt => (None, prompt.as_ref()),
    };
    let written = prompt.map_or(Ok(()), write);
    command_line::give_signals_back();
    let text = summary::text(record);
    if settings.json == Some(Destination::Stdout) {
        print_error(&text);
    } else {
        print(&text);
    }
    let written = written.and_then(|()| waiting.map_or(Ok(()), write));
    written.map_err(|error| {
        command_line::flush_log();
        error.print_instead(record)
    })
}

fn tell_ready(settings: &Settings, room: Room) {
    let threads = match settings.threads {
        1 => String::new(),
        threads => format!(", by {threads} threads"),
    };
    let last = match settings.ports {
        1 => String::new(),
        _ => format!(" to {}", settings.last_port()),
    };
    log::info!(
        "ready: listening on {}, {}{last}, for {}{threads}",
        format::counted(u64::from(settings.ports), "port"),
        settings.bind.socket_addr(settings.first_port),
        format::counted(room.connections_max, "connection"),
    );
}

/// Serves until all threads have let go of all their connections, or a second signal says that this takes too long.
fn run(reactor: &mut Reactor<()>, service: &mut Echo<Lead>) -> Result<(), reactor::Error> {
    reactor.run(service)?;
    while service.left_by.is_none() && service.duty.workers.running() > 0 {
        if reactor.turn(service, None)? == Status::Stopped {
            break;
        }
    }
    Ok(())
}

/// This machine with the descriptor limit raised as far as it goes; what falls short of the hard limit is said.
fn machine() -> Machine {
    let raised = raise_descriptor_limit()
        .inspect_err(|error| log::warn!("the descriptor limit can't be read: {error}"))
        .ok();
    if let Some(line) = raised.as_ref().and_then(|raised| raised.shortfall.as_ref()) {
        log::warn!("{line}");
    }
    Machine { descriptors: raised.map(|raised| raised.limit), ..Machine::read() }
}

/// Says how many connections may come, and where their sockets are held.
fn room(settings: &Settings) -> Result<Room, String> {
    let machine = with_all_its_memory(machine());
    let listening = settings.listening();
    if machine.connections_within(listening) == Some(0) {
        return Err(no_room(settings, &machine));
    }
    let need = need(settings.file_table, settings.target(), listening, &machine)?;
    let cap = largest_target(&machine, &need);
    let most = cap.as_ref().map(|cap| cap.connections.max(1));
    let by_files = match need.file_table {
        FileTable::Process => machine.connections_within(listening),
        FileTable::Registered => None,
    };
    let allowed = match settings.max_connections {
        None => most.unwrap_or(settings.target()),
        Some(asked) => asked.min(by_files.unwrap_or(asked)),
    };
    if allowed < settings.target() {
        match cap.filter(|cap| cap.connections <= allowed || cap.kind == CapKind::Descriptors) {
            Some(cap) => log::info!(
                "allowed here: {} of {}: {}; to go further: {}",
                format::counted(allowed, "connection"),
                format::count(settings.target()),
                cap.reason,
                cap.remedy
            ),
            None => log::info!("allowed here: {}", format::counted(allowed, "connection")),
        }
    }
    Ok(Room { connections_max: allowed, file_table: need.file_table })
}

/// How many connections may come, and where their sockets are held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) connections_max: u64,
    pub(crate) file_table: FileTable,
}

/// What so many connections need, their sockets in the table that was asked for.
fn need(
    choice: FileTableChoice,
    connections: u64,
    listening: u64,
    machine: &Machine,
) -> Result<Need, String> {
    let need = Need { ports: listening, ..Need::new(Role::Server, connections) };
    need.with_file_table(choice, machine)
}

fn no_room(settings: &Settings, machine: &Machine) -> String {
    let (threads, fewer) = match settings.threads {
        1 => (String::new(), "--ports"),
        threads => (format!(" in {threads} threads"), "--ports or --threads"),
    };
    let inherited = match machine.descriptors_inherited {
        0 => String::new(),
        count => format!(" and {} open at the start", format::counted(count, "descriptor")),
    };
    format!(
        "RLIMIT_NOFILE is {}, which is too low for {}{threads}{inherited}: raise it with `ulimit -n`, or give fewer {fewer}",
        format::count(machine.descriptors.map_or(0, |limit| limit.hard)),
        format::counted(u64::from(settings.ports), "listening port"),
    )
}

/// What is left of the memory changes, and the guard watches it; all that there is bounds the connections for good.
fn with_all_its_memory(machine: Machine) -> Machine {
    let rooms = MemoryReader::new().rooms();
    let whole = rooms.into_iter().find(|room| room.bound_by == MemoryBound::Machine);
    let memory = whole.map(|room| MemoryRoom { bytes: room.total_bytes, ..room });
    Machine { memory, ..machine }
}

/// What all output queues together may take.
fn queues_bytes_max(guard: &Guard) -> usize {
    let most = Config::default().write_queues_bytes_max;
    let part = guard.queues_bytes_max().map(|bytes| usize::try_from(bytes).unwrap_or(most));
    part.unwrap_or(most).clamp(WRITE_QUEUE_BYTES_MAX, most)
}

/// The reactors, the lead's first, each of which listens on all ports, or none does.
fn listening(
    settings: &Settings,
    room: Room,
    write_queues_bytes_max: usize,
) -> Result<(Reactor<()>, Vec<Reactor<()>>), String> {
    let remedy = |error: &reactor::Error| match room.file_table {
        _ if error.errno().is_none() => {
            "see ulimit -v and ulimit -d, or give a lower --max-connections"
        }
        FileTable::Process => "see ulimit -n, or give a lower --max-connections",
        FileTable::Registered => {
            "see ulimit -l and ulimit -n, or give --file-table process or a lower --max-connections"
        }
    };
    let refused =
        |error: reactor::Error| format!("the reactor can't be set up: {error}; {}", remedy(&error));
    let threads = usize::try_from(settings.threads).unwrap_or(usize::MAX);
    let config = Config {
        connections_max: usize::try_from(room.connections_max)
            .unwrap_or(usize::MAX)
            .saturating_add(1),
        file_table: room.file_table.into(),
        listeners_max: usize::from(settings.ports),
        write_queue_bytes_max: WRITE_QUEUE_BYTES_MAX,
        write_queues_bytes_max: (write_queues_bytes_max / threads).max(WRITE_QUEUE_BYTES_MAX),
        ..Config::default()
    };
    let mut lead = Reactor::new(&config).map_err(refused)?;
    lead.context().watch_signals(&[Signal::Interrupt, Signal::Terminate]).map_err(refused)?;
    if threads > 1 {
        see_that_ports_are_free(settings, &mut lead)?;
    }
    listen(settings, &mut lead)?;
    let mut others = Vec::new();
    for _ in 1..threads {
        let mut reactor = Reactor::new(&config).map_err(refused)?;
        listen(settings, &mut reactor)?;
        others.push(reactor);
    }
    Ok((lead, others))
}

/// With `SO_REUSEPORT` two servers of one user would share their ports without a word; without it the kernel tells.
fn see_that_ports_are_free(settings: &Settings, reactor: &mut Reactor<()>) -> Result<(), String> {
    let cx = reactor.context();
    for address in settings.addresses() {
        let options = ListenOptions { backlog: Some(1), ..Default::default() };
        let listener =
            cx.listen(address, &options).map_err(|error| listen_refusal(address, &error))?;
        cx.unlisten(listener);
    }
    Ok(())
}

fn listen(settings: &Settings, reactor: &mut Reactor<()>) -> Result<(), String> {
    let options = ListenOptions {
        backlog: settings.backlog,
        reuse_port: settings.threads > 1,
        keepalive: settings.keepalive,
        user_timeout: settings.tcp_user_timeout,
        ..Default::default()
    };
    for address in settings.addresses() {
        let listened = reactor.context().listen(address, &options);
        listened.map_err(|error| listen_refusal(address, &error))?;
    }
    Ok(())
}

fn listen_refusal(address: SocketAddr, error: &reactor::Error) -> String {
    format!("can't listen on {address}: {error}; {}", listen_remedy(address.port(), error))
}

fn listen_remedy(port: u16, error: &reactor::Error) -> String {
    use std::io::ErrorKind;
    let remedy = match error.kind() {
        ErrorKind::AddrInUse => return port_remedy(port),
        ErrorKind::PermissionDenied => "ports below 1024 are for root: give a --first-port above",
        ErrorKind::AddrNotAvailable => "give a --bind that is an address of this machine",
        _ => "give another --bind or --first-port",
    };
    remedy.to_owned()
}

/// What to do about a port that is in use depends on what uses it.
fn port_remedy(port: u16) -> String {
    match port_holder(port) {
        Some(PortHolder::Listener) => {
            "end what listens there, or give another --first-port".to_owned()
        }
        Some(PortHolder::Connection) => format!(
            "it is the local port of a connection of this machine: end that one, or give another --first-port; \
             sysctl -w net.ipv4.ip_local_reserved_ports={port} keeps the kernel from choosing it"
        ),
        None => "a socket is bound to it: end its program, or give another --first-port".to_owned(),
    }
}
