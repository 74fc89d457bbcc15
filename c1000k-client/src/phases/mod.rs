//! The phases of a run: one file for each.

mod drain;
mod hold;
mod ramp;
mod storm;
mod verify;

use reactor::{CloseReason, TimerId, Token, WatchId};

pub(crate) use drain::{Drain, slice as slice_of_resets};
pub(crate) use hold::Hold;
pub(crate) use ramp::Ramp;
pub(crate) use storm::Storm;
pub(crate) use verify::Verify;

use crate::protocols::Protocol;
use crate::run::{Conn, Cx, Run};

/// One phase of a run. The default methods are those of most phases.
///
/// It ends when it is done, or by a signal, and then the next one is entered.
pub(crate) trait Phase<P: Protocol> {
    /// The phase begins.
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>);

    /// Whether the phase is complete.
    fn is_done(&self, cx: &Cx<P>, run: &Run<'_, P>) -> bool;

    /// Cancels its timers, whether it is complete or not.
    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>);

    /// A connection has opened.
    fn on_open(
        &mut self,
        _cx: &mut Cx<P>,
        _run: &mut Run<'_, P>,
        _token: Token,
        _conn: &mut Conn<P::State>,
    ) {
    }

    /// A connection has received its complete answer.
    fn on_answer(
        &mut self,
        _cx: &mut Cx<P>,
        _run: &mut Run<'_, P>,
        _token: Token,
        _conn: &mut Conn<P::State>,
    ) {
    }

    /// A connection has ended: usually one that was held, and is lost.
    fn on_close(
        &mut self,
        _cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        run.note_loss(conn, reason);
    }

    /// One of its timers has expired.
    fn on_timer(&mut self, _cx: &mut Cx<P>, _run: &mut Run<'_, P>, _timer: TimerId) {}

    /// A descriptor that it watches is ready.
    fn on_ready(&mut self, _cx: &mut Cx<P>, _run: &mut Run<'_, P>, _watch: WatchId) {}

    /// A second has passed; `is_stalled`: nothing has succeeded for too long.
    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool);
}

/// One type for all phases of the list below.
macro_rules! phases {
    ($($phase:ident,)+) => {
        /// Any of the phases.
        #[derive(Debug)]
        pub(crate) enum AnyPhase {
            $($phase($phase),)+
        }

        $(impl From<$phase> for AnyPhase {
            fn from(phase: $phase) -> Self {
                Self::$phase(phase)
            }
        })+

        impl<P: Protocol> Phase<P> for AnyPhase {
            fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
                match self { $(Self::$phase(phase) => phase.enter(cx, run),)+ }
            }

            fn is_done(&self, cx: &Cx<P>, run: &Run<'_, P>) -> bool {
                match self { $(Self::$phase(phase) => phase.is_done(cx, run),)+ }
            }

            fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
                match self { $(Self::$phase(phase) => phase.end(cx, run),)+ }
            }

            fn on_open(
                &mut self,
                cx: &mut Cx<P>,
                run: &mut Run<'_, P>,
                token: Token,
                conn: &mut Conn<P::State>,
            ) {
                match self { $(Self::$phase(phase) => phase.on_open(cx, run, token, conn),)+ }
            }

            fn on_answer(
                &mut self,
                cx: &mut Cx<P>,
                run: &mut Run<'_, P>,
                token: Token,
                conn: &mut Conn<P::State>,
            ) {
                match self { $(Self::$phase(phase) => phase.on_answer(cx, run, token, conn),)+ }
            }

            fn on_close(
                &mut self,
                cx: &mut Cx<P>,
                run: &mut Run<'_, P>,
                conn: &Conn<P::State>,
                reason: &CloseReason,
            ) {
                match self { $(Self::$phase(phase) => phase.on_close(cx, run, conn, reason),)+ }
            }

            fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
                match self { $(Self::$phase(phase) => phase.on_timer(cx, run, timer),)+ }
            }

            fn on_ready(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, watch: WatchId) {
                match self { $(Self::$phase(phase) => phase.on_ready(cx, run, watch),)+ }
            }

            fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool) {
                match self { $(Self::$phase(phase) => phase.tick(cx, run, is_stalled),)+ }
            }
        }
    };
}

phases! {
    Ramp,
    Hold,
    Storm,
    Verify,
    Drain,
}
