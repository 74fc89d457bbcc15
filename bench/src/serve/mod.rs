//! The same echo server once per contestant, each in the best form that its own documentation recommends.
//!
//! Alike in all: the listening sockets ([`listeners`]), one thread, [`EVENTS`] events a wait where that can be said,
//! accepting as the library likes it, and one receive and one send per message: none reads again after a short read.
//! Where the library lets connections share one read buffer, it has [`BUFFER_BYTES`].

mod mio;
mod monoio;
mod polling;
mod reactor;
mod tokio;

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};

/// The read buffer that all connections share.
const BUFFER_BYTES: usize = 64 * 1024;

/// Events taken from the kernel at once.
const EVENTS: usize = 1024;

/// Connections that may wait to be accepted on each listener.
const BACKLOG: i32 = 4096;

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Library {
    Reactor,
    Mio,
    Polling,
    Tokio,
    Monoio,
}

/// Serves until it is killed.
pub(crate) fn serve(
    library: Library,
    first_port: u16,
    ports: u16,
    idle_timeout: Option<Duration>,
) -> io::Result<()> {
    let addresses = first_port..first_port + ports;
    match library {
        Library::Reactor => reactor::serve(addresses, idle_timeout),
        Library::Mio => mio::serve(listeners(addresses)?),
        Library::Polling => polling::serve(listeners(addresses)?),
        Library::Tokio => tokio::serve(listeners(addresses)?, idle_timeout),
        Library::Monoio => monoio::serve(listeners(addresses)?),
    }
}

/// Says that the ports are open.
fn say_ready() {
    println!("ready");
}

/// The listening sockets, with the options that the reactor gives its own.
fn listeners(ports: std::ops::Range<u16>) -> io::Result<Vec<TcpListener>> {
    ports.map(listener).collect()
}

fn listener(port: u16) -> io::Result<TcpListener> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    let [a, b, c, d] = Ipv4Addr::LOCALHOST.octets();
    bind(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, port))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}
