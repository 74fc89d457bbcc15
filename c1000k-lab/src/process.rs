//! Starts, waits for and ends all programs that the lab runs.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use clap::Args;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, Uid, getpid, setgid, setgroups, setuid};
use serde::{Deserialize, Serialize};

use crate::wait::wait_until;

/// A running program; killed when dropped, and by the kernel when the lab itself is killed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    pub(crate) fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("the {name} can't be started"))?;
        Ok(Self { child, name: name.to_owned(), log: PathBuf::new() })
    }

    /// Starts a program without input, and with both outputs in a log file.
    pub(crate) fn spawn_logged(name: &str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut process = Self::spawn(name, command)?;
        process.log = log;
        Ok(process)
    }

    /// Takes its input and output, if both are pipes.
    pub(crate) fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Its files in /proc.
    pub(crate) fn proc(&self) -> Result<procfs::process::Process> {
        Ok(procfs::process::Process::new(self.pid().as_raw())?)
    }

    /// How often it has gone to sleep so far.
    pub(crate) fn wakes(&self) -> Result<u64> {
        let wakes = self.proc()?.status()?.voluntary_ctxt_switches;
        wakes.context("the kernel does not count context switches")
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("{signal} for the {}", self.name))
    }

    /// Does not consume the stops of a traced process, which its tracer waits for.
    pub(crate) fn is_running(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        matches!(waitid(Id::Pid(self.pid()), flags), Ok(WaitStatus::StillAlive))
    }

    /// The exit code once it has ended: 128 plus the signal's number if a signal ended it.
    pub(crate) fn exit_code(&mut self) -> Result<Option<i32>> {
        if self.is_running() {
            return Ok(None);
        }
        let status = self.child.wait()?;
        Ok(Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())))
    }

    /// Waits for its end, and returns the exit code.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<i32> {
        wait_until(&format!("the {} has ended", self.name), timeout, || Ok(!self.is_running()))?;
        self.exit_code()?.context("it has ended")
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub(crate) fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }

    /// The first line of the log with this text, which must begin a word; an error if the program ends without one.
    pub(crate) fn find_in_log(&mut self, text: &str) -> Result<Option<String>> {
        // Before the log is read, which then is complete.
        let code = self.exit_code()?;
        let log = self.log()?;
        let inner = format!(" {text}");
        let mut lines = log.lines();
        let line = lines.find(|line| line.starts_with(text) || line.contains(&inner));
        if let (None, Some(code)) = (line, code) {
            let last = last_lines(&log);
            bail!("the {} ended with code {code} before it printed '{text}': {last}", self.name);
        }
        Ok(line.map(str::to_owned))
    }

    pub(crate) fn await_log(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let what = format!("the {} prints '{text}'", self.name);
        wait_until(&what, timeout, || Ok(self.find_in_log(text)?.is_some())).map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.kill();
    }
}

/// The last line of a log that is not indented and those after it: a verdict and its figures.
pub(crate) fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let verdict = lines.iter().rposition(|line| !line.starts_with(' ')).unwrap_or_default();
    lines[verdict..].join("\n")
}

/// The limits and namespaces of a program.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Isolation {
    /// A cgroup's directory.
    pub(crate) cgroup: Option<PathBuf>,
    /// RLIMIT_NOFILE, soft and hard.
    pub(crate) descriptors: Option<u64>,
    /// The file of a network namespace.
    pub(crate) network: Option<PathBuf>,
    /// The OOM killer chooses it first.
    pub(crate) is_killed_first: bool,
    /// A user, and the group of the same number.
    pub(crate) user: Option<u32>,
}

impl Isolation {
    /// For this process.
    fn enter(&self) -> Result<()> {
        if let Some(network) = &self.network {
            setns(File::open(network)?, CloneFlags::CLONE_NEWNET)?;
        }
        if let Some(cgroup) = &self.cgroup {
            fs::write(cgroup.join("cgroup.procs"), getpid().to_string())?;
        }
        if let Some(descriptors) = self.descriptors {
            setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?;
        }
        if self.is_killed_first {
            fs::write("/proc/self/oom_score_adj", "1000")?;
        }
        if let Some(user) = self.user {
            setgroups(&[])?;
            setgid(Gid::from_raw(user))?;
            setuid(Uid::from_raw(user))?;
        }
        Ok(())
    }
}

/// The command for a program: this program sets up the isolation and then executes it.
pub(crate) fn isolated(isolation: &Isolation, program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["isolated", &getpid().to_string(), &serde_json::to_string(isolation)?, "--"]);
    command.arg(program);
    Ok(command)
}

/// Executes a program with some limits and namespaces; the kernel kills it when the lab ends
#[derive(Debug, Args)]
pub(crate) struct Isolated {
    /// The process that starts this
    parent: i32,
    /// JSON
    #[arg(value_parser = |text: &str| serde_json::from_str::<Isolation>(text))]
    isolation: Isolation,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Returns only if it fails.
pub(crate) fn run_isolated(arguments: &Isolated) -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if nix::unistd::getppid().as_raw() != arguments.parent {
        bail!("the lab has ended");
    }
    arguments.isolation.enter()?;
    // The signals that the lab has blocked are inherited.
    SigSet::all().thread_unblock()?;
    let [program, rest @ ..] = arguments.command.as_slice() else { bail!("no program is given") };
    let failure = Command::new(program).args(rest).exec();
    Err(Error::new(failure).context(Path::new(program).display().to_string()))
}

/// Runs a command and returns its standard output; if it fails, the error has both outputs.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_the_verdict_with_its_figures() {
        assert_eq!(
            last_lines("target: 9\nreached\n  9 held\n  0 lost\n"),
            "reached\n  9 held\n  0 lost"
        );
        assert_eq!(last_lines("  9 held\n"), "  9 held");
        assert_eq!(last_lines(""), "");
    }

    #[test]
    fn the_log_is_searched_for_whole_words_until_the_program_ends() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo already in use; echo now ready; exit 7"]);
        let mut process =
            Process::spawn_logged("stub", &mut command, log.path().to_owned()).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap(), 7);
        assert_eq!(process.find_in_log("ready").unwrap().as_deref(), Some("now ready"));
        let why = process.find_in_log("steady").unwrap_err().to_string();
        assert!(why.contains("ended with code 7") && why.ends_with("now ready"), "{why}");
    }
}
