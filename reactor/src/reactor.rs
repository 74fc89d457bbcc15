//! The loop: wait, hand each event to the service, remove what is to be removed, fire timers.

use std::fmt;
use std::time::Duration;

use crate::config::Config;
use crate::connection::Flags;
use crate::context::Context;
use crate::error::{CloseReason, Error};
use crate::handler::{Handler, Incoming};
use crate::sys::{self, Accepted, Descriptor, Events, Readiness, Transferred};
use crate::token::{Inner, ListenerId, Source, Token};

/// An epoll loop over connections whose state is `C`.
///
/// Its service is an argument of [`run`](Self::run) and [`turn`](Self::turn), not owned by it: one reactor can serve
/// different handlers in turn.
pub struct Reactor<C> {
    cx: Context<C>,
    events: Events,
    read_buffer: Vec<u8>,
}

impl<C> fmt::Debug for Reactor<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("context", &self.cx).finish_non_exhaustive()
    }
}

/// Whether a reactor wants another turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a reactor that has stopped wants no further turn"]
pub enum Status {
    /// It does.
    Running,
    /// [`stop`](Context::stop) was called, or a [`shutdown`](Context::shutdown) is complete.
    Stopped,
}

impl<C> Reactor<C> {
    /// A reactor within these bounds. It holds three descriptors of its own: the epoll one, one to be woken by, and a
    /// spare for when descriptors have run out.
    ///
    /// # Errors
    /// The system's refusal (`EMFILE`: no descriptor left), or [`Error::Invalid`] where a bound is zero or there is no
    /// address space for that many connections.
    pub fn new(config: &Config) -> Result<Self, Error> {
        if config.events_per_wait == 0
            || config.read_buffer_bytes == 0
            || config.accepts_per_wake == 0
        {
            return Err(Error::Invalid(
                "events_per_wait, read_buffer_bytes and accepts_per_wake must not be zero",
            ));
        }
        if config.timers_per_turn == 0 {
            return Err(Error::Invalid("timers_per_turn must not be zero"));
        }
        Ok(Self {
            cx: Context::new(config)?,
            events: Events::with_capacity(config.events_per_wait),
            read_buffer: vec![0; config.read_buffer_bytes],
        })
    }

    /// The context, to set the reactor up and to look at it between turns. Its clock is read anew.
    pub fn context(&mut self) -> &mut Context<C> {
        self.cx.read_clock();
        &mut self.cx
    }

    /// Serves until [`stop`](Context::stop) is called or a [`shutdown`](Context::shutdown) is complete.
    ///
    /// # Errors
    /// Only what makes waiting itself impossible; faults of connections go to the handler.
    pub fn run<H: Handler<Conn = C>>(&mut self, handler: &mut H) -> Result<(), Error> {
        while self.turn(handler, None)? == Status::Running {}
        Ok(())
    }

    /// Waits for events, `max_wait` at the most (`None`: as long as it takes), and handles them.
    ///
    /// # Errors
    /// Only what makes waiting itself impossible; faults of connections go to the handler.
    pub fn turn<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        max_wait: Option<Duration>,
    ) -> Result<Status, Error> {
        bury_doomed(&mut self.cx, handler);
        self.cx.feed_starved();
        self.wait(max_wait)?;
        bury_doomed(&mut self.cx, handler);
        for index in 0..self.events.len() {
            let (data, ready) = self.events.at(index);
            self.dispatch(handler, data, ready);
            bury_doomed(&mut self.cx, handler);
        }
        self.fire_timers(handler);
        self.sweep(handler);
        self.cx.tell_shutdown();
        bury_doomed(&mut self.cx, handler);
        Ok(if self.cx.take_stop() { Status::Stopped } else { Status::Running })
    }

    fn wait(&mut self, max_wait: Option<Duration>) -> Result<(), Error> {
        self.cx.settle();
        let at_once = self.cx.has_doomed()
            || self.cx.has_more_to_tell()
            || self.cx.has_sweeps()
            || self.cx.wants_stop();
        let wait = if at_once { Some(Duration::ZERO) } else { self.cx.wait_within(max_wait) };
        self.cx.poller().wait(&mut self.events, wait)?;
        self.cx.begin_turn();
        self.cx.stats_mut().events += self.events.len() as u64;
        Ok(())
    }

    fn dispatch<H: Handler<Conn = C>>(&mut self, handler: &mut H, data: u64, ready: Readiness) {
        match Source::from_bits(data) {
            Some(Source::Connection(token)) => self.serve(handler, token, ready),
            Some(Source::Listener(listener)) => self.accept(handler, listener),
            Some(Source::Watch(watch)) if self.cx.minds(watch) => {
                handler.on_ready(&mut self.cx, watch, ready);
            }
            Some(Source::Inner(Inner::Wake)) => {
                if self.cx.acknowledge_wake() {
                    handler.on_wake(&mut self.cx);
                }
            }
            Some(Source::Inner(Inner::Signal)) => {
                while let Some(signal) = self.cx.next_signal() {
                    handler.on_signal(&mut self.cx, signal);
                }
            }
            _ => self.cx.stats_mut().stale_events += 1,
        }
    }

    fn serve<H: Handler<Conn = C>>(&mut self, handler: &mut H, token: Token, ready: Readiness) {
        let Some(mut link) = self.cx.link(token) else {
            self.cx.stats_mut().stale_events += 1;
            return;
        };
        if link.flags.any(Flags::CONNECTING) {
            return self.open_connected(handler, token, ready);
        }
        if ready.is_writable() {
            if self.cx.flush(token) {
                lend(&mut self.cx, token, |cx, conn| handler.on_drain(cx, token, conn));
            }
            let Some(flushed) = self.cx.link(token) else { return };
            link = flushed;
        }
        if link.wants_reads() {
            if ready.is_readable() || ready.is_error() || ready.is_hangup() {
                let lingers = link.lingers();
                let received = sys::receive(&link.socket, &mut self.read_buffer);
                self.hand_over(handler, token, lingers, received);
            }
        } else if ready.is_error()
            && let Some(error) = sys::take_error(&link.socket, "epoll_wait")
        {
            self.cx.doom(token, CloseReason::Failed(error));
        } else if ready.is_hangup() {
            self.cx.end_hung_up(token);
        }
    }

    /// Hands what was read to the service; from a connection that `lingers`, nothing is wanted but its end.
    fn hand_over<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        token: Token,
        lingers: bool,
        received: Transferred,
    ) {
        match received {
            Transferred::Bytes(0) if lingers => self.cx.doom(token, CloseReason::Closed),
            Transferred::Bytes(_) if lingers => {}
            Transferred::Bytes(0) => {
                self.cx.note_eof(token);
                lend(&mut self.cx, token, |cx, conn| handler.on_eof(cx, token, conn));
                self.cx.end_if_finished(token);
            }
            Transferred::Bytes(received) => {
                self.cx.stats_mut().bytes_in += received as u64;
                let bytes = &self.read_buffer[..received];
                lend(&mut self.cx, token, |cx, conn| handler.on_data(cx, token, conn, bytes));
            }
            Transferred::NotNow => {}
            Transferred::Failed(error) => self.cx.doom(token, CloseReason::Failed(error)),
        }
    }

    fn open_connected<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        token: Token,
        ready: Readiness,
    ) {
        match self.cx.finish_connect(token, ready) {
            Ok(()) => {
                self.cx.stats_mut().connected += 1;
                open(&mut self.cx, handler, token);
            }
            Err(error) => self.cx.doom(token, CloseReason::ConnectFailed(error)),
        }
    }

    fn accept<H: Handler<Conn = C>>(&mut self, handler: &mut H, listener: ListenerId) {
        if !self.cx.hears(listener) {
            return self.cx.hush(listener);
        }
        for round in 0..self.cx.config().accepts_per_wake {
            // The kernel has told of one peer that waits. Whether there is another behind it is not known: if so, it
            // tells again.
            let somebody_waits = round == 0 && self.cx.hears(listener);
            if let Some(error) = self.cx.lacks_slot() {
                if somebody_waits {
                    self.starve(handler, listener, &error);
                }
                return;
            }
            match self.cx.accept(listener) {
                Accepted::Connection(socket) => {
                    if !self.admit(handler, listener, socket) {
                        return;
                    }
                }
                Accepted::Nobody => return,
                Accepted::Lost(error) => self.count_accept_error(handler, listener, &error),
                Accepted::Exhausted(_) if !somebody_waits => return,
                Accepted::Exhausted(error) => {
                    self.cx.drain_one(listener);
                    return self.starve(handler, listener, &error);
                }
                Accepted::Broken(error) => return self.starve(handler, listener, &error),
            }
            bury_doomed(&mut self.cx, handler);
        }
    }

    /// Asks the service and opens the connection; `false` when there was no epoll watch for it.
    fn admit<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        listener: ListenerId,
        socket: Descriptor,
    ) -> bool {
        let Some(conn) = handler.on_accept(&mut self.cx, &Incoming::new(listener, &socket)) else {
            self.cx.refuse(socket);
            return true;
        };
        match self.cx.adopt(socket, Flags::NONE, conn) {
            Ok(token) => {
                self.cx.stats_mut().accepted += 1;
                self.cx.reset_pause();
                open(&mut self.cx, handler, token);
                true
            }
            Err(error) => {
                self.cx.stats_mut().dropped += 1;
                self.starve(handler, listener, &error);
                false
            }
        }
    }

    fn starve<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        listener: ListenerId,
        error: &Error,
    ) {
        self.cx.starve(listener);
        self.count_accept_error(handler, listener, error);
    }

    fn count_accept_error<H: Handler<Conn = C>>(
        &mut self,
        handler: &mut H,
        listener: ListenerId,
        error: &Error,
    ) {
        if let Some(errno) = error.errno() {
            *self.cx.stats_mut().accept_errors.entry(errno).or_default() += 1;
        }
        handler.on_accept_error(&mut self.cx, listener, error);
    }

    fn fire_timers<H: Handler<Conn = C>>(&mut self, handler: &mut H) {
        let mut budget = self.cx.config().timers_per_turn;
        while let Some(source) = self.cx.next_due(&mut budget) {
            match source {
                Source::Connection(token) => time_out(&mut self.cx, handler, token),
                Source::Timer(timer) => handler.on_timer(&mut self.cx, timer),
                Source::Inner(Inner::Pause) => self.cx.end_pause(),
                Source::Inner(_) => self.cx.harden_shutdown(),
                Source::Listener(_) | Source::Watch(_) => {} // They have no timer.
            }
            bury_doomed(&mut self.cx, handler);
        }
    }

    /// Makes one slice of visits.
    fn sweep<H: Handler<Conn = C>>(&mut self, handler: &mut H) {
        let Some((sweep, slots)) = self.cx.next_slice() else { return };
        for slot in slots {
            if let Some(token) = self.cx.visitable(slot) {
                lend(&mut self.cx, token, |cx, conn| handler.on_visit(cx, sweep, token, conn));
                bury_doomed(&mut self.cx, handler);
            }
        }
        if self.cx.end_sweep() {
            handler.on_swept(&mut self.cx, sweep);
        }
    }
}

fn open<H: Handler>(cx: &mut Context<H::Conn>, handler: &mut H, token: Token) {
    if let Some(link) = cx.link_mut(token) {
        link.flags.set(Flags::OPENED, true);
    }
    let stats = cx.stats_mut();
    stats.opened += 1;
    stats.open_max = stats.open_max.max(stats.opened - stats.closed);
    lend(cx, token, |cx, conn| handler.on_open(cx, token, conn));
}

fn time_out<H: Handler>(cx: &mut Context<H::Conn>, handler: &mut H, token: Token) {
    let Some(link) = cx.link(token) else { return };
    if link.flags.any(Flags::CLOSING) {
        cx.end_closing(token, CloseReason::FlushTimedOut);
    } else if link.flags.any(Flags::CONNECTING) {
        cx.doom(token, CloseReason::ConnectTimedOut);
    } else {
        lend(cx, token, |cx, conn| handler.on_timeout(cx, token, conn));
    }
}

/// Moves the connection's state out of its slot for the time of a callback.
fn lend<C>(cx: &mut Context<C>, token: Token, callback: impl FnOnce(&mut Context<C>, &mut C)) {
    if let Some(mut conn) = cx.lend(token) {
        callback(cx, &mut conn);
        cx.give_back(token, conn);
    }
}

/// Removes what callbacks, or the set-up code, have closed; the service hears of each one.
#[inline]
fn bury_doomed<H: Handler>(cx: &mut Context<H::Conn>, handler: &mut H) {
    while cx.has_doomed() {
        if let Some((token, conn, reason)) = cx.bury() {
            handler.on_close(cx, token, conn, reason);
        }
    }
}
