//! The machine's available memory, from `/proc/meminfo`, or from other sources if that is missing or incomplete.
//!
//! `/proc` may be mounted with `subset=pid`, which shows only processes; a container may have a replaced file with
//! fewer lines; kernels before 3.14 have no `MemAvailable`.

use {
    super::{Meminfo, MemoryBound, MemoryRoom, pinned_bytes, total},
    crate::text,
    nix::sys::sysinfo::sysinfo,
    std::fs,
};

/// Without `MemAvailable`, this part of the memory counts neither as free nor as reclaimable cache: the kernel reserves
/// it by its watermarks, which are about 0.3% to 1% of the memory.
const SET_ASIDE_DIVISOR: u64 = 64;

/// The machine's room, on a system with `tcp_sockets` sockets; `None` without a source.
pub(super) fn room(tcp_sockets: u64) -> Option<MemoryRoom> {
    let is_usable = |meminfo: &Meminfo| meminfo.available_bytes.or(meminfo.free_bytes).is_some();
    let meminfo = text::read("/proc/meminfo").map(|text| Meminfo::parse(&text));
    let meminfo = meminfo.filter(is_usable).unwrap_or_else(meminfo_of_nodes);
    let total_bytes = meminfo.total_bytes.or_else(|| Some(sysinfo().ok()?.ram_total()))?;
    room_of(&meminfo, total_bytes, tcp_sockets)
}

/// The meminfo of all memory nodes in `/sys`.
fn meminfo_of_nodes() -> Meminfo {
    let entries = fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let texts = entries.filter_map(|node| text::read(node.path().join("meminfo")));
    Meminfo::parse(&texts.collect::<String>())
}

fn room_of(meminfo: &Meminfo, total_bytes: u64, tcp_sockets: u64) -> Option<MemoryRoom> {
    let slab_bytes = meminfo.reclaimable_slab_bytes.unwrap_or(0);
    let available_bytes = meminfo
        .available_bytes
        .or_else(|| estimate(meminfo, slab_bytes, total_bytes / SET_ASIDE_DIVISOR))?;
    let bytes = available_bytes.saturating_sub(pinned_bytes(tcp_sockets).min(slab_bytes));
    Some(MemoryRoom {
        bytes: bytes.min(total_bytes),
        total_bytes,
        bound_by: MemoryBound::Machine,
        // The kernel bounds it by `tcp_mem`.
        socket_data_bytes: None,
    })
}

/// Estimates `MemAvailable` as the kernel does (`si_mem_available`): free memory, and caches that can shrink, each
/// minus a watermark.
fn estimate(meminfo: &Meminfo, slab_bytes: u64, set_aside_bytes: u64) -> Option<u64> {
    let free_bytes = meminfo.free_bytes?.saturating_sub(set_aside_bytes);
    let page_cache = [meminfo.active_file_bytes, meminfo.inactive_file_bytes];
    let page_cache_bytes = total(page_cache.into_iter().flatten());
    let shrinking = |bytes: u64| bytes - set_aside_bytes.min(bytes / 2);
    Some(total([free_bytes, shrinking(page_cache_bytes), shrinking(slab_bytes)].into_iter()))
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    const KIB: u64 = 1024;
    const TOTAL: u64 = 24_684_092 * KIB;

    const MEMINFO: &str = "MemTotal:       24684092 kB\nMemFree:        24387136 kB\n\
        MemAvailable:   24354432 kB\nBuffers:            2720 kB\nCached:           161864 kB\n\
        Active(file):      90000 kB\nInactive(file):    60000 kB\nSReclaimable:      20000 kB\n";

    const NODES: &str = "Node 0 MemTotal:       1000000 kB\nNode 0 MemFree:         500000 kB\n\
        Node 0 Active(file):    200000 kB\nNode 0 SReclaimable:         0 kB\n\
        Node 1 MemTotal:       1000000 kB\nNode 1 MemFree:         300000 kB\n";

    fn room_bytes(meminfo: &str, tcp_sockets: u64) -> Option<u64> {
        room_of(&Meminfo::parse(meminfo), TOTAL, tcp_sockets).map(|room| room.bytes)
    }

    #[test]
    fn available_memory_is_room() {
        assert_eq!(room_bytes(MEMINFO, 0), Some(24_354_432 * KIB));
        assert_eq!(Meminfo::parse(MEMINFO).total_bytes, Some(TOTAL));
    }

    #[test]
    fn memory_pinned_by_open_sockets_is_not_available() {
        let room = |sockets| room_bytes(MEMINFO, sockets).expect("a meminfo");
        assert_eq!(room(0) - room(10_000), 10_570_000);
        assert_eq!(room(0) - room(1_000_000), 20_000 * KIB);
    }

    #[test]
    fn without_mem_available_it_is_estimated_as_the_kernel_does() {
        let without = MEMINFO.replace("MemAvailable", "Other");
        let set_aside = TOTAL / 64;
        let expected = 24_387_136 * KIB - set_aside + 75_000 * KIB + 10_000 * KIB;
        assert_eq!(room_bytes(&without, 0), Some(expected));
        let kernels = room_bytes(MEMINFO, 0).expect("a meminfo");
        assert!(expected.abs_diff(kernels) < kernels / 50, "{expected} and {kernels}");
    }

    #[test]
    fn nodes_are_added_up() {
        assert_eq!(Meminfo::parse(NODES).total_bytes, Some(2_000_000 * KIB));
        let total = 2_000_000 * KIB;
        let expected = 800_000 * KIB - total / 64 + 200_000 * KIB - total / 64;
        assert_eq!(
            room_of(&Meminfo::parse(NODES), total, 0).map(|room| room.bytes),
            Some(expected)
        );
    }

    #[test]
    fn the_system_call_has_the_total_where_no_file_has() {
        let meminfo = text::read("/proc/meminfo").expect("is world-readable");
        let total = Meminfo::parse(&meminfo).total_bytes.expect("is in each meminfo");
        let called = sysinfo().expect("is allowed").ram_total();
        assert!(called.abs_diff(total) < total / 100, "{called} and {total}");
    }

    #[test]
    fn an_invalid_meminfo_is_none() {
        for text in ["", "MemTotal: x kB", "\u{0}", "MemTotal: 4 kB\nCached: 2 kB\n"] {
            assert_eq!(room_bytes(text, 0), None, "{text}");
        }
    }

    #[test]
    fn this_machines_nodes_show_no_more_than_its_meminfo() {
        let room = |meminfo: &Meminfo| room_of(meminfo, meminfo.total_bytes?, 0);
        // Without nodes there is nothing to compare.
        let Some(of_nodes) = room(&meminfo_of_nodes()) else { return };
        let meminfo = text::read("/proc/meminfo").expect("is world-readable");
        let whole = room(&Meminfo::parse(&meminfo)).expect("is a meminfo");
        assert!(of_nodes.bytes < whole.bytes / 4 * 5, "{of_nodes:?} and {whole:?}");
    }

    proptest! {
        #[test]
        fn a_damaged_meminfo_breaks_nothing(text in damaged(MEMINFO), nodes in damaged(NODES)) {
            let (text, nodes) = (Meminfo::parse(&text), Meminfo::parse(&nodes));
            let _ = (room_of(&text, u64::MAX, u64::MAX), room_of(&nodes, 0, 1), text.used_bytes());
        }
    }
}
