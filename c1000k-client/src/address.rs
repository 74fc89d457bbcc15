//! What TARGET may be: an address, a name, either with a port, or a `tcp://` URL of these.

use std::net::{SocketAddr, ToSocketAddrs};

use c1000k_host::command_line::{ZonedIp, parse_ip, parse_port};

/// What is understood.
const WRITTEN: &str = "write the server as 192.0.2.1, [2001:db8::1]:9900, example.com, example.com:9900 or tcp://example.com:9900";

/// The longest name that DNS has.
const NAME_BYTES_MAX: usize = 253;

/// A server, before its name is resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TargetAddress {
    pub(crate) host: Host,
    pub(crate) port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Ip(ZonedIp),
    Name(String),
}

impl TargetAddress {
    /// For clap's `value_parser`.
    ///
    /// # Errors
    /// What is wrong, and what is understood.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = without_scheme(text)?;
        see_that_it_is_bare(text)?;
        if let Some((address, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']'))
        {
            let ip = parse_ip(address)?;
            return match rest.strip_prefix(':') {
                _ if ip.ip.is_ipv4() => Err(format!("brackets are for IPv6; {WRITTEN}")),
                Some(port) => Ok(Self { host: Host::Ip(ip), port: Some(parse_port(port)?) }),
                None if rest.is_empty() => Ok(Self { host: Host::Ip(ip), port: None }),
                None => Err(format!("{rest:?} after the address is no port; {WRITTEN}")),
            };
        }
        match text.rsplit_once(':') {
            // More than one colon is IPv6.
            Some((host, port)) if !host.contains(':') => {
                Ok(Self { host: host_of(host)?, port: Some(parse_port(port)?) })
            }
            _ => Ok(Self { host: host_of(text)?, port: None }),
        }
    }

    /// The address to connect to. Of a name's addresses it is the first of the family that is asked for, and the first
    /// IPv4 one where any will do, as the server listens on IPv4 by default.
    ///
    /// # Errors
    /// The name has no such address, or can't be resolved.
    pub(crate) fn resolve(&self, port: u16, is_ipv4: Option<bool>) -> Result<SocketAddr, String> {
        let name = match &self.host {
            Host::Ip(ip) => return Ok(ip.socket_addr(port)),
            Host::Name(name) => name,
        };
        let found = (name.as_str(), port).to_socket_addrs().map_err(|error| {
            format!("{name} can't be resolved: {error}; give an address, or look at /etc/hosts and the name server")
        })?;
        let of_family: Vec<SocketAddr> = found
            .filter(|address| is_ipv4.is_none_or(|is_ipv4| address.is_ipv4() == is_ipv4))
            .collect();
        let first = of_family.iter().find(|address| address.is_ipv4()).or(of_family.first());
        first.copied().ok_or_else(|| format!("{name} has no address of the family of --source"))
    }
}

/// The text without `tcp://` and the slash that may follow the port.
fn without_scheme(text: &str) -> Result<&str, String> {
    let Some((scheme, rest)) = text.split_once("://") else { return Ok(text) };
    if !scheme.eq_ignore_ascii_case("tcp") {
        return Err(format!("{scheme:?} is no protocol that is spoken here; {WRITTEN}"));
    }
    Ok(rest.strip_suffix('/').unwrap_or(rest))
}

/// What a URL may have beside the host and its port is of no use here, and a bracket has its other half.
fn see_that_it_is_bare(text: &str) -> Result<(), String> {
    // An interface is shown as eth0@if5 where its other end is elsewhere.
    let before_zone = text.split('%').next().unwrap_or(text);
    if before_zone.contains('@') {
        return Err(format!(
            "no user is asked for here: leave out what stands before the @; {WRITTEN}"
        ));
    }
    if let Some(end) = text.find(['/', '?', '#']).filter(|&end| end > 0) {
        let rest = &text[end..];
        return Err(format!("there are no paths here: leave {rest:?} out; {WRITTEN}"));
    }
    match (text.starts_with('['), text.contains(']')) {
        (true, false) => Err(format!("the closing bracket is missing; {WRITTEN}")),
        (false, true) => Err(format!("the opening bracket is missing; {WRITTEN}")),
        _ => Ok(()),
    }
}

fn host_of(text: &str) -> Result<Host, String> {
    let is_numeric =
        |label: &str| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_digit());
    let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let is_address = text.contains([':', '%']) || text.rsplit('.').next().is_some_and(is_numeric);
    if is_address {
        return parse_ip(text).map(Host::Ip);
    }
    if !(1..=NAME_BYTES_MAX).contains(&text.len())
        || text.starts_with('-')
        || !text.bytes().all(is_of_name)
    {
        return Err(format!("neither an address nor a name; {WRITTEN}"));
    }
    Ok(Host::Name(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_target_is_an_address_or_a_name_with_or_without_a_port() {
        let ip = |text: &str| Host::Ip(parse_ip(text).unwrap());
        let name = |text: &str| Host::Name(text.to_owned());
        for (text, host, port) in [
            ("192.0.2.1", ip("192.0.2.1"), None),
            ("192.0.2.1:9900", ip("192.0.2.1"), Some(9900)),
            ("::1", ip("::1"), None),
            ("[::1]", ip("::1"), None),
            ("[::1]:80", ip("::1"), Some(80)),
            ("fe80::1%lo", ip("fe80::1%lo"), None),
            ("[fe80::1%lo]:80", ip("fe80::1%lo"), Some(80)),
            ("localhost", name("localhost"), None),
            ("a-b.example.com:65535", name("a-b.example.com"), Some(65_535)),
            ("tcp://127.0.0.1:1", ip("127.0.0.1"), Some(1)),
            ("TCP://[::1]:80/", ip("::1"), Some(80)),
            ("tcp://localhost", name("localhost"), None),
        ] {
            let found = TargetAddress::parse(text);
            assert_eq!(found, Ok(TargetAddress { host, port }), "{text}");
        }
    }

    #[test]
    fn what_is_no_target_says_what_would_be() {
        for (text, part) in [
            ("", "neither an address nor a name"),
            ("tcp://", "neither an address nor a name"),
            (":9900", "neither an address nor a name"),
            ("127.0.0", "no IP address"),
            ("999.1.1.1", "no IP address"),
            ("127.0.0.1:0", "port 0 is out of range: a port is a number from 1 to 65535"),
            ("127.0.0.1:70000", "port 70000 is out of range"),
            ("[::1]:70000", "port 70000 is out of range"),
            ("localhost:", "1 to 65535"),
            ("localhost:http", "\"http\" is no port"),
            ("[127.0.0.1]:80", "brackets are for IPv6"),
            ("[::1]80", "no port"),
            ("[::1", "the closing bracket is missing"),
            ("[::1:9900", "the closing bracket is missing"),
            ("::1]:9900", "the opening bracket is missing"),
            ("http://localhost", "\"http\" is no protocol"),
            ("tcp://localhost/path", "leave \"/path\" out"),
            ("host/x?y", "leave \"/x?y\" out"),
            ("host:80?y", "leave \"?y\" out"),
            ("[::1]:80#z", "leave \"#z\" out"),
            ("192.0.2.0/24", "leave \"/24\" out"),
            ("/tmp/socket", "neither an address nor a name"),
            ("tcp://user@localhost", "leave out what stands before the @"),
            ("user:word@localhost:80", "leave out what stands before the @"),
            ("fe80::1%eth0@if5", "no interface \"eth0@if5\""),
            ("local host", "neither an address nor a name"),
            ("fe80::1", "fe80::1%eth0"),
        ] {
            let line = TargetAddress::parse(text).expect_err(text);
            assert!(line.contains(part) && !line.contains('\n'), "{text}: {line}");
        }
    }

    #[test]
    fn a_name_is_resolved_to_ipv4_where_it_has_both() {
        let localhost = TargetAddress::parse("localhost").unwrap();
        assert_eq!(localhost.resolve(9900, None), Ok("127.0.0.1:9900".parse().unwrap()));
        let nowhere = TargetAddress::parse("nowhere.invalid").unwrap();
        assert!(nowhere.resolve(9900, None).is_err_and(|line| line.contains("can't be resolved")));
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,40}", near in "(tcp://)?[\\[\\]:%./a-f0-9]{0,30}") {
            let _ = (TargetAddress::parse(&text), TargetAddress::parse(&near));
        }
    }
}
