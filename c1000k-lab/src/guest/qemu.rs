//! A virtual machine as a process.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::{AccessFlags, access, geteuid};
use tempfile::TempDir;

use super::init::BOOTED;
use super::initramfs::{self, Extras, INIT};
use super::packages::Packages;
use crate::namespace::Network;
use crate::print_line;
use crate::process::{Isolation, Process, isolated};
use crate::programs::Programs;
use crate::wait::wait_until;

const KVM: &str = "/dev/kvm";
const KVM_BOOT_TIMEOUT: Duration = Duration::from_secs(10);

/// For a guest's files.
const DISK_BYTES: u64 = 256 << 20;

/// For one server and one client.
const CPUS: &str = "2";

/// Datagrams that a Unix socket queues. The default is 10, and qemu spins while the queue is full.
const CABLE_DATAGRAMS: &str = "1000";

#[derive(Debug, Clone, Copy)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn options(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Everything that guests are made of.
#[derive(Debug)]
pub(crate) struct Kit {
    packages: Packages,
    programs: Programs,
    pub(crate) accelerator: Accelerator,
}

impl Kit {
    /// Uses KVM if it boots the guest's kernel; that /dev/kvm can be opened does not suffice.
    pub(crate) fn new(programs: Programs) -> Result<Self> {
        let packages = Packages::fetch()?;
        let mut kit = Self { packages, programs, accelerator: Accelerator::Tcg };
        if access(KVM, AccessFlags::W_OK).is_ok() {
            print_line("testing whether KVM boots the guest's kernel");
            kit.accelerator = Accelerator::Kvm;
            if !kit.boots()? {
                print_line("it does not; the guest is emulated, which is slower");
                kit.accelerator = Accelerator::Tcg;
            }
        }
        Ok(kit)
    }

    fn boots(&self) -> Result<bool> {
        let folder = tempfile::tempdir()?;
        let console = folder.path().join("console.log");
        let machine = self.machine(folder.path(), &Extras::default())?;
        let probe = Spec { name: "probe", memory_mb: 512, connections: 1_000, end: 1, cables: &[] };
        let _running = machine.boot(&probe, &console)?;
        let has_booted = || Ok(fs::read_to_string(&console).unwrap_or_default().contains(BOOTED));
        Ok(wait_until("it boots", KVM_BOOT_TIMEOUT, has_booted).is_ok())
    }

    /// Builds the files that guests boot from, in a new directory in `out`.
    pub(crate) fn machine(&self, out: &Path, extras: &Extras) -> Result<Machine<'_>> {
        let folder = tempfile::Builder::new().prefix("machine-").tempdir_in(out)?;
        let initramfs = folder.path().join("initramfs");
        initramfs::build(&initramfs, &self.packages, &self.programs, extras)?;
        let network = geteuid().is_root().then(network_with_long_queues).transpose()?;
        Ok(Machine { kit: self, folder, network })
    }
}

/// The files that all guests of a run boot from, in a directory that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    kit: &'a Kit,
    folder: TempDir,
    network: Option<Network>,
}

/// A guest to boot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) memory_mb: u64,
    /// The number that its kernel is prepared for.
    pub(crate) connections: u64,
    /// The end of its cables: 1 or 2.
    pub(crate) end: u8,
    pub(crate) cables: &'static [u8],
}

/// A running qemu, and the pipe for the guest's requests.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Process,
    pub(crate) requests: ChildStdin,
    pub(crate) log: PathBuf,
    pub(crate) disk: PathBuf,
}

impl Machine<'_> {
    /// Returns the pipe from the guest's second serial port, too.
    pub(crate) fn boot(&self, spec: &Spec, console: &Path) -> Result<(Running, ChildStdout)> {
        let Spec { name, memory_mb, connections, end, cables } = spec;
        let folder = self.folder.path();
        let disk = folder.join(format!("disk-{name}"));
        let log = folder.join(format!("qemu-{name}.log"));
        File::create(&disk)?.set_len(DISK_BYTES)?;
        let mut kernel_arguments = format!(
            "console=ttyS0 panic=-1 mitigations=off slab_nomerge no_timer_check quiet rdinit={INIT} -- guest {name} \
             {connections} --end {end}"
        );
        let Packages { qemu, .. } = &self.kit.packages;
        let network = self.network.as_ref().map(Network::path);
        let mut command = isolated(&Isolation { network, ..Isolation::default() }, qemu)?;
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(self.kit.accelerator.options());
        command.args(["-smp", CPUS, "-m", &format!("{memory_mb}M")]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-chardev", "stdio,id=requests,signal=off", "-serial", "chardev:requests"]);
        command.arg("-drive").arg(format!("file=disk-{name},format=raw,if=none,id=disk"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        for cable in *cables {
            kernel_arguments += &format!(" --cable {cable}");
            command.args(cable_options(*cable, *end));
        }
        command.arg("-kernel").arg(self.kit.packages.kernel());
        command.args(["-initrd", "initramfs", "-append", &kernel_arguments]);
        // The path of a Unix socket must be short, so it is relative to this directory. In a separate process group
        // Ctrl-C does not reach qemu.
        command.current_dir(folder).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let mut process = Process::spawn(&format!("guest '{name}'"), &mut command)?;
        let (requests, messages) = process.pipes().context("qemu has two pipes")?;
        Ok((Running { process, requests, log, disk }, messages))
    }
}

/// A cable carries frames as datagrams over a pair of Unix sockets; docs/lab.md explains why not as a stream.
fn cable_options(cable: u8, end: u8) -> [String; 4] {
    let (id, other) = (format!("cable{cable}"), 3 - end);
    [
        "-netdev".to_owned(),
        format!(
            "dgram,id={id},local.type=unix,local.path={id}-{end},remote.type=unix,remote.path={id}-{other}"
        ),
        "-device".to_owned(),
        format!("virtio-net-pci,netdev={id},mac={}", super::card(cable, end)),
    ]
}

/// The queue length of Unix sockets is a setting of the network namespace: root runs qemu in a separate one, and leaves
/// the setting of this machine unchanged.
fn network_with_long_queues() -> Result<Network> {
    let network = Network::new()?;
    network.set("net/unix/max_dgram_qlen", CABLE_DATAGRAMS)?;
    Ok(network)
}
