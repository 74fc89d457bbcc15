//! Driving a reactor from another event loop, and the statistics of turns.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use common::descriptors::Descriptors;
use common::{Event, Why, World, echo, peer};
use reactor::{Callback, Config};

/// Whether the reactor's descriptor becomes readable within this time.
fn is_readable(world: &World, within: Duration) -> bool {
    let mut descriptors = [PollFd::new(world.reactor.as_fd(), PollFlags::POLLIN)];
    poll(&mut descriptors, PollTimeout::try_from(within).unwrap()).unwrap() == 1
}

/// Whether a turn is due, independently of the descriptor.
fn is_due(world: &World) -> bool {
    world.reactor.next_deadline().is_some_and(|due| due <= Instant::now())
}

#[test]
fn the_descriptor_is_readable_while_events_are_pending() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    assert!(!is_readable(&world, Duration::ZERO) && world.reactor.next_deadline().is_none());
    let _peer = peer(address);
    assert!(is_readable(&world, common::DEADLINE));
    while is_readable(&world, Duration::ZERO) || is_due(&world) {
        let _ = world.turn(Duration::ZERO);
    }
    assert_eq!(world.service.opened().len(), 1);
    world.cx().waker().wake();
    assert!(is_readable(&world, Duration::ZERO), "a wake-up makes the descriptor readable");
    let _ = world.turn(Duration::ZERO);
    assert!(world.service.saw(&Event::Wake));
}

#[test]
fn the_next_deadline_is_that_of_the_next_timer() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let begun = world.cx().now();
    let timer = world.cx().add_timer(Duration::from_secs(3)).unwrap();
    world.cx().add_timer(Duration::from_millis(20)).unwrap();
    let due = world.reactor.next_deadline().unwrap();
    assert!(due <= begun + Duration::from_millis(21), "{:?}", due - begun);
    while world.service.count(|event| matches!(event, Event::Timer(_))) == 0 {
        let due = world.reactor.next_deadline().expect("a timer is armed");
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let _ = world.turn(Duration::ZERO);
    }
    assert!(begun.elapsed() >= Duration::from_millis(20), "the timer fired early");
    world.cx().cancel_timer(timer);
    assert_eq!(world.reactor.next_deadline(), None);
}

#[test]
fn requests_between_two_turns_make_a_turn_due() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let (_other, other) = world.pair(address);
    while is_due(&world) || is_readable(&world, Duration::ZERO) {
        let _ = world.turn(Duration::ZERO);
    }
    world.cx().sweep().unwrap();
    assert!(is_due(&world), "a sweep");
    let _ = world.turn(Duration::ZERO);
    assert!(!is_due(&world));
    world.cx().abort(token);
    assert!(is_due(&world), "a close");
    let _ = world.turn(Duration::ZERO);
    assert_eq!(world.service.why(token), Some(Why::Aborted));
    world.cx().shutdown(common::DEADLINE);
    assert!(is_due(&world), "a shutdown");
    world.until_closed(other);
}

/// The duration of a slow callback.
const SLOW: Duration = Duration::from_millis(60);

#[test]
fn the_longest_turn_is_recorded_without_waits() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(|cx, event| {
        if let Event::Data(..) = event {
            std::thread::sleep(SLOW);
        }
        echo(cx, event);
    });
    let address = world.listen();
    let (mut peer, _) = world.pair(address);
    world.run_for(2 * SLOW);
    let before = world.cx().stats();
    assert!(before.busy < SLOW, "the wait is counted: {before:?}");
    common::echo_once(&mut world, &mut peer, b"slow");
    let after = world.cx().stats();
    assert!(after.turn_longest >= SLOW && after.busy >= before.busy + SLOW, "{after:?}");
}

/// Longer than any other callback takes, even on a busy machine.
const VERY_SLOW: Duration = Duration::from_secs(1);

#[test]
fn the_longest_callback_is_named_if_callbacks_are_timed() {
    let _descriptors = Descriptors::counted();
    for times_callbacks in [false, true] {
        let mut world = World::with(Config { times_callbacks, ..Config::default() });
        let address = world.listen();
        world.script(|cx, event| match event {
            Event::Eof(token) => cx.abort(*token),
            Event::Close(..) => std::thread::sleep(VERY_SLOW),
            _ => {}
        });
        let (peer, token) = world.pair(address);
        let before = world.cx().stats().callback_longest;
        assert_eq!(before.is_some(), times_callbacks, "{before:?}");
        drop(peer);
        assert_eq!(world.until_closed(token), Why::Aborted);
        let stats = world.cx().stats();
        assert!(stats.turn_longest >= VERY_SLOW);
        let Some(longest) = stats.callback_longest else {
            assert!(!times_callbacks);
            continue;
        };
        assert_eq!((longest.callback, longest.callback.name()), (Callback::Close, "on_close"));
        assert!(longest.time >= VERY_SLOW && longest.time <= stats.turn_longest, "{stats:?}");
        world.cx().reset_lag();
        let stats = world.cx().stats();
        assert_eq!((stats.turn_longest, stats.callback_longest), (Duration::ZERO, None));
    }
}
