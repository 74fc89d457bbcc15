//! The reactor's own state of a connection: 16 bytes.
//!
//! ```text
//!   connect            accept
//!      |                  |
//!      v                  |
//!  CONNECTING --on_open---+--> open ---- the peer finishes: EOF, on_eof ---+
//!      |                         |  \                                      |
//!      | connect fails           |   finish: FINISHING, then FINISHED -----+-- both finished: closed
//!      |                         |           once the queue is sent (FIN)  |
//!      |                       close                                       |
//!      |                         v                                         |
//!      |                      CLOSING: the queue is sent, then FINISHED;   |
//!      |                         |     further input is discarded          |
//!      |                         |                                         |
//!      |                         | all is acknowledged, the peer           |
//!      |                         | finishes, or flush_timeout              |
//!      v                         v                                         v
//!    CLOSED <----------------------------------- abort, an error, a reset (RESET: a reset is sent)
//!      |
//!      v  when no callback is running
//!    on_close, and the slot is free
//! ```
//!
//! In addition, QUEUED, SENDING and UNSENT describe pending output, and READS_PAUSED, UNREAD, READ_TO_END, LISTED and
//! HELD pending input. A connection that was not accepted is OUTBOUND throughout.

use std::mem;

use crate::sys::{Descriptor, Socket};
use crate::wheel::NodeId;

/// The reactor's half of a connection; the service's half is its `Handler::Conn`.
#[derive(Debug)]
pub(crate) struct ConnHeader {
    pub(crate) socket: Socket,
    pub(crate) timer: NodeId,
    /// Index into the reactor's write queues; valid only with [`Flags::QUEUED`]. An `Option` would take four bytes
    /// more.
    queue: u32,
    pub(crate) flags: Flags,
    /// The descriptor number with which a registered file was added to epoll, if it fits; otherwise `u16::MAX`, and 0
    /// before the move.
    watched_as: u16,
}

/// The documented limits: the size of a slot without the service's state, and of an armed timeout.
const _: () = {
    assert!(crate::slab::slot_bytes::<ConnHeader, ()>() <= 24);
    assert!(crate::slab::slot_bytes::<ConnHeader, u32>() <= 24 + 4);
    assert!(crate::slab::slot_bytes::<ConnHeader, u64>() <= 24 + 8);
    assert!(crate::slab::slot_bytes::<ConnHeader, [u64; 5]>() <= 24 + 40);
    assert!(crate::wheel::NODE_BYTES <= 24);
};

impl ConnHeader {
    pub(crate) fn new(socket: Socket, flags: Flags) -> Self {
        Self { socket, timer: NodeId::NONE, queue: 0, flags, watched_as: 0 }
    }

    /// Takes the descriptor for the move to a registered file, and keeps its number, by which epoll identifies the
    /// socket. `None` if the socket has no descriptor.
    pub(crate) fn take_descriptor(&mut self, place: u32) -> Option<Descriptor> {
        if self.socket.place().is_some() {
            return None;
        }
        let descriptor =
            mem::replace(&mut self.socket, Socket::at_place(place)).take_descriptor()?;
        self.watched_as = u16::try_from(descriptor.number()).unwrap_or(u16::MAX);
        Some(descriptor)
    }

    /// The descriptor number with which the socket was added to epoll; `descriptor` is its current one.
    pub(crate) fn watched_as(&self, descriptor: &Descriptor) -> i32 {
        match self.watched_as {
            0 => descriptor.number(),
            number => number.into(),
        }
    }

    pub(crate) fn has_queue(&self) -> bool {
        self.flags.any(Flags::QUEUED)
    }

    pub(crate) fn queue(&self) -> Option<u32> {
        self.has_queue().then_some(self.queue)
    }

    pub(crate) fn set_queue(&mut self, queue: Option<u32>) {
        self.flags.set(Flags::QUEUED, queue.is_some());
        self.queue = queue.unwrap_or(0);
    }

    /// `on_open` was called.
    pub(crate) fn has_opened(&self) -> bool {
        !self.flags.any(Flags::CONNECTING)
    }

    /// Input is passed to the service.
    pub(crate) fn reads(&self) -> bool {
        !self.flags.any(Flags::UNREADABLE | Flags::READS_PAUSED | Flags::CLOSING)
    }

    /// Input is passed to the service, and the connection needs nothing else.
    #[inline]
    pub(crate) fn only_reads(&self) -> bool {
        !self.flags.any(Flags::NOT_SIMPLY_READ)
    }

    /// There is input that epoll will not report, and it is to be read now, for the service or to be discarded.
    pub(crate) fn wants_reading(&self) -> bool {
        self.flags.any(Flags::UNREAD | Flags::HELD) && (self.reads() || self.drains())
    }

    /// Input is discarded.
    pub(crate) fn drains(&self) -> bool {
        self.lingers() && !self.flags.any(Flags::UNREADABLE)
    }

    /// The queue was sent, and the connection waits for the peer to acknowledge it or to finish.
    pub(crate) fn lingers(&self) -> bool {
        self.flags.any(Flags::CLOSING) && self.flags.any(Flags::FINISHED)
    }

    /// Written bytes go to the kernel at once.
    pub(crate) fn sends_at_once(&self) -> bool {
        !self.flags.any(Flags::UNWRITABLE | Flags::CONNECTING | Flags::QUEUED | Flags::SENDING)
    }

    pub(crate) fn takes_writes(&self) -> bool {
        !self.flags.any(Flags::UNWRITABLE)
    }
}

/// The state of a connection, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u16);

impl Flags {
    pub(crate) const NONE: Flags = Flags(0);
    /// An outbound connect is in progress, or an adopted socket is to be opened. Otherwise `on_open` was called.
    pub(crate) const CONNECTING: Flags = Flags(1);
    /// The connection was not accepted: it is an outbound connect or an adopted socket.
    pub(crate) const OUTBOUND: Flags = Flags(1 << 1);
    /// The service has paused reads.
    pub(crate) const READS_PAUSED: Flags = Flags(1 << 2);
    /// The peer has finished writing.
    pub(crate) const EOF: Flags = Flags(1 << 3);
    /// The service has finished writing; queued bytes are still sent.
    pub(crate) const FINISHING: Flags = Flags(1 << 4);
    /// The writing side was shut down, after the queue was sent.
    pub(crate) const FINISHED: Flags = Flags(1 << 5);
    /// To be closed as soon as the queue is empty.
    pub(crate) const CLOSING: Flags = Flags(1 << 6);
    /// In the list of those to be removed.
    pub(crate) const CLOSED: Flags = Flags(1 << 7);
    /// Closing the socket resets it.
    pub(crate) const RESET: Flags = Flags(1 << 8);
    /// Has a write queue.
    pub(crate) const QUEUED: Flags = Flags(1 << 9);
    /// Has bytes in the batch of sends, which was not submitted yet.
    pub(crate) const SENDING: Flags = Flags(1 << 10);
    /// There may be input that epoll will not report again, for example because reads were paused when it was reported.
    pub(crate) const UNREAD: Flags = Flags(1 << 11);
    /// epoll will not report the end of the input again, so the connection is read until the end, an error, or
    /// `EAGAIN`.
    pub(crate) const READ_TO_END: Flags = Flags(1 << 12);
    /// The last send accepted everything, and more is queued: epoll will not report room.
    pub(crate) const UNSENT: Flags = Flags(1 << 13);
    /// In the list of those to be served again without a report by epoll.
    pub(crate) const LISTED: Flags = Flags(1 << 14);
    /// Bytes were received before reads were paused, and are delivered when reads are resumed.
    pub(crate) const HELD: Flags = Flags(1 << 15);

    /// There is nothing to read, either not yet or no more.
    const UNREADABLE: Flags = Flags(Self::CONNECTING.0 | Self::EOF.0 | Self::CLOSED.0);

    /// The connection needs more than a read for the service.
    const NOT_SIMPLY_READ: Flags = Flags(
        Self::UNREADABLE.0 | Self::READS_PAUSED.0 | Self::CLOSING.0 | Self::QUEUED.0 | Self::HELD.0,
    );

    /// Writes are refused.
    const UNWRITABLE: Flags = Flags(Self::FINISHING.0 | Self::CLOSING.0 | Self::CLOSED.0);

    pub(crate) fn any(self, flags: Flags) -> bool {
        self.0 & flags.0 != 0
    }

    pub(crate) fn set(&mut self, flags: Flags, on: bool) {
        if on { self.0 |= flags.0 } else { self.0 &= !flags.0 }
    }
}

impl std::ops::BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}
