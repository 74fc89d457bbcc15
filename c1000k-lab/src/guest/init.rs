//! Process 1 of a guest: prepares the kernel for N connections, handles the host's requests, and writes its files to the disk at the end.

mod conditions;
mod programs;
mod requests;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::getpid;

use super::initramfs::{BUSYBOX, MODULE_LIST};
use super::request::Message;
use crate::million::plan::address;
use crate::process::output;
use crate::snapshot;
use requests::Guest;

/// For the files of the programs, which the host collects.
const OUT: &str = "/out";

/// A line of the console: the guest accepts requests.
pub(super) const BOOTED: &str = "lab: booted";

/// Runs as process 1 of a guest
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The guest's name
    name: String,
    /// The kernel is prepared for this many connections
    connections: u64,
    /// The end of its cables: 1 or 2
    #[arg(long, default_value_t = 1)]
    end: u8,
    /// The number of each of its cables
    #[arg(long)]
    cable: Vec<u8>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if getpid().as_raw() != 1 {
        bail!("this runs only as process 1 of a guest, which `scenarios` and `million --vm` boot");
    }
    for (kind, path) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>).context(path)?;
    }
    // Ordinary users write here too.
    fs::set_permissions(OUT, fs::Permissions::from_mode(0o1777))?;
    Command::new(BUSYBOX).args(["--install", "-s", "/bin"]).status()?;
    load_modules()?;
    raise_limits(arguments.connections)?;
    join_network(arguments)?;
    let mut guest = Guest::new(arguments)?;
    println!("{BOOTED}");
    guest.send(&Message::Booted(snapshot::describe_machine()?))?;
    guest.serve_requests()?;
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(ExitCode::SUCCESS)
}

/// In the order of the list, which has dependencies first.
fn load_modules() -> Result<()> {
    for path in fs::read_to_string(MODULE_LIST)?.lines() {
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

/// No frame may be dropped: an RST is never retransmitted, and its receiver would keep the connection. The default
/// fq_codel drops frames that have waited for 5 ms, as they do before an emulated cable, and a burst of a thousand
/// connects overflows its usual 1,000 frames. bfifo counts bytes, and has room for 750,000 small frames here (32,767 is
/// the longest queue that this kernel allows). The entry of the other end is permanent, because a slow guest may answer
/// an ARP request too late.
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

/// Returns what a command prints; an error if it fails.
fn shell(command: &str) -> Result<String> {
    output(Command::new(BUSYBOX).args(["sh", "-c", command]).env("PATH", "/bin"))
}
