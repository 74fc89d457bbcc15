//! The parameters of a run, native or in guests.

use std::path::PathBuf;

use c1000k_host::check::Role;
use c1000k_host::quantity::{parse_bytes, parse_count};
use c1000k_report::run::Topology;

/// The server's first port, and how many it listens on.
pub(crate) const FIRST_PORT: u16 = 9900;
pub(crate) const PORTS: u16 = 100;

/// 100 server ports x 50,000 local ports.
const CONNECTIONS_MAX: u64 = 5_000_000;

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) connections: u64,
    pub(crate) topology: Topology,
    /// The clients have no sockets.
    pub(crate) stateless: bool,
    /// In MiB, of all guests together.
    pub(crate) memory_mb: Option<u64>,
    /// In MiB, of the server's guest.
    pub(crate) server_memory_mb: Option<u64>,
    /// An empty directory.
    pub(crate) out: PathBuf,
}

/// A client's part of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// The client's name; with three hosts also its host's.
    pub(crate) client: &'static str,
    /// The server's address.
    pub(crate) server: String,
    pub(crate) connections: u64,
}

impl Plan {
    /// The ends that have sockets here.
    pub(crate) fn role(&self) -> Role {
        if self.stateless { Role::Server } else { Role::Both }
    }

    pub(crate) fn shares(&self) -> Vec<Share> {
        let second = self.connections / 2;
        let of =
            |link, client, connections| Share { client, server: address(link, 1), connections };
        match self.topology {
            Topology::OneHost => vec![Share {
                client: "client",
                server: "127.0.0.1".to_owned(),
                connections: self.connections,
            }],
            Topology::ThreeHosts => {
                vec![of(1, "client-1", self.connections - second), of(2, "client-2", second)]
            }
        }
    }
}

/// The address of one end of a link between hosts: 1 is the server's.
pub(crate) fn address(link: u8, end: u8) -> String {
    format!("10.199.{link}.{end}")
}

/// Parses the number of connections.
pub(crate) fn parse_connections(text: &str) -> Result<u64, String> {
    let most = c1000k_host::format::count(CONNECTIONS_MAX);
    match parse_count(text)? {
        count @ 2..=CONNECTIONS_MAX => Ok(count),
        _ => Err(format!("must be 2 to {most}")),
    }
}

/// Parses a size as in 900M or 14G; returns MiB.
pub(crate) fn parse_mebibytes(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? >> 20 {
        0 => Err("less than 1M; a size is written as in 900M or 14G".to_owned()),
        mebibytes => Ok(mebibytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_parsed_within_bounds() {
        for (text, count) in
            [("15000", 15_000), ("10k", 10_000), ("2M", 2_000_000), ("08", 8), ("2500k", 2_500_000)]
        {
            assert_eq!(parse_connections(text), Ok(count), "{text}");
        }
        for text in ["", "k", "-1", "1kk", "9999999999", "1 0", "0", "1", "9M", "ten"] {
            assert!(parse_connections(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_parsed_as_mebibytes() {
        assert_eq!(parse_mebibytes("512M"), Ok(512));
        assert_eq!(parse_mebibytes("14g"), Ok(14_336));
        for text in ["", "14", "12", "M", "0G", "00M"] {
            assert!(parse_mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn two_clients_share_all_connections() {
        let plan = |topology| Plan {
            connections: 15_001,
            topology,
            stateless: false,
            memory_mb: None,
            server_memory_mb: None,
            out: PathBuf::new(),
        };
        let shares = plan(Topology::ThreeHosts).shares();
        assert_eq!(shares.iter().map(|share| share.connections).sum::<u64>(), 15_001);
        assert_eq!((shares[0].connections, shares[1].server.as_str()), (7_501, "10.199.2.1"));
        assert_eq!(plan(Topology::OneHost).shares()[0].connections, 15_001);
    }
}
