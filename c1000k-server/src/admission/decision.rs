//! What one sample of memory decides.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use c1000k_host::format;
use c1000k_host::memory::{MemoryBound, MemoryRoom};

/// The decision of one sample of memory for all threads, until the next sample.
#[derive(Debug)]
pub(crate) struct Decision {
    /// Why no connection is admitted; `None` while there is room.
    pub(crate) shortage: Option<Shortage>,
    /// Whether this sample began or ended a shortage.
    pub(crate) change: Option<Change>,
    /// Connections that may be admitted.
    pub(crate) admissions: Budget,
    /// The maximum number of admissions that a thread takes at once. Those that it has not used at the next sample are
    /// void.
    pub(crate) admissions_per_draw: u64,
    /// Connections that may be refused: refusing takes memory for a moment too.
    pub(crate) refusals: Budget,
    /// Bytes of slow readers' queued data that must be freed, because the reserve is being used up.
    pub(crate) memory_to_free_bytes: u64,
    /// Bytes of queued data in the kernel that each thread must free, because the kernel is short of room for it.
    pub(crate) buffers_to_free_bytes: u64,
    /// Sockets hold so much data that slow readers are searched for.
    pub(crate) buffers_full: bool,
    /// Data that the kernel holds for peers counts against the limit that binds: that of a machine, or of a cgroup of
    /// version 2.
    pub(crate) charges_socket_data: bool,
    /// Time until the next periodic sample.
    pub(crate) sample_interval: Duration,
}

/// The change that a sample made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Closed,
    Opened,
}

/// Why no connection is admitted.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Shortage {
    Memory {
        room: MemoryRoom,
        reserve_bytes: u64,
    },
    SocketBuffers {
        queued_bytes: u64,
        limit_bytes: u64,
    },
    /// The limits can't be read.
    BufferPressure {
        queued_bytes: u64,
    },
}

/// A budget of admissions or refusals, shared by all threads.
#[derive(Debug, Default)]
pub(crate) struct Budget(AtomicU64);

impl Budget {
    pub(crate) fn new(count: u64) -> Self {
        Self(AtomicU64::new(count))
    }

    /// Takes up to `count`; returns how many it took.
    pub(crate) fn take(&self, count: u64) -> u64 {
        let take = |left: u64| Some(left.saturating_sub(count));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        before.unwrap_or_else(|left| left).min(count)
    }

    pub(crate) fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn withdraw(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Decision {
    /// Takes a thread's next admissions; if none is left, a sample is due.
    pub(crate) fn draw(&self) -> Result<u64, &Shortage> {
        match &self.shortage {
            Some(shortage) => Err(shortage),
            None => Ok(self.admissions.take(self.admissions_per_draw)),
        }
    }

    /// Counts a refusal; returns whether more may follow before the next sample.
    pub(crate) fn refuse(&self) -> bool {
        self.refusals.take(1);
        !self.has_refused_enough()
    }

    pub(crate) fn has_refused_enough(&self) -> bool {
        self.shortage.is_some() && self.refusals.left() == 0
    }
}

impl Shortage {
    /// The name that counters use.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Memory { .. } => "memory",
            Self::SocketBuffers { .. } | Self::BufferPressure { .. } => "tcp_mem",
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { room, reserve_bytes } => {
                let total = format::bytes(room.total_bytes);
                let left = format::bytes(room.bytes);
                let reserve = format::bytes(*reserve_bytes);
                let cgroup = cgroup_of(room);
                write!(f, "memory: {left} of {total}{cgroup} available, reserve {reserve}")
            }
            Self::SocketBuffers { queued_bytes, limit_bytes } => {
                let queued = format::bytes(*queued_bytes);
                let limit = format::bytes(*limit_bytes);
                write!(f, "tcp_mem: {queued} are queued in sockets, of at most {limit}")
            }
            Self::BufferPressure { queued_bytes } => {
                let queued = format::bytes(*queued_bytes);
                write!(
                    f,
                    "tcp_mem: {queued} are queued in sockets, and the kernel reports memory pressure"
                )
            }
        }
    }
}

/// Names the cgroup, if it is one.
pub(super) fn cgroup_of(room: &MemoryRoom) -> String {
    match &room.bound_by {
        MemoryBound::Cgroup(directory) => format!(" (cgroup {})", directory.display()),
        MemoryBound::Machine => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn threads_together_take_no_more_than_the_budget() {
        let budget = Budget::new(1_000);
        let taken = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        taken.fetch_add(budget.take(7), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!((taken.into_inner(), budget.left()), (1_000, 0));
        assert_eq!(budget.take(1), 0);
    }
}
