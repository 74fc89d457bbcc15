//! The ramp: all connections are opened, and each is verified.

use std::time::{Duration, Instant};

use c1000k_host::format::{self, rate};
use c1000k_record::per_second;
use reactor::{CloseReason, TimerId, Token};

use super::Phase;
use crate::pacing::Pace;
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Run, TICK, arm, cancel, some};
use crate::stats::cpu_seconds;

/// Without verification, a connection that is dropped within this time was not admitted.
const PROBATION: Duration = Duration::from_secs(1);

/// Opens connections until the goal is reached, or something stops it.
#[derive(Debug, Default)]
pub(crate) struct Ramp {
    held_at_tick: u64,
    cpu_before: Option<f64>,
    /// Without verification, the end of the youngest connection's probation.
    settle: Option<TimerId>,
    is_over: bool,
}

impl Ramp {
    /// Starts as many connects as may be in flight, and ends the ramp when nothing is left.
    fn open_more<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        if run.open_more(cx) {
            self.settle_down(cx, run);
        }
    }

    /// Ends the ramp. Without verification it first waits for the end of the youngest connection's probation.
    fn settle_down<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &Run<'_, P>) {
        let youngest = run.stats.started.elapsed().saturating_sub(run.stats.ramp);
        if run.settings.verify || run.stats.held == 0 || youngest >= PROBATION {
            self.is_over = true;
        } else if self.settle.is_none() {
            self.settle = arm(cx, PROBATION - youngest);
        }
    }

    /// The connection is verified, or needs no verification.
    fn keep<P: Protocol>(&mut self, run: &mut Run<'_, P>, conn: &mut Conn<P::State>) {
        run.keep(conn);
        run.stats.note_ramp(Instant::now());
    }

    /// Opens no more connections; the attempts in flight have failed.
    fn complete<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        run.stats.failures.count_unfinished(run.opening.in_flight as u64);
        run.fail_opening(cx);
        run.stats.sample(Instant::now());
        run.stats.usage.note_peak(run.stats.held);
        run.stats.verify_seconds =
            run.stats.verified_passes.iter().map(|_| run.stats.ramp.as_secs_f64()).collect();
        if !run.settings.verify && run.stats.refused_by_server > 0 {
            // Those that the server dropped were open for a moment, so the peak counted some of them.
            run.stats.peak = run.stats.held;
            run.stats.targets.iter_mut().for_each(|target| target.peak = target.held);
        }
        run.warn_of_closed_ports();
        if run.stats.held == 0 {
            run.end_early();
        }
    }

    fn line<P: Protocol>(&self, run: &Run<'_, P>) -> String {
        let opened = run.stats.held.saturating_sub(self.held_at_tick);
        format!(
            "opening: {} of {}, {}{}{}",
            format::count(run.stats.held),
            format::count(u64::from(run.settings.goal)),
            rate(per_second(opened, TICK.as_secs_f64())),
            some(run.stats.failures.by_name().values().sum(), "failed attempts"),
            some(run.stats.lost, "lost"),
        )
    }
}

impl<P: Protocol> Phase<P> for Ramp {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        run.stats.sample(run.stats.started);
        self.cpu_before = cpu_seconds();
        let stages = &run.settings.stages;
        run.opening.pace = (!stages.is_empty()).then(|| Pace::new(stages, run.stats.started));
        self.open_more(cx, run);
    }

    fn is_done(&self, _cx: &Cx<P>, _run: &Run<'_, P>) -> bool {
        self.is_over
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        run.stats.note_ramp_cpu(self.cpu_before);
        cancel(cx, &mut self.settle);
        if self.is_over {
            self.complete(cx, run);
        } else {
            run.end_opening(cx);
            if run.settings.verify {
                run.stats.verify_seconds.push(run.phase_began.elapsed().as_secs_f64());
            }
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
        run.stats.note_connect(latency);
        if run.settings.verify {
            run.open(cx, token, conn);
        } else {
            self.keep(run, conn);
            self.open_more(cx, run);
        }
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        _token: Token,
        conn: &mut Conn<P::State>,
    ) {
        run.count_answer();
        self.keep(run, conn);
        self.open_more(cx, run);
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
            ConnStage::Up | ConnStage::Asked
                if !run.settings.verify && run.age(conn) < PROBATION =>
            {
                run.note_drop(conn, reason);
            }
            ConnStage::Up | ConnStage::Asked => run.note_loss(conn, reason),
        }
        self.open_more(cx, run);
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
        if self.settle == Some(timer) {
            self.settle = None;
        } else if !run.is_opening_timer(timer) {
            return;
        }
        self.open_more(cx, run);
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool) {
        run.stats.sample(Instant::now());
        run.progress.tick(&run.stats, run.all_in_flight(), || self.line(run));
        self.held_at_tick = run.stats.held;
        if is_stalled {
            run.stop_stalled();
        }
        if is_stalled && run.stats.held == 0 {
            self.is_over = true;
        } else {
            self.open_more(cx, run);
        }
    }
}
