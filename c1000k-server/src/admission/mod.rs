//! Admission: bounds the number of connections, the memory that they leave free, and the connections from each source.
//!
//! All threads share one [`Admission`], and each has a [`Gate`] that checks every peer that connects. Memory is not
//! read for each peer: a sample makes one [`Decision`], which is published to all threads. Admitting a peer takes no
//! lock, except for the first peer after a new decision, for the one that makes the next sample due, and with a limit
//! per source, whose table is locked.

mod capacity;
mod cost;
mod decision;
mod gate;
mod memory;
mod per_source;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use c1000k_host::format;

use crate::args::Settings;
use crate::sync::{Published, Snapshot, lock};
use capacity::Capacity;
use decision::{Change, Decision};
use per_source::{PerSourceLimit, Source};

pub(crate) use gate::Gate;
pub(crate) use memory::{MemoryGuard, Overload, Reserve};

/// The part of the admission that all threads share.
#[derive(Debug)]
pub(crate) struct Admission {
    capacity: Capacity,
    /// Locked while a sample is taken.
    guard: Mutex<MemoryGuard>,
    decision: Published<Decision>,
    overload: Overload,
    per_source: Option<PerSourceLimit>,
    /// Peers refused because their source had reached its limit.
    refused_by_source: AtomicU64,
}

impl Admission {
    pub(crate) fn new(settings: &Settings, connections_max: u64, guard: MemoryGuard) -> Self {
        Self {
            capacity: Capacity::new(connections_max),
            decision: Published::new(guard.unsampled()),
            guard: Mutex::new(guard),
            overload: settings.overload,
            per_source: settings.max_per_source.map(PerSourceLimit::new),
            refused_by_source: AtomicU64::new(0),
        }
    }

    /// Samples memory, and publishes the decision.
    pub(crate) fn sample(&self, now: Instant) {
        self.sample_with(&mut lock(&self.guard), now);
    }

    /// The same, unless another thread has done so since `seen` was read.
    fn sample_after(&self, seen: &Snapshot<Decision>, now: Instant) {
        let mut guard = lock(&self.guard);
        if self.decision.is_current(seen) {
            self.sample_with(&mut guard, now);
        }
    }

    fn sample_with(&self, guard: &mut MemoryGuard, now: Instant) {
        // Connections admitted while memory is read are not in this sample.
        self.decision.snapshot().value.admissions.withdraw();
        let open = self.capacity.open();
        let decision = guard.sample(open, now);
        self.log_change(&decision, open);
        self.decision.publish(decision);
    }

    fn log_change(&self, decision: &Decision, open: u64) {
        let held = format::counted(open, "connection");
        match (decision.change, &decision.shortage) {
            (Some(Change::Closed), Some(shortage)) => {
                let effect = match self.overload {
                    Overload::Refuse => "further connections are refused",
                    Overload::Pause => "further connections wait",
                };
                log::warn!("{shortage}: {held} held, {effect}");
            }
            (Some(Change::Opened), _) => {
                log::info!("memory is available again: {held} held, admitting");
            }
            _ => {}
        }
    }

    pub(crate) fn memory_guard_record(&self, now: Instant) -> Option<c1000k_record::MemoryGuard> {
        lock(&self.guard).record(now)
    }

    /// The maximum number of open connections.
    pub(crate) fn open_max(&self) -> u64 {
        self.capacity.open_max()
    }

    fn log_source(&self, source: Source) {
        let times = self.refused_by_source.fetch_add(1, Ordering::Relaxed) + 1;
        if times.is_power_of_two() {
            log::warn!(
                "{source} has reached --max-per-source: its further connections are refused ({} so far, all sources)",
                format::count(times)
            );
        }
    }

    /// The decision of a sample that finds the kernel short of room for data.
    #[cfg(test)]
    pub(crate) fn close_for_buffers(&self) {
        self.decision.publish(Decision {
            shortage: Some(decision::Shortage::BufferPressure { queued_bytes: 1 << 30 }),
            buffers_to_free_bytes: 1 << 28,
            buffers_full: true,
            ..lock(&self.guard).unsampled()
        });
    }
}
