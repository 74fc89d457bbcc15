//! Peers that read too slowly: all data that waits for a peer at one moment must be taken within the timeout.
//!
//! What waits is what is queued here and what the kernel holds because the peer has not acknowledged it. So a peer that
//! reads a little now and then, just enough for the queue to run empty, is as slow as one that reads nothing; and one
//! that always has something waiting, and takes it, is not slow.
//!
//! A connection is watched from when data has to wait for it until none does; the others cost nothing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use reactor::Token;

#[derive(Debug)]
pub(crate) struct SlowReaders {
    timeout: Duration,
    watched: HashMap<Token, Waiting>,
}

/// What waited for a peer at one moment, and what has been written to it since.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    bytes: usize,
    written: usize,
}

/// What checking a connection finds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Nothing waits for it any more, and it is no longer watched.
    Done,
    /// The time that it has left.
    Within(Duration),
    /// Its time is over.
    TooSlow,
}

impl SlowReaders {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, watched: HashMap::new() }
    }

    pub(crate) fn watches(&self, token: Token) -> bool {
        !self.watched.is_empty() && self.watched.contains_key(&token)
    }

    /// Begins to watch a connection with `waiting_bytes`; returns how long it has.
    pub(crate) fn watch(&mut self, token: Token, waiting_bytes: usize, now: Instant) -> Duration {
        self.watched.insert(token, Waiting { since: now, bytes: waiting_bytes, written: 0 });
        self.timeout
    }

    /// More was written to this peer.
    pub(crate) fn note_written(&mut self, token: Token, bytes: usize) {
        if !self.watched.is_empty()
            && let Some(waiting) = self.watched.get_mut(&token)
        {
            waiting.written += bytes;
        }
    }

    /// Checks a connection for which `waiting_bytes` wait now.
    pub(crate) fn check(&mut self, token: Token, waiting_bytes: usize, now: Instant) -> Check {
        let watched = self.watched.get_mut(&token).filter(|_| waiting_bytes > 0);
        let Some(waiting) = watched else {
            self.watched.remove(&token);
            return Check::Done;
        };
        if waiting.taken(waiting_bytes) >= waiting.bytes {
            *waiting = Waiting { since: now, bytes: waiting_bytes, written: 0 };
        }
        let left = self.timeout.saturating_sub(now.saturating_duration_since(waiting.since));
        if left.is_zero() { Check::TooSlow } else { Check::Within(left) }
    }

    /// At most `most` connections for which data has waited for `least` or longer.
    pub(crate) fn waiting_for(
        &self,
        least: Duration,
        most: usize,
        now: Instant,
    ) -> impl Iterator<Item = Token> {
        let watched = self.watched.keys().copied();
        watched.filter(move |&token| self.has_waited(token, least, now)).take(most)
    }

    /// Whether data has waited for this peer for `least` or longer.
    pub(crate) fn has_waited(&self, token: Token, least: Duration, now: Instant) -> bool {
        let since = self.watched.get(&token).map(|waiting| waiting.since);
        since.is_some_and(|since| now.saturating_duration_since(since) >= least)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    pub(crate) fn forget(&mut self, token: Token) {
        if !self.watched.is_empty() {
            self.watched.remove(&token);
        }
    }
}

impl Waiting {
    /// What the peer has taken since, if `waiting_bytes` wait now.
    fn taken(&self, waiting_bytes: usize) -> usize {
        self.bytes.saturating_add(self.written).saturating_sub(waiting_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn token(number: u64) -> Token {
        Token::from_bits((1 << 32) | number).expect("is a connection's")
    }

    /// A peer that takes `taken_bytes` a second of 4 MB that wait for it, and gets as many new ones; returns the second
    /// in which it is too slow.
    fn seconds_until_too_slow(taken_bytes: usize) -> Option<u64> {
        const WAITING: usize = 4 << 20;
        let mut slow = SlowReaders::new(TIMEOUT);
        let start = Instant::now();
        slow.watch(token(1), WAITING, start);
        (1..600).find(|&second| {
            slow.note_written(token(1), taken_bytes);
            let now = start + Duration::from_secs(second);
            slow.check(token(1), WAITING, now) == Check::TooSlow
        })
    }

    #[test]
    fn slowness_is_bytes_over_time() {
        assert_eq!(seconds_until_too_slow(0), Some(60));
        assert_eq!(seconds_until_too_slow(1_000), Some(60), "a little now and then");
        assert_eq!(seconds_until_too_slow(100_000), None, "all that waited within the time");
    }

    #[test]
    fn who_has_taken_everything_is_watched_no_longer() {
        let mut slow = SlowReaders::new(TIMEOUT);
        let start = Instant::now();
        slow.watch(token(1), 10, start);
        assert!(slow.watches(token(1)) && !slow.watches(token(2)));
        let later = start + Duration::from_secs(59);
        assert_eq!(slow.check(token(1), 9, later), Check::Within(Duration::from_secs(1)));
        assert_eq!(slow.check(token(1), 0, later), Check::Done);
        assert!(slow.is_empty());
    }

    #[test]
    fn those_for_whom_something_waits_for_long_are_found() {
        let mut slow = SlowReaders::new(TIMEOUT);
        let start = Instant::now();
        for number in 1..=3 {
            slow.watch(token(number), 10, start + Duration::from_secs(number));
        }
        let now = start + Duration::from_secs(4);
        let mut found: Vec<Token> = slow.waiting_for(Duration::from_secs(2), 9, now).collect();
        found.sort_unstable();
        assert_eq!(found, [token(1), token(2)]);
        assert_eq!(slow.waiting_for(Duration::ZERO, 1, now).count(), 1);
        slow.forget(token(1));
        assert_eq!(slow.waiting_for(Duration::from_secs(3), 9, now).count(), 0);
    }
}
