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
use crate::crowd::{Crowd, greeting};
use crate::faults::run::{Run, many};
use crate::patience::{sleep, wait_until};
use crate::record::{Limit, Verdict, client as client_record, server as server_record};
use crate::server::{Server, Setup};
use crate::sockets::{block, connect, is_admitted};

const TALK: &[u8] = &[b't'; 600];

pub(super) fn sigterm_under_load(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &["--grace", "20s"])?;
    let mut crowd = Crowd::new(server.ports())?;
    crowd.add(1_000)?;
    let (mut slow, mut sent) = (Vec::new(), 0);
    for number in 0..50 {
        let stream = connect(server.address(number))?;
        sent += fill(&stream, 3 << 20)?;
        slow.push(stream);
    }
    let is_over = AtomicBool::new(false);
    let (code, took, talked, heard) = thread::scope(|scope| -> Result<_> {
        let talker = scope.spawn(|| talk(crowd, &is_over));
        let outcome = end_under_load(&mut server, slow);
        is_over.store(true, Ordering::Relaxed);
        let talked = talker.join().map_err(|_| anyhow!("the busy peers failed"))??;
        let (code, took, heard) = outcome?;
        Ok((code, took, talked, heard))
    })?;
    run.figure("exit_code", code);
    run.seconds("seconds", took);
    let record = server_record(&server.record_path)?;
    run.figures(json!({"queued_senders": 50, "sent_bytes": sent, "heard_bytes": heard}));
    let (bytes_in, bytes_out) = (record.bytes_in, record.bytes_out);
    run.figures(json!({"talked_bytes": talked, "bytes_in": bytes_in, "bytes_out": bytes_out}));
    run.check("exit code 0", code == Some(0));
    run.check("all that was read was sent back", bytes_in == bytes_out);
    run.check("nothing was left open", record.open == 0 && record.accepted == record.closed);
    run.check("and all of it arrived", heard + talked == bytes_out);
    Ok(())
}

fn serve_without_bystander(run: &Run<'_>, arguments: &[&str]) -> Result<Server> {
    run.serve_as(&Setup { arguments, has_no_bystander: true, ..Setup::default() })
}

/// SIGTERM, and half a second later the slow ones read what is queued for them. Returns the exit code, how long it took,
/// and how many bytes they have read.
fn end_under_load(
    server: &mut Server,
    slow: Vec<TcpStream>,
) -> Result<(Option<i32>, Duration, u64)> {
    sleep(Duration::from_secs(1))?;
    server.process.signal(Signal::SIGTERM)?;
    let started = Instant::now();
    sleep(Duration::from_millis(500))?;
    let readers: Vec<_> =
        slow.into_iter().map(|stream| thread::spawn(move || drain(&stream))).collect();
    let code = server.process.wait(Duration::from_secs(60))?.code();
    let took = started.elapsed();
    let mut heard = 0;
    for reader in readers {
        heard += reader.join().map_err(|_| anyhow!("a reader failed"))?;
    }
    Ok((code, took, heard))
}

/// Writes until the server takes no more.
fn fill(mut stream: &TcpStream, most: usize) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let (mut sent, mut quiet) = (0, 0);
    while sent < most && quiet < 10 {
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
    let mut heard = 0;
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        heard += count as u64;
    }
    heard
}

/// Each one sends again as soon as it has read, until all have been closed; returns how many bytes they have read, their
/// greetings included. Once the server has ended there is nothing more to wait for.
fn talk(mut crowd: Crowd, is_over: &AtomicBool) -> Result<u64> {
    let mut left = BTreeSet::new();
    let mut talked = 0;
    for (slot, peer) in crowd.iter() {
        talked += greeting(slot).len() as u64;
        (&peer.stream).write_all(TALK)?;
        left.insert(slot);
    }
    let mut buffer = vec![0; 1 << 16];
    while !left.is_empty() {
        let ready = crowd.wait(Duration::from_millis(100))?;
        if ready.is_empty() && is_over.load(Ordering::Relaxed) {
            break;
        }
        for slot in ready {
            let Some(peer) = crowd.get(slot) else { continue };
            match (&peer.stream).read(&mut buffer) {
                Ok(count @ 1..) => {
                    talked += count as u64;
                    // A server that is ending need not take it.
                    let _ = (&peer.stream).write(TALK);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => {
                    left.remove(&slot);
                    crowd.remove(slot, false);
                }
            }
        }
    }
    Ok(talked)
}

pub(super) fn sigkill_restart(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &[])?;
    let _crowd = run.crowd(&server, 10_000)?;
    server.process.kill()?;
    let started = Instant::now();
    let again =
        run.serve_as(&Setup { first_port: Some(server.all_ports.first), ..Setup::default() })?;
    run.check("serves", is_admitted(again.address(0)));
    run.seconds("serving_again_seconds", started.elapsed());
    sleep(Duration::from_millis(500))?;
    run.ends(again).map(drop)
}

pub(super) fn server_killed(run: &mut Run<'_>) -> Result<()> {
    let mut server = serve_without_bystander(run, &[])?;
    let count = many(10_000)?;
    let before = server.descriptors()?;
    let (_folder, path) = record_path()?;
    let words = ["-c", &count.to_string(), "--hold", "1h", "--json", &path];
    let mut client = start_client(run, &server, &words)?;
    let all_held = || Ok(server.descriptors()? >= before + count);
    wait_until("all are held", Duration::from_secs(60), all_held)?;
    sleep(Duration::from_secs(1))?;
    server.process.kill()?;
    let started = Instant::now();
    let code = client.wait(Duration::from_secs(30))?.code();
    let record = client_record(path.as_ref())?;
    run.figure("client_exit", code);
    run.seconds("seconds", started.elapsed());
    let (limit, verdict) =
        (record.limit.map(|limit| limit.to_string()), record.verdict.to_string());
    run.figures(json!({"lost": record.lost, "limit": limit, "verdict": verdict}));
    run.check("exit code 1, verdict short", code == Some(1) && record.verdict == Verdict::Short);
    run.check("all are reported as lost", record.lost == count as u64);
    run.check("the server is named", record.limit == Some(Limit::Server));
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
    let _crowd = run.crowd(&server, 5_000)?;
    server.process.signal(Signal::SIGSTOP)?;
    sleep(duration)?;
    let cpu = server.cpu_seconds()?;
    server.process.signal(Signal::SIGCONT)?;
    run.gone_again(&server, before)?;
    run.seconds("cpu_seconds", Duration::try_from_secs_f64(server.cpu_seconds()? - cpu)?);
    let wakes = server.wakes_per_second(|| sleep(Duration::from_secs(3)))?;
    run.figure("wakes_per_second", wakes);
    run.check("no storm afterwards", wakes < 20.0);
    let record = run.ends(server)?;
    run.counts("closed_by", &record.closed_by);
    let is_each = record.closed_by.len() == 1 && record.closed_by.get("idle") == Some(&5_000);
    run.check("each fired once", is_each);
    Ok(())
}
