//! A table of the kernel runs out under load.

use anyhow::Result;

use super::check::Must::{BeAtLeast, BeAtMost};
use super::scene::{PATIENT, ROOT, Scene, USER_2, USER_3, USER_4};
use crate::guest::order::Condition;

/// fs.epoll.max_user_watches, which binds root too: each client is a user of its own.
pub(super) fn watches(scene: &mut Scene<'_>) -> Result<()> {
    let lower = "echo 1000 >/proc/sys/fs/epoll/max_user_watches";
    let wakes = lower_under_load(scene, lower, [USER_2, USER_3, USER_4])?;
    judge(scene, "ENOSPC", wakes)
}

/// fs.file-max, which does not bind root: the clients are root, so only the server meets it.
pub(super) fn files(scene: &mut Scene<'_>) -> Result<()> {
    let lower = "echo $(($(cut -f 1 /proc/sys/fs/file-nr) + 100)) >/proc/sys/fs/file-max";
    let wakes = lower_under_load(scene, lower, [ROOT; 3])?;
    judge(scene, "ENFILE", wakes)
}

/// Two clients hold their connections, a third is connecting when the command takes the server's room away, and a fourth
/// connects when all are closed. Returns how often a second the server woke up.
fn lower_under_load(scene: &mut Scene<'_>, command: &str, users: [u32; 3]) -> Result<u64> {
    scene.start_server(None, "")?;
    for (name, user) in [("first", users[0]), ("second", users[1])] {
        scene.start_client(name, user, 1_500, PATIENT)?;
        scene.freeze(name, 300)?;
    }
    scene.start_client("third", users[2], 5_000, "--connect-timeout 10s --rate 100")?;
    scene.wait(Condition::says("third", "target"), 60)?;
    scene.run(command)?;
    let wakes = scene.server_wakes()?;
    scene.await_end("third", 300)?;
    scene.resume("first")?;
    scene.resume("second")?;
    scene.await_end("first", 300)?;
    scene.await_end("second", 300)?;
    scene.drained(120)?;
    scene.start_client("fourth", users[2], 400, PATIENT)?;
    scene.await_end("fourth", 300)?;
    scene.drained(120)?;
    scene.end_server()?;
    scene.collect()?;
    Ok(wakes)
}

fn judge(scene: &mut Scene<'_>, errno: &str, wakes: u64) -> Result<()> {
    scene.expect_survived()?;
    scene.expect_all("first")?;
    scene.expect_all("second")?;
    scene.expect_short("third")?;
    let held = scene.client("third")?.established;
    scene.checks.expect("third: held", held, BeAtMost(2_000))?;
    scene.expect_all("fourth")?;
    // Errors that did not occur are not in the table.
    let failed = scene.server()?.accept_errors.get(errno).copied().unwrap_or(0);
    let what = format!("server: accepts that failed with {errno}");
    scene.checks.expect(&what, failed, BeAtLeast(1))?;
    scene.expect_few_wakes("peers waited to connect", wakes)
}
