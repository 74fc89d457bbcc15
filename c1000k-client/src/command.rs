//! The program: from the command line to the record, the summary and the exit code.

use std::net::{SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use c1000k_host::check::{FileTable, Machine};
use c1000k_host::command_line::{self, SHORT, fail, print_error};
use c1000k_host::format;
use c1000k_host::limits::{DescriptorLimit, raise_descriptor_limit};
use c1000k_host::ports::LOCAL_PORTS_DEFAULT;
use c1000k_host::usage::{ProcessUsage, processors};
use c1000k_record::endpoint::Endpoint;
use c1000k_record::{
    CLIENT_SCHEMA, ClientRecord, Descriptors, Head, Output, TargetRecord, Verdict, per_second,
    time_text,
};
use reactor::{Config, Reactor, Signal};

use crate::address::Scheme;
use crate::args::{self, Arguments, MessageChoice, TargetArgs};
use crate::destination::{self, Destination};
use crate::hdr::HdrFile;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::protocols::{Echo, Http, Message, Mqtt, Protocol, Redis, Text, Tls, WebSocket};
use crate::run::{Client, Conn, Server, Settings};
use crate::stateless;
use crate::stats::RunStats;
use crate::summary;
use crate::target::{self, Target};
use crate::target_stats::TargetStats;
use crate::verdict::{Outcome, judge};

/// Slots beyond the goal, for connections that have ended but are not removed yet.
const SLOTS_SPARE: usize = 64;

/// Fewer consecutive failures may be chance.
const CONSECUTIVE_FAILURES_MIN: u32 = 100;

/// Runs the program; returns its exit code.
pub fn run_command() -> ExitCode {
    let code = obey();
    command_line::flush_log();
    code
}

fn obey() -> ExitCode {
    match args::parse() {
        Ok(arguments) if arguments.check.check => print_check(arguments),
        Ok(arguments) => run(arguments).unwrap_or_else(|error| fail(SHORT, &error.to_string())),
        Err(code) => code,
    }
}

fn print_check(mut arguments: Arguments) -> ExitCode {
    match target::machine_and_requirements(&mut arguments, raise_limit()) {
        Ok((machine, requirements)) => arguments.check.report(&machine, &requirements),
        Err(line) => fail(SHORT, &line),
    }
}

fn run(mut arguments: Arguments) -> Result<ExitCode, String> {
    let started_at = SystemTime::now();
    if let Some(json) = &arguments.json {
        command_line::check_output(json)?;
    }
    let hdr = arguments.hdr.as_deref().map(HdrFile::create).transpose()?;
    check_sources(&arguments)?;
    let descriptors = raise_limit();
    let (machine, requirements) = target::machine_and_requirements(&mut arguments, descriptors)?;
    let arguments = &arguments;
    let target = target::within_limits(arguments, &machine, &requirements);
    announce(&target)?;
    let endpoint = arguments.metrics.map(Endpoint::open).transpose()?;
    let stats = connect(arguments, &target, &machine, endpoint)?;
    let outcome = judge(&target, &stats, &destinations(arguments));
    let mut record = record(arguments, &stats, outcome, descriptors, target.file_table, started_at);
    record.thresholds =
        arguments.fail_if.iter().map(|condition| condition.judge(&record)).collect();
    let written = hdr.map_or(Ok(()), |hdr| hdr.write(&stats, started_at));
    let code = report(arguments, &record)?;
    written.map(|()| code)
}

/// If that is refused, the run continues within the present limit.
fn raise_limit() -> Option<DescriptorLimit> {
    let raised = raise_descriptor_limit()
        .inspect_err(|error| log::warn!("the descriptor limit can't be read: {error}"))
        .ok()?;
    if let Some(line) = raised.shortfall {
        log::warn!("{line}");
    }
    Some(raised.limit)
}

fn check_sources(arguments: &Arguments) -> Result<(), String> {
    for &source in &arguments.sources {
        UdpSocket::bind(source.socket_addr(0)).map_err(|error| {
            format!(
                "--source {source} can't be used: {error}; use addresses of this machine \
                 (`ip address` lists them)"
            )
        })?;
    }
    Ok(())
}

/// Logs the target, and the limit that prevents a higher one.
fn announce(target: &Target) -> Result<(), String> {
    match &target.cap {
        Some(cap) if target.goal == 0 => {
            return Err(format!("no connection can be opened: {}", cap.detail));
        }
        Some(cap) if target.is_asked => {
            log::warn!("target: {}; {}", format::count(target.connections), cap.detail);
        }
        Some(cap) => log::info!("target: {}", cap.detail),
        None => log::info!("target: {}", format::count(target.connections)),
    }
    Ok(())
}

fn connect(
    arguments: &Arguments,
    target: &Target,
    machine: &Machine,
    endpoint: Option<Endpoint>,
) -> Result<RunStats, String> {
    let settings = Settings {
        goal: target.goal,
        verify: arguments.verify,
        hold: arguments.hold,
        workload: arguments.workload,
        timeout: arguments.connect_timeout,
        in_flight_max: arguments.in_flight_max,
        stages: arguments.stages.clone(),
        churn_per_second: arguments.churn_per_second,
        storm: arguments.storm,
        endpoint,
        local_ports: machine.local_ports.clone(),
        consecutive_failures_max: CONSECUTIVE_FAILURES_MIN.max(2 * u32::from(arguments.ports)),
    };
    log::debug!(
        "{} to {} ({} in all) from {} sources, at most {} in flight, {} for each; in {}",
        arguments.protocol(),
        destination::list(&destinations(arguments)),
        format::counted(arguments.endpoints(), "address"),
        arguments.sources.len().max(1),
        settings.in_flight_max,
        format::duration(settings.timeout.as_secs_f64()),
        target.file_table,
    );
    log::debug!("{settings:?}");
    let mut stats =
        RunStats::new(Instant::now(), arguments.verify).ok_or("can't start the histogram")?;
    stats.workload.keeps_intervals = arguments.hdr.is_some();
    let local_ports = machine.local_ports_free().unwrap_or(LOCAL_PORTS_DEFAULT.len() as u64);
    let run = Setup { target, settings, arguments, local_ports, stats };
    let message = arguments.message.clone();
    match arguments.scheme {
        Scheme::Tcp | Scheme::Tls => match message {
            None => run.play_over(|_| Echo),
            Some(MessageChoice::OfSize(bytes)) => run.play_over(|_| Message::of_size(bytes)),
            Some(MessageChoice::Text { message, expected }) => {
                let answer = expected.unwrap_or_else(|| message.clone());
                run.play_over(|_| Message::new(message.clone(), answer.clone()))
            }
        },
        Scheme::Redis => run.play_over(|_| Redis::new()),
        Scheme::Http | Scheme::Https => run.play_over(|to| Http::new(&to.authority, &to.path)),
        Scheme::Ws | Scheme::Wss => {
            let text = message.map(|choice| {
                let (message, expected) = choice.into_text();
                Text { answer: expected.unwrap_or_else(|| message.clone()), message }
            });
            run.play_over(|to| WebSocket::new(&to.authority, &to.path, text.clone()))
        }
        Scheme::Mqtt | Scheme::Mqtts => {
            let payload = message.map(|choice| choice.into_text().0);
            run.play_over(|_| Mqtt::new(std::process::id(), payload.clone()))
        }
    }
}

/// Everything that a run needs except its protocol.
struct Setup<'a> {
    target: &'a Target,
    settings: Settings,
    arguments: &'a Arguments,
    /// Ports that the kernel may choose.
    local_ports: u64,
    stats: RunStats,
}

impl Setup<'_> {
    /// Through TLS, for a scheme that has it.
    fn play_over<P: Protocol>(
        self,
        protocol: impl Fn(&TargetArgs) -> P,
    ) -> Result<RunStats, String> {
        let Arguments { scheme, trust, .. } = self.arguments;
        if scheme.is_tls() {
            self.play(|to| Tls::new(protocol(to), &to.host, trust))
        } else {
            self.play(|to| Ok(protocol(to)))
        }
    }

    fn play<P: Protocol>(
        self,
        protocol: impl Fn(&TargetArgs) -> Result<P, String>,
    ) -> Result<RunStats, String> {
        let Self { target, settings, arguments, local_ports, stats } = self;
        let mut servers = Vec::with_capacity(arguments.targets.len());
        for to in &arguments.targets {
            let destination = to.destination.clone();
            let plan = plan(arguments, &destination, local_ports);
            servers.push(Server { destination, plan, protocol: protocol(to)? });
        }
        if let Some(setup) = &arguments.stateless {
            let progress = Progress::new(u64::from(target.goal));
            let protocol = servers.remove(0).protocol;
            return stateless::play(setup, settings, protocol, stats, &progress);
        }
        let mut reactor = reactor(target)
            .map_err(|error| format!("can't start: {error}; {}", remedy(target, &error)))?;
        let progress = Progress::new(u64::from(target.goal));
        let mut client = Client::new(settings, servers, stats, &progress)
            .map_err(|errno| format!("can't start the clock: {errno}; see ulimit -n"))?;
        client.start(reactor.context());
        let outcome = reactor.run(&mut client);
        progress.end();
        outcome.map_err(|error| format!("can't wait for events: {error}"))?;
        Ok(client.into_stats())
    }
}

/// The remedy if a reactor can't be created.
fn remedy(target: &Target, error: &reactor::Error) -> &'static str {
    match target.file_table {
        _ if error.errno().is_none() => "see ulimit -v and ulimit -d, or use a lower -c",
        FileTable::Process => "see ulimit -n",
        FileTable::Registered => "see ulimit -l and ulimit -n, or use --file-table process",
    }
}

fn reactor<S>(target: &Target) -> Result<Reactor<Conn<S>>, reactor::Error> {
    let config = Config {
        connections_max: target.goal as usize + SLOTS_SPARE,
        file_table: target.file_table.into(),
        ..Config::default()
    };
    let mut reactor = Reactor::new(&config)?;
    reactor.context().watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    Ok(reactor)
}

/// The routes to a server. A Unix-domain socket has one, which never runs out.
fn plan(arguments: &Arguments, to: &Destination, local_ports: u64) -> Plan {
    if to.is_unix() {
        return Plan::new(Vec::new(), 0, 1, u64::MAX);
    }
    Plan::new(arguments.sources.clone(), to.first_port(), to.ports(), local_ports)
}

fn destinations(arguments: &Arguments) -> Vec<Destination> {
    match arguments.stateless {
        Some(setup) => vec![Destination::new(SocketAddr::V4(setup.server), setup.ports)],
        None => arguments.destinations().cloned().collect(),
    }
}

/// The targets' parts of the run. The outcome leaves out failures past a target that was lowered.
fn targets(arguments: &Arguments, stats: &RunStats, outcome: &Outcome) -> Vec<TargetRecord> {
    let given = arguments.targets.iter().map(|target| target.text.clone());
    if let [_] = arguments.targets[..] {
        let only = |target| TargetRecord {
            target,
            attempted: stats.attempted,
            established: stats.peak,
            failed: outcome.failed,
            lost: stats.lost,
        };
        return given.map(only).collect();
    }
    let part = |(target, part): (String, &TargetStats)| TargetRecord {
        target,
        attempted: part.attempted,
        established: part.peak,
        failed: part.failed.min(outcome.failed),
        lost: part.lost,
    };
    given.zip(&stats.targets).map(part).collect()
}

fn record(
    arguments: &Arguments,
    stats: &RunStats,
    outcome: Outcome,
    descriptors: Option<DescriptorLimit>,
    file_table: FileTable,
    started_at: SystemTime,
) -> ClientRecord {
    let ramp_seconds = stats.ramp.as_secs_f64();
    let held = held_between(stats);
    let usage = ProcessUsage::read();
    let destinations = destinations(arguments);
    ClientRecord {
        targets: targets(arguments, stats, &outcome),
        head: Head::new(CLIENT_SCHEMA, env!("CARGO_PKG_VERSION"), started_at),
        target: outcome.target,
        attempted: stats.attempted,
        established: stats.peak,
        verified: stats.verified(),
        failed: outcome.failed,
        failures: stats.failures.by_name().clone(),
        lost: stats.lost,
        limit: outcome.limit,
        ramp_seconds,
        connects_per_second: per_second(stats.peak, ramp_seconds),
        connect_latency_us: stats.connect_latency.percentiles(),
        verdict: outcome.verdict,
        destination: destinations.iter().map(Destination::first).collect::<Vec<_>>().join(", "),
        ports: destinations.iter().map(|to| u64::from(to.ports())).sum(),
        sources: arguments.sources.iter().map(ToString::to_string).collect(),
        verified_passes: stats.verified_passes.clone(),
        retried: stats.retried,
        refused_by_server: stats.refused_by_server,
        hold_seconds: stats.hold.as_secs_f64(),
        verify_seconds: stats.verify_seconds.clone(),
        ramp_series: stats.ramp_series(),
        descriptors: descriptors.map(|limit| Descriptors { soft: limit.soft, hard: limit.hard }),
        limit_detail: outcome.detail,
        held_from: held.map(|(from, _)| time_text(from)),
        held_until: held.map(|(_, until)| time_text(until)),
        file_table: arguments.stateless.is_none().then(|| file_table.into()),
        protocol: arguments.protocol().to_owned(),
        connect_histogram: stats.connect_latency.encoded(),
        workload: stats.workload.record(),
        churn: arguments.churn_per_second.map(|_| stats.churn.record()),
        storm: arguments.storm.then(|| stats.storm.record()),
        thresholds: Vec::new(),
        stateless: arguments.stateless.is_some(),
        retransmitted: stats.retransmitted,
        state_bytes: stats.state_bytes,
        rss_peak_bytes: usage.and_then(|usage| usage.rss_peak_bytes),
        cpu_user_seconds: usage.map(|usage| usage.cpu_user_seconds),
        cpu_system_seconds: usage.map(|usage| usage.cpu_system_seconds),
        ramp_cpu_seconds: stats.ramp_cpu_seconds,
        in_flight_max: Some(arguments.in_flight_max as u64),
        has_rate: !arguments.stages.is_empty(),
        connection_bytes: stats.usage.connection_bytes(),
        process_bytes_per_connection: stats.usage.process_bytes_per_connection(),
        hold_series: stats.hold_series(),
        processors: processors(),
    }
}

/// The wall-clock times from and until which the maximum was held; `None` if no connection was held.
fn held_between(stats: &RunStats) -> Option<(SystemTime, SystemTime)> {
    let first_connect = SystemTime::now().checked_sub(stats.started.elapsed())?;
    let last_pass = stats.verify_seconds.get(1).copied().unwrap_or(0.0);
    let held = stats.hold + Duration::try_from_secs_f64(last_pass).ok()?;
    let from = first_connect + stats.ramp;
    (stats.peak > 0).then_some((from, from + held))
}

/// Writes the record and the summary; returns the exit code. If no connection was held, one line gives the reason. The
/// summary is also printed if the record can't be written. A signal ends the program while a pipe is not read.
fn report(arguments: &Arguments, record: &ClientRecord) -> Result<ExitCode, String> {
    let write = |json: &Output| json.write(record);
    let (waiting, prompt) = match &arguments.json {
        Some(json) if json.may_wait() => (Some(json), None),
        prompt => (None, prompt.as_ref()),
    };
    let written = prompt.map_or(Ok(()), write);
    command_line::give_signals_back();
    let mut printed = Ok(());
    let code = match (&record.limit_detail, record.established) {
        (Some(detail), 0) => fail(SHORT, &detail.to_string()),
        _ => {
            let text = summary::render(record);
            match arguments.json {
                Some(Output::Stdout) => print_error(&text),
                _ => printed = command_line::print_summary(&text),
            }
            let passed = record.thresholds.iter().all(|threshold| threshold.passed);
            match record.verdict {
                Verdict::Reached | Verdict::Held if passed => ExitCode::SUCCESS,
                _ => ExitCode::from(SHORT),
            }
        }
    };
    let written = written.and_then(|()| waiting.map_or(Ok(()), write));
    written.map_err(|error| {
        command_line::flush_log();
        error.print_instead(record)
    })?;
    printed.map(|()| code)
}
