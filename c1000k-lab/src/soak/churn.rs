//! The load of the soak test: it holds connections, and closes and opens many of them each second.
//!
//! A connection sends a message when it opens, and another at half of its life. One slot in ten is never closed. One in
//! fifty becomes silent after its first echo, and the server's idle timeout must close it. Every other close is a
//! reset. At the end each connection must echo once more, and then all are reset.

use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use c1000k_host::command_line::SHORT;
use c1000k_host::limits::raise_descriptor_limit;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::load::{Event, Load, State, WRONG_ECHO};
use crate::sockets::Ports;

const PERMANENT_EVERY: usize = 10;
const SILENT_EVERY: usize = 50;
const IN_FLIGHT_MAX: usize = 4_000;
/// Slots that are handled between two polls.
const SLOTS_MAX: usize = 100;
/// For the echoes at the end.
const LAST_ECHOES_TIMEOUT: Duration = Duration::from_secs(120);
/// Lost connections that are reported.
const REPORTS_MAX: u64 = 20;
/// Without a pause: a reset is sent only once, and the kernel's queue of loopback packets holds a thousand.
const RESETS_MAX: usize = 64;

/// Holds connections, and closes and opens many of them each second
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The server's address
    ip: Ipv4Addr,
    /// Its first port
    first_port: u16,
    /// Connections
    #[arg(value_parser = clap::value_parser!(u32).range(2..))]
    connections: u32,
    /// How long connections close and open
    seconds: f64,
    /// The server's ports
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    ports: u16,
    /// Connections that close and open per second
    #[arg(long, default_value_t = 1_000.0)]
    churn: f64,
    /// Connections that open per second at the start
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
}

/// A line of the output: a sample each second, and finally the summary.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Sample(Sample),
    Summary(Summary),
}

/// The counts so far, and the longest latency since the last sample.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) open: usize,
    #[serde(flatten)]
    pub(crate) counts: Counts,
    pub(crate) echo_max_ms: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) connections: usize,
    pub(crate) ramp_seconds: f64,
    pub(crate) seconds: f64,
    pub(crate) opened_per_second: f64,
    pub(crate) closed_per_second: f64,
    /// At the end of the churn.
    pub(crate) held: usize,
    /// Those that echoed once more at the end.
    pub(crate) proven: usize,
    #[serde(flatten)]
    pub(crate) counts: Counts,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) opened: u64,
    /// By this program.
    pub(crate) closed: u64,
    /// By the server's idle timeout.
    pub(crate) timed_out: u64,
    pub(crate) lost: u64,
    /// Echoes that differ from the message.
    pub(crate) wrong: u64,
    pub(crate) echoes: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    raise_descriptor_limit()?;
    let summary = churn(arguments)?;
    let Counts { lost, wrong, .. } = summary.counts;
    let is_correct = lost == 0 && wrong == 0 && summary.proven == summary.connections;
    print(&Line::Summary(summary))?;
    Ok(if is_correct { ExitCode::SUCCESS } else { ExitCode::from(SHORT) })
}

fn churn(arguments: &Arguments) -> Result<Summary> {
    let mut churn = Churn::new(arguments)?;
    churn.ramp(arguments.rate)?;
    let ramp_seconds = churn.seconds();
    churn.close_and_open(arguments.churn, Duration::from_secs_f64(arguments.seconds))?;
    let seconds = churn.seconds() - ramp_seconds;
    let (held, connections) = (churn.connected, churn.slots.len());
    let Counts { opened, closed, timed_out, .. } = churn.counts;
    let proven = churn.verify()?;
    churn.reset_all();
    Ok(Summary {
        connections,
        ramp_seconds,
        seconds,
        opened_per_second: (opened - connections as u64) as f64 / seconds,
        closed_per_second: (closed + timed_out) as f64 / seconds,
        held,
        proven,
        counts: churn.counts,
    })
}

fn print(line: &Line) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(line)?)?;
    Ok(out.flush()?)
}

/// A slot's connection, in addition to its state in the load.
#[derive(Debug, Clone)]
struct Slot {
    /// The number of the slot's connections so far. Each message contains it, so an echo of an earlier connection is
    /// wrong.
    generation: u32,
    sent_at: Instant,
    is_silent: bool,
}

#[derive(Debug)]
struct Churn {
    load: Load,
    slots: Vec<Slot>,
    began: Instant,
    sampled_at: Instant,
    echo_max: Duration,
    /// Connects and echoes in flight.
    in_flight: usize,
    connected: usize,
    counts: Counts,
}

impl Churn {
    fn new(arguments: &Arguments) -> Result<Self> {
        let now = Instant::now();
        let ports = Ports { ip: arguments.ip, first: arguments.first_port, count: arguments.ports };
        let slot = Slot { generation: 0, sent_at: now, is_silent: false };
        Ok(Self {
            load: Load::new(ports)?,
            slots: vec![slot; arguments.connections as usize],
            began: now,
            sampled_at: now,
            echo_max: Duration::ZERO,
            in_flight: 0,
            connected: 0,
            counts: Counts::default(),
        })
    }

    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn ramp(&mut self, per_second: f64) -> Result<()> {
        let mut next = 0;
        while next < self.slots.len() || self.in_flight > 0 {
            let due = self.seconds() * per_second;
            while next < self.slots.len() && (next as f64) < due && self.in_flight < IN_FLIGHT_MAX {
                self.open(next)?;
                next += 1;
            }
            self.handle_events()?;
        }
        Ok(())
    }

    fn close_and_open(&mut self, per_second: f64, duration: Duration) -> Result<()> {
        let (started, count) = (Instant::now(), self.slots.len());
        let (mut slot, mut replaced) = (0, 0.0);
        while started.elapsed() < duration {
            let due = started.elapsed().as_secs_f64() * per_second;
            for _ in 0..SLOTS_MAX {
                if replaced >= due || self.in_flight >= IN_FLIGHT_MAX {
                    break;
                }
                replaced += f64::from(u8::from(self.replace(slot)?));
                self.half_of_life((slot + count / 2) % count)?;
                slot = (slot + 1) % count;
            }
            self.handle_events()?;
        }
        Ok(())
    }

    fn open(&mut self, slot: usize) -> Result<()> {
        let generation = self.slots[slot].generation + 1;
        self.slots[slot] = Slot { generation, sent_at: Instant::now(), is_silent: false };
        match self.load.connect(slot)? {
            Ok(()) => self.in_flight += 1,
            Err(reason) => self.count_lost(slot, &reason),
        }
        Ok(())
    }

    fn count_lost(&mut self, slot: usize, reason: &str) {
        if self.counts.lost < REPORTS_MAX {
            eprintln!("lost connection {slot} at {:.1} s: {reason}", self.seconds());
        }
        self.counts.lost += 1;
    }

    fn send(&mut self, slot: usize, state: State) -> Result<()> {
        let connection = &mut self.slots[slot];
        connection.sent_at = Instant::now();
        let message = format!("connection {} of slot {slot}, still there?", connection.generation);
        self.in_flight += usize::from(state == State::Open);
        match self.load.send(slot, message.into_bytes()) {
            Ok(()) => Ok(()),
            Err(reason) => self.on_closed(slot, State::Waiting, &reason),
        }
    }

    /// The server must close silent connections, and no others.
    fn on_closed(&mut self, slot: usize, state: State, reason: &str) -> Result<()> {
        self.uncount(state);
        if !self.slots[slot].is_silent {
            self.count_lost(slot, reason);
            return Ok(());
        }
        self.counts.timed_out += 1;
        self.open(slot)
    }

    fn uncount(&mut self, state: State) {
        self.in_flight -= usize::from(state != State::Open);
        self.connected -= usize::from(state != State::Connecting);
    }

    fn handle_events(&mut self) -> Result<()> {
        for (slot, event) in self.load.poll(Duration::from_millis(1))? {
            match event {
                Event::Connected => {
                    self.counts.opened += 1;
                    self.connected += 1;
                    self.send(slot, State::Waiting)?;
                }
                Event::Echoed => {
                    self.in_flight -= 1;
                    self.counts.echoes += 1;
                    self.echo_max = self.echo_max.max(self.slots[slot].sent_at.elapsed());
                }
                Event::Closed(state, reason) => {
                    self.counts.wrong += u64::from(reason == WRONG_ECHO);
                    self.on_closed(slot, state, &reason)?;
                }
            }
        }
        if self.sampled_at.elapsed() < Duration::from_secs(1) {
            return Ok(());
        }
        self.sampled_at = Instant::now();
        let echo_max_ms = std::mem::take(&mut self.echo_max).as_secs_f64() * 1e3;
        let (seconds, open, counts) = (self.seconds(), self.connected, self.counts);
        print(&Line::Sample(Sample { seconds, open, counts, echo_max_ms }))
    }

    fn is_open(&self, slot: usize) -> bool {
        self.load.get(slot).is_some_and(|connection| connection.state == State::Open)
    }

    /// Closes the slot's connection and opens another, unless it is permanent or silent; returns whether it did.
    fn replace(&mut self, slot: usize) -> Result<bool> {
        if !self.is_open(slot) || self.slots[slot].is_silent {
            return Ok(false);
        }
        if slot.is_multiple_of(PERMANENT_EVERY) {
            self.send(slot, State::Open)?;
            return Ok(false);
        }
        let is_reset = !self.counts.closed.is_multiple_of(2);
        self.counts.closed += 1;
        self.load.remove(slot, is_reset);
        self.uncount(State::Open);
        self.open(slot)?;
        Ok(true)
    }

    /// Sends a message, or becomes silent.
    fn half_of_life(&mut self, slot: usize) -> Result<()> {
        if !self.is_open(slot) || self.slots[slot].is_silent {
            return Ok(());
        }
        if slot % SILENT_EVERY == 1 {
            self.slots[slot].is_silent = true;
            return Ok(());
        }
        self.send(slot, State::Open)
    }

    /// Returns how many echo once more, including silent ones that are not closed yet.
    fn verify(&mut self) -> Result<usize> {
        for slot in 0..self.slots.len() {
            if self.is_open(slot) {
                self.send(slot, State::Open)?;
            }
            self.await_in_flight(IN_FLIGHT_MAX - 1)?;
        }
        self.await_in_flight(0)?;
        Ok(self.load.open())
    }

    fn await_in_flight(&mut self, max: usize) -> Result<()> {
        let deadline = Instant::now() + LAST_ECHOES_TIMEOUT;
        while self.in_flight > max && Instant::now() < deadline {
            self.handle_events()?;
        }
        Ok(())
    }

    fn reset_all(&mut self) {
        for slot in 0..self.slots.len() {
            self.load.remove(slot, true);
            if slot.is_multiple_of(RESETS_MAX) {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Echoes until the end of the stream, with each byte XORed with `change`.
    fn echo(mut stream: TcpStream, change: u8) {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            buffer[..count].iter_mut().for_each(|byte| *byte ^= change);
            if stream.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    }

    /// Twenty connections to such a server, fifty of which close and open per second.
    fn churn_against(change: u8) -> Summary {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let first_port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || echo(stream, change));
            }
        });
        let ip = Ipv4Addr::LOCALHOST;
        let (connections, seconds, ports, per_second, rate) = (20, 0.6, 1, 50.0, 10_000.0);
        churn(&Arguments { ip, first_port, connections, seconds, ports, churn: per_second, rate })
            .unwrap()
    }

    #[test]
    fn connections_close_and_open_and_all_of_them_echo() {
        let Summary { held, proven, counts, .. } = churn_against(0);
        assert_eq!((held, proven), (20, 20));
        assert_eq!((counts.lost, counts.wrong, counts.timed_out), (0, 0, 0));
        assert!(counts.closed > 10 && counts.opened == 20 + counts.closed, "{counts:?}");
    }

    #[test]
    fn wrong_echoes_are_counted_and_their_connections_lost() {
        let Summary { held, proven, counts, .. } = churn_against(1);
        assert_eq!((held, proven, counts.lost, counts.wrong), (0, 0, 20, 20));
    }
}
