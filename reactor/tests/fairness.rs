//! Many connections with much to read: the bytes read per turn are bounded, and an idle connection is still served.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reactor::{Config, Context, Handler, Incoming, ListenOptions, Reactor, Token};

use common::descriptors::Descriptors;
use common::{DEADLINE, LOOPBACK, file_table, peer};

/// As in `reactor.rs`: the maximum that the reads of one round return. A turn has two rounds, one for events and one for
/// listed connections.
const ROUND_BYTES: usize = 4 << 20;
const TURN_BYTES_MAX: usize = 2 * ROUND_BYTES;

const CONNECTIONS: usize = 300;
const BYTES_EACH: usize = 128 << 10;
/// The minimum size of a read, however many other connections are readable.
const READ_BYTES_MIN: usize = 4096;
/// The descriptors of the process other than both ends of its connections.
const DESCRIPTORS_BESIDE: usize = 100;

/// Counts the received bytes; only bystanders send single bytes.
#[derive(Default)]
struct Counts {
    opened: usize,
    total: usize,
    longest: usize,
    single_bytes: usize,
}

impl Handler for Counts {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        self.opened += 1;
        Some(())
    }

    fn on_data(&mut self, _: &mut Context<()>, _: Token, (): &mut (), bytes: &mut [u8]) {
        self.total += bytes.len();
        self.longest = self.longest.max(bytes.len());
        self.single_bytes += usize::from(bytes.len() == 1);
    }
}

struct Crowd {
    reactor: Reactor<()>,
    counts: Counts,
    peers: Vec<TcpStream>,
    bystander: TcpStream,
    sent: usize,
}

impl Crowd {
    /// Opens all connections; all but the bystander have sent much.
    fn new() -> Self {
        Self::of(CONNECTIONS, BYTES_EACH, Config::default())
    }

    fn of(connections: usize, bytes_each: usize, config: Config) -> Self {
        let config = Config { file_table: file_table(), ..config };
        let mut reactor = Reactor::new(&config).unwrap();
        let listener = reactor.context().listen(LOOPBACK, &ListenOptions::default()).unwrap();
        let address = reactor.context().listener_addr(listener).unwrap();
        let mut counts = Counts::default();
        let mut open = |wanted| {
            let peer = peer(address);
            let end = Instant::now() + DEADLINE;
            while counts.opened < wanted {
                assert!(Instant::now() < end);
                let _ = reactor.turn(&mut counts, Some(DEADLINE)).unwrap();
            }
            peer
        };
        let peers: Vec<_> = (1..=connections).map(&mut open).collect();
        let bystander = open(connections + 1);
        let sent = peers.iter().map(|peer| fill(peer, bytes_each)).sum();
        Self { reactor, counts, peers, bystander, sent }
    }

    /// Makes one turn; returns the number of its events and the number of bytes that it read.
    fn turn(&mut self) -> (usize, usize) {
        let (events, total) = (self.reactor.context().stats().events, self.counts.total);
        self.counts.longest = 0;
        let _ = self.reactor.turn(&mut self.counts, Some(Duration::from_millis(20))).unwrap();
        let events = self.reactor.context().stats().events - events;
        (events as usize, self.counts.total - total)
    }
}

/// Sends as much as the kernel accepts, up to a bound.
fn fill(mut peer: &TcpStream, most: usize) -> usize {
    let bytes = [7; BYTES_EACH];
    let mut sent = 0;
    peer.set_nonblocking(true).unwrap();
    while sent < most {
        match peer.write(&bytes[sent..most]) {
            Ok(taken) => sent += taken,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    sent
}

#[test]
fn one_turn_reads_a_bounded_amount_and_a_fair_share_of_each_connection() {
    let _descriptors = Descriptors::counted();
    let mut crowd = Crowd::new();
    assert!(crowd.sent > 2 * TURN_BYTES_MAX, "only {} bytes were accepted", crowd.sent);
    let (events, first) = crowd.turn();
    assert!(first <= TURN_BYTES_MAX, "{first} bytes in one turn");
    // Connections whose bytes have not arrived yet leave more to the others, so up to two shares are allowed.
    let (share, longest) = (ROUND_BYTES / events.max(1), crowd.counts.longest);
    assert!(longest <= 2 * share, "a read of {longest} bytes with a share of {share}");

    let end = Instant::now() + DEADLINE;
    while crowd.counts.total < crowd.sent {
        let (_, read) = crowd.turn();
        assert!(read <= TURN_BYTES_MAX, "{read} bytes in one turn");
        assert!(Instant::now() < end, "{} of {} bytes arrived", crowd.counts.total, crowd.sent);
    }
    assert_eq!((crowd.counts.total, crowd.peers.len()), (crowd.sent, CONNECTIONS));
}

#[test]
fn a_bystander_is_served_in_the_next_turn_although_others_have_much_to_read() {
    let _descriptors = Descriptors::counted();
    let mut crowd = Crowd::new();
    let _ = crowd.turn();
    crowd.bystander.write_all(b"!").unwrap();
    let _ = crowd.turn();
    assert!(
        crowd.counts.total < crowd.sent,
        "there is no input left that could delay the bystander"
    );
    assert_eq!(crowd.counts.single_bytes, 1, "the bystander was not served");
}

#[test]
fn the_reads_of_a_round_are_bounded_for_any_number_of_events() {
    let _descriptors = Descriptors::counted();
    let bound = ROUND_BYTES / READ_BYTES_MIN;
    let connections = bound + bound / 4;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < (2 * connections + DESCRIPTORS_BESIDE) as u64 {
        // Written directly, because the test harness captures `eprintln!`.
        let why = "too few descriptors may be had here";
        return writeln!(std::io::stderr(), "the test of {connections} readers is skipped: {why}")
            .unwrap();
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let config = Config { events_per_wait: usize::MAX, ..Config::default() };
    let mut crowd = Crowd::of(connections, READ_BYTES_MIN, config);
    let (events, read) = crowd.turn();
    assert!(events <= bound && read <= ROUND_BYTES, "{events} events and {read} bytes in a round");
    let end = Instant::now() + DEADLINE;
    while crowd.counts.total < crowd.sent {
        let _ = crowd.turn();
        assert!(Instant::now() < end, "{} of {} bytes arrived", crowd.counts.total, crowd.sent);
    }
}
