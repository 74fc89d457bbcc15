//! What the lab and the agents of its hosts send each other: a line of JSON each.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// A request, and the number that its reply has.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) number: u64,
    pub(crate) request: Request,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Start a program, which logs to `NAME.log`.
    Start(Start),
    /// Send a program the signal of that number.
    Signal { name: String, signal: i32 },
    /// Run a command in a shell; the reply is its output.
    Run(String),
    /// Copy the kernel's own figures of this moment, and those of the server if it runs.
    Snapshot(String),
    /// The reply is how many connections this client's record says it held.
    Established(String),
    /// Until the program ends, add a line to `samples.log` again and again.
    Sample { name: String, every_seconds: u64 },
    /// Reply once the condition holds; an error after that time.
    Await { condition: Condition, within_seconds: u64 },
    /// In a guest: write all files to the disk. Then end.
    End,
}

impl Request {
    pub(crate) fn start(name: &str, user: u32, cgroup: Option<&str>, words: &str) -> Self {
        let words = words.split_whitespace().map(str::to_owned).collect();
        Self::Start(Start { name: name.to_owned(), user, cgroup: cgroup.map(str::to_owned), words })
    }

    pub(crate) fn signal(name: &str, signal: Signal) -> Self {
        Self::Signal { name: name.to_owned(), signal: signal as i32 }
    }

    pub(crate) fn wait_for(condition: Condition, within_seconds: u64) -> Self {
        Self::Await { condition, within_seconds }
    }

    /// How long it is meant to take.
    pub(crate) fn duration(&self) -> Duration {
        match self {
            Self::Await { within_seconds, .. } => Duration::from_secs(*within_seconds),
            _ => Duration::ZERO,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) name: String,
    /// 0 for the agent's own.
    pub(crate) user: u32,
    /// A cgroup's folder.
    pub(crate) cgroup: Option<String>,
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Condition {
    /// The program's log has these words; the reply is the line with them. An error if it ends without.
    Logged { name: String, words: String },
    /// The client holds all that it could open, and is stopped then. An error if it ends without.
    Holds(String),
    /// The reply is its exit code, 128 and the signal if one ended it.
    Ended(String),
    /// At most this many TCP sockets exist, or no fewer than before for that long; the reply is how many do.
    Drained { sockets_max: u64, stall_seconds: u64 },
    /// At most this many connections are in the table of tracked ones.
    Tracked { connections_max: u64 },
    /// The reply is how often a second the program has woken up from waiting, over that time.
    Wakes { name: String, seconds: u64 },
}

impl Condition {
    pub(crate) fn logged(name: &str, words: &str) -> Self {
        Self::Logged { name: name.to_owned(), words: words.to_owned() }
    }
}

/// What an agent sends.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// It takes requests; the text describes its machine.
    Ready(String),
    /// New lines of a running program's log, in a guest the newest one alone.
    Progress {
        name: String,
        lines: String,
    },
    /// A program has ended; the text is the end of its log.
    Ended {
        name: String,
        code: i32,
        words: String,
    },
    Reply {
        number: u64,
        reply: Result<String, String>,
    },
}
