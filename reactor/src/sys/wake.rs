//! The eventfd that ends a reactor's wait.

use std::os::fd::AsFd;

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::poller::Poller;
use super::refused;
use crate::error::Error;

/// An eventfd.
#[derive(Debug)]
pub(crate) struct WakeFd(EventFd);

impl WakeFd {
    /// Creates an eventfd that this poller reports with this user data.
    pub(crate) fn watched(poller: &Poller, data: u64) -> Result<Self, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let counter = EventFd::from_value_and_flags(0, flags).map_err(refused("eventfd"))?;
        poller.watch(counter.as_fd(), EpollFlags::EPOLLIN, data)?;
        Ok(Self(counter))
    }

    /// Makes it readable. The write can fail only if the counter is full, and then it is already readable.
    pub(crate) fn signal(&self) {
        let _ = self.0.write(1);
    }

    /// Makes it unreadable until the next signal.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }
}
