//! Available memory, and the kernel's share for data in sockets.

use {
    super::{Cap, CapKind, Limit, at_least, compare, not_needed, raised, unreadable},
    crate::check::{Machine, Requirements, Row, RowStatus, Setting, predict},
    crate::{format, memory::MemoryBound, text},
};

/// Below this default size of a socket's buffer, throughput is very low.
const BUFFER_DEFAULT_BYTES_MIN: u64 = 4_096;

/// Available memory in the machine or in the tightest cgroup.
pub(super) struct Available;

impl Limit for Available {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let prediction = predict(requirements);
        let needed = prediction.total_bytes();
        let present = machine.memory.as_ref();
        let row = Row {
            name: "memory available",
            needed: format::bytes(needed),
            present: present.map_or_else(unreadable, |room| format::bytes(room.bytes)),
            status: compare(needed, present.map(|room| room.bytes)),
            remedy: machine.hidden_cgroup.as_ref().map(|group| {
                format!(
                    "the limits of the cgroup {} can't be read here, and bind too",
                    group.display()
                )
            }),
        };
        row.with_remedy(|| match present.map(|room| (&room.bound_by, room.total_bytes)) {
            Some((MemoryBound::Cgroup(directory), total_bytes)) => format!(
                "bound by the cgroup {} ({}): raise its limit,\n\
                 as systemd-run --scope -p MemoryMax={needed} does, or lower -c",
                format::visible(&directory.display().to_string()),
                format::bytes(total_bytes)
            ),
            _ => format!(
                "the kernel takes {} of it, the process {}: add memory, or lower -c",
                format::bytes(prediction.kernel_bytes),
                format::bytes(prediction.process_bytes)
            ),
        })
    }

    fn cap(&self, machine: &Machine, requirements: &Requirements) -> Option<Cap> {
        let room = machine.memory.as_ref()?;
        let bytes_per_connection = (requirements.sockets_per_connection()
            * requirements.kernel_bytes_per_socket())
        .saturating_add(requirements.user_bytes_per_connection);
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
                "{} of memory are available{place}, and a connection takes {}",
                format::bytes(room.bytes),
                format::bytes(bytes_per_connection)
            ),
            remedy: match room.bound_by {
                MemoryBound::Machine => "add memory".to_owned(),
                MemoryBound::Cgroup(_) => "raise the cgroup's limit".to_owned(),
            },
        })
    }
}

/// `net.ipv4.tcp_mem`. An idle socket queues nothing; one that is being opened and verified holds a page each way.
pub(super) struct SocketData;

impl SocketData {
    const NAME: &str = "net.ipv4.tcp_mem, pressure";
}

impl Limit for SocketData {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let needed =
            requirements.in_flight.saturating_mul(2 * requirements.sockets_per_connection());
        let present = machine.tcp_mem_pages.map(|[_, pressure, _]| pressure);
        let pages = |figure: String| if figure == "-" { figure } else { format!("{figure} pages") };
        if !requirements.uses_tcp() {
            let present = present.map_or_else(unreadable, format::count);
            return not_needed(Self::NAME, pages(present));
        }
        let row = at_least(Self::NAME, needed, present).with_remedy(|| {
            format!(
                "in pages, not bytes: sysctl -w net.ipv4.tcp_mem=\"{needed} {} {}\"",
                needed.saturating_mul(2),
                needed.saturating_mul(3)
            )
        });
        Row { needed: pages(row.needed), present: pages(row.present), ..row }
    }

    /// A page per connection, at most half of the memory.
    fn setting(&self, machine: &Machine, requirements: &Requirements) -> Option<Setting> {
        if !requirements.uses_tcp() {
            return None;
        }
        let half_pages = machine.memory_total_bytes? / text::page_bytes() / 2;
        let third = (requirements.connections / 2).min(half_pages / 3);
        let needed = [1, 2, 3].map(|thirds| third * thirds);
        let purpose = "pages, not bytes, for queued data";
        raised("net.ipv4.tcp_mem", needed, machine.tcp_mem_pages, purpose)
    }
}

/// `net.ipv4.tcp_rmem`.
pub(super) struct ReceiveBuffer;

impl Limit for ReceiveBuffer {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let usual = "4096 131072 6291456";
        buffer("net.ipv4.tcp_rmem", machine.tcp_rmem_bytes, usual, requirements)
    }
}

/// `net.ipv4.tcp_wmem`.
pub(super) struct SendBuffer;

impl Limit for SendBuffer {
    fn row(&self, machine: &Machine, requirements: &Requirements) -> Row {
        let usual = "4096 16384 4194304";
        buffer("net.ipv4.tcp_wmem", machine.tcp_wmem_bytes, usual, requirements)
    }
}

/// Small buffers save nothing on idle connections and slow those that carry data.
fn buffer(
    name: &'static str,
    present: Option<[u64; 3]>,
    usual: &str,
    requirements: &Requirements,
) -> Row {
    let triple = |values: [u64; 3]| values.map(|value| value.to_string()).join(" ");
    if !requirements.uses_tcp() {
        return not_needed(name, present.map_or_else(unreadable, triple));
    }
    let row = at_least(
        name,
        BUFFER_DEFAULT_BYTES_MIN,
        present.map(|[_, default_bytes, _]| default_bytes),
    );
    let status = if row.status == RowStatus::Fail { RowStatus::Advice } else { row.status };
    Row {
        needed: format!("default {}", row.needed),
        present: present.map_or_else(unreadable, triple),
        status,
        ..row
    }
    .with_remedy(|| {
        format!(
            "saves nothing on idle connections and slows the others:\nsysctl -w {name}=\"{usual}\""
        )
    })
}
