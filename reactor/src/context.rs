//! What a service works with, in every callback and while it is set up.
//!
//! The parts that belong to one concern each stand in files of their own: [`listen`], [`connect`], [`stream`] (write,
//! pause, close), [`adopt`] (sockets from elsewhere, and to there), [`batch`] (what goes to the kernel together), [`sweep`] (visiting all connections), [`time`] and
//! [`watch`] (any other descriptor).

mod adopt;
mod batch;
mod connect;
#[cfg(any(test, fuzzing))]
mod invariants;
mod listen;
mod stream;
mod sweep;
mod time;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::config::{Config, FileTable, TcpOptions};
use crate::connection::{ConnHeader, Flags};
use crate::error::{CloseReason, Error};
use crate::queue::WriteQueue;
use crate::signal::Signal;
use crate::slab::{Slab, slot_bytes};
use crate::stats::Stats;
use crate::sys::{self, Descriptor, Poller, SendBatch, SignalReader, Socket, Sockets};
use crate::token::{EventSource, Inner, ListenerId, TimerId, Token};
use crate::waker::Waker;
use crate::wheel::{NodeId, Tick, Wheel};

use listen::{AcceptBackoff, AcceptedBy, Listener};
use sweep::Sweep;
use time::Timer;
use watch::Watch;

pub(crate) use batch::receives;
pub(crate) use stream::Received;
pub use sweep::SweepId;
pub(crate) use time::Due;

/// Everything a reactor offers to its service; `C` is the state of one connection.
pub struct Context<C> {
    config: Config,
    poller: Poller,
    connections: Slab<ConnHeader, C>,
    listeners: Slab<Listener, ()>,
    /// Free timers and tagged timeouts.
    timers: Slab<Timer, ()>,
    /// The tagged timeouts of connections, by name and tag.
    tagged: BTreeMap<(Token, u64), TimerId>,
    watches: Slab<Watch, ()>,
    /// The first one is under way, the others wait for it.
    sweeps: VecDeque<Sweep>,
    sweep_next: NonZeroU64,
    /// Connections with a call that waits for the end of the events.
    deferred: VecDeque<Token>,
    wheel: Wheel,
    queues: Vec<WriteQueue>,
    /// The connection of each queue; `None` for a free one.
    queue_owners: Vec<Option<Token>>,
    queues_free: Vec<u32>,
    /// When queues are tried again, while there is one, and the queue that was tried last.
    retry: Option<NodeId>,
    retry_next: usize,
    sockets: Sockets,
    /// What callbacks have written in this turn, where it goes to the kernel together.
    sends: SendBatch,
    /// A turn is under way, which flushes what is batched.
    in_turn: bool,
    /// Connections whose sockets are to move from descriptors to registered files.
    moving: Vec<Token>,
    /// Of those, while they move; empty in between.
    moving_descriptors: Vec<(u32, Descriptor)>,
    /// Connections whose sockets came from elsewhere, to be opened in the next turn.
    adopted: VecDeque<Token>,
    /// Connections to be served again though epoll reports nothing.
    listed: VecDeque<Token>,
    /// Bytes that were received before their connection's reads were paused.
    held: Vec<(Token, Box<[u8]>)>,
    /// Connections whose sockets were taken out, to be removed when what was received together has been delivered.
    detached: Vec<(Token, Descriptor)>,
    /// What was received together is being delivered.
    delivering: bool,
    /// The connection that `on_close` is about, whose socket is closed when that returns, and whether with a reset.
    leaving: Option<(Token, Socket, bool)>,
    /// Connections to be removed as soon as no callback runs.
    closed: VecDeque<(Token, CloseReason)>,
    /// Listeners that epoll has reported in this turn; empty in between.
    ready_listeners: Vec<ListenerId>,
    /// Listeners that stop listening when their backlog is empty.
    draining: Vec<ListenerId>,
    accepted_by: AcceptedBy,
    /// Turns in a row in which they were not accepted from because ended connections may have been about to make room.
    turns_without_room: usize,
    /// Accepted connections that may be held at once; the slots of the others are reserved for connects.
    accepts_max: usize,
    /// Connections that were not accepted.
    outbound: usize,
    throttled: AcceptBackoff,
    /// Connections that have gone since throttled listeners were last looked at.
    freed: usize,
    spare: Option<Descriptor>,
    waker: Waker,
    signals: Option<SignalReader>,
    started: Instant,
    now: Instant,
    /// From `started` to `now`.
    elapsed: Duration,
    stats: Stats,
    stop: bool,
    shutdown: Option<Shutdown>,
}

/// Each connection and free timer can have one in the wheel, the pause of throttled listeners, the grace of a shutdown, and
/// the queues that are tried again.
fn timers_in_wheel_max(config: &Config) -> usize {
    config.connections_max.saturating_add(config.timers_max).saturating_add(3)
}

/// Slots are reserved at the start, so a large state and the default bound can be too much.
fn lacks_address_space<C>(connections_max: usize) -> Error {
    let bytes_each = slot_bytes::<ConnHeader, C>();
    Error::NoAddressSpace { connections_max, bytes_each }
}

/// How far a shutdown has come.
#[derive(Debug)]
struct Shutdown {
    /// The slots before this one have been notified.
    notified: usize,
    /// The grace has passed.
    hard: bool,
    /// The end of the grace, while it has not passed.
    grace: Option<NodeId>,
    deadline: Tick,
}

impl<C> Context<C> {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let no_memory = |_| {
            Error::Invalid("there is no address space for that many listeners, timers or watches")
        };
        let poller = Poller::new()?;
        let waker = Waker::watched(&poller, EventSource::Inner(Inner::Wake).to_bits())?;
        let sockets =
            Sockets::new(config.file_table, config.connections_max, config.listeners_max)?;
        let sends = if sockets.has_tables() { batch::sends() } else { SendBatch::default() };
        let now = poller.now();
        let connections = Slab::with_capacity(config.connections_max)
            .map_err(|_| lacks_address_space::<C>(config.connections_max))?;
        Ok(Self {
            poller,
            accepts_max: connections.capacity().saturating_sub(config.connects_reserved),
            connections,
            listeners: Slab::with_capacity(config.listeners_max).map_err(no_memory)?,
            timers: Slab::with_capacity(config.timers_max).map_err(no_memory)?,
            tagged: BTreeMap::new(),
            watches: Slab::with_capacity(config.watches_max).map_err(no_memory)?,
            sweeps: VecDeque::new(),
            sweep_next: NonZeroU64::MIN,
            deferred: VecDeque::new(),
            wheel: Wheel::with_capacity(timers_in_wheel_max(config)).map_err(no_memory)?,
            queues: Vec::new(),
            queue_owners: Vec::new(),
            queues_free: Vec::new(),
            retry: None,
            retry_next: 0,
            sockets,
            sends,
            in_turn: false,
            moving: Vec::with_capacity(batch::MOVING_MAX),
            moving_descriptors: Vec::with_capacity(batch::MOVING_MAX),
            adopted: VecDeque::new(),
            listed: VecDeque::new(),
            held: Vec::new(),
            detached: Vec::new(),
            delivering: false,
            leaving: None,
            closed: VecDeque::new(),
            ready_listeners: Vec::new(),
            draining: Vec::new(),
            accepted_by: AcceptedBy::default(),
            turns_without_room: 0,
            outbound: 0,
            throttled: AcceptBackoff::default(),
            freed: 0,
            spare: Some(sys::spare()?),
            waker,
            signals: None,
            started: now,
            now,
            elapsed: Duration::ZERO,
            stats: Stats::default(),
            stop: false,
            shutdown: None,
            config: config.clone(),
        })
    }

    /// The time at which this turn began, or at which [`Reactor::context`](crate::Reactor::context) was called: one
    /// reading of the clock serves all callbacks of a turn, and timeouts count from it.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// What has been counted so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        // Trying queues again is the reactor's own affair.
        let timers_armed = self.wheel.len() - usize::from(self.retry.is_some());
        Stats { timers_armed, ..self.stats.clone() }
    }

    /// How many connections are held, those included that are still connecting or flushing.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The bounds it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where connections' sockets are held: [`FileTable::Process`] or [`FileTable::Registered`], whatever was asked for.
    #[must_use]
    pub fn file_table(&self) -> FileTable {
        if self.sockets.has_tables() { FileTable::Registered } else { FileTable::Process }
    }

    /// The state of a connection; `None` for a stale token, and for the one that the running callback is about (its
    /// state is lent to the callback).
    #[must_use]
    pub fn conn(&self, token: Token) -> Option<&C> {
        self.connections.body(token.key())
    }

    /// The same, to be changed.
    #[must_use]
    pub fn conn_mut(&mut self, token: Token) -> Option<&mut C> {
        self.connections.body_mut(token.key())
    }

    /// Whether the token still names a connection.
    #[must_use]
    pub fn holds(&self, token: Token) -> bool {
        self.connections.head(token.key()).is_some()
    }

    /// The connections in a range of slots, up to [`slots`](Self::slots). Those that are still connecting are among
    /// them. To visit all connections without keeping the sockets waiting, [`sweep`](Self::sweep).
    pub fn tokens(&self, slots: Range<usize>) -> impl Iterator<Item = Token> + '_ {
        self.connections.keys(slots.start, slots.end).map(Token::from)
    }

    /// One past the last slot that may hold a connection.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.connections.slots_used()
    }

    /// The address of the peer, also when that has gone, and in [`on_close`](crate::Handler::on_close) of this
    /// connection. Costs one system call; three where the socket is a registered file.
    ///
    /// # Errors
    /// [`Error::Stale`], the system's refusal (`ENOTCONN` where a connect has not worked), or [`Error::Invalid`] for a
    /// Unix-domain connection, which has no IP address.
    pub fn peer_addr(&self, token: Token) -> Result<SocketAddr, Error> {
        self.sockets.peer_addr(self.socket_of(token)?)
    }

    /// The address of this side, likewise. Costs one system call; three where the socket is a registered file.
    ///
    /// # Errors
    /// [`Error::Stale`], the system's refusal, or [`Error::Invalid`] for a Unix-domain connection.
    pub fn local_addr(&self, token: Token) -> Result<SocketAddr, Error> {
        self.sockets.local_addr(self.socket_of(token)?)
    }

    /// The socket of a connection, or of the one that `on_close` is about.
    fn socket_of(&self, token: Token) -> Result<&Socket, Error> {
        match (self.header(token), &self.leaving) {
            (Some(header), _) => Ok(&header.socket),
            (None, Some((leaving, socket, _))) if *leaving == token => Ok(socket),
            _ => Err(Error::Stale),
        }
    }

    /// A handle that wakes this reactor from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Takes delivery of these signals: from now on each calls [`on_signal`](crate::Handler::on_signal).
    ///
    /// They are blocked in the calling thread (`pthread_sigmask`, then `signalfd`); call it before starting other
    /// threads, which inherit that. They stay blocked when the reactor is gone: a second Ctrl-C that came while it shut
    /// down would otherwise end the process in the middle of what it does last, and the threads that have inherited the
    /// mask could not be given theirs back. A child process that is started later inherits the mask too, and does not
    /// receive these signals unless it unblocks them.
    ///
    /// # Errors
    /// The system's refusal, or [`Error::Invalid`] when signals are watched already.
    pub fn watch_signals(&mut self, signals: &[Signal]) -> Result<(), Error> {
        if self.signals.is_some() {
            return Err(Error::Invalid("signals are watched already"));
        }
        let data = EventSource::Inner(Inner::Signal).to_bits();
        self.signals = Some(SignalReader::watched(signals, &self.poller, data)?);
        Ok(())
    }

    /// Makes `run` return after this turn. Connections stay as they are; `run` may be called again.
    pub fn stop(&mut self) {
        self.stop = true;
    }

    /// Lets go of all listeners, ends every connection, and makes `run` return when none is left.
    /// [`on_shutdown`](crate::Handler::on_shutdown) follows for each, which by default closes it once its queue has been
    /// handed over. What has not ended within `grace` is reset. Called again, it can only shorten the grace.
    pub fn shutdown(&mut self, grace: Duration) {
        let deadline = self.tick_after(grace);
        if let Some(shutdown) = &mut self.shutdown {
            if let Some(end) = shutdown.grace
                && deadline < shutdown.deadline
            {
                shutdown.deadline = deadline;
                self.wheel.set_deadline(end, deadline);
            }
            return;
        }
        let listeners: Vec<_> = self.listeners().collect();
        for listener in listeners {
            self.unlisten(listener);
        }
        let grace = self.wheel.insert(deadline, EventSource::Inner(Inner::Grace).to_bits());
        self.shutdown = Some(Shutdown { notified: 0, hard: false, grace: Some(grace), deadline });
    }

    /// Whether [`shutdown`](Self::shutdown) was called.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutdown.is_some()
    }

    // What the reactor's loop needs of it.

    pub(crate) fn poller(&self) -> &Poller {
        &self.poller
    }

    pub(crate) fn stats_mut(&mut self) -> &mut Stats {
        &mut self.stats
    }

    pub(crate) fn read_clock(&mut self) {
        self.now = self.poller.now();
        self.elapsed = self.now.duration_since(self.started);
    }

    /// Whether there is something to do that no event and no timer reports.
    pub(crate) fn wants_turn(&self) -> bool {
        !self.listed.is_empty()
            || !self.adopted.is_empty()
            || !self.deferred.is_empty()
            || self.has_closed()
            || self.has_freed()
            || self.is_draining()
            || self.has_more_to_notify()
            || self.has_sweeps()
            || self.wants_stop()
    }

    /// Counts the time from the end of the wait, of which a turn has read the clock.
    pub(crate) fn end_turn(&mut self) {
        let turn = self.poller.now().duration_since(self.now);
        self.stats.busy += turn;
        self.stats.turn_longest = self.stats.turn_longest.max(turn);
    }

    pub(crate) fn end_wait(&mut self) {
        self.read_clock();
        self.stats.wakeups += 1;
    }

    pub(crate) fn set_in_turn(&mut self, in_turn: bool) {
        self.in_turn = in_turn;
    }

    pub(crate) fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// Nothing new may start that would keep a shutdown from its end.
    fn refuse_while_shutting_down(&self) -> Result<(), Error> {
        match self.shutdown {
            Some(_) => Err(Error::Invalid("the reactor is shutting down")),
            None => Ok(()),
        }
    }

    /// Whether `run` is to return.
    pub(crate) fn wants_stop(&self) -> bool {
        self.stop || (self.is_shutting_down() && self.connections.len() == 0)
    }

    /// The same; a stop, and a shutdown that is complete, are used up by asking.
    pub(crate) fn take_stop(&mut self) -> bool {
        if self.connections.len() == 0
            && let Some(shutdown) = self.shutdown.take()
        {
            if let Some(grace) = shutdown.grace {
                self.wheel.remove(grace);
            }
            self.stop = true;
        }
        std::mem::take(&mut self.stop)
    }

    pub(crate) fn acknowledge_wake(&self) -> bool {
        self.waker.acknowledge()
    }

    pub(crate) fn next_signal(&self) -> Option<Signal> {
        self.signals.as_ref()?.read()
    }

    pub(crate) fn header(&self, token: Token) -> Option<&ConnHeader> {
        self.connections.head(token.key())
    }

    /// Whether nothing waits to be sent, nor a connect to be decided.
    #[inline]
    pub(crate) fn is_idle(&self, token: Token) -> bool {
        self.header(token)
            .is_some_and(|header| !header.flags.any(Flags::CONNECTING | Flags::QUEUED))
    }

    pub(crate) fn header_mut(&mut self, token: Token) -> Option<&mut ConnHeader> {
        self.connections.head_mut(token.key())
    }

    pub(crate) fn lend(&mut self, token: Token) -> Option<C> {
        self.connections.lend(token.key()).map(|(_, conn)| conn)
    }

    pub(crate) fn give_back(&mut self, token: Token, conn: C) {
        self.connections.give_back(token.key(), conn);
    }

    /// The grace of the shutdown has passed: everything that is left will be reset.
    pub(crate) fn harden_shutdown(&mut self) {
        if let Some(shutdown) = &mut self.shutdown {
            *shutdown = Shutdown { notified: 0, hard: true, grace: None, ..*shutdown };
        }
    }

    /// Whether a shutdown has still connections to notify.
    pub(crate) fn has_more_to_notify(&self) -> bool {
        self.shutdown
            .as_ref()
            .is_some_and(|shutdown| shutdown.notified < self.connections.slots_used())
    }

    /// The slots whose connections are to be notified of a shutdown in this turn, and whether its grace has passed.
    pub(crate) fn next_notified(&mut self) -> Option<(Range<usize>, bool)> {
        let shutdown = self.shutdown.as_mut()?;
        let end = shutdown.notified.saturating_add(self.config.closes_per_turn.max(1));
        let slots = shutdown.notified..end;
        shutdown.notified = end;
        Some((slots, shutdown.hard))
    }
}

/// A summary, without the connections.
impl<C> fmt::Debug for Context<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("connections", &self.connections.len())
            .field("listeners", &self.listeners.len())
            .field("watches", &self.watches.len())
            .field("sweeps", &self.sweeps.len())
            .field("shutting_down", &self.is_shutting_down())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// Sets what is asked for, at a system call for each.
fn set_tcp_options(socket: &Descriptor, options: &TcpOptions) -> Result<(), Error> {
    if options.nodelay {
        sys::set_nodelay(socket)?;
    }
    if let Some(keepalive) = &options.keepalive {
        sys::set_keepalive(socket, keepalive)?;
    }
    if let Some(timeout) = options.user_timeout {
        sys::set_user_timeout(socket, timeout)?;
    }
    if let Some(bytes) = options.send_buffer_bytes {
        sys::set_send_buffer(socket, bytes)?;
    }
    if let Some(bytes) = options.receive_buffer_bytes {
        sys::set_receive_buffer(socket, bytes)?;
    }
    if let Some(bytes) = options.notsent_lowat_bytes {
        sys::set_notsent_lowat(socket, bytes)?;
    }
    Ok(())
}
