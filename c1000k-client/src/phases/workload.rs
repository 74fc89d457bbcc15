//! The workload: a hold in which messages are sent at times that were fixed before.
//!
//! Each active connection has its turn once in a period. One that still waits for an answer when its turn comes sends
//! when the answer is there, and its latency is counted from its turn all the same.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use c1000k_host::format;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use reactor::{CloseReason, Context, Error, Interest, Token, WatchId};

use super::Phase;
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Fault, Run, some};
use crate::schedule::{self, Schedule};
use crate::stats::Stop;

/// Messages sent before other events get their turn.
const MESSAGES_PER_SLICE: usize = 4096;

/// Sends messages for the time that was asked for, and waits for the last answers.
#[derive(Debug)]
pub(crate) struct Workload {
    plan: schedule::Workload,
    schedule: Schedule,
    /// Those that send, in the order of their turns.
    active: Vec<Token>,
    /// The number of the next message.
    next: u64,
    alarm: Alarm,
    lost_at_tick: u64,
    is_over: bool,
}

impl Workload {
    /// # Errors
    /// No descriptor is left for its alarm.
    pub(crate) fn new(plan: schedule::Workload) -> Result<Self, Errno> {
        Ok(Self {
            plan,
            schedule: plan.schedule(0),
            active: Vec::new(),
            next: 0,
            alarm: Alarm::new()?,
            lost_at_tick: 0,
            is_over: false,
        })
    }

    /// Sends what is due, and sets the alarm for what is not.
    fn send_due<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        let (elapsed, hold) = (run.phase_began.elapsed(), run.settings.hold);
        let mut due = self.schedule.due(self.next);
        for _ in 0..MESSAGES_PER_SLICE {
            if due > elapsed || due >= hold {
                break;
            }
            let token = self.active[self.schedule.turn(self.next)];
            self.next += 1;
            if cx.conn(token).is_some_and(|conn| conn.stage == ConnStage::Up) {
                run.ask(cx, token, run.phase_began + due);
                run.stats.workload.sent += 1;
            }
            due = self.schedule.due(self.next);
        }
        if due >= hold && elapsed >= hold {
            return self.stop_sending(cx);
        }
        let wait = due.min(hold).saturating_sub(run.phase_began.elapsed());
        if let Err(errno) = self.alarm.set(wait) {
            log::error!("no more messages are sent: timerfd_settime: {errno}");
            self.stop_sending(cx);
        }
    }

    fn stop_sending<C>(&mut self, cx: &mut Context<C>) {
        self.is_over = true;
        self.alarm.unwatch(cx);
    }
}

impl<P: Protocol> Phase<P> for Workload {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.lost_at_tick = run.stats.lost;
        let held: Vec<Token> = cx.tokens(0..cx.slots()).collect();
        self.active = evenly(held, |count| self.plan.active(count));
        self.schedule = self.plan.schedule(self.active.len());
        run.stats.workload.began = run.phase_began.duration_since(run.stats.started);
        run.stats.workload.connections = self.active.len() as u64;
        run.stats.workload.period = self.schedule.period;
        run.progress.begin("holding", &first_line(run));
        if self.active.is_empty() {
            self.is_over = true;
        } else if self.alarm.watch(cx).is_err() {
            run.stop(Stop::Watches);
            self.is_over = true;
        } else {
            self.send_due(cx, run);
        }
    }

    fn is_done(&self, _cx: &Cx<P>, run: &Run<'_, P>) -> bool {
        run.stats.held == 0 || (self.is_over && run.in_flight == 0)
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.stop_sending(cx);
        run.stats.hold = run.phase_began.elapsed();
        run.stats.workload.seconds = run.stats.hold;
        run.stats.workload.end_interval(run.stats.hold);
        // Where a signal ends it, some are under way.
        run.stats.workload.unanswered += run.in_flight as u64;
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) {
        let latency = run.age(conn);
        run.note_answer(conn);
        let stats = &mut run.stats.workload;
        stats.answered += 1;
        stats.interval.record(latency);
        if latency >= self.schedule.period && !self.is_over {
            stats.sent += 1;
            stats.late += 1;
            run.ask_again(cx, token, conn, self.schedule.period);
        }
    }

    fn on_close(
        &mut self,
        _cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        if conn.fault == Some(Fault::Mismatch) {
            run.stats.workload.mismatched += 1;
        } else if conn.stage == ConnStage::Asked {
            run.stats.workload.unanswered += 1;
        }
        run.note_loss(conn, reason);
    }

    fn on_ready(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, watch: WatchId) {
        if self.alarm.watch == Some(watch) {
            self.send_due(cx, run);
        }
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, _is_stalled: bool) {
        run.progress.tick(|| line(run));
        run.stats.workload.end_interval(run.phase_began.elapsed());
        if run.stats.lost > self.lost_at_tick {
            run.progress.warn(&run.loss_line());
        } else if run.stats.has_lost_most() {
            self.stop_sending(cx);
        }
        self.lost_at_tick = run.stats.lost;
    }
}

/// Wakes the reactor to the microsecond; its own timers are good to a millisecond, and many an answer is faster.
#[derive(Debug)]
struct Alarm {
    timer: TimerFd,
    /// The descriptor that is to be watched.
    unwatched: Option<OwnedFd>,
    watch: Option<WatchId>,
}

impl Alarm {
    fn new() -> Result<Self, Errno> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let twin = timer.as_fd().try_clone_to_owned();
        let unwatched = twin.map_err(|_| Errno::EMFILE)?;
        Ok(Self { timer, unwatched: Some(unwatched), watch: None })
    }

    fn watch<C>(&mut self, cx: &mut Context<C>) -> Result<(), Error> {
        if let Some(descriptor) = self.unwatched.take() {
            self.watch = Some(cx.watch(descriptor, Interest::Readable)?);
        }
        Ok(())
    }

    fn unwatch<C>(&mut self, cx: &mut Context<C>) {
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
    }

    /// Rings after this time, and is silent until then.
    fn set(&self, wait: Duration) -> Result<(), Errno> {
        // Zero would turn it off.
        let wait = TimeSpec::from(wait.max(Duration::from_nanos(1)));
        self.timer.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())
    }
}

/// As many of them as `count` says of their number, spread evenly.
fn evenly(tokens: Vec<Token>, count: impl Fn(usize) -> usize) -> Vec<Token> {
    let (all, part) = (tokens.len(), count(tokens.len()));
    let is_chosen = |index: usize| (index + 1) * part / all > index * part / all;
    tokens
        .into_iter()
        .enumerate()
        .filter(|&(index, _)| is_chosen(index))
        .map(|(_, token)| token)
        .collect()
}

fn first_line<P: Protocol>(run: &Run<'_, P>) -> String {
    let stats = &run.stats.workload;
    format!(
        "holding {} for {} s; {} a message every {}",
        format::counted(run.stats.held, "connection"),
        run.settings.hold.as_secs_f64(),
        match stats.connections {
            all if all == run.stats.held => "each sends".to_owned(),
            1 => "1 of them sends".to_owned(),
            some => format!("{} of them send", format::count(some)),
        },
        format::duration(stats.period.as_secs_f64()),
    )
}

/// The latencies are those of the last second.
fn line<P: Protocol>(run: &Run<'_, P>) -> String {
    let stats = &run.stats.workload;
    let latency = stats.interval.percentiles();
    let text = |value: Option<u64>| format::duration(value.unwrap_or(0) as f64 / 1e6);
    format!(
        "messages: {} sent, {} answered{}; median {}, p99 {}, longest {}",
        format::count(stats.sent),
        format::count(stats.answered),
        some(run.stats.lost, "lost"),
        text(latency.p50),
        text(latency.p99),
        text(latency.max),
    )
}
