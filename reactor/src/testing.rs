//! A test harness for handlers, with the feature `testing`.
//!
//! The handler under test is the one of the service, unchanged, on the real reactor. A [`Harness`] plays its peers over
//! loopback, from the same thread: each call returns when the reactor has nothing left to do. Time is the harness's:
//! [`Harness::advance`] lets an hour pass at once, so tests of timeouts neither wait nor race.
//!
//! ```
//! use std::time::Duration;
//! use reactor::testing::{End, Harness};
//! use reactor::{Context, Handler, Incoming, Token};
//!
//! /// Answers each message in upper case, and closes after a minute of silence.
//! struct Shout;
//!
//! impl Handler for Shout {
//!     type Conn = ();
//!     fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
//!         Some(())
//!     }
//!     fn on_open(&mut self, cx: &mut Context<()>, token: Token, (): &mut ()) {
//!         cx.set_timeout(token, Duration::from_secs(60));
//!     }
//!     fn on_data(&mut self, cx: &mut Context<()>, token: Token, (): &mut (), bytes: &mut [u8]) {
//!         bytes.make_ascii_uppercase();
//!         let _ = cx.write(token, bytes);
//!         cx.set_timeout(token, Duration::from_secs(60));
//!     }
//! }
//!
//! let mut harness = Harness::new(Shout)?;
//! let mut peer = harness.connect()?;
//! harness.send(&mut peer, b"hello")?;
//! assert_eq!(harness.received(&mut peer), b"HELLO");
//! harness.advance(Duration::from_secs(59));
//! assert_eq!(harness.end(&mut peer), None);
//! harness.advance(Duration::from_secs(1));
//! assert_eq!(harness.end(&mut peer), Some(End::Finished));
//! # Ok::<(), std::io::Error>(())
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::config::{Config, FileTable, ListenOptions};
use crate::context::Context;
use crate::handler::Handler;
use crate::reactor::{Reactor, Status};
use crate::sys;
use crate::token::ListenerId;

/// How long the kernel may take to bring over loopback what was sent; as a rule it is there at once.
const DELIVERY: Duration = Duration::from_millis(50);

/// Timers are rounded up to it.
const TICK: Duration = Duration::from_millis(1);

/// What a peer is read with.
const READ_BYTES: usize = 64 * 1024;

/// Turns that follow each other without an end: the handler keeps the reactor busy by itself.
const TURNS_MAX: usize = 100_000;

/// A handler under test, with its reactor.
#[derive(Debug)]
pub struct Harness<H: Handler> {
    reactor: Reactor<H::Conn>,
    handler: H,
    listener: ListenerId,
    address: SocketAddr,
    has_stopped: bool,
}

/// The other end of a connection.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    received: Vec<u8>,
    end: Option<End>,
}

/// How the handler's side of a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has finished writing, or was closed.
    Finished,
    /// It was reset: aborted, or refused.
    Reset,
}

impl Peer {
    /// The address that the handler sees.
    ///
    /// # Errors
    /// The system's.
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// Reads what is there.
    fn read(&mut self) {
        let mut buffer = vec![0; READ_BYTES];
        while self.end.is_none() {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.end = Some(End::Finished),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.end = Some(End::Reset),
            }
        }
    }
}

impl<H: Handler> Harness<H> {
    /// With bounds for a few connections, and descriptors.
    ///
    /// # Errors
    /// The system's refusal to make a reactor or to listen on loopback.
    pub fn new(handler: H) -> io::Result<Self> {
        let config =
            Config { connections_max: 1024, file_table: FileTable::Process, ..Config::default() };
        Self::with_config(handler, &config)
    }

    /// With these bounds.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_config(handler: H, config: &Config) -> io::Result<Self> {
        let mut reactor = Reactor::new(config)?;
        let cx = reactor.context();
        let listener = cx.listen((Ipv4Addr::LOCALHOST, 0), &ListenOptions::default())?;
        let address = cx.listener_addr(listener)?;
        Ok(Self { reactor, handler, listener, address, has_stopped: false })
    }

    /// The handler, to look at what it has noted.
    pub fn handler(&mut self) -> &mut H {
        &mut self.handler
    }

    /// The context, as between two turns.
    pub fn context(&mut self) -> &mut Context<H::Conn> {
        self.reactor.context()
    }

    /// The listener of [`connect`](Self::connect).
    pub fn listener(&self) -> ListenerId {
        self.listener
    }

    /// Whether the handler has stopped the reactor, or its shutdown is complete.
    pub fn has_stopped(&self) -> bool {
        self.has_stopped
    }

    /// A peer connects. Whether the handler takes it is seen by [`end`](Self::end).
    ///
    /// # Errors
    /// Nothing listens any more, or the system's refusal.
    pub fn connect(&mut self) -> io::Result<Peer> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        self.settle(DELIVERY);
        Ok(Peer { stream, received: Vec::new(), end: None })
    }

    /// A peer sends these bytes.
    ///
    /// # Errors
    /// The connection has ended, or the handler does not read and the kernel takes no more.
    pub fn send(&mut self, peer: &mut Peer, mut bytes: &[u8]) -> io::Result<()> {
        let mut tries = 0;
        while !bytes.is_empty() {
            match peer.stream.write(bytes) {
                Ok(count) => (bytes, tries) = (&bytes[count..], 0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The handler may make room by reading, or by being read from.
                Err(error) if error.kind() == ErrorKind::WouldBlock && tries < 2 => tries += 1,
                Err(error) => return Err(error),
            }
            self.settle(DELIVERY);
            peer.read();
        }
        Ok(())
    }

    /// A peer finishes writing.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn finish(&mut self, peer: &mut Peer) -> io::Result<()> {
        peer.stream.shutdown(Shutdown::Write)?;
        self.settle(DELIVERY);
        Ok(())
    }

    /// A peer resets its connection.
    ///
    /// # Errors
    /// The system's.
    pub fn reset(&mut self, peer: Peer) -> io::Result<()> {
        sys::reset_on_close(&peer.stream)?;
        drop(peer);
        self.settle(DELIVERY);
        Ok(())
    }

    /// What the handler has sent to a peer since this was asked last.
    pub fn received(&mut self, peer: &mut Peer) -> Vec<u8> {
        self.settle(Duration::ZERO);
        peer.read();
        std::mem::take(&mut peer.received)
    }

    /// How the handler's side has ended; `None` while it has not.
    pub fn end(&mut self, peer: &mut Peer) -> Option<End> {
        self.settle(Duration::ZERO);
        peer.read();
        peer.end
    }

    /// Lets time pass, and up to a millisecond more, to which timers are rounded up: what is due by then happens, in the
    /// order in which it is due.
    pub fn advance(&mut self, by: Duration) {
        let end = self.reactor.context().now() + by + TICK;
        self.settle(Duration::ZERO);
        while let Some(due) = self.reactor.next_deadline().filter(|&due| due <= end) {
            let now = self.reactor.context().now();
            self.reactor.context().advance_clock(due.saturating_duration_since(now));
            self.settle(Duration::ZERO);
        }
        let now = self.reactor.context().now();
        self.reactor.context().advance_clock(end.saturating_duration_since(now));
        self.settle(Duration::ZERO);
    }

    /// Takes turns until there is nothing left to do, and waits so long for the first event.
    ///
    /// # Panics
    /// Where the reactor fails, or the handler makes work for itself without an end.
    pub fn settle(&mut self, wait: Duration) {
        let began = Instant::now();
        for _ in 0..TURNS_MAX {
            if self.has_stopped {
                return;
            }
            let before = self.reactor.context().stats();
            let status = self.reactor.turn(&mut self.handler, Some(Duration::ZERO));
            self.has_stopped = status.expect("the reactor can wait") == Status::Stopped;
            let is_event = self.reactor.context().stats().events != before.events;
            let is_due =
                self.reactor.next_deadline().is_some_and(|due| due <= self.reactor.context().now());
            if !is_event && !is_due && began.elapsed() >= wait.min(DELIVERY) {
                return;
            }
            if is_event && wait > Duration::ZERO {
                // What comes after the first event is there at once, too.
                return self.settle(Duration::ZERO);
            }
        }
        panic!("after {TURNS_MAX} turns there is still something to do");
    }
}
