//! How many connections to open: the requested number, and the number that this machine allows.

use std::collections::HashSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::ops::RangeInclusive;

use c1000k_host::check::{
    CapKind, FileTable, Machine, Requirements, Role, TLS_BYTES_PER_CONNECTION, Transport,
    largest_target,
};
use c1000k_host::command_line::ZonedIp;
use c1000k_host::format;
use c1000k_host::limits::DescriptorLimit;
use c1000k_record::Limit;
use ipnet::Ipv4AddrRange;

use crate::address::Scheme;
use crate::args::Arguments;
use crate::destination::Destination;
use crate::stateless;

/// The default target.
const TARGET_DEFAULT: u64 = 1_000_000;

/// Memory of this process for each connection: the reactor's slot, the state and the timer node.
const USER_BYTES_PER_CONNECTION: u64 = 64;

/// The maximum number of source addresses that are chosen without `--source`.
const LOOPBACK_SOURCES_MAX: u64 = 1_000;

/// The requested connections of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The number was requested (`-c`), so only reaching it is a success.
    pub(crate) is_asked: bool,
    /// The number to be reached.
    pub(crate) connections: u64,
    /// The number to be opened: `connections`, or what the limits allow.
    pub(crate) goal: u32,
    /// The limit of this machine, if it is lower.
    pub(crate) cap: Option<Cap>,
    /// The table that holds the sockets.
    pub(crate) file_table: FileTable,
    /// Local ports that are reserved in the kernel.
    pub(crate) local_ports_reserved: u64,
}

/// A limit of this machine below the requested number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cap {
    pub(crate) limit: Limit,
    /// The numbers, the reason and the remedy, in one line.
    pub(crate) detail: String,
}

/// This machine, with the descriptors that the process may have, and the requirements. On loopback, adds the source
/// addresses that are needed to the arguments.
///
/// # Errors
/// One line, if registered files were requested and are not available.
pub(crate) fn machine_and_requirements(
    arguments: &mut Arguments,
    descriptors: Option<DescriptorLimit>,
) -> Result<(Machine, Requirements), String> {
    if let Some(setup) = &arguments.stateless {
        return stateless_machine_and_requirements(arguments, setup);
    }
    let mut machine = Machine { descriptors, ..Machine::read_with_root(&arguments.check.root) };
    let requirements = requirements(arguments, &machine);
    if requirements.role == Role::Both {
        // Servers on several addresses usually have the same ports.
        let spans = arguments.destinations().filter(|to| is_here(to)).filter_map(port_span);
        let mut listening = 0;
        for span in spans.collect::<HashSet<_>>() {
            machine.count_listening_ports(span);
            listening += std::mem::take(&mut machine.local_ports_listening);
        }
        machine.local_ports_listening = listening;
    }
    let mut requirements = requirements.with_file_table(arguments.file_table, &machine)?;
    with_enough_sources(arguments, &machine, &mut requirements);
    Ok((machine, requirements))
}

/// Clients without sockets have no requirements, except for a server on this machine.
fn stateless_machine_and_requirements(
    arguments: &Arguments,
    setup: &stateless::Setup,
) -> Result<(Machine, Requirements), String> {
    let mut machine = Machine::read_with_root(&arguments.check.root);
    if setup.is_here {
        let first = setup.server.port();
        machine.count_listening_ports(first..=first.saturating_add(setup.ports - 1));
    } else {
        machine.descriptors = None;
    }
    let requirements = Requirements {
        ports: u64::from(setup.ports),
        in_flight: arguments.in_flight_max as u64,
        user_bytes_per_connection: USER_BYTES_PER_CONNECTION,
        ..Requirements::new(
            if setup.is_here { Role::Server } else { Role::Client },
            arguments.connections.unwrap_or(TARGET_DEFAULT),
        )
    };
    machine.local_ports = None;
    Ok((machine.clone(), requirements.with_file_table(arguments.file_table, &machine)?))
}

/// The requirements, which include the server's if it is a process of this machine.
fn requirements(arguments: &Arguments, machine: &Machine) -> Requirements {
    let connections = arguments.connections.unwrap_or(TARGET_DEFAULT);
    let here: u64 =
        arguments.destinations().filter(|to| is_here(to)).map(|to| u64::from(to.endpoints())).sum();
    let (endpoints, is_here) = (arguments.endpoints(), here > 0);
    let listening = if is_here { here } else { endpoints };
    let is_unix = arguments.destinations().all(Destination::is_unix);
    Requirements {
        transport: if is_unix { Transport::Unix } else { Transport::Tcp },
        ports: endpoints,
        listeners: Some(listeners(listening, connections, machine)),
        sources: match arguments.sources.len() as u64 {
            0 => arguments.sources_unlisted,
            count => Some(count),
        },
        in_flight: arguments.in_flight_max as u64,
        user_bytes_per_connection: user_bytes_per_connection(arguments.scheme),
        ..Requirements::new(if is_here { Role::Both } else { Role::Client }, connections)
    }
}

/// Memory of this process for each connection through this scheme.
fn user_bytes_per_connection(scheme: Scheme) -> u64 {
    let tls = if scheme.is_tls() { TLS_BYTES_PER_CONNECTION } else { 0 };
    USER_BYTES_PER_CONNECTION + tls
}

/// Whether the server is a process of this machine: an address can only be bound on its own machine.
fn is_here(to: &Destination) -> bool {
    to.ip().is_none_or(|ip| UdpSocket::bind(ip.socket_addr(0)).is_ok())
}

fn port_span(to: &Destination) -> Option<RangeInclusive<u16>> {
    let count = to.ports().checked_sub(1)?;
    Some(to.first_port()..=to.first_port().saturating_add(count))
}

/// On loopback every 127.x.y.z is a source address. If one has too few ports and none was given, chooses as many as the
/// number of connections needs, and adds them to the requirements.
fn with_enough_sources(
    arguments: &mut Arguments,
    machine: &Machine,
    requirements: &mut Requirements,
) {
    let per_source = machine.local_ports_free().unwrap_or(0) * arguments.endpoints();
    let with_any_ports = Machine { local_ports: None, ..machine.clone() };
    let cap = largest_target(&with_any_ports, requirements).map_or(u64::MAX, |cap| cap.connections);
    let reachable = requirements.connections.min(cap);
    let is_on_loopback = requirements.transport == Transport::Tcp
        && arguments
            .destinations()
            .filter_map(Destination::ip)
            .all(|to| to.ip.is_ipv4() && to.ip.is_loopback());
    if !is_on_loopback || requirements.sources.is_some() || reachable <= per_source {
        return;
    }
    let count = reachable.div_ceil(per_source.max(1)).min(LOOPBACK_SOURCES_MAX);
    let first = Ipv4Addr::LOCALHOST;
    let last = Ipv4Addr::from(u32::from(first) + (count - 1) as u32);
    log::info!("one source address has too few ports: connecting from {first} to {last}");
    arguments.sources = Ipv4AddrRange::new(first, last).map(ZonedIp::from).collect();
    requirements.sources = Some(count);
}

/// The estimated number of ports that the server listens on: at most one for each connection, and a server with this
/// machine's descriptor limit does not use most of it for listeners.
fn listeners(ports: u64, connections: u64, machine: &Machine) -> u64 {
    let listeners = ports.min(connections);
    let most = machine.descriptors.map_or(u64::MAX, |limit| limit.hard / 2);
    if listeners <= most { listeners } else { 0 }
}

/// Compares the requested number with the machine's limits.
pub(crate) fn within_limits(
    arguments: &Arguments,
    machine: &Machine,
    requirements: &Requirements,
) -> Target {
    let wanted = requirements.connections;
    let is_asked = arguments.connections.is_some();
    let file_table = requirements.file_table;
    let target = |connections, goal, cap| {
        let local_ports_reserved = machine.local_ports_reserved;
        Target { is_asked, connections, goal: bounded(goal), cap, file_table, local_ports_reserved }
    };
    let Some(cap) = largest_target(machine, requirements) else {
        return target(wanted, wanted, None);
    };
    let by_descriptors = cap.kind == CapKind::Descriptors && file_table == FileTable::Process;
    // The client's own choice leaves room for listeners even if they are elsewhere, so that a client and a server with
    // the same limit choose the same number.
    let within = requirements.listeners.and_then(|listeners| machine.connections_within(listeners));
    let room = match within {
        Some(within) if by_descriptors && !is_asked => cap.connections.min(within),
        _ => cap.connections,
    };
    if wanted <= room {
        return target(wanted, wanted, None);
    }
    // A requested number is tried beyond the limit, and may reach a little more.
    let predicted = if is_asked { "predicted to fit here: " } else { "" };
    let detail = format!(
        "{predicted}{} of {}: {}; to open more: {}",
        format::count(room),
        format::count(wanted),
        cap.reason,
        cap.remedy
    );
    let lowered = Some(Cap { limit: limit_of(cap.kind), detail });
    if !is_asked {
        return target(room, room, lowered);
    }
    // The listeners' share of the descriptors may be free after all, but memory must not be exceeded.
    let furthest = match machine.connections_within(0) {
        Some(within) if by_descriptors => within,
        _ => room,
    };
    target(wanted, wanted.min(furthest), lowered)
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
    use c1000k_host::check::predict;
    use c1000k_host::limits::DescriptorLimit;

    use super::*;
    use crate::args;

    fn target_of(line: &str) -> Target {
        let arguments = args::of(line).unwrap();
        let descriptors = Some(DescriptorLimit { soft: 20_000, hard: 20_000 });
        let local_ports = Some(32_768..=60_999);
        let machine = Machine { descriptors, local_ports, ..Machine::default() };
        within_limits(&arguments, &machine, &requirements(&arguments, &machine))
    }

    #[test]
    fn without_a_given_target_it_is_what_the_limits_allow_on_both_ends() {
        for ip in ["127.0.0.1", "192.0.2.1"] {
            let target = target_of(&format!("{ip} 9900"));
            assert_eq!(
                (target.is_asked, target.connections, target.goal),
                (false, 19_868, 19_868),
                "{ip}"
            );
            let cap = target.cap.unwrap();
            assert_eq!(cap.limit, Limit::Descriptors);
            let start = "19,868 of 1,000,000: RLIMIT_NOFILE is 20,000 hard; to open more: ";
            assert!(cap.detail.starts_with(start), "{}", cap.detail);
        }
    }

    #[test]
    fn tls_is_predicted_to_take_more_memory_of_the_process() {
        let process_bytes = |line: &str| {
            let requirements = requirements(&args::of(line).unwrap(), &Machine::default());
            predict(&requirements).process_bytes
        };
        for target in ["192.0.2.1", "ws://192.0.2.1", "unix:/run/a"] {
            assert_eq!(process_bytes(&format!("{target} -c 100k")), 6_400_000, "{target}");
        }
        for target in ["tls://192.0.2.1", "wss://192.0.2.1", "https+unix:/run/a"] {
            assert_eq!(process_bytes(&format!("{target} -c 100k")), 399_100_000, "{target}");
        }
    }

    #[test]
    fn a_given_target_stays_and_is_tried_up_to_the_limits() {
        let target = target_of("127.0.0.1 9900 -c 50k");
        assert_eq!((target.is_asked, target.connections, target.goal), (true, 50_000, 19_968));
        let detail = target.cap.unwrap().detail;
        let start = "predicted to fit here: 19,868 of 50,000: RLIMIT_NOFILE is 20,000 hard; ";
        assert!(detail.starts_with(start), "{detail}");
        let target = target_of("127.0.0.1 9900 -c 15k");
        assert_eq!(
            (target.is_asked, target.connections, target.goal, target.cap),
            (true, 15_000, 15_000, None)
        );
    }

    #[test]
    fn a_client_needs_no_descriptor_for_ports_that_others_listen_on() {
        for ip in ["127.0.0.1", "192.0.2.1"] {
            for (options, goal) in [
                ("-c 100 --ports 65535", 100),
                ("-c 15k --ports 20000", 15_000),
                ("--ports 65535", 19_968),
                ("-c 19950 --ports 20000", 19_950),
            ] {
                let target = target_of(&format!("{ip} 1 {options}"));
                assert_eq!(target.goal, goal, "{ip} {options}");
                let cap = if goal == 19_968 { Some(Limit::Descriptors) } else { None };
                assert_eq!(target.cap.map(|cap| cap.limit), cap, "{ip} {options}");
            }
        }
        assert_eq!(target_of("192.0.2.1 9900 -c 19900").cap, None);
    }

    #[test]
    fn with_registered_files_descriptors_are_not_a_limit() {
        let arguments = args::of("127.0.0.1 9900").unwrap();
        let descriptors = Some(DescriptorLimit { soft: 20_000, hard: 20_000 });
        let local_ports = Some(32_768..=60_999);
        let machine = Machine { descriptors, local_ports, ..Machine::default() };
        let requirements = Requirements {
            file_table: FileTable::Registered,
            ..requirements(&arguments, &machine)
        };
        let target = within_limits(&arguments, &machine, &requirements);
        assert_eq!((target.connections, target.goal, target.cap), (1_000_000, 1_000_000, None));
    }

    #[test]
    fn on_loopback_more_sources_are_used_if_one_is_too_few() {
        let machine = Machine { local_ports: Some(32_768..=60_999), ..Machine::default() };
        for (line, sources) in [
            ("127.0.0.1 9900 -c 2800k", 0),
            ("127.0.0.1 9900 -c 5M", 2),
            ("127.0.0.1 9900 -c 100k --ports 1", 4),
            ("127.0.0.1 9900 -c 100k --ports 1 --source 127.0.0.9", 1),
            ("192.0.2.1 9900 -c 5M", 0),
        ] {
            let mut arguments = args::of(line).unwrap();
            let mut requirements = requirements(&arguments, &machine);
            with_enough_sources(&mut arguments, &machine, &mut requirements);
            assert_eq!(arguments.sources.len(), sources, "{line}");
        }
    }

    #[test]
    fn tuples_are_a_limit() {
        let target = target_of("127.0.0.1 9900 --ports 1 -c 19k");
        assert_eq!(target.cap, None);
        let arguments = args::of("127.0.0.1 9900 --ports 1").unwrap();
        let machine = Machine { local_ports: Some(32_768..=33_767), ..Machine::default() };
        let target =
            super::within_limits(&arguments, &machine, &requirements(&arguments, &machine));
        assert_eq!((target.connections, target.cap.unwrap().limit), (1_000, Limit::Ports));
    }
}
