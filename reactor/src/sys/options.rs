//! Socket options.

use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt};

use super::refused;
use super::socket::Descriptor;
use crate::config::Keepalive;
use crate::error::Error;

pub(crate) fn set_nodelay(socket: &Descriptor) -> Result<(), Error> {
    setsockopt(socket, sockopt::TcpNoDelay, &true).map_err(refused("setsockopt(TCP_NODELAY)"))
}

pub(crate) fn set_keepalive(socket: &Descriptor, keepalive: &Keepalive) -> Result<(), Error> {
    setsockopt(socket, sockopt::TcpKeepIdle, &whole_seconds(keepalive.idle))
        .map_err(refused("setsockopt(TCP_KEEPIDLE)"))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &whole_seconds(keepalive.interval))
        .map_err(refused("setsockopt(TCP_KEEPINTVL)"))?;
    setsockopt(socket, sockopt::TcpKeepCount, &keepalive.probes_max)
        .map_err(refused("setsockopt(TCP_KEEPCNT)"))?;
    setsockopt(socket, sockopt::KeepAlive, &true).map_err(refused("setsockopt(SO_KEEPALIVE)"))
}

fn whole_seconds(time: Duration) -> u32 {
    time.as_nanos().div_ceil(1_000_000_000).min(i32::MAX as u128) as u32
}

pub(crate) fn set_user_timeout(socket: &Descriptor, timeout: Duration) -> Result<(), Error> {
    let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as u32;
    setsockopt(socket, sockopt::TcpUserTimeout, &milliseconds)
        .map_err(refused("setsockopt(TCP_USER_TIMEOUT)"))
}

pub(crate) fn set_send_buffer(socket: &Descriptor, bytes: usize) -> Result<(), Error> {
    setsockopt(socket, sockopt::SndBuf, &bytes.min(i32::MAX as usize))
        .map_err(refused("setsockopt(SO_SNDBUF)"))
}

pub(crate) fn set_receive_buffer(socket: &Descriptor, bytes: usize) -> Result<(), Error> {
    setsockopt(socket, sockopt::RcvBuf, &bytes.min(i32::MAX as usize))
        .map_err(refused("setsockopt(SO_RCVBUF)"))
}

pub(crate) fn set_notsent_lowat(socket: &Descriptor, bytes: u32) -> Result<(), Error> {
    setsockopt(socket, unnamed::NotSentLowat, &bytes)
        .map_err(refused("setsockopt(TCP_NOTSENT_LOWAT)"))
}

/// Lets the kernel choose the source port at connect time, when the 5-tuple is known.
pub(crate) fn defer_source_port(socket: &Descriptor) -> Result<(), Error> {
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)
        .map_err(refused("setsockopt(IP_BIND_ADDRESS_NO_PORT)"))
}

/// Options that nix does not define.
mod unnamed {
    use nix::libc;
    use nix::sys::socket::sockopt::SetStruct;
    use nix::{setsockopt_impl, sockopt_impl};

    /// From linux/in.h, since Linux 6.3; the libc crate does not define it.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

    sockopt_impl!(
        LocalPortRange,
        SetOnly,
        libc::IPPROTO_IP,
        IP_LOCAL_PORT_RANGE,
        u32,
        SetStruct<u32>
    );
    sockopt_impl!(
        NotSentLowat,
        SetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_NOTSENT_LOWAT,
        u32,
        SetStruct<u32>
    );
}

/// Restricts the ports that the kernel chooses from. A kernel before 6.3 does not know the option and uses the
/// system's range; this is not an error.
pub(crate) fn set_port_range(
    socket: &Descriptor,
    range: &RangeInclusive<u16>,
) -> Result<(), Error> {
    let packed = u32::from(*range.end()) << 16 | u32::from(*range.start());
    match setsockopt(socket, unnamed::LocalPortRange, &packed) {
        Ok(()) | Err(Errno::ENOPROTOOPT) => Ok(()),
        Err(errno) => Err(refused("setsockopt(IP_LOCAL_PORT_RANGE)")(errno)),
    }
}

/// Makes closing the socket reset the connection, without a TIME_WAIT state.
pub(crate) fn reset_on_close(socket: &impl AsFd) -> Result<(), Error> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(socket, sockopt::Linger, &linger).map_err(refused("setsockopt(SO_LINGER)"))
}

/// The soft limit of descriptors, which also limits the size of a registered-file table.
pub(super) fn descriptors_max() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use nix::sys::socket::getsockopt;

    use super::super::poller::{Events, Poller};
    use super::super::socket::{accept, bound, listen, local_addr, stream_socket};
    use super::super::{AcceptResult, Readiness};
    use super::*;
    use crate::address::Address;

    /// The current options of a socket: nodelay, keepalive and its three values, the user timeout, and the buffer
    /// sizes, which the kernel doubles.
    fn options(socket: &impl AsFd) -> (bool, bool, [u32; 3], u32, [usize; 2]) {
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
            [
                getsockopt(socket, sockopt::SndBuf).unwrap(),
                getsockopt(socket, sockopt::RcvBuf).unwrap(),
            ],
        )
    }

    fn accept_within_a_second(listener: &Descriptor) -> Descriptor {
        let poller = Poller::new().unwrap();
        let mut events = Events::with_capacity(1);
        poller.add(listener, Readiness::READABLE, 1).unwrap();
        poller.wait(&mut events, Some(Duration::from_secs(1))).unwrap();
        match accept(listener) {
            AcceptResult::Connection(socket) => socket,
            other => panic!("no connection was accepted: {other:?}"),
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
            set_send_buffer(&listener, 20_000).unwrap();
            set_receive_buffer(&listener, 30_000).unwrap();
            let _peer = TcpStream::connect(destination).unwrap();
            let inherited = options(&accept_within_a_second(&listener));
            assert_eq!(inherited, (true, true, [42, 7, 5], 33_001, [40_000, 60_000]));
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
