//! The limits of this machine that are too low for a native run.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Error, Result};
use c1000k_host::check::{CapKind, FileTableChoice, Machine, Requirements, caps};
use c1000k_host::format;
use c1000k_host::limits::{descriptors_for, raise_descriptor_limit};
use c1000k_host::memory::reserve_bytes;
use c1000k_report::run::Topology;
use nix::sys::resource::{Resource, setrlimit};

use super::plan::{FIRST_PORT, PORTS, Plan};

/// A limit that is too low.
#[derive(Debug)]
pub(crate) struct Obstacle {
    pub(crate) line: String,
    /// The reason if the run must not be tried.
    pub(crate) prevents: Option<&'static str>,
}

/// Returns the limits that are too low. Raises the descriptor limit as far as needed and permitted.
pub(crate) fn obstacles(plan: &Plan) -> Result<Vec<Obstacle>> {
    let needed = descriptors_for(plan.connections, PORTS.into());
    if raise_descriptor_limit()?.limit.hard < needed {
        // Only root may; registered files need no descriptors.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, needed, needed);
    }
    let mut machine = Machine::read();
    if plan.topology == Topology::ThreeHosts {
        machine.conntrack = None;
    }
    let requirements =
        Requirements { ports: PORTS.into(), ..Requirements::new(plan.role(), plan.connections) };
    let (requirements, refusal) =
        requirements.in_file_table(FileTableChoice::Auto, &machine).map_err(Error::msg)?;
    let mut obstacles = of_limits(machine, &requirements, refusal.as_deref());
    // In a separate namespace all ports are free.
    if plan.topology == Topology::OneHost && !plan.stateless {
        obstacles.extend(taken_port().map(|port| Obstacle {
            line: format!(
                "port {port} is in use, and the server listens on {FIRST_PORT} to {}; end the process that holds it",
                FIRST_PORT + PORTS - 1
            ),
            prevents: Some("the server's ports are taken"),
        }));
    }
    Ok(obstacles)
}

/// `refusal` is the reason why registered files are not available.
fn of_limits(
    machine: Machine,
    requirements: &Requirements,
    refusal: Option<&str>,
) -> Vec<Obstacle> {
    let total_bytes = machine.memory.as_ref().map_or(0, |room| room.total_bytes);
    let reserve_bytes = reserve_bytes(total_bytes);
    // The client uses more loopback addresses if necessary, and namespaces have their own port range.
    let mut machine = Machine { local_ports: None, ..machine };
    if let Some(room) = &mut machine.memory {
        room.bytes = room.bytes.saturating_sub(reserve_bytes);
    }
    let binding =
        caps(&machine, requirements).filter(|cap| cap.connections < requirements.connections);
    let obstacle = |cap: c1000k_host::check::Cap| {
        let detail = match (cap.kind, refusal) {
            (CapKind::Memory, _) => {
                format!(", in addition to the server's reserve of {}", format::bytes(reserve_bytes))
            }
            (CapKind::Descriptors, Some(refusal)) => format!(" ({refusal})"),
            _ => String::new(),
        };
        Obstacle {
            line: format!(
                "{} of {} connections fit: {}{detail}; to go further: {}",
                format::count(cap.connections),
                format::count(requirements.connections),
                cap.reason,
                cap.remedy
            ),
            prevents: (cap.kind == CapKind::Memory).then_some("memory would run out"),
        }
    };
    binding.map(obstacle).collect()
}

/// The first of the server's ports that is in use.
fn taken_port() -> Option<u16> {
    (FIRST_PORT..FIRST_PORT + PORTS)
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err())
}

#[cfg(test)]
mod tests {
    use c1000k_host::check::{FileTable, Role};
    use c1000k_host::limits::{DescriptorLimit, SystemDescriptorLimits};
    use c1000k_host::memory::{MemoryBound, MemoryRoom};

    use super::*;

    const LOW: DescriptorLimit = DescriptorLimit { soft: 1_000, hard: 1_000 };

    fn lines(machine: Machine, file_table: FileTable, refusal: Option<&str>) -> Vec<String> {
        let requirements = Requirements { file_table, ..Requirements::new(Role::Both, 50_000) };
        of_limits(machine, &requirements, refusal)
            .into_iter()
            .map(|obstacle| obstacle.line)
            .collect()
    }

    #[test]
    fn descriptors_count_only_without_registered_files() {
        let machine = Machine { descriptors: Some(LOW), ..Machine::default() };
        assert!(lines(machine.clone(), FileTable::Registered, None).is_empty());
        let lines = lines(machine, FileTable::Process, Some("they are forbidden"));
        assert_eq!(lines.len(), 1);
        let start = "868 of 50,000 connections fit: RLIMIT_NOFILE is 1,000 hard (they are forbidden); to go further: ";
        assert!(lines[0].starts_with(start), "{lines:?}");
    }

    #[test]
    fn files_count_only_for_ordinary_users() {
        let system_descriptors = SystemDescriptorLimits {
            system_max: Some(100_000),
            ..SystemDescriptorLimits::default()
        };
        let machine = Machine { system_descriptors, ..Machine::default() };
        let found = lines(machine.clone(), FileTable::Process, None);
        assert!(found.len() == 1 && found[0].contains("fs.file-max is 100,000"), "{found:?}");
        let root = Machine { exceeds_file_max: true, ..machine };
        assert!(lines(root, FileTable::Process, None).is_empty());
    }

    #[test]
    fn the_servers_reserve_is_kept_and_too_little_memory_prevents_the_run() {
        let room = |bytes| MemoryRoom {
            bytes,
            total_bytes: 24 << 30,
            bound_by: MemoryBound::Machine,
            socket_data_bytes: None,
        };
        let machine = |bytes| Machine { memory: Some(room(bytes)), ..Machine::default() };
        let requirements = Requirements::new(Role::Both, 1_000_000);
        assert!(of_limits(machine(10_000_000_000), &requirements, None).is_empty());
        let obstacles = of_limits(machine(9_000_000_000), &requirements, None);
        assert_eq!(obstacles[0].prevents, Some("memory would run out"));
        assert!(
            obstacles[0].line.contains("in addition to the server's reserve of 1.1 GB"),
            "{obstacles:?}"
        );
    }
}
