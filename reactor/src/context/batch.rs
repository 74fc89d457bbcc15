//! Operations that go to the kernel together: the sends of a turn, the closes of files, and the moves of sockets from
//! descriptors to registered files.
//!
//! They are always submitted in this order: a send must not follow the close of its file, and the close of a file must
//! not follow the move of another file into the same place.

use std::mem;

use crate::connection::Flags;
use crate::context::Context;
use crate::context::stream::BATCHED_SEND_BYTES_MAX;
use crate::error::CloseReason;
use crate::sys::{IoResult, Readiness, ReceiveBatch, SendBatch, Socket};
use crate::token::Token;

/// The maximum number of sockets that have a descriptor while they wait to move.
pub(super) const MOVING_MAX: usize = 64;
/// The maximum of one receive of a batch; a connection that has more is then read singly.
const RECEIVE_BYTES: usize = 1024;
const SENDS_MAX: usize = 1024;
const SENDS_BYTES_MAX: usize = 1 << 20;
const _: () = assert!(BATCHED_SEND_BYTES_MAX <= SENDS_BYTES_MAX);

pub(super) fn sends() -> SendBatch {
    SendBatch::with_capacity(SENDS_MAX, SENDS_BYTES_MAX)
}

/// A batch with room for one receive per event of a wait.
pub(crate) fn receives(events_max: usize, read_buffer_bytes: usize) -> ReceiveBatch {
    ReceiveBatch::with_capacity(events_max, RECEIVE_BYTES.min(read_buffer_bytes))
}

impl<C> Context<C> {
    /// The place in the tables of a connection that can be read in a batch; `None` if it needs more than a read.
    #[inline]
    pub(crate) fn batched_place(&mut self, token: Token, ready: Readiness) -> Option<u32> {
        let header = self.header_mut(token)?;
        if !header.only_reads() {
            return None;
        }
        if ready.any(Readiness::READ_TO_END) {
            header.flags.set(Flags::READ_TO_END, true);
        }
        header.socket.place()
    }

    /// Lends the state of a connection for which a batched receive returned bytes; `None` if it was removed or stopped
    /// reading after the batch was made.
    #[inline]
    pub(crate) fn lend_received(
        &mut self,
        token: Token,
        received: usize,
        was_full: bool,
    ) -> Option<C> {
        let (header, conn) = self.connections.lend(token.key())?;
        if !header.reads() {
            self.give_back(token, conn);
            return None;
        }
        if was_full || header.flags.any(Flags::READ_TO_END | Flags::UNREAD) {
            self.note_partial_read(token, was_full);
        }
        self.stats.bytes_in += received as u64;
        Some(conn)
    }

    /// Keeps bytes that were received for a connection whose reads are paused, until they are resumed.
    #[cold]
    pub(crate) fn hold(&mut self, token: Token, bytes: &[u8]) {
        let Some(header) = self.header_mut(token) else {
            self.stats.stale_events += 1;
            return;
        };
        header.flags.set(Flags::UNREAD, true);
        let only_pauses = !header.flags.any(Flags::CLOSING | Flags::CLOSED);
        if (only_pauses || header.socket.is_detached()) && !bytes.is_empty() {
            header.flags.set(Flags::HELD, true);
            self.held.push((token, bytes.into()));
        }
        self.list_unread(token);
    }

    /// A batched receive returned no bytes or an error; returns whether to report this to the service.
    #[cold]
    pub(crate) fn wants_end(&mut self, token: Token, result: &IoResult) -> bool {
        match self.header(token) {
            None => {
                self.stats.stale_events += 1;
                false
            }
            Some(header) if header.reads() || matches!(result, IoResult::Failed(_)) => true,
            // A later read returns the end of the input again.
            Some(_) => {
                self.hold(token, &[]);
                false
            }
        }
    }

    /// Schedules the move of a connection's socket to a registered file.
    #[inline]
    pub(super) fn move_later(&mut self, token: Token) {
        if self.sockets.has_tables() {
            self.moving.push(token);
            if self.moving.len() >= MOVING_MAX {
                self.flush();
            }
        }
    }

    /// Tries to free descriptors, by closing the socket of the connection whose `on_close` is running and by moving
    /// sockets out of the process's table; returns whether there was such a socket.
    pub(crate) fn free_descriptors(&mut self) -> bool {
        let can_free = self.close_leaving() | !self.moving.is_empty();
        self.flush();
        can_free
    }

    /// Submits all batches.
    #[inline]
    pub(crate) fn flush(&mut self) {
        if self.sockets.has_tables() {
            self.flush_batches();
        }
    }

    #[inline(never)]
    fn flush_batches(&mut self) {
        self.flush_sends();
        self.close_leaving();
        if self.sockets.has_closes() {
            self.sockets.flush_closes();
        }
        while let Some(places) = self.sockets.take_lost() {
            let lost: Vec<_> = self.tokens(places).collect();
            for token in lost {
                self.lose(token);
            }
        }
        if !self.moving.is_empty() {
            self.move_sockets();
        }
    }

    /// The table that held the connection's socket is lost.
    fn lose(&mut self, token: Token) {
        if self.header(token).is_some_and(|header| header.socket.place().is_some()) {
            self.mark_closed(token, CloseReason::Failed(crate::sys::no_memory("io_uring_enter")));
        }
    }

    fn move_sockets(&mut self) {
        let mut moving = mem::take(&mut self.moving_descriptors);
        for token in self.moving.drain(..) {
            let Some(header) = self.connections.head_mut(token.key()) else { continue };
            let place = token.key().index();
            moving.extend(header.take_descriptor(place).map(|descriptor| (place, descriptor)));
        }
        self.sockets.register(&mut moving);
        // A socket that could not be moved keeps its descriptor.
        for (place, descriptor) in moving.drain(..) {
            let name = self.connections.keys(place as usize, place as usize + 1).next();
            if let Some(header) = name.and_then(|name| self.connections.head_mut(name)) {
                header.socket = Socket::from(descriptor);
            }
        }
        self.moving_descriptors = moving;
    }
}
