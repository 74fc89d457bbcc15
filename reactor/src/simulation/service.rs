//! The service of the simulation: it keeps a record of each connection and checks the reactor's guarantees.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::context::{Context, SweepId};
use crate::error::{CloseReason, Detached, Error};
use crate::handler::{Handler, Incoming};
use crate::interest::Interest;
use crate::reactor::Status;
use crate::signal::Signal;
use crate::sys::{self, Readiness};
use crate::token::{ListenerId, TimerId, Token, WatchId};

pub(super) type Cx = Context<Conn>;

/// A connection's state: the number of its record.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) record: usize,
    alive: Rc<Cell<usize>>,
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.alive.set(self.alive.get() - 1);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// `on_accept` has accepted it, and its token is not known yet.
    Offered,
    Connecting,
    Open,
    /// The peer has finished.
    Ended,
    Closed,
}

/// The service's record of a connection.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) phase: Phase,
    pub(super) token: Option<Token>,
    /// The serial number of the socket in the fake kernel.
    pub(super) serial: u32,
    /// The listener that accepted it.
    pub(super) listener: Option<ListenerId>,
    /// All bytes that the reactor has accepted for sending.
    pub(super) written: Vec<u8>,
    pub(super) received: usize,
    pub(super) paused: bool,
    pub(super) finished: bool,
    pub(super) closing: bool,
    /// `on_shutdown` was called.
    pub(super) notified: bool,
    pub(super) aborted: bool,
    /// Detached; `on_close` must follow.
    pub(super) detached: bool,
    /// A part of a write was sent, and the rest did not fit into the queues.
    pub(super) cut_short: bool,
    /// Bytes were queued, and `on_drain` must follow.
    pub(super) drain_due: bool,
    /// Bytes were batched. If the kernel accepts only a part, `on_drain` may follow.
    pub(super) drain_possible: bool,
    /// All queues together had no room for it.
    pub(super) room_due: bool,
    pub(super) deadline: Option<Instant>,
    /// The number of deferred calls that must follow while it is open.
    pub(super) deferred: usize,
    pub(super) deferred_perhaps: usize,
    /// The tagged timeouts.
    pub(super) deadlines: BTreeMap<u64, Instant>,
}

impl Record {
    pub(super) fn new(phase: Phase) -> Self {
        Self {
            phase,
            token: None,
            serial: 0,
            listener: None,
            written: Vec::new(),
            received: 0,
            paused: false,
            finished: false,
            closing: false,
            notified: false,
            aborted: false,
            detached: false,
            cut_short: false,
            drain_due: false,
            drain_possible: false,
            room_due: false,
            deadline: None,
            deferred: 0,
            deferred_perhaps: 0,
            deadlines: BTreeMap::new(),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Ended)
    }

    pub(super) fn is_held(&self) -> bool {
        self.is_open() || self.phase == Phase::Connecting
    }
}

/// A connected socket outside of the reactor, and the bytes that were transferred over it.
#[derive(Debug)]
pub(super) struct Outside {
    pub(super) descriptor: OwnedFd,
    pub(super) received: usize,
    pub(super) written: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Sweep {
    pub(super) due: BTreeSet<usize>,
    pub(super) visited: BTreeSet<usize>,
}

#[derive(Debug)]
pub(super) struct Service {
    pub(super) records: Vec<Record>,
    pub(super) alive: Rc<Cell<usize>>,
    pub(super) timers: BTreeMap<TimerId, Instant>,
    pub(super) timers_gone: Vec<TimerId>,
    pub(super) sweeps: BTreeMap<SweepId, Sweep>,
    pub(super) watches: BTreeMap<WatchId, Interest>,
    pub(super) watches_gone: Vec<WatchId>,
    /// Listeners, and whether they are paused.
    pub(super) listeners: BTreeMap<ListenerId, bool>,
    pub(super) listeners_gone: Vec<ListenerId>,
    pub(super) draining: Vec<ListenerId>,
    pub(super) outside: Vec<Outside>,
    pub(super) outside_listeners: Vec<OwnedFd>,
    pub(super) wake_due: bool,
    pub(super) stop_due: bool,
    pub(super) shutting_down: Option<Instant>,
    pub(super) calm: bool,
    tokens: BTreeSet<Token>,
    inside: bool,
    signals: Option<u64>,
    signals_seen: u64,
    bytes_in: u64,
    accept_errors: u64,
    refused: u64,
}

impl Service {
    pub(super) fn new(cx: &mut Cx) -> Self {
        let signals = sys::percent(50).then(|| {
            cx.watch_signals(&[Signal::Hangup]).expect("no faults are injected yet");
            1
        });
        Self {
            records: Vec::new(),
            alive: Rc::default(),
            timers: BTreeMap::new(),
            timers_gone: Vec::new(),
            sweeps: BTreeMap::new(),
            watches: BTreeMap::new(),
            watches_gone: Vec::new(),
            listeners: BTreeMap::new(),
            listeners_gone: Vec::new(),
            draining: Vec::new(),
            outside: Vec::new(),
            outside_listeners: Vec::new(),
            wake_due: false,
            stop_due: false,
            shutting_down: None,
            calm: false,
            tokens: BTreeSet::new(),
            inside: false,
            signals,
            signals_seen: 0,
            bytes_in: 0,
            accept_errors: 0,
            refused: 0,
        }
    }

    pub(super) fn new_conn(&mut self, phase: Phase) -> Conn {
        self.alive.set(self.alive.get() + 1);
        self.records.push(Record::new(phase));
        Conn { record: self.records.len() - 1, alive: self.alive.clone() }
    }

    pub(super) fn note_name(&mut self, cx: &Cx, record: usize, token: Token) {
        assert!(self.tokens.insert(token), "{token:?} is the token of an earlier connection");
        let header = cx.header(token).expect("the connection exists");
        self.records[record].token = Some(token);
        self.records[record].serial = header.socket.serial();
    }

    /// Checks what holds for each callback.
    fn enter(&mut self, name: &str) {
        sys::trace(|| format!("  {name}"));
        assert!(!self.inside, "{name} was called during another callback");
        self.inside = true;
    }

    /// Ends each callback with random actions.
    fn leave(&mut self, cx: &mut Cx, own: Option<Token>) {
        if !self.calm {
            for _ in 0..sys::below(4) {
                self.act(cx, own);
            }
        }
        self.inside = false;
    }

    /// Checks what holds for each callback of an open connection.
    fn about(&mut self, cx: &Cx, name: &str, token: Token, conn: &Conn) -> &mut Record {
        self.enter(&format!("{name} {token:?}"));
        assert!(cx.holds(token), "{name} with a stale token");
        assert!(cx.conn(token).is_none(), "the state is lent to the callback");
        let record = &mut self.records[conn.record];
        assert_eq!(record.token, Some(token), "{name} with the state of another connection");
        assert!(record.is_open(), "{name} of a connection that is not open: {record:?}");
        assert!(
            !record.aborted && !record.detached,
            "{name} of a connection that has ended: {record:?}"
        );
        record
    }

    fn check_written(cx: &Cx, record: &Record, token: Token) {
        let sent = sys::wire(record.serial).sent;
        assert_eq!(
            sent.len() + cx.queued_bytes(token),
            record.written.len(),
            "bytes were lost or doubled: {record:?}"
        );
        assert!(
            record.written.starts_with(&sent),
            "the sent bytes differ from those that were written"
        );
    }

    pub(super) fn after_turn(&mut self, cx: &mut Cx, status: Status) {
        for record in self.records.iter().filter(|record| record.is_held()) {
            let token = record.token.expect("the token is known");
            assert!(cx.holds(token), "{token:?} was removed without on_close");
            assert_eq!(cx.conn(token).map(|conn| conn.record), self.record_of(token));
            Self::check_written(cx, record, token);
        }
        let held = self.records.iter().filter(|record| record.is_held()).count();
        assert_eq!(cx.connections(), held, "the service has no record of some connection");
        assert_eq!(self.alive.get(), held, "a state was leaked or dropped early");
        self.check_stats(cx);
        let complete = self.shutting_down.is_some() && held == 0;
        assert_eq!(status == Status::Stopped, self.stop_due || complete, "{status:?}");
        self.stop_due = false;
        if complete {
            self.shutting_down = None;
        }
        assert_eq!(cx.is_shutting_down(), self.shutting_down.is_some());
    }

    fn record_of(&self, token: Token) -> Option<usize> {
        self.records.iter().position(|record| record.token == Some(token))
    }

    fn check_stats(&self, cx: &Cx) {
        let stats = cx.stats();
        assert_eq!(stats.refused, self.refused);
        assert_eq!(stats.bytes_in, self.bytes_in);
        assert_eq!(stats.bytes_out, sys::bytes_taken());
        let granted = stats.accepted + stats.refused + stats.dropped;
        assert_eq!(granted, sys::accepts_granted(), "{stats:?}");
        assert_eq!(stats.accept_errors.values().sum::<u64>(), self.accept_errors);
    }

    /// Without faults only slots can run out. As soon as one is free, the listener must accept again.
    fn make_room(&mut self, cx: &mut Cx, listener: ListenerId, error: &Error) {
        let Error::Full { what, .. } = error else { panic!("{error}") };
        let is_one = |record: &&mut Record| {
            let helps = match *what {
                "connections" => true,
                "accepted connections" => record.listener.is_some(),
                _ => record.listener == Some(listener),
            };
            record.is_held() && !record.aborted && helps
        };
        let first = self.records.iter_mut().find(is_one);
        if let Some(record) = first {
            record.aborted = true;
            cx.abort(record.token.expect("the token is known"));
        }
    }

    /// Ends the random actions, and resumes everything that is paused.
    pub(super) fn calm_down(&mut self, cx: &mut Cx) {
        self.calm = true;
        for record in self.records.iter_mut().filter(|record| record.is_held()) {
            cx.resume_reads(record.token.expect("the token is known"));
            record.paused = false;
            // A listener at its own bound reports this only once.
            if record.listener.is_some() {
                record.aborted = true;
                cx.abort(record.token.expect("the token is known"));
            }
        }
        for (&listener, paused) in &mut self.listeners {
            cx.resume_accepts(listener).expect("no faults are injected any more");
            *paused = false;
        }
    }

    /// Checks that nothing is pending.
    pub(super) fn check_at_rest(&mut self, cx: &mut Cx) {
        for record in self.records.iter().filter(|record| record.is_held()) {
            let wire = sys::wire(record.serial);
            assert!(record.is_open(), "no callback after the connect: {record:?}");
            assert!(!record.closing, "a closing connection does not end: {record:?}");
            assert_eq!(record.received, wire.arrived, "bytes are unread: {record:?}");
            assert_eq!(
                record.phase == Phase::Ended,
                wire.fin || wire.gone,
                "the end of the input: {record:?}"
            );
            assert_eq!(wire.sent.len(), record.written.len(), "bytes are unsent: {record:?}");
            assert!(!record.drain_due, "no on_drain although the queue is empty: {record:?}");
            let is_missed = record.room_due && !record.finished;
            assert!(!is_missed, "no on_drain although there is room: {record:?}");
            assert_eq!(record.deadline, None, "the timeout does not fire: {record:?}");
            assert_eq!(record.deferred, 0, "a deferred call is missing: {record:?}");
            assert!(record.deadlines.is_empty(), "a tagged timeout does not fire: {record:?}");
        }
        assert_eq!(cx.listeners().count(), self.listeners.len(), "a listener is not drained");
        assert!(
            self.draining.is_empty(),
            "a drained listener is not reported: {:?}",
            self.draining
        );
        assert_eq!(sys::peers_waiting(), 0, "waiting peers are not accepted");
        assert!(self.timers.is_empty(), "timers do not fire: {:?}", self.timers);
        assert!(self.sweeps.is_empty(), "sweeps do not end: {:?}", self.sweeps);
        assert!(!self.wake_due, "the wake-up is missing");
        if self.signals.is_some() {
            assert_eq!(self.signals_seen, sys::signals_raised(), "signals are lost");
        }
        assert_eq!(cx.stats().queued_bytes, 0);
    }

    /// Checks that the shutdown ended within its grace period.
    pub(super) fn check_shut_down(&mut self, cx: &mut Cx, called: Instant) {
        let deadline = self.shutting_down.expect("a shutdown was started").max(called);
        assert!(
            cx.now() <= deadline + Duration::from_millis(5),
            "the shutdown took longer than its grace period"
        );
        self.after_turn(cx, Status::Stopped);
        assert!(self.records.iter().all(|record| !record.is_held()), "a connection is left");
    }

    /// Removes everything that the service owns.
    pub(super) fn let_go(&mut self, cx: &mut Cx) {
        for watch in std::mem::take(&mut self.watches).into_keys() {
            assert!(cx.unwatch(watch).is_some(), "{watch:?} does not exist");
        }
    }

    pub(super) fn check_end(&self) {
        assert_eq!(self.alive.get(), 0, "states of connections have leaked");
    }
}

impl Handler for Service {
    type Conn = Conn;

    fn on_accept(&mut self, cx: &mut Cx, incoming: &Incoming<'_>) -> Option<Conn> {
        self.enter("on_accept");
        let accepts = self.listeners.get(&incoming.listener()) == Some(&false);
        let drained = self.draining.contains(&incoming.listener());
        assert!(accepts || drained, "an accept of a listener that is paused or removed");
        let Config { connections_max, connects_reserved, .. } = *cx.config();
        let accepted = |record: &&Record| record.is_held() && record.listener.is_some();
        let accepted = self.records.iter().filter(accepted).count();
        assert!(accepted + connects_reserved < connections_max, "a reserved slot was used");
        assert!(cx.connections() < connections_max, "no slot is free");
        let _ = incoming.peer_addr();
        let conn = if sys::percent(85) { Some(self.new_conn(Phase::Offered)) } else { None };
        if let Some(conn) = &conn {
            self.records[conn.record].listener = Some(incoming.listener());
        }
        self.refused += u64::from(conn.is_none());
        self.leave(cx, None);
        conn
    }

    fn on_open(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        self.enter(&format!("on_open {token:?}"));
        assert!(cx.conn(token).is_none(), "the state is lent to the callback");
        match self.records[conn.record].phase {
            Phase::Offered => self.note_name(cx, conn.record, token),
            Phase::Connecting => assert_eq!(self.records[conn.record].token, Some(token)),
            other => panic!("on_open in the phase {other:?}"),
        }
        let record = &mut self.records[conn.record];
        assert!(!record.aborted, "on_open after an abort");
        record.phase = Phase::Open;
        if !record.closing {
            record.deadline = None;
        }
        self.leave(cx, Some(token));
    }

    fn on_data(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        let record = self.about(cx, "on_data", token, conn);
        assert!(!record.closing && !record.paused, "unwanted data: {record:?}");
        assert_eq!(record.phase, Phase::Open, "data after the end");
        assert!(!bytes.is_empty(), "on_data without data");
        for &byte in bytes.iter() {
            let expected = sys::byte_of(record.serial, record.received);
            assert_eq!(
                byte, expected,
                "bytes are lost, repeated or from another connection: {record:?}"
            );
            record.received += 1;
        }
        self.bytes_in += bytes.len() as u64;
        bytes.fill(0); // The service may change the buffer.
        self.leave(cx, Some(token));
    }

    fn on_eof(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        let record = self.about(cx, "on_eof", token, conn);
        assert!(!record.closing && !record.paused, "an unwanted on_eof: {record:?}");
        assert_eq!(record.phase, Phase::Open, "on_eof was called twice");
        assert_eq!(
            record.received,
            sys::wire(record.serial).arrived,
            "bytes are missing before the end"
        );
        record.phase = Phase::Ended;
        self.leave(cx, Some(token));
    }

    fn on_drain(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        assert_eq!(cx.queued_bytes(token), 0, "the queue is not empty");
        let record = self.about(cx, "on_drain", token, conn);
        assert!(!record.closing, "the connection is closing: {record:?}");
        let is_due = record.drain_due || record.drain_possible || record.room_due;
        assert!(is_due, "nothing was queued: {record:?}");
        (record.drain_due, record.room_due) = (false, false);
        self.leave(cx, Some(token));
    }

    fn on_timeout(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        let now = cx.now();
        let record = self.about(cx, "on_timeout", token, conn);
        let deadline = record.deadline.take().expect("the timeout is armed");
        assert!(deadline <= now, "it fires early");
        assert!(!record.closing, "the connection is closing: {record:?}");
        self.leave(cx, Some(token));
    }

    fn on_tagged_timeout(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn, tag: u64) {
        self.enter(&format!("on_tagged_timeout {token:?} {tag}"));
        let now = cx.now();
        let record = &mut self.records[conn.record];
        assert_eq!(
            record.token,
            Some(token),
            "on_tagged_timeout with the state of another connection"
        );
        assert!(
            record.is_held() && !record.closing && !record.aborted,
            "the connection has ended: {record:?}"
        );
        let deadline = record.deadlines.remove(&tag).expect("the timeout is armed");
        assert!(deadline <= now, "it fires early");
        self.leave(cx, Some(token));
    }

    fn on_close(&mut self, cx: &mut Cx, token: Token, conn: Conn, reason: CloseReason) {
        self.enter(&format!("on_close {token:?}: {reason}"));
        assert!(!cx.holds(token), "the token is not stale in on_close");
        let record = &mut self.records[conn.record];
        assert_eq!(record.token, Some(token), "on_close with the state of another connection");
        assert!(record.is_held(), "on_close in the phase {:?}", record.phase);
        check_reason(record, self.shutting_down.is_some(), &reason, cx.now());
        if !matches!(reason, CloseReason::Detached(_)) {
            let address = cx.peer_addr(token);
            assert!(
                !matches!(address, Err(Error::Stale)),
                "the address is not available in on_close"
            );
        }
        record.phase = Phase::Closed;
        record.deadlines.clear();
        if let CloseReason::Detached(Detached { descriptor, unread, .. }) = reason {
            let received = record.received + unread.len();
            let written = sys::wire(record.serial).sent;
            self.outside.push(Outside { descriptor, received, written });
        }
        self.leave(cx, None);
    }

    fn on_accept_error(&mut self, cx: &mut Cx, listener: ListenerId, error: &Error) {
        self.enter("on_accept_error");
        self.accept_errors += u64::from(error.errno().is_some());
        if self.calm {
            self.make_room(cx, listener, error);
        }
        self.leave(cx, None);
    }

    fn on_listener_drained(&mut self, cx: &mut Cx, listener: ListenerId) {
        self.enter("on_listener_drained");
        let index = self.draining.iter().position(|&draining| draining == listener);
        self.draining.swap_remove(index.expect("the listener is being drained, and ends once"));
        assert!(
            matches!(cx.listener_addr(listener), Err(Error::Stale)),
            "the id of a drained listener is not stale"
        );
        self.listeners_gone.push(listener);
        self.leave(cx, None);
    }

    fn on_timer(&mut self, cx: &mut Cx, timer: TimerId) {
        self.enter("on_timer");
        let deadline = self.timers.remove(&timer).expect("the timer is armed, and fires once");
        assert!(deadline <= cx.now(), "it fires early");
        self.timers_gone.push(timer);
        assert!(!cx.cancel_timer(timer), "the id of a fired timer is not stale");
        self.leave(cx, None);
    }

    fn on_visit(&mut self, cx: &mut Cx, sweep: SweepId, token: Token, conn: &mut Conn) {
        let record = self.about(cx, "on_visit", token, conn);
        assert!(!record.closing, "the connection is closing: {record:?}");
        let sweep = self.sweeps.get_mut(&sweep).expect("the sweep was started");
        assert!(sweep.visited.insert(conn.record), "visited twice");
        self.leave(cx, Some(token));
    }

    fn on_deferred(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        let record = self.about(cx, "on_deferred", token, conn);
        assert!(!record.closing, "the connection is closing: {record:?}");
        if record.deferred > 0 {
            record.deferred -= 1;
        } else {
            let left = record.deferred_perhaps.checked_sub(1);
            record.deferred_perhaps = left.expect("a call was deferred");
        }
        self.leave(cx, Some(token));
    }

    fn on_swept(&mut self, cx: &mut Cx, sweep: SweepId) {
        self.enter("on_swept");
        let sweep = self.sweeps.remove(&sweep).expect("the sweep was started, and ends once");
        for id in sweep.due.difference(&sweep.visited) {
            let record = &self.records[*id];
            let may_be_passed_over =
                record.closing || record.detached || self.shutting_down.is_some();
            assert!(
                !record.is_open() || may_be_passed_over,
                "a connection was skipped: {record:?}"
            );
        }
        self.leave(cx, None);
    }

    fn on_shutdown(&mut self, cx: &mut Cx, token: Token, conn: &mut Conn) {
        let record = self.about(cx, "on_shutdown", token, conn);
        assert!(!record.closing && !record.notified, "an unwanted on_shutdown: {record:?}");
        record.notified = true;
        assert!(self.shutting_down.is_some(), "there is no shutdown");
        if sys::percent(70) {
            cx.close(token);
            let record = &mut self.records[conn.record];
            record.closing = true;
            record.drain_due = false;
            record.deadlines.clear();
        }
        self.leave(cx, Some(token));
    }

    fn on_wake(&mut self, cx: &mut Cx) {
        self.enter("on_wake");
        assert!(std::mem::take(&mut self.wake_due), "the waker was not used");
        self.leave(cx, None);
    }

    fn on_ready(&mut self, cx: &mut Cx, watch: WatchId, _readiness: Readiness) {
        self.enter("on_ready");
        let interest = self.watches.get(&watch).expect("the watch exists");
        assert_ne!(*interest, Interest::Nothing);
        assert!(cx.watched(watch).is_some());
        sys::read_watched();
        self.leave(cx, None);
    }

    fn on_signal(&mut self, cx: &mut Cx, _signal: Signal) {
        self.enter("on_signal");
        self.signals_seen += 1;
        self.leave(cx, None);
    }
}

/// Checks the reason that is passed to `on_close`.
fn check_reason(record: &Record, shutting_down: bool, reason: &CloseReason, now: Instant) {
    let wire = sys::wire(record.serial);
    assert!(
        record.written.starts_with(&wire.sent),
        "the sent bytes differ from those that were written"
    );
    let all_sent = wire.sent.len() == record.written.len();
    match reason {
        CloseReason::Closed | CloseReason::PeerClosed => {
            assert!(record.closing || shutting_down, "close was not called: {record:?}");
            assert!(all_sent, "bytes were not sent: {record:?}");
            let by_peer = matches!(reason, CloseReason::PeerClosed);
            assert_eq!(
                by_peer,
                record.phase == Phase::Ended,
                "the wrong side is reported as closing: {record:?}"
            );
        }
        CloseReason::Finished => {
            let finished = record.finished && record.phase == Phase::Ended;
            assert!(all_sent && finished, "the connection is not finished: {record:?}");
        }
        CloseReason::Aborted => assert!(record.aborted, "abort was not called"),
        CloseReason::Failed(Error::Full { .. }) => assert!(record.cut_short, "the write did fit"),
        CloseReason::Failed(error) => assert!(error.errno().is_some(), "{error}"),
        CloseReason::ConnectFailed(_) => assert!(!record.is_open(), "the connection was open"),
        CloseReason::ConnectTimedOut => {
            assert!(!record.is_open(), "the connection was open");
            assert!(
                record.deadline.is_some_and(|deadline| deadline <= now),
                "the timeout had not expired"
            );
        }
        CloseReason::FlushTimedOut => {
            assert!(record.closing || shutting_down, "close was not called: {record:?}");
        }
        CloseReason::ShutDown => assert!(shutting_down, "there is no shutdown: {record:?}"),
        CloseReason::Detached(detached) => {
            assert!(record.detached, "detach was not called: {record:?}");
            for (place, &byte) in (record.received..).zip(&detached.unread) {
                assert_eq!(byte, sys::byte_of(record.serial, place), "bytes are lost: {record:?}");
            }
            let written = [&wire.sent[..], &detached.unsent].concat();
            assert_eq!(written, record.written, "bytes are lost: {record:?}");
        }
    }
}
