//! The kernel's slab caches, of which a connection is made. Only root may read them.
//!
//! A connection that epoll watches holds one object in each of [`CONNECTION_CACHES`]. The kernel
//! merges caches of the same size and kind, and `/proc/slabinfo` shows a merged cache under the
//! name of its first user (`eventpoll_pwq` under `anon_vma_chain`, for instance); which that is
//! differs from kernel to kernel and can be told by `/sys/kernel/slab`, where each name is a link.

use {
    crate::text,
    std::{
        collections::BTreeMap,
        fs, iter,
        path::{Path, PathBuf},
    },
};

/// The caches that a connection takes an object from. Kernels without a security module have no
/// `lsm_*`, those before 5.11 no `ep_head`.
///
/// Who weighs a connection weighs these: all other caches move with what else the machine does.
pub(crate) const CONNECTION_CACHES: &[&str] = &[
    "TCP",
    "TCPv6",
    "sock_inode_cache",
    "filp",
    "dentry",
    "eventpoll_epi",
    "eventpoll_pwq",
    "ep_head",
    "lsm_inode_cache",
    "lsm_file_cache",
];

/// Those of them that every file takes an object from: whoever walks a directory tree moves them by more than
/// thousands of connections do. So of these a connection's share is not measured, but the size of one object.
const FILE_CACHES: &[&str] = &["dentry", "lsm_inode_cache"];

/// One cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlabCache {
    /// Objects handed out; approximate, since free ones that a processor keeps at hand count too.
    pub active_objects: u64,
    /// Size of one object.
    pub object_bytes: u64,
    /// Memory of the whole cache: its slabs' pages, used or not.
    pub slab_bytes: u64,
}

/// A reading of all caches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlabUsage {
    caches: BTreeMap<String, SlabCache>,
    shown_as: BTreeMap<String, String>,
}

impl SlabUsage {
    /// The cache of that name.
    pub fn cache(&self, name: &str) -> Option<&SlabCache> {
        self.caches.get(name)
    }

    /// All caches by their names.
    pub fn caches(&self) -> &BTreeMap<String, SlabCache> {
        &self.caches
    }

    /// Those caches of a connection that the kernel shows under another's name: own name to shown name.
    pub fn shown_as(&self) -> &BTreeMap<String, String> {
        &self.shown_as
    }

    /// Gives a cache of a connection that is shown under another's name its own one.
    ///
    /// It has no effect where the kernel shows a cache of that name, or none under the other's.
    pub fn name_merged(&mut self, name: &str, shown: &str) {
        // Two caches of a connection may be merged with each other: the first keeps it.
        if self.caches.contains_key(name) || CONNECTION_CACHES.contains(&shown) {
            return;
        }
        if let Some(cache) = self.caches.remove(shown) {
            self.caches.insert(name.to_owned(), cache);
            self.shown_as.insert(name.to_owned(), shown.to_owned());
        }
    }

    /// Memory of the caches that connections have almost to themselves.
    pub fn connection_bytes(&self) -> u64 {
        let own = CONNECTION_CACHES.iter().filter(|name| !FILE_CACHES.contains(name));
        let bytes = |name| self.cache(name).map_or(0, |cache| cache.slab_bytes);
        own.fold(0, |total, name| total.saturating_add(bytes(name)))
    }

    /// What one socket takes of each cache of a connection, now that this many were added since `before`.
    ///
    /// Growth by pages; in the caches that every file takes an object from, the size of one object.
    pub fn bytes_per_socket(&self, before: &Self, sockets: u64) -> Vec<(&'static str, f64)> {
        let grown = |name| {
            let old = before.cache(name).map_or(0, |cache| cache.slab_bytes);
            let now = self.cache(name)?;
            Some(if FILE_CACHES.contains(&name) {
                now.object_bytes as f64
            } else {
                (now.slab_bytes as f64 - old as f64) / sockets as f64
            })
        };
        CONNECTION_CACHES.iter().filter_map(|&name| Some((name, grown(name)?))).collect()
    }

    /// Memory of all caches together.
    pub fn total_bytes(&self) -> u64 {
        self.caches.values().fold(0, |total, cache| total.saturating_add(cache.slab_bytes))
    }

    /// Understands the text of `/proc/slabinfo`, version 2; a line that is not understood is left out.
    pub fn parse(text: &str, page_bytes: u64) -> Option<Self> {
        text.starts_with("slabinfo - version: 2").then_some(())?;
        let caches = text.lines().filter_map(|line| parse_cache(line, page_bytes)).collect();
        Some(Self { caches, shown_as: BTreeMap::new() })
    }
}

/// Reads the caches, and knows which name each is shown under.
#[derive(Clone, Debug)]
pub struct SlabReader {
    /// Name of a connection's cache, and all names that it may be shown under instead.
    merged: Vec<(&'static str, Vec<String>)>,
}

impl SlabReader {
    /// Finds out once which caches this kernel has merged.
    pub fn new() -> Self {
        Self { merged: merged_names(Path::new("/sys/kernel/slab")) }
    }

    /// Reads `/proc/slabinfo`; `None` without root, or where the kernel has none.
    ///
    /// A cache of a connection that is merged into another appears under its own name, and no
    /// longer under the other's.
    pub fn read(&self) -> Option<SlabUsage> {
        let mut usage = SlabUsage::parse(&text::read("/proc/slabinfo")?, text::page_bytes())?;
        self.rename(&mut usage);
        Some(usage)
    }

    fn rename(&self, usage: &mut SlabUsage) {
        for (name, shown_as) in &self.merged {
            for shown in shown_as {
                usage.name_merged(name, shown);
            }
        }
    }
}

impl Default for SlabReader {
    fn default() -> Self {
        Self::new()
    }
}

/// For each of a connection's caches the other names that link to the same cache.
fn merged_names(directory: &Path) -> Vec<(&'static str, Vec<String>)> {
    let links: Vec<(String, PathBuf)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().into_string().ok()?, fs::read_link(entry.path()).ok()?))
        })
        .collect();
    let target_of = |name| links.iter().find(|(link, _)| link == name).map(|(_, target)| target);
    let others = |name: &str, target: &Path| -> Vec<String> {
        let same = links.iter().filter(|(link, other)| link != name && other == target);
        same.map(|(link, _)| link.clone()).collect()
    };
    CONNECTION_CACHES
        .iter()
        .filter_map(|&name| Some((name, others(name, target_of(name)?))))
        .collect()
}

/// `name active total size per_slab pages_per_slab : tunables ... : slabdata active total shared`
fn parse_cache(line: &str, page_bytes: u64) -> Option<(String, SlabCache)> {
    let mut parts = line.split(" : ");
    let (name, figures) = parts.next()?.split_once(' ')?;
    let figures = text::numbers(figures)?;
    let &[active_objects, _, object_bytes, _, pages_per_slab] = figures.as_slice() else {
        return None;
    };
    let slabs: u64 = parts
        .find_map(|part| part.trim().strip_prefix("slabdata"))?
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()?;
    let slab_bytes =
        iter::once(slabs).chain([pages_per_slab, page_bytes]).try_fold(1_u64, u64::checked_mul)?;
    Some((name.to_owned(), SlabCache { active_objects, object_bytes, slab_bytes }))
}

#[cfg(test)]
pub(crate) mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    pub(crate) const SLABINFO: &str = "slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>
TCPv6                 13     13   2496   13    8 : tunables    0    0    0 : slabdata      1      1      0
TCP                   26     26   2368   13    8 : tunables    0    0    0 : slabdata      2      2      0
ep_head              512    512     16  256    1 : tunables    0    0    0 : slabdata      2      2      0
eventpoll_epi        192    192    128   32    1 : tunables    0    0    0 : slabdata      6      6      0
sock_inode_cache      95     95    832   19    4 : tunables    0    0    0 : slabdata      5      5      0
filp                 469    567    192   21    1 : tunables    0    0    0 : slabdata     27     27      0
anon_vma_chain      1210   1280     64   64    1 : tunables    0    0    0 : slabdata     20     20      0
";

    pub(crate) fn usage(text: &str) -> SlabUsage {
        SlabUsage::parse(text, 4096).expect("a slabinfo")
    }

    #[test]
    fn caches_are_read_with_the_memory_of_their_slabs() {
        let usage = usage(SLABINFO);
        let expected = SlabCache { active_objects: 469, object_bytes: 192, slab_bytes: 27 * 4096 };
        assert_eq!(usage.cache("filp"), Some(&expected));
        assert_eq!(usage.cache("TCP").map(|cache| cache.slab_bytes), Some(2 * 8 * 4096));
        assert_eq!(usage.total_bytes(), (8 + 16 + 2 + 6 + 20 + 27 + 20) * 4096);
    }

    #[test]
    fn connections_live_in_some_of_the_caches() {
        let usage = usage(SLABINFO);
        assert_eq!(usage.connection_bytes(), usage.total_bytes() - 20 * 4096);
    }

    #[test]
    fn files_of_others_do_not_weigh_on_a_socket() {
        let with_dentries = |slabs: u64| {
            let line = format!("dentry 1 1 192 21 1 : tunables 0 0 0 : slabdata {slabs} {slabs} 0");
            usage(&format!("{SLABINFO}{line}\n"))
        };
        let (before, now) = (with_dentries(1), with_dentries(100_000));
        assert_eq!(now.connection_bytes(), before.connection_bytes());
        let taken = now.bytes_per_socket(&before, 10);
        assert!(taken.contains(&("dentry", 192.0)) && taken.contains(&("filp", 0.0)), "{taken:?}");
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        assert_eq!(SlabUsage::parse("", 4096), None);
        assert_eq!(SlabUsage::parse("slabinfo - version: 1.1\n", 4096), None);
        for line in [
            "TCP",
            "TCP 1 2",
            "TCP 1 2 3 4 5",
            "TCP 1 2 3 4 5 : tunables 0 0 0 : slabdata 1",
            "TCP 1 2 3 4 5 : tunables 0 0 0 : slabdata 1 x 0",
            "TCP 1 2 3 4 99999999999 : tunables 0 0 0 : slabdata 1 99999999999 0",
            "TCP a b c d e : tunables 0 0 0 : slabdata 1 1 0",
        ] {
            let text = format!("slabinfo - version: 2.1\n{line}\n");
            assert_eq!(usage(&text), SlabUsage::default(), "{line}");
        }
    }

    #[test]
    fn a_merged_cache_is_found_under_its_other_name() {
        let reader = SlabReader {
            merged: vec![
                ("eventpoll_epi", vec!["anon_vma_chain".into()]),
                ("eventpoll_pwq", vec!["fs_cache".into(), "anon_vma_chain".into()]),
                ("lsm_file_cache", vec!["TCP".into(), "no_such".into()]),
            ],
        };
        let mut usage = usage(SLABINFO);
        let total_bytes = usage.total_bytes();
        reader.rename(&mut usage);
        assert_eq!(usage.cache("eventpoll_pwq").map(|cache| cache.active_objects), Some(1210));
        assert_eq!(usage.cache("anon_vma_chain"), None);
        let shown_as = [("eventpoll_pwq".to_owned(), "anon_vma_chain".to_owned())];
        assert_eq!(usage.shown_as(), &BTreeMap::from(shown_as));
        assert_eq!(usage.cache("eventpoll_epi").map(|cache| cache.active_objects), Some(192));
        assert_eq!(usage.cache("TCP").map(|cache| cache.active_objects), Some(26));
        assert_eq!(usage.cache("lsm_file_cache"), None);
        assert_eq!(usage.total_bytes(), total_bytes);
    }

    #[test]
    fn a_kernel_without_slab_links_is_read_as_it_is() {
        assert_eq!(merged_names(Path::new("/no/such/directory")), vec![]);
    }

    proptest! {
        #[test]
        fn a_damaged_slabinfo_breaks_nothing(text in damaged(SLABINFO)) {
            let usage = SlabUsage::parse(&text, u64::MAX / 1024);
            let _ = usage.map(|usage| usage.total_bytes());
        }
    }
}
