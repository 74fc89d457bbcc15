//! Resets the connections with the most queued data when memory or the kernel's room for data is used up.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use reactor::{Context, Token};

use super::{Echo, ThreadRole};
use crate::slow::Check;

/// While the kernel is short of room for data, a peer that has not taken its queued data within this time may be reset.
const BUFFERS_PATIENCE: Duration = Duration::from_secs(1);

/// The maximum number of such resets at a time, because the kernel takes long to free the data of each.
const BUFFERS_RESETS_MAX: usize = 64;

/// The maximum number of watched connections that are examined at a time, with two system calls each.
const EXAMINED_MAX: usize = 4_096;

/// The time between two searches for connections with data only in the kernel, while the total in sockets is high.
const SEARCH_INTERVAL: Duration = Duration::from_secs(2);

/// Connections with less than this, a page, are neither searched for nor reset.
pub(super) const HELD_BYTES_MIN: usize = 4_096;

/// The time of the last search for slow readers.
#[derive(Debug, Default)]
pub(super) struct Search {
    last: Option<Instant>,
}

/// The shortage, its size, and which connections are reset for it.
struct Shedding {
    shortage: &'static str,
    bytes: u64,
    /// The part of it that a peer holds.
    held_by: fn(&Context<()>, Token) -> usize,
    /// A peer that has taken its queued data within this time is not reset.
    patience: Duration,
    resets_max: usize,
}

impl<R: ThreadRole> Echo<R> {
    /// Searches for connections with data only in the kernel, while the total in sockets is high.
    pub(super) fn search_slow_readers(&mut self, cx: &mut Context<()>) {
        let is_early = self.search.last.is_some_and(|last| cx.now() < last + SEARCH_INTERVAL);
        if !is_early && self.gate.decision().buffers_full && cx.sweep().is_ok() {
            self.search.last = Some(cx.now());
        }
    }

    /// Resets the connections with the most queued data, if the latest decision requires it.
    pub(super) fn shed(&mut self, cx: &mut Context<()>) {
        let decision = self.gate.decision();
        let for_memory = Shedding {
            shortage: "memory",
            bytes: decision.memory_to_free_bytes,
            held_by: if decision.charges_socket_data {
                waiting_bytes
            } else {
                Context::queued_bytes
            },
            patience: Duration::ZERO,
            resets_max: usize::MAX,
        };
        let for_buffers = Shedding {
            shortage: "tcp_mem",
            bytes: decision.buffers_to_free_bytes,
            held_by: Context::unacknowledged_bytes,
            patience: BUFFERS_PATIENCE,
            resets_max: BUFFERS_RESETS_MAX,
        };
        self.reset_largest(cx, &for_memory);
        self.reset_largest(cx, &for_buffers);
    }

    fn reset_largest(&mut self, cx: &mut Context<()>, shedding: &Shedding) {
        if shedding.bytes == 0 || self.slow.is_empty() {
            return;
        }
        let holders = self.holders(cx, shedding.patience).into_iter();
        let holders = holders.map(|token| ((shedding.held_by)(cx, token), token)).collect();
        let mut largest = largest(holders, shedding.bytes);
        largest.truncate(shedding.resets_max);
        if largest.is_empty() {
            return;
        }
        let shortage = shedding.shortage;
        let times = self.closed_by.entry(shortage).or_default();
        let before = *times;
        *times += largest.len() as u64;
        if times.checked_ilog2() != before.checked_ilog2() {
            log::warn!(
                "{shortage} is short: {} connections with the most queued data are reset ({times} so far)",
                largest.len()
            );
        }
        for token in largest {
            cx.abort(token);
        }
    }

    /// Connections whose peers have not taken their queued data within `patience`.
    fn holders(&mut self, cx: &mut Context<()>, patience: Duration) -> Vec<Token> {
        let now = cx.now();
        let watched: Vec<Token> = self.slow.waiting_for(patience, EXAMINED_MAX, now).collect();
        let mut holders = Vec::new();
        for token in watched {
            match self.slow.check(token, waiting_bytes(cx, token), now) {
                Check::Done => self.reset_timeout(cx, token),
                Check::Within(_) if !self.slow.has_waited(token, patience, now) => {}
                Check::Within(_) | Check::TooSlow => holders.push(token),
            }
        }
        holders
    }
}

/// The written data that the peer has not taken: queued here or in the kernel.
pub(super) fn waiting_bytes(cx: &Context<()>, token: Token) -> usize {
    cx.queued_bytes(token) + cx.unacknowledged_bytes(token)
}

/// The largest holders that together hold `bytes`, without those that hold less than a page.
fn largest(mut holders: Vec<(usize, Token)>, bytes: u64) -> Vec<Token> {
    holders.retain(|&(held_bytes, _)| held_bytes >= HELD_BYTES_MIN);
    holders.sort_unstable_by_key(|&(held_bytes, _)| Reverse(held_bytes));
    let mut taken_bytes = 0;
    let still_wanted = |&(held_bytes, _): &(usize, Token)| {
        let is_wanted = taken_bytes < bytes;
        taken_bytes += held_bytes as u64;
        is_wanted
    };
    holders.into_iter().take_while(still_wanted).map(|(_, token)| token).collect()
}
