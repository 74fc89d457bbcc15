//! The 5-tuple arithmetic of outbound connections.
//!
//! A connection is one (source address, source port, destination address, destination port,
//! protocol). From one source address, each destination port can be reached once from each local
//! port, so the room is sources x destination ports x local ports.

use {crate::text, std::ops::RangeInclusive};

/// `net.ipv4.ip_local_port_range`: the ports that the kernel chooses from; IPv6 uses it too.
pub fn ip_local_port_range() -> Option<RangeInclusive<u16>> {
    parse_range(&text::read("/proc/sys/net/ipv4/ip_local_port_range")?)
}

/// How many connections fit between so many source addresses and destination ports.
///
/// ```
/// use c1000k_host::ports::port_room;
/// assert_eq!(port_room(1, 100, &(32_768..=60_999)), 2_823_200);
/// ```
pub fn port_room(sources: u64, destination_ports: u64, local_ports: &RangeInclusive<u16>) -> u64 {
    sources.saturating_mul(destination_ports).saturating_mul(local_ports.len() as u64)
}

fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    match *text::numbers(text)? {
        [first, last] => Some(u16::try_from(first).ok()?..=u16::try_from(last).ok()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_two_ports() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        for text in ["", "1", "1 2 3", "1 70000", "a b"] {
            assert_eq!(parse_range(text), None, "{text}");
        }
    }

    #[test]
    fn the_original_test_has_room_for_four_million() {
        assert_eq!(port_room(2, 100, &(10_001..=30_000)), 4_000_000);
        assert_eq!(port_room(u64::MAX, 100, &(1..=2)), u64::MAX);
        assert_eq!(port_room(1, 1, &RangeInclusive::new(2, 1)), 0);
    }
}
