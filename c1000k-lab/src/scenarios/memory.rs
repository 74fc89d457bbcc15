//! Memory runs out: the machine's, or a cgroup's.

use anyhow::{Context, Result};

use super::Settings;
use super::check::Must::{BeAtLeast, Equal, Exceed};
use super::run::{LONG_CONNECT_TIMEOUT, Run, SERVER, USER_2, USER_3};
use crate::guest::qemu::Spec;
use crate::guest::request::Condition;

/// A connection takes more memory, so more are requested than fit.
const BYTES_PER_CONNECTION_REQUESTED: u64 = 3_000;

fn requested(settings: &Settings) -> u64 {
    (settings.memory_mb << 20) / BYTES_PER_CONNECTION_REQUESTED
}

/// The server's guest, and a somewhat larger one for clients.
pub(super) fn pair(settings: &Settings) -> Vec<Spec> {
    let (memory_mb, connections) = (settings.memory_mb, requested(settings));
    vec![
        Spec { name: "server", memory_mb, connections, end: 1, cables: &[1] },
        Spec { name: "client-1", memory_mb: memory_mb + 256, connections, end: 2, cables: &[1] },
    ]
}

/// Clients exceed the memory of the server's machine, which killed the original server.
pub(super) fn memory(run: &mut Run<'_>) -> Result<()> {
    let requested = requested(run.settings);
    run.start_server(None, "")?;
    let wakes = exceed_memory(run, requested)?;
    run.end_server()?;
    run.collect()?;
    run.expect_survived()?;
    check_admission(run, wakes)
}

/// Nested memory cgroups of version 2. First the inner limit is reached; after all connections have closed, it is
/// raised, and the outer limit is reached.
pub(super) fn cgroup(run: &mut Run<'_>) -> Result<()> {
    const OUTER: &str = "/sys/fs/cgroup/outer";
    const INNER: &str = "/sys/fs/cgroup/outer/inner";
    run.shell(&format!(
        "mount -t cgroup2 none /sys/fs/cgroup && mkdir -p {INNER} && \
         echo +memory >/sys/fs/cgroup/cgroup.subtree_control && \
         echo +memory >{OUTER}/cgroup.subtree_control && \
         echo 64M >{OUTER}/memory.max && echo 12M >{INNER}/memory.max"
    ))?;
    run.start_server(Some(INNER), "")?;
    let wakes = exceed_memory(run, 20_000)?;
    run.shell(&format!("echo 64M >{INNER}/memory.max; echo 16M >{OUTER}/memory.max"))?;
    run.start_client("fourth", USER_3, 26_000, LONG_CONNECT_TIMEOUT)?;
    run.await_end("fourth", 600)?;
    run.drained(120)?;
    run.end_server()?;
    let events = run.shell(&format!("cat {OUTER}/memory.events {INNER}/memory.events"))?;
    run.collect()?;
    run.expect_survived()?;
    run.checks.expect("cgroups: processes killed", kills(&events)?, Equal(0))?;
    check_admission(run, wakes)?;
    run.expect_short("fourth")?;
    let (first, fourth) = (run.client("first")?, run.client("fourth")?);
    run.checks.expect("fourth: lost", fourth.lost, Equal(0))?;
    let what = "fourth: held, as the outer limit leaves more room";
    run.checks.expect(what, fourth.established, Exceed(first.established))
}

/// The sum of all cgroups.
fn kills(events: &str) -> Result<u64> {
    let counts = events.lines().filter_map(|line| line.strip_prefix("oom_kill "));
    let counts: Vec<u64> = counts.map(|count| Ok(count.parse()?)).collect::<Result<_>>()?;
    (!counts.is_empty()).then(|| counts.iter().sum()).context("the cgroups do not count OOM kills")
}

/// More connections open than fit, and further ones while these are held; after all have closed, a tenth of the number
/// must be admitted. Returns the server's wake-ups per second while it was full.
fn exceed_memory(run: &mut Run<'_>, requested: u64) -> Result<u64> {
    // An emulated guest opens, verifies and closes some thousands per second.
    let timeout = 600 + requested / 200;
    run.snapshot("before")?;
    run.start_client("first", USER_2, requested, LONG_CONNECT_TIMEOUT)?;
    run.pause("first", timeout)?;
    run.snapshot("peak")?;
    run.start_client("second", USER_2, 5_000, LONG_CONNECT_TIMEOUT)?;
    run.await_end("second", 600)?;
    let wakes = run.server_wakes()?;
    run.resume("first")?;
    run.await_end("first", timeout)?;
    run.drained(timeout)?;
    run.wait(Condition::logged(SERVER, "memory is available again"), 60)?;
    let tenth = run.established("first")? / 10;
    run.start_client("third", USER_2, tenth, LONG_CONNECT_TIMEOUT)?;
    run.await_end("third", timeout)?;
    run.drained(timeout)?;
    run.snapshot("after")?;
    Ok(wakes)
}

fn check_admission(run: &mut Run<'_>, wakes: u64) -> Result<()> {
    run.expect_short("first")?;
    run.expect_alive("first")?;
    run.expect_short("second")?;
    run.expect_all("third")?;
    let (server, first) = (run.server()?, run.client("first")?);
    let guard = server.memory_guard.context("the record has no memory guard")?;
    // Reasons that did not occur are not in the table.
    let refused = server.refused_by.get("memory").copied().unwrap_or(0);
    let checks = &mut run.checks;
    checks.expect("server: times that it refused for memory", guard.closings, BeAtLeast(1))?;
    checks.expect("server: refused for memory", refused, BeAtLeast(200))?;
    // The reserve is for connects that are in flight when it starts to refuse, and for data.
    let what = "server: least memory left, kB, at least half of the reserve";
    checks.expect(what, guard.room_min_bytes >> 10, BeAtLeast(guard.reserve_bytes >> 11))?;
    checks.expect("server: held at the peak", server.peak, BeAtLeast(first.established))?;
    run.expect_few_wakes("it was full", wakes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_of_all_cgroups_are_added_and_no_count_is_an_error() {
        assert_eq!(kills("oom 3\noom_kill 1\noom_group_kill 0\noom 4\noom_kill 2\n").unwrap(), 3);
        assert!(kills("low 0\n").is_err());
    }
}
