//! The processes of a measurement: a server and the load generator, and the server's resources from /proc.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const POLL: Duration = Duration::from_millis(20);

/// The number of polls without CPU time after which a server counts as idle.
const QUIET_POLLS: u32 = 6;

/// The time limit of each operation.
const PATIENCE: Duration = Duration::from_secs(120);

/// The processor of the server; the load and everything else run on [`LOAD_CPU`].
pub(crate) const SERVER_CPU: usize = 0;
pub(crate) const LOAD_CPU: usize = 1;

/// A server under measurement, which is killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// Starts a server, under a `wrapper` such as valgrind, and waits until it listens.
    pub(crate) fn start(wrapper: &[String], command: &[String]) -> io::Result<Self> {
        let cpu = SERVER_CPU.to_string();
        let mut child = Command::new("taskset")
            .args(["-c", &cpu])
            .args(wrapper)
            .args(command)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let server = Self { child };
        if line.trim() != "ready" {
            return Err(io::Error::other(format!("{} did not start", command.join(" "))));
        }
        Ok(server)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill(Pid::from_raw(self.id() as i32), signal)?)
    }

    /// Ends the server with SIGTERM, so that a tool that runs it can write its report.
    pub(crate) fn terminate(mut self) -> io::Result<()> {
        self.signal(Signal::SIGTERM)?;
        self.child.wait().map(drop)
    }

    /// Stops the server with SIGSTOP and waits until it has stopped.
    pub(crate) fn freeze(&self) -> io::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        wait_until("the server does not stop", || {
            Ok(stat_fields(self.id())?.first().map(String::as_str) == Some("T"))
        })
    }

    /// Continues the server.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Waits until the server is idle.
    pub(crate) fn wait_until_idle(&self) -> io::Result<()> {
        let mut quiet = 0;
        let mut before = self.cpu_ns()?;
        wait_until("the server does not become idle", || {
            let now = self.cpu_ns()?;
            quiet = if now == before { quiet + 1 } else { 0 };
            before = now;
            Ok(quiet > QUIET_POLLS)
        })
    }

    /// The exact CPU time of all threads, in nanoseconds.
    pub(crate) fn cpu_ns(&self) -> io::Result<u64> {
        let mut total = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.id()))? {
            let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            total += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(total)
    }

    /// User and system time as accounted by the clock tick, in ticks of 10 ms.
    pub(crate) fn ticks(&self) -> io::Result<(u64, u64)> {
        let fields = stat_fields(self.id())?;
        let ticks =
            |place: usize| fields.get(place).and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok((ticks(11), ticks(12)))
    }

    /// The anonymous memory of the server.
    pub(crate) fn anonymous_bytes(&self) -> io::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
        let kb = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kb.map(|kb| kb * 1024).ok_or_else(|| io::Error::other("smaps_rollup has no Anonymous line"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The fields after the process name in /proc/PID/stat.
fn stat_fields(id: u32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{id}/stat"))?;
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(after_name.split_whitespace().map(str::to_owned).collect())
}

/// Polls until `ask` returns true; `what` is the error message after the time limit.
pub(crate) fn wait_until(what: &str, mut ask: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let begin = Instant::now();
    while !ask()? {
        if begin.elapsed() > PATIENCE {
            return Err(io::Error::other(what.to_owned()));
        }
        sleep(POLL);
    }
    Ok(())
}

/// The load generator: a process that executes one command per line.
#[derive(Debug)]
pub(crate) struct Load {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Load {
    pub(crate) fn start(program: &Path, first_port: u16, ports: u16) -> io::Result<Self> {
        let mut child = Command::new(program)
            .args([first_port.to_string(), ports.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(commands), Some(answers)) => {
                Ok(Self { child, commands, answers: BufReader::new(answers) })
            }
            _ => Err(io::Error::other("the load generator has no pipes")),
        }
    }

    /// Executes a command; returns the number of connections or messages, and the duration.
    pub(crate) fn command(&mut self, line: &str) -> io::Result<(u64, Duration)> {
        writeln!(self.commands, "{line}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        let mut numbers = answer.split_whitespace().map_while(|number| number.parse::<u64>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(done), Some(ns)) => Ok((done, Duration::from_nanos(ns))),
            _ => Err(io::Error::other(format!("the load generator failed at `{line}`"))),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
