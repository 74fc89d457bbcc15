//! Timers and the timeouts of connections: not early, each once, in order.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;
use std::time::{Duration, Instant};

use reactor::{Config, Error, TimerId};

use common::descriptors::Descriptors;
use common::{DEADLINE, Event, Why, World, echo, echo_once};

const MS: fn(u64) -> Duration = Duration::from_millis;

#[test]
fn timers_fire_in_the_order_of_their_deadlines_and_never_early() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let fired = Rc::new(RefCell::new(Vec::new()));
    let seen = fired.clone();
    world.script(move |_, event| {
        if let Event::Timer(timer) = *event {
            seen.borrow_mut().push((timer, Instant::now()));
        }
    });
    let mut expected: Vec<(Duration, TimerId, Instant)> = Vec::new();
    for after in [70, 5, 200, 64, 63, 0, 128, 1, 100, 65] {
        let set = Instant::now();
        let timer = world.cx().add_timer(MS(after)).unwrap();
        expected.push((MS(after), timer, set));
    }
    world.until("all timers", |_| fired.borrow().len() == expected.len());
    expected.sort_by_key(|&(after, ..)| after);
    let fired = fired.borrow();
    let order: Vec<_> = fired.iter().map(|&(timer, _)| timer).collect();
    assert_eq!(order, expected.iter().map(|&(_, timer, _)| timer).collect::<Vec<_>>());
    for (&(_, at), &(after, timer, set)) in fired.iter().zip(&expected) {
        assert!(at - set >= after, "{timer:?} fired after {:?} of {after:?}", at - set);
    }
}

#[test]
fn timers_that_are_late_fire_in_order_too() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let spans = [90, 80, 10, 85, 70, 66];
    let mut expected: Vec<_> =
        spans.map(|after| (after, world.cx().add_timer(MS(after)).unwrap())).to_vec();
    expected.sort_unstable();
    // The loop is busy until all of them are due, as in a slow callback.
    let end = Instant::now() + MS(100);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    let _ = world.turn(Duration::ZERO);
    let expected: Vec<_> = expected.into_iter().map(|(_, timer)| Event::Timer(timer)).collect();
    assert_eq!(world.service.log, expected);
}

#[test]
fn a_timer_set_between_turns_starts_when_it_is_set() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let before = Instant::now();
    while before.elapsed() < MS(60) {
        std::hint::spin_loop();
    }
    let set = Instant::now();
    let timer = world.cx().add_timer(MS(50)).unwrap();
    world.until("the timer", |world| world.service.saw(&Event::Timer(timer)));
    assert!(set.elapsed() >= MS(50));
}

#[test]
fn a_cancelled_timer_does_not_fire_and_its_id_is_stale() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let cancelled = world.cx().add_timer(MS(1)).unwrap();
    assert!(world.cx().cancel_timer(cancelled));
    assert!(!world.cx().cancel_timer(cancelled));
    // Its slot is reused, and the old id does not match the new timer.
    let timer = world.cx().add_timer(MS(5)).unwrap();
    assert_ne!(timer, cancelled);
    assert!(!world.cx().cancel_timer(cancelled));
    assert_eq!(world.cx().stats().timers_armed, 1);
    world.until("the timer", |world| !world.service.log.is_empty());
    assert_eq!(world.service.log, [Event::Timer(timer)]);
    assert!(!world.cx().cancel_timer(timer), "a fired timer can be cancelled");
    assert_eq!(world.cx().stats().timers_armed, 0);
}

#[test]
fn a_timer_can_cancel_another_and_set_itself_again() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let victim = world.cx().add_timer(MS(2)).unwrap();
    let mut left = 5;
    world.script(move |cx, event| {
        if let Event::Timer(timer) = *event {
            assert!(!cx.cancel_timer(timer), "its id is not stale in its own callback");
            cx.cancel_timer(victim);
            left -= 1;
            if left > 0 {
                cx.add_timer(MS(1)).unwrap();
            }
        }
    });
    // Both are due in the same turn; the first cancels the second.
    world.cx().add_timer(MS(1)).unwrap();
    let end = Instant::now() + MS(4);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    world.until("five of them", |world| world.service.log.len() == 5);
    assert!(!world.service.saw(&Event::Timer(victim)));
    assert_eq!(world.cx().stats().timers_armed, 0);
}

#[test]
fn timers_have_a_bound() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { timers_max: 2, ..Default::default() });
    let first = world.cx().add_timer(DEADLINE).unwrap();
    world.cx().add_timer(DEADLINE).unwrap();
    let error = world.cx().add_timer(DEADLINE).unwrap_err();
    assert!(matches!(error, Error::Full { what: "timers", limit: 2 }), "{error}");
    assert!(world.cx().cancel_timer(first));
    world.cx().add_timer(DEADLINE).unwrap();
}

#[test]
fn many_timers_at_once_are_spread_over_turns_and_none_is_lost() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { timers_per_turn: 10, ..Default::default() });
    for _ in 0..95 {
        world.cx().add_timer(Duration::ZERO).unwrap();
    }
    let end = Instant::now() + MS(2);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    let _ = world.turn(Duration::ZERO);
    assert!(world.service.log.len() <= 10);
    world.until("all of them", |world| world.service.log.len() == 95);
}

#[test]
fn a_far_deadline_costs_few_wake_ups() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.cx().add_timer(Duration::MAX).unwrap();
    world.cx().add_timer(Duration::from_secs(3600)).unwrap();
    let wakeups = world.run_for(MS(200));
    assert!(wakeups <= 5, "{wakeups} wake-ups");
    assert_eq!(world.service.log, []);
}

#[test]
fn a_timeout_fires_once_and_does_not_close_by_itself() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let set = Instant::now();
    world.cx().set_timeout(token, MS(30));
    world.until("the timeout", |world| world.service.saw(&Event::Timeout(token)));
    assert!(set.elapsed() >= MS(30));
    world.run_for(MS(50));
    assert_eq!(world.service.count(|event| matches!(event, Event::Timeout(_))), 1);
    assert!(world.cx().holds(token));
    // It can be set again.
    world.cx().set_timeout(token, MS(1));
    world.until("another", |world| {
        world.service.count(|event| matches!(event, Event::Timeout(_))) == 2
    });
}

#[test]
fn a_timeout_can_be_moved_both_ways_and_cleared() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().set_timeout(token, DEADLINE * 10);
    world.cx().set_timeout(token, MS(1));
    world.until("the earlier timeout", |world| world.service.saw(&Event::Timeout(token)));
    world.cx().set_timeout(token, MS(1));
    world.cx().set_timeout(token, DEADLINE * 10);
    world.run_for(MS(30));
    assert_eq!(world.cx().stats().timers_armed, 1);
    world.cx().set_timeout(token, MS(1));
    world.cx().clear_timeout(token);
    world.cx().clear_timeout(token);
    world.run_for(MS(30));
    assert_eq!(world.service.count(|event| matches!(event, Event::Timeout(_))), 1);
    assert_eq!(world.cx().stats().timers_armed, 0);
}

#[test]
fn a_removed_connection_has_no_timeout() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().set_timeout(token, MS(20));
    world.cx().abort(token);
    world.until_closed(token);
    assert_eq!(world.cx().stats().timers_armed, 0);
    // The next connection in its slot does not inherit the timeout.
    let (_next_peer, next) = world.pair(address);
    assert_eq!(next.index(), token.index());
    world.run_for(MS(50));
    assert_eq!(world.service.count(|event| matches!(event, Event::Timeout(_))), 0);
}

#[test]
fn an_idle_timeout_closes_only_idle_connections() {
    let _descriptors = Descriptors::counted();
    const IDLE: Duration = Duration::from_secs(1);
    let mut world = World::new();
    world.script(|cx, event| match *event {
        Event::Open(token) => cx.set_timeout(token, IDLE),
        Event::Data(token, _) => {
            cx.set_timeout(token, IDLE);
            echo(cx, event);
        }
        Event::Timeout(token) => cx.close(token),
        _ => {}
    });
    let address = world.listen();
    let (mut busy, busy_token) = world.pair(address);
    let (_silent, silent_token) = world.pair(address);
    let opened = Instant::now();
    let mut last_echo = Instant::now();
    while world.service.why(silent_token).is_none() {
        echo_once(&mut world, &mut busy, b"alive");
        // If this loop is stalled for longer than the timeout, the test is inconclusive.
        assert!(last_echo.elapsed() < IDLE, "this machine is too slow for this test");
        last_echo = Instant::now();
        assert!(opened.elapsed() < DEADLINE);
    }
    assert_eq!(world.service.why(silent_token), Some(Why::Closed));
    assert!(world.cx().holds(busy_token));
    busy.write_all(b"and out").unwrap();
    world.until("the timeout of the other peer", |world| world.service.why(busy_token).is_some());
    assert!(last_echo.elapsed() >= IDLE);
}

#[test]
fn tagged_timeouts_are_independent_of_the_timeout_and_end_with_the_connection() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let set = Instant::now();
    world.cx().set_timeout(token, MS(20));
    for (tag, after) in [(1, 10), (u64::MAX, 30), (0, 40), (7, 50), (8, 60)] {
        world.cx().set_tagged_timeout(token, tag, MS(after)).unwrap();
    }
    world.cx().set_tagged_timeout(token, 0, MS(35)).unwrap();
    assert!(world.cx().clear_tagged_timeout(token, 7));
    assert!(!world.cx().clear_tagged_timeout(token, 7));
    world.script(|cx, event| {
        if let Event::TaggedTimeout(token, 0) = event {
            cx.close(*token);
        }
    });
    assert_eq!(world.until_closed(token), Why::Closed);
    assert!(set.elapsed() >= MS(35), "the timeout fired after {:?}", set.elapsed());
    world.run_for(MS(40));
    let expected = [
        Event::Open(token),
        Event::TaggedTimeout(token, 1),
        Event::Timeout(token),
        Event::TaggedTimeout(token, u64::MAX),
        Event::TaggedTimeout(token, 0),
        Event::Close(token, Why::Closed),
    ];
    assert_eq!(world.service.log, expected);
    assert_eq!(world.cx().stats().timers_armed, 0);
}
