//! The run: a list of phases over the reactor, and what they share.
//!
//! A connect is in flight until its connection is up: answered, or without verification open. The number in flight is
//! bounded, so that no backlog overflows. A failed attempt is tried on another route, retried, or ends the ramp; the
//! connections held by then still go through the hold and the second verification. Every phase ends: each attempt and
//! each answer has a timeout, and a phase in which nothing succeeds for about twice that time ends.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::process;
use std::time::{Duration, Instant};

use c1000k_host::command_line;
use c1000k_host::format;
use c1000k_record::ConnectionBytes;
use c1000k_record::endpoint::Endpoint;
use nix::errno::Errno;
use reactor::{
    CloseReason, Context, Error, Handler, Incoming, Readiness, Signal, TimerId, Token, WatchId,
};

use crate::destination::Destination;
use crate::exposition::{self, Snapshot};
use crate::opening::Opening;
use crate::pacing::Stage;
use crate::phases::{AnyPhase, Drain, Hold, Phase, Ramp, Storm, Verify};
use crate::plan::Plan;
use crate::progress::Progress;
use crate::protocols::{Answer, Protocol};
use crate::schedule;
use crate::stats::{RunStats, Stop};
use crate::target_stats::TargetStats;

/// The interval of progress and of the check for stalls.
pub(crate) const TICK: Duration = Duration::from_secs(1);

/// The reactor's memory of an idle connection without its state.
const SLOT_BYTES: u64 = 24;

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Connections to open.
    pub goal: u32,
    /// Verify each connection when it opens, and again after the hold.
    pub verify: bool,
    /// How long all of them are held.
    pub hold: Duration,
    /// The messages sent during the hold.
    pub workload: Option<schedule::Workload>,
    /// The timeout of a connect, and of an echo.
    pub timeout: Duration,
    /// The maximum of connects, and later verifications, in flight.
    pub in_flight_max: usize,
    /// The rates of connects during the ramp; empty: as fast as possible.
    pub stages: Vec<Stage>,
    /// Connections closed and reopened in each second of the hold.
    pub churn_per_second: Option<u64>,
    /// After the hold, close all connections at once and reopen them.
    pub storm: bool,
    /// Where the figures of each second are published.
    pub endpoint: Option<Endpoint>,
    /// The range of the kernel's local ports; `None` if it can't be read.
    pub local_ports: Option<RangeInclusive<u16>>,
    /// This many consecutive connections to a target that the server drops, or that fail permanently, end its ramp.
    pub consecutive_failures_max: u32,
}

/// A target of the run.
#[derive(Debug)]
pub struct Server<P> {
    /// Where it is.
    pub destination: Destination,
    /// The routes to it.
    pub plan: Plan,
    /// What is sent to it.
    pub protocol: P,
}

/// The state of a connection, which is kept small; `S` is the protocol's part.
#[derive(Debug)]
pub struct Conn<S> {
    /// Counted from 1; it is part of the message.
    pub(crate) number: u32,
    /// The pair in the plan.
    pub(crate) pair: u32,
    /// When the connect was started, or the unanswered message was due, in microseconds since the start of the run; it
    /// may wrap around.
    since_us: u32,
    pub(crate) stage: ConnStage,
    pub(crate) fault: Option<Fault>,
    /// Attempts before this one.
    pub(crate) retries: u8,
    state: S,
}

const _: () = assert!(size_of::<Conn<<crate::protocols::Echo as Protocol>::State>>() <= 16);

impl<S> Conn<S> {
    /// Whether no fault was found.
    pub(crate) fn is_usable(&self) -> bool {
        self.fault.is_none()
    }
}

/// The context of a run with this protocol.
pub(crate) type Cx<P> = Context<Conn<<P as Protocol>::State>>;

/// The stage of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnStage {
    Connecting,
    /// The first message was sent and is not answered yet.
    Opening,
    /// Held, without an unanswered message.
    Up,
    /// Held, with an unanswered heartbeat.
    Asked,
}

/// Why the client itself closed a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The peer ended the stream.
    Eof,
    /// The answer did not come in time.
    TimedOut,
    /// The answer was wrong.
    Mismatch,
    /// It is connected to itself.
    SelfConnected,
    /// It was closed as a part of the test, which is not a loss.
    Closed,
}

/// The state that the phases of a run share.
#[derive(Debug)]
pub(crate) struct Run<'a, P> {
    pub(crate) settings: Settings,
    /// By target.
    protocols: Vec<P>,
    pub(crate) progress: &'a Progress,
    pub(crate) stats: RunStats,
    pub(crate) phase_began: Instant,
    pub(crate) opening: Opening,
    /// Unanswered heartbeats.
    pub(crate) in_flight: usize,
    stall: Stall,
    /// All phases except the last are skipped from now on.
    ends_early: bool,
    /// The protocol's output buffer; empty between calls.
    out: Vec<u8>,
}

/// Detects that nothing succeeds any more. It counts ticks instead of time, so that the time in which the process was
/// stopped does not count.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    ticks: u32,
    had_success: bool,
}

impl Stall {
    pub(crate) fn note_success(&mut self) {
        self.had_success = true;
    }

    /// Counts a tick; returns for how long nothing has succeeded.
    pub(crate) fn tick(&mut self) -> Duration {
        self.ticks = if std::mem::take(&mut self.had_success) { 0 } else { self.ticks + 1 };
        TICK * self.ticks
    }
}

impl<P: Protocol> Run<'_, P> {
    /// A connection whose latency counts from `since`.
    pub(crate) fn new_conn(
        &self,
        number: u32,
        pair: u32,
        retries: u8,
        since: Instant,
    ) -> Conn<P::State> {
        Conn {
            number,
            pair,
            since_us: self.run_us(since),
            stage: ConnStage::Connecting,
            fault: None,
            retries,
            state: self.protocol_of(number).state(),
        }
    }

    /// Its age counts from now on.
    pub(crate) fn restart_age(&self, conn: &mut Conn<P::State>) {
        conn.since_us = self.run_us(Instant::now());
    }

    fn protocol_of(&self, number: u32) -> &P {
        &self.protocols[self.opening.target_of(number)]
    }

    /// The counters of the connection's target.
    pub(crate) fn target_of(&mut self, conn: &Conn<P::State>) -> &mut TargetStats {
        &mut self.stats.targets[self.opening.target_of(conn.number)]
    }

    /// Sends the first message on a connection that has opened.
    pub(crate) fn open(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Conn<P::State>) {
        conn.stage = ConnStage::Opening;
        let target = self.opening.target_of(conn.number);
        self.protocols[target].open(&mut conn.state, conn.number, &mut self.out);
        self.send(cx, token);
        cx.set_timeout(token, self.settings.timeout);
    }

    /// Sends a heartbeat that was due at this time.
    pub(crate) fn ask(&mut self, cx: &mut Cx<P>, token: Token, due: Instant) {
        let Some(conn) = cx.conn_mut(token) else { return };
        conn.since_us = self.run_us(due);
        self.write_heartbeat(conn);
        self.send_heartbeat(cx, token);
    }

    /// Sends another heartbeat, which was due this long after the previous one.
    pub(crate) fn ask_again(
        &mut self,
        cx: &mut Cx<P>,
        token: Token,
        conn: &mut Conn<P::State>,
        period: Duration,
    ) {
        conn.since_us = conn.since_us.wrapping_add(period.as_micros() as u32);
        self.write_heartbeat(conn);
        self.send_heartbeat(cx, token);
    }

    fn write_heartbeat(&mut self, conn: &mut Conn<P::State>) {
        conn.stage = ConnStage::Asked;
        let target = self.opening.target_of(conn.number);
        self.protocols[target].heartbeat(&mut conn.state, conn.number, &mut self.out);
    }

    fn send_heartbeat(&mut self, cx: &mut Cx<P>, token: Token) {
        self.in_flight += 1;
        self.send(cx, token);
        cx.set_timeout(token, self.settings.timeout);
    }

    /// If the connection does not accept the bytes, `on_close` follows with the reason.
    fn send(&mut self, cx: &mut Cx<P>, token: Token) {
        let _ = cx.write(token, &self.out);
        self.out.clear();
    }

    /// Passes received bytes to the protocol; returns whether the answer is complete.
    fn receive(
        &mut self,
        cx: &mut Cx<P>,
        token: Token,
        conn: &mut Conn<P::State>,
        bytes: &[u8],
    ) -> bool {
        let protocol = &self.protocols[self.opening.target_of(conn.number)];
        let answer = protocol.receive(&mut conn.state, conn.number, bytes, &mut self.out);
        if !self.out.is_empty() {
            self.send(cx, token);
        }
        match answer {
            Answer::Partial => {}
            Answer::Complete => cx.clear_timeout(token),
            Answer::Mismatch => {
                if self.stats.complaint.is_none() {
                    self.stats.complaint = self.protocol_of(conn.number).complaint();
                }
                self.give_up(cx, token, conn, Fault::Mismatch);
            }
        }
        answer == Answer::Complete
    }

    /// Counts an answer in this pass.
    pub(crate) fn count_answer(&mut self) {
        if let Some(pass) = self.stats.verified_passes.last_mut() {
            *pass += 1;
        }
    }

    /// A heartbeat was answered.
    pub(crate) fn note_answer(&mut self, conn: &mut Conn<P::State>) {
        conn.stage = ConnStage::Up;
        self.in_flight -= 1;
        self.stall.note_success();
    }

    /// The connection is up; `is_again`: it was held before.
    pub(crate) fn note_up(&mut self, conn: &mut Conn<P::State>, is_again: bool) {
        conn.stage = ConnStage::Up;
        self.stall.note_success();
        if is_again {
            self.stats.hold_again();
            self.target_of(conn).hold_again();
        } else {
            self.stats.hold_one();
            self.target_of(conn).hold_one();
        }
        self.progress.advance(self.stats.held);
    }

    /// A held connection has ended.
    pub(crate) fn note_loss(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        let errno = match conn.fault {
            Some(Fault::TimedOut) => Some(Errno::ETIMEDOUT),
            Some(Fault::Mismatch) => Some(Errno::EBADMSG),
            _ => None,
        };
        self.stats.lost_in_part += u64::from(self.has_part(conn));
        self.stats.lose_one(errno.or_else(|| errno_of(reason)));
        self.target_of(conn).lose_one();
        if conn.stage == ConnStage::Asked {
            self.in_flight -= 1;
        }
    }

    /// Whether the connection had received a part of the answer.
    pub(crate) fn has_part(&self, conn: &Conn<P::State>) -> bool {
        conn.fault != Some(Fault::Mismatch) && self.protocol_of(conn.number).has_part(&conn.state)
    }

    /// The client closes the connection; `on_close` follows.
    pub(crate) fn give_up(
        &mut self,
        cx: &mut Cx<P>,
        token: Token,
        conn: &mut Conn<P::State>,
        fault: Fault,
    ) {
        conn.fault = Some(fault);
        cx.abort(token);
    }

    /// Publishes the present figures.
    fn publish(&self) {
        if let Some(endpoint) = &self.settings.endpoint {
            let snapshot = Snapshot::of(&self.stats, self.settings.goal);
            endpoint.publish(exposition::PREFIX, Box::new(snapshot));
        }
    }

    /// Connects and messages that the server has not answered yet.
    pub(crate) fn all_in_flight(&self) -> usize {
        self.opening.in_flight + self.in_flight
    }

    /// Opens no more connections; the first reason counts.
    pub(crate) fn stop(&mut self, stop: Stop) {
        self.stats.stop(stop);
        self.opening.stop();
    }

    /// A connection was closed as a part of the test.
    pub(crate) fn note_closed(&mut self, conn: &Conn<P::State>) {
        self.stats.held -= 1;
        let target = self.target_of(conn);
        target.held -= 1;
        target.away += 1;
        self.opening.reopen(conn.number);
    }

    /// Continues with the last phase.
    pub(crate) fn end_early(&mut self) {
        self.ends_early = true;
    }

    /// From here on the time in which nothing succeeds is counted anew.
    pub(crate) fn restart_stall(&mut self) {
        self.stall = Stall::default();
    }

    pub(crate) fn patience(&self) -> Duration {
        patience(self.settings.timeout, self.stats.peak)
    }

    /// Microseconds since the start of the run; they wrap around after 71 minutes.
    fn run_us(&self, at: Instant) -> u32 {
        at.saturating_duration_since(self.stats.started).as_micros() as u32
    }

    /// Time since the connect was started, or the message was due; at most 71 minutes.
    pub(crate) fn age(&self, conn: &Conn<P::State>) -> Duration {
        let age_us = self.run_us(Instant::now()).wrapping_sub(conn.since_us);
        Duration::from_micros(u64::from(age_us))
    }
}

/// The handler of a client's reactor: runs the phases.
#[derive(Debug)]
pub struct Client<'a, P> {
    run: Run<'a, P>,
    phase: AnyPhase,
    /// The phases that follow.
    phases: VecDeque<AnyPhase>,
    tick: Option<TimerId>,
    /// Enters the next phase.
    next_phase: Option<TimerId>,
    is_signalled: bool,
}

impl<'a, P: Protocol> Client<'a, P> {
    /// A run to these servers, at least one, which counts in `stats`.
    ///
    /// # Errors
    /// No descriptor is left for the timer of a workload.
    pub fn new(
        settings: Settings,
        servers: Vec<Server<P>>,
        mut stats: RunStats,
        progress: &'a Progress,
    ) -> Result<Self, Errno> {
        let (mut destinations, mut protocols) = (Vec::new(), Vec::new());
        for Server { destination, plan, protocol } in servers {
            stats.expected = protocol.expected();
            stats.targets.push(TargetStats::new(destination.clone()));
            destinations.push((destination, plan));
            protocols.push(protocol);
        }
        stats.usage.layers = Some(layers::<P>());
        let mut phases = VecDeque::from([Hold::new(&settings)?.into()]);
        if settings.storm {
            phases.push_back(Storm::default().into());
        }
        if settings.verify {
            phases.push_back(Verify::default().into());
        }
        phases.push_back(Drain::default().into());
        let run = Run {
            opening: Opening::new(destinations, settings.goal),
            settings,
            protocols,
            progress,
            phase_began: stats.started,
            stats,
            in_flight: 0,
            stall: Stall::default(),
            ends_early: false,
            out: Vec::new(),
        };
        Ok(Self {
            run,
            phase: Ramp::default().into(),
            phases,
            tick: None,
            next_phase: None,
            is_signalled: false,
        })
    }

    /// Enters the first phase; the others follow by events.
    pub fn start(&mut self, cx: &mut Cx<P>) {
        self.tick = arm(cx, TICK);
        self.phase.enter(cx, &mut self.run);
        self.advance_phases(cx);
    }

    /// The counters.
    pub fn into_stats(self) -> RunStats {
        self.run.stats
    }

    /// Enters the next phase if the present one is done, and so on.
    fn advance_phases(&mut self, cx: &mut Cx<P>) {
        while self.is_phase_over(cx) {
            self.phase.end(cx, &mut self.run);
            let next = if self.run.ends_early {
                self.phases.drain(..).next_back()
            } else {
                self.phases.pop_front()
            };
            let Some(next) = next else { return cx.stop() };
            self.phase = next;
            self.run.phase_began = Instant::now();
            self.run.stall = Stall::default();
            self.phase.enter(cx, &mut self.run);
        }
    }

    /// The same from a callback that has borrowed a connection, which the next phase could not use in the meantime.
    fn advance_phases_later(&mut self, cx: &mut Cx<P>) {
        if self.next_phase.is_none() && self.is_phase_over(cx) {
            self.next_phase = arm(cx, Duration::ZERO);
        }
    }

    fn is_phase_over(&self, cx: &Cx<P>) -> bool {
        self.phase.is_done(cx, &self.run) || (self.run.ends_early && !self.is_last_phase())
    }

    fn is_last_phase(&self) -> bool {
        self.phases.is_empty()
    }

    fn tick(&mut self, cx: &mut Cx<P>) {
        self.tick = arm(cx, TICK);
        self.run.publish();
        self.run.stats.sample_hold(Instant::now());
        let is_stalled = self.run.stall.tick() > self.run.patience();
        self.phase.tick(cx, &mut self.run, is_stalled);
    }
}

impl<P: Protocol> Handler for Client<'_, P> {
    type Conn = Conn<P::State>;

    fn on_accept(&mut self, _: &mut Cx<P>, _: &Incoming<'_>) -> Option<Self::Conn> {
        None
    }

    fn on_open(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Self::Conn) {
        self.phase.on_open(cx, &mut self.run, token, conn);
        self.advance_phases_later(cx);
    }

    fn on_data(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Self::Conn, bytes: &mut [u8]) {
        if self.run.settings.verify && self.run.receive(cx, token, conn, bytes) {
            self.phase.on_answer(cx, &mut self.run, token, conn);
            self.advance_phases_later(cx);
        }
    }

    fn on_eof(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Self::Conn) {
        self.run.give_up(cx, token, conn, Fault::Eof);
    }

    fn on_timeout(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Self::Conn) {
        self.run.give_up(cx, token, conn, Fault::TimedOut);
    }

    fn on_close(&mut self, cx: &mut Cx<P>, _: Token, conn: Self::Conn, reason: CloseReason) {
        self.phase.on_close(cx, &mut self.run, &conn, &reason);
        self.advance_phases(cx);
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, timer: TimerId) {
        if self.tick == Some(timer) {
            self.tick(cx);
        } else if self.next_phase == Some(timer) {
            self.next_phase = None;
        } else {
            self.phase.on_timer(cx, &mut self.run, timer);
        }
        self.advance_phases(cx);
    }

    fn on_ready(&mut self, cx: &mut Cx<P>, watch: WatchId, _readiness: Readiness) {
        self.phase.on_ready(cx, &mut self.run, watch);
        self.advance_phases(cx);
    }

    /// The first signal ends the run early and in order, the second one immediately.
    fn on_signal(&mut self, cx: &mut Cx<P>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.run.progress.end();
            command_line::flush_log();
            process::exit(if signal == Signal::Interrupt { 130 } else { 143 });
        }
        // During the teardown there is nothing to end early.
        if !self.is_last_phase() {
            self.run.stats.stop = Some(Stop::Interrupted);
            self.run.opening.stop();
            self.run.progress.warn("ending early; a second signal exits immediately");
            self.run.end_early();
            self.advance_phases(cx);
        }
    }
}

/// The memory of a connection in this process, by the sizes of its parts.
fn layers<P: Protocol>() -> ConnectionBytes {
    let own = size_of::<Conn<P::State>>() - size_of::<P::State>();
    ConnectionBytes { client: SLOT_BYTES + own as u64, ..P::connection_bytes() }
}

/// How long nothing may succeed: one timeout before the first success, two after it.
pub(crate) fn patience(timeout: Duration, peak: u64) -> Duration {
    let attempts = if peak == 0 { 1 } else { 2 };
    timeout * attempts + TICK
}

/// A run has few timers, so the reactor's bound is never reached.
pub(crate) fn arm<C>(cx: &mut Context<C>, after: Duration) -> Option<TimerId> {
    cx.add_timer(after).ok()
}

pub(crate) fn cancel<C>(cx: &mut Context<C>, timer: &mut Option<TimerId>) {
    if let Some(timer) = timer.take() {
        cx.cancel_timer(timer);
    }
}

/// `, 12 lost`, or nothing for zero.
pub(crate) fn some(count: u64, what: &str) -> String {
    if count == 0 { String::new() } else { format!(", {} {what}", format::count(count)) }
}

/// The errno of a failed attempt, which is ETIMEDOUT for the attempt's own timeout.
pub(crate) fn errno_of(reason: &CloseReason) -> Option<Errno> {
    match reason {
        CloseReason::ConnectFailed(error) | CloseReason::Failed(error) => errno(error),
        CloseReason::ConnectTimedOut => Some(Errno::ETIMEDOUT),
        _ => None,
    }
}

pub(crate) fn errno(error: &Error) -> Option<Errno> {
    error.errno().map(Errno::from_raw)
}
