//! Orders of the host, which come and are answered on a serial port.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use nix::unistd::sync;

use super::programs::Programs;
use super::wait::{self, Look, look_for};
use super::{Arguments, OUT, shell};
use crate::guest::order::{Message, Numbered, Order};
use crate::{record, snapshot};

/// A disk that the host reads.
const DISK: &str = "/dev/vda";

const PORT: &str = "/dev/ttyS1";

/// Between two looks at what is waited for.
const TICK: Duration = Duration::from_millis(200);
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// An order that is not answered yet.
struct Wait {
    number: u64,
    look: Look,
    until: Instant,
    /// What is waited for.
    what: String,
}

pub(super) struct Guest {
    name: String,
    port: File,
    orders: Receiver<Numbered>,
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
        let (taken, orders) = channel();
        let lines = BufReader::new(port.try_clone()?).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let sent = match serde_json::from_str(&line) {
                    Ok(order) => taken.send(order).is_ok(),
                    Err(why) => {
                        println!("no order, {why}: {line}");
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
            orders,
            programs: Programs::default(),
            waits: Vec::new(),
            shown_at: Instant::now(),
        })
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        Ok(self.port.write_all(line.as_bytes())?)
    }

    /// Returns when everything is shipped.
    pub(super) fn follow_orders(&mut self) -> Result<()> {
        loop {
            match self.orders.recv_timeout(TICK) {
                Ok(Numbered { number, order }) => {
                    let is_last = matches!(order, Order::Ship);
                    match self.play(number, order) {
                        Ok(Some(answer)) => self.answer(number, Ok(answer))?,
                        Ok(None) => {}
                        Err(why) => self.answer(number, Err(why))?,
                    }
                    if is_last {
                        return Ok(tcdrain(&self.port)?);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the host gives no more orders"),
            }
            let mut news = self.programs.ended()?;
            if self.shown_at.elapsed() >= PROGRESS_EVERY {
                self.shown_at = Instant::now();
                news.extend(self.programs.progress()?);
            }
            news.iter().try_for_each(|message| self.send(message))?;
            self.look_at_waits()?;
        }
    }

    fn answer(&mut self, number: u64, answer: Result<String>) -> Result<()> {
        let answer = answer.map_err(|why| format!("{why:#}"));
        self.send(&Message::Answer { number, answer })
    }

    /// `None` for what is waited for.
    fn play(&mut self, number: u64, order: Order) -> Result<Option<String>> {
        let mut answer = String::new();
        match order {
            Order::Start(start) => self.programs.start(start)?,
            Order::Signal { name, signal } => {
                self.programs.named(&name)?.process.signal(Signal::try_from(signal)?)?;
            }
            Order::Run(command) => answer = shell(&command)?,
            Order::Snapshot(moment) => {
                let server = self.programs.server();
                let folder = Path::new(OUT).join("snapshots").join(&self.name).join(moment);
                snapshot::take(&folder, server.map(|server| server.process.pid()))?;
            }
            Order::Established(client) => {
                let record = record::client(&Path::new(OUT).join(format!("{client}.json")))?;
                answer = record.established.to_string();
            }
            Order::Sample { name, every_seconds } => {
                let pid = self.programs.named(&name)?.process.pid();
                thread::spawn(move || wait::sample(pid, Duration::from_secs(every_seconds)));
            }
            Order::Await { condition, within_seconds } => {
                let what = format!("not within {within_seconds} s: {condition:?}");
                let look = look_for(condition, &self.programs)?;
                let until = Instant::now() + Duration::from_secs(within_seconds);
                self.waits.push(Wait { number, look, until, what });
                return Ok(None);
            }
            Order::Ship => {
                shell(&format!(
                    "dmesg >{OUT}/kernel-{}.log; tar -C {OUT} -cf {DISK} .",
                    self.name
                ))?;
                sync();
            }
        }
        Ok(Some(answer))
    }

    fn look_at_waits(&mut self) -> Result<()> {
        for mut wait in std::mem::take(&mut self.waits) {
            match (wait.look)(&self.programs).transpose() {
                Some(answer) => self.answer(wait.number, answer)?,
                None if Instant::now() > wait.until => {
                    self.answer(wait.number, Err(anyhow::Error::msg(wait.what)))?;
                }
                None => self.waits.push(wait),
            }
        }
        Ok(())
    }
}
