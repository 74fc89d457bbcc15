//! The loop: wait, dispatch each event to the service, remove closed connections, fire timers.
//!
//! Connections are watched edge-triggered: epoll reports a change once. The reactor handles a report completely, or
//! lists the connection and serves it again in the next turn: if a read filled its buffer, if reads were paused, or if
//! a send accepted everything and more is queued.
//!
//! Listeners are served last in a turn, after ended connections have freed their slots.

use std::fmt;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use crate::callback::Timed;
use crate::config::Config;
use crate::connection::{ConnHeader, Flags};
use crate::context::{Context, Due, Received, receives};
use crate::error::{CloseReason, Error};
use crate::handler::{Handler, Incoming};
use crate::sys::{Accepted, Descriptor, Events, IoResult, Readiness, ReceiveBatch};
use crate::token::{EventSource, Inner, ListenerId, Token};

/// An epoll loop over connections whose state is `C`.
///
/// The service is passed to [`run`](Self::run) and [`turn`](Self::turn); the reactor does not own it, so one reactor
/// can be used with different handlers, one after the other.
pub struct Reactor<C> {
    cx: Context<C>,
    events: Events,
    read_buffer: Vec<u8>,
    /// The batch of receives, if sockets are registered files.
    receives: Option<ReceiveBatch>,
    /// A turn has begun and not returned. If this is set when another turn begins, a callback has panicked.
    turning: bool,
}

impl<C> fmt::Debug for Reactor<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("context", &self.cx).finish_non_exhaustive()
    }
}

/// How many times per turn `on_close` may lead to further closed connections before the rest waits for the next turn.
const CLOSING_ROUNDS_MAX: usize = 32;

/// The maximum that the reads after one wait return together: with many readable connections, each read is smaller.
const ROUND_BYTES: usize = 4 << 20;
/// The minimum size of a read.
const READ_BYTES_MIN: usize = 4096;
/// The resulting maximum number of events per wait, whatever is configured.
const EVENTS_PER_WAIT_MAX: usize = ROUND_BYTES / READ_BYTES_MIN;

/// The maximum that the reads of listed connections return per turn: less, because epoll's events wait meanwhile.
const LISTED_BYTES: usize = 1 << 20;

fn zeroes(bytes: usize) -> Result<Vec<u8>, Error> {
    let mut buffer = Vec::new();
    buffer
        .try_reserve_exact(bytes)
        .map_err(|_| Error::Invalid("there is not enough memory for the read buffer"))?;
    buffer.resize(bytes, 0);
    Ok(buffer)
}

/// The result of a turn: whether the reactor continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a reactor that has stopped wants no further turn"]
pub enum Status {
    /// Call [`turn`](Reactor::turn) again.
    Running,
    /// [`stop`](Context::stop) was called, or a [`shutdown`](Context::shutdown) is complete.
    Stopped,
}

impl<C> Reactor<C> {
    /// Creates a reactor with this configuration. It uses three descriptors: an epoll instance, an eventfd for the
    /// [`Waker`](crate::Waker), and a spare one for when descriptors run out.
    ///
    /// # Errors
    /// A system error (`EMFILE` if no descriptor is left), [`Error::Invalid`], which names the invalid bound, or
    /// [`Error::NoAddressSpace`].
    pub fn new(config: &Config) -> Result<Self, Error> {
        config.check()?;
        let cx = Context::new(config)?;
        let events_max = config.events_per_wait.min(EVENTS_PER_WAIT_MAX);
        let batches = cx.sockets().has_tables();
        Ok(Self {
            cx,
            events: Events::with_capacity(events_max),
            read_buffer: zeroes(config.read_buffer_bytes)?,
            receives: batches.then(|| receives(events_max, config.read_buffer_bytes)),
            turning: false,
        })
    }

    /// Returns the context, for setup and for use between turns. Updates [`Context::now`].
    pub fn context(&mut self) -> &mut Context<C> {
        self.cx.read_clock();
        &mut self.cx
    }

    /// Returns the time at which a turn is due even if the descriptor ([`AsFd`]) is not readable: a timer expires then.
    /// If work is pending, the time is now or in the past. `None`: no turn is due before the descriptor is readable.
    ///
    /// Another event loop can drive a reactor with the descriptor and this time: it calls [`turn`](Self::turn) with a
    /// wait of zero when the descriptor is readable or the time is reached. It must ask for the time again after each
    /// turn and after each use of the [`context`](Self::context) between turns. The [guide](crate::guide) contains an
    /// example.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.cx.wants_turn() { Some(self.cx.now()) } else { self.cx.next_timer() }
    }

    /// Runs the loop until [`stop`](Context::stop) is called or a [`shutdown`](Context::shutdown) is complete.
    ///
    /// # Errors
    /// As for [`turn`](Self::turn).
    pub fn run<H: Handler<Conn = C> + ?Sized>(&mut self, handler: &mut H) -> Result<(), Error> {
        while self.turn(handler, None)? == Status::Running {}
        Ok(())
    }

    /// Waits for events, for at most `max_wait` (`None`: without a limit), and handles them.
    ///
    /// # Errors
    /// A failure of `epoll_wait`; errors of connections are passed to the handler. [`Error::Invalid`] after a callback
    /// has panicked: the lent state is lost, and the reactor can only be dropped.
    pub fn turn<H: Handler<Conn = C> + ?Sized>(
        &mut self,
        handler: &mut H,
        max_wait: Option<Duration>,
    ) -> Result<Status, Error> {
        if mem::replace(&mut self.turning, true) {
            return Err(Error::Invalid("a callback has panicked in this reactor: drop it"));
        }
        self.cx.set_in_turn(true);
        let status = if self.cx.config().times_callbacks {
            let timed: &mut dyn Handler<Conn = C> = &mut Timed(handler);
            self.turn_whole(timed, max_wait)
        } else {
            self.turn_whole(handler, max_wait)
        };
        if status.is_ok() {
            self.cx.end_turn();
        }
        self.cx.set_in_turn(false);
        self.turning = false;
        status
    }

    fn turn_whole<H: Handler<Conn = C> + ?Sized>(
        &mut self,
        handler: &mut H,
        max_wait: Option<Duration>,
    ) -> Result<Status, Error> {
        let Self { cx, events, read_buffer, receives, .. } = self;
        finish_round(cx, handler);
        cx.resume_accepting();
        wait(cx, events, max_wait)?;
        dispatch_all(cx, handler, read_buffer, receives.as_mut(), events);
        serve_listed(cx, handler, read_buffer);
        report_room(cx, handler);
        open_adopted(cx, handler);
        accept_all(cx, handler, events);
        call_deferred(cx, handler);
        finish_round(cx, handler);
        fire_timers(cx, handler);
        visit_slice(cx, handler);
        notify_shutdown(cx, handler);
        finish_round(cx, handler);
        Ok(if cx.take_stop() { Status::Stopped } else { Status::Running })
    }
}

fn wait<C>(
    cx: &mut Context<C>,
    events: &mut Events,
    max_wait: Option<Duration>,
) -> Result<(), Error> {
    let wait = if cx.wants_turn() { Some(Duration::ZERO) } else { cx.wait_within(max_wait) };
    cx.poller().wait(events, wait)?;
    cx.end_wait();
    cx.stats_mut().events += events.len() as u64;
    Ok(())
}

/// Removes closed connections and submits the batches, until no more connections are closed. If `on_close` closes
/// others without end, the rest waits for the next turn.
fn finish_round<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    for _ in 0..CLOSING_ROUNDS_MAX {
        reap_closed(cx, handler);
        cx.flush();
        if !cx.has_closed() {
            return;
        }
    }
}

/// The epoll descriptor, which is readable when a turn would find an event. Use it only to wait in another event loop.
impl<C> AsFd for Reactor<C> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cx.poller().as_fd()
    }
}

/// The same, for event loops that need the descriptor's number.
impl<C> AsRawFd for Reactor<C> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The part of the buffer that one read may use if that many connections share `bytes`.
fn share(buffer: &mut [u8], bytes: usize, connections: usize) -> &mut [u8] {
    let share = (bytes / connections.max(1)).max(READ_BYTES_MIN).min(buffer.len());
    &mut buffer[..share]
}

/// A small function that is not inlined, so that the common path stays in registers.
#[inline(never)]
fn dispatch_all<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    receives: Option<&mut ReceiveBatch>,
    events: &Events,
) {
    let buffer = share(buffer, ROUND_BYTES, events.len());
    if let Some(receives) = receives {
        return dispatch_batched(cx, handler, buffer, receives, events);
    }
    for (data, ready) in events.iter() {
        dispatch(cx, handler, buffer, data, ready);
        reap_closed(cx, handler);
    }
}

#[inline(always)] // Otherwise the compiler emits a call per message.
fn dispatch<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    data: u64,
    ready: Readiness,
) {
    match Token::from_bits(data) {
        Some(token) => serve(cx, handler, buffer, token, ready),
        None => dispatch_other(cx, handler, data, ready),
    }
}

/// The same, but registered files are read in one batch before the first callback, and the writes of the callbacks are
/// sent in one batch after the last one.
fn dispatch_batched<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    receives: &mut ReceiveBatch,
    events: &Events,
) {
    receives.clear();
    for (data, ready) in events.iter() {
        if ready.any(Readiness::INPUT)
            && let Some(token) = Token::from_bits(data)
            && let Some(place) = cx.batched_place(token, ready)
            && !receives.is_full()
        {
            receives.push(token, place);
        }
    }
    cx.sockets().receive_all(receives);
    cx.begin_delivery();
    let mut next = 0;
    for (data, ready) in events.iter() {
        if next < receives.len() && Token::from_bits(data) == Some(receives.token(next)) {
            deliver(cx, handler, receives, next);
            next += 1;
        } else {
            dispatch_unbatched(cx, handler, buffer, data, ready);
        }
        reap_closed(cx, handler);
    }
    cx.end_delivery();
    reap_closed(cx, handler);
}

/// Dispatches an event that is not part of the batch.
#[inline(never)]
fn dispatch_unbatched<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    data: u64,
    ready: Readiness,
) {
    dispatch(cx, handler, buffer, data, ready);
}

/// Passes the result of one batched receive to the service.
#[inline]
fn deliver<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    receives: &mut ReceiveBatch,
    index: usize,
) {
    let token = receives.token(index);
    match receives.result(index) {
        IoResult::Bytes(received @ 1..) => {
            let was_full = received == receives.bytes_each();
            let bytes = &mut receives.part(index)[..received];
            match cx.lend_received(token, received, was_full) {
                Some(mut conn) => {
                    handler.on_data(cx, token, &mut conn, bytes);
                    cx.give_back(token, conn);
                }
                None => cx.hold(token, bytes),
            }
        }
        why => {
            if cx.wants_end(token, &why) {
                end_input(cx, handler, token, why);
            }
        }
    }
}

/// Dispatches an event that does not belong to a connection.
fn dispatch_other<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    data: u64,
    ready: Readiness,
) {
    match EventSource::from_bits(data) {
        Some(EventSource::Listener(listener)) => cx.accept_later(listener),
        Some(EventSource::Watch(watch)) if cx.is_watching(watch) => {
            handler.on_ready(cx, watch, ready)
        }
        Some(EventSource::Inner(Inner::Wake)) => {
            if cx.acknowledge_wake() {
                handler.on_wake(cx);
            }
        }
        Some(EventSource::Inner(Inner::Signal)) => {
            while let Some(signal) = cx.next_signal() {
                handler.on_signal(cx, signal);
            }
        }
        _ => cx.stats_mut().stale_events += 1,
    }
}

/// The common event is input for a connection that only reads: it takes one look-up and the read. All other cases are
/// handled in [`serve_unusual`].
#[inline(always)] // Otherwise the compiler emits a call per message.
fn serve<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    token: Token,
    ready: Readiness,
) {
    if ready != Readiness::READABLE_AND_WRITABLE {
        // Usually the first report of a connection: nothing is queued.
        if ready != Readiness::WRITABLE || !cx.is_idle(token) {
            serve_unusual(cx, handler, buffer, token, ready);
        }
        return;
    }
    match cx.receive(token, buffer) {
        Some(Received::Bytes(mut conn, received)) => {
            handler.on_data(cx, token, &mut conn, &mut buffer[..received]);
            cx.give_back(token, conn);
        }
        Some(Received::Nothing(why)) => end_input(cx, handler, token, why),
        None => serve_unusual(cx, handler, buffer, token, ready),
    }
}

#[inline(never)]
fn serve_unusual<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    token: Token,
    ready: Readiness,
) {
    let Some(header) = cx.header_mut(token) else {
        cx.stats_mut().stale_events += 1;
        return;
    };
    if ready.any(Readiness::READ_TO_END) {
        header.flags.set(Flags::READ_TO_END, true);
    }
    if header.flags.any(Flags::CONNECTING) {
        return open_connected(cx, handler, token, ready);
    }
    if ready.is_writable() && header.has_queue() && cx.flush_queue(token) {
        lend(cx, token, |cx, conn| handler.on_drain(cx, token, conn));
    }
    if ready.any(Readiness::INPUT) {
        serve_input(cx, handler, buffer, token, ready);
    }
}

/// Handles a report of input: reads, or checks for an error if the connection does not read.
fn serve_input<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    token: Token,
    ready: Readiness,
) {
    let Some(header) = cx.header(token) else { return };
    if header.reads() || header.drains() {
        return read(cx, handler, buffer, token);
    }
    let error =
        if ready.is_error() { cx.sockets().take_error(&header.socket, "epoll_wait") } else { None };
    match error {
        Some(error) => cx.mark_closed(token, CloseReason::Failed(error)),
        None => {
            if ready.is_hangup() {
                cx.end_if_finished(token);
            }
            cx.note_unread(token);
        }
    }
}

/// Reads once from a connection that may also have queued output; held bytes are delivered first.
fn read<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    token: Token,
) {
    if cx.header(token).is_none_or(|header| !header.reads()) {
        return cx.drain(token, buffer);
    }
    if let Some(mut bytes) = cx.take_held(token) {
        cx.note_unread(token);
        cx.stats_mut().bytes_in += bytes.len() as u64;
        return lend(cx, token, |cx, conn| handler.on_data(cx, token, conn, &mut bytes));
    }
    match cx.receive_beside_queue(token, buffer) {
        Some(Received::Bytes(mut conn, received)) => {
            handler.on_data(cx, token, &mut conn, &mut buffer[..received]);
            cx.give_back(token, conn);
        }
        Some(Received::Nothing(why)) => end_input(cx, handler, token, why),
        None => {}
    }
}

/// Serves listed connections. Their number and their bytes are bounded, because epoll's events wait meanwhile.
fn serve_listed<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
) {
    let most = cx.listed().min(cx.served_again_max());
    let buffer = share(buffer, LISTED_BYTES, most);
    let bytes_before = cx.stats_mut().bytes_in;
    for _ in 0..most {
        if cx.stats_mut().bytes_in - bytes_before > LISTED_BYTES as u64 {
            return;
        }
        let Some(token) = cx.next_listed() else { return };
        serve_again(cx, handler, buffer, token);
        reap_closed(cx, handler);
    }
}

/// All queues together have room again: calls some of the connections that waited for it.
fn report_room<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    for _ in 0..cx.served_again_max() {
        let Some(token) = cx.next_with_room() else { return };
        lend(cx, token, |cx, conn| handler.on_drain(cx, token, conn));
        reap_closed(cx, handler);
    }
}

fn serve_again<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    buffer: &mut [u8],
    token: Token,
) {
    let Some(header) = cx.header(token) else { return };
    if header.flags.any(Flags::UNSENT)
        && !header.flags.any(Flags::CONNECTING)
        && cx.flush_queue(token)
    {
        lend(cx, token, |cx, conn| handler.on_drain(cx, token, conn));
    }
    if cx.header(token).is_some_and(ConnHeader::wants_reading) {
        read(cx, handler, buffer, token);
    }
}

/// Handles a read that returned no bytes.
#[cold]
fn end_input<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    token: Token,
    why: IoResult,
) {
    match why {
        IoResult::Bytes(_) => {
            cx.note_eof(token);
            lend(cx, token, |cx, conn| handler.on_eof(cx, token, conn));
            cx.end_if_finished(token);
        }
        IoResult::NotNow => cx.note_read_empty(token),
        IoResult::Interrupted => cx.note_unread(token),
        IoResult::Failed(error) => cx.mark_closed(token, CloseReason::Failed(error)),
    }
}

fn open_connected<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    token: Token,
    ready: Readiness,
) {
    if cx.is_to_be_removed(token) {
        return;
    }
    match cx.finish_connect(token, ready) {
        Ok(()) => {
            cx.stats_mut().connected += 1;
            cx.stats_mut().count_open();
            if ready.any(Readiness::INPUT) {
                cx.note_unread(token);
            }
            if cx.header(token).is_some_and(ConnHeader::has_queue) {
                cx.mark_unsent(token);
            }
            lend(cx, token, |cx, conn| handler.on_open(cx, token, conn));
        }
        Err(error) => cx.mark_closed(token, CloseReason::ConnectFailed(error)),
    }
}

/// Opens adopted connections that have had no event, for example because no input has arrived and the peer's window is
/// full.
fn open_adopted<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    for _ in 0..cx.config().accepts_per_wake {
        let Some(token) = cx.next_adopted() else { return };
        open_connected(cx, handler, token, Readiness::NONE);
        reap_closed(cx, handler);
    }
}

/// Accepts connections, after the other events of this wait, so that ended connections have freed their slots.
fn accept_all<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H, events: &Events) {
    let Some(mut listeners) = cx.take_ready_listeners() else { return };
    let has_more_events = events.is_full() && listeners.len() < events.len();
    if !cx.waits_for_room(has_more_events) {
        for &listener in &listeners {
            accept(cx, handler, listener);
        }
    }
    listeners.clear();
    cx.give_back_listeners(listeners);
}

fn accept<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H, listener: ListenerId) {
    let Some((conn_flags, is_bounded)) = cx.terms_of(listener) else {
        return cx.disable(listener);
    };
    let rounds = cx.config().accepts_per_wake;
    let mut lost = 0;
    for round in 0..rounds {
        // The kernel has reported at least one waiting peer. If there are more, it reports again.
        let peer_waits = round == 0;
        if let Some(error) = cx.lacks_slot_to_accept() {
            if peer_waits {
                throttle(cx, handler, listener, &error);
            }
            return;
        }
        if is_bounded && let Some(error) = cx.lacks_place_at(listener) {
            if peer_waits {
                cx.hold_back(listener);
                count_accept_error(cx, handler, listener, &error);
            }
            return;
        }
        match cx.accept(listener) {
            Accepted::Connection(socket) => {
                if !admit(cx, handler, listener, socket, conn_flags, is_bounded) {
                    return;
                }
            }
            Accepted::Empty => {
                if cx.end_draining(listener) {
                    handler.on_listener_drained(cx, listener);
                }
                return;
            }
            Accepted::Lost(error) => {
                lost += 1;
                count_accept_error(cx, handler, listener, &error);
            }
            Accepted::Exhausted(_) if cx.free_descriptors() => {}
            Accepted::Exhausted(_) if !peer_waits => return,
            Accepted::Exhausted(error) => {
                cx.drain_one(listener);
                return throttle(cx, handler, listener, &error);
            }
            Accepted::Broken(error) => return throttle(cx, handler, listener, &error),
        }
        reap_closed(cx, handler);
    }
    // Some errors, for example of a security module, are returned for every accept.
    if lost == rounds {
        cx.throttle(listener);
    }
}

/// Asks the service and opens the connection; returns `false` if epoll could not watch it.
fn admit<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    listener: ListenerId,
    socket: Descriptor,
    conn_flags: Flags,
    is_bounded: bool,
) -> bool {
    let Some(mut conn) = handler.on_accept(cx, &Incoming::new(listener, &socket)) else {
        cx.refuse(socket);
        return true;
    };
    match cx.insert(socket, conn_flags) {
        Ok(token) => {
            cx.stats_mut().accepted += 1;
            cx.stats_mut().count_open();
            cx.reset_pause();
            if is_bounded {
                cx.count_accepted(listener, token);
            }
            handler.on_open(cx, token, &mut conn);
            cx.give_back(token, conn);
            true
        }
        Err(refused) => {
            cx.stats_mut().dropped += 1;
            throttle(cx, handler, listener, &refused.error);
            false
        }
    }
}

fn throttle<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    listener: ListenerId,
    error: &Error,
) {
    cx.throttle(listener);
    count_accept_error(cx, handler, listener, error);
}

fn count_accept_error<H: Handler + ?Sized>(
    cx: &mut Context<H::Conn>,
    handler: &mut H,
    listener: ListenerId,
    error: &Error,
) {
    if let Some(errno) = error.errno() {
        *cx.stats_mut().accept_errors.entry(errno).or_default() += 1;
    }
    handler.on_accept_error(cx, listener, error);
}

fn fire_timers<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    let mut budget = cx.config().timers_per_turn;
    while let Some(due) = cx.next_due(&mut budget) {
        match due {
            Due::Timeout(token) => time_out(cx, handler, token),
            Due::TaggedTimeout(token, tag) => {
                lend(cx, token, |cx, conn| handler.on_tagged_timeout(cx, token, conn, tag));
            }
            Due::Timer(timer) => handler.on_timer(cx, timer),
            Due::Inner(Inner::Pause) => cx.end_pause(),
            Due::Inner(Inner::Retry) => cx.retry_queues(),
            Due::Inner(Inner::Linger) => cx.check_lingering(),
            Due::Inner(_) => cx.harden_shutdown(),
        }
        reap_closed(cx, handler);
    }
}

/// Makes the deferred calls.
fn call_deferred<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    for _ in 0..cx.deferred() {
        if let Some(token) = cx.next_deferred() {
            lend(cx, token, |cx, conn| handler.on_deferred(cx, token, conn));
            reap_closed(cx, handler);
        }
    }
}

/// Makes one slice of the sweep in progress.
fn visit_slice<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    let Some((sweep, visits)) = cx.next_slice() else { return };
    for _ in 0..visits {
        let Some(visited) = cx.next_visit() else { break };
        if let Some(token) = visited {
            lend(cx, token, |cx, conn| handler.on_visit(cx, sweep, token, conn));
            reap_closed(cx, handler);
        }
    }
    if cx.end_sweep() {
        handler.on_swept(cx, sweep);
    }
}

/// Notifies the next slice of connections of a shutdown, or resets them if the grace period has passed.
fn notify_shutdown<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    let Some((slots, hard)) = cx.next_notified() else { return };
    let tokens: Vec<_> = cx.tokens(slots).collect();
    for token in tokens {
        if hard {
            cx.end_closing(token, CloseReason::ShutDown);
        } else if cx.is_open(token) {
            lend(cx, token, |cx, conn| handler.on_shutdown(cx, token, conn));
        } else {
            cx.close(token);
        }
        reap_closed(cx, handler);
    }
}

fn time_out<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H, token: Token) {
    let Some(header) = cx.header(token) else { return };
    if header.flags.any(Flags::CLOSING) {
        cx.end_closing(token, CloseReason::FlushTimedOut);
    } else if header.flags.any(Flags::CONNECTING) {
        cx.mark_closed(token, CloseReason::ConnectTimedOut);
    } else {
        lend(cx, token, |cx, conn| handler.on_timeout(cx, token, conn));
    }
}

/// Moves the connection's state out of its slot for the duration of a callback. Does nothing for a closed connection.
fn lend<C>(cx: &mut Context<C>, token: Token, callback: impl FnOnce(&mut Context<C>, &mut C)) {
    if cx.is_to_be_removed(token) {
        return;
    }
    if let Some(mut conn) = cx.lend(token) {
        callback(cx, &mut conn);
        cx.give_back(token, conn);
    }
}

/// Removes connections that callbacks or the setup code have closed; calls `on_close` for each.
#[inline]
fn reap_closed<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    if cx.has_closed() {
        reap_all(cx, handler);
    }
}

#[inline(never)]
fn reap_all<H: Handler + ?Sized>(cx: &mut Context<H::Conn>, handler: &mut H) {
    for _ in 0..CLOSING_ROUNDS_MAX {
        for _ in 0..cx.closed() {
            let Some((token, conn, reason)) = cx.reap() else { return };
            handler.on_close(cx, token, conn, reason);
            cx.close_leaving();
        }
    }
}
