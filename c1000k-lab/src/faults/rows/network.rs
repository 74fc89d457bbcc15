//! The network or the machines of the peers fail.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::json;

use super::many::{record_path, start_client};
use crate::faults::run::{Run, require_descriptors};
use crate::load::{Load, State};
use crate::namespace::Namespace;
use crate::record::{ClientRecord, Verdict, client as client_record};
use crate::server::{Server, Setup};
use crate::sockets::is_admitted;
use crate::syn;
use crate::wait::sleep;

pub(super) fn full_accept_queue(run: &mut Run<'_>) -> Result<()> {
    let count = require_descriptors(5_000)?;
    let namespace = Namespace::new()?;
    let server = serve_in(run, &namespace, &["--backlog", "16"])?;
    let mut load = Load::new(server.ports())?;
    server.process.signal(Signal::SIGSTOP)?;
    load.connect_many(count)?;
    load.run_for(Duration::from_secs(2))?;
    server.process.signal(Signal::SIGCONT)?;
    let is_over = |load: &Load| load.open() >= count || load.failed() > 0;
    let took = load.run_until(Duration::from_secs(60), is_over)?;
    run.figure("open", load.open());
    run.seconds("recovered_seconds", took);
    run.check("all are admitted in the end", load.open() == count);
    drop(load);
    let record = run.end_delayed(server)?;
    let counter = |name: &str| record.counters.get(name).copied();
    let (overflows, drops) = (counter("ListenOverflows"), counter("ListenDrops"));
    run.figures(json!({"listen_overflows": overflows, "listen_drops": drops}));
    let is_counted = overflows.is_some_and(|count| count > 0);
    run.check("the overflow is in the record", is_counted);
    Ok(())
}

fn serve_in(run: &Run<'_>, namespace: &Namespace, arguments: &[&str]) -> Result<Server> {
    run.serve_as(&Setup { arguments, namespace: Some(namespace), ..Setup::default() })
}

pub(super) fn syn_flood(run: &mut Run<'_>) -> Result<()> {
    let namespace = Namespace::new()?;
    let server = serve_in(run, &namespace, &[])?;
    let before = server.descriptors()?;
    let SocketAddr::V4(target) = server.address(0) else { bail!("no IPv4 address") };
    let started = Instant::now();
    let flood = thread::spawn(move || syn::flood(target, 50_000));
    let (mut admitted, mut tried) = (0, 0);
    while !flood.is_finished() {
        admitted += usize::from(is_admitted(server.address(tried)));
        tried += 1;
        sleep(Duration::from_millis(50))?;
    }
    flood.join().map_err(|_| anyhow!("the flood panicked"))??;
    run.seconds("flood_seconds", started.elapsed());
    run.figures(json!({"got_in": admitted, "tried": tried}));
    let are_admitted = tried > 0 && admitted as f64 >= 0.9 * tried as f64;
    run.check("others are admitted during the flood", are_admitted);
    run.check("others are admitted after the flood", is_admitted(server.address(0)));
    run.check_all_closed(&server, before)?;
    let cookies = namespace.counter("SyncookiesSent")?;
    run.figure("syn_cookies_sent", cookies);
    run.figure("request_queue_full", namespace.counter("TCPReqQFullDoCookies")?);
    let dropped = namespace.counter("TCPReqQFullDrop")?;
    run.check("the kernel counts a flood", cookies + dropped > 0);
    run.end(server).map(drop)
}

pub(super) fn link_down(run: &mut Run<'_>) -> Result<()> {
    let namespace = Namespace::new()?;
    let server = serve_in(run, &namespace, &[])?;
    let mut load = Load::new(server.ports())?;
    load.add(500)?;
    let (_folder, path) = record_path()?;
    let arguments = ["-c", "2000", "--rate", "500", "--hold", "2s", "--json", &path];
    let mut client = start_client(run, &server, &arguments)?;
    sleep(Duration::from_millis(1_500))?;
    namespace.link_down()?;
    let slots = load.send_all()?;
    load.run_for(Duration::from_secs(5))?;
    let is_silent = slots.len() == 500 && load.count(State::Waiting) == 500;
    run.check("nothing comes back while the link is down", is_silent);
    namespace.link_up()?;
    let started = Instant::now();
    run.check("all echo again", load.await_echoes(&slots, Duration::from_secs(60))? == 500);
    run.seconds("echoing_again_seconds", started.elapsed());
    let code = client.wait(Duration::from_secs(90))?;
    let record = client_record(path.as_ref())?;
    let ClientRecord { established, verified, failed, retried, verdict, .. } = record;
    run.figures(json!({"client_exit": code, "established": established, "verified": verified}));
    run.figures(json!({"failed": failed, "retried": retried}));
    run.counts("failures", &record.failures);
    run.figure("verdict", verdict.to_string());
    let is_reached = code == 0;
    let is_verdict = is_reached == (verdict == Verdict::Reached);
    run.check("the client's exit code is its verdict", is_verdict);
    // A connect during that time is retried, or ends the ramp if the kernel reports EHOSTUNREACH.
    let adds_up = match is_reached {
        true => established == 2_000 && verified == Some(2_000),
        false => failed > 0 && record.failures.values().sum::<u64>() == failed,
    };
    run.check("the client's figures add up", adds_up);
    drop(load);
    run.end_delayed(server).map(drop)
}

pub(super) fn peer_machine_gone(run: &mut Run<'_>) -> Result<()> {
    let namespace = Namespace::new()?;
    let probing = serve_in(run, &namespace, &["--keepalive", "1s"])?;
    let answering = run.serve_as(&Setup {
        arguments: &["--tcp-user-timeout", "3s"],
        namespace: Some(&namespace),
        first_port: Some(probing.all_ports.first + 50),
        has_no_bystander: true,
        ..Setup::default()
    })?;
    machine_vanishes(run, &namespace, &probing, &answering)?;
    let aborted = namespace.counter("TCPAbortOnTimeout")?;
    run.figure("tcp_abort_on_timeout", aborted);
    run.check("the kernel counts each of them", aborted == 1_000);
    let record = run.end(probing)?;
    run.counts("closed_by", &record.closed_by);
    run.check(
        "the record counts each of the silent peers",
        record.closed_by.get("tcp_timeout") == Some(&500),
    );
    Ok(())
}

fn machine_vanishes(
    run: &mut Run<'_>,
    namespace: &Namespace,
    probing: &Server,
    answering: &Server,
) -> Result<()> {
    let (mut silent, mut asking) = (Load::new(probing.ports())?, Load::new(answering.ports())?);
    let before = [probing.descriptors()?, answering.descriptors()?];
    silent.add(500)?;
    asking.add(500)?;
    sleep(Duration::from_secs(4))?;
    run.check("peers that answer probes stay", probing.descriptors()? == before[0] + 500);
    answering.process.signal(Signal::SIGSTOP)?;
    asking.send_all()?;
    sleep(Duration::from_millis(200))?;
    namespace.vanish()?;
    let vanished = Instant::now();
    answering.process.signal(Signal::SIGCONT)?;
    let mut took = [None; 2];
    while took.contains(&None) && vanished.elapsed() < Duration::from_secs(60) {
        for (index, server) in [probing, answering].into_iter().enumerate() {
            if took[index].is_none() && server.descriptors()? <= before[index] {
                took[index] = Some(vanished.elapsed());
            }
        }
        sleep(Duration::from_millis(20))?;
    }
    let [probed, answered] = took.map(|took| took.unwrap_or_default());
    run.seconds("silent_gone_seconds", probed);
    run.seconds("answered_gone_seconds", answered);
    let is_between = |took: Duration, least| (least..=10.0).contains(&took.as_secs_f64());
    run.check("three unanswered probes, one per second, close it", is_between(probed, 2.0));
    run.check("an unacknowledged answer closes it after 3 s", is_between(answered, 2.9));
    run.check("the silent peers see no error", silent.open() == 500);
    Ok(())
}
