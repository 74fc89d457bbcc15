//! How much memory is left: in the machine, and in every cgroup around this process.

mod cgroup;
mod machine;
mod meminfo;

pub use cgroup::{CgroupLimit, Cgroups};
pub use meminfo::Meminfo;

use {
    crate::usage::SocketUsage,
    std::path::{Path, PathBuf},
};

/// The memory of a TCP socket in slabs that the kernel counts as reclaimable, and so as available, although it can't
/// reclaim them while the socket is open: sock_inode_cache 832 + dentry 192 bytes, each with its share of the unused
/// end of its slab. Measured as the growth of `SReclaimable` by two million sockets.
const PINNED_BYTES_PER_SOCKET: u64 = 1_057;

/// The limit that binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBound {
    /// The machine's memory.
    Machine,
    /// The limit of the cgroup with this directory: that of the process or one around it.
    Cgroup(PathBuf),
}

/// How much memory may still be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRoom {
    /// The available memory under the tightest limit. Swap is not counted.
    pub bytes: u64,
    /// The total there: the machine's memory, or the cgroup's limit.
    pub total_bytes: u64,
    /// The tightest limit.
    pub bound_by: MemoryBound,
    /// The part that data queued in sockets takes, if that is charged here. A cgroup of version 2 is charged at least a
    /// page for each socket with data, and when it is full the kernel kills.
    pub socket_data_bytes: Option<u64>,
}

/// Reads the room repeatedly; the cgroups that count are determined once.
#[derive(Clone, Debug, Default)]
pub struct MemoryReader {
    cgroups: Cgroups,
}

impl MemoryReader {
    /// Finds the cgroups of this process.
    pub fn new() -> Self {
        Self { cgroups: Cgroups::of_self() }
    }

    /// The present room under the tightest limit; `None` if no limit can be read.
    ///
    /// Under a cgroup limit, reclaimable page cache of the group counts as room. The machine's room is `MemAvailable`
    /// without the memory that open sockets pin.
    pub fn read(&self) -> Option<MemoryRoom> {
        self.rooms().into_iter().min_by_key(|room| room.bytes)
    }

    /// The present room in the machine and in each cgroup that has a limit, if it can be read.
    pub fn rooms(&self) -> Vec<MemoryRoom> {
        let sockets = SocketUsage::read().map_or(0, |usage| usage.tcp_alloc);
        let cgroups = self.cgroups.limits(sockets).map(MemoryRoom::from);
        machine::room(sockets).into_iter().chain(cgroups).collect()
    }

    /// This process's cgroup, if its limits can't be read, so that they are missing in [`rooms`](Self::rooms).
    pub fn hidden_cgroup(&self) -> Option<&Path> {
        self.cgroups.hidden()
    }
}

/// The present room. For frequent readings keep a [`MemoryReader`].
pub fn memory_available() -> Option<MemoryRoom> {
    MemoryReader::new().read()
}

/// The default reserve of a server on this amount of memory: a tenth, at most 1 GiB.
#[must_use]
pub fn reserve_bytes(total_bytes: u64) -> u64 {
    (total_bytes / 10).min(1 << 30)
}

impl From<CgroupLimit> for MemoryRoom {
    fn from(cgroup: CgroupLimit) -> Self {
        Self {
            bytes: cgroup.room_bytes(),
            total_bytes: cgroup.limit_bytes,
            bound_by: MemoryBound::Cgroup(cgroup.directory),
            socket_data_bytes: cgroup.socket_data_bytes,
        }
    }
}

/// The memory of slabs counted as reclaimable that open sockets pin.
fn pinned_bytes(tcp_sockets: u64) -> u64 {
    tcp_sockets.saturating_mul(PINNED_BYTES_PER_SOCKET)
}

fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_room() {
        let room = memory_available().expect("meminfo is world-readable");
        assert!(room.bytes > 0 && room.bytes <= room.total_bytes, "{room:?}");
        let rooms = MemoryReader::new().rooms();
        assert!(rooms.contains(&room) || rooms.iter().any(|other| other.bound_by == room.bound_by));
    }
}
