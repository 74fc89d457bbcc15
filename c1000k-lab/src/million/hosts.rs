//! The hosts of a native run: this machine, or network namespaces.

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

/// By name, the server's first.
#[derive(Debug)]
pub(super) struct Hosts(Vec<(&'static str, Option<Network>)>);

impl Hosts {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        match plan.topology {
            Topology::OneHost if plan.stateless => {
                Ok(Self(vec![("one", Some(host(&parent_namespace(plan.connections)?)?))]))
            }
            Topology::OneHost => Ok(Self(vec![("one", None)])),
            Topology::ThreeHosts => three(plan.connections),
        }
    }

    /// The network namespace of a program; `None` is this process's.
    pub(super) fn network(&self, program: &str) -> Option<&Network> {
        match &self.0[..] {
            [(_, only)] => only.as_ref(),
            hosts => hosts.iter().find(|(name, _)| *name == program)?.1.as_ref(),
        }
    }

    /// Takes a snapshot on each host, on the first one with the server's process.
    pub(super) fn snapshot(&self, out: &Path, moment: &str, server: Option<Pid>) -> Result<()> {
        for (index, (name, network)) in self.0.iter().enumerate() {
            let folder = out.join("snapshots").join(name).join(moment);
            let take = || snapshot::take(&folder, server.filter(|_| index == 0));
            network.as_ref().map_or_else(take, |network| network.run(take))?;
        }
        Ok(())
    }
}

/// The namespace in which the hosts are created. Since Linux 6.1 it determines the size of their separate hash tables of
/// connections.
fn parent_namespace(connections: u64) -> Result<Network> {
    let parent = Network::new()?;
    if Path::new("/proc/sys").join(HASH_TABLE).exists() {
        parent.set(HASH_TABLE, &connections.to_string())?;
    }
    Ok(parent)
}

fn host(parent: &Network) -> Result<Network> {
    let host = parent.run(Network::new)?;
    host.ip("link set lo up")?;
    host.set("net/ipv4/ip_local_port_range", LOCAL_PORTS)?;
    Ok(host)
}

/// A link connects the server's host to each client's.
fn three(connections: u64) -> Result<Hosts> {
    let parent = parent_namespace(connections)?;
    let host = || host(&parent);
    let (server, clients) = (host()?, [host()?, host()?]);
    for (link, client) in (1..).zip(&clients) {
        let device = format!("eth{link}");
        let namespace = client.path().display().to_string();
        server.ip(&format!("link add {device} type veth peer name eth0 netns {namespace}"))?;
        for (host, end, device) in [(&server, 1, device.as_str()), (client, 2, "eth0")] {
            host.ip(&format!("address add {}/24 dev {device}", address(link, end)))?;
            host.ip(&format!("link set {device} up"))?;
        }
    }
    let [first, second] = clients.map(Some);
    Ok(Hosts(vec![("server", Some(server)), ("client-1", first), ("client-2", second)]))
}
