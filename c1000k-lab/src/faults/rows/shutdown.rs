//! The server is ended, killed or suspended under load.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::sys::signal::Signal;
use serde_json::json;

use super::many::{record_path, start_client};
use crate::faults::run::{Run, require_descriptors};
use crate::load::{Load, first_message};
use crate::record::{Limit, Verdict, client as client_record, server as server_record};
use crate::server::{Server, Setup};
use crate::sockets::{block, connect, is_admitted};
use crate::wait::{sleep, wait_until};

const TALK: &[u8] = &[b't'; 600];

pub(super) fn sigterm_under_load(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &["--grace", "20s"])?;
    let mut load = Load::new(server.ports())?;
    load.add(1_000)?;
    let (mut slow, mut sent) = (Vec::new(), 0);
    for number in 0..50 {
        let stream = connect(server.address(number))?;
        sent += fill(&stream, 3 << 20)?;
        slow.push(stream);
    }
    let is_over = AtomicBool::new(false);
    let (code, took, talked, received) = thread::scope(|scope| -> Result<_> {
        let talker = scope.spawn(|| talk(load, &is_over));
        let outcome = end_under_load(&mut server, slow);
        is_over.store(true, Ordering::Relaxed);
        let talked =
            talker.join().map_err(|_| anyhow!("the thread of the busy peers panicked"))??;
        let (code, took, received) = outcome?;
        Ok((code, took, talked, received))
    })?;
    run.figure("exit_code", code);
    run.seconds("seconds", took);
    let record = server_record(&server.record_path)?;
    run.figures(json!({"queued_senders": 50, "sent_bytes": sent, "heard_bytes": received}));
    let (bytes_in, bytes_out) = (record.bytes_in, record.bytes_out);
    run.figures(json!({"talked_bytes": talked, "bytes_in": bytes_in, "bytes_out": bytes_out}));
    run.check("exit code 0", code == 0);
    run.check("all that was read was sent back", bytes_in == bytes_out);
    run.check("no connection was left open", record.open == 0 && record.accepted == record.closed);
    run.check("all that was sent back arrived", received + talked == bytes_out);
    Ok(())
}

fn serve_without_bystander(run: &Run<'_>, arguments: &[&str]) -> Result<Server> {
    run.serve_as(&Setup { arguments, has_no_bystander: true, ..Setup::default() })
}

/// Sends SIGTERM; half a second later the slow peers read what is queued for them. Returns the exit code, the time
/// until the end, and how many bytes the peers read.
fn end_under_load(server: &mut Server, slow: Vec<TcpStream>) -> Result<(i32, Duration, u64)> {
    sleep(Duration::from_secs(1))?;
    server.process.signal(Signal::SIGTERM)?;
    let started = Instant::now();
    sleep(Duration::from_millis(500))?;
    let readers: Vec<_> =
        slow.into_iter().map(|stream| thread::spawn(move || drain(&stream))).collect();
    let code = server.process.wait(Duration::from_secs(60))?;
    let took = started.elapsed();
    let mut received = 0;
    for reader in readers {
        received += reader.join().map_err(|_| anyhow!("a reader panicked"))?;
    }
    Ok((code, took, received))
}

/// Writes until the server accepts no more.
fn fill(mut stream: &TcpStream, max: usize) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let (mut sent, mut quiet) = (0, 0);
    while sent < max && quiet < 10 {
        match stream.write(&[b'q'; 1 << 16]) {
            Ok(count) => (sent, quiet) = (sent + count, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                quiet += 1;
                sleep(Duration::from_millis(10))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    block(stream, Duration::from_secs(30))?;
    Ok(sent)
}

/// Reads until the end or an error.
fn drain(mut stream: &TcpStream) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    let mut received = 0;
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        received += count as u64;
    }
    received
}

/// Sends on each connection again after each read, until all are closed or the server has ended. Returns how many bytes
/// were read, including the echoes of the first messages.
fn talk(mut load: Load, is_over: &AtomicBool) -> Result<u64> {
    let mut left = BTreeSet::new();
    let mut talked = 0;
    for (slot, connection) in load.iter() {
        talked += first_message(slot).len() as u64;
        (&connection.stream).write_all(TALK)?;
        left.insert(slot);
    }
    let mut buffer = vec![0; 1 << 16];
    while !left.is_empty() {
        let ready = load.wait(Duration::from_millis(100))?;
        if ready.is_empty() && is_over.load(Ordering::Relaxed) {
            break;
        }
        for slot in ready {
            let Some(connection) = load.get(slot) else { continue };
            match (&connection.stream).read(&mut buffer) {
                Ok(count @ 1..) => {
                    talked += count as u64;
                    // A server that is shutting down may refuse it.
                    let _ = (&connection.stream).write(TALK);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => {
                    left.remove(&slot);
                    load.remove(slot, false);
                }
            }
        }
    }
    Ok(talked)
}

pub(super) fn sigkill_restart(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &[])?;
    let _load = run.load(&server, 10_000)?;
    server.process.kill()?;
    let started = Instant::now();
    let again =
        run.serve_as(&Setup { first_port: Some(server.all_ports.first), ..Setup::default() })?;
    run.check("the new server admits", is_admitted(again.address(0)));
    run.seconds("serving_again_seconds", started.elapsed());
    sleep(Duration::from_millis(500))?;
    run.end(again).map(drop)
}

pub(super) fn server_killed(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &[])?;
    let count = require_descriptors(10_000)?;
    let before = server.descriptors()?;
    let (_folder, path) = record_path()?;
    let arguments = ["-c", &count.to_string(), "--hold", "1h", "--json", &path];
    let mut client = start_client(run, &server, &arguments)?;
    let all_held = || Ok(server.descriptors()? >= before + count);
    wait_until("all are held", Duration::from_secs(60), all_held)?;
    sleep(Duration::from_secs(1))?;
    server.process.kill()?;
    let started = Instant::now();
    let code = client.wait(Duration::from_secs(30))?;
    let record = client_record(path.as_ref())?;
    run.figure("client_exit", code);
    run.seconds("seconds", started.elapsed());
    let (limit, verdict) =
        (record.limit.map(|limit| limit.to_string()), record.verdict.to_string());
    run.figures(json!({"lost": record.lost, "limit": limit, "verdict": verdict}));
    run.check("exit code 1, verdict short", code == 1 && record.verdict == Verdict::Short);
    run.check("all are reported as lost", record.lost == count as u64);
    run.check("the limit is the server", record.limit == Some(Limit::Server));
    Ok(())
}

pub(super) fn suspended(run: &mut Run<'_>) -> Result<()> {
    suspend(run, Duration::from_secs(12))
}

pub(super) fn suspended_minutes(run: &mut Run<'_>) -> Result<()> {
    suspend(run, Duration::from_secs(180))
}

fn suspend(run: &mut Run<'_>, duration: Duration) -> Result<()> {
    let server = serve_without_bystander(run, &["--idle-timeout", "5s"])?;
    let before = server.descriptors()?;
    let _load = run.load(&server, 5_000)?;
    server.process.signal(Signal::SIGSTOP)?;
    sleep(duration)?;
    let cpu = server.cpu_seconds()?;
    server.process.signal(Signal::SIGCONT)?;
    run.check_all_closed(&server, before)?;
    run.seconds("cpu_seconds", Duration::try_from_secs_f64(server.cpu_seconds()? - cpu)?);
    let wakes = server.wakes_per_second(|| sleep(Duration::from_secs(3)))?;
    run.figure("wakes_per_second", wakes);
    run.check("it wakes a few times a second afterwards", wakes < 20.0);
    let record = run.end(server)?;
    run.counts("closed_by", &record.closed_by);
    let is_each = record.closed_by.len() == 1 && record.closed_by.get("idle") == Some(&5_000);
    run.check("each fired once", is_each);
    Ok(())
}
