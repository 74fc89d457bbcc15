//! The limits: each has a row of the table, the number of connections that it allows, and a remedy.

mod descriptors;
mod memory;
mod network;

use {
    super::{Machine, Requirements, Row, RowStatus, Setting},
    crate::format,
    std::fmt,
};

/// One limit of a machine.
trait Limit {
    /// The value that the target needs, and the present one.
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row;

    /// The maximum number of connections that it allows; `None` if it does not bind them, or can't be read.
    fn cap(&self, _machine: &Machine, _need: &Requirements) -> Option<Cap> {
        None
    }

    /// The permanent setting for it, with room for other programs of the machine; `None` if this machine or this role
    /// does not need it.
    fn setting(&self, _machine: &Machine, _need: &Requirements) -> Option<Setting> {
        None
    }
}

/// Files, watches and connection tracking entries of other programs of the machine, for which a permanent setting has
/// room.
const OTHERS: u64 = 65_536;

/// In the order in which a run would reach them.
const LIMITS: &[&dyn Limit] = &[
    &descriptors::Soft,
    &descriptors::Hard,
    &descriptors::PerProcess,
    &descriptors::System,
    &descriptors::Watches,
    &descriptors::LockedMemory,
    &memory::Available,
    &memory::SocketData,
    &memory::ReceiveBuffer,
    &memory::SendBuffer,
    &network::LocalPorts,
    &network::Tuples,
    &network::AcceptBacklog,
    &network::SynBacklog,
    &network::Conntrack,
    &network::Orphans,
    &network::RpFilter,
];

/// Compares each limit of the machine with what the target needs.
pub fn table(machine: &Machine, requirements: &Requirements) -> Vec<Row> {
    LIMITS.iter().map(|limit| limit.row(machine, requirements)).collect()
}

/// The settings for the target, limit by limit. Both ends of the connections may be on the machine, and belong to one
/// user, whatever the role is.
pub fn settings(machine: &Machine, requirements: &Requirements) -> Vec<Setting> {
    LIMITS.iter().filter_map(|limit| limit.setting(machine, requirements)).collect()
}
/// The number that each limit of connections allows; the number of `need` is used only for the remedies.
pub fn caps(machine: &Machine, requirements: &Requirements) -> impl Iterator<Item = Cap> {
    LIMITS.iter().filter_map(|limit| limit.cap(machine, requirements))
}

/// The lowest of the [`caps`]; `None` if no limit can be read.
pub fn largest_target(machine: &Machine, requirements: &Requirements) -> Option<Cap> {
    caps(machine, requirements).min_by_key(|cap| cap.connections)
}

/// The limit that binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapKind {
    /// Descriptors of the process or of the system.
    Descriptors,
    /// Epoll watches of the user.
    Watches,
    /// 5-tuples.
    Ports,
    /// Memory.
    Memory,
    /// Entries of the connection tracking table.
    Conntrack,
}

impl fmt::Display for CapKind {
    /// The name that the records use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Descriptors => "descriptors",
            Self::Watches => "watches",
            Self::Ports => "ports",
            Self::Memory => "memory",
            Self::Conntrack => "conntrack",
        })
    }
}

/// The limit of the connections, and their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cap {
    /// The maximum number of connections that fit.
    pub connections: u64,
    /// The limit that binds.
    pub kind: CapKind,
    /// Why, as a clause: "RLIMIT_NOFILE is 20,000 hard".
    pub reason: String,
    /// The remedy to reach `need.connections`.
    pub remedy: String,
}

impl Row {
    /// Adds the remedy if the row needs one.
    fn with_remedy(self, remedy: impl FnOnce() -> String) -> Self {
        let wanted = matches!(self.status, RowStatus::Fail | RowStatus::Advice);
        let remedy = if wanted { Some(remedy()) } else { self.remedy };
        Self { remedy, ..self }
    }

    fn with_sysctl(self, name: &str, value: u64) -> Self {
        self.with_remedy(|| sysctl(name, value))
    }
}

fn at_least(name: &'static str, needed: u64, present: Option<u64>) -> Row {
    Row {
        name,
        needed: format::count(needed),
        present: present.map_or_else(unreadable, format::count),
        status: compare(needed, present),
        remedy: None,
    }
}

fn compare(needed: u64, present: Option<u64>) -> RowStatus {
    match present {
        None => RowStatus::Unknown,
        Some(present) if present >= needed => RowStatus::Pass,
        Some(_) => RowStatus::Fail,
    }
}

/// At least these values, number by number; `None` if this kernel has no such setting.
fn raised<const N: usize>(
    name: &'static str,
    needed: [u64; N],
    present: Option<[u64; N]>,
    purpose: &'static str,
) -> Option<Setting> {
    let present = present?;
    let higher: Vec<u64> = needed.iter().zip(present).map(|(&a, b)| a.max(b)).collect();
    let is_enough = higher == present;
    let values = if is_enough { needed.to_vec() } else { higher };
    Some(Setting::Sysctl { name, values, is_enough, purpose })
}

fn not_needed(name: &'static str, present: String) -> Row {
    Row { name, needed: "-".to_owned(), present, status: RowStatus::NotNeeded, remedy: None }
}

fn unreadable() -> String {
    "-".to_owned()
}

/// The command that sets a limit of the kernel.
fn sysctl(name: &str, value: u64) -> String {
    format!("sysctl -w {name}={value}")
}
