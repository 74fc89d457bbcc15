//! The run itself: N connections are opened, held, proven and closed, natively or in guests.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use c1000k_host::check::{Need, Role, predict};
use c1000k_host::format;
use c1000k_host::memory::memory_available;
use c1000k_report::run::Topology;
use nix::sys::signal::Signal;

use super::namespaces;
use super::plan::{FIRST_PORT, Plan, Share};
use crate::guest::initramfs::More;
use crate::guest::packages::Packages;
use crate::guest::qemu::{Kit, Spec};
use crate::hosts::request::{Condition, Message, Request};
use crate::hosts::{ALONE, Hosts};
use crate::patience;
use crate::programs::Programs;
use crate::say;

const MB: u64 = 1_000_000;

/// Memory of a kernel without connections.
const KERNEL_MB: u64 = 256;

/// What stays with the host: qemu itself, caches, the rest.
const HOST_RESERVE_MB: u64 = 768;

const SERVER: &str = "server";

/// For clients that are past their time to write their records.
const END_WITHIN: Duration = Duration::from_secs(60);

/// More sockets than before the run that may be left after it.
const SOCKETS_LEFT_MAX: u64 = 50;

/// The server's guest first.
fn guests(plan: &Plan, memory_mb: u64) -> Vec<Spec> {
    let connections = plan.connections;
    if plan.topology == Topology::OneHost {
        return vec![Spec { name: ALONE, memory_mb, connections, end: 1, cables: &[] }];
    }
    let server_mb = plan.server_memory_mb.unwrap_or(memory_mb / 2);
    let cables: [&[u8]; 2] = [&[1], &[2]];
    let server =
        Spec { name: "server", memory_mb: server_mb, connections, end: 1, cables: &[1, 2] };
    let clients = plan.shares().into_iter().zip(cables).map(|(share, cables)| Spec {
        name: share.client,
        memory_mb: (memory_mb - server_mb) / 2,
        connections: share.connections,
        end: 2,
        cables,
    });
    [server].into_iter().chain(clients).collect()
}

/// What differs between a native run and one in guests, which may be emulated and slow.
#[derive(Debug)]
struct Tempo {
    client_options: &'static str,
    /// For each of opening, proving and closing all connections.
    seconds_max: u64,
    /// A wait for fewer sockets ends when there are no fewer for that long.
    stall_seconds: u64,
    /// For RCU and the slab caches to free the rest.
    pause_seconds: u64,
}

/// Fails early where there is not enough memory, or no qemu or kernel available. Returns the MiB that the guests get: as
/// asked for, or a fifth more than is needed, where the host has it.
pub(crate) fn prepare(plan: &Plan) -> Result<u64> {
    let connections = format::count(plan.connections);
    let kernels = match plan.topology {
        Topology::OneHost => 1,
        Topology::ThreeHosts => 3,
    };
    let needed =
        predict(&Need::new(Role::Both, plan.connections)).total_bytes() / MB + kernels * KERNEL_MB;
    let room = memory_available().map_or(0, |room| room.bytes >> 20);
    let available = room.saturating_sub(HOST_RESERVE_MB);
    let memory_mb = match plan.memory_mb {
        Some(asked) if asked > available => bail!(
            "--memory asks for {} MB, and this machine can give {} MB",
            format::count(asked),
            format::count(available)
        ),
        Some(asked) => asked,
        None if available < needed => bail!(
            "{connections} connections in a virtual machine need {} MB, and this machine can give {} MB: free some, or ask \
             for fewer",
            format::count(needed),
            format::count(available)
        ),
        None => available.min(needed * 6 / 5),
    };
    if memory_mb < needed {
        say(format!(
            "capped: {connections} connections need some {} MB, and --memory gives {} MB: trying as far as it goes",
            format::count(needed),
            format::count(memory_mb)
        ));
    }
    Packages::fetch()?;
    Ok(memory_mb)
}

/// What is printed: the clients' progress and their last words, and how the server ended.
fn shown(message: &Message) -> Option<String> {
    match message {
        Message::Progress { name, lines } if name != SERVER => Some(prefixed(name, lines)),
        Message::Ended { name, code, words } if name == SERVER => match code {
            0 => Some("the server ended with code 0".to_owned()),
            _ => Some(format!("the server ended with code {code}: {words}")),
        },
        Message::Ended { name, words, .. } => Some(prefixed(name, words)),
        _ => None,
    }
}

/// With three hosts a client has the name of its host, which is printed already.
fn prefixed(name: &str, lines: &str) -> String {
    match name {
        "client" => lines.lines().map(|line| format!("client: {line}\n")).collect(),
        _ => lines.to_owned(),
    }
}

/// Returns the clients' exit code.
pub(super) fn natively(plan: &Plan, programs: &Programs) -> Result<u8> {
    note_accelerator(plan, "none")?;
    let networks = namespaces::new(plan)?;
    let agents = namespaces::start_agents(&networks, plan, programs)?;
    let hosts = Hosts::connect(&plan.out, agents, shown)?;
    let seconds_max = 60 + plan.connections / 200;
    let client_options = "--hold 5s";
    let tempo = Tempo { client_options, seconds_max, stall_seconds: 5, pause_seconds: 0 };
    Run { plan, hosts, tempo }.run()
}

/// The same in guests, which are booted first.
pub(super) fn in_guests(plan: &Plan, programs: Programs) -> Result<u8> {
    let memory_mb = plan.memory_mb.context("how much memory the guests get")?;
    let kit = Kit::new(programs)?;
    let accelerator = kit.accelerator.name();
    note_accelerator(plan, accelerator)?;
    let machine = kit.machine(&plan.out, &More::default())?;
    let specs = guests(plan, memory_mb);
    let names: Vec<&str> = specs.iter().map(|spec| spec.name).collect();
    let (names, memory) = (names.join(" "), format::count(memory_mb));
    say(format!("booting {names} with {memory} MB in all ({accelerator})"));
    let began = Instant::now();
    let hosts = machine.boot_all(&plan.out, &specs, shown)?;
    say(format!("ready after {} s", began.elapsed().as_secs()));
    let seconds_max = 300 + plan.connections / 250;
    let client_options = "--hold 10s --connect-timeout 60s";
    let tempo = Tempo { client_options, seconds_max, stall_seconds: 20, pause_seconds: 2 };
    Run { plan, hosts, tempo }.run()
}

fn note_accelerator(plan: &Plan, name: &str) -> Result<()> {
    let mut record = OpenOptions::new().append(true).open(plan.out.join("machine.txt"))?;
    Ok(writeln!(record, "accel: {name}")?)
}

struct Run<'a> {
    plan: &'a Plan,
    /// The server's first.
    hosts: Hosts,
    tempo: Tempo,
}

impl Run<'_> {
    fn run(mut self) -> Result<u8> {
        let names = self.hosts.names();
        let bind = match self.plan.topology {
            Topology::OneHost => "127.0.0.1",
            Topology::ThreeHosts => "0.0.0.0",
        };
        let words = format!("c1000k-server --bind {bind} --json server.json");
        self.hosts.ask(names[0], Request::start(SERVER, 0, None, &words))?;
        let ready = Request::wait_for(Condition::logged(SERVER, "ready"), 120);
        self.hosts.ask(names[0], ready).context("the server could not be started")?;
        let sockets = self.hosts.ask_all(&names, &self.drained(u64::MAX))?;
        self.snapshot("before")?;
        let code = self.run_clients()?;
        // The server's host first, which waits until all its sockets are gone: a client's guest may still have its last
        // RSTs in the queue before the cable, and must not be switched off with them.
        for (place, (name, before)) in names.into_iter().zip(sockets).enumerate() {
            let enough = self.drained(before.parse::<u64>()? + SOCKETS_LEFT_MAX);
            self.hosts.ask(name, enough)?;
            self.hosts.ask(name, Request::Run(format!("sleep {}", self.tempo.pause_seconds)))?;
            self.hosts.ask(name, Request::Snapshot("after".to_owned()))?;
            if place == 0 {
                self.end_server(name)?;
            }
            self.hosts.ask(name, Request::Snapshot("end".to_owned()))?;
            self.hosts.collect(name)?;
        }
        Ok(code)
    }

    fn drained(&self, sockets_max: u64) -> Request {
        let stall_seconds = self.tempo.stall_seconds;
        let drained = Condition::Drained { sockets_max, stall_seconds };
        Request::wait_for(drained, self.tempo.seconds_max)
    }

    /// On all hosts at once.
    fn snapshot(&mut self, moment: &str) -> Result<()> {
        let names = self.hosts.names();
        self.hosts.ask_all(&names, &Request::Snapshot(moment.to_owned())).map(drop)
    }

    /// Returns their exit code. The peak is one moment for all hosts: a client that holds is stopped until each does.
    fn run_clients(&mut self) -> Result<u8> {
        let shares = self.plan.shares();
        let is_alone = self.plan.topology == Topology::OneHost;
        let host = |share: &Share| if is_alone { ALONE } else { share.client };
        let names: Vec<&str> = shares.iter().map(host).collect();
        let start = |share: &Share| {
            let Share { client, server, connections } = share;
            let options = self.tempo.client_options;
            let words = format!(
                "c1000k-client {server} {FIRST_PORT} -c {connections} {options} --json {client}.json"
            );
            Request::start(client, 0, None, &words)
        };
        let wait = |place: usize, condition: fn(String) -> Condition, seconds| {
            Request::wait_for(condition(shares[place].client.to_owned()), seconds)
        };
        patience::be_gentle_once();
        self.hosts.clients = shares.iter().map(|share| (host(share), share.client)).collect();
        let (began, seconds_max) = (Instant::now(), self.tempo.seconds_max);
        self.hosts.ask_each(&names, |place| start(&shares[place]))?;
        let held =
            self.hosts.ask_each(&names, |place| wait(place, Condition::Holds, seconds_max))?;
        // A client that has ended holds nothing.
        if held.iter().any(Result::is_ok) {
            self.snapshot("peak")?;
            self.hosts
                .ask_each(&names, |place| Request::signal(shares[place].client, Signal::SIGCONT))?;
        }
        let mut codes =
            self.hosts.ask_each(&names, |place| wait(place, Condition::Ended, seconds_max))?;
        if codes.iter().any(Result::is_err) {
            say(format!(
                "time-out: the clients were not done after {} s",
                began.elapsed().as_secs()
            ));
            self.hosts.end_clients("")?;
            let within = END_WITHIN.as_secs();
            codes = self.hosts.ask_each(&names, |place| wait(place, Condition::Ended, within))?;
        }
        let mut worst = 0;
        for code in codes {
            let code: u8 = code.map_err(Error::msg)?.parse()?;
            // Above 2 a signal has ended it.
            worst = worst.max(if code > 2 { 1 } else { code });
        }
        Ok(worst)
    }

    /// It may have ended by itself; one that does not is killed with its host.
    fn end_server(&mut self, host: &str) -> Result<()> {
        let ended = Condition::Ended(SERVER.to_owned());
        let ended = Request::wait_for(ended, self.tempo.seconds_max);
        self.hosts.ask_each(&[host], |_| Request::signal(SERVER, Signal::SIGTERM))?;
        for why in
            self.hosts.ask_each(&[host], |_| ended.clone())?.into_iter().filter_map(Result::err)
        {
            say(format!("the server did not end: {why}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn plan(topology: Topology, memory_mb: u64) -> Plan {
        let (out, server_memory_mb) = (PathBuf::new(), Some(600));
        Plan { connections: 15_001, topology, memory_mb: Some(memory_mb), server_memory_mb, out }
    }

    #[test]
    fn three_guests_share_the_memory_and_each_client_has_a_cable_to_the_server() {
        let specs = guests(&plan(Topology::ThreeHosts, 1_000), 1_000);
        let memory: Vec<u64> = specs.iter().map(|spec| spec.memory_mb).collect();
        assert_eq!(memory, [600, 200, 200]);
        assert_eq!(specs[1].connections + specs[2].connections, specs[0].connections);
        let cables: Vec<_> = specs.iter().map(|spec| (spec.end, spec.cables)).collect();
        assert_eq!(cables, [(1, &[1, 2][..]), (2, &[1]), (2, &[2])]);
    }

    #[test]
    fn more_memory_than_there_is_is_refused_before_anything_else() {
        for topology in [Topology::OneHost, Topology::ThreeHosts] {
            let why = prepare(&plan(topology, 1 << 40)).unwrap_err().to_string();
            assert!(why.starts_with("--memory asks for 1,099,511,627,776 MB"), "{why}");
        }
    }
}
