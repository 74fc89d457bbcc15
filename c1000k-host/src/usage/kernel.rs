//! The kernel memory of one socket: growth since a baseline, divided by the sockets added.

use std::collections::BTreeMap;

use super::{
    slab::{SlabReader, SlabUsage},
    sockets::SocketUsage,
};

/// Measures the kernel's memory per TCP socket from the moment it was made.
///
/// Slabs and sockets are counted for the whole system. If both ends of a connection are on one kernel, two sockets are
/// counted, and the cost is still that of one. Other programs that open sockets or files at the same time distort the
/// figure.
#[derive(Clone, Debug)]
pub struct KernelMeter {
    reader: SlabReader,
    baseline: Option<(SlabUsage, SocketUsage)>,
}

/// The kernel memory of one socket, in bytes. Slabs are counted by their pages, so the unused end of each slab is
/// included.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelCost {
    /// Sockets added since the baseline, over which the growth is spread.
    pub sockets: u64,
    /// Bytes per socket in each cache from which a connection takes an object, by the cache's name; for caches that
    /// every file uses, the size of an object.
    pub slabs: Vec<(&'static str, f64)>,
    /// Bytes per socket by which all other caches together have grown (negative if they shrank).
    pub other_slabs: f64,
    /// Bytes per socket of queued data.
    pub buffers: f64,
}

impl KernelMeter {
    /// Takes the baseline.
    pub fn start() -> Self {
        let reader = SlabReader::new();
        let baseline = sample(&reader);
        Self { reader, baseline }
    }

    /// The caches of a connection that this kernel shows under another name: original name to shown name.
    pub fn shown_as(&self) -> BTreeMap<String, String> {
        let slabs = self.baseline.as_ref().map(|(slabs, _)| slabs.shown_as().clone());
        slabs.unwrap_or_default()
    }

    /// The cost since the baseline. `None` if the slabs can't be read (no root), if no socket was added, or if the
    /// caches of a connection have not grown.
    pub fn cost(&self) -> Option<KernelCost> {
        let (slabs, sockets) = sample(&self.reader)?;
        let (slabs_before, sockets_before) = self.baseline.as_ref()?;
        KernelCost::between((slabs_before, sockets_before), (&slabs, &sockets))
    }
}

impl KernelCost {
    /// Bytes per socket in the caches of a connection.
    pub fn slab_bytes(&self) -> f64 {
        self.slabs.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Total bytes per socket: its caches, the growth of the others, and queued data.
    pub fn total_bytes(&self) -> f64 {
        self.slab_bytes() + self.other_slabs + self.buffers
    }

    fn between(
        (slabs_before, sockets_before): (&SlabUsage, &SocketUsage),
        (slabs, sockets): (&SlabUsage, &SocketUsage),
    ) -> Option<Self> {
        let added = sockets.tcp_alloc.checked_sub(sockets_before.tcp_alloc)?;
        if added == 0 {
            return None;
        }
        let per_socket = |before: u64, now: u64| (now as f64 - before as f64) / added as f64;
        let own = slabs.bytes_per_socket(slabs_before, added);
        let known: f64 = own.iter().map(|(_, bytes)| bytes).sum();
        // The kernel freed slabs of earlier sockets meanwhile, so the growth is not that of the new ones.
        let has_grown = known > 0.0;
        has_grown.then(|| Self {
            sockets: added,
            other_slabs: per_socket(slabs_before.total_bytes(), slabs.total_bytes()) - known,
            slabs: own,
            buffers: per_socket(sockets_before.buffer_bytes, sockets.buffer_bytes),
        })
    }
}

/// Slabs first: if they can't be read, the sockets need not be counted.
fn sample(reader: &SlabReader) -> Option<(SlabUsage, SocketUsage)> {
    Some((reader.read()?, SocketUsage::read()?))
}

#[cfg(test)]
mod tests {
    use {
        super::*,
        crate::usage::slab::tests::{SLABINFO, usage},
    };

    fn sockets(tcp_alloc: u64, buffer_bytes: u64) -> SocketUsage {
        SocketUsage { tcp_alloc, buffer_bytes, ..SocketUsage::default() }
    }

    #[test]
    fn growth_is_spread_over_the_sockets_added() {
        let before = usage(SLABINFO);
        let after = usage(
            &SLABINFO
                .replace("slabdata      2      2      0", "slabdata     12     12      0")
                .replace("slabdata     20     20      0", "slabdata     22     22      0"),
        );
        let cost = KernelCost::between((&before, &sockets(1, 0)), (&after, &sockets(131, 1300)))
            .expect("sockets were added");
        let of =
            |name| cost.slabs.iter().find(|(cache, _)| *cache == name).map(|&(_, bytes)| bytes);
        assert_eq!(cost.sockets, 130);
        assert_eq!(of("TCP"), Some(10.0 * 8.0 * 4096.0 / 130.0));
        assert_eq!(of("filp"), Some(0.0));
        assert_eq!(of("lsm_file_cache"), None);
        assert!((cost.other_slabs - 2.0 * 4096.0 / 130.0).abs() < 1e-6, "{cost:?}");
        assert_eq!(cost.buffers, 10.0);
        let parts = cost.slab_bytes() + cost.other_slabs + cost.buffers;
        assert!((cost.total_bytes() - parts).abs() < 1e-6, "{cost:?}");
    }

    #[test]
    fn without_new_sockets_there_is_no_cost() {
        let slabs = usage(SLABINFO);
        for after in [4, 5] {
            let cost = KernelCost::between((&slabs, &sockets(5, 0)), (&slabs, &sockets(after, 0)));
            assert_eq!(cost, None);
        }
    }

    #[test]
    fn slabs_that_shrank_or_stayed_are_no_cost() {
        let grown =
            SLABINFO.replace("slabdata      2      2      0", "slabdata     12     12      0");
        let (small, large) = (usage(SLABINFO), usage(&grown));
        for (before, after) in [(&large, &small), (&small, &small)] {
            let cost = KernelCost::between((before, &sockets(1, 0)), (after, &sockets(131, 0)));
            assert_eq!(cost, None);
        }
    }

    #[test]
    fn without_readable_slabs_there_is_no_cost() {
        let meter = KernelMeter { reader: SlabReader::new(), baseline: None };
        assert_eq!(meter.cost(), None);
    }
}
