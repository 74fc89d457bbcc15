//! polling in level-triggered mode, with the `slab` crate: no call is needed to re-arm a connection after an event.

// With polling, the caller must ensure that a socket outlives its registration, so `add` is unsafe.
#![allow(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;

use nix::sys::socket::{SockFlag, accept4};
use polling::{Event, Events, PollMode, Poller};
use slab::Slab;

use super::{BUFFER_BYTES, EVENTS, say_ready};

pub(super) fn serve(listeners: Vec<TcpListener>) -> io::Result<()> {
    let poller = Poller::new()?;
    for (key, listener) in listeners.iter().enumerate() {
        // SAFETY: the listeners live as long as the poller, which is until the process ends.
        unsafe { poller.add_with_mode(listener, Event::readable(key), PollMode::Level)? };
    }
    say_ready();
    let mut connections = Slab::new();
    let mut events = Events::with_capacity(NonZeroUsize::new(EVENTS).unwrap_or(NonZeroUsize::MIN));
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        events.clear();
        poller.wait(&mut events, None)?;
        for event in events.iter() {
            match listeners.get(event.key) {
                Some(listener) => accept_all(&poller, listener, &mut connections, listeners.len())?,
                None => {
                    let key = event.key - listeners.len();
                    if !connections.get_mut(key).is_some_and(|stream| echo(stream, &mut buffer))
                        && let Some(stream) = connections.try_remove(key)
                    {
                        poller.delete(&stream)?;
                    }
                }
            }
        }
    }
}

fn accept_all(
    poller: &Poller,
    listener: &TcpListener,
    connections: &mut Slab<TcpStream>,
    keys_before: usize,
) -> io::Result<()> {
    loop {
        match accept(listener) {
            Ok(stream) => {
                let entry = connections.vacant_entry();
                let interest = Event::readable(keys_before + entry.key());
                // SAFETY: a connection is deleted from the poller before it is dropped.
                unsafe { poller.add_with_mode(&stream, interest, PollMode::Level)? };
                entry.insert(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// `TcpListener::accept` would need one more call to make the stream non-blocking.
fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(accept4(listener, flags)?.into())
}

/// Returns whether the connection stays open.
fn echo(stream: &mut TcpStream, buffer: &mut [u8]) -> bool {
    match stream.read(buffer) {
        Ok(0) => false,
        Ok(received) => stream.write_all(&buffer[..received]).is_ok(),
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}
