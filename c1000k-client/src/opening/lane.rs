//! The connections of one target: those to be opened, their routes, and those that wait for a retry.

use std::time::{Duration, Instant};

use crate::destination::Destination;
use crate::failures::Retries;
use crate::plan::Plan;

/// The first pause after a full backlog; it doubles up to the maximum.
const BACKLOG_PAUSE: Duration = Duration::from_millis(1);
const BACKLOG_PAUSE_MAX: Duration = Duration::from_millis(100);

/// The connections to be opened to one target, and those in flight.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) destination: Destination,
    pub(super) plan: Plan,
    /// The next connection that has not been tried.
    next_number: u64,
    /// The difference between the numbers of two successive connections of this target.
    step: u64,
    /// The last number of the run.
    last_number: u64,
    /// Connections that were held and closed, to be reopened.
    reopen: Vec<u32>,
    /// Connections to be retried immediately.
    again: Vec<u32>,
    pub(super) retries: Retries,
    /// Attempts in flight: they end with an answer or, without verification, with the connection.
    pub(super) in_flight: usize,
    /// Drops and permanent failures since `most_held` last increased.
    pub(super) consecutive_failures: u32,
    /// The maximum held since it was last reset.
    most_held: u64,
    /// When the next connect may be started after a full backlog.
    paused_until: Option<Instant>,
    backlog_pause: Duration,
    /// The connection that waits for the full backlog, and since when. The others of the lane are not tried meanwhile.
    waiting: Option<(u32, Instant)>,
    /// No more connections are opened to this target.
    pub(super) is_stopped: bool,
    /// Only connections that were held are reopened.
    pub(super) is_reopening: bool,
}

/// A connection to be tried.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub(super) number: u32,
    pub(super) retries: u8,
    /// It was tried before.
    pub(super) is_known: bool,
    /// It was tried before and was never held.
    pub(super) is_retry: bool,
}

impl Lane {
    /// The connections `first`, `first + step`, ... up to `goal`.
    pub(super) fn new(
        destination: Destination,
        plan: Plan,
        first: u64,
        step: u64,
        goal: u32,
    ) -> Self {
        Self {
            destination,
            plan,
            next_number: first,
            step,
            last_number: u64::from(goal),
            reopen: Vec::new(),
            again: Vec::new(),
            retries: Retries::default(),
            in_flight: 0,
            consecutive_failures: 0,
            most_held: 0,
            paused_until: None,
            backlog_pause: BACKLOG_PAUSE,
            waiting: None,
            is_stopped: false,
            is_reopening: false,
        }
    }

    /// From here on only connections that were held are reopened, and each counts as a success.
    pub(super) fn begin_reopening(&mut self) {
        self.next_number = self.last_number + 1;
        self.is_stopped = false;
        self.is_reopening = true;
        self.count_from(0);
    }

    pub(super) fn reopen(&mut self, number: u32) {
        self.reopen.push(number);
    }

    pub(super) fn try_again(&mut self, number: u32) {
        self.again.push(number);
    }

    /// Resets the maximum: from here on, holding more connections than `held` is a success.
    fn count_from(&mut self, held: u64) {
        self.most_held = held;
        self.consecutive_failures = 0;
    }

    /// A connection is up; `held` are held now.
    pub(super) fn note_up(&mut self, held: u64) {
        if self.is_reopening || held > self.most_held {
            self.count_from(held);
        }
    }

    fn has_new_work(&self) -> bool {
        self.next_number <= self.last_number || !self.again.is_empty() || !self.reopen.is_empty()
    }

    /// Whether a connection is to be opened, now or later.
    pub(super) fn has_work(&self) -> bool {
        !self.is_stopped && (self.has_new_work() || self.retries.len() > 0)
    }

    pub(super) fn has_due_work(&self, now: Instant) -> bool {
        !self.is_stopped
            && !self.is_paused(now)
            && (self.has_new_work() || self.retries.next_due().is_some_and(|due| due <= now))
    }

    /// When the next work is due; `None` without any.
    pub(super) fn next_due(&self) -> Option<Instant> {
        if self.is_stopped {
            return None;
        }
        let work = if self.has_new_work() { self.paused_until } else { self.retries.next_due() };
        work.map(|due| self.paused_until.map_or(due, |until| due.max(until)))
    }

    /// The next connection to be tried.
    pub(super) fn next_work(&mut self, now: Instant) -> Option<Work> {
        if let Some((number, retries)) = self.retries.pop_due(now) {
            return Some(Work { number, retries, is_known: true, is_retry: true });
        }
        if let Some(number) = self.again.pop() {
            return Some(Work { number, retries: 0, is_known: true, is_retry: true });
        }
        if let Some(number) = self.reopen.pop() {
            return Some(Work { number, retries: 0, is_known: true, is_retry: false });
        }
        if self.next_number > self.last_number {
            return None;
        }
        let number = self.next_number as u32;
        self.next_number += self.step;
        Some(Work { number, retries: 0, is_known: false, is_retry: false })
    }

    /// Discards retries and reopenings; returns their number and that of the attempts in flight.
    pub(super) fn give_up(&mut self) -> u64 {
        let waiting = self.again.len() + self.reopen.len() + self.retries.give_up();
        self.again.clear();
        self.reopen.clear();
        (self.in_flight + waiting) as u64
    }

    /// The server's backlog is full: this connection waits until the server accepts.
    pub(super) fn pause(&mut self, now: Instant, number: u32) {
        if self.waited_since(number).is_none() {
            self.waiting = Some((number, now));
        }
        self.paused_until = Some(now + self.backlog_pause);
        self.backlog_pause = (self.backlog_pause * 2).min(BACKLOG_PAUSE_MAX);
    }

    /// When the connection first met a full backlog, if it waits for that.
    pub(super) fn waited_since(&self, number: u32) -> Option<Instant> {
        self.waiting.filter(|&(waiting, _)| waiting == number).map(|(_, since)| since)
    }

    /// The server accepts again.
    pub(super) fn end_pause(&mut self) {
        self.waiting = None;
        self.paused_until = None;
        self.backlog_pause = BACKLOG_PAUSE;
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(first: u64, step: u64, goal: u32) -> Lane {
        let plan = Plan::new(vec![], 9900, 1, 28_232);
        Lane::new(Destination::new(([127, 0, 0, 1], 9900), 1), plan, first, step, goal)
    }

    #[test]
    fn lanes_share_the_numbers() {
        let now = Instant::now();
        let mut all: Vec<u32> = vec![];
        for first in 1..=3 {
            let mut lane = lane(first, 3, 10);
            let own = std::iter::from_fn(|| lane.next_work(now)).map(|work| work.number);
            all.extend(own);
            assert!(!lane.has_work());
        }
        assert_eq!(all, [1, 4, 7, 10, 2, 5, 8, 3, 6, 9]);
    }

    #[test]
    fn a_full_backlog_is_tried_again_after_growing_pauses() {
        let start = Instant::now();
        let (mut lane, mut now) = (lane(1, 1, 1), start);
        let mut pauses = vec![];
        for _ in 0..9 {
            lane.pause(now, 1);
            assert_eq!((lane.waited_since(1), lane.waited_since(2)), (Some(start), None));
            assert!(!lane.has_due_work(now));
            let due = lane.next_due().unwrap();
            pauses.push((due - now).as_millis());
            now = due;
            assert!(lane.has_due_work(now));
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 100, 100]);
        lane.end_pause();
        assert!(lane.has_due_work(start) && lane.next_due().is_none());
        assert_eq!(lane.waited_since(1), None);
    }
}
