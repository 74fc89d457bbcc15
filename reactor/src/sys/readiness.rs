//! The events that epoll watches for and reports.

use std::fmt;

use nix::libc;

/// The readiness of a descriptor; passed to [`Handler::on_ready`](crate::Handler::on_ready).
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

    /// The common report of a connection: there is input, and output is possible.
    pub(crate) const READABLE_AND_WRITABLE: Self = Self::READABLE.with(Self::WRITABLE);
    /// After one of these, a short read does not mean that the input is exhausted.
    pub(crate) const READ_TO_END: Self =
        Self::PEER_FINISHED.with(Self::HANGUP).with(Self::ERROR).with(Self::URGENT);
    /// A read will return data, the end of the input or an error.
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

    /// Returns whether a read will not block: there is data, or the end of the stream (`EPOLLIN`).
    #[must_use]
    pub fn is_readable(self) -> bool {
        self.any(Self::READABLE)
    }

    /// Returns whether a write will not block (`EPOLLOUT`).
    #[must_use]
    pub fn is_writable(self) -> bool {
        self.any(Self::WRITABLE)
    }

    /// Returns whether an error is pending, or a pipe has no reader any more (`EPOLLERR`). The kernel always reports
    /// this, whatever the interest.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.any(Self::ERROR)
    }

    /// Returns whether both directions were shut down (`EPOLLHUP`). The kernel always reports this, whatever the
    /// interest.
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
