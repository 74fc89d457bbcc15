//! The run of N connections in guests: one with both ends, or a server and two clients.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Error, Result, bail};
use c1000k_host::check::{Requirements, Role, predict};
use c1000k_host::format;
use c1000k_host::memory::memory_available;
use c1000k_report::run::Topology;
use nix::sys::signal::Signal;

use super::guests::{ALONE, Guests, wait_for};
use super::initramfs::More;
use super::order::{Condition, Message, Order, Start};
use super::packages::Packages;
use super::qemu::{Kit, Spec};
use crate::million::plan::{FIRST_PORT, Plan, Share};
use crate::patience;
use crate::programs::Programs;
use crate::say::say;

const MB: u64 = 1_000_000;

/// What a kernel takes beside connections.
const KERNEL_MB: u64 = 256;

/// What stays with the host: qemu itself, caches, the rest.
const HOST_RESERVE_MB: u64 = 768;

/// Sockets that may be left of those that came with the connections.
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

/// Longer than emulated guests take to open, prove or close all connections.
fn seconds_max(plan: &Plan) -> u64 {
    300 + plan.connections / 250
}

fn start(name: &str, words: &str) -> Order {
    let words = words.split(' ').map(str::to_owned).collect();
    Order::Start(Start { name: name.to_owned(), user: 0, cgroup: None, words })
}

/// Its time-out is generous, for a guest may be emulated and slow.
fn start_client(share: &Share) -> Order {
    let Share { client, server, connections } = share;
    let words = format!(
        "c1000k-client {server} {FIRST_PORT} -c {connections} --hold 10s --connect-timeout 60s \
         --json /out/{client}.json"
    );
    start(client, &words)
}

/// Fails early where there is not enough memory, or no qemu or kernel to be had. Returns the MiB that the guests get: as
/// asked for, or a fifth more than is needed, where the host has it.
pub(crate) fn prepare(plan: &Plan) -> Result<u64> {
    let connections = format::count(plan.connections);
    let kernels = match plan.topology {
        Topology::OneHost => 1,
        Topology::ThreeHosts => 3,
    };
    let needed = predict(&Requirements::new(Role::Both, plan.connections)).total_bytes() / MB
        + kernels * KERNEL_MB;
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

/// What a person sees: the clients' progress and their last words, and how the server ended.
fn shown(message: &Message) -> Option<String> {
    match message {
        Message::Progress { name, line } if name != "server" => Some(line.clone()),
        Message::Ended { name, code, words } if name == "server" => match code {
            0 => Some("the server ended with code 0".to_owned()),
            _ => Some(format!("the server ended with code {code}: {words}")),
        },
        Message::Ended { words, .. } => Some(words.clone()),
        _ => None,
    }
}

/// Boots the guests, has the connections opened, held, proven and closed, and returns the clients' exit code.
pub(crate) fn run(plan: &Plan, programs: Programs) -> Result<u8> {
    let memory_mb = plan.memory_mb.context("how much memory the guests get")?;
    let kit = Kit::new(programs)?;
    let accelerator = kit.accelerator.name();
    let mut record = OpenOptions::new().append(true).open(plan.out.join("machine.txt"))?;
    writeln!(record, "accel: {accelerator}")?;
    let machine = kit.machine(&plan.out, &More::default())?;
    let specs = guests(plan, memory_mb);
    let names: Vec<&str> = specs.iter().map(|spec| spec.name).collect();
    say(format!(
        "booting {} with {} MB in all ({accelerator})",
        names.join(" "),
        format::count(memory_mb)
    ));
    let began = Instant::now();
    let mut guests = Guests::boot(machine, &plan.out, &specs, shown)?;
    let server = specs[0].name;
    guests.ask(server, start("server", "c1000k-server --json /out/server.json"))?;
    guests.ask(server, wait_for(Condition::says("server", "ready"), 120))?;
    let sockets = wait_for(Condition::Drained { sockets_max: u64::MAX }, 0);
    let sockets = guests.ask_all(&names, &sockets)?;
    guests.ask_all(&names, &Order::Snapshot("before".to_owned()))?;
    say(format!("ready after {} s; opening connections", began.elapsed().as_secs()));
    let code = run_clients(plan, &mut guests)?;
    // The server's guest first, which waits until all its sockets are gone: a client's guest may still have its last
    // RSTs in the queue before the cable, and must not be switched off with them.
    for (spec, before) in specs.iter().zip(sockets) {
        let sockets_max = before.parse::<u64>()? + SOCKETS_LEFT_MAX;
        let drained = Condition::DrainedOrStalled { sockets_max };
        guests.ask(spec.name, wait_for(drained, seconds_max(plan)))?;
        end(plan, &mut guests, spec.name, spec.name == server)?;
    }
    Ok(code)
}

/// Returns their exit code. The peak is one moment for all guests: a client that holds is stopped until each does.
fn run_clients(plan: &Plan, guests: &mut Guests<'_>) -> Result<u8> {
    let shares = plan.shares();
    let host =
        |share: &Share| if plan.topology == Topology::OneHost { ALONE } else { share.client };
    let hosts: Vec<&str> = shares.iter().map(host).collect();
    let wait = |place: usize, condition: fn(String) -> Condition| {
        wait_for(condition(shares[place].client.to_owned()), seconds_max(plan))
    };
    patience::be_gentle_once();
    guests.clients = shares.iter().map(|share| (host(share), share.client)).collect();
    guests.ask_each(&hosts, |place| start_client(&shares[place]))?;
    let held = guests.ask_each(&hosts, |place| wait(place, Condition::Holds))?;
    // One that ends does not hold any more.
    if held.iter().any(Result::is_ok) {
        guests.ask_all(&guests.names(), &Order::Snapshot("peak".to_owned()))?;
        guests.ask_each(&hosts, |place| Order::signal(shares[place].client, Signal::SIGCONT))?;
    }
    let mut worst = 0;
    for code in guests.ask_each(&hosts, |place| wait(place, Condition::Ended))? {
        let code: u8 = code.map_err(Error::msg)?.parse()?;
        // Above 2 a signal has ended it.
        worst = worst.max(if code > 2 { 1 } else { code });
    }
    Ok(worst)
}

/// Once its connections are gone.
fn end(plan: &Plan, guests: &mut Guests<'_>, name: &'static str, has_server: bool) -> Result<()> {
    // What RCU and the slab caches still free.
    guests.ask(name, Order::Run("sleep 2".to_owned()))?;
    guests.ask(name, Order::Snapshot("after".to_owned()))?;
    if has_server {
        // One that has died takes no signal.
        let _ = guests.ask(name, Order::signal("server", Signal::SIGTERM));
        let ended = Condition::Ended("server".to_owned());
        guests.ask(name, wait_for(ended, seconds_max(plan)))?;
    }
    guests.ask(name, Order::Snapshot("end".to_owned()))?;
    guests.collect(name)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn plan(topology: Topology, memory_mb: u64) -> Plan {
        let (out, server_memory_mb) = (PathBuf::new(), Some(600));
        let (connections, memory_mb) = (15_001, Some(memory_mb));
        Plan { connections, topology, stateless: false, memory_mb, server_memory_mb, out }
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
