//! The hosts of a run, each with an agent that does what the lab requests: guests, or network namespaces of this machine.

pub(crate) mod agent;
mod condition;
pub(crate) mod request;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use nix::sys::signal::Signal;

use crate::patience;
use crate::process::{Process, tool};
use crate::say;
use request::{Message, Numbered, Request};

/// The name of a host with both ends.
pub(crate) const ALONE: &str = "one";

const READY_WITHIN: Duration = Duration::from_secs(300);
const OFF_WITHIN: Duration = Duration::from_secs(30);

/// For what takes time only in an emulated guest; it is added to the time of a wait.
const REPLY_WITHIN: Duration = Duration::from_secs(120);

const TICK: Duration = Duration::from_millis(100);
const LAST_LINES: usize = 20;

/// A host: its process, which is a guest or its agent itself, and what connects the agent.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: &'static str,
    pub(crate) process: Process,
    pub(crate) requests: ChildStdin,
    /// Shown where something fails.
    pub(crate) logs: Vec<PathBuf>,
    /// A guest's files, once it has ended.
    pub(crate) disk: Option<PathBuf>,
    /// What its agent said of its machine.
    pub(crate) machine: Option<String>,
    pub(crate) has_ended: bool,
}

/// The hosts of a run; killed when dropped.
#[derive(Debug)]
pub(crate) struct Hosts {
    out: PathBuf,
    hosts: Vec<Host>,
    /// By the host's place; `None` after its last message.
    inbox: Receiver<(usize, Option<Message>)>,
    requests: u64,
    replies: BTreeMap<u64, Result<String, String>>,
    /// What of a message is printed.
    shown: fn(&Message) -> Option<String>,
    /// Clients, by host and name, that end early on the first interrupt.
    pub(crate) clients: Vec<(&'static str, &'static str)>,
}

impl Hosts {
    /// Returns when all agents are ready, and adds to `machine.txt` what the first one says of its machine.
    pub(crate) fn connect(
        out: &Path,
        hosts: Vec<(Host, ChildStdout)>,
        shown: fn(&Message) -> Option<String>,
    ) -> Result<Self> {
        let (sender, inbox) = channel();
        let (hosts, messages): (Vec<_>, Vec<_>) = hosts.into_iter().unzip();
        for (place, messages) in messages.into_iter().enumerate() {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(messages).lines().map_while(Result::ok) {
                    // Firmware or kernel may print there as well.
                    if let Ok(message) = serde_json::from_str(&line) {
                        let _ = sender.send((place, Some(message)));
                    }
                }
                let _ = sender.send((place, None));
            });
        }
        let (out, replies, clients) = (out.to_owned(), BTreeMap::new(), Vec::new());
        let mut hosts = Self { out, hosts, inbox, requests: 0, replies, shown, clients };
        hosts.receive_until("all hosts are ready", READY_WITHIN, |hosts| {
            hosts.hosts.iter().all(|host| host.machine.is_some())
        })?;
        let mut record = OpenOptions::new().append(true).open(hosts.out.join("machine.txt"))?;
        let described = hosts.hosts.first().and_then(|host| host.machine.as_deref());
        record.write_all(described.unwrap_or_default().as_bytes())?;
        Ok(hosts)
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.hosts.iter().map(|host| host.name).collect()
    }

    /// The reply of one host.
    pub(crate) fn ask(&mut self, name: &str, request: Request) -> Result<String> {
        self.ask_all(&[name], &request)?.pop().context("one reply")
    }

    /// The same request to several hosts at once.
    pub(crate) fn ask_all(&mut self, names: &[&str], request: &Request) -> Result<Vec<String>> {
        let replies = names.iter().zip(self.ask_each(names, |_| request.clone())?);
        replies.map(|(name, reply)| reply.map_err(|why| anyhow!("host '{name}': {why}"))).collect()
    }

    /// Requests to several hosts at once, by the place of the name, and their replies.
    pub(crate) fn ask_each(
        &mut self,
        names: &[&str],
        request: impl Fn(usize) -> Request,
    ) -> Result<Vec<Result<String, String>>> {
        let (mut numbers, mut what, mut within) = (Vec::new(), String::new(), Duration::ZERO);
        for (place, name) in names.iter().enumerate() {
            let request = request(place);
            what = format!("{request:?}");
            within = within.max(REPLY_WITHIN + request.duration());
            numbers.push(self.send(name, request)?);
        }
        self.receive_until(&what, within, |hosts| {
            numbers.iter().all(|number| hosts.replies.contains_key(number))
        })?;
        Ok(numbers.iter().filter_map(|number| self.replies.remove(number)).collect())
    }

    fn send(&mut self, name: &str, request: Request) -> Result<u64> {
        self.requests += 1;
        let number = self.requests;
        let line = serde_json::to_string(&Numbered { number, request })? + "\n";
        let host = self.hosts.iter_mut().find(|host| host.name == name);
        let host = host.with_context(|| format!("there is no host '{name}'"))?;
        let sent = host.requests.write_all(line.as_bytes());
        sent.with_context(|| format!("the host '{name}' takes no requests"))?;
        Ok(number)
    }

    fn receive_until(
        &mut self,
        what: &str,
        within: Duration,
        is_over: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let until = Instant::now() + within;
        while !is_over(self) {
            patience::go_on()?;
            if patience::is_asked_to_end_early() {
                self.end_clients("; again to end at once")?;
            }
            let why = match self.inbox.recv_timeout(TICK) {
                Ok((place, Some(message))) => {
                    self.take(place, message);
                    continue;
                }
                Ok((place, None)) if self.hosts[place].has_ended => continue,
                Ok((place, None)) => format!("the host '{}' died", self.hosts[place].name),
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => continue,
                Err(_) => format!("time-out after {} s", within.as_secs()),
            };
            return Err(self.failure(&format!("{why} while waiting for this: {what}")));
        }
        Ok(())
    }

    fn take(&mut self, place: usize, message: Message) {
        let host = &mut self.hosts[place];
        for line in (self.shown)(&message).iter().flat_map(|text| text.lines()) {
            match host.name {
                ALONE => say(format!("  {line}")),
                name => say(format!("  {name}: {line}")),
            }
        }
        match message {
            Message::Ready(machine) => host.machine = Some(machine),
            Message::Reply { number, reply } => {
                self.replies.insert(number, reply);
            }
            Message::Progress { .. } | Message::Ended { .. } => {}
        }
    }

    /// Has the clients close what they hold and write their records, once.
    pub(crate) fn end_clients(&mut self, more: &str) -> Result<()> {
        let clients = std::mem::take(&mut self.clients);
        if !clients.is_empty() {
            say(format!(
                "ending early: the clients close what they hold and write their records{more}"
            ));
        }
        for (host, name) in clients {
            for signal in [Signal::SIGINT, Signal::SIGCONT] {
                self.send(host, Request::signal(name, signal))?;
            }
        }
        Ok(())
    }

    /// The error, after the end of each log.
    fn failure(&self, why: &str) -> Error {
        for log in self.hosts.iter().flat_map(|host| &host.logs) {
            let text = fs::read(log).unwrap_or_default();
            let lines: Vec<_> = text.lines().map_while(Result::ok).collect();
            say(format!("the last lines of {}:", log.display()));
            for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
                say(format!("    {line}"));
            }
        }
        anyhow!("{why}; what was written until then is in {}", self.out.display())
    }

    /// Ends one host; all its files are in the folder of the run then.
    pub(crate) fn collect(&mut self, name: &'static str) -> Result<()> {
        self.ask(name, Request::End)?;
        let host = self.hosts.iter_mut().find(|host| host.name == name).context("it replied")?;
        host.has_ended = true;
        if host.process.wait(OFF_WITHIN).is_err() {
            host.process.kill()?;
        }
        let Some(disk) = &host.disk else { return Ok(()) };
        let (out, disk) = (self.out.display().to_string(), disk.display().to_string());
        tool("tar", &["-C", &out, "-xf", &disk])?;
        if name == ALONE {
            fs::rename(self.out.join(format!("kernel-{ALONE}.log")), self.out.join("kernel.log"))?;
        }
        Ok(())
    }
}
