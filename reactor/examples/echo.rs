//! An echo server: `cargo run --example echo -- 127.0.0.1:7007`.
//!
//! Back-pressure takes three lines: while a part of the answer is queued, reads from that peer are paused. A peer that
//! sends without reading takes a bounded buffer and is slowed down by TCP.

use reactor::{Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, Token, Written};

use common::{Failure, address};

mod common;

struct Echo;

impl Handler for Echo {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        match cx.write(token, bytes) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(_) => cx.abort(token),
        }
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:7007".to_owned());
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let listener = cx.listen(address(&argument), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Echo)?;
    Ok(())
}
