//! A counter that ends a reactor's wait.

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
    pub(crate) fn new() -> Result<Self, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_value_and_flags(0, flags).map(Self).map_err(refused("eventfd"))
    }

    /// Makes it readable. The counter can be full only when it is readable anyway.
    pub(crate) fn signal(&self) {
        let _ = self.0.write(1);
    }

    /// Makes it unreadable until the next signal.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }

    pub(crate) fn watch(&self, poller: &Poller, data: u64) -> Result<(), Error> {
        poller.watch(self.0.as_fd(), EpollFlags::EPOLLIN, data)
    }
}
