//! The run as a state machine over the reactor: ramp, hold, prove again, tear down.
//!
//! A connect counts as under way until its connection is proven (or open, where no proof is asked for), and so many may
//! be under way at once: no backlog overflows. What fails is tried elsewhere, tried again, or ends the ramp; what is
//! held by then goes on to the hold and the second proof all the same. No stage can last for ever: each attempt and
//! each proof has its time, and a stage in which nothing succeeds for about twice that time ends.

mod proof;
mod ramp;
mod teardown;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::process;
use std::time::{Duration, Instant};

use c1000k_host::command_line::{self, ZonedIp};
use c1000k_host::format::{self, rate};
use c1000k_report::record::per_second;
use nix::errno::Errno;
use reactor::{CloseReason, Context, Error, Handler, Incoming, Signal, TimerId, Token};

use crate::failures::Retries;
use crate::pace::Pace;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::tally::{Stop, Tally};

/// How often progress is shown and stalls are looked for.
const TICK: Duration = Duration::from_secs(1);

/// Without a proof to wait for, a connection that is dropped as young as this was never let in.
const PROBATION: Duration = Duration::from_secs(1);

/// What the run is to do.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The server's address; the port is the plan's.
    pub(crate) server: ZonedIp,
    /// Connections to open.
    pub(crate) goal: u32,
    pub(crate) verify: bool,
    pub(crate) hold: Duration,
    /// For a connect, and for an echo.
    pub(crate) timeout: Duration,
    /// Connects, and later proofs, under way at once at the most.
    pub(crate) in_flight_max: usize,
    pub(crate) rate_per_second: Option<u64>,
    /// What the kernel chooses local ports from; `None` where it can't be read.
    pub(crate) local_ports: Option<RangeInclusive<u16>>,
    /// So many connections in a row that the server drops, or that fail for good, end the ramp.
    pub(crate) setbacks_max: u32,
}

/// State of one connection, stored a million times.
#[derive(Debug)]
pub(crate) struct Conn {
    /// Counted from 1; it is part of the message.
    number: u32,
    /// Its pair in the plan.
    pair: u32,
    /// When its connect was started, in microseconds of the run; it may wrap around.
    started_us: u32,
    stage: ConnStage,
    fault: Option<Fault>,
    /// Bytes of the echo that have come back.
    matched: u8,
    /// Attempts before this one.
    retries: u8,
}

const _: () = assert!(size_of::<Conn>() <= 16);

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnStage {
    Connecting,
    FirstProof,
    Held,
    SecondProof,
}

/// Why the client itself gave a connection up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The peer ended the stream.
    Eof,
    /// The echo did not come in time.
    Late,
    /// Other bytes came than were sent.
    Garbled,
    /// The peer is the connection itself.
    SelfConnected,
}

/// What all connections are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Ramp,
    Hold,
    Proof,
    Teardown,
}

/// The timers that a stage has armed. They end with it, however it ends.
#[derive(Debug, Default)]
struct StageTimers {
    retry: Option<TimerId>,
    pace: Option<TimerId>,
    settle: Option<TimerId>,
    hold: Option<TimerId>,
    slice: Option<TimerId>,
}

impl StageTimers {
    fn cancel(self, cx: &mut Context<Conn>) {
        for timer in [self.retry, self.pace, self.settle, self.hold, self.slice] {
            timer.map(|timer| cx.cancel_timer(timer));
        }
    }
}

/// The run.
#[derive(Debug)]
pub(crate) struct Flood<'a> {
    settings: Settings,
    plan: Plan,
    progress: &'a Progress,
    tally: Tally,
    stage: Stage,
    stage_began: Instant,
    timers: StageTimers,
    tick: Option<TimerId>,
    /// The next connection that was never tried.
    next_number: u32,
    /// Connections to be tried elsewhere at once.
    again: Vec<u32>,
    retries: Retries,
    pace: Option<Pace>,
    /// Attempts, or proofs, under way.
    in_flight: usize,
    /// Drops and final failures since there were last more connections held than ever.
    setbacks: u32,
    /// The slot from which the second proof or the teardown goes on.
    cursor: usize,
    stall: Stall,
    lost_at_tick: u64,
    held_at_tick: u64,
    is_signalled: bool,
}

/// Finds out that nothing succeeds any more. It counts ticks and not time, so that a process that was stopped for a
/// while does not believe that its peers were silent all along.
#[derive(Debug, Default)]
struct Stall {
    ticks: u32,
    had_success: bool,
}

impl Stall {
    fn note_success(&mut self) {
        self.had_success = true;
    }

    /// Counts a tick; says how long nothing has succeeded.
    fn tick(&mut self) -> Duration {
        self.ticks = if std::mem::take(&mut self.had_success) { 0 } else { self.ticks + 1 };
        TICK * self.ticks
    }
}

impl<'a> Flood<'a> {
    pub(crate) fn new(
        settings: Settings,
        plan: Plan,
        tally: Tally,
        progress: &'a Progress,
    ) -> Self {
        Self {
            pace: settings.rate_per_second.map(|rate| Pace::new(rate, tally.started)),
            stage_began: tally.started,
            settings,
            plan,
            progress,
            tally,
            stage: Stage::Ramp,
            timers: StageTimers::default(),
            tick: None,
            next_number: 1,
            again: Vec::new(),
            retries: Retries::default(),
            in_flight: 0,
            setbacks: 0,
            cursor: 0,
            stall: Stall::default(),
            lost_at_tick: 0,
            held_at_tick: 0,
            is_signalled: false,
        }
    }

    /// Opens the first connections; the rest follows from events.
    pub(crate) fn start(&mut self, cx: &mut Context<Conn>) {
        self.tick = arm(cx, TICK);
        self.tally.sample(self.tally.started);
        self.open_more(cx);
    }

    /// What was counted.
    pub(crate) fn into_tally(self) -> Tally {
        self.tally
    }

    /// Nothing more will be opened, and what is still under way never will be.
    fn end_ramp(&mut self, cx: &mut Context<Conn>) {
        self.tally.failures.count_unfinished(self.in_flight as u64);
        let unfinished = self.in_flight + self.again.len() + self.retries.give_up();
        self.tally.failed += unfinished as u64;
        self.again.clear();
        self.tally.sample(Instant::now());
        self.tally.verify_seconds =
            self.tally.verified_passes.iter().map(|_| self.tally.ramp.as_secs_f64()).collect();
        if !self.settings.verify && self.tally.turned_away > 0 {
            // Those that the server dropped were open for a moment, so the peak counted some of them.
            self.tally.peak = self.tally.held;
        }
        self.tell_closed_ports();
        if self.tally.held == 0 {
            return self.begin_teardown(cx);
        }
        self.enter(cx, Stage::Hold);
        self.progress.begin(
            "holding",
            &format!(
                "holding {} for {} s",
                format::counted(self.tally.held, "connection"),
                self.settings.hold.as_secs_f64()
            ),
        );
        // The reactor counts from the beginning of its turn, which may be a while ago.
        let end = self.stage_began + self.settings.hold;
        self.timers.hold = arm(cx, end.saturating_duration_since(cx.now()));
    }

    fn end_hold(&mut self, cx: &mut Context<Conn>) {
        self.tally.hold = Instant::now().duration_since(self.stage_began);
        if !self.settings.verify {
            return self.begin_teardown(cx);
        }
        self.enter(cx, Stage::Proof);
        if self.tally.held > 0 {
            self.progress.begin(
                "proving",
                &format!("proving {} again", format::counted(self.tally.held, "connection")),
            );
        }
        self.tally.verified_passes.push(0);
        self.cursor = 0;
        self.prove_more(cx);
    }

    fn enter(&mut self, cx: &mut Context<Conn>, stage: Stage) {
        self.stage = stage;
        self.stage_began = Instant::now();
        self.stall = Stall::default();
        std::mem::take(&mut self.timers).cancel(cx);
    }

    /// After something has ended: what comes next.
    fn go_on(&mut self, cx: &mut Context<Conn>) {
        match self.stage {
            Stage::Ramp => self.open_more(cx),
            Stage::Hold if self.tally.held == 0 => self.end_hold(cx),
            Stage::Proof => self.prove_more(cx),
            Stage::Hold | Stage::Teardown => {}
        }
    }

    fn tick(&mut self, cx: &mut Context<Conn>) {
        self.tick = arm(cx, TICK);
        let is_stalled = self.stall.tick() > self.patience();
        let is_losing = self.tally.lost > self.lost_at_tick;
        self.lost_at_tick = self.tally.lost;
        match self.stage {
            Stage::Ramp => {
                self.tally.sample(Instant::now());
                self.progress.tick(|| self.ramp_line());
                self.held_at_tick = self.tally.held;
                if is_stalled {
                    self.note_stall();
                }
                if is_stalled && self.tally.held == 0 {
                    self.end_ramp(cx);
                } else {
                    self.open_more(cx);
                }
            }
            Stage::Hold => {
                if is_losing {
                    self.progress.warn(&self.loss_line());
                } else if self.tally.has_lost_most() {
                    self.end_hold(cx);
                }
            }
            Stage::Proof => {
                self.progress.tick(|| self.proof_line());
                if is_stalled {
                    self.stop(Stop::ServerSilent);
                    self.begin_teardown(cx);
                }
            }
            Stage::Teardown => self.progress.tick(|| self.teardown_line(cx)),
        }
    }

    /// How long nothing may succeed: for the first success one attempt is enough, later hiccups get another one.
    fn patience(&self) -> Duration {
        let attempts = if self.tally.peak == 0 { 1 } else { 2 };
        self.settings.timeout * attempts + TICK
    }

    fn ramp_line(&self) -> String {
        let opened = self.tally.held.saturating_sub(self.held_at_tick);
        format!(
            "opening: {} of {}, {}{}{}",
            format::count(self.tally.held),
            format::count(u64::from(self.settings.goal)),
            rate(per_second(opened, TICK.as_secs_f64())),
            some(self.tally.failures.by_name().values().sum(), "failed attempts"),
            some(self.tally.lost, "lost"),
        )
    }

    /// What is lost so far, and how.
    fn loss_line(&self) -> String {
        format!(
            "{} of {} lost so far ({})",
            format::count(self.tally.lost),
            format::counted(self.tally.opened, "connection"),
            self.tally.losses
        )
    }

    fn proof_line(&self) -> String {
        format!(
            "proving: {} of {}{}",
            format::count(self.tally.verified().unwrap_or(0)),
            format::count(self.tally.held),
            some(self.tally.lost, "lost"),
        )
    }

    /// The first reason counts.
    fn stop(&mut self, stop: Stop) {
        self.tally.stop.get_or_insert(stop);
    }

    /// A connection that was held has gone.
    fn note_loss(&mut self, conn: &Conn, reason: &CloseReason) {
        let errno = match conn.fault {
            Some(Fault::Late) => Some(Errno::ETIMEDOUT),
            Some(Fault::Garbled) => Some(Errno::EBADMSG),
            _ => None,
        };
        if let Some(errno) = errno {
            self.tally.failures.count_errno(errno);
        }
        self.tally.lose_one(errno.or_else(|| errno_of(reason)));
        if conn.stage == ConnStage::SecondProof {
            self.in_flight -= 1;
        }
    }

    /// The client gives the connection up; `on_close` follows.
    fn give_up(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, fault: Fault) {
        conn.fault = Some(fault);
        cx.abort(token);
    }
}

impl Handler for Flood<'_> {
    type Conn = Conn;

    fn on_accept(&mut self, _: &mut Context<Conn>, _: &Incoming<'_>) -> Option<Conn> {
        None
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        if self.stage != Stage::Teardown {
            self.note_open(cx, token, conn);
        }
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &[u8]) {
        if self.settings.verify && self.stage != Stage::Teardown {
            self.note_echo(cx, token, conn, bytes);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        self.give_up(cx, token, conn, Fault::Eof);
    }

    fn on_timeout(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        self.give_up(cx, token, conn, Fault::Late);
    }

    fn on_close(&mut self, cx: &mut Context<Conn>, _: Token, conn: Conn, reason: CloseReason) {
        if self.stage == Stage::Teardown {
            return;
        }
        match conn.stage {
            ConnStage::Connecting | ConnStage::FirstProof => self.note_failure(&conn, &reason),
            ConnStage::Held if self.was_never_let_in(&conn) => self.note_drop(&conn, &reason),
            ConnStage::Held | ConnStage::SecondProof => self.note_loss(&conn, &reason),
        }
        self.go_on(cx);
    }

    fn on_timer(&mut self, cx: &mut Context<Conn>, timer: TimerId) {
        let timer = Some(timer);
        if timer == self.tick {
            self.tick(cx);
        } else if timer == self.timers.retry {
            self.timers.retry = None;
            self.go_on(cx);
        } else if timer == self.timers.pace {
            self.timers.pace = None;
            self.go_on(cx);
        } else if timer == self.timers.settle {
            self.timers.settle = None;
            self.go_on(cx);
        } else if timer == self.timers.hold {
            self.timers.hold = None;
            self.end_hold(cx);
        } else if timer == self.timers.slice {
            self.abort_slice(cx);
        }
    }

    /// The first signal ends the run early and in order, the second at once.
    fn on_signal(&mut self, cx: &mut Context<Conn>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.progress.end();
            command_line::flush_log();
            process::exit(if signal == Signal::Interrupt { 130 } else { 143 });
        }
        // Where all is done but the closing, there is nothing left to end early.
        if self.stage != Stage::Teardown {
            self.tally.stop = Some(Stop::Interrupted);
            self.progress.warn("ending early; a second signal leaves at once");
            self.begin_teardown(cx);
        }
    }
}

/// There are always more timers to be had than the few of a run.
fn arm(cx: &mut Context<Conn>, after: Duration) -> Option<TimerId> {
    cx.add_timer(after).ok()
}

/// `, 12 lost`, or nothing where there are none.
fn some(count: u64, what: &str) -> String {
    if count == 0 { String::new() } else { format!(", {} {what}", format::count(count)) }
}

/// What the system said of a failed attempt; the attempt's own time-out counts as the system's.
fn errno_of(reason: &CloseReason) -> Option<Errno> {
    match reason {
        CloseReason::ConnectFailed(error) | CloseReason::Failed(error) => errno(error),
        CloseReason::ConnectTimedOut => Some(Errno::ETIMEDOUT),
        _ => None,
    }
}

fn errno(error: &Error) -> Option<Errno> {
    error.errno().map(Errno::from_raw)
}
