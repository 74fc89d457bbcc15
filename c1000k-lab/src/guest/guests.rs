//! The host's side: sends requests to the guests of a run, and receives their replies.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use nix::sys::signal::Signal;

use super::qemu::{Machine, Running, Spec};
use super::request::{Condition, Message, Numbered, Request};
use crate::print_line;
use crate::process::tool;
use crate::wait;

/// The name of a guest with both ends.
pub(crate) const ALONE: &str = "one";

const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);

/// For a reply, in addition to the timeout of the condition that the request waits for: an emulated guest is slow.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

const POLL_INTERVAL: Duration = Duration::from_millis(100);
const CONSOLE_LINES: usize = 20;

#[derive(Debug)]
struct Guest {
    name: &'static str,
    running: Running,
    console: PathBuf,
    /// The description of its machine, once it has booted.
    machine: Option<String>,
    is_collected: bool,
}

/// The index of a guest and its message; `None` at the end of its messages.
type Received = (usize, Option<Message>);

/// The guests of a run; killed when dropped.
#[derive(Debug)]
pub(crate) struct Guests<'a> {
    out: PathBuf,
    guests: Vec<Guest>,
    receiver: Receiver<Received>,
    sender: Sender<Received>,
    requests: u64,
    replies: BTreeMap<u64, Result<String, String>>,
    /// What to print of a message.
    shown: fn(&Message) -> Option<String>,
    /// Clients, by guest and name, that the first interrupt ends early.
    pub(crate) clients: Vec<(&'static str, &'static str)>,
    // The last field: the guests use its directory.
    machine: Machine<'a>,
}

impl<'a> Guests<'a> {
    /// Returns when all guests accept requests, and appends the description of the first one's machine to
    /// `machine.txt`.
    pub(crate) fn boot(
        machine: Machine<'a>,
        out: &Path,
        specs: &[Spec],
        shown: fn(&Message) -> Option<String>,
    ) -> Result<Self> {
        let (sender, receiver) = channel();
        let mut guests = Self {
            out: out.to_owned(),
            guests: Vec::new(),
            receiver,
            sender,
            requests: 0,
            replies: BTreeMap::new(),
            shown,
            clients: Vec::new(),
            machine,
        };
        for spec in specs {
            guests.add(spec)?;
        }
        guests.receive_until("all guests have booted", BOOT_TIMEOUT, |guests| {
            guests.guests.iter().all(|guest| guest.machine.is_some())
        })?;
        let mut record = OpenOptions::new().append(true).open(out.join("machine.txt"))?;
        let description = guests.guests.first().and_then(|guest| guest.machine.as_deref());
        record.write_all(description.unwrap_or_default().as_bytes())?;
        Ok(guests)
    }

    fn add(&mut self, spec: &Spec) -> Result<()> {
        let console = self.out.join(match spec.name {
            ALONE => "console.log".to_owned(),
            name => format!("console-{name}.log"),
        });
        let (running, messages) = self.machine.boot(spec, &console)?;
        let (index, sender) = (self.guests.len(), self.sender.clone());
        thread::spawn(move || {
            for line in BufReader::new(messages).lines().map_while(Result::ok) {
                // Firmware and kernel may write other lines.
                if let Ok(message) = serde_json::from_str(&line) {
                    let _ = sender.send((index, Some(message)));
                }
            }
            let _ = sender.send((index, None));
        });
        let guest = Guest { name: spec.name, running, console, machine: None, is_collected: false };
        self.guests.push(guest);
        Ok(())
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.guests.iter().map(|guest| guest.name).collect()
    }

    fn named(&mut self, name: &str) -> Result<&mut Guest> {
        let guest = self.guests.iter_mut().find(|guest| guest.name == name);
        guest.with_context(|| format!("there is no guest '{name}'"))
    }

    /// Sends a request to one guest, and returns its reply.
    pub(crate) fn request(&mut self, name: &str, request: Request) -> Result<String> {
        self.request_all(&[name], &request)?.pop().context("a guest sends one reply")
    }

    /// Sends a request to several guests at once, and returns their replies.
    pub(crate) fn request_all(&mut self, names: &[&str], request: &Request) -> Result<Vec<String>> {
        let replies = self.request_each(names, |_| request.clone())?;
        let replies = names.iter().zip(replies);
        replies.map(|(name, reply)| reply.map_err(|why| anyhow!("guest '{name}': {why}"))).collect()
    }

    /// Sends a request to each of several guests at once, by the index of its name, and returns their replies.
    pub(crate) fn request_each(
        &mut self,
        names: &[&str],
        request: impl Fn(usize) -> Request,
    ) -> Result<Vec<Result<String, String>>> {
        let (mut numbers, mut what, mut timeout) = (Vec::new(), String::new(), Duration::ZERO);
        for (index, name) in names.iter().enumerate() {
            let request = request(index);
            what = format!("{request:?}");
            timeout = timeout.max(REPLY_TIMEOUT + request.timeout());
            numbers.push(self.send(name, request)?);
        }
        self.receive_until(&what, timeout, |guests| {
            numbers.iter().all(|number| guests.replies.contains_key(number))
        })?;
        Ok(numbers.iter().filter_map(|number| self.replies.remove(number)).collect())
    }

    fn send(&mut self, name: &str, request: Request) -> Result<u64> {
        self.requests += 1;
        let number = self.requests;
        let line = serde_json::to_string(&Numbered { number, request })? + "\n";
        let sent = self.named(name)?.running.requests.write_all(line.as_bytes());
        sent.with_context(|| format!("the guest '{name}' accepts no requests"))?;
        Ok(number)
    }

    fn receive_until(
        &mut self,
        what: &str,
        timeout: Duration,
        is_over: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !is_over(self) {
            self.check_interrupts()?;
            let why = match self.receiver.recv_timeout(POLL_INTERVAL) {
                Ok((index, Some(message))) => {
                    self.handle(index, message);
                    continue;
                }
                Ok((index, None)) if self.guests[index].is_collected => continue,
                Ok((index, None)) => format!("the guest '{}' ended", self.guests[index].name),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => continue,
                Err(_) => format!("timeout after {} s", timeout.as_secs()),
            };
            return Err(self.failure(&format!("{why} while this was awaited: {what}")));
        }
        Ok(())
    }

    fn handle(&mut self, index: usize, message: Message) {
        let guest = &mut self.guests[index];
        let shown_name = if guest.name == ALONE { "guest" } else { guest.name };
        for line in (self.shown)(&message).iter().flat_map(|text| text.lines()) {
            print_line(format!("  {shown_name}: {line}"));
        }
        match message {
            Message::Booted(machine) => guest.machine = Some(machine),
            Message::Reply { number, result } => {
                self.replies.insert(number, result);
            }
            Message::Progress { .. } | Message::Ended { .. } => {}
        }
    }

    /// The first interrupt ends the clients early, which then write their records; the second one ends the run.
    fn check_interrupts(&mut self) -> Result<()> {
        wait::check_deadline()?;
        if !wait::is_early_end_requested() || self.clients.is_empty() {
            return Ok(());
        }
        print_line(
            "ending early: the clients close their connections and write their records; interrupt again to end at once",
        );
        for (guest, name) in std::mem::take(&mut self.clients) {
            for signal in [Signal::SIGINT, Signal::SIGCONT] {
                self.send(guest, Request::signal(name, signal))?;
            }
        }
        Ok(())
    }

    /// Prints the ends of the consoles and qemu's logs, and returns the error.
    fn failure(&self, why: &str) -> Error {
        for guest in &self.guests {
            print_line(format!("the last lines of {}:", guest.console.display()));
            let console = fs::read(&guest.console).unwrap_or_default();
            let lines: Vec<_> = console.lines().map_while(Result::ok).collect();
            for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
                print_line(format!("    {line}"));
            }
            let log = fs::read(&guest.running.log).unwrap_or_default();
            for line in log.lines().map_while(Result::ok) {
                print_line(format!("    qemu: {line}"));
            }
        }
        anyhow!("{why}; the files so far are in {}", self.out.display())
    }

    /// Copies all files of a guest to the directory of the run, and ends the guest.
    pub(crate) fn collect(&mut self, name: &'static str) -> Result<()> {
        self.request(name, Request::Collect)?;
        let guest = self.named(name)?;
        guest.is_collected = true;
        if guest.running.process.wait(POWER_OFF_TIMEOUT).is_err() {
            guest.running.process.kill()?;
        }
        let disk = guest.running.disk.display().to_string();
        tool("tar", &["-C", &self.out.display().to_string(), "-xf", &disk])?;
        if name == ALONE {
            fs::rename(self.out.join(format!("kernel-{ALONE}.log")), self.out.join("kernel.log"))?;
        }
        Ok(())
    }
}

/// Waits for a condition in a guest.
pub(crate) fn wait_for(condition: Condition, timeout_seconds: u64) -> Request {
    Request::Await { condition, timeout_seconds }
}
