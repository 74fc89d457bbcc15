//! How long the end of all connections is waited for.

use std::time::{Duration, Instant};

/// And a second more for each 10,000 connections.
pub(super) const WITHIN: Duration = Duration::from_secs(60);

const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Sockets that may be left of those that came with the connections.
const SOCKETS_LEFT_MAX: u64 = 50;

/// The server's sockets go as it reads that their peers are gone, and the clients' as the kernel clears up behind them.
/// The kernel's count of both is at hand; but other processes' sockets are in it, so once there have not been fewer for a
/// while, no more is waited.
#[derive(Debug)]
pub(super) struct Teardown {
    enough: u64,
    fewest: u64,
    ends: Instant,
    stalls: Instant,
}

impl Teardown {
    /// `before` is the count from before the connections.
    pub(super) fn new(before: u64, connections: u64, now: Instant) -> Self {
        let ends = now + WITHIN + Duration::from_secs(connections / 10_000);
        let enough = before + SOCKETS_LEFT_MAX;
        Self { enough, fewest: u64::MAX, ends, stalls: now + STALLED_AFTER }
    }

    /// Whether no more is waited, with this many sockets now.
    pub(super) fn is_over(&mut self, sockets: u64, now: Instant) -> bool {
        if sockets < self.fewest {
            self.fewest = sockets;
            self.stalls = now + STALLED_AFTER;
        }
        self.fewest <= self.enough || now >= self.ends.min(self.stalls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In 5 s the run's sockets are gone; others come and go.
    fn seconds_to_tear_down(others: u64) -> u64 {
        let began = Instant::now();
        let mut teardown = Teardown::new(0, 5_000, began);
        let sockets = |second: u64| 5_000_u64.saturating_sub(1_000 * second) + others + second % 3;
        let is_over =
            |&second: &u64| teardown.is_over(sockets(second), began + Duration::from_secs(second));
        (0..1_000).find(is_over).unwrap()
    }

    #[test]
    fn the_sockets_of_the_run_are_waited_for_and_not_those_of_others() {
        let stall = STALLED_AFTER.as_secs();
        assert!((5..5 + stall).contains(&seconds_to_tear_down(0)));
        assert!((5 + stall..WITHIN.as_secs()).contains(&seconds_to_tear_down(1_000)));
    }
}
