//! TCP sockets as `/proc/net/sockstat` and `/proc/net/sockstat6` count them.

use crate::text;

/// TCP sockets, and the memory of the data queued in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketUsage {
    /// IPv4 sockets in use in this network namespace.
    pub tcp_inuse: u64,
    /// IPv6 sockets in use in this network namespace; 0 without IPv6.
    pub tcp6_inuse: u64,
    /// Sockets that their process has closed and that still have data to send.
    pub tcp_orphan: u64,
    /// Sockets in TIME_WAIT.
    pub tcp_tw: u64,
    /// TCP sockets that exist in the whole system: both families, each network namespace.
    pub tcp_alloc: u64,
    /// Memory of the data queued in all of them. An idle socket adds nothing.
    pub buffer_bytes: u64,
}

impl SocketUsage {
    /// Reads both files.
    pub fn read() -> Option<Self> {
        let version_6 = text::read("/proc/self/net/sockstat6").unwrap_or_default();
        Self::parse(&text::read("/proc/self/net/sockstat")?, &version_6, text::page_bytes())
    }

    /// `net.ipv4.tcp_mem` in bytes: there is no pressure below the first, above the second the kernel shrinks buffers,
    /// at the third it queues nothing more. `None` in any network namespace except the first, although the limits apply
    /// there too.
    pub fn buffer_limits_bytes() -> Option<[u64; 3]> {
        let pages = text::numbers(&text::read("/proc/sys/net/ipv4/tcp_mem")?)?;
        let bytes = |pages: &u64| pages.saturating_mul(text::page_bytes());
        pages.iter().map(bytes).collect::<Vec<_>>().try_into().ok()
    }

    /// Whether the kernel shrinks buffers, which it shows in each network namespace: queued data has exceeded the
    /// second limit, and is not yet below the first.
    pub fn is_pressed() -> bool {
        text::read("/proc/self/net/protocols").is_some_and(|protocols| is_pressed(&protocols))
    }

    /// Parses the texts of a `sockstat` and a `sockstat6`, which is empty without IPv6.
    pub fn parse(version_4: &str, version_6: &str, page_bytes: u64) -> Option<Self> {
        let field = |name| field(version_4, "TCP:", name);
        Some(Self {
            tcp_inuse: field("inuse")?,
            tcp6_inuse: self::field(version_6, "TCP6:", "inuse").unwrap_or(0),
            tcp_orphan: field("orphan")?,
            tcp_tw: field("tw")?,
            tcp_alloc: field("alloc")?,
            buffer_bytes: field("mem")?.checked_mul(page_bytes)?,
        })
    }
}

/// Whether the line of TCP has `yes` in the column `press`.
fn is_pressed(protocols: &str) -> bool {
    let mut lines = protocols.lines();
    let column =
        lines.next().and_then(|head| head.split_whitespace().position(|name| name == "press"));
    let tcp = lines.map(str::split_whitespace).find(|line| line.clone().next() == Some("TCP"));
    tcp.zip(column).is_some_and(|(mut line, column)| line.nth(column) == Some("yes"))
}

/// The number after `name` in the line that starts with `protocol`.
fn field(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(protocol))?;
    let mut words = line.split_whitespace();
    words.find(|&word| word == name)?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*, std::net::TcpListener};

    const VERSION_4: &str = "sockets: used 12\n\
        TCP: inuse 18011 orphan 2 tw 1 alloc 18014 mem 35\n\
        UDP: inuse 0 mem 0\nUDPLITE: inuse 0\nRAW: inuse 0\nFRAG: inuse 0 memory 0\n";
    const VERSION_6: &str = "TCP6: inuse 3\nUDP6: inuse 0\n";

    #[test]
    fn both_files_are_read_together() {
        let expected = SocketUsage {
            tcp_inuse: 18_011,
            tcp6_inuse: 3,
            tcp_orphan: 2,
            tcp_tw: 1,
            tcp_alloc: 18_014,
            buffer_bytes: 35 * 4096,
        };
        assert_eq!(SocketUsage::parse(VERSION_4, VERSION_6, 4096), Some(expected));
        let without_ipv6 = SocketUsage { tcp6_inuse: 0, ..expected };
        assert_eq!(SocketUsage::parse(VERSION_4, "", 4096), Some(without_ipv6));
    }

    #[test]
    fn an_invalid_text_is_none() {
        for text in [
            "",
            "TCP:",
            "TCP: inuse",
            "TCP: inuse x orphan 0 tw 0 alloc 0 mem 0",
            "TCP: inuse 1 orphan 0 tw 0 alloc 0",
            "UDP: inuse 1 orphan 0 tw 0 alloc 0 mem 0",
            "TCP: inuse 1 orphan 0 tw 0 alloc 0 mem 18446744073709551615",
        ] {
            assert_eq!(SocketUsage::parse(text, VERSION_6, 4096), None, "{text}");
        }
    }

    #[test]
    fn the_pressure_on_buffers_is_that_of_tcp() {
        let protocols = |tcp| {
            format!(
                "protocol  size sockets  memory press maxhdr  slab module\n\
                 TCPv6     2432      0     351   no     192   yes  kernel\n\
                 TCP       2304     27     351   {tcp}   192   yes  kernel\n"
            )
        };
        assert!(is_pressed(&protocols("yes")));
        assert!(!is_pressed(&protocols("no")));
        assert!(!is_pressed("") && !is_pressed("press\nTCP") && !is_pressed("TCP yes"));
    }

    #[test]
    fn a_listener_is_counted() {
        let _listener = TcpListener::bind("127.0.0.1:0").expect("loopback listens");
        let usage = SocketUsage::read().expect("sockstat is world-readable");
        assert!(usage.tcp_inuse >= 1 && usage.tcp_alloc >= 1, "{usage:?}");
    }

    proptest! {
        #[test]
        fn a_damaged_sockstat_breaks_nothing(four in damaged(VERSION_4), six in damaged(VERSION_6)) {
            let _ = SocketUsage::parse(&four, &six, 4096);
        }
    }
}
