//! The reactors and their listeners.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};

use c1000k_host::check::FileTable;
use c1000k_host::ports::{PortHolder, port_holder};
use reactor::{Config, ListenOptions, Reactor, Signal};

use crate::admission::MemoryGuard;
use crate::args::Settings;
use crate::plan::Plan;

/// A connection's output queue holds at most one read; the rest is room for data that is being sent.
const WRITE_QUEUE_BYTES_MAX: usize = 128 * 1024;

/// The maximum of all output queues together.
pub(crate) fn queues_bytes_max(guard: &MemoryGuard) -> usize {
    let most = Config::default().write_queues_bytes_max;
    let part = guard.queues_bytes_max().map(|bytes| usize::try_from(bytes).unwrap_or(most));
    part.unwrap_or(most).clamp(WRITE_QUEUE_BYTES_MAX, most)
}

/// The reactors, beginning with the main thread's, each of which listens on all ports: with the passed sockets, or with
/// new ones.
///
/// # Errors
/// One line: the failure and its remedy.
pub(crate) fn reactors(
    settings: &Settings,
    plan: Plan,
    write_queues_bytes_max: usize,
    passed: Vec<TcpListener>,
) -> Result<(Reactor<()>, Vec<Reactor<()>>), String> {
    let remedy = |error: &reactor::Error| match plan.file_table {
        _ if error.errno().is_none() => {
            "see ulimit -v and ulimit -d, or use a lower --max-connections"
        }
        FileTable::Process => "see ulimit -n, or use a lower --max-connections",
        FileTable::Registered => {
            "see ulimit -l and ulimit -n, or use --file-table process or a lower --max-connections"
        }
    };
    let refused =
        |error: reactor::Error| format!("the reactor can't be set up: {error}; {}", remedy(&error));
    let threads = usize::try_from(settings.threads).unwrap_or(usize::MAX);
    let config = Config {
        connections_max: usize::try_from(plan.connections_max)
            .unwrap_or(usize::MAX)
            .saturating_add(1),
        file_table: plan.file_table.into(),
        listeners_max: usize::from(settings.ports),
        write_queue_bytes_max: WRITE_QUEUE_BYTES_MAX,
        write_queues_bytes_max: (write_queues_bytes_max / threads).max(WRITE_QUEUE_BYTES_MAX),
        ..Config::default()
    };
    let mut first = Reactor::new(&config).map_err(refused)?;
    first.context().watch_signals(&[Signal::Interrupt, Signal::Terminate]).map_err(refused)?;
    if threads > 1 {
        check_ports_are_free(settings, &mut first)?;
    }
    if passed.is_empty() {
        listen(settings, &mut first)?;
    }
    for socket in passed {
        let listened = first.context().adopt_listener(socket, &options(settings));
        listened.map_err(|error| format!("can't listen on a socket of LISTEN_FDS: {error}"))?;
    }
    let mut others = Vec::new();
    for _ in 1..threads {
        let mut reactor = Reactor::new(&config).map_err(refused)?;
        listen(settings, &mut reactor)?;
        others.push(reactor);
    }
    Ok((first, others))
}

/// With `SO_REUSEPORT` two servers of one user could share their ports by mistake, so each port is first bound without
/// it.
fn check_ports_are_free(settings: &Settings, reactor: &mut Reactor<()>) -> Result<(), String> {
    let cx = reactor.context();
    for address in settings.addresses() {
        let options = ListenOptions { backlog: Some(1), ..Default::default() };
        let listener =
            cx.listen(address, &options).map_err(|error| listen_refusal(address, &error))?;
        cx.unlisten(listener);
    }
    Ok(())
}

fn options(settings: &Settings) -> ListenOptions {
    ListenOptions {
        backlog: settings.backlog,
        reuse_port: settings.threads > 1,
        keepalive: settings.keepalive,
        user_timeout: settings.tcp_user_timeout,
        ..Default::default()
    }
}

fn listen(settings: &Settings, reactor: &mut Reactor<()>) -> Result<(), String> {
    let options = options(settings);
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
    let remedy = match error.kind() {
        ErrorKind::AddrInUse => return port_remedy(port),
        ErrorKind::PermissionDenied => "ports below 1024 need root: use a higher --first-port",
        ErrorKind::AddrNotAvailable => "use an address of this machine with --bind",
        _ => "use another --bind or --first-port",
    };
    remedy.to_owned()
}

/// The remedy for a port that is in use, which depends on what uses it.
fn port_remedy(port: u16) -> String {
    match port_holder(port) {
        Some(PortHolder::Listener) => {
            "end the program that listens there, or use another --first-port".to_owned()
        }
        Some(PortHolder::Connection) => format!(
            "it is the local port of a connection of this machine: close that connection, or use another \
             --first-port; sysctl -w net.ipv4.ip_local_reserved_ports={port} keeps the kernel from choosing it"
        ),
        None => "a socket is bound to it: end its program, or use another --first-port".to_owned(),
    }
}
