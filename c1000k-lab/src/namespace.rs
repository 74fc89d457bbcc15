//! Network namespaces, which have no names and end with the processes in them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getgid, getpid, getuid};

use crate::faults::Skipped;
use crate::process::tool;

static NUMBERS: AtomicU32 = AtomicU32::new(0);

/// How many can have their own addresses, in all processes together.
const NUMBERS_MAX: u32 = 4_000;

/// The name of the link's end in the namespace.
const INSIDE: &str = "inside";

/// The address of no card.
const NO_CARD: &str = "02:c1:00:00:00:01";

/// Where network namespaces can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Maker {
    /// Here, by this process as it is.
    Here,
    /// In a user namespace of an ordinary user's own.
    OwnUser,
}

impl Maker {
    /// `None` where none can be made, or not be set up.
    pub(crate) fn find() -> Option<Self> {
        let user = ["--user", "--map-root-user", "--net", "true"];
        tool("ip", &["-V"]).ok()?;
        let here = tool("unshare", &["--net", "true"]).map(|()| Self::Here);
        here.or_else(|_| tool("unshare", &user).map(|()| Self::OwnUser)).ok()
    }

    /// Lets this process make them. Call it before any thread is started.
    pub(crate) fn prepare(self) -> Result<()> {
        if self == Self::OwnUser {
            let (user, group) = (getuid(), getgid());
            unshare(CloneFlags::CLONE_NEWUSER)?;
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
            fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
        }
        Ok(())
    }
}

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Network(File);

impl Network {
    /// Inherits settings from the network namespace of the calling thread.
    pub(crate) fn new() -> Result<Self> {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        });
        made.join().map_err(|_| anyhow!("the thread that makes it panicked"))?
    }

    /// Its file, for other processes: as long as this one lives.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", getpid(), self.0.as_raw_fd()))
    }

    /// Takes the calling thread there, permanently.
    fn enter(&self) -> Result<()> {
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs a function there, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let there = scope.spawn(|| self.enter().and_then(|()| what()));
            there.join().map_err(|_| anyhow!("the thread in the namespace panicked"))?
        })
    }

    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<()> {
        self.run(|| tool("ip", arguments))
    }

    /// Writes a setting of the namespace, as in `net/ipv4/tcp_rmem`.
    pub(crate) fn set(&self, setting: &str, value: &str) -> Result<()> {
        self.run(|| {
            fs::write(format!("/proc/sys/{setting}"), value).with_context(|| setting.to_owned())
        })
    }
}

/// A network namespace that is joined to this one by a link: `outer` here, `inner` there.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) there: Network,
    device: String,
    pub(crate) outer: Ipv4Addr,
    pub(crate) inner: Ipv4Addr,
}

impl Namespace {
    /// # Errors
    /// [`Skipped`] where none can be made.
    pub(crate) fn new() -> Result<Self> {
        Self::make().map_err(|why| Skipped(format!("no network namespace here: {why:#}")).into())
    }

    fn make() -> Result<Self> {
        let there = Network::new()?;
        let number = (getpid().as_raw().cast_unsigned().wrapping_mul(16)
            + NUMBERS.fetch_add(1, Ordering::Relaxed))
            % NUMBERS_MAX;
        // 198.18/15 is for benchmarks.
        let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + 4 * number;
        let space = Self {
            there,
            device: format!("c1kf{number}"),
            outer: Ipv4Addr::from(first + 1),
            inner: Ipv4Addr::from(first + 2),
        };
        let here = getpid().to_string();
        space.there.ip(&[
            "link",
            "add",
            INSIDE,
            "type",
            "veth",
            "peer",
            "name",
            &space.device,
            "netns",
            &here,
        ])?;
        space.there.ip(&["addr", "add", &format!("{}/30", space.inner), "dev", INSIDE])?;
        tool("ip", &["addr", "add", &format!("{}/30", space.outer), "dev", &space.device])?;
        tool("ip", &["link", "set", &space.device, "up"])?;
        space.there.ip(&["link", "set", "lo", "up"])?;
        space.link_up()?;
        Ok(space)
    }

    /// Takes the far end of the link down, so that this end keeps its route and nothing is sent by another.
    pub(crate) fn link_down(&self) -> Result<()> {
        self.there.ip(&["link", "set", INSIDE, "down"])
    }

    pub(crate) fn link_up(&self) -> Result<()> {
        self.there.ip(&["link", "set", INSIDE, "up"])?;
        // Forged addresses get their answers sent, to nowhere.
        self.there.ip(&["route", "replace", "default", "via", &self.outer.to_string()])
    }

    /// This end no longer answers, and the other sees no error: its frames go to the address of no card.
    pub(crate) fn vanish(&self) -> Result<()> {
        let card = fs::read_to_string(format!("/sys/class/net/{}/address", self.device))?;
        let outer = self.outer.to_string();
        self.there.ip(&[
            "neigh",
            "replace",
            &outer,
            "lladdr",
            card.trim(),
            "dev",
            INSIDE,
            "nud",
            "permanent",
        ])?;
        tool("ip", &["link", "set", &self.device, "address", NO_CARD])
    }

    /// The value of one of its own TCP counters.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let text = self.there.run(|| Ok(fs::read_to_string("/proc/thread-self/net/netstat")?))?;
        counters(&text)
            .get(name)
            .copied()
            .with_context(|| format!("the kernel has no counter {name}"))
    }
}

/// A line of names and one of values.
fn counters(netstat: &str) -> BTreeMap<&str, u64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let values = values.split_whitespace().map_while(|value| value.parse().ok());
    names.split_whitespace().zip(values).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_name() {
        let text = "IpExt: InNoRoutes\nIpExt: 9\nTcpExt: SyncookiesSent ListenDrops\nTcpExt: 7 8\n";
        assert_eq!(counters(text).get("ListenDrops"), Some(&8));
        assert_eq!(counters(text).get("InNoRoutes"), None);
    }
}
