//! The native run: server and clients are processes of this machine.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use c1000k_host::usage::SocketUsage;
use c1000k_report::run::Topology;
use nix::sys::signal::Signal;

use super::hosts::Hosts;
use super::plan::{FIRST_PORT, Plan, Share};
use super::teardown::{self, SOCKETS_LEFT_MAX, Teardown};
use crate::print_line;
use crate::process::{Isolation, Process, isolated};
use crate::programs::Programs;
use crate::wait::{self, sleep};

const HOLD: &str = "5s";
const READY_TIMEOUT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The teardown ends if no socket has been closed for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Lets the clients open, hold, verify and close the connections; returns the worst exit code of the clients.
pub(super) fn run(plan: &Plan, programs: &Programs) -> Result<u8> {
    // The first interrupt ends the clients early.
    wait::defer_first_interrupt();
    let native = Native { plan, path: path(programs)?, hosts: Hosts::new(plan)? };
    let mut server = native.start_server()?;
    native.snapshot("before", Some(&server))?;
    let sockets_before = sockets()?;
    let mut clients = native.start_clients()?;
    native.watch(&server, &mut clients)?;
    let mut code = 0;
    for client in &mut clients {
        code = code.max(match client.process.wait(POLL_INTERVAL)? {
            code @ 0..=2 => code as u8,
            // A signal ended it.
            _ => 1,
        });
    }
    let deadline =
        Instant::now() + teardown::TIMEOUT + Duration::from_secs(plan.connections / 10_000);
    let sockets_max = sockets_before + SOCKETS_LEFT_MAX;
    let mut teardown = Teardown::new(sockets_max, STALL_TIMEOUT, Instant::now());
    while !teardown.is_over(sockets()?, Instant::now()) && Instant::now() < deadline {
        sleep(POLL_INTERVAL)?;
    }
    native.snapshot("after", Some(&server))?;
    native.stop(&mut server)?;
    native.snapshot("end", None)?;
    Ok(code)
}

/// A `PATH` with the directory of the programs first: they are started by their names, so that no record has a path of
/// this machine.
fn path(programs: &Programs) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths([programs.0.clone()].into_iter().chain(env::split_paths(&path)))?)
}

/// The allocated TCP sockets of all namespaces, including those that were reset and are not freed yet.
fn sockets() -> Result<u64> {
    Ok(SocketUsage::read().context("/proc/self/net/sockstat can't be read")?.tcp_alloc)
}

/// A client of the run.
#[derive(Debug)]
struct Client {
    name: &'static str,
    process: Process,
    /// Bytes of its log that were shown.
    shown: usize,
    /// It holds its connections, and is stopped until all clients do.
    holds: bool,
}

#[derive(Debug)]
struct Native<'a> {
    plan: &'a Plan,
    path: OsString,
    hosts: Hosts,
}

impl Native<'_> {
    /// Starts a program in the directory of the run, in a separate process group: Ctrl-C reaches only this process,
    /// which then ends the others in order.
    fn start(&self, program: &str, name: &str, arguments: &[&str]) -> Result<Process> {
        let place = Isolation {
            network: self.hosts.network(name).map(|network| network.path()),
            is_killed_first: true,
            ..Isolation::default()
        };
        let out = &self.plan.out;
        let mut command = isolated(&place, program)?;
        command.args(arguments).env("PATH", &self.path).current_dir(out).process_group(0);
        Process::spawn_logged(name, &mut command, out.join(format!("{name}.log")))
    }

    fn start_server(&self) -> Result<Process> {
        let bind = match self.plan.topology {
            Topology::OneHost if !self.plan.stateless => "127.0.0.1",
            _ => "0.0.0.0",
        };
        let arguments = ["--bind", bind, "--json", "server.json"];
        let mut server = self.start("c1000k-server", "server", &arguments)?;
        server.await_log("ready", READY_TIMEOUT).context("the server could not be started")?;
        Ok(server)
    }

    fn start_clients(&self) -> Result<Vec<Client>> {
        let start = |Share { client, server, connections }| {
            let (first, count) = (FIRST_PORT.to_string(), connections.to_string());
            let record = format!("{client}.json");
            let mut arguments =
                vec![&*server, &first, "-c", &count, "--hold", HOLD, "--json", &record];
            arguments.extend(self.plan.stateless.then_some("--stateless"));
            let process = self.start("c1000k-client", client, &arguments)?;
            Ok(Client { name: client, process, shown: 0, holds: false })
        };
        self.plan.shares().into_iter().map(start).collect()
    }

    /// Prints the clients' logs until all have ended, and takes the snapshot of the peak when all of them hold. After
    /// the timeout they get the time of a teardown to end early.
    fn watch(&self, server: &Process, clients: &mut [Client]) -> Result<()> {
        let timeout = Duration::from_secs(60 + self.plan.connections / 200);
        let deadline = Instant::now() + timeout;
        let (mut is_peak_taken, mut is_ending) = (false, false);
        loop {
            if !relay(clients)? {
                return Ok(());
            }
            let all_hold =
                clients.iter().all(|client| client.holds || !client.process.is_running());
            if !is_peak_taken && all_hold && clients.iter().any(|client| client.holds) {
                self.snapshot("peak", Some(server))?;
                is_peak_taken = true;
                signal(clients, &[Signal::SIGCONT]);
            }
            let is_late = Instant::now() >= deadline;
            if !is_ending && (is_late || wait::is_early_end_requested()) {
                if is_late {
                    print_line(format!(
                        "timeout: the clients have not ended after {} s",
                        timeout.as_secs()
                    ));
                }
                print_line(
                    "ending early: the clients close their connections and write their records",
                );
                signal(clients, &[Signal::SIGINT, Signal::SIGCONT]);
                is_ending = true;
            }
            if Instant::now() >= deadline + teardown::TIMEOUT {
                bail!(
                    "the clients did not end within {} s; their files are in {}",
                    teardown::TIMEOUT.as_secs(),
                    self.plan.out.display()
                );
            }
            sleep(POLL_INTERVAL)?;
        }
    }

    fn stop(&self, server: &mut Process) -> Result<()> {
        // It may have ended by itself.
        let _ = server.signal(Signal::SIGTERM);
        let outcome = match server.wait(teardown::TIMEOUT) {
            Ok(0) => return Ok(()),
            Ok(code) => format!("code {code}"),
            Err(why) => why.to_string(),
        };
        server.kill()?;
        let log = self.plan.out.join("server.log");
        print_line(format!("the server ended with {outcome}: see {}", log.display()));
        Ok(())
    }

    fn snapshot(&self, moment: &str, server: Option<&Process>) -> Result<()> {
        self.hosts.snapshot(&self.plan.out, moment, server.map(Process::pid))
    }
}

/// Prints the new lines of the clients' logs, and returns whether a client still runs.
fn relay(clients: &mut [Client]) -> Result<bool> {
    let mut is_running = false;
    for client in clients {
        // Before its log is read, which then is complete.
        is_running |= client.process.is_running();
        let log = client.process.log()?;
        let complete = log.rfind('\n').map_or(0, |end| end + 1);
        for line in log.get(client.shown..complete).unwrap_or_default().lines() {
            print_line(format!("  {}: {line}", client.name));
            if line.contains("holding ") && line.contains(" connections") {
                // The kernel keeps its connections open meanwhile.
                let _ = client.process.signal(Signal::SIGSTOP);
                client.holds = true;
            }
        }
        client.shown = complete;
    }
    Ok(is_running)
}

/// Signals all clients; those that have ended ignore it.
fn signal(clients: &[Client], signals: &[Signal]) {
    for client in clients {
        for &signal in signals {
            let _ = client.process.signal(signal);
        }
    }
}
