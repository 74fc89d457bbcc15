//! A harness for tests of a handler: peers, bytes and time come from the test, and what the handler writes goes to it.
//! There is no socket, no thread and no waiting, and the same test does the same each time.
//!
//! The handler is the one that serves in production, and the reactor that calls it too: only the kernel below is
//! replaced, by one in memory. So the promises of [`Handler`] hold, queues fill, reads pause and timeouts come as they do
//! with real sockets.
//!
//! ```
//! use std::time::Duration;
//! use reactor::testing::{Harness, State};
//! use reactor::{Config, Context, Handler, Incoming, ListenOptions, Token};
//!
//! /// Sends everything back, and closes what is silent for a minute.
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
//! # What is not as with sockets
//! - What the handler sends is with the peer at once, up to its room ([`Harness::set_room`]), and counts as
//!   acknowledged.
//! - Connections are in the process's file table, whatever [`Config::file_table`] says, and have no descriptor:
//!   [`Context::connection_fd`] answers with an error. Socket options are taken and have no effect.
//! - An outbound connect waits until the test answers it, to a Unix-domain address too.
//! - A watched descriptor is real, and the test says when it is ready ([`Harness::ready`]).
//! - No call fails for want of something. What a handler does then is tested with small bounds of [`Config`].
//!
//! Harnesses of one thread share one clock. What other threads send by a [`Mailbox`](crate::Mailbox) or a
//! [`Waker`](crate::Waker) arrives in the next turn.

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

/// Turns within which a handler must have done all there is to do.
const TURNS_MAX: u32 = 1_000_000;

/// A reactor without a kernel, with its handler; see the [module](self).
///
/// Peers act at once, callbacks follow in [`turn`](Self::turn), [`run`](Self::run) and [`advance`](Self::advance).
pub struct Harness<H: Handler> {
    reactor: Reactor<H::Conn>,
    handler: H,
    /// What the last turn wanted.
    status: Status,
    /// Peers that have come, for their addresses.
    arrived: u32,
    /// The kernel in memory is the thread's.
    of_this_thread: PhantomData<*const ()>,
}

/// The other end of a connection, in the hands of the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(u32);

/// What a peer sees of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It waits to be accepted, or its connect has not been answered.
    Waiting,
    /// It is open.
    Open,
    /// The reactor has finished writing (FIN) and may still read.
    Finished,
    /// The reactor has closed it.
    Closed,
    /// The reactor has closed it with a reset, as by [`Context::abort`], or its listener went before it was accepted.
    Reset,
}

impl<H: Handler> fmt::Debug for Harness<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("reactor", &self.reactor).finish_non_exhaustive()
    }
}

impl<H: Handler> Harness<H> {
    /// A reactor within these bounds, for this handler.
    ///
    /// # Errors
    /// As [`Reactor::new`].
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

    /// The context, to set the service up and to look at it.
    pub fn context(&mut self) -> &mut Context<H::Conn> {
        self.reactor.context()
    }

    /// The handler.
    pub fn handler(&self) -> &H {
        &self.handler
    }

    /// The same, to be changed.
    pub fn handler_mut(&mut self) -> &mut H {
        &mut self.handler
    }

    // Peers.

    /// A peer connects to a listener and waits to be accepted. Its address is 127.0.0.1 with another port for each.
    ///
    /// # Panics
    /// If the listener is gone.
    pub fn accept(&mut self, listener: ListenerId) -> Peer {
        self.arrived += 1;
        let port = 1024 + (self.arrived % 60_000) as u16;
        self.accept_from(listener, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
    }

    /// The same with the address that the handler is to see.
    ///
    /// # Panics
    /// If the listener is gone.
    pub fn accept_from(&mut self, listener: ListenerId, address: SocketAddr) -> Peer {
        match self.context().listener_socket(listener) {
            Some(Descriptor::Memory(listener)) => Peer(fake::arrive(listener, address)),
            _ => panic!("{listener:?} is gone"),
        }
    }

    /// The outbound connects that the handler has begun since this was last called, and where they go. Each waits for
    /// [`answer`](Self::answer) or [`refuse`](Self::refuse).
    pub fn connects(&mut self) -> Vec<(Peer, Address)> {
        fake::take_connects().into_iter().map(|(serial, to)| (Peer(serial), to)).collect()
    }

    /// The connect to this peer works.
    pub fn answer(&mut self, peer: Peer) {
        fake::answer(peer.0, true);
    }

    /// The connect to this peer is refused (`ECONNREFUSED`).
    pub fn refuse(&mut self, peer: Peer) {
        fake::answer(peer.0, false);
    }

    /// A connected socket for [`Context::adopt`], and its other end. It stands for a socket and is none.
    pub fn socket(&mut self) -> (OwnedFd, Peer) {
        let (descriptor, serial) = fake::outside_peer();
        (descriptor, Peer(serial))
    }

    /// The peer sends bytes. Nothing comes of it where its connection is closed.
    pub fn send(&mut self, peer: Peer, bytes: &[u8]) {
        fake::feed(peer.0, bytes);
    }

    /// The peer finishes writing (FIN): `on_eof` follows when what it has sent was read.
    pub fn end(&mut self, peer: Peer) {
        fake::finish_peer(peer.0);
    }

    /// The peer resets the connection; what it has sent and was not read is lost.
    pub fn reset(&mut self, peer: Peer) {
        fake::reset_peer(peer.0);
    }

    /// How many bytes the peer takes from here on; what is more waits in the write queue. At first there is no bound.
    pub fn set_room(&mut self, peer: Peer, bytes: usize) {
        fake::set_room(peer.0, bytes);
    }

    /// What the peer was sent since this was last called.
    pub fn received(&mut self, peer: Peer) -> Vec<u8> {
        fake::take_sent(peer.0)
    }

    /// What the peer sees of its connection.
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

    /// Whether the reactor has closed the connection, with a reset or without.
    #[must_use]
    pub fn is_closed(&self, peer: Peer) -> bool {
        matches!(self.state(peer), State::Closed | State::Reset)
    }

    /// The reactor's name of the connection, while it has one.
    #[must_use]
    pub fn token(&self, peer: Peer) -> Option<Token> {
        fake::data_of(peer.0).and_then(Token::from_bits)
    }

    // Everything else.

    /// A signal comes, if [`Context::watch_signals`] was called.
    pub fn signal(&mut self, signal: Signal) {
        fake::raise(signal);
    }

    /// A watched descriptor is ready for this, in one turn. It is real: what the handler reads from it, the test must have
    /// written.
    pub fn ready(&mut self, watch: WatchId, interest: Interest) {
        if let Some(readiness) = interest.registered() {
            fake::set_ready(EventSource::Watch(watch).to_bits(), readiness);
        }
    }

    /// One turn, without waiting.
    ///
    /// # Panics
    /// After a callback has panicked.
    pub fn turn(&mut self) {
        let turned = self.reactor.turn(&mut self.handler, Some(Duration::ZERO));
        self.status = turned.expect("no wait fails, and no callback has panicked");
    }

    /// Turns until there is nothing left to do at this time, or the reactor has [stopped](Self::has_stopped).
    ///
    /// # Panics
    /// If that never comes: a handler that asks for another turn in each one. And as [`turn`](Self::turn).
    pub fn run(&mut self) {
        for _ in 0..TURNS_MAX {
            self.turn();
            if self.has_stopped() || self.is_at_rest() {
                return;
            }
        }
        panic!("there is always something left to do: {:?}", self.reactor);
    }

    /// Lets time pass, and runs at each moment at which something is due.
    ///
    /// Where the reactor [stops](Self::has_stopped), the rest of the time does not pass.
    ///
    /// # Panics
    /// As [`run`](Self::run).
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

    /// Whether the last turn has ended a [`Reactor::run`]: by [`Context::stop`], or by a complete
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
