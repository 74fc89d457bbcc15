//! The operations of a service, in each callback and during setup.
//!
//! Each concern has its own file: [`listen`], [`connect`], [`stream`] (write, pause, close), [`adopt`] (sockets from
//! outside, and detaching them), [`batch`] (operations that go to the kernel together), [`sweep`] (visiting all
//! connections), [`time`] and [`watch`] (any other descriptor).

mod adopt;
mod batch;
mod connect;
#[cfg(any(test, fuzzing))]
mod invariants;
mod linger;
mod listen;
mod room;
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

use linger::Lingering;
use listen::{AcceptBackoff, AcceptedBy, Listener};
use room::RoomWaiters;
use sweep::Sweep;
use time::Timer;
use watch::Watch;

pub(crate) use batch::receives;
pub(crate) use stream::Received;
pub use sweep::SweepId;
pub(crate) use time::Due;

/// The operations of a reactor, for its service; `C` is the state of one connection.
pub struct Context<C> {
    config: Config,
    poller: Poller,
    connections: Slab<ConnHeader, C>,
    listeners: Slab<Listener, ()>,
    /// Timers of the service and tagged timeouts.
    timers: Slab<Timer, ()>,
    /// The tagged timeouts of connections, by token and tag.
    tagged: BTreeMap<(Token, u64), TimerId>,
    watches: Slab<Watch, ()>,
    /// The first one is in progress, the others are pending.
    sweeps: VecDeque<Sweep>,
    sweep_next: NonZeroU64,
    /// Connections with a deferred call.
    deferred: VecDeque<Token>,
    wheel: Wheel,
    queues: Vec<WriteQueue>,
    /// The connection of each queue; `None` for a free one.
    queue_owners: Vec<Option<Token>>,
    queues_free: Vec<u32>,
    /// The timer that retries queues, armed while a queue exists, and the queue that was retried last.
    retry: Option<NodeId>,
    retry_next: usize,
    room_waiters: RoomWaiters,
    lingering: Lingering,
    sockets: Sockets,
    /// The batched writes of this turn; used only with registered files.
    sends: SendBatch,
    /// A turn is running; it flushes the batches at its end.
    in_turn: bool,
    /// Connections whose sockets are to move from descriptors to registered files.
    moving: Vec<Token>,
    /// Their descriptors during the move; empty otherwise.
    moving_descriptors: Vec<(u32, Descriptor)>,
    /// Adopted connections, to be opened in the next turn.
    adopted: VecDeque<Token>,
    /// Connections to be served again without a report by epoll.
    listed: VecDeque<Token>,
    /// Bytes that were received before their connection's reads were paused.
    held: Vec<(Token, Box<[u8]>)>,
    /// Detached connections, to be removed when the batch of receives has been delivered.
    detached: Vec<(Token, Descriptor)>,
    /// A batch of receives is being delivered.
    delivering: bool,
    /// The connection whose `on_close` is running, its socket, which is closed when that returns, and whether to reset
    /// it.
    leaving: Option<(Token, Socket, bool)>,
    /// Connections to be removed as soon as no callback is running.
    closed: VecDeque<(Token, CloseReason)>,
    /// Listeners that epoll has reported in this turn; empty between turns.
    ready_listeners: Vec<ListenerId>,
    /// Listeners that stop listening when their backlog is empty.
    draining: Vec<ListenerId>,
    accepted_by: AcceptedBy,
    /// Consecutive turns without accepting, because connections that may have ended could free slots.
    turns_without_room: usize,
    /// Maximum number of accepted connections; the other slots are reserved for connects.
    accepts_max: usize,
    /// Connections that were not accepted.
    outbound: usize,
    throttled: AcceptBackoff,
    /// Connections that were removed since throttled listeners were last resumed.
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

/// One per connection and per timer of the service, and one each for the pause of throttled listeners, the grace period of a
/// shutdown, the retry of queues, and the check of lingering connections.
fn timers_in_wheel_max(config: &Config) -> usize {
    config.connections_max.saturating_add(config.timers_max).saturating_add(4)
}

/// Slots are reserved at the start, so with a large state the default bound can exceed the address space.
fn lacks_address_space<C>(connections_max: usize) -> Error {
    let bytes_each = slot_bytes::<ConnHeader, C>();
    Error::NoAddressSpace { connections_max, bytes_each }
}

/// The progress of a shutdown.
#[derive(Debug)]
struct Shutdown {
    /// The connections in the slots before this one have been notified.
    notified: usize,
    /// The grace period has passed.
    hard: bool,
    /// The timer of the grace period, until it has passed.
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
            room_waiters: RoomWaiters::default(),
            lingering: Lingering::default(),
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

    /// Returns the time at which this turn began, or at which [`Reactor::context`](crate::Reactor::context) was called.
    /// The clock is read once per turn, for all callbacks, and timeouts count from this time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Returns a copy of the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        // The reactor's own timers are not counted.
        let own = usize::from(self.retry.is_some()) + usize::from(self.lingering.has_check());
        let timers_armed = self.wheel.len() - own;
        Stats { timers_armed, ..self.stats.clone() }
    }

    /// Resets [`Stats::turn_longest`] and [`Stats::callback_longest`], to measure the next period. A running turn counts
    /// for the next period.
    pub fn reset_lag(&mut self) {
        self.stats.turn_longest = Duration::ZERO;
        self.stats.callback_longest = None;
    }

    /// Returns the number of connections, including those that are still connecting or flushing.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Returns the configuration of this reactor.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns where connections' sockets are held: [`FileTable::Process`] or [`FileTable::Registered`], also if
    /// [`FileTable::Auto`] was configured.
    #[must_use]
    pub fn file_table(&self) -> FileTable {
        if self.sockets.has_tables() { FileTable::Registered } else { FileTable::Process }
    }

    /// Returns the state of a connection; `None` if the token is stale, and for the connection of the running callback,
    /// whose state is lent to that callback.
    #[must_use]
    pub fn conn(&self, token: Token) -> Option<&C> {
        self.connections.body(token.key())
    }

    /// Returns the state of a connection mutably; `None` as for [`conn`](Self::conn). The context can't be used while
    /// the state is borrowed.
    #[must_use]
    pub fn conn_mut(&mut self, token: Token) -> Option<&mut C> {
        self.connections.body_mut(token.key())
    }

    /// Returns whether the token still identifies a connection.
    #[must_use]
    pub fn holds(&self, token: Token) -> bool {
        self.connections.head(token.key()).is_some()
    }

    /// Returns the connections in a range of slots, up to [`slots`](Self::slots), including those that are still
    /// connecting. To visit all connections without delaying events, use [`sweep`](Self::sweep).
    pub fn tokens(&self, slots: Range<usize>) -> impl Iterator<Item = Token> + '_ {
        self.connections.keys(slots.start, slots.end).map(Token::from)
    }

    /// Returns one past the index of the last slot that may hold a connection.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.connections.slots_used()
    }

    /// Returns the address of the peer (`getpeername`), also after the peer has closed, and in
    /// [`on_close`](crate::Handler::on_close) of this connection. Makes one system call, or three if the socket is a
    /// registered file.
    ///
    /// # Errors
    /// [`Error::Stale`], a system error (`ENOTCONN` if a connect has failed; `EMFILE` if the socket is a registered file
    /// and no descriptor is left), or [`Error::Invalid`] for a Unix-domain connection, which has no IP address.
    pub fn peer_addr(&self, token: Token) -> Result<SocketAddr, Error> {
        self.sockets.peer_addr(self.socket_of(token)?)
    }

    /// Returns the local address (`getsockname`), also in [`on_close`](crate::Handler::on_close) of this connection.
    /// Makes one system call, or three if the socket is a registered file.
    ///
    /// # Errors
    /// As for [`peer_addr`](Self::peer_addr).
    pub fn local_addr(&self, token: Token) -> Result<SocketAddr, Error> {
        self.sockets.local_addr(self.socket_of(token)?)
    }

    /// The socket of a connection, or of the connection whose `on_close` is running.
    fn socket_of(&self, token: Token) -> Result<&Socket, Error> {
        match (self.header(token), &self.leaving) {
            (Some(header), _) => Ok(&header.socket),
            (None, Some((leaving, socket, _))) if *leaving == token => Ok(socket),
            _ => Err(Error::Stale),
        }
    }

    /// Returns a handle that wakes this reactor from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Receives these signals from now on: each results in a call of [`on_signal`](crate::Handler::on_signal).
    ///
    /// The signals are blocked in the calling thread (`pthread_sigmask`, then `signalfd`). Call this before starting
    /// other threads, which inherit the mask. The signals stay blocked after the reactor is dropped: otherwise a second
    /// Ctrl-C during a shutdown would end the process before its cleanup is complete, and the masks of the other
    /// threads could not be restored. A child process that is started later also inherits the mask, and does not
    /// receive these signals unless it unblocks them.
    ///
    /// # Errors
    /// A system error, or [`Error::Invalid`] if signals are already watched.
    pub fn watch_signals(&mut self, signals: &[Signal]) -> Result<(), Error> {
        if self.signals.is_some() {
            return Err(Error::Invalid("signals are already watched"));
        }
        let data = EventSource::Inner(Inner::Signal).to_bits();
        self.signals = Some(SignalReader::watched(signals, &self.poller, data)?);
        Ok(())
    }

    /// Makes `run` return after this turn. Connections stay open; `run` may be called again.
    pub fn stop(&mut self) {
        self.stop = true;
    }

    /// Removes all listeners, ends every connection, and makes `run` return when no connection is left.
    /// [`on_shutdown`](crate::Handler::on_shutdown) is called for each connection; by default it closes the connection
    /// once its queue has been sent. Connections that have not ended within `grace` are reset. A second call can only
    /// shorten the grace period.
    ///
    /// From this call on, [`connect`](Self::connect), [`adopt`](Self::adopt), [`listen`](Self::listen) and
    /// [`adopt_listener`](Self::adopt_listener) are refused. Reads, writes, timers, deferred calls, watches and sweeps
    /// go on until `run` returns. `on_shutdown` can be called before a sweep in progress reaches the connection: to
    /// complete a broadcast, call `shutdown` in [`on_swept`](crate::Handler::on_swept).
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

    /// Returns whether a [`shutdown`](Self::shutdown) is in progress.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutdown.is_some()
    }

    // Used by the reactor's loop.

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

    /// Whether there is work that no event or timer reports.
    pub(crate) fn wants_turn(&self) -> bool {
        !self.listed.is_empty()
            || !self.adopted.is_empty()
            || !self.deferred.is_empty()
            || self.has_closed()
            || self.has_freed()
            || self.is_draining()
            || self.has_more_to_notify()
            || self.has_room_for_waiters()
            || self.has_sweeps()
            || self.wants_stop()
    }

    /// Counts the time since the end of the wait, when this turn read the clock.
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

    /// During a shutdown, nothing may start that would keep it from completing.
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

    /// The same; clears a stop, and a shutdown that is complete.
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

    /// Whether the connection has completed its connect and has no queued output.
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

    /// The grace period of the shutdown has passed: the remaining connections will be reset.
    pub(crate) fn harden_shutdown(&mut self) {
        if let Some(shutdown) = &mut self.shutdown {
            *shutdown = Shutdown { notified: 0, hard: true, grace: None, ..*shutdown };
        }
    }

    /// Whether a shutdown still has connections to notify.
    pub(crate) fn has_more_to_notify(&self) -> bool {
        self.shutdown
            .as_ref()
            .is_some_and(|shutdown| shutdown.notified < self.connections.slots_used())
    }

    /// The slots whose connections are to be notified of a shutdown in this turn, and whether its grace period has
    /// passed.
    pub(crate) fn next_notified(&mut self) -> Option<(Range<usize>, bool)> {
        let shutdown = self.shutdown.as_mut()?;
        let end = shutdown.notified.saturating_add(self.config.closes_per_turn.max(1));
        let slots = shutdown.notified..end;
        shutdown.notified = end;
        Some((slots, shutdown.hard))
    }
}

/// Formats a summary, without the connections.
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

/// Sets the requested options, with one system call each.
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
