//! A memory cgroup of a row's own, version 1 or 2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::getpid;

use crate::skipped::Skipped;

const CGROUPS: &str = "/sys/fs/cgroup";

/// A process that has ended leaves its group a moment later.
const REMOVALS_MAX: u32 = 100;

/// The files of a version: the limit, the peak, and the kills.
#[derive(Debug)]
struct Names {
    limit: &'static str,
    peak: &'static str,
    events: &'static str,
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
};
const VERSION_2: Names =
    Names { limit: "memory.max", peak: "memory.peak", events: "memory.events" };

/// A memory cgroup; removed when dropped.
#[derive(Debug)]
pub(crate) struct MemoryCgroup {
    path: PathBuf,
    names: &'static Names,
}

impl MemoryCgroup {
    /// # Errors
    /// [`Skipped`] where none can be made.
    pub(crate) fn new(limit_bytes: u64) -> Result<Self> {
        let version_1 = Path::new(CGROUPS).join("memory");
        let (root, names) = match version_1.is_dir() {
            true => (version_1, &VERSION_1),
            false => (PathBuf::from(CGROUPS), &VERSION_2),
        };
        let cgroup = Self { path: root.join(format!("c1000k-faults-{}", getpid())), names };
        cgroup
            .make(limit_bytes)
            .map_err(|why| Skipped(format!("no memory cgroup can be made here: {why}")))?;
        Ok(cgroup)
    }

    fn make(&self, limit_bytes: u64) -> io::Result<()> {
        fs::create_dir(&self.path)?;
        fs::write(self.path.join(self.names.limit), limit_bytes.to_string())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Processes of it that were killed for want of memory.
    pub(crate) fn kills(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(self.names.events))?;
        let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        value.context("the cgroup does not count its kills")?.trim().parse().context("oom_kill")
    }

    /// `None` where the kernel does not keep it.
    pub(crate) fn peak_bytes(&self) -> Option<u64> {
        fs::read_to_string(self.path.join(self.names.peak)).ok()?.trim().parse().ok()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        for _ in 0..REMOVALS_MAX {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    thread::sleep(Duration::from_millis(100));
                }
                _ => return,
            }
        }
    }
}
