//! Timeouts of connections, and free timers. Both are rounded up to a millisecond and never early.

use std::time::{Duration, Instant};

use crate::connection::Flags;
use crate::context::Context;
use crate::error::Error;
use crate::token::{EventSource, TimerId, Token};
use crate::wheel::{NodeId, Tick};

impl<C> Context<C> {
    /// Arms the connection's timeout, or moves it: [`on_timeout`](crate::Handler::on_timeout) follows unless it is
    /// moved or cleared before. Moving it to later, as an idle timeout does on each message, stores one integer.
    ///
    /// While the connection is still connecting, this is the time that the connect may take, and it is disarmed when
    /// the connection opens: arm an idle timeout in [`on_open`](crate::Handler::on_open), not right after
    /// [`connect`](Self::connect). Nothing for a stale token, and for a connection that is being closed.
    pub fn set_timeout(&mut self, token: Token, after: Duration) {
        if self
            .header(token)
            .is_some_and(|header| !header.flags.any(Flags::CLOSING | Flags::CLOSED))
        {
            self.arm(token, after);
        }
    }

    /// Disarms the connection's timeout. Nothing for a stale token, and for a connection that is being closed.
    pub fn clear_timeout(&mut self, token: Token) {
        if let Some(header) = self.connections.head_mut(token.key())
            && header.timer != NodeId::NONE
            && !header.flags.any(Flags::CLOSING)
        {
            self.wheel.remove(header.timer);
            header.timer = NodeId::NONE;
        }
    }

    /// Arms a timer of its own: [`on_timer`](crate::Handler::on_timer) follows, once.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::timers_max`](crate::Config::timers_max).
    pub fn add_timer(&mut self, after: Duration) -> Result<TimerId, Error> {
        let full = Error::Full { what: "timers", limit: self.timers.capacity() };
        let timer = TimerId::from(self.timers.insert(NodeId::NONE, ()).map_err(|_| full)?);
        let deadline = self.tick_after(after);
        let node = self.wheel.insert(deadline, EventSource::Timer(timer).to_bits());
        if let Some(place) = self.timers.head_mut(timer.key()) {
            *place = node;
        }
        Ok(timer)
    }

    /// Disarms a timer; says whether it was still armed.
    pub fn cancel_timer(&mut self, timer: TimerId) -> bool {
        match self.timers.remove(timer.key()) {
            Some((node, ())) => {
                self.wheel.remove(node);
                true
            }
            None => false,
        }
    }

    /// A timer that is due, at the price of one from the budget for each that is looked at.
    pub(crate) fn next_due(&mut self, budget: &mut u32) -> Option<EventSource> {
        let now = self.tick();
        loop {
            match EventSource::from_bits(self.wheel.poll(now, budget)?)? {
                EventSource::Timer(timer) => {
                    self.timers.remove(timer.key());
                    return Some(EventSource::Timer(timer));
                }
                EventSource::Connection(token) => {
                    if let Some(header) = self.header_mut(token) {
                        header.timer = NodeId::NONE;
                        return Some(EventSource::Connection(token));
                    }
                }
                other => return Some(other),
            }
        }
    }

    /// When the wheel is to be looked at.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.wheel.next_tick().map(|tick| self.started + Duration::from_millis(tick))
    }

    /// How long the kernel may let us wait: not past the next timer, nor past `most`.
    pub(crate) fn wait_within(&self, most: Option<Duration>) -> Option<Duration> {
        let Some(due) = self.next_timer() else { return most };
        let until_due = due.saturating_duration_since(self.poller.now());
        Some(most.map_or(until_due, |most| most.min(until_due)))
    }

    /// Arms the timeout whatever the state of the connection.
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

    /// The first tick at which `after` has passed.
    pub(super) fn tick_after(&self, after: Duration) -> Tick {
        let deadline = self.elapsed.saturating_add(after);
        ticks(deadline, deadline.subsec_nanos().div_ceil(1_000_000)).min(Tick::MAX / 2)
    }
}

/// The whole seconds of a time and some milliseconds, as ticks.
fn ticks(time: Duration, milliseconds: u32) -> Tick {
    time.as_secs().saturating_mul(1000).saturating_add(Tick::from(milliseconds))
}
