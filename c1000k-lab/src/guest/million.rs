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
use super::initramfs::Extras;
use super::packages::Packages;
use super::qemu::{Kit, Spec};
use super::request::{Condition, Message, Request, Start};
use crate::million::plan::{FIRST_PORT, Plan, Share};
use crate::million::teardown::SOCKETS_LEFT_MAX;
use crate::print_line;
use crate::programs::Programs;
use crate::wait;

const MB: u64 = 1_000_000;

/// For a kernel, without connections.
const KERNEL_MB: u64 = 256;

/// For qemu, caches and everything else of the host.
const HOST_RESERVE_MB: u64 = 768;

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

/// A timeout for emulated guests that open, verify or close all connections.
fn timeout_seconds(plan: &Plan) -> u64 {
    300 + plan.connections / 250
}

fn start(name: &str, command: &str) -> Request {
    let command = command.split(' ').map(str::to_owned).collect();
    Request::Start(Start { name: name.to_owned(), user: 0, cgroup: None, command })
}

/// With a long timeout, because an emulated guest is slow.
fn start_client(share: &Share) -> Request {
    let Share { client, server, connections } = share;
    let command = format!(
        "c1000k-client {server} {FIRST_PORT} -c {connections} --hold 10s --connect-timeout 60s \
         --json /out/{client}.json"
    );
    start(client, &command)
}

/// Fails early without enough memory, qemu or a kernel. Returns the guests' memory in MiB: as requested, or a fifth
/// more than needed if the host has it.
pub(crate) fn prepare(plan: &Plan) -> Result<u64> {
    let connections = format::count(plan.connections);
    let kernels = if plan.topology == Topology::OneHost { 1 } else { 3 };
    let needed = predict(&Requirements::new(Role::Both, plan.connections)).total_bytes() / MB
        + kernels * KERNEL_MB;
    let room = memory_available().map_or(0, |room| room.bytes >> 20);
    let available = room.saturating_sub(HOST_RESERVE_MB);
    let memory_mb = match plan.memory_mb {
        Some(requested) if requested > available => bail!(
            "--memory requests {} MB, and this machine has {} MB available",
            format::count(requested),
            format::count(available)
        ),
        Some(requested) => requested,
        None if available < needed => bail!(
            "{connections} connections in a virtual machine need {} MB, and this machine has {} MB available: free some, or open fewer \
             connections",
            format::count(needed),
            format::count(available)
        ),
        None => available.min(needed * 6 / 5),
    };
    if memory_mb < needed {
        print_line(format!(
            "capped: {connections} connections need {} MB, and --memory gives {} MB: opening the maximum that fits",
            format::count(needed),
            format::count(memory_mb)
        ));
    }
    Packages::fetch()?;
    Ok(memory_mb)
}

/// The clients' progress and last lines, and the server's exit code.
fn shown(message: &Message) -> Option<String> {
    match message {
        Message::Progress { name, line } if name != "server" => Some(line.clone()),
        Message::Ended { name, code, output } if name == "server" => match code {
            0 => Some("the server ended with code 0".to_owned()),
            _ => Some(format!("the server ended with code {code}: {output}")),
        },
        Message::Ended { output, .. } => Some(output.clone()),
        _ => None,
    }
}

/// Boots the guests, lets the clients open, hold, verify and close the connections, and returns the clients' exit code.
pub(crate) fn run(plan: &Plan, programs: Programs) -> Result<u8> {
    let memory_mb = plan.memory_mb.context("the guests' memory is not known")?;
    let kit = Kit::new(programs)?;
    let accelerator = kit.accelerator.name();
    let mut record = OpenOptions::new().append(true).open(plan.out.join("machine.txt"))?;
    writeln!(record, "accel: {accelerator}")?;
    let machine = kit.machine(&plan.out, &Extras::default())?;
    let specs = guests(plan, memory_mb);
    let names: Vec<&str> = specs.iter().map(|spec| spec.name).collect();
    print_line(format!(
        "booting {} with {} MB in all ({accelerator})",
        names.join(" "),
        format::count(memory_mb)
    ));
    let began = Instant::now();
    let mut guests = Guests::boot(machine, &plan.out, &specs, shown)?;
    let server = specs[0].name;
    guests.request(server, start("server", "c1000k-server --json /out/server.json"))?;
    guests.request(server, wait_for(Condition::logged("server", "ready"), 120))?;
    let sockets = wait_for(Condition::Drained { sockets_max: u64::MAX }, 0);
    let sockets = guests.request_all(&names, &sockets)?;
    guests.request_all(&names, &Request::Snapshot("before".to_owned()))?;
    print_line(format!("ready after {} s; opening connections", began.elapsed().as_secs()));
    let code = run_clients(plan, &mut guests)?;
    // The server's guest first, until all its sockets are closed: a client's guest may still have its last RSTs in the
    // queue before the cable, and must not be powered off with them.
    for (spec, before) in specs.iter().zip(sockets) {
        let sockets_max = before.parse::<u64>()? + SOCKETS_LEFT_MAX;
        let drained = Condition::DrainedOrStalled { sockets_max };
        guests.request(spec.name, wait_for(drained, timeout_seconds(plan)))?;
        end(plan, &mut guests, spec.name, spec.name == server)?;
    }
    Ok(code)
}

/// Returns the worst exit code. The snapshots of the peak are taken at one moment: a client that holds its connections
/// is stopped until all clients do.
fn run_clients(plan: &Plan, guests: &mut Guests<'_>) -> Result<u8> {
    let shares = plan.shares();
    let host =
        |share: &Share| if plan.topology == Topology::OneHost { ALONE } else { share.client };
    let hosts: Vec<&str> = shares.iter().map(host).collect();
    let wait = |place: usize, condition: fn(String) -> Condition| {
        wait_for(condition(shares[place].client.to_owned()), timeout_seconds(plan))
    };
    wait::defer_first_interrupt();
    guests.clients = shares.iter().map(|share| (host(share), share.client)).collect();
    guests.request_each(&hosts, |place| start_client(&shares[place]))?;
    let held = guests.request_each(&hosts, |place| wait(place, Condition::Holds))?;
    // A client that has ended holds none.
    if held.iter().any(Result::is_ok) {
        guests.request_all(&guests.names(), &Request::Snapshot("peak".to_owned()))?;
        guests
            .request_each(&hosts, |place| Request::signal(shares[place].client, Signal::SIGCONT))?;
    }
    let mut worst = 0;
    for code in guests.request_each(&hosts, |place| wait(place, Condition::Ended))? {
        let code: u8 = code.map_err(Error::msg)?.parse()?;
        // A signal ended it if the code is above 2.
        worst = worst.max(if code > 2 { 1 } else { code });
    }
    Ok(worst)
}

/// Takes the last snapshots of a guest without connections, and ends it.
fn end(plan: &Plan, guests: &mut Guests<'_>, name: &'static str, has_server: bool) -> Result<()> {
    // RCU and the slab caches free memory meanwhile.
    guests.request(name, Request::Run("sleep 2".to_owned()))?;
    guests.request(name, Request::Snapshot("after".to_owned()))?;
    if has_server {
        // It may have ended by itself.
        let _ = guests.request(name, Request::signal("server", Signal::SIGTERM));
        let ended = Condition::Ended("server".to_owned());
        guests.request(name, wait_for(ended, timeout_seconds(plan)))?;
    }
    guests.request(name, Request::Snapshot("end".to_owned()))?;
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
            assert!(why.starts_with("--memory requests 1,099,511,627,776 MB"), "{why}");
        }
    }
}
