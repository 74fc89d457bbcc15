//! An HTTP proxy for CONNECT, which resolves names on threads:
//!
//! ```sh
//! cargo run --release --example connect_proxy -- 127.0.0.1:7008
//! curl --proxy http://127.0.0.1:7008 --proxytunnel http://localhost:7007/
//! ```
//!
//! Half of the slots are reserved for the connections to servers, so that accepts can't use them up. Back-pressure
//! works in both directions, and half-closes and resets are forwarded.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use reactor::{
    CloseReason, Config, ConnectOptions, Context, Handler, Incoming, Keepalive, ListenOptions,
    Mailbox, Reactor, Signal, Token, Written,
};

use common::{Failure, address, usage_error};

mod common;

const RESOLVERS: usize = 4;
/// The capacity of the queue of names to resolve.
const NAMES_MAX: usize = 1024;
const REQUEST_BYTES_MAX: usize = 8 * 1024;
const FIELDS_MAX: usize = 64;
/// The time limit of a request and of a connect.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTIONS_MAX: usize = 20_000;

/// A client, and the addresses of its server.
type Resolved = (Token, io::Result<Vec<SocketAddr>>);

struct Proxy {
    names: mpsc::SyncSender<(Token, String)>,
    resolved: Mailbox<Resolved>,
    options: ConnectOptions,
}

enum Half {
    /// A client whose request is incomplete.
    Request(Vec<u8>),
    /// A client that waits for its server, and the input that followed its request.
    Waiting(Vec<u8>),
    /// A server during the connect, its client, and the addresses to try if the connect fails.
    Dialed { client: Token, left: Vec<SocketAddr> },
    /// A client or a server of an established tunnel, and the other one's token.
    Joined(Token),
}

impl Proxy {
    /// Returns the server's name and the bytes after the request; `None` if the request is incomplete.
    fn parse(input: &[u8]) -> Result<Option<(String, Vec<u8>)>, &'static str> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(input) {
            Ok(httparse::Status::Partial) if input.len() < REQUEST_BYTES_MAX => Ok(None),
            Ok(httparse::Status::Complete(length)) => match (request.method, request.path) {
                (Some("CONNECT"), Some(name)) if name.contains(':') => {
                    Ok(Some((name.to_owned(), input[length..].to_vec())))
                }
                _ => Err("405 Method Not Allowed"),
            },
            _ => Err("400 Bad Request"),
        }
    }

    fn dial(&self, cx: &mut Context<Half>, client: Token, mut left: Vec<SocketAddr>) {
        while let Some(server) = left.pop() {
            let half = Half::Dialed { client, left };
            match cx.connect(server, &self.options, half) {
                Ok(_) => return,
                Err(refused) => match refused.given {
                    Half::Dialed { left: rest, .. } => left = rest,
                    _ => return,
                },
            }
        }
        refuse(cx, client, "502 Bad Gateway");
    }
}

impl Handler for Proxy {
    type Conn = Half;

    fn on_accept(&mut self, _cx: &mut Context<Half>, _incoming: &Incoming<'_>) -> Option<Half> {
        Some(Half::Request(Vec::new()))
    }

    fn on_open(&mut self, cx: &mut Context<Half>, token: Token, half: &mut Half) {
        let &mut Half::Dialed { client, .. } = half else {
            return cx.set_timeout(token, TIMEOUT);
        };
        let Some(waiting) = cx.conn_mut(client) else { return cx.abort(token) };
        let sent = std::mem::replace(waiting, Half::Joined(token));
        *half = Half::Joined(client);
        if let Half::Waiting(bytes) = sent
            && cx.write_chunk(token, bytes).is_ok()
            && cx.write(client, b"HTTP/1.1 200 Connection established\r\n\r\n").is_ok()
        {
            cx.resume_reads(client);
        } else {
            cx.abort(client);
        }
    }

    fn on_data(&mut self, cx: &mut Context<Half>, token: Token, half: &mut Half, bytes: &mut [u8]) {
        match half {
            Half::Joined(other) => match cx.write(*other, bytes) {
                Ok(Written::Sent) => {}
                Ok(Written::Queued) => cx.pause_reads(token),
                Err(_) => cx.abort(token),
            },
            Half::Request(input) => {
                input.extend_from_slice(bytes);
                match Self::parse(input) {
                    Ok(None) => {}
                    Ok(Some((name, rest))) => {
                        cx.pause_reads(token);
                        cx.clear_timeout(token);
                        *half = Half::Waiting(rest);
                        if self.names.try_send((token, name)).is_err() {
                            refuse(cx, token, "503 Service Unavailable");
                        }
                    }
                    Err(why) => refuse(cx, token, why),
                }
            }
            Half::Waiting(_) | Half::Dialed { .. } => {}
        }
    }

    fn on_wake(&mut self, cx: &mut Context<Half>) {
        while let Some((client, resolved)) = self.resolved.receive() {
            match resolved {
                // The client may have disconnected meanwhile.
                _ if !cx.holds(client) => {}
                Ok(addresses) => self.dial(cx, client, addresses),
                Err(_) => refuse(cx, client, "502 Bad Gateway"),
            }
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Half>, _token: Token, half: &mut Half) {
        if let Half::Joined(other) = *half {
            cx.resume_reads(other);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<Half>, token: Token, half: &mut Half) {
        match *half {
            // A connection ends when both sides have finished.
            Half::Joined(other) => cx.finish(other),
            _ => cx.close(token),
        }
    }

    fn on_close(&mut self, cx: &mut Context<Half>, _token: Token, half: Half, why: CloseReason) {
        let is_orderly =
            matches!(why, CloseReason::Finished | CloseReason::Closed | CloseReason::PeerClosed);
        match half {
            Half::Dialed { client, left } => self.dial(cx, client, left),
            Half::Joined(other) if !is_orderly => cx.abort(other),
            _ => {}
        }
    }
}

fn refuse(cx: &mut Context<Half>, client: Token, why: &str) {
    let _ = cx.write(client, format!("HTTP/1.1 {why}\r\nContent-Length: 0\r\n\r\n").as_bytes());
    cx.close(client);
}

/// Takes names from the queue and sends their addresses to the proxy.
fn resolve(names: &Mutex<mpsc::Receiver<(Token, String)>>, resolved: &reactor::Sender<Resolved>) {
    loop {
        let Ok(names) = names.lock() else { return };
        let Ok((client, name)) = names.recv() else { return };
        drop(names);
        // `dial` tries the addresses from the last to the first.
        let addresses = name.to_socket_addrs().map(|found| found.rev().collect());
        if resolved.send((client, addresses)).is_err() {
            return;
        }
    }
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let listen = address(&args.next().unwrap_or_else(|| "127.0.0.1:7008".to_owned()));
    let connections_max = match args.next().map(|most| most.parse()) {
        None => CONNECTIONS_MAX,
        Some(Ok(most @ 2..)) => most,
        Some(_) => {
            usage_error("expected an address and at least 2 connections: connect_proxy LISTEN MAX")
        }
    };
    let config =
        Config { connections_max, connects_reserved: connections_max / 2, ..Config::default() };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    let keepalive = Some(Keepalive::default());
    let options = ListenOptions { keepalive, ..ListenOptions::default() };
    let listener = cx.listen(listen, &options)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    let (names, waiting) = mpsc::sync_channel(NAMES_MAX);
    let (sender, resolved) = cx.mailbox(NAMES_MAX);
    let waiting = Arc::new(Mutex::new(waiting));
    for _ in 0..RESOLVERS {
        let (waiting, sender) = (Arc::clone(&waiting), sender.clone());
        thread::spawn(move || resolve(&waiting, &sender));
    }
    let options = ConnectOptions {
        timeout: Some(TIMEOUT),
        nodelay: true,
        keepalive,
        ..ConnectOptions::default()
    };
    reactor.run(&mut Proxy { names, resolved, options })?;
    Ok(())
}
