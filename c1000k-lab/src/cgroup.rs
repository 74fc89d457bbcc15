//! A memory cgroup of version 1 or 2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::getpid;

use crate::faults::Skipped;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Attempts to remove it: a process leaves its cgroup a moment after its end.
const REMOVALS_MAX: u32 = 100;

/// A memory cgroup; removed when dropped.
#[derive(Debug)]
pub(crate) struct MemoryCgroup {
    path: PathBuf,
    /// The names of the files with its limit, its peak and its number of kills.
    files: [&'static str; 3],
}

impl MemoryCgroup {
    /// # Errors
    /// [`Skipped`] if none can be created.
    pub(crate) fn new(limit_bytes: u64) -> Result<Self> {
        let version_1 = Path::new(CGROUPS).join("memory");
        let (root, files) = match version_1.is_dir() {
            true => {
                let files =
                    ["memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"];
                (version_1, files)
            }
            false => (PathBuf::from(CGROUPS), ["memory.max", "memory.peak", "memory.events"]),
        };
        let cgroup = Self { path: root.join(format!("c1000k-faults-{}", getpid())), files };
        fs::create_dir(&cgroup.path)
            .and_then(|()| fs::write(cgroup.path.join(files[0]), limit_bytes.to_string()))
            .map_err(|why| Skipped(format!("no memory cgroup can be created here: {why}")))?;
        Ok(cgroup)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How many of its processes the OOM killer killed.
    pub(crate) fn kills(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(self.files[2]))?;
        let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        value.context("the cgroup does not count OOM kills")?.trim().parse().context("oom_kill")
    }

    /// `None` if the kernel does not record it.
    pub(crate) fn peak_bytes(&self) -> Option<u64> {
        fs::read_to_string(self.path.join(self.files[1])).ok()?.trim().parse().ok()
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
