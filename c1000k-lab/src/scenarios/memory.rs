//! Memory runs out: that of the server's machine, or of a cgroup.

use anyhow::{Context, Result};

use super::Settings;
use super::check::Must::{BeAtLeast, Equal, Exceed};
use super::scene::{PATIENT, SERVER, Scene, USER_2, USER_3};
use crate::guest::order::Condition;
use crate::guest::qemu::Spec;

/// A connection takes more memory than that, so more are asked for than fit.
const BYTES_PER_CONNECTION_ASKED: u64 = 3_000;

fn asked(settings: &Settings) -> u64 {
    (settings.memory_mb << 20) / BYTES_PER_CONNECTION_ASKED
}

/// The server's guest, and a somewhat larger one for clients.
pub(super) fn pair(settings: &Settings) -> Vec<Spec> {
    let (memory_mb, connections) = (settings.memory_mb, asked(settings));
    vec![
        Spec { name: "server", memory_mb, connections, end: 1, cables: &[1] },
        Spec { name: "client-1", memory_mb: memory_mb + 256, connections, end: 2, cables: &[1] },
    ]
}

/// Clients push past the memory of the server's machine, of which the original died.
pub(super) fn memory(scene: &mut Scene<'_>) -> Result<()> {
    let asked = asked(scene.settings);
    scene.start_server(None, "")?;
    let wakes = push_past_memory(scene, asked)?;
    scene.end_server()?;
    scene.collect()?;
    scene.expect_survived()?;
    judge_admission(scene, wakes)
}

/// Nested memory cgroups of version 2. The limit of the inner one is reached first; when all connections are closed, it is
/// raised, and that of the outer one is reached.
pub(super) fn cgroup(scene: &mut Scene<'_>) -> Result<()> {
    const OUTER: &str = "/sys/fs/cgroup/outer";
    const INNER: &str = "/sys/fs/cgroup/outer/inner";
    scene.run(&format!(
        "mount -t cgroup2 none /sys/fs/cgroup && mkdir -p {INNER} && \
         echo +memory >/sys/fs/cgroup/cgroup.subtree_control && \
         echo +memory >{OUTER}/cgroup.subtree_control && \
         echo 64M >{OUTER}/memory.max && echo 12M >{INNER}/memory.max"
    ))?;
    scene.start_server(Some(INNER), "")?;
    let wakes = push_past_memory(scene, 20_000)?;
    scene.run(&format!("echo 64M >{INNER}/memory.max; echo 16M >{OUTER}/memory.max"))?;
    scene.start_client("fourth", USER_3, 26_000, PATIENT)?;
    scene.await_end("fourth", 600)?;
    scene.drained(120)?;
    scene.end_server()?;
    let events = scene.run(&format!("cat {OUTER}/memory.events {INNER}/memory.events"))?;
    scene.collect()?;
    scene.expect_survived()?;
    scene.checks.expect("cgroups: processes killed", kills(&events)?, Equal(0))?;
    judge_admission(scene, wakes)?;
    scene.expect_short("fourth")?;
    let (first, fourth) = (scene.client("first")?, scene.client("fourth")?);
    scene.checks.expect("fourth: lost", fourth.lost, Equal(0))?;
    let what = "fourth: held, as the outer limit leaves more room";
    scene.checks.expect(what, fourth.established, Exceed(first.established))
}

/// The sum of all groups.
fn kills(events: &str) -> Result<u64> {
    let counts = events.lines().filter_map(|line| line.strip_prefix("oom_kill "));
    let counts: Vec<u64> = counts.map(|count| Ok(count.parse()?)).collect::<Result<_>>()?;
    (!counts.is_empty()).then(|| counts.iter().sum()).context("the groups count no kills")
}

/// More connect than fit, and more still while those that fit are held; when all are closed, a tenth of them must be
/// admitted. Returns how often a second the server woke up while it was full.
fn push_past_memory(scene: &mut Scene<'_>, asked: u64) -> Result<u64> {
    // An emulated guest opens, proves and closes some thousands a second.
    let patience = 600 + asked / 200;
    scene.snapshot("before")?;
    scene.start_client("first", USER_2, asked, PATIENT)?;
    scene.freeze("first", patience)?;
    scene.snapshot("peak")?;
    scene.start_client("second", USER_2, 5_000, PATIENT)?;
    scene.await_end("second", 600)?;
    let wakes = scene.server_wakes()?;
    scene.resume("first")?;
    scene.await_end("first", patience)?;
    scene.drained(patience)?;
    scene.wait(Condition::says(SERVER, "memory is back"), 60)?;
    let tenth = scene.established("first")? / 10;
    scene.start_client("third", USER_2, tenth, PATIENT)?;
    scene.await_end("third", patience)?;
    scene.drained(patience)?;
    scene.snapshot("after")?;
    Ok(wakes)
}

fn judge_admission(scene: &mut Scene<'_>, wakes: u64) -> Result<()> {
    scene.expect_short("first")?;
    scene.expect_alive("first")?;
    scene.expect_short("second")?;
    scene.expect_all("third")?;
    let (server, first) = (scene.server()?, scene.client("first")?);
    let guard = server.memory_guard.context("the server watched no memory")?;
    // Reasons that did not occur are not in the table.
    let refused = server.refused_by.get("memory").copied().unwrap_or(0);
    let checks = &mut scene.checks;
    checks.expect("server: times that it refused for memory", guard.closings, BeAtLeast(1))?;
    checks.expect("server: refused for memory", refused, BeAtLeast(200))?;
    // The reserve is for connects that are under way when it starts to refuse, and for data.
    let what = "server: least memory left, kB, at least half of the reserve";
    checks.expect(what, guard.room_min_bytes >> 10, BeAtLeast(guard.reserve_bytes >> 11))?;
    checks.expect("server: held at the peak", server.peak, BeAtLeast(first.established))?;
    scene.expect_few_wakes("it was full", wakes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_of_all_groups_are_added_and_none_is_an_error() {
        assert_eq!(kills("oom 3\noom_kill 1\noom_group_kill 0\noom 4\noom_kill 2\n").unwrap(), 3);
        assert!(kills("low 0\n").is_err());
    }
}
