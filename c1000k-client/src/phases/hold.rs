//! The hold: nothing happens, and nothing may be lost.

use c1000k_host::format;
use reactor::TimerId;

use super::Phase;
use crate::protocols::Protocol;
use crate::run::{Cx, Run, arm, cancel};

/// Holds all connections for the time that was asked for, or until none is left.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    end: Option<TimerId>,
    lost_at_tick: u64,
    is_over: bool,
}

impl<P: Protocol> Phase<P> for Hold {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        self.lost_at_tick = run.stats.lost;
        run.progress.begin(
            "holding",
            &format!(
                "holding {} for {} s",
                format::counted(run.stats.held, "connection"),
                run.settings.hold.as_secs_f64()
            ),
        );
        // The reactor counts from the beginning of its turn, which may be a while ago.
        let end = run.phase_began + run.settings.hold;
        self.end = arm(cx, end.saturating_duration_since(cx.now()));
    }

    fn is_done(&self, _cx: &Cx<P>, run: &Run<'_, P>) -> bool {
        self.is_over || run.stats.held == 0
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        cancel(cx, &mut self.end);
        run.stats.hold = run.phase_began.elapsed();
    }

    fn on_timer(&mut self, _cx: &mut Cx<P>, _run: &mut Run<'_, P>, timer: TimerId) {
        if self.end == Some(timer) {
            self.end = None;
            self.is_over = true;
        }
    }

    fn tick(&mut self, _cx: &mut Cx<P>, run: &mut Run<'_, P>, _is_stalled: bool) {
        if run.stats.lost > self.lost_at_tick {
            run.progress.warn(&run.loss_line());
        } else if run.stats.has_lost_most() {
            self.is_over = true;
        }
        self.lost_at_tick = run.stats.lost;
    }
}
