//! Counts the system calls of server and client, for the budget in docs/architecture.md.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::patience::{self, wait_until};
use crate::process::{Place, Process, inside};
use crate::programs::Programs;

const FIRST_PORT: &str = "9900";

/// Counts the system calls of server and client
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Connections, each proven twice and then reset by the client
    #[arg(value_name = "N", default_value_t = 5_000)]
    connections: u64,
    /// Where the counts go
    #[arg(value_name = "FOLDER", default_value = "out/syscalls")]
    folder: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Arguments { connections, folder } = arguments;
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        bail!("strace is missing: install it (Debian, Ubuntu: sudo apt-get install strace)");
    }
    patience::take_interrupts()?;
    let programs = Programs::find("FAULTS_BINARIES")?;
    fs::create_dir_all(folder)?;
    let words = ["--bind", "127.0.0.1", "--first-port", FIRST_PORT, "--interval", "1h"];
    let mut server = trace("server", &programs, folder, &words)?;
    let log = folder.join("server.log");
    let is_ready = || {
        let log = fs::read_to_string(&log)?;
        if !server.is_running() {
            bail!("the server did not start: {}", log.lines().next_back().unwrap_or_default());
        }
        Ok(log.contains("ready: "))
    };
    wait_until("the server is ready", Duration::from_secs(30), is_ready)?;
    let count = connections.to_string();
    let words = ["127.0.0.1", FIRST_PORT, "-c", &count, "--hold", "1s"];
    let mut client = trace("client", &programs, folder, &words)?;
    let status = client.wait(Duration::from_secs(60 + connections / 50))?;
    if !status.success() {
        bail!("the client fell short: see {}", folder.join("client.log").display());
    }
    kill(child_of(server.pid())?, Signal::SIGTERM)?;
    server.wait(Duration::from_secs(60))?;
    for end in ["server", "client"] {
        println!(
            "\nthe {end}, {connections} connections, each proven twice and then reset by the client:"
        );
        print!("{}", fs::read_to_string(folder.join(format!("syscalls-{end}.txt")))?);
    }
    Ok(ExitCode::SUCCESS)
}

fn trace(end: &str, programs: &Programs, folder: &Path, words: &[&str]) -> Result<Process> {
    let log = File::create(folder.join(format!("{end}.log")))?;
    let mut command = inside(&Place::default(), "strace")?;
    command.args(["-c", "-f", "-o"]).arg(folder.join(format!("syscalls-{end}.txt")));
    command.arg(programs.path(&format!("c1000k-{end}"))).args(words.iter().map(OsStr::new));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Process::spawn(end, &mut command)
}

fn child_of(parent: Pid) -> Result<Pid> {
    let processes = procfs::process::all_processes()?.filter_map(Result::ok);
    let mut stats = processes.filter_map(|process| process.stat().ok());
    let child =
        stats.find(|stat| stat.ppid == parent.as_raw()).context("the tracer has no child")?;
    Ok(Pid::from_raw(child.pid))
}
