//! The clients' TCP against a model of a server's TCP, over a link that loses, duplicates and reorders packets.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::protocols::{Echo, Message};

const COUNT: u32 = 40;
const TIMEOUT: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(10);

fn tuples() -> Tuples {
    let server = "198.18.0.1:9900".parse().unwrap();
    Tuples::new("198.18.0.0/15".parse().unwrap(), server, 3)
}

/// Keeps what was sent.
#[derive(Debug, Default)]
struct Outbox(Vec<Vec<u8>>);

impl Link for Outbox {
    fn send(&mut self, packet: &[u8]) {
        let segment = Segment::parse(packet).expect("a whole segment");
        let prefix: ipnet::Ipv4Net = "198.18.0.0/15".parse().unwrap();
        assert!(prefix.contains(segment.source.ip()), "{segment:?}");
        assert_eq!(segment.destination.ip().octets(), [198, 18, 0, 1]);
        self.0.push(packet.to_vec());
    }
}

/// The server's state of a connection.
#[derive(Debug)]
struct Served {
    receive_next: u32,
    /// The first unacknowledged number, with the SYN.
    unacknowledged: u32,
    /// The data sent from there on, without the SYN.
    sent: Vec<u8>,
    is_established: bool,
    resend_at: Instant,
}

/// An echo server with the required parts of RFC 9293.
#[derive(Debug, Default)]
struct Server {
    connections: BTreeMap<u32, Served>,
    out: Vec<Vec<u8>>,
    /// The segment size of answers.
    segment_bytes: usize,
}

impl Server {
    fn reply(
        &mut self,
        to: &Segment<'_>,
        sequence: u32,
        ack: Option<u32>,
        flags: Flags,
        payload: &[u8],
    ) {
        let mut packet = vec![];
        let segment = Segment {
            source: to.destination,
            destination: to.source,
            sequence,
            acknowledgment: ack,
            flags,
            payload,
        };
        segment.write(&mut packet);
        self.out.push(packet);
    }

    fn on_packet(&mut self, packet: &[u8], now: Instant) {
        let segment = Segment::parse(packet).unwrap();
        let index = tuples().index(segment.source, segment.destination).unwrap();
        let syn = Flags { syn: true, ..Flags::default() };
        let rst = Flags { rst: true, ..Flags::default() };
        let Some(served) = self.connections.get_mut(&index) else {
            if segment.flags.syn {
                let first = index.wrapping_mul(0x9e37_79b9);
                let receive_next = segment.sequence.wrapping_add(1);
                let served = Served {
                    receive_next,
                    unacknowledged: first,
                    sent: vec![],
                    is_established: false,
                    resend_at: now + Duration::from_secs(1),
                };
                self.connections.insert(index, served);
                self.reply(&segment, first, Some(receive_next), syn, b"");
            } else if !segment.flags.rst {
                self.reply(&segment, segment.acknowledgment.unwrap(), None, rst, b"");
            }
            return;
        };
        if segment.flags.rst {
            if segment.sequence == served.receive_next {
                self.connections.remove(&index);
            }
            return;
        }
        let syn_bytes = u32::from(!served.is_established);
        let next = served.unacknowledged + syn_bytes + served.sent.len() as u32;
        if let Some(acknowledgment) = segment.acknowledgment {
            let new = acknowledgment.wrapping_sub(served.unacknowledged);
            if new > 0 && new <= syn_bytes + served.sent.len() as u32 {
                served.sent.drain(..(new - syn_bytes) as usize);
                served.unacknowledged = acknowledgment;
                served.is_established = true;
            }
        }
        let is_next = segment.sequence == served.receive_next && served.is_established;
        if !segment.payload.is_empty() && is_next {
            served.receive_next = served.receive_next.wrapping_add(segment.payload.len() as u32);
            served.sent.extend_from_slice(segment.payload);
            served.resend_at = now + Duration::from_millis(200);
            let acknowledgment = Some(served.receive_next);
            for (number, part) in segment.payload.chunks(self.segment_bytes).enumerate() {
                let sequence = next.wrapping_add((number * self.segment_bytes) as u32);
                self.reply(&segment, sequence, acknowledgment, Flags::default(), part);
            }
        } else if segment.flags.syn || !is_next || segment.length() > 0 {
            let (flags, sequence) = if served.is_established {
                (Flags::default(), next)
            } else {
                (syn, served.unacknowledged)
            };
            let acknowledgment = Some(served.receive_next);
            self.reply(&segment, sequence, acknowledgment, flags, b"");
        }
    }

    fn expire(&mut self, now: Instant) {
        let due: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, served)| {
                served.resend_at <= now && (!served.is_established || !served.sent.is_empty())
            })
            .map(|(&index, _)| index)
            .collect();
        for index in due {
            let (client, server) = tuples().of(index);
            let served = self.connections.get_mut(&index).unwrap();
            served.resend_at = now + Duration::from_millis(400);
            let flags = Flags { syn: !served.is_established, ..Flags::default() };
            let payload = if served.is_established { served.sent.clone() } else { vec![] };
            let segment = Segment {
                source: server,
                destination: client,
                sequence: served.unacknowledged,
                acknowledgment: Some(served.receive_next),
                flags,
                payload: &payload,
            };
            let mut packet = vec![];
            segment.write(&mut packet);
            self.out.push(packet);
        }
    }
}

/// Clients, server, and the link between them.
struct World<P: Protocol> {
    tcp: Tcp<P, Outbox>,
    server: Server,
    now: Instant,
    /// Of 100 packets.
    lost: u32,
    random: fastrand::Rng,
}

impl<P: Protocol> World<P> {
    fn new(protocol: P, lost: u32, seed: u64, segment_bytes: usize) -> Self {
        Self {
            tcp: Tcp::new(protocol, tuples(), Outbox::default(), COUNT, TIMEOUT, true),
            server: Server { segment_bytes, ..Server::default() },
            now: Instant::now(),
            lost,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// Loss, duplication and order of packets on the link.
    fn carried(&mut self, packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut carried = vec![];
        for packet in packets {
            for _ in 0..if self.lost > 0 && self.random.u32(..100) < 3 { 2 } else { 1 } {
                if self.random.u32(..100) >= self.lost {
                    carried.push(packet.clone());
                }
            }
        }
        if self.lost > 0 {
            self.random.shuffle(&mut carried);
        }
        carried
    }

    fn step(&mut self) -> Vec<Event> {
        let mut events = vec![];
        while let Some(event) = self.tcp.expire(self.now) {
            events.push(event);
        }
        self.server.expire(self.now);
        while !self.tcp.link.0.is_empty() || !self.server.out.is_empty() {
            let sent = std::mem::take(&mut self.tcp.link.0);
            for packet in self.carried(sent) {
                self.server.on_packet(&packet, self.now);
            }
            let sent = std::mem::take(&mut self.server.out);
            for packet in self.carried(sent) {
                events.extend(self.tcp.on_packet(&packet, self.now));
            }
        }
        self.now += STEP;
        events
    }

    fn until_quiet(&mut self) -> Vec<Event> {
        let mut events = vec![];
        let tcp = self.now + 2 * TIMEOUT;
        while self.tcp.waiting() > 0 {
            assert!(self.now < tcp, "{} wait", self.tcp.waiting());
            events.extend(self.step());
        }
        events
    }
}

fn open_ask_and_close<P: Protocol>(mut world: World<P>) {
    for index in 0..COUNT {
        world.tcp.open(index, world.now);
    }
    let events = world.until_quiet();
    let opened = events.iter().filter(|event| matches!(event, Event::Opened { .. })).count();
    let up = |event: &&Event| matches!(event, Event::Answered { was: Stage::Opening, .. });
    assert_eq!((opened, events.iter().filter(up).count()), (COUNT as usize, COUNT as usize));
    for round in 0..5 {
        for index in 0..COUNT {
            assert_eq!(world.tcp.stage(index), Stage::Up, "{index} in round {round}");
            world.tcp.ask(index, world.now, world.now);
        }
        let events = world.until_quiet();
        let answered = |event: &&Event| matches!(event, Event::Answered { was: Stage::Asked, .. });
        assert_eq!(events.iter().filter(answered).count(), events.len(), "{events:?}");
        assert_eq!(events.len(), COUNT as usize);
    }
    for index in 0..COUNT {
        world.tcp.reset(index);
    }
    world.step();
    for index in 0..COUNT {
        world.tcp.confirm(index, world.now);
    }
    let events = world.until_quiet();
    assert!(events.iter().all(|event| matches!(event, Event::Confirmed { .. })), "{events:?}");
    assert!(world.server.connections.is_empty(), "{:?}", world.server.connections);
}

#[test]
fn a_good_link_needs_no_retransmission() {
    let mut world = World::new(Echo, 0, 1, 1_460);
    for index in 0..COUNT {
        world.tcp.open(index, world.now);
    }
    world.until_quiet();
    assert_eq!(world.tcp.counters.retransmitted, 0);
    open_ask_and_close(World::new(Echo, 0, 1, 1_460));
}

#[test]
fn an_old_connection_of_the_server_is_reset() {
    let mut world = World::new(Echo, 0, 1, 1_460);
    world.tcp.open(0, world.now);
    world.until_quiet();
    let server = std::mem::take(&mut world.server);
    let mut world = World { server, ..World::new(Echo, 0, 2, 1_460) };
    world.tcp.open(0, world.now);
    world.until_quiet();
    assert_eq!(world.tcp.stage(0), Stage::Up);
}

#[test]
fn a_duplicate_is_acknowledged_again() {
    let mut world = World::new(Echo, 0, 1, 1_460);
    world.tcp.open(0, world.now);
    world.until_quiet();
    let (client, server) = tuples().of(0);
    let (receive_next, first) = world.tcp.numbers(0);
    let echo = b"Hello Server, connections num:1";
    // The complete answer again, as if its acknowledgment was lost; and a keepalive with one old byte.
    for payload in [&echo[..], &echo[30..]] {
        let mut packet = vec![];
        Segment {
            source: server,
            destination: client,
            sequence: receive_next.wrapping_sub(payload.len() as u32),
            acknowledgment: Some(first.wrapping_add(echo.len() as u32)),
            flags: Flags::default(),
            payload,
        }
        .write(&mut packet);
        assert_eq!(world.tcp.on_packet(&packet, world.now), None);
        let sent = std::mem::take(&mut world.tcp.link.0);
        let [reply] = &sent[..] else { panic!("one reply, and not {}", sent.len()) };
        let reply = Segment::parse(reply).unwrap();
        assert_eq!((reply.acknowledgment, reply.payload.len()), (Some(receive_next), 0));
    }
}

#[test]
fn a_reset_that_is_not_of_the_connection_does_not_end_it() {
    let mut world = World::new(Echo, 0, 1, 1_460);
    world.tcp.open(0, world.now);
    world.until_quiet();
    let (client, server) = tuples().of(0);
    let receive_next = world.tcp.connections[0].receive_next;
    for (sequence, tcp) in [
        (receive_next.wrapping_sub(1), false),
        (receive_next.wrapping_add(9), false),
        (receive_next, true),
    ] {
        let mut packet = vec![];
        let flags = Flags { rst: true, ..Flags::default() };
        let acknowledgment = None;
        Segment {
            source: server,
            destination: client,
            sequence,
            acknowledgment,
            flags,
            payload: b"",
        }
        .write(&mut packet);
        assert_eq!(world.tcp.on_packet(&packet, world.now).is_some(), tcp, "{sequence}");
    }
}

#[test]
fn a_silent_server_ends_each_connection_in_time() {
    let mut tcp = Tcp::new(Echo, tuples(), Outbox::default(), 2, TIMEOUT, true);
    let mut now = Instant::now();
    tcp.open(0, now);
    let began = now;
    let event = loop {
        now += STEP;
        if let Some(event) = tcp.expire(now) {
            break event;
        }
    };
    let ended =
        Event::Ended { index: 0, was: Stage::Connecting, why: Why::TimedOut, has_part: false };
    assert_eq!(event, ended);
    assert!(now - began >= TIMEOUT && now - began < TIMEOUT + 2 * STEP);
    assert!(tcp.counters.retransmitted > 50, "{:?}", tcp.counters);
    assert_eq!(tcp.waiting(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn everything_arrives_over_a_bad_link(
        lost in 1..20_u32, seed in any::<u64>(), segment_bytes in 5..50_usize,
    ) {
        open_ask_and_close(World::new(Echo, lost, seed, segment_bytes));
        open_ask_and_close(World::new(Message::of_size(700), lost, seed, 536));
    }
}

proptest! {
    #[test]
    fn no_packets_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..1_500)) {
        super::super::fuzz::play_packets(&bytes);
    }
}
