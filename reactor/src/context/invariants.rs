//! The invariants of a context after each turn, whatever the service and the system have done; checked by the
//! simulation.

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::token::Token;
use crate::wheel::NodeId;

impl<C> Context<C> {
    /// # Panics
    /// If something has leaked, is counted wrongly, or differs from what is registered with epoll.
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
        assert!(self.ready_listeners.is_empty(), "ready listeners are left after the turn");
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
            assert_eq!(header.flags.any(Flags::LISTED), is_listed, "{token:?}: LISTED");
            let is_held = self.held.iter().any(|(held, _)| *held == token);
            assert_eq!(header.flags.any(Flags::HELD), is_held, "{token:?}: HELD");
            assert!(
                !header.flags.any(Flags::SENDING),
                "batched bytes of {token:?} are left after the turn"
            );
        }
        assert!(
            self.held.iter().all(|(token, _)| self.holds(*token)),
            "bytes are held for a connection that was removed"
        );
        assert!(self.sends.is_empty() && self.moving.is_empty() && !self.sockets.has_closes());
    }

    /// Whether `timers_max` is reached.
    pub(crate) fn has_all_timers(&self) -> bool {
        self.timers.is_full()
    }

    /// Bytes of all connections in the batch of sends.
    pub(crate) fn all_batched_bytes(&self) -> usize {
        self.sends.len_bytes()
    }

    /// Bytes of a connection in the batch of sends, which are not in its queue.
    pub(crate) fn batched_bytes(&self, token: Token) -> usize {
        self.sends.bytes_of(token)
    }

    fn check_queues(&self) {
        let held: Vec<u32> = self.headers().filter_map(|(_, header)| header.queue()).collect();
        let mut known: Vec<u32> = held.iter().chain(&self.queues_free).copied().collect();
        known.sort_unstable();
        let all: Vec<u32> = (0..self.queues.len() as u32).collect();
        assert_eq!(known, all, "a queue has no owner, or two");
        assert!(held.iter().all(|&queue| !self.queues[queue as usize].is_empty()));
        assert!(self.queues_free.iter().all(|&queue| self.queues[queue as usize].is_empty()));
        let bytes: usize = self.queues.iter().map(|queue| queue.len_bytes()).sum();
        assert_eq!(bytes, self.stats.queued_bytes, "queued bytes are counted wrongly");
        for (token, header) in self.headers() {
            if let Some(queue) = header.queue() {
                assert_eq!(self.queue_owners[queue as usize], Some(token), "the owner of a queue");
            }
        }
        assert_eq!(
            self.retry.is_some(),
            !held.is_empty(),
            "the retry timer is armed while a queue exists, and only then"
        );
    }

    fn check_timers(&self) {
        let timeouts = self.headers().filter(|(_, header)| header.timer != NodeId::NONE).count();
        let grace = self.shutdown.as_ref().is_some_and(|shutdown| shutdown.grace.is_some());
        let pause = self.throttled.has_pause();
        assert_eq!(pause, self.throttled.len() > 0, "a pause exists while a listener is throttled");
        let retry = self.retry.is_some();
        let linger = self.lingering.has_check();
        let lingers =
            self.headers().any(|(_, header)| header.lingers() && !header.flags.any(Flags::CLOSED));
        assert!(linger || !lingers, "a connection lingers and is not checked");
        let single = [pause, grace, retry, linger].map(usize::from).iter().sum::<usize>();
        for (&(token, tag), timer) in &self.tagged {
            assert!(self.holds(token), "{token:?} was removed but has a timeout with tag {tag}");
            assert!(self.timers.head(timer.key()).is_some(), "{token:?} {tag} is not armed");
        }
        let owned = timeouts + self.timers.len() + single;
        assert_eq!(
            self.wheel.len(),
            owned,
            "a timer without an owner, or an owner without a timer"
        );
    }

    fn check_epoll(&self) {
        for (token, header) in self.headers() {
            assert!(header.socket.is_watched(), "{token:?} is not registered with epoll");
            let may_wait = !header.has_queue()
                || header.flags.any(Flags::CONNECTING | Flags::UNSENT)
                || header.socket.has_reason_to_wait();
            assert!(may_wait, "bytes of {token:?} wait without a reason: {header:?}");
        }
    }

    fn check_stats(&self) {
        let stats = &self.stats;
        let open = self.headers().filter(|(_, header)| header.has_opened()).count() as u64;
        assert_eq!(stats.opened - stats.closed, open, "{stats:?}");
        assert_eq!(stats.accepted + stats.connected, stats.opened, "{stats:?}");
        let outbound = self.headers().filter(|(_, header)| header.flags.any(Flags::OUTBOUND));
        assert_eq!(self.outbound, outbound.count(), "the count of outbound connections is wrong");
        assert!(self.accepted() <= self.accepts_max, "accepted connections hold reserved slots");
        assert!(stats.open_max >= open && stats.open_max <= stats.opened, "{stats:?}");
    }
}
