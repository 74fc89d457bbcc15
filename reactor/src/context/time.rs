//! Timeouts of connections, with and without a tag, and timers of the service. All are rounded up to a millisecond and never
//! early.

use std::time::{Duration, Instant};

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::error::Error;
use crate::token::{EventSource, Inner, TimerId, Token};
use crate::wheel::{NodeId, Tick};

/// A timer of the service, or a tagged timeout of a connection.
#[derive(Debug)]
pub(super) struct Timer {
    node: NodeId,
    tagged: Option<(Token, u64)>,
}

/// An expired timer.
pub(crate) enum Due {
    Timeout(Token),
    TaggedTimeout(Token, u64),
    Timer(TimerId),
    Inner(Inner),
}

impl<C> Context<C> {
    /// Arms the connection's timeout, or moves it. [`on_timeout`](crate::Handler::on_timeout) is called when it
    /// expires, unless it is moved or cleared before. Moving it to later, as an idle timeout does on each message,
    /// stores one integer.
    ///
    /// While the connection is still connecting, this timeout limits the connect, and it is disarmed when the
    /// connection opens: arm an idle timeout in [`on_open`](crate::Handler::on_open), not right after
    /// [`connect`](Self::connect). Does nothing if the token is stale or the connection is being closed.
    pub fn set_timeout(&mut self, token: Token, after: Duration) {
        if self
            .header(token)
            .is_some_and(|header| !header.flags.any(Flags::CLOSING | Flags::CLOSED))
        {
            self.arm(token, after);
        }
    }

    /// Disarms the connection's timeout. Does nothing if the token is stale or the connection is being closed.
    pub fn clear_timeout(&mut self, token: Token) {
        if let Some(header) = self.connections.head_mut(token.key())
            && header.timer != NodeId::NONE
            && !header.flags.any(Flags::CLOSING)
        {
            self.wheel.remove(header.timer);
            header.timer = NodeId::NONE;
        }
    }

    /// Arms an additional timeout of the connection, or moves the one with this tag.
    /// [`on_tagged_timeout`](crate::Handler::on_tagged_timeout) is called when it expires, unless it is moved or
    /// cleared before, or the connection ends. So a connection can have an idle timeout, a deadline and a heartbeat at
    /// once, with the values of an enum as tags.
    ///
    /// Use [`set_timeout`](Self::set_timeout) for the first timeout of a connection: it takes 24 bytes. While it is
    /// armed, a tagged timeout counts against [`Config::timers_max`](crate::Config::timers_max) and takes about 100
    /// bytes; moving it needs a look-up in a map.
    ///
    /// # Errors
    /// [`Error::Stale`], also if the connection is being closed, and [`Error::Full`] at
    /// [`Config::timers_max`](crate::Config::timers_max).
    pub fn set_tagged_timeout(
        &mut self,
        token: Token,
        tag: u64,
        after: Duration,
    ) -> Result<(), Error> {
        let takes_timeouts =
            |header: &ConnHeader| !header.flags.any(Flags::CLOSING | Flags::CLOSED);
        if !self.header(token).is_some_and(takes_timeouts) {
            return Err(Error::Stale);
        }
        if let Some(timer) = self.tagged.get(&(token, tag)) {
            let deadline = self.tick_after(after);
            if let Some(timer) = self.timers.head(timer.key()) {
                self.wheel.set_deadline(timer.node, deadline);
            }
            return Ok(());
        }
        let timer = self.insert_timer(after, Some((token, tag)))?;
        self.tagged.insert((token, tag), timer);
        Ok(())
    }

    /// Disarms the connection's timeout with this tag; returns whether it was armed.
    pub fn clear_tagged_timeout(&mut self, token: Token, tag: u64) -> bool {
        self.tagged.remove(&(token, tag)).is_some_and(|timer| self.remove_timer(timer).is_some())
    }

    /// The connection is being closed: disarms its tagged timeouts.
    #[inline]
    pub(super) fn clear_tagged_timeouts(&mut self, token: Token) {
        if !self.tagged.is_empty() {
            self.clear_tagged_timeouts_of(token);
        }
    }

    #[cold]
    fn clear_tagged_timeouts_of(&mut self, token: Token) {
        while let Some((&(_, tag), _)) = self.tagged.range((token, 0)..=(token, u64::MAX)).next() {
            self.clear_tagged_timeout(token, tag);
        }
    }

    /// Arms a timer that belongs to no connection; [`on_timer`](crate::Handler::on_timer) is called once.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::timers_max`](crate::Config::timers_max).
    pub fn add_timer(&mut self, after: Duration) -> Result<TimerId, Error> {
        self.insert_timer(after, None)
    }

    /// Disarms a timer; returns whether it was armed.
    pub fn cancel_timer(&mut self, timer: TimerId) -> bool {
        self.remove_timer(timer).is_some()
    }

    fn insert_timer(
        &mut self,
        after: Duration,
        tagged: Option<(Token, u64)>,
    ) -> Result<TimerId, Error> {
        let full = Error::Full { what: "timers", limit: self.timers.capacity() };
        let unarmed = Timer { node: NodeId::NONE, tagged };
        let timer = TimerId::from(self.timers.insert(unarmed, ()).map_err(|_| full)?);
        let deadline = self.tick_after(after);
        let node = self.wheel.insert(deadline, EventSource::Timer(timer).to_bits());
        if let Some(timer) = self.timers.head_mut(timer.key()) {
            timer.node = node;
        }
        Ok(timer)
    }

    fn remove_timer(&mut self, timer: TimerId) -> Option<Timer> {
        let (timer, ()) = self.timers.remove(timer.key())?;
        self.wheel.remove(timer.node);
        Some(timer)
    }

    /// The next expired timer; each timer that is examined takes one from the budget.
    pub(crate) fn next_due(&mut self, budget: &mut u32) -> Option<Due> {
        let now = self.tick();
        loop {
            match EventSource::from_bits(self.wheel.poll(now, budget)?)? {
                EventSource::Timer(timer) => match self.timers.remove(timer.key()) {
                    Some((Timer { tagged: Some((token, tag)), .. }, ())) => {
                        self.tagged.remove(&(token, tag));
                        return Some(Due::TaggedTimeout(token, tag));
                    }
                    _ => return Some(Due::Timer(timer)),
                },
                EventSource::Connection(token) => {
                    if let Some(header) = self.header_mut(token) {
                        header.timer = NodeId::NONE;
                        return Some(Due::Timeout(token));
                    }
                }
                EventSource::Inner(inner) => return Some(Due::Inner(inner)),
                EventSource::Listener(_) | EventSource::Watch(_) => {} // These have no timer.
            }
        }
    }

    /// The time at which the wheel must be polled next.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.wheel.next_tick().map(|tick| self.started + Duration::from_millis(tick))
    }

    /// The maximum time to wait for events: until the next timer, and at most `most`.
    pub(crate) fn wait_within(&self, most: Option<Duration>) -> Option<Duration> {
        let Some(due) = self.next_timer() else { return most };
        let until_due = due.saturating_duration_since(self.poller.now());
        Some(most.map_or(until_due, |most| most.min(until_due)))
    }

    /// Arms the timeout in any state of the connection.
    pub(super) fn arm(&mut self, token: Token, after: Duration) {
        let deadline = self.tick_after(after);
        let Some(header) = self.connections.head_mut(token.key()) else { return };
        if header.timer == NodeId::NONE {
            header.timer = self.wheel.insert(deadline, EventSource::Connection(token).to_bits());
        } else {
            self.wheel.set_deadline(header.timer, deadline);
        }
    }

    pub(super) fn tick(&self) -> Tick {
        ticks(self.elapsed, self.elapsed.subsec_millis())
    }

    /// The first tick by which `after` has passed.
    pub(super) fn tick_after(&self, after: Duration) -> Tick {
        let deadline = self.elapsed.saturating_add(after);
        ticks(deadline, deadline.subsec_nanos().div_ceil(1_000_000)).min(Tick::MAX / 2)
    }
}

/// The whole seconds of `time`, plus `milliseconds`, in ticks.
fn ticks(time: Duration, milliseconds: u32) -> Tick {
    time.as_secs().saturating_mul(1000).saturating_add(Tick::from(milliseconds))
}
