//! The storm: all connections are reset at once, as if a network or a gateway failed, and are reopened together.

use std::time::{Duration, Instant};

use c1000k_host::format;
use reactor::{CloseReason, TimerId, Token};

use super::Phase;
use super::drain::Resets;
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Run, some};

/// Closes all connections and reopens them.
#[derive(Debug, Default)]
pub(crate) struct Storm {
    resets: Resets,
    /// When the last one was closed, and the first one was reopened.
    ebb: Option<Instant>,
    is_over: bool,
}

impl Storm {
    fn open_more<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.is_over = self.is_over || run.open_more(cx);
    }

    /// Reopens the connections once all are closed.
    fn turn<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        if self.ebb.is_some() || !self.resets.are_done(cx) || run.stats.held > 0 {
            return;
        }
        self.ebb = Some(Instant::now());
        run.stats.storm.drop = run.phase_began.elapsed();
        run.opening.begin_reopening();
        run.restart_stall();
        let dropped = format::counted(run.stats.storm.dropped, "connection");
        run.progress.begin("reopening", &format!("reopening {dropped}"));
        self.open_more(cx, run);
    }

    fn keep<P: Protocol>(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &mut Conn<P::State>,
    ) {
        run.keep(conn);
        run.stats.storm.back += 1;
        run.stats.storm.reopen = self.ebb.map_or(Duration::ZERO, |ebb| ebb.elapsed());
        self.open_more(cx, run);
    }
}

impl<P: Protocol> Phase<P> for Storm {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        let held = format::counted(run.stats.held, "connection");
        run.progress.begin("dropping", &format!("dropping {held} at once"));
        self.resets.next_slice(cx, run);
    }

    fn is_done(&self, _cx: &Cx<P>, _run: &Run<'_, P>) -> bool {
        self.is_over
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.resets.cancel(cx);
        run.end_opening(cx);
        if !self.is_over {
            return;
        }
        run.stats.lose_all_away();
    }

    fn on_open(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) {
        let Some(latency) = run.note_open(cx, token, conn) else { return };
        run.stats.storm.latency.record(latency);
        if run.settings.verify {
            run.open(cx, token, conn);
        } else {
            self.keep(cx, run, conn);
        }
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        _token: Token,
        conn: &mut Conn<P::State>,
    ) {
        self.keep(cx, run, conn);
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
            ConnStage::Up | ConnStage::Asked if self.ebb.is_none() => {
                run.stats.storm.dropped += 1;
                run.note_closed(conn);
            }
            ConnStage::Up | ConnStage::Asked => run.note_loss(conn, reason),
        }
        self.turn(cx, run);
        if self.ebb.is_some() {
            self.open_more(cx, run);
        }
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
        if run.is_opening_timer(timer) {
            self.open_more(cx, run);
        } else {
            self.resets.on_timer(cx, run, timer);
            self.turn(cx, run);
        }
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool) {
        let stats = &run.stats;
        run.progress.tick(&run.stats, run.all_in_flight(), || match self.ebb {
            None => format!("dropping: {} left", format::count(stats.held)),
            Some(_) => format!(
                "reopening: {} of {}{}",
                format::count(stats.storm.back),
                format::count(stats.storm.dropped),
                some(stats.lost, "lost"),
            ),
        });
        self.turn(cx, run);
        if is_stalled && self.ebb.is_some() {
            run.cut_opening(cx);
            self.open_more(cx, run);
        }
    }
}
