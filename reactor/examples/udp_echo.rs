//! A UDP echo server: `cargo run --example udp_echo -- 127.0.0.1:7007`.
//!
//! The UDP socket is a watched descriptor: the reactor reports when it is ready, and the service reads and writes it.

use std::io::ErrorKind;
use std::net::UdpSocket;

use reactor::{
    Config, Context, Handler, Incoming, Interest, Reactor, Readiness, Signal, Token, WatchId,
};

use common::{Failure, address};

mod common;

/// The maximum number of datagrams per call, so that other descriptors are served too; the rest is reported again.
const DATAGRAMS_PER_TURN: usize = 64;

struct UdpEcho {
    socket: UdpSocket,
    buffer: Vec<u8>,
}

impl UdpEcho {
    fn answer_one(&mut self) -> std::io::Result<()> {
        let (length, peer) = self.socket.recv_from(&mut self.buffer)?;
        // If the kernel can't accept the datagram now, it is lost, as datagrams may be.
        let _ = self.socket.send_to(&self.buffer[..length], peer);
        Ok(())
    }
}

impl Handler for UdpEcho {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        None
    }

    fn on_data(&mut self, _cx: &mut Context<()>, _token: Token, _conn: &mut (), _bytes: &mut [u8]) {
    }

    fn on_ready(&mut self, _cx: &mut Context<()>, _watch: WatchId, _readiness: Readiness) {
        for _ in 0..DATAGRAMS_PER_TURN {
            match self.answer_one() {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // An earlier answer was rejected, for example because the port of its receiver is closed.
                Err(error) => eprintln!("a datagram was lost: {error}"),
            }
        }
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:7007".to_owned());
    let socket = UdpSocket::bind(address(&argument))?;
    socket.set_nonblocking(true)?;
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    cx.watch(socket.try_clone()?, Interest::Readable)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", socket.local_addr()?);
    reactor.run(&mut UdpEcho { socket, buffer: vec![0; 64 * 1024] })?;
    Ok(())
}
