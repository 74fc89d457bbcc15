//! An HTTP proxy for tunnels (`CONNECT`): `cargo run --example connect_proxy -- 127.0.0.1:8080 1000`, then
//! `curl -p -x http://127.0.0.1:8080 http://example.com/`. The second argument bounds the tunnels.
//!
//! It shows work that blocks, done elsewhere: the system's resolver is asked by a few threads, and the answers come
//! back through a mailbox, each with the token of the connection that waits for it. It also shows a service that never
//! fails for want of a slot: the listener has a bound of its own, `connects_reserved` keeps slots for the way out, and
//! clients beyond that wait in the backlog. Back-pressure, half-closes and resets are passed on, as in `tcp_proxy`.
//!
//! A tunnel is two connections of 24 bytes and 16 of state each; what a request needs is boxed and freed when the tunnel is
//! up. It lets anyone who can reach it connect anywhere, so let it listen where only friends are.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{io, mem, thread, vec};

use reactor::{
    CloseReason, Config, ConnectOptions, Context, Handler, Incoming, Keepalive, ListenOptions,
    Mailbox, Reactor, Sender, Signal, Token, Written,
};

use common::{Failure, address, misused};

mod common;

const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// From the accept until the tunnel is up.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESOLVERS: usize = 4;
/// Names that are being looked up, the answers included that have not been taken yet: so no answer finds its mailbox
/// full.
const LOOKUPS_MAX: usize = 1024;

const ESTABLISHED: &str = "HTTP/1.1 200 Connection established\r\n\r\n";

struct Proxy {
    options: ConnectOptions,
    questions: mpsc::Sender<Question>,
    answers: Mailbox<Answer>,
    lookups: usize,
}

/// Which connection asks, and for what host and port.
struct Question(Token, String);

struct Answer(Token, io::Result<vec::IntoIter<SocketAddr>>);

enum Conn {
    /// A client whose tunnel is not up.
    Client(Box<Setup>),
    /// One end of a tunnel, or a connect that is to become one, and its other end.
    End(Token),
}

const _: () = assert!(size_of::<Conn>() <= 16, "each end of a tunnel has this state");

#[derive(Default)]
struct Setup {
    /// The request, and after it what the client has sent beyond.
    input: Vec<u8>,
    /// Those that have not been tried.
    addresses: vec::IntoIter<SocketAddr>,
    upstream: Option<Token>,
}

/// The host and port of a whole request, and the length of its head; `None` where its end has not arrived.
fn parse(bytes: &[u8]) -> Result<Option<(String, usize)>, &'static str> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if request.method == Some("CONNECT") => {
            Ok(Some((request.path.unwrap_or_default().to_owned(), length)))
        }
        Ok(httparse::Status::Complete(_)) => Err("405 Method Not Allowed"),
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_BYTES_MAX => Ok(None),
        Ok(httparse::Status::Partial) => Err("431 Request Header Fields Too Large"),
        Err(_) => Err("400 Bad Request"),
    }
}

impl Proxy {
    fn take_request(
        &mut self,
        cx: &mut Context<Conn>,
        token: Token,
        setup: &mut Setup,
        bytes: &[u8],
    ) {
        setup.input.extend_from_slice(bytes);
        let (target, length) = match parse(&setup.input) {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(status) => return refuse(cx, token, status),
        };
        setup.input.drain(..length);
        // What the client sends early stays in its socket until there is somewhere to send it.
        cx.pause_reads(token);
        if let Ok(address) = target.parse() {
            setup.addresses = vec![address].into_iter();
            return self.try_next(cx, token, setup);
        }
        if self.lookups >= LOOKUPS_MAX || self.questions.send(Question(token, target)).is_err() {
            return refuse(cx, token, "503 Service Unavailable");
        }
        self.lookups += 1;
    }

    /// Connects to the next address of a name.
    fn try_next(&self, cx: &mut Context<Conn>, client: Token, setup: &mut Setup) {
        setup.upstream = setup.addresses.find_map(|address| {
            cx.connect(address, &self.options, Conn::End(client)).ok() // else the one after it
        });
        if setup.upstream.is_none() {
            refuse(cx, client, "502 Bad Gateway");
        }
    }

    /// The same from the callback of another connection or of none, where the client's state is still in its slot.
    fn go_on(&self, cx: &mut Context<Conn>, client: Token, change: impl FnOnce(&mut Setup)) {
        let Some(Conn::Client(setup)) = cx.conn_mut(client) else { return }; // gone by now
        let mut setup = mem::take(setup);
        change(&mut setup);
        self.try_next(cx, client, &mut setup);
        if let Some(conn) = cx.conn_mut(client) {
            *conn = Conn::Client(setup);
        }
    }

    /// The upstream side is there: the client learns of it, and both sides are joined.
    fn establish(&self, cx: &mut Context<Conn>, upstream: Token, client: Token) {
        let Some(conn) = cx.conn_mut(client) else { return cx.abort(upstream) };
        let Conn::Client(setup) = mem::replace(conn, Conn::End(upstream)) else { return };
        cx.clear_timeout(client);
        let is_sent = cx.write(client, ESTABLISHED.as_bytes()).is_ok()
            && (setup.input.is_empty() || cx.write_chunk(upstream, setup.input).is_ok());
        if !is_sent {
            return cx.abort(client); // which ends the other one too
        }
        cx.resume_reads(client);
    }
}

fn refuse(cx: &mut Context<Conn>, token: Token, status: &str) {
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    // A client that can't be answered is closed as well.
    let _ = cx.write(token, answer.as_bytes());
    cx.close(token);
}

impl Handler for Proxy {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Context<Conn>, _incoming: &Incoming<'_>) -> Option<Conn> {
        Some(Conn::Client(Box::default()))
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        match conn {
            Conn::Client(_) => cx.set_timeout(token, SETUP_TIMEOUT),
            Conn::End(client) => self.establish(cx, token, *client),
        }
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        match conn {
            Conn::Client(setup) => self.take_request(cx, token, setup, bytes),
            Conn::End(other) => match cx.write(*other, bytes) {
                Ok(Written::Sent) => {}
                Ok(Written::Queued) => cx.pause_reads(token),
                Err(_) => cx.abort(token),
            },
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Conn>, _token: Token, conn: &mut Conn) {
        if let Conn::End(other) = conn {
            cx.resume_reads(*other);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        match conn {
            Conn::Client(_) => cx.close(token),
            // When both ends have finished, both go by themselves.
            Conn::End(other) => cx.finish(*other),
        }
    }

    fn on_timeout(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        if let Conn::Client(setup) = conn
            && let Some(upstream) = setup.upstream.take()
        {
            cx.abort(upstream);
        }
        refuse(cx, token, "504 Gateway Timeout");
    }

    fn on_wake(&mut self, cx: &mut Context<Conn>) {
        while let Some(Answer(client, addresses)) = self.answers.receive() {
            self.lookups -= 1;
            self.go_on(cx, client, |setup| setup.addresses = addresses.unwrap_or_default());
        }
    }

    fn on_close(&mut self, cx: &mut Context<Conn>, token: Token, conn: Conn, reason: CloseReason) {
        let other = match conn {
            Conn::Client(setup) => setup.upstream,
            Conn::End(other) => Some(other),
        };
        let Some(other) = other else { return };
        let orderly =
            matches!(reason, CloseReason::Finished | CloseReason::Closed | CloseReason::PeerClosed);
        match cx.conn(other) {
            // A connect for a client did not work: there may be another address.
            Some(Conn::Client(setup)) if setup.upstream == Some(token) => {
                self.go_on(cx, other, |_| ());
            }
            Some(Conn::End(_)) if !orderly => cx.abort(other),
            _ => {}
        }
    }
}

/// Asks the system's resolver, which blocks, until the proxy is gone.
fn resolve(questions: &Mutex<Receiver<Question>>, answers: &Sender<Answer>) {
    loop {
        let question = questions.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Question(token, target)) = question else { return };
        if answers.send(Answer(token, target.to_socket_addrs())).is_err() {
            return;
        }
    }
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let listen = address(&args.next().unwrap_or("127.0.0.1:8080".to_owned()));
    let tunnels_max = args.next().unwrap_or("1000".to_owned());
    let tunnels_max = match tunnels_max.parse() {
        Ok(number @ 1..=100_000) => number,
        _ => misused(&format!("{tunnels_max:?} is no number of tunnels; give 1 to 100000")),
    };

    // A client for each tunnel and its way out, and as many again for ways out that are still being closed when their client
    // has gone and the next one has come.
    let config = Config {
        connections_max: 3 * tunnels_max,
        connects_reserved: tunnels_max,
        listeners_max: 1,
        ..Config::default()
    };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    // No timeout of a tunnel: it may be silent. A peer that is gone without a word is found all the same.
    let keepalive = Some(Keepalive::default());
    let connections_max = Some(tunnels_max as u32);
    let options = ListenOptions { connections_max, keepalive, ..ListenOptions::default() };
    let listener = cx.listen(listen, &options)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?; // before there are other threads
    let (sender, answers) = cx.mailbox(LOOKUPS_MAX);
    let (questions, receiver) = mpsc::channel();
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..RESOLVERS {
        let (receiver, sender) = (Arc::clone(&receiver), sender.clone());
        thread::Builder::new().spawn(move || resolve(&receiver, &sender))?;
    }
    println!("listening on {}", cx.listener_addr(listener)?);

    let options = ConnectOptions {
        timeout: Some(CONNECT_TIMEOUT),
        nodelay: true,
        keepalive,
        ..ConnectOptions::default()
    };
    reactor.run(&mut Proxy { options, questions, answers, lookups: 0 })?;
    Ok(())
}
