//! Connections per second at the most, without bursts.

use std::time::{Duration, Instant};

/// What was not opened in time may be made up for by at most so much at once.
const BURST: Duration = Duration::from_millis(10);

/// A steady rate of permits.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    interval: Duration,
    /// When the next permit is due.
    next: Instant,
}

impl RateLimiter {
    /// So many permits a second from `now` on; the caller has seen to it that they are not zero.
    pub(crate) fn new(per_second: u64, now: Instant) -> Self {
        Self { interval: Duration::from_secs(1).div_f64(per_second as f64), next: now }
    }

    /// Takes a permit, or says how long to wait for the next one.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        if self.next > now {
            return Err(self.next - now);
        }
        let oldest = now.checked_sub(BURST).unwrap_or(now);
        self.next = self.next.max(oldest) + self.interval;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(pace: &mut RateLimiter, now: Instant) -> u32 {
        (0..).take_while(|_| pace.take(now).is_ok()).count() as u32
    }

    #[test]
    fn a_second_brings_the_rate_and_not_more() {
        let start = Instant::now();
        for rate in [1, 7, 100, 5_000, 123_456] {
            let mut pace = RateLimiter::new(rate, start);
            let total: u32 =
                (0..1000).map(|ms| taken(&mut pace, start + Duration::from_millis(ms))).sum();
            assert!(u64::from(total).abs_diff(rate) <= 1 + rate / 500, "{rate}: {total}");
        }
    }

    #[test]
    fn a_pause_is_made_up_for_by_ten_milliseconds_only() {
        let start = Instant::now();
        let mut pace = RateLimiter::new(10_000, start);
        assert_eq!(taken(&mut pace, start), 1);
        assert!(taken(&mut pace, start + Duration::from_secs(60)) <= 101);
    }

    #[test]
    fn the_wait_ends_at_the_next_permit() {
        let start = Instant::now();
        let mut pace = RateLimiter::new(10, start);
        pace.take(start).unwrap();
        assert_eq!(pace.take(start), Err(Duration::from_millis(100)));
        assert_eq!(pace.take(start + Duration::from_millis(100)), Ok(()));
    }
}
