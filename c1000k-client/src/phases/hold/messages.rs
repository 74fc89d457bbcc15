//! Messages during the hold, on a fixed schedule.
//!
//! Each active connection has its turn once in a period. One that still waits for an answer when its turn comes sends
//! when the answer has arrived, and the latency is measured from its turn.

use c1000k_host::format;
use nix::errno::Errno;
use reactor::{Context, Token, WatchId};

use crate::alarm::Alarm;
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Fault, Run};
use crate::schedule::{Schedule, Workload};
use crate::stats::Stop;

/// Messages that are sent before other events are handled.
const MESSAGES_PER_SLICE: usize = 4096;

/// Sends messages until the hold is over.
#[derive(Debug)]
pub(super) struct Messages {
    workload: Workload,
    schedule: Schedule,
    /// Slots of the connections that send, in the order of their turns. A reopened connection has the turns of its new
    /// slot.
    active: Vec<usize>,
    /// The number of the next message.
    next: u64,
    /// Turns of connections that had been lost; turns of those being reopened are skipped.
    vacant: u64,
    lost_before: u64,
    alarm: Alarm,
    is_over: bool,
}

impl Messages {
    /// # Errors
    /// No descriptor is left for its timer.
    pub(super) fn new(workload: Workload) -> Result<Self, Errno> {
        Ok(Self {
            workload,
            schedule: workload.schedule(0),
            active: Vec::new(),
            next: 0,
            vacant: 0,
            lost_before: 0,
            alarm: Alarm::new()?,
            is_over: false,
        })
    }

    pub(super) fn start<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        let held: Vec<usize> = cx.tokens(0..cx.slots()).map(Token::index).collect();
        let count = self.workload.active(held.len());
        self.active = evenly(held, count);
        self.lost_before = run.stats.lost;
        self.schedule = self.workload.schedule(count);
        let stats = &mut run.stats.workload;
        stats.began = run.phase_began.duration_since(run.stats.started);
        stats.connections = count as u64;
        stats.period = self.schedule.period;
        if count == 0 {
            self.is_over = true;
        } else if self.alarm.watch(cx).is_err() {
            run.stop(Stop::Watches);
            self.is_over = true;
        } else {
            self.send_due(cx, run);
        }
    }

    /// The senders and their rate.
    pub(super) fn description(&self, held: u64) -> String {
        let senders = match self.active.len() as u64 {
            all if all == held => "each sends".to_owned(),
            1 => "1 of them sends".to_owned(),
            some => format!("{} of them send", format::count(some)),
        };
        let period = format::duration(self.schedule.period.as_secs_f64());
        format!("{senders} a message every {period}")
    }

    /// Sends what is due, and arms the timer for the next message.
    fn send_due<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        let (elapsed, hold) = (run.phase_began.elapsed(), run.settings.hold);
        let mut due = self.schedule.due(self.next);
        for _ in 0..MESSAGES_PER_SLICE {
            if due > elapsed || due >= hold {
                break;
            }
            let slot = self.active[self.schedule.turn(self.next)];
            self.next += 1;
            let token = cx.tokens(slot..slot + 1).next();
            let conn = token.and_then(|token| cx.conn(token).map(|conn| (token, conn)));
            let stage = match conn {
                Some((token, conn)) if conn.is_usable() => Some((token, conn.stage)),
                _ => None,
            };
            match stage {
                Some((token, ConnStage::Up)) => {
                    run.ask(cx, token, run.phase_began + due);
                    run.stats.workload.sent += 1;
                }
                Some(_) => {}
                None if run.stats.lost > self.lost_before && run.stats.away() == 0 => {
                    self.vacant += 1;
                }
                None => {}
            }
            due = self.schedule.due(self.next);
        }
        if due >= hold {
            return self.stop(cx);
        }
        if let Err(errno) = self.alarm.set(due.saturating_sub(run.phase_began.elapsed())) {
            log::error!("no more messages are sent: timerfd_settime: {errno}");
            self.stop(cx);
        }
    }

    pub(super) fn stop<C>(&mut self, cx: &mut Context<C>) {
        self.is_over = true;
        self.alarm.unwatch(cx);
    }

    /// The hold has ended.
    pub(super) fn count_up<P: Protocol>(&self, run: &mut Run<'_, P>) {
        let stats = &mut run.stats.workload;
        stats.skipped = (self.next - self.vacant).saturating_sub(stats.sent);
        stats.seconds = run.stats.hold;
        stats.end_interval(run.phase_began.elapsed());
        // After a signal, some are in flight.
        stats.unanswered += run.in_flight as u64;
    }

    /// A message was answered.
    pub(super) fn on_answer<P: Protocol>(
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
        let due = run.phase_began.elapsed().saturating_sub(latency);
        if self.schedule.has_passed(due, self.next) && !self.is_over {
            stats.sent += 1;
            stats.late += 1;
            run.ask_again(cx, token, conn, self.schedule.period);
        }
    }

    /// A connection with an unanswered message has ended.
    pub(super) fn note_gone<P: Protocol>(run: &mut Run<'_, P>, conn: &Conn<P::State>) {
        if conn.fault == Some(Fault::Mismatch) {
            run.stats.workload.mismatched += 1;
        } else {
            run.stats.workload.unanswered += 1;
        }
    }

    pub(super) fn on_ready<P: Protocol>(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        watch: WatchId,
    ) {
        if self.alarm.is(watch) {
            self.send_due(cx, run);
        }
    }
}

/// `count` of them, spread evenly.
fn evenly(slots: Vec<usize>, count: usize) -> Vec<usize> {
    let all = slots.len();
    let is_chosen = |index: usize| (index + 1) * count / all > index * count / all;
    let chosen = slots.into_iter().enumerate().filter(|&(index, _)| is_chosen(index));
    chosen.map(|(_, slot)| slot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_spread_evenly() {
        assert_eq!(evenly((0..10).collect(), 10), (0..10).collect::<Vec<_>>());
        assert_eq!(evenly((0..10).collect(), 2), [4, 9]);
        assert_eq!(evenly(vec![3, 5, 8], 1), [8]);
        assert!(evenly(vec![], 0).is_empty());
    }
}
