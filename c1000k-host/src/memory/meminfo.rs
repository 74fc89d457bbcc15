//! `/proc/meminfo`, live or saved.

use crate::text;

/// The figures of a meminfo; each is `None` if its line is missing or invalid. If the text is that of several memory
/// nodes (`Node 0 MemFree: 4 kB`), each figure is their sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meminfo {
    /// `MemTotal`.
    pub total_bytes: Option<u64>,
    /// `MemFree`.
    pub free_bytes: Option<u64>,
    /// `MemAvailable`, which kernels before 3.14 and memory nodes do not have.
    pub available_bytes: Option<u64>,
    /// `Buffers`.
    pub buffers_bytes: Option<u64>,
    /// `Cached`.
    pub cached_bytes: Option<u64>,
    /// `Active(file)`.
    pub active_file_bytes: Option<u64>,
    /// `Inactive(file)`.
    pub inactive_file_bytes: Option<u64>,
    /// `SReclaimable`: slabs that the kernel counts as available.
    pub reclaimable_slab_bytes: Option<u64>,
}

impl Meminfo {
    /// Parses the text of a meminfo.
    pub fn parse(text: &str) -> Self {
        let sum = |key| sum_of(text, key);
        Self {
            total_bytes: sum("MemTotal"),
            free_bytes: sum("MemFree"),
            available_bytes: sum("MemAvailable"),
            buffers_bytes: sum("Buffers"),
            cached_bytes: sum("Cached"),
            active_file_bytes: sum("Active(file)"),
            inactive_file_bytes: sum("Inactive(file)"),
            reclaimable_slab_bytes: sum("SReclaimable"),
        }
    }

    /// Memory that is neither free nor page cache.
    pub fn used_bytes(&self) -> Option<u64> {
        let unused = [self.free_bytes, self.buffers_bytes, self.cached_bytes];
        unused
            .into_iter()
            .try_fold(self.total_bytes?, |left, bytes| Some(left.saturating_sub(bytes?)))
    }
}

fn sum_of(text: &str, key: &str) -> Option<u64> {
    let values = text.lines().filter_map(|line| text::kilobytes_of(without_node(line), key));
    values.reduce(u64::saturating_add)
}

fn without_node(line: &str) -> &str {
    let numbered = line.strip_prefix("Node ").and_then(|node| node.split_once(' '));
    numbered.map_or(line, |(_, rest)| rest)
}
