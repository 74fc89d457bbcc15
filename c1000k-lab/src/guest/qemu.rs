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
use super::initramfs::{self, INIT, More};
use super::packages::Packages;
use crate::namespace::Network;
use crate::patience::wait_until;
use crate::process::{Place, Process, inside};
use crate::programs::Programs;
use crate::say;

const KVM: &str = "/dev/kvm";
const KVM_BOOTS_WITHIN: Duration = Duration::from_secs(10);

/// For a guest's files.
const DISK_BYTES: u64 = 256 << 20;

/// One for the server, one for the client.
const CPUS: &str = "2";

/// Datagrams in a unix socket. It holds 10 by default, and qemu spins on a full one.
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

/// What guests are made of.
#[derive(Debug)]
pub(crate) struct Kit {
    packages: Packages,
    programs: Programs,
    pub(crate) accelerator: Accelerator,
}

impl Kit {
    /// With KVM, if that boots this kernel: a /dev/kvm that opens does not mean so.
    pub(crate) fn new(programs: Programs) -> Result<Self> {
        let packages = Packages::fetch()?;
        let mut kit = Self { packages, programs, accelerator: Accelerator::Tcg };
        if access(KVM, AccessFlags::W_OK).is_ok() {
            say("trying whether KVM boots the guest's kernel");
            kit.accelerator = Accelerator::Kvm;
            if !kit.boots()? {
                say("it does not: emulating, which is slower");
                kit.accelerator = Accelerator::Tcg;
            }
        }
        Ok(kit)
    }

    fn boots(&self) -> Result<bool> {
        let folder = tempfile::tempdir()?;
        let console = folder.path().join("console.log");
        let machine = self.machine(folder.path(), &More::default())?;
        let probe = Spec { name: "probe", memory_mb: 512, connections: 1_000, end: 1, cables: &[] };
        let _running = machine.boot(&probe, &console)?;
        let has_booted = || Ok(fs::read_to_string(&console).unwrap_or_default().contains(BOOTED));
        Ok(wait_until("it boots", KVM_BOOTS_WITHIN, has_booted).is_ok())
    }

    /// A machine with its own folder in `out`.
    pub(crate) fn machine(&self, out: &Path, more: &More) -> Result<Machine<'_>> {
        let folder = tempfile::Builder::new().prefix("machine-").tempdir_in(out)?;
        let initramfs = folder.path().join("initramfs");
        initramfs::build(&initramfs, &self.packages, &self.programs, more)?;
        let network = geteuid().is_root().then(roomy_network).transpose()?;
        Ok(Machine { kit: self, folder, network })
    }
}

/// What all guests of a run boot from, in a folder that is removed with it.
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
    /// What its kernel is prepared for.
    pub(crate) connections: u64,
    /// Which end of its cables it is: 1 or 2.
    pub(crate) end: u8,
    pub(crate) cables: &'static [u8],
}

/// A running qemu, and where orders for the guest go.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Process,
    pub(crate) orders: ChildStdin,
    pub(crate) log: PathBuf,
    pub(crate) disk: PathBuf,
}

impl Machine<'_> {
    /// With what the guest says on its second serial port.
    pub(crate) fn boot(&self, spec: &Spec, console: &Path) -> Result<(Running, ChildStdout)> {
        let Spec { name, memory_mb, connections, end, cables } = spec;
        let folder = self.folder.path();
        let disk = folder.join(format!("disk-{name}"));
        let log = folder.join(format!("qemu-{name}.log"));
        File::create(&disk)?.set_len(DISK_BYTES)?;
        let mut words = format!(
            "console=ttyS0 panic=-1 mitigations=off slab_nomerge no_timer_check quiet rdinit={INIT} -- guest {name} \
             {connections} --end {end}"
        );
        let Packages { qemu, .. } = &self.kit.packages;
        let network = self.network.as_ref().map(Network::path);
        let mut command = inside(&Place { network, ..Place::default() }, qemu)?;
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(self.kit.accelerator.options());
        command.args(["-smp", CPUS, "-m", &format!("{memory_mb}M")]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-chardev", "stdio,id=orders,signal=off", "-serial", "chardev:orders"]);
        command.arg("-drive").arg(format!("file=disk-{name},format=raw,if=none,id=disk"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        for cable in *cables {
            words += &format!(" --cable {cable}");
            command.args(cable_options(*cable, *end));
        }
        command.arg("-kernel").arg(self.kit.packages.kernel());
        command.args(["-initrd", "initramfs", "-append", &words]);
        // From inside the folder, for the path of a unix socket is short. Ctrl-C is for the lab alone.
        command.current_dir(folder).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let mut process = Process::spawn(&format!("guest '{name}'"), &mut command)?;
        let (orders, said) = process.pipes().context("qemu has two pipes")?;
        Ok((Running { process, orders, log, disk }, said))
    }
}

/// A cable carries frames as datagrams over a pair of unix sockets; docs/lab.md tells why not a stream.
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

/// The queue length of unix sockets belongs to the network namespace: root gives qemu one of its own, and that of this
/// machine stays as it is.
fn roomy_network() -> Result<Network> {
    let network = Network::new()?;
    network.set("net/unix/max_dgram_qlen", CABLE_DATAGRAMS)?;
    Ok(network)
}
