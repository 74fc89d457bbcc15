//! Process 1 of a guest: prepares the kernel for N connections, does what the host orders, and ships what it kept.

mod orders;
mod programs;
mod wait;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::getpid;
use procfs::{Current, Meminfo};

use super::initramfs::{BUSYBOX, MODULES_LISTED};
use super::order::Message;
use crate::million::plan::address;
use orders::Guest;

/// Where the programs work, and what is shipped.
const OUT: &str = "/out";

/// What the console says when orders are taken.
pub(super) const BOOTED: &str = "lab: booted";

/// Is process 1 of a guest
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The guest's name
    name: String,
    /// What the kernel is prepared for
    connections: u64,
    /// Which end of its cables this guest is
    #[arg(long, default_value_t = 1)]
    end: u8,
    /// Each cable that it has, by number
    #[arg(long)]
    cable: Vec<u8>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if getpid().as_raw() != 1 {
        bail!("only as process 1 of a guest, which `scenarios` and `million --vm` boot");
    }
    for (kind, path) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>).context(path)?;
    }
    // Programs that are not root write here too.
    fs::set_permissions(OUT, fs::Permissions::from_mode(0o1777))?;
    Command::new(BUSYBOX).args(["--install", "-s", "/bin"]).status()?;
    load_modules()?;
    raise_limits(arguments.connections)?;
    join_network(arguments)?;
    let mut guest = Guest::new(arguments)?;
    println!("{BOOTED}");
    guest.send(&Message::Booted(describe_machine()?))?;
    guest.follow_orders()?;
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(ExitCode::SUCCESS)
}

/// In the order of the list, in which they depend on each other.
fn load_modules() -> Result<()> {
    for path in fs::read_to_string(MODULES_LISTED)?.lines() {
        finit_module(File::open(path)?, c"", ModuleInitFlags::empty()).context(path.to_owned())?;
    }
    Ok(())
}

fn raise_limits(connections: u64) -> Result<()> {
    set("fs/nr_open", &(2 * connections + 100_000).to_string())?;
    set("fs/file-max", &(4 * connections + 100_000).to_string())?;
    set("fs/epoll/max_user_watches", &(4 * connections + 100_000).to_string())?;
    set("net/ipv4/ip_local_port_range", "10000 65535")?;
    let descriptors = connections + 10_000;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?)
}

fn set(setting: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{setting}"), value).with_context(|| setting.to_owned())
}

/// The kernel's fq_codel drops frames that waited for 5 ms, as they do before an emulated cable, and a burst of a
/// thousand connects overflows the usual 1,000 frames; a lost RST is never sent again, and the peer would keep its dead
/// connection. bfifo counts bytes, room for 750,000 small frames here (32,767 is the longest queue this kernel takes),
/// and so loses none. The other end is entered permanently: a slow guest may answer an ARP request too late, and every
/// frame to a neighbour that does not answer is dropped.
fn join_network(arguments: &Arguments) -> Result<()> {
    set("net/core/default_qdisc", "bfifo")?;
    shell("ip link set lo up")?;
    for (card, cable) in arguments.cable.iter().enumerate() {
        let (this, other) = (arguments.end, 3 - arguments.end);
        fs::write(format!("/sys/class/net/eth{card}/tx_queue_len"), "32767")?;
        shell(&format!("ip address add {}/24 dev eth{card}", address(*cable, this)))?;
        shell(&format!("ip link set eth{card} up"))?;
        let neighbour = address(*cable, other);
        shell(&format!("arp -i eth{card} -s {neighbour} {}", super::card(*cable, other)))?;
    }
    Ok(())
}

fn describe_machine() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let memory_kb = Meminfo::current()?.mem_total >> 10;
    let cpus = thread::available_parallelism()?;
    Ok(format!("kernel: Linux {}\ncpus: {cpus}\nmemory_kb: {memory_kb}\n", release.trim()))
}

/// What a command prints; an error if it fails.
fn shell(command: &str) -> Result<String> {
    let output = Command::new(BUSYBOX)
        .args(["sh", "-c", command])
        .env("PATH", "/bin")
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command}: {said}{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(said.trim().to_owned())
}
