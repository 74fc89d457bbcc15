//! Room for writes: of one connection, and in all queues together.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::token::Token;

/// Connections without a queue of their own that wait for room in all queues together.
#[derive(Debug, Default)]
pub(super) struct RoomWaiters {
    tokens: BTreeSet<Token>,
    /// The last connection called; the search continues after it.
    last: Option<Token>,
}

impl RoomWaiters {
    pub(super) fn remove(&mut self, token: Token) {
        if !self.tokens.is_empty() {
            self.tokens.remove(&token);
        }
    }

    fn pop(&mut self) -> Option<Token> {
        let after_last =
            self.last.and_then(|last| self.tokens.range((Excluded(last), Unbounded)).next());
        let token = *after_last.or_else(|| self.tokens.first())?;
        self.tokens.remove(&token);
        self.last = Some(token);
        Some(token)
    }
}

impl<C> Context<C> {
    /// Returns the number of bytes that a write is guaranteed to accept now, whatever the kernel does; 0 for a stale
    /// token, and for a connection that is closed for writing. A write to another connection may use some of this room.
    ///
    /// If it is less than [`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max),
    /// [`on_drain`](crate::Handler::on_drain) follows when there is more: when this connection's queue is empty or, if
    /// it has none, when all queues together have room again.
    ///
    /// With [registered files](crate::FileTable::Registered), if this turn has already written to the connection, that
    /// is sent first, at the cost of a system call.
    pub fn write_room(&mut self, token: Token) -> usize {
        if self.header(token).is_some_and(|header| header.flags.any(Flags::SENDING)) {
            self.flush_sends();
        }
        let Some(header) = self.header(token).filter(|header| header.takes_writes()) else {
            return 0;
        };
        let own = self.config.write_queue_bytes_max.saturating_sub(self.queue_bytes(header));
        let of_all = self.queues_room();
        if of_all < own {
            self.await_room(token);
        }
        own.min(of_all)
    }

    /// Makes `on_drain` follow when all queues together have room again. A connection that has a queue, or is still
    /// connecting, gets another callback first.
    #[cold]
    pub(super) fn await_room(&mut self, token: Token) {
        if self.header(token).is_some_and(can_wait_for_room) {
            self.room_waiters.tokens.insert(token);
        }
    }

    /// Whether a waiting connection now has room.
    pub(crate) fn has_room_for_waiters(&self) -> bool {
        !self.room_waiters.tokens.is_empty() && self.queues_room() >= self.room_for_waiters()
    }

    /// The next waiting connection, if there is room.
    pub(crate) fn next_with_room(&mut self) -> Option<Token> {
        while self.has_room_for_waiters() {
            let token = self.room_waiters.pop()?;
            if self.header(token).is_some_and(can_wait_for_room) {
                return Some(token);
            }
        }
        None
    }

    /// Room for the largest write.
    fn room_for_waiters(&self) -> usize {
        self.config.write_queue_bytes_max.min(self.config.write_queues_bytes_max)
    }
}

fn can_wait_for_room(header: &ConnHeader) -> bool {
    header.takes_writes() && !header.flags.any(Flags::CONNECTING | Flags::QUEUED)
}
