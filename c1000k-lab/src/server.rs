//! The server under test: started, measured from outside, and ended.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use procfs::process::FDTarget;
use tempfile::TempDir;

use crate::bystander::{Bystander, Seen};
use crate::cgroup::MemoryCgroup;
use crate::namespace::Namespace;
use crate::patience::{sleep, wait_until};
use crate::process::{Place, Process, inside};
use crate::programs::Programs;
use crate::record::{self, ServerRecord};
use crate::sockets::{Ports, free_ports};

pub(crate) const PORTS: u16 = 10;

const READY_WITHIN: Duration = Duration::from_secs(30);
const END_WITHIN: Duration = Duration::from_secs(60);
const LISTED_WITHIN: Duration = Duration::from_secs(60);

/// What is the same for all servers.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) programs: Programs,
    /// `--file-table` of each server whose arguments have none.
    pub(crate) file_table: &'static str,
}

/// How a server is started.
#[derive(Debug, Default)]
pub(crate) struct Setup<'a> {
    pub(crate) arguments: &'a [&'a str],
    pub(crate) namespace: Option<&'a Namespace>,
    pub(crate) cgroup: Option<&'a MemoryCgroup>,
    pub(crate) descriptors: Option<u64>,
    /// By default the first of some free ones.
    pub(crate) first_port: Option<u16>,
    pub(crate) has_no_bystander: bool,
}

/// A running server, and the bystander on the last of its ports.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: Process,
    bystander: Option<Bystander>,
    /// Where it listens.
    pub(crate) all_ports: Ports,
    pub(crate) arguments: Vec<String>,
    pub(crate) record_path: PathBuf,
    log_path: PathBuf,
    _folder: TempDir,
}

/// How a server has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None` where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) record: Option<ServerRecord>,
    pub(crate) bystander: Option<Seen>,
}

impl Server {
    pub(crate) fn start(lab: &Lab, setup: &Setup<'_>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("c1000k-lab-").tempdir()?;
        let (record_path, log_path) =
            (folder.path().join("record.json"), folder.path().join("log"));
        let ip = setup.namespace.map_or(Ipv4Addr::LOCALHOST, |namespace| namespace.inner);
        let first = setup.first_port.map_or_else(|| free_ports(PORTS), Ok)?;
        let (bind, first_port, ports) = (ip.to_string(), first.to_string(), PORTS.to_string());
        let mut arguments = vec!["--bind", &bind, "--first-port", &first_port, "--ports", &ports];
        arguments.extend(setup.arguments);
        if !setup.arguments.contains(&"--file-table") {
            arguments.extend(["--file-table", lab.file_table]);
        }
        let place = Place {
            cgroup: setup.cgroup.map(|cgroup| cgroup.path().to_owned()),
            descriptors: setup.descriptors,
            network: setup.namespace.map(|namespace| namespace.there.path()),
            ..Place::default()
        };
        let log = File::create(&log_path)?;
        let mut command = inside(&place, lab.programs.path("c1000k-server"))?;
        command.args(&arguments).arg("--json").arg(&record_path);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut server = Self {
            process: Process::spawn("server", &mut command)?,
            bystander: None,
            all_ports: Ports { ip, first, count: PORTS },
            arguments: arguments.into_iter().map(str::to_owned).collect(),
            record_path,
            log_path,
            _folder: folder,
        };
        wait_until("the server is ready", READY_WITHIN, || server.is_ready())?;
        if !setup.has_no_bystander {
            let last = server.all_ports.address(usize::from(PORTS) - 1);
            server.bystander = Some(Bystander::start(last, server.process.pid(), setup.namespace)?);
        }
        Ok(server)
    }

    fn is_ready(&self) -> Result<bool> {
        let log = self.log()?;
        if !self.process.is_running() {
            bail!("the server did not start: {}", log.lines().next_back().unwrap_or_default());
        }
        Ok(log.contains("ready: "))
    }

    /// The ports of the crowds: the bystander has the last one for itself.
    pub(crate) fn ports(&self) -> Ports {
        Ports { count: PORTS - 1, ..self.all_ports }
    }

    pub(crate) fn address(&self, number: usize) -> SocketAddr {
        self.ports().address(number)
    }

    pub(crate) fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log_path)?).into_owned())
    }

    /// Waits for some words of its log.
    pub(crate) fn await_log(&self, words: &str, within: Duration) -> Result<()> {
        let what = format!("the server says {words:?}");
        wait_until(&what, within, || Ok(self.log()?.contains(words))).map(drop)
    }

    pub(crate) fn bystander(&self) -> Result<&Bystander> {
        self.bystander.as_ref().context("this server has no bystander")
    }

    fn proc(&self) -> Result<procfs::process::Process> {
        Ok(procfs::process::Process::new(self.process.pid().as_raw())?)
    }

    /// Files that it has open, registered ones too, without its rings, which it makes as it needs them, and without
    /// those of /proc that it reads for a moment now and then.
    pub(crate) fn descriptors(&self) -> Result<usize> {
        let mut open = self.proc()?.fd_count()?;
        for _ in 0..4 {
            sleep(Duration::from_millis(1))?;
            open = open.min(self.proc()?.fd_count()?);
        }
        Ok(open.saturating_sub(self.rings()?.len()) + self.registered_sockets()?)
    }

    /// Sockets in the tables of its rings.
    pub(crate) fn registered_sockets(&self) -> Result<usize> {
        self.rings()?.iter().map(|ring| sockets_listed(ring)).sum()
    }

    /// The kernel's description of each of its rings.
    fn rings(&self) -> Result<Vec<PathBuf>> {
        let info = PathBuf::from(format!("/proc/{}/fdinfo", self.process.pid()));
        // One may be closed by now.
        let files = self.proc()?.fd()?.filter_map(Result::ok);
        let is_ring = |target: &FDTarget| matches!(target, FDTarget::AnonInode(kind) if kind.contains("io_uring"));
        let rings = files.filter(|file| is_ring(&file.target));
        Ok(rings.map(|file| info.join(file.fd.to_string())).collect())
    }

    pub(crate) fn rss_bytes(&self) -> Result<u64> {
        Ok(self.proc()?.statm()?.resident * procfs::page_size())
    }

    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let stat = self.proc()?.stat()?;
        Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
    }

    /// How often a second it goes to sleep while `meanwhile` runs.
    pub(crate) fn wakes_per_second(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<f64> {
        let wakes =
            || self.proc()?.status()?.voluntary_ctxt_switches.context("no count of switches");
        let (before, started) = (wakes()?, Instant::now());
        meanwhile()?;
        let count = (wakes()? - before) as f64;
        Ok(((count / started.elapsed().as_secs_f64()) * 10.0).round() / 10.0)
    }

    /// Ends it by SIGTERM.
    pub(crate) fn end(mut self) -> Result<Ended> {
        let bystander = self.bystander.take().map(Bystander::end).transpose()?;
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.wait(END_WITHIN)?;
        let is_written = self.record_path.exists();
        let record = is_written.then(|| record::server(&self.record_path)).transpose()?;
        let code = status.code().filter(|_| status.signal().is_none());
        Ok(Ended { code, record, bystander })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A bystander waits for its echo as long as there is a server.
        let _ = self.process.kill();
        if let Some(bystander) = self.bystander.take() {
            let _ = bystander.end();
        }
    }
}

/// The kernel lists the files of a ring only while no system call works on it, so a busy server is asked again.
fn sockets_listed(ring: &Path) -> Result<usize> {
    let mut sockets = 0;
    wait_until("the kernel lists the files of a ring", LISTED_WITHIN, || {
        let text = fs::read_to_string(ring)?;
        sockets = text.lines().filter(|line| is_socket(line)).count();
        Ok(text.contains("UserFiles:"))
    })?;
    Ok(sockets)
}

/// `   12: socket:[4711]`
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
