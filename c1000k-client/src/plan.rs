//! The port plan of one target: which source and which destination port the next connection takes.
//!
//! A connection is one 5-tuple. Each pair of a source address and a destination port has room for as many connections
//! as the kernel has local ports, and pairs are used in rotation, so all of them fill evenly. A pair that has run out
//! of local ports, and a destination port on which nothing listens, leave the rotation. This module does no I/O.

use std::collections::VecDeque;

use c1000k_host::command_line::ZonedIp;

/// A destination port leaves the rotation after this many refusals in a row.
pub(crate) const REFUSALS_MAX: u8 = 3;

/// The routes of connections, in rotation.
#[derive(Debug)]
pub struct Plan {
    /// Empty: one source, of the kernel's choice.
    sources: Vec<ZonedIp>,
    first_port: u16,
    ports: Vec<Port>,
    /// Pairs in the order of their turns. Those that have left the rotation are removed when their turn comes.
    ring: VecDeque<u32>,
    /// By pair: no local port is left.
    spent: Vec<bool>,
    /// Pairs that can still be used.
    live: usize,
    /// Local ports that the kernel chooses from.
    local_ports: u64,
}

/// The state of a destination port.
#[derive(Clone, Copy, Debug, Default)]
struct Port {
    closed: bool,
    refusals: u8,
}

/// A pair of a source and a destination port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// The index of the pair.
    pub(crate) pair: u32,
    /// `None`: the kernel's choice.
    pub(crate) source: Option<ZonedIp>,
    pub(crate) port: u16,
}

impl Plan {
    /// All pairs of these sources and `ports` ports from `first_port` on. The ports must exist, and the number of pairs
    /// must fit a `u32`.
    pub fn new(sources: Vec<ZonedIp>, first_port: u16, ports: u16, local_ports: u64) -> Self {
        let pairs = sources.len().max(1) * usize::from(ports);
        Self {
            sources,
            first_port,
            ports: vec![Port::default(); usize::from(ports)],
            ring: (0..pairs as u32).collect(),
            spent: vec![false; pairs],
            live: pairs,
            local_ports,
        }
    }

    /// The next pair in rotation: destination ports first, then the next source. `None` when none is left.
    pub(crate) fn next_route(&mut self) -> Option<Route> {
        loop {
            let pair = self.ring.pop_front()?;
            if self.is_live(pair) {
                self.ring.push_back(pair);
                return Some(self.route(pair));
            }
        }
    }

    /// Whether this many connections would take more than half of the local ports of a pair, where the kernel's own
    /// choice of a port is very slow.
    pub(crate) fn is_crowded_by(&self, connections: u64) -> bool {
        connections.div_ceil(self.live.max(1) as u64) * 2 > self.local_ports
    }

    /// The pair has no local port left.
    pub(crate) fn spend(&mut self, pair: u32) {
        if self.is_live(pair) {
            self.live -= 1;
        }
        self.spent[pair as usize] = true;
    }

    /// Nothing listened on the pair's port; returns whether the port is considered closed now.
    pub(crate) fn note_refusal(&mut self, pair: u32) -> bool {
        let index = self.port_index(pair);
        let port = &mut self.ports[index];
        port.refusals = port.refusals.saturating_add(1);
        if port.closed || port.refusals < REFUSALS_MAX {
            return false;
        }
        let pairs = (index..self.spent.len()).step_by(self.ports.len());
        self.live -= pairs.filter(|&pair| !self.spent[pair]).count();
        self.ports[index].closed = true;
        true
    }

    /// The pair's destination port.
    pub(crate) fn port(&self, pair: u32) -> u16 {
        self.port_at(self.port_index(pair))
    }

    /// All destination ports in the syntax of sysctls: `9900-9999`, or `9900`.
    pub(crate) fn port_span(&self) -> String {
        match self.ports.len() {
            1 => self.first_port.to_string(),
            count => format!("{}-{}", self.first_port, self.port_at(count - 1)),
        }
    }

    /// A server listens on the pair's port.
    pub(crate) fn note_success(&mut self, pair: u32) {
        let index = self.port_index(pair);
        self.ports[index].refusals = 0;
    }

    /// The ports on which nothing listens, in order.
    pub(crate) fn closed_ports(&self) -> impl Iterator<Item = u16> + '_ {
        let closed = |(index, port): (usize, &Port)| port.closed.then(|| self.port_at(index));
        self.ports.iter().enumerate().filter_map(closed)
    }

    /// Whether nothing listens on any port.
    pub(crate) fn is_closed(&self) -> bool {
        self.ports.iter().all(|port| port.closed)
    }

    fn is_live(&self, pair: u32) -> bool {
        !self.spent[pair as usize] && !self.ports[self.port_index(pair)].closed
    }

    fn route(&self, pair: u32) -> Route {
        let source = self.sources.get(pair as usize / self.ports.len()).copied();
        Route { pair, source, port: self.port(pair) }
    }

    fn port_index(&self, pair: u32) -> usize {
        pair as usize % self.ports.len()
    }

    fn port_at(&self, index: usize) -> u16 {
        self.first_port + index as u16
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn plan(sources: u8, ports: u16) -> Plan {
        let sources =
            (0..sources).map(|last| std::net::Ipv4Addr::new(127, 0, 0, last).into()).collect();
        Plan::new(sources, 9900, ports, 28_232)
    }

    #[test]
    fn ports_turn_before_sources() {
        let mut plan = plan(2, 2);
        let turns: Vec<_> = (0..5)
            .map(|_| plan.next_route().unwrap())
            .map(|route| (route.source.unwrap().to_string(), route.port))
            .collect();
        let expected = [("127.0.0.0", 9900), ("127.0.0.0", 9901), ("127.0.0.1", 9900)];
        assert_eq!(turns[..3], expected.map(|(source, port)| (source.to_owned(), port)));
        assert_eq!(turns[4], turns[0]);
    }

    #[test]
    fn without_a_source_the_kernel_chooses() {
        let route = Plan::new(vec![], u16::MAX, 1, 28_232).next_route().unwrap();
        assert_eq!(route, Route { pair: 0, source: None, port: u16::MAX });
    }

    #[test]
    fn a_port_closes_after_refusals_in_a_row_and_only_then() {
        let mut plan = plan(1, 2);
        for _ in 0..10 {
            assert!(!plan.note_refusal(0));
            assert!(!plan.note_refusal(0));
            plan.note_success(0);
        }
        let closed: Vec<_> = (0..5).map(|_| plan.note_refusal(0)).collect();
        assert_eq!(closed, [false, false, true, false, false]);
        assert_eq!(plan.closed_ports().collect::<Vec<_>>(), [9900]);
        assert!(!plan.is_closed());
        assert_eq!(plan.next_route().unwrap().port, 9901);
        assert_eq!(plan.next_route().unwrap().port, 9901);
    }

    #[test]
    fn a_pair_is_crowded_past_half_of_its_local_ports() {
        let mut plan = plan(1, 100);
        assert!(!plan.is_crowded_by(1_000_000));
        assert!(!plan.is_crowded_by(1_411_600));
        assert!(plan.is_crowded_by(1_411_601));
        (0..50).for_each(|pair| plan.spend(pair));
        assert!(plan.is_crowded_by(1_000_000));
    }

    proptest! {
        /// Against a naive model: pairs that may be used get their turns evenly, others get none.
        #[test]
        fn turns_are_even_among_the_pairs_that_are_left(
            sources in 1..5_u8,
            ports in 1..20_u16,
            losses in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..60),
        ) {
            let mut plan = plan(sources, ports);
            let pairs = u32::from(sources) * u32::from(ports);
            let mut left: BTreeSet<u32> = (0..pairs).collect();
            for (is_port, index) in losses {
                let pair = index.index(pairs as usize) as u32;
                if is_port {
                    (0..REFUSALS_MAX).for_each(|_| _ = plan.note_refusal(pair));
                    left.retain(|other| other % u32::from(ports) != pair % u32::from(ports));
                } else {
                    plan.spend(pair);
                    left.remove(&pair);
                }
                prop_assert_eq!(plan.live, left.len());
                let turn = plan.next_route().map(|route| route.pair);
                prop_assert_eq!(turn.is_some(), !left.is_empty());
                prop_assert!(turn.is_none_or(|pair| left.contains(&pair)));
            }
            let mut turns = BTreeMap::<u32, u32>::new();
            for _ in 0..3 * left.len() {
                *turns.entry(plan.next_route().unwrap().pair).or_default() += 1;
            }
            prop_assert_eq!(turns, left.into_iter().map(|pair| (pair, 3)).collect());
        }
    }
}
