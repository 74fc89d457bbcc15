//! Peers that read too slowly: all data that is queued for a peer at one moment must be taken within the timeout.
//!
//! This includes data in the kernel that the peer has not acknowledged. So a peer that occasionally reads a little,
//! just enough to empty the queue, is as slow as one that reads nothing; and a peer that always has queued data, and
//! takes it, is not slow.
//!
//! A connection is watched while data is queued for it; the others cost nothing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use reactor::Token;

#[derive(Debug)]
pub(crate) struct SlowReaders {
    timeout: Duration,
    watched: HashMap<Token, Waiting>,
}

/// The data queued for a peer at one moment, and the data written to it since.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    bytes: usize,
    written: usize,
}

/// The result of checking a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// No data is queued for it, and it is no longer watched.
    Done,
    /// The remaining time.
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

    /// Begins to watch a connection with `waiting_bytes`; returns its time limit.
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

    /// Checks a connection with `waiting_bytes` queued now.
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

    /// At most `most` connections with data queued for `least` or longer.
    pub(crate) fn waiting_for(
        &self,
        least: Duration,
        most: usize,
        now: Instant,
    ) -> impl Iterator<Item = Token> {
        let watched = self.watched.keys().copied();
        watched.filter(move |&token| self.has_waited(token, least, now)).take(most)
    }

    /// Whether data has been queued for this peer for `least` or longer.
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
    /// The bytes that the peer has taken since, if `waiting_bytes` are queued now.
    fn taken(&self, waiting_bytes: usize) -> usize {
        self.bytes.saturating_add(self.written).saturating_sub(waiting_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn token(number: u64) -> Token {
        Token::from_bits((1 << 32) | number).expect("the token of a connection")
    }

    /// A peer with 4 MB queued that takes `taken_bytes` per second, and is sent the same number of new ones; returns
    /// the second in which it is too slow.
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
        assert_eq!(seconds_until_too_slow(1_000), Some(60), "a little at times");
        assert_eq!(seconds_until_too_slow(100_000), None, "all queued data within the time");
    }

    #[test]
    fn a_peer_that_has_taken_everything_is_no_longer_watched() {
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
    fn peers_with_data_queued_for_long_are_found() {
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
