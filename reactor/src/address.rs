//! Addresses of listeners and connects: TCP, or a Unix-domain stream socket.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// The address of a listener or the destination of a connect. Methods accept `impl Into<Address>`, so a [`SocketAddr`]
/// or a path can be passed.
///
/// ```
/// use std::path::Path;
/// use reactor::Address;
///
/// assert_eq!(Address::from(([127, 0, 0, 1], 9900)).to_string(), "127.0.0.1:9900");
/// assert_eq!(Address::from(Path::new("/run/echo.socket")).to_string(), "unix:/run/echo.socket");
/// assert_eq!(Address::unix_abstract("echo").to_string(), "unix:@echo");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// TCP over IPv4 or IPv6.
    Ip(SocketAddr),
    /// A Unix-domain stream socket in the file system; the path has at most 107 bytes.
    Unix(PathBuf),
    /// A Unix-domain stream socket in Linux's abstract namespace: a name without a file, which disappears with its last
    /// socket. It has at most 107 bytes, without the leading zero byte.
    UnixAbstract(Vec<u8>),
}

impl Address {
    /// Creates an address in the abstract namespace of Unix-domain sockets.
    #[must_use]
    pub fn unix_abstract(name: impl Into<Vec<u8>>) -> Self {
        Address::UnixAbstract(name.into())
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self, Address::Ip(_))
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Address::Ip(address)
    }
}

impl<I: Into<IpAddr>> From<(I, u16)> for Address {
    fn from(address: (I, u16)) -> Self {
        Address::Ip(SocketAddr::from(address))
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Address::Unix(path)
    }
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Address::Unix(path.to_owned())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ip(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::UnixAbstract(name) => write!(f, "unix:@{}", name.escape_ascii()),
        }
    }
}
