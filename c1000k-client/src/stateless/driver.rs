//! The phases of a run without sockets, and their event loop.

use std::collections::{HashMap, HashSet};
use std::io;
use std::process;
use std::time::{Duration, Instant};

use c1000k_host::command_line;
use c1000k_host::format::{self, rate};
use c1000k_record::per_second;
use nix::errno::Errno;
use reactor::{Context, Handler, Incoming, Interest, Readiness, Signal, TimerId, Token, WatchId};

use super::device::Device;
use super::tcp::{Event, Stage, Tcp, Why};
use super::{Setup, return_route};
use crate::alarm::Alarm;
use crate::exposition::{self, Snapshot};
use crate::failures::{self, Retries};
use crate::pacing::{Pace, RateLimiter};
use crate::phases::slice_of_resets;
use crate::progress::Progress;
use crate::protocols::Protocol;
use crate::run::{Settings, Stall, TICK, arm, patience, some};
use crate::schedule::{Schedule, Workload};
use crate::stats::{RunStats, Stop, cpu_seconds};

/// Packets that are read before other events are handled.
const PACKETS_PER_TURN: usize = 512;

/// Messages sent, or connections opened, before packets are read.
const SENDS_PER_TURN: usize = 256;

/// The interval of the check for retransmissions and timeouts.
const EXPIRY: Duration = Duration::from_millis(10);

/// The pause if no connection can be closed for churn, because all wait for answers.
const CHURN_PAUSE: Duration = Duration::from_millis(10);

/// Bytes of the longest packet.
const PACKET_MAX: usize = 2048;

type Cx = Context<()>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// One connection is opened to verify that answers arrive.
    ReturnRoute,
    Ramp,
    Hold,
    /// Waits for the answers to the messages of the hold.
    HoldEnd,
    /// A storm resets all connections.
    Drop,
    /// They are reopened.
    Reopen,
    Verify,
    Drain,
    /// If packets were lost, checks whether the server has the resets.
    Confirm,
}

/// The connections to be opened.
#[derive(Debug, Default)]
struct Opening {
    pace: Option<Pace>,
    /// The next connection that was never tried in this phase.
    next: u32,
    /// New ones that remain to be tried in this phase.
    left: u64,
    /// Those to be retried at once.
    again: Vec<u32>,
    /// Those that wait for a retry.
    retries: Retries,
    /// The number of retries of connections that had any.
    attempts: HashMap<u32, u8>,
    consecutive_failures: u32,
    /// The maximum of connections held since the count was last reset.
    most_held: u64,
}

impl Opening {
    fn has_work(&self) -> bool {
        self.left > 0 || !self.again.is_empty() || self.retries.len() > 0
    }

    fn count_from(&mut self, held: u64) {
        self.most_held = held;
        self.consecutive_failures = 0;
    }

    /// Removes everything that waits; returns the number.
    fn give_up(&mut self) -> u64 {
        self.left = 0;
        let again = std::mem::take(&mut self.again).len();
        (again + self.retries.give_up()) as u64
    }
}

/// The handler of the reactor that watches the device.
#[derive(Debug)]
pub(super) struct Driver<'a, P: Protocol> {
    setup: &'a Setup,
    settings: Settings,
    stats: RunStats,
    progress: &'a Progress,
    tcp: Tcp<P, Device>,
    opening: Opening,
    phase: Phase,
    phase_began: Instant,
    hold_began: Instant,
    /// Most connections were lost: the hold ends early.
    is_hold_over: bool,
    stall: Stall,
    /// The position of a pass over all connections.
    cursor: u32,
    /// When the next slice of a paced pass may begin.
    slice_due: Instant,
    /// When messages are due during the hold.
    schedule: Option<Schedule>,
    next_message: u64,
    /// Turns of connections that had been lost; turns of those being reopened are skipped.
    vacant: u64,
    churn: Option<RateLimiter>,
    churn_cursor: u32,
    /// Connections that churn has closed and that are not reopened yet.
    away: HashSet<u32>,
    held_at_tick: u64,
    cpu_before_ramp: Option<f64>,
    lost_at_tick: u64,
    unconfirmed: u64,
    /// Whether the rest of a pass is skipped.
    has_given_up: bool,
    is_signalled: bool,
    alarm: Alarm,
    alarm_at: Option<Instant>,
    buffer: Vec<u8>,
    device: Option<WatchId>,
    tick: Option<TimerId>,
    expiry: Option<TimerId>,
}

impl<'a, P: Protocol> Driver<'a, P> {
    /// # Errors
    /// No descriptor is left for its timer.
    pub(super) fn new(
        setup: &'a Setup,
        settings: Settings,
        stats: RunStats,
        progress: &'a Progress,
        tcp: Tcp<P, Device>,
    ) -> Result<Self, Errno> {
        let now = Instant::now();
        let in_flight_max = settings.in_flight_max.min(tcp.link.in_flight_max);
        let settings = Settings { in_flight_max, ..settings };
        Ok(Self {
            setup,
            settings,
            stats,
            progress,
            tcp,
            opening: Opening::default(),
            phase: Phase::ReturnRoute,
            phase_began: now,
            hold_began: now,
            is_hold_over: false,
            stall: Stall::default(),
            cursor: 0,
            slice_due: now,
            schedule: None,
            next_message: 0,
            vacant: 0,
            churn: None,
            churn_cursor: 0,
            away: HashSet::new(),
            held_at_tick: 0,
            cpu_before_ramp: None,
            lost_at_tick: 0,
            unconfirmed: 0,
            has_given_up: false,
            is_signalled: false,
            alarm: Alarm::new()?,
            alarm_at: None,
            buffer: vec![0; PACKET_MAX],
            device: None,
            tick: None,
            expiry: None,
        })
    }

    /// # Errors
    /// No descriptor or no epoll watch is left.
    pub(super) fn start(&mut self, cx: &mut Cx) -> io::Result<()> {
        let descriptor = self.tcp.link.descriptor()?;
        self.device = Some(cx.watch(descriptor, Interest::Readable)?);
        self.alarm.watch(cx)?;
        self.tick = arm(cx, TICK);
        self.expiry = arm(cx, EXPIRY);
        self.opening.left = u64::from(self.tcp.count().min(1));
        self.open_due(Instant::now());
        Ok(())
    }

    pub(super) fn into_parts(self) -> (RunStats, Tcp<P, Device>) {
        (self.stats, self.tcp)
    }

    /// Does what is due now, and arms the timer for the rest.
    fn advance_phases(&mut self, cx: &mut Cx) {
        while let Some(next) = self.advance(Instant::now()) {
            self.enter(next);
        }
        if self.is_over() {
            if self.unconfirmed > 0 {
                self.progress.warn(&format!(
                    "no answer from the server for {}: it may still hold them",
                    format::counted(self.unconfirmed, "connection")
                ));
            }
            cx.stop();
        }
    }

    /// Reads received packets, up to the bound of one turn.
    fn read(&mut self, cx: &mut Cx) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..PACKETS_PER_TURN {
            match self.tcp.link.receive(&mut buffer) {
                Ok(Some(packet)) => {
                    let now = Instant::now();
                    if let Some(event) = self.tcp.on_packet(packet, now) {
                        self.on_event(event, now);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    self.fail(cx, &error);
                    break;
                }
            }
        }
        self.buffer = buffer;
    }

    /// The device has failed: nothing more can be sent or received.
    fn fail(&mut self, cx: &mut Cx, error: &io::Error) {
        log::error!("{} can't be read: {error}", self.tcp.link.name());
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.stats.stop.get_or_insert(Stop::Network(errno));
        self.end_phase(Phase::Drain);
        for _ in 0..self.stats.held {
            self.stats.lose_one(Some(errno));
        }
        cx.stop();
    }

    fn expire(&mut self, now: Instant) {
        while let Some(event) = self.tcp.expire(now) {
            self.on_event(event, now);
        }
    }

    /// Continues the present phase; returns the next one when it is over.
    fn advance(&mut self, now: Instant) -> Option<Phase> {
        match self.phase {
            Phase::ReturnRoute | Phase::Ramp | Phase::Reopen => self.open_due(now),
            Phase::Hold => {
                self.send_due(now);
                self.close_due(now);
                self.open_due(now);
            }
            // Reopens what churn has closed.
            Phase::HoldEnd => {
                self.cut_reopening(now);
                self.open_due(now);
            }
            Phase::Drop | Phase::Drain => self.reset_due(now),
            Phase::Verify => self.ask_more(now),
            Phase::Confirm => self.confirm_more(now),
        }
        self.following(now)
    }

    fn following(&self, now: Instant) -> Option<Phase> {
        let is_quiet = self.tcp.waiting() == 0;
        let is_opened = is_quiet && (self.opens_no_more() || !self.opening.has_work());
        let is_passed = self.cursor >= self.tcp.count();
        let is_interrupted = self.stats.stop == Some(Stop::Interrupted);
        match self.phase {
            Phase::Drain if is_passed && self.has_doubt() => Some(Phase::Confirm),
            Phase::Drain | Phase::Confirm => None,
            _ if is_interrupted => Some(Phase::Drain),
            Phase::ReturnRoute if is_opened && self.stats.held > 0 => Some(Phase::Ramp),
            Phase::ReturnRoute | Phase::Ramp if is_opened && self.stats.held == 0 => {
                Some(Phase::Drain)
            }
            Phase::Ramp if is_opened => Some(Phase::Hold),
            Phase::Hold if self.is_hold_over || now >= self.hold_end() => Some(Phase::HoldEnd),
            Phase::Hold if self.stats.held == 0 && is_opened => Some(Phase::HoldEnd),
            Phase::HoldEnd if is_opened && self.settings.storm => Some(Phase::Drop),
            Phase::Drop if is_passed => Some(Phase::Reopen),
            Phase::HoldEnd if is_opened => Some(self.last_verification()),
            Phase::Reopen if is_opened => Some(self.last_verification()),
            Phase::Verify if is_quiet && is_passed => Some(Phase::Drain),
            _ => None,
        }
    }

    /// A reason that has stopped the ramp does not prevent reopening later.
    fn opens_no_more(&self) -> bool {
        match self.phase {
            Phase::ReturnRoute | Phase::Ramp => self.stats.stop.is_some(),
            _ => self.stats.stop == Some(Stop::Interrupted),
        }
    }

    fn last_verification(&self) -> Phase {
        if self.settings.verify { Phase::Verify } else { Phase::Drain }
    }

    /// Ends the present phase and begins the next one.
    fn enter(&mut self, next: Phase) {
        self.end_phase(next);
        self.phase = next;
        self.phase_began = Instant::now();
        self.stall = Stall::default();
        self.cursor = 0;
        self.slice_due = self.phase_began;
        self.begin_phase();
    }

    fn end_phase(&mut self, next: Phase) {
        match self.phase {
            Phase::ReturnRoute if next == Phase::Ramp => {}
            Phase::ReturnRoute | Phase::Ramp => self.end_ramp(),
            Phase::HoldEnd => self.end_hold(),
            Phase::Hold => {
                self.stats.hold = self.hold_began.elapsed();
                if next != Phase::HoldEnd {
                    self.end_hold();
                }
            }
            Phase::Drop => self.stats.storm.drop = self.phase_began.elapsed(),
            Phase::Reopen => {
                self.opening.give_up();
                let missing = self.stats.storm.dropped.saturating_sub(self.stats.storm.back);
                if self.stats.stop != Some(Stop::Interrupted) {
                    self.stats.lose_not_back(missing);
                }
            }
            Phase::Verify => {
                self.stats.verify_seconds.push(self.phase_began.elapsed().as_secs_f64());
            }
            Phase::Drain | Phase::Confirm => {}
        }
    }

    fn begin_phase(&mut self) {
        let held = format::counted(self.stats.held, "connection");
        match self.phase {
            Phase::Ramp => {
                self.stats.restart(self.phase_began);
                self.cpu_before_ramp = cpu_seconds();
                let stages = &self.settings.stages;
                self.opening.pace =
                    (!stages.is_empty()).then(|| Pace::new(stages, self.phase_began));
                self.opening.left = u64::from(self.settings.goal) - 1;
            }
            Phase::Hold => {
                self.begin_hold();
            }
            Phase::Drop => {
                self.progress.begin("dropping", &format!("dropping {held} at once"));
            }
            Phase::Reopen => {
                self.opening.next = 0;
                self.opening.left = self.stats.storm.dropped;
                self.opening.pace = None;
                self.opening.count_from(0);
                let dropped = format::counted(self.stats.storm.dropped, "connection");
                self.progress.begin("reopening", &format!("reopening {dropped}"));
            }
            Phase::Verify => {
                self.stats.verified_passes.push(0);
                self.progress.begin("verifying", &format!("proving {held} again"));
            }
            Phase::Drain if self.stats.held > 0 => {
                let line = format!("closing {held} by reset, which leaves no TIME_WAIT");
                self.progress.begin("closing", &line);
            }
            Phase::Confirm => self.progress.begin(
                "confirming",
                "packets were lost: checking that the server received every reset",
            ),
            Phase::ReturnRoute | Phase::HoldEnd | Phase::Drain => {}
        }
    }

    fn end_ramp(&mut self) {
        self.stats.note_ramp_cpu(self.cpu_before_ramp);
        let unfinished = self.tcp.waiting() as u64;
        self.stats.failures.count_unfinished(unfinished);
        if self.stats.stop != Some(Stop::Interrupted) {
            self.stats.failed += unfinished + self.opening.give_up();
        }
        self.stats.sample(Instant::now());
        self.stats.verify_seconds =
            self.stats.verified_passes.iter().map(|_| self.stats.ramp.as_secs_f64()).collect();
    }

    fn begin_hold(&mut self) {
        self.hold_began = self.phase_began;
        self.lost_at_tick = self.stats.lost;
        self.stats.failures_of_ramp = Some(self.stats.failures.clone());
        let mut line = format!(
            "holding {} for {} s",
            format::counted(self.stats.held, "connection"),
            self.settings.hold.as_secs_f64()
        );
        if let Some(workload) = self.settings.workload {
            let schedule = self.begin_messages(&workload);
            let period = format::duration(schedule.period.as_secs_f64());
            let active = format::counted(self.stats.workload.connections, "connection");
            line = format!("{line}; {active} send a message every {period}");
        }
        if let Some(per_second) = self.settings.churn_per_second {
            self.churn = Some(RateLimiter::new(per_second, self.phase_began));
            let per_second = format::count(per_second);
            line = format!("{line}; {per_second} a second are closed and reopened");
        }
        self.progress.begin("holding", &line);
    }

    fn begin_messages(&mut self, workload: &Workload) -> Schedule {
        let active = workload.active(self.tcp.count() as usize);
        let schedule = workload.schedule(active);
        let stats = &mut self.stats.workload;
        stats.began = self.phase_began.duration_since(self.stats.started);
        stats.connections = active as u64;
        stats.period = schedule.period;
        self.schedule = Some(schedule);
        schedule
    }

    fn end_hold(&mut self) {
        if self.schedule.take().is_some() {
            let stats = &mut self.stats.workload;
            stats.skipped = (self.next_message - self.vacant).saturating_sub(stats.sent);
            stats.seconds = self.stats.hold;
            stats.end_interval(self.hold_began.elapsed());
            // After a signal, some are unanswered.
            stats.unanswered += self.tcp.waiting() as u64;
        }
        self.opening.give_up();
        let missing = std::mem::take(&mut self.away).len();
        if self.stats.stop != Some(Stop::Interrupted) {
            self.stats.lose_not_back(missing as u64);
        }
    }

    /// Closes the connections that are not reopened in time after the hold.
    fn cut_reopening(&mut self, now: Instant) {
        if now.duration_since(self.phase_began) < patience(self.settings.timeout, self.stats.peak) {
            return;
        }
        self.opening.give_up();
        for index in 0..self.tcp.count() {
            if matches!(self.tcp.stage(index), Stage::Connecting | Stage::Opening) {
                self.tcp.reset(index);
            }
        }
    }

    /// Whether only connections that were held before are opened.
    fn is_reopening(&self) -> bool {
        !matches!(self.phase, Phase::ReturnRoute | Phase::Ramp)
    }

    /// A connection has failed permanently; one that was held before is lost at the end of the phase.
    fn fail_one(&mut self) {
        self.stats.failed += u64::from(!self.is_reopening());
    }

    fn hold_end(&self) -> Instant {
        self.hold_began + self.settings.hold
    }

    /// Starts as many connects as may be in flight.
    fn open_due(&mut self, now: Instant) {
        for _ in 0..SENDS_PER_TURN {
            if self.opens_no_more() || self.tcp.waiting() >= self.settings.in_flight_max {
                return;
            }
            let has_due = self.opening.left > 0
                || !self.opening.again.is_empty()
                || self.opening.retries.next_due().is_some_and(|due| due <= now);
            if !has_due {
                return self.opening.retries.next_due().map_or((), |due| self.wake_at(due));
            }
            if let Some(Err(wait)) = self.opening.pace.as_mut().map(|pace| pace.take(now)) {
                return self.wake_at(now + wait);
            }
            let Some(index) = self.next_to_open(now) else { return };
            self.stats.attempted += 1;
            self.tcp.open(index, now);
        }
        self.wake_at(now);
    }

    fn next_to_open(&mut self, now: Instant) -> Option<u32> {
        if let Some((index, attempt)) = self.opening.retries.pop_due(now) {
            self.stats.retried += 1;
            self.opening.attempts.insert(index, attempt);
            return Some(index);
        }
        if let Some(index) = self.opening.again.pop() {
            return Some(index);
        }
        while self.opening.left > 0 && self.opening.next < self.tcp.count() {
            let index = self.opening.next;
            self.opening.next += 1;
            if self.tcp.stage(index) == Stage::Closed {
                self.opening.left -= 1;
                return Some(index);
            }
        }
        self.opening.left = 0;
        None
    }

    /// Sends the messages that are due.
    fn send_due(&mut self, now: Instant) {
        let Some(schedule) = self.schedule else { return };
        let (elapsed, hold) = (now - self.hold_began, self.settings.hold);
        let (count, active) = (u64::from(self.tcp.count()), self.stats.workload.connections);
        for _ in 0..SENDS_PER_TURN {
            let due = schedule.due(self.next_message);
            if due >= hold {
                return self.wake_at(self.hold_end());
            }
            if due > elapsed {
                return self.wake_at(self.hold_began + due);
            }
            // The active part is spread evenly over all.
            let turn = schedule.turn(self.next_message) as u64;
            let index = ((turn + 1) * count / active - 1) as u32;
            self.next_message += 1;
            match self.tcp.stage(index) {
                Stage::Up => {
                    self.tcp.ask(index, self.hold_began + due, now);
                    self.stats.workload.sent += 1;
                }
                Stage::Asked => {}
                _ => self.vacant += u64::from(!self.away.contains(&index)),
            }
        }
        self.wake_at(now);
    }

    /// Closes the connections that churn has due.
    fn close_due(&mut self, now: Instant) {
        let Some(mut limiter) = self.churn.take() else { return };
        let wait = loop {
            match limiter.take(now) {
                Ok(()) if self.close_one() => {}
                Ok(()) => break CHURN_PAUSE,
                Err(wait) => break wait,
            }
        };
        self.churn = Some(limiter);
        self.wake_at(now + wait);
    }

    /// Closes the next connection without an unanswered message; returns whether there was one.
    fn close_one(&mut self) -> bool {
        for _ in 0..self.tcp.count() {
            let index = self.churn_cursor % self.tcp.count();
            self.churn_cursor = index + 1;
            if self.tcp.stage(index) == Stage::Up {
                self.tcp.reset(index);
                self.stats.held -= 1;
                self.stats.churn.closed += 1;
                self.opening.again.push(index);
                self.away.insert(index);
                return true;
            }
        }
        false
    }

    /// Resets the connections of the next slice.
    fn reset_due(&mut self, now: Instant) {
        if now < self.slice_due {
            return self.wake_at(self.slice_due);
        }
        let (count, pause) = slice_of_resets(self.setup.is_here, self.stats.peak, self.stats.ramp);
        let mut left = count;
        while left > 0 && self.cursor < self.tcp.count() {
            let index = self.cursor;
            self.cursor += 1;
            let was = self.tcp.stage(index);
            if was == Stage::Closed {
                continue;
            }
            left -= 1;
            self.tcp.reset(index);
            if self.phase == Phase::Drop && matches!(was, Stage::Up | Stage::Asked) {
                self.stats.held -= 1;
                self.stats.storm.dropped += 1;
            }
        }
        self.slice_due = now + pause;
        if self.cursor < self.tcp.count() {
            self.wake_at(self.slice_due);
        }
    }

    /// Sends a heartbeat on all connections that are up, with a bounded number in flight.
    fn ask_more(&mut self, now: Instant) {
        let mut sends = SENDS_PER_TURN;
        while self.cursor < self.tcp.count() && self.tcp.waiting() < self.settings.in_flight_max {
            if sends == 0 {
                return self.wake_at(now);
            }
            let index = self.cursor;
            self.cursor += 1;
            if self.tcp.stage(index) == Stage::Up {
                self.tcp.ask(index, now, now);
                sends -= 1;
            }
        }
    }

    /// Whether a reset may have been lost.
    fn has_doubt(&self) -> bool {
        self.tcp.counters.retransmitted > 0 || self.tcp.link.unsent > 0
    }

    /// Sends no more heartbeats, and waits for no more answers.
    fn give_up_confirming(&mut self) {
        let left = self.tcp.count() - self.cursor;
        self.unconfirmed += u64::from(left) + self.tcp.waiting() as u64;
        self.cursor = self.tcp.count();
        self.has_given_up = true;
    }

    fn confirm_more(&mut self, now: Instant) {
        let mut sends = SENDS_PER_TURN;
        while self.cursor < self.tcp.count() && self.tcp.waiting() < self.settings.in_flight_max {
            if sends == 0 {
                return self.wake_at(now);
            }
            let index = self.cursor;
            self.cursor += 1;
            if self.tcp.was_open(index) {
                self.tcp.confirm(index, now);
                sends -= 1;
            }
        }
    }

    fn on_event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Opened { index, latency } => {
                match self.phase {
                    Phase::Reopen => self.stats.storm.latency.record(latency),
                    Phase::Hold | Phase::HoldEnd => self.stats.churn.latency.record(latency),
                    _ => self.stats.note_connect(latency),
                }
                if !self.settings.verify {
                    self.keep(index, now);
                }
            }
            Event::Answered { index, was: Stage::Opening, .. } => self.keep(index, now),
            Event::Answered { index, latency, .. } => self.note_answer(index, latency, now),
            Event::Ended {
                index,
                was: was @ (Stage::Connecting | Stage::Opening),
                why,
                has_part,
            } => {
                self.note_failure(index, was, why, has_part);
            }
            // This end closes them.
            Event::Ended { .. } if matches!(self.phase, Phase::Drain | Phase::Confirm) => {}
            Event::Ended { .. } if self.phase == Phase::Drop => {
                self.stats.held -= 1;
                self.stats.storm.dropped += 1;
            }
            Event::Ended { was, why, has_part, .. } => self.note_loss(was, why, has_part),
            Event::Confirmed { .. } => self.stall.note_success(),
            Event::Unconfirmed { .. } => self.unconfirmed += 1,
        }
    }

    /// The connection is up.
    fn keep(&mut self, index: u32, now: Instant) {
        self.opening.attempts.remove(&index);
        self.stall.note_success();
        if self.is_reopening() {
            self.stats.hold_again();
        } else {
            self.stats.hold_one();
        }
        self.away.remove(&index);
        self.progress.advance(self.stats.held);
        if self.stats.held > self.opening.most_held {
            self.opening.count_from(self.stats.held);
        }
        match self.phase {
            Phase::Reopen => {
                self.stats.storm.back += 1;
                self.stats.storm.reopen = self.phase_began.elapsed();
            }
            Phase::Hold | Phase::HoldEnd => self.stats.churn.reopened += 1,
            _ => {
                if let Some(pass) = self.stats.verified_passes.last_mut() {
                    *pass += 1;
                }
                self.stats.note_ramp(now);
            }
        }
    }

    /// A message of the hold or of the second verification was answered.
    fn note_answer(&mut self, index: u32, latency: Duration, now: Instant) {
        self.stall.note_success();
        if self.phase == Phase::Verify {
            if let Some(pass) = self.stats.verified_passes.last_mut() {
                *pass += 1;
            }
            return;
        }
        let stats = &mut self.stats.workload;
        stats.answered += 1;
        stats.interval.record(latency);
        let (period, next) = (stats.period, self.next_message);
        let due = (now - self.hold_began).saturating_sub(latency);
        let has_passed = self.schedule.is_some_and(|schedule| schedule.has_passed(due, next));
        if has_passed && self.phase == Phase::Hold {
            stats.sent += 1;
            stats.late += 1;
            self.tcp.ask(index, now - latency + period, now);
        }
    }

    /// An attempt to open a connection has failed.
    fn note_failure(&mut self, index: u32, was: Stage, why: Why, has_part: bool) {
        self.stats.answered_in_part += u64::from(has_part);
        match why {
            Why::Refused => self.stats.failures.count_errno(Errno::ECONNREFUSED),
            Why::Reset => self.stats.failures.count_errno(Errno::ECONNRESET),
            Why::Eof => self.stats.failures.count(failures::EOF),
            Why::TimedOut => self.stats.failures.count_errno(Errno::ETIMEDOUT),
            Why::Mismatch => self.stats.failures.count_errno(Errno::EBADMSG),
        }
        match why {
            Why::Refused => {
                self.try_later(index);
                self.note_consecutive_failure(self.nothing_listens());
            }
            Why::Reset | Why::Eof => {
                self.stats.refused_by_server += 1;
                self.try_later(index);
                self.note_consecutive_failure(Stop::ServerFull);
            }
            Why::Mismatch => {
                self.fail_one();
                if self.stats.complaint.is_none() {
                    self.stats.complaint = self.tcp.protocol().complaint();
                }
                self.note_consecutive_failure(Stop::NotAnEcho);
            }
            Why::TimedOut if self.phase == Phase::ReturnRoute && was == Stage::Connecting => {
                self.stats.failed += 1;
                self.stats.stop.get_or_insert(Stop::Network(Errno::ETIMEDOUT));
                if !self.setup.is_here {
                    self.progress.warn(&return_route(self.setup));
                }
            }
            Why::TimedOut if self.phase == Phase::ReturnRoute => {
                self.stats.unanswered += 1;
                self.stats.failed += 1;
                self.stats.stop.get_or_insert(Stop::ServerSilent);
            }
            Why::TimedOut => {
                self.stats.unanswered += u64::from(was == Stage::Opening);
                self.try_later(index);
            }
        }
    }

    fn nothing_listens(&self) -> Stop {
        if self.stats.peak == 0 { Stop::NothingListens } else { Stop::ServerGone }
    }

    fn try_later(&mut self, index: u32) {
        let attempts = self.opening.attempts.remove(&index).unwrap_or(0);
        if !self.opening.retries.push(Instant::now(), index, attempts) {
            self.fail_one();
        }
    }

    fn note_consecutive_failure(&mut self, stop: Stop) {
        self.opening.consecutive_failures += 1;
        let max = if self.phase == Phase::ReturnRoute {
            u32::from(failures::RETRIES_MAX) + 1
        } else {
            self.settings.consecutive_failures_max
        };
        if self.opening.consecutive_failures >= max {
            self.stats.stop.get_or_insert(stop);
        }
    }

    /// A held connection has ended.
    fn note_loss(&mut self, was: Stage, why: Why, has_part: bool) {
        if was == Stage::Asked && self.schedule.is_some() {
            if why == Why::Mismatch {
                self.stats.workload.mismatched += 1;
            } else {
                self.stats.workload.unanswered += 1;
            }
        }
        let errno = match why {
            Why::Eof | Why::Refused => None,
            Why::Reset => Some(Errno::ECONNRESET),
            Why::TimedOut => Some(Errno::ETIMEDOUT),
            Why::Mismatch => Some(Errno::EBADMSG),
        };
        self.stats.lost_in_part += u64::from(has_part);
        self.stats.lose_one(errno);
    }

    /// Arms the timer for the earliest of the given times.
    fn wake_at(&mut self, at: Instant) {
        let now = Instant::now();
        if self.alarm_at.is_some_and(|set| set <= at && set > now) {
            return;
        }
        self.alarm_at = Some(at);
        if let Err(errno) = self.alarm.set(at.saturating_duration_since(now)) {
            log::error!("timerfd_settime: {errno}");
        }
    }

    fn tick(&mut self, cx: &mut Cx) {
        self.tick = arm(cx, TICK);
        if let Some(endpoint) = &self.settings.endpoint {
            let snapshot = Snapshot::of(&self.stats, self.settings.goal);
            endpoint.publish(exposition::PREFIX, Box::new(snapshot));
        }
        self.stats.sample_hold(Instant::now());
        self.progress.tick(&self.stats, self.tcp.waiting(), || self.line());
        self.held_at_tick = self.stats.held;
        if self.schedule.is_some() {
            let elapsed = self.stats.started.elapsed().saturating_sub(self.stats.workload.began);
            self.stats.workload.end_interval(elapsed);
        }
        let is_stalled = self.stall.tick() > patience(self.settings.timeout, self.stats.peak);
        if is_stalled && matches!(self.phase, Phase::Ramp | Phase::Reopen | Phase::Verify) {
            self.stats.stop.get_or_insert(if self.phase == Phase::Ramp {
                Stop::Network(Errno::ETIMEDOUT)
            } else {
                Stop::ServerSilent
            });
            self.cursor = self.tcp.count();
        }
        if is_stalled && self.phase == Phase::Reopen {
            self.opening.give_up();
        }
        if is_stalled && self.phase == Phase::Confirm {
            self.give_up_confirming();
        }
        if self.phase == Phase::Hold {
            if self.stats.lost > self.lost_at_tick {
                self.progress.warn(&self.stats.loss_line());
            } else if self.stats.has_lost_most() {
                self.is_hold_over = true;
            }
            self.lost_at_tick = self.stats.lost;
        }
    }

    fn line(&self) -> String {
        let stats = &self.stats;
        let resent = some(self.tcp.counters.retransmitted, "sent again");
        let lost = some(stats.lost, "lost");
        let count = format::count;
        match self.phase {
            Phase::ReturnRoute => "verifying the return route with one connection".to_owned(),
            Phase::Ramp => {
                let opened = stats.held.saturating_sub(self.held_at_tick);
                format!(
                    "opening: {} of {}, {}{}{resent}{lost}",
                    count(stats.held),
                    count(u64::from(self.settings.goal)),
                    rate(per_second(opened, TICK.as_secs_f64())),
                    some(stats.failures.by_name().values().sum(), "failed attempts"),
                )
            }
            Phase::Hold | Phase::HoldEnd => match self.schedule {
                None => format!("holding: {}{lost}", count(stats.held)),
                Some(_) => stats.workload_line(),
            },
            Phase::Drop => format!("dropping: {} left", count(stats.held)),
            Phase::Reopen => format!(
                "reopening: {} of {}{lost}",
                count(stats.storm.back),
                count(stats.storm.dropped)
            ),
            Phase::Verify => format!(
                "verifying: {} of {}{resent}{lost}",
                count(stats.verified().unwrap_or(0)),
                count(stats.held)
            ),
            Phase::Drain => {
                format!("closing: {} left", count(u64::from(self.tcp.count() - self.cursor)))
            }
            Phase::Confirm => {
                format!("confirming: {} left", count(u64::from(self.tcp.count() - self.cursor)))
            }
        }
    }

    fn is_over(&self) -> bool {
        let is_passed = self.cursor >= self.tcp.count();
        match self.phase {
            Phase::Drain => is_passed && !self.has_doubt(),
            Phase::Confirm => self.has_given_up || (is_passed && self.tcp.waiting() == 0),
            _ => false,
        }
    }
}

impl<P: Protocol> Handler for Driver<'_, P> {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Cx, _: &Incoming<'_>) -> Option<()> {
        None
    }

    fn on_data(&mut self, _: &mut Cx, _: Token, (): &mut (), _: &mut [u8]) {}

    fn on_ready(&mut self, cx: &mut Cx, watch: WatchId, _: Readiness) {
        if self.device == Some(watch) {
            self.read(cx);
        } else {
            self.alarm_at = None;
        }
        self.advance_phases(cx);
    }

    fn on_timer(&mut self, cx: &mut Cx, timer: TimerId) {
        if self.tick == Some(timer) {
            self.tick(cx);
        } else {
            self.expiry = arm(cx, EXPIRY);
            // Packets that have already arrived are not late.
            self.read(cx);
            self.expire(Instant::now());
        }
        self.advance_phases(cx);
    }

    /// The first signal ends the run early and in order, the second one immediately.
    fn on_signal(&mut self, cx: &mut Cx, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.progress.end();
            command_line::flush_log();
            process::exit(if signal == Signal::Interrupt { 130 } else { 143 });
        }
        if self.phase == Phase::Confirm {
            self.give_up_confirming();
        }
        if !matches!(self.phase, Phase::Drain | Phase::Confirm) {
            self.stats.stop = Some(Stop::Interrupted);
            self.progress.warn("ending early; a second signal exits immediately");
        }
        self.advance_phases(cx);
    }
}
