//! Descriptors, and calls on sockets. They are owned, and created non-blocking and close-on-exec.

use std::fs::File;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockProtocol, SockType, SockaddrIn,
    SockaddrIn6, SockaddrLike, SockaddrStorage, UnixAddr, setsockopt, sockopt,
};

use super::{AcceptResult, Adopted, IoResult, accept_result, io_result, refused};
use crate::address::Address;
use crate::error::Error;

/// An open descriptor, which is closed when dropped.
#[derive(Debug)]
pub(crate) struct Descriptor(OwnedFd);

impl From<OwnedFd> for Descriptor {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl From<Descriptor> for OwnedFd {
    fn from(descriptor: Descriptor) -> Self {
        descriptor.0
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Descriptor {
    pub(crate) fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Duplicates the descriptor, to the lowest free number that is not below `number`.
    pub(super) fn duplicate_from(&self, number: RawFd) -> Result<Descriptor, Error> {
        // SAFETY: the descriptor is open as long as it is borrowed, and the call takes numbers only.
        let answer = unsafe { libc::fcntl(self.number(), libc::F_DUPFD_CLOEXEC, number) };
        let number = Errno::result(answer).map_err(refused("fcntl(F_DUPFD_CLOEXEC)"))?;
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    pub(super) fn into_raw(self) -> RawFd {
        self.0.into_raw_fd()
    }
}

/// Closes descriptors that nothing else owns, with one call per run of consecutive numbers.
pub(super) fn close_all(numbers: &mut Vec<RawFd>) {
    numbers.sort_unstable();
    let mut rest = &numbers[..];
    while let Some(&first) = rest.first() {
        let run = rest.iter().zip(first..).take_while(|(number, next)| *number == next).count();
        if run == 1 || !close_range(first, rest[run - 1]) {
            for &number in &rest[..run] {
                // SAFETY: the caller owns the descriptor, and passes it on.
                drop(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        rest = &rest[run..];
    }
    numbers.clear();
}

/// Closes a range of descriptors; returns `false` if the kernel can't (before Linux 5.9).
fn close_range(first: RawFd, last: RawFd) -> bool {
    // SAFETY: the call takes numbers only; the caller owns each descriptor of the range. A raw system call, because
    // older C libraries have no function for it.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
}

/// Opens the descriptor that is closed to free one when descriptors have run out: an eventfd, which needs no file.
pub(crate) fn spare() -> Result<Descriptor, Error> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
        .map(|spare| Descriptor(spare.into()))
        .map_err(refused("eventfd"))
}

/// Creates a socket that is bound but does not listen yet.
pub(super) fn bound(
    address: &Address,
    reuse_port: bool,
    only_v6: bool,
) -> Result<Descriptor, Error> {
    let socket = stream_socket(address)?;
    if let Address::Ip(ip) = address {
        setsockopt(&socket.0, sockopt::ReuseAddr, &true)
            .map_err(refused("setsockopt(SO_REUSEADDR)"))?;
        if reuse_port {
            setsockopt(&socket.0, sockopt::ReusePort, &true)
                .map_err(refused("setsockopt(SO_REUSEPORT)"))?;
        }
        if ip.is_ipv6() {
            setsockopt(&socket.0, sockopt::Ipv6V6Only, &only_v6)
                .map_err(refused("setsockopt(IPV6_V6ONLY)"))?;
        }
    }
    bind(&socket, address)?;
    Ok(socket)
}

pub(super) fn stream_socket(address: &Address) -> Result<Descriptor, Error> {
    let (family, protocol) = match address {
        Address::Ip(SocketAddr::V4(_)) => (AddressFamily::Inet, Some(SockProtocol::Tcp)),
        Address::Ip(SocketAddr::V6(_)) => (AddressFamily::Inet6, Some(SockProtocol::Tcp)),
        Address::Unix(_) | Address::UnixAbstract(_) => (AddressFamily::Unix, None),
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socket::socket(family, SockType::Stream, flags, protocol)
        .map(Descriptor)
        .map_err(refused("socket"))
}

/// Checks a socket from outside and makes it non-blocking and close-on-exec; returns whether it is a TCP socket.
pub(crate) fn adopt(socket: &Descriptor, wanted: Adopted) -> Result<bool, Error> {
    let name: SockaddrStorage =
        socket::getsockname(socket.number()).map_err(refused("getsockname"))?;
    let is_tcp = match name.family() {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => true,
        Some(AddressFamily::Unix) => false,
        _ => return Err(Error::Invalid("only a TCP or a Unix-domain socket can be adopted")),
    };
    let kind = socket::getsockopt(socket, sockopt::SockType);
    if kind.map_err(refused("getsockopt(SO_TYPE)"))? != SockType::Stream {
        return Err(Error::Invalid("only a stream socket can be adopted"));
    }
    let listens = socket::getsockopt(socket, sockopt::AcceptConn);
    let listens = listens.map_err(refused("getsockopt(SO_ACCEPTCONN)"))?;
    match wanted {
        Adopted::Connection if listens => {
            return Err(Error::Invalid("a listening socket can't be adopted as a connection"));
        }
        // Fails with ENOTCONN if the socket is not connected.
        Adopted::Connection => {
            let peer = socket::getpeername::<SockaddrStorage>(socket.number());
            peer.map_err(refused("getpeername"))?;
        }
        // The kernel would choose a port of all addresses for it.
        Adopted::Listener if !listens && !is_bound(&name) => {
            return Err(Error::Invalid(
                "a socket must be bound before it is adopted as a listener",
            ));
        }
        Adopted::Listener => {}
    }
    set_flag(socket, libc::FIONBIO, "ioctl(FIONBIO)")?;
    set_flag(socket, libc::FIOCLEX, "ioctl(FIOCLEX)")?;
    Ok(is_tcp)
}

fn is_bound(name: &SockaddrStorage) -> bool {
    let port = name.as_sockaddr_in().map(SockaddrIn::port);
    let port = port.or_else(|| name.as_sockaddr_in6().map(SockaddrIn6::port));
    let is_unnamed = |unix: &UnixAddr| unix.path().is_none() && unix.as_abstract().is_none();
    port != Some(0) && !name.as_unix_addr().is_some_and(is_unnamed)
}

fn set_flag(socket: &Descriptor, request: libc::Ioctl, call: &'static str) -> Result<(), Error> {
    let on: libc::c_int = 1;
    // SAFETY: FIONBIO reads one int through the pointer, which is valid for the call; FIOCLEX reads nothing.
    let answer = unsafe { libc::ioctl(socket.number(), request, &raw const on) };
    Errno::result(answer).map(drop).map_err(refused(call))
}

pub(crate) fn bind(socket: &Descriptor, address: &Address) -> Result<(), Error> {
    let socket = socket.0.as_raw_fd();
    match address {
        Address::Ip(ip) => socket::bind(socket, &SockaddrStorage::from(*ip)),
        _ => unix_addr(address).and_then(|unix| socket::bind(socket, &unix)),
    }
    .map_err(refused("bind"))
}

fn unix_addr(address: &Address) -> nix::Result<UnixAddr> {
    match address {
        // The kernel would interpret an empty path as an abstract name.
        Address::Unix(path) if path.as_os_str().is_empty() => Err(Errno::ENOENT),
        Address::Unix(path) => UnixAddr::new(path),
        Address::UnixAbstract(name) => UnixAddr::new_abstract(name),
        Address::Ip(_) => Err(Errno::EAFNOSUPPORT),
    }
}

/// Listens, or changes the backlog of a listening socket. `None` is the largest backlog that the kernel allows.
pub(crate) fn listen(socket: &Descriptor, backlog: Option<u32>) -> Result<(), Error> {
    // Backlog::new refuses more than 4,096, but a raised net.core.somaxconn allows more; the kernel clamps the value.
    let backlog =
        backlog.map_or(Backlog::MAXALLOWABLE.into(), |most| most.min(i32::MAX as u32) as i32);
    // SAFETY: listen() takes no pointer, and the descriptor is open as long as it is borrowed here.
    let answer = unsafe { libc::listen(socket.0.as_raw_fd(), backlog) };
    Errno::result(answer).map(drop).map_err(refused("listen"))
}

/// Starts to connect. The socket becomes writable when the connect succeeds, and reports an error when it fails.
pub(crate) fn connect(socket: &Descriptor, address: &Address) -> Result<(), Error> {
    let socket = socket.0.as_raw_fd();
    let answer = match address {
        Address::Ip(ip) => socket::connect(socket, &SockaddrStorage::from(*ip)),
        _ => unix_addr(address).and_then(|unix| socket::connect(socket, &unix)),
    };
    match answer {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(errno) => Err(refused("connect")(errno)),
    }
}

#[inline]
pub(crate) fn accept(listener: &Descriptor) -> AcceptResult<Descriptor> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    accept_result(socket::accept4(&listener.0, flags).map(Descriptor))
}

// The two calls per message use libc directly: nix's functions are not inlined, which adds a tenth to the cost of a
// message outside of the kernel.

#[inline]
pub(super) fn receive(socket: RawFd, buffer: &mut [u8]) -> IoResult {
    let (start, room) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the kernel writes at most `room` bytes from `start`, all of them borrowed exclusively here.
    let answer = unsafe { libc::recv(socket, start, room, 0) };
    io_result("recv", counted(answer))
}

#[inline]
pub(super) fn send(socket: RawFd, bytes: &[u8]) -> IoResult {
    let (start, length) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: the kernel reads `length` bytes from `start`, all of them borrowed here.
    let answer = unsafe { libc::send(socket, start, length, libc::MSG_NOSIGNAL) };
    io_result("send", counted(answer))
}

/// Converts a result of libc to one of nix.
#[inline]
fn counted(answer: libc::ssize_t) -> nix::Result<usize> {
    usize::try_from(answer).map_err(|_| Errno::last())
}

pub(super) fn send_vectored(socket: RawFd, slices: &[IoSlice<'_>]) -> IoResult {
    let answer =
        socket::sendmsg::<SockaddrStorage>(socket, slices, &[], MsgFlags::MSG_NOSIGNAL, None);
    io_result("sendmsg", answer)
}

/// Sends from a file, starting at the offset `place`; 0 bytes mean that the file ends before it.
pub(super) fn send_file(socket: RawFd, file: &File, place: u64, bytes: usize) -> IoResult {
    let Ok(mut place) = libc::off64_t::try_from(place) else {
        return io_result("sendfile", Err(Errno::EOVERFLOW));
    };
    // SAFETY: the descriptors are open as long as they are borrowed, and the kernel stores one number through the
    // pointer, which is valid during the call.
    let answer = unsafe { libc::sendfile64(socket, file.as_raw_fd(), &raw mut place, bytes) };
    io_result("sendfile", counted(answer))
}

pub(super) fn finish_writing(socket: RawFd) -> Result<(), Error> {
    socket::shutdown(socket, Shutdown::Write).map_err(refused("shutdown"))
}

/// The number of sent bytes that the peer has not acknowledged; 0 if it is not known.
pub(super) fn unacknowledged_bytes(socket: RawFd) -> usize {
    let mut unsent: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, stores one int through the pointer, which is valid for the call.
    let answer = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut unsent) };
    if answer == 0 { usize::try_from(unsent).unwrap_or(0) } else { 0 }
}

/// Takes the pending error of the socket, if there is one.
pub(super) fn take_error(socket: BorrowedFd<'_>, call: &'static str) -> Option<Error> {
    match socket::getsockopt(&socket, sockopt::SocketError) {
        Ok(0) => None,
        Ok(errno) => Some(refused(call)(Errno::from_raw(errno))),
        Err(errno) => Some(refused("getsockopt(SO_ERROR)")(errno)),
    }
}

pub(crate) fn peer_addr(socket: &impl AsFd) -> Result<SocketAddr, Error> {
    let number = socket.as_fd().as_raw_fd();
    let name = match socket::getpeername(number) {
        Err(Errno::ENOTCONN) => peer_name(number).ok_or(Errno::ENOTCONN),
        other => other,
    };
    ip_address(&name.map_err(refused("getpeername"))?)
}

/// The peer address from `SO_PEERNAME`, which is still available after a reset, when `getpeername` fails.
fn peer_name(socket: RawFd) -> Option<SockaddrStorage> {
    // The option needs the length of the name, not the size of the buffer.
    let lengths = [size_of::<libc::sockaddr_in6>(), size_of::<libc::sockaddr_in>()];
    lengths.into_iter().find_map(|length| {
        // SAFETY: all zeroes is a valid address of an unspecified family.
        let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let mut length = length as libc::socklen_t;
        let start = (&raw mut name).cast();
        // SAFETY: the kernel writes at most `length` bytes, for which there is room.
        let answer = unsafe {
            libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERNAME, start, &raw mut length)
        };
        if answer != 0 {
            return None;
        }
        // SAFETY: the kernel has stored an address of this length.
        unsafe { SockaddrStorage::from_raw(start.cast(), Some(length)) }
    })
}

pub(crate) fn local_addr(socket: &impl AsFd) -> Result<SocketAddr, Error> {
    let name = socket::getsockname(socket.as_fd().as_raw_fd()).map_err(refused("getsockname"))?;
    ip_address(&name)
}

fn ip_address(name: &SockaddrStorage) -> Result<SocketAddr, Error> {
    if let Some(v4) = name.as_sockaddr_in() {
        return Ok(SocketAddr::V4((*v4).into()));
    }
    if let Some(v6) = name.as_sockaddr_in6() {
        // Keeps the scope, without which a link-local address is incomplete.
        return Ok(SocketAddr::V6((*v6).into()));
    }
    Err(Error::Invalid("a Unix-domain socket has no IP address"))
}
