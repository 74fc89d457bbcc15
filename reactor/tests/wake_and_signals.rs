//! Wake-ups from other threads are coalesced and never lost; signals arrive as callbacks.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal as Raised, raise};
use reactor::{Error, Signal};

use common::descriptors::Descriptors;
use common::{DEADLINE, Event, World};

#[test]
fn a_wake_ends_the_wait() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let waker = world.cx().waker();
    let thread = std::thread::spawn(move || waker.wake());
    let before = Instant::now();
    let _ = world.turn(DEADLINE * 10);
    assert!(before.elapsed() < DEADLINE);
    assert_eq!(world.service.log, [Event::Wake]);
    thread.join().unwrap();
}

#[test]
fn many_wakes_before_a_turn_make_one_call() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let waker = world.cx().waker();
    for _ in 0..1000 {
        waker.wake();
        world.cx().waker().wake();
    }
    let wakeups = world.run_for(Duration::from_millis(20));
    assert_eq!(world.service.log, [Event::Wake]);
    assert!(wakeups <= 2, "{wakeups} wake-ups");
}

#[test]
fn a_wake_within_on_wake_makes_another_call() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let waker = world.cx().waker();
    let mut left = 3;
    waker.wake();
    world.script(move |_, _| {
        left -= 1;
        if left > 0 {
            waker.wake();
        }
    });
    world.until("three calls", |world| world.service.log.len() == 3);
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.log.len(), 3);
}

#[test]
fn no_wake_is_lost_under_load() {
    let _descriptors = Descriptors::counted();
    const THREADS: u64 = 4;
    const WAKES: u64 = 20_000;
    let mut world = World::new();
    let done = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (waker, done) = (world.cx().waker(), done.clone());
            std::thread::spawn(move || {
                for _ in 0..WAKES {
                    done.fetch_add(1, Ordering::Relaxed);
                    waker.wake();
                }
            })
        })
        .collect();
    // Work done before a wake must be visible to a later call. Only wakes end the waits here, so a lost wake is detected
    // by a wait that reaches its deadline with work undone.
    let seen = Arc::new(AtomicU64::new(0));
    let (counter, sum) = (seen.clone(), done.clone());
    world.script(move |_, _| counter.store(sum.load(Ordering::Relaxed), Ordering::Relaxed));
    while seen.load(Ordering::Relaxed) < THREADS * WAKES {
        let before = Instant::now();
        let _ = world.turn(DEADLINE);
        assert!(before.elapsed() < DEADLINE, "a wake was lost");
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(world.service.log.len() as u64 <= THREADS * WAKES);
}

#[test]
fn each_wake_of_a_ping_pong_is_delivered() {
    let _descriptors = Descriptors::counted();
    // The other thread wakes only after it has seen the call, so no wake can be coalesced with another.
    let mut world = World::new();
    let (waker, calls) = (world.cx().waker(), Arc::new(AtomicU64::new(0)));
    let seen = calls.clone();
    let thread = std::thread::spawn(move || {
        for round in 0..5_000 {
            waker.wake();
            let end = Instant::now() + DEADLINE;
            while seen.load(Ordering::Acquire) == round {
                assert!(Instant::now() < end);
                std::thread::yield_now();
            }
        }
    });
    let counter = calls.clone();
    world.script(move |_, _| {
        counter.fetch_add(1, Ordering::Release);
    });
    while calls.load(Ordering::Acquire) < 5_000 {
        let before = Instant::now();
        let _ = world.turn(DEADLINE);
        assert!(before.elapsed() < DEADLINE, "a wake was lost");
    }
    thread.join().unwrap();
}

#[test]
fn a_waker_outlives_its_reactor() {
    let _descriptors = Descriptors::counted();
    let waker = World::new().cx().waker();
    waker.wake();
    waker.clone().wake();
}

#[test]
fn signals_arrive_as_callbacks() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.cx().watch_signals(&[Signal::User1, Signal::User2]).unwrap();
    raise(Raised::SIGUSR1).unwrap();
    world.until("the signal", |world| world.service.saw(&Event::Signal(Signal::User1)));
    raise(Raised::SIGUSR2).unwrap();
    world.until("the other", |world| world.service.saw(&Event::Signal(Signal::User2)));
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.log.len(), 2);
}

#[test]
fn signals_that_are_ignored_by_default_arrive_too() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.cx().watch_signals(&[Signal::Child, Signal::WindowChange]).unwrap();
    raise(Raised::SIGWINCH).unwrap();
    world.until("the window", |world| world.service.saw(&Event::Signal(Signal::WindowChange)));
    raise(Raised::SIGCHLD).unwrap();
    world.until("the child", |world| world.service.saw(&Event::Signal(Signal::Child)));
}

#[test]
fn signals_that_arrive_together_are_all_delivered() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.cx().watch_signals(&[Signal::User1, Signal::User2, Signal::Hangup]).unwrap();
    for signal in [Raised::SIGUSR1, Raised::SIGUSR2, Raised::SIGHUP, Raised::SIGUSR1] {
        raise(signal).unwrap();
    }
    let _ = world.turn(DEADLINE);
    // The kernel keeps one pending signal of each kind.
    assert_eq!(world.service.log.len(), 3);
}

#[test]
fn signals_are_watched_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.cx().watch_signals(&[Signal::User1]).unwrap();
    let again = world.cx().watch_signals(&[Signal::User2]);
    assert!(matches!(again, Err(Error::Invalid(_))));
}

#[test]
fn the_default_for_a_signal_is_a_shutdown() {
    let _descriptors = Descriptors::counted();
    struct Plain;
    impl reactor::Handler for Plain {
        type Conn = ();
        fn on_accept(
            &mut self,
            _: &mut reactor::Context<()>,
            _: &reactor::Incoming<'_>,
        ) -> Option<()> {
            Some(())
        }
        fn on_data(
            &mut self,
            _: &mut reactor::Context<()>,
            _: reactor::Token,
            _: &mut (),
            _: &mut [u8],
        ) {
        }
    }
    let mut reactor = reactor::Reactor::new(&reactor::Config::default()).unwrap();
    let cx = reactor.context();
    cx.watch_signals(&[Signal::Terminate]).unwrap();
    let listener = cx.listen(common::LOOPBACK, &Default::default()).unwrap();
    let mut peer = common::peer(cx.listener_addr(listener).unwrap());
    while reactor.context().connections() == 0 {
        let _ = reactor.turn(&mut Plain, Some(DEADLINE)).unwrap();
    }
    raise(Raised::SIGTERM).unwrap();
    let before = Instant::now();
    reactor.run(&mut Plain).unwrap();
    assert!(before.elapsed() < DEADLINE);
    assert_eq!(common::read_to_end(&mut peer), (Vec::new(), false));
}
