//! Counts instructions in user space per accepted connection and per echoed message, with callgrind.
//!
//! The work of a server per wake-up depends on how much input has arrived. So the server is stopped while the load
//! connects or sends, and then finds all input at once: the count is the same in each run, however busy the machine is.

use std::fs;
use std::io;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::contest::{Contestant, Setting};
use crate::process::Server;

const CONNECTIONS_FEW: usize = 1_000;
const CONNECTIONS_MANY: usize = 4_000;
const ECHOES: usize = 5;

/// The allowed relative difference from the recorded count.
const TOLERANCE: f64 = 0.05;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Instructions {
    pub(crate) contestant: String,
    pub(crate) per_accept: f64,
    pub(crate) per_message: f64,
}

/// Whether valgrind is available.
pub(crate) fn is_available() -> bool {
    let ran = Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    ran.is_ok_and(|status| status.success())
}

pub(crate) fn run(setting: &Setting, contestant: &Contestant) -> io::Result<Instructions> {
    let few = count(setting, contestant, CONNECTIONS_FEW, 0)?;
    let many = count(setting, contestant, CONNECTIONS_MANY, 0)?;
    let echoed = count(setting, contestant, CONNECTIONS_FEW, ECHOES)?;
    Ok(Instructions {
        contestant: contestant.name.clone(),
        per_accept: (many - few) as f64 / (CONNECTIONS_MANY - CONNECTIONS_FEW) as f64,
        per_message: (echoed - few) as f64 / (CONNECTIONS_FEW * ECHOES) as f64,
    })
}

fn count(
    setting: &Setting,
    contestant: &Contestant,
    connections: usize,
    echoes: usize,
) -> io::Result<i64> {
    let log = setting.scratch.join("callgrind.log");
    let wrapper = [
        "valgrind".to_owned(),
        "--tool=callgrind".to_owned(),
        "--callgrind-out-file=/dev/null".to_owned(),
        format!("--log-file={}", log.display()),
    ];
    let server = setting.server(&wrapper, contestant)?;
    let mut load = setting.load()?;
    server.wait_until_idle()?;
    at_once(&server, || load.command(&format!("open {connections}")).map(drop))?;
    server.wait_until_idle()?;
    for _ in 0..echoes {
        at_once(&server, || load.command(&format!("send {connections}")).map(drop))?;
        load.command(&format!("receive {connections}"))?;
        server.wait_until_idle()?;
    }
    server.terminate()?;
    collected(&fs::read_to_string(log)?)
        .ok_or_else(|| io::Error::other("callgrind has reported no count"))
}

/// Runs `act` while the server is stopped.
fn at_once(server: &Server, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    server.freeze()?;
    act()?;
    server.thaw()
}

/// Parses the line `==123== Collected : 456789`.
fn collected(log: &str) -> Option<i64> {
    let line = log.lines().rev().find(|line| line.contains("Collected"))?;
    line.rsplit(':').next()?.trim().parse().ok()
}

/// Compares counts with the recorded ones; returns a line per count, and whether all are within the tolerance.
pub(crate) fn compare(recorded: &Instructions, counted: &Instructions) -> (String, bool) {
    let figures = [
        ("accept", recorded.per_accept, counted.per_accept),
        ("message", recorded.per_message, counted.per_message),
    ];
    let mut text = String::new();
    let mut all_within = true;
    for (what, recorded, counted) in figures {
        let change = counted / recorded - 1.0;
        let within = change.abs() <= TOLERANCE;
        all_within &= within;
        let verdict = if within { "  ok" } else { "FAIL" };
        let advice = match change {
            _ if within => "",
            worse if worse > 0.0 => {
                ": find out what has grown, or record it anew by scripts/instructions"
            }
            _ => ": it has become better, so record it anew by scripts/instructions",
        };
        text += &format!(
            "{verdict} instructions per {what}: {counted:.0}, recorded {recorded:.0} ({:+.1}%, {:.0}% is allowed){advice}\n",
            change * 100.0,
            TOLERANCE * 100.0
        );
    }
    (text, all_within)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(per_accept: f64, per_message: f64) -> Instructions {
        Instructions { contestant: "reactor".to_owned(), per_accept, per_message }
    }

    #[test]
    fn a_count_within_five_per_cent_passes() {
        assert!(compare(&figures(1000.0, 500.0), &figures(1049.0, 476.0)).1);
    }

    #[test]
    fn a_count_further_off_fails_in_either_direction() {
        let (worse, within) = compare(&figures(1000.0, 500.0), &figures(1051.0, 500.0));
        assert!(
            !within && worse.contains("FAIL instructions per accept: 1051, recorded 1000 (+5.1%")
        );
        let (better, within) = compare(&figures(1000.0, 500.0), &figures(1000.0, 474.0));
        assert!(!within && better.contains("it has become better"), "{better}");
    }

    #[test]
    fn callgrind_s_total_is_found() {
        let log = "==7== Events    : Ir\n==7== Collected : 123456\n==7== \n";
        assert_eq!(collected(log), Some(123_456));
        assert_eq!(collected("==7== nothing"), None);
    }
}
