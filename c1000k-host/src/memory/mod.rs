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

    /// The room that is left now, where it is tightest; `None` where nothing of it can be read.
    ///
    /// Under a cgroup limit, page cache that the group could give back counts as room. The machine's own room is
    /// `MemAvailable` without what open sockets pin.
    pub fn read(&self) -> Option<MemoryRoom> {
        self.rooms().into_iter().min_by_key(|room| room.bytes)
    }

    /// The room that is left now in the machine and in each cgroup that has a limit, as far as each can be read.
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

/// The room that is left now. Who asks often keeps a [`MemoryReader`].
pub fn memory_available() -> Option<MemoryRoom> {
    MemoryReader::new().read()
}

/// What a server keeps free of so much memory where nothing else is asked for: a tenth, at most 1 GiB.
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

/// What open sockets keep of the slabs that count as reclaimable.
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
