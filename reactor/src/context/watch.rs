//! Watching descriptors that are not connections: a timerfd, a pipe, inotify, a UDP socket, another library's socket.
//!
//! The reactor owns a descriptor from `watch` to `unwatch`. An epoll registration belongs to the open file, not to the
//! descriptor, so a duplicate would keep it alive after a close. Therefore a descriptor is removed from epoll before it
//! is given back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::context::Context;
use crate::error::{Error, Refused};
use crate::interest::Interest;
use crate::sys::{Descriptor, Poller};
use crate::token::{EventSource, WatchId};

#[derive(Debug)]
pub(super) struct Watch {
    descriptor: Descriptor,
    interest: Interest,
}

impl<C> Context<C> {
    /// Watches any descriptor that epoll can watch: [`on_ready`](crate::Handler::on_ready) is called in each turn while
    /// it is ready (level-triggered). The end of a stream, a hang-up and some errors are permanent: call
    /// [`unwatch`](Self::unwatch) when they are reported.
    ///
    /// The reactor owns the descriptor until [`unwatch`](Self::unwatch) gives it back, and does not change its flags:
    /// make it non-blocking first if a read or a write could block. To use it through its own type, watch one of two
    /// handles made with `try_clone` and keep the other; both refer to the same open file.
    ///
    /// ```
    /// use std::net::UdpSocket;
    /// use reactor::{Config, Context, Interest, Reactor};
    ///
    /// let mut reactor = Reactor::<()>::new(&Config::default())?;
    /// let socket = UdpSocket::bind("127.0.0.1:0")?;
    /// socket.set_nonblocking(true)?;
    /// let watch = reactor.context().watch(socket.try_clone()?, Interest::Readable)?;
    /// // ... on_ready reads from `socket` ...
    /// reactor.context().unwatch(watch);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::watches_max`](crate::Config::watches_max), or a system error: `EPERM` if the file
    /// does not support epoll (a regular file, a directory), `ENOSPC` if epoll watches have run out. All errors return
    /// the descriptor.
    pub fn watch(
        &mut self,
        descriptor: impl Into<OwnedFd>,
        interest: Interest,
    ) -> Result<WatchId, Refused<OwnedFd>> {
        let descriptor = self.sockets.own(descriptor.into());
        let watch = Watch { descriptor, interest: Interest::Nothing };
        let inserted = self.watches.insert(watch, ()).map_err(|(watch, ())| Refused {
            error: Error::Full { what: "watches", limit: self.watches.capacity() },
            given: watch.descriptor.into(),
        });
        let id = WatchId::from(inserted?);
        match self.set_interest(id, interest) {
            Ok(()) => Ok(id),
            Err(error) => {
                let given = self.unwatch(id).expect("it was inserted");
                Err(Refused { error, given })
            }
        }
    }

    /// Changes what a descriptor is watched for. Makes one system call if the interest differs.
    ///
    /// # Errors
    /// [`Error::Stale`], or a system error; the interest is unchanged then.
    pub fn set_interest(&mut self, watch: WatchId, interest: Interest) -> Result<(), Error> {
        let data = EventSource::Watch(watch).to_bits();
        let watch = self.watches.head_mut(watch.key()).ok_or(Error::Stale)?;
        update_interest(&self.poller, watch, interest, data)?;
        watch.interest = interest;
        Ok(())
    }

    /// Ends a watch and returns the descriptor; drop it to close it. Returns `None` if the id is stale.
    pub fn unwatch(&mut self, watch: WatchId) -> Option<OwnedFd> {
        if let Err(error) = self.set_interest(watch, Interest::Nothing) {
            log::debug!("{watch:?} could not be removed from epoll: {error}");
        }
        self.watches.remove(watch.key()).map(|(watch, ())| watch.descriptor.into())
    }

    /// Returns a watched descriptor, for reading and writing; `None` if the id is stale.
    #[must_use]
    pub fn watched(&self, watch: WatchId) -> Option<BorrowedFd<'_>> {
        self.watches.head(watch.key()).map(|watch| watch.descriptor.as_fd())
    }

    /// Whether events of this watch are still to be reported.
    pub(crate) fn is_watching(&self, watch: WatchId) -> bool {
        self.watches.head(watch.key()).is_some_and(|watch| watch.interest != Interest::Nothing)
    }
}

fn update_interest(
    poller: &Poller,
    watch: &Watch,
    interest: Interest,
    data: u64,
) -> Result<(), Error> {
    match (watch.interest.registered(), interest.registered()) {
        (None, None) => Ok(()),
        (None, Some(after)) => poller.add(&watch.descriptor, after, data),
        (Some(_), None) => poller.delete(&watch.descriptor),
        (Some(before), Some(after)) if before == after => Ok(()),
        (Some(_), Some(after)) => poller.modify(&watch.descriptor, after, data),
    }
}
