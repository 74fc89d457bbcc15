//! How much memory is left: in the machine, and in every cgroup around this process.

mod cgroup;

pub use cgroup::{CgroupLimit, Cgroups};

use {
    crate::{text, usage::SocketUsage},
    std::path::PathBuf,
};

/// What a TCP socket has in slabs that the kernel counts as reclaimable, and so as available, though nothing takes
/// them back while the socket is open: sock_inode_cache 832 + dentry 192 bytes, each with its share of what is lost at
/// the end of its slab. Seen as the growth of `SReclaimable` by two million sockets.
const PINNED_BYTES_PER_SOCKET: u64 = 1_057;

/// What binds first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBound {
    /// The machine's memory.
    Machine,
    /// The limit of the cgroup with this directory: the process's own or one around it.
    Cgroup(PathBuf),
}

/// How much memory may still be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRoom {
    /// What is left where it is tightest. Swap is not counted.
    pub bytes: u64,
    /// All that there is there: the machine's memory, or the cgroup's limit.
    pub total_bytes: u64,
    /// Where it is tightest.
    pub bound_by: MemoryBound,
    /// What is taken of it by data queued in sockets, if that is charged here: a cgroup of version 2 is, a page at the
    /// least for each socket that has some, and when it is full the kernel kills.
    pub socket_data_bytes: Option<u64>,
}

/// Tells the room again and again; which cgroups count is found out once.
#[derive(Clone, Debug, Default)]
pub struct MemoryReader {
    cgroups: Cgroups,
}

impl MemoryReader {
    /// Finds the cgroups of this process.
    pub fn new() -> Self {
        Self { cgroups: Cgroups::of_self() }
    }

    /// The room that is left now, where it is tightest; `None` where `/proc/meminfo` can't be read.
    ///
    /// Under a cgroup limit, page cache that the group could give back counts as room. The machine's own room is
    /// `MemAvailable` without what open sockets pin.
    pub fn read(&self) -> Option<MemoryRoom> {
        self.rooms().into_iter().min_by_key(|room| room.bytes)
    }

    /// The room that is left now in the machine and in each cgroup that has a limit; nothing where `/proc/meminfo`
    /// can't be read.
    pub fn rooms(&self) -> Vec<MemoryRoom> {
        let meminfo = text::read("/proc/meminfo").unwrap_or_default();
        let sockets = SocketUsage::read().map_or(0, |usage| usage.tcp_alloc);
        rooms(&meminfo, sockets, self.cgroups.limits()).unwrap_or_default()
    }
}

/// The room that is left now. Who asks often keeps a [`MemoryReader`].
pub fn memory_available() -> Option<MemoryRoom> {
    MemoryReader::new().read()
}

fn rooms(
    meminfo: &str,
    tcp_sockets: u64,
    cgroups: impl Iterator<Item = CgroupLimit>,
) -> Option<Vec<MemoryRoom>> {
    let reclaimable_bytes = text::kilobytes_of(meminfo, "SReclaimable").unwrap_or(0);
    let pinned_bytes = tcp_sockets.saturating_mul(PINNED_BYTES_PER_SOCKET).min(reclaimable_bytes);
    let available_bytes = text::kilobytes_of(meminfo, "MemAvailable")?;
    let machine = MemoryRoom {
        bytes: available_bytes.saturating_sub(pinned_bytes),
        total_bytes: text::kilobytes_of(meminfo, "MemTotal")?,
        bound_by: MemoryBound::Machine,
        // The kernel bounds it by `tcp_mem`.
        socket_data_bytes: None,
    };
    let cgroups = cgroups.map(|cgroup| MemoryRoom {
        bytes: cgroup.room_bytes(),
        total_bytes: cgroup.limit_bytes,
        bound_by: MemoryBound::Cgroup(cgroup.directory),
        socket_data_bytes: cgroup.socket_data_bytes,
    });
    Some([machine].into_iter().chain(cgroups).collect())
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    const MEMINFO: &str = "MemTotal:       24684092 kB\nMemFree:        24387136 kB\n\
        MemAvailable:   24354432 kB\nBuffers:            2720 kB\nCached:           161864 kB\n";

    fn tightest(
        meminfo: &str,
        tcp_sockets: u64,
        cgroups: impl Iterator<Item = CgroupLimit>,
    ) -> Option<MemoryRoom> {
        rooms(meminfo, tcp_sockets, cgroups)?.into_iter().min_by_key(|room| room.bytes)
    }

    fn cgroup(directory: &str, limit_bytes: u64, used_bytes: u64) -> CgroupLimit {
        CgroupLimit {
            directory: directory.into(),
            limit_bytes,
            used_bytes,
            reclaimable_bytes: 0,
            socket_data_bytes: None,
        }
    }

    #[test]
    fn without_a_cgroup_limit_the_machine_binds() {
        let room = tightest(MEMINFO, 0, std::iter::empty()).expect("a meminfo");
        assert_eq!(room.bytes, 24_354_432 * 1024);
        assert_eq!(room.total_bytes, 24_684_092 * 1024);
        assert_eq!(room.bound_by, MemoryBound::Machine);
    }

    #[test]
    fn the_tightest_of_nested_groups_binds_by_what_it_has_left() {
        let groups = [
            cgroup("/wide", 64 << 30, 0),
            cgroup("/wide/full", 8 << 30, (8 << 30) - 4096),
            cgroup("/wide/full/small", 1 << 20, 0),
        ];
        let room = tightest(MEMINFO, 0, groups.into_iter()).expect("a meminfo");
        assert_eq!(room.bytes, 4096);
        assert_eq!(room.total_bytes, 8 << 30);
        assert_eq!(room.bound_by, MemoryBound::Cgroup("/wide/full".into()));
    }

    #[test]
    fn what_open_sockets_pin_is_not_available() {
        let meminfo = MEMINFO.replace("Buffers: ", "SReclaimable:  20000 kB\nBuffers: ");
        let room = |sockets| tightest(&meminfo, sockets, std::iter::empty()).expect("a meminfo");
        assert_eq!(room(0).bytes - room(10_000).bytes, 10_570_000);
        assert_eq!(room(0).bytes - room(1_000_000).bytes, 20_000 * 1024);
    }

    #[test]
    fn what_is_no_meminfo_is_none() {
        for text in ["", "MemTotal: x kB", "\u{0}", &MEMINFO.replace("MemAvailable", "Other")] {
            assert_eq!(tightest(text, 0, std::iter::empty()), None, "{text}");
        }
    }

    #[test]
    fn this_machine_has_room() {
        let room = memory_available().expect("meminfo is world-readable");
        assert!(room.bytes > 0 && room.bytes <= room.total_bytes, "{room:?}");
    }

    proptest! {
        #[test]
        fn a_damaged_meminfo_breaks_nothing(text in damaged(MEMINFO)) {
            let _ = tightest(&text, u64::MAX, std::iter::empty());
        }
    }
}
