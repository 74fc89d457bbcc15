//! What the reactor itself keeps of a connection: sixteen bytes.
//!
//! ```text
//!   connect            accept
//!      |                  |
//!      v                  |
//!  CONNECTING --on_open---+--> open ------ the peer ends: EOF, on_eof -----+
//!      |                         |  \                                      |
//!      | connect fails           |   finish: FINISHING, then FINISHED -----+-- both ends: closed
//!      |                         |           once the queue is out (FIN)   |
//!      |                       close                                       |
//!      |                         v                                         |
//!      |                      CLOSING: the queue goes out, then FINISHED;  |
//!      |                         |     what still arrives is dropped       |
//!      |                         |                                         |
//!      |                         | the peer ends, or flush_timeout         |
//!      v                         v                                         v
//!    CLOSED <----------------------------------- abort, an error, a reset (RESET: the peer is sent one)
//!      |
//!      v  when no callback runs
//!    on_close, and the slot is free
//! ```
//!
//! Beside these, QUEUED, SENDING and UNSENT say what waits to go out, and READS_PAUSED, UNREAD, READ_TO_END, LISTED and
//! HELD what waits to be read. A connection that was not accepted is OUTBOUND throughout.

use std::mem;

use crate::sys::{Descriptor, Socket};
use crate::wheel::NodeId;

/// The reactor's half of a connection; the service's half is its `Handler::Conn`.
#[derive(Debug)]
pub(crate) struct ConnHeader {
    pub(crate) socket: Socket,
    pub(crate) timer: NodeId,
    /// Index into the reactor's write queues; of no meaning without [`Flags::QUEUED`]. An `Option` would cost four
    /// bytes more.
    queue: u32,
    pub(crate) flags: Flags,
    /// The number of the descriptor by which epoll knows a registered file, where that fits.
    watched_as: u16,
}

/// The bytes that a connection costs beside its state, and what an armed timeout adds; both are promises.
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

    /// The socket moves to a registered file: takes its descriptor, by which epoll goes on knowing it. `None` where it
    /// has none.
    pub(crate) fn take_descriptor(&mut self, place: u32) -> Option<Descriptor> {
        if self.socket.place().is_some() {
            return None;
        }
        let descriptor =
            mem::replace(&mut self.socket, Socket::at_place(place)).take_descriptor()?;
        self.watched_as = u16::try_from(descriptor.number()).unwrap_or(u16::MAX);
        Some(descriptor)
    }

    /// The number by which epoll knows the socket that has this descriptor now.
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

    /// What arrives is for the service.
    pub(crate) fn reads(&self) -> bool {
        !self.flags.any(Flags::UNREADABLE | Flags::READS_PAUSED | Flags::CLOSING)
    }

    /// What arrives is for the service, and that is all there is to do.
    #[inline]
    pub(crate) fn only_reads(&self) -> bool {
        !self.flags.any(Flags::NOT_SIMPLY_READ)
    }

    /// There is input that epoll will not report, and it is wanted now: by the service, or to be dropped.
    pub(crate) fn wants_reading(&self) -> bool {
        self.flags.any(Flags::UNREAD | Flags::HELD) && (self.reads() || self.drains())
    }

    /// What arrives is dropped.
    pub(crate) fn drains(&self) -> bool {
        self.lingers() && !self.flags.any(Flags::UNREADABLE)
    }

    /// All has gone out, and only the peer's end is missing.
    pub(crate) fn lingers(&self) -> bool {
        self.flags.any(Flags::CLOSING) && self.flags.any(Flags::FINISHED)
    }

    /// What is written goes to the kernel at once.
    pub(crate) fn sends_at_once(&self) -> bool {
        !self.flags.any(Flags::UNWRITABLE | Flags::CONNECTING | Flags::QUEUED | Flags::SENDING)
    }

    pub(crate) fn takes_writes(&self) -> bool {
        !self.flags.any(Flags::UNWRITABLE)
    }
}

/// The state of a connection, a bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u16);

impl Flags {
    pub(crate) const NONE: Flags = Flags(0);
    /// An outbound connect is under way; without this, `on_open` was called.
    pub(crate) const CONNECTING: Flags = Flags(1);
    /// It was not accepted: an outbound connect, or an adopted socket.
    pub(crate) const OUTBOUND: Flags = Flags(1 << 1);
    /// The service does not want to read now.
    pub(crate) const READS_PAUSED: Flags = Flags(1 << 2);
    /// The peer has finished writing.
    pub(crate) const EOF: Flags = Flags(1 << 3);
    /// The service has finished writing; what is queued still goes out.
    pub(crate) const FINISHING: Flags = Flags(1 << 4);
    /// And it has gone out: the kernel knows.
    pub(crate) const FINISHED: Flags = Flags(1 << 5);
    /// To be closed as soon as the queue is empty.
    pub(crate) const CLOSING: Flags = Flags(1 << 6);
    /// In the list of those to be removed.
    pub(crate) const CLOSED: Flags = Flags(1 << 7);
    /// Closing the socket resets it.
    pub(crate) const RESET: Flags = Flags(1 << 8);
    /// Has a write queue.
    pub(crate) const QUEUED: Flags = Flags(1 << 9);
    /// Bytes are in the batch of sends that has not gone to the kernel yet.
    pub(crate) const SENDING: Flags = Flags(1 << 10);
    /// epoll has reported input that was not read: reads were paused, or the connect was not known to be decided.
    pub(crate) const UNREAD: Flags = Flags(1 << 11);
    /// epoll will report nothing more of this input's end, so it is read until the end, an error, or nothing.
    pub(crate) const READ_TO_END: Flags = Flags(1 << 12);
    /// The last send took all that it was offered, and more waits in the queue: epoll has nothing to report.
    pub(crate) const UNSENT: Flags = Flags(1 << 13);
    /// In the list of those to be served again though epoll reports nothing.
    pub(crate) const LISTED: Flags = Flags(1 << 14);
    /// Bytes were received before reads were paused, and wait for the service to read again.
    pub(crate) const HELD: Flags = Flags(1 << 15);

    /// There is nothing to read, not yet or never more.
    const UNREADABLE: Flags = Flags(Self::CONNECTING.0 | Self::EOF.0 | Self::CLOSED.0);

    /// What arrives is not simply for the service, or something has to be sent first.
    const NOT_SIMPLY_READ: Flags = Flags(
        Self::UNREADABLE.0 | Self::READS_PAUSED.0 | Self::CLOSING.0 | Self::QUEUED.0 | Self::HELD.0,
    );

    /// Nothing more is taken from the service.
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
