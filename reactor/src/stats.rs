//! The counters of a reactor.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::time::Duration;

use crate::callback::CallbackTime;

/// Counters of one reactor since its creation; see [`Context::stats`](crate::Context::stats).
///
/// At any time `accepted + connected == opened`, `opened - closed` connections are open, and each successful `accept4`
/// is counted in exactly one of `accepted`, `refused` and `dropped`.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Connections that were accepted and opened.
    pub accepted: u64,
    /// Connections that [`on_accept`](crate::Handler::on_accept) refused.
    pub refused: u64,
    /// Connections that the reactor itself reset after `accept4`, because descriptors, memory or watches had run out.
    pub dropped: u64,
    /// Outbound connects that opened, and sockets that were adopted.
    pub connected: u64,
    /// Outbound connects that failed or timed out after they had started, and adopted sockets that ended before they
    /// opened.
    pub connects_failed: u64,
    /// Connections for which `on_open` was called.
    pub opened: u64,
    /// Opened connections for which `on_close` was called.
    pub closed: u64,
    /// The highest number of connections that were open at once.
    pub open_max: u64,
    /// Events for connections that had already been removed; they were dropped.
    pub stale_events: u64,
    /// Failed accepts by errno.
    pub accept_errors: BTreeMap<i32, u64>,
    /// How often a listener paused because descriptors, memory, watches or slots had run out.
    pub accept_pauses: u64,
    /// Returns from `epoll_wait`.
    pub wakeups: u64,
    /// The duration of the longest turn since the start or [`Context::reset_lag`](crate::Context::reset_lag), without its
    /// wait. It delays timers, accepts and wake-ups. If more sockets are ready than
    /// [`Config::events_per_wait`](crate::Config::events_per_wait), an event waits for several turns.
    pub turn_longest: Duration,
    /// The longest callback in the same time and its duration. `None` without
    /// [`Config::times_callbacks`](crate::Config::times_callbacks).
    pub callback_longest: Option<CallbackTime>,
    /// The total duration of all turns, without their waits. Its increase over a period, divided by the length of the
    /// period, is the reactor's utilization.
    pub busy: Duration,
    /// Events that the kernel reported.
    pub events: u64,
    /// Bytes received and passed to the service.
    pub bytes_in: u64,
    /// Bytes that the kernel accepted.
    pub bytes_out: u64,
    /// Bytes now in write queues, except those of files, which are not in memory.
    pub queued_bytes: usize,
    /// Timers and timeouts armed now.
    pub timers_armed: usize,
}

impl Stats {
    #[inline]
    pub(crate) fn count_open(&mut self) {
        self.opened += 1;
        self.open_max = self.open_max.max(self.open());
    }

    /// Returns the number of connections open now.
    #[must_use]
    #[inline]
    pub fn open(&self) -> u64 {
        self.opened - self.closed
    }
}

/// Adds the counters of another reactor, to show several reactors as one.
///
/// `open_max` is not changed: peaks at different times can't be added. `turn_longest` and `callback_longest` become the
/// longer of the two.
impl AddAssign<&Self> for Stats {
    fn add_assign(&mut self, other: &Self) {
        // All fields are named, so that the compiler reports a new counter that is missing here.
        let Self {
            accepted,
            refused,
            dropped,
            connected,
            connects_failed,
            opened,
            closed,
            open_max: _,
            stale_events,
            accept_errors,
            accept_pauses,
            wakeups,
            turn_longest,
            callback_longest,
            busy,
            events,
            bytes_in,
            bytes_out,
            queued_bytes,
            timers_armed,
        } = other;
        self.accepted += accepted;
        self.refused += refused;
        self.dropped += dropped;
        self.connected += connected;
        self.connects_failed += connects_failed;
        self.opened += opened;
        self.closed += closed;
        self.stale_events += stale_events;
        self.accept_pauses += accept_pauses;
        self.wakeups += wakeups;
        self.turn_longest = self.turn_longest.max(*turn_longest);
        self.callback_longest = CallbackTime::longer(self.callback_longest, *callback_longest);
        self.busy += *busy;
        self.events += events;
        self.bytes_in += bytes_in;
        self.bytes_out += bytes_out;
        self.queued_bytes += queued_bytes;
        self.timers_armed += timers_armed;
        for (&errno, &times) in accept_errors {
            *self.accept_errors.entry(errno).or_default() += times;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callback::Callback;

    #[test]
    fn counters_of_two_reactors_are_added_and_their_peaks_are_not() {
        let slow = CallbackTime { callback: Callback::Open, time: Duration::from_secs(20) };
        let one = Stats {
            accepted: 1,
            refused: 2,
            dropped: 3,
            connected: 4,
            connects_failed: 5,
            opened: 7,
            closed: 6,
            open_max: 8,
            stale_events: 9,
            accept_errors: BTreeMap::from([(24, 10), (12, 1)]),
            accept_pauses: 11,
            wakeups: 12,
            turn_longest: Duration::from_secs(18),
            callback_longest: Some(slow),
            busy: Duration::from_secs(19),
            events: 13,
            bytes_in: 14,
            bytes_out: 15,
            queued_bytes: 16,
            timers_armed: 17,
        };
        let mut sum = Stats { open_max: 3, ..Stats::default() };
        sum.accept_errors.insert(24, 1);
        sum += &one;
        sum += &one;
        let twice = Stats {
            accepted: 2,
            refused: 4,
            dropped: 6,
            connected: 8,
            connects_failed: 10,
            opened: 14,
            closed: 12,
            open_max: 3,
            stale_events: 18,
            accept_errors: BTreeMap::from([(24, 21), (12, 2)]),
            accept_pauses: 22,
            wakeups: 24,
            turn_longest: Duration::from_secs(18),
            callback_longest: Some(slow),
            busy: Duration::from_secs(38),
            events: 26,
            bytes_in: 28,
            bytes_out: 30,
            queued_bytes: 32,
            timers_armed: 34,
        };
        assert_eq!(format!("{sum:?}"), format!("{twice:?}"));
        assert_eq!(sum.open(), 2);
    }
}
