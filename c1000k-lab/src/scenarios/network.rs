//! The network loses packets, or no longer tracks connections.

use std::time::Instant;

use anyhow::{Context, Result};

use super::check::Must::{BeAtLeast, BeAtMost, Equal};
use super::scene::{ROOT, Scene, USER_2, proven_again};
use crate::guest::order::Condition;
use crate::record::Limit;

/// Each way loses 3 of 10 packets and takes 200 ms.
pub(super) fn loss(scene: &mut Scene<'_>) -> Result<()> {
    scene.start_server(None, "--keepalive 10s --tcp-user-timeout 60s")?;
    scene.run("insmod /lib/sch_netem.ko")?;
    scene.run("/bin/tc qdisc add dev lo root netem delay 200ms loss 30% limit 100000")?;
    let began = Instant::now();
    scene.start_client("first", USER_2, 2_000, "")?;
    scene.await_end("first", 600)?;
    let took = began.elapsed().as_secs();
    // A reset that is lost is not sent again: it is keepalive that finds such connections.
    scene.drained(300)?;
    scene.run("ip link set lo down; /bin/tc qdisc del dev lo root; ip link set lo up")?;
    scene.start_client("second", USER_2, 2_000, "")?;
    scene.await_end("second", 300)?;
    scene.drained(120)?;
    scene.end_server()?;
    scene.collect()?;

    scene.expect_survived()?;
    let first = scene.client("first")?;
    let (held, again) = (first.established, proven_again(&first)?);
    let is_short = held != 2_000 || again != 2_000;
    let (what, code) =
        ("first: exit code, 1 as not all were reached and proven", scene.code("first")?);
    let timed_out = first.failures.get("ETIMEDOUT").copied().unwrap_or(0);
    let checks = &mut scene.checks;
    checks.expect(what, code, Equal(is_short.into()))?;
    checks.expect("first: held", held, BeAtLeast(1))?;
    checks.expect("first: held and given up", held + first.failed, Equal(2_000))?;
    checks.expect("first: proven again and lost", again + first.lost, Equal(held))?;
    let what = "first: attempts, at most 4 for each connection";
    checks.expect(what, first.attempted, BeAtMost(8_000))?;
    checks.expect("first: attempts that timed out", timed_out, BeAtLeast(1))?;
    checks.expect("first: seconds it took", took, BeAtMost(300))?;
    scene.expect_all("second")
}

/// The network loses 5% of what the server sends to clients without sockets.
pub(super) fn stateless(scene: &mut Scene<'_>) -> Result<()> {
    scene.run("insmod /lib/sch_netem.ko && insmod /lib/tun.ko")?;
    scene.start_server(None, "")?;
    let options = "--stateless --connect-timeout 120s --rate 500/s --heartbeat 5s";
    scene.start_client("first", ROOT, 3_000, options)?;
    // The device is the client's.
    scene.run(
        "for try in $(seq 100); do \
         /bin/tc qdisc add dev tun0 root netem loss 5% limit 100000 2>/dev/null && exit; sleep 0.1; done; exit 1",
    )?;
    scene.await_end("first", 300)?;
    // Each reset was confirmed.
    scene.drained(10)?;
    scene.end_server()?;
    scene.collect()?;

    scene.expect_survived()?;
    scene.expect_all("first")?;
    let first = scene.client("first")?;
    let resent = first.retransmitted.unwrap_or(0);
    let workload = first.workload.context("the record has no workload")?;
    let checks = &mut scene.checks;
    checks.expect("first: segments sent again", resent, BeAtLeast(200))?;
    checks.expect("first: messages answered", workload.answered, Equal(workload.sent))
}

/// The table of tracked connections is full: new packets are dropped without an answer.
pub(super) fn conntrack(scene: &mut Scene<'_>) -> Result<()> {
    scene.start_server(None, "")?;
    scene.run(
        "insmod /lib/libcrc32c.ko && insmod /lib/nf_defrag_ipv4.ko && insmod /lib/nf_defrag_ipv6.ko && \
         insmod /lib/nf_conntrack.ko enable_hooks=1 && echo 2000 >/proc/sys/net/netfilter/nf_conntrack_max",
    )?;
    scene.start_client("first", USER_2, 5_000, "--connect-timeout 5s")?;
    scene.await_end("first", 300)?;
    scene.drained(120)?;
    scene.wait(Condition::Tracked { connections_max: 200 }, 120)?;
    scene.start_client("second", USER_2, 1_500, "")?;
    scene.await_end("second", 300)?;
    scene.drained(120)?;
    scene.end_server()?;
    scene.collect()?;

    scene.expect_survived()?;
    scene.expect_code("first", 1)?;
    let first = scene.client("first")?;
    scene.checks.expect("first: held", first.established, BeAtLeast(1_900))?;
    scene.expect_alive("first")?;
    scene.expect_limit("first", Limit::Network)?;
    let what = "first: attempts, at most 4 for each connection";
    scene.checks.expect(what, first.attempted, BeAtMost(20_000))?;
    let lines = scene.kernel_lines(&["table full"])?;
    scene.checks.expect("kernel: messages that the table is full", lines, BeAtLeast(1))?;
    scene.expect_all("second")
}
