//! Where connections go: an IP address with consecutive ports, or a Unix-domain socket.

use std::fmt;
use std::path::Path;

use c1000k_host::command_line::ZonedIp;
use c1000k_host::format;
use reactor::Address;

/// Destinations that are named in a sentence; of the others, their number.
const NAMED_MAX: usize = 3;

/// The address of one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The socket, or the IP address with the first port.
    address: Address,
    /// Consecutive ports from the first one on; 1 without ports.
    ports: u16,
}

impl Destination {
    /// An IP address with its first port and their number, or a Unix-domain socket, whatever `ports` is.
    pub fn new(address: impl Into<Address>, ports: u16) -> Self {
        let address = address.into();
        let ports = if matches!(address, Address::Ip(_)) { ports } else { 1 };
        Self { address, ports }
    }

    /// The address of one port. A Unix-domain socket has no port, and the argument is ignored.
    pub(crate) fn at(&self, port: u16) -> Address {
        match &self.address {
            Address::Ip(first) => ZonedIp::from(*first).socket_addr(port).into(),
            unix => unix.clone(),
        }
    }

    /// `None` for a Unix-domain socket.
    pub(crate) fn ip(&self) -> Option<ZonedIp> {
        match self.address {
            Address::Ip(first) => Some(first.into()),
            _ => None,
        }
    }

    /// The first port; 0 for a Unix-domain socket.
    pub(crate) fn first_port(&self) -> u16 {
        match self.address {
            Address::Ip(first) => first.port(),
            _ => 0,
        }
    }

    /// Number of addresses to connect to: those of its ports, or 1.
    pub(crate) fn endpoints(&self) -> u16 {
        self.ports
    }

    /// Number of ports; 0 for a Unix-domain socket.
    pub(crate) fn ports(&self) -> u16 {
        if self.is_unix() { 0 } else { self.ports }
    }

    pub(crate) fn is_unix(&self) -> bool {
        self.ip().is_none()
    }

    /// The file of a Unix-domain socket, which one in the abstract namespace does not have.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.address {
            Address::Unix(path) => Some(path),
            _ => None,
        }
    }

    /// Whether its packets, if it has any, stay on loopback.
    pub(crate) fn is_local(&self) -> bool {
        self.ip().is_none_or(|ip| ip.ip.is_loopback())
    }

    /// Whether both have an address and a port in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        match (self.ip(), other.ip()) {
            (Some(own), Some(others)) => {
                let last = |to: &Self| u32::from(to.first_port()) + u32::from(to.ports) - 1;
                own == others
                    && u32::from(self.first_port()) <= last(other)
                    && u32::from(other.first_port()) <= last(self)
            }
            _ => self.address == other.address,
        }
    }

    /// The address without the number of ports: `127.0.0.1:9900`, `unix:/run/server.sock`.
    pub(crate) fn first(&self) -> String {
        format::visible(&self.address.to_string())
    }
}

/// `127.0.0.1:9900-9999`, `[::1]:80` or `unix:/run/server.sock`.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first())?;
        match self.ports {
            1 => Ok(()),
            ports => write!(f, "-{}", self.first_port() + (ports - 1)),
        }
    }
}

/// All of them in a sentence: `127.0.0.1:80, 127.0.0.2:80 and 7 more`.
pub(crate) fn list<T: fmt::Display>(all: &[T]) -> String {
    let named: Vec<String> = all.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    match (named.split_last(), all.len() - named.len()) {
        (Some((last, [])), 0) => last.clone(),
        (Some((last, before)), 0) => format!("{} and {last}", before.join(", ")),
        (_, more) => format!("{} and {} more", named.join(", "), format::count(more as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(first: &str, ports: u16) -> Destination {
        Destination::new(first.parse::<std::net::SocketAddr>().unwrap(), ports)
    }

    fn unix(path: &str) -> Destination {
        Destination::new(Path::new(path), 100)
    }

    #[test]
    fn it_is_shown_with_its_ports_if_it_has_any() {
        assert_eq!(ip("127.0.0.1:9900", 100).to_string(), "127.0.0.1:9900-9999");
        assert_eq!(ip("[::1]:80", 1).to_string(), "[::1]:80");
        assert_eq!(unix("/run/server.sock").to_string(), "unix:/run/server.sock");
        assert_eq!(unix("/run/a\nb").to_string(), r"unix:/run/a\nb");
        let name = Destination::new(Address::unix_abstract("server"), 1);
        assert_eq!(name.to_string(), "unix:@server");
        assert_eq!((unix("a").ports(), unix("a").endpoints()), (0, 1));
    }

    #[test]
    fn a_list_names_the_first_ones() {
        assert_eq!(list(&["a"]), "a");
        assert_eq!(list(&["a", "b"]), "a and b");
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(list(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }

    #[test]
    fn two_overlap_that_have_a_port_of_an_address_in_common() {
        for (one, other, overlaps) in [
            (ip("127.0.0.1:9900", 100), ip("127.0.0.1:9999", 1), true),
            (ip("127.0.0.1:9900", 100), ip("127.0.0.1:10000", 100), false),
            (ip("127.0.0.1:9900", 100), ip("127.0.0.2:9900", 100), false),
            (ip("127.0.0.1:65535", 1), ip("127.0.0.1:65535", 1), true),
            (unix("/run/a"), unix("/run/a"), true),
            (unix("/run/a"), unix("/run/b"), false),
            (unix("/run/a"), ip("127.0.0.1:1", 1), false),
        ] {
            assert_eq!(one.overlaps(&other), overlaps, "{one} {other}");
            assert_eq!(other.overlaps(&one), overlaps, "{other} {one}");
        }
    }
}
