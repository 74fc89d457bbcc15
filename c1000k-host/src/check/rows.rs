//! The rows of the table, in the order in which a run would meet the limits.

use {
    super::{
        Machine, Row, Verdict,
        file_table::FileTable,
        need::{Need, Role, predict},
    },
    crate::{
        format,
        limits::{DescriptorLimit, descriptors_for},
        memory::MemoryBound,
        ports::port_room,
    },
};

/// Below this default size of a socket's buffer, data crawls.
const BUFFER_DEFAULT_BYTES_MIN: u64 = 4_096;

/// What fits the wider part of the ports and leaves out the server's own 9900-9999.
const WIDE_PORT_RANGE: &str = "10000 65535";

/// Compares each limit of the machine with what the target needs.
pub fn table(machine: &Machine, need: &Need) -> Vec<Row> {
    vec![
        soft_descriptors(machine, need),
        hard_descriptors(machine, need),
        nr_open(machine, need),
        file_max(machine, need),
        epoll_watches(machine, need),
        locked_memory(machine, need),
        memory(machine, need),
        tcp_mem(machine, need),
        buffers("net.ipv4.tcp_rmem", machine.tcp_rmem_bytes, "4096 131072 6291456"),
        buffers("net.ipv4.tcp_wmem", machine.tcp_wmem_bytes, "4096 16384 4194304"),
        local_ports(machine, need),
        tuples(machine, need),
        backlog("net.core.somaxconn", machine.somaxconn, need),
        backlog("net.ipv4.tcp_max_syn_backlog", machine.tcp_max_syn_backlog, need),
        conntrack(machine, need),
        orphans(machine, need),
        rp_filter(machine, need),
    ]
}

fn soft_descriptors(machine: &Machine, need: &Need) -> Row {
    let needed = descriptors_needed(machine, need);
    let row = at_least("RLIMIT_NOFILE soft", needed, machine.descriptors.map(|limit| limit.soft));
    match machine.descriptors {
        Some(DescriptorLimit { soft, hard }) if soft < needed && needed <= hard => Row {
            verdict: Verdict::Pass,
            remedy: Some("raised to the hard limit at the start, by itself".to_owned()),
            ..row
        },
        _ => row.with_remedy(|| "raise the hard limit, the soft one follows by itself".to_owned()),
    }
}

/// Of one process.
fn descriptors_needed(machine: &Machine, need: &Need) -> u64 {
    descriptors_for(
        machine.descriptors_needed(need),
        machine.descriptors_beside(need.listening_ports()),
    )
}

fn hard_descriptors(machine: &Machine, need: &Need) -> Row {
    let needed = descriptors_needed(machine, need);
    at_least("RLIMIT_NOFILE hard", needed, machine.descriptors.map(|limit| limit.hard)).with_remedy(
        || {
            format!(
                "as root, in the shell that starts it: ulimit -Hn {needed}\n\
                 for each login: {} -c {} --apply\n\
                 for a service: LimitNOFILE={needed}\n\
                 where root may not either (a container): scripts/million boots a virtual machine",
                tune_script(need),
                need.connections
            )
        },
    )
}

fn nr_open(machine: &Machine, need: &Need) -> Row {
    let needed = descriptors_needed(machine, need);
    let present = machine.system_descriptors.per_process_max;
    at_least("fs.nr_open", needed, present).with_sysctl("fs.nr_open", needed)
}

fn file_max(machine: &Machine, need: &Need) -> Row {
    let open = machine.system_descriptors.system_open.unwrap_or(0);
    let needed = need.sockets().saturating_add(need.other_descriptors()).saturating_add(open);
    let present = machine.system_descriptors.system_max;
    let row = at_least("fs.file-max", needed, present);
    if row.verdict != Verdict::Fail || !machine.exceeds_file_max {
        return row.with_sysctl("fs.file-max", needed);
    }
    let remedy = format!(
        "does not bind this process, which has CAP_SYS_ADMIN; for one without it:\n\
         sysctl -w fs.file-max={needed}"
    );
    Row { verdict: Verdict::Pass, remedy: Some(remedy), ..row }
}

fn epoll_watches(machine: &Machine, need: &Need) -> Row {
    let needed = need.sockets().saturating_add(need.other_descriptors());
    at_least("fs.epoll.max_user_watches", needed, machine.epoll_watches_max)
        .with_sysctl("fs.epoll.max_user_watches", needed)
}

/// The rings of registered-file tables.
fn locked_memory(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "RLIMIT_MEMLOCK";
    let present = machine.locked_bytes_max;
    let shown = present.map_or_else(|| "unlimited".to_owned(), format::bytes);
    if need.file_table == FileTable::Process {
        return not_needed(NAME, shown);
    }
    let needed = machine.locked_bytes_needed(need).saturating_mul(need.sockets_per_connection());
    let verdict =
        if present.is_none_or(|present| needed <= present) { Verdict::Pass } else { Verdict::Fail };
    Row { name: NAME, needed: format::bytes(needed), present: shown, verdict, remedy: None }
        .with_remedy(|| {
            format!(
                "for registered files: ulimit -l {} as root in the shell that starts it\n\
                 for a service: LimitMEMLOCK={needed}",
                needed.div_ceil(1024)
            )
        })
}

fn memory(machine: &Machine, need: &Need) -> Row {
    let prediction = predict(need);
    let needed = prediction.total_bytes();
    let present = machine.memory.as_ref();
    let row = Row {
        name: "memory available",
        needed: format::bytes(needed),
        present: present.map_or_else(unreadable, |room| format::bytes(room.bytes)),
        verdict: compare(needed, present.map(|room| room.bytes)),
        remedy: machine.hidden_cgroup.as_ref().map(|group| {
            format!("the limits of the cgroup {} can't be read here, and bind too", group.display())
        }),
    };
    row.with_remedy(|| match present.map(|room| (&room.bound_by, room.total_bytes)) {
        Some((MemoryBound::Cgroup(directory), total_bytes)) => format!(
            "bound by the cgroup {} ({}): raise its limit,\n\
             as systemd-run --scope -p MemoryMax={needed} does, or lower the target",
            format::visible(&directory.display().to_string()),
            format::bytes(total_bytes)
        ),
        _ => format!(
            "the kernel takes {} of it, the process {}: add memory, or lower the target",
            format::bytes(prediction.kernel_bytes),
            format::bytes(prediction.user_bytes)
        ),
    })
}

/// An idle socket queues nothing. One that is being opened and proven holds a page each way.
fn tcp_mem(machine: &Machine, need: &Need) -> Row {
    let needed = need.in_flight.saturating_mul(2 * need.sockets_per_connection());
    let present = machine.tcp_mem_pages.map(|[_, pressure, _]| pressure);
    let row = at_least("net.ipv4.tcp_mem, pressure", needed, present).with_remedy(|| {
        format!(
            "in pages, not bytes: sysctl -w net.ipv4.tcp_mem=\"{needed} {} {}\"",
            needed.saturating_mul(2),
            needed.saturating_mul(3)
        )
    });
    let pages = |figure: String| if figure == "-" { figure } else { format!("{figure} pages") };
    Row { needed: pages(row.needed), present: pages(row.present), ..row }
}

/// Tiny buffers save nothing on idle connections and starve those that talk.
fn buffers(name: &'static str, present: Option<[u64; 3]>, usual: &str) -> Row {
    let row = at_least(
        name,
        BUFFER_DEFAULT_BYTES_MIN,
        present.map(|[_, default_bytes, _]| default_bytes),
    );
    let verdict = if row.verdict == Verdict::Fail { Verdict::Advice } else { row.verdict };
    let triple = |values: [u64; 3]| values.map(|value| value.to_string()).join(" ");
    Row {
        needed: format!("default {}", row.needed),
        present: present.map_or_else(unreadable, triple),
        verdict,
        ..row
    }
    .with_remedy(|| {
        format!(
            "saves nothing on idle connections, slows all others:\nsysctl -w {name}=\"{usual}\""
        )
    })
}

fn local_ports(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "net.ipv4.ip_local_port_range";
    let present = machine.local_ports.as_ref();
    let reserved = match machine.local_ports_reserved {
        0 => String::new(),
        count => format!(", {} reserved", format::count(count)),
    };
    let shown = present
        .map_or_else(unreadable, |ports| format!("{}-{}{reserved}", ports.start(), ports.end()));
    if !need.connects_out() {
        return not_needed(NAME, shown);
    }
    let lanes = need.sources.unwrap_or(1).saturating_mul(need.ports).max(1);
    let needed = need.connections.div_ceil(lanes);
    let row = at_least(NAME, needed, machine.local_ports_free());
    Row { needed: format::counted(needed, "port"), present: shown, ..row }.with_remedy(|| {
        let fewer = match machine.local_ports_reserved {
            0 => "",
            _ => "\nor reserve fewer of them: net.ipv4.ip_local_reserved_ports",
        };
        wider_ports(needed) + fewer
    })
}

fn tuples(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "5-tuples, sources x ports x local";
    let ports = machine.local_ports_free();
    let room = ports.map(|ports| port_room(need.sources.unwrap_or(1), need.ports, ports));
    if !need.connects_out() {
        return not_needed(NAME, room.map_or_else(unreadable, format::count));
    }
    at_least(NAME, need.connections, room)
        .with_remedy(|| "more source addresses (--source), more ports, or a wider range".to_owned())
}

fn wider_ports(needed: u64) -> String {
    let widest = 55_536;
    if needed <= widest {
        format!("sysctl -w net.ipv4.ip_local_port_range=\"{WIDE_PORT_RANGE}\"")
    } else {
        "more than a range can hold: give more source addresses (--source) or more ports".to_owned()
    }
}

fn backlog(name: &'static str, present: Option<u64>, need: &Need) -> Row {
    if !need.listens() {
        return not_needed(name, present.map_or_else(unreadable, format::count));
    }
    let needed = need.in_flight.div_ceil(need.ports.max(1));
    at_least(name, needed, present).with_sysctl(name, needed)
}

fn conntrack(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "net.netfilter.nf_conntrack_max";
    match machine.conntrack {
        None => not_needed(NAME, "not loaded".to_owned()),
        Some(table) if table.count == 0 => Row {
            remedy: (table.max < need.connections).then(|| {
                format!(
                    "tracks nothing now; once a firewall makes it:\nsysctl -w {NAME}={}",
                    need.connections
                )
            }),
            ..not_needed(NAME, format::count(table.max))
        },
        Some(table) => {
            let needed = need.connections.saturating_add(table.count);
            at_least(NAME, needed, Some(table.max)).with_sysctl(NAME, needed)
        }
    }
}

/// The client resets its connections and so leaves no orphan; a server that shuts down flushes.
fn orphans(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "net.ipv4.tcp_max_orphans";
    if need.role == Role::Client {
        return not_needed(NAME, machine.tcp_max_orphans.map_or_else(unreadable, format::count));
    }
    let row = at_least(NAME, need.connections, machine.tcp_max_orphans);
    let verdict = if row.verdict == Verdict::Fail { Verdict::Advice } else { row.verdict };
    Row { verdict, ..row }.with_remedy(|| {
        format!(
            "closed at once, those past it are reset instead of flushed:\nsysctl -w {NAME}={}",
            need.connections
        )
    })
}

fn rp_filter(machine: &Machine, need: &Need) -> Row {
    const NAME: &str = "net.ipv4.conf.*.rp_filter";
    const MEANINGS: [&str; 3] = ["0 (off)", "1 (strict)", "2 (loose)"];
    let present = machine.rp_filter;
    let shown = present
        .and_then(|value| MEANINGS.get(usize::try_from(value).ok()?))
        .map_or_else(unreadable, |meaning| (*meaning).to_owned());
    if !need.connects_out() || need.sources.is_none() {
        return not_needed(NAME, shown);
    }
    let verdict = match present {
        None => Verdict::Unknown,
        Some(1) => Verdict::Advice,
        Some(_) => Verdict::Pass,
    };
    Row { name: NAME, needed: "0 or 2".to_owned(), present: shown, verdict, remedy: None }
        .with_remedy(|| {
            "strict drops answers that come in by another interface than their source's route:\n\
             sysctl -w net.ipv4.conf.all.rp_filter=2"
                .to_owned()
        })
}

impl Row {
    /// Adds the remedy where the row asks for one.
    fn with_remedy(self, remedy: impl FnOnce() -> String) -> Self {
        let wanted = matches!(self.verdict, Verdict::Fail | Verdict::Advice);
        let remedy = if wanted { Some(remedy()) } else { self.remedy };
        Self { remedy, ..self }
    }

    fn with_sysctl(self, name: &str, value: u64) -> Self {
        self.with_remedy(|| format!("sysctl -w {name}={value}"))
    }
}

fn at_least(name: &'static str, needed: u64, present: Option<u64>) -> Row {
    Row {
        name,
        needed: format::count(needed),
        present: present.map_or_else(unreadable, format::count),
        verdict: compare(needed, present),
        remedy: None,
    }
}

fn compare(needed: u64, present: Option<u64>) -> Verdict {
    match present {
        None => Verdict::Unknown,
        Some(present) if present >= needed => Verdict::Pass,
        Some(_) => Verdict::Fail,
    }
}

fn not_needed(name: &'static str, present: String) -> Row {
    Row { name, needed: "-".to_owned(), present, verdict: Verdict::NotNeeded, remedy: None }
}

fn unreadable() -> String {
    "-".to_owned()
}

fn tune_script(need: &Need) -> &'static str {
    if need.role == Role::Client { "scripts/tune-client" } else { "scripts/tune-server" }
}
