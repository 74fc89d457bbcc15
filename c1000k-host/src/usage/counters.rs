//! The network event counters that many new connections change.

use {crate::text, std::collections::BTreeMap};

/// The counters that are kept, by the kernel's names (`/proc/net/netstat`, `/proc/net/snmp`).
const WATCHED: &[&str] = &[
    // A connection that completed its handshake found the accept queue full.
    "ListenOverflows",
    // A listener dropped a SYN or a final ACK, for any reason, including overflows.
    "ListenDrops",
    "TCPReqQFullDrop",
    "TCPReqQFullDoCookies",
    "SyncookiesSent",
    "TCPBacklogDrop",
    "TCPAbortOnMemory",
    "TCPAbortOnTimeout",
    "TCPMemoryPressures",
    "PruneCalled",
    "RcvPruned",
    "TCPTimeouts",
    "TCPSynRetrans",
    "ActiveOpens",
    "PassiveOpens",
    "AttemptFails",
    "EstabResets",
    "CurrEstab",
    "RetransSegs",
    "OutRsts",
];

/// A reading of the counters, of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetCounters(BTreeMap<&'static str, u64>);

impl NetCounters {
    /// Reads `/proc/net/netstat` and `/proc/net/snmp`.
    pub fn read() -> Option<Self> {
        let netstat = text::read("/proc/self/net/netstat")?;
        let snmp = text::read("/proc/self/net/snmp").unwrap_or_default();
        Some(Self::parse(&netstat, &snmp))
    }

    /// The value of a counter by the kernel's name; `None` if this kernel has no such counter.
    pub fn value(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// The growth since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let added = |(&name, &value): (&&'static str, &u64)| {
            (name, value.saturating_sub(earlier.value(name).unwrap_or(0)))
        };
        Self(self.0.iter().map(added).collect())
    }

    /// All counters with their names, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|(&name, &value)| (name, value))
    }

    /// Parses the texts of a `netstat` and an `snmp`: each section is a line of names and a line of values, both with
    /// the same prefix.
    pub fn parse(netstat: &str, snmp: &str) -> Self {
        let mut counters = BTreeMap::new();
        for (prefix, text) in [("TcpExt:", netstat), ("Tcp:", snmp)] {
            let mut lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
            let (Some(names), Some(values)) = (lines.next(), lines.next()) else { continue };
            for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
                let watched = WATCHED.iter().find(|&&watched| watched == name);
                if let (Some(&name), Ok(value)) = (watched, value.parse()) {
                    counters.insert(name, value);
                }
            }
        }
        Self(counters)
    }
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    const NETSTAT: &str = "TcpExt: SyncookiesSent TW ListenOverflows ListenDrops\n\
        TcpExt: 0 10 43 44\n\
        IpExt: InNoRoutes ListenDrops\nIpExt: 0 7\n";
    const SNMP: &str = "Ip: Forwarding DefaultTTL\nIp: 2 64\n\
        Tcp: RtoAlgorithm MaxConn ActiveOpens CurrEstab\nTcp: 1 -1 481 2\n";

    #[test]
    fn names_and_values_are_paired_within_their_section() {
        let counters = NetCounters::parse(NETSTAT, SNMP);
        let pairs: Vec<_> = counters.iter().collect();
        assert_eq!(
            pairs,
            [
                ("ActiveOpens", 481),
                ("CurrEstab", 2),
                ("ListenDrops", 44),
                ("ListenOverflows", 43),
                ("SyncookiesSent", 0)
            ]
        );
        assert_eq!(counters.value("TW"), None);
    }

    #[test]
    fn a_difference_never_falls_below_zero() {
        let earlier = NetCounters::parse("", "Tcp: CurrEstab OutRsts\nTcp: 9 1\n");
        let later = NetCounters::parse("", "Tcp: CurrEstab OutRsts PassiveOpens\nTcp: 2 5 3\n");
        let added = later.since(&earlier);
        assert_eq!(added.value("CurrEstab"), Some(0));
        assert_eq!(added.value("OutRsts"), Some(4));
        assert_eq!(added.value("PassiveOpens"), Some(3));
    }

    #[test]
    fn garbage_counts_nothing() {
        for text in ["", "Tcp:", "Tcp: CurrEstab", "Tcp: CurrEstab\nTcp: many\n", "\u{0}\n\n"] {
            assert_eq!(NetCounters::parse("", text), NetCounters::default(), "{text}");
        }
    }

    #[test]
    fn this_kernel_has_the_counters_that_the_summary_shows() {
        let counters = NetCounters::read().expect("netstat is world-readable");
        assert!(counters.value("ListenOverflows").is_some(), "{counters:?}");
        assert!(counters.value("PassiveOpens").is_some(), "{counters:?}");
    }

    proptest! {
        #[test]
        fn damaged_counters_break_nothing(netstat in damaged(NETSTAT), snmp in damaged(SNMP)) {
            let counters = NetCounters::parse(&netstat, &snmp);
            let _ = counters.since(&counters);
        }
    }
}
