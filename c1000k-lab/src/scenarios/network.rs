//! The network loses packets, or its connection tracking table is full.

use std::time::Instant;

use anyhow::{Context, Result};

use super::check::Must::{BeAtLeast, BeAtMost, Equal};
use super::run::{ROOT, Run, USER_2, verified_again};
use crate::guest::request::Condition;
use crate::record::Limit;

/// Each direction loses 30% of the packets and delays them by 200 ms.
pub(super) fn loss(run: &mut Run<'_>) -> Result<()> {
    run.start_server(None, "--keepalive 10s --tcp-user-timeout 60s")?;
    run.shell("insmod /lib/sch_netem.ko")?;
    run.shell("/bin/tc qdisc add dev lo root netem delay 200ms loss 30% limit 100000")?;
    let began = Instant::now();
    run.start_client("first", USER_2, 2_000, "")?;
    run.await_end("first", 600)?;
    let took = began.elapsed().as_secs();
    // A lost reset is not retransmitted; keepalive detects such connections.
    run.drained(300)?;
    run.shell("ip link set lo down; /bin/tc qdisc del dev lo root; ip link set lo up")?;
    run.start_client("second", USER_2, 2_000, "")?;
    run.await_end("second", 300)?;
    run.drained(120)?;
    run.end_server()?;
    run.collect()?;

    run.expect_survived()?;
    let first = run.client("first")?;
    let (held, again) = (first.established, verified_again(&first)?);
    let is_short = held != 2_000 || again != 2_000;
    let code = run.code("first")?;
    let timed_out = first.failures.get("ETIMEDOUT").copied().unwrap_or(0);
    let checks = &mut run.checks;
    let what = "first: exit code, 1 if not all were opened and verified twice";
    checks.expect(what, code, Equal(is_short.into()))?;
    checks.expect("first: held", held, BeAtLeast(1))?;
    checks.expect("first: held and failed", held + first.failed, Equal(2_000))?;
    checks.expect("first: verified again and lost", again + first.lost, Equal(held))?;
    let what = "first: attempts, at most 4 for each connection";
    checks.expect(what, first.attempted, BeAtMost(8_000))?;
    checks.expect("first: attempts that timed out", timed_out, BeAtLeast(1))?;
    checks.expect("first: seconds until the end", took, BeAtMost(300))?;
    run.expect_all("second")
}

/// The network loses 5% of what the server sends to clients without sockets.
pub(super) fn stateless(run: &mut Run<'_>) -> Result<()> {
    run.shell("insmod /lib/sch_netem.ko && insmod /lib/tun.ko")?;
    run.start_server(None, "")?;
    let options = "--stateless --connect-timeout 120s --rate 500/s --heartbeat 5s";
    run.start_client("first", ROOT, 3_000, options)?;
    // The client creates the device.
    run.shell(
        "for try in $(seq 100); do \
         /bin/tc qdisc add dev tun0 root netem loss 5% limit 100000 2>/dev/null && exit; sleep 0.1; done; exit 1",
    )?;
    run.await_end("first", 300)?;
    // Each reset was confirmed.
    run.drained(10)?;
    run.end_server()?;
    run.collect()?;

    run.expect_survived()?;
    run.expect_all("first")?;
    let first = run.client("first")?;
    let resent = first.retransmitted.unwrap_or(0);
    let workload = first.workload.context("the record has no workload")?;
    let checks = &mut run.checks;
    checks.expect("first: segments retransmitted", resent, BeAtLeast(200))?;
    checks.expect("first: messages answered", workload.answered, Equal(workload.sent))
}

/// The connection tracking table is full: new packets are dropped without an answer.
pub(super) fn conntrack(run: &mut Run<'_>) -> Result<()> {
    run.start_server(None, "")?;
    run.shell(
        "insmod /lib/libcrc32c.ko && insmod /lib/nf_defrag_ipv4.ko && insmod /lib/nf_defrag_ipv6.ko && \
         insmod /lib/nf_conntrack.ko enable_hooks=1 && echo 2000 >/proc/sys/net/netfilter/nf_conntrack_max",
    )?;
    run.start_client("first", USER_2, 5_000, "--connect-timeout 5s")?;
    run.await_end("first", 300)?;
    run.drained(120)?;
    run.wait(Condition::Tracked { connections_max: 200 }, 120)?;
    run.start_client("second", USER_2, 1_500, "")?;
    run.await_end("second", 300)?;
    run.drained(120)?;
    run.end_server()?;
    run.collect()?;

    run.expect_survived()?;
    run.expect_code("first", 1)?;
    let first = run.client("first")?;
    run.checks.expect("first: held", first.established, BeAtLeast(1_900))?;
    run.expect_alive("first")?;
    run.expect_limit("first", Limit::Network)?;
    let what = "first: attempts, at most 4 for each connection";
    run.checks.expect(what, first.attempted, BeAtMost(20_000))?;
    let lines = run.kernel_lines(&["table full"])?;
    run.checks.expect("kernel: messages that the table is full", lines, BeAtLeast(1))?;
    run.expect_all("second")
}
