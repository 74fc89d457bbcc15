//! The reactor, with the handler of c1000k-server without its counters.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use reactor::{
    Config, Context, Error, FileTable, Handler, Incoming, ListenOptions, Reactor, Token,
    WriteError, Written,
};

use super::{BACKLOG, BUFFER_BYTES, EVENTS, say_ready};

#[derive(Debug)]
struct Echo {
    idle_timeout: Option<Duration>,
}

impl Echo {
    fn refresh(&self, cx: &mut Context<()>, token: Token) {
        if let Some(idle_timeout) = self.idle_timeout {
            cx.set_timeout(token, idle_timeout);
        }
    }
}

impl Handler for Echo {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.refresh(cx, token);
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        self.refresh(cx, token);
        match cx.write(token, bytes) {
            Ok(Written::Sent) | Err(WriteError::Closed) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(_) => cx.abort(token),
        }
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
    }
}

pub(super) fn serve(
    ports: Range<u16>,
    file_table: FileTable,
    idle_timeout: Option<Duration>,
) -> io::Result<()> {
    run(ports, file_table, idle_timeout).map_err(io::Error::other)
}

fn run(
    ports: Range<u16>,
    file_table: FileTable,
    idle_timeout: Option<Duration>,
) -> Result<(), Error> {
    let config = Config {
        events_per_wait: EVENTS,
        read_buffer_bytes: BUFFER_BYTES,
        file_table,
        ..Config::default()
    };
    let mut reactor = Reactor::new(&config)?;
    let options = ListenOptions { backlog: Some(BACKLOG as u32), ..Default::default() };
    for port in ports {
        reactor.context().listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &options)?;
    }
    say_ready();
    reactor.run(&mut Echo { idle_timeout })
}
