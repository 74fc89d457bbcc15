//! The memory of each server's process per idle connection.

use std::io;

use serde::Serialize;

use crate::contest::{Contestant, Setting};

/// A timeout that does not fire during the measurement.
const IDLE_TIMEOUT: [&str; 2] = ["--idle-timeout", "600"];

#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) contestant: String,
    pub(crate) connections: usize,
    pub(crate) bytes_per_connection: f64,
    /// The memory of the whole process with all connections open.
    pub(crate) bytes: u64,
}

pub(crate) fn run(setting: &Setting, connections: usize) -> io::Result<Vec<Memory>> {
    let mut contestants = setting.contestants();
    for library in ["reactor", "tokio"] {
        contestants.push(setting.library(library, &IDLE_TIMEOUT));
    }
    contestants.iter().map(|contestant| measure(setting, contestant, connections)).collect()
}

fn measure(setting: &Setting, contestant: &Contestant, connections: usize) -> io::Result<Memory> {
    let server = setting.server(&[], contestant)?;
    let mut load = setting.load()?;
    server.wait_until_idle()?;
    let before = server.anonymous_bytes()?;
    load.command(&format!("open {connections}"))?;
    server.wait_until_idle()?;
    let bytes = server.anonymous_bytes()?;
    Ok(Memory {
        contestant: contestant.name.clone(),
        connections,
        bytes_per_connection: bytes.saturating_sub(before) as f64 / connections as f64,
        bytes,
    })
}
