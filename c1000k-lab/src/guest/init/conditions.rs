//! The conditions that a request may wait for.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::usage::SocketUsage;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use procfs::{Current, Meminfo};

use super::OUT;
use super::programs::Programs;
use crate::guest::request::Condition;
use crate::million::teardown::Teardown;
use crate::soak::ServerSample;

/// The teardown ends if no socket has been closed for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// A client prints it when it has opened all connections that it could.
const HOLDING: &str = "holding ";

/// Returns the reply once the condition holds.
pub(super) type Poll = Box<dyn FnMut(&mut Programs) -> Result<Option<String>>>;

pub(super) fn poll_for(condition: Condition, programs: &mut Programs) -> Result<Poll> {
    Ok(match condition {
        Condition::Logged { name, text } => {
            Box::new(move |programs| programs.named(&name)?.process.find_in_log(&text))
        }
        Condition::Holds(name) => Box::new(move |programs| {
            let process = &mut programs.named(&name)?.process;
            let line = process.find_in_log(HOLDING)?;
            if line.is_some() {
                process.signal(Signal::SIGSTOP)?;
            }
            Ok(line)
        }),
        Condition::Ended(name) => {
            Box::new(move |programs| Ok(programs.named(&name)?.code.map(|code| code.to_string())))
        }
        Condition::Drained { sockets_max } => Box::new(move |_| {
            let sockets = sockets_in_use()?;
            Ok((sockets <= sockets_max).then(|| sockets.to_string()))
        }),
        Condition::DrainedOrStalled { sockets_max } => {
            let mut teardown = Teardown::new(sockets_max, STALL_TIMEOUT, Instant::now());
            Box::new(move |_| {
                let sockets = sockets_in_use()?;
                Ok(teardown.is_over(sockets, Instant::now()).then(|| sockets.to_string()))
            })
        }
        Condition::Tracked { connections_max } => Box::new(move |_| {
            let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
            let count: u64 = count.trim().parse()?;
            Ok((count <= connections_max).then(|| count.to_string()))
        }),
        Condition::Wakes { name, seconds } => {
            let (before, started) = (programs.named(&name)?.process.wakes()?, Instant::now());
            Box::new(move |programs| {
                let passed = started.elapsed().as_secs();
                if passed < seconds {
                    return Ok(None);
                }
                let count = programs.named(&name)?.process.wakes()? - before;
                Ok(Some((count / passed.max(1)).to_string()))
            })
        }
    })
}

/// In this network namespace.
fn sockets_in_use() -> Result<u64> {
    Ok(SocketUsage::read().context("no count of sockets")?.tcp_inuse)
}

/// Writes a sample to `samples.log` periodically until the process has ended. Counts the open files of the whole guest,
/// because listing 300,000 descriptors would take memory and time itself.
pub(super) fn sample(pid: Pid, every: Duration) -> Result<()> {
    let mut log = fs::File::create(format!("{OUT}/samples.log"))?;
    let process = procfs::process::Process::new(pid.as_raw())?;
    let began = Instant::now();
    while let Some(rss_kb) = process.status()?.vmrss {
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let sample = ServerSample {
            seconds: began.elapsed().as_secs_f64(),
            descriptors: files.split_whitespace().next().context("file-nr")?.parse()?,
            rss_bytes: rss_kb << 10,
            kernel_slab_bytes: Some(Meminfo::current()?.slab),
        };
        writeln!(log, "{}", serde_json::to_string(&sample)?)?;
        std::thread::sleep(every);
    }
    Ok(())
}
