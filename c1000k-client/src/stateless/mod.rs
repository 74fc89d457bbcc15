//! Clients without sockets: a tun device passes every packet for a prefix to this process, which acts as all clients.
//!
//! The same phases as with sockets, over [`Tcp`] instead of a reactor's connections: the ramp, the hold with messages
//! and churn, the storm, the second verification, and the resets. One thread serves all.

mod device;
mod driver;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod segment;
mod tcp;
mod tuple;

use std::net::SocketAddrV4;

use c1000k_host::format;
use ipnet::Ipv4Net;
use reactor::{Config, Reactor, Signal};

use self::device::Device;
use self::driver::Driver;
pub(crate) use self::segment::PAYLOAD_MAX;
use self::tcp::Tcp;
pub(crate) use self::tuple::{Tuples, device_address};
use crate::progress::Progress;
use crate::protocols::Protocol;
use crate::run::Settings;
use crate::stats::RunStats;

/// The addresses of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Setup {
    /// The addresses of the clients.
    pub(crate) prefix: Ipv4Net,
    /// The server's address and first port.
    pub(crate) server: SocketAddrV4,
    pub(crate) ports: u16,
    /// The server is a process of this machine.
    pub(crate) is_here: bool,
    /// The share of dropped packets, for tests.
    pub(crate) loss: Option<f64>,
}

/// Runs the phases.
///
/// # Errors
/// One line, if the device is not available or waiting for events fails.
pub(crate) fn play<P: Protocol>(
    setup: &Setup,
    settings: Settings,
    protocol: P,
    mut stats: RunStats,
    progress: &Progress,
) -> Result<RunStats, String> {
    let device = Device::open(setup.prefix, setup.loss)?;
    let tuples = Tuples::new(setup.prefix, setup.server, setup.ports);
    announce(setup, &device, &tuples, settings.goal);
    stats.expected = protocol.expected();
    let tcp = Tcp::new(protocol, tuples, device, settings.goal, settings.timeout, settings.verify);
    let mut reactor = Reactor::new(&Config { connections_max: 1, ..Config::default() })
        .map_err(|error| start(&error))?;
    let cx = reactor.context();
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate]).map_err(|error| start(&error))?;
    let mut driver =
        Driver::new(setup, settings, stats, progress, tcp).map_err(|errno| start(&errno))?;
    driver.start(cx).map_err(|error| start(&error))?;
    let outcome = reactor.run(&mut driver);
    progress.end();
    outcome.map_err(|error| format!("can't wait for events: {error}"))?;
    let (mut stats, tcp) = driver.into_parts();
    stats.retransmitted = Some(tcp.counters.retransmitted);
    stats.state_bytes = Some(tcp.state_bytes());
    if tcp.link.unsent > 0 {
        log::warn!(
            "{} could not be sent by the device",
            format::counted(tcp.link.unsent, "packet")
        );
    }
    if tcp.counters.strays > 0 {
        log::info!("{} belonged to no connection", format::counted(tcp.counters.strays, "packet"));
    }
    Ok(stats)
}

fn start(error: &dyn std::fmt::Display) -> String {
    format!("can't start: {error}; see ulimit -n")
}

/// Logs the addresses of the device and the clients.
fn announce(setup: &Setup, device: &Device, tuples: &Tuples, goal: u32) {
    let own = device_address(setup.prefix);
    log::info!(
        "stateless: device {} is {own}/{}; the clients are {} to {}, and send to {} only",
        device.name(),
        setup.prefix.prefix_len(),
        tuples.first_client(),
        tuples.last_client(goal),
        setup.server.ip(),
    );
    if *setup.server.ip() == own {
        log::info!(
            "a server of this machine is reached at {own}: it has to listen on all addresses"
        );
    } else if !setup.is_here {
        log::info!("{}", return_route(setup));
    }
}

/// The routes that answers from another machine need.
fn return_route(setup: &Setup) -> String {
    format!(
        "the server's machine has to send answers here: on it, or on its gateway: \
         ip route add {} via ADDRESS_OF_THIS_MACHINE; here: sysctl -w net.ipv4.ip_forward=1",
        setup.prefix
    )
}
