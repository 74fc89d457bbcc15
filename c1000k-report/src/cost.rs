//! The memory of a connection, in the process and in the kernel, and how much was returned after the teardown.

use std::collections::BTreeSet;

use c1000k_host::usage::SlabUsage;
use c1000k_record::ServerRecord;

use crate::run::{Moment, Run};
use crate::snapshot::Snapshot;

/// The slab memory of one kernel per connection.
#[derive(Debug, Clone, PartialEq)]
pub struct HostCost {
    /// The host.
    pub host: String,
    /// The ends of each connection that are in this kernel: 1 or 2.
    pub ends: u64,
    /// The number of connections.
    pub connections: u64,
    /// The caches that grew with the connections, the largest first.
    pub caches: Vec<CacheCost>,
    /// Growth of all other caches, per connection; negative if they shrank.
    pub rest_bytes: f64,
    /// The memory of one end of a connection, by the caches that connections use.
    pub end_bytes: f64,
}

/// The share of one slab cache in a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheCost {
    /// The cache.
    pub name: String,
    /// Objects per connection.
    pub objects: f64,
    /// The size of one object.
    pub object_bytes: u64,
    /// Bytes of pages per connection.
    pub bytes: f64,
}

impl HostCost {
    /// The host and the ends of its connections there, as text.
    #[must_use]
    pub fn name(&self) -> String {
        let ends = if self.ends == 2 { "both ends" } else { "one end" };
        format!("kernel of host {}, with {ends} of each connection", self.host)
    }

    /// The total per connection.
    #[must_use]
    pub fn bytes(&self) -> f64 {
        self.rest_bytes + self.caches.iter().map(|cache| cache.bytes).sum::<f64>()
    }
}

/// The memory of a connection in each kernel whose slabs are known before and at the peak.
#[must_use]
pub fn kernels(run: &Run) -> Vec<HostCost> {
    // Hosts that share a kernel show the same slabs: those of the server's host have all connections.
    let is_shown = |host: &&str| !run.is_one_kernel() || *host == run.server_host();
    run.hosts().filter(is_shown).filter_map(|host| kernel(run, host)).collect()
}

/// The memory of the server's end of a connection, by the slab caches that connections use. The server measures it by
/// the same caches.
#[must_use]
pub fn server_end_bytes(run: &Run) -> Option<f64> {
    let costs = kernels(run);
    Some(costs.iter().find(|cost| cost.host == run.server_host())?.end_bytes)
}

/// The bytes of one socket in each slab cache of a connection, by the server's record, the largest first.
#[must_use]
pub fn recorded_slabs(run: &Run) -> Vec<(&str, f64)> {
    let Some(server) = run.server.as_ref().filter(|server| server.peak > 0) else {
        return Vec::new();
    };
    let sockets = float(server.peak) * float(run.ends_in_kernel());
    let slabs = server.kernel_bytes_by_slab.iter().flatten();
    let mut slabs: Vec<_> = slabs
        // The growth of all other caches is not a part of a connection.
        .filter(|(name, _)| *name != "other")
        .map(|(name, bytes)| (name.as_str(), float(*bytes) / sockets))
        .collect();
    slabs.sort_by(|(_, first), (_, second)| second.total_cmp(first));
    slabs
}

fn kernel(run: &Run, host: &str) -> Option<HostCost> {
    let connections = run.connections_of(host)?;
    let before = run.snapshot(host, Moment::Before)?.slabs.as_ref()?;
    let peak = run.snapshot(host, Moment::Peak)?.slabs.as_ref()?;
    let mut caches = growth(before, peak, connections);
    caches.sort_by(|a, b| b.bytes.total_cmp(&a.bytes));
    // A cache that connections use has an object for almost every one of them.
    let (caches, rest): (Vec<_>, Vec<_>) =
        caches.into_iter().partition(|cache| cache.objects > 0.5 && cache.bytes > 0.0);
    let rest_bytes = rest.iter().map(|cache| cache.bytes).sum();
    let ends = run.ends_in_kernel();
    let end = peak.bytes_per_socket(before, connections.saturating_mul(ends));
    let end_bytes = end.iter().map(|(_, bytes)| bytes).sum();
    Some(HostCost { host: host.to_owned(), ends, connections, caches, rest_bytes, end_bytes })
}

fn growth(before: &SlabUsage, peak: &SlabUsage, connections: u64) -> Vec<CacheCost> {
    let names: BTreeSet<&String> = before.caches().keys().chain(peak.caches().keys()).collect();
    let share = |new: u64, old: u64| (float(new) - float(old)) / float(connections);
    let cost = |name: &String| {
        let old = before.cache(name).copied().unwrap_or_default();
        let new = peak.cache(name).copied().unwrap_or_default();
        CacheCost {
            name: name.clone(),
            objects: share(new.active_objects, old.active_objects),
            object_bytes: new.object_bytes,
            bytes: share(new.slab_bytes, old.slab_bytes),
        }
    };
    names.into_iter().map(cost).collect()
}

/// The server's resident memory at the three moments.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ProcessMemory {
    /// Before the first connection.
    pub before_bytes: Option<u64>,
    /// At the peak.
    pub peak_bytes: Option<u64>,
    /// After the teardown.
    pub after_bytes: Option<u64>,
    /// Growth until the peak, per connection.
    pub bytes_each: Option<f64>,
}

/// The server's memory by its record, or else by the snapshots. All figures are from one of the two, because they are
/// of different moments.
#[must_use]
pub fn process(run: &Run) -> ProcessMemory {
    let recorded = run.server.as_ref().map(ProcessMemory::recorded);
    let is_whole = |memory: &ProcessMemory| memory.bytes_each.is_some();
    let seen = process_seen(run);
    recorded
        .filter(is_whole)
        .or_else(|| seen.peak_bytes.map(|_| seen))
        .or(recorded)
        .unwrap_or_default()
}

/// The server's memory by the snapshots.
#[must_use]
pub fn process_seen(run: &Run) -> ProcessMemory {
    let seen = |moment| run.snapshot(run.server_host(), moment)?.server_rss_bytes;
    let (before_bytes, peak_bytes) = (seen(Moment::Before), seen(Moment::Peak));
    let grown = peak_bytes.zip(before_bytes).map(|(peak, before)| peak.saturating_sub(before));
    ProcessMemory {
        before_bytes,
        peak_bytes,
        after_bytes: seen(Moment::After),
        bytes_each: grown
            .zip(run.server_connections())
            .map(|(grown, count)| float(grown) / float(count)),
    }
}

impl ProcessMemory {
    fn recorded(server: &ServerRecord) -> Self {
        Self {
            before_bytes: server.rss_at_start_bytes,
            peak_bytes: server.rss_at_peak_bytes.or(server.rss_peak_bytes),
            after_bytes: server.rss_now_bytes,
            bytes_each: server.user_bytes_per_connection,
        }
    }

    /// The share of its growth that was returned.
    #[must_use]
    pub fn share_returned(&self) -> Option<f64> {
        share_returned(self.before_bytes?, self.peak_bytes?, self.after_bytes?)
    }
}

/// The share of the growth of the slabs that only connections use that was returned after the teardown, on a host.
#[must_use]
pub fn slab_share_returned(run: &Run, host: &str) -> Option<f64> {
    let bytes = |moment| run.snapshot(host, moment).and_then(Snapshot::connection_bytes);
    share_returned(bytes(Moment::Before)?, bytes(Moment::Peak)?, bytes(Moment::After)?)
}

fn share_returned(before: u64, peak: u64, after: u64) -> Option<f64> {
    let grown = peak.checked_sub(before).filter(|grown| *grown > 0)?;
    Some((float(peak) - float(after)) / float(grown))
}

#[expect(clippy::cast_precision_loss, reason = "a count below 2^53 is exact")]
pub(crate) fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_counts_new_caches_and_shrinking_ones() {
        let slabs = |name: &str, slabs: u64| {
            let text = format!(
                "slabinfo - version: 2.1\n{name} 10 10 64 10 1 : tunables 0 0 0 : slabdata 0 {slabs} 0\n"
            );
            SlabUsage::parse(&text, 1_000).unwrap()
        };
        let costs = growth(&slabs("a", 1), &slabs("b", 2), 10);
        let bytes: Vec<_> = costs.iter().map(|cost| (cost.name.as_str(), cost.bytes)).collect();
        assert_eq!(bytes, [("a", -100.0), ("b", 200.0)]);
    }

    #[test]
    fn the_share_returned_is_of_what_was_grown() {
        assert_eq!(share_returned(100, 200, 100), Some(1.0));
        assert_eq!(share_returned(100, 200, 150), Some(0.5));
        assert_eq!(share_returned(100, 200, 90), Some(1.1));
        assert_eq!(share_returned(100, 100, 100), None);
        assert_eq!(share_returned(200, 100, 100), None);
    }
}
