//! Counts the system calls of server and client, for the table in docs/architecture.md.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::{Isolation, Process, isolated};
use crate::programs::Programs;
use crate::wait;

const FIRST_PORT: &str = "9900";

/// Counts the system calls of server and client
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Connections, each verified twice and then reset by the client
    #[arg(value_name = "N", default_value_t = 5_000)]
    connections: u64,
    /// The directory for the counts
    #[arg(value_name = "FOLDER", default_value = "out/syscalls")]
    folder: PathBuf,
}

pub(crate) fn run(Arguments { connections, folder }: &Arguments) -> Result<ExitCode> {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        bail!("strace is missing: install it (Debian, Ubuntu: sudo apt-get install strace)");
    }
    wait::handle_interrupts()?;
    let programs = Programs::find("FAULTS_BINARIES")?;
    fs::create_dir_all(folder)?;
    let arguments = ["--bind", "127.0.0.1", "--first-port", FIRST_PORT, "--interval", "1h"];
    let mut server = trace("server", &programs, folder, &arguments)?;
    server.await_log("ready", Duration::from_secs(30))?;
    let count = connections.to_string();
    let arguments = ["127.0.0.1", FIRST_PORT, "-c", &count, "--hold", "1s"];
    let mut client = trace("client", &programs, folder, &arguments)?;
    if client.wait(Duration::from_secs(60 + connections / 50))? != 0 {
        bail!("the client did not reach its target: see {}", folder.join("client.log").display());
    }
    kill(child_of(server.pid())?, Signal::SIGTERM)?;
    server.wait(Duration::from_secs(60))?;
    for end in ["server", "client"] {
        println!(
            "\nthe {end}, {connections} connections, each verified twice and then reset by the client:"
        );
        print!("{}", fs::read_to_string(folder.join(format!("syscalls-{end}.txt")))?);
    }
    Ok(ExitCode::SUCCESS)
}

fn trace(end: &str, programs: &Programs, folder: &Path, arguments: &[&str]) -> Result<Process> {
    let mut command = isolated(&Isolation::default(), "strace")?;
    command.args(["-c", "-f", "-o"]).arg(folder.join(format!("syscalls-{end}.txt")));
    command.arg(programs.path(&format!("c1000k-{end}"))).args(arguments);
    Process::spawn_logged(end, &mut command, folder.join(format!("{end}.log")))
}

fn child_of(parent: Pid) -> Result<Pid> {
    let processes = procfs::process::all_processes()?.filter_map(Result::ok);
    let mut stats = processes.filter_map(|process| process.stat().ok());
    let child =
        stats.find(|stat| stat.ppid == parent.as_raw()).context("the tracer has no child")?;
    Ok(Pid::from_raw(child.pid))
}
