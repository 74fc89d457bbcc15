//! The load: many connections on epoll, each in a slot, which send one message at a time and verify its echo.

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

use crate::sockets::Ports;
use crate::wait::check_deadline;

/// Events of one `epoll_wait`.
const EVENTS_MAX: usize = 1_000;

const STEP: Duration = Duration::from_millis(50);

/// The failure of a connection whose echo differs from the message.
pub(crate) const WRONG_ECHO: &str = "a wrong echo";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Connecting,
    /// The echo of its last message is not complete.
    Waiting,
    /// The echo of its last message is complete.
    Open,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) state: State,
    message: Arc<[u8]>,
    /// Bytes of its echo so far.
    received: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The connection is established, and the owner is to send a message.
    Connected,
    /// The echo is complete.
    Echoed,
    /// The connection was closed or failed, and is removed from its slot: its last state, and the reason.
    Closed(State, String),
}

/// How connections are opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ramp {
    /// Connects and first echoes in flight at a time.
    pub(crate) in_flight_max: usize,
    /// It ends if there has been no event for this long.
    pub(crate) stall_timeout: Duration,
    pub(crate) timeout: Duration,
}

impl Default for Ramp {
    fn default() -> Self {
        let (stall_timeout, timeout) = (Duration::from_secs(5), Duration::from_secs(120));
        Self { in_flight_max: 500, stall_timeout, timeout }
    }
}

/// Connections to one server.
#[derive(Debug)]
pub(crate) struct Load {
    epoll: Epoll,
    ports: Ports,
    slots: Vec<Option<Connection>>,
    receive_buffer_bytes: Option<usize>,
    /// Connections that failed or that the server closed, by reason.
    failures: BTreeMap<String, usize>,
}

/// Single connections.
impl Load {
    pub(crate) fn new(ports: Ports) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (slots, failures) = (Vec::new(), BTreeMap::new());
        Ok(Self { epoll, ports, slots, receive_buffer_bytes: None, failures })
    }

    /// With small receive windows: the rest of an echo stays in the server until it is read here.
    pub(crate) fn with_receive_buffers(ports: Ports, bytes: usize) -> Result<Self> {
        Ok(Self { receive_buffer_bytes: Some(bytes), ..Self::new(ports)? })
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Connection> {
        self.slots.get(slot)?.as_ref()
    }

    /// By slot, the oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Connection)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, connection)| Some((slot, connection.as_ref()?)))
    }

    pub(crate) fn count(&self, state: State) -> usize {
        self.iter().filter(|(_, connection)| connection.state == state).count()
    }

    /// Starts a connect in a free slot. The inner error is the reason if it failed at once.
    pub(crate) fn connect(&mut self, slot: usize) -> Result<Result<(), String>> {
        let to = self.ports.address(slot);
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)
            .context("a socket of the load")?;
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
        let (state, message) = (State::Connecting, Arc::default());
        self.slots[slot] = Some(Connection { stream, state, message, received: 0 });
        Ok(Ok(()))
    }

    /// Sends a message, whose echo is then verified. An error is the reason why it failed; the connection is removed.
    pub(crate) fn send(
        &mut self,
        slot: usize,
        message: impl Into<Arc<[u8]>>,
    ) -> Result<(), String> {
        let Some(Some(connection)) = self.slots.get_mut(slot) else { return Ok(()) };
        let message = message.into();
        let failure = match connection.stream.write(&message) {
            Ok(count) if count == message.len() => {
                (connection.state, connection.message, connection.received) =
                    (State::Waiting, message, 0);
                return Ok(());
            }
            Ok(_) => "sent in part".to_owned(),
            Err(error) => name_of(&error),
        };
        self.slots[slot] = None;
        Err(failure)
    }

    pub(crate) fn remove(&mut self, slot: usize, is_reset: bool) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        if is_reset {
            // If that fails, it is closed normally.
            let _ = SockRef::from(&connection.stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// Waits for events, and returns their slots.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<Vec<usize>> {
        let timeout = u16::try_from(timeout.as_millis()).unwrap_or(u16::MAX);
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        Ok(events[..count].iter().map(|event| event.data() as usize).collect())
    }

    pub(crate) fn poll(&mut self, timeout: Duration) -> Result<Vec<(usize, Event)>> {
        let mut events = Vec::new();
        for slot in self.wait(timeout)? {
            let Some(Some(connection)) = self.slots.get_mut(slot) else { continue };
            let state = connection.state;
            match advance(connection, &self.epoll, slot) {
                Ok(event) => events.extend(event.map(|event| (slot, event))),
                Err(reason) => {
                    self.slots[slot] = None;
                    events.push((slot, Event::Closed(state, reason)));
                }
            }
        }
        Ok(events)
    }
}

/// Handles an event; an error is the reason why the connection has ended.
fn advance(
    connection: &mut Connection,
    epoll: &Epoll,
    slot: usize,
) -> Result<Option<Event>, String> {
    let name = |error| name_of(&error);
    if connection.state == State::Connecting {
        if let Some(error) = connection.stream.take_error().map_err(name)? {
            return Err(name_of(&error));
        }
        let mut input = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
        epoll.modify(&connection.stream, &mut input).map_err(|errno| errno_name(errno as i32))?;
        connection.state = State::Waiting;
        return Ok(Some(Event::Connected));
    }
    let mut buffer = [0; 4096];
    let count = match connection.stream.read(&mut buffer) {
        Ok(0) => return Err("closed".to_owned()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        count => count.map_err(name)?,
    };
    if !connection.message[connection.received..].starts_with(&buffer[..count]) {
        return Err(WRONG_ECHO.to_owned());
    }
    connection.received += count;
    if connection.received < connection.message.len() {
        return Ok(None);
    }
    connection.state = State::Open;
    Ok(Some(Event::Echoed))
}

/// The kernel's name of the error, if it has one.
pub(crate) fn name_of(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), errno_name)
}

/// All connections.
impl Load {
    pub(crate) fn open(&self) -> usize {
        self.count(State::Open)
    }

    /// Connections without a complete echo: not accepted yet, or not connected.
    pub(crate) fn waiting(&self) -> usize {
        self.count(State::Waiting) + self.count(State::Connecting)
    }

    /// Connections that were reset before their first echo.
    pub(crate) fn reset(&self) -> usize {
        self.failures.get("ECONNRESET").copied().unwrap_or(0)
    }

    pub(crate) fn failed(&self) -> usize {
        self.failures.values().sum()
    }

    pub(crate) fn streams(&self) -> impl Iterator<Item = &TcpStream> {
        self.iter().map(|(_, connection)| &connection.stream)
    }

    pub(crate) fn add(&mut self, count: usize) -> Result<()> {
        self.ramp(count, Ramp::default())
    }

    /// Opens `count` more; returns when each has its echo or has failed, or after the ramp's timeout.
    pub(crate) fn ramp(&mut self, count: usize, ramp: Ramp) -> Result<()> {
        let deadline = Instant::now() + ramp.timeout;
        let (mut left, mut in_flight) = (count, 0_usize);
        let mut last_event = Instant::now();
        while (left > 0 || in_flight > 0) && Instant::now() < deadline {
            while left > 0 && in_flight < ramp.in_flight_max {
                left -= 1;
                in_flight += usize::from(self.start()?);
            }
            let done = self.step(STEP)?;
            in_flight = in_flight.saturating_sub(done);
            if done > 0 {
                last_event = Instant::now();
            } else if last_event.elapsed() > ramp.stall_timeout {
                if left == 0 {
                    break;
                }
                // Those that wait in a backlog no longer count as in flight.
                (in_flight, last_event) = (0, Instant::now());
            }
        }
        Ok(())
    }

    /// Starts one more connect, and returns whether it is in flight.
    fn start(&mut self) -> Result<bool> {
        let slot = self.slots.len();
        self.slots.push(None);
        let started = self.connect(slot)?;
        Ok(self.count_failure(started))
    }

    pub(crate) fn connect_many(&mut self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.start().map(drop))
    }

    /// Returns whether it is a success.
    fn count_failure(&mut self, outcome: Result<(), String>) -> bool {
        outcome.map_err(|reason| *self.failures.entry(reason).or_default() += 1).is_ok()
    }

    fn send_counted(&mut self, slot: usize, message: impl Into<Arc<[u8]>>) -> bool {
        let sent = self.send(slot, message);
        self.count_failure(sent)
    }

    /// Handles events; returns how many connections got their echo or failed before it.
    fn step(&mut self, timeout: Duration) -> Result<usize> {
        check_deadline()?;
        let mut done = 0;
        for (slot, event) in self.poll(timeout)? {
            done += usize::from(match event {
                Event::Connected => !self.send_counted(slot, first_message(slot)),
                Event::Echoed => true,
                Event::Closed(State::Open, reason) => {
                    self.count_failure(Err(format!("lost: {reason}")));
                    false
                }
                Event::Closed(_, reason) => !self.count_failure(Err(reason)),
            });
        }
        Ok(done)
    }

    /// Handles events until the condition holds or the time is over; returns how long that took.
    pub(crate) fn run_until(
        &mut self,
        timeout: Duration,
        mut holds: impl FnMut(&Self) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        while !holds(self) && started.elapsed() < timeout {
            self.step(STEP)?;
        }
        Ok(started.elapsed())
    }

    pub(crate) fn run_for(&mut self, duration: Duration) -> Result<()> {
        self.run_until(duration, |_| false).map(drop)
    }

    /// Sends a message on each open connection; returns how many get its echo.
    pub(crate) fn verify(&mut self) -> Result<usize> {
        let slots = self.send_all()?;
        self.await_echoes(&slots, Duration::from_secs(20))
    }

    /// Sends a message on each open connection; returns their slots.
    pub(crate) fn send_all(&mut self) -> Result<Vec<usize>> {
        let slots = self.open_slots();
        for (number, &slot) in slots.iter().enumerate() {
            self.send_counted(slot, format!("still there, number {number}?").into_bytes());
            if number % 200 == 0 {
                self.step(Duration::ZERO)?;
            }
        }
        Ok(slots)
    }

    /// Sends one of these messages in turn on each open connection, without reading; returns their slots.
    pub(crate) fn send_at_once(&mut self, messages: &[Arc<[u8]>]) -> Vec<usize> {
        let slots = self.open_slots();
        for (&slot, message) in slots.iter().zip(messages.iter().cycle()) {
            self.send_counted(slot, Arc::clone(message));
        }
        slots
    }

    fn open_slots(&self) -> Vec<usize> {
        let open = self.iter().filter(|(_, connection)| connection.state == State::Open);
        open.map(|(slot, _)| slot).collect()
    }

    /// Waits for the echoes on these slots; returns how many are complete.
    pub(crate) fn await_echoes(&mut self, slots: &[usize], timeout: Duration) -> Result<usize> {
        let count = |load: &Self, state| {
            let connections = slots.iter().filter_map(|&slot| load.get(slot));
            connections.filter(|connection| connection.state == state).count()
        };
        self.run_until(timeout, |load| count(load, State::Waiting) == 0)?;
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
        let chosen = self.iter().filter(|(_, connection)| is_chosen(connection.state));
        let chosen: Vec<usize> = chosen.map(|(slot, _)| slot).take(count).collect();
        chosen.into_iter().for_each(|slot| self.remove(slot, is_reset));
    }
}

/// What a connection sends first.
pub(crate) fn first_message(slot: usize) -> Vec<u8> {
    format!("Hello Server, connections num:{slot}").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    fn load_to(listener: &TcpListener) -> Load {
        let first = listener.local_addr().unwrap().port();
        Load::new(Ports { ip: Ipv4Addr::LOCALHOST, first, count: 1 }).unwrap()
    }

    /// A connection that has sent a message, and its other end.
    fn connection(message: &[u8]) -> (Load, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut load = load_to(&listener);
        load.connect(3).unwrap().unwrap();
        assert_eq!(next(&mut load), [(3, Event::Connected)]);
        load.send(3, message.to_vec()).unwrap();
        (load, listener.accept().unwrap().0)
    }

    fn next(load: &mut Load) -> Vec<(usize, Event)> {
        load.poll(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn an_echo_in_pieces_is_complete_with_the_last_one() {
        let (mut load, mut server) = connection(b"hello");
        server.write_all(b"hel").unwrap();
        assert_eq!(next(&mut load), []);
        assert_eq!(load.waiting(), 1);
        server.write_all(b"lo").unwrap();
        assert_eq!(next(&mut load), [(3, Event::Echoed)]);
        assert_eq!(load.open(), 1);
    }

    #[test]
    fn other_bytes_more_bytes_and_the_end_close_it() {
        for (answer, why) in
            [(&b"help"[..], "a wrong echo"), (b"hellohello", "a wrong echo"), (b"", "closed")]
        {
            let (mut load, mut server) = connection(b"hello");
            server.write_all(answer).unwrap();
            drop(server);
            let events = next(&mut load);
            assert!(
                matches!(&events[..], [(3, Event::Closed(State::Waiting, reason))] if reason == why || reason == "ECONNRESET"),
                "{events:?}"
            );
            assert_eq!(load.iter().count(), 0);
        }
    }

    #[test]
    fn a_refused_connect_has_a_reason() {
        let mut load = load_to(&TcpListener::bind("127.0.0.1:0").unwrap());
        if load.connect(0).unwrap().is_ok() {
            let refused = Event::Closed(State::Connecting, "ECONNREFUSED".to_owned());
            assert_eq!(next(&mut load), [(0, refused)]);
        }
    }
}
