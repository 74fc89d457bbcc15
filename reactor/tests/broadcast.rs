//! Sweeps and broadcasts: all connections are visited, in slices, in order, without delaying others.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

mod common;

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reactor::{
    CloseReason, Config, Context, Error, Handler, Incoming, ListenOptions, Reactor, Status,
    SweepId, Token, Written,
};

use common::descriptors::Descriptors;

const DEADLINE: Duration = Duration::from_secs(60);
const VISITS_PER_TURN: usize = 256;

/// Echoes, and sends each message to all connections; a reader that is too slow is dropped.
#[derive(Default)]
struct Station {
    messages: HashMap<SweepId, Arc<[u8]>>,
    visited: HashMap<SweepId, Vec<Token>>,
    swept: Vec<SweepId>,
    opened: Vec<Token>,
    closed: HashSet<Token>,
    echoed: usize,
    queued: usize,
    /// Connections that the next visit closes instead.
    to_close: HashSet<Token>,
}

impl Station {
    fn send_to_all(&mut self, cx: &mut Context<()>, message: &Arc<[u8]>) -> SweepId {
        let sweep = cx.sweep().unwrap();
        self.messages.insert(sweep, Arc::clone(message));
        sweep
    }

    fn visits(&self) -> usize {
        self.visited.values().map(Vec::len).sum()
    }
}

impl Handler for Station {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_open(&mut self, _: &mut Context<()>, token: Token, _: &mut ()) {
        self.opened.push(token);
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _: &mut (), bytes: &mut [u8]) {
        self.echoed += bytes.len();
        cx.write(token, bytes).unwrap();
    }

    fn on_visit(&mut self, cx: &mut Context<()>, sweep: SweepId, token: Token, _: &mut ()) {
        self.visited.entry(sweep).or_default().push(token);
        if self.to_close.contains(&token) {
            return cx.close(token);
        }
        let Some(message) = self.messages.get(&sweep) else { return };
        match cx.write_chunk(token, Arc::clone(message)) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => self.queued += 1,
            Err(_) => cx.abort(token),
        }
    }

    fn on_swept(&mut self, _: &mut Context<()>, sweep: SweepId) {
        self.messages.remove(&sweep);
        self.swept.push(sweep);
    }

    fn on_close(&mut self, _: &mut Context<()>, token: Token, _: (), _: CloseReason) {
        self.closed.insert(token);
    }
}

struct World {
    reactor: Reactor<()>,
    station: Station,
    address: SocketAddr,
}

impl World {
    fn new(connections: usize) -> Self {
        let config = Config {
            connections_max: connections + 8,
            visits_per_turn: VISITS_PER_TURN,
            sweeps_max: 2,
            write_queue_bytes_max: 16 * 1024,
            ..Config::default()
        };
        let mut reactor = Reactor::new(&config).unwrap();
        let cx = reactor.context();
        let listener = cx.listen(([127, 0, 0, 1], 0), &ListenOptions::default()).unwrap();
        let address = cx.listener_addr(listener).unwrap();
        Self { reactor, station: Station::default(), address }
    }

    fn turn(&mut self, max_wait: Duration) {
        assert_eq!(self.reactor.turn(&mut self.station, Some(max_wait)).unwrap(), Status::Running);
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "{what} did not happen");
            self.turn(Duration::from_millis(20));
        }
    }

    /// Connects this number of peers, a hundred at a time, so that no backlog overflows.
    fn peers(&mut self, count: usize) -> Vec<TcpStream> {
        let mut peers = Vec::with_capacity(count);
        while peers.len() < count {
            for _ in 0..100.min(count - peers.len()) {
                let peer = TcpStream::connect_timeout(&self.address, DEADLINE).unwrap();
                peer.set_read_timeout(Some(DEADLINE)).unwrap();
                peers.push(peer);
            }
            self.until("the accepts", |world| world.station.opened.len() == peers.len());
        }
        peers
    }

    fn broadcast(&mut self, message: &Arc<[u8]>) -> SweepId {
        self.station.send_to_all(self.reactor.context(), message)
    }
}

fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > 10_200, "this test needs 10,200 descriptors, and the hard limit is {hard}");
}

/// Fills the kernel's buffers towards a peer that does not read, and 8 KiB of its queue.
fn fill_buffers(world: &mut World, token: Token) {
    let filler = vec![b'-'; 8 * 1024];
    let mut turns_stuck = 0;
    // The kernel enlarges its buffers for a while, so they are full only after several refusals in a row.
    while turns_stuck < 5 {
        let cx = world.reactor.context();
        if cx.queued_bytes(token) == 0 {
            turns_stuck = 0;
            cx.write(token, &filler).unwrap();
        } else {
            turns_stuck += 1;
            world.turn(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_broadcast_to_5000_reaches_all_in_slices_while_a_bystander_is_served() {
    let _descriptors = Descriptors::counted();
    const PEERS: usize = 5_000;
    const SLOW: usize = 10;
    raise_descriptor_limit();
    let mut world = World::new(PEERS);
    let mut peers = world.peers(PEERS);
    let slow: Vec<Token> = world.station.opened[..SLOW].to_vec();
    for token in &slow {
        fill_buffers(&mut world, *token);
    }

    let message: Arc<[u8]> = vec![b'm'; 4 * 1024].into();
    let sweep = world.broadcast(&message);
    let (mut turns, mut visits) = (0, 0);
    while world.station.swept.is_empty() {
        peers[PEERS - 1].write_all(b"?").unwrap();
        world.turn(Duration::ZERO);
        turns += 1;
        let new_visits = world.station.visits() - visits;
        assert!(new_visits <= VISITS_PER_TURN, "{new_visits} visits in one turn");
        visits += new_visits;
        assert!(turns <= PEERS / VISITS_PER_TURN + 1, "{visits} visits in {turns} turns");
    }
    assert!(turns >= PEERS / VISITS_PER_TURN);
    let bystander = world.station.echoed;
    assert!(bystander >= turns / 2, "{bystander} echoes in {turns} turns");

    let visited: HashSet<Token> = world.station.visited[&sweep].iter().copied().collect();
    assert_eq!(visits, PEERS, "each connection is visited once");
    assert_eq!(visited, world.station.opened.iter().copied().collect());

    // The queues of slow readers share the allocation.
    assert_eq!(world.station.queued, SLOW);
    assert_eq!(Arc::strong_count(&message), 1 + SLOW);
    for peer in &mut peers[SLOW..PEERS - 1] {
        let mut received = vec![0; message.len()];
        peer.read_exact(&mut received).unwrap();
        assert_eq!(received[..], message[..]);
    }

    // Their queues hold 16 KiB: after a few more messages they are dropped, and only they.
    for _ in 0..4 {
        world.broadcast(&message);
        world.until("the sweep", |world| world.station.messages.is_empty());
    }
    world.until("the drop", |world| world.station.closed.len() >= SLOW);
    assert_eq!(world.station.closed, slow.into_iter().collect());
    assert_eq!(Arc::strong_count(&message), 1, "their queued chunks are released");
}

#[test]
fn two_broadcasts_arrive_in_order_and_wait_for_each_other() {
    let _descriptors = Descriptors::counted();
    let count = VISITS_PER_TURN + 10;
    let mut world = World::new(count);
    let mut peers = world.peers(count);
    let first = world.broadcast(&b"first ".as_slice().into());
    let second = world.broadcast(&b"second".as_slice().into());
    let refused = world.reactor.context().sweep().unwrap_err();
    assert!(matches!(refused, Error::Full { what: "sweeps", limit: 2 }), "{refused}");
    world.until("both sweeps", |world| world.station.swept.len() == 2);
    assert_eq!(world.station.swept, [first, second]);
    for peer in &mut peers {
        let mut received = [0; 12];
        peer.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"first second");
    }
    world.reactor.context().sweep().expect("a sweep can be started again");
}

#[test]
fn connections_that_open_or_close_during_a_sweep_do_not_affect_others() {
    let _descriptors = Descriptors::counted();
    let count = VISITS_PER_TURN * 2;
    let mut world = World::new(count + 1);
    let peers = world.peers(count);
    let opened = world.station.opened.clone();
    // One is closed when visited, one is removed before its slice.
    let (visitor, gone) = (opened[3], opened[count - 3]);
    world.station.to_close.insert(visitor);
    let sweep = world.broadcast(&b"x".as_slice().into());
    world.turn(Duration::ZERO);
    assert_eq!(world.station.visits(), VISITS_PER_TURN);
    assert!(world.station.closed.contains(&visitor), "it was not removed before the next turn");
    world.reactor.context().abort(gone);
    let _newcomer = TcpStream::connect(world.address).unwrap();
    world.until("the sweep", |world| world.station.swept.contains(&sweep));

    let visited = &world.station.visited[&sweep];
    assert!(!visited.contains(&gone));
    assert!(opened.iter().all(|token| *token == gone || visited.contains(token)));
    assert_eq!(visited.len(), visited.iter().collect::<HashSet<_>>().len());
    drop(peers);
}

#[test]
fn a_sweep_without_connections_ends_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new(4);
    let sweep = world.reactor.context().sweep().unwrap();
    world.turn(DEADLINE);
    assert_eq!(world.station.swept, [sweep]);
}

#[test]
fn a_reader_that_catches_up_gets_every_byte_in_order() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new(2);
    let mut peers = world.peers(1);
    let token = world.station.opened[0];
    fill_buffers(&mut world, token);
    let message: Arc<[u8]> = b"the news".as_slice().into();
    world.broadcast(&message);
    world.until("the sweep", |world| world.station.swept.len() == 1);
    assert_eq!(world.station.queued, 1);

    peers[0].set_nonblocking(true).unwrap();
    let mut received = Vec::new();
    let mut buffer = [0; 16 * 1024];
    world.until("the rest", |_| {
        loop {
            match peers[0].read(&mut buffer) {
                Ok(count) => received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("the peer could not read: {error}"),
            }
        }
        received.ends_with(b"the news")
    });
    assert!(received[..received.len() - message.len()].iter().all(|&byte| byte == b'-'));
    assert_eq!(Arc::strong_count(&message), 1);
}

#[test]
fn a_sweep_of_chosen_connections_visits_only_these_in_order() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new(600);
    let _peers = world.peers(600);
    // Every other connection, in reverse order; some of them end before they are visited.
    let mut chosen: Vec<Token> = world.station.opened.iter().copied().step_by(2).collect();
    chosen.reverse();
    world.station.to_close.extend(&chosen[10..20]);
    let sweep = world.reactor.context().sweep_of(chosen.clone()).unwrap();
    let again = world.reactor.context().sweep_of(&chosen[..20]).unwrap();
    assert!(matches!(world.reactor.context().sweep_of([]), Err(Error::Full { limit: 2, .. })));
    world.turn(Duration::ZERO);
    assert_eq!(world.station.visits(), VISITS_PER_TURN, "in slices");
    world.until("both sweeps", |world| world.station.swept == [sweep, again]);
    assert_eq!(world.station.visited[&sweep], chosen);
    assert_eq!(
        world.station.visited[&again],
        chosen[..10],
        "connections that have ended are skipped"
    );

    let none = world.reactor.context().sweep_of([]).unwrap();
    world.until("the end of nothing", |world| world.station.swept.contains(&none));
}
