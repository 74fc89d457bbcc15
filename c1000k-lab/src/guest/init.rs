//! Process 1 of a guest: prepares the kernel for N connections, is the agent of its host, and writes its files to a disk.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use nix::unistd::{getpid, sync};

use super::initramfs::{BUSYBOX, MODULES_LISTED};
use crate::hosts::agent::{Agent, shell};
use crate::million::plan::address;

/// Where the programs work, and what the disk gets.
const OUT: &str = "/out";

/// A disk that the lab reads.
const DISK: &str = "/dev/vda";

const PORT: &str = "/dev/ttyS1";

/// Printed on the console when the agent starts.
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
    // In the order of the list, in which they depend on each other.
    for path in fs::read_to_string(MODULES_LISTED)?.lines() {
        finit_module(File::open(path)?, c"", ModuleInitFlags::empty()).context(path.to_owned())?;
    }
    raise_limits(arguments.connections)?;
    join_network(arguments)?;
    let port = File::options().read(true).write(true).open(PORT).context(PORT)?;
    let mut settings = tcgetattr(&port)?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings)?;
    let (requests, replies) = (port.try_clone()?, Box::new(port.try_clone()?));
    println!("{BOOTED}");
    Agent::new(arguments.name.clone(), OUT.into(), requests, replies).serve()?;
    tcdrain(&port)?;
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(ExitCode::SUCCESS)
}

/// All files, and the kernel's messages.
pub(crate) fn write_disk(name: &str) -> Result<()> {
    shell(&format!("dmesg >{OUT}/kernel-{name}.log; tar -C {OUT} -cf {DISK} ."))?;
    sync();
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
/// and so loses none. The neighbour is permanent: a slow guest may answer an ARP request too late, and every frame to a
/// neighbour that does not answer is dropped.
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
