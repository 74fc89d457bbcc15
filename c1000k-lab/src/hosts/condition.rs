//! The conditions that a request may wait for.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::usage::SocketUsage;
use nix::sys::signal::Signal;

use super::agent::Programs;
use super::request::Condition;
use crate::process::Process;

/// What a client prints when it has opened all that it could.
const HOLDING: &str = "holding ";

/// Gives the reply once the condition holds.
pub(super) type Look = Box<dyn FnMut(&mut Programs) -> Result<Option<String>>>;

pub(super) fn look_for(condition: Condition, programs: &mut Programs) -> Result<Look> {
    Ok(match condition {
        Condition::Logged { name, words } => {
            Box::new(move |programs| programs.named(&name)?.logged(&words))
        }
        Condition::Holds(name) => Box::new(move |programs| {
            let program = programs.named(&name)?;
            let line = program.logged(HOLDING)?;
            if line.is_some() {
                // Its connections stay up meanwhile, for they are the kernel's.
                program.signal(Signal::SIGSTOP)?;
            }
            Ok(line)
        }),
        Condition::Ended(name) => Box::new(move |programs| {
            Ok(programs.named(&name)?.code()?.map(|code| code.to_string()))
        }),
        Condition::Drained { sockets_max, stall_seconds } => {
            let mut stall = Stall::new(Duration::from_secs(stall_seconds), Instant::now());
            Box::new(move |_| {
                // Of all network namespaces, with those that were reset and are not freed yet.
                let sockets = SocketUsage::read().context("no count of sockets")?.tcp_alloc;
                let is_over = stall.is_over(sockets, Instant::now()) || sockets <= sockets_max;
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

/// How often a program has gone to sleep so far.
fn wakes(program: &Process) -> Result<u64> {
    let status = procfs::process::Process::new(program.pid().as_raw())?.status()?;
    status.voluntary_ctxt_switches.context("no count of switches")
}

/// Other processes' sockets are in the kernel's count as well, so a wait for fewer ends when there have been no fewer for
/// a while.
struct Stall {
    after: Duration,
    fewest: u64,
    since: Instant,
}

impl Stall {
    fn new(after: Duration, now: Instant) -> Self {
        Self { after, fewest: u64::MAX, since: now }
    }

    fn is_over(&mut self, sockets: u64, now: Instant) -> bool {
        if sockets < self.fewest {
            (self.fewest, self.since) = (sockets, now);
        }
        now - self.since > self.after
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_goes_on_while_there_are_fewer_sockets() {
        let began = Instant::now();
        let mut stall = Stall::new(Duration::from_secs(5), began);
        // Those of the run are gone in 10 s; others come and go.
        let sockets = |second: u64| 5_000_u64.saturating_sub(500 * second) + second % 3;
        let is_over =
            |&second: &u64| stall.is_over(sockets(second), began + Duration::from_secs(second));
        assert_eq!((0..100).find(is_over), Some(18));
    }
}
