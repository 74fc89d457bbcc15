//! Counts the connections of each source address, if they are limited.
//!
//! A source is an IPv4 address, or the /64 network of an IPv6 address, which a provider usually assigns to one
//! customer. It is stored in eight bytes per connection, because a closed socket has no address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use reactor::Token;

use crate::sync::lock;

/// A network in 64 bits: IPv4 uses the lowest 32 of ::/64, from which only the loopback address connects in IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Source(u64);

/// One thread's connections by source, and the counts of all threads.
#[derive(Debug)]
pub(crate) struct PerSourceLimit {
    max: u32,
    held: Arc<Mutex<HashMap<Source, u32>>>,
    /// The source of the connection in each slot.
    by_slot: Vec<Source>,
    /// The source of the connection that opens next; it is already counted.
    next: Option<Source>,
}

impl PerSourceLimit {
    pub(crate) fn new(max: u32) -> Self {
        Self { max, held: Arc::default(), by_slot: Vec::new(), next: None }
    }

    /// The same limit for another thread, shared by all threads.
    pub(crate) fn share(&self) -> Self {
        Self { held: Arc::clone(&self.held), ..Self::new(self.max) }
    }

    /// Reserves a place for the connection that opens next, if this source is below its limit.
    pub(crate) fn claim(&mut self, source: Source) -> bool {
        let mut all = lock(&self.held);
        let held = all.entry(source).or_default();
        let has_room = *held < self.max;
        if has_room {
            *held += 1;
            self.next = Some(source);
        }
        has_room
    }

    /// Releases the place if the connection did not open.
    pub(crate) fn release_unopened(&mut self) {
        if let Some(source) = self.next.take() {
            self.release(source);
        }
    }

    pub(crate) fn note_open(&mut self, token: Token) {
        let Some(source) = self.next.take() else { return };
        let slot = token.index();
        if slot >= self.by_slot.len() {
            self.by_slot.resize(slot + 1, Source::default());
        }
        self.by_slot[slot] = source;
    }

    pub(crate) fn note_close(&mut self, token: Token) {
        if let Some(&source) = self.by_slot.get(token.index()) {
            self.release(source);
        }
    }

    fn release(&self, source: Source) {
        if let Entry::Occupied(mut held) = lock(&self.held).entry(source) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(u64::from(address.to_bits())),
            IpAddr::V6(address) => Self((address.to_bits() >> 64) as u64),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match u32::try_from(self.0) {
            Ok(0) => f.write_str("::/64"),
            Ok(bits) => Ipv4Addr::from_bits(bits).fmt(f),
            Err(_) => write!(f, "{}/64", Ipv6Addr::from_bits(u128::from(self.0) << 64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> Source {
        Source::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn an_ipv6_network_is_one_source_and_a_mapped_address_is_ipv4() {
        assert_eq!(source("2001:db8:0:1::1"), source("2001:db8:0:1:ffff::9"));
        assert_ne!(source("2001:db8:0:1::1"), source("2001:db8:0:2::1"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
        assert_eq!(source("192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(source("2001:db8:0:1::1").to_string(), "2001:db8:0:1::/64");
        assert_eq!(source("::1").to_string(), "::/64");
    }

    #[test]
    fn a_claim_of_one_thread_counts_for_the_others() {
        let mut one = PerSourceLimit::new(2);
        let mut other = one.share();
        let peer = source("192.0.2.1");
        assert!(one.claim(peer) && other.claim(peer) && !one.claim(peer));
        other.release_unopened();
        other.release_unopened();
        assert!(one.claim(peer) && !other.claim(peer));
    }
}
