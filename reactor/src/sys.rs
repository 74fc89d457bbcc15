//! The edge to the operating system: the one file that names `nix` and the only one with `unsafe`. In unit tests and
//! under the fuzzer `fake_sys.rs` stands in its place, with the same functions and types.
//!
//! Everything here is a thin, safe function with one system call in it, or a few for setting up. Descriptors are
//! owned, non-blocking and close-on-exec from birth.

#![allow(unsafe_code)] // The one exception of the workspace; each block says why it is sound.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockProtocol, SockType,
    SockaddrStorage, UnixAddr, setsockopt, sockopt,
};
use nix::sys::stat::Mode;

use crate::address::Address;
use crate::config::Keepalive;
use crate::error::Error;
use crate::signal::Signal;

/// An open descriptor: closed when dropped.
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

pub(crate) fn refused(call: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::System { call, source: io::Error::from_raw_os_error(errno as i32) }
}

/// The monotonic clock.
pub(crate) fn now() -> Instant {
    Instant::now()
}

// --- epoll ---------------------------------------------------------------------------------------------------------

/// What happened to a descriptor; given to [`Handler::on_ready`](crate::Handler::on_ready).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Readiness(EpollFlags);

impl Readiness {
    pub(crate) const NONE: Self = Self(EpollFlags::empty());
    pub(crate) const READABLE: Self = Self(EpollFlags::EPOLLIN);
    pub(crate) const WRITABLE: Self = Self(EpollFlags::EPOLLOUT);
    #[cfg(any(test, fuzzing))]
    pub(crate) const ERROR: Self = Self(EpollFlags::EPOLLERR);
    #[cfg(any(test, fuzzing))]
    pub(crate) const HANGUP: Self = Self(EpollFlags::EPOLLHUP);

    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// A read will not block: there is something, or the end of it (`EPOLLIN`).
    #[must_use]
    pub fn is_readable(self) -> bool {
        self.0.contains(EpollFlags::EPOLLIN)
    }

    /// A write will not block (`EPOLLOUT`).
    #[must_use]
    pub fn is_writable(self) -> bool {
        self.0.contains(EpollFlags::EPOLLOUT)
    }

    /// An error waits on the descriptor, or a pipe has lost its reader (`EPOLLERR`). The kernel reports it whatever
    /// the interest.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0.contains(EpollFlags::EPOLLERR)
    }

    /// The other side is gone, in both directions (`EPOLLHUP`). The kernel reports it whatever the interest.
    #[must_use]
    pub fn is_hangup(self) -> bool {
        self.0.contains(EpollFlags::EPOLLHUP)
    }
}

/// The kernel's list of watched descriptors.
#[derive(Debug)]
pub(crate) struct Poller(Epoll);

impl Poller {
    pub(crate) fn new() -> Result<Self, Error> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self).map_err(refused("epoll_create1"))
    }

    #[inline]
    pub(crate) fn add(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        self.0.add(&descriptor.0, EpollEvent::new(interest.0, data)).map_err(refused("epoll_ctl"))
    }

    pub(crate) fn modify(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        self.0
            .modify(&descriptor.0, &mut EpollEvent::new(interest.0, data))
            .map_err(refused("epoll_ctl"))
    }

    pub(crate) fn delete(&self, descriptor: &Descriptor) -> Result<(), Error> {
        self.0.delete(&descriptor.0).map_err(refused("epoll_ctl"))
    }

    /// Waits for events, at the most `wait` (rounded up to a millisecond); an interruption counts as no event.
    pub(crate) fn wait(&self, events: &mut Events, wait: Option<Duration>) -> Result<(), Error> {
        events.filled = match self.0.wait(&mut events.buffer, milliseconds(wait)) {
            Ok(filled) => filled,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(refused("epoll_wait")(errno)),
        };
        Ok(())
    }
}

fn milliseconds(wait: Option<Duration>) -> EpollTimeout {
    match wait {
        None => EpollTimeout::NONE,
        Some(wait) => {
            let rounded_up = wait.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(rounded_up.min(i32::MAX as u128) as i32)
                .unwrap_or(EpollTimeout::MAX)
        }
    }
}

/// Room for the events of one wait.
#[derive(Debug)]
pub(crate) struct Events {
    buffer: Vec<EpollEvent>,
    filled: usize,
}

impl Events {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { buffer: vec![EpollEvent::empty(); capacity], filled: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.filled
    }

    /// Each with the data of its descriptor.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Readiness)> {
        self.buffer[..self.filled].iter().map(|event| (event.data(), Readiness(event.events())))
    }
}

// --- sockets -------------------------------------------------------------------------------------------------------

/// A socket that is bound but does not listen yet.
pub(crate) fn bound(
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

pub(crate) fn stream_socket(address: &Address) -> Result<Descriptor, Error> {
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
        // The system would take an empty path for an abstract name.
        Address::Unix(path) if path.as_os_str().is_empty() => Err(Errno::ENOENT),
        Address::Unix(path) => UnixAddr::new(path),
        Address::UnixAbstract(name) => UnixAddr::new_abstract(name),
        Address::Ip(_) => Err(Errno::EAFNOSUPPORT),
    }
}

/// Listens, or changes the backlog of a socket that does; `None` asks for as much as the kernel allows.
pub(crate) fn listen(socket: &Descriptor, backlog: Option<u32>) -> Result<(), Error> {
    // Backlog::new refuses more than 4,096, which a raised net.core.somaxconn allows; the kernel clamps for itself.
    let backlog =
        backlog.map_or(Backlog::MAXALLOWABLE.into(), |most| most.min(i32::MAX as u32) as i32);
    // SAFETY: listen() takes no pointer, and the descriptor is open for as long as it is borrowed here.
    let answer = unsafe { libc::listen(socket.0.as_raw_fd(), backlog) };
    Errno::result(answer).map(drop).map_err(refused("listen"))
}

pub(crate) fn set_nodelay(socket: &Descriptor) -> Result<(), Error> {
    setsockopt(&socket.0, sockopt::TcpNoDelay, &true).map_err(refused("setsockopt(TCP_NODELAY)"))
}

pub(crate) fn set_keepalive(socket: &Descriptor, keepalive: &Keepalive) -> Result<(), Error> {
    setsockopt(&socket.0, sockopt::TcpKeepIdle, &whole_seconds(keepalive.idle))
        .map_err(refused("setsockopt(TCP_KEEPIDLE)"))?;
    setsockopt(&socket.0, sockopt::TcpKeepInterval, &whole_seconds(keepalive.interval))
        .map_err(refused("setsockopt(TCP_KEEPINTVL)"))?;
    setsockopt(&socket.0, sockopt::TcpKeepCount, &keepalive.probes_max)
        .map_err(refused("setsockopt(TCP_KEEPCNT)"))?;
    setsockopt(&socket.0, sockopt::KeepAlive, &true).map_err(refused("setsockopt(SO_KEEPALIVE)"))
}

fn whole_seconds(time: Duration) -> u32 {
    time.as_nanos().div_ceil(1_000_000_000).min(i32::MAX as u128) as u32
}

pub(crate) fn set_user_timeout(socket: &Descriptor, timeout: Duration) -> Result<(), Error> {
    let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as u32;
    setsockopt(&socket.0, sockopt::TcpUserTimeout, &milliseconds)
        .map_err(refused("setsockopt(TCP_USER_TIMEOUT)"))
}

/// Lets the kernel choose the source port at connect time, when it knows the whole 5-tuple.
pub(crate) fn defer_source_port(socket: &Descriptor) -> Result<(), Error> {
    setsockopt(&socket.0, sockopt::IpBindAddressNoPort, &true)
        .map_err(refused("setsockopt(IP_BIND_ADDRESS_NO_PORT)"))
}

mod port_range {
    use nix::libc;
    use nix::sys::socket::sockopt::SetStruct;
    use nix::{setsockopt_impl, sockopt_impl};

    /// From linux/in.h, since Linux 6.3; the libc crate does not name it.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

    sockopt_impl!(
        LocalPortRange,
        SetOnly,
        libc::IPPROTO_IP,
        IP_LOCAL_PORT_RANGE,
        u32,
        SetStruct<u32>
    );
}

/// Restricts the ports that the kernel chooses from. A kernel before 6.3 does not know the option and keeps to the
/// system's range, which is no error.
pub(crate) fn set_port_range(
    socket: &Descriptor,
    range: &RangeInclusive<u16>,
) -> Result<(), Error> {
    let packed = u32::from(*range.end()) << 16 | u32::from(*range.start());
    match setsockopt(&socket.0, port_range::LocalPortRange, &packed) {
        Ok(()) | Err(Errno::ENOPROTOOPT) => Ok(()),
        Err(errno) => Err(refused("setsockopt(IP_LOCAL_PORT_RANGE)")(errno)),
    }
}

/// Starts to connect; the socket becomes writable, or reports an error, when it is decided.
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

/// What became of an accept.
#[derive(Debug)]
pub(crate) enum Accepted<D = Descriptor> {
    Connection(D),
    /// Nobody waits.
    Nobody,
    /// This one was lost before it was accepted, by the peer or the network; the next may be there.
    Lost(Error),
    /// Descriptors or memory ran out.
    Exhausted(Error),
    /// The listener itself is at fault.
    Broken(Error),
}

#[inline]
pub(crate) fn accept(listener: &Descriptor) -> Accepted {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let answer = socket::accept4(listener.0.as_raw_fd(), flags);
    // SAFETY: accept4 has just opened this descriptor, and nothing else knows it.
    accepted(answer.map(|raw| Descriptor(unsafe { OwnedFd::from_raw_fd(raw) })))
}

/// What the answer of an accept means.
#[inline]
pub(crate) fn accepted<D>(answer: nix::Result<D>) -> Accepted<D> {
    match answer {
        Ok(socket) => Accepted::Connection(socket),
        Err(Errno::EAGAIN) => Accepted::Nobody,
        Err(errno) => not_accepted(errno),
    }
}

#[cold]
fn not_accepted<D>(errno: Errno) -> Accepted<D> {
    let error = refused("accept4")(errno);
    match errno {
        // accept(2): Linux passes errors of the new socket on; they are to be treated like a retry.
        Errno::EINTR
        | Errno::ECONNABORTED
        | Errno::EPROTO
        | Errno::EPERM
        | Errno::ENETDOWN
        | Errno::ENOPROTOOPT
        | Errno::EHOSTDOWN
        | Errno::ENONET
        | Errno::EHOSTUNREACH
        | Errno::ENETUNREACH
        | Errno::ETIMEDOUT => Accepted::Lost(error),
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
            Accepted::Exhausted(error)
        }
        _ => Accepted::Broken(error),
    }
}

/// What became of a read or a write.
#[derive(Debug)]
pub(crate) enum Transferred {
    Bytes(usize),
    /// The kernel can't take or give anything now.
    NotNow,
    Failed(Error),
}

/// What the answer of a read or a write means.
#[inline]
pub(crate) fn transferred(call: &'static str, answer: nix::Result<usize>) -> Transferred {
    match answer {
        Ok(bytes) => Transferred::Bytes(bytes),
        Err(errno) => not_transferred(call, errno),
    }
}

/// Out of the way, so that the usual case is small enough to be inlined.
#[cold]
fn not_transferred(call: &'static str, errno: Errno) -> Transferred {
    match errno {
        Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS => Transferred::NotNow,
        errno => Transferred::Failed(refused(call)(errno)),
    }
}

// The two calls of every message go to libc themselves: nix's functions for them are not inlined, and that is a tenth of
// what a message costs beside the kernel.

#[inline]
pub(crate) fn receive(socket: &Descriptor, buffer: &mut [u8]) -> Transferred {
    let (start, room) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the kernel writes at most `room` bytes from `start`, all of them borrowed exclusively here.
    let answer = unsafe { libc::recv(socket.0.as_raw_fd(), start, room, 0) };
    transferred("recv", counted(answer))
}

#[inline]
pub(crate) fn send(socket: &Descriptor, bytes: &[u8]) -> Transferred {
    let (start, length) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: the kernel reads `length` bytes from `start`, all of them borrowed here.
    let answer = unsafe { libc::send(socket.0.as_raw_fd(), start, length, libc::MSG_NOSIGNAL) };
    transferred("send", counted(answer))
}

/// What libc has answered, as nix would put it.
#[inline]
fn counted(answer: libc::ssize_t) -> nix::Result<usize> {
    usize::try_from(answer).map_err(|_| Errno::last())
}

pub(crate) fn send_vectored(socket: &Descriptor, slices: &[IoSlice<'_>]) -> Transferred {
    let answer = socket::sendmsg::<SockaddrStorage>(
        socket.0.as_raw_fd(),
        slices,
        &[],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    transferred("sendmsg", answer)
}

pub(crate) fn finish_writing(socket: &Descriptor) -> Result<(), Error> {
    socket::shutdown(socket.0.as_raw_fd(), Shutdown::Write).map_err(refused("shutdown"))
}

/// Makes closing the socket reset the connection: the peer learns it at once, and no TIME_WAIT stays behind.
pub(crate) fn reset_on_close(socket: &Descriptor) -> Result<(), Error> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&socket.0, sockopt::Linger, &linger).map_err(refused("setsockopt(SO_LINGER)"))
}

/// Whether the kernel holds bytes that the peer has not acknowledged yet.
pub(crate) fn has_unsent(socket: &Descriptor) -> bool {
    let mut unsent: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, stores one int through the pointer, which is valid for the call.
    let answer = unsafe { libc::ioctl(socket.0.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
    answer == 0 && unsent > 0
}

/// Takes the error that waits on the socket, if there is one.
pub(crate) fn take_error(socket: &Descriptor, call: &'static str) -> Option<Error> {
    match socket::getsockopt(&socket.0, sockopt::SocketError) {
        Ok(0) => None,
        Ok(errno) => Some(refused(call)(Errno::from_raw(errno))),
        Err(errno) => Some(refused("getsockopt(SO_ERROR)")(errno)),
    }
}

pub(crate) fn peer_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    let name = socket::getpeername(socket.0.as_raw_fd()).map_err(refused("getpeername"))?;
    ip_address(&name)
}

pub(crate) fn local_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    let name = socket::getsockname(socket.0.as_raw_fd()).map_err(refused("getsockname"))?;
    ip_address(&name)
}

fn ip_address(name: &SockaddrStorage) -> Result<SocketAddr, Error> {
    if let Some(v4) = name.as_sockaddr_in() {
        return Ok(SocketAddr::V4((*v4).into()));
    }
    if let Some(v6) = name.as_sockaddr_in6() {
        // With its scope, without which a link-local address leads nowhere.
        return Ok(SocketAddr::V6((*v6).into()));
    }
    Err(Error::Invalid("a Unix-domain socket has no IP address"))
}

// --- other descriptors ---------------------------------------------------------------------------------------------

/// A descriptor that is good for nothing but being closed when descriptors have run out.
pub(crate) fn spare() -> Result<Descriptor, Error> {
    open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map(Descriptor)
        .map_err(refused("open"))
}

/// A counter that makes a reactor's wait end.
#[derive(Debug)]
pub(crate) struct Bell(EventFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_value_and_flags(0, flags).map(Self).map_err(refused("eventfd"))
    }

    /// Rings. The counter can be full only when the bell rings anyway.
    pub(crate) fn ring(&self) {
        let _ = self.0.write(1);
    }

    /// Silences it until the next ring.
    pub(crate) fn hush(&self) {
        let _ = self.0.read();
    }

    pub(crate) fn watch(&self, poller: &Poller, data: u64) -> Result<(), Error> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, data);
        poller.0.add(self.0.as_fd(), event).map_err(refused("epoll_ctl"))
    }
}

/// Signals as something to read.
#[derive(Debug)]
pub(crate) struct SignalReader(SignalFd);

impl SignalReader {
    /// Blocks the signals in this thread, so that they arrive here and nowhere else.
    pub(crate) fn new(signals: &[Signal]) -> Result<Self, Error> {
        let mask: SigSet = signals.iter().map(|&signal| to_nix(signal)).collect();
        mask.thread_block().map_err(refused("pthread_sigmask"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        SignalFd::with_flags(&mask, flags).map(Self).map_err(refused("signalfd"))
    }

    pub(crate) fn read(&self) -> Option<Signal> {
        let info = self.0.read_signal().ok()??;
        ALL_SIGNALS.into_iter().find(|&signal| to_nix(signal) as u32 == info.ssi_signo)
    }

    pub(crate) fn watch(&self, poller: &Poller, data: u64) -> Result<(), Error> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, data);
        poller.0.add(self.0.as_fd(), event).map_err(refused("epoll_ctl"))
    }
}

const ALL_SIGNALS: [Signal; 6] = [
    Signal::Hangup,
    Signal::Interrupt,
    Signal::Quit,
    Signal::Terminate,
    Signal::User1,
    Signal::User2,
];

fn to_nix(signal: Signal) -> NixSignal {
    match signal {
        Signal::Hangup => NixSignal::SIGHUP,
        Signal::Interrupt => NixSignal::SIGINT,
        Signal::Quit => NixSignal::SIGQUIT,
        Signal::Terminate => NixSignal::SIGTERM,
        Signal::User1 => NixSignal::SIGUSR1,
        Signal::User2 => NixSignal::SIGUSR2,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use nix::sys::socket::getsockopt;

    use super::*;

    /// The options as they are on a socket: nodelay, keepalive, its three figures, and the user timeout.
    fn options(socket: &impl AsFd) -> (bool, bool, [u32; 3], u32) {
        let figures = [
            getsockopt(socket, sockopt::TcpKeepIdle).unwrap(),
            getsockopt(socket, sockopt::TcpKeepInterval).unwrap(),
            getsockopt(socket, sockopt::TcpKeepCount).unwrap(),
        ];
        (
            getsockopt(socket, sockopt::TcpNoDelay).unwrap(),
            getsockopt(socket, sockopt::KeepAlive).unwrap(),
            figures,
            getsockopt(socket, sockopt::TcpUserTimeout).unwrap(),
        )
    }

    fn accept_within_a_second(listener: &Descriptor) -> Descriptor {
        let poller = Poller::new().unwrap();
        let mut events = Events::with_capacity(1);
        poller.add(listener, Readiness::READABLE, 1).unwrap();
        poller.wait(&mut events, Some(Duration::from_secs(1))).unwrap();
        match accept(listener) {
            Accepted::Connection(socket) => socket,
            other => panic!("nobody came: {other:?}"),
        }
    }

    #[test]
    fn accepted_sockets_inherit_every_option_of_their_listener() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let address = Address::Ip(address.parse().unwrap());
            let listener = bound(&address, false, false).unwrap();
            listen(&listener, None).unwrap();
            let destination = local_addr(&listener).unwrap();
            let _plain_peer = TcpStream::connect(destination).unwrap();
            let plain = options(&accept_within_a_second(&listener));
            assert!(!plain.0 && !plain.1 && plain.3 == 0, "{plain:?}");

            set_nodelay(&listener).unwrap();
            let keepalive = Keepalive {
                idle: Duration::from_millis(41_001),
                interval: Duration::from_secs(7),
                probes_max: 5,
            };
            set_keepalive(&listener, &keepalive).unwrap();
            set_user_timeout(&listener, Duration::from_micros(33_000_001)).unwrap();
            let _peer = TcpStream::connect(destination).unwrap();
            let inherited = options(&accept_within_a_second(&listener));
            assert_eq!(inherited, (true, true, [42, 7, 5], 33_001));
        }
    }

    #[test]
    fn a_keepalive_out_of_range_is_refused_by_name() {
        let socket = stream_socket(&Address::from(([127, 0, 0, 1], 0))).unwrap();
        let keepalive = Keepalive { probes_max: 128, ..Keepalive::default() };
        let refused = set_keepalive(&socket, &keepalive).unwrap_err().to_string();
        assert!(refused.starts_with("setsockopt(TCP_KEEPCNT)"), "{refused}");
    }
}
