//! Descriptors run out, or the kernel refuses other calls.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use serde_json::json;

use crate::faults::Skipped;
use crate::faults::run::{Run, require_descriptors};
use crate::load::{Load, Ramp};
use crate::process::tool;
use crate::server::{PORTS, Server, Setup};
use crate::sockets::is_admitted;
use crate::trace::{Call, Tracer};
use crate::wait::wait_until;

const DESCRIPTORS: usize = 200;
const PEERS: usize = 5_000;

pub(super) fn descriptors(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve_as(&Setup {
        arguments: &["--file-table", "process"],
        descriptors: Some(DESCRIPTORS as u64),
        ..Setup::default()
    })?;
    let mut load = Load::new(server.ports())?;
    load.add(require_descriptors(PEERS)?)?;
    let (held, refused) = (load.open(), load.reset());
    run.figures(json!({"held": held, "refused": refused}));
    // All but the listeners, the reserve and the bystander.
    run.check("the maximum is held", held == DESCRIPTORS - usize::from(PORTS) - 32 - 1);
    run.check("all others were reset", refused == PEERS - held);
    let wakes = idle_wakes(&server, &mut load, Duration::from_secs(3))?;
    run.figure("wakes_per_second", wakes);
    run.check("it wakes a few times a second", wakes < 20.0);
    load.close(50);
    let is_admitted_again = || Ok(is_admitted(server.address(0)));
    let took = wait_until("new ones are admitted", Duration::from_secs(5), is_admitted_again)?;
    load.add(40)?;
    run.seconds("room_again_seconds", took);
    run.figure("held_again", load.open());
    run.check("new ones are admitted within a second", took < Duration::from_secs(1));
    run.check("all held ones still echo", load.verify()? == held - 50 + 40);
    load.close_all();
    let record = run.end(server)?;
    let counted = record.refused_by.get("max_connections").copied().unwrap_or(0);
    run.check("the record counts the refusals", counted >= refused as u64);
    Ok(())
}

/// How often per second the server wakes up while the bystander is paused.
fn idle_wakes(server: &Server, load: &mut Load, duration: Duration) -> Result<f64> {
    server.bystander()?.pause();
    let wakes = server.wakes_per_second(|| load.run_for(duration))?;
    server.bystander()?.resume();
    Ok(wakes)
}

pub(super) fn registered_files(run: &mut Run<'_>) -> Result<()> {
    // It must choose registered files by itself.
    let server = run.serve_as(&Setup {
        arguments: &["--file-table", "auto"],
        descriptors: Some(DESCRIPTORS as u64),
        ..Setup::default()
    })?;
    if !server.process.log()?.contains("registered files") {
        return Err(Skipped("io_uring is not available here".to_owned()).into());
    }
    let before = server.registered_sockets()?;
    let mut load = run.load(&server, PEERS)?;
    run.check("all of them echo", load.verify()? == PEERS);
    run.check("none is a descriptor", server.registered_sockets()? == before + PEERS);
    load.reset_all();
    let is_empty = || Ok(server.registered_sockets()? == before);
    let took = wait_until("no slot of a table leaked", Duration::from_secs(20), is_empty)?;
    run.seconds("cleared_seconds", took);
    run.end(server).map(drop)
}

pub(super) fn descriptors_lowered(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&["--file-table", "process"])?;
    let mut load = Load::new(server.ports())?;
    let limit = format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}");
    tool("prlimit", &["--pid", &server.process.pid().to_string(), &limit])?;
    let timeout = Duration::from_secs(5);
    load.ramp(
        require_descriptors(PEERS)?,
        Ramp { in_flight_max: PEERS, timeout, ..Ramp::default() },
    )?;
    let held = load.open();
    run.figures(json!({"held": held, "waiting": load.waiting(), "reset": load.reset()}));
    let fits = DESCRIPTORS - usize::from(PORTS) - 10..DESCRIPTORS;
    run.check("the maximum is held", fits.contains(&held));
    let cpu_before = server.cpu_seconds()?;
    let wakes = idle_wakes(&server, &mut load, Duration::from_secs(5))?;
    run.figure("wakes_per_second", wakes);
    let percent = (server.cpu_seconds()? - cpu_before) / 5.0 * 100.0;
    run.figure("cpu_percent", (percent * 10.0).round() / 10.0);
    run.check("it wakes a few times a second", wakes < 50.0);
    run.check("all held ones still echo", load.verify()? >= held);
    let held = load.open();
    load.close_open(100);
    let took = load.run_until(Duration::from_secs(10), |load| load.open() + 10 >= held)?;
    run.figure("refilled", load.open());
    run.seconds("refilled_seconds", took);
    run.check("waiting peers are admitted", load.open() + 10 >= held);
    load.close_all();
    let record = run.end(server)?;
    run.counts("accept_errors", &record.accept_errors);
    run.figure("accept_pauses", record.accept_pauses);
    let is_counted = record.accept_errors.get("EMFILE").is_some_and(|&count| count > 0);
    run.check("EMFILE is counted", is_counted);
    Ok(())
}

pub(super) fn exhausted(run: &mut Run<'_>) -> Result<()> {
    let server = run.serve(&[])?;
    let mut load = Load::new(server.ports())?;
    load.add(200)?;
    let tracer = Tracer::start(server.process.pid())?;
    for (call, errno) in [
        (Call::Accept4, Errno::ENFILE),
        (Call::Accept4, Errno::ENOMEM),
        (Call::Accept4, Errno::ENOBUFS),
        (Call::EpollCtlAdd, Errno::ENOSPC),
        (Call::EpollCtlAdd, Errno::ENOMEM),
    ] {
        refuse(run, &server, &mut load, &tracer, (call, errno))?;
    }
    tracer.end()?;
    load.close_all();
    let record = run.end_delayed(server)?;
    run.counts("accept_errors", &record.accept_errors);
    run.counts("refused_by", &record.refused_by);
    for name in ["ENFILE", "ENOMEM", "ENOBUFS", "ENOSPC"] {
        let is_counted = record.accept_errors.get(name).is_some_and(|&count| count > 0);
        run.check(format!("{name} is counted"), is_counted);
    }
    Ok(())
}

/// Makes a call fail while 200 more connect, and then work again.
fn refuse(
    run: &mut Run<'_>,
    server: &Server,
    load: &mut Load,
    tracer: &Tracer,
    (call, errno): (Call, Errno),
) -> Result<()> {
    let on = match call {
        Call::Accept4 => "accept4",
        Call::EpollCtlAdd => "epoll_ctl",
    };
    let name = format!("{} on {on}", c1000k_host::errno_name(errno as i32));
    let (held, failed) = (load.open(), load.failed());
    tracer.fail(call, errno)?;
    load.connect_many(200)?;
    load.run_for(Duration::from_secs(1))?;
    server.bystander()?.pause();
    let waits = tracer.waits();
    load.run_for(Duration::from_secs(3))?;
    let wakes = (tracer.waits() - waits) / 3;
    server.bystander()?.resume();
    run.check(format!("{name}: it wakes a few times a second"), wakes < 50);
    run.check(format!("{name}: none is admitted"), load.open() == held);
    run.check(format!("{name}: all held ones echo"), load.verify()? == held);
    tracer.fail_none()?;
    let took = load.run_until(Duration::from_secs(10), |load| load.waiting() == 0)?;
    let (admitted, reset) = (load.open() - held, load.failed() - failed);
    let seconds = took.as_secs_f64();
    run.figure(
        &name,
        format!("{wakes} wakes/s, {reset} reset, {admitted} in {seconds:.2} s after"),
    );
    let are_admitted = admitted + reset == 200 && admitted > 0;
    run.check(format!("{name}: waiting peers are admitted"), are_admitted);
    Ok(())
}
