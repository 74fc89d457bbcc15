//! The maximum rate of new connections, without bursts.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The largest burst after a delay.
const BURST: Duration = Duration::from_millis(10);

/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(366 * 24 * 3600);

/// A steady rate of permits.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    interval: Duration,
    /// When the next permit is due.
    next: Instant,
}

impl RateLimiter {
    /// This many permits a second from `now` on, which must not be zero.
    pub(crate) fn new(per_second: u64, now: Instant) -> Self {
        Self { interval: Duration::from_secs(1).div_f64(per_second as f64), next: now }
    }

    /// Takes a permit; the error is the time until the next one.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        if self.next > now {
            return Err(self.next - now);
        }
        let oldest = now.checked_sub(BURST).unwrap_or(now);
        self.next = self.next.max(oldest) + self.interval;
        Ok(())
    }
}

/// A part of the ramp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Connects per second at most; 0 is a pause.
    pub per_second: u64,
    /// Its duration.
    pub duration: Duration,
}

/// Consecutive stages. The last one that is not a pause continues until everything is open.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The stages that follow.
    next: VecDeque<Stage>,
    /// `None` in a pause.
    limiter: Option<RateLimiter>,
    ends: Instant,
    last_per_second: u64,
}

impl Pace {
    pub(crate) fn new(stages: &[Stage], now: Instant) -> Self {
        let last_per_second = stages.iter().rfind(|stage| stage.per_second > 0);
        let last_per_second = last_per_second.map_or(1, |stage| stage.per_second);
        let next = stages.iter().copied().collect();
        Self { next, limiter: None, ends: now, last_per_second }
    }

    /// Takes a permit; the error is the time until the next call can succeed.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        while self.ends <= now {
            let began = self.ends;
            let forever = Stage { per_second: self.last_per_second, duration: FOREVER };
            let stage = self.next.pop_front().unwrap_or(forever);
            self.ends = began + stage.duration;
            self.limiter =
                (stage.per_second > 0).then(|| RateLimiter::new(stage.per_second, began));
        }
        let rest = self.ends - now;
        let Some(limiter) = &mut self.limiter else { return Err(rest) };
        limiter.take(now).map_err(|wait| wait.min(rest))
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
    fn the_burst_after_a_pause_is_ten_milliseconds() {
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

    #[test]
    fn stages_follow_each_other_and_the_last_rate_continues() {
        let start = Instant::now();
        let stage =
            |per_second, seconds| Stage { per_second, duration: Duration::from_secs(seconds) };
        let mut pace =
            Pace::new(&[stage(1_000, 2), stage(0, 3), stage(100, 1), stage(0, 1)], start);
        let mut taken = [0; 9];
        for ms in 0..9_000 {
            let now = start + Duration::from_millis(ms);
            taken[ms as usize / 1000] += (0..).take_while(|_| pace.take(now).is_ok()).count();
        }
        for (second, expected) in [1_000, 1_000, 0, 0, 0, 100, 0, 100, 100].into_iter().enumerate()
        {
            assert!(taken[second].abs_diff(expected) <= expected / 100 + 1, "{second}: {taken:?}");
        }
    }

    #[test]
    fn in_a_pause_the_wait_is_until_its_end() {
        let start = Instant::now();
        let pause = Stage { per_second: 0, duration: Duration::from_secs(3) };
        let flow = Stage { per_second: 10, duration: Duration::from_secs(1) };
        let mut pace = Pace::new(&[pause, flow], start);
        assert_eq!(pace.take(start), Err(Duration::from_secs(3)));
        assert_eq!(pace.take(start + Duration::from_secs(3)), Ok(()));
    }
}
