//! The target, and its predicted memory.

use c1000k_record::Prediction;

use super::file_table::FileTable;
use crate::limits;

/// Slab memory of one socket that epoll watches, in bytes.
///
/// Measured on Linux 6.18: TCP 2,368 + sock_inode_cache 832 + filp 192 + dentry 192 + eventpoll_epi 128 + eventpoll_pwq
/// 64 + lsm_inode_cache 32 + lsm_file_cache 24 + ep_head 16 = 3,848 bytes of objects, each with its share of the unused
/// end of its slab. Linux 6.1 differs by less than 5% (its TCP object is 2,304 bytes, its filp 256).
pub const KERNEL_BYTES_PER_SOCKET: u64 = 4_036;

/// The same for a Unix-domain stream socket, whose object takes 1,152 bytes: 2,632 bytes of objects.
pub const KERNEL_BYTES_PER_UNIX_SOCKET: u64 = 2_686;

/// Memory of the client's process for the TLS session of a connection: keys, buffers and the state of TLS 1.3.
///
/// Measured with 100,000 WebSockets through TLS: the client's process grew by 3,991 bytes per connection, 64 of which
/// are those of a connection without TLS.
pub const TLS_BYTES_PER_CONNECTION: u64 = 3_927;

/// The additional memory of a place in a registered-file table: both tables take 8 bytes, and this one a node of 32.
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

/// What carries the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// Unix-domain stream sockets, which have no ports, no packets, and both ends on this machine.
    Unix,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirements {
    /// Which end is here.
    pub role: Role,
    /// Connections to hold.
    pub connections: u64,
    /// What carries them.
    pub transport: Transport,
    /// Listening ports, or Unix-domain sockets: the server's own, or the client's destinations.
    pub ports: u64,
    /// Ports that a process of this machine listens on, if that is not [`ports`](Self::ports).
    pub listeners: Option<u64>,
    /// Source addresses of the client; with `None` the kernel chooses one.
    pub sources: Option<u64>,
    /// Connects in flight at once, which all backlogs together must hold.
    pub in_flight: u64,
    /// The process's memory per connection, of both processes together if both ends are here.
    pub user_bytes_per_connection: u64,
    /// The table that holds the sockets.
    pub file_table: FileTable,
}

impl Requirements {
    /// A target with 100 ports, one source, at most 1,024 connects in flight, and 64 bytes of process memory per
    /// connection.
    pub fn new(role: Role, connections: u64) -> Self {
        Self {
            role,
            connections,
            transport: Transport::Tcp,
            ports: 100,
            listeners: None,
            sources: None,
            in_flight: 1_024,
            user_bytes_per_connection: 64,
            file_table: FileTable::Process,
        }
    }

    /// Kernel memory of a socket.
    pub fn kernel_bytes_per_socket(&self) -> u64 {
        let socket = match self.transport {
            Transport::Tcp => KERNEL_BYTES_PER_SOCKET,
            Transport::Unix => KERNEL_BYTES_PER_UNIX_SOCKET,
        };
        match self.file_table {
            FileTable::Process => socket,
            FileTable::Registered => socket + REGISTERED_BYTES_PER_SOCKET,
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

    /// Descriptors that this machine needs besides those of the connections.
    pub(crate) fn other_descriptors(&self) -> u64 {
        let processes = self.sockets_per_connection();
        self.listening_ports().saturating_add(processes * limits::RESERVED_DESCRIPTORS)
    }

    pub(crate) fn uses_tcp(&self) -> bool {
        self.transport == Transport::Tcp
    }

    /// Whether local ports are needed here.
    pub(crate) fn connects_out(&self) -> bool {
        self.role != Role::Server && self.uses_tcp()
    }

    pub(crate) fn listens(&self) -> bool {
        self.role != Role::Client
    }
}

/// Predicts the memory of the target on this machine. If a run differs by more than a tenth, the prediction is wrong.
pub fn predict(requirements: &Requirements) -> Prediction {
    Prediction {
        connections: requirements.connections,
        process_bytes: requirements
            .connections
            .saturating_mul(requirements.user_bytes_per_connection),
        kernel_bytes: requirements.sockets().saturating_mul(requirements.kernel_bytes_per_socket()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_cost_the_kernel_twice() {
        let server = predict(&Requirements::new(Role::Server, 1_000_000));
        assert_eq!(server.kernel_bytes, 4_036_000_000);
        assert_eq!(server.process_bytes, 64_000_000);
        assert_eq!(server.total_bytes(), 4_100_000_000);
        let both = predict(&Requirements::new(Role::Both, 1_000_000));
        assert_eq!(both.kernel_bytes, 2 * server.kernel_bytes);
    }

    #[test]
    fn a_unix_domain_socket_takes_less_than_one_of_tcp() {
        let tcp = Requirements::new(Role::Both, 1_000);
        let unix = Requirements { transport: Transport::Unix, ..tcp.clone() };
        assert_eq!(predict(&unix).kernel_bytes, 2_000 * KERNEL_BYTES_PER_UNIX_SOCKET);
        assert!(predict(&unix).kernel_bytes < predict(&tcp).kernel_bytes);
    }

    #[test]
    fn an_absurd_target_saturates() {
        let requirements = Requirements::new(Role::Both, u64::MAX);
        assert_eq!(predict(&requirements).total_bytes(), u64::MAX);
        assert_eq!(requirements.sockets(), u64::MAX);
    }
}
