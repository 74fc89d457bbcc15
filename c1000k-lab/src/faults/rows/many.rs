//! Many peers do the same at once, or send unusual data.

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::faults::run::{Run, require_descriptors};
use crate::load::{Load, State};
use crate::process::{Isolation, Process, isolated};
use crate::server::Server;
use crate::sockets::{block, connect, is_admitted, pump, receive};
use crate::wait::{sleep, wait_until};

const MANY: usize = 15_000;
const TIMEOUT: Duration = Duration::from_secs(20);

/// Linux doubles it for its overhead, and advertises a window of this size.
const TINY_WINDOW_BYTES: usize = 4096;

pub(super) fn killed_clients(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let before = server.descriptors()?;
    let count = require_descriptors(MANY)?;
    let mut client = start_client(run, &server, &["-c", &count.to_string(), "--hold", "1h"])?;
    let all_held = || Ok(server.descriptors()? >= before + MANY);
    wait_until("all are held", Duration::from_secs(120), all_held)?;
    client.kill()?;
    run.check_all_closed(&server, before)?;
    run.check("new ones are admitted", is_admitted(server.address(0)));
    run.end(server).map(drop)
}

/// Starts the client program, on all ports but the bystander's.
pub(super) fn start_client(run: &Run<'_>, server: &Server, arguments: &[&str]) -> Result<Process> {
    let ports = server.ports();
    let mut command = isolated(&Isolation::default(), run.lab.programs.path("c1000k-client"))?;
    command.args([ports.ip.to_string(), ports.first.to_string()]);
    command.args(["--ports", &ports.count.to_string()]).args(arguments);
    Process::spawn_logged("client", &mut command, "/dev/null".into())
}

/// The path of a client's record, and its directory, which is removed when dropped.
pub(super) fn record_path() -> Result<(TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("client.json").to_string_lossy().into_owned();
    Ok((folder, path))
}

pub(super) fn rst_burst(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let before = server.descriptors()?;
    let mut load = run.load(&server, MANY)?;
    let started = Instant::now();
    load.reset_all();
    run.seconds("burst_seconds", started.elapsed());
    run.check_all_closed(&server, before)?;
    run.check("new ones are admitted", is_admitted(server.address(0)));
    run.end(server).map(drop)
}

pub(super) fn half_closes(run: &mut Run<'_>) -> Result<()> {
    const MESSAGE: &[u8] = b"last message";
    let server = run.serve(&[])?;
    let before = server.descriptors()?;
    let load = run.load(&server, 5_000)?;
    for mut stream in load.streams() {
        stream.write_all(MESSAGE)?;
        stream.shutdown(Shutdown::Write)?;
    }
    let mut ended = 0;
    for stream in load.streams() {
        block(stream, TIMEOUT)?;
        ended += usize::from(receive(stream, MESSAGE.len() + 1)? == MESSAGE);
    }
    run.figure("ended", ended);
    run.check("each got the complete echo and the end of the stream", ended == 5_000);
    run.check_all_closed(&server, before)?;
    run.end(server).map(drop)
}

pub(super) fn reset_before_accept(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let mut load = Load::new(server.ports())?;
    let before = server.descriptors()?;
    server.process.signal(Signal::SIGSTOP)?;
    load.connect_many(2_000)?;
    load.run_for(Duration::from_secs(1))?;
    let connected = load.count(State::Waiting);
    run.figure("connected", connected);
    run.check("all completed in the backlogs", connected == 2_000);
    load.reset_all();
    server.process.signal(Signal::SIGCONT)?;
    run.check("new ones are admitted", is_admitted(server.address(0)));
    run.check_all_closed(&server, before)?;
    let record = run.end_delayed(server)?;
    run.figure("accepted", record.accepted);
    run.counts("accept_errors", &record.accept_errors);
    Ok(())
}

pub(super) fn slowloris(run: &mut Run<'_>) -> Result<()> {
    const ROUNDS: usize = 8;
    let server = run.serve(&[])?;
    let load = run.load(&server, MANY)?;
    let rss = server.rss_bytes()?;
    let mut sent = 0;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        for (number, mut stream) in load.streams().enumerate() {
            sent += stream.write(b"x")?;
            if number % 15 == 0 {
                let due = Duration::from_secs_f64(number as f64 / MANY as f64);
                sleep(due.saturating_sub(started.elapsed()))?;
            }
        }
    }
    let mut received = 0;
    for stream in load.streams() {
        block(stream, TIMEOUT)?;
        received += receive(stream, ROUNDS)?.len();
    }
    let grown = server.rss_bytes()?.saturating_sub(rss);
    run.figures(json!({"sent": sent, "heard": received, "process_grew_bytes": grown}));
    run.check("each byte came back", received == sent && sent == ROUNDS * MANY);
    run.check("the process grew by less than 1 MB", grown < 1 << 20);
    run.end(server).map(drop)
}

pub(super) fn messages_at_once(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let load = Load::new(server.ports())?;
    send_at_once(run, server, load)
}

pub(super) fn tiny_windows(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let load = Load::with_receive_buffers(server.ports(), TINY_WINDOW_BYTES)?;
    send_at_once(run, server, load)
}

fn send_at_once(run: &mut Run<'_>, server: Server, mut load: Load) -> Result<()> {
    const ROUNDS: usize = 3;
    let messages: Vec<Arc<[u8]>> =
        (1..=4).map(|number| random_bytes(number, number as usize * (8 << 10)).into()).collect();
    load.add(require_descriptors(MANY)?)?;
    let rss = server.rss_bytes()?;
    let (mut echoed, mut grown) = (0, 0);
    let started = Instant::now();
    for _ in 0..ROUNDS {
        let slots = load.send_at_once(&messages);
        grown = grown.max(server.rss_bytes()?.saturating_sub(rss));
        echoed += load.await_echoes(&slots, Duration::from_secs(60))?;
    }
    run.seconds("rounds_seconds", started.elapsed());
    run.figures(json!({"echoed": echoed, "process_grew_bytes": grown}));
    run.check("each got the complete echo each time", echoed == ROUNDS * MANY);
    run.end(server).map(drop)
}

pub(super) fn odd_bytes(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    for number in 0..20_u32 {
        let message = random_bytes(number.into(), 1 + number as usize * 39_989);
        let is_correct = pump(&connect(server.address(number as usize))?, &message, 1)?;
        run.check(format!("{} random bytes come back", message.len()), is_correct);
    }
    let started = Instant::now();
    let is_correct = pump(&connect(server.address(0))?, &random_bytes(0, 1_000_000), 1_000)?;
    run.seconds("gigabyte_seconds", started.elapsed());
    run.check("1 GB on one connection comes back", is_correct);
    let started = Instant::now();
    let mut stream = connect(server.address(1))?;
    let mut wrong = 0;
    for number in 0..2_000 {
        let bytes = random_bytes(number, 500);
        for byte in &bytes {
            stream.write_all(&[*byte])?;
        }
        wrong += usize::from(receive(&stream, bytes.len())? != bytes);
        sleep(Duration::ZERO)?;
    }
    run.seconds("million_messages_seconds", started.elapsed());
    run.check("a million messages of one byte come back", wrong == 0);
    run.end_delayed(server).map(drop)
}

fn random_bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; count];
    random.fill(&mut bytes);
    bytes
}
