//! Slots and descriptors run out: the reactor neither spins nor exits, keeps its listeners, and uses room at once.
//!
//! The descriptors really run out: the server is this test binary as a child process, with a lowered limit.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc::EMFILE;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::chroot;
use reactor::{Config, FileTable};

use common::child::Child;
use common::descriptors::Descriptors;
use common::{DEADLINE, Event, World, echo, echo_once, peer};

#[test]
fn using_all_slots_is_not_exhaustion() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 10, ..Default::default() });
    let address = world.listen();
    let _peers: Vec<_> = (0..10).map(|_| peer(address)).collect();
    world.until("all of them", |world| world.service.opened().len() == 10);
    let wakeups = world.run_for(Duration::from_millis(100));
    assert!(wakeups <= 2, "{wakeups} wake-ups while no peer waits");
    assert_eq!(world.cx().stats().accept_pauses, 0);
    assert_eq!(world.service.count(|event| matches!(event, Event::AcceptError(..))), 0);
}

#[test]
fn peers_wait_for_a_slot_and_get_it_as_soon_as_one_is_free() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 10, ..Default::default() });
    world.script(echo);
    let (listener, address) = world.listener();
    let mut peers: Vec<_> = (0..25).map(|_| peer(address)).collect();
    world.until("ten of them", |world| world.service.opened().len() == 10);
    world.until("the pause", |world| world.cx().stats().accept_pauses > 0);
    let error = "connections is at its bound of 10".to_owned();
    assert!(world.service.saw(&Event::AcceptError(listener, error)));
    // The pauses double from 10 ms, so there are at most seven in the first second.
    let wakeups = world.run_for(Duration::from_secs(1));
    assert!(wakeups <= 25, "{wakeups} wake-ups in a second of being full");
    assert_eq!(world.cx().connections(), 10);
    assert_eq!(world.cx().stats().dropped, 0, "waiting peers were dropped");

    while !peers.is_empty() {
        let held = world.cx().connections();
        let expected = world.service.opened().len() + usize::from(peers.len() > held);
        let freed = Instant::now();
        drop(peers.remove(0));
        world.until("the next waiting peer", |world| world.service.opened().len() >= expected);
        assert!(
            freed.elapsed() < Duration::from_secs(1),
            "the slot was not used until the end of the pause"
        );
        if let Some(first) = peers.first_mut() {
            echo_once(&mut world, first, b"my turn");
        }
    }
    world.until("all ends", |world| world.cx().connections() == 0);
    assert_eq!(world.service.opened().len(), 25);
}

#[test]
fn a_slot_freed_between_turns_is_used_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 1, ..Default::default() });
    let address = world.listen();
    let (_first, token) = world.pair(address);
    let _second = peer(address);
    world.until("the pause", |world| world.cx().stats().accept_pauses > 0);
    // Let the pause grow to a second.
    world.run_for(Duration::from_millis(1400));
    let freed = Instant::now();
    world.cx().abort(token);
    // A turn with a long wait must watch the listener before it waits.
    while world.service.opened().len() < 2 {
        let _ = world.turn(DEADLINE);
        assert!(freed.elapsed() < DEADLINE);
    }
    assert!(freed.elapsed() < Duration::from_millis(500), "it took {:?}", freed.elapsed());
}

#[test]
fn every_throttled_listener_is_resumed() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 3, ..Default::default() });
    let addresses: Vec<_> = (0..3).map(|_| world.listen()).collect();
    let _peers: Vec<_> =
        addresses.iter().flat_map(|&address| [peer(address), peer(address)]).collect();
    world.until("three of them", |world| world.service.opened().len() == 3);
    world.until("three pauses", |world| world.cx().stats().accept_pauses >= 3);
    for token in world.service.opened() {
        world.cx().abort(token);
    }
    world.until("the other three", |world| world.service.opened().len() == 6);
}

#[test]
fn a_paused_or_removed_listener_stays_so_when_slots_are_freed() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 1, ..Default::default() });
    let (paused, paused_address) = world.listener();
    let (forgotten, forgotten_address) = world.listener();
    let (_first, token) = world.pair(paused_address);
    let _waiting = [peer(paused_address), peer(forgotten_address)];
    world.until("both are throttled", |world| world.cx().stats().accept_pauses >= 2);
    world.cx().pause_accepts(paused).unwrap();
    world.cx().unlisten(forgotten);
    world.cx().abort(token);
    world.until_closed(token);
    world.run_for(Duration::from_millis(50));
    assert_eq!(world.service.opened().len(), 1);
    world.cx().resume_accepts(paused).unwrap();
    world.until("the waiting peer", |world| world.service.opened().len() == 2);
    assert_eq!(world.cx().stats().timers_armed, 0);
}

/// The number of listeners of the server.
const LISTENERS: usize = 100;

/// Twice the longest pause: after it, the shorter pauses are over, and there is one pause per second.
const PAUSES_GROWN: Duration = Duration::from_secs(2);

#[test]
fn a_hundred_throttled_listeners_share_one_pause() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 1, ..Default::default() });
    let addresses: Vec<_> = (0..LISTENERS).map(|_| world.listen()).collect();
    let (_first, token) = world.pair(addresses[0]);
    let _waiting: Vec<_> = addresses.iter().map(|&address| peer(address)).collect();
    let all = LISTENERS as u64;
    world.until("all are throttled", |world| world.cx().stats().accept_pauses >= all);
    assert_eq!(world.cx().stats().timers_armed, 1);
    world.run_for(PAUSES_GROWN);
    let pauses = world.cx().stats().accept_pauses;
    let wakeups = world.run_for(FULL);
    // The end of a pause is one wake-up, and the events of all listeners without a slot are another.
    assert!((2..=8).contains(&wakeups), "{wakeups} wake-ups in two seconds of being full");
    let tried = world.cx().stats().accept_pauses - pauses;
    assert!(tried >= all && tried <= 4 * all, "{tried} tries of {all} listeners");

    // Each peer that leaves makes room for the next one, at once.
    let freed = Instant::now();
    world.script(|cx, event| {
        if let Event::Open(token) = event {
            cx.abort(*token);
        }
    });
    world.cx().abort(token);
    world.until("all of them", |world| world.service.opened().len() == LISTENERS + 1);
    assert!(freed.elapsed() < Duration::from_secs(10), "it took {:?}", freed.elapsed());
    world.until("all ends", |world| world.cx().connections() == 0);
    assert_eq!(
        world.cx().stats().timers_armed,
        0,
        "a pause timer is armed without a throttled listener"
    );
}

#[test]
fn a_hundred_listeners_without_descriptors_wake_a_few_times_a_second() {
    let _descriptors = Descriptors::counted();
    const NAME: &str = "a_hundred_listeners_without_descriptors_wake_a_few_times_a_second";
    const DESCRIPTORS: u64 = LISTENERS as u64 + 64;
    if common::child::is_child() {
        return serve_on_demand(LISTENERS, DESCRIPTORS, FileTable::Process);
    }
    let mut child = Child::start(NAME, Some(DESCRIPTORS));
    let addresses = child.read("addresses");
    let addresses: Vec<SocketAddr> = addresses.split(',').map(|one| one.parse().unwrap()).collect();
    let room = child.ask("room") as usize;
    assert!((32..64).contains(&room), "{room} fit");
    let connect = |address| TcpStream::connect_timeout(address, DEADLINE).ok();
    let mut waiting: Vec<_> =
        addresses.iter().chain(&addresses).chain(&addresses).filter_map(connect).collect();
    for peer in &mut waiting {
        let _ = peer.write_all(b"hello");
        peer.set_nonblocking(true).unwrap();
    }
    let (mut held, mut lost) = (Vec::new(), 0);
    sort_out(&mut waiting, &mut held, &mut lost, |held, _| held >= room);

    let grown = Instant::now();
    sort_out(&mut waiting, &mut held, &mut lost, |_, _| grown.elapsed() > PAUSES_GROWN);
    let (wakeups, dropped) = (child.ask("wakeups"), child.ask("dropped"));
    let full = Instant::now();
    sort_out(&mut waiting, &mut held, &mut lost, |_, _| full.elapsed() > FULL);
    let (wakeups, dropped) = (child.ask("wakeups") - wakeups, child.ask("dropped") - dropped);
    // Two of the wake-ups are the test's queries.
    assert!((2..=10).contains(&wakeups), "{wakeups} wake-ups in two seconds of being full");
    assert!(dropped <= 4, "{dropped} peers were reset in two seconds, not one in each pause");
    assert!(waiting.len() >= LISTENERS, "{} still wait", waiting.len());
    assert_eq!(held.len(), room);

    // Peers that leave make room for all others eventually, whichever port they wait at.
    while !(held.is_empty() && waiting.is_empty()) {
        held.drain(..).for_each(common::reset);
        sort_out(&mut waiting, &mut held, &mut lost, |held, waiting| held > 0 || waiting == 0);
    }
    assert!(lost < LISTENERS, "{lost} of {} were reset", 3 * LISTENERS);
    child.end();
}

#[test]
fn registered_files_hold_far_more_connections_than_descriptors() {
    let _descriptors = Descriptors::counted();
    const NAME: &str = "registered_files_hold_far_more_connections_than_descriptors";
    const PEERS: usize = 5 * DESCRIPTORS as usize;
    if common::child::is_child() {
        return serve_on_demand(1, DESCRIPTORS, FileTable::Registered);
    }
    let mut child = Child::start(NAME, Some(DESCRIPTORS));
    let address: SocketAddr = child.read("addresses").parse().unwrap();
    let mut peers: Vec<_> = (0..PEERS).map(|_| common::peer(address)).collect();
    for round in 0..3_u8 {
        for peer in &mut peers {
            peer.write_all(&[round; 100]).unwrap();
        }
        for peer in &mut peers {
            let mut echoed = [0; 100];
            peer.read_exact(&mut echoed).unwrap();
            assert_eq!(echoed, [round; 100]);
        }
    }
    assert_eq!(child.ask("open") as usize, PEERS);
    assert_eq!((child.ask("emfile"), child.ask("dropped")), (0, 0));

    // Peers that leave make room for others.
    peers.drain(..PEERS / 2).for_each(common::reset);
    let mut others: Vec<_> = (0..PEERS / 2).map(|_| common::peer(address)).collect();
    for peer in others.iter_mut().chain(&mut peers) {
        peer.write_all(b"again").unwrap();
        let mut echoed = [0; 5];
        peer.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, b"again");
    }
    child.end();
}

const DESCRIPTORS: u64 = 64;

/// The time during which the wake-ups of a full server are counted.
const FULL: Duration = Duration::from_secs(2);

#[test]
fn without_descriptors_the_reactor_keeps_its_connections_and_accepts_when_some_close() {
    let _descriptors = Descriptors::counted();
    const NAME: &str =
        "without_descriptors_the_reactor_keeps_its_connections_and_accepts_when_some_close";
    if common::child::is_child() {
        return serve_on_demand(1, DESCRIPTORS, FileTable::Process);
    }
    let mut child = Child::start(NAME, Some(DESCRIPTORS));
    let address: SocketAddr = child.read("addresses").parse().unwrap();

    // More clients than fit. Each sends a greeting, and those that receive an echo are held. A few are reset.
    let connect = |_| TcpStream::connect_timeout(&address, DEADLINE).ok();
    let mut waiting: Vec<_> = (0..DESCRIPTORS * 2).filter_map(connect).collect();
    for peer in &mut waiting {
        let _ = peer.write_all(b"hello");
        peer.set_nonblocking(true).unwrap();
    }
    let mut held = Vec::new();
    let expected = child.ask("room") as usize;
    assert!(expected > DESCRIPTORS as usize - 16, "{expected} fit");
    let mut lost = 0;
    sort_out(&mut waiting, &mut held, &mut lost, |held, _| held >= expected);
    assert_eq!(held.len(), expected, "one connection per descriptor");

    // The full server does not spin, and serves its connections.
    let before = child.ask("wakeups");
    let full = Instant::now();
    sort_out(&mut waiting, &mut held, &mut lost, |_, _| full.elapsed() > FULL);
    let wakeups = child.ask("wakeups") - before;
    assert!(wakeups <= 20, "{wakeups} wake-ups in two seconds of being full");
    assert!(child.ask("accept_pauses") > 0);
    assert!(child.ask("emfile") > 0);
    for peer in &mut held {
        greet(peer);
    }

    // Ten leave, and ten waiting peers are accepted, each within a pause.
    assert!(waiting.len() > 20, "{} still wait", waiting.len());
    let lost_before = lost;
    for peer in held.drain(..10) {
        common::reset(peer);
    }
    let left = Instant::now();
    sort_out(&mut waiting, &mut held, &mut lost, |held, _| held >= expected);
    assert!(left.elapsed() < Duration::from_secs(2), "it took {:?}", left.elapsed());
    assert!(lost - lost_before <= 10, "{} were reset while ten got in", lost - lost_before);

    // All leave, and the listener still accepts.
    held.into_iter().chain(waiting).for_each(common::reset);
    let end = Instant::now() + DEADLINE;
    while child.ask("open") > 0 {
        assert!(Instant::now() < end);
    }
    greet(&mut peer(address));
    let kernel = child.ask("accepted") + child.ask("dropped") + child.ask("refused");
    assert!(child.ask("accepted") >= expected as u64 + 11 && kernel >= child.ask("accepted"));
    child.end();
}

/// Moves peers that were greeted from `waiting` to `held`, and drops those that were reset, until `done`.
fn sort_out(
    waiting: &mut Vec<TcpStream>,
    held: &mut Vec<TcpStream>,
    lost: &mut usize,
    done: impl Fn(usize, usize) -> bool,
) {
    let end = Instant::now() + DEADLINE;
    loop {
        let mut answer = [0; 5];
        let mut still = Vec::new();
        for mut peer in waiting.drain(..) {
            match peer.read(&mut answer) {
                Ok(5) => {
                    peer.set_nonblocking(false).unwrap();
                    peer.set_read_timeout(Some(DEADLINE)).unwrap();
                    held.push(peer);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => still.push(peer),
                _ => *lost += 1,
            }
        }
        *waiting = still;
        if done(held.len(), waiting.len()) {
            return;
        }
        assert!(Instant::now() < end, "{} held, {} wait, {lost} lost", held.len(), waiting.len());
        // There is no event of the other process to wait for, so this polls; the deadline above ends it.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn greet(peer: &mut TcpStream) {
    peer.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

/// The child: an echo server that answers queries on its standard streams.
fn serve_on_demand(listeners: usize, descriptors: u64, file_table: FileTable) {
    let mut world = World::with(Config { file_table, ..Config::default() });
    world.script(echo);
    let addresses: Vec<_> = (0..listeners).map(|_| world.listen().to_string()).collect();
    let room = room(descriptors);
    let questions = common::child::Questions::start(world.cx().waker());
    questions.answer("addresses", addresses.join(","));
    loop {
        let _ = world.turn(DEADLINE);
        let stats = world.cx().stats();
        while let Some(question) = questions.next() {
            let answer = match question.as_str() {
                "room" => room,
                "wakeups" => stats.wakeups,
                "accept_pauses" => stats.accept_pauses,
                "emfile" => stats.accept_errors.get(&EMFILE).copied().unwrap_or(0),
                "open" => stats.open(),
                "accepted" => stats.accepted,
                "dropped" => stats.dropped,
                "refused" => stats.refused,
                "end" => return,
                _ => 0,
            };
            questions.answer(&question, answer);
        }
    }
}

/// The number of free descriptors below the limit. Inherited descriptors above it do not count.
fn room(descriptors: u64) -> u64 {
    let listing = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = listing.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse::<u64>());
    let open = numbers.filter(|number| *number.as_ref().unwrap() < descriptors).count() as u64;
    // The directory being listed was one of them.
    descriptors - (open - 1)
}

#[test]
fn a_reactor_opens_no_file_of_the_file_system() {
    let _descriptors = Descriptors::counted();
    let served = std::thread::spawn(|| {
        // The root directory of this thread alone is an empty folder.
        let root = tempfile::tempdir().unwrap();
        unshare(CloneFlags::CLONE_FS)?;
        chroot(root.path())?;
        assert!(!Path::new("/dev").exists());
        let mut world = World::new();
        world.script(echo);
        let address = world.listen();
        let (mut peer, _) = world.pair(address);
        echo_once(&mut world, &mut peer, b"from nowhere");
        nix::Result::Ok(root)
    });
    match served.join().unwrap() {
        Ok(root) => drop(root),
        Err(errno) => {
            // Written directly, because the test harness captures `eprintln!`.
            let why = format!("a root of its own takes privilege: {errno}");
            writeln!(std::io::stderr(), "the test without files is skipped: {why}").unwrap();
        }
    }
}
