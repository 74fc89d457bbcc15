//! mio with the `slab` crate, like its tcp_server example.
//!
//! mio is edge-triggered, and its documentation requires reading until `WouldBlock`. But a read that is shorter than the
//! buffer has emptied the socket. tokio, its main user, relies on this with epoll, and so does this server; it saves one
//! receive per message.

use std::io::{self, ErrorKind, Read, Write};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token};
use slab::Slab;

use super::{BUFFER_BYTES, EVENTS, say_ready};

pub(super) fn serve(listeners: Vec<std::net::TcpListener>) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listeners: Vec<_> = listeners.into_iter().map(TcpListener::from_std).collect();
    for (index, listener) in listeners.iter_mut().enumerate() {
        poll.registry().register(listener, Token(index), Interest::READABLE)?;
    }
    say_ready();
    let mut connections = Slab::new();
    let mut events = Events::with_capacity(EVENTS);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            match listeners.get(event.token().0) {
                Some(listener) => {
                    accept_all(poll.registry(), listener, &mut connections, listeners.len())?;
                }
                None => {
                    let key = event.token().0 - listeners.len();
                    if !connections.get_mut(key).is_some_and(|stream| echo(stream, &mut buffer)) {
                        connections.try_remove(key);
                    }
                }
            }
        }
    }
}

fn accept_all(
    registry: &Registry,
    listener: &TcpListener,
    connections: &mut Slab<TcpStream>,
    tokens_before: usize,
) -> io::Result<()> {
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                let entry = connections.vacant_entry();
                let token = Token(tokens_before + entry.key());
                registry.register(&mut stream, token, Interest::READABLE)?;
                entry.insert(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Returns whether the connection stays open.
fn echo(stream: &mut TcpStream, buffer: &mut [u8]) -> bool {
    loop {
        match stream.read(buffer) {
            Ok(0) => return false,
            Ok(received) => {
                if stream.write_all(&buffer[..received]).is_err() {
                    return false;
                }
                if received < buffer.len() {
                    return true;
                }
            }
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}
