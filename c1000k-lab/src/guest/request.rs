//! The protocol between host and guest: lines of JSON on the guest's second serial port.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// A request of the host, and the number that identifies its reply.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) number: u64,
    pub(crate) request: Request,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Starts a program, which logs to `NAME.log`.
    Start(Start),
    /// Sends a signal to a program.
    Signal { name: String, signal: i32 },
    /// Runs a command in a shell; the reply is its output.
    Run(String),
    /// Takes a snapshot of the kernel's figures, and of the server's if it runs.
    Snapshot(String),
    /// The reply is `established` of this client's record.
    Established(String),
    /// Writes samples of a program to `samples.log` until it ends.
    Sample { name: String, interval_seconds: u64 },
    /// The reply is sent as soon as the condition holds; an error after the timeout.
    Await { condition: Condition, timeout_seconds: u64 },
    /// Writes all files to the disk and ends the guest.
    Collect,
}

impl Request {
    pub(crate) fn signal(name: &str, signal: Signal) -> Self {
        Self::Signal { name: name.to_owned(), signal: signal as i32 }
    }

    /// Of the condition that it waits for.
    pub(crate) fn timeout(&self) -> Duration {
        match self {
            Self::Await { timeout_seconds, .. } => Duration::from_secs(*timeout_seconds),
            _ => Duration::ZERO,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) name: String,
    pub(crate) user: u32,
    /// Its directory.
    pub(crate) cgroup: Option<String>,
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Condition {
    /// The program's log has this text; the reply is the line. An error if the program ends without it.
    Logged { name: String, text: String },
    /// The client holds all connections that it could open; it is stopped then. An error if it ends before.
    Holds(String),
    /// The reply is the exit code, or 128 plus the number of the signal that ended the program.
    Ended(String),
    /// At most this many TCP sockets are in use; the reply is their number.
    Drained { sockets_max: u64 },
    /// The same, or the number has not decreased for some time.
    DrainedOrStalled { sockets_max: u64 },
    /// At most this many connections are in the kernel's table.
    Tracked { connections_max: u64 },
    /// After this time; the reply is how often per second the program has gone to sleep meanwhile.
    Wakes { name: String, seconds: u64 },
}

impl Condition {
    pub(crate) fn logged(name: &str, text: &str) -> Self {
        Self::Logged { name: name.to_owned(), text: text.to_owned() }
    }
}

/// A message of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// It accepts requests; the text describes its machine.
    Booted(String),
    /// The last line of a running program's log.
    Progress {
        name: String,
        line: String,
    },
    /// A program has ended; `output` is the end of its log.
    Ended {
        name: String,
        code: i32,
        output: String,
    },
    Reply {
        number: u64,
        result: Result<String, String>,
    },
}
