//! The hold: only churn opens or closes connections, and none may be lost.

mod churn;
mod messages;

use c1000k_host::format;
use nix::errno::Errno;
use reactor::{CloseReason, Context, TimerId, Token, WatchId};

use self::churn::Churn;
use self::messages::Messages;
use super::Phase;
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Fault, Run, Settings, arm, cancel};
use crate::stats::Stop;

/// Holds all connections for the given time, or until none is left, and then waits for what is in flight: at most the
/// patience of a run.
#[derive(Debug)]
pub(crate) struct Hold {
    messages: Option<Messages>,
    churn: Option<Churn>,
    /// The end of the hold, and then of the wait for what is in flight.
    end: Option<TimerId>,
    lost_at_tick: u64,
    is_over: bool,
}

impl Hold {
    /// # Errors
    /// No descriptor is left for the timer of the messages.
    pub(crate) fn new(settings: &Settings) -> Result<Self, Errno> {
        Ok(Self {
            messages: settings.workload.map(Messages::new).transpose()?,
            churn: settings.churn_per_second.map(Churn::new),
            end: None,
            lost_at_tick: 0,
            is_over: false,
        })
    }

    /// The hold is over, and the wait for what is in flight begins.
    fn finish<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        if self.is_over {
            return;
        }
        run.stats.hold = run.phase_began.elapsed();
        self.stop(cx);
        cancel(cx, &mut self.end);
        self.end = arm(cx, run.patience());
    }

    /// Sends and closes nothing more.
    fn stop<C>(&mut self, cx: &mut Context<C>) {
        self.is_over = true;
        if let Some(messages) = &mut self.messages {
            messages.stop(cx);
        }
        if let Some(churn) = &mut self.churn {
            churn.stop(cx);
        }
    }

    fn first_line<P: Protocol>(&self, run: &Run<'_, P>) -> String {
        let mut line = format!(
            "holding {} for {} s",
            format::counted(run.stats.held, "connection"),
            run.settings.hold.as_secs_f64()
        );
        if let Some(messages) = &self.messages {
            line = format!("{line}; {}", messages.description(run.stats.held));
        }
        if let Some(rate) = run.settings.churn_per_second {
            line = format!("{line}; {} a second are closed and reopened", format::count(rate));
        }
        line
    }
}

impl<P: Protocol> Phase<P> for Hold {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.lost_at_tick = run.stats.lost;
        run.opening.begin_reopening();
        run.stats.failures_of_ramp = Some(run.stats.failures.clone());
        // The reactor measures from the beginning of its turn, which may be some time ago.
        let end = run.phase_began + run.settings.hold;
        self.end = arm(cx, end.saturating_duration_since(cx.now()));
        if let Some(messages) = &mut self.messages {
            messages.start(cx, run);
        }
        run.progress.begin("holding", &self.first_line(run));
        if let Some(churn) = &mut self.churn {
            churn.start(cx);
        }
    }

    fn is_done(&self, _cx: &Cx<P>, run: &Run<'_, P>) -> bool {
        let is_idle = run.in_flight == 0 && !run.is_opening();
        is_idle && (self.is_over || run.stats.held == 0)
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        cancel(cx, &mut self.end);
        if !self.is_over {
            run.stats.hold = run.phase_began.elapsed();
        }
        self.stop(cx);
        run.end_opening(cx);
        if run.stats.stop != Some(Stop::Interrupted) {
            run.stats.lose_all_away();
        }
        if let Some(messages) = &mut self.messages {
            messages.count_up(run);
        }
    }

    fn on_open(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) {
        let Some(latency) = run.note_open(cx, token, conn) else { return };
        run.stats.churn.latency.record(latency);
        if run.settings.verify {
            run.open(cx, token, conn);
        } else {
            run.keep(conn);
            run.stats.churn.reopened += 1;
            run.open_more(cx);
        }
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) {
        match (conn.stage, &mut self.messages) {
            (ConnStage::Asked, Some(messages)) => messages.on_answer(cx, run, token, conn),
            _ => {
                run.keep(conn);
                run.stats.churn.reopened += 1;
                run.open_more(cx);
            }
        }
    }

    fn on_close(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        match conn.stage {
            ConnStage::Connecting | ConnStage::Opening => run.note_failure(conn, reason),
            _ if conn.fault == Some(Fault::Closed) => {
                run.stats.churn.closed += 1;
                run.note_closed(conn);
            }
            ConnStage::Asked => {
                Messages::note_gone(run, conn);
                run.note_loss(conn, reason);
            }
            ConnStage::Up => run.note_loss(conn, reason),
        }
        run.open_more(cx);
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
        if self.end == Some(timer) {
            self.end = None;
            if self.is_over {
                run.cut_opening(cx);
            } else {
                self.finish(cx, run);
            }
        } else if run.is_opening_timer(timer) {
            run.open_more(cx);
        } else if let Some(churn) = &mut self.churn {
            churn.on_timer(cx, timer);
        }
    }

    fn on_ready(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, watch: WatchId) {
        if let Some(messages) = &mut self.messages {
            messages.on_ready(cx, run, watch);
        }
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, _is_stalled: bool) {
        if self.messages.is_some() {
            run.progress.tick(&run.stats, run.all_in_flight(), || run.stats.workload_line());
            run.stats.workload.end_interval(run.phase_began.elapsed());
        }
        if run.stats.lost > self.lost_at_tick {
            run.progress.warn(&run.stats.loss_line());
        } else if run.stats.has_lost_most() {
            self.finish(cx, run);
        }
        self.lost_at_tick = run.stats.lost;
    }
}
