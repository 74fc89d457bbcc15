//! The network fails, or the machines at its other end.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::json;

use super::many::{record_path, start_client};
use crate::crowd::{Crowd, State};
use crate::faults::run::{Run, many};
use crate::namespace::Namespace;
use crate::patience::sleep;
use crate::record::{ClientRecord, Verdict, client as client_record};
use crate::server::{Server, Setup};
use crate::sockets::is_admitted;
use crate::syn;

pub(super) fn full_accept_queue(run: &mut Run<'_>) -> Result<()> {
    let count = many(5_000)?;
    let namespace = Namespace::new()?;
    let server = serve_in(run, &namespace, &["--backlog", "16"])?;
    let mut crowd = Crowd::new(server.ports())?;
    server.process.signal(Signal::SIGSTOP)?;
    crowd.start_many(count)?;
    crowd.settle(Duration::from_secs(2))?;
    server.process.signal(Signal::SIGCONT)?;
    let is_over = |crowd: &Crowd| crowd.open() >= count || crowd.gone() > 0;
    let took = crowd.step_until(Duration::from_secs(60), is_over)?;
    run.figure("open", crowd.open());
    run.seconds("recovered_seconds", took);
    run.check("all get in in the end", crowd.open() == count);
    drop(crowd);
    let record = run.ends_suspended(server)?;
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
    let (mut got_in, mut tried) = (0, 0);
    while !flood.is_finished() {
        got_in += usize::from(is_admitted(server.address(tried)));
        tried += 1;
        sleep(Duration::from_millis(50))?;
    }
    flood.join().map_err(|_| anyhow!("the flood failed"))??;
    run.seconds("flood_seconds", started.elapsed());
    run.figures(json!({"got_in": got_in, "tried": tried}));
    run.check("others get in during the flood", tried > 0 && got_in as f64 >= 0.9 * tried as f64);
    run.check("and after it", is_admitted(server.address(0)));
    run.gone_again(&server, before)?;
    let cookies = namespace.counter("SyncookiesSent")?;
    run.figure("syn_cookies_sent", cookies);
    run.figure("request_queue_full", namespace.counter("TCPReqQFullDoCookies")?);
    let dropped = namespace.counter("TCPReqQFullDrop")?;
    run.check("the kernel saw a flood", cookies + dropped > 0);
    run.ends(server).map(drop)
}

pub(super) fn link_down(run: &mut Run<'_>) -> Result<()> {
    let namespace = Namespace::new()?;
    let server = serve_in(run, &namespace, &[])?;
    let mut crowd = Crowd::new(server.ports())?;
    crowd.add(500)?;
    let (_folder, path) = record_path()?;
    let words = ["-c", "2000", "--rate", "500", "--hold", "2s", "--json", &path];
    let mut client = start_client(run, &server, &words)?;
    sleep(Duration::from_millis(1_500))?;
    namespace.link_down()?;
    let asked = crowd.ask()?;
    crowd.settle(Duration::from_secs(5))?;
    let is_silent = asked.len() == 500 && crowd.count(State::Waiting) == 500;
    run.check("nothing comes back while it is down", is_silent);
    namespace.link_up()?;
    let started = Instant::now();
    run.check("all echo again", crowd.echoes_of(&asked, Duration::from_secs(60))? == 500);
    run.seconds("echoing_again_seconds", started.elapsed());
    let code = client.wait(Duration::from_secs(90))?.code();
    let record = client_record(path.as_ref())?;
    let ClientRecord { established, verified, failed, retried, verdict, .. } = record;
    run.figures(json!({"client_exit": code, "established": established, "verified": verified}));
    run.figures(json!({"failed": failed, "retried": retried}));
    run.counts("failures", &record.failures);
    run.figure("verdict", verdict.to_string());
    let is_reached = code == Some(0);
    let is_verdict = is_reached == (verdict == Verdict::Reached);
    run.check("the client's exit code is its verdict", is_verdict);
    // A connect that meets the dead link is tried again, or ends the ramp where the kernel says EHOSTUNREACH.
    let adds_up = match is_reached {
        true => established == 2_000 && verified == Some(2_000),
        false => failed > 0 && record.failures.values().sum::<u64>() == failed,
    };
    run.check("the client's figures add up", adds_up);
    drop(crowd);
    run.ends_suspended(server).map(drop)
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
    let record = run.ends(probing)?;
    run.counts("closed_by", &record.closed_by);
    run.check("so does the record", record.closed_by.get("tcp_timeout") == Some(&500));
    Ok(())
}

fn machine_vanishes(
    run: &mut Run<'_>,
    namespace: &Namespace,
    probing: &Server,
    answering: &Server,
) -> Result<()> {
    let (mut silent, mut asking) = (Crowd::new(probing.ports())?, Crowd::new(answering.ports())?);
    let before = [probing.descriptors()?, answering.descriptors()?];
    silent.add(500)?;
    asking.add(500)?;
    sleep(Duration::from_secs(4))?;
    run.check("those who answer probes stay", probing.descriptors()? == before[0] + 500);
    answering.process.signal(Signal::SIGSTOP)?;
    asking.ask()?;
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
    run.check("three unanswered probes, a second apart, end it", is_between(probed, 2.0));
    run.check("an answer that is not taken ends it after 3 s", is_between(answered, 2.9));
    run.check("the peers have seen nothing of it", silent.open() == 500);
    Ok(())
}
