//! An HTTP service that can be replaced while it serves. After its successor has started, SIGTERM or Ctrl-C ends the
//! old instance. There are two ways to share the port:
//!
//! - `cargo run --example rolling_restart -- 127.0.0.1:8080`: each instance has a socket of its own (`SO_REUSEPORT`),
//!   and the kernel distributes connections among them. The old instance drains its listener.
//! - `cargo run --example rolling_restart -- -`: all instances share one socket, which a supervisor keeps and passes to
//!   them as standard input. The old instance only closes it. Nothing is lost; with `SO_REUSEPORT`, handshakes in
//!   progress can be.
//!
//! The old instance keeps its connections: the answer to the next request asks the client to close the connection
//! (`Connection: close`). Closing an idle connection could cross with a request, so that is done only at the end.

use std::os::fd::AsFd;
use std::time::Duration;

use reactor::{
    CloseReason, Config, Context, Handler, Incoming, ListenOptions, ListenerId, Reactor, Signal,
    TimerId, Token, Written,
};

use common::{Failure, address};

mod common;

const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// How long the old instance waits for the next request of its connections.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long peers have to receive the last answers.
const GRACE: Duration = Duration::from_secs(5);

const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n";
const LAST_ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";

struct Http {
    listener: ListenerId,
    /// Other instances share the socket.
    is_shared: bool,
    /// The signal was received.
    is_ending: bool,
}

/// Returns the number of complete requests at the start of the bytes, and their length; `None` if there is anything
/// but GET requests, or a head is too large.
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

impl Http {
    /// Stops if the listener and all connections have ended.
    fn stop_if_done(&self, cx: &mut Context<Vec<u8>>) {
        if self.is_ending && cx.listeners().next().is_none() && cx.connections() == 0 {
            cx.stop();
        }
    }
}

impl Handler for Http {
    type Conn = Vec<u8>; // an incomplete request

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
        input.extend_from_slice(bytes);
        let Some((count, used)) = parse(input) else { return cx.abort(token) };
        if count == 0 {
            return;
        }
        input.drain(..used);
        let answers = match self.is_ending {
            false => ANSWER.repeat(count),
            true => ANSWER.repeat(count - 1) + LAST_ANSWER,
        };
        match cx.write_chunk(token, answers.into_bytes()) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(_) => return cx.abort(token),
        }
        if self.is_ending {
            cx.close(token);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Vec<u8>>, token: Token, _input: &mut Vec<u8>) {
        cx.resume_reads(token);
    }

    fn on_signal(&mut self, cx: &mut Context<Vec<u8>>, _signal: Signal) {
        if self.is_ending || cx.add_timer(PATIENCE).is_err() {
            return cx.shutdown(GRACE); // a second signal ends it without waiting for requests
        }
        self.is_ending = true;
        if self.is_shared {
            cx.unlisten(self.listener); // the backlog stays for the successor
        } else {
            cx.drain_listener(self.listener);
        }
        self.stop_if_done(cx);
    }

    fn on_listener_drained(&mut self, cx: &mut Context<Vec<u8>>, _listener: ListenerId) {
        self.stop_if_done(cx);
    }

    fn on_close(&mut self, cx: &mut Context<Vec<u8>>, _: Token, _: Vec<u8>, _: CloseReason) {
        self.stop_if_done(cx);
    }

    fn on_timer(&mut self, cx: &mut Context<Vec<u8>>, _timer: TimerId) {
        cx.shutdown(GRACE); // a client that sends a request at this moment has to retry
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let is_shared = argument == "-";
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let listener = if is_shared {
        let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
        cx.adopt_listener(socket, &ListenOptions::default())?
    } else {
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        cx.listen(address(&argument), &options)?
    };
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Http { listener, is_shared, is_ending: false })?;
    Ok(())
}
