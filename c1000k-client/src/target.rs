//! How many connections to open: what was asked for, against what this machine allows.

use std::net::UdpSocket;

use c1000k_host::check::{CapKind, Machine, Need, Role, largest_target};
use c1000k_host::format;
use c1000k_report::record::Limit;

use crate::args::Arguments;

/// The target where none is asked for.
const TARGET_DEFAULT: u64 = 1_000_000;

/// Bytes of this process for each connection: the reactor's slot, its state and its place in the wheel.
const USER_BYTES_PER_CONNECTION: u64 = 64;

/// What the run is measured against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Aim {
    /// The target was asked for, so nothing but reaching it is success.
    pub(crate) is_asked: bool,
    /// What is to be reached.
    pub(crate) target: u64,
    /// How many are tried: the target, or as far as it goes.
    pub(crate) goal: u32,
    /// What this machine's limits cut off.
    pub(crate) cap: Option<Lowered>,
}

/// A limit of this machine below what was wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lowered {
    pub(crate) limit: Limit,
    /// How far of how many, why, and what to do, in one line.
    pub(crate) detail: String,
}

/// What is needed where the server is a process of this machine, and else where it is not.
pub(crate) fn need(arguments: &Arguments) -> Need {
    // An address can be bound only where it belongs to.
    let is_here = UdpSocket::bind((arguments.destination.ip(), 0)).is_ok();
    Need {
        ports: u64::from(arguments.ports),
        sources: Some(arguments.sources.len() as u64).filter(|&count| count > 0),
        in_flight: arguments.in_flight_max as u64,
        user_bytes_per_connection: USER_BYTES_PER_CONNECTION,
        ..Need::new(
            if is_here { Role::Both } else { Role::Client },
            arguments.connections.unwrap_or(TARGET_DEFAULT),
        )
    }
}

/// Holds what is wanted against the machine.
pub(crate) fn aim(arguments: &Arguments, machine: &Machine) -> Aim {
    let need = need(arguments);
    let wanted = need.connections;
    let is_asked = arguments.connections.is_some();
    let Some(cap) = largest_target(machine, &need) else {
        return Aim { is_asked, target: wanted, goal: bounded(wanted), cap: None };
    };
    // Both ends keep room for the listeners, wherever they are: so a client and a server with the same limit meet.
    let room = match (cap.kind, machine.connections_within(need.ports)) {
        (CapKind::Descriptors, Some(within)) => cap.connections.min(within),
        _ => cap.connections,
    };
    if wanted <= room {
        return Aim { is_asked, target: wanted, goal: bounded(wanted), cap: None };
    }
    let detail = format!(
        "{} of {}: {}; to go further: {}",
        format::count(room),
        format::count(wanted),
        cap.reason,
        cap.remedy
    );
    let cap_told = Some(Lowered { limit: limit_of(cap.kind), detail });
    if !is_asked {
        return Aim { is_asked, target: room, goal: bounded(room), cap: cap_told };
    }
    // As far as it goes: the listeners' share of the descriptors may be had, past memory there is no return.
    let furthest = match (cap.kind, machine.connections_within(0)) {
        (CapKind::Descriptors, Some(within)) => within,
        _ => room,
    };
    Aim { is_asked, target: wanted, goal: bounded(wanted.min(furthest)), cap: cap_told }
}

fn bounded(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn limit_of(kind: CapKind) -> Limit {
    match kind {
        CapKind::Descriptors => Limit::Descriptors,
        CapKind::Watches => Limit::Watches,
        CapKind::Ports => Limit::Ports,
        CapKind::Memory => Limit::Memory,
        CapKind::Conntrack => Limit::Other,
    }
}

#[cfg(test)]
mod tests {
    use c1000k_host::limits::DescriptorLimit;

    use super::*;
    use crate::args;

    fn aim_of(line: &str) -> Aim {
        let arguments = args::of(line).unwrap();
        let descriptors = Some(DescriptorLimit { soft: 20_000, hard: 20_000 });
        let local_ports = Some(32_768..=60_999);
        aim(&arguments, &Machine { descriptors, local_ports, ..Machine::default() })
    }

    #[test]
    fn left_out_it_is_what_the_limits_allow_on_both_ends() {
        for ip in ["127.0.0.1", "192.0.2.1"] {
            let aim = aim_of(&format!("{ip} 9900"));
            assert_eq!((aim.is_asked, aim.target, aim.goal), (false, 19_868, 19_868), "{ip}");
            let cap = aim.cap.unwrap();
            assert_eq!(cap.limit, Limit::Descriptors);
            let start = "19,868 of 1,000,000: RLIMIT_NOFILE is 20,000 hard; to go further: ";
            assert!(cap.detail.starts_with(start), "{}", cap.detail);
        }
    }

    #[test]
    fn asked_for_it_stays_and_is_tried_as_far_as_it_goes() {
        let aim = aim_of("127.0.0.1 9900 -c 50k");
        assert_eq!((aim.is_asked, aim.target, aim.goal), (true, 50_000, 19_968));
        assert!(aim.cap.is_some());
        let aim = aim_of("127.0.0.1 9900 -c 15k");
        assert_eq!(aim, Aim { is_asked: true, target: 15_000, goal: 15_000, cap: None });
    }

    #[test]
    fn tuples_are_a_cap() {
        let aim = aim_of("127.0.0.1 9900 --ports 1 -c 19k");
        assert_eq!(aim.cap, None);
        let arguments = args::of("127.0.0.1 9900 --ports 1").unwrap();
        let machine = Machine { local_ports: Some(32_768..=33_767), ..Machine::default() };
        let aim = super::aim(&arguments, &machine);
        assert_eq!((aim.target, aim.cap.unwrap().limit), (1_000, Limit::Ports));
    }
}
