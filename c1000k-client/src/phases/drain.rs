//! The end of a run: every connection is reset, so that no TIME_WAIT stays behind.
//!
//! A reset is sent once. If the network loses it, the server keeps a dead connection; so across a network the client
//! resets no faster than the ramp has shown the network to carry. Loopback can lose resets too: packets wait in a queue
//! of 1,000 for each processor (`net.core.netdev_max_backlog`), which a burst overflows on a busy machine.

use std::time::Duration;

use c1000k_host::format;
use reactor::{CloseReason, Context, TimerId, Token};

use super::Phase;
use crate::destination::Destination;
use crate::protocols::Protocol;
use crate::run::{Conn, Cx, Run, arm, cancel};

/// Slots that are visited before other events are handled.
const SLOTS_PER_SLICE_MAX: usize = 4096;

/// On loopback: a quarter of the kernel's queue, because there may be other clients.
const SLOTS_PER_SLICE_ON_LOOPBACK: usize = 256;

/// On loopback: the client sleeps, so that the kernel can deliver the packets.
const PAUSE_ON_LOOPBACK: Duration = Duration::from_millis(1);

/// Time between two slices across a network.
const PAUSE: Duration = Duration::from_millis(10);

/// A reset is one packet, while opening and verifying a connection took the client four.
const TIMES_THE_RAMP: f64 = 2.0;

/// The lowest rate of resets, which any network carries, even after a slow ramp.
const RESETS_PER_SECOND_MIN: f64 = 1000.0;

/// Resets all connections.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    resets: Resets,
}

/// Resets of all connections, slice by slice.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// The slot that is reset next.
    cursor: usize,
    pause: Option<TimerId>,
}

impl Resets {
    /// Resets the connections of the next slots, and arms a timer for the following ones.
    pub(super) fn next_slice<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &Run<'_, P>) {
        let is_local = run.opening.destinations().any(Destination::is_local);
        let is_remote = run.opening.destinations().any(|to| !to.is_local());
        let (mut slots, pause) = slice(!is_remote, run.stats.peak, run.stats.ramp);
        if is_local {
            slots = slots.min(SLOTS_PER_SLICE_ON_LOOPBACK);
        }
        let slice = self.cursor..self.cursor + slots;
        self.cursor = slice.end;
        let tokens: Vec<Token> = cx.tokens(slice).collect();
        for token in tokens {
            cx.abort(token);
        }
        if self.cursor < cx.slots() {
            self.pause = arm(cx, pause);
        }
    }

    pub(super) fn on_timer<P: Protocol>(
        &mut self,
        cx: &mut Cx<P>,
        run: &Run<'_, P>,
        timer: TimerId,
    ) {
        if self.pause == Some(timer) {
            self.pause = None;
            self.next_slice(cx, run);
        }
    }

    pub(super) fn are_done<C>(&self, cx: &Context<C>) -> bool {
        self.cursor >= cx.slots()
    }

    pub(super) fn cancel<C>(&mut self, cx: &mut Context<C>) {
        cancel(cx, &mut self.pause);
    }
}

impl<P: Protocol> Phase<P> for Drain {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        if run.stats.held > 0 {
            // A Unix-domain socket has neither a reset nor TIME_WAIT.
            let how = match run.opening.destinations().all(Destination::is_unix) {
                true => "",
                false => " by reset, which leaves no TIME_WAIT",
            };
            let held = format::counted(run.stats.held, "connection");
            run.progress.begin("closing", &format!("closing {held}{how}"));
        }
        self.resets.next_slice(cx, run);
    }

    fn is_done(&self, cx: &Cx<P>, _run: &Run<'_, P>) -> bool {
        self.resets.are_done(cx)
    }

    fn end(&mut self, cx: &mut Cx<P>, _run: &mut Run<'_, P>) {
        self.resets.cancel(cx);
    }

    /// This end closes them.
    fn on_close(
        &mut self,
        _cx: &mut Cx<P>,
        _run: &mut Run<'_, P>,
        _conn: &Conn<P::State>,
        _reason: &CloseReason,
    ) {
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
        self.resets.on_timer(cx, run, timer);
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, _is_stalled: bool) {
        run.progress.tick(&run.stats, run.all_in_flight(), || {
            format!("closing: {} left", format::count(cx.connections() as u64))
        });
    }
}

/// The number of slots of a slice, and the pause after it.
pub(crate) fn slice(is_here: bool, opened: u64, ramp: Duration) -> (usize, Duration) {
    if is_here {
        return (SLOTS_PER_SLICE_ON_LOOPBACK, PAUSE_ON_LOOPBACK);
    }
    let opened_per_second = opened as f64 / ramp.as_secs_f64();
    let resets_per_second = (opened_per_second * TIMES_THE_RAMP).max(RESETS_PER_SECOND_MIN);
    let slots = (resets_per_second * PAUSE.as_secs_f64()) as usize;
    (slots.clamp(1, SLOTS_PER_SLICE_MAX), PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resets_per_second(opened: u64, ramp: Duration) -> f64 {
        let (slots, pause) = slice(false, opened, ramp);
        slots as f64 / pause.as_secs_f64()
    }

    #[test]
    fn across_a_network_it_closes_twice_as_fast_as_it_opened() {
        let rate = resets_per_second(500_000, Duration::from_secs(100));
        assert!((9_900.0..=10_000.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_ramp_without_time_or_without_speed_has_a_valid_rate() {
        assert_eq!(resets_per_second(0, Duration::ZERO), RESETS_PER_SECOND_MIN);
        assert_eq!(resets_per_second(1, Duration::from_secs(3600)), RESETS_PER_SECOND_MIN);
        assert_eq!(slice(false, 7, Duration::ZERO).0, SLOTS_PER_SLICE_MAX);
    }

    #[test]
    fn on_loopback_the_kernel_can_deliver_before_its_queue_is_full() {
        let (slots, pause) = slice(true, 1_000_000, Duration::from_secs(30));
        assert!(slots < 1_000 / 2, "{slots} resets at once");
        assert!(pause > Duration::ZERO);
    }
}
