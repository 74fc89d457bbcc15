//! What TARGET may be: an address, a name, either with a port, a Unix-domain socket, or a URL with the protocol.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use c1000k_host::command_line::{ZonedIp, parse_ip, parse_port};
use reactor::Address;

/// The accepted forms.
const WRITTEN: &str = "write the server as 192.0.2.1, [2001:db8::1]:9900, example.com, example.com:9900, unix:/run/server.sock or as a URL: wss://example.com/chat";

/// The longest name of DNS.
const NAME_BYTES_MAX: usize = 253;

/// The longest path of a Unix-domain socket.
const SOCKET_BYTES_MAX: usize = 107;

/// The host name of a Unix-domain socket in HTTP requests and certificates.
const UNIX_HOST: &str = "localhost";

/// A server before its name is resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TargetAddress {
    pub(crate) scheme: Scheme,
    pub(crate) host: Host,
    pub(crate) port: Option<u16>,
    /// Path and query of the requests, for a scheme that has them.
    pub(crate) path: String,
}

/// The protocol over TCP or a Unix-domain socket. The echo is `tcp` over both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Tcp,
    Tls,
    Http,
    Https,
    Ws,
    Wss,
    Mqtt,
    Mqtts,
    Redis,
}

const SCHEMES: &[(Scheme, &str)] = &[
    (Scheme::Tcp, "tcp"),
    (Scheme::Tls, "tls"),
    (Scheme::Http, "http"),
    (Scheme::Https, "https"),
    (Scheme::Ws, "ws"),
    (Scheme::Wss, "wss"),
    (Scheme::Mqtt, "mqtt"),
    (Scheme::Mqtts, "mqtts"),
    (Scheme::Redis, "redis"),
];

impl Scheme {
    fn parse(text: &str) -> Result<Self, String> {
        let found = SCHEMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text));
        found.map(|&(scheme, _)| scheme).ok_or_else(|| {
            let names: Vec<&str> = SCHEMES.iter().map(|&(_, name)| name).collect();
            format!("{text:?} is not a supported protocol; supported: {}", names.join(", "))
        })
    }

    pub(crate) fn name(self) -> &'static str {
        SCHEMES.iter().find(|(scheme, _)| *scheme == self).map_or("", |&(_, name)| name)
    }

    /// The default port of the protocol, if it has one.
    pub(crate) fn port(self) -> Option<u16> {
        match self {
            Self::Tcp | Self::Tls => None,
            Self::Http | Self::Ws => Some(80),
            Self::Https | Self::Wss => Some(443),
            Self::Mqtt => Some(1883),
            Self::Mqtts => Some(8883),
            Self::Redis => Some(6379),
        }
    }

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::Tls | Self::Https | Self::Wss | Self::Mqtts)
    }

    fn has_path(self) -> bool {
        matches!(self, Self::Http | Self::Https | Self::Ws | Self::Wss)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Ip(ZonedIp),
    Name(String),
    /// A path, or `@` and a name in the abstract namespace.
    Unix(String),
}

impl TargetAddress {
    /// For clap's `value_parser`.
    ///
    /// # Errors
    /// What is wrong, and the accepted forms.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some((scheme, socket)) = split_unix(text) {
            return Self::parse_unix(scheme, socket);
        }
        let (scheme, text) = match text.split_once("://") {
            Some((scheme, rest)) => (Scheme::parse(scheme)?, rest),
            None => (Scheme::Tcp, text),
        };
        let (text, path) = split_path(scheme, text)?;
        check_bare(text)?;
        let (host, port) = host_and_port(text)?;
        Ok(Self { scheme, host, port, path })
    }

    /// Reads what follows `unix:`. As in nginx, `:/` begins the path of a request.
    fn parse_unix(scheme: &str, socket: &str) -> Result<Self, String> {
        let scheme = match scheme {
            "" => Scheme::Tcp,
            name => Scheme::parse(name)?,
        };
        let (socket, path) = match socket.split_once(":/") {
            Some((socket, path)) if scheme.has_path() => (socket, format!("/{path}")),
            _ => (socket, String::new()),
        };
        let (_, path) = split_path(scheme, &path)?;
        // A URL has an empty host before an absolute path.
        let socket = match socket.strip_prefix("//") {
            Some(path) if path.starts_with('/') => path,
            Some(_) => return Err(format!("a Unix-domain path can't follow a host name; {UNIX}")),
            None => socket,
        };
        let name = socket.strip_prefix('@').unwrap_or(socket);
        match name.len() {
            0 => Err(format!("the path of the socket is missing; {UNIX}")),
            1..=SOCKET_BYTES_MAX => {
                Ok(Self { scheme, host: Host::Unix(socket.to_owned()), port: None, path })
            }
            length => Err(format!(
                "the path of the socket has {length} bytes: Linux allows {SOCKET_BYTES_MAX}; \
                 use a shorter one, such as a symbolic link or a relative path"
            )),
        }
    }

    /// The protocol for the record and for messages: `tcp`, `unix`, `http+unix`.
    pub(crate) fn protocol(&self) -> String {
        match (self.scheme, self.is_unix()) {
            (Scheme::Tcp, true) => "unix".to_owned(),
            (scheme, true) => format!("{}+unix", scheme.name()),
            (scheme, false) => scheme.name().to_owned(),
        }
    }

    pub(crate) fn is_unix(&self) -> bool {
        matches!(self.host, Host::Unix(_))
    }

    /// Host and port, for HTTP requests.
    pub(crate) fn authority(&self, port: u16) -> String {
        let host = match &self.host {
            Host::Ip(ZonedIp { ip: IpAddr::V6(ip), .. }) => format!("[{ip}]"),
            host => host.name(),
        };
        let has_own_port = self.is_unix() || self.scheme.port() == Some(port);
        if has_own_port { host } else { format!("{host}:{port}") }
    }

    /// The address to connect to. Of a name's addresses it is the first of the requested family, or without a family
    /// the first IPv4 address, as the server listens on IPv4 by default.
    ///
    /// # Errors
    /// The name has no such address, or can't be resolved.
    pub(crate) fn resolve(&self, port: u16, is_ipv4: Option<bool>) -> Result<Address, String> {
        let name = match &self.host {
            Host::Ip(ip) => return Ok(ip.socket_addr(port).into()),
            Host::Name(name) => name,
            Host::Unix(socket) => {
                return Ok(match socket.strip_prefix('@') {
                    Some(name) => Address::unix_abstract(name),
                    None => PathBuf::from(socket).into(),
                });
            }
        };
        let found = (name.as_str(), port).to_socket_addrs().map_err(|error| {
            format!("{name} can't be resolved: {error}; use an address, or see /etc/hosts and the name server")
        })?;
        let of_family: Vec<SocketAddr> = found
            .filter(|address| is_ipv4.is_none_or(|is_ipv4| address.is_ipv4() == is_ipv4))
            .collect();
        let first = of_family.iter().find(|address| address.is_ipv4()).or(of_family.first());
        first
            .copied()
            .map(Address::from)
            .ok_or_else(|| format!("{name} has no address of the family of --source"))
    }
}

impl Host {
    /// The name in a certificate.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Ip(ip) => ip.ip.to_string(),
            Self::Name(name) => name.clone(),
            Self::Unix(_) => UNIX_HOST.to_owned(),
        }
    }
}

/// The accepted forms of a Unix-domain socket.
const UNIX: &str = "write it as unix:/run/server.sock, or unix:@NAME in the abstract namespace";

/// The scheme, which may be empty, and the socket, of `unix:PATH` and `SCHEME+unix:PATH`.
fn split_unix(text: &str) -> Option<(&str, &str)> {
    let (before, socket) = text.split_once(':')?;
    let (scheme, unix) = before.rsplit_once('+').unwrap_or(("", before));
    unix.eq_ignore_ascii_case("unix").then_some((scheme, socket))
}

/// The text before the path, and the path, which is `/` by default.
fn split_path(scheme: Scheme, text: &str) -> Result<(&str, String), String> {
    if !scheme.has_path() {
        return Ok((text.strip_suffix('/').unwrap_or(text), String::new()));
    }
    let (before, path) = text.split_at(text.find(['/', '?', '#']).unwrap_or(text.len()));
    let path = path.split('#').next().unwrap_or_default();
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!(
            "{path:?} is not a path: percent-encode spaces and non-ASCII characters (%20)"
        ));
    }
    let slash = if path.starts_with('/') { "" } else { "/" };
    Ok((before, format!("{slash}{path}")))
}

fn host_and_port(text: &str) -> Result<(Host, Option<u16>), String> {
    if let Some((address, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        let ip = parse_ip(address)?;
        return match rest.strip_prefix(':') {
            _ if ip.ip.is_ipv4() => Err(format!("brackets are for IPv6; {WRITTEN}")),
            Some(port) => Ok((Host::Ip(ip), Some(parse_port(port)?))),
            None if rest.is_empty() => Ok((Host::Ip(ip), None)),
            None => Err(format!("{rest:?} after the address is not a port; {WRITTEN}")),
        };
    }
    match text.rsplit_once(':') {
        // More than one colon is IPv6.
        Some((host, port)) if !host.contains(':') => Ok((host_of(host)?, Some(parse_port(port)?))),
        _ => Ok((host_of(text)?, None)),
    }
}

/// Refuses the parts of a URL that are not supported, and unpaired brackets.
fn check_bare(text: &str) -> Result<(), String> {
    // `ip link` shows an interface as eth0@if5 if its other end is in another namespace.
    let before_zone = text.split('%').next().unwrap_or(text);
    if before_zone.contains('@') {
        return Err(format!(
            "user names in URLs are not supported: remove the part before the @; {WRITTEN}"
        ));
    }
    if let Some(end) = text.find(['/', '?', '#']).filter(|&end| end > 0) {
        let rest = &text[end..];
        return Err(format!("this target has no path: remove {rest:?}; {WRITTEN}"));
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
            let (scheme, path) = (Scheme::Tcp, String::new());
            let found = TargetAddress::parse(text);
            assert_eq!(found, Ok(TargetAddress { scheme, host, port, path }), "{text}");
        }
    }

    #[test]
    fn a_url_says_the_protocol_and_for_some_the_path() {
        for (text, scheme, port, path, authority) in [
            ("http://example.com", Scheme::Http, None, "/", "example.com"),
            (
                "https://example.com:8443/a/b?c=d#e",
                Scheme::Https,
                Some(8443),
                "/a/b?c=d",
                "example.com:8443",
            ),
            ("WS://example.com?x", Scheme::Ws, None, "/?x", "example.com"),
            ("wss://[::1]/chat", Scheme::Wss, None, "/chat", "[::1]"),
            ("mqtt://example.com/", Scheme::Mqtt, None, "", "example.com"),
            ("mqtts://example.com", Scheme::Mqtts, None, "", "example.com"),
            ("redis://example.com:6380", Scheme::Redis, Some(6380), "", "example.com:6380"),
            ("tls://example.com:1", Scheme::Tls, Some(1), "", "example.com:1"),
        ] {
            let found = TargetAddress::parse(text).unwrap();
            assert_eq!(
                (found.scheme, found.port, found.path.as_str()),
                (scheme, port, path),
                "{text}"
            );
            let port = port.or(scheme.port()).unwrap();
            assert_eq!(found.authority(port), authority, "{text}");
        }
    }

    #[test]
    fn a_unix_domain_socket_may_have_any_protocol() {
        for (text, scheme, socket, path, protocol) in [
            ("unix:/run/a.sock", Scheme::Tcp, "/run/a.sock", "", "unix"),
            ("UNIX:a:b", Scheme::Tcp, "a:b", "", "unix"),
            ("unix:a:/b", Scheme::Tcp, "a:/b", "", "unix"),
            ("unix:///run/a.sock", Scheme::Tcp, "/run/a.sock", "", "unix"),
            ("unix:@name", Scheme::Tcp, "@name", "", "unix"),
            ("http+unix:/run/a.sock", Scheme::Http, "/run/a.sock", "/", "http+unix"),
            ("WSS+unix:a:/chat?x", Scheme::Wss, "a", "/chat?x", "wss+unix"),
            ("http+unix:///run/a:/b", Scheme::Http, "/run/a", "/b", "http+unix"),
            ("redis+unix:a:/b", Scheme::Redis, "a:/b", "", "redis+unix"),
        ] {
            let found = TargetAddress::parse(text).unwrap();
            let host = Host::Unix(socket.to_owned());
            assert_eq!(found, TargetAddress { scheme, host, port: None, path: path.to_owned() });
            assert_eq!(
                (found.protocol().as_str(), found.authority(1)),
                (protocol, "localhost".to_owned())
            );
            let address = found.resolve(1, None).unwrap().to_string();
            assert_eq!(address, format!("unix:{socket}"), "{text}");
        }
        let longest = "x".repeat(SOCKET_BYTES_MAX);
        assert!(TargetAddress::parse(&format!("unix:{longest}")).is_ok());
        assert!(TargetAddress::parse(&format!("unix:@{longest}")).is_ok());
        for (text, part) in [
            ("unix:", "the path of the socket is missing"),
            ("unix:@", "the path of the socket is missing"),
            ("http+unix::/a", "the path of the socket is missing"),
            ("unix://host/a", "a Unix-domain path can't follow a host name"),
            ("ftp+unix:/a", "\"ftp\" is not a supported protocol"),
            ("http+unix:/a:/b c", "is not a path"),
            (&format!("unix:{longest}x"), "has 108 bytes: Linux allows 107"),
        ] {
            let line = TargetAddress::parse(text).expect_err(text);
            assert!(line.contains(part) && !line.contains('\n'), "{text}: {line}");
        }
    }

    #[test]
    fn an_invalid_target_is_explained() {
        for (text, part) in [
            ("", "neither an address nor a name"),
            ("tcp://", "neither an address nor a name"),
            (":9900", "neither an address nor a name"),
            ("127.0.0", "not an IP address"),
            ("999.1.1.1", "not an IP address"),
            ("127.0.0.1:0", "port 0 is out of range: a port is a number from 1 to 65535"),
            ("127.0.0.1:70000", "port 70000 is out of range"),
            ("[::1]:70000", "port 70000 is out of range"),
            ("localhost:", "1 to 65535"),
            ("localhost:http", "\"http\" is not a port"),
            ("[127.0.0.1]:80", "brackets are for IPv6"),
            ("[::1]80", "not a port"),
            ("[::1", "the closing bracket is missing"),
            ("[::1:9900", "the closing bracket is missing"),
            ("::1]:9900", "the opening bracket is missing"),
            ("ftp://localhost", "\"ftp\" is not a supported protocol"),
            ("http://local host/", "neither an address nor a name"),
            ("http://localhost/a b", "is not a path"),
            ("redis://localhost/0", "remove \"/0\""),
            ("tcp://localhost/path", "remove \"/path\""),
            ("host/x?y", "remove \"/x?y\""),
            ("host:80?y", "remove \"?y\""),
            ("[::1]:80#z", "remove \"#z\""),
            ("192.0.2.0/24", "remove \"/24\""),
            ("/tmp/socket", "neither an address nor a name"),
            ("tcp://user@localhost", "remove the part before the @"),
            ("user:word@localhost:80", "remove the part before the @"),
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
        let expected: SocketAddr = "127.0.0.1:9900".parse().unwrap();
        assert_eq!(localhost.resolve(9900, None), Ok(expected.into()));
        let nowhere = TargetAddress::parse("nowhere.invalid").unwrap();
        assert!(nowhere.resolve(9900, None).is_err_and(|line| line.contains("can't be resolved")));
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,40}", near in "((tcp|wss)://|(ws[+])?unix:)?[\\[\\]:%./a-f0-9]{0,30}") {
            let _ = (TargetAddress::parse(&text), TargetAddress::parse(&near));
        }
    }
}
