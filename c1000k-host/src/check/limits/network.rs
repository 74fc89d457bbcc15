//! Ports, and the kernel's tables of connections.

use {
    super::{Cap, CapKind, Limit, OTHERS, at_least, not_needed, raised, sysctl, unreadable},
    crate::check::{Machine, Requirements, Role, Row, RowStatus, Setting},
    crate::{
        format,
        ports::{LOCAL_PORTS_DEFAULT, port_room},
    },
    std::ops::RangeInclusive,
};

/// The wider part of the ports without the server's 9900-9999.
const WIDE_PORTS: RangeInclusive<u16> = 10_000..=65_535;

/// The kernel's default since 5.4, for connections that wait to be accepted at one port.
const DEFAULT_BACKLOG: u64 = 4_096;

/// `net.ipv4.ip_local_port_range`.
pub(super) struct LocalPorts;

impl LocalPorts {
    const NAME: &str = "net.ipv4.ip_local_port_range";

    /// Local ports that are needed per source address.
    fn needed(requirements: &Requirements) -> u64 {
        let lanes = requirements.sources.unwrap_or(1).saturating_mul(requirements.ports).max(1);
        requirements.connections.div_ceil(lanes)
    }

    /// The present range, widened to twice the number of ports that are needed: before Linux 6.3, `connect` slows down
    /// when half of a range is in use.
    fn granted(requirements: &Requirements, present: &RangeInclusive<u16>) -> RangeInclusive<u16> {
        let wanted = Self::needed(requirements).saturating_mul(2);
        let range = if wanted <= LOCAL_PORTS_DEFAULT.len() as u64 {
            LOCAL_PORTS_DEFAULT
        } else {
            let most = WIDE_PORTS.len() as u64;
            let first = *WIDE_PORTS.start() + (most - wanted.min(most)) as u16;
            first..=*WIDE_PORTS.end()
        };
        *range.start().min(present.start())..=*range.end().max(present.end())
    }
}

impl Limit for LocalPorts {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let present = machine.local_ports.as_ref();
        let reserved = match machine.local_ports_reserved {
            0 => String::new(),
            count => format!(", {} reserved", format::count(count)),
        };
        let shown = present.map_or_else(unreadable, |ports| {
            format!("{}-{}{reserved}", ports.start(), ports.end())
        });
        if !requirements.connects_out() {
            return not_needed(Self::NAME, shown);
        }
        let needed = Self::needed(requirements);
        let row = at_least(Self::NAME, needed, machine.local_ports_free());
        Row { needed: format::counted(needed, "port"), present: shown, ..row }.with_remedy(|| {
            let fewer = match machine.local_ports_reserved {
                0 => "",
                _ => "\nor reserve fewer of them: net.ipv4.ip_local_reserved_ports",
            };
            wider_ports(needed) + fewer
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present = machine.local_ports.as_ref().filter(|_| requirements.connects_out())?;
        let granted = Self::granted(requirements, present);
        Some(Setting::Sysctl {
            name: Self::NAME,
            is_enough: granted == *present,
            values: vec![u64::from(*granted.start()), u64::from(*granted.end())],
            purpose: "local ports to connect from",
        })
    }
}

/// The 5-tuples that the addresses and ports allow.
pub(super) struct Tuples;

impl Limit for Tuples {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        const NAME: &str = "5-tuples, sources x ports x local";
        let ports = machine.local_ports_free();
        let room = ports
            .map(|ports| port_room(requirements.sources.unwrap_or(1), requirements.ports, ports));
        if !requirements.connects_out() {
            return not_needed(NAME, room.map_or_else(unreadable, format::count));
        }
        at_least(NAME, requirements.connections, room).with_remedy(|| {
            "use more source addresses (--source), more ports (--ports), or a wider range"
                .to_owned()
        })
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let local = machine.local_ports_free().filter(|_| requirements.connects_out())?;
        let reserved = match machine.local_ports_reserved {
            0 => String::new(),
            count => {
                format!(
                    "; {} more are reserved (net.ipv4.ip_local_reserved_ports)",
                    format::count(count)
                )
            }
        };
        let sources = requirements.sources.unwrap_or(1);
        Some(Cap {
            connections: port_room(sources, requirements.ports, local),
            kind: CapKind::Ports,
            reason: format!(
                "{} x {} x {} is the number of 5-tuples{reserved}",
                format::counted(sources, "source"),
                format::counted(requirements.ports, "destination port"),
                format::counted(local, "local port")
            ),
            remedy: "use more source addresses (--source) or more ports (--ports)".to_owned(),
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present = machine.local_ports.as_ref().filter(|_| requirements.connects_out())?;
        let local = LocalPorts::granted(requirements, present).len() as u64;
        let sources = requirements.sources.unwrap_or(1);
        let are_too_few = port_room(sources, requirements.ports, local) < requirements.connections;
        are_too_few.then(|| {
            Setting::Impossible(format!(
                "the 5-tuples of {} x {} x {} are too few: use more source addresses or more ports",
                format::counted(sources, "source"),
                format::counted(requirements.ports, "destination port"),
                format::counted(local, "local port")
            ))
        })
    }
}

/// `net.core.somaxconn`.
pub(super) struct AcceptBacklog;

impl Limit for AcceptBacklog {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        backlog("net.core.somaxconn", machine.somaxconn, requirements)
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let purpose = "connections that wait to be accepted, for each listening port";
        backlog_setting("net.core.somaxconn", machine.somaxconn, requirements, purpose)
    }
}

/// `net.ipv4.tcp_max_syn_backlog`.
pub(super) struct SynBacklog;

impl Limit for SynBacklog {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let (name, present) = ("net.ipv4.tcp_max_syn_backlog", machine.tcp_max_syn_backlog);
        if !requirements.uses_tcp() {
            return not_needed(name, present.map_or_else(unreadable, format::count));
        }
        backlog(name, present, requirements)
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let purpose = "connections half open, for each listening port";
        let present = machine.tcp_max_syn_backlog.filter(|_| requirements.uses_tcp());
        backlog_setting("net.ipv4.tcp_max_syn_backlog", present, requirements, purpose)
    }
}

const CONNTRACK_MAX: &str = "net.netfilter.nf_conntrack_max";

/// The connection tracking table.
pub(super) struct Conntrack;

impl Limit for Conntrack {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        match machine.conntrack {
            None => not_needed(CONNTRACK_MAX, "not loaded".to_owned()),
            Some(table) if !requirements.uses_tcp() => {
                not_needed(CONNTRACK_MAX, format::count(table.max))
            }
            Some(table) if table.count == 0 => Row {
                remedy: (table.max < requirements.connections).then(|| {
                    format!(
                        "tracks nothing now; if a firewall starts tracking:\n{}",
                        sysctl(CONNTRACK_MAX, requirements.connections)
                    )
                }),
                ..not_needed(CONNTRACK_MAX, format::count(table.max))
            },
            Some(table) => {
                let needed = requirements.connections.saturating_add(table.count);
                at_least(CONNTRACK_MAX, needed, Some(table.max)).with_sysctl(CONNTRACK_MAX, needed)
            }
        }
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let tracked = machine.conntrack.filter(|_| requirements.uses_tcp());
        let table = tracked.filter(|table| table.count > 0)?;
        Some(Cap {
            connections: table.max.saturating_sub(table.count),
            kind: CapKind::Conntrack,
            reason: format!("nf_conntrack_max is {}", format::count(table.max)),
            remedy: sysctl(CONNTRACK_MAX, requirements.connections.saturating_add(table.count)),
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let tracked = machine.conntrack.filter(|_| requirements.uses_tcp());
        let table = tracked.filter(|table| table.count > 0 || table.is_held)?;
        let needed = requirements.connections.saturating_add(OTHERS);
        raised(CONNTRACK_MAX, [needed], Some([table.max]), "connections that the firewall tracks")
    }
}

/// `net.ipv4.tcp_max_orphans`. The client resets its connections and so leaves no orphan; a server that shuts down
/// flushes.
pub(super) struct Orphans;

impl Orphans {
    const NAME: &str = "net.ipv4.tcp_max_orphans";
}

impl Limit for Orphans {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        if requirements.role == Role::Client || !requirements.uses_tcp() {
            return not_needed(
                Self::NAME,
                machine.tcp_max_orphans.map_or_else(unreadable, format::count),
            );
        }
        let row = at_least(Self::NAME, requirements.connections, machine.tcp_max_orphans);
        let status = if row.status == RowStatus::Fail { RowStatus::Advice } else { row.status };
        Row { status, ..row }.with_remedy(|| {
            format!(
                "at a shutdown, connections beyond it are reset instead of flushed:\n{}",
                sysctl(Self::NAME, requirements.connections)
            )
        })
    }

    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present =
            machine.tcp_max_orphans.filter(|_| requirements.listens() && requirements.uses_tcp());
        let present = present.map(|present| [present]);
        let purpose = "connections that a shutdown flushes at once";
        raised(Self::NAME, [requirements.connections], present, purpose)
    }
}

/// `net.ipv4.conf.*.rp_filter`.
pub(super) struct RpFilter;

impl Limit for RpFilter {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        const NAME: &str = "net.ipv4.conf.*.rp_filter";
        const MEANINGS: [&str; 3] = ["0 (off)", "1 (strict)", "2 (loose)"];
        let present = machine.rp_filter;
        let shown = present
            .and_then(|value| MEANINGS.get(usize::try_from(value).ok()?))
            .map_or_else(unreadable, |meaning| (*meaning).to_owned());
        if !requirements.connects_out() || requirements.sources.is_none() {
            return not_needed(NAME, shown);
        }
        let status = match present {
            None => RowStatus::Unknown,
            Some(1) => RowStatus::Advice,
            Some(_) => RowStatus::Pass,
        };
        Row { name: NAME, needed: "0 or 2".to_owned(), present: shown, status, remedy: None }
            .with_remedy(|| {
                "strict drops answers that come in by another interface than their source's route:\n\
                 sysctl -w net.ipv4.conf.all.rp_filter=2"
                    .to_owned()
            })
    }

    /// If it is already loose, that may be because of this setting.
    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        let present =
            machine.rp_filter.filter(|&value| value > 0 && requirements.connects_out())?;
        (requirements.sources > Some(1)).then(|| Setting::Sysctl {
            name: "net.ipv4.conf.all.rp_filter",
            values: vec![2],
            is_enough: present == 2,
            purpose: "loose, for several source addresses",
        })
    }
}

fn wider_ports(needed: u64) -> String {
    if needed <= WIDE_PORTS.len() as u64 {
        let (first, last) = WIDE_PORTS.into_inner();
        format!("sysctl -w {}=\"{first} {last}\"", LocalPorts::NAME)
    } else {
        "more than a range can hold: use more source addresses (--source) or more ports".to_owned()
    }
}

fn backlog(name: &'static str, present: Option<u64>, requirements: &Requirements) -> Row {
    if !requirements.listens() {
        return not_needed(name, present.map_or_else(unreadable, format::count));
    }
    let needed = requirements.in_flight.div_ceil(requirements.ports.max(1));
    at_least(name, needed, present).with_sysctl(name, needed)
}

fn backlog_setting(
    name: &'static str,
    present: Option<u64>,
    requirements: &Requirements,
    purpose: &'static str,
) -> Option<Setting> {
    let present = present.filter(|_| requirements.listens())?;
    let needed = requirements.in_flight.div_ceil(requirements.ports.max(1)).max(DEFAULT_BACKLOG);
    raised(name, [needed], Some([present]), purpose)
}
