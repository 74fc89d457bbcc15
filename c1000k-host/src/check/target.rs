//! The most connections that a machine allows, and what caps them.

use {
    super::{Machine, file_table::FileTable, need::Need},
    crate::{format, limits::descriptors_for, memory::MemoryBound, ports::port_room},
    std::fmt,
};

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
    /// Entries of the connection tracker.
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

/// What caps the connections, and at how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cap {
    /// The most connections that fit.
    pub connections: u64,
    /// What binds.
    pub kind: CapKind,
    /// Why, as a clause: "RLIMIT_NOFILE is 20,000 hard".
    pub reason: String,
    /// What to do to come to `need.connections`.
    pub remedy: String,
}

/// The tightest cap on the connections of `need`, whose own number serves the remedies only.
/// `None` where no limit can be read.
pub fn largest_target(machine: &Machine, need: &Need) -> Option<Cap> {
    [
        process_descriptors(machine, need),
        system_descriptors(machine, need),
        watches(machine, need),
        ports(machine, need),
        memory(machine, need),
        conntrack(machine, need),
    ]
    .into_iter()
    .flatten()
    .min_by_key(|cap| cap.connections)
}

fn process_descriptors(machine: &Machine, need: &Need) -> Option<Cap> {
    if need.file_table == FileTable::Registered {
        return registered_files(machine, need);
    }
    let connections = machine.connections_within(need.listening_ports())?;
    let hard = machine.descriptors?.hard;
    let beside = machine.descriptors_beside(need.listening_ports());
    let wanted = descriptors_for(need.connections, beside);
    let most = machine.descriptors_max().unwrap_or(hard);
    let reason = if most < hard {
        format!("fs.nr_open is {}, below RLIMIT_NOFILE", format::count(most))
    } else {
        format!("RLIMIT_NOFILE is {} hard", format::count(hard))
    };
    let of_others = if beside > need.listening_ports() {
        let inherited = format::count(machine.descriptors_inherited);
        format!(", of which {inherited} were open at the start")
    } else {
        String::new()
    };
    Some(Cap {
        connections,
        kind: CapKind::Descriptors,
        reason: reason + &of_others,
        remedy: if most < hard {
            format!("sysctl -w fs.nr_open={wanted}")
        } else {
            format!("ulimit -Hn {wanted} as root in the shell that starts it, or scripts/million")
        },
    })
}

/// Few tables hold very many files, so this binds only where hardly anything is allowed.
fn registered_files(machine: &Machine, need: &Need) -> Option<Cap> {
    Some(Cap {
        connections: machine.places_max(need)?,
        kind: CapKind::Descriptors,
        reason: format!(
            "a table of registered files has {} places, and takes a descriptor and {} of locked memory; {}",
            format::count(machine.descriptors_max()?.min(1 << 20)),
            format::bytes(2 * 4096),
            machine.tables_bound(need)?
        ),
        remedy: format!(
            "ulimit -Hn {} -l {} as root in the shell that starts it",
            descriptors_for(machine.descriptors_needed(need), need.listening_ports()),
            machine
                .locked_bytes_needed(need)
                .saturating_mul(need.sockets_per_connection())
                .div_ceil(1024)
        ),
    })
}

fn system_descriptors(machine: &Machine, need: &Need) -> Option<Cap> {
    if machine.exceeds_file_max {
        return None;
    }
    let limit = machine.system_descriptors.system_max?;
    let open = machine.system_descriptors.system_open.unwrap_or(0);
    let others = open.saturating_add(need.other_descriptors());
    Some(Cap {
        connections: limit.saturating_sub(others) / need.sockets_per_connection(),
        kind: CapKind::Descriptors,
        reason: format!("fs.file-max is {}, of which {open} are open", format::count(limit)),
        remedy: format!("sysctl -w fs.file-max={}", need.sockets().saturating_add(others)),
    })
}

fn watches(machine: &Machine, need: &Need) -> Option<Cap> {
    let limit = machine.epoll_watches_max?;
    let others = need.other_descriptors();
    Some(Cap {
        connections: limit.saturating_sub(others) / need.sockets_per_connection(),
        kind: CapKind::Watches,
        reason: format!("fs.epoll.max_user_watches is {}", format::count(limit)),
        remedy: format!(
            "sysctl -w fs.epoll.max_user_watches={}",
            need.sockets().saturating_add(others)
        ),
    })
}

fn ports(machine: &Machine, need: &Need) -> Option<Cap> {
    let local = machine.local_ports_free().filter(|_| need.connects_out())?;
    let reserved = match machine.local_ports_reserved {
        0 => String::new(),
        count => {
            format!(
                "; {} more are reserved (net.ipv4.ip_local_reserved_ports)",
                format::count(count)
            )
        }
    };
    let sources = need.sources.unwrap_or(1);
    Some(Cap {
        connections: port_room(sources, need.ports, local),
        kind: CapKind::Ports,
        reason: format!(
            "{} x {} x {} are all the 5-tuples there are{reserved}",
            format::counted(sources, "source"),
            format::counted(need.ports, "destination port"),
            format::counted(local, "local port")
        ),
        remedy: "give more source addresses (--source) or more ports (--ports)".to_owned(),
    })
}

fn memory(machine: &Machine, need: &Need) -> Option<Cap> {
    let room = machine.memory.as_ref()?;
    let bytes_per_connection = (need.sockets_per_connection() * need.kernel_bytes_per_socket())
        .saturating_add(need.user_bytes_per_connection);
    let place = match &room.bound_by {
        MemoryBound::Machine => String::new(),
        MemoryBound::Cgroup(directory) => {
            format!(" in the cgroup {}", format::visible(&directory.display().to_string()))
        }
    };
    Some(Cap {
        connections: room.bytes / bytes_per_connection,
        kind: CapKind::Memory,
        reason: format!(
            "{} of memory are there{place}, and a connection takes {}",
            format::bytes(room.bytes),
            format::bytes(bytes_per_connection)
        ),
        remedy: match room.bound_by {
            MemoryBound::Machine => "add memory".to_owned(),
            MemoryBound::Cgroup(_) => "raise the cgroup's limit".to_owned(),
        },
    })
}

fn conntrack(machine: &Machine, need: &Need) -> Option<Cap> {
    let table = machine.conntrack.filter(|table| table.count > 0)?;
    Some(Cap {
        connections: table.max.saturating_sub(table.count),
        kind: CapKind::Conntrack,
        reason: format!("nf_conntrack_max is {}", format::count(table.max)),
        remedy: format!(
            "sysctl -w net.netfilter.nf_conntrack_max={}",
            need.connections.saturating_add(table.count)
        ),
    })
}
