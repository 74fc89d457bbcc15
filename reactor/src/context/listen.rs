//! Listening, and throttling listeners when resources for accepting have run out.
//!
//! A listener for which there is no descriptor, memory, epoll watch or slot is throttled: it is removed from epoll's
//! interest list, so that the loop does not spin, and resumes when a connection has closed or when the pause has
//! passed. All throttled listeners share one pause, which doubles each time: a resource that has run out has run out
//! for all of them, and a hundred listeners that retry one by one would cause a hundred wake-ups.

use std::collections::VecDeque;
use std::mem;
use std::net::SocketAddr;
use std::time::Duration;

use crate::address::Address;
use crate::config::{Config, ListenOptions};
use crate::connection::Flags;
use crate::context::connect::input_flags;
use crate::context::{Context, set_tcp_options};
use crate::error::{Error, Refused};
use crate::sys::{self, Accepted, Descriptor, Readiness};
use crate::token::{EventSource, Inner, ListenerId, Token};
use crate::wheel::NodeId;

/// A lower bound for the configured pause: the resolution of the wheel.
const PAUSE_MIN: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(super) struct Listener {
    socket: Descriptor,
    /// Registered with epoll. A listener that is being drained is not: it is accepted from in each turn.
    watched: bool,
    /// The initial flags of its connections.
    conn_flags: Flags,
    /// Paused by the service.
    paused: bool,
    /// Paused because a resource has run out.
    throttled: bool,
    /// Paused because it is at its own bound.
    full: bool,
    connections_max: Option<usize>,
    /// Its open connections; counted only if it has a bound.
    connections: usize,
}

impl Listener {
    fn is_accepting(&self) -> bool {
        !self.paused && !self.throttled && !self.full
    }

    fn interest(&self) -> Readiness {
        if self.is_accepting() { Readiness::READABLE } else { Readiness::NONE }
    }

    /// Returns an error if the listener is at its own bound.
    fn lacks_place(&self) -> Option<Error> {
        let limit = self.connections_max?;
        let what = "connections of the listener";
        (self.connections >= limit).then_some(Error::Full { what, limit })
    }

    pub(super) fn socket(&self) -> &Descriptor {
        &self.socket
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_throttled(&self) -> bool {
        self.throttled
    }
}

/// The listener of each connection, by slot; empty if no listener has a bound of its own.
#[derive(Debug, Default)]
pub(super) struct AcceptedBy(Vec<Option<ListenerId>>);

impl AcceptedBy {
    /// Reserves address space for all slots, so that growing copies nothing.
    fn reserve(&mut self, slots: usize) -> Result<(), Error> {
        let no_memory = |_| {
            Error::Invalid("there is no address space to count the connections of each listener")
        };
        self.0.try_reserve_exact(slots.saturating_sub(self.0.len())).map_err(no_memory)
    }

    fn set(&mut self, slot: usize, listener: ListenerId) {
        if slot >= self.0.len() {
            self.0.resize(slot + 1, None);
        }
        self.0[slot] = Some(listener);
    }

    #[cfg(any(test, fuzzing))]
    fn count(&self, listener: ListenerId) -> usize {
        self.0.iter().filter(|from| **from == Some(listener)).count()
    }

    #[inline]
    fn take(&mut self, slot: usize) -> Option<ListenerId> {
        self.0.get_mut(slot)?.take()
    }
}

/// The throttled listeners, which wait for descriptors, memory or slots, and the pause that they share.
#[derive(Debug, Default)]
pub(super) struct AcceptBackoff {
    /// In the order in which they were throttled.
    waiting: VecDeque<ListenerId>,
    /// The timer of the pause; armed while a listener is throttled.
    pause: Option<NodeId>,
    /// The length of the next pause; `None` for the first one.
    pause_next: Option<Duration>,
}

impl AcceptBackoff {
    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn has_pause(&self) -> bool {
        self.pause.is_some()
    }
}

impl<C> Context<C> {
    /// Listens on an address. With port 0 the kernel chooses a port, which
    /// [`listener_addr`](Self::listener_addr) returns. `SO_REUSEADDR` is set, so that a restarted service can use a port
    /// with connections in TIME_WAIT.
    ///
    /// The file of a Unix-domain listener belongs to the caller: the reactor does not remove it, neither before
    /// listening nor when the listener is removed. A file that an earlier process has left causes `EADDRINUSE`; try to
    /// connect first, and remove the file if the connect is refused. The permissions of the file determine who may
    /// connect.
    ///
    /// # Errors
    /// A system error: the address is in use (`EADDRINUSE`) or not of this machine (`EADDRNOTAVAIL`), the port is
    /// privileged (`EACCES`), or the path is too long (`ENAMETOOLONG`); [`Error::Full`] at
    /// [`Config::listeners_max`](crate::Config::listeners_max); [`Error::Invalid`] during a
    /// [`shutdown`](Self::shutdown).
    pub fn listen(
        &mut self,
        address: impl Into<Address>,
        options: &ListenOptions,
    ) -> Result<ListenerId, Error> {
        let address = address.into();
        self.refuse_while_shutting_down()?;
        self.lacks_listener()?;
        let socket = self.sockets.bound(&address, options.reuse_port, options.only_v6)?;
        if address.is_tcp() {
            set_tcp_options(&socket, &options.tcp())?;
        }
        sys::listen(&socket, options.backlog)?;
        Ok(self.insert_listener(socket, address.is_tcp(), options)?)
    }

    /// Returns an error if `listeners_max` is reached.
    pub(super) fn lacks_listener(&self) -> Result<(), Error> {
        let limit = self.listeners.capacity();
        if self.listeners.is_full() {
            return Err(Error::Full { what: "listeners", limit });
        }
        Ok(())
    }

    /// Gives a listener a slot and registers it with epoll.
    pub(super) fn insert_listener(
        &mut self,
        socket: Descriptor,
        is_tcp: bool,
        options: &ListenOptions,
    ) -> Result<ListenerId, Refused<Descriptor>> {
        if options.connections_max.is_some()
            && let Err(error) = self.accepted_by.reserve(self.connections.capacity())
        {
            return Err(Refused { error, given: socket });
        }
        let listener = Listener {
            socket,
            watched: false,
            conn_flags: input_flags(is_tcp),
            paused: false,
            throttled: false,
            full: options.connections_max == Some(0),
            connections_max: options.connections_max,
            connections: 0,
        };
        let inserted = self.listeners.insert(listener, ()).map_err(|(listener, ())| Refused {
            error: Error::Full { what: "listeners", limit: self.listeners.capacity() },
            given: listener.socket,
        });
        let id = ListenerId::from(inserted?);
        let added = self.with_listener(id, |cx, listener| {
            let data = EventSource::Listener(id).to_bits();
            cx.poller.add(&listener.socket, listener.interest(), data)
        });
        if let Some(Err(error)) = added {
            let given = self.remove_listener(id).expect("it was inserted");
            return Err(Refused { error, given });
        }
        if let Some(listener) = self.listeners.head_mut(id.key()) {
            listener.watched = true;
        }
        Ok(id)
    }

    /// The socket of a listener.
    #[cfg(all(feature = "testing", not(any(test, fuzzing))))]
    pub(crate) fn listener_socket(&self, listener: ListenerId) -> Option<&Descriptor> {
        self.listeners.head(listener.key()).map(Listener::socket)
    }

    /// # Panics
    /// If the connections of a listener are counted wrongly, or a listener is held back below its bound.
    #[cfg(any(test, fuzzing))]
    pub(super) fn check_accepted(&self) {
        for id in self.listeners() {
            let Some(listener) = self.listeners.head(id.key()) else { continue };
            assert_eq!(listener.connections, self.accepted_by.count(id), "connections of {id:?}");
            let bound = listener.connections_max.unwrap_or(usize::MAX);
            assert!(listener.connections <= bound, "{id:?} has more than its bound");
            assert!(!listener.full || listener.connections == bound, "{id:?} is below its bound");
        }
    }

    /// Stops listening. The kernel resets connections that wait to be accepted, unless the socket is open elsewhere
    /// too, for example after [`adopt_listener`](Self::adopt_listener) of a duplicate. Does nothing if the id is stale.
    pub fn unlisten(&mut self, listener: ListenerId) {
        drop(self.remove_listener(listener));
    }

    pub(super) fn remove_listener(&mut self, listener: ListenerId) -> Option<Descriptor> {
        self.reset_backoff(listener);
        self.draining.retain(|&other| other != listener);
        self.unwatch_listener(listener);
        self.listeners.remove(listener.key()).map(|(listener, ())| listener.socket)
    }

    /// Removes a listener from epoll, which would continue to report it while its socket is open elsewhere.
    fn unwatch_listener(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.head_mut(id.key())
            && mem::replace(&mut listener.watched, false)
            && let Err(error) = self.poller.delete(&listener.socket)
        {
            log::debug!("{id:?} could not be removed from epoll: {error}");
        }
    }

    /// Accepts the connections in the listener's backlog, also if accepting is paused, and then stops listening. Use it
    /// to hand over to another process on the same port (`reuse_port`) without resetting peers in the backlog.
    /// [`on_listener_drained`](crate::Handler::on_listener_drained) is called once the listener is removed. If slots or
    /// descriptors run out meanwhile, draining continues when some are free. Does nothing if the id is stale.
    ///
    /// While peers arrive faster than they are accepted, the backlog does not become empty, and draining does not end.
    /// Call [`set_backlog`](Self::set_backlog) with `Some(0)` first: the kernel then drops further SYNs, and the peers
    /// repeat them.
    ///
    /// Peers whose handshake is in progress when the socket is closed are still reset: those that have not sent its
    /// last segment, and those whose handshake completes between the last accept and the close. With
    /// `net.ipv4.tcp_migrate_req` (Linux 5.14) the kernel moves both to another socket of the port. If the other
    /// process has the same socket ([`adopt_listener`](Self::adopt_listener)), none are lost and draining is not
    /// needed: [`unlisten`](Self::unlisten) leaves the backlog to that process.
    pub fn drain_listener(&mut self, listener: ListenerId) {
        let Some(head) = self.listeners.head_mut(listener.key()) else { return };
        head.paused = false;
        if !self.draining.contains(&listener) {
            self.draining.push(listener);
            // Now, to keep the time between the last accept and the close short.
            self.unwatch_listener(listener);
        }
    }

    /// Whether a listener is being drained and is not throttled.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.iter().any(|&listener| self.is_accepting(listener))
    }

    /// The listener's backlog is empty: if it is being drained, removes it and returns true.
    #[inline]
    pub(crate) fn end_draining(&mut self, listener: ListenerId) -> bool {
        !self.draining.is_empty() && self.end_if_drained(listener)
    }

    #[cold]
    fn end_if_drained(&mut self, listener: ListenerId) -> bool {
        let is_drained = self.draining.contains(&listener) && self.is_accepting(listener);
        if is_drained {
            self.unlisten(listener);
        }
        is_drained
    }

    /// Returns the address of a TCP listener (`getsockname`).
    ///
    /// # Errors
    /// [`Error::Stale`], a system error, or [`Error::Invalid`] for a Unix-domain listener.
    pub fn listener_addr(&self, listener: ListenerId) -> Result<SocketAddr, Error> {
        sys::local_addr(&self.listeners.head(listener.key()).ok_or(Error::Stale)?.socket)
    }

    /// Returns all listeners.
    pub fn listeners(&self) -> impl Iterator<Item = ListenerId> + '_ {
        self.listeners.keys(0, self.listeners.slots_used()).map(ListenerId::from)
    }

    /// Stops accepting on this listener until [`resume_accepts`](Self::resume_accepts); peers wait in its backlog.
    ///
    /// # Errors
    /// [`Error::Stale`], or a system error.
    pub fn pause_accepts(&mut self, listener: ListenerId) -> Result<(), Error> {
        self.set_accepts_paused(listener, true)
    }

    /// Accepts again after [`pause_accepts`](Self::pause_accepts).
    ///
    /// # Errors
    /// [`Error::Stale`], or a system error.
    pub fn resume_accepts(&mut self, listener: ListenerId) -> Result<(), Error> {
        self.set_accepts_paused(listener, false)
    }

    /// Changes the maximum number of connections that wait to be accepted; `None` sets the kernel's maximum.
    ///
    /// # Errors
    /// [`Error::Stale`], or a system error.
    pub fn set_backlog(&mut self, listener: ListenerId, backlog: Option<u32>) -> Result<(), Error> {
        sys::listen(&self.listeners.head(listener.key()).ok_or(Error::Stale)?.socket, backlog)
    }

    fn set_accepts_paused(&mut self, id: ListenerId, paused: bool) -> Result<(), Error> {
        self.listeners.head_mut(id.key()).ok_or(Error::Stale)?.paused = paused;
        self.sync_interest(id)
    }

    /// Sets the listener's interest in epoll.
    fn sync_interest(&mut self, id: ListenerId) -> Result<(), Error> {
        let synced = self.with_listener(id, |cx, listener| {
            if !listener.watched {
                return Ok(());
            }
            let data = EventSource::Listener(id).to_bits();
            cx.poller.modify(&listener.socket, listener.interest(), data)
        });
        synced.unwrap_or(Err(Error::Stale))
    }

    fn with_listener<T>(
        &self,
        id: ListenerId,
        act: impl FnOnce(&Self, &Listener) -> T,
    ) -> Option<T> {
        self.listeners.head(id.key()).map(|listener| act(self, listener))
    }

    /// Whether the listener exists and is neither paused, throttled nor at its bound.
    pub(crate) fn is_accepting(&self, id: ListenerId) -> bool {
        self.listeners.head(id.key()).is_some_and(Listener::is_accepting)
    }

    /// Sets the interest of a listener that was reported although it is not accepting: epoll may have refused the
    /// earlier change.
    pub(crate) fn disable(&mut self, id: ListenerId) {
        if let Err(Error::System { call, source }) = self.sync_interest(id) {
            log::warn!("a listener could not be paused: {call}: {source}");
        }
    }

    /// epoll has reported the listener: it is served when the connections of this turn have been served.
    pub(crate) fn accept_later(&mut self, id: ListenerId) {
        self.ready_listeners.push(id);
    }

    /// The listeners to accept from in this turn, if any, including those that are being drained. Give the list back
    /// afterwards, so that its memory is reused.
    pub(crate) fn take_ready_listeners(&mut self) -> Option<Vec<ListenerId>> {
        for index in 0..self.draining.len() {
            let listener = self.draining[index];
            if self.is_accepting(listener) && !self.ready_listeners.contains(&listener) {
                self.ready_listeners.push(listener);
            }
        }
        (!self.ready_listeners.is_empty()).then(|| mem::take(&mut self.ready_listeners))
    }

    pub(crate) fn give_back_listeners(&mut self, empty: Vec<ListenerId>) {
        self.ready_listeners = empty;
    }

    /// Whether every slot is taken and connections that may have ended are still to be served: epoll has more events,
    /// or some are listed. Listeners are not served then, and epoll reports them again, but only for the number of
    /// turns that it takes to serve each connection once.
    pub(crate) fn waits_for_room(&mut self, has_more_events: bool) -> bool {
        let turns_max = self.connections.capacity() / self.served_again_max() + 1;
        let waits = (has_more_events || !self.listed.is_empty())
            && self.lacks_slot_to_accept().is_some()
            && self.turns_without_room < turns_max;
        self.turns_without_room = if waits { self.turns_without_room + 1 } else { 0 };
        waits
    }

    /// Accepts one connection from the listener's backlog, unless the listener is paused or removed.
    pub(crate) fn accept(&self, id: ListenerId) -> Accepted {
        match self.listeners.head(id.key()) {
            Some(listener) if listener.is_accepting() => sys::accept(&listener.socket),
            _ => Accepted::Empty,
        }
    }

    /// The initial flags of a connection of this listener, and whether the listener has a bound of its own; `None` if
    /// it is not accepting.
    #[inline]
    pub(crate) fn terms_of(&self, id: ListenerId) -> Option<(Flags, bool)> {
        let listener = self.listeners.head(id.key()).filter(|listener| listener.is_accepting())?;
        Some((listener.conn_flags, listener.connections_max.is_some()))
    }

    /// Returns an error if the listener is at its own bound.
    pub(crate) fn lacks_place_at(&self, id: ListenerId) -> Option<Error> {
        self.listeners.head(id.key())?.lacks_place()
    }

    /// The listener is at its own bound, and a peer waits: epoll does not report it until one of its connections has
    /// closed.
    pub(crate) fn hold_back(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.head_mut(id.key()) {
            listener.full = true;
            self.stats.accept_pauses += 1;
            self.disable(id);
        }
    }

    /// Counts a connection for its listener.
    pub(crate) fn count_accepted(&mut self, id: ListenerId, token: Token) {
        if let Some(listener) = self.listeners.head_mut(id.key()) {
            listener.connections += 1;
            self.accepted_by.set(token.index(), id);
        }
    }

    /// A connection was removed: resumes its listener if that was at its own bound.
    #[inline]
    pub(super) fn release_place(&mut self, token: Token) {
        if let Some(id) = self.accepted_by.take(token.index()) {
            self.uncount_accepted(id);
        }
    }

    #[cold]
    fn uncount_accepted(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.head_mut(id.key()) else { return };
        listener.connections -= 1;
        if mem::replace(&mut listener.full, false)
            && let Err(error) = self.sync_interest(id)
        {
            log::warn!("a listener could not be resumed: {error}");
            self.throttle(id);
        }
    }

    /// Returns an error if every slot is taken.
    pub(crate) fn lacks_slot(&self) -> Option<Error> {
        let limit = self.connections.capacity();
        self.connections.is_full().then_some(Error::Full { what: "connections", limit })
    }

    /// Returns an error if there is no slot for another accepted connection, because all are taken or the free ones are
    /// reserved for connects.
    #[inline]
    pub(crate) fn lacks_slot_to_accept(&self) -> Option<Error> {
        let limit = self.accepts_max;
        if self.config.connects_reserved > 0 && self.accepted() >= limit {
            return Some(Error::Full { what: "accepted connections", limit });
        }
        self.lacks_slot()
    }

    /// How many of the connections were accepted.
    #[inline]
    pub(super) fn accepted(&self) -> usize {
        self.connections.len() - self.outbound
    }

    /// A resource for accepting has run out: throttles the listener.
    pub(crate) fn throttle(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.head_mut(id.key()) else { return };
        if mem::replace(&mut listener.throttled, true) {
            return;
        }
        self.throttled.waiting.push_back(id);
        self.begin_pause();
        self.stats.accept_pauses += 1;
        if let Err(error) = self.sync_interest(id) {
            log::warn!("a listener could not be paused: {error}");
        }
    }

    /// Begins a pause, unless one is in progress.
    fn begin_pause(&mut self) {
        if self.throttled.pause.is_some() {
            return;
        }
        let Config { accept_pause_min, accept_pause_max, .. } = self.config;
        let pause = self.throttled.pause_next.unwrap_or(accept_pause_min).max(PAUSE_MIN);
        let end = self.tick_after(pause);
        self.throttled.pause =
            Some(self.wheel.insert(end, EventSource::Inner(Inner::Pause).to_bits()));
        self.throttled.pause_next = Some(pause.saturating_mul(2).min(accept_pause_max));
    }

    /// The pause is over: all throttled listeners try again.
    pub(crate) fn end_pause(&mut self) {
        self.throttled.pause = None;
        for id in mem::take(&mut self.throttled.waiting) {
            self.resume_listener(id);
        }
    }

    /// An accept has succeeded. If no listener is throttled, the next pause is the shortest again. While one is
    /// throttled, the success may only have used a resource that one closed connection had freed.
    pub(crate) fn reset_pause(&mut self) {
        if self.throttled.waiting.is_empty() {
            self.throttled.pause_next = None;
        }
    }

    /// Whether a throttled listener is to be resumed.
    pub(crate) fn has_freed(&self) -> bool {
        self.freed > 0 && !self.throttled.waiting.is_empty()
    }

    /// Resumes one throttled listener per connection that was removed, the longest waiting first. Resumes none while
    /// there is no slot for another accepted connection, as when only connects were removed.
    pub(crate) fn resume_accepting(&mut self) {
        let freed = mem::take(&mut self.freed);
        if freed == 0 || self.lacks_slot_to_accept().is_some() {
            return;
        }
        for _ in 0..freed {
            let Some(&id) = self.throttled.waiting.front() else { return };
            self.reset_backoff(id);
            self.resume_listener(id);
        }
    }

    /// Removes a listener from the throttled ones; with the last one, the pause ends.
    fn reset_backoff(&mut self, id: ListenerId) {
        self.throttled.waiting.retain(|&other| other != id);
        if self.throttled.waiting.is_empty()
            && let Some(pause) = self.throttled.pause.take()
        {
            self.wheel.remove(pause);
        }
    }

    fn resume_listener(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.head_mut(id.key()) {
            listener.throttled = false;
        }
        self.restock_spare();
        if let Err(error) = self.sync_interest(id) {
            log::warn!("a listener could not be resumed: {error}");
            self.throttle(id);
        }
    }

    /// No descriptor is left: closes the spare one, to accept one connection and reset it. This is done once per
    /// pause, whatever the number of listeners: the other peers may still be accepted when descriptors are free again.
    pub(crate) fn drain_one(&mut self, id: ListenerId) {
        if self.throttled.pause.is_some() || self.spare.take().is_none() {
            return;
        }
        if let Accepted::Connection(socket) = self.accept(id) {
            self.drop_accepted(socket);
        }
        self.restock_spare();
    }

    /// Resets a connection that was accepted but can't be kept.
    pub(crate) fn drop_accepted(&mut self, socket: Descriptor) {
        self.stats.dropped += 1;
        reset(socket);
    }

    /// Resets a connection that the service does not want.
    pub(crate) fn refuse(&mut self, socket: Descriptor) {
        self.stats.refused += 1;
        reset(socket);
    }

    fn restock_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = sys::spare().ok();
        }
    }
}

fn reset(socket: Descriptor) {
    if let Err(error) = sys::reset_on_close(&socket) {
        log::debug!("a connection is closed without a reset: {error}");
    }
}
