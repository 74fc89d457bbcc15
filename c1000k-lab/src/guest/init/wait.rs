//! What an order may wait for.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use c1000k_host::usage::SocketUsage;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use procfs::{Current, Meminfo};

use super::OUT;
use super::programs::{Program, Programs, last_words};
use crate::guest::order::Condition;

/// Sockets that get no fewer for so long stay.
const STALL: Duration = Duration::from_secs(20);

/// What a client says when it has opened all that it could.
const HOLDING: &str = "holding ";

/// Gives the answer once the condition holds.
pub(super) type Look = Box<dyn FnMut(&Programs) -> Result<Option<String>>>;

pub(super) fn look_for(condition: Condition, programs: &Programs) -> Result<Look> {
    Ok(match condition {
        Condition::Says { name, words } => {
            Box::new(move |programs| said(programs.named(&name)?, &words))
        }
        Condition::Holds(name) => Box::new(move |programs| {
            let program = programs.named(&name)?;
            let said = said(program, HOLDING)?;
            if said.is_some() {
                program.process.signal(Signal::SIGSTOP)?;
            }
            Ok(said)
        }),
        Condition::Ended(name) => {
            Box::new(move |programs| Ok(programs.named(&name)?.code.map(|code| code.to_string())))
        }
        Condition::Drained { sockets_max } => Box::new(move |_| {
            let sockets = sockets_in_use()?;
            Ok((sockets <= sockets_max).then(|| sockets.to_string()))
        }),
        Condition::DrainedOrStalled { sockets_max } => {
            let (mut fewest, mut since) = (u64::MAX, Instant::now());
            Box::new(move |_| {
                let sockets = sockets_in_use()?;
                if sockets < fewest {
                    (fewest, since) = (sockets, Instant::now());
                }
                let is_over = sockets <= sockets_max || since.elapsed() > STALL;
                Ok(is_over.then(|| sockets.to_string()))
            })
        }
        Condition::Tracked { connections_max } => Box::new(move |_| {
            let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
            let count: u64 = count.trim().parse()?;
            Ok((count <= connections_max).then(|| count.to_string()))
        }),
        Condition::Wakes { name, seconds } => {
            let (before, since) = (wakes(programs.named(&name)?)?, Instant::now());
            Box::new(move |programs| {
                let passed = since.elapsed().as_secs();
                if passed < seconds {
                    return Ok(None);
                }
                let count = wakes(programs.named(&name)?)? - before;
                Ok(Some((count / passed.max(1)).to_string()))
            })
        }
    })
}

/// The first line of a log with these words.
fn said(program: &Program, words: &str) -> Result<Option<String>> {
    let (code, log) = (program.code, program.log()?);
    match (log.lines().find(|line| line.contains(words)), code) {
        (Some(line), _) => Ok(Some(line.to_owned())),
        (None, Some(code)) => {
            let last = last_words(&log);
            bail!("it ended with code {code} and did not say '{words}', but: {last}")
        }
        (None, None) => Ok(None),
    }
}

/// In this network namespace.
fn sockets_in_use() -> Result<u64> {
    Ok(SocketUsage::read().context("no count of sockets")?.tcp_inuse)
}

/// How often a program has waited so far.
fn wakes(program: &Program) -> Result<u64> {
    let status = procfs::process::Process::new(program.process.pid().as_raw())?.status()?;
    status.voluntary_ctxt_switches.context("no count of switches")
}

/// Writes down how many files are open here, the process's memory in kB, and the kernel's slabs in kB, until it has
/// ended. To list 300,000 descriptors would itself take memory and time.
pub(super) fn sample(pid: Pid, every: Duration) -> Result<()> {
    let mut log = fs::File::create(format!("{OUT}/samples.log"))?;
    let process = procfs::process::Process::new(pid.as_raw())?;
    let began = Instant::now();
    while let Some(rss_kb) = process.status()?.vmrss {
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files.split_whitespace().next().unwrap_or_default();
        let slab_kb = Meminfo::current()?.slab >> 10;
        writeln!(log, "{:.2} {files} {rss_kb} {slab_kb}", began.elapsed().as_secs_f64())?;
        std::thread::sleep(every);
    }
    Ok(())
}
