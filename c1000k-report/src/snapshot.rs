//! What the kernel said about itself at one moment, read from the `/proc` text a run left behind.
//!
//! Each file may be missing (`slabinfo` needs root): its figures are then `None`. A line that makes
//! no sense is passed over, as the kernel adds lines and columns from version to version.

use std::collections::BTreeMap;
use std::path::Path;

use c1000k_host::usage::SlabUsage;
use c1000k_record::input;

/// The page that `slabinfo` counts in, as on x86-64.
const PAGE_BYTES: u64 = 4_096;

/// The files of one host at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Slab caches, from `slabinfo`.
    pub slabs: Option<SlabUsage>,
    /// TCP sockets in use, from `sockstat`.
    pub tcp_inuse: Option<u64>,
    /// The kernel's `ListenOverflows` and `ListenDrops`, from `netstat`.
    pub listen_overflows: Option<u64>,
    /// See [`Self::listen_overflows`].
    pub listen_drops: Option<u64>,
    /// Memory that is neither free nor cache, from `meminfo`.
    pub memory_used_bytes: Option<u64>,
    /// Resident memory of the server, from `server-smaps_rollup`, else from `server-status`.
    pub server_rss_bytes: Option<u64>,
}

impl Snapshot {
    /// Reads what there is in a folder such as `snapshots/one/peak`.
    #[must_use]
    pub fn read(folder: &Path) -> Self {
        let text = |name: &str| input::text(&folder.join(name));
        let netstat = text("netstat").unwrap_or_default();
        let tcp_ext = tcp_ext(&netstat);
        Self {
            slabs: text("slabinfo")
                .and_then(|text| SlabUsage::parse(&text, PAGE_BYTES))
                .filter(|slabs| !slabs.caches().is_empty()),
            tcp_inuse: text("sockstat").and_then(|text| tcp_inuse(&text)),
            listen_overflows: tcp_ext.get("ListenOverflows").copied(),
            listen_drops: tcp_ext.get("ListenDrops").copied(),
            memory_used_bytes: text("meminfo").and_then(|text| memory_used(&text)),
            server_rss_bytes: text("server-smaps_rollup")
                .and_then(|text| kilobytes(&text, "Rss:"))
                .or_else(|| text("server-status").and_then(|text| kilobytes(&text, "VmRSS:"))),
        }
    }

    /// The pages of the slab caches that connections have to themselves.
    #[must_use]
    pub fn connection_bytes(&self) -> Option<u64> {
        Some(self.slabs.as_ref()?.connection_bytes())
    }

    /// TCP sockets by the kernel's allocator: those of IPv4 and of IPv6.
    #[must_use]
    pub fn tcp_objects(&self) -> Option<u64> {
        let slabs = self.slabs.as_ref()?;
        let objects = |name| slabs.cache(name).map_or(0, |cache| cache.active_objects);
        Some(objects("TCP").saturating_add(objects("TCPv6")))
    }
}

/// `TCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1`
fn tcp_inuse(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "inuse");
    words.nth(1)?.parse().ok()
}

/// A line of names and a line of values, both led by `TcpExt:`.
fn tcp_ext(text: &str) -> BTreeMap<&str, u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return BTreeMap::new();
    };
    let values = values.split_whitespace().map(|value| value.parse().unwrap_or(0));
    names.split_whitespace().zip(values).collect()
}

fn memory_used(text: &str) -> Option<u64> {
    let all = kilobytes(text, "MemTotal:")?;
    let idle = ["MemFree:", "Buffers:", "Cached:"].map(|name| kilobytes(text, name));
    idle.into_iter().try_fold(all, |left, idle| Some(left.saturating_sub(idle?)))
}

/// `Name:   123 kB`
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let value: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(value.saturating_mul(1_024))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SLABINFO: &str = "slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables
TCPv6                 13     13   2496   13    8 : tunables    0    0    0 : slabdata      1      1      0
TCP                   91    156   2368   13    8 : tunables    0    0    0 : slabdata     12     12      0
tw_sock_TCP            5      5    272   30    2 : tunables    0    0    0 : slabdata      1      1      0
half a line
";

    #[test]
    fn slabs_are_read_by_objects_and_by_pages() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("slabinfo"), SLABINFO).unwrap();
        let snapshot = Snapshot::read(folder.path());
        assert_eq!(snapshot.tcp_objects(), Some(104));
        assert_eq!(snapshot.connection_bytes(), Some((12 * 8 + 8) * 4_096));
    }

    #[test]
    fn sockets_in_use_are_found_by_name() {
        let text = "sockets: used 11\nTCP: inuse 5 orphan 0 tw 2 alloc 7 mem 1\nUDP: inuse 9\n";
        assert_eq!(tcp_inuse(text), Some(5));
        assert_eq!(tcp_inuse("sockets: used 11\n"), None);
        assert_eq!(tcp_inuse("TCP: inuse\n"), None);
    }

    #[test]
    fn listen_counters_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 33\n\
                    IpExt: InNoRoutes\nIpExt: 7\n";
        assert_eq!(tcp_ext(text).get("ListenOverflows"), Some(&22));
        assert_eq!(tcp_ext(text).get("ListenDrops"), Some(&33));
        assert!(tcp_ext("TcpExt: ListenDrops\n").is_empty());
    }

    #[test]
    fn memory_used_is_what_is_neither_free_nor_cache() {
        let text = "MemTotal: 100 kB\nMemFree: 30 kB\nMemAvailable: 60 kB\nBuffers: 5 kB\n\
                    Cached: 15 kB\nSwapCached: 0 kB\n";
        assert_eq!(memory_used(text), Some(50 * 1_024));
        assert_eq!(memory_used("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn an_empty_folder_is_a_snapshot_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Snapshot::read(folder.path()), Snapshot::default());
    }

    #[test]
    fn the_process_is_read_from_status_where_the_rollup_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("server-status"), "Name:\tx\nVmRSS:\t  900 kB\n").unwrap();
        assert_eq!(Snapshot::read(folder.path()).server_rss_bytes, Some(900 * 1_024));
        fs::write(folder.path().join("server-smaps_rollup"), "Rss:   800 kB\n").unwrap();
        assert_eq!(Snapshot::read(folder.path()).server_rss_bytes, Some(800 * 1_024));
    }
}
