//! Memory and CPU time of this process.

use {
    crate::text,
    nix::sys::{
        resource::{UsageWho, getrusage},
        time::TimeVal,
    },
};

/// The resources that this process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessUsage {
    /// Resident memory now, from the page tables. The kernel's running counts may be wrong by hundreds of pages, a
    /// tenth of the memory of ten thousand connections.
    pub rss_bytes: u64,
    /// The maximum resident memory, from the running counts, at least the present one; `None` if `/proc/self/status`
    /// does not have it.
    pub rss_peak_bytes: Option<u64>,
    /// The part of the resident memory that no file backs and no other process shares: heap and
    /// stack.
    pub private_bytes: u64,
    /// Processor time spent in the program.
    pub cpu_user_seconds: f64,
    /// Processor time spent in the kernel on the program's behalf.
    pub cpu_system_seconds: f64,
}

impl ProcessUsage {
    /// Reads `/proc/self/smaps_rollup`, `/proc/self/statm`, `/proc/self/status` and `getrusage`.
    pub fn read() -> Option<Self> {
        let time = getrusage(UsageWho::RUSAGE_SELF).ok()?;
        let (counted_bytes, private_bytes) =
            resident(&text::read("/proc/self/statm")?, text::page_bytes())?;
        // Kernels before 4.14 do not have it.
        let rss_bytes = text::read("/proc/self/smaps_rollup")
            .and_then(|rollup| rss_of_rollup(&rollup))
            .unwrap_or(counted_bytes);
        let rss_peak_bytes = text::read("/proc/self/status")
            .and_then(|status| text::kilobytes_of(&status, "VmHWM"))
            // The two files are read one after the other: the peak is at least the present value.
            .map(|peak| peak.max(rss_bytes));
        Some(Self {
            rss_bytes,
            rss_peak_bytes,
            private_bytes,
            cpu_user_seconds: seconds(time.user_time()),
            cpu_system_seconds: seconds(time.system_time()),
        })
    }
}

/// Resident memory from the text of a `/proc/PID/smaps_rollup`.
pub fn rss_of_rollup(smaps_rollup: &str) -> Option<u64> {
    text::kilobytes_of(smaps_rollup, "Rss")
}

/// Resident memory from the text of a `/proc/PID/status`: the kernel's running count.
pub fn rss_of_status(status: &str) -> Option<u64> {
    text::kilobytes_of(status, "VmRSS")
}

/// Resident and private bytes from `/proc/self/statm`, which counts pages.
fn resident(statm: &str, page_bytes: u64) -> Option<(u64, u64)> {
    match *text::numbers(statm)? {
        [_, resident, shared, ..] => Some((
            resident.checked_mul(page_bytes)?,
            resident.saturating_sub(shared).checked_mul(page_bytes)?,
        )),
        _ => None,
    }
}

fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statm_counts_pages() {
        assert_eq!(resident("765 433 405 5 0 123 0\n", 4096), Some((433 * 4096, 28 * 4096)));
        assert_eq!(resident("1 2 3", 4096), Some((8192, 0)));
        for text in ["", "1 2", "a b c", "1 18446744073709551615 0"] {
            assert_eq!(resident(text, 4096), None, "{text}");
        }
    }

    #[test]
    fn resident_memory_is_counted_to_the_page() {
        let rollup = || {
            let text = text::read("/proc/self/smaps_rollup").expect("this process may read itself");
            text::kilobytes_of(&text, "Rss").expect("the kernel has it since 4.14")
        };
        let reads = |_| {
            let before = rollup();
            let rss_bytes = ProcessUsage::read().expect("this process may read itself").rss_bytes;
            (before, rss_bytes, rollup())
        };
        // Other tests of this process allocate and free memory at the same time.
        let is_between = |(before, rss_bytes, after): (u64, u64, u64)| {
            (before.min(after)..=before.max(after)).contains(&rss_bytes)
        };
        assert!((0..1_000).map(reads).any(is_between));
    }

    #[test]
    fn touched_memory_is_seen() {
        let before = ProcessUsage::read().expect("this process may read itself");
        let touched = vec![1_u8; 32 << 20];
        let after = ProcessUsage::read().expect("this process may read itself");
        assert!(touched.iter().all(|&byte| byte == 1));
        assert!(after.private_bytes >= before.private_bytes + (24 << 20), "{before:?} {after:?}");
        assert!(after.rss_peak_bytes >= Some(after.rss_bytes), "{after:?}");
        assert!(after.cpu_user_seconds >= before.cpu_user_seconds, "{before:?} {after:?}");
    }
}
