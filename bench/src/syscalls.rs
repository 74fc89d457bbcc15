//! Counts system calls per accepted connection and per message, with strace, in separate runs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use crate::contest::{Contestant, Setting};
use crate::process::{Load, Server};

const CONNECTIONS: usize = 2_000;
const MESSAGES_EACH: usize = 5;

#[derive(Debug, Serialize)]
pub(crate) struct Syscalls {
    pub(crate) contestant: String,
    pub(crate) connections: usize,
    pub(crate) messages: usize,
    /// The calls by name while the connections were opened.
    pub(crate) accepting: BTreeMap<String, u64>,
    /// The calls by name while all connections were echoing.
    pub(crate) echoing: BTreeMap<String, u64>,
}

/// Whether strace can attach here.
pub(crate) fn is_available() -> bool {
    let ran = Command::new("strace")
        .args(["-c", "-o", "/dev/null", "true"])
        .stderr(Stdio::null())
        .status();
    ran.is_ok_and(|status| status.success())
}

pub(crate) fn run(setting: &Setting, contestant: &Contestant) -> io::Result<Syscalls> {
    let server = setting.server(&[], contestant)?;
    let mut load = setting.load()?;
    let scratch = &setting.scratch;
    let open = format!("open {CONNECTIONS}");
    let accepting = count(&server, &mut load, &open, scratch)?;
    let echo =
        format!("echo {CONNECTIONS} {MESSAGES_EACH} {}", scratch.join("latencies").display());
    let echoing = count(&server, &mut load, &echo, scratch)?;
    Ok(Syscalls {
        contestant: contestant.name.clone(),
        connections: CONNECTIONS,
        messages: CONNECTIONS * MESSAGES_EACH,
        accepting,
        echoing,
    })
}

fn count(
    server: &Server,
    load: &mut Load,
    command: &str,
    scratch: &Path,
) -> io::Result<BTreeMap<String, u64>> {
    server.wait_until_idle()?;
    let report = scratch.join("strace");
    let mut strace = Command::new("strace")
        .args(["-c", "-f", "-p", &server.id().to_string(), "-o"])
        .arg(&report)
        .stderr(Stdio::piped())
        .spawn()?;
    // strace prints a line when it has attached.
    if let Some(stderr) = strace.stderr.take() {
        BufReader::new(stderr).read_line(&mut String::new())?;
    }
    load.command(command)?;
    server.wait_until_idle()?;
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGINT)?;
    strace.wait()?;
    Ok(fs::read_to_string(report)?.lines().filter_map(row).collect())
}

/// Parses a line like ` 50.00    0.000123           1      2000        12 accept4`; the error count is optional.
fn row(line: &str) -> Option<(String, u64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let name = *fields.last()?;
    let calls = fields.get(3)?.parse().ok()?;
    (name != "total" && fields.len() >= 5).then(|| (name.to_owned(), calls))
}
