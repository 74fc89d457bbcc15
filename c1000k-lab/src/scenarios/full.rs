//! A table of the kernel becomes full under load.

use anyhow::Result;

use super::check::Must::{BeAtLeast, BeAtMost};
use super::run::{LONG_CONNECT_TIMEOUT, ROOT, Run, USER_2, USER_3, USER_4};
use crate::guest::request::Condition;

/// fs.epoll.max_user_watches, which binds root too: each client has its own user.
pub(super) fn watches(run: &mut Run<'_>) -> Result<()> {
    let lower = "echo 1000 >/proc/sys/fs/epoll/max_user_watches";
    let wakes = lower_under_load(run, lower, [USER_2, USER_3, USER_4])?;
    check(run, "ENOSPC", wakes)
}

/// fs.file-max, which does not bind root: the clients are root, so it binds only the server.
pub(super) fn files(run: &mut Run<'_>) -> Result<()> {
    let lower = "echo $(($(cut -f 1 /proc/sys/fs/file-nr) + 100)) >/proc/sys/fs/file-max";
    let wakes = lower_under_load(run, lower, [ROOT; 3])?;
    check(run, "ENFILE", wakes)
}

/// Two clients hold their connections, a third one is connecting when the command lowers the limit, and a fourth one
/// connects after all have closed. Returns the server's wake-ups per second.
fn lower_under_load(run: &mut Run<'_>, command: &str, users: [u32; 3]) -> Result<u64> {
    run.start_server(None, "")?;
    for (name, user) in [("first", users[0]), ("second", users[1])] {
        run.start_client(name, user, 1_500, LONG_CONNECT_TIMEOUT)?;
        run.pause(name, 300)?;
    }
    run.start_client("third", users[2], 5_000, "--connect-timeout 10s --rate 100")?;
    run.wait(Condition::logged("third", "target"), 60)?;
    run.shell(command)?;
    let wakes = run.server_wakes()?;
    run.await_end("third", 300)?;
    run.resume("first")?;
    run.resume("second")?;
    run.await_end("first", 300)?;
    run.await_end("second", 300)?;
    run.drained(120)?;
    run.start_client("fourth", users[2], 400, LONG_CONNECT_TIMEOUT)?;
    run.await_end("fourth", 300)?;
    run.drained(120)?;
    run.end_server()?;
    run.collect()?;
    Ok(wakes)
}

fn check(run: &mut Run<'_>, errno: &str, wakes: u64) -> Result<()> {
    run.expect_survived()?;
    run.expect_all("first")?;
    run.expect_all("second")?;
    run.expect_short("third")?;
    let held = run.client("third")?.established;
    run.checks.expect("third: held", held, BeAtMost(2_000))?;
    run.expect_all("fourth")?;
    // Errors that did not occur are not in the table.
    let failed = run.server()?.accept_errors.get(errno).copied().unwrap_or(0);
    let what = format!("server: accepts that failed with {errno}");
    run.checks.expect(&what, failed, BeAtLeast(1))?;
    run.expect_few_wakes("peers waited to connect", wakes)
}
