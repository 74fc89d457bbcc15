//! The target, and the memory that it is predicted to take.

use c1000k_record::Prediction;

use super::file_table::FileTable;
use crate::limits;

/// What one socket that epoll watches takes of the kernel's slabs, in bytes.
///
/// Measured on Linux 6.18: TCP 2,368 + sock_inode_cache 832 + filp 192 + dentry 192 +
/// eventpoll_epi 128 + eventpoll_pwq 64 + lsm_inode_cache 32 + lsm_file_cache 24 + ep_head 16 =
/// 3,848 bytes of objects, each with its share of what is lost at the end of its slab. Linux 6.1
/// differs by less than 5% (its TCP object is 2,304 bytes, its filp 256).
pub const KERNEL_BYTES_PER_SOCKET: u64 = 4_036;

/// What a place in a registered-file table takes beyond one in the process's table: 8 bytes in either, and a node of 32.
const REGISTERED_BYTES_PER_SOCKET: u64 = 32;

/// Which end of the connections is on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The listening end.
    Server,
    /// The connecting end.
    Client,
    /// Both ends, in two processes of one user: the kernel has two sockets for each connection.
    Both,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Which end is here.
    pub role: Role,
    /// Connections to hold.
    pub connections: u64,
    /// Listening ports: the server's own, or the client's destinations.
    pub ports: u64,
    /// Ports that a process of this machine listens on, where it is not [`ports`](Self::ports).
    pub listeners: Option<u64>,
    /// Source addresses of the client; `None` leaves the choice, of one, to the kernel.
    pub sources: Option<u64>,
    /// Connects under way at once: this many may wait in all backlogs together.
    pub in_flight: u64,
    /// What the process itself takes for each connection, both processes together where both ends
    /// are here.
    pub user_bytes_per_connection: u64,
    /// Where the sockets are held.
    pub file_table: FileTable,
}

impl Need {
    /// This many connections over 100 ports from one source, at most 1,024 connects under way, 64
    /// bytes of the process each.
    pub fn new(role: Role, connections: u64) -> Self {
        Self {
            role,
            connections,
            ports: 100,
            listeners: None,
            sources: None,
            in_flight: 1_024,
            user_bytes_per_connection: 64,
            file_table: FileTable::Process,
        }
    }

    /// What a socket takes of the kernel.
    pub fn kernel_bytes_per_socket(&self) -> u64 {
        match self.file_table {
            FileTable::Process => KERNEL_BYTES_PER_SOCKET,
            FileTable::Registered => KERNEL_BYTES_PER_SOCKET + REGISTERED_BYTES_PER_SOCKET,
        }
    }

    /// Sockets on this machine for each connection.
    pub(crate) fn sockets_per_connection(&self) -> u64 {
        if self.role == Role::Both { 2 } else { 1 }
    }

    /// Sockets of the connections on this machine.
    pub(crate) fn sockets(&self) -> u64 {
        self.connections.saturating_mul(self.sockets_per_connection())
    }

    /// Ports that a process here listens on.
    pub(crate) fn listening_ports(&self) -> u64 {
        if self.role == Role::Client { 0 } else { self.listeners.unwrap_or(self.ports) }
    }

    /// What descriptors this machine needs beside those of the connections.
    pub(crate) fn other_descriptors(&self) -> u64 {
        let processes = self.sockets_per_connection();
        self.listening_ports().saturating_add(processes * limits::RESERVED_DESCRIPTORS)
    }

    pub(crate) fn connects_out(&self) -> bool {
        self.role != Role::Server
    }

    pub(crate) fn listens(&self) -> bool {
        self.role != Role::Client
    }
}

/// Predicts the memory that the target takes on this machine. Where a run then differs by more than a tenth, the
/// prediction is wrong.
pub fn predict(need: &Need) -> Prediction {
    Prediction {
        connections: need.connections,
        process_bytes: need.connections.saturating_mul(need.user_bytes_per_connection),
        kernel_bytes: need.sockets().saturating_mul(need.kernel_bytes_per_socket()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_cost_the_kernel_twice() {
        let server = predict(&Need::new(Role::Server, 1_000_000));
        assert_eq!(server.kernel_bytes, 4_036_000_000);
        assert_eq!(server.process_bytes, 64_000_000);
        assert_eq!(server.total_bytes(), 4_100_000_000);
        let both = predict(&Need::new(Role::Both, 1_000_000));
        assert_eq!(both.kernel_bytes, 2 * server.kernel_bytes);
    }

    #[test]
    fn an_absurd_target_saturates() {
        let need = Need::new(Role::Both, u64::MAX);
        assert_eq!(predict(&need).total_bytes(), u64::MAX);
        assert_eq!(need.sockets(), u64::MAX);
    }
}
