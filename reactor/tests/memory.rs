//! Memory: no heap block per idle connection, no allocation per message, and the documented number of bytes.
//!
//! Allocations are counted per thread. Peers and reactor share the thread, so neither may allocate.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use allocation_counter::measure;
use reactor::{Config, Context, FileTable, Handler, Incoming, ListenOptions, Reactor, Token};

use common::descriptors::Descriptors;
use common::{DEADLINE, LOOPBACK, file_table, peer};

/// An echo server that records nothing.
struct Echo;

impl Handler for Echo {
    type Conn = u64;

    fn on_accept(&mut self, _cx: &mut Context<u64>, _incoming: &Incoming<'_>) -> Option<u64> {
        Some(7)
    }

    fn on_data(&mut self, cx: &mut Context<u64>, token: Token, _conn: &mut u64, bytes: &mut [u8]) {
        cx.write(token, bytes).unwrap();
    }
}

struct Server {
    reactor: Reactor<u64>,
    address: std::net::SocketAddr,
}

impl Server {
    fn new() -> Self {
        let config = Config { file_table: file_table(), ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let listener = reactor.context().listen(LOOPBACK, &ListenOptions::default()).unwrap();
        let address = reactor.context().listener_addr(listener).unwrap();
        Self { reactor, address }
    }

    fn until(&mut self, mut condition: impl FnMut(&mut Context<u64>) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition(self.reactor.context()) {
            assert!(Instant::now() < end);
            let _ = self.reactor.turn(&mut Echo, Some(Duration::from_millis(20))).unwrap();
        }
    }

    fn echo(&mut self, peer: &mut TcpStream, message: &[u8]) {
        let mut answer = [0; 1024];
        let echoed = self.reactor.context().stats().bytes_out + message.len() as u64;
        peer.write_all(message).unwrap();
        self.until(|cx| cx.stats().bytes_out == echoed);
        peer.read_exact(&mut answer[..message.len()]).unwrap();
        assert_eq!(&answer[..message.len()], message);
    }

    fn tokens(&mut self) -> Vec<Token> {
        self.reactor.context().tokens(0..usize::MAX).collect()
    }
}

#[test]
fn the_counter_counts() {
    let _descriptors = Descriptors::counted();
    let info = measure(|| drop(std::hint::black_box(vec![1_u8; 100])));
    assert_eq!((info.count_total, info.bytes_total), (1, 100));
}

#[test]
fn an_echoed_message_allocates_nothing() {
    let _descriptors = Descriptors::counted();
    let mut server = Server::new();
    let mut peers: Vec<_> = (0..10).map(|_| peer(server.address)).collect();
    for peer in &mut peers {
        server.echo(peer, b"warm-up");
    }
    let info = measure(|| {
        for round in 0..100_u8 {
            for peer in &mut peers {
                server.echo(peer, &[round; 1000]);
            }
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
}

#[test]
#[cfg_attr(feature = "testing", ignore = "the choice of a kernel allocates when sockets move")]
fn an_idle_connection_and_its_timeout_have_no_heap_block() {
    let _descriptors = Descriptors::counted();
    const CONNECTIONS: usize = 500;
    let mut server = Server::new();
    let mut peers = Vec::with_capacity(CONNECTIONS + 1);
    peers.push(peer(server.address));
    server.until(|cx| cx.connections() == 1);

    let accepting = measure(|| {
        for _ in 0..CONNECTIONS {
            peers.push(peer(server.address));
        }
        server.until(|cx| cx.connections() == CONNECTIONS + 1);
    });
    assert_eq!(accepting.count_total, 0, "{accepting:?}");

    let tokens = server.tokens();
    let timing = measure(|| {
        for after in [3600, 60, 7200] {
            for &token in &tokens {
                server.reactor.context().set_timeout(token, Duration::from_secs(after));
            }
            let _ = server.reactor.turn(&mut Echo, Some(Duration::ZERO)).unwrap();
        }
        assert_eq!(server.reactor.context().stats().timers_armed, CONNECTIONS + 1);
        for &token in &tokens {
            server.reactor.context().clear_timeout(token);
        }
    });
    assert_eq!(timing.count_total, 0, "{timing:?}");
}

#[test]
#[cfg_attr(feature = "testing", ignore = "the choice of a kernel allocates when sockets move")]
fn churn_allocates_nothing_once_warm() {
    let _descriptors = Descriptors::counted();
    let mut server = Server::new();
    let churn = |server: &mut Server| {
        let peer = peer(server.address);
        server.until(|cx| cx.connections() == 1);
        let token = server.reactor.context().tokens(0..1).next().unwrap();
        server.reactor.context().set_timeout(token, DEADLINE);
        common::reset(peer);
        server.until(|cx| cx.connections() == 0);
    };
    churn(&mut server);
    let info = measure(|| (0..200).for_each(|_| churn(&mut server)));
    assert_eq!(info.count_total, 0, "{info:?}");
}

#[test]
fn an_empty_queue_returns_its_memory() {
    let _descriptors = Descriptors::counted();
    let mut server = Server::new();
    let mut peer = peer(server.address);
    server.until(|cx| cx.connections() == 1);
    let token = server.tokens()[0];
    peer.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 1 << 18];
    let mut fill_and_drain = || {
        let mut queued_max = 0;
        while server.reactor.context().queued_bytes(token) == 0 {
            server.reactor.context().write(token, &[7; 64 * 1024]).unwrap();
            queued_max = queued_max.max(server.reactor.context().queued_bytes(token));
        }
        server.until(|cx| {
            while peer.read(&mut buffer).is_ok() {}
            cx.stats().queued_bytes == 0
        });
        assert!(queued_max > 0);
    };
    fill_and_drain();
    let info = measure(fill_and_drain);
    assert!(info.count_total > 0, "the queue was not used");
    assert_eq!((info.count_current, info.bytes_current), (0, 0), "{info:?}");
}

/// The bytes that the reactor reserves per connection with this state, including the node of its timeout.
fn reserved_bytes_per_connection<C>() -> f64 {
    const CONNECTIONS: usize = 1 << 16;
    let reserved = |connections_max| {
        let config =
            Config { connections_max, file_table: FileTable::Process, ..Default::default() };
        let mut kept = None;
        let info = measure(|| kept = Some(Reactor::<C>::new(&config).unwrap()));
        info.bytes_current as f64
    };
    (reserved(2 * CONNECTIONS) - reserved(CONNECTIONS)) / CONNECTIONS as f64
}

#[test]
fn a_connection_takes_at_most_48_bytes_and_its_state() {
    let _descriptors = Descriptors::counted();
    let without_state = reserved_bytes_per_connection::<()>();
    assert!((24.0..=48.0).contains(&without_state), "{without_state}");
    let with_state = reserved_bytes_per_connection::<[u64; 4]>();
    assert!((24.0 + 32.0..=48.0 + 32.0).contains(&with_state), "{with_state}");
}

#[test]
fn the_maximum_number_of_timers_fits_into_the_reserved_memory() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 10, timers_max: 5000, ..Default::default() };
    let mut reactor = Reactor::<()>::new(&config).unwrap();
    let info = measure(|| {
        for _ in 0..5000 {
            reactor.context().add_timer(DEADLINE).unwrap();
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
}
