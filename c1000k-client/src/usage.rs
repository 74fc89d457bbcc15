//! What the run took of this machine: memory of the process, and the kernel's counters of events.

use std::collections::BTreeMap;

use c1000k_host::usage::{NetCounters, ProcessUsage};

/// The figures at the start, and those of the peak.
#[derive(Debug)]
pub(crate) struct Usage {
    counters_at_start: Option<NetCounters>,
    rss_at_start_bytes: Option<u64>,
    /// Connections held, and resident memory, when the ramp was over.
    peak: Option<(u64, u64)>,
}

impl Usage {
    /// Before the first connect.
    pub(crate) fn start() -> Self {
        Self { counters_at_start: NetCounters::read(), rss_at_start_bytes: rss_bytes(), peak: None }
    }

    /// The ramp is over, with so many held.
    pub(crate) fn note_peak(&mut self, held: u64) {
        self.peak = rss_bytes().map(|bytes| (held, bytes)).filter(|_| held > 0);
    }

    /// What the process has grown by during the ramp, per connection.
    pub(crate) fn process_bytes_per_connection(&self) -> Option<f64> {
        let (held, bytes) = self.peak?;
        Some(bytes.saturating_sub(self.rss_at_start_bytes?) as f64 / held as f64)
    }

    /// What the kernel's own counters have grown by.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let grown = self.counters_at_start.as_ref().zip(NetCounters::read());
        let grown = grown.map(|(before, now)| now.since(before));
        let counters = grown.iter().flat_map(NetCounters::iter);
        counters.map(|(name, count)| (name.to_owned(), count)).collect()
    }
}

fn rss_bytes() -> Option<u64> {
    ProcessUsage::read().map(|usage| usage.rss_bytes)
}
