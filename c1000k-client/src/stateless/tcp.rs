//! TCP of the clients, which have no sockets.
//!
//! The state of a connection is computed where possible: its addresses and ports from its index, its initial sequence number
//! from a keyed hash of the index, its next sequence number from the number of messages sent. The stored state is 8
//! bytes: the position in the server's stream, the number of messages sent, and the stage. The state that it needs
//! only while it waits for the server is in a separate table.
//!
//! All I/O is done by a [`Link`].

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::hash_map::RandomState;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use super::segment::{Flags, Segment};
use super::tuple::Tuples;
use crate::protocols::{Answer, Protocol};

/// The first retransmission timeout of a SYN; it doubles each time.
const SYN_TIMEOUT: Duration = Duration::from_millis(500);

/// The first retransmission timeout of a message; it doubles each time.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(250);

/// The longest retransmission timeout, for about ten attempts within `--connect-timeout`.
const RESEND_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// The advertised window: a reset within it is answered by an acknowledgment (RFC 5961).
const WINDOW: u32 = 65_535;

/// Half of the sequence numbers: a number less than this ahead is new, all others are old.
const HALF: u32 = 1 << 31;

/// Sends packets.
pub(crate) trait Link {
    /// Sends a packet. If it can't be sent, it is lost, as on any network.
    fn send(&mut self, packet: &[u8]);
}

/// The stage of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Stage {
    /// Not opened, or ended.
    Closed,
    /// A SYN has been sent.
    Connecting,
    /// The first message has been sent.
    Opening,
    /// Held, without an unanswered message.
    Up,
    /// Held, with an unanswered message.
    Asked,
}

/// The stored state of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    /// The server's next sequence number.
    receive_next: u32,
    /// The stage in the upper 3 bits, the number of messages sent in the others.
    word: u32,
}

/// Memory of an idle connection.
pub(crate) const CONNECTION_BYTES: usize = size_of::<Connection>();
const _: () = assert!(CONNECTION_BYTES == 8);

const STAGE_SHIFT: u32 = 29;
const MESSAGES_MASK: u32 = (1 << STAGE_SHIFT) - 1;

impl Connection {
    fn stage(self) -> Stage {
        match self.word >> STAGE_SHIFT {
            1 => Stage::Connecting,
            2 => Stage::Opening,
            3 => Stage::Up,
            4 => Stage::Asked,
            _ => Stage::Closed,
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        self.word = (self.word & MESSAGES_MASK) | ((stage as u32) << STAGE_SHIFT);
    }

    fn messages(self) -> u32 {
        self.word & MESSAGES_MASK
    }
}

/// The state of a connection that waits for the server.
#[derive(Debug)]
struct Waiting<S> {
    /// When the connect was started, or the message was due.
    since: Instant,
    /// When it was first sent.
    sent: Instant,
    deadline: Instant,
    /// The number of retransmissions.
    resent: u32,
    /// The server has acknowledged the message, so it is not retransmitted.
    is_acknowledged: bool,
    /// The protocol's state.
    state: S,
}

/// An event of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The server answered the SYN, this long after the first one.
    Opened { index: u32, latency: Duration },
    /// The answer is complete.
    Answered { index: u32, was: Stage, latency: Duration },
    /// It has ended, but not by [`reset`](Tcp::reset).
    Ended { index: u32, was: Stage, why: Why, has_part: bool },
    /// The server no longer has the connection.
    Confirmed { index: u32 },
    /// The server did not answer whether it still has the connection.
    Unconfirmed { index: u32 },
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// A SYN was answered by a reset.
    Refused,
    /// The server reset it.
    Reset,
    /// The server ended its stream.
    Eof,
    /// No answer came in time.
    TimedOut,
    /// The answer was wrong.
    Mismatch,
}

/// Counters of segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Retransmitted segments.
    pub(crate) retransmitted: u64,
    /// Packets that are not complete TCP segments, or belong to no connection.
    pub(crate) strays: u64,
}

/// All connections, over one link.
#[derive(Debug)]
pub(crate) struct Tcp<P: Protocol, L> {
    protocol: P,
    tuples: Tuples,
    pub(crate) link: L,
    /// The key of the initial sequence numbers, so that a third party can't guess them.
    random: RandomState,
    /// The timeout of a connect, and of an answer.
    timeout: Duration,
    /// A connection is up only after its first answer.
    verify: bool,
    connections: Vec<Connection>,
    waiting: HashMap<u32, Waiting<P::State>>,
    /// Connections that wait, by time; some have been answered since.
    deadlines: BinaryHeap<Reverse<(Instant, u32)>>,
    /// The maximum that waited at once.
    waiting_max: usize,
    pub(crate) counters: Counters,
    message: Vec<u8>,
    /// Messages that are built to compute their length.
    scratch: Vec<u8>,
    packet: Vec<u8>,
}

impl<P: Protocol, L: Link> Tcp<P, L> {
    /// Creates this many connections, all closed.
    pub(crate) fn new(
        protocol: P,
        tuples: Tuples,
        link: L,
        count: u32,
        timeout: Duration,
        verify: bool,
    ) -> Self {
        Self {
            protocol,
            tuples,
            link,
            random: RandomState::new(),
            timeout,
            verify,
            connections: vec![Connection::default(); count as usize],
            waiting: HashMap::new(),
            deadlines: BinaryHeap::new(),
            waiting_max: 0,
            counters: Counters::default(),
            message: Vec::new(),
            scratch: Vec::new(),
            packet: Vec::new(),
        }
    }

    pub(crate) fn protocol(&self) -> &P {
        &self.protocol
    }

    pub(crate) fn count(&self) -> u32 {
        self.connections.len() as u32
    }

    pub(crate) fn stage(&self, index: u32) -> Stage {
        self.connections[index as usize].stage()
    }

    /// Whether the server has answered it.
    pub(crate) fn was_open(&self, index: u32) -> bool {
        self.connections[index as usize].receive_next != 0
    }

    /// The number that waits for the server.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Memory of all connections, with the maximum that waited at once.
    pub(crate) fn state_bytes(&self) -> u64 {
        let waiting = size_of::<(u32, Waiting<P::State>)>() + size_of::<(Instant, u32)>();
        (self.connections.len() * CONNECTION_BYTES + self.waiting_max * waiting) as u64
    }

    /// Sends a SYN for a closed connection.
    pub(crate) fn open(&mut self, index: u32, now: Instant) {
        self.connections[index as usize] = Connection::default();
        self.connections[index as usize].set_stage(Stage::Connecting);
        let state = self.protocol.state();
        self.wait(index, now, now, SYN_TIMEOUT, state);
        self.send_syn(index);
    }

    /// Sends a message, which was due at this time, on a connection that is up.
    pub(crate) fn ask(&mut self, index: u32, due: Instant, now: Instant) {
        self.connections[index as usize].set_stage(Stage::Asked);
        self.begin_message(index, due, now);
    }

    /// Resets a connection; no event follows.
    pub(crate) fn reset(&mut self, index: u32) {
        let connection = &mut self.connections[index as usize];
        let was = connection.stage();
        connection.set_stage(Stage::Closed);
        self.waiting.remove(&index);
        if was == Stage::Closed {
            return;
        }
        let sequence = self.send_next(index);
        let flags = Flags { rst: true, ..Flags::default() };
        self.send(
            index,
            sequence,
            Some(self.connections[index as usize].receive_next),
            flags,
            false,
        );
    }

    /// Asks the server whether it still has a connection that was reset.
    pub(crate) fn confirm(&mut self, index: u32, now: Instant) {
        let state = self.protocol.state();
        self.wait(index, now, now, MESSAGE_TIMEOUT, state);
        self.send_probe(index);
    }

    /// Handles a packet.
    pub(crate) fn on_packet(&mut self, packet: &[u8], now: Instant) -> Option<Event> {
        let segment = Segment::parse(packet);
        let found = segment.and_then(|segment| {
            let index = self.tuples.index(segment.destination, segment.source)?;
            (index < self.count()).then_some((index, segment))
        });
        let Some((index, segment)) = found else {
            self.counters.strays += 1;
            return None;
        };
        match self.connections[index as usize].stage() {
            Stage::Closed => self.on_closed(index, &segment),
            Stage::Connecting => self.on_connecting(index, &segment, now),
            stage => self.on_established(index, stage, &segment, now),
        }
    }

    /// Retransmits what is unanswered, and ends connections whose time is over. To be called until it returns `None`.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Event> {
        while let Some(&Reverse((deadline, index))) = self.deadlines.peek()
            && deadline <= now
        {
            self.deadlines.pop();
            let Some(waiting) = self.waiting.get_mut(&index) else { continue };
            if waiting.deadline != deadline {
                continue;
            }
            let end = waiting.sent + self.timeout;
            if now >= end {
                return Some(self.time_out(index));
            }
            let stage = self.connections[index as usize].stage();
            let first = if stage == Stage::Connecting { SYN_TIMEOUT } else { MESSAGE_TIMEOUT };
            waiting.resent += 1;
            let wait = first.saturating_mul(2_u32.saturating_pow(waiting.resent));
            waiting.deadline = end.min(now + wait.min(RESEND_TIMEOUT_MAX));
            self.deadlines.push(Reverse((waiting.deadline, index)));
            if waiting.is_acknowledged {
                continue;
            }
            self.counters.retransmitted += 1;
            match stage {
                Stage::Closed => self.send_probe(index),
                Stage::Connecting => self.send_syn(index),
                Stage::Opening | Stage::Up | Stage::Asked => self.send_message(index),
            }
        }
        None
    }

    fn time_out(&mut self, index: u32) -> Event {
        let was = self.connections[index as usize].stage();
        if was == Stage::Closed {
            self.waiting.remove(&index);
            return Event::Unconfirmed { index };
        }
        self.end(index, Why::TimedOut)
    }

    /// Ends the connection. It is reset if the server may still have it.
    fn end(&mut self, index: u32, why: Why) -> Event {
        let was = self.stage(index);
        let state = self.waiting.get(&index).map(|waiting| &waiting.state);
        let has_part = state.is_some_and(|state| self.protocol.has_part(state));
        if matches!(why, Why::TimedOut | Why::Mismatch | Why::Eof) {
            self.reset(index);
        } else {
            self.connections[index as usize].set_stage(Stage::Closed);
            self.waiting.remove(&index);
        }
        Event::Ended { index, was, why, has_part }
    }

    /// A segment of a connection that does not exist here, or no longer.
    fn on_closed(&mut self, index: u32, segment: &Segment<'_>) -> Option<Event> {
        if segment.flags.rst {
            return self.waiting.remove(&index).map(|_| Event::Confirmed { index });
        }
        self.refuse(index, segment);
        None
    }

    fn on_connecting(&mut self, index: u32, segment: &Segment<'_>, now: Instant) -> Option<Event> {
        let first = self.initial(index).wrapping_add(1);
        if segment.acknowledgment != Some(first) {
            // The server has an older connection with these addresses, which is reset before this one can open.
            if !segment.flags.rst {
                self.refuse(index, segment);
                self.send_syn(index);
            }
            return None;
        }
        if segment.flags.rst {
            return Some(self.end(index, Why::Refused));
        }
        if !segment.flags.syn {
            return None;
        }
        let since = self.waiting.get(&index)?.since;
        self.connections[index as usize].receive_next = segment.sequence.wrapping_add(1);
        if self.verify {
            self.connections[index as usize].set_stage(Stage::Opening);
            self.begin_message(index, now, now);
        } else {
            self.waiting.remove(&index);
            self.connections[index as usize].set_stage(Stage::Up);
            self.acknowledge(index);
        }
        Some(Event::Opened { index, latency: now.saturating_duration_since(since) })
    }

    fn on_established(
        &mut self,
        index: u32,
        stage: Stage,
        segment: &Segment<'_>,
        now: Instant,
    ) -> Option<Event> {
        let receive_next = self.connections[index as usize].receive_next;
        if segment.flags.rst {
            if segment.sequence == receive_next {
                return Some(self.end(index, Why::Reset));
            }
            if segment.sequence.wrapping_sub(receive_next) < WINDOW {
                self.acknowledge(index);
            }
            return None;
        }
        let send_next = self.send_next(index);
        let unacknowledged = send_next.wrapping_sub(segment.acknowledgment?);
        if unacknowledged >= HALF {
            // It acknowledges data that was never sent.
            self.acknowledge(index);
            return None;
        }
        if segment.flags.syn {
            self.answer_again(index, stage);
            return None;
        }
        if unacknowledged == 0
            && let Some(waiting) = self.waiting.get_mut(&index)
        {
            waiting.is_acknowledged = true;
        }
        if segment.length() == 0 {
            // A keepalive probe of the server.
            if segment.sequence.wrapping_add(1) == receive_next {
                self.acknowledge(index);
            }
            return None;
        }
        let old = receive_next.wrapping_sub(segment.sequence);
        let length = segment.payload.len() as u32;
        if old >= HALF || old > length || (old == length && !segment.flags.fin) {
            // An earlier segment is missing, or this one is a duplicate.
            self.acknowledge(index);
            return None;
        }
        self.on_new(index, &segment.payload[old as usize..], segment.flags.fin, now)
    }

    /// The next bytes of the server's stream, and perhaps its end.
    fn on_new(&mut self, index: u32, bytes: &[u8], has_end: bool, now: Instant) -> Option<Event> {
        let connection = &mut self.connections[index as usize];
        connection.receive_next = connection.receive_next.wrapping_add(bytes.len() as u32);
        let answer = if bytes.is_empty() {
            Answer::Partial
        } else {
            match self.waiting.get_mut(&index) {
                Some(waiting) => self.protocol.receive(
                    &mut waiting.state,
                    number(index),
                    bytes,
                    &mut self.scratch,
                ),
                None => Answer::Mismatch,
            }
        };
        match answer {
            Answer::Mismatch => return Some(self.end(index, Why::Mismatch)),
            _ if has_end => return Some(self.end(index, Why::Eof)),
            _ if bytes.is_empty() => {}
            _ => self.acknowledge(index),
        }
        if answer != Answer::Complete {
            return None;
        }
        let since = self.waiting.remove(&index)?.since;
        let connection = &mut self.connections[index as usize];
        let was = connection.stage();
        connection.set_stage(Stage::Up);
        Some(Event::Answered { index, was, latency: now.saturating_duration_since(since) })
    }

    /// The server has retransmitted its SYN-ACK: it has not received the next segment.
    fn answer_again(&mut self, index: u32, stage: Stage) {
        if stage == Stage::Opening {
            self.counters.retransmitted += 1;
            self.send_message(index);
        } else {
            self.acknowledge(index);
        }
    }

    fn wait(&mut self, index: u32, since: Instant, now: Instant, first: Duration, state: P::State) {
        let deadline = now + first.min(self.timeout);
        let waiting =
            Waiting { since, sent: now, deadline, resent: 0, is_acknowledged: false, state };
        self.waiting.insert(index, waiting);
        self.waiting_max = self.waiting_max.max(self.waiting.len());
        self.deadlines.push(Reverse((deadline, index)));
    }

    fn begin_message(&mut self, index: u32, due: Instant, now: Instant) {
        let mut state = self.protocol.state();
        let connection = &mut self.connections[index as usize];
        let is_first = connection.messages() == 0;
        connection.word += 1;
        self.message.clear();
        if is_first {
            self.protocol.open(&mut state, number(index), &mut self.message);
        } else {
            self.protocol.heartbeat(&mut state, number(index), &mut self.message);
        }
        self.wait(index, due, now, MESSAGE_TIMEOUT, state);
        self.send_last_message(index);
    }

    /// Retransmits the last message.
    fn send_message(&mut self, index: u32) {
        let mut state = self.protocol.state();
        self.message.clear();
        if self.connections[index as usize].messages() == 1 {
            self.protocol.open(&mut state, number(index), &mut self.message);
        } else {
            self.protocol.heartbeat(&mut state, number(index), &mut self.message);
        }
        self.send_last_message(index);
    }

    fn send_last_message(&mut self, index: u32) {
        let sequence = self.send_next(index).wrapping_sub(self.message.len() as u32);
        let receive_next = self.connections[index as usize].receive_next;
        self.send(index, sequence, Some(receive_next), Flags::default(), true);
    }

    /// The client's next sequence number.
    fn send_next(&mut self, index: u32) -> u32 {
        let first = self.initial(index).wrapping_add(1);
        let messages = self.connections[index as usize].messages();
        if messages == 0 {
            return first;
        }
        let mut state = self.protocol.state();
        self.scratch.clear();
        self.protocol.open(&mut state, number(index), &mut self.scratch);
        let opening = self.scratch.len() as u32;
        if messages == 1 {
            return first.wrapping_add(opening);
        }
        self.scratch.clear();
        self.protocol.heartbeat(&mut state, number(index), &mut self.scratch);
        let heartbeats = (messages - 1).wrapping_mul(self.scratch.len() as u32);
        first.wrapping_add(opening).wrapping_add(heartbeats)
    }

    /// What the server sends next, and the first number that the client sent after its SYN.
    #[cfg(any(test, fuzzing))]
    pub(super) fn numbers(&self, index: u32) -> (u32, u32) {
        let receive_next =
            self.connections.get(index as usize).map_or(0, |connection| connection.receive_next);
        (receive_next, self.initial(index).wrapping_add(1))
    }

    fn initial(&self, index: u32) -> u32 {
        self.random.hash_one(index) as u32
    }

    fn send_syn(&mut self, index: u32) {
        let flags = Flags { syn: true, ..Flags::default() };
        self.send(index, self.initial(index), None, flags, false);
    }

    fn acknowledge(&mut self, index: u32) {
        let sequence = self.send_next(index);
        let receive_next = self.connections[index as usize].receive_next;
        self.send(index, sequence, Some(receive_next), Flags::default(), false);
    }

    /// A probe one byte before the expected number, which the server must answer.
    fn send_probe(&mut self, index: u32) {
        let sequence = self.send_next(index).wrapping_sub(1);
        let receive_next = self.connections[index as usize].receive_next;
        self.send(index, sequence, Some(receive_next), Flags::default(), false);
    }

    /// The answer to a segment without a connection (RFC 9293).
    fn refuse(&mut self, index: u32, segment: &Segment<'_>) {
        let flags = Flags { rst: true, ..Flags::default() };
        match segment.acknowledgment {
            Some(acknowledgment) => self.send(index, acknowledgment, None, flags, false),
            None => {
                let end = segment.sequence.wrapping_add(segment.length());
                self.send(index, 0, Some(end), flags, false);
            }
        }
    }

    fn send(
        &mut self,
        index: u32,
        sequence: u32,
        acknowledgment: Option<u32>,
        flags: Flags,
        with_message: bool,
    ) {
        let (source, destination) = self.tuples.of(index);
        let payload = if with_message { &self.message[..] } else { &[] };
        let segment = Segment { source, destination, sequence, acknowledgment, flags, payload };
        segment.write(&mut self.packet);
        self.link.send(&self.packet);
    }
}

/// Connections are numbered from 1 in messages.
fn number(index: u32) -> u32 {
    index + 1
}
