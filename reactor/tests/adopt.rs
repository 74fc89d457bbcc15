//! Adopted and detached sockets, and borrowed descriptors.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::libc::{ENOTCONN, ENOTSOCK};
use reactor::{
    Config, ConnectOptions, Context, Error, Handler, Incoming, Interest, ListenOptions, Reactor,
    Refused, Token,
};
use socket2::{Domain, SockRef, Socket, Type};

use common::descriptors::Descriptors;
use common::{Conn, DEADLINE, Event, LOOPBACK, Why, World, echo, echo_once, pattern, peer};

/// A connected pair of sockets outside of the reactor.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let connected = peer(listener.local_addr().unwrap());
    (listener.accept().unwrap().0, connected)
}

/// Writes until the kernel accepts no more.
fn fill(mut socket: &TcpStream) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut filled = 0;
    loop {
        match socket.write(&[7; 65_536]) {
            Ok(written) => filled += written,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return filled;
            }
        }
    }
}

fn until_open(world: &mut World, token: Token) {
    world.until("on_open", |world| world.service.opened().contains(&token));
}

/// Detaches a connection; returns its socket, and the unread and unsent bytes.
fn detach(world: &mut World, token: Token) -> (TcpStream, Vec<u8>, Vec<u8>) {
    world.cx().detach(token).unwrap();
    assert!(world.cx().holds(token), "the token is valid until on_close");
    assert!(world.cx().write(token, b"too late").is_err());
    assert_eq!(world.until_closed(token), Why::Detached);
    let detached = world.service.detached.pop().unwrap();
    (TcpStream::from(detached.descriptor), detached.unread, detached.unsent)
}

#[test]
fn an_adopted_socket_is_a_connection_like_others() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let (inside, mut outside) = tcp_pair();
    let token = world.cx().adopt(inside, Conn::Connecting).unwrap();
    world.cx().write(token, b"hello").unwrap();
    until_open(&mut world, token);
    let mut greeting = [0; 5];
    outside.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"hello");
    echo_once(&mut world, &mut outside, b"as any other");
    assert_eq!(world.cx().stats().connected, 1);
    drop(outside);
    assert_eq!(world.until_closed(token), Why::PeerClosed);
}

#[test]
fn both_ends_of_a_socket_pair_can_be_adopted() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (one, other) = UnixStream::pair().unwrap();
    let one = world.cx().adopt(one, Conn::Connecting).unwrap();
    let other = world.cx().adopt(other, Conn::Connecting).unwrap();
    world.cx().write(one, b"to the other").unwrap();
    world.until("the bytes", |world| world.service.data(other) == b"to the other");
    world.cx().close(one);
    world.until("the end", |world| world.service.saw(&Event::Eof(other)));
    world.cx().close(other);
    assert_eq!(world.until_closed(other), Why::PeerClosed);
}

#[test]
fn bytes_that_arrived_before_the_adoption_are_read() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (inside, mut outside) = tcp_pair();
    outside.write_all(b"early").unwrap();
    drop(outside);
    let token = world.cx().adopt(inside, Conn::Connecting).unwrap();
    world.until("the end", |world| world.service.saw(&Event::Eof(token)));
    assert_eq!(world.service.data(token), b"early");
    world.cx().close(token);
    world.until_closed(token);
}

#[test]
fn an_adopted_socket_without_events_opens_too() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (inside, mut outside) = tcp_pair();
    let filled = fill(&inside);
    let token = world.cx().adopt(inside, Conn::Connecting).unwrap();
    world.cx().write(token, b"the last").unwrap();
    until_open(&mut world, token);
    assert_eq!(world.run_for(Duration::from_millis(50)) / 10, 0, "the reactor spins");
    let mut all = vec![0; filled + 8];
    outside.set_nonblocking(true).unwrap();
    let mut read = 0;
    world.until("the last bytes", |_| {
        match outside.read(&mut all[read..]) {
            Ok(bytes) => read += bytes,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        read == all.len()
    });
    assert_eq!(&all[filled..], b"the last");
    world.cx().abort(token);
    world.until_closed(token);
}

#[test]
fn a_socket_that_cannot_be_adopted_is_returned() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 1, ..Config::default() });
    let mut refuse = |what: OwnedFd| {
        let number = what.as_raw_fd();
        let Refused { error, given } = world.cx().adopt(what, Conn::Connecting).unwrap_err();
        assert_eq!((given.0.as_raw_fd(), given.1), (number, Conn::Connecting));
        (error, given.0)
    };
    let (error, file) = refuse(File::open("/dev/null").unwrap().into());
    assert_eq!(error.errno(), Some(ENOTSOCK));
    let unconnected = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    assert_eq!(refuse(unconnected.into()).0.errno(), Some(ENOTCONN));
    let datagrams = UdpSocket::bind(LOOPBACK).unwrap();
    assert!(matches!(refuse(datagrams.into()).0, Error::Invalid(_)));
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    assert!(matches!(refuse(listener.into()).0, Error::Invalid(_)));

    let (inside, _outside) = tcp_pair();
    let (again, _other) = tcp_pair();
    let token = world.cx().adopt(inside, Conn::Connecting).unwrap();
    let refused = world.cx().adopt(again, Conn::Connecting).unwrap_err();
    assert!(matches!(refused.error, Error::Full { .. }), "{refused}");
    world.cx().abort(token);
    world.until_closed(token);
    world.cx().shutdown(Duration::ZERO);
    let refused = world.cx().adopt(refused.given.0, Conn::Connecting).unwrap_err();
    assert!(matches!(refused.error, Error::Invalid(_)), "{refused}");
    let refused = world.cx().adopt_listener(file, &ListenOptions::default()).unwrap_err();
    assert!(matches!(refused.error, Error::Invalid(_)), "{refused}");
    let _ = world.turn(Duration::ZERO);
}

#[test]
fn a_refused_connect_and_a_refused_watch_return_their_argument() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let options = ConnectOptions { source: Some(([0; 16], 0).into()), ..Default::default() };
    let refused = world.cx().connect(([127, 0, 0, 1], 1), &options, Conn::Connecting).unwrap_err();
    assert_eq!(refused.given, Conn::Connecting);
    let file = File::open("/proc/self/exe").unwrap();
    let number = file.as_raw_fd();
    let refused = world.cx().watch(file, Interest::Readable).unwrap_err();
    assert_eq!(refused.given.as_raw_fd(), number);
}

#[test]
fn an_adopted_listener_accepts_and_its_options_are_set() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let address = listener.local_addr().unwrap();
    let mut early = peer(address);
    let options = ListenOptions { backlog: Some(5), nodelay: true, ..Default::default() };
    let id = world.cx().adopt_listener(listener, &options).unwrap();
    assert_eq!(world.cx().listener_addr(id).unwrap(), address);
    echo_once(&mut world, &mut early, b"from the backlog");
    let (_peer, token) = world.pair(address);
    let nodelay = {
        let socket = world.cx().connection_fd(token).unwrap();
        SockRef::from(&socket).tcp_nodelay().unwrap()
    };
    assert!(nodelay, "the option is inherited");
}

#[test]
fn a_socket_that_is_bound_listens_when_it_is_adopted() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&LOOPBACK.into()).unwrap();
    let id = world.cx().adopt_listener(socket, &ListenOptions::default()).unwrap();
    let address = world.cx().listener_addr(id).unwrap();
    world.pair(address);

    for domain in [Domain::IPV4, Domain::IPV6, Domain::UNIX] {
        let unbound = Socket::new(domain, Type::STREAM, None).unwrap();
        let refused = world.cx().adopt_listener(unbound, &ListenOptions::default()).unwrap_err();
        assert!(matches!(refused.error, Error::Invalid(_)), "{domain:?}: {refused}");
    }
}

#[test]
fn a_detached_listener_keeps_its_backlog() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    let mut waiting = peer(address);
    let socket = world.cx().detach_listener(listener).unwrap();
    assert!(world.cx().detach_listener(listener).is_none(), "the id is stale");
    assert!(world.cx().listener_fd(listener).is_none());
    world.run_for(Duration::from_millis(10));
    assert!(world.service.opened().is_empty());
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(false).unwrap();
    listener.accept().unwrap().0.write_all(b"from elsewhere").unwrap();
    let mut text = String::new();
    waiting.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from elsewhere");
}

/// Detaches a connection after `disturb`; returns the number of stale events that the reactor has received for it.
fn stale_events_of_a_detached<T>(disturb: impl FnOnce(File) -> T) -> u64 {
    let mut world = World::new();
    let lower = File::open("/dev/null").unwrap();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let _ = world.turn(Duration::ZERO); // Registers the file, if registered files are in use.
    let _kept = disturb(lower);
    let (mut socket, unread, unsent) = detach(&mut world, token);
    assert_eq!((unread, unsent), (Vec::new(), Vec::new()));
    socket.set_nonblocking(false).unwrap();
    for _ in 0..3 {
        peer.write_all(b"to elsewhere").unwrap();
        let mut bytes = [0; 12];
        socket.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"to elsewhere");
        world.run_for(Duration::from_millis(10));
    }
    drop(socket);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    world.cx().stats().stale_events
}

#[test]
fn a_detached_connection_stays_open_without_stale_events() {
    let _descriptors = Descriptors::counted();
    // Its original descriptor number is free and the lowest; then it is free but not the lowest.
    assert_eq!(stale_events_of_a_detached(|lower| lower), 0);
    assert_eq!(stale_events_of_a_detached(drop), 0);
}

#[test]
fn a_detached_connection_whose_number_was_reused_stays_open() {
    let _descriptors = Descriptors::counted();
    let taken = |lower: File| [lower, File::open("/dev/null").unwrap()];
    let in_vain = stale_events_of_a_detached(taken);
    assert!(in_vain <= 6, "{in_vain}");
}

#[test]
fn a_connection_that_is_detached_within_its_own_callback_loses_no_byte() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { read_buffer_bytes: 4, ..Config::default() });
    world.script(|cx, event| {
        if let Event::Data(token, _) = event {
            cx.write(*token, b"answer").unwrap();
            cx.detach(*token).unwrap();
            assert!(cx.detach(*token).is_err(), "it is already detached");
        }
    });
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    peer.write_all(b"a longer request").unwrap();
    assert_eq!(world.until_closed(token), Why::Detached);
    let detached = world.service.detached.pop().unwrap();
    let mut socket = TcpStream::from(detached.descriptor);
    socket.set_nonblocking(false).unwrap();
    socket.write_all(b" and more").unwrap();
    let mut rest = [world.service.data(token), detached.unread].concat();
    let mut buffer = [0; 16];
    while rest.len() < 16 {
        let read = socket.read(&mut buffer).unwrap();
        rest.extend_from_slice(&buffer[..read]);
    }
    assert_eq!(rest, b"a longer request");
    drop(socket);
    let mut answer = String::new();
    peer.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer and more");
}

/// One callback detaches both connections; bytes already received for the other one are returned.
#[test]
fn a_connection_detached_by_another_callback_loses_no_byte() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut first_peer, first) = world.pair(address);
    let (mut second_peer, second) = world.pair(address);
    let _ = world.turn(Duration::ZERO); // Registers the files, if registered files are in use.
    world.script(move |cx, event| {
        if let Event::Data(..) = event {
            cx.detach(first).unwrap();
            cx.detach(second).unwrap();
        }
    });
    first_peer.write_all(b"one").unwrap();
    second_peer.write_all(b"two").unwrap();
    world.until_closed(first);
    world.until_closed(second);
    let mut all = [world.service.data(first), world.service.data(second)].concat();
    for detached in world.service.detached.drain(..) {
        all.extend(&detached.unread);
        let mut socket = TcpStream::from(detached.descriptor);
        let mut buffer = [0; 8];
        match socket.read(&mut buffer) {
            Ok(read) => all.extend(&buffer[..read]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    all.sort_unstable();
    assert_eq!(all, b"enootw");
}

#[test]
fn unsent_bytes_of_a_detached_connection_are_returned() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    let mut written = 0;
    for piece in stream.chunks(50_000) {
        if world.cx().write(token, piece).is_err() {
            break;
        }
        written += piece.len();
    }
    assert!(world.cx().queued_bytes(token) > 0);
    let (mut socket, _, unsent) = detach(&mut world, token);
    assert!(!unsent.is_empty());
    assert_eq!(world.cx().stats().queued_bytes, 0);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    socket.set_nonblocking(false).unwrap();
    socket.write_all(&unsent).unwrap();
    drop(socket);
    assert!(reader.join().unwrap() == stream[..written], "bytes are lost or out of order");
}

#[test]
fn a_connection_moves_between_reactors_and_back() {
    let _descriptors = Descriptors::counted();
    let (mut world, mut other) = (World::new(), World::new());
    world.script(echo);
    other.script(echo);
    let address = world.listen();
    let (mut peer, mut token) = world.pair(address);
    for _ in 0..3 {
        echo_once(&mut world, &mut peer, b"in the first");
        let (socket, ..) = detach(&mut world, token);
        let there = other.cx().adopt(socket, Conn::Connecting).unwrap();
        until_open(&mut other, there);
        echo_once(&mut other, &mut peer, b"in the second");
        let (socket, ..) = detach(&mut other, there);
        token = world.cx().adopt(socket, Conn::Connecting).unwrap();
        until_open(&mut world, token);
    }
    assert_eq!(world.cx().stats().stale_events + other.cx().stats().stale_events, 0);
}

#[test]
fn a_connecting_closing_or_removed_connection_cannot_be_detached() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let connecting =
        world.cx().connect(address, &ConnectOptions::default(), Conn::Connecting).unwrap();
    assert!(matches!(world.cx().detach(connecting), Err(Error::Invalid(_))));
    until_open(&mut world, connecting);
    world.cx().abort(connecting);
    assert!(matches!(world.cx().detach(connecting), Err(Error::Invalid(_))));
    world.until_closed(connecting);
    assert!(matches!(world.cx().detach(connecting), Err(Error::Stale)));
    assert!(matches!(world.cx().connection_fd(connecting), Err(Error::Stale)));
}

#[test]
fn a_connections_descriptor_is_lent_and_closed() {
    let descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    let (mut peer, token) = world.pair(address);
    world.script(echo);
    echo_once(&mut world, &mut peer, b"it has moved");
    {
        let socket = world.cx().connection_fd(token).unwrap();
        SockRef::from(&socket).set_ttl_v4(42).unwrap();
    }
    let before = descriptors.more();
    let ttl = {
        let socket = world.cx().connection_fd(token).unwrap();
        SockRef::from(&socket).ttl_v4().unwrap()
    };
    assert_eq!(ttl, 42);
    assert_eq!(descriptors.more(), before, "the descriptor was closed");
    let listening = world.cx().listener_fd(listener).unwrap();
    let local = SockRef::from(&listening).local_addr().unwrap();
    assert_eq!(local.as_socket(), Some(address));
    echo_once(&mut world, &mut peer, b"and it works on");
}

/// Sets an option of each connection before it is accepted.
struct Setting;

impl Handler for Setting {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<()> {
        SockRef::from(incoming).set_ttl_v4(43).ok()
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), _: &mut [u8]) {
        let ttl = SockRef::from(&cx.connection_fd(token).unwrap()).ttl_v4().unwrap();
        cx.write(token, &[ttl as u8]).unwrap();
    }
}

#[test]
fn an_option_can_be_set_in_on_accept() {
    let _descriptors = Descriptors::counted();
    let config = Config { file_table: common::file_table(), ..Config::default() };
    let mut reactor = Reactor::new(&config).unwrap();
    let listener = reactor.context().listen(LOOPBACK, &ListenOptions::default()).unwrap();
    let mut peer = peer(reactor.context().listener_addr(listener).unwrap());
    peer.write_all(b"?").unwrap();
    let deadline = std::time::Instant::now() + DEADLINE;
    while reactor.context().stats().bytes_out == 0 {
        assert!(std::time::Instant::now() < deadline);
        let _ = reactor.turn(&mut Setting, Some(Duration::from_millis(20))).unwrap();
    }
    let mut ttl = [0];
    peer.read_exact(&mut ttl).unwrap();
    assert_eq!(ttl, [43]);
}
