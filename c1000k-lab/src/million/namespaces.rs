//! The hosts of a native run: this machine itself, or three network namespaces.

use std::env;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdout, Stdio};

use anyhow::{Context, Result};
use c1000k_report::run::Topology;

use super::plan::{Plan, address};
use crate::hosts::{ALONE, Host};
use crate::namespace::Network;
use crate::process::{Place, Process, inside};
use crate::programs::Programs;

/// Above the server's ports.
const LOCAL_PORTS: &str = "10000 65535";

const HASH_TABLE: &str = "net/ipv4/tcp_child_ehash_entries";

/// A host's name, and its network where that is not this machine's own.
pub(super) type Named = (&'static str, Option<Network>);

/// The server's first.
pub(super) fn new(plan: &Plan) -> Result<Vec<Named>> {
    match plan.topology {
        Topology::OneHost => Ok(vec![(ALONE, None)]),
        Topology::ThreeHosts => three(plan.connections),
    }
}

/// Starts the agent of each host. A network lasts as long as it is open here or something runs in it.
pub(super) fn start_agents(
    networks: &[Named],
    plan: &Plan,
    programs: &Programs,
) -> Result<Vec<(Host, ChildStdout)>> {
    // The programs first, by their bare names: so no record names a path of this machine.
    let others = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([programs.0.clone()].into_iter().chain(env::split_paths(&others)))?;
    networks.iter().map(|named| start_agent(named, &path, &plan.out)).collect()
}

/// In a process group of its own: Ctrl-C reaches the lab alone, which then ends the programs in order.
fn start_agent((name, network): &Named, path: &OsStr, out: &Path) -> Result<(Host, ChildStdout)> {
    let place = Place { network: network.as_ref().map(Network::path), ..Place::default() };
    let mut command = inside(&place, env::current_exe()?)?;
    command.args(["agent", name]).env("PATH", path).current_dir(out).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Process::spawn(&format!("agent of host '{name}'"), &mut command)?;
    let (requests, messages) = process.pipes().context("the agent has two pipes")?;
    let (logs, disk) = (Vec::new(), None);
    let host = Host { name, process, requests, logs, disk, machine: None, has_ended: false };
    Ok((host, messages))
}

/// The server's host is joined to each client's by a link.
fn three(connections: u64) -> Result<Vec<Named>> {
    // A namespace has a hash table of its own for its connections where the one that it is made in says so, from Linux
    // 6.1 on.
    let cradle = Network::new()?;
    if Path::new("/proc/sys").join(HASH_TABLE).exists() {
        cradle.set(HASH_TABLE, &connections.to_string())?;
    }
    let host = || {
        let host = cradle.run(Network::new)?;
        host.ip("link set lo up")?;
        host.set("net/ipv4/ip_local_port_range", LOCAL_PORTS)?;
        Ok::<_, anyhow::Error>(host)
    };
    let (server, clients) = (host()?, [host()?, host()?]);
    for (link, client) in (1..).zip(&clients) {
        let there = client.path().display().to_string();
        server.ip(&format!("link add eth{link} type veth peer name eth0 netns {there}"))?;
        for (host, end, device) in [(&server, 1, format!("eth{link}")), (client, 2, "eth0".into())]
        {
            host.ip(&format!("address add {}/24 dev {device}", address(link, end)))?;
            host.ip(&format!("link set {device} up"))?;
        }
    }
    let [first, second] = clients.map(Some);
    Ok(vec![("server", Some(server)), ("client-1", first), ("client-2", second)])
}
