//! When the sockets of a run are closed.

use std::time::{Duration, Instant};

/// In addition to one second per 10,000 connections.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Sockets that may remain after the teardown, in addition to those before the run.
pub(crate) const SOCKETS_LEFT_MAX: u64 = 50;

/// The server closes its sockets as it reads the resets, and the kernel frees the clients' sockets. Its count of sockets
/// includes those of other processes, so the teardown also ends when the count has not decreased for some time.
#[derive(Debug)]
pub(crate) struct Teardown {
    sockets_max: u64,
    stall_timeout: Duration,
    fewest: u64,
    decreased: Instant,
}

impl Teardown {
    pub(crate) fn new(sockets_max: u64, stall_timeout: Duration, now: Instant) -> Self {
        Self { sockets_max, stall_timeout, fewest: u64::MAX, decreased: now }
    }

    /// Takes the current number of sockets.
    pub(crate) fn is_over(&mut self, sockets: u64, now: Instant) -> bool {
        if sockets < self.fewest {
            (self.fewest, self.decreased) = (sockets, now);
        }
        self.fewest <= self.sockets_max || now >= self.decreased + self.stall_timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL_SECONDS: u64 = 5;

    /// The sockets of the run are closed within 5 s; others open and close all the time.
    fn seconds_to_tear_down(others: u64) -> u64 {
        let began = Instant::now();
        let stall_timeout = Duration::from_secs(STALL_SECONDS);
        let mut teardown = Teardown::new(SOCKETS_LEFT_MAX, stall_timeout, began);
        let sockets = |second: u64| 5_000_u64.saturating_sub(1_000 * second) + others + second % 3;
        let is_over =
            |&second: &u64| teardown.is_over(sockets(second), began + Duration::from_secs(second));
        (0..1_000).find(is_over).unwrap()
    }

    #[test]
    fn the_sockets_of_the_run_are_waited_for_and_not_those_of_others() {
        assert!((5..5 + STALL_SECONDS).contains(&seconds_to_tear_down(0)));
        assert!((5 + STALL_SECONDS..TIMEOUT.as_secs()).contains(&seconds_to_tear_down(1_000)));
    }
}
