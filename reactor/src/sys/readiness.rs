//! What epoll watches for and what it reports.

use std::fmt;

use nix::libc;

/// What happened to a descriptor; given to [`Handler::on_ready`](crate::Handler::on_ready).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Readiness(u32);

impl Readiness {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const READABLE: Self = Self(libc::EPOLLIN as u32);
    pub(crate) const WRITABLE: Self = Self(libc::EPOLLOUT as u32);
    pub(crate) const ERROR: Self = Self(libc::EPOLLERR as u32);
    pub(crate) const HANGUP: Self = Self(libc::EPOLLHUP as u32);
    pub(crate) const PEER_FINISHED: Self = Self(libc::EPOLLRDHUP as u32);
    pub(crate) const URGENT: Self = Self(libc::EPOLLPRI as u32);

    /// The usual report of a connection: bytes have come, and more can be sent.
    pub(crate) const READABLE_AND_WRITABLE: Self = Self::READABLE.with(Self::WRITABLE);
    /// After one of these, a read that brings less than it could may not be the last that brings something.
    pub(crate) const READ_TO_END: Self =
        Self::PEER_FINISHED.with(Self::HANGUP).with(Self::ERROR).with(Self::URGENT);
    /// There is something to be learnt by reading.
    pub(crate) const INPUT: Self = Self::READABLE.with(Self::READ_TO_END);

    pub(super) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[inline]
    pub(crate) const fn any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// A read will not block: there is something, or the end of it (`EPOLLIN`).
    #[must_use]
    pub fn is_readable(self) -> bool {
        self.any(Self::READABLE)
    }

    /// A write will not block (`EPOLLOUT`).
    #[must_use]
    pub fn is_writable(self) -> bool {
        self.any(Self::WRITABLE)
    }

    /// An error waits on the descriptor, or a pipe has lost its reader (`EPOLLERR`). The kernel reports it whatever
    /// the interest.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.any(Self::ERROR)
    }

    /// The other side is gone, in both directions (`EPOLLHUP`). The kernel reports it whatever the interest.
    #[must_use]
    pub fn is_hangup(self) -> bool {
        self.any(Self::HANGUP)
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::READABLE, "readable"),
            (Self::WRITABLE, "writable"),
            (Self::ERROR, "error"),
            (Self::HANGUP, "hangup"),
            (Self::PEER_FINISHED, "peer finished"),
            (Self::URGENT, "urgent"),
        ];
        f.debug_set()
            .entries(names.iter().filter(|(bit, _)| self.any(*bit)).map(|(_, name)| name))
            .finish()
    }
}
