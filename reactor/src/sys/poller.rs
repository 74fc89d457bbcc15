//! epoll.

use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::socket::Descriptor;
use super::{Readiness, refused};
use crate::error::Error;

/// An epoll instance.
#[derive(Debug)]
pub(crate) struct Poller(Epoll);

/// The interest of a connection, which never changes: epoll reports each change once.
const EVERY_CHANGE: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLPRI)
    .union(EpollFlags::EPOLLET);

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Error> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self).map_err(refused("epoll_create1"))
    }

    /// Watches a descriptor level-triggered.
    pub(crate) fn add(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        self.watch(descriptor, EpollFlags::from_bits_retain(interest.bits() as i32), data)
    }

    /// Watches a connection's socket edge-triggered, as long as its file is open. The watch remains when the descriptor
    /// is closed and a registered-file table keeps the file open.
    #[inline]
    pub(crate) fn add_connection(&self, descriptor: &Descriptor, data: u64) -> Result<(), Error> {
        self.watch(descriptor, EVERY_CHANGE, data)
    }

    /// Ends the watch of a connection's file, which epoll identifies by the descriptor number with which it was added.
    /// If another file has this number now, the watch can't be removed, and ends when the file is closed.
    pub(crate) fn delete_connection(
        &self,
        descriptor: &Descriptor,
        number: RawFd,
    ) -> Result<(), Error> {
        if descriptor.number() == number {
            return self.delete(descriptor);
        }
        let duplicate = descriptor.duplicate_from(number)?;
        if duplicate.number() != number {
            return Err(Error::Invalid("another file has the number of the descriptor now"));
        }
        self.delete(&duplicate)
    }

    #[inline]
    pub(super) fn watch(
        &self,
        descriptor: impl AsFd,
        flags: EpollFlags,
        data: u64,
    ) -> Result<(), Error> {
        self.0.add(descriptor, EpollEvent::new(flags, data)).map_err(refused("epoll_ctl"))
    }

    pub(crate) fn modify(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        let flags = EpollFlags::from_bits_retain(interest.bits() as i32);
        self.0.modify(descriptor, &mut EpollEvent::new(flags, data)).map_err(refused("epoll_ctl"))
    }

    pub(crate) fn delete(&self, descriptor: &Descriptor) -> Result<(), Error> {
        self.0.delete(descriptor).map_err(refused("epoll_ctl"))
    }

    /// The monotonic clock.
    #[inline]
    pub(crate) fn now(&self) -> Instant {
        Instant::now()
    }

    /// Waits for events, for at most `wait` (rounded up to a millisecond). An interruption by a signal returns no events.
    pub(crate) fn wait(&self, events: &mut Events, wait: Option<Duration>) -> Result<(), Error> {
        events.filled = match self.0.wait(&mut events.buffer, milliseconds(wait)) {
            Ok(filled) => filled,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(refused("epoll_wait")(errno)),
        };
        Ok(())
    }
}

fn milliseconds(wait: Option<Duration>) -> EpollTimeout {
    match wait {
        None => EpollTimeout::NONE,
        Some(wait) => {
            let rounded_up = wait.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(rounded_up.min(i32::MAX as u128) as i32)
                .unwrap_or(EpollTimeout::MAX)
        }
    }
}

/// The buffer for the events of one wait.
#[derive(Debug)]
pub(crate) struct Events {
    buffer: Vec<EpollEvent>,
    filled: usize,
}

impl Events {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { buffer: vec![EpollEvent::empty(); capacity], filled: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.filled
    }

    /// Whether the buffer is full, so that there may be more events.
    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.buffer.len()
    }

    /// The events, each with the user data of its descriptor.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Readiness)> {
        self.buffer[..self.filled]
            .iter()
            .map(|event| (event.data(), Readiness::from_bits(event.events().bits() as u32)))
    }
}
