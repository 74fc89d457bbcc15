//! Network namespaces without names: each exists while it is open or a process runs in it.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow};
use c1000k_host::usage::NetCounters;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getgid, getpid, getuid};

use crate::faults::Skipped;
use crate::process::tool;

static NUMBERS: AtomicU32 = AtomicU32::new(0);

/// Namespaces with separate addresses, of all processes together.
const NUMBERS_MAX: u32 = 4_000;

/// The name of the link's end in the namespace.
const INSIDE: &str = "inside";

/// A MAC address that no card has.
const NO_CARD: &str = "02:c1:00:00:00:01";

/// How this process may create network namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    Direct,
    /// In its own user namespace, in which an ordinary user is root.
    UserNamespace,
}

impl Privilege {
    /// `None` if it can't create them, or can't set up links in them.
    pub(crate) fn find() -> Option<Self> {
        let user = ["--user", "--map-root-user", "--net", "true"];
        tool("ip", &["-V"]).ok()?;
        let direct = tool("unshare", &["--net", "true"]).map(|()| Self::Direct);
        direct.or_else(|_| tool("unshare", &user).map(|()| Self::UserNamespace)).ok()
    }

    /// Enters the user namespace if necessary. Call it before any thread is started.
    pub(crate) fn enter(self) -> Result<()> {
        if self == Self::UserNamespace {
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
    /// Inherits settings of the calling thread's network namespace.
    pub(crate) fn new() -> Result<Self> {
        let thread = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        });
        thread.join().map_err(|_| anyhow!("the thread that creates a namespace panicked"))?
    }

    /// Its file, for other processes, which exists while this one is open.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", getpid(), self.0.as_raw_fd()))
    }

    /// Moves the calling thread into it, permanently.
    fn enter(&self) -> Result<()> {
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs a function in it, on a separate thread.
    pub(crate) fn run<T: Send>(&self, function: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| self.enter().and_then(|()| function()));
            thread.join().map_err(|_| anyhow!("the thread in the namespace panicked"))?
        })
    }

    pub(crate) fn ip(&self, arguments: &str) -> Result<()> {
        self.run(|| ip(arguments))
    }

    /// Writes a setting of the namespace, as in `net/ipv4/tcp_rmem`.
    pub(crate) fn set(&self, setting: &str, value: &str) -> Result<()> {
        self.run(|| {
            fs::write(format!("/proc/sys/{setting}"), value).with_context(|| setting.to_owned())
        })
    }
}

/// A network namespace and its link to this one: `outer` is the address here, `inner` the address in the namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) network: Network,
    device: String,
    pub(crate) outer: Ipv4Addr,
    pub(crate) inner: Ipv4Addr,
}

impl Namespace {
    /// # Errors
    /// [`Skipped`] if none can be created.
    pub(crate) fn new() -> Result<Self> {
        Self::create().map_err(|why| {
            Skipped(format!("no network namespace can be created here: {why:#}")).into()
        })
    }

    fn create() -> Result<Self> {
        let network = Network::new()?;
        let number = (getpid().as_raw().cast_unsigned().wrapping_mul(16)
            + NUMBERS.fetch_add(1, Ordering::Relaxed))
            % NUMBERS_MAX;
        // 198.18.0.0/15 is reserved for benchmarks.
        let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + 4 * number;
        let space = Self {
            network,
            device: format!("c1kf{number}"),
            outer: Ipv4Addr::from(first + 1),
            inner: Ipv4Addr::from(first + 2),
        };
        let (device, here) = (&space.device, getpid());
        space
            .network
            .ip(&format!("link add {INSIDE} type veth peer name {device} netns {here}"))?;
        space.network.ip(&format!("addr add {}/30 dev {INSIDE}", space.inner))?;
        ip(&format!("addr add {}/30 dev {device}", space.outer))?;
        ip(&format!("link set {device} up"))?;
        space.network.ip("link set lo up")?;
        space.link_up()?;
        Ok(space)
    }

    /// Takes down the far end of the link, so that this end keeps its route and no packet takes another one.
    pub(crate) fn link_down(&self) -> Result<()> {
        self.network.ip(&format!("link set {INSIDE} down"))
    }

    pub(crate) fn link_up(&self) -> Result<()> {
        self.network.ip(&format!("link set {INSIDE} up"))?;
        // Replies to forged addresses need a route.
        self.network.ip(&format!("route replace default via {}", self.outer))
    }

    /// Makes this end unreachable: the other end sees no error, and its frames go to a card that does not exist.
    pub(crate) fn vanish(&self) -> Result<()> {
        let Self { device, outer, .. } = self;
        let path = format!("/sys/class/net/{device}/address");
        let card = fs::read_to_string(&path).context(path)?;
        let card = card.trim();
        self.network
            .ip(&format!("neigh replace {outer} lladdr {card} dev {INSIDE} nud permanent"))?;
        ip(&format!("link set {device} address {NO_CARD}"))
    }

    /// One of the TCP counters of the namespace.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let counters = self.network.run(|| {
            let netstat = fs::read_to_string("/proc/thread-self/net/netstat")?;
            Ok(NetCounters::parse(&netstat, ""))
        })?;
        counters.value(name).with_context(|| format!("the kernel has no counter {name}"))
    }
}

fn ip(arguments: &str) -> Result<()> {
    tool("ip", &arguments.split(' ').collect::<Vec<_>>())
}
