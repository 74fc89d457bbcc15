//! The addresses and ports of a connection, computed from its index, and the reverse.

use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;

/// The first port of a client address; all from here on are used.
const FIRST_CLIENT_PORT: u16 = 1024;
const CLIENT_PORTS: u32 = 65_536 - FIRST_CLIENT_PORT as u32;

/// The 5-tuples of all connections. The destination port changes fastest, then the client's port, then its address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuples {
    server: SocketAddrV4,
    ports: u16,
    first_client: u32,
    clients: u32,
}

impl Tuples {
    /// Clients have all addresses of the prefix except its first, its last, and the device's own, which is the second.
    pub(crate) fn new(prefix: Ipv4Net, server: SocketAddrV4, ports: u16) -> Self {
        let first_client = u32::from(device_address(prefix)) + 1;
        let clients = u32::from(prefix.broadcast()).saturating_sub(first_client);
        Self { server, ports, first_client, clients }
    }

    /// The maximum number of connections.
    pub(crate) fn room(&self) -> u64 {
        u64::from(self.clients) * u64::from(CLIENT_PORTS) * u64::from(self.ports)
    }

    /// The last client address that this many connections use.
    pub(crate) fn last_client(&self, connections: u32) -> Ipv4Addr {
        *self.of(connections.saturating_sub(1)).0.ip()
    }

    /// The first client address.
    pub(crate) fn first_client(&self) -> Ipv4Addr {
        self.first_client.into()
    }

    /// The client's and the server's address of a connection; the index must be below [`room`](Self::room).
    pub(crate) fn of(&self, index: u32) -> (SocketAddrV4, SocketAddrV4) {
        let ports = u32::from(self.ports);
        let (client, port) = (index / ports, index % ports);
        let ip = self.first_client + client / CLIENT_PORTS;
        let client_port = FIRST_CLIENT_PORT + (client % CLIENT_PORTS) as u16;
        let server = SocketAddrV4::new(*self.server.ip(), self.server.port() + port as u16);
        (SocketAddrV4::new(ip.into(), client_port), server)
    }

    /// The connection between these two addresses; `None` if there can be none.
    pub(crate) fn index(&self, client: SocketAddrV4, server: SocketAddrV4) -> Option<u32> {
        let port =
            server.port().checked_sub(self.server.port()).filter(|&port| port < self.ports)?;
        let address = u32::from(*client.ip()).checked_sub(self.first_client)?;
        if server.ip() != self.server.ip() || address >= self.clients {
            return None;
        }
        let client_port = client.port().checked_sub(FIRST_CLIENT_PORT)?;
        let client = address.checked_mul(CLIENT_PORTS)?.checked_add(u32::from(client_port))?;
        client.checked_mul(u32::from(self.ports))?.checked_add(u32::from(port))
    }
}

/// The address of the device itself, at which the server of this machine is reached.
pub(crate) fn device_address(prefix: Ipv4Net) -> Ipv4Addr {
    (u32::from(prefix.network()) + 1).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuples(prefix: &str, ports: u16) -> Tuples {
        Tuples::new(prefix.parse().unwrap(), "198.18.0.1:9900".parse().unwrap(), ports)
    }

    #[test]
    fn the_block_for_benchmarks_has_room_for_all() {
        let tuples = tuples("198.18.0.0/15", 100);
        assert!(tuples.room() > 800_000_000_000);
        assert_eq!(tuples.first_client().to_string(), "198.18.0.2");
        assert_eq!(tuples.last_client(5_000_000).to_string(), "198.18.0.2");
        assert_eq!(super::tests::tuples("198.18.0.0/30", 1).room(), u64::from(CLIENT_PORTS));
    }

    proptest! {
        #[test]
        fn a_connection_is_found_by_its_addresses(index in any::<u32>(), ports in 1..=1_000_u16) {
            let tuples = tuples("198.18.0.0/15", ports);
            prop_assume!(u64::from(index) < tuples.room());
            let (client, server) = tuples.of(index);
            prop_assert_eq!(tuples.index(client, server), Some(index));
            let prefix: Ipv4Net = "198.18.0.0/15".parse().unwrap();
            prop_assert!(prefix.contains(client.ip()), "{} is outside of the prefix", client);
        }

        #[test]
        fn other_addresses_belong_to_no_connection(
            ip in any::<u32>(), port in any::<u16>(), server_port in any::<u16>(),
        ) {
            let tuples = tuples("198.18.0.0/15", 100);
            let client = SocketAddrV4::new(ip.into(), port);
            let server = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 1), server_port);
            if let Some(index) = tuples.index(client, server) {
                prop_assert_eq!(tuples.of(index), (client, server));
            }
        }
    }
}
