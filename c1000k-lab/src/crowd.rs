//! Many connections on epoll, each in a slot: one message at a time, and the echo that must come back.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::errno_name;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, SockRef, Socket, Type};

use crate::patience::go_on;
use crate::sockets::Ports;

/// Taken from the kernel at a time.
const EVENTS_MAX: usize = 1_000;

const STEP: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The connect is not decided.
    Connecting,
    /// An echo is under way.
    Waiting,
    /// The last echo came back complete.
    Open,
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) stream: TcpStream,
    pub(crate) state: State,
    awaited: Arc<[u8]>,
    received: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The connection is established, and a message is to be sent.
    Connected,
    /// The echo is complete.
    Echoed,
    /// The peer is gone from its slot: its state until then, and why.
    Gone(State, String),
}

/// How a crowd connects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// It ends when nothing has happened for that long.
    pub(crate) patience: Duration,
    /// Connects and first echoes under way at a time.
    pub(crate) in_flight_max: usize,
    /// It ends then at the latest.
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

/// Peers of one server.
#[derive(Debug)]
pub(crate) struct Crowd {
    epoll: Epoll,
    ports: Ports,
    slots: Vec<Option<Peer>>,
    receive_buffer_bytes: Option<usize>,
    /// How many are gone other than by us, by the reason.
    gone: BTreeMap<String, usize>,
}

/// Single peers.
impl Crowd {
    pub(crate) fn new(ports: Ports) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (slots, gone) = (Vec::new(), BTreeMap::new());
        Ok(Self { epoll, ports, slots, receive_buffer_bytes: None, gone })
    }

    /// With windows of that size: the rest of an echo waits in the server until it is read here.
    pub(crate) fn with_receive_buffers(ports: Ports, bytes: usize) -> Result<Self> {
        Ok(Self { receive_buffer_bytes: Some(bytes), ..Self::new(ports)? })
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Peer> {
        self.slots.get(slot)?.as_ref()
    }

    /// All that exist, the oldest slot first.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (usize, &Peer)> {
        self.slots.iter().enumerate().filter_map(|(slot, peer)| Some((slot, peer.as_ref()?)))
    }

    pub(crate) fn count(&self, state: State) -> usize {
        self.iter().filter(|(_, peer)| peer.state == state).count()
    }

    /// Starts a connect in a free slot. The inner error is why the kernel refused it at once.
    pub(crate) fn connect(&mut self, slot: usize) -> Result<Result<(), String>> {
        let to = self.ports.address(slot);
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)
            .context("a socket of the crowd")?;
        socket.set_tcp_nodelay(true)?;
        if let Some(bytes) = self.receive_buffer_bytes {
            socket.set_recv_buffer_size(bytes)?;
        }
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                return Ok(Err(name_of(&error)));
            }
            _ => {}
        }
        let stream = TcpStream::from(socket);
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLOUT, slot as u64))?;
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        let peer = Peer { stream, state: State::Connecting, awaited: Arc::default(), received: 0 };
        self.slots[slot] = Some(peer);
        Ok(Ok(()))
    }

    /// Sends a message, whose echo is awaited from now on. An error is why it could not; the peer is gone then.
    pub(crate) fn send(
        &mut self,
        slot: usize,
        message: impl Into<Arc<[u8]>>,
    ) -> Result<(), String> {
        let Some(Some(peer)) = self.slots.get_mut(slot) else { return Ok(()) };
        let message = message.into();
        match peer.stream.write(&message) {
            Ok(count) if count == message.len() => {
                (peer.state, peer.awaited, peer.received) = (State::Waiting, message, 0);
                Ok(())
            }
            outcome => {
                self.slots[slot] = None;
                Err(outcome.map_or_else(|error| name_of(&error), |_| "sent in part".to_owned()))
            }
        }
    }

    pub(crate) fn remove(&mut self, slot: usize, is_reset: bool) {
        let Some(peer) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        if is_reset {
            // A stream that does not take it is closed all the same.
            let _ = SockRef::from(&peer.stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// The slots on which something has happened.
    pub(crate) fn wait(&self, within: Duration) -> Result<Vec<usize>> {
        let within = u16::try_from(within.as_millis()).unwrap_or(u16::MAX);
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = match self.epoll.wait(&mut events, within) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        Ok(events[..count].iter().map(|event| event.data() as usize).collect())
    }

    pub(crate) fn poll(&mut self, within: Duration) -> Result<Vec<(usize, Event)>> {
        let mut events = Vec::new();
        for slot in self.wait(within)? {
            let Some(Some(peer)) = self.slots.get_mut(slot) else { continue };
            let state = peer.state;
            match advance(peer, &self.epoll, slot) {
                Ok(event) => events.extend(event.map(|event| (slot, event))),
                Err(why) => {
                    self.slots[slot] = None;
                    events.push((slot, Event::Gone(state, why)));
                }
            }
        }
        Ok(events)
    }
}

/// An error is the peer's end.
fn advance(peer: &mut Peer, epoll: &Epoll, slot: usize) -> Result<Option<Event>, String> {
    let name = |error| name_of(&error);
    if peer.state == State::Connecting {
        if let Some(error) = peer.stream.take_error().map_err(name)? {
            return Err(name_of(&error));
        }
        let mut input = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
        epoll.modify(&peer.stream, &mut input).map_err(|errno| errno_name(errno as i32))?;
        peer.state = State::Waiting;
        return Ok(Some(Event::Connected));
    }
    let mut buffer = [0; 4096];
    let count = match peer.stream.read(&mut buffer) {
        Ok(0) => return Err("closed".to_owned()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        count => count.map_err(name)?,
    };
    if !peer.awaited[peer.received..].starts_with(&buffer[..count]) {
        return Err("a wrong echo".to_owned());
    }
    peer.received += count;
    if peer.received < peer.awaited.len() {
        return Ok(None);
    }
    peer.state = State::Open;
    Ok(Some(Event::Echoed))
}

pub(crate) fn name_of(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), errno_name)
}

/// All of them.
impl Crowd {
    pub(crate) fn open(&self) -> usize {
        self.count(State::Open)
    }

    /// Those without an echo yet: in a backlog, or not connected.
    pub(crate) fn waiting(&self) -> usize {
        self.count(State::Waiting) + self.count(State::Connecting)
    }

    /// Those that were reset before they got an echo.
    pub(crate) fn reset(&self) -> usize {
        self.gone.get("ECONNRESET").copied().unwrap_or(0)
    }

    pub(crate) fn gone(&self) -> usize {
        self.gone.values().sum()
    }

    pub(crate) fn streams(&self) -> impl Iterator<Item = &TcpStream> {
        self.iter().map(|(_, peer)| &peer.stream)
    }

    pub(crate) fn add(&mut self, count: usize) -> Result<()> {
        self.add_as(count, Arrival::default())
    }

    /// Connects `count` more; returns when all have their echo, or when nothing has happened for a while.
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
                // Those that wait in a backlog are no longer under way.
                (active, quiet_since) = (0, Instant::now());
            }
        }
        Ok(())
    }

    /// Starts one more connect; whether it is under way.
    fn start(&mut self) -> Result<bool> {
        let slot = self.slots.len();
        self.slots.push(None);
        let started = self.connect(slot)?;
        Ok(self.note(started))
    }

    pub(crate) fn start_many(&mut self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.start().map(drop))
    }

    fn note(&mut self, outcome: Result<(), String>) -> bool {
        outcome.map_err(|why| *self.gone.entry(why).or_default() += 1).is_ok()
    }

    fn send_noted(&mut self, slot: usize, message: impl Into<Arc<[u8]>>) -> bool {
        let sent = self.send(slot, message);
        self.note(sent)
    }

    /// Handles events; returns how many peers got their echo or their end.
    fn step(&mut self, within: Duration) -> Result<usize> {
        go_on()?;
        let mut done = 0;
        for (slot, event) in self.poll(within)? {
            done += usize::from(match event {
                Event::Connected => !self.send_noted(slot, greeting(slot)),
                Event::Echoed => true,
                Event::Gone(State::Open, why) => {
                    self.note(Err(format!("lost: {why}")));
                    false
                }
                Event::Gone(_, why) => !self.note(Err(why)),
            });
        }
        Ok(done)
    }

    /// Handles events until the condition holds, or for that long.
    pub(crate) fn step_until(
        &mut self,
        within: Duration,
        mut is_over: impl FnMut(&Self) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        while !is_over(self) && started.elapsed() < within {
            self.step(STEP)?;
        }
        Ok(started.elapsed())
    }

    /// Handles events for that long.
    pub(crate) fn settle(&mut self, duration: Duration) -> Result<()> {
        self.step_until(duration, |_| false).map(drop)
    }

    /// How many of the open ones get one more echo.
    pub(crate) fn verify(&mut self) -> Result<usize> {
        let asked = self.ask()?;
        self.echoes_of(&asked, Duration::from_secs(20))
    }

    /// Sends a message on each open one; returns which these are.
    pub(crate) fn ask(&mut self) -> Result<Vec<usize>> {
        let asked = self.open_slots();
        for (number, &slot) in asked.iter().enumerate() {
            self.send_noted(slot, format!("still there, number {number}?").into_bytes());
            if number % 200 == 0 {
                self.step(Duration::ZERO)?;
            }
        }
        Ok(asked)
    }

    /// Sends one of these messages in turn on each open one, and reads nothing meanwhile.
    pub(crate) fn ask_at_once(&mut self, messages: &[Arc<[u8]>]) -> Vec<usize> {
        let asked = self.open_slots();
        for (&slot, message) in asked.iter().zip(messages.iter().cycle()) {
            self.send_noted(slot, Arc::clone(message));
        }
        asked
    }

    fn open_slots(&self) -> Vec<usize> {
        let is_open = self.iter().filter(|(_, peer)| peer.state == State::Open);
        is_open.map(|(slot, _)| slot).collect()
    }

    /// Waits for the echoes of these; returns how many came back.
    pub(crate) fn echoes_of(&mut self, asked: &[usize], within: Duration) -> Result<usize> {
        let count = |crowd: &Self, state| {
            let is_one = |slot: &&usize| crowd.get(**slot).is_some_and(|peer| peer.state == state);
            asked.iter().filter(is_one).count()
        };
        self.step_until(within, |crowd| count(crowd, State::Waiting) == 0)?;
        Ok(count(self, State::Open))
    }

    /// Closes the oldest.
    pub(crate) fn close(&mut self, count: usize) {
        self.remove_some(count, false, |_| true);
    }

    /// Closes the oldest of those that are open.
    pub(crate) fn close_open(&mut self, count: usize) {
        self.remove_some(count, false, |state| state == State::Open);
    }

    pub(crate) fn close_all(&mut self) {
        self.close(usize::MAX);
    }

    pub(crate) fn reset_all(&mut self) {
        self.remove_some(usize::MAX, true, |_| true);
    }

    fn remove_some(&mut self, count: usize, is_reset: bool, is_chosen: impl Fn(State) -> bool) {
        let chosen = self.iter().filter(|(_, peer)| is_chosen(peer.state));
        let chosen: Vec<usize> = chosen.map(|(slot, _)| slot).take(count).collect();
        chosen.into_iter().for_each(|slot| self.remove(slot, is_reset));
    }
}

/// A peer's first message.
pub(crate) fn greeting(slot: usize) -> Vec<u8> {
    format!("Hello Server, connections num:{slot}").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    fn crowd_of(listener: &TcpListener) -> Crowd {
        let first = listener.local_addr().unwrap().port();
        Crowd::new(Ports { ip: Ipv4Addr::LOCALHOST, first, count: 1 }).unwrap()
    }

    /// A peer that has sent a message, and the other end of its connection.
    fn peer(message: &[u8]) -> (Crowd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut crowd = crowd_of(&listener);
        crowd.connect(3).unwrap().unwrap();
        assert_eq!(next(&mut crowd), [(3, Event::Connected)]);
        crowd.send(3, message.to_vec()).unwrap();
        (crowd, listener.accept().unwrap().0)
    }

    fn next(crowd: &mut Crowd) -> Vec<(usize, Event)> {
        crowd.poll(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn an_echo_in_pieces_is_complete_with_the_last_one() {
        let (mut crowd, mut server) = peer(b"hello");
        server.write_all(b"hel").unwrap();
        assert_eq!(next(&mut crowd), []);
        assert_eq!(crowd.waiting(), 1);
        server.write_all(b"lo").unwrap();
        assert_eq!(next(&mut crowd), [(3, Event::Echoed)]);
        assert_eq!(crowd.open(), 1);
    }

    #[test]
    fn other_bytes_more_bytes_and_the_end_are_its_end() {
        for (answer, why) in
            [(&b"help"[..], "a wrong echo"), (b"hellohello", "a wrong echo"), (b"", "closed")]
        {
            let (mut crowd, mut server) = peer(b"hello");
            server.write_all(answer).unwrap();
            drop(server);
            let seen = next(&mut crowd);
            assert!(
                matches!(&seen[..], [(3, Event::Gone(State::Waiting, said))] if said == why || said == "ECONNRESET"),
                "{seen:?}"
            );
            assert_eq!(crowd.iter().count(), 0);
        }
    }

    #[test]
    fn a_refused_connect_says_why() {
        let mut crowd = crowd_of(&TcpListener::bind("127.0.0.1:0").unwrap());
        if crowd.connect(0).unwrap().is_ok() {
            let refused = Event::Gone(State::Connecting, "ECONNREFUSED".to_owned());
            assert_eq!(next(&mut crowd), [(0, refused)]);
        }
    }
}
