//! Failed connects: counted by errno, classified, and retried a bounded number of times.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use c1000k_host::format;
use nix::errno::Errno;

/// Retries of a connect whose failure may be temporary.
pub(crate) const RETRIES_MAX: u8 = 3;

/// The pause before the first retry; it doubles for each further one.
const BACKOFF: Duration = Duration::from_millis(100);

/// Counts an end of the stream before the echo, which has no errno.
pub(crate) const EOF: &str = "EOF";

/// Counts connections to themselves, which have no errno either.
pub(crate) const SELF_CONNECT: &str = "SELF_CONNECT";

/// Counts connections that churn or a storm closed, and that could not be reopened.
pub(crate) const NOT_BACK: &str = "NOT_BACK";

/// Failed attempts, or lost connections, by errno.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    counts: BTreeMap<String, u64>,
    last: Option<Errno>,
}

impl Failures {
    pub(crate) fn count(&mut self, name: &str) {
        match self.counts.get_mut(name) {
            Some(count) => *count += 1,
            None => _ = self.counts.insert(name.to_owned(), 1),
        }
    }

    pub(crate) fn count_errno(&mut self, errno: Errno) {
        self.count(&format!("{errno:?}"));
        self.last = Some(errno);
    }

    pub(crate) fn count_many(&mut self, name: &str, count: u64) {
        if count > 0 {
            *self.counts.entry(name.to_owned()).or_default() += count;
        }
    }

    /// Counts attempts that were still in flight at the end.
    pub(crate) fn count_unfinished(&mut self, count: u64) {
        self.count_many(&format!("{:?}", Errno::ECANCELED), count);
    }

    /// Those that were counted after `earlier`, which is a former state of these counts.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let before = |name: &String| earlier.counts.get(name).copied().unwrap_or(0);
        let later = self.counts.iter().map(|(name, &count)| (name.clone(), count - before(name)));
        Self { counts: later.filter(|&(_, count)| count > 0).collect(), last: self.last }
    }

    /// The counts by name: an errno, or one of the names above.
    pub fn by_name(&self) -> &BTreeMap<String, u64> {
        &self.counts
    }

    pub(crate) fn last(&self) -> Option<Errno> {
        self.last
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.counts.contains_key(name)
    }

    /// The name with the highest count.
    pub(crate) fn most(&self) -> Option<&str> {
        self.counts.iter().max_by_key(|&(_, &count)| count).map(|(name, _)| name.as_str())
    }
}

/// `EOF 12, ECONNRESET 3`, in the order of the names.
impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, &count)) in self.counts.iter().enumerate() {
            let before = if index == 0 { "" } else { ", " };
            write!(f, "{before}{name} {}", format::count(count))?;
        }
        Ok(())
    }
}

/// The class of a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Descriptors of this process or of the system have run out.
    NoDescriptor,
    /// The kernel has no memory for another socket.
    NoMemory,
    /// Epoll watches of this user have run out.
    NoWatch,
    /// The pair of source and destination has no local port left.
    NoLocalPort,
    /// Nothing listens on this port.
    NothingListens,
    /// The server accepted the connection and dropped it before its echo.
    RefusedByServer,
    /// It may be temporary.
    Transient,
    /// It is permanent.
    Final,
}

/// Classifies an errno of a connect, or of a connection before its echo.
pub(crate) fn meaning(errno: Errno) -> Meaning {
    match errno {
        Errno::EMFILE | Errno::ENFILE => Meaning::NoDescriptor,
        Errno::ENOBUFS | Errno::ENOMEM => Meaning::NoMemory,
        Errno::ENOSPC => Meaning::NoWatch,
        Errno::EADDRNOTAVAIL => Meaning::NoLocalPort,
        Errno::ECONNREFUSED => Meaning::NothingListens,
        Errno::ECONNRESET | Errno::ECONNABORTED | Errno::EPIPE => Meaning::RefusedByServer,
        Errno::ETIMEDOUT
        | Errno::EAGAIN
        | Errno::EINTR
        | Errno::ENETUNREACH
        | Errno::EHOSTUNREACH
        | Errno::ENETDOWN
        | Errno::EHOSTDOWN
        | Errno::ENONET => Meaning::Transient,
        _ => Meaning::Final,
    }
}

/// Connections that wait for a retry.
#[derive(Debug, Default)]
pub(crate) struct Retries {
    /// One queue for each pause, so that each is ordered by time.
    queues: [VecDeque<(Instant, u32)>; RETRIES_MAX as usize],
}

impl Retries {
    /// The connection has failed after this many retries; returns whether it gets another one.
    pub(crate) fn push(&mut self, now: Instant, number: u32, retries: u8) -> bool {
        let Some(queue) = self.queues.get_mut(usize::from(retries)) else { return false };
        queue.push_back((now + BACKOFF * (1 << retries), number));
        true
    }

    /// A connection whose pause is over, and the number of its retry.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<(u32, u8)> {
        let is_due =
            |queue: &VecDeque<(Instant, u32)>| queue.front().is_some_and(|&(due, _)| due <= now);
        let index = self.queues.iter().position(is_due)?;
        let (_, number) = self.queues[index].pop_front()?;
        Some((number, index as u8 + 1))
    }

    /// When the next pause is over.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.queues.iter().filter_map(|queue| queue.front()).map(|&(due, _)| due).min()
    }

    pub(crate) fn len(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    /// Removes all of them; returns their number.
    pub(crate) fn give_up(&mut self) -> usize {
        let count = self.len();
        *self = Self::default();
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_under_the_names_of_errno() {
        let mut failures = Failures::default();
        failures.count_errno(Errno::ECONNREFUSED);
        failures.count_errno(Errno::ECONNREFUSED);
        failures.count(EOF);
        failures.count_unfinished(0);
        failures.count_unfinished(3);
        let counted: Vec<_> =
            failures.by_name().iter().map(|(name, &n)| (name.as_str(), n)).collect();
        assert_eq!(counted, [("ECANCELED", 3), ("ECONNREFUSED", 2), ("EOF", 1)]);
    }

    #[test]
    fn a_timeout_is_temporary_and_a_refusal_is_not() {
        assert_eq!(meaning(Errno::ETIMEDOUT), Meaning::Transient);
        assert_eq!(meaning(Errno::EAGAIN), Meaning::Transient);
        assert_eq!(meaning(Errno::ECONNREFUSED), Meaning::NothingListens);
        assert_eq!(meaning(Errno::ECONNRESET), Meaning::RefusedByServer);
        assert_eq!(meaning(Errno::EACCES), Meaning::Final);
        assert_eq!(meaning(Errno::EMFILE), Meaning::NoDescriptor);
    }

    #[test]
    fn each_connection_gets_three_retries_with_growing_pauses() {
        let start = Instant::now();
        let mut retries = Retries::default();
        let mut now = start;
        let mut pauses = vec![];
        let mut attempt = 0;
        while retries.push(now, 7, attempt) {
            assert_eq!(retries.pop_due(now), None);
            let due = retries.next_due().unwrap();
            pauses.push((due - now).as_millis());
            now = due;
            let (number, next) = retries.pop_due(now).unwrap();
            assert_eq!((number, next), (7, attempt + 1));
            attempt = next;
        }
        assert_eq!(pauses, [100, 200, 400]);
        assert_eq!((attempt, retries.len()), (RETRIES_MAX, 0));
    }
}
