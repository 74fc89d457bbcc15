//! The harness, and by it the callbacks that have nothing to do with sockets.

#![cfg(feature = "testing")]
#![allow(clippy::unwrap_used)] // A test may unwrap, and so may what it is made of.

mod common;

use std::time::Duration;

use reactor::testing::{End, Harness};
use reactor::{CloseReason, Config, Context, Error, Handler, Incoming, SweepId, TimerId, Token};

use common::descriptors::Descriptors;

const SECOND: Duration = Duration::from_secs(1);

/// What a handler was called with.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Opened(Token),
    Data(Vec<u8>),
    Eof,
    Timeout,
    ConnTimer(Token, u64),
    Timer(TimerId),
    Deferred(u64),
    Visit(Token),
    Swept(SweepId),
    Closed(String),
}

/// Notes its calls, and does on each message what that says.
#[derive(Debug, Default)]
struct Notes {
    calls: Vec<Call>,
}

impl Notes {
    fn take(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }
}

impl Handler for Notes {
    type Conn = u32;

    fn on_accept(&mut self, _: &mut Context<u32>, incoming: &Incoming<'_>) -> Option<u32> {
        incoming.peer_addr().unwrap();
        Some(0)
    }

    fn on_open(&mut self, _: &mut Context<u32>, token: Token, _: &mut u32) {
        self.calls.push(Call::Opened(token));
    }

    fn on_data(&mut self, cx: &mut Context<u32>, token: Token, conn: &mut u32, bytes: &mut [u8]) {
        self.calls.push(Call::Data(bytes.to_vec()));
        match &*bytes {
            b"echo" => _ = cx.write(token, bytes).unwrap(),
            b"abort" => cx.abort(token),
            b"timers" => {
                for (tag, seconds) in [(7, 30), (8, 10), (9, 20)] {
                    cx.add_conn_timer(token, SECOND * seconds, tag).unwrap();
                }
                cx.set_timeout(token, SECOND * 15);
            }
            b"defer" => [3, 1, 2].into_iter().for_each(|tag| cx.defer(tag)),
            b"again" => cx.defer(100),
            b"stop" => cx.stop(),
            _ => *conn += 1,
        }
    }

    fn on_eof(&mut self, cx: &mut Context<u32>, token: Token, _: &mut u32) {
        self.calls.push(Call::Eof);
        cx.close(token);
    }

    fn on_timeout(&mut self, _: &mut Context<u32>, _: Token, _: &mut u32) {
        self.calls.push(Call::Timeout);
    }

    fn on_conn_timer(&mut self, cx: &mut Context<u32>, token: Token, conn: &mut u32, tag: u64) {
        assert!(cx.conn(token).is_none(), "its state is lent");
        *conn += 1;
        self.calls.push(Call::ConnTimer(token, tag));
    }

    fn on_timer(&mut self, _: &mut Context<u32>, timer: TimerId) {
        self.calls.push(Call::Timer(timer));
    }

    fn on_deferred(&mut self, cx: &mut Context<u32>, tag: u64) {
        self.calls.push(Call::Deferred(tag));
        if (100..103).contains(&tag) {
            cx.defer(tag + 1);
        }
    }

    fn on_visit(&mut self, _: &mut Context<u32>, _: SweepId, token: Token, _: &mut u32) {
        self.calls.push(Call::Visit(token));
    }

    fn on_swept(&mut self, _: &mut Context<u32>, sweep: SweepId) {
        self.calls.push(Call::Swept(sweep));
    }

    fn on_close(&mut self, _: &mut Context<u32>, _: Token, _: u32, reason: CloseReason) {
        self.calls.push(Call::Closed(reason.to_string()));
    }
}

#[test]
fn bytes_ends_and_resets_reach_the_handler_and_its_own_reach_the_peer() {
    let _descriptors = Descriptors::counted();
    let mut harness = Harness::new(Notes::default()).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.send(&mut peer, b"echo").unwrap();
    assert_eq!(harness.received(&mut peer), b"echo");
    assert_eq!(harness.end(&mut peer), None);
    harness.finish(&mut peer).unwrap();
    assert_eq!(harness.end(&mut peer), Some(End::Finished));
    let calls = harness.handler().take();
    assert_eq!(
        calls[1..],
        [Call::Data(b"echo".to_vec()), Call::Eof, Call::Closed("closed by the peer".to_owned()),]
    );

    let mut peer = harness.connect().unwrap();
    harness.send(&mut peer, b"abort").unwrap();
    assert_eq!(harness.end(&mut peer), Some(End::Reset));
    let peer = harness.connect().unwrap();
    harness.handler().take();
    harness.reset(peer).unwrap();
    let calls = harness.handler().take();
    assert!(matches!(&calls[..], [Call::Closed(reason)] if reason.contains("reset")), "{calls:?}");
    assert_eq!(harness.context().connections(), 0);
}

#[test]
fn many_bytes_come_through_whole() {
    let _descriptors = Descriptors::counted();
    let mut harness = Harness::new(Echo).unwrap();
    let mut peer = harness.connect().unwrap();
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|number| number as u8).collect();
    let mut received = vec![];
    for part in bytes.chunks(50_000) {
        harness.send(&mut peer, part).unwrap();
        received.extend(harness.received(&mut peer));
    }
    assert!(received == bytes, "{} of {} came back", received.len(), bytes.len());
}

struct Echo;

impl Handler for Echo {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, (): &mut (), bytes: &mut [u8]) {
        cx.write(token, bytes).unwrap();
    }
}

#[test]
fn timers_of_a_connection_have_their_tags_beside_its_timeout() {
    let _descriptors = Descriptors::counted();
    let mut harness = Harness::new(Notes::default()).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.send(&mut peer, b"timers").unwrap();
    let [Call::Opened(token), _] = harness.handler().take()[..] else { panic!("it has opened") };
    harness.advance(SECOND * 9);
    assert_eq!(harness.handler().take(), []);
    harness.advance(SECOND * 60);
    let timer = |tag| Call::ConnTimer(token, tag);
    assert_eq!(harness.handler().take(), [timer(8), Call::Timeout, timer(9), timer(7)]);
    assert_eq!(harness.context().conn(token), Some(&3));
    assert_eq!(harness.context().stats().timers_armed, 0);
}

#[test]
fn a_timer_of_a_connection_that_has_gone_is_dropped() {
    let _descriptors = Descriptors::counted();
    let config = Config { timers_max: 4, ..Config::default() };
    let mut harness = Harness::with_config(Notes::default(), &config).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.send(&mut peer, b"timers").unwrap();
    let [Call::Opened(token), _] = harness.handler().take()[..] else { panic!("it has opened") };
    let cancelled = harness.context().add_conn_timer(token, SECOND, 1).unwrap();
    let full = harness.context().add_conn_timer(token, SECOND, 2);
    assert!(matches!(full, Err(Error::Full { what: "timers", limit: 4 })), "{full:?}");
    assert!(harness.context().cancel_timer(cancelled));
    harness.context().abort(token);
    harness.advance(SECOND * 60);
    assert_eq!(harness.handler().take(), [Call::Closed("aborted".to_owned())]);
    let stale = harness.context().add_conn_timer(token, SECOND, 3);
    assert!(matches!(stale, Err(Error::Stale)), "{stale:?}");
    let timer = harness.context().add_timer(SECOND).unwrap();
    harness.advance(SECOND);
    assert_eq!(harness.handler().take(), [Call::Timer(timer)]);
}

#[test]
fn what_is_deferred_comes_in_the_next_turn_and_in_order() {
    let _descriptors = Descriptors::counted();
    let mut harness = Harness::new(Notes::default()).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.handler().take();
    harness.send(&mut peer, b"defer").unwrap();
    let deferred = |tag| Call::Deferred(tag);
    assert_eq!(harness.handler().take()[1..], [deferred(3), deferred(1), deferred(2)]);
    let turns = harness.context().stats().wakeups;
    harness.send(&mut peer, b"again").unwrap();
    assert_eq!(harness.handler().take()[1..], [100, 101, 102, 103].map(deferred));
    assert!(harness.context().stats().wakeups >= turns + 4, "each in a turn of its own");
}

#[test]
fn a_sweep_over_chosen_connections_visits_those_that_are_open() {
    let _descriptors = Descriptors::counted();
    let config = Config { visits_per_turn: 2, ..Config::default() };
    let mut harness = Harness::with_config(Notes::default(), &config).unwrap();
    let _peers: Vec<_> = (0..7).map(|_| harness.connect().unwrap()).collect();
    let tokens: Vec<Token> = harness.context().tokens(0..7).collect();
    harness.context().abort(tokens[2]);
    harness.settle(Duration::ZERO);
    harness.handler().take();
    let chosen = [5, 2, 0, 6, 5].map(|index| tokens[index]);
    let sweep = harness.context().sweep_over(chosen.to_vec()).unwrap();
    let empty = harness.context().sweep_over(vec![]).unwrap();
    harness.settle(Duration::ZERO);
    let visit = |index: usize| Call::Visit(tokens[index]);
    let expected = [visit(5), visit(0), visit(6), visit(5), Call::Swept(sweep), Call::Swept(empty)];
    assert_eq!(harness.handler().take(), expected);
}

#[test]
fn a_handler_may_stop_and_be_shut_down() {
    let _descriptors = Descriptors::counted();
    let mut harness = Harness::new(Notes::default()).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.send(&mut peer, b"stop").unwrap();
    assert!(harness.has_stopped());
    let mut harness = Harness::new(Notes::default()).unwrap();
    let mut peer = harness.connect().unwrap();
    harness.context().shutdown(SECOND);
    harness.settle(Duration::ZERO);
    harness.finish(&mut peer).unwrap();
    assert_eq!(harness.end(&mut peer), Some(End::Finished));
    assert!(harness.has_stopped());
    assert!(harness.connect().is_err(), "nothing listens");
}
