//! An HTTP service that is replaced while it serves: `cargo run --example rolling_restart -- 127.0.0.1:8080`, start it a
//! second time in another terminal, and end the first one by SIGTERM. No request is lost.
//!
//! Both listen on the same address (`reuse_port`), and the kernel spreads connections over them. At the signal the old one
//! drains its listener: it takes those that wait in its backlog, which an ordinary close would reset, and then new ones go to
//! the successor alone. It goes on answering on the connections that it has, each of which is asked to end by the
//! answer to its next request (`Connection: close`): a connection that is closed while it is idle could be used by its peer
//! at the same moment.

use std::time::Duration;

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, ListenerId, Reactor, Signal, TimerId, Token,
    Written,
};

use common::{Failure, address};

mod common;

const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// For the next request of those that are connected when the signal comes.
const PATIENCE: Duration = Duration::from_secs(10);
/// For what has been answered to be taken.
const GRACE: Duration = Duration::from_secs(5);
/// How often it looks whether it is done.
const LOOK: Duration = Duration::from_millis(10);

struct Http {
    listener: ListenerId,
    /// Looks that are left, once the signal has come.
    looks_left: Option<u32>,
}

/// How many requests there are at the beginning of the bytes, and their length; `None` where they are no requests that are
/// answered here: they have no bodies.
fn parse(bytes: &[u8]) -> Option<(usize, usize)> {
    let (mut count, mut used) = (0, 0);
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&bytes[used..]) {
            Ok(httparse::Status::Complete(length)) if request.method == Some("GET") => {
                (count, used) = (count + 1, used + length);
            }
            Ok(httparse::Status::Partial) if bytes.len() - used <= HEAD_BYTES_MAX => {
                return Some((count, used));
            }
            _ => return None,
        }
    }
}

impl Handler for Http {
    type Conn = Vec<u8>; // the beginning of a request

    fn on_accept(&mut self, _cx: &mut Context<Vec<u8>>, _: &Incoming<'_>) -> Option<Vec<u8>> {
        Some(Vec::new())
    }

    fn on_data(
        &mut self,
        cx: &mut Context<Vec<u8>>,
        token: Token,
        input: &mut Vec<u8>,
        bytes: &mut [u8],
    ) {
        let mut all = std::mem::take(input);
        all.extend_from_slice(bytes);
        let Some((count, used)) = parse(&all) else { return cx.abort(token) };
        *input = all.split_off(used);
        if count == 0 {
            return;
        }
        let keeps = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n";
        let ends = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";
        let answers = match self.looks_left {
            None => keeps.repeat(count),
            Some(_) => keeps.repeat(count - 1) + ends,
        };
        match cx.write_chunk(token, answers.into_bytes()) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(_) => return cx.abort(token),
        }
        if self.looks_left.is_some() {
            cx.close(token);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Vec<u8>>, token: Token, _input: &mut Vec<u8>) {
        cx.resume_reads(token);
    }

    fn on_signal(&mut self, cx: &mut Context<Vec<u8>>, _signal: Signal) {
        if self.looks_left.is_some() || cx.add_timer(LOOK).is_err() {
            return cx.shutdown(GRACE); // a second signal waits for no request
        }
        self.looks_left = Some((PATIENCE.as_millis() / LOOK.as_millis()) as u32);
        cx.drain_listener(self.listener);
    }

    fn on_timer(&mut self, cx: &mut Context<Vec<u8>>, _timer: TimerId) {
        // A listener that has been drained has no address any more.
        let is_done = cx.listener_addr(self.listener).is_err() && cx.connections() == 0;
        let left = self.looks_left.unwrap_or(0);
        if is_done || left == 0 || cx.add_timer(LOOK).is_err() {
            return cx.shutdown(GRACE);
        }
        self.looks_left = Some(left - 1);
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:8080".to_owned());
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
    let listener = cx.listen(address(&argument), &options)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Http { listener, looks_left: None })?;
    Ok(())
}
