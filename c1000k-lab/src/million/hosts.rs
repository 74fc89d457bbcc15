//! The hosts of a native run: this one alone, or three network namespaces.

use std::path::Path;

use anyhow::Result;
use c1000k_report::run::Topology;
use nix::unistd::Pid;

use super::plan::{Plan, address};
use crate::namespace::Network;
use crate::snapshot;

/// Above the server's ports.
const LOCAL_PORTS: &str = "10000 65535";

const HASH_TABLE: &str = "net/ipv4/tcp_child_ehash_entries";

/// By their names, the server's first.
#[derive(Debug)]
pub(super) struct Hosts(Vec<(&'static str, Option<Network>)>);

impl Hosts {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        match plan.topology {
            Topology::OneHost if plan.stateless => {
                Ok(Self(vec![("one", Some(host(&cradle(plan.connections)?)?))]))
            }
            Topology::OneHost => Ok(Self(vec![("one", None)])),
            Topology::ThreeHosts => three(plan.connections),
        }
    }

    /// Where a program runs; `None` is this host.
    pub(super) fn network(&self, program: &str) -> Option<&Network> {
        match &self.0[..] {
            [(_, only)] => only.as_ref(),
            hosts => hosts.iter().find(|(name, _)| *name == program)?.1.as_ref(),
        }
    }

    /// What the kernel says of itself on each of them; of the server's process where its host is.
    pub(super) fn snapshot(&self, out: &Path, moment: &str, server: Option<Pid>) -> Result<()> {
        for (place, (name, network)) in self.0.iter().enumerate() {
            let folder = out.join("snapshots").join(name).join(moment);
            let take = || snapshot::take(&folder, server.filter(|_| place == 0));
            network.as_ref().map_or_else(take, |network| network.run(take))?;
        }
        Ok(())
    }
}

/// The namespace that others are made in. They have hash tables of their own for their connections where it says so, from
/// Linux 6.1 on.
fn cradle(connections: u64) -> Result<Network> {
    let cradle = Network::new()?;
    if Path::new("/proc/sys").join(HASH_TABLE).exists() {
        cradle.set(HASH_TABLE, &connections.to_string())?;
    }
    Ok(cradle)
}

fn host(cradle: &Network) -> Result<Network> {
    let host = cradle.run(Network::new)?;
    host.ip(&["link", "set", "lo", "up"])?;
    host.set("net/ipv4/ip_local_port_range", LOCAL_PORTS)?;
    Ok(host)
}

/// The server's host is joined to each client's by a link.
fn three(connections: u64) -> Result<Hosts> {
    let cradle = cradle(connections)?;
    let host = || host(&cradle);
    let (server, clients) = (host()?, [host()?, host()?]);
    for (link, client) in (1..).zip(&clients) {
        let (here, there) = (format!("eth{link}"), client.path().display().to_string());
        server
            .ip(&["link", "add", &here, "type", "veth", "peer", "name", "eth0", "netns", &there])?;
        for (host, end, device) in [(&server, 1, here.as_str()), (client, 2, "eth0")] {
            host.ip(&["address", "add", &format!("{}/24", address(link, end)), "dev", device])?;
            host.ip(&["link", "set", device, "up"])?;
        }
    }
    let [first, second] = clients.map(Some);
    Ok(Hosts(vec![("server", Some(server)), ("client-1", first), ("client-2", second)]))
}
