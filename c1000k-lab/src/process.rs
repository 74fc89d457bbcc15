//! The one supervisor: every program of the lab is started, waited for and ended here, and is never left behind.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, Uid, getpid, setgid, setgroups, setuid};

use crate::patience::wait_until;

/// A running program; killed when dropped, and by the kernel when the lab itself is killed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    pub(crate) fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("the {name} can't be started"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// The ends of its input and output, once, where they were piped.
    pub(crate) fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("the {} got no {signal}", self.name))
    }

    /// Looks at its end alone, and leaves the stops of a traced process to who traces it.
    pub(crate) fn is_running(&self) -> bool {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        matches!(waitid(Id::Pid(self.pid()), look), Ok(WaitStatus::StillAlive))
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        wait_until(&format!("the {} has ended", self.name), within, || Ok(!self.is_running()))?;
        Ok(self.child.wait()?)
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and been waited for, long ago.
        let _ = self.kill();
    }
}

/// Where a program runs.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Place {
    /// A cgroup's folder.
    #[arg(long)]
    pub(crate) cgroup: Option<PathBuf>,
    /// RLIMIT_NOFILE, soft and hard.
    #[arg(long)]
    pub(crate) descriptors: Option<u64>,
    /// The file of a network namespace.
    #[arg(long)]
    pub(crate) network: Option<PathBuf>,
    /// It is what the kernel kills first where memory runs out.
    #[arg(long)]
    pub(crate) is_expendable: bool,
    /// A user, and the group of that number.
    #[arg(long)]
    pub(crate) user: Option<u32>,
}

/// A program at its place, as [`run_inside`] starts it: this program itself goes there and then becomes it.
pub(crate) fn inside(place: &Place, program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["inside", "--parent", &getpid().to_string()]);
    if let Some(cgroup) = &place.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    if let Some(descriptors) = place.descriptors {
        command.args(["--descriptors", &descriptors.to_string()]);
    }
    if let Some(network) = &place.network {
        command.arg("--network").arg(network);
    }
    if place.is_expendable {
        command.arg("--is-expendable");
    }
    if let Some(user) = place.user {
        command.args(["--user", &user.to_string()]);
    }
    command.arg("--").arg(program);
    Ok(command)
}

/// Goes to a place and becomes a program there, which the kernel kills when the lab ends.
#[derive(Debug, Args)]
pub(crate) struct Inside {
    #[command(flatten)]
    place: Place,
    /// The process that started this.
    #[arg(long)]
    parent: i32,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    words: Vec<OsString>,
}

/// Returns only where it fails.
pub(crate) fn run_inside(arguments: &Inside) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if nix::unistd::getppid().as_raw() != arguments.parent {
        bail!("the lab has ended");
    }
    if let Some(network) = &arguments.place.network {
        setns(File::open(network)?, CloneFlags::CLONE_NEWNET)?;
    }
    if let Some(cgroup) = &arguments.place.cgroup {
        fs::write(cgroup.join("cgroup.procs"), getpid().to_string())?;
    }
    if let Some(descriptors) = arguments.place.descriptors {
        setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?;
    }
    if arguments.place.is_expendable {
        fs::write("/proc/self/oom_score_adj", "1000")?;
    }
    if let Some(user) = arguments.place.user {
        setgroups(&[])?;
        setgid(Gid::from_raw(user))?;
        setuid(Uid::from_raw(user))?;
    }
    // What the lab has blocked for itself would be inherited.
    SigSet::all().thread_unblock()?;
    let [program, words @ ..] = arguments.words.as_slice() else { bail!("no program is given") };
    let failure = Command::new(program).args(words).exec();
    Err(failure).with_context(|| Path::new(program).display().to_string())
}

/// Runs a command to its end and returns what it prints; an error if it fails, with what it prints on standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().context(name)?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command:?}: {printed}{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(printed.trim().to_owned())
}

pub(crate) fn tool(name: &str, arguments: &[&str]) -> Result<()> {
    output(Command::new(name).args(arguments)).map(drop)
}
