//! The host's side: orders for the guests of a run, and what they answer.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use nix::sys::signal::Signal;

use super::order::{Condition, Message, Numbered, Order};
use super::qemu::{Machine, Running, Spec};
use crate::patience;
use crate::process::tool;
use crate::say::say;

/// The name of a guest with both ends.
pub(crate) const ALONE: &str = "one";

const BOOTED_WITHIN: Duration = Duration::from_secs(300);
const OFF_WITHIN: Duration = Duration::from_secs(30);

/// For what a guest does at once; an emulated one is slow. As much comes on top of the time of a wait.
const ANSWERED_WITHIN: Duration = Duration::from_secs(120);

const TICK: Duration = Duration::from_millis(100);
const CONSOLE_LINES: usize = 20;

#[derive(Debug)]
struct Guest {
    name: &'static str,
    running: Running,
    console: PathBuf,
    /// What it said of its machine when it had booted.
    machine: Option<String>,
    has_shipped: bool,
}

/// By the guest's place; `None` once it says no more.
type Received = (usize, Option<Message>);

/// The guests of a run; killed when dropped.
#[derive(Debug)]
pub(crate) struct Guests<'a> {
    out: PathBuf,
    guests: Vec<Guest>,
    inbox: Receiver<Received>,
    outbox: Sender<Received>,
    orders: u64,
    answers: BTreeMap<u64, Result<String, String>>,
    /// What a person sees of a message.
    shown: fn(&Message) -> Option<String>,
    /// Clients, by guest and name, that are to end early when a person asks for that.
    pub(crate) clients: Vec<(&'static str, &'static str)>,
    // Last, for the guests work in its folder.
    machine: Machine<'a>,
}

impl<'a> Guests<'a> {
    /// Returns when all of them take orders, and adds to `machine.txt` what the first one says of its machine.
    pub(crate) fn boot(
        machine: Machine<'a>,
        out: &Path,
        specs: &[Spec],
        shown: fn(&Message) -> Option<String>,
    ) -> Result<Self> {
        let (outbox, inbox) = channel();
        let mut guests = Self {
            out: out.to_owned(),
            guests: Vec::new(),
            inbox,
            outbox,
            orders: 0,
            answers: BTreeMap::new(),
            shown,
            clients: Vec::new(),
            machine,
        };
        for spec in specs {
            guests.add(spec)?;
        }
        guests.receive_until("all guests have booted", BOOTED_WITHIN, |guests| {
            guests.guests.iter().all(|guest| guest.machine.is_some())
        })?;
        let mut record = OpenOptions::new().append(true).open(out.join("machine.txt"))?;
        let described = guests.guests.first().and_then(|guest| guest.machine.as_deref());
        record.write_all(described.unwrap_or_default().as_bytes())?;
        Ok(guests)
    }

    fn add(&mut self, spec: &Spec) -> Result<()> {
        let console = self.out.join(match spec.name {
            ALONE => "console.log".to_owned(),
            name => format!("console-{name}.log"),
        });
        let (running, said) = self.machine.boot(spec, &console)?;
        let (place, outbox) = (self.guests.len(), self.outbox.clone());
        thread::spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                // What firmware or kernel may write there is no message.
                if let Ok(message) = serde_json::from_str(&line) {
                    let _ = outbox.send((place, Some(message)));
                }
            }
            let _ = outbox.send((place, None));
        });
        let guest = Guest { name: spec.name, running, console, machine: None, has_shipped: false };
        self.guests.push(guest);
        Ok(())
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.guests.iter().map(|guest| guest.name).collect()
    }

    /// The answer of one guest.
    pub(crate) fn ask(&mut self, name: &str, order: Order) -> Result<String> {
        self.ask_all(&[name], &order)?.pop().context("one answer")
    }

    /// The same order for several guests at once.
    pub(crate) fn ask_all(&mut self, names: &[&str], order: &Order) -> Result<Vec<String>> {
        let answers = self.ask_each(names, |_| order.clone())?;
        let answers = names.iter().zip(answers);
        answers.map(|(name, said)| said.map_err(|why| anyhow!("guest '{name}': {why}"))).collect()
    }

    /// Orders for several guests at once, by the place of the name, and their answers.
    pub(crate) fn ask_each(
        &mut self,
        names: &[&str],
        order: impl Fn(usize) -> Order,
    ) -> Result<Vec<Result<String, String>>> {
        let (mut numbers, mut what, mut within) = (Vec::new(), String::new(), Duration::ZERO);
        for (place, name) in names.iter().enumerate() {
            let order = order(place);
            what = format!("{order:?}");
            within = within.max(ANSWERED_WITHIN + time_given(&order));
            numbers.push(self.send(name, order)?);
        }
        self.receive_until(&what, within, |guests| {
            numbers.iter().all(|number| guests.answers.contains_key(number))
        })?;
        Ok(numbers.iter().filter_map(|number| self.answers.remove(number)).collect())
    }

    fn send(&mut self, name: &str, order: Order) -> Result<u64> {
        self.orders += 1;
        let number = self.orders;
        let line = serde_json::to_string(&Numbered { number, order })? + "\n";
        let guest = self.guests.iter_mut().find(|guest| guest.name == name);
        let guest = guest.with_context(|| format!("there is no guest '{name}'"))?;
        guest
            .running
            .orders
            .write_all(line.as_bytes())
            .with_context(|| format!("the guest '{name}' takes no orders"))?;
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
            self.check_interrupts()?;
            let why = match self.inbox.recv_timeout(TICK) {
                Ok((place, Some(message))) => {
                    self.take(place, message);
                    continue;
                }
                Ok((place, None)) if self.guests[place].has_shipped => continue,
                Ok((place, None)) => format!("the guest '{}' died", self.guests[place].name),
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => continue,
                Err(_) => format!("time-out after {} s", within.as_secs()),
            };
            return Err(self.failure(&format!("{why}, and this was awaited: {what}")));
        }
        Ok(())
    }

    fn take(&mut self, place: usize, message: Message) {
        let guest = &mut self.guests[place];
        let shown_name = if guest.name == ALONE { "guest" } else { guest.name };
        for line in (self.shown)(&message).iter().flat_map(|text| text.lines()) {
            say(format!("  {shown_name}: {line}"));
        }
        match message {
            Message::Booted(machine) => guest.machine = Some(machine),
            Message::Answer { number, answer } => {
                self.answers.insert(number, answer);
            }
            Message::Progress { .. } | Message::Ended { .. } => {}
        }
    }

    /// The first one has the clients end early and write what they have; the next one ends all.
    fn check_interrupts(&mut self) -> Result<()> {
        patience::go_on()?;
        if !patience::is_asked_to_end_early() {
            return Ok(());
        }
        let clients = std::mem::take(&mut self.clients);
        if clients.is_empty() {
            return Ok(());
        }
        say(
            "ending early: the clients close what they hold and write their records; again to end at once",
        );
        for (guest, name) in clients {
            for signal in [Signal::SIGINT, Signal::SIGCONT] {
                self.send(guest, Order::signal(name, signal))?;
            }
        }
        Ok(())
    }

    /// What was the matter, after the end of each console.
    fn failure(&self, why: &str) -> Error {
        for guest in &self.guests {
            say(format!("the last lines of {}:", guest.console.display()));
            let console = fs::read(&guest.console).unwrap_or_default();
            let lines: Vec<_> = console.lines().map_while(Result::ok).collect();
            for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
                say(format!("    {line}"));
            }
            let log = fs::read(&guest.running.log).unwrap_or_default();
            for line in log.lines().map_while(Result::ok) {
                say(format!("    qemu: {line}"));
            }
        }
        anyhow!("{why}; what there is lies in {}", self.out.display())
    }

    /// Has one guest put all its files into the folder of the run, and ends it.
    pub(crate) fn collect(&mut self, name: &'static str) -> Result<()> {
        self.ask(name, Order::Ship)?;
        let guest =
            self.guests.iter_mut().find(|guest| guest.name == name).context("it answered")?;
        guest.has_shipped = true;
        if guest.running.process.wait(OFF_WITHIN).is_err() {
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

/// What was meant to take time.
fn time_given(order: &Order) -> Duration {
    match order {
        Order::Await { within_seconds, .. } => Duration::from_secs(*within_seconds),
        _ => Duration::ZERO,
    }
}

/// Waits for a condition in a guest.
pub(crate) fn wait_for(condition: Condition, within_seconds: u64) -> Order {
    Order::Await { condition, within_seconds }
}
