//! Server and clients as processes of this machine.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use c1000k_host::usage::SocketUsage;
use c1000k_report::run::Topology;
use nix::sys::signal::Signal;

use super::hosts::Hosts;
use super::plan::{FIRST_PORT, Plan, Share};
use super::teardown::{self, Teardown};
use crate::patience::{self, sleep};
use crate::process::{Place, Process, inside};
use crate::programs::Programs;
use crate::say::say;

const HOLD: &str = "5s";
const READY_WITHIN: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(200);

/// Lines of the log of a server that does not start.
const LAST_LINES: usize = 5;

/// Has the connections opened, held, proven and closed, and returns the clients' exit code.
pub(super) fn run(plan: &Plan, programs: &Programs) -> Result<u8> {
    // The first interrupt ends the clients early.
    patience::be_gentle_once();
    let native = Native { plan, path: path(programs)?, hosts: Hosts::new(plan)? };
    let mut server = native.start_server()?;
    native.snapshot("before", Some(&server))?;
    let sockets_before = sockets()?;
    let mut clients = native.start_clients()?;
    native.watch(&server, &mut clients)?;
    let mut code = 0;
    for client in &mut clients {
        // Above 2 or without a code a signal has ended it.
        let ended = client.process.wait(PAUSE)?.code();
        code = code.max(
            ended.and_then(|code| u8::try_from(code).ok()).filter(|&code| code <= 2).unwrap_or(1),
        );
    }
    let mut teardown = Teardown::new(sockets_before, plan.connections, Instant::now());
    while !teardown.is_over(sockets()?, Instant::now()) {
        sleep(PAUSE)?;
    }
    native.snapshot("after", Some(&server))?;
    native.stop(&mut server)?;
    native.snapshot("end", None)?;
    Ok(code)
}

/// The programs first, by their bare names: so no record names a path of this machine.
fn path(programs: &Programs) -> Result<OsString> {
    let others = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths([programs.0.clone()].into_iter().chain(env::split_paths(&others)))?)
}

/// TCP sockets of all namespaces that are allocated, those that were reset and are not freed yet included.
fn sockets() -> Result<u64> {
    Ok(SocketUsage::read().context("/proc/self/net/sockstat can't be read")?.tcp_alloc)
}

/// A program of the run.
#[derive(Debug)]
struct Program {
    name: &'static str,
    process: Process,
    log: Log,
    /// A client that holds is stopped until all of them do.
    holds: bool,
}

/// A log that is still written.
#[derive(Debug)]
struct Log {
    file: BufReader<File>,
    line: Vec<u8>,
}

impl Log {
    /// The next line that is whole.
    fn next(&mut self) -> Result<Option<String>> {
        self.file.read_until(b'\n', &mut self.line)?;
        if !self.line.ends_with(b"\n") {
            return Ok(None);
        }
        let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        Ok(Some(line))
    }
}

#[derive(Debug)]
struct Native<'a> {
    plan: &'a Plan,
    path: OsString,
    hosts: Hosts,
}

impl Native<'_> {
    /// In the folder of the run, and in a process group of its own: Ctrl-C reaches this process alone, which then ends the
    /// others in order.
    fn start(&self, program: &str, name: &'static str, words: &[&str]) -> Result<Program> {
        let log = self.plan.out.join(format!("{name}.log"));
        let file = File::create(&log)?;
        let place = Place {
            network: self.hosts.network(name).map(|network| network.path()),
            is_expendable: true,
            ..Place::default()
        };
        let mut command = inside(&place, program)?;
        command.args(words).env("PATH", &self.path).current_dir(&self.plan.out).process_group(0);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let process = Process::spawn(name, &mut command)?;
        let log = Log { file: BufReader::new(File::open(log)?), line: Vec::new() };
        Ok(Program { name, process, log, holds: false })
    }

    fn start_server(&self) -> Result<Program> {
        let bind = match self.plan.topology {
            Topology::OneHost if !self.plan.stateless => "127.0.0.1",
            _ => "0.0.0.0",
        };
        let words = ["--bind", bind, "--json", "server.json"];
        let mut server = self.start("c1000k-server", "server", &words)?;
        let (ends, mut last) = (Instant::now() + READY_WITHIN, Vec::new());
        loop {
            // Before its log is read, which then is all of it.
            let is_running = server.process.is_running();
            while let Some(line) = server.log.next()? {
                if is_ready(&line) {
                    return Ok(server);
                }
                last.push(line);
            }
            if is_running && Instant::now() < ends {
                sleep(PAUSE)?;
                continue;
            }
            for line in last.iter().skip(last.len().saturating_sub(LAST_LINES)) {
                eprintln!("{line}");
            }
            if is_running {
                bail!(
                    "the server did not get ready within {} s; its last lines are above",
                    READY_WITHIN.as_secs()
                );
            }
            bail!("the server could not be started; its last lines are above");
        }
    }

    fn start_clients(&self) -> Result<Vec<Program>> {
        let start = |share: Share| {
            let (first, count) = (FIRST_PORT.to_string(), share.connections.to_string());
            let record = format!("{}.json", share.client);
            let mut words =
                vec![&*share.server, &first, "-c", &count, "--hold", HOLD, "--json", &record];
            words.extend(self.plan.stateless.then_some("--stateless"));
            self.start("c1000k-client", share.client, &words)
        };
        self.plan.shares().into_iter().map(start).collect()
    }

    /// Relays the clients' logs until all have ended, and takes the peak when all of them hold. Past their time they get
    /// as long as a teardown to end by themselves.
    fn watch(&self, server: &Program, clients: &mut [Program]) -> Result<()> {
        let within = Duration::from_secs(60 + self.plan.connections / 200);
        let ends = Instant::now() + within;
        let (mut is_peak_taken, mut is_ending) = (false, false);
        loop {
            let is_running = relay(clients)?;
            if !is_running {
                return Ok(());
            }
            let all_hold =
                clients.iter().all(|client| client.holds || !client.process.is_running());
            if !is_peak_taken && all_hold && clients.iter().any(|client| client.holds) {
                self.snapshot("peak", Some(server))?;
                is_peak_taken = true;
                signal(clients, &[Signal::SIGCONT]);
            }
            let is_late = Instant::now() >= ends;
            if !is_ending && (is_late || patience::is_asked_to_end_early()) {
                if is_late {
                    say(format!(
                        "time-out: the clients were not done after {} s; ending them",
                        within.as_secs()
                    ));
                }
                say("ending early: the clients close what they hold and write their records");
                signal(clients, &[Signal::SIGINT, Signal::SIGCONT]);
                is_ending = true;
            }
            if Instant::now() >= ends + teardown::WITHIN {
                bail!(
                    "the clients did not end within {} s; what there is lies in {}",
                    teardown::WITHIN.as_secs(),
                    self.plan.out.display()
                );
            }
            sleep(PAUSE)?;
        }
    }

    fn stop(&self, server: &mut Program) -> Result<()> {
        // It may have ended by itself.
        let _ = server.process.signal(Signal::SIGTERM);
        let code = match server.process.wait(teardown::WITHIN) {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => status.to_string(),
            Err(why) => why.to_string(),
        };
        server.process.kill()?;
        say(format!(
            "the server ended with {code}: see {}",
            self.plan.out.join("server.log").display()
        ));
        Ok(())
    }

    fn snapshot(&self, moment: &str, server: Option<&Program>) -> Result<()> {
        let server = server.map(|server| server.process.pid());
        self.hosts.snapshot(&self.plan.out, moment, server)
    }
}

/// As a word: not in "already in use".
fn is_ready(line: &str) -> bool {
    line.split_whitespace().any(|word| word.starts_with("ready"))
}

/// Shows what the clients have said since, and returns whether one still runs.
fn relay(clients: &mut [Program]) -> Result<bool> {
    let mut is_running = false;
    for client in clients {
        // Before its log is read, which then is all of it.
        is_running |= client.process.is_running();
        while let Some(line) = client.log.next()? {
            say(format!("  {}: {line}", client.name));
            if line.contains("holding ") && line.contains(" connections") {
                // Its connections stay up meanwhile, for they are the kernel's.
                let _ = client.process.signal(Signal::SIGSTOP);
                client.holds = true;
            }
        }
    }
    Ok(is_running)
}

/// To those that still run.
fn signal(clients: &[Program], signals: &[Signal]) {
    for client in clients {
        for &signal in signals {
            let _ = client.process.signal(signal);
        }
    }
}
