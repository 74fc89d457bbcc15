//! Divides a server's CPU time into user and system time.
//!
//! The kernel samples once per clock tick (4 ms here), which is far too coarse for a user time of a few milliseconds.
//! `perf record` samples 5,000 times a second, and the exact total is divided in the proportion of its samples. If perf
//! is not available, the clock tick is used.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::process::wait_until;

/// Chosen so that samples are not synchronous with a timer.
const SAMPLES_PER_SECOND: &str = "4999";

/// A perf process that samples a server.
#[derive(Debug)]
pub(crate) struct Sampler {
    perf: Child,
    data: PathBuf,
}

/// A sample: its time, and whether it was in the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) at_ns: u64,
    pub(crate) in_kernel: bool,
}

/// The current time on the clock of the samples.
pub(crate) fn now_ns() -> io::Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Whether perf can sample here.
pub(crate) fn is_available() -> bool {
    let ran = Command::new("perf")
        .args(["record", "-q", "-e", "cpu-clock", "-o", "/dev/null", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    ran.is_ok_and(|status| status.success())
}

impl Sampler {
    /// Attaches perf to a process.
    pub(crate) fn start(id: u32, folder: &Path) -> io::Result<Self> {
        let data = folder.join("perf.data");
        let perf = Command::new("perf")
            .args(["record", "-q", "-k", "CLOCK_MONOTONIC", "-e", "cpu-clock"])
            .args(["-F", SAMPLES_PER_SECOND, "-p", &id.to_string(), "-o"])
            .arg(&data)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let sampler = Self { perf, data };
        wait_until("perf does not attach", || Ok(sampler.is_attached()))?;
        Ok(sampler)
    }

    fn is_attached(&self) -> bool {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.perf.id())) else {
            return false;
        };
        entries
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|target| target.to_string_lossy().contains("perf_event"))
    }

    /// Detaches and returns the samples.
    pub(crate) fn stop(mut self) -> io::Result<Vec<Sample>> {
        kill(Pid::from_raw(self.perf.id() as i32), Signal::SIGINT)?;
        self.perf.wait()?;
        let script = Command::new("perf")
            .args(["script", "--ns", "-F", "time,ip", "-i"])
            .arg(&self.data)
            .stderr(Stdio::null())
            .output()?;
        Ok(String::from_utf8_lossy(&script.stdout).lines().filter_map(sample).collect())
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// Parses a line like `12345.678901234:  ffffffff81000000`.
fn sample(line: &str) -> Option<Sample> {
    let (time, ip) = line.split_once(':')?;
    let (seconds, fraction) = time.trim().split_once('.')?;
    let at_ns = seconds.parse::<u64>().ok()? * 1_000_000_000 + fraction.parse::<u64>().ok()?;
    // Kernel addresses have the highest bit set.
    let in_kernel = u64::from_str_radix(ip.trim().split(' ').next()?, 16).ok()? >> 63 == 1;
    Some(Sample { at_ns, in_kernel })
}
