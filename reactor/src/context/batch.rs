//! What goes to the kernel together: the sends of a turn, the files that are closed, and the sockets that move from
//! descriptors to registered files.
//!
//! The order is always this one: a send must not come after the close of its file, nor the close of a file after another
//! has taken its place.

use std::mem;

use crate::connection::Flags;
use crate::context::Context;
use crate::context::stream::BATCHED_SEND_BYTES_MAX;
use crate::error::CloseReason;
use crate::sys::{IoResult, Readiness, ReceiveBatch, SendBatch, Socket};
use crate::token::Token;

/// Sockets that have a descriptor while they wait to move.
pub(super) const MOVING_MAX: usize = 64;
/// What one receive of a batch may bring; a connection that has more is read by itself.
const RECEIVE_BYTES: usize = 1024;
const SENDS_MAX: usize = 1024;
const SENDS_BYTES_MAX: usize = 1 << 20;
const _: () = assert!(BATCHED_SEND_BYTES_MAX <= SENDS_BYTES_MAX);

pub(super) fn sends() -> SendBatch {
    SendBatch::with_capacity(SENDS_MAX, SENDS_BYTES_MAX)
}

/// A receive for each event of a wait.
pub(crate) fn receives(events_max: usize, read_buffer_bytes: usize) -> ReceiveBatch {
    ReceiveBatch::with_capacity(events_max, RECEIVE_BYTES.min(read_buffer_bytes))
}

impl<C> Context<C> {
    /// The place of a connection that can be read with others, all that there is to do for it being to read.
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

    /// Lends the state of a connection that a receive of a batch has brought bytes for; `None` where it has gone or does
    /// not read any more since the batch was made.
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

    /// Keeps what was received for a connection that does not read now, until it does.
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

    /// A receive of a batch has brought no bytes, or an error; says whether it is to be reported to the service.
    #[cold]
    pub(crate) fn wants_end(&mut self, token: Token, result: &IoResult) -> bool {
        match self.header(token) {
            None => {
                self.stats.stale_events += 1;
                false
            }
            Some(header) if header.reads() || matches!(result, IoResult::Failed(_)) => true,
            // The end of the input is still there when it is read again.
            Some(_) => {
                self.hold(token, &[]);
                false
            }
        }
    }

    /// Remembers that a connection's socket is to move to a registered file.
    #[inline]
    pub(super) fn move_later(&mut self, token: Token) {
        if self.sockets.has_tables() {
            self.moving.push(token);
            if self.moving.len() >= MOVING_MAX {
                self.flush();
            }
        }
    }

    /// Whether descriptors can be had by closing the socket of the connection that `on_close` is about, or by moving
    /// sockets out of the process's table.
    pub(crate) fn free_descriptors(&mut self) -> bool {
        let can_free = self.close_leaving() | !self.moving.is_empty();
        self.flush();
        can_free
    }

    /// Hands everything over that waits for others to go with.
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

    /// The table with the connection's socket is lost.
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
        // What could not move stays what it was.
        for (place, descriptor) in moving.drain(..) {
            let name = self.connections.keys(place as usize, place as usize + 1).next();
            if let Some(header) = name.and_then(|name| self.connections.head_mut(name)) {
                header.socket = Socket::from(descriptor);
            }
        }
        self.moving_descriptors = moving;
    }
}
