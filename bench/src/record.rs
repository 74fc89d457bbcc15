//! The record of a run: all measurements of each round, as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::contest::{Result, Size};
use crate::instructions::Instructions;
use crate::memory::Memory;
use crate::syscalls::Syscalls;

#[derive(Debug, Serialize)]
pub(crate) struct Record {
    pub(crate) command: String,
    pub(crate) machine: BTreeMap<String, String>,
    pub(crate) size: Size,
    pub(crate) results: Vec<Result>,
    pub(crate) syscalls: Vec<Syscalls>,
    pub(crate) memory: Vec<Memory>,
    pub(crate) instructions: Vec<Instructions>,
    pub(crate) micro: Vec<Micro>,
}

/// The cost of one operation on one structure: nanoseconds, or bytes per entry if the subject is memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Micro {
    pub(crate) subject: String,
    pub(crate) structure: String,
    pub(crate) entries: usize,
    pub(crate) operation: String,
    pub(crate) cost: f64,
    pub(crate) round: usize,
}

/// A description of the machine.
pub(crate) fn machine() -> BTreeMap<String, String> {
    let mut machine = BTreeMap::new();
    let mut note = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            machine.insert(key.to_owned(), value);
        }
    };
    note("kernel", said_by("uname", &["-sr"]));
    note("date", said_by("date", &["-u", "+%FT%TZ"]));
    note("git", said_by("git", &["rev-parse", "--short", "HEAD"]));
    note("rustc", said_by("rustc", &["--version"]));
    note("cc", said_by("cc", &["--version"]));
    note("cpu", line_after("/proc/cpuinfo", "model name"));
    note("memory", line_after("/proc/meminfo", "MemTotal"));
    note("cpus", std::thread::available_parallelism().ok().map(|cpus| cpus.to_string()));
    note("load when it began", fs::read_to_string("/proc/loadavg").ok().map(|t| t.trim().into()));
    machine
}

fn said_by(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(str::to_owned)
}

fn line_after(file: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}
