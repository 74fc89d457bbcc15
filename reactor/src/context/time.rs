//! Timeouts of connections, and free timers. Both are rounded up to a millisecond and never early.

use std::time::{Duration, Instant};

use crate::connection::Flags;
use crate::context::Context;
use crate::error::Error;
use crate::token::{EventSource, Inner, TimerId, Token};
use crate::wheel::{NodeId, Tick};

/// What is due.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Due {
    /// The timeout of a connection.
    Timeout(Token),
    /// A timer of a connection, and its tag.
    OfConnection(Token, u64),
    Timer(TimerId),
    Inner(Inner),
}

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
        self.insert_timer(after, None)
    }

    /// Arms a timer of a connection, beside its timeout: [`on_conn_timer`](crate::Handler::on_conn_timer) follows, once,
    /// with the connection's state and with `tag`, which says what it is for. A connection may have any number of them,
    /// and one without any pays nothing.
    ///
    /// A timer whose connection has gone is dropped without a call when its time comes, and counts for
    /// [`Config::timers_max`](crate::Config::timers_max) until then: cancel long ones in
    /// [`on_close`](crate::Handler::on_close).
    ///
    /// # Errors
    /// [`Error::Stale`], or [`Error::Full`] at [`Config::timers_max`](crate::Config::timers_max).
    pub fn add_conn_timer(
        &mut self,
        token: Token,
        after: Duration,
        tag: u64,
    ) -> Result<TimerId, Error> {
        if !self.holds(token) {
            return Err(Error::Stale);
        }
        self.insert_timer(after, Some((token, tag)))
    }

    fn insert_timer(
        &mut self,
        after: Duration,
        owner: Option<(Token, u64)>,
    ) -> Result<TimerId, Error> {
        let full = Error::Full { what: "timers", limit: self.timers.capacity() };
        let timer = TimerId::from(self.timers.insert(NodeId::NONE, owner).map_err(|_| full)?);
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
            Some((node, _)) => {
                self.wheel.remove(node);
                true
            }
            None => false,
        }
    }

    /// A timer that is due, at the price of one from the budget for each that is looked at.
    pub(crate) fn next_due(&mut self, budget: &mut u32) -> Option<Due> {
        let now = self.tick();
        loop {
            match EventSource::from_bits(self.wheel.poll(now, budget)?)? {
                EventSource::Timer(timer) => match self.timers.remove(timer.key()) {
                    Some((_, Some((token, tag)))) => return Some(Due::OfConnection(token, tag)),
                    _ => return Some(Due::Timer(timer)),
                },
                EventSource::Connection(token) => {
                    if let Some(header) = self.header_mut(token) {
                        header.timer = NodeId::NONE;
                        return Some(Due::Timeout(token));
                    }
                }
                EventSource::Inner(inner) => return Some(Due::Inner(inner)),
                EventSource::Listener(_) | EventSource::Watch(_) => {} // They have no timer.
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
        let until_due = due.saturating_duration_since(self.clock());
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
