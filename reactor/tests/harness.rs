//! The harness of the feature `testing`: a handler gets the same callbacks as with real sockets.

#![cfg(feature = "testing")]
#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use common::descriptors::Descriptors;
use common::{World, echo, peer};
use reactor::testing::{Harness, State};
use reactor::{
    Address, CloseReason, Config, ConnectOptions, Context, Error, Handler, Incoming, Interest,
    ListenOptions, ListenerId, Mailbox, Readiness, Signal, Token, WatchId, Written,
};

const SECOND: Duration = Duration::from_secs(1);

/// Records the callbacks; the first byte of a message selects an action.
#[derive(Default)]
struct Service {
    log: Vec<String>,
    mailbox: Option<Mailbox<u32>>,
    detached: Vec<reactor::Detached>,
}

type Cx = Context<u32>;

impl Handler for Service {
    type Conn = u32;

    fn on_accept(&mut self, cx: &mut Cx, incoming: &Incoming<'_>) -> Option<u32> {
        let port = incoming.peer_addr().unwrap().port();
        self.log.push(format!("accept {port} at {:?}", cx.now().elapsed() < SECOND));
        (port != 666).then_some(u32::from(port))
    }

    fn on_open(&mut self, cx: &mut Cx, token: Token, conn: &mut u32) {
        let port = cx.peer_addr(token).unwrap().port();
        self.log.push(format!("open {conn} {port}"));
    }

    fn on_data(&mut self, cx: &mut Cx, token: Token, conn: &mut u32, bytes: &mut [u8]) {
        self.log.push(format!("data {conn} {}", bytes.escape_ascii()));
        match bytes[0] {
            b'c' => cx.close(token),
            b'a' => cx.abort(token),
            b'f' => cx.finish(token),
            b'd' => cx.detach(token).unwrap(),
            b't' => cx.set_timeout(token, 90 * SECOND),
            b'h' => cx.set_tagged_timeout(token, bytes[1].into(), SECOND).unwrap(),
            b'n' => assert!(cx.clear_tagged_timeout(token, bytes[1].into())),
            b's' => cx.stop(),
            b'F' => {
                let file = std::fs::File::open("Cargo.toml").unwrap();
                let length = file.metadata().unwrap().len();
                let more = if bytes.len() > 1 { 1 } else { 0 };
                assert_eq!(cx.write_file(token, file, 0..length + more).unwrap(), Written::Queued);
            }
            _ => {
                let written = cx.write(token, bytes).unwrap();
                if written == Written::Queued {
                    cx.pause_reads(token);
                }
            }
        }
    }

    fn on_eof(&mut self, cx: &mut Cx, token: Token, conn: &mut u32) {
        self.log.push(format!("eof {conn}"));
        cx.close(token);
    }

    fn on_drain(&mut self, cx: &mut Cx, token: Token, conn: &mut u32) {
        self.log.push(format!("drain {conn}"));
        cx.resume_reads(token);
    }

    fn on_close(&mut self, _cx: &mut Cx, _token: Token, conn: u32, reason: CloseReason) {
        self.log.push(format!("close {conn} {reason}"));
        if let CloseReason::Detached(detached) = reason {
            self.detached.push(detached);
        }
    }

    fn on_timeout(&mut self, cx: &mut Cx, token: Token, conn: &mut u32) {
        self.log.push(format!("timeout {conn}"));
        cx.close(token);
    }

    fn on_tagged_timeout(&mut self, _cx: &mut Cx, _token: Token, conn: &mut u32, tag: u64) {
        self.log.push(format!("tagged timeout {conn} {tag}"));
    }

    fn on_listener_drained(&mut self, cx: &mut Cx, listener: ListenerId) {
        assert!(cx.listeners().all(|other| other != listener));
        self.log.push("drained".to_owned());
    }

    fn on_ready(&mut self, cx: &mut Cx, watch: WatchId, readiness: Readiness) {
        let mut reader =
            std::fs::File::from(cx.watched(watch).unwrap().try_clone_to_owned().unwrap());
        let mut bytes = [0; 16];
        let count = reader.read(&mut bytes).unwrap();
        let text = bytes[..count].escape_ascii();
        self.log.push(format!("ready {} {text}", readiness.is_readable()));
    }

    fn on_wake(&mut self, _cx: &mut Cx) {
        while let Some(message) = self.mailbox.as_mut().and_then(Mailbox::receive) {
            self.log.push(format!("message {message}"));
        }
    }

    fn on_signal(&mut self, cx: &mut Cx, signal: Signal) {
        self.log.push(format!("{signal:?}"));
        cx.shutdown(SECOND);
    }
}

fn harness() -> (Harness<Service>, ListenerId) {
    harness_with(&Config::default())
}

fn harness_with(config: &Config) -> (Harness<Service>, ListenerId) {
    let mut harness = Harness::new(config, Service::default()).unwrap();
    let listener =
        harness.context().listen(([127, 0, 0, 1], 7), &ListenOptions::default()).unwrap();
    (harness, listener)
}

/// Takes the log since the last call.
fn log(harness: &mut Harness<Service>) -> Vec<String> {
    std::mem::take(&mut harness.handler_mut().log)
}

fn accept(
    harness: &mut Harness<Service>,
    listener: ListenerId,
    port: u16,
) -> reactor::testing::Peer {
    harness.accept_from(listener, SocketAddr::from(([192, 0, 2, 1], port)))
}

#[test]
fn a_peer_is_accepted_answered_and_closed() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    let peer = accept(&mut harness, listener, 5);
    harness.send(peer, b"one");
    assert_eq!(harness.state(peer), State::Waiting);
    assert!(harness.token(peer).is_none());
    harness.run();
    assert_eq!(log(&mut harness), ["accept 5 at true", "open 5 5", "data 5 one"]);
    assert_eq!(harness.received(peer), b"one");
    assert_eq!(harness.received(peer), b"");
    let token = harness.token(peer).unwrap();
    assert!(harness.context().holds(token));

    harness.send(peer, b"2");
    harness.end(peer);
    harness.run();
    assert_eq!(log(&mut harness), ["data 5 2", "eof 5", "close 5 closed by the peer"]);
    assert_eq!(harness.received(peer), b"2");
    assert_eq!(harness.state(peer), State::Closed);
    harness.send(peer, b"late");
    harness.run();
    assert!(log(&mut harness).is_empty());
}

#[test]
fn the_peer_sees_each_way_to_end() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    let ends = [(b"c", State::Closed), (b"a", State::Reset), (b"f", State::Finished)];
    for (message, state) in ends {
        let peer = accept(&mut harness, listener, 5);
        harness.send(peer, message);
        harness.run();
        assert_eq!(harness.state(peer), state);
        assert_eq!(harness.is_closed(peer), state != State::Finished);
    }
    let refused = accept(&mut harness, listener, 666);
    harness.run();
    assert_eq!(harness.state(refused), State::Reset);

    log(&mut harness);
    let resetting = accept(&mut harness, listener, 6);
    harness.run();
    harness.reset(resetting);
    harness.run();
    assert!(log(&mut harness)[2].starts_with("close 6 failed: "));

    let waiting = accept(&mut harness, listener, 7);
    harness.context().unlisten(listener);
    assert_eq!(harness.state(waiting), State::Reset);
}

#[test]
fn a_drained_listener_accepts_waiting_peers_and_reports_its_end() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 2, ..Config::default() };
    let (mut harness, listener) = harness_with(&config);
    let peers = [5, 6, 7].map(|port| accept(&mut harness, listener, port));
    harness.context().drain_listener(listener);
    harness.run();
    let first = ["accept 5 at true", "open 5 5", "accept 6 at true", "open 6 6"];
    assert_eq!(log(&mut harness), first);
    assert_eq!(harness.state(peers[2]), State::Waiting);

    harness.send(peers[0], b"a");
    harness.run();
    let then = ["data 5 a", "close 5 aborted", "accept 7 at true", "open 7 7"];
    assert_eq!(log(&mut harness), then);

    // The reactor sees that the backlog is empty only when it has a slot to accept.
    harness.send(peers[1], b"a");
    harness.run();
    assert_eq!(log(&mut harness), ["data 6 a", "close 6 aborted", "drained"]);
    assert_eq!(harness.context().listeners().count(), 0);
}

#[test]
fn a_peer_without_room_fills_the_queue_and_drains_it() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    let peer = accept(&mut harness, listener, 5);
    harness.set_room(peer, 4);
    harness.send(peer, b"123456");
    harness.run();
    harness.send(peer, b"789");
    harness.run();
    assert_eq!(harness.received(peer), b"1234");
    assert_eq!(harness.context().stats().queued_bytes, 2);
    assert_eq!(log(&mut harness), ["accept 5 at true", "open 5 5", "data 5 123456"]);

    harness.set_room(peer, 1);
    harness.run();
    assert_eq!(harness.received(peer), b"5");
    assert!(log(&mut harness).is_empty());
    harness.set_room(peer, 100);
    harness.run();
    assert_eq!(harness.received(peer), b"6789");
    assert_eq!(log(&mut harness), ["drain 5", "data 5 789"]);
}

#[test]
fn the_test_controls_the_time() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    let started = harness.context().now();
    let peers = [5, 6].map(|port| accept(&mut harness, listener, port));
    for peer in peers {
        harness.send(peer, b"t");
        harness.advance(30 * SECOND);
    }
    log(&mut harness);
    harness.advance(60 * SECOND - Duration::from_millis(1));
    assert!(log(&mut harness)[..] == ["timeout 5", "close 5 closed"], "30 s + 90 s are not over");
    harness.advance(Duration::from_millis(1));
    assert_eq!(log(&mut harness), ["timeout 6", "close 6 closed"]);
    assert_eq!(harness.context().now() - started, 120 * SECOND);
}

#[test]
fn connects_wait_for_their_answer() {
    let _descriptors = Descriptors::counted();
    let (mut harness, _) = harness();
    let to = SocketAddr::from(([192, 0, 2, 9], 80));
    for conn in [1, 2, 3] {
        let options = ConnectOptions { timeout: Some(SECOND), ..ConnectOptions::default() };
        let token = harness.context().connect(to, &options, conn).unwrap();
        harness.context().write(token, b"early").unwrap();
    }
    harness.run();
    let connects = harness.connects();
    assert_eq!(connects.len(), 3);
    assert!(connects.iter().all(|(_, address)| *address == Address::Ip(to)));
    assert!(harness.connects().is_empty() && log(&mut harness).is_empty());
    assert_eq!(harness.state(connects[0].0), State::Waiting);
    harness.answer(connects[0].0);
    harness.refuse(connects[1].0);
    harness.advance(SECOND);
    let log = log(&mut harness);
    assert_eq!(log[0], "open 1 80");
    assert!(log.iter().any(|line| line.starts_with("close 2 connect failed: ")), "{log:?}");
    assert_eq!(log.last().unwrap(), "close 3 connect timed out");
    assert_eq!(harness.received(connects[0].0), b"early");
}

#[test]
fn a_connect_that_is_reset_fails() {
    let _descriptors = Descriptors::counted();
    let (mut harness, _) = harness();
    let to = SocketAddr::from(([192, 0, 2, 9], 80));
    harness.context().connect(to, &ConnectOptions::default(), 1).unwrap();
    harness.run();
    let connects = harness.connects();
    harness.reset(connects[0].0);
    harness.run();
    let log = log(&mut harness);
    assert!(log.len() == 1 && log[0].starts_with("close 1 connect failed: "), "{log:?}");
    assert_eq!(harness.context().connections(), 0);
}

#[test]
fn sockets_are_adopted_and_detached() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    let (socket, peer) = harness.socket();
    harness.context().adopt(socket, 9).unwrap();
    harness.send(peer, b"d");
    harness.run();
    assert_eq!(log(&mut harness), ["open 9 1", "data 9 d", "close 9 detached"]);
    let detached = harness.handler_mut().detached.pop().unwrap();
    harness.context().adopt(detached.descriptor, 10).unwrap();
    harness.send(peer, b"x");
    harness.run();
    assert_eq!(harness.received(peer), b"x");

    let descriptor = harness.context().detach_listener(listener).unwrap();
    let waiting = harness.context().adopt_listener(descriptor, &ListenOptions::default()).unwrap();
    let other = accept(&mut harness, waiting, 5);
    harness.run();
    assert_eq!(harness.state(other), State::Open);
}

#[test]
fn the_test_controls_the_readiness_of_a_watch() {
    let _descriptors = Descriptors::counted();
    let (mut harness, _) = harness();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let watch = harness.context().watch(reader, Interest::Readable).unwrap();
    writer.write_all(b"news").unwrap();
    harness.run();
    assert!(log(&mut harness).is_empty());
    harness.ready(watch, Interest::Readable);
    harness.run();
    assert_eq!(log(&mut harness), ["ready true news"]);
    drop(harness.context().unwatch(watch).unwrap());
}

#[test]
fn signals_messages_and_stops_arrive() {
    let _descriptors = Descriptors::counted();
    let (mut harness, listener) = harness();
    harness.context().watch_signals(&[Signal::Terminate]).unwrap();
    let (handler, cx) = harness.parts_mut();
    let (sender, mailbox) = cx.mailbox(4);
    handler.mailbox = Some(mailbox);
    std::thread::spawn(move || sender.send(7)).join().unwrap().unwrap();
    harness.run();
    assert_eq!(log(&mut harness), ["message 7"]);

    let peer = accept(&mut harness, listener, 5);
    harness.send(peer, b"stop");
    harness.run();
    assert!(harness.has_stopped());
    harness.run();
    assert!(!harness.has_stopped());
    log(&mut harness);
    harness.signal(Signal::Terminate);
    harness.run();
    assert!(harness.has_stopped());
    assert_eq!(log(&mut harness), ["Terminate", "close 5 closed"]);
}

#[test]
fn bounds_hold_as_with_sockets() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 1, ..Config::default() };
    let (mut harness, listener) = harness_with(&config);
    let [first, second] = [5, 6].map(|port| accept(&mut harness, listener, port));
    harness.run();
    assert_eq!((harness.state(first), harness.state(second)), (State::Open, State::Waiting));
    harness.end(first);
    harness.run();
    assert_eq!((harness.state(first), harness.state(second)), (State::Closed, State::Open));
}

#[test]
fn the_same_test_has_the_same_result_each_time() {
    let _descriptors = Descriptors::counted();
    let run = || {
        let (mut harness, listener) = harness();
        let peers: Vec<_> = (0..50).map(|port| accept(&mut harness, listener, port)).collect();
        for (number, &peer) in peers.iter().enumerate() {
            harness.send(peer, if number % 7 == 0 { b"c" } else { b"t" });
            if number % 5 == 0 {
                harness.turn();
            }
        }
        harness.advance(100 * SECOND);
        assert!(peers.iter().all(|&peer| harness.is_closed(peer)));
        log(&mut harness)
    };
    assert_eq!(run(), run());
}

#[test]
fn harnesses_and_a_real_reactor_can_coexist() {
    let _descriptors = Descriptors::counted();
    let (mut one, one_listener) = harness();
    let (mut two, two_listener) = harness();
    let mut world = World::new();
    world.script(echo);
    let address = world.listen();
    let (mut real, _) = world.pair(address);
    common::echo_once(&mut world, &mut real, b"real");

    let first = accept(&mut one, one_listener, 5);
    let second = accept(&mut two, two_listener, 6);
    one.send(first, b"1st");
    two.send(second, b"2nd");
    one.run();
    assert_eq!(one.received(first), b"1st");
    assert_eq!(two.received(second), b"", "the other harness has run");
    two.run();
    assert_eq!(two.received(second), b"2nd");

    drop(one);
    assert_eq!(two.state(first), State::Closed, "a dropped reactor has not closed its connections");
    two.send(second, b"more");
    two.run();
    assert_eq!(two.received(second), b"more");
    let mut other = peer(address);
    common::echo_once(&mut world, &mut other, b"still real");
}

#[test]
fn a_connection_has_a_timeout_for_each_tag() {
    let _descriptors = Descriptors::counted();
    let config = Config { timers_max: 3, ..Config::default() };
    let (mut harness, listener) = harness_with(&config);
    let peer = accept(&mut harness, listener, 5);
    for message in [b"t0", b"h1", b"h2", b"h3"] {
        harness.send(peer, message);
        harness.run();
        harness.advance(Duration::from_millis(100));
    }
    let token = harness.token(peer).unwrap();
    let cx = harness.context();
    assert!(matches!(cx.set_tagged_timeout(token, 4, SECOND), Err(Error::Full { limit: 3, .. })));
    assert!(matches!(cx.add_timer(SECOND), Err(Error::Full { limit: 3, .. })));
    assert_eq!(cx.stats().timers_armed, 4);

    // The first is moved, the second is cleared; the timeout without a tag is independent.
    harness.send(peer, b"h1");
    harness.run();
    harness.send(peer, b"n2");
    harness.run();
    log(&mut harness);
    harness.advance(SECOND);
    let (first, third) = (u64::from(b'1'), u64::from(b'3'));
    let due = [third, first].map(|tag| format!("tagged timeout 5 {tag}"));
    assert_eq!(log(&mut harness), due);

    // A removed connection has no timeouts.
    harness.send(peer, b"h1");
    harness.run();
    harness.send(peer, b"a");
    harness.run();
    assert_eq!(harness.context().stats().timers_armed, 0);
    let refused = harness.context().set_tagged_timeout(token, 1, SECOND);
    assert!(matches!(refused, Err(Error::Stale)));
    assert!(!harness.context().clear_tagged_timeout(token, 1));
    log(&mut harness);
    harness.advance(10 * SECOND);
    assert!(log(&mut harness).is_empty());
}

#[test]
fn a_file_is_sent_up_to_the_room_and_must_have_the_full_length() {
    let _descriptors = Descriptors::counted();
    let text = std::fs::read("Cargo.toml").unwrap();
    let (mut harness, listener) = harness();
    let peer = accept(&mut harness, listener, 5);
    harness.set_room(peer, 100);
    harness.send(peer, b"F");
    harness.run();
    assert_eq!(harness.received(peer), text[..100]);
    harness.set_room(peer, 1_000_000);
    harness.run();
    assert_eq!(harness.received(peer), text[100..]);
    assert_eq!(log(&mut harness)[2..], ["data 5 F", "drain 5"]);

    harness.send(peer, b"F+");
    harness.run();
    assert_eq!(harness.received(peer), text);
    assert_eq!(harness.state(peer), State::Reset);
    let expected = "close 5 failed: the file ended before all of the part was sent";
    assert_eq!(log(&mut harness)[1..], [expected]);
}
