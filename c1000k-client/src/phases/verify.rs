//! Verification: a heartbeat of each connection that is held.

use c1000k_host::format;
use reactor::{CloseReason, Token};

use super::Phase;
use crate::protocols::Protocol;
use crate::run::{Conn, Cx, Run, some};
use crate::stats::Stop;

/// Slots that are visited before other events are handled.
const SLOTS_PER_SLICE: usize = 4096;

/// Sends a heartbeat on all connections, with a bounded number of them in flight.
#[derive(Debug, Default)]
pub(crate) struct Verify {
    /// The next slot.
    cursor: usize,
    /// The server has stopped answering.
    is_stalled: bool,
}

impl Verify {
    fn ask_more<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        while run.in_flight < run.settings.in_flight_max && self.cursor < cx.slots() {
            let room = run.settings.in_flight_max - run.in_flight;
            let end = (self.cursor + room.min(SLOTS_PER_SLICE)).min(cx.slots());
            let tokens: Vec<Token> = cx.tokens(self.cursor..end).collect();
            self.cursor = end;
            for token in tokens {
                run.ask(cx, token, cx.now());
            }
        }
    }
}

impl<P: Protocol> Phase<P> for Verify {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        if run.stats.held > 0 {
            run.progress.begin(
                "verifying",
                &format!("proving {} again", format::counted(run.stats.held, "connection")),
            );
        }
        run.stats.verified_passes.push(0);
        self.ask_more(cx, run);
    }

    fn is_done(&self, cx: &Cx<P>, run: &Run<'_, P>) -> bool {
        self.is_stalled || (run.in_flight == 0 && self.cursor >= cx.slots())
    }

    fn end(&mut self, _cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        run.stats.verify_seconds.push(run.phase_began.elapsed().as_secs_f64());
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        _token: Token,
        conn: &mut Conn<P::State>,
    ) {
        run.count_answer();
        run.note_answer(conn);
        self.ask_more(cx, run);
    }

    fn on_close(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        run.note_loss(conn, reason);
        self.ask_more(cx, run);
    }

    fn tick(&mut self, _cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool) {
        run.progress.tick(&run.stats, run.all_in_flight(), || line(run));
        if is_stalled {
            run.stop(Stop::ServerSilent);
            self.is_stalled = true;
        }
    }
}

fn line<P: Protocol>(run: &Run<'_, P>) -> String {
    format!(
        "verifying: {} of {}{}",
        format::count(run.stats.verified().unwrap_or(0)),
        format::count(run.stats.held),
        some(run.stats.lost, "lost"),
    )
}
