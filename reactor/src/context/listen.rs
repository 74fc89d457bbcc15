//! Listening, and what happens when there is nothing left to accept with.
//!
//! A listener that finds no descriptor, memory, epoll watch or slot is throttled: it leaves epoll's interest, so that
//! nothing spins, and comes back when a connection has gone or when the pause has passed. All throttled listeners share one
//! pause, which doubles each time: what has run out has run out for all of them, and a hundred listeners that try again
//! one by one would be a hundred wake-ups.

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

/// Whatever is configured: the wheel goes by milliseconds.
const PAUSE_MIN: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(super) struct Listener {
    socket: Descriptor,
    /// epoll knows it; one that is drained is accepted from in each turn without a report.
    watched: bool,
    /// What its connections begin with.
    conn_flags: Flags,
    /// By the service.
    paused: bool,
    /// Because something has run out.
    throttled: bool,
    /// At its own bound.
    full: bool,
    connections_max: Option<usize>,
    /// Connections that it has, counted where there is a bound.
    connections: usize,
}

impl Listener {
    fn is_accepting(&self) -> bool {
        !self.paused && !self.throttled && !self.full
    }

    fn interest(&self) -> Readiness {
        if self.is_accepting() { Readiness::READABLE } else { Readiness::NONE }
    }

    /// Why it can't have another connection.
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

/// Which listener each connection came from, by slot; empty where no listener has a bound of its own.
#[derive(Debug, Default)]
pub(super) struct AcceptedBy(Vec<Option<ListenerId>>);

impl AcceptedBy {
    /// Reserves address space for all slots, so that no growth copies.
    fn reserve(&mut self, slots: usize) -> Result<(), Error> {
        let no_memory = |_| Error::Invalid("there is no address space for a bound of a listener");
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

/// The listeners that wait for descriptors, memory or slots, and the pause that they share.
#[derive(Debug, Default)]
pub(super) struct AcceptBackoff {
    /// In the order in which they ran out.
    waiting: VecDeque<ListenerId>,
    /// The end of the pause in the wheel; there is one while a listener is throttled.
    pause: Option<NodeId>,
    /// How long the next pause is, where it is not the first.
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
    /// Listens on an address; with port 0 the kernel chooses one, which
    /// [`listener_addr`](Self::listener_addr) returns.
    ///
    /// The file of a Unix-domain listener is the caller's: the reactor neither removes one that a dead process left
    /// behind (it makes `EADDRINUSE`; try to connect first, and remove it when that is refused), nor its own when the
    /// listener is gone. Who may connect is decided by the file's permissions.
    ///
    /// # Errors
    /// The system's refusal: the address is in use (`EADDRINUSE`), is not of this machine (`EADDRNOTAVAIL`), its
    /// port is privileged (`EACCES`), or its path is too long (`ENAMETOOLONG`); [`Error::Full`] at [`Config::listeners_max`](crate::Config::listeners_max);
    /// [`Error::Invalid`] during a [`shutdown`](Self::shutdown).
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

    /// Why there can't be another listener.
    pub(super) fn lacks_listener(&self) -> Result<(), Error> {
        let limit = self.listeners.capacity();
        if self.listeners.is_full() {
            return Err(Error::Full { what: "listeners", limit });
        }
        Ok(())
    }

    /// Gives a listener its place in epoll and its slot, of which there must be one.
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
    /// When the connections of a listener are counted wrongly, or it waits for none of them.
    #[cfg(any(test, fuzzing))]
    pub(super) fn check_accepted(&self) {
        for id in self.listeners() {
            let Some(listener) = self.listeners.head(id.key()) else { continue };
            assert_eq!(listener.connections, self.accepted_by.count(id), "connections of {id:?}");
            let bound = listener.connections_max.unwrap_or(usize::MAX);
            assert!(listener.connections <= bound, "{id:?} has more than its bound");
            assert!(!listener.full || listener.connections == bound, "{id:?} waits for nothing");
        }
    }

    /// Stops listening; connections that waited to be accepted are reset by the kernel, unless the socket is open
    /// elsewhere too, as after [`adopt_listener`](Self::adopt_listener) of a duplicate. Nothing for a stale name.
    pub fn unlisten(&mut self, listener: ListenerId) {
        drop(self.remove_listener(listener));
    }

    pub(super) fn remove_listener(&mut self, listener: ListenerId) -> Option<Descriptor> {
        self.reset_backoff(listener);
        self.draining.retain(|&other| other != listener);
        self.unwatch_listener(listener);
        self.listeners.remove(listener.key()).map(|(listener, ())| listener.socket)
    }

    /// Takes a listener out of epoll, which would go on reporting one whose socket is open elsewhere too.
    fn unwatch_listener(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.head_mut(id.key())
            && mem::replace(&mut listener.watched, false)
            && let Err(error) = self.poller.delete(&listener.socket)
        {
            log::debug!("{id:?} could not be taken out of epoll: {error}");
        }
    }

    /// Accepts what waits in the listener's backlog, also if accepts were paused, and then stops listening: the way to
    /// end a service beside its successor (`reuse_port`) without resetting the peers that wait.
    /// [`on_listener_drained`](crate::Handler::on_listener_drained) follows when it is gone. Where slots or descriptors
    /// run out meanwhile, it goes on when there are some. Nothing for a stale name.
    ///
    /// Peers whose handshake is still under way when the socket is closed are reset all the same: those that wait for
    /// its last segment, and those that complete it between the last accept and the close. With
    /// `net.ipv4.tcp_migrate_req` (Linux 5.14) the kernel moves both to another socket of the port. A successor that
    /// has the same socket ([`adopt_listener`](Self::adopt_listener)) loses none, and there is nothing to be drained:
    /// [`unlisten`](Self::unlisten) leaves it the backlog.
    pub fn drain_listener(&mut self, listener: ListenerId) {
        let Some(head) = self.listeners.head_mut(listener.key()) else { return };
        head.paused = false;
        if !self.draining.contains(&listener) {
            self.draining.push(listener);
            // Now rather than at the end, where it would come between the last accept and the close.
            self.unwatch_listener(listener);
        }
    }

    /// Whether a listener is drained, and is not waiting for something to accept with.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.iter().any(|&listener| self.is_accepting(listener))
    }

    /// No peer waits at the listener: the end of one that is drained. Says whether it is.
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

    /// The address of a TCP listener.
    ///
    /// # Errors
    /// [`Error::Stale`], the system's refusal, or [`Error::Invalid`] for a Unix-domain listener.
    pub fn listener_addr(&self, listener: ListenerId) -> Result<SocketAddr, Error> {
        sys::local_addr(&self.listeners.head(listener.key()).ok_or(Error::Stale)?.socket)
    }

    /// All listeners.
    pub fn listeners(&self) -> impl Iterator<Item = ListenerId> + '_ {
        self.listeners.keys(0, self.listeners.slots_used()).map(ListenerId::from)
    }

    /// Accepts nothing on this listener until [`resume_accepts`](Self::resume_accepts); peers wait in its backlog.
    ///
    /// # Errors
    /// [`Error::Stale`], or the system's refusal.
    pub fn pause_accepts(&mut self, listener: ListenerId) -> Result<(), Error> {
        self.set_accepts_paused(listener, true)
    }

    /// Accepts again.
    ///
    /// # Errors
    /// [`Error::Stale`], or the system's refusal.
    pub fn resume_accepts(&mut self, listener: ListenerId) -> Result<(), Error> {
        self.set_accepts_paused(listener, false)
    }

    /// Changes how many connections may wait to be accepted; `None` asks for as many as the kernel allows.
    ///
    /// # Errors
    /// [`Error::Stale`], or the system's refusal.
    pub fn set_backlog(&mut self, listener: ListenerId, backlog: Option<u32>) -> Result<(), Error> {
        sys::listen(&self.listeners.head(listener.key()).ok_or(Error::Stale)?.socket, backlog)
    }

    fn set_accepts_paused(&mut self, id: ListenerId, paused: bool) -> Result<(), Error> {
        self.listeners.head_mut(id.key()).ok_or(Error::Stale)?.paused = paused;
        self.sync_interest(id)
    }

    /// Makes epoll report the listener, or not.
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

    /// Whether the listener is there and neither paused, throttled nor at its bound.
    pub(crate) fn is_accepting(&self, id: ListenerId) -> bool {
        self.listeners.head(id.key()).is_some_and(Listener::is_accepting)
    }

    /// An event came from a listener that is not to be accepted from: epoll may have refused the change, which is tried
    /// again.
    pub(crate) fn disable(&mut self, id: ListenerId) {
        if let Err(Error::System { call, source }) = self.sync_interest(id) {
            log::warn!("a listener could not be paused: {call}: {source}");
        }
    }

    /// epoll has reported the listener: it is accepted from when the connections of this turn have been served.
    pub(crate) fn accept_later(&mut self, id: ListenerId) {
        self.ready_listeners.push(id);
    }

    /// The listeners to accept from in this turn, if any, those that are drained included; the list is to be given back, so that its memory is used again.
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

    /// Whether every slot is taken and connections that may have ended are still to be served: epoll has more events, or
    /// some are listed. Listeners are left alone then, and reported again, but only for as many turns as it takes to
    /// serve each connection once.
    pub(crate) fn waits_for_room(&mut self, has_more_events: bool) -> bool {
        let turns_max = self.connections.capacity() / self.served_again_max() + 1;
        let waits = (has_more_events || !self.listed.is_empty())
            && self.lacks_slot_to_accept().is_some()
            && self.turns_without_room < turns_max;
        self.turns_without_room = if waits { self.turns_without_room + 1 } else { 0 };
        waits
    }

    /// Takes one connection from the listener's backlog, unless the listener is paused or gone.
    pub(crate) fn accept(&self, id: ListenerId) -> Accepted {
        match self.listeners.head(id.key()) {
            Some(listener) if listener.is_accepting() => sys::accept(&listener.socket),
            _ => Accepted::Empty,
        }
    }

    /// What a connection of this listener begins with, and whether the listener has a bound of its own; `None` where it
    /// does not accept now.
    #[inline]
    pub(crate) fn terms_of(&self, id: ListenerId) -> Option<(Flags, bool)> {
        let listener = self.listeners.head(id.key()).filter(|listener| listener.is_accepting())?;
        Some((listener.conn_flags, listener.connections_max.is_some()))
    }

    /// Why no connection of this listener could be kept now, by its own bound.
    pub(crate) fn lacks_place_at(&self, id: ListenerId) -> Option<Error> {
        self.listeners.head(id.key())?.lacks_place()
    }

    /// The listener is at its own bound, and a peer waits: epoll does not report it until one of its connections has
    /// gone.
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

    /// A connection has gone: its listener may have room again.
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

    /// Why no connection could be kept now, were there one.
    pub(crate) fn lacks_slot(&self) -> Option<Error> {
        let limit = self.connections.capacity();
        self.connections.is_full().then_some(Error::Full { what: "connections", limit })
    }

    /// The same of one that is accepted, where some are reserved for others.
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

    /// Something to accept with ran out: the listener waits.
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

    /// Begins a pause, unless one is under way.
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

    /// Accepting has worked. If no listener is throttled any more, the next pause is a short one again; as long as one is,
    /// a place that was freed and taken is no sign of plenty.
    pub(crate) fn reset_pause(&mut self) {
        if self.throttled.waiting.is_empty() {
            self.throttled.pause_next = None;
        }
    }

    /// Whether a throttled listener is to come back.
    pub(crate) fn has_freed(&self) -> bool {
        self.freed > 0 && !self.throttled.waiting.is_empty()
    }

    /// For each connection that has gone, one throttled listener comes back, the longest waiting first; none where they
    /// were connects and have left their slots to other connects.
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

    /// The listener is throttled no more; the last one takes the pause with it.
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

    /// With no descriptor left, the spare one makes room to take one connection and reset it. One in each
    /// pause, whatever the number of listeners: the others may still get in when there is room again.
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
