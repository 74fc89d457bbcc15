//! The server under test.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::check::FileTableChoice;
use c1000k_host::limits::raise_descriptor_limit;
use nix::sys::signal::Signal;
use procfs::process::FDTarget;
use tempfile::TempDir;

use crate::bystander::{Bystander, Latencies};
use crate::cgroup::MemoryCgroup;
use crate::namespace::Namespace;
use crate::process::{Isolation, Process, isolated};
use crate::programs::Programs;
use crate::record::{self, ServerRecord};
use crate::sockets::{Ports, free_ports};
use crate::wait::{handle_interrupts, sleep, wait_until};

pub(crate) const PORTS: u16 = 10;

const READY_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(60);
const LIST_TIMEOUT: Duration = Duration::from_secs(60);

/// The programs and settings that all servers under test share.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) programs: Programs,
    /// `--file-table` of the servers whose arguments do not set it.
    pub(crate) file_table: &'static str,
}

impl Lab {
    /// Also prepares this process; call it before any thread is started.
    pub(crate) fn new(file_table: FileTableChoice) -> Result<Self> {
        handle_interrupts()?;
        raise_descriptor_limit()?;
        Ok(Self { programs: Programs::find("FAULTS_BINARIES")?, file_table: file_table.as_str() })
    }
}

/// How a server is started.
#[derive(Debug, Default)]
pub(crate) struct Setup<'a> {
    pub(crate) arguments: &'a [&'a str],
    pub(crate) namespace: Option<&'a Namespace>,
    pub(crate) cgroup: Option<&'a MemoryCgroup>,
    pub(crate) descriptors: Option<u64>,
    /// By default the first of free ports.
    pub(crate) first_port: Option<u16>,
    pub(crate) has_no_bystander: bool,
}

/// A running server, and the bystander on its last port.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: Process,
    bystander: Option<Bystander>,
    pub(crate) all_ports: Ports,
    pub(crate) arguments: Vec<String>,
    pub(crate) record_path: PathBuf,
    _folder: TempDir,
}

/// How a server has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) record: Option<ServerRecord>,
    pub(crate) bystander: Option<Latencies>,
}

impl Server {
    pub(crate) fn start(lab: &Lab, setup: &Setup<'_>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("c1000k-lab-").tempdir()?;
        let record_path = folder.path().join("record.json");
        let ip = setup.namespace.map_or(Ipv4Addr::LOCALHOST, |namespace| namespace.inner);
        let first = setup.first_port.map_or_else(|| free_ports(PORTS), Ok)?;
        let (bind, first_port, ports) = (ip.to_string(), first.to_string(), PORTS.to_string());
        let mut arguments = vec!["--bind", &bind, "--first-port", &first_port, "--ports", &ports];
        arguments.extend(setup.arguments);
        if !setup.arguments.contains(&"--file-table") {
            arguments.extend(["--file-table", lab.file_table]);
        }
        let place = Isolation {
            cgroup: setup.cgroup.map(|cgroup| cgroup.path().to_owned()),
            descriptors: setup.descriptors,
            network: setup.namespace.map(|namespace| namespace.network.path()),
            ..Isolation::default()
        };
        let mut command = isolated(&place, lab.programs.path("c1000k-server"))?;
        command.args(&arguments).arg("--json").arg(&record_path);
        let log = folder.path().join("log");
        let mut server = Self {
            process: Process::spawn_logged("server", &mut command, log)?,
            bystander: None,
            all_ports: Ports { ip, first, count: PORTS },
            arguments: arguments.into_iter().map(str::to_owned).collect(),
            record_path,
            _folder: folder,
        };
        server.process.await_log("ready", READY_TIMEOUT)?;
        if !setup.has_no_bystander {
            let last = server.all_ports.address(usize::from(PORTS) - 1);
            server.bystander = Some(Bystander::start(last, server.process.pid(), setup.namespace)?);
        }
        Ok(server)
    }

    /// The ports for the load: all but the bystander's.
    pub(crate) fn ports(&self) -> Ports {
        Ports { count: PORTS - 1, ..self.all_ports }
    }

    pub(crate) fn address(&self, number: usize) -> SocketAddr {
        self.ports().address(number)
    }

    pub(crate) fn bystander(&self) -> Result<&Bystander> {
        self.bystander.as_ref().context("this server has no bystander")
    }

    /// Its open files, including registered ones. Not counted are its rings, which it creates as needed, and the files of
    /// /proc, which it opens only briefly.
    pub(crate) fn descriptors(&self) -> Result<usize> {
        let mut open = self.process.proc()?.fd_count()?;
        for _ in 0..4 {
            sleep(Duration::from_millis(1))?;
            open = open.min(self.process.proc()?.fd_count()?);
        }
        Ok(open.saturating_sub(self.rings()?.len()) + self.registered_sockets()?)
    }

    /// The sockets in its registered-file tables.
    pub(crate) fn registered_sockets(&self) -> Result<usize> {
        self.rings()?.iter().map(|ring| sockets_listed(ring)).sum()
    }

    /// The `fdinfo` of each of its rings.
    fn rings(&self) -> Result<Vec<PathBuf>> {
        let info = PathBuf::from(format!("/proc/{}/fdinfo", self.process.pid()));
        // A descriptor may have been closed since it was listed.
        let files = self.process.proc()?.fd()?.filter_map(Result::ok);
        let is_ring = |target: &FDTarget| matches!(target, FDTarget::AnonInode(kind) if kind.contains("io_uring"));
        let rings = files.filter(|file| is_ring(&file.target));
        Ok(rings.map(|file| info.join(file.fd.to_string())).collect())
    }

    pub(crate) fn rss_bytes(&self) -> Result<u64> {
        Ok(self.process.proc()?.statm()?.resident * procfs::page_size())
    }

    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let stat = self.process.proc()?.stat()?;
        Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
    }

    /// How often per second it goes to sleep while `meanwhile` runs.
    pub(crate) fn wakes_per_second(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<f64> {
        let (before, started) = (self.process.wakes()?, Instant::now());
        meanwhile()?;
        let count = (self.process.wakes()? - before) as f64;
        Ok(((count / started.elapsed().as_secs_f64()) * 10.0).round() / 10.0)
    }

    /// Ends it by SIGTERM.
    pub(crate) fn end(mut self) -> Result<Ended> {
        let bystander = self.bystander.take().map(Bystander::end).transpose()?;
        self.process.signal(Signal::SIGTERM)?;
        let code = self.process.wait(END_TIMEOUT)?;
        let is_written = self.record_path.exists();
        let record = is_written.then(|| record::server(&self.record_path)).transpose()?;
        Ok(Ended { code, record, bystander })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server first: while it runs, the bystander waits for its echo.
        let _ = self.process.kill();
        if let Some(bystander) = self.bystander.take() {
            let _ = bystander.end();
        }
    }
}

/// The kernel lists the files of a ring only while no system call uses it, so the read is repeated for a busy server.
fn sockets_listed(ring: &Path) -> Result<usize> {
    let mut sockets = 0;
    wait_until("the kernel lists the files of a ring", LIST_TIMEOUT, || {
        let text = fs::read_to_string(ring)?;
        sockets = text.lines().filter(|line| is_socket(line)).count();
        Ok(text.contains("UserFiles:"))
    })?;
    Ok(sockets)
}

/// Whether this line of `fdinfo` is a socket, as in `   12: socket:[4711]`.
fn is_socket(line: &str) -> bool {
    let Some((number, file)) = line.trim_start().split_once(": ") else { return false };
    number.parse::<u32>().is_ok() && file.starts_with("socket:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_a_ring_are_distinguished_from_its_other_lines() {
        assert!(is_socket("   12: socket:[4711]"));
        assert!(is_socket("0: socket:[1]"));
        for other in ["UserFiles:\t16", "    3: anon_inode:[eventfd]", "PollList:", "SqMask: 0x3"] {
            assert!(!is_socket(other), "{other}");
        }
    }
}
