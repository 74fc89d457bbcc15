//! Descriptors, epoll watches, and the tables of registered files.

use {
    super::{Cap, CapKind, Limit, OTHERS, at_least, not_needed, raised, sysctl},
    crate::check::{FileTable, Machine, Requirements, Role, Row, RowStatus, Setting},
    crate::{
        format,
        limits::{DescriptorLimit, descriptors_for},
    },
};

/// Descriptors of one process.
fn descriptors_needed(machine: &Machine, requirements: &Requirements) -> u64 {
    descriptors_for(
        machine.descriptors_needed(requirements),
        machine.descriptors_beside(requirements.listening_ports()),
    )
}

/// The same for a process with the usual number of inherited descriptors: the limit for a login or a service.
fn descriptors_granted(machine: &Machine, requirements: &Requirements) -> u64 {
    descriptors_for(machine.descriptors_needed(requirements), requirements.listening_ports())
}

/// Open files of the connections, and others.
fn files_granted(requirements: &Requirements) -> u64 {
    requirements.connections.saturating_mul(2).saturating_add(OTHERS)
}

/// The limit by the descriptors of one process, if each connection takes one.
fn process_cap(
    machine: &Machine,
    requirements: &Requirements,
    reason: String,
    remedy: String,
) -> Option<Cap> {
    if requirements.file_table == FileTable::Registered {
        return None;
    }
    let inherited = if machine.descriptors_beside(requirements.listening_ports())
        > requirements.listening_ports()
    {
        let inherited = format::count(machine.descriptors_inherited);
        format!(", of which {inherited} were open at the start")
    } else {
        String::new()
    };
    Some(Cap {
        connections: machine.connections_within(requirements.listening_ports())?,
        kind: CapKind::Descriptors,
        reason: reason + &inherited,
        remedy,
    })
}

/// Whether `fs.nr_open` was lowered below the hard limit, so that it binds instead.
fn is_nr_open_lower(machine: &Machine, hard: u64) -> bool {
    machine.descriptors_max().is_some_and(|most| most < hard)
}

/// `RLIMIT_NOFILE`, the soft limit.
pub(super) struct Soft;

impl Limit for Soft {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed = descriptors_needed(machine, requirements);
        let row =
            at_least("RLIMIT_NOFILE soft", needed, machine.descriptors.map(|limit| limit.soft));
        match machine.descriptors {
            Some(DescriptorLimit { soft, hard }) if soft < needed && needed <= hard => Row {
                status: RowStatus::Pass,
                remedy: Some("the programs raise it to the hard limit at the start".to_owned()),
                ..row
            },
            _ => row.with_remedy(|| {
                "raise the hard limit; the programs raise the soft limit to it".to_owned()
            }),
        }
    }
}

/// `RLIMIT_NOFILE`, the hard limit.
pub(super) struct Hard;

impl Limit for Hard {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed = descriptors_needed(machine, requirements);
        at_least("RLIMIT_NOFILE hard", needed, machine.descriptors.map(|limit| limit.hard))
            .with_remedy(|| {
                format!(
                    "as root, in the shell that starts it: ulimit -Hn {needed}\n\
                     for each login: {} -c {} --apply\n\
                     for a service: LimitNOFILE={needed}\n\
                     if root is not permitted to (a container): run scripts/million --vm",
                    tune_script(requirements),
                    requirements.connections
                )
            })
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let hard = machine.descriptors?.hard;
        if is_nr_open_lower(machine, hard) {
            return None;
        }
        let wanted = descriptors_needed(machine, requirements);
        let reason = format!("RLIMIT_NOFILE is {} hard", format::count(hard));
        let remedy =
            format!("ulimit -Hn {wanted} as root in the shell that starts it, or scripts/million");
        process_cap(machine, requirements, reason, remedy)
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        Some(Setting::HardDescriptors(descriptors_granted(machine, requirements)))
    }
}

/// `fs.nr_open`, which bounds the hard limit.
pub(super) struct PerProcess;

impl Limit for PerProcess {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed = descriptors_needed(machine, requirements);
        let present = machine.system_descriptors.per_process_max;
        at_least("fs.nr_open", needed, present).with_sysctl("fs.nr_open", needed)
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let per_process_max = machine.system_descriptors.per_process_max?;
        if !is_nr_open_lower(machine, machine.descriptors?.hard) {
            return None;
        }
        let reason =
            format!("fs.nr_open is {}, below RLIMIT_NOFILE", format::count(per_process_max));
        let remedy = sysctl("fs.nr_open", descriptors_needed(machine, requirements));
        process_cap(machine, requirements, reason, remedy)
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        raised(
            "fs.nr_open",
            [descriptors_granted(machine, requirements)],
            machine.system_descriptors.per_process_max.map(|present| [present]),
            "the highest descriptor limit that a process may be given",
        )
    }
}

/// `fs.file-max`: the open files of the whole system.
pub(super) struct System;

impl System {
    fn open(machine: &Machine) -> u64 {
        machine.system_descriptors.system_open.unwrap_or(0)
    }

    /// Files that are not for connections.
    fn others(machine: &Machine, requirements: &Requirements) -> u64 {
        Self::open(machine).saturating_add(requirements.other_descriptors())
    }

    fn needed(machine: &Machine, requirements: &Requirements) -> u64 {
        requirements.sockets().saturating_add(Self::others(machine, requirements))
    }
}

impl Limit for System {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed = Self::needed(machine, requirements);
        let row = at_least("fs.file-max", needed, machine.system_descriptors.system_max);
        if row.status != RowStatus::Fail || !machine.exceeds_file_max {
            return row.with_sysctl("fs.file-max", needed);
        }
        let remedy = format!(
            "does not bind this process, which has CAP_SYS_ADMIN; for one without it:\n{}",
            sysctl("fs.file-max", needed)
        );
        Row { status: RowStatus::Pass, remedy: Some(remedy), ..row }
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        if machine.exceeds_file_max {
            return None;
        }
        let limit = machine.system_descriptors.system_max?;
        let for_connections = limit.saturating_sub(Self::others(machine, requirements));
        let open = Self::open(machine);
        Some(Cap {
            connections: for_connections / requirements.sockets_per_connection(),
            kind: CapKind::Descriptors,
            reason: format!("fs.file-max is {}, of which {open} are open", format::count(limit)),
            remedy: sysctl("fs.file-max", Self::needed(machine, requirements)),
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present = machine.system_descriptors.system_max.map(|present| [present]);
        raised(
            "fs.file-max",
            [files_granted(requirements)],
            present,
            "open files of the whole system",
        )
    }
}

/// `fs.epoll.max_user_watches`.
pub(super) struct Watches;

impl Watches {
    const NAME: &str = "fs.epoll.max_user_watches";

    fn needed(requirements: &Requirements) -> u64 {
        requirements.sockets().saturating_add(requirements.other_descriptors())
    }
}

impl Limit for Watches {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed = Self::needed(requirements);
        at_least(Self::NAME, needed, machine.epoll_watches_max).with_sysctl(Self::NAME, needed)
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let limit = machine.epoll_watches_max?;
        let for_connections = limit.saturating_sub(requirements.other_descriptors());
        Some(Cap {
            connections: for_connections / requirements.sockets_per_connection(),
            kind: CapKind::Watches,
            reason: format!("{} is {}", Self::NAME, format::count(limit)),
            remedy: sysctl(Self::NAME, Self::needed(requirements)),
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present = machine.epoll_watches_max.map(|present| [present]);
        raised(
            Self::NAME,
            [files_granted(requirements)],
            present,
            "descriptors that a user's processes may watch",
        )
    }
}

/// `RLIMIT_MEMLOCK`: the rings of registered-file tables. A few tables hold very many files, so it binds only if it is
/// very low.
pub(super) struct LockedMemory;

impl LockedMemory {
    const NAME: &str = "RLIMIT_MEMLOCK";

    /// For all processes on this machine.
    fn needed_bytes(machine: &Machine, requirements: &Requirements) -> u64 {
        machine
            .locked_bytes_needed(requirements)
            .saturating_mul(requirements.sockets_per_connection())
    }
}

impl Limit for LockedMemory {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let present = machine.locked_bytes_max;
        let shown = present.map_or_else(|| "unlimited".to_owned(), format::bytes);
        if requirements.file_table == FileTable::Process {
            return not_needed(Self::NAME, shown);
        }
        let needed = Self::needed_bytes(machine, requirements);
        let status = if present.is_none_or(|present| needed <= present) {
            RowStatus::Pass
        } else {
            RowStatus::Fail
        };
        Row {
            name: Self::NAME,
            needed: format::bytes(needed),
            present: shown,
            status,
            remedy: None,
        }
        .with_remedy(|| {
            format!(
                "for registered files: ulimit -l {} as root in the shell that starts it\n\
                     for a service: LimitMEMLOCK={needed}",
                needed.div_ceil(1024)
            )
        })
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        if requirements.file_table == FileTable::Process {
            return None;
        }
        Some(Cap {
            connections: machine.places_max(requirements)?,
            kind: CapKind::Descriptors,
            reason: format!(
                "a table of registered files has {} places, and takes a descriptor and {} of locked memory; {}",
                format::count(machine.descriptors_max()?.min(1 << 20)),
                format::bytes(2 * 4096),
                machine.tables_bound(requirements)?
            ),
            remedy: format!(
                "ulimit -Hn {} -l {} as root in the shell that starts it",
                descriptors_granted(machine, requirements),
                Self::needed_bytes(machine, requirements).div_ceil(1024)
            ),
        })
    }
}

fn tune_script(requirements: &Requirements) -> &'static str {
    if requirements.role == Role::Client { "scripts/tune-client" } else { "scripts/tune-server" }
}
