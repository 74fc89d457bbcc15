//! Watching descriptors that are no connections: a timerfd, a pipe, inotify, a UDP socket, another library's socket.
//!
//! Who owns them: the reactor, from `watch` to `unwatch`. A registration belongs to the open file and not to the
//! number, so a duplicate would keep it alive after a close; therefore a descriptor leaves epoll before it is let go.

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
    /// Watches any descriptor that epoll can watch: [`on_ready`](crate::Handler::on_ready) follows whenever it is
    /// ready, again and again for as long as it stays so (level-triggered). The end of a stream, a hang-up and a
    /// lasting error stay: [`unwatch`](Self::unwatch) when they come.
    ///
    /// The reactor owns the descriptor until [`unwatch`](Self::unwatch) gives it back, and leaves its flags alone: make
    /// it non-blocking before, where a read or a write might block. To use it through a type of its own, keep a
    /// `try_clone` of that and watch the other; both are the same open file.
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
    /// [`Error::Full`] at [`Config::watches_max`](crate::Config::watches_max), and the system's refusal: `EPERM` for
    /// what is always ready (a plain file, a directory), `ENOSPC` where epoll watches have run out. The descriptor
    /// comes back.
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

    /// Changes what a descriptor is watched for. Costs one system call where it differs.
    ///
    /// # Errors
    /// [`Error::Stale`], or the system's refusal; the interest is as it was then.
    pub fn set_interest(&mut self, watch: WatchId, interest: Interest) -> Result<(), Error> {
        let data = EventSource::Watch(watch).to_bits();
        let watch = self.watches.head_mut(watch.key()).ok_or(Error::Stale)?;
        update_interest(&self.poller, watch, interest, data)?;
        watch.interest = interest;
        Ok(())
    }

    /// Ends a watch and gives the descriptor back; drop it to close it. `None` for a stale name.
    pub fn unwatch(&mut self, watch: WatchId) -> Option<OwnedFd> {
        if let Err(error) = self.set_interest(watch, Interest::Nothing) {
            log::debug!("{watch:?} could not be taken out of epoll: {error}");
        }
        self.watches.remove(watch.key()).map(|(watch, ())| watch.descriptor.into())
    }

    /// A watched descriptor, to read or write with it. `None` for a stale name.
    #[must_use]
    pub fn watched(&self, watch: WatchId) -> Option<BorrowedFd<'_>> {
        self.watches.head(watch.key()).map(|watch| watch.descriptor.as_fd())
    }

    /// Whether an event of this watch is still of interest.
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
