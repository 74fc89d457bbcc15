//! Descriptors that are no connections.

#![expect(clippy::unwrap_used, reason = "the panic of a test is its report")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeWriter, Read, Write, pipe};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use reactor::{
    Config, Context, Error, Handler, Incoming, Interest, Reactor, Readiness, Token, WatchId,
};

const DEADLINE: Duration = Duration::from_secs(10);

/// Notes what it is told of each watch, and reads nothing unless asked to.
#[derive(Default)]
struct Notes {
    seen: HashMap<WatchId, Vec<Readiness>>,
    read: Vec<u8>,
    reads: bool,
    unwatch_also: Option<WatchId>,
    uses_default: bool,
}

impl Notes {
    fn times(&self, watch: WatchId) -> usize {
        self.seen.get(&watch).map_or(0, Vec::len)
    }
}

impl Handler for Notes {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        None
    }

    fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &[u8]) {}

    fn on_ready(&mut self, cx: &mut Context<()>, watch: WatchId, readiness: Readiness) {
        self.seen.entry(watch).or_default().push(readiness);
        if self.uses_default {
            cx.unwatch(watch);
        }
        if self.reads {
            let mut file = File::from(cx.watched(watch).unwrap().try_clone_to_owned().unwrap());
            let mut buffer = [0; 64];
            let count = file.read(&mut buffer).unwrap();
            self.read.extend_from_slice(&buffer[..count]);
        }
        if let Some(other) = self.unwatch_also.take() {
            cx.unwatch(other);
        }
    }
}

fn reactor() -> Reactor<()> {
    let config = Config { connections_max: 8, watches_max: 2, ..Config::default() };
    Reactor::new(&config).unwrap()
}

/// Turns until `done`, within the deadline.
fn turn_until(reactor: &mut Reactor<()>, notes: &mut Notes, mut done: impl FnMut(&Notes) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done(notes) {
        assert!(Instant::now() < deadline, "it did not happen in time");
        let _ = reactor.turn(notes, Some(Duration::from_millis(10))).unwrap();
    }
}

/// One turn that waits for nothing.
fn glance(reactor: &mut Reactor<()>, notes: &mut Notes) {
    let _ = reactor.turn(notes, Some(Duration::ZERO)).unwrap();
}

fn watched_pipe(reactor: &mut Reactor<()>) -> (WatchId, PipeWriter) {
    let (reader, writer) = pipe().unwrap();
    (reactor.context().watch(reader, Interest::Readable).unwrap(), writer)
}

#[test]
fn a_pipe_is_reported_until_it_is_read() {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (watch, mut writer) = watched_pipe(&mut reactor);
    glance(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0, "an empty pipe is not ready");

    writer.write_all(b"hello").unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    notes.reads = true;
    turn_until(&mut reactor, &mut notes, |notes| notes.read == b"hello");
    let times = notes.times(watch);
    glance(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), times, "a pipe that was read is not ready");

    drop(writer);
    notes.reads = false;
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) > times);
    assert!(notes.seen[&watch].last().unwrap().is_hangup());
}

#[test]
fn interest_decides_what_is_reported() {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    let watch = reactor.context().watch(socket.try_clone().unwrap(), Interest::Readable).unwrap();
    glance(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0);

    reactor.context().set_interest(watch, Interest::Writable).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 1);
    assert!(notes.seen[&watch][0].is_writable() && !notes.seen[&watch][0].is_readable());

    socket.send_to(b"x", address).unwrap();
    reactor.context().set_interest(watch, Interest::Both).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| {
        notes.seen[&watch].last().is_some_and(|last| last.is_readable() && last.is_writable())
    });

    reactor.context().set_interest(watch, Interest::Nothing).unwrap();
    let times = notes.times(watch);
    glance(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), times);
}

#[test]
fn no_interest_means_no_hang_up_either() {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (watch, writer) = watched_pipe(&mut reactor);
    reactor.context().set_interest(watch, Interest::Nothing).unwrap();
    drop(writer);
    glance(&mut reactor, &mut notes);
    assert_eq!(reactor.context().stats().events, 0, "the kernel was not even asked");

    reactor.context().set_interest(watch, Interest::Readable).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 1);
}

#[test]
fn a_duplicate_does_not_keep_a_watch_alive() {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (reader, mut writer) = pipe().unwrap();
    let duplicate = reader.try_clone().unwrap();
    let watch = reactor.context().watch(reader, Interest::Readable).unwrap();
    let given_back = reactor.context().unwatch(watch).unwrap();
    drop(given_back);
    writer.write_all(b"x").unwrap();
    glance(&mut reactor, &mut notes);
    assert_eq!(reactor.context().stats().events, 0, "epoll still knows the open file");
    drop(duplicate);
}

#[test]
fn what_is_given_back_is_the_open_file_itself() {
    let mut reactor = reactor();
    let (watch, mut writer) = watched_pipe(&mut reactor);
    writer.write_all(b"still here").unwrap();
    drop(writer);
    let mut file = File::from(reactor.context().unwatch(watch).unwrap());
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
}

#[test]
fn a_watch_that_a_callback_ends_is_not_heard_of_again_in_the_same_turn() {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (one, mut one_writer) = watched_pipe(&mut reactor);
    let (two, mut two_writer) = watched_pipe(&mut reactor);
    one_writer.write_all(b"x").unwrap();
    two_writer.write_all(b"x").unwrap();

    // Both are ready in the same turn; whichever comes first ends the second one.
    notes.unwatch_also = Some(two);
    turn_until(&mut reactor, &mut notes, |notes| notes.times(one) > 0);
    let heard = notes.times(two) as u64;
    assert_eq!(reactor.context().stats().stale_events, 1 - heard);
    glance(&mut reactor, &mut notes);
    assert_eq!(notes.times(two) as u64, heard);
    assert!(reactor.context().watched(two).is_none());
}

#[test]
fn a_stale_watch_is_refused_and_its_slot_serves_the_next() {
    let mut reactor = reactor();
    let (first, _writer) = watched_pipe(&mut reactor);
    reactor.context().unwatch(first).unwrap();
    let (second, _writer) = watched_pipe(&mut reactor);
    assert_ne!(first, second);
    assert!(reactor.context().unwatch(first).is_none());
    assert!(matches!(reactor.context().set_interest(first, Interest::Both), Err(Error::Stale)));
    assert!(reactor.context().watched(second).is_some());
}

#[test]
fn the_bound_holds_and_a_plain_file_is_refused() {
    let mut reactor = reactor();
    let _two = [watched_pipe(&mut reactor), watched_pipe(&mut reactor)];
    let (reader, _writer) = pipe().unwrap();
    let refused = reactor.context().watch(reader, Interest::Readable).unwrap_err();
    assert!(matches!(refused, Error::Full { limit: 2, .. }), "{refused}");

    reactor.context().unwatch(_two[0].0).unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    let refused = reactor.context().watch(file, Interest::Readable).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied, "{refused}");
    let (reader, _writer) = pipe().unwrap();
    reactor.context().watch(reader, Interest::Readable).expect("the refused one left no slot");
}

#[test]
fn a_service_that_minds_no_watch_does_not_spin() {
    struct Indifferent;
    impl Handler for Indifferent {
        type Conn = ();
        fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
            None
        }
        fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &[u8]) {}
    }
    let mut reactor = reactor();
    let (watch, mut writer) = watched_pipe(&mut reactor);
    writer.write_all(b"x").unwrap();
    let _ = reactor.turn(&mut Indifferent, Some(DEADLINE)).unwrap();
    assert!(reactor.context().watched(watch).is_none());
    assert_eq!(reactor.context().stats().events, 1);
}

#[test]
fn a_watched_descriptor_is_used_through_the_context() {
    let mut reactor = reactor();
    let (watch, _writer) = watched_pipe(&mut reactor);
    assert!(reactor.context().watched(watch).unwrap().as_fd().try_clone_to_owned().is_ok());
}
