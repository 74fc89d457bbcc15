//! A harness for tests of a handler: the test plays the peers, sets the time, and reads what the handler writes.
//! There are no sockets, threads or waits, and each run of a test is the same.
//!
//! The handler and the reactor are those of production; only the kernel is replaced by one in memory. So the
//! guarantees of [`Handler`] hold, and queues fill, reads pause and timeouts fire as with real sockets.
//!
//! ```
//! use std::time::Duration;
//! use reactor::testing::{Harness, State};
//! use reactor::{Config, Context, Handler, Incoming, ListenOptions, Token};
//!
//! /// Echoes, and closes connections that are idle for a minute.
//! struct Echo;
//!
//! impl Handler for Echo {
//!     type Conn = ();
//!     fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
//!         Some(())
//!     }
//!     fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
//!         cx.set_timeout(token, Duration::from_secs(60));
//!     }
//!     fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
//!         cx.set_timeout(token, Duration::from_secs(60));
//!         if cx.write(token, bytes).is_err() {
//!             cx.abort(token);
//!         }
//!     }
//! }
//!
//! let mut harness = Harness::new(&Config::default(), Echo)?;
//! let listener = harness.context().listen(([127, 0, 0, 1], 7), &ListenOptions::default())?;
//! let peer = harness.accept(listener);
//! harness.send(peer, b"hello");
//! harness.run();
//! assert_eq!(harness.received(peer), b"hello");
//!
//! harness.advance(Duration::from_secs(59));
//! assert_eq!(harness.state(peer), State::Open);
//! harness.advance(Duration::from_secs(1));
//! assert_eq!(harness.state(peer), State::Closed);
//! # Ok::<(), reactor::Error>(())
//! ```
//!
//! # Differences to real sockets
//! - Bytes that the handler sends reach the peer at once, up to its room ([`Harness::set_room`]), and count as
//!   acknowledged.
//! - Connections are in the process's file table, whatever [`Config::file_table`] says, and have no descriptor:
//!   [`Context::connection_fd`] returns an error. Socket options are accepted and have no effect.
//! - An outbound connect, also to a Unix-domain address, is pending until the test answers it.
//! - A watched descriptor is real, but the test sets when it is ready ([`Harness::ready`]).
//! - No call fails because of a lack of resources. To test the behaviour at a limit, use small bounds in [`Config`].
//! - [`Context::watch_signals`] does not block the process's signals: only [`Harness::signal`] raises one.
//!
//! A turn examines each connection, so a harness suits hundreds of them, not tens of thousands.
//!
//! Harnesses on one thread share one clock. Messages and wake-ups from other threads, through a
//! [`Mailbox`](crate::Mailbox) or a [`Waker`](crate::Waker), arrive in the next turn. A handler with a mailbox is created
//! before the reactor, so keep the mailbox in an `Option` and set it with [`Harness::handler_mut`].

use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::config::Config;
use crate::context::Context;
use crate::error::Error;
use crate::handler::Handler;
use crate::interest::Interest;
use crate::reactor::{Reactor, Status};
use crate::signal::Signal;
use crate::sys::fake::{self, OtherSide};
use crate::sys::{self, Descriptor};
use crate::token::{EventSource, ListenerId, Token, WatchId};

/// The maximum number of turns of one [`Harness::run`].
const TURNS_MAX: u32 = 1_000_000;

/// A handler and its reactor on a kernel in memory; see the [module](self).
///
/// Peers act at once; the callbacks are called in [`turn`](Self::turn), [`run`](Self::run) and
/// [`advance`](Self::advance).
pub struct Harness<H: Handler> {
    reactor: Reactor<H::Conn>,
    handler: H,
    /// The result of the last turn.
    status: Status,
    /// The number of peers that have connected, for their ports.
    arrived: u32,
    /// The kernel in memory belongs to the thread, so the harness must not be sent to another one.
    of_this_thread: PhantomData<*const ()>,
}

/// The other end of a connection, which the test controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(u32);

/// The state of a connection as its peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// The peer waits in the backlog, or the test has not answered the connect.
    Waiting,
    /// The connection is open.
    Open,
    /// The reactor has finished writing (FIN) and may still read.
    Finished,
    /// The reactor has closed the connection.
    Closed,
    /// The reactor has reset the connection, for example by [`Context::abort`], or its listener was removed before it
    /// was accepted.
    Reset,
}

impl<H: Handler> fmt::Debug for Harness<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("reactor", &self.reactor).finish_non_exhaustive()
    }
}

impl<H: Handler> Harness<H> {
    /// Creates a reactor with this configuration, for this handler.
    ///
    /// # Errors
    /// As for [`Reactor::new`].
    pub fn new(config: &Config, handler: H) -> Result<Self, Error> {
        let reactor = sys::in_memory(|| Reactor::new(config))?;
        Ok(Self {
            reactor,
            handler,
            status: Status::Running,
            arrived: 0,
            of_this_thread: PhantomData,
        })
    }

    /// Returns the context, for setup and for inspection.
    pub fn context(&mut self) -> &mut Context<H::Conn> {
        self.reactor.context()
    }

    /// Returns the handler.
    pub fn handler(&self) -> &H {
        &self.handler
    }

    /// Returns the handler, mutably.
    pub fn handler_mut(&mut self) -> &mut H {
        &mut self.handler
    }

    // Peers.

    /// Connects a peer to a listener; it waits to be accepted. Its address is 127.0.0.1, with a different port for each
    /// peer.
    ///
    /// # Panics
    /// If the listener has been removed.
    pub fn accept(&mut self, listener: ListenerId) -> Peer {
        self.arrived += 1;
        let port = 1024 + (self.arrived % 60_000) as u16;
        self.accept_from(listener, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
    }

    /// The same, with this peer address.
    ///
    /// # Panics
    /// If the listener has been removed.
    pub fn accept_from(&mut self, listener: ListenerId, address: SocketAddr) -> Peer {
        match self.context().listener_socket(listener) {
            Some(Descriptor::Memory(listener)) => Peer(fake::arrive(listener, address)),
            _ => panic!("{listener:?} has been removed"),
        }
    }

    /// Returns the outbound connects that the handler has started since the last call, with their addresses. Each is
    /// pending until [`answer`](Self::answer) or [`refuse`](Self::refuse).
    pub fn connects(&mut self) -> Vec<(Peer, Address)> {
        fake::take_connects().into_iter().map(|(serial, to)| (Peer(serial), to)).collect()
    }

    /// Lets the connect to this peer succeed.
    pub fn answer(&mut self, peer: Peer) {
        fake::answer(peer.0, true);
    }

    /// Lets the connect to this peer fail with `ECONNREFUSED`.
    pub fn refuse(&mut self, peer: Peer) {
        fake::answer(peer.0, false);
    }

    /// Returns a stand-in for a connected socket, to be passed to [`Context::adopt`], and its other end. It can't be used
    /// in any other way.
    pub fn socket(&mut self) -> (OwnedFd, Peer) {
        let (descriptor, serial) = fake::outside_peer();
        (descriptor, Peer(serial))
    }

    /// Sends bytes from the peer. Does nothing if its connection is closed.
    pub fn send(&mut self, peer: Peer, bytes: &[u8]) {
        fake::feed(peer.0, bytes);
    }

    /// Finishes the peer's writing (FIN): `on_eof` follows after its bytes have been read.
    pub fn end(&mut self, peer: Peer) {
        fake::finish_peer(peer.0);
    }

    /// Resets the connection from the peer's side; unread bytes are lost.
    pub fn reset(&mut self, peer: Peer) {
        fake::reset_peer(peer.0);
    }

    /// Sets the number of bytes that the peer accepts from now on; further bytes wait in the write queue. Initially there
    /// is no limit.
    pub fn set_room(&mut self, peer: Peer, bytes: usize) {
        fake::set_room(peer.0, bytes);
    }

    /// Returns the bytes that the peer has received since the last call.
    pub fn received(&mut self, peer: Peer) -> Vec<u8> {
        fake::take_sent(peer.0)
    }

    /// Returns the state of the connection as the peer sees it.
    #[must_use]
    pub fn state(&self, peer: Peer) -> State {
        match fake::other_side(peer.0) {
            OtherSide::Waiting => State::Waiting,
            OtherSide::Open => State::Open,
            OtherSide::Finished => State::Finished,
            OtherSide::Closed => State::Closed,
            OtherSide::Reset => State::Reset,
        }
    }

    /// Returns whether the reactor has closed or reset the connection.
    #[must_use]
    pub fn is_closed(&self, peer: Peer) -> bool {
        matches!(self.state(peer), State::Closed | State::Reset)
    }

    /// Returns the connection's token; `None` before it is accepted and after it is closed.
    #[must_use]
    pub fn token(&self, peer: Peer) -> Option<Token> {
        fake::data_of(peer.0).and_then(Token::from_bits)
    }

    // Everything else.

    /// Raises a signal, if [`Context::watch_signals`] was called.
    pub fn signal(&mut self, signal: Signal) {
        fake::raise(signal);
    }

    /// Reports a watched descriptor as ready, in one turn. The descriptor is real: if the handler is to read from it, the
    /// test must have written to it.
    pub fn ready(&mut self, watch: WatchId, interest: Interest) {
        if let Some(readiness) = interest.registered() {
            fake::set_ready(EventSource::Watch(watch).to_bits(), readiness);
        }
    }

    /// Makes one turn, without waiting.
    ///
    /// # Panics
    /// After a callback has panicked.
    pub fn turn(&mut self) {
        let turned = self.reactor.turn(&mut self.handler, Some(Duration::ZERO));
        self.status = turned.expect("no wait fails, and no callback has panicked");
    }

    /// Makes turns until nothing is left to do at the current time, or the reactor has [stopped](Self::has_stopped).
    ///
    /// # Panics
    /// If the handler causes another turn in each turn, after a million turns. Also as for [`turn`](Self::turn).
    pub fn run(&mut self) {
        for _ in 0..TURNS_MAX {
            self.turn();
            if self.has_stopped() || self.is_at_rest() {
                return;
            }
        }
        panic!("the handler causes turns without end: {:?}", self.reactor);
    }

    /// Advances the clock, and calls [`run`](Self::run) at each time at which a timer is due.
    ///
    /// If the reactor [stops](Self::has_stopped), the clock stays at that time.
    ///
    /// # Panics
    /// As for [`run`](Self::run).
    pub fn advance(&mut self, time: Duration) {
        let end = self.context().now() + time;
        loop {
            self.run();
            if self.has_stopped() {
                return;
            }
            match self.reactor.next_deadline() {
                Some(due) if due < end => self.advance_to(due),
                _ => break,
            }
        }
        self.advance_to(end);
        self.run();
    }

    /// Returns whether the last turn would have ended [`Reactor::run`]: after [`Context::stop`], or a complete
    /// [`Context::shutdown`].
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.status == Status::Stopped
    }

    fn advance_to(&mut self, time: Instant) {
        let now = self.context().now();
        fake::advance(time.saturating_duration_since(now));
    }

    fn is_at_rest(&mut self) -> bool {
        let now = self.context().now();
        let is_due = self.reactor.next_deadline().is_some_and(|due| due <= now);
        !is_due && !self.context().poller().has_events()
    }
}
