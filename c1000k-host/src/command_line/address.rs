//! IP addresses that users type, with a zone where they need one: `192.0.2.1`, `2001:db8::1`, `fe80::1%eth0`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use nix::net::if_::{if_indextoname, if_nametoindex};

/// An IP address and its zone: the link that a link-local address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ZonedIp {
    /// The address.
    pub ip: IpAddr,
    /// The index of the zone's interface; 0 without a zone.
    pub zone: u32,
}

impl ZonedIp {
    /// The address with a port, for the kernel.
    #[must_use]
    pub fn socket_addr(self, port: u16) -> SocketAddr {
        match self.ip {
            IpAddr::V4(ip) => (ip, port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, self.zone).into(),
        }
    }
}

impl From<IpAddr> for ZonedIp {
    fn from(ip: IpAddr) -> Self {
        Self { ip, zone: 0 }
    }
}

impl From<Ipv4Addr> for ZonedIp {
    fn from(ip: Ipv4Addr) -> Self {
        IpAddr::from(ip).into()
    }
}

impl From<Ipv6Addr> for ZonedIp {
    fn from(ip: Ipv6Addr) -> Self {
        IpAddr::from(ip).into()
    }
}

impl From<SocketAddr> for ZonedIp {
    fn from(address: SocketAddr) -> Self {
        let zone = match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(address) => address.scope_id(),
        };
        Self { ip: address.ip(), zone }
    }
}

/// As it is typed: `fe80::1%eth0`.
impl fmt::Display for ZonedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ip, zone } = self;
        match if_indextoname(*zone) {
            _ if *zone == 0 => write!(f, "{ip}"),
            Ok(name) => write!(f, "{ip}%{}", name.to_string_lossy()),
            Err(_) => write!(f, "{ip}%{zone}"),
        }
    }
}

/// Parses an IP address, for clap's `value_parser`.
///
/// # Errors
/// The accepted forms, or what the address lacks.
pub fn parse_ip(text: &str) -> Result<ZonedIp, String> {
    let (address, zone) = split_zone(text)?;
    let ip = address.parse().map_err(|_| {
        "not an IP address; write it as 192.0.2.1, 2001:db8::1 or fe80::1%eth0 \
         (`getent hosts NAME` shows the address of a name)"
            .to_owned()
    })?;
    with_zone(ip, zone)
}

/// Parses a port, for clap's `value_parser`.
///
/// # Errors
/// It is not a number, or out of range; with the valid range.
pub fn parse_port(text: &str) -> Result<u16, String> {
    const PORT: &str = "a port is a number from 1 to 65535";
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(0) | Err(_) if is_number => Err(format!("port {text} is out of range: {PORT}")),
        Ok(port) if is_number => Ok(port),
        _ => Err(format!("{text:?} is not a port: {PORT}")),
    }
}

/// The address with its zone.
///
/// # Errors
/// A link-local address has no zone, or another address has one.
pub fn with_zone(ip: IpAddr, zone: u32) -> Result<ZonedIp, String> {
    match ip {
        IpAddr::V4(_) if zone != 0 => {
            Err(format!("{ip} is an IPv4 address, which has no zone: leave the % out"))
        }
        IpAddr::V6(address) if address.is_unicast_link_local() && zone == 0 => Err(format!(
            "{ip} is a link-local address: specify its zone too, as {ip}%eth0 (`ip link` lists them)"
        )),
        _ => Ok(ZonedIp { ip, zone }),
    }
}

/// The text before the `%`, and the index of the interface after it; 0 without a `%`.
///
/// # Errors
/// This machine has no such interface.
pub fn split_zone(text: &str) -> Result<(&str, u32), String> {
    let Some((address, name)) = text.split_once('%') else { return Ok((text, 0)) };
    let index = if_nametoindex(name).ok().or_else(|| index_in(name));
    let no_such = || format!("this machine has no interface {name:?}; `ip link` lists them");
    Ok((address, index.ok_or_else(no_such)?))
}

/// An interface may also be given by its index.
fn index_in(text: &str) -> Option<u32> {
    let index = text.parse().ok()?;
    let name = if_indextoname(index).ok()?;
    if_nametoindex(name.as_c_str()).ok().filter(|&found| found == index)
}

/// Whether it is a multicast or the broadcast address instead of the address of one machine.
#[must_use]
pub fn is_of_many(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    is_broadcast || address.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_have_a_zone() {
        let zone = if_nametoindex("lo").unwrap();
        let address = parse_ip("fe80::1%lo").unwrap();
        assert_eq!((address.ip, address.zone), ("fe80::1".parse().unwrap(), zone));
        assert_eq!(address.to_string(), "fe80::1%lo");
        assert_eq!(parse_ip(&format!("fe80::1%{zone}")), Ok(address));
        let SocketAddr::V6(socket) = address.socket_addr(9900) else { panic!("it is IPv6") };
        assert_eq!((socket.port(), socket.scope_id()), (9900, zone));
        assert_eq!(ZonedIp::from(address.socket_addr(1)), address);
        for text in ["192.0.2.1", "2001:db8::1", "::"] {
            assert_eq!(parse_ip(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_port_is_a_number_within_its_range() {
        assert_eq!((parse_port("1"), parse_port("65535")), (Ok(1), Ok(65_535)));
        for text in ["0", "65536", "70000", "99999999999999999999"] {
            let line = parse_port(text).expect_err(text);
            let start = format!("port {text} is out of range: ");
            assert!(line.starts_with(&start) && line.ends_with("1 to 65535"), "{line}");
        }
        for text in ["", "-1", "+80", "http", "80.0", " 80"] {
            let line = parse_port(text).expect_err(text);
            assert!(line.contains("is not a port: a port is a number from 1 to 65535"), "{line}");
        }
    }

    #[test]
    fn an_address_without_its_zone_or_with_a_wrong_one_is_refused() {
        for (text, part) in [
            ("fe80::1", "fe80::1%eth0"),
            ("fe80::1%", "no interface"),
            ("fe80::1%nowhere", "no interface \"nowhere\""),
            ("fe80::1%4294967295", "no interface"),
            ("fe80::1%a\0b", "no interface"),
            ("127.0.0.1%lo", "has no zone"),
            ("nowhere%lo", "not an IP address"),
            ("", "not an IP address"),
        ] {
            let line = parse_ip(text).expect_err(text);
            assert!(line.contains(part), "{text}: {line}");
        }
    }
}
