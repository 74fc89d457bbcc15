//! Memory runs out in a cgroup, or queues grow because peers do not read.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::cgroup::MemoryCgroup;
use crate::faults::run::{Run, require_descriptors};
use crate::load::{Load, Ramp};
use crate::namespace::Namespace;
use crate::server::{Server, Setup};
use crate::sockets::is_admitted;
use crate::wait::{sleep, wait_until};

const CGROUP_BYTES: u64 = 12 << 20;
const PEERS: usize = 18_000;

pub(super) fn cgroup(run: &mut Run<'_>) -> Result<()> {
    let cgroup = MemoryCgroup::new(CGROUP_BYTES)?;
    let mut server = serve_in(run, &cgroup, &["--max-connections", "19000"])?;
    let mut load = Load::new(server.ports())?;
    load.add(require_descriptors(PEERS)?)?;
    let (held, refused) = (load.open(), load.reset());
    run.figures(json!({"held": held, "refused": refused}));
    run.figures(json!({"peak_bytes": cgroup.peak_bytes(), "kills": cgroup.kills()?}));
    run.check("not killed", server.process.is_running() && cgroup.kills()? == 0);
    run.check("many are held", held > 3_000);
    run.check("all others were reset", held + refused == PEERS);
    run.check("each admitted connection echoes", load.verify()? == held);
    server.process.await_log("| refusing: memory", Duration::from_secs(10))?;
    load.close(held / 2);
    let is_admitted_again = || Ok(is_admitted(server.address(0)));
    let took = wait_until("it admits again", Duration::from_secs(15), is_admitted_again)?;
    load.add(held / 4)?;
    run.seconds("room_again_seconds", took);
    run.figure("held_again", load.open());
    run.check("it admits again", load.open() > held - held / 2 + held / 8);
    run.check("all of them echo", load.verify()? == load.open());
    drop(load);
    let record = run.end(server)?;
    run.figure("guard", serde_json::to_string(&record.memory_guard)?);
    run.figure("kills_at_end", cgroup.kills()?);
    let counted = record.refused_by.get("memory").copied().unwrap_or(0);
    run.check("the record counts the refusals", counted >= refused as u64);
    run.check("never killed", cgroup.kills()? == 0);
    Ok(())
}

pub(super) fn pause(run: &mut Run<'_>) -> Result<()> {
    let cgroup = MemoryCgroup::new(CGROUP_BYTES)?;
    let server = serve_in(run, &cgroup, &["--max-connections", "19000", "--overload", "pause"])?;
    let mut load = Load::new(server.ports())?;
    let stall_timeout = Duration::from_millis(1_500);
    let ramp = Ramp { in_flight_max: 2_000, stall_timeout, ..Ramp::default() };
    load.ramp(require_descriptors(PEERS)?, ramp)?;
    let held = load.open();
    run.figures(json!({"held": held, "waiting": load.waiting()}));
    run.figures(json!({"kills": cgroup.kills()?, "reset": load.reset()}));
    run.check("not killed", server.process.is_running() && cgroup.kills()? == 0);
    run.check("none is reset", load.failed() == 0);
    run.check("each admitted connection echoes", held > 3_000 && load.verify()? == held);
    load.close_open(held / 2);
    let expected = held - held / 4;
    load.run_until(Duration::from_secs(30), |load| load.open() >= expected)?;
    run.figure("held_again", load.open());
    run.check("waiting peers are admitted", load.open() >= expected);
    drop(load);
    run.end(server).map(drop)
}

fn serve_in(run: &Run<'_>, cgroup: &MemoryCgroup, arguments: &[&str]) -> Result<Server> {
    run.serve_as(&Setup { arguments, cgroup: Some(cgroup), ..Setup::default() })
}

pub(super) fn never_reading(run: &mut Run<'_>) -> Result<()> {
    // At most 128 KiB per peer, and its overhead.
    let closed_by = send_without_reading(run, 500, 64 << 10, 500 * (160 << 10))?;
    run.check("the record counts each of them", closed_by.get("slow_reader") == Some(&500));
    Ok(())
}

pub(super) fn never_reading_many(run: &mut Run<'_>) -> Result<()> {
    let count = require_descriptors(15_000)?;
    // At most 256 MiB of queues, and the same for their overhead.
    let closed_by = send_without_reading(run, count, 16 << 10, 512 << 20)?;
    let reasons = ["slow_reader", "queues_full", "tcp_mem"];
    let dropped: u64 = reasons.iter().filter_map(|&reason| closed_by.get(reason)).sum();
    run.check("the record counts each of them", dropped == count as u64);
    Ok(())
}

/// Runs peers that send and never read; returns the record's `closed_by`.
fn send_without_reading(
    run: &mut Run<'_>,
    count: usize,
    kernel_bytes: usize,
    process_bytes_max: u64,
) -> Result<BTreeMap<String, u64>> {
    let namespace = Namespace::new()?;
    let server = run.serve_as(&Setup {
        arguments: &["--slow-reader-timeout", "4s"],
        namespace: Some(&namespace),
        ..Setup::default()
    })?;
    // With its defaults the kernel would buffer megabytes per peer before the server has to queue anything.
    for setting in ["tcp_rmem", "tcp_wmem"] {
        let sizes = format!("4096 {kernel_bytes} {kernel_bytes}");
        namespace.network.set(&format!("net/ipv4/{setting}"), &sizes)?;
    }
    let (before, rss) = (server.descriptors()?, server.rss_bytes()?);
    let mut peers = Vec::with_capacity(count);
    for number in 0..count {
        peers.push((peer_without_window(&server, number, kernel_bytes)?, 0));
    }
    let mut peak = 0;
    let started = Instant::now();
    for _ in 0..12 {
        for (number, (stream, sent)) in peers.iter_mut().enumerate() {
            // Without pauses the kernel's memory for TCP would be full, and the peers would wait for retransmissions.
            sleep(Duration::from_millis(number as u64).saturating_sub(started.elapsed()))?;
            *sent += send_up_to(stream, (1 << 20) - *sent);
        }
        peak = peak.max(server.rss_bytes()?.saturating_sub(rss));
        sleep(Duration::from_millis(100))?;
    }
    let sent: usize = peers.iter().map(|(_, sent)| *sent).sum();
    run.figures(json!({"sent_bytes": sent, "process_grew_bytes": peak}));
    run.check("the process stays within its bounds", peak < process_bytes_max);
    let are_dropped = || Ok(server.descriptors()? <= before);
    let took = wait_until("they are dropped", Duration::from_secs(60), are_dropped)?;
    run.seconds("dropped_seconds", took);
    drop(peers);
    let record = run.end(server)?;
    run.counts("closed_by", &record.closed_by);
    Ok(record.closed_by)
}

fn peer_without_window(server: &Server, number: usize, kernel_bytes: usize) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(4096)?;
    socket.set_send_buffer_size(kernel_bytes)?;
    socket.connect_timeout(&server.address(number).into(), Duration::from_secs(30))?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Sends as much as the kernel accepts now.
fn send_up_to(stream: &mut TcpStream, max: usize) -> usize {
    let mut sent = 0;
    while sent < max {
        match stream.write(&[b'x'; 1 << 16]) {
            Ok(count) => sent += count,
            // The send buffer is full, or the connection was dropped.
            Err(_) => break,
        }
    }
    sent
}
