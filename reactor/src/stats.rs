//! What a reactor has counted since it began.

use std::collections::BTreeMap;

/// Counters of one reactor; see [`Context::stats`](crate::Context::stats).
///
/// At any time `accepted + connected == opened`, `opened - closed` connections are open, and each accept that the
/// kernel granted is in exactly one of `accepted`, `refused` and `dropped`.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Connections taken in and opened.
    pub accepted: u64,
    /// Connections that [`on_accept`](crate::Handler::on_accept) refused.
    pub refused: u64,
    /// Connections accepted and reset by the reactor itself, because descriptors, memory or watches had run out.
    pub dropped: u64,
    /// Outbound connects that opened.
    pub connected: u64,
    /// Outbound connects that failed or timed out after they were under way.
    pub connects_failed: u64,
    /// Connections for which `on_open` was called.
    pub opened: u64,
    /// Opened connections for which `on_close` was called.
    pub closed: u64,
    /// The most connections that were open at once.
    pub open_max: u64,
    /// Events for a connection that was gone already; each was dropped.
    pub stale_events: u64,
    /// Failed accepts by errno.
    pub accept_errors: BTreeMap<i32, u64>,
    /// How often a listener paused because descriptors, memory, watches or slots had run out.
    pub accept_pauses: u64,
    /// Returns from the kernel's wait.
    pub wakeups: u64,
    /// Events that the kernel reported.
    pub events: u64,
    /// Bytes read and handed to the service.
    pub bytes_in: u64,
    /// Bytes that the kernel took.
    pub bytes_out: u64,
    /// Bytes that wait in write queues now.
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

    /// Connections open now.
    #[must_use]
    #[inline]
    pub fn open(&self) -> u64 {
        self.opened - self.closed
    }
}
