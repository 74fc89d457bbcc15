//! The 5-tuple arithmetic of outbound connections.
//!
//! A connection is one (source address, source port, destination address, destination port, protocol). From one source
//! address, each local port can connect once to each destination port, so the room is sources x destination ports x
//! local ports.

use {
    crate::text,
    std::{
        fs::File,
        io::{BufRead, BufReader},
        ops::RangeInclusive,
        path::Path,
    },
};

/// The kernel's default range of local ports.
pub const LOCAL_PORTS_DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// `net.ipv4.ip_local_port_range`: the ports that the kernel chooses from, on the machine whose root directory this is;
/// IPv6 uses it too.
pub fn ip_local_port_range(root: &Path) -> Option<RangeInclusive<u16>> {
    range_of(&text::read_sysctl(root, "net.ipv4.ip_local_port_range")?)
}

/// How many ports of the range the kernel never chooses: `net.ipv4.ip_local_reserved_ports`. None if that can't be
/// read.
pub fn reserved_ports(range: &RangeInclusive<u16>) -> u64 {
    text::read("/proc/sys/net/ipv4/ip_local_reserved_ports")
        .and_then(|list| count_within(&list, range))
        .unwrap_or(0)
}

/// How many connections fit between these numbers of source addresses, destination ports and local ports.
///
/// ```
/// use c1000k_host::ports::port_room;
/// assert_eq!(port_room(1, 100, 28_232), 2_823_200);
/// ```
pub fn port_room(sources: u64, destination_ports: u64, local_ports: u64) -> u64 {
    sources.saturating_mul(destination_ports).saturating_mul(local_ports)
}

/// What uses a local TCP port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortHolder {
    /// A socket listens on it.
    Listener,
    /// It is the local port of a connection, usually one that this machine has opened.
    Connection,
}

/// What uses this TCP port in the network namespace of this process; a listener takes precedence. `None` if no visible
/// socket has it.
pub fn port_holder(port: u16) -> Option<PortHolder> {
    let holders = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .into_iter()
        .filter_map(|table| File::open(table).ok())
        .flat_map(|table| BufReader::new(table).lines().map_while(Result::ok))
        .filter_map(|line| holder_in(&line, port));
    let mut found = None;
    for holder in holders {
        found = Some(holder);
        if holder == PortHolder::Listener {
            break;
        }
    }
    found
}

/// What uses the port according to a line such as `0: 0100007F:26AC 00000000:0000 0A ...`.
fn holder_in(line: &str, port: u16) -> Option<PortHolder> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (_, local_port) = fields.next()?.rsplit_once(':')?;
    if u16::from_str_radix(local_port, 16) != Ok(port) {
        return None;
    }
    let is_listening = fields.nth(1)? == LISTEN;
    Some(if is_listening { PortHolder::Listener } else { PortHolder::Connection })
}

/// The number of ports of a list such as `8080,9148-9150` that are in the range.
fn count_within(list: &str, range: &RangeInclusive<u16>) -> Option<u64> {
    let mut count = 0;
    for item in list.trim().split(',').filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let first = first.parse::<u16>().ok()?.max(*range.start());
        let last = last.parse::<u16>().ok()?.min(*range.end());
        count += (first..=last).len() as u64;
    }
    Some(count)
}

fn range_of(numbers: &[u64]) -> Option<RangeInclusive<u16>> {
    match *numbers {
        [first, last] => Some(u16::try_from(first).ok()?..=u16::try_from(last).ok()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_two_ports() {
        assert_eq!(range_of(&[32_768, 60_999]), Some(32_768..=60_999));
        for numbers in [&[][..], &[1], &[1, 2, 3], &[1, 70_000]] {
            assert_eq!(range_of(numbers), None, "{numbers:?}");
        }
    }

    #[test]
    fn reserved_ports_count_where_the_kernel_would_choose_them() {
        for (list, count) in [
            ("\n", Some(0)),
            ("8080,9148-9150\n", Some(0)),
            ("40000\n", Some(1)),
            ("1-40000,40005,60999-65535\n", Some(7_233 + 1 + 1)),
            ("1-70000\n", None),
            ("x\n", None),
        ] {
            assert_eq!(count_within(list, &(32_768..=60_999)), count, "{list}");
        }
    }

    #[test]
    fn a_port_is_a_listeners_or_a_connections() {
        let line = |local, state| format!("  7: 0100007F:{local} 0100007F:9C40 {state} 00000000");
        assert_eq!(holder_in(&line("26AC", "0A"), 9_900), Some(PortHolder::Listener));
        assert_eq!(holder_in(&line("26AC", "01"), 9_900), Some(PortHolder::Connection));
        assert_eq!(holder_in(&line("26AD", "01"), 9_900), None);
        assert_eq!(holder_in("  sl  local_address rem_address   st tx_queue", 9_900), None);
        assert_eq!(holder_in("", 9_900), None);
    }

    #[test]
    fn the_original_test_has_room_for_four_million() {
        assert_eq!(port_room(2, 100, 20_000), 4_000_000);
        assert_eq!(port_room(u64::MAX, 100, 2), u64::MAX);
        assert_eq!(port_room(1, 1, 0), 0);
    }
}
