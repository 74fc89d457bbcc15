//! Connections of a crowd, each in a slot: one message at a time, and the echo that must come back.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use c1000k_host::errno_name;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, SockRef, Socket, Type};

/// What a look at the events takes at most.
const EVENTS_MAX: usize = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The connect is not decided.
    Connecting,
    /// An echo is on its way.
    Waiting,
    /// The last echo came back whole.
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
    /// The connection is there; the peer is to say something.
    Connected,
    /// Its echo is complete.
    Echoed,
    /// It is gone, and so is its slot's content: what it was, and why.
    Gone(State, String),
}

/// Peers by slot.
#[derive(Debug)]
pub(crate) struct Peers {
    epoll: Epoll,
    slots: Vec<Option<Peer>>,
    events: Vec<EpollEvent>,
    /// Those who connect from now on take so much before they read it; the kernel's choice where it is `None`.
    pub(crate) receive_buffer_bytes: Option<usize>,
}

impl Peers {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            slots: Vec::new(),
            events: vec![EpollEvent::empty(); EVENTS_MAX],
            receive_buffer_bytes: None,
        })
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Peer> {
        self.slots.get(slot)?.as_ref()
    }

    /// All that there are, the oldest slot first.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (usize, &Peer)> {
        self.slots.iter().enumerate().filter_map(|(slot, peer)| Some((slot, peer.as_ref()?)))
    }

    pub(crate) fn count(&self, state: State) -> usize {
        self.iter().filter(|(_, peer)| peer.state == state).count()
    }

    /// Starts a connect in a free slot. `Err` in the answer is what the kernel refused it with at once.
    pub(crate) fn connect(&mut self, slot: usize, to: SocketAddr) -> Result<Result<(), String>> {
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

    /// Says something, whose echo is awaited from now on. `Err` is why it could not; the peer is gone then.
    pub(crate) fn say(&mut self, slot: usize, message: impl Into<Arc<[u8]>>) -> Result<(), String> {
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

    /// Removes a peer and closes it, by a reset where that is wanted.
    pub(crate) fn remove(&mut self, slot: usize, is_reset: bool) {
        let Some(peer) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        if is_reset {
            // A stream that does not take it is closed all the same.
            let _ = SockRef::from(&peer.stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// The slots on which something has happened.
    pub(crate) fn wait(&mut self, within: Duration) -> Result<Vec<usize>> {
        let within = u16::try_from(within.as_millis()).unwrap_or(u16::MAX);
        let count = match self.epoll.wait(&mut self.events, within) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        Ok(self.events[..count].iter().map(|event| event.data() as usize).collect())
    }

    /// Takes what has happened.
    pub(crate) fn poll(&mut self, within: Duration) -> Result<Vec<(usize, Event)>> {
        let ready = self.wait(within)?;
        let mut events = Vec::with_capacity(ready.len());
        for slot in ready {
            let Some(Some(peer)) = self.slots.get_mut(slot) else { continue };
            let state = peer.state;
            match advance(peer, &self.epoll, slot) {
                Ok(None) => {}
                Ok(Some(event)) => events.push((slot, event)),
                Err(why) => {
                    self.slots[slot] = None;
                    events.push((slot, Event::Gone(state, why)));
                }
            }
        }
        Ok(events)
    }
}

/// What has happened to one peer; an error is its end.
fn advance(peer: &mut Peer, epoll: &Epoll, slot: usize) -> Result<Option<Event>, String> {
    if peer.state == State::Connecting {
        if let Some(error) = peer.stream.take_error().map_err(|error| name_of(&error))? {
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
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(name_of(&error)),
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A peer that has said `said`, and the other end of its connection.
    fn peer(said: &[u8]) -> (Peers, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peers = Peers::new().unwrap();
        peers.connect(3, listener.local_addr().unwrap()).unwrap().unwrap();
        assert_eq!(next(&mut peers), [(3, Event::Connected)]);
        peers.say(3, said.to_vec()).unwrap();
        (peers, listener.accept().unwrap().0)
    }

    fn next(peers: &mut Peers) -> Vec<(usize, Event)> {
        peers.poll(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn an_echo_in_pieces_is_complete_with_the_last_one() {
        let (mut peers, mut server) = peer(b"hello");
        server.write_all(b"hel").unwrap();
        assert_eq!(next(&mut peers), []);
        assert_eq!(peers.count(State::Waiting), 1);
        server.write_all(b"lo").unwrap();
        assert_eq!(next(&mut peers), [(3, Event::Echoed)]);
        assert_eq!(peers.count(State::Open), 1);
    }

    #[test]
    fn other_bytes_more_bytes_and_the_end_are_its_end() {
        for (answer, why) in
            [(&b"help"[..], "a wrong echo"), (b"hellohello", "a wrong echo"), (b"", "closed")]
        {
            let (mut peers, mut server) = peer(b"hello");
            server.write_all(answer).unwrap();
            drop(server);
            let seen = next(&mut peers);
            assert!(
                matches!(&seen[..], [(3, Event::Gone(State::Waiting, said))] if said == why || said == "ECONNRESET"),
                "{seen:?}"
            );
            assert_eq!(peers.iter().count(), 0);
        }
    }

    #[test]
    fn a_refused_connect_says_why() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut peers = Peers::new().unwrap();
        if peers.connect(0, free).unwrap().is_ok() {
            assert_eq!(
                next(&mut peers),
                [(0, Event::Gone(State::Connecting, "ECONNREFUSED".to_owned()))]
            );
        }
    }
}
