//! The server: holds the connections to its ports, on one thread by default, and shows the memory that they take.
//!
//! `main` only connects the parts: [`args`] to settings, settings to a [`plan`], reactors and their [`echo`] handlers,
//! and the results to a [`summary`]. The reactor is a separate crate.

mod admission;
mod args;
mod closings;
mod counts;
mod echo;
mod exposition;
mod listen;
mod metrics;
mod plan;
mod service_manager;
mod slow;
mod summary;
mod sync;
mod workers;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use c1000k_host::check::{CheckArgs, FileTableChoice};
use c1000k_host::command_line::{self, REACHED, SHORT, USAGE, fail, print_error};
use c1000k_host::format;
use c1000k_record::endpoint::Endpoint;
use c1000k_record::{Output, ServerRecord};
use reactor::{Reactor, Signal, Status};

use admission::{Admission, MemoryGuard};
use args::{Args, Command, Settings};
use echo::{Echo, SHUT_DOWN};
use metrics::Sampler;
use plan::Plan;
use workers::{MainThread, Workers};

/// A second signal ends the process with the exit code of that signal.
const fn exit_code(left_by: Option<Signal>) -> u8 {
    match left_by {
        None => REACHED,
        Some(Signal::Terminate) => 143,
        Some(_) => 130,
    }
}

fn main() -> ExitCode {
    let code = run_command();
    command_line::flush_log();
    code
}

fn run_command() -> ExitCode {
    let args = match command_line::parse_and_start_log::<Args>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    match args.check() {
        Err(line) => fail(USAGE, &line),
        Ok(Command::Check { args, file_table, connections, listening }) => {
            check(&args, file_table, connections, listening)
        }
        Ok(Command::Serve(settings)) => {
            let guard = MemoryGuard::new(settings.memory_reserve, settings.threads);
            if let Err(line) = guard.check_reserve() {
                return fail(USAGE, &line);
            }
            serve(&settings, guard).unwrap_or_else(|line| fail(SHORT, &line))
        }
    }
}

/// Prints the limits of this machine, or the settings that are needed.
fn check(args: &CheckArgs, choice: FileTableChoice, connections: u64, listening: u64) -> ExitCode {
    match plan::machine_and_requirements(&args.root, choice, connections, listening) {
        Ok((machine, requirements)) => args.report(&machine, &requirements),
        Err(line) => fail(SHORT, &line),
    }
}

fn serve(settings: &Settings, guard: MemoryGuard) -> Result<ExitCode, String> {
    let started_at = SystemTime::now();
    if let Some(destination) = &settings.json {
        command_line::check_output(destination)?;
    }
    let sockets = service_manager::passed_sockets()?;
    let settings = &service_manager::settings_for(settings, &sockets)?;
    let endpoint = settings.metrics.map(Endpoint::open).transpose()?;
    let plan = plan::plan(settings)?;
    let queues_bytes_max = listen::queues_bytes_max(&guard);
    let (mut reactor, others) = listen::reactors(settings, plan, queues_bytes_max, sockets)?;
    let blind_spots = guard.blind_spots();
    let admission = Arc::new(Admission::new(settings, plan.connections_max, guard));
    let mut sampler = Sampler::start(settings.overload);
    sampler.endpoint = endpoint;
    let workers = Workers::start(others, settings, &admission, &reactor.context().waker())?;
    let role = MainThread { admission: Arc::clone(&admission), sampler, workers };
    let mut echo = Echo::new(settings, &admission, role);
    echo.start(reactor.context()).map_err(|error| error.to_string())?;
    for blind_spot in blind_spots {
        log::warn!("{blind_spot}");
    }
    log_ready(settings, plan);
    service_manager::notify_ready();
    if let Some(bytes) = echo.lacking_bytes().filter(|&bytes| bytes > 0) {
        log::warn!("no connection can be admitted until {} more are free", format::bytes(bytes));
    }
    run(&mut reactor, &mut echo).map_err(|error| format!("the reactor failed: {error}"))?;
    echo.role.workers.join()?;
    let totals = echo.role.totals(echo.totals(reactor.context()));
    let now = Instant::now();
    let metrics = echo.role.sampler.measure(totals, None, now);
    let memory_guard = admission.memory_guard_record(now);
    let sampler = &mut echo.role.sampler;
    let record = summary::record(settings, plan, started_at, &metrics, sampler, memory_guard);
    log_losses(&record);
    let code = exit_code(echo.left_by);
    conclude(settings, &record).map(|()| ExitCode::from(code))
}

/// Logs that output was lost, because users read the log first.
fn log_losses(record: &ServerRecord) {
    let lost = |reason| record.closed_by.get(reason).copied().unwrap_or(0);
    let cut_off = lost(SHUT_DOWN) + record.open;
    if cut_off > 0 {
        log::warn!(
            "{} reset at shutdown; unread data is lost. Use a longer --grace",
            format::counted(cut_off, "connection")
        );
    }
}

/// Writes the record and prints the summary. From here on signals end the program, so that a pipe that is not read
/// can't block it.
fn conclude(settings: &Settings, record: &ServerRecord) -> Result<(), String> {
    let write = |output: &Output| output.write(record);
    let (waiting, prompt) = match &settings.json {
        Some(destination) if destination.may_wait() => (Some(destination), None),
        prompt => (None, prompt.as_ref()),
    };
    let written = prompt.map_or(Ok(()), write);
    command_line::give_signals_back();
    let text = summary::text(record);
    let printed = if settings.json == Some(Output::Stdout) {
        print_error(&text);
        Ok(())
    } else {
        command_line::print_summary(&text)
    };
    let written = written.and_then(|()| waiting.map_or(Ok(()), write));
    written.map_err(|error| {
        command_line::flush_log();
        error.print_instead(record)
    })?;
    printed
}

fn log_ready(settings: &Settings, plan: Plan) {
    let threads = match settings.threads {
        1 => String::new(),
        threads => format!(", by {threads} threads"),
    };
    let last = match settings.ports {
        1 => String::new(),
        _ => format!(" to {}", settings.last_port()),
    };
    log::info!(
        "ready: listening on {}, {}{last}, for {}{threads}",
        format::counted(u64::from(settings.ports), "port"),
        settings.bind.socket_addr(settings.first_port),
        format::counted(plan.connections_max, "connection"),
    );
}

/// Serves until the connections of all threads have ended, or until a second signal.
fn run(reactor: &mut Reactor<()>, echo: &mut Echo<MainThread>) -> Result<(), reactor::Error> {
    reactor.run(echo)?;
    while echo.left_by.is_none() && echo.role.workers.running() > 0 {
        if reactor.turn(echo, None)? == Status::Stopped {
            break;
        }
    }
    Ok(())
}
