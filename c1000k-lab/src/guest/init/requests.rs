//! Receives the host's requests on a serial port, handles them and sends the replies.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use nix::unistd::sync;

use super::conditions::{self, Poll, poll_for};
use super::programs::Programs;
use super::{Arguments, OUT, shell};
use crate::guest::request::{Message, Numbered, Request};
use crate::{record, snapshot};

/// The host reads it.
const DISK: &str = "/dev/vda";

const PORT: &str = "/dev/ttyS1";

/// Between two polls of the conditions.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// A request that waits for a condition.
struct Wait {
    number: u64,
    poll: Poll,
    deadline: Instant,
    /// The error after the deadline.
    error: String,
}

pub(super) struct Guest {
    name: String,
    port: File,
    requests: Receiver<Numbered>,
    programs: Programs,
    waits: Vec<Wait>,
    shown_at: Instant,
}

impl Guest {
    pub(super) fn new(arguments: &Arguments) -> Result<Self> {
        let port = File::options().read(true).write(true).open(PORT).context(PORT)?;
        let mut settings = tcgetattr(&port)?;
        cfmakeraw(&mut settings);
        tcsetattr(&port, SetArg::TCSANOW, &settings)?;
        let (sender, requests) = channel();
        let lines = BufReader::new(port.try_clone()?).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let sent = match serde_json::from_str(&line) {
                    Ok(request) => sender.send(request).is_ok(),
                    Err(why) => {
                        println!("not a request, {why}: {line}");
                        true
                    }
                };
                if !sent {
                    return;
                }
            }
        });
        Ok(Self {
            name: arguments.name.clone(),
            port,
            requests,
            programs: Programs::default(),
            waits: Vec::new(),
            shown_at: Instant::now(),
        })
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        Ok(self.port.write_all(line.as_bytes())?)
    }

    /// Returns when the host has requested the files.
    pub(super) fn serve_requests(&mut self) -> Result<()> {
        loop {
            match self.requests.recv_timeout(POLL_INTERVAL) {
                Ok(Numbered { number, request }) => {
                    let is_last = matches!(request, Request::Collect);
                    match self.handle(number, request) {
                        Ok(Some(result)) => self.reply(number, Ok(result))?,
                        Ok(None) => {}
                        Err(why) => self.reply(number, Err(why))?,
                    }
                    if is_last {
                        return Ok(tcdrain(&self.port)?);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the host sends no more requests"),
            }
            let mut messages = self.programs.ended()?;
            if self.shown_at.elapsed() >= PROGRESS_INTERVAL {
                self.shown_at = Instant::now();
                messages.extend(self.programs.progress()?);
            }
            messages.iter().try_for_each(|message| self.send(message))?;
            self.poll_waits()?;
        }
    }

    fn reply(&mut self, number: u64, result: Result<String>) -> Result<()> {
        let result = result.map_err(|why| format!("{why:#}"));
        self.send(&Message::Reply { number, result })
    }

    /// Returns `None` for a request that waits.
    fn handle(&mut self, number: u64, request: Request) -> Result<Option<String>> {
        let mut result = String::new();
        match request {
            Request::Start(start) => self.programs.start(start)?,
            Request::Signal { name, signal } => {
                self.programs.named(&name)?.process.signal(Signal::try_from(signal)?)?;
            }
            Request::Run(command) => result = shell(&command)?,
            Request::Snapshot(moment) => {
                let server = self.programs.server();
                let folder = Path::new(OUT).join("snapshots").join(&self.name).join(moment);
                snapshot::take(&folder, server.map(|server| server.process.pid()))?;
            }
            Request::Established(client) => {
                let record = record::client(&Path::new(OUT).join(format!("{client}.json")))?;
                result = record.established.to_string();
            }
            Request::Sample { name, interval_seconds } => {
                let pid = self.programs.named(&name)?.process.pid();
                thread::spawn(move || {
                    conditions::sample(pid, Duration::from_secs(interval_seconds))
                });
            }
            Request::Await { condition, timeout_seconds } => {
                let error = format!("not within {timeout_seconds} s: {condition:?}");
                let poll = poll_for(condition, &mut self.programs)?;
                let deadline = Instant::now() + Duration::from_secs(timeout_seconds);
                self.waits.push(Wait { number, poll, deadline, error });
                return Ok(None);
            }
            Request::Collect => {
                shell(&format!(
                    "dmesg >{OUT}/kernel-{}.log; tar -C {OUT} -cf {DISK} .",
                    self.name
                ))?;
                sync();
            }
        }
        Ok(Some(result))
    }

    fn poll_waits(&mut self) -> Result<()> {
        for mut wait in std::mem::take(&mut self.waits) {
            match (wait.poll)(&mut self.programs).transpose() {
                Some(result) => self.reply(wait.number, result)?,
                None if Instant::now() > wait.deadline => {
                    self.reply(wait.number, Err(Error::msg(wait.error)))?;
                }
                None => self.waits.push(wait),
            }
        }
        Ok(())
    }
}
