//! What host and guest say to each other: a line of JSON each, on the guest's second serial port.

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// An order of the host, and the number by which it knows the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) number: u64,
    pub(crate) order: Order,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Starts a program, which logs to `NAME.log`.
    Start(Start),
    /// The signal of that number for a program.
    Signal { name: String, signal: i32 },
    /// A command for the guest's shell; the answer is its output.
    Run(String),
    /// What the kernel says of itself at this moment, and of the server if it runs.
    Snapshot(String),
    /// The answer is how many connections this client's record says it held.
    Established(String),
    /// From here on until the program ends a line goes to `samples.log` again and again.
    Sample { name: String, every_seconds: u64 },
    /// Answered as soon as it holds; an error after that time.
    Await { condition: Condition, within_seconds: u64 },
    /// All files go to the disk; then the guest ends.
    Ship,
}

impl Order {
    pub(crate) fn signal(name: &str, signal: Signal) -> Self {
        Self::Signal { name: name.to_owned(), signal: signal as i32 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) name: String,
    /// Root, if it is 0.
    pub(crate) user: u32,
    /// A cgroup's folder.
    pub(crate) cgroup: Option<String>,
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Condition {
    /// The program's log has these words; the answer is the line with them. An error if it ends without.
    Says { name: String, words: String },
    /// The client holds all that it could open, and is stopped then. An error if it ends without.
    Holds(String),
    /// The answer is its exit code, 128 and the signal if one ended it.
    Ended(String),
    /// At most this many TCP sockets are in use; the answer is how many are.
    Drained { sockets_max: u64 },
    /// As few, or no fewer for a while.
    DrainedOrStalled { sockets_max: u64 },
    /// At most this many connections are in the kernel's table.
    Tracked { connections_max: u64 },
    /// The answer is how often a second the program has woken up from waiting, over that time.
    Wakes { name: String, seconds: u64 },
}

impl Condition {
    pub(crate) fn says(name: &str, words: &str) -> Self {
        Self::Says { name: name.to_owned(), words: words.to_owned() }
    }
}

/// A word of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// It takes orders; the text is what it says of its machine.
    Booted(String),
    /// The newest line of a running program's log.
    Progress { name: String, line: String },
    /// A program has ended; the text is the end of its log.
    Ended { name: String, code: i32, words: String },
    /// The answer to an order; an error is what it complained of.
    Answer { number: u64, answer: Result<String, String> },
}
