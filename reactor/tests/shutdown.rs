//! `stop`, `shutdown` and single turns: when `run` returns, and the state of the connections then.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use reactor::{
    Config, ConnectOptions, Context, Handler, Incoming, ListenOptions, Reactor, Status, Token,
};

use common::descriptors::Descriptors;
use common::{Conn, DEADLINE, Event, LOOPBACK, Why, World, echo, echo_once, pattern, read_to_end};

/// Like `Reactor::run`, with a deadline on each wait.
fn run(world: &mut World) {
    while world.turn(DEADLINE) == Status::Running {}
}

#[test]
fn stop_ends_run_and_keeps_the_connections() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.script(|cx, event| {
        if let Event::Data(..) = event {
            cx.stop();
        }
        echo(cx, event);
    });
    for round in 1..=3 {
        peer.write_all(b"stop").unwrap();
        world.reactor.run(&mut world.service).unwrap();
        assert_eq!(world.service.data(token), b"stop".repeat(round));
        assert!(world.cx().holds(token));
    }
    assert_eq!(world.service.closed(), []);
}

#[test]
fn stop_before_run_makes_it_return_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.listen();
    // Without the stop, this timer would end the wait.
    world.cx().add_timer(DEADLINE * 10).unwrap();
    let before = Instant::now();
    world.cx().stop();
    run(&mut world);
    assert!(before.elapsed() < DEADLINE);
}

#[test]
fn a_turn_returns_whether_the_reactor_continues() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    assert_eq!(world.turn(Duration::ZERO), Status::Running);
    world.cx().stop();
    assert_eq!(world.turn(Duration::ZERO), Status::Stopped);
    assert_eq!(world.turn(Duration::ZERO), Status::Running, "a stop ends one run only");
}

#[test]
fn a_turn_waits_no_longer_than_its_limit() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.listen();
    let before = Instant::now();
    let _ = world.turn(Duration::from_millis(20));
    assert!(before.elapsed() >= Duration::from_millis(20));
    assert!(before.elapsed() < DEADLINE);
}

#[test]
fn one_reactor_serves_two_handlers_in_turn() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    // The first handler records; the second one is of another type.
    struct Shouting;
    impl reactor::Handler for Shouting {
        type Conn = Conn;
        fn on_accept(&mut self, _: &mut common::Cx, _: &reactor::Incoming<'_>) -> Option<Conn> {
            None
        }
        fn on_data(
            &mut self,
            cx: &mut common::Cx,
            token: reactor::Token,
            conn: &mut Conn,
            bytes: &mut [u8],
        ) {
            assert_eq!(*conn, Conn::Accepted, "the state is lost between the handlers");
            cx.write(token, &bytes.to_ascii_uppercase()).unwrap();
            cx.stop();
        }
    }
    peer.write_all(b"loud").unwrap();
    world.reactor.run(&mut Shouting).unwrap();
    let mut answer = [0; 4];
    std::io::Read::read_exact(&mut peer, &mut answer).unwrap();
    assert_eq!(&answer, b"LOUD");
    world.script(echo);
    echo_once(&mut world, &mut peer, b"quiet");
    assert_eq!(world.service.data(token), b"quiet");
}

#[test]
fn shutdown_with_nothing_to_close_completes_at_once() {
    let _descriptors = Descriptors::counted();
    for with_past in [false, true] {
        let mut world = World::new();
        let address = world.listen();
        if with_past {
            let (_peer, token) = world.pair(address);
            world.cx().abort(token);
            world.until_closed(token);
        }
        let before = Instant::now();
        world.cx().shutdown(DEADLINE * 10);
        assert!(world.cx().is_shutting_down());
        run(&mut world);
        assert!(before.elapsed() < DEADLINE);
        assert_eq!(world.cx().stats().timers_armed, 0);
        assert_eq!(world.cx().listeners().count(), 0);
        assert!(TcpStream::connect(address).is_err());
    }
}

#[test]
fn shutdown_sends_queued_bytes_within_the_grace_period() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { write_queue_bytes_max: 32 << 20, ..Default::default() });
    let address = world.listen();
    let stream = pattern(16 << 20);
    let pairs: Vec<_> = (0..3).map(|_| world.pair(address)).collect();
    let mut tokens = Vec::new();
    let mut readers = Vec::new();
    for (mut peer, token) in pairs {
        world.cx().write(token, &stream).unwrap();
        assert!(world.cx().queued_bytes(token) > 0);
        tokens.push(token);
        readers.push(move || read_to_end(&mut peer));
    }
    world.cx().shutdown(DEADLINE);
    let readers: Vec<_> = readers.into_iter().map(std::thread::spawn).collect();
    run(&mut world);
    for reader in readers {
        let (bytes, by_reset) = reader.join().unwrap();
        assert!(bytes == stream && !by_reset);
    }
    for token in tokens {
        assert_eq!(world.service.why(token), Some(Why::Closed));
    }
    assert_eq!(world.cx().connections(), 0);
}

#[test]
fn shutdown_resets_connections_after_the_grace_period() {
    let _descriptors = Descriptors::counted();
    let grace = Duration::from_millis(100);
    let mut world = World::with(Config { write_queue_bytes_max: 32 << 20, ..Default::default() });
    let address = world.listen();
    let (mut slow, slow_token) = world.pair(address);
    let (mut idle, idle_token) = world.pair(address);
    world.cx().write(slow_token, &pattern(16 << 20)).unwrap();
    let before = Instant::now();
    world.cx().shutdown(grace);
    run(&mut world);
    assert!(before.elapsed() >= grace && before.elapsed() < DEADLINE);
    assert_eq!(world.service.why(slow_token), Some(Why::ShutDown));
    assert_eq!(world.service.why(idle_token), Some(Why::Closed));
    assert!(read_to_end(&mut slow).1);
    assert_eq!(read_to_end(&mut idle), (Vec::new(), false));
}

/// Sends a closing message, and waits for that of the peer.
struct ClosingMessage;

impl Handler for ClosingMessage {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        if bytes == b"goodbye" {
            cx.close(token);
        } else {
            cx.write(token, bytes).unwrap();
        }
    }

    fn on_shutdown(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.write(token, b"goodbye").unwrap();
    }
}

#[test]
fn each_connection_has_the_grace_period_for_a_closing_message() {
    let _descriptors = Descriptors::counted();
    let grace = Duration::from_millis(300);
    let config = Config { file_table: common::file_table(), ..Config::default() };
    let mut reactor = Reactor::new(&config).unwrap();
    let listener = reactor.context().listen(LOOPBACK, &ListenOptions::default()).unwrap();
    let address = reactor.context().listener_addr(listener).unwrap();
    let [mut polite, mut rude] = [(); 2].map(|()| common::peer(address));
    let deadline = Instant::now() + DEADLINE;
    while reactor.context().stats().opened < 2 {
        assert!(Instant::now() < deadline);
        let _ = reactor.turn(&mut ClosingMessage, Some(Duration::from_millis(20))).unwrap();
    }
    let peers = std::thread::spawn(move || {
        let mut said = [0; 7];
        polite.read_exact(&mut said).unwrap();
        polite.write_all(&said).unwrap();
        (read_to_end(&mut polite), read_to_end(&mut rude))
    });
    let before = Instant::now();
    reactor.context().shutdown(grace);
    reactor.run(&mut ClosingMessage).unwrap();
    assert!(before.elapsed() >= grace, "the other connection had less than the grace period");
    let (polite, rude) = peers.join().unwrap();
    assert_eq!(polite, (Vec::new(), false));
    assert!(rude.1, "the connection was not reset");
}

#[test]
fn shutdown_closes_all_connections_in_slices() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { closes_per_turn: 7, ..Default::default() });
    let address = world.listen();
    let peers: Vec<_> = (0..50).map(|_| common::peer(address)).collect();
    world.until("all of them", |world| world.service.opened().len() == peers.len());
    world.cx().shutdown(DEADLINE * 10);
    let before = Instant::now();
    run(&mut world);
    assert!(before.elapsed() < DEADLINE);
    assert_eq!(world.service.closed().len(), 50);
}

#[test]
fn shutdown_within_each_callback_keeps_the_guarantees() {
    let _descriptors = Descriptors::counted();
    let callbacks: [fn(&Event) -> bool; 5] = [
        |event| matches!(event, Event::Open(_)),
        |event| matches!(event, Event::Data(..)),
        |event| matches!(event, Event::Eof(_)),
        |event| matches!(event, Event::Timer(_)),
        |event| matches!(event, Event::Close(..)),
    ];
    for (which, callback) in callbacks.into_iter().enumerate() {
        let mut world = World::new();
        world.script(move |cx, event| {
            if callback(event) {
                cx.shutdown(DEADLINE);
            }
            echo(cx, event);
        });
        let address = world.listen();
        let mut peers: Vec<_> = (0..3).map(|_| common::peer(address)).collect();
        peers[1].write_all(b"data").unwrap();
        peers[2].shutdown(std::net::Shutdown::Write).unwrap();
        world.cx().add_timer(Duration::from_millis(5)).unwrap();
        let before = Instant::now();
        run(&mut world);
        assert!(before.elapsed() < DEADLINE, "callback {which}");
        assert_eq!(world.cx().connections(), 0);
        assert_eq!(world.service.opened().len(), world.service.closed().len());
    }
}

#[test]
fn nothing_new_starts_during_a_shutdown() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { write_queue_bytes_max: 32 << 20, ..Default::default() });
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().write(token, &pattern(16 << 20)).unwrap();
    world.cx().shutdown(Duration::from_millis(50));
    let options = ConnectOptions::default();
    assert!(world.cx().connect(address, &options, Conn::Connecting).is_err());
    assert!(world.cx().listen(LOOPBACK, &ListenOptions::default()).is_err());
    run(&mut world);
    // After the shutdown the reactor can be used again.
    assert!(!world.cx().is_shutting_down());
    let address = world.listen();
    world.pair(address);
}

#[test]
fn a_pending_connect_is_cancelled_by_a_shutdown() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let options = ConnectOptions::default();
    let token = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.cx().shutdown(DEADLINE * 10);
    let before = Instant::now();
    run(&mut world);
    assert!(before.elapsed() < DEADLINE);
    assert!(world.service.why(token).is_some());
}

#[test]
fn a_second_shutdown_changes_nothing() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { write_queue_bytes_max: 32 << 20, ..Default::default() });
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().write(token, &pattern(16 << 20)).unwrap();
    world.cx().shutdown(Duration::from_millis(50));
    world.cx().shutdown(DEADLINE * 10);
    let before = Instant::now();
    run(&mut world);
    assert!(before.elapsed() < DEADLINE);
    assert_eq!(world.service.why(token), Some(Why::ShutDown));
}

#[test]
fn a_second_shutdown_can_only_shorten_the_grace_period() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_silent, token) = world.pair(address);
    let stream = pattern(200_000);
    while world.cx().queued_bytes(token) == 0 {
        world.cx().write(token, &stream).unwrap();
    }
    let before = Instant::now();
    world.cx().shutdown(DEADLINE * 10);
    world.cx().shutdown(DEADLINE * 20);
    world.cx().shutdown(Duration::from_millis(50));
    run(&mut world);
    assert_eq!(world.service.why(token), Some(Why::ShutDown));
    assert!(before.elapsed() >= Duration::from_millis(50) && before.elapsed() < DEADLINE);
}
