//! Shared by the tests: a recording service, its reactor, and peers.
//!
//! Every test that uses [`World`] also checks the guarantees of `Handler`: the service checks that each callback is
//! allowed in the state of its connection, and the world compares its counts with the reactor's when it is dropped.

#![allow(dead_code)] // Each test binary uses a part of it.
#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

pub(crate) mod child;
pub(crate) mod descriptors;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
    sockopt,
};
use reactor::{
    CloseReason, Config, Context, Detached, Error, FileTable, Handler, Incoming, ListenOptions,
    ListenerId, Reactor, Signal, Status, TimerId, Token, WriteError,
};

/// Longer than any operation takes on a busy machine; only a failing test waits this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Where sockets are held: `scripts/check` runs the tests with each, `REACTOR_FILE_TABLE=process` and `registered`.
pub(crate) fn file_table() -> FileTable {
    match std::env::var("REACTOR_FILE_TABLE").as_deref() {
        Ok("process") => FileTable::Process,
        Ok("registered") => FileTable::Registered,
        Ok(other) => panic!("REACTOR_FILE_TABLE={other}: expected process or registered"),
        Err(_) => FileTable::Auto,
    }
}

/// The state of a connection: its origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conn {
    Accepted,
    Connecting,
    Connected,
}

pub(crate) type Cx = Context<Conn>;

/// A callback with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Open(Token),
    Data(Token, Vec<u8>),
    Eof(Token),
    Drain(Token),
    Timeout(Token),
    TaggedTimeout(Token, u64),
    Deferred(Token),
    Close(Token, Why),
    AcceptError(ListenerId, String),
    ListenerDrained(ListenerId),
    Timer(TimerId),
    Wake,
    Signal(Signal),
}

/// A `CloseReason` that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Closed,
    PeerClosed,
    Aborted,
    Finished,
    Failed(i32),
    ConnectFailed(i32),
    ConnectTimedOut,
    FlushTimedOut,
    ShutDown,
    Detached,
}

impl From<CloseReason> for Why {
    fn from(reason: CloseReason) -> Self {
        let errno = |error: Error| error.errno().expect("a system error has an errno");
        match reason {
            CloseReason::Closed => Why::Closed,
            CloseReason::PeerClosed => Why::PeerClosed,
            CloseReason::Aborted => Why::Aborted,
            CloseReason::Finished => Why::Finished,
            CloseReason::Failed(error) => Why::Failed(errno(error)),
            CloseReason::ConnectFailed(error) => Why::ConnectFailed(errno(error)),
            CloseReason::ConnectTimedOut => Why::ConnectTimedOut,
            CloseReason::FlushTimedOut => Why::FlushTimedOut,
            CloseReason::ShutDown => Why::ShutDown,
            other => panic!("an unknown reason: {other:?}"),
        }
    }
}

type Script = Box<dyn FnMut(&mut Cx, &Event)>;

/// Records each callback, checks the reactor's guarantees, and then runs the script.
pub(crate) struct Service {
    pub(crate) log: Vec<Event>,
    pub(crate) refusing: bool,
    /// The detached sockets that `on_close` has received.
    pub(crate) detached: Vec<Detached>,
    script: Script,
    phases: HashMap<Token, Phase>,
    inside: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Open,
    Ended,
    Closed,
}

impl Service {
    fn new() -> Self {
        Self {
            log: Vec::new(),
            refusing: false,
            detached: Vec::new(),
            script: Box::new(|_, _| {}),
            phases: HashMap::new(),
            inside: false,
        }
    }

    fn record(&mut self, cx: &mut Cx, event: Event) {
        assert!(!self.inside, "a callback was called during another one: {event:?}");
        self.check(&event);
        self.inside = true;
        (self.script)(cx, &event);
        self.inside = false;
        self.log.push(event);
    }

    fn check(&mut self, event: &Event) {
        let (token, allowed, next): (_, &[_], _) = match event {
            Event::Open(token) => (token, &[None], Phase::Open),
            Event::Data(token, bytes) => {
                assert!(!bytes.is_empty(), "on_data without data");
                (token, &[Some(Phase::Open)], Phase::Open)
            }
            Event::Eof(token) => (token, &[Some(Phase::Open)], Phase::Ended),
            // These do not depend on the state of the input.
            Event::Drain(token)
            | Event::Timeout(token)
            | Event::TaggedTimeout(token, _)
            | Event::Deferred(token) => {
                let phase = self.phases.get(token);
                assert!(matches!(phase, Some(Phase::Open | Phase::Ended)), "{phase:?}: {event:?}");
                return;
            }
            Event::Close(token, Why::ConnectFailed(_) | Why::ConnectTimedOut) => {
                (token, &[None], Phase::Closed)
            }
            // A connect that was closed or aborted before it opened gets only `on_close`.
            Event::Close(token, _) => {
                (token, &[None, Some(Phase::Open), Some(Phase::Ended)], Phase::Closed)
            }
            _ => return,
        };
        let phase = self.phases.insert(*token, next);
        assert!(allowed.contains(&phase), "{event:?} after {phase:?}");
    }

    pub(crate) fn count(&self, of: impl Fn(&Event) -> bool) -> usize {
        self.log.iter().filter(|event| of(event)).count()
    }

    pub(crate) fn opened(&self) -> Vec<Token> {
        let token = |event: &Event| match event {
            Event::Open(token) => Some(*token),
            _ => None,
        };
        self.log.iter().filter_map(token).collect()
    }

    pub(crate) fn closed(&self) -> Vec<(Token, Why)> {
        let close = |event: &Event| match event {
            Event::Close(token, why) => Some((*token, *why)),
            _ => None,
        };
        self.log.iter().filter_map(close).collect()
    }

    pub(crate) fn why(&self, token: Token) -> Option<Why> {
        self.closed().into_iter().find(|&(other, _)| other == token).map(|(_, why)| why)
    }

    /// All bytes that arrived on a connection.
    pub(crate) fn data(&self, token: Token) -> Vec<u8> {
        let mut all = Vec::new();
        for event in &self.log {
            if let Event::Data(other, bytes) = event
                && *other == token
            {
                all.extend_from_slice(bytes);
            }
        }
        all
    }

    pub(crate) fn saw(&self, event: &Event) -> bool {
        self.log.contains(event)
    }
}

impl Handler for Service {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Cx, _incoming: &Incoming<'_>) -> Option<Conn> {
        assert!(!self.inside);
        (!self.refusing).then_some(Conn::Accepted)
    }

    fn on_open(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        assert!(cx.conn(token).is_none(), "the state is lent to the callback");
        assert!(cx.holds(token));
        if *conn == Conn::Connecting {
            *conn = Conn::Connected;
        }
        self.record(cx, Event::Open(token));
    }

    fn on_data(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        assert_ne!(*conn, Conn::Connecting);
        self.record(cx, Event::Data(token, bytes.to_vec()));
    }

    fn on_eof(&mut self, cx: &mut Cx, token: Token, _conn: &mut Conn) {
        self.record(cx, Event::Eof(token));
    }

    fn on_drain(&mut self, cx: &mut Cx, token: Token, _conn: &mut Conn) {
        assert_eq!(cx.queued_bytes(token), 0);
        self.record(cx, Event::Drain(token));
    }

    fn on_timeout(&mut self, cx: &mut Cx, token: Token, _conn: &mut Conn) {
        self.record(cx, Event::Timeout(token));
    }

    fn on_tagged_timeout(&mut self, cx: &mut Cx, token: Token, _conn: &mut Conn, tag: u64) {
        self.record(cx, Event::TaggedTimeout(token, tag));
    }

    fn on_deferred(&mut self, cx: &mut Cx, token: Token, _conn: &mut Conn) {
        self.record(cx, Event::Deferred(token));
    }

    fn on_close(&mut self, cx: &mut Cx, token: Token, conn: Conn, reason: CloseReason) {
        assert!(!cx.holds(token), "the token is not stale in on_close");
        let opened = self.phases.contains_key(&token);
        assert_eq!(opened, conn != Conn::Connecting, "a connect that failed gets only on_close");
        let why = match reason {
            CloseReason::Detached(detached) => {
                self.detached.push(detached);
                Why::Detached
            }
            other => other.into(),
        };
        self.record(cx, Event::Close(token, why));
    }

    fn on_accept_error(&mut self, cx: &mut Cx, listener: ListenerId, error: &Error) {
        self.record(cx, Event::AcceptError(listener, error.to_string()));
    }

    fn on_listener_drained(&mut self, cx: &mut Cx, listener: ListenerId) {
        assert!(cx.listener_fd(listener).is_none(), "the id is not stale in on_listener_drained");
        self.record(cx, Event::ListenerDrained(listener));
    }

    fn on_timer(&mut self, cx: &mut Cx, timer: TimerId) {
        self.record(cx, Event::Timer(timer));
    }

    fn on_wake(&mut self, cx: &mut Cx) {
        self.record(cx, Event::Wake);
    }

    fn on_signal(&mut self, cx: &mut Cx, signal: Signal) {
        self.record(cx, Event::Signal(signal));
    }
}

/// A reactor with its recording service.
pub(crate) struct World {
    pub(crate) reactor: Reactor<Conn>,
    pub(crate) service: Service,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        let file_table = match config.file_table {
            FileTable::Auto => file_table(),
            asked => asked,
        };
        let config = Config { file_table, ..config };
        Self { reactor: Reactor::new(&config).unwrap(), service: Service::new() }
    }

    pub(crate) fn cx(&mut self) -> &mut Cx {
        self.reactor.context()
    }

    /// Sets the script that each callback runs.
    pub(crate) fn script(&mut self, script: impl FnMut(&mut Cx, &Event) + 'static) {
        self.service.script = Box::new(script);
    }

    pub(crate) fn listen(&mut self) -> SocketAddr {
        self.listener().1
    }

    pub(crate) fn listener(&mut self) -> (ListenerId, SocketAddr) {
        let listener = self.cx().listen(LOOPBACK, &ListenOptions::default()).unwrap();
        (listener, self.cx().listener_addr(listener).unwrap())
    }

    pub(crate) fn turn(&mut self, max_wait: Duration) -> Status {
        self.reactor.turn(&mut self.service, Some(max_wait)).unwrap()
    }

    /// Runs until the condition holds.
    ///
    /// # Panics
    /// If that takes longer than [`DEADLINE`].
    pub(crate) fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "{what} did not happen; log: {:?}",
                self.service.log
            );
            let _ = self.turn(Duration::from_millis(20));
        }
    }

    /// Runs for this time; returns how often the kernel's wait returned. For tests that nothing happens, so no condition
    /// can end it earlier.
    pub(crate) fn run_for(&mut self, time: Duration) -> u64 {
        let before = self.cx().stats().wakeups;
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let _ = self.turn(left);
        }
        self.cx().stats().wakeups - before
    }

    /// Connects a peer; returns it with the reactor's token.
    pub(crate) fn pair(&mut self, address: SocketAddr) -> (TcpStream, Token) {
        let before = self.service.opened().len();
        let peer = peer(address);
        self.until("the accept", |world| world.service.opened().len() > before);
        (peer, self.service.opened()[before])
    }

    pub(crate) fn until_closed(&mut self, token: Token) -> Why {
        self.until("the close", |world| world.service.why(token).is_some());
        self.service.why(token).unwrap()
    }

    /// Compares the counts of the service with those of the reactor.
    fn check(&mut self) {
        let stats = self.cx().stats();
        let opened = self.service.opened();
        let closed_after_open =
            self.service.closed().iter().filter(|(token, _)| opened.contains(token)).count();
        assert_eq!(stats.opened, opened.len() as u64);
        assert_eq!(stats.accepted + stats.connected, stats.opened);
        assert_eq!(stats.closed, closed_after_open as u64);
        // Pending connects are counted by `connections`, but are not open.
        assert!(stats.open() <= self.cx().connections() as u64, "{stats:?}");
        if self.cx().connections() == 0 {
            assert_eq!(stats.queued_bytes, 0, "bytes are queued without connections");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}

/// A blocking peer whose reads and writes have a deadline.
pub(crate) fn peer(address: SocketAddr) -> TcpStream {
    let peer = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    peer.set_read_timeout(Some(DEADLINE)).unwrap();
    peer.set_write_timeout(Some(DEADLINE)).unwrap();
    peer.set_nodelay(true).unwrap();
    peer
}

/// Closes a peer with a reset.
pub(crate) fn reset(peer: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&peer, sockopt::Linger, &linger).unwrap();
    drop(peer);
}

/// Reads to the end; returns the bytes, and whether the end was a reset.
pub(crate) fn read_to_end(peer: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return (bytes, false),
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => return (bytes, true),
            Err(error) => panic!("the peer could not read: {error}"),
        }
    }
}

/// Sends bytes and waits for their echo, with turns of the world in between.
pub(crate) fn echo_once(world: &mut World, peer: &mut TcpStream, message: &[u8]) {
    peer.write_all(message).unwrap();
    let mut answer = vec![0; message.len()];
    let mut filled = 0;
    peer.set_nonblocking(true).unwrap();
    world.until("the echo", |_| {
        match peer.read(&mut answer[filled..]) {
            Ok(read) => filled += read,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        filled == message.len()
    });
    peer.set_nonblocking(false).unwrap();
    assert_eq!(answer, message);
}

/// A script that echoes.
pub(crate) fn echo(cx: &mut Cx, event: &Event) {
    match event {
        Event::Data(token, bytes) => match cx.write(*token, bytes) {
            // If the peer has reset the connection meanwhile, it is closed with that error.
            Ok(_) | Err(WriteError::Closed) => {}
            Err(error) => panic!("an echo should fit: {error}"),
        },
        Event::Eof(token) => cx.close(*token),
        _ => {}
    }
}

/// Bytes with which missing or reordered parts are detected.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8 ^ (index / 251) as u8).collect()
}

/// An address without a listener, which is reserved as long as the socket is open.
pub(crate) fn closed_port(ip: IpAddr) -> (OwnedFd, SocketAddr) {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let bound = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(bound.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(ip, 0))).unwrap();
    let address: SockaddrStorage = getsockname(bound.as_raw_fd()).unwrap();
    let port = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => v4.port(),
        (_, Some(v6)) => v6.port(),
        _ => unreachable!("it was bound to one of them"),
    };
    (bound, SocketAddr::new(ip, port))
}
