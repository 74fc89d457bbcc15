//! What must be true of a context after each turn, whatever the service and the system have done; asserted by the
//! simulation.

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::token::Token;
use crate::wheel::NodeId;

impl<C> Context<C> {
    /// # Panics
    /// When something has leaked, is counted wrongly, or differs from what epoll knows.
    pub(crate) fn check_invariants(&self) {
        self.check_lists();
        self.check_accepted();
        self.check_queues();
        self.check_timers();
        self.check_epoll();
        self.check_stats();
    }

    fn headers(&self) -> impl Iterator<Item = (Token, &ConnHeader)> {
        self.tokens(0..self.slots()).filter_map(|token| Some((token, self.header(token)?)))
    }

    fn check_lists(&self) {
        assert!(self.closed.is_empty(), "connections wait to be removed though the turn is over");
        assert!(self.ready_listeners.is_empty(), "listeners wait though the turn is over");
        let throttled = self.listeners().filter(|id| {
            self.listeners.head(id.key()).is_some_and(|listener| listener.is_throttled())
        });
        assert_eq!(
            throttled.count(),
            self.throttled.len(),
            "the list of throttled listeners is wrong"
        );
        for (token, header) in self.headers() {
            let is_listed = self.listed.contains(&token);
            assert_eq!(header.flags.any(Flags::LISTED), is_listed, "{token:?} in the list");
            let is_held = self.held.iter().any(|(held, _)| *held == token);
            assert_eq!(header.flags.any(Flags::HELD), is_held, "{token:?} among those held back");
            assert!(
                !header.flags.any(Flags::SENDING),
                "bytes of {token:?} wait though the turn is over"
            );
        }
        assert!(
            self.held.iter().all(|(token, _)| self.holds(*token)),
            "bytes are held for no connection"
        );
        assert!(self.sends.is_empty() && self.moving.is_empty() && !self.sockets.has_closes());
    }

    /// Whether there can be no other timer.
    pub(crate) fn has_all_timers(&self) -> bool {
        self.timers.is_full()
    }

    /// The same of all connections.
    pub(crate) fn all_batched_bytes(&self) -> usize {
        self.sends.len_bytes()
    }

    /// Bytes that wait for the end of the turn, and not in a queue.
    pub(crate) fn batched_bytes(&self, token: Token) -> usize {
        self.sends.bytes_of(token)
    }

    fn check_queues(&self) {
        let held: Vec<u32> = self.headers().filter_map(|(_, header)| header.queue()).collect();
        let mut known: Vec<u32> = held.iter().chain(&self.queues_free).copied().collect();
        known.sort_unstable();
        let all: Vec<u32> = (0..self.queues.len() as u32).collect();
        assert_eq!(known, all, "a queue is lost, or has two owners");
        assert!(held.iter().all(|&queue| !self.queues[queue as usize].is_empty()));
        assert!(self.queues_free.iter().all(|&queue| self.queues[queue as usize].is_empty()));
        let bytes: usize = self.queues.iter().map(|queue| queue.len_bytes()).sum();
        assert_eq!(bytes, self.stats.queued_bytes, "queued bytes are counted wrongly");
        for (token, header) in self.headers() {
            if let Some(queue) = header.queue() {
                assert_eq!(self.queue_owners[queue as usize], Some(token), "whose queue it is");
            }
        }
        assert_eq!(
            self.retry.is_some(),
            !held.is_empty(),
            "queues are tried again while there is one"
        );
    }

    fn check_timers(&self) {
        let timeouts = self.headers().filter(|(_, header)| header.timer != NodeId::NONE).count();
        let grace = self.shutdown.as_ref().is_some_and(|shutdown| shutdown.grace.is_some());
        let pause = self.throttled.has_pause();
        assert_eq!(pause, self.throttled.len() > 0, "a pause is for those that throttle");
        let retry = self.retry.is_some();
        let single = usize::from(pause) + usize::from(grace) + usize::from(retry);
        for (&(token, tag), timer) in &self.tagged {
            assert!(self.holds(token), "{token:?} has gone and has a timeout with the tag {tag}");
            assert!(self.timers.head(timer.key()).is_some(), "{token:?} {tag} is not armed");
        }
        let owned = timeouts + self.timers.len() + single;
        assert_eq!(self.wheel.len(), owned, "a timer has lost its owner, or the owner its timer");
    }

    fn check_epoll(&self) {
        for (token, header) in self.headers() {
            assert!(header.socket.is_watched(), "epoll does not know of {token:?}");
            let may_wait = !header.has_queue()
                || header.flags.any(Flags::CONNECTING | Flags::UNSENT)
                || header.socket.has_reason_to_wait();
            assert!(may_wait, "bytes of {token:?} wait though nothing keeps them: {header:?}");
        }
    }

    fn check_stats(&self) {
        let stats = &self.stats;
        let open = self.headers().filter(|(_, header)| header.has_opened()).count() as u64;
        assert_eq!(stats.opened - stats.closed, open, "{stats:?}");
        assert_eq!(stats.accepted + stats.connected, stats.opened, "{stats:?}");
        let outbound = self.headers().filter(|(_, header)| header.flags.any(Flags::OUTBOUND));
        assert_eq!(self.outbound, outbound.count(), "connects are counted wrongly");
        assert!(self.accepted() <= self.accepts_max, "accepts have taken slots of connects");
        assert!(stats.open_max >= open && stats.open_max <= stats.opened, "{stats:?}");
    }
}
