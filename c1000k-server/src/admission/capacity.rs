//! Counts the connections of all threads against their maximum.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use c1000k_host::format;

/// Time between two log lines about the limit.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Capacity {
    max: u64,
    /// Connections that are open or about to be.
    claimed: AtomicU64,
    open: AtomicU64,
    open_max: AtomicU64,
    notice: Notice,
}

impl Capacity {
    pub(crate) fn new(max: u64) -> Self {
        Self {
            max,
            claimed: AtomicU64::new(0),
            open: AtomicU64::new(0),
            open_max: AtomicU64::new(0),
            notice: Notice::new(),
        }
    }

    /// Reserves a place for a connection that is about to open, if one is free.
    pub(crate) fn claim(&self) -> bool {
        let one_more = |claimed| (claimed < self.max).then_some(claimed + 1);
        self.claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Releases the place of a connection that did not open.
    pub(crate) fn release(&self) {
        self.claimed.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn note_open(&self) {
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.open_max.fetch_max(open, Ordering::Relaxed);
    }

    pub(crate) fn note_close(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.release();
    }

    /// The open connections, without those that wait to be closed.
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    pub(crate) fn open_max(&self) -> u64 {
        self.open_max.load(Ordering::Relaxed)
    }

    /// Logs that all places are taken, unless that was logged already.
    pub(crate) fn log_full(&self, now: Instant) {
        if self.notice.is_due_for_full(now) {
            let max = format::counted(self.max, "connection");
            log::warn!("at capacity: {max} held; further connections are refused");
        }
    }

    /// Logs that places are free again, after a line that said that none was.
    pub(crate) fn log_room(&self, now: Instant) {
        let open = self.open();
        if self.notice.is_due_for_room(open, self.max, now) {
            log::info!(
                "below capacity again: {} held, admitting",
                format::counted(open, "connection")
            );
        }
    }
}

/// Decides when to log a line about the limit: at most one per [`NOTICE_INTERVAL`], however often the limit is reached.
#[derive(Debug)]
struct Notice {
    started: Instant,
    /// 0 before the first line; then its time in milliseconds since the start, plus one, times two, plus one if the
    /// line said that all places are taken. One word, so that no lock is needed.
    last: AtomicU64,
}

impl Notice {
    fn new() -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0) }
    }

    fn is_due_for_full(&self, now: Instant) -> bool {
        self.change(true, now)
    }

    fn is_due_for_room(&self, open: u64, max: u64, now: Instant) -> bool {
        is_full(self.last.load(Ordering::Relaxed))
            && open <= max - free_min(max)
            && self.change(false, now)
    }

    fn change(&self, to_full: bool, now: Instant) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        if is_full(last) == to_full {
            return false;
        }
        let since_start = now.saturating_duration_since(self.started);
        let now_ms = since_start.as_millis() as u64;
        let is_early = (last >> 1).checked_sub(1).is_some_and(|last_ms| {
            now_ms.saturating_sub(last_ms) < NOTICE_INTERVAL.as_millis() as u64
        });
        let next = ((now_ms + 1) << 1) | u64::from(to_full);
        !is_early
            && self.last.compare_exchange(last, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

fn is_full(last: u64) -> bool {
    last & 1 == 1
}

/// The free places at which a line says that there is room: 5%, and more than one if the limit allows it.
fn free_min(max: u64) -> u64 {
    (max / 20).max(2).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn peers_that_connect_and_leave_at_the_limit_cause_at_most_one_line_a_second() {
        for max in [1, 2, 10, 1_000] {
            let notice = Notice::new();
            let start = Instant::now();
            let lines = (0..10_000_u64).filter(|&step| {
                let now = start + Duration::from_millis(step);
                notice.is_due_for_full(now) | notice.is_due_for_room(0, max, now)
            });
            assert!((9..=10).contains(&lines.count()), "{max}");
        }
        let notice = Notice::new();
        let now = Instant::now();
        assert!(notice.is_due_for_full(now) && !notice.is_due_for_full(now));
        let later = now + NOTICE_INTERVAL;
        assert!(!notice.is_due_for_room(9, 10, later), "one free place is no room");
        assert!(notice.is_due_for_room(8, 10, later) && !notice.is_due_for_room(8, 10, later));
    }

    #[test]
    fn threads_together_claim_no_more_places_than_the_limit() {
        const MAX: u64 = 1_000;
        let capacity = Capacity::new(MAX);
        let claimed = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..MAX {
                        if capacity.claim() {
                            capacity.note_open();
                            claimed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let held = || capacity.claimed.load(Ordering::Relaxed);
        assert_eq!((claimed.into_inner(), held()), (MAX, MAX));
        capacity.note_close();
        assert!(capacity.claim() && !capacity.claim());
        capacity.release();
        assert_eq!((held(), capacity.open_max()), (MAX - 1, MAX));
    }
}
