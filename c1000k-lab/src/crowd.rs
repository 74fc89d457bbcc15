//! Many peers at once, each of which says something and knows what must come back.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::patience::go_on;
use crate::peers::{Event, Peers, State};
use crate::sockets::Ports;

const STEP: Duration = Duration::from_millis(50);

/// How a crowd comes in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// It is over when nothing has happened for so long.
    pub(crate) patience: Duration,
    /// This many are under way at a time.
    pub(crate) in_flight_max: usize,
    /// It is over then at the latest.
    pub(crate) within: Duration,
}

impl Default for Arrival {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(5),
            in_flight_max: 500,
            within: Duration::from_secs(120),
        }
    }
}

/// Peers of one server; those whose last echo came back whole are open.
#[derive(Debug)]
pub(crate) struct Crowd {
    peers: Peers,
    ports: Ports,
    started: usize,
    gone: BTreeMap<String, usize>,
}

impl Crowd {
    pub(crate) fn new(ports: Ports) -> Result<Self> {
        Ok(Self { peers: Peers::new()?, ports, started: 0, gone: BTreeMap::new() })
    }

    /// The same with so small windows: what comes back waits in the server until it is read here.
    pub(crate) fn with_receive_buffers(ports: Ports, bytes: usize) -> Result<Self> {
        let mut crowd = Self::new(ports)?;
        crowd.peers.receive_buffer_bytes = Some(bytes);
        Ok(crowd)
    }

    pub(crate) fn open(&self) -> usize {
        self.peers.count(State::Open)
    }

    /// Those who got no echo yet: in a backlog, or not even there.
    pub(crate) fn waiting(&self) -> usize {
        self.peers.count(State::Waiting) + self.peers.count(State::Connecting)
    }

    /// Those who are connected and have said something.
    pub(crate) fn connected_and_waiting(&self) -> usize {
        self.peers.count(State::Waiting)
    }

    /// Those who were turned away by a reset before they got an echo.
    pub(crate) fn reset(&self) -> usize {
        self.gone.get("ECONNRESET").copied().unwrap_or(0)
    }

    /// Those who are gone by any way but their own.
    pub(crate) fn gone(&self) -> usize {
        self.gone.values().sum()
    }

    pub(crate) fn streams(&self) -> impl Iterator<Item = &TcpStream> {
        self.peers.iter().map(|(_, peer)| &peer.stream)
    }

    pub(crate) fn add(&mut self, count: usize) -> Result<()> {
        self.add_as(count, Arrival::default())
    }

    /// Connects `count` more; returns when all are answered, or when nothing has happened for a while.
    pub(crate) fn add_as(&mut self, count: usize, arrival: Arrival) -> Result<()> {
        let deadline = Instant::now() + arrival.within;
        let (mut left, mut active) = (count, 0_usize);
        let mut quiet_since = Instant::now();
        while (left > 0 || active > 0) && Instant::now() < deadline {
            while left > 0 && active < arrival.in_flight_max {
                left -= 1;
                active += usize::from(self.start()?);
            }
            let done = self.step(STEP)?;
            active = active.saturating_sub(done);
            if done > 0 {
                quiet_since = Instant::now();
            } else if quiet_since.elapsed() > arrival.patience {
                if left == 0 {
                    break;
                }
                // Those who wait in a backlog are no longer under way.
                (active, quiet_since) = (0, Instant::now());
            }
        }
        Ok(())
    }

    /// Starts one more connect; whether it is under way.
    pub(crate) fn start(&mut self) -> Result<bool> {
        let slot = self.started;
        self.started += 1;
        match self.peers.connect(slot, self.ports.address(slot))? {
            Ok(()) => Ok(true),
            Err(why) => {
                *self.gone.entry(why).or_default() += 1;
                Ok(false)
            }
        }
    }

    pub(crate) fn start_many(&mut self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.start().map(drop))
    }

    /// Takes what has happened; returns how many were answered, by an echo or by their end.
    pub(crate) fn step(&mut self, within: Duration) -> Result<usize> {
        go_on()?;
        let mut answered = 0;
        for (slot, event) in self.peers.poll(within)? {
            match event {
                Event::Connected => answered += usize::from(!self.say(slot, greeting(slot))),
                Event::Echoed => answered += 1,
                Event::Gone(State::Open, why) => {
                    *self.gone.entry(format!("lost: {why}")).or_default() += 1;
                }
                Event::Gone(_, why) => {
                    *self.gone.entry(why).or_default() += 1;
                    answered += 1;
                }
            }
        }
        Ok(answered)
    }

    /// Whether it was sent; else the peer is gone.
    fn say(&mut self, slot: usize, message: impl Into<Arc<[u8]>>) -> bool {
        let said = self.peers.say(slot, message);
        said.map_err(|why| *self.gone.entry(why).or_default() += 1).is_ok()
    }

    /// Takes what happens, until enough has, or for so long.
    pub(crate) fn step_until(
        &mut self,
        within: Duration,
        mut is_enough: impl FnMut(&Self) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        while !is_enough(self) && started.elapsed() < within {
            self.step(STEP)?;
        }
        Ok(started.elapsed())
    }

    /// Takes what happens for so long.
    pub(crate) fn settle(&mut self, duration: Duration) -> Result<()> {
        self.step_until(duration, |_| false).map(drop)
    }

    /// Has each open one say something; returns how many echoes came back.
    pub(crate) fn prove(&mut self) -> Result<usize> {
        let asked = self.ask()?;
        self.echoes_of(&asked, Duration::from_secs(20))
    }

    /// Has each open one say something, and returns which these are.
    pub(crate) fn ask(&mut self) -> Result<Vec<usize>> {
        let asked = self.open_slots();
        for (number, &slot) in asked.iter().enumerate() {
            self.say(slot, format!("still there, number {number}?").into_bytes());
            if number % 200 == 0 {
                self.step(Duration::ZERO)?;
            }
        }
        Ok(asked)
    }

    /// Has each open one say one of these in turn, all before any of them looks for its echo; returns which these are.
    pub(crate) fn ask_at_once(&mut self, messages: &[Arc<[u8]>]) -> Vec<usize> {
        let asked = self.open_slots();
        for (&slot, message) in asked.iter().zip(messages.iter().cycle()) {
            self.say(slot, Arc::clone(message));
        }
        asked
    }

    fn open_slots(&self) -> Vec<usize> {
        let is_open = self.peers.iter().filter(|(_, peer)| peer.state == State::Open);
        is_open.map(|(slot, _)| slot).collect()
    }

    /// Waits for the echoes of those asked; returns how many came back.
    pub(crate) fn echoes_of(&mut self, asked: &[usize], within: Duration) -> Result<usize> {
        let in_state = |crowd: &Self, state| {
            asked
                .iter()
                .filter(|&&slot| crowd.peers.get(slot).is_some_and(|peer| peer.state == state))
                .count()
        };
        self.step_until(within, |crowd| in_state(crowd, State::Waiting) == 0)?;
        Ok(in_state(self, State::Open))
    }

    /// Closes the oldest.
    pub(crate) fn close(&mut self, count: usize) {
        self.remove(count, false, |_| true);
    }

    /// Closes the oldest of those that are open.
    pub(crate) fn close_open(&mut self, count: usize) {
        self.remove(count, false, |state| state == State::Open);
    }

    pub(crate) fn close_all(&mut self) {
        self.close(usize::MAX);
    }

    pub(crate) fn reset_all(&mut self) {
        self.remove(usize::MAX, true, |_| true);
    }

    fn remove(&mut self, count: usize, is_reset: bool, is_chosen: impl Fn(State) -> bool) {
        let chosen = self.peers.iter().filter(|(_, peer)| is_chosen(peer.state));
        let chosen: Vec<usize> = chosen.map(|(slot, _)| slot).take(count).collect();
        for slot in chosen {
            self.peers.remove(slot, is_reset);
        }
    }

    /// The peers themselves, for who plays with them in its own way.
    pub(crate) fn into_peers(self) -> Peers {
        self.peers
    }
}

/// What a peer says first.
pub(crate) fn greeting(slot: usize) -> Vec<u8> {
    format!("Hello Server, connections num:{slot}").into_bytes()
}
