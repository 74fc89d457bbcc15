//! The values of a machine that the check uses, read at one moment.

use {
    crate::{
        limits::{
            DescriptorLimit, INHERITED_DESCRIPTORS, SystemDescriptorLimits, connections_within,
            descriptor_limit, locked_bytes_max, may_exceed_file_max, open_descriptors,
            system_descriptor_limits,
        },
        memory::{Meminfo, MemoryReader, MemoryRoom},
        ports::{ip_local_port_range, reserved_ports},
        text,
    },
    std::{
        fs,
        ops::RangeInclusive,
        path::{Path, PathBuf},
    },
};

/// Readings of a machine. Each is `None` if it can't be read; tests set their own values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `RLIMIT_NOFILE` of this process.
    pub descriptors: Option<DescriptorLimit>,
    /// Descriptors that this process has inherited, besides the standard streams.
    pub descriptors_inherited: u64,
    /// `fs.nr_open`, `fs.file-max`, `fs.file-nr`.
    pub system_descriptors: SystemDescriptorLimits,
    /// `RLIMIT_MEMLOCK` of this process in bytes, which counts for all processes of a user; `None` without a limit.
    pub locked_bytes_max: Option<u64>,
    /// This process has `CAP_SYS_ADMIN`, and so `fs.file-max` does not bind it.
    pub exceeds_file_max: bool,
    /// `fs.epoll.max_user_watches`, which counts for all processes of a user.
    pub epoll_watches_max: Option<u64>,
    /// All memory of the machine.
    pub memory_total_bytes: Option<u64>,
    /// Available memory, in the machine or in the tightest cgroup.
    pub memory: Option<MemoryRoom>,
    /// This process's cgroup, if its limits can't be read.
    pub hidden_cgroup: Option<PathBuf>,
    /// `net.ipv4.tcp_mem`, in pages: no pressure below the first, pressure above the second, refusals at the third.
    pub tcp_mem_pages: Option<[u64; 3]>,
    /// `net.ipv4.tcp_rmem`, in bytes: minimum, default, maximum.
    pub tcp_rmem_bytes: Option<[u64; 3]>,
    /// `net.ipv4.tcp_wmem`, in bytes: minimum, default, maximum.
    pub tcp_wmem_bytes: Option<[u64; 3]>,
    /// `net.ipv4.ip_local_port_range`.
    pub local_ports: Option<RangeInclusive<u16>>,
    /// How many of them `net.ipv4.ip_local_reserved_ports` reserves.
    pub local_ports_reserved: u64,
    /// Others of them that a server of this machine listens on.
    pub local_ports_listening: u64,
    /// `net.core.somaxconn`.
    pub somaxconn: Option<u64>,
    /// `net.ipv4.tcp_max_syn_backlog`.
    pub tcp_max_syn_backlog: Option<u64>,
    /// `net.ipv4.tcp_max_orphans`.
    pub tcp_max_orphans: Option<u64>,
    /// The connection tracking table, if the module is loaded.
    pub conntrack: Option<Conntrack>,
    /// The strictest `net.ipv4.conf.*.rp_filter`: 0 off, 1 strict, 2 loose.
    pub rp_filter: Option<u64>,
}

/// The connection tracking table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// `net.netfilter.nf_conntrack_max`.
    pub max: u64,
    /// `net.netfilter.nf_conntrack_count`; 0 usually means that no rule uses tracking.
    pub count: u64,
    /// Another module, such as a firewall's, uses the tracker, whether or not it tracks anything yet.
    pub is_held: bool,
}

impl Machine {
    /// Reads this machine as this process sees it at its start, before it opens anything.
    pub fn read() -> Self {
        Self::read_with_root(Path::new("/"))
    }

    /// The same with the kernel's settings below this directory.
    pub fn read_with_root(root: &Path) -> Self {
        let descriptors = descriptor_limit().ok();
        let memory = MemoryReader::new();
        let local_ports = ip_local_port_range(root);
        let numbers = |name| text::read_sysctl(root, name);
        let first = |name| numbers(name)?.first().copied();
        let triple = |name| numbers(name)?.try_into().ok();
        Self {
            descriptors,
            descriptors_inherited: open_descriptors(
                descriptors.map_or(u64::MAX, |limit| limit.hard),
            ),
            system_descriptors: system_descriptor_limits(root),
            locked_bytes_max: locked_bytes_max(),
            exceeds_file_max: may_exceed_file_max(),
            epoll_watches_max: first("fs.epoll.max_user_watches"),
            memory_total_bytes: text::read(root.join("proc/meminfo"))
                .and_then(|text| Meminfo::parse(&text).total_bytes),
            memory: memory.read(),
            hidden_cgroup: memory.hidden_cgroup().map(PathBuf::from),
            tcp_mem_pages: triple("net.ipv4.tcp_mem"),
            tcp_rmem_bytes: triple("net.ipv4.tcp_rmem"),
            tcp_wmem_bytes: triple("net.ipv4.tcp_wmem"),
            local_ports_reserved: local_ports.as_ref().map_or(0, reserved_ports),
            local_ports,
            local_ports_listening: 0,
            somaxconn: first("net.core.somaxconn"),
            tcp_max_syn_backlog: first("net.ipv4.tcp_max_syn_backlog"),
            tcp_max_orphans: first("net.ipv4.tcp_max_orphans"),
            conntrack: read_conntrack(root),
            rp_filter: read_rp_filter(root),
        }
    }

    /// Local ports that the kernel may choose.
    #[must_use]
    pub fn local_ports_free(&self) -> Option<u64> {
        let all = self.local_ports.as_ref()?.len() as u64;
        Some(all.saturating_sub(self.local_ports_reserved + self.local_ports_listening))
    }

    /// Counts the ports that a server of this machine listens on: within the range, they are not available as local
    /// ports.
    pub fn count_listening_ports(&mut self, listening: RangeInclusive<u16>) {
        let Some(local) = &self.local_ports else { return };
        let first = *local.start().max(listening.start());
        let last = *local.end().min(listening.end());
        if first <= last {
            let reserved = reserved_ports(&(first..=last));
            self.local_ports_listening = u64::from(last - first) + 1 - reserved;
        }
    }
}

impl Machine {
    /// How many connections of one process fit under its descriptor limit besides its listeners and inherited
    /// descriptors; `None` if the limit can't be read.
    pub fn connections_within(&self, listening_ports: u64) -> Option<u64> {
        let limit = self.descriptors_max()?;
        Some(connections_within(limit, self.descriptors_beside(listening_ports)))
    }

    /// Descriptors that are neither for connections nor among those that each process needs.
    pub(super) fn descriptors_beside(&self, listening_ports: u64) -> u64 {
        let unexpected = self.descriptors_inherited.saturating_sub(INHERITED_DESCRIPTORS);
        listening_ports.saturating_add(unexpected)
    }

    /// The limit that the process can reach: its hard limit, or `fs.nr_open` if that was lowered since.
    pub(super) fn descriptors_max(&self) -> Option<u64> {
        let hard = self.descriptors?.hard;
        Some(self.system_descriptors.per_process_max.map_or(hard, |most| most.min(hard)))
    }
}

fn read_conntrack(root: &Path) -> Option<Conntrack> {
    let first = |name| text::read_sysctl(root, name)?.first().copied();
    Some(Conntrack {
        max: first("net.netfilter.nf_conntrack_max")?,
        count: first("net.netfilter.nf_conntrack_count")?,
        is_held: text::read(root.join("proc/modules")).is_some_and(|list| is_held(&list)),
    })
}

/// `nf_conntrack 188416 3 nf_nat,nft_ct,xt_conntrack, Live 0x0`: the third word is the number of users.
fn is_held(modules: &str) -> bool {
    let mut lines = modules.lines().map(|line| line.split(' '));
    let users = lines.find(|words| words.clone().next() == Some("nf_conntrack"));
    users.is_some_and(|mut words| words.nth(2) != Some("0"))
}

/// The kernel uses the larger of `all` and the interface's value; strict is 1, loose 2.
fn read_rp_filter(root: &Path) -> Option<u64> {
    let conf = root.join("proc/sys/net/ipv4/conf");
    let all = text::read_number(conf.join("all/rp_filter"))?;
    let interfaces = fs::read_dir(conf).ok()?.flatten();
    let own = interfaces
        .filter(|entry| entry.file_name() != "all" && entry.file_name() != "default")
        .filter_map(|entry| text::read_number(entry.path().join("rp_filter")));
    let effective: Vec<u64> = own.map(|value| value.max(all)).collect();
    if effective.contains(&1) { Some(1) } else { effective.into_iter().max().or(Some(all)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracker_is_held_by_the_modules_that_use_it() {
        assert!(is_held("x 1 0 - Live 0x0\nnf_conntrack 188416 2 nf_nat,nft_ct, Live 0x0\n"));
        for modules in ["nf_conntrack 188416 0 - Live 0x0\n", "nf_conntrack_x 1 2 y, Live 0x0", ""]
        {
            assert!(!is_held(modules), "{modules}");
        }
    }

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read();
        assert!(machine.descriptors.is_some_and(|limit| limit.soft <= limit.hard), "{machine:?}");
        assert!(machine.memory.is_some(), "{machine:?}");
        let ordered = |triple: Option<[u64; 3]>| triple.is_none_or(|triple| triple.is_sorted());
        assert!(ordered(machine.tcp_mem_pages), "{machine:?}");
    }
}
