//! The tun device that passes every packet for the clients' prefix to this process.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use ipnet::Ipv4Net;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::tcp::Link;
use super::tuple::device_address;

/// The queue of the device: more packets than arrive between two turns of this process.
const QUEUE_PACKETS: u32 = 16_384;

/// The maximum of connects or messages in flight if the queue has the default 500 packets.
const IN_FLIGHT_SHORT: usize = 200;

const MTU: u16 = 1500;

/// The kernel's list of the routes of this network namespace.
const ROUTES: &str = "/proc/net/route";

/// A device, which is removed with the process.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
    name: String,
    /// The number in flight that the device's queue can hold.
    pub(super) in_flight_max: usize,
    /// Packets that could not be sent.
    pub(super) unsent: u64,
    loss: Option<Loss>,
    _device: Holder,
}

/// Keeps the device.
struct Holder(#[expect(dead_code, reason = "it is kept for its drop")] SyncDevice);

impl std::fmt::Debug for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Holder")
    }
}

impl Device {
    /// Opens a device and routes the prefix to it. `loss` is the share of packets to drop, in both directions.
    ///
    /// # Errors
    /// One line with what is missing.
    pub(super) fn open(prefix: Ipv4Net, loss: Option<f64>) -> Result<Self, String> {
        if let Some(route) = overlapping_route(prefix, None) {
            return Err(in_use(prefix, route));
        }
        let device = DeviceBuilder::new()
            .ipv4(device_address(prefix), prefix.prefix_len(), None)
            .mtu(MTU)
            .build_sync()
            .map_err(|error| refusal(&error))?;
        let name = device.name().map_err(|error| refusal(&error))?;
        if let Some(route) = overlapping_route(prefix, Some(&name)) {
            return Err(in_use(prefix, route));
        }
        // Only root of the first user namespace may.
        let in_flight_max = match device.set_tx_queue_len(QUEUE_PACKETS) {
            Ok(()) => usize::MAX,
            Err(error) => {
                log::debug!("the device keeps its short queue: {error}");
                IN_FLIGHT_SHORT
            }
        };
        let descriptor = device.as_fd().try_clone_to_owned().map_err(|error| refusal(&error))?;
        fcntl(&descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| refusal(&errno.into()))?;
        let file = File::from(descriptor);
        let loss = loss.map(Loss::new);
        Ok(Self { file, name, in_flight_max, unsent: 0, loss, _device: Holder(device) })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A second descriptor, for a reactor to watch.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// The next packet; `None` if there is none.
    ///
    /// # Errors
    /// The device is gone.
    pub(super) fn receive<'a>(&mut self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        loop {
            match self.file.read(buffer) {
                Ok(_) if self.loss.as_mut().is_some_and(Loss::takes) => {}
                Ok(length) => return Ok(Some(&buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Link for Device {
    fn send(&mut self, packet: &[u8]) {
        if !self.loss.as_mut().is_some_and(Loss::takes) && self.file.write(packet).is_err() {
            self.unsent += 1;
        }
    }
}

/// Drops a share of the packets, for tests.
#[derive(Debug)]
struct Loss {
    share: f64,
    random: fastrand::Rng,
}

impl Loss {
    fn new(share: f64) -> Self {
        Self { share, random: fastrand::Rng::new() }
    }

    fn takes(&mut self) -> bool {
        self.random.f64() < self.share
    }
}

fn refusal(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "load the module: modprobe tun",
        io::ErrorKind::PermissionDenied => {
            "run as root, or in a new user and network namespace (unshare -Urn) where /dev/net/tun is open to all"
        }
        _ => "check whether `ip tuntap add mode tun` works",
    };
    format!("--stateless can't open a tun device: {error}; {remedy}")
}

fn in_use(prefix: Ipv4Net, route: Ipv4Net) -> String {
    format!(
        "--stateless needs {prefix} for its clients, and this machine has a route to {route}: use another block with \
         --stateless-prefix"
    )
}

/// A route of this machine that overlaps the prefix, except those of `own` device and the default route.
fn overlapping_route(prefix: Ipv4Net, own: Option<&str>) -> Option<Ipv4Net> {
    let table = std::fs::read_to_string(ROUTES).ok()?;
    let others = table
        .lines()
        .skip(1)
        .filter(|line| own.is_none_or(|own| line.split_whitespace().next() != Some(own)));
    others.filter_map(parse_route).find(|route| {
        route.prefix_len() > 0
            && (route.contains(&prefix.network()) || prefix.contains(&route.network()))
    })
}

/// A line of `/proc/net/route`: destination and mask are in hexadecimal, the first byte of an address last.
fn parse_route(line: &str) -> Option<Ipv4Net> {
    let mut fields = line.split_whitespace();
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::swap_bytes);
    let destination = address(fields.nth(1)?)?;
    let mask = address(fields.nth(5)?)?;
    Ipv4Net::with_netmask(Ipv4Addr::from(destination), Ipv4Addr::from(mask)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_read_from_its_line() {
        let line = "eth0\t000212C6\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
        assert_eq!(parse_route(line), Some("198.18.2.0/24".parse().unwrap()));
        let default = "eth0\t00000000\t010A000A\t0003\t0\t0\t0\t00000000\t0\t0\t0";
        assert_eq!(parse_route(default).map(|route| route.prefix_len()), Some(0));
        for odd in ["", "eth0", "eth0 zz 0 0 0 0 0 zz", "eth0 0 0 0 0 0 0 FF00FF00"] {
            assert_eq!(parse_route(odd), None, "{odd}");
        }
    }
}
