//! The run: a list of phases over the reactor, and what they share.
//!
//! A connect counts as under way until its connection is up: answered, or open where no proof is asked for. This many may
//! be under way at once: no backlog overflows. What fails is tried elsewhere, tried again, or ends the ramp; what is
//! held by then goes on to the hold and the second proof all the same. No phase can last for ever: each attempt and
//! each proof has its time, and a phase in which nothing succeeds for about twice that time ends.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::process;
use std::time::{Duration, Instant};

use c1000k_host::command_line;
use c1000k_host::format;
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

/// How often progress is shown and stalls are looked for.
pub(crate) const TICK: Duration = Duration::from_secs(1);

/// What the run is to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Connections to open.
    pub goal: u32,
    /// Have each connection answer when it opens, and once more after the hold.
    pub verify: bool,
    /// How long all of them are held.
    pub hold: Duration,
    /// What is sent meanwhile.
    pub workload: Option<schedule::Workload>,
    /// For a connect, and for an echo.
    pub timeout: Duration,
    /// Connects, and later proofs, under way at once at most.
    pub in_flight_max: usize,
    /// How fast connects are started during the ramp; none: as fast as may be.
    pub stages: Vec<Stage>,
    /// Connections closed and opened anew each second of the hold.
    pub churn_per_second: Option<u64>,
    /// After the hold all are closed at once and opened anew.
    pub storm: bool,
    /// Where figures are shown each second.
    pub endpoint: Option<Endpoint>,
    /// What the kernel chooses local ports from; `None` where it can't be read.
    pub local_ports: Option<RangeInclusive<u16>>,
    /// This many connections in a row that the server drops, or that fail finally, end the ramp.
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

/// State of one connection, stored a million times; `S` is the protocol's part.
#[derive(Debug)]
pub struct Conn<S> {
    /// Counted from 1; it is part of the message.
    pub(crate) number: u32,
    /// Its pair in the plan.
    pub(crate) pair: u32,
    /// When its connect was started, or the message that it waits for was due, in microseconds of the run; it may wrap
    /// around.
    since_us: u32,
    pub(crate) stage: ConnStage,
    pub(crate) fault: Option<Fault>,
    /// Attempts before this one.
    pub(crate) retries: u8,
    state: S,
}

const _: () = assert!(size_of::<Conn<<crate::protocols::Echo as Protocol>::State>>() <= 16);

impl<S> Conn<S> {
    /// Whether nothing has been found wrong with it.
    pub(crate) fn is_usable(&self) -> bool {
        self.fault.is_none()
    }
}

/// The context of a run with this protocol.
pub(crate) type Cx<P> = Context<Conn<<P as Protocol>::State>>;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnStage {
    Connecting,
    /// What comes first has been sent, and waits for its answer.
    Opening,
    /// Held, and nothing is waited for.
    Up,
    /// Held, and a heartbeat waits for its answer.
    Asked,
}

/// Why the client itself gave a connection up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The peer ended the stream.
    Eof,
    /// The answer did not come in time.
    TimedOut,
    /// Another answer came than was asked for.
    Mismatch,
    /// The peer is the connection itself.
    SelfConnected,
    /// It was closed as a part of the test, and is no loss.
    Closed,
}

/// What the phases of a run share.
#[derive(Debug)]
pub(crate) struct Run<'a, P> {
    pub(crate) settings: Settings,
    /// By target.
    protocols: Vec<P>,
    pub(crate) progress: &'a Progress,
    pub(crate) stats: RunStats,
    pub(crate) phase_began: Instant,
    pub(crate) opening: Opening,
    /// Heartbeats that wait for their answers.
    pub(crate) in_flight: usize,
    stall: Stall,
    /// All phases but the last are left out from now on.
    ends_early: bool,
    /// What the protocol sends; empty in between.
    out: Vec<u8>,
}

/// Finds out that nothing succeeds any more. It counts ticks and not time, so that a process that was stopped for a
/// while does not believe that its peers were silent all along.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    ticks: u32,
    had_success: bool,
}

impl Stall {
    pub(crate) fn note_success(&mut self) {
        self.had_success = true;
    }

    /// Counts a tick; says how long nothing has succeeded.
    pub(crate) fn tick(&mut self) -> Duration {
        self.ticks = if std::mem::take(&mut self.had_success) { 0 } else { self.ticks + 1 };
        TICK * self.ticks
    }
}

impl<P: Protocol> Run<'_, P> {
    pub(crate) fn new_conn(&self, number: u32, pair: u32, retries: u8) -> Conn<P::State> {
        Conn {
            number,
            pair,
            since_us: self.run_us(Instant::now()),
            stage: ConnStage::Connecting,
            fault: None,
            retries,
            state: self.protocol_of(number).state(),
        }
    }

    fn protocol_of(&self, number: u32) -> &P {
        &self.protocols[self.opening.target_of(number)]
    }

    /// The counters of the connection's target.
    pub(crate) fn target_of(&mut self, conn: &Conn<P::State>) -> &mut TargetStats {
        &mut self.stats.targets[self.opening.target_of(conn.number)]
    }

    /// Sends what comes first on a connection that has opened.
    pub(crate) fn open(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Conn<P::State>) {
        conn.stage = ConnStage::Opening;
        let target = self.opening.target_of(conn.number);
        self.protocols[target].open(&mut conn.state, conn.number, &mut self.out);
        self.send(cx, token);
        cx.set_timeout(token, self.settings.timeout);
    }

    /// Sends a heartbeat that was due then.
    pub(crate) fn ask(&mut self, cx: &mut Cx<P>, token: Token, due: Instant) {
        let Some(conn) = cx.conn_mut(token) else { return };
        conn.since_us = self.run_us(due);
        self.write_heartbeat(conn);
        self.send_heartbeat(cx, token);
    }

    /// Sends one more heartbeat, which was due this long after the last one.
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

    /// Where the connection does not take the bytes, `on_close` follows and tells why.
    fn send(&mut self, cx: &mut Cx<P>, token: Token) {
        let _ = cx.write(token, &self.out);
        self.out.clear();
    }

    /// Hands the protocol what came in; says whether that was all that the connection waited for.
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

    /// One more answer in this pass.
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

    /// The connection is up.
    pub(crate) fn note_up(&mut self, conn: &mut Conn<P::State>) {
        conn.stage = ConnStage::Up;
        self.stall.note_success();
        self.stats.hold_one();
        self.target_of(conn).hold_one();
        self.progress.advance(self.stats.held);
    }

    /// A connection that was held has gone.
    pub(crate) fn note_loss(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        let errno = match conn.fault {
            Some(Fault::TimedOut) => Some(Errno::ETIMEDOUT),
            Some(Fault::Mismatch) => Some(Errno::EBADMSG),
            _ => None,
        };
        if let Some(errno) = errno {
            self.stats.failures.count_errno(errno);
        }
        self.stats.lost_in_part += u64::from(self.has_part(conn));
        self.stats.lose_one(errno.or_else(|| errno_of(reason)));
        self.target_of(conn).lose_one();
        if conn.stage == ConnStage::Asked {
            self.in_flight -= 1;
        }
    }

    /// Whether the connection had a part of the answer that it waited for.
    pub(crate) fn has_part(&self, conn: &Conn<P::State>) -> bool {
        conn.fault != Some(Fault::Mismatch) && self.protocol_of(conn.number).has_part(&conn.state)
    }

    /// The client gives the connection up; `on_close` follows.
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

    /// Shows the figures of this moment.
    fn publish(&self) {
        if let Some(endpoint) = &self.settings.endpoint {
            let snapshot = Snapshot::of(&self.stats, self.settings.goal);
            endpoint.publish(exposition::PREFIX, Box::new(snapshot));
        }
    }

    /// Connects and messages that wait for the server.
    pub(crate) fn under_way(&self) -> usize {
        self.opening.under_way + self.in_flight
    }

    /// Opens no more connections; the first reason counts.
    pub(crate) fn stop(&mut self, stop: Stop) {
        self.stats.stop(stop);
        self.opening.stop();
    }

    /// A connection was closed as a part of the test.
    pub(crate) fn note_closed(&mut self, conn: &Conn<P::State>) {
        self.stats.held -= 1;
        self.target_of(conn).held -= 1;
        self.opening.reopen(conn.number);
    }

    /// Goes on with the last phase.
    pub(crate) fn end_early(&mut self) {
        self.ends_early = true;
    }

    fn patience(&self) -> Duration {
        patience(self.settings.timeout, self.stats.peak)
    }

    /// Microseconds of the run; they wrap around after 71 minutes.
    fn run_us(&self, at: Instant) -> u32 {
        at.saturating_duration_since(self.stats.started).as_micros() as u32
    }

    /// Since its connect was started, or its message was due; at most 71 minutes.
    pub(crate) fn age(&self, conn: &Conn<P::State>) -> Duration {
        let age_us = self.run_us(Instant::now()).wrapping_sub(conn.since_us);
        Duration::from_micros(u64::from(age_us))
    }
}

/// The service of a client's reactor: takes a run through its phases.
#[derive(Debug)]
pub struct Client<'a, P> {
    run: Run<'a, P>,
    phase: AnyPhase,
    /// Those that follow.
    phases: VecDeque<AnyPhase>,
    tick: Option<TimerId>,
    /// Enters the next phase.
    next_phase: Option<TimerId>,
    is_signalled: bool,
}

impl<'a, P: Protocol> Client<'a, P> {
    /// Connections to these servers, at least one; what is counted goes into `stats`.
    ///
    /// # Errors
    /// No descriptor is left for the clock of a workload.
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

    /// Enters the first phase; the rest follows from events.
    pub fn start(&mut self, cx: &mut Cx<P>) {
        self.tick = arm(cx, TICK);
        self.phase.enter(cx, &mut self.run);
        self.go_on(cx);
    }

    /// What was counted.
    pub fn into_stats(self) -> RunStats {
        self.run.stats
    }

    /// Enters the phase that follows, as long as the present one is done.
    fn go_on(&mut self, cx: &mut Cx<P>) {
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

    /// The same from a callback that has borrowed a connection, which the next phase could not use meanwhile.
    fn go_on_later(&mut self, cx: &mut Cx<P>) {
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
        self.go_on_later(cx);
    }

    fn on_data(&mut self, cx: &mut Cx<P>, token: Token, conn: &mut Self::Conn, bytes: &mut [u8]) {
        if self.run.settings.verify && self.run.receive(cx, token, conn, bytes) {
            self.phase.on_answer(cx, &mut self.run, token, conn);
            self.go_on_later(cx);
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
        self.go_on(cx);
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, timer: TimerId) {
        if self.tick == Some(timer) {
            self.tick(cx);
        } else if self.next_phase == Some(timer) {
            self.next_phase = None;
        } else {
            self.phase.on_timer(cx, &mut self.run, timer);
        }
        self.go_on(cx);
    }

    fn on_ready(&mut self, cx: &mut Cx<P>, watch: WatchId, _readiness: Readiness) {
        self.phase.on_ready(cx, &mut self.run, watch);
        self.go_on(cx);
    }

    /// The first signal ends the run early and in order, the second at once.
    fn on_signal(&mut self, cx: &mut Cx<P>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.run.progress.end();
            command_line::flush_log();
            process::exit(if signal == Signal::Interrupt { 130 } else { 143 });
        }
        // Where all is done but the closing, there is nothing left to end early.
        if !self.is_last_phase() {
            self.run.stats.stop = Some(Stop::Interrupted);
            self.run.opening.stop();
            self.run.progress.warn("ending early; a second signal leaves at once");
            self.run.end_early();
            self.go_on(cx);
        }
    }
}

/// How long nothing may succeed: for the first success one attempt is enough, later hiccups get another one.
pub(crate) fn patience(timeout: Duration, peak: u64) -> Duration {
    let attempts = if peak == 0 { 1 } else { 2 };
    timeout * attempts + TICK
}

/// There are always more timers to be had than the few of a run.
pub(crate) fn arm<C>(cx: &mut Context<C>, after: Duration) -> Option<TimerId> {
    cx.add_timer(after).ok()
}

pub(crate) fn cancel<C>(cx: &mut Context<C>, timer: &mut Option<TimerId>) {
    if let Some(timer) = timer.take() {
        cx.cancel_timer(timer);
    }
}

/// `, 12 lost`, or nothing where there are none.
pub(crate) fn some(count: u64, what: &str) -> String {
    if count == 0 { String::new() } else { format!(", {} {what}", format::count(count)) }
}

/// What the system said of a failed attempt; the attempt's own time-out counts as the system's.
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
