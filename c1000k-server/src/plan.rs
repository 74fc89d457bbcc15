//! Determines how many connections the server may hold on this machine.

use std::path::Path;

use c1000k_host::check::{
    CapKind, FileTable, FileTableChoice, Machine, Requirements, Role, largest_target,
};
use c1000k_host::format;
use c1000k_host::limits::raise_descriptor_limit;
use c1000k_host::memory::{MemoryBound, MemoryReader, MemoryRoom};

use crate::args::Settings;

/// The maximum number of connections, and the table that holds their sockets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) connections_max: u64,
    pub(crate) file_table: FileTable,
}

/// The two sides that `--check` compares.
///
/// # Errors
/// One line: why the requested table can't be used.
pub(crate) fn machine_and_requirements(
    root: &Path,
    choice: FileTableChoice,
    connections: u64,
    listening: u64,
) -> Result<(Machine, Requirements), String> {
    let machine = machine(root);
    let requirements = requirements(choice, connections, listening, &machine)?;
    Ok((machine, requirements))
}

/// The maximum number of connections here, and the table that holds their sockets.
///
/// # Errors
/// One line: why not even one connection fits, or why the requested table can't be used.
pub(crate) fn plan(settings: &Settings) -> Result<Plan, String> {
    let machine = with_all_its_memory(machine(Path::new("/")));
    let listening = settings.listening();
    if machine.connections_within(listening) == Some(0) {
        return Err(no_room(settings, &machine));
    }
    let requirements = requirements(settings.file_table, settings.target(), listening, &machine)?;
    let cap = largest_target(&machine, &requirements);
    let cap_connections = cap.as_ref().map(|cap| cap.connections.max(1));
    let by_files = match requirements.file_table {
        FileTable::Process => machine.connections_within(listening),
        FileTable::Registered => None,
    };
    let allowed = match settings.max_connections {
        None => cap_connections.unwrap_or(settings.target()),
        Some(asked) => asked.min(by_files.unwrap_or(asked)),
    };
    if allowed < settings.target() {
        match cap.filter(|cap| cap.connections <= allowed || cap.kind == CapKind::Descriptors) {
            Some(cap) => log::info!(
                "limited to {} of {}: {}; to open more: {}",
                format::count(allowed),
                format::counted(settings.target(), "connection"),
                cap.reason,
                cap.remedy
            ),
            None => log::info!("limited to {}", format::counted(allowed, "connection")),
        }
    }
    Ok(Plan { connections_max: allowed, file_table: requirements.file_table })
}

/// The requirements of this number of connections, with their sockets in the requested table.
fn requirements(
    choice: FileTableChoice,
    connections: u64,
    listening: u64,
    machine: &Machine,
) -> Result<Requirements, String> {
    let requirements =
        Requirements { ports: listening, ..Requirements::new(Role::Server, connections) };
    requirements.with_file_table(choice, machine)
}

fn no_room(settings: &Settings, machine: &Machine) -> String {
    let (threads, fewer) = match settings.threads {
        1 => (String::new(), "--ports"),
        threads => (format!(" in {threads} threads"), "--ports or --threads"),
    };
    let inherited = match machine.descriptors_inherited {
        0 => String::new(),
        count => format!(" and {} open at the start", format::counted(count, "descriptor")),
    };
    format!(
        "RLIMIT_NOFILE is {}, which is too low for {}{threads}{inherited}: raise it with `ulimit -n`, or use fewer {fewer}",
        format::count(machine.descriptors.map_or(0, |limit| limit.hard)),
        format::counted(u64::from(settings.ports), "listening port"),
    )
}

/// This machine, as if all its memory were free: the free memory changes, and the memory guard samples it.
fn with_all_its_memory(machine: Machine) -> Machine {
    let rooms = MemoryReader::new().rooms();
    let whole = rooms.into_iter().find(|room| room.bound_by == MemoryBound::Machine);
    let memory = whole.map(|room| MemoryRoom { bytes: room.total_bytes, ..room });
    Machine { memory, ..machine }
}

/// This machine, with the descriptor limit raised as far as possible; a line is logged if that is not the hard limit.
fn machine(root: &Path) -> Machine {
    let raised = raise_descriptor_limit()
        .inspect_err(|error| log::warn!("the descriptor limit can't be read: {error}"))
        .ok();
    if let Some(line) = raised.as_ref().and_then(|raised| raised.shortfall.as_ref()) {
        log::warn!("{line}");
    }
    Machine { descriptors: raised.map(|raised| raised.limit), ..Machine::read_with_root(root) }
}
