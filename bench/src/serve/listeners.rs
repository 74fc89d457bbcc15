//! Listening sockets for servers that do not create their own.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};

use super::BACKLOG;

/// Creates the listening sockets, with the same options as those of the reactor.
pub(super) fn bound(ports: Range<u16>) -> io::Result<Vec<TcpListener>> {
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
