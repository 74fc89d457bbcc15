//! Watched descriptors.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, PipeWriter, Read, Write, pipe};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use reactor::{
    Config, Context, Error, Handler, Incoming, Interest, Reactor, Readiness, Token, WatchId,
};
use socket2::{Domain, Socket, Type};
use tappers::{AddAddressV4, Tun};

use common::descriptors::Descriptors;

const DEADLINE: Duration = Duration::from_secs(10);

/// Records the readiness of each watch, and reads only if `reads` is set.
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

    fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &mut [u8]) {}

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
        assert!(Instant::now() < deadline, "the condition did not become true in time");
        let _ = reactor.turn(notes, Some(Duration::from_millis(10))).unwrap();
    }
}

/// Makes one turn without waiting.
fn turn_without_wait(reactor: &mut Reactor<()>, notes: &mut Notes) {
    let _ = reactor.turn(notes, Some(Duration::ZERO)).unwrap();
}

fn watched_pipe(reactor: &mut Reactor<()>) -> (WatchId, PipeWriter) {
    let (reader, writer) = pipe().unwrap();
    (reactor.context().watch(reader, Interest::Readable).unwrap(), writer)
}

#[test]
fn a_pipe_is_reported_until_it_is_read() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (watch, mut writer) = watched_pipe(&mut reactor);
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0, "an empty pipe is not ready");

    writer.write_all(b"hello").unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    notes.reads = true;
    turn_until(&mut reactor, &mut notes, |notes| notes.read == b"hello");
    let times = notes.times(watch);
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), times, "a pipe that was read is not ready");

    drop(writer);
    notes.reads = false;
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) > times);
    assert!(notes.seen[&watch].last().unwrap().is_hangup());
}

#[test]
fn interest_selects_the_reported_events() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    let watch = reactor.context().watch(socket.try_clone().unwrap(), Interest::Readable).unwrap();
    turn_without_wait(&mut reactor, &mut notes);
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
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), times);
}

#[test]
fn without_interest_no_hang_up_is_reported() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (watch, writer) = watched_pipe(&mut reactor);
    reactor.context().set_interest(watch, Interest::Nothing).unwrap();
    drop(writer);
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(reactor.context().stats().events, 0, "the kernel has reported an event");

    reactor.context().set_interest(watch, Interest::Readable).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 1);
}

#[test]
fn a_duplicate_does_not_keep_a_watch_alive() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (reader, mut writer) = pipe().unwrap();
    let duplicate = reader.try_clone().unwrap();
    let watch = reactor.context().watch(reader, Interest::Readable).unwrap();
    let given_back = reactor.context().unwatch(watch).unwrap();
    drop(given_back);
    writer.write_all(b"x").unwrap();
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(reactor.context().stats().events, 0, "epoll still watches the open file");
    drop(duplicate);
}

#[test]
fn unwatch_returns_the_open_file_itself() {
    let _descriptors = Descriptors::counted();
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
fn a_watch_that_a_callback_ends_is_not_reported_in_the_same_turn() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let (one, mut one_writer) = watched_pipe(&mut reactor);
    let (two, mut two_writer) = watched_pipe(&mut reactor);
    one_writer.write_all(b"x").unwrap();
    two_writer.write_all(b"x").unwrap();

    // Both are ready in the same turn; the first one that is served ends the other.
    notes.unwatch_also = Some(two);
    turn_until(&mut reactor, &mut notes, |notes| notes.times(one) > 0);
    let before = notes.times(two) as u64;
    assert_eq!(reactor.context().stats().stale_events, 1 - before);
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(two) as u64, before);
    assert!(reactor.context().watched(two).is_none());
}

#[test]
fn a_stale_watch_is_refused_and_its_slot_serves_the_next() {
    let _descriptors = Descriptors::counted();
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
    let _descriptors = Descriptors::counted();
    let mut reactor = reactor();
    let _two = [watched_pipe(&mut reactor), watched_pipe(&mut reactor)];
    let (reader, _writer) = pipe().unwrap();
    let refused = reactor.context().watch(reader, Interest::Readable).unwrap_err().error;
    assert!(matches!(refused, Error::Full { limit: 2, .. }), "{refused}");

    reactor.context().unwatch(_two[0].0).unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    let refused = reactor.context().watch(file, Interest::Readable).unwrap_err().error;
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied, "{refused}");
    let (reader, _writer) = pipe().unwrap();
    reactor
        .context()
        .watch(reader, Interest::Readable)
        .expect("the refused watch has not taken a slot");
}

#[test]
fn a_service_without_on_ready_does_not_spin() {
    let _descriptors = Descriptors::counted();
    struct Indifferent;
    impl Handler for Indifferent {
        type Conn = ();
        fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
            None
        }
        fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &mut [u8]) {}
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
    let _descriptors = Descriptors::counted();
    let mut reactor = reactor();
    let (watch, _writer) = watched_pipe(&mut reactor);
    assert!(reactor.context().watched(watch).unwrap().as_fd().try_clone_to_owned().is_ok());
}

// Descriptors of each kind: which owner closes them, and that interest works as for a pipe.

/// Removes the interest of a ready watch, and restores it.
fn check_interest(reactor: &mut Reactor<()>, notes: &mut Notes, watch: WatchId) {
    reactor.context().set_interest(watch, Interest::Nothing).unwrap();
    let (times, events) = (notes.times(watch), reactor.context().stats().events);
    turn_without_wait(reactor, notes);
    assert_eq!(notes.times(watch), times);
    assert_eq!(reactor.context().stats().events, events, "the kernel has reported an event");
    reactor.context().set_interest(watch, Interest::Readable).unwrap();
    turn_until(reactor, notes, |notes| notes.times(watch) > times);
    assert!(notes.seen[&watch].last().unwrap().is_readable());
}

/// Checks that a watch is not reported after the read.
fn check_not_ready_after_read(reactor: &mut Reactor<()>, notes: &mut Notes, watch: WatchId) {
    let times = notes.times(watch);
    turn_without_wait(reactor, notes);
    assert_eq!(notes.times(watch), times, "the watch is ready after the read");
}

#[test]
fn a_timerfd_is_watched_and_its_owner_may_keep_the_other_end() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).unwrap();
    let same = timer.as_fd().try_clone_to_owned().unwrap();
    let watch = reactor.context().watch(same, Interest::Readable).unwrap();
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0, "a timer that is not armed is not ready");

    let soon = || Expiration::OneShot(TimeSpec::new(0, 1_000_000));
    timer.set(soon(), TimerSetTimeFlags::empty()).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    check_interest(&mut reactor, &mut notes, watch);
    timer.wait().unwrap();
    check_not_ready_after_read(&mut reactor, &mut notes, watch);

    // The reactor's descriptor is returned and closed; the timer remains open through the descriptor that was kept.
    drop(reactor.context().unwatch(watch).unwrap());
    timer.set(soon(), TimerSetTimeFlags::empty()).unwrap();
    let given_up = reactor.context().watch(timer, Interest::Readable).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(given_up) > 0);
    // This timer has no other descriptor: it is closed with the reactor.
}

#[test]
fn inotify_reports_files_while_it_is_watched() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let folder = tempfile::tempdir().unwrap();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
    inotify.add_watch(folder.path(), AddWatchFlags::IN_CREATE).unwrap();
    let same = inotify.as_fd().try_clone_to_owned().unwrap();
    let watch = reactor.context().watch(same, Interest::Readable).unwrap();
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0, "nothing has happened");

    drop(File::create(folder.path().join("new")).unwrap());
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    check_interest(&mut reactor, &mut notes, watch);
    let events = inotify.read_events().unwrap();
    assert_eq!(events[0].name.as_deref(), Some("new".as_ref()));
    check_not_ready_after_read(&mut reactor, &mut notes, watch);

    // The library's descriptor is dropped; the reactor's keeps the inotify instance open until it is returned.
    drop(inotify);
    drop(File::create(folder.path().join("newer")).unwrap());
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) > 3);
    assert!(reactor.context().unwatch(watch).is_some());
}

#[test]
fn another_library_s_socket_is_watched_and_closed_by_its_last_owner() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect(address).unwrap();
    let watch = reactor.context().watch(socket.try_clone().unwrap(), Interest::Readable).unwrap();
    turn_without_wait(&mut reactor, &mut notes);
    assert_eq!(notes.times(watch), 0, "nothing was sent");

    sender.send(b"hello").unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    check_interest(&mut reactor, &mut notes, watch);
    let mut buffer = [0; 16];
    let received = (&socket).read(&mut buffer).unwrap();
    assert_eq!(&buffer[..received], b"hello");
    check_not_ready_after_read(&mut reactor, &mut notes, watch);

    reactor.context().set_interest(watch, Interest::Both).unwrap();
    let times = notes.times(watch);
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) > times);
    let last = *notes.seen[&watch].last().unwrap();
    assert!(last.is_writable() && !last.is_readable(), "{last:?}");

    // The library's own descriptor is closed. The reactor's is open, so a datagram is still accepted.
    drop(socket);
    sender.send(b"more").unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.seen[&watch].last().unwrap().is_readable());
    // The last descriptor is closed by the test, and only then the port is closed.
    let given_back = reactor.context().unwatch(watch).unwrap();
    sender.send(b"even more").unwrap();
    assert!(sender.take_error().unwrap().is_none());
    drop(given_back);
    sender.send(b"too late").unwrap();
    let refused = sender.recv(&mut buffer).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_tun_device_is_watched_in_both_directions_and_closed_with_its_last_owner() {
    let _descriptors = Descriptors::counted();
    // In a thread with its own network namespace, so that the network of the machine is not changed.
    let done = std::thread::spawn(|| match new_network_with_tun() {
        Ok(tun) => echo_packets(tun),
        // Written directly, because the test harness captures `eprintln!`, and a skipped test must be visible.
        Err(why) => {
            writeln!(std::io::stderr(), "the test of a tun device is skipped: {why}").unwrap()
        }
    });
    done.join().unwrap();
}

const OURS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const BEYOND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 4242);

fn new_network_with_tun() -> Result<Tun, String> {
    if !Path::new("/dev/net/tun").exists() {
        return Err("there is no /dev/net/tun".to_owned());
    }
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| format!("a network namespace needs privileges: {errno}"))?;
    let mut tun = Tun::new().map_err(|error| format!("/dev/net/tun: {error}"))?;
    let mut ours = AddAddressV4::new(OURS);
    ours.set_netmask(30);
    tun.add_addr(ours).unwrap();
    tun.set_up().unwrap();
    tun.set_nonblocking(true).unwrap();
    Ok(tun)
}

fn echo_packets(tun: Tun) {
    let (mut reactor, mut notes) = (reactor(), Notes::default());
    let name = tun.name().unwrap().name().into_string().unwrap();
    let same = tun.as_fd().try_clone_to_owned().unwrap();
    let watch = reactor.context().watch(same, Interest::Readable).unwrap();
    let socket = UdpSocket::bind((OURS, 0)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send_to(b"hello", BEYOND).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.times(watch) == 2);
    check_interest(&mut reactor, &mut notes, watch);

    // The kernel may have sent IPv6 packets before or after this one.
    let mut packet = read_udp_packet(&tun);
    reactor.context().set_interest(watch, Interest::Writable).unwrap();
    turn_until(&mut reactor, &mut notes, |notes| notes.seen[&watch].last().unwrap().is_writable());
    // Exchanging both addresses and both ports makes it the answer, and the checksums remain correct.
    for (one, other, bytes) in [(12, 16, 4), (20, 22, 2)] {
        for byte in 0..bytes {
            packet.swap(one + byte, other + byte);
        }
    }
    tun.send(&packet).unwrap();
    let mut buffer = [0; 16];
    let (received, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..received], from), (&b"hello"[..], BEYOND.into()));

    // The device exists as long as a descriptor is open, and the only one left is the reactor's.
    drop(tun);
    assert!(if_nametoindex(name.as_str()).is_ok());
    drop(reactor);
    assert!(if_nametoindex(name.as_str()).is_err(), "the reactor has not closed the device");
}

fn read_udp_packet(tun: &Tun) -> Vec<u8> {
    const IPV4: u8 = 4;
    const UDP: u8 = 17;
    let deadline = Instant::now() + DEADLINE;
    let mut buffer = [0; 2048];
    loop {
        if let Ok(read) = tun.recv(&mut buffer)
            && buffer[0] >> 4 == IPV4
            && buffer[9] == UDP
        {
            return buffer[..read].to_vec();
        }
        assert!(Instant::now() < deadline, "the packet did not arrive");
    }
}
