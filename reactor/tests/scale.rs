//! Ten thousand connections between two processes with one reactor each: all echo, all end, and the counts agree.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reactor::{
    CloseReason, Config, ConnectOptions, Context, FileTable, Handler, Incoming, ListenOptions,
    Reactor, Stats, Token,
};

use common::child::{Child, Questions};
use common::descriptors::Descriptors;
use common::{DEADLINE, file_table};

const CONNECTIONS: usize = 10_000;
/// The number of concurrent connects; far below any backlog.
const IN_FLIGHT_MAX: usize = 500;
const LISTENERS: usize = 4;
/// The descriptors of each process other than its connections.
const DESCRIPTORS_BESIDE: usize = 100;

#[test]
fn ten_thousand_connections_echo_and_end_and_the_counts_agree() {
    let _descriptors = Descriptors::counted();
    const NAME: &str = "ten_thousand_connections_echo_and_end_and_the_counts_agree";
    if common::child::is_child() {
        return serve();
    }
    let connections = CONNECTIONS.min(raise_descriptors() - DESCRIPTORS_BESIDE);
    if connections < CONNECTIONS {
        println!("RLIMIT_NOFILE allows only {connections} of {CONNECTIONS} connections");
    }
    let mut child = Child::start(NAME, None);
    let addresses = child.read("addresses").split(',').map(|it| it.parse().unwrap()).collect();
    let rss_before = child.ask("rss_bytes");

    let mut reactor =
        Reactor::new(&Config { file_table: file_table(), ..Config::default() }).unwrap();
    let mut client = Client { addresses, target: connections, ..Default::default() };
    turn_until(&mut reactor, &mut client, |client, cx| {
        client.open_more(cx);
        client.verified == connections
    });
    assert_eq!(reactor.context().connections(), connections);
    assert_eq!(child.ask("open"), connections as u64);
    let grown = child.ask("rss_bytes").saturating_sub(rss_before);
    // 24 bytes and the state per connection, the batches of a turn with registered files, and a margin for other pages.
    let batches = if file_table() == FileTable::Process { 0 } else { 2 << 20 };
    let allowed = connections as u64 * (24 + size_of::<u64>() as u64) + batches + (512 << 10);
    assert!(grown <= allowed, "the server grew by {grown} bytes");

    // The server ends one connection in ten, the client the others.
    child.ask("close_a_tenth");
    turn_until(&mut reactor, &mut client, |client, _| client.ended == connections / 10);
    let left: Vec<_> = reactor.context().tokens(0..usize::MAX).collect();
    assert_eq!(left.len(), connections - connections / 10);
    for token in left {
        reactor.context().abort(token);
    }
    turn_until(&mut reactor, &mut client, |client, _| client.ended == connections);
    let end = Instant::now() + DEADLINE;
    while child.ask("open") > 0 {
        assert!(Instant::now() < end);
    }

    let stats = reactor.context().stats();
    let bytes = connections as u64 * size_of::<u64>() as u64;
    assert_eq!(client.failed, 0);
    assert_counts(&stats, connections as u64, bytes);
    assert_eq!(stats.connected, connections as u64);
    assert_eq!(child.ask("accepted"), connections as u64);
    assert_eq!(child.ask("open_max"), connections as u64);
    assert_eq!(child.ask("closed"), connections as u64);
    assert_eq!(child.ask("bytes_in"), bytes);
    assert_eq!(child.ask("bytes_out"), bytes);
    assert_eq!(child.ask("refused_or_dropped"), 0);
    assert_eq!(child.ask("accept_pauses"), 0);
    assert_eq!(child.ask("held"), 0);
    child.end();
}

fn assert_counts(stats: &Stats, connections: u64, bytes: u64) {
    assert_eq!(
        (stats.opened, stats.closed, stats.open_max),
        (connections, connections, connections)
    );
    assert_eq!((stats.bytes_in, stats.bytes_out), (bytes, bytes));
    assert_eq!((stats.queued_bytes, stats.timers_armed), (0, 0));
}

/// Raises the soft limit to the hard one, also for the child; returns the limit.
fn raise_descriptors() -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    usize::try_from(hard).unwrap_or(usize::MAX)
}

fn turn_until<H: Handler>(
    reactor: &mut Reactor<H::Conn>,
    handler: &mut H,
    mut done: impl FnMut(&mut H, &mut Context<H::Conn>) -> bool,
) {
    let end = Instant::now() + 2 * DEADLINE;
    while !done(handler, reactor.context()) {
        assert!(Instant::now() < end);
        let _ = reactor.turn(handler, Some(Duration::from_millis(20))).unwrap();
    }
}

/// Opens connections, and sends a distinct number on each, which must be echoed.
#[derive(Default)]
struct Client {
    addresses: Vec<SocketAddr>,
    target: usize,
    started: usize,
    in_flight: usize,
    verified: usize,
    ended: usize,
    failed: usize,
}

impl Client {
    fn open_more(&mut self, cx: &mut Context<u64>) {
        while self.started < self.target && self.in_flight < IN_FLIGHT_MAX {
            let address = self.addresses[self.started % self.addresses.len()];
            let token = cx.connect(address, &ConnectOptions::default(), self.started as u64);
            assert_ne!(token.unwrap().to_bits(), 0);
            self.started += 1;
            self.in_flight += 1;
        }
    }
}

impl Handler for Client {
    type Conn = u64;

    fn on_accept(&mut self, _: &mut Context<u64>, _: &Incoming<'_>) -> Option<u64> {
        unreachable!("the client listens nowhere")
    }

    fn on_open(&mut self, cx: &mut Context<u64>, token: Token, conn: &mut u64) {
        self.in_flight -= 1;
        cx.write(token, &conn.to_be_bytes()).unwrap();
        self.open_more(cx);
    }

    fn on_data(&mut self, _: &mut Context<u64>, _: Token, conn: &mut u64, bytes: &mut [u8]) {
        assert_eq!(bytes, conn.to_be_bytes());
        self.verified += 1;
    }

    fn on_close(&mut self, _: &mut Context<u64>, _: Token, _: u64, reason: CloseReason) {
        match reason {
            CloseReason::Closed | CloseReason::PeerClosed | CloseReason::Aborted => self.ended += 1,
            _ => self.failed += 1,
        }
    }
}

/// The child.
struct Server;

impl Handler for Server {
    type Conn = u64;

    fn on_accept(&mut self, _: &mut Context<u64>, _: &Incoming<'_>) -> Option<u64> {
        Some(0)
    }

    fn on_data(&mut self, cx: &mut Context<u64>, token: Token, _: &mut u64, bytes: &mut [u8]) {
        cx.write(token, bytes).unwrap();
    }
}

fn serve() {
    let mut reactor =
        Reactor::new(&Config { file_table: file_table(), ..Config::default() }).unwrap();
    let mut listen = || {
        let options = ListenOptions::default();
        let listener = reactor.context().listen(common::LOOPBACK, &options).unwrap();
        reactor.context().listener_addr(listener).unwrap().to_string()
    };
    let addresses: Vec<_> = (0..LISTENERS).map(|_| listen()).collect();
    let questions = Questions::start(reactor.context().waker());
    questions.answer("addresses", addresses.join(","));
    loop {
        let _ = reactor.turn(&mut Server, Some(DEADLINE)).unwrap();
        while let Some(question) = questions.next() {
            let cx = reactor.context();
            let stats = cx.stats();
            let answer = match question.as_str() {
                "open" => stats.open(),
                "accepted" => stats.accepted,
                "open_max" => stats.open_max,
                "closed" => stats.closed,
                "bytes_in" => stats.bytes_in,
                "bytes_out" => stats.bytes_out,
                "refused_or_dropped" => stats.refused + stats.dropped,
                "accept_pauses" => stats.accept_pauses,
                "held" => cx.connections() as u64,
                "rss_bytes" => rss_bytes(),
                "close_a_tenth" => close_a_tenth(cx),
                "end" => return,
                other => panic!("unknown query {other}"),
            };
            questions.answer(&question, answer);
        }
    }
}

fn close_a_tenth(cx: &mut Context<u64>) -> u64 {
    let tokens: Vec<_> = cx.tokens(0..cx.connections() / 10).collect();
    tokens.iter().for_each(|&token| cx.close(token));
    tokens.len() as u64
}

fn rss_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
