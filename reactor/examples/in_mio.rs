//! A reactor driven by another epoll loop: `cargo run --example in_mio -- 127.0.0.1:7007`.
//!
//! The program's own mio loop serves a UDP socket, and also waits for the reactor's descriptor. Both echo their input, on
//! the same port.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mio::net::UdpSocket;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};
use reactor::{Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, Status, Token};

use common::{Failure, address};

mod common;

const REACTOR: mio::Token = mio::Token(0);
const DATAGRAMS: mio::Token = mio::Token(1);

struct Echo;

impl Handler for Echo {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        if cx.write(token, bytes).is_err() {
            cx.abort(token);
        }
    }
}

/// Echoes all pending datagrams.
fn answer(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        match socket.recv_from(buffer) {
            Ok((length, peer)) => drop(socket.send_to(&buffer[..length], peer)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn run(reactor: &mut Reactor<()>, mut datagrams: UdpSocket) -> Result<(), Failure> {
    let (mut poll, mut events) = (Poll::new()?, Events::with_capacity(64));
    let mut buffer = vec![0; 64 * 1024];
    poll.registry().register(&mut SourceFd(&reactor.as_raw_fd()), REACTOR, Interest::READABLE)?;
    poll.registry().register(&mut datagrams, DATAGRAMS, Interest::READABLE)?;
    // mio is edge-triggered, so the descriptor counts as readable until a turn has found no event.
    let mut is_readable = false;
    loop {
        let wait = match reactor.next_deadline() {
            _ if is_readable => Some(Duration::ZERO),
            due => due.map(|due| due.saturating_duration_since(Instant::now())),
        };
        match poll.poll(&mut events, wait) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
            _ => {}
        }
        is_readable |= events.iter().any(|event| event.token() == REACTOR);
        if events.iter().any(|event| event.token() == DATAGRAMS) {
            answer(&datagrams, &mut buffer)?;
        }
        if is_readable || reactor.next_deadline().is_some_and(|due| due <= Instant::now()) {
            let before = reactor.context().stats().events;
            if reactor.turn(&mut Echo, Some(Duration::ZERO))? == Status::Stopped {
                return Ok(());
            }
            is_readable = reactor.context().stats().events > before;
        }
    }
}

fn main() -> Result<(), Failure> {
    let address = address(&std::env::args().nth(1).unwrap_or("127.0.0.1:7007".to_owned()));
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    let listener = cx.listen(address, &ListenOptions::default())?;
    let address = cx.listener_addr(listener)?;
    let datagrams = UdpSocket::bind(address)?;
    println!("listening on {address}");
    run(&mut reactor, datagrams)
}
