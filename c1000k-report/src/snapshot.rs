//! What the kernel reported at one moment, read from the copies of `/proc` files that a run has saved, by the same
//! parsers that read the live files.
//!
//! Each file may be missing (`slabinfo` needs root): its figures are then `None`.

use std::path::Path;

use c1000k_host::memory::Meminfo;
use c1000k_host::usage::{NetCounters, SlabUsage, SocketUsage, rss_of_rollup, rss_of_status};
use c1000k_record::input;

/// The page size in which `slabinfo` counts, as on x86-64.
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
    /// Reads the files in a directory such as `snapshots/one/peak`.
    #[must_use]
    pub fn read(folder: &Path) -> Self {
        let text = |name: &str| input::text(&folder.join(name));
        let counters = NetCounters::parse(&text("netstat").unwrap_or_default(), "");
        let sockets = |text: String| SocketUsage::parse(&text, "", PAGE_BYTES);
        Self {
            slabs: text("slabinfo")
                .and_then(|text| SlabUsage::parse(&text, PAGE_BYTES))
                .filter(|slabs| !slabs.caches().is_empty()),
            tcp_inuse: text("sockstat").and_then(sockets).map(|usage| usage.tcp_inuse),
            listen_overflows: counters.value("ListenOverflows"),
            listen_drops: counters.value("ListenDrops"),
            memory_used_bytes: text("meminfo").and_then(|text| Meminfo::parse(&text).used_bytes()),
            server_rss_bytes: text("server-smaps_rollup")
                .and_then(|text| rss_of_rollup(&text))
                .or_else(|| text("server-status").and_then(|text| rss_of_status(&text))),
        }
    }

    /// The pages of the slab caches that only connections use.
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

    /// A snapshot of one file.
    fn saved(name: &str, text: &str) -> Snapshot {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), text).unwrap();
        Snapshot::read(folder.path())
    }

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
        let tcp_inuse = |text| saved("sockstat", text).tcp_inuse;
        let text = "sockets: used 11\nTCP: inuse 5 orphan 0 tw 2 alloc 7 mem 1\nUDP: inuse 9\n";
        assert_eq!(tcp_inuse(text), Some(5));
        assert_eq!(tcp_inuse("sockets: used 11\n"), None);
        assert_eq!(tcp_inuse("TCP: inuse\n"), None);
    }

    #[test]
    fn listen_counters_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 33\n\
                    IpExt: InNoRoutes\nIpExt: 7\n";
        let snapshot = saved("netstat", text);
        assert_eq!(snapshot.listen_overflows, Some(22));
        assert_eq!(snapshot.listen_drops, Some(33));
        assert_eq!(saved("netstat", "TcpExt: ListenDrops\n"), Snapshot::default());
    }

    #[test]
    fn memory_used_is_what_is_neither_free_nor_cache() {
        let memory_used = |text| saved("meminfo", text).memory_used_bytes;
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
