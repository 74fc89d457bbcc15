//! Descriptors run out, and other calls that the kernel refuses.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use serde_json::json;

use crate::crowd::{Arrival, Crowd};
use crate::faults::Skipped;
use crate::faults::run::{Run, many};
use crate::patience::wait_until;
use crate::process::tool;
use crate::server::{PORTS, Server, Setup};
use crate::sockets::is_admitted;
use crate::trace::{Call, Tracer};

const DESCRIPTORS: usize = 200;
const PEERS: usize = 5_000;

pub(super) fn descriptors(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve_as(&Setup {
        arguments: &["--file-table", "process"],
        descriptors: Some(DESCRIPTORS as u64),
        ..Setup::default()
    })?;
    let mut crowd = Crowd::new(server.ports())?;
    crowd.add(many(PEERS)?)?;
    let (held, refused) = (crowd.open(), crowd.reset());
    run.figures(json!({"held": held, "refused": refused}));
    // Beside the listeners, the reserve, and the bystander.
    run.check("as many as fit are held", held == DESCRIPTORS - usize::from(PORTS) - 32 - 1);
    run.check("all others were reset", refused == PEERS - held);
    let wakes = idle_wakes(&server, &mut crowd, Duration::from_secs(3))?;
    run.figure("wakes_per_second", wakes);
    run.check("it wakes a few times a second", wakes < 20.0);
    crowd.close(50);
    let is_let_in = || Ok(is_admitted(server.address(0)));
    let took = wait_until("new ones are taken", Duration::from_secs(5), is_let_in)?;
    crowd.add(40)?;
    run.seconds("room_again_seconds", took);
    run.figure("held_again", crowd.open());
    run.check("new ones are taken within a second", took < Duration::from_secs(1));
    run.check("all held ones still echo", crowd.verify()? == held - 50 + 40);
    crowd.close_all();
    let record = run.ends(server)?;
    let counted = record.refused_by.get("max_connections").copied().unwrap_or(0);
    run.check("the record counts the refusals", counted >= refused as u64);
    Ok(())
}

/// How often a second it wakes while the bystander pauses.
fn idle_wakes(server: &Server, crowd: &mut Crowd, duration: Duration) -> Result<f64> {
    server.bystander()?.pause();
    let wakes = server.wakes_per_second(|| crowd.settle(duration))?;
    server.bystander()?.resume();
    Ok(wakes)
}

pub(super) fn registered_files(run: &mut Run<'_>) -> Result<()> {
    // It chooses registered files by itself.
    let server = run.serve_as(&Setup {
        arguments: &["--file-table", "auto"],
        descriptors: Some(DESCRIPTORS as u64),
        ..Setup::default()
    })?;
    if !server.log()?.contains("registered files") {
        return Err(Skipped("io_uring is not available here".to_owned()).into());
    }
    let before = server.registered_sockets()?;
    let mut crowd = run.crowd(&server, PEERS)?;
    run.check("all of them echo", crowd.verify()? == PEERS);
    run.check("none is a descriptor", server.registered_sockets()? == before + PEERS);
    crowd.reset_all();
    let is_empty = || Ok(server.registered_sockets()? == before);
    let took = wait_until("no slot of a table leaked", Duration::from_secs(20), is_empty)?;
    run.seconds("cleared_seconds", took);
    run.ends(server).map(drop)
}

pub(super) fn descriptors_lowered(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&["--file-table", "process"])?;
    let mut crowd = Crowd::new(server.ports())?;
    let (pid, limit) =
        (server.process.pid().to_string(), format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"));
    tool("prlimit", &["--pid", &pid, &limit])?;
    let within = Duration::from_secs(5);
    crowd.add_as(many(PEERS)?, Arrival { in_flight_max: PEERS, within, ..Arrival::default() })?;
    let held = crowd.open();
    run.figures(json!({"held": held, "waiting": crowd.waiting(), "reset": crowd.reset()}));
    let fits = DESCRIPTORS - usize::from(PORTS) - 10..DESCRIPTORS;
    run.check("as many as fit are held", fits.contains(&held));
    let cpu_before = server.cpu_seconds()?;
    let wakes = idle_wakes(&server, &mut crowd, Duration::from_secs(5))?;
    run.figure("wakes_per_second", wakes);
    let percent = (server.cpu_seconds()? - cpu_before) / 5.0 * 100.0;
    run.figure("cpu_percent", (percent * 10.0).round() / 10.0);
    run.check("it wakes a few times a second, not thousands", wakes < 50.0);
    run.check("all held ones still echo", crowd.verify()? >= held);
    let held = crowd.open();
    crowd.close_open(100);
    let took = crowd.step_until(Duration::from_secs(10), |crowd| crowd.open() + 10 >= held)?;
    run.figure("refilled", crowd.open());
    run.seconds("refilled_seconds", took);
    run.check("those that waited take the places", crowd.open() + 10 >= held);
    crowd.close_all();
    let record = run.ends(server)?;
    run.counts("accept_errors", &record.accept_errors);
    run.figure("accept_pauses", record.accept_pauses);
    run.check(
        "EMFILE is counted",
        record.accept_errors.get("EMFILE").is_some_and(|&count| count > 0),
    );
    Ok(())
}

pub(super) fn exhausted(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let mut crowd = Crowd::new(server.ports())?;
    crowd.add(200)?;
    let tracer = Tracer::start(server.process.pid())?;
    for (call, errno) in [
        (Call::Accept4, Errno::ENFILE),
        (Call::Accept4, Errno::ENOMEM),
        (Call::Accept4, Errno::ENOBUFS),
        (Call::EpollCtlAdd, Errno::ENOSPC),
        (Call::EpollCtlAdd, Errno::ENOMEM),
    ] {
        refuse(run, &server, &mut crowd, &tracer, (call, errno))?;
    }
    tracer.end()?;
    crowd.close_all();
    let record = run.ends_suspended(server)?;
    run.counts("accept_errors", &record.accept_errors);
    run.counts("refused_by", &record.refused_by);
    for name in ["ENFILE", "ENOMEM", "ENOBUFS", "ENOSPC"] {
        let is_counted = record.accept_errors.get(name).is_some_and(|&count| count > 0);
        run.check(format!("{name} is counted"), is_counted);
    }
    Ok(())
}

/// A call fails while 200 more connect, and then works again.
fn refuse(
    run: &mut Run<'_>,
    server: &Server,
    crowd: &mut Crowd,
    tracer: &Tracer,
    (call, errno): (Call, Errno),
) -> Result<()> {
    let on = match call {
        Call::Accept4 => "accept4",
        Call::EpollCtlAdd => "epoll_ctl",
    };
    let name = format!("{} on {on}", c1000k_host::errno_name(errno as i32));
    let (held, gone) = (crowd.open(), crowd.gone());
    tracer.fail(call, errno)?;
    crowd.start_many(200)?;
    crowd.settle(Duration::from_secs(1))?;
    server.bystander()?.pause();
    let waits = tracer.waits();
    crowd.settle(Duration::from_secs(3))?;
    let wakes = (tracer.waits() - waits) / 3;
    server.bystander()?.resume();
    run.check(format!("{name}: it wakes a few times a second"), wakes < 50);
    run.check(format!("{name}: none gets in"), crowd.open() == held);
    run.check(format!("{name}: all held ones echo"), crowd.verify()? == held);
    tracer.fail_none()?;
    let took = crowd.step_until(Duration::from_secs(10), |crowd| crowd.waiting() == 0)?;
    let (got_in, reset) = (crowd.open() - held, crowd.gone() - gone);
    let seconds = took.as_secs_f64();
    run.figure(&name, format!("{wakes} wakes/s, {reset} reset, {got_in} in {seconds:.2} s after"));
    run.check(format!("{name}: those that waited get in"), got_in + reset == 200 && got_in > 0);
    Ok(())
}
