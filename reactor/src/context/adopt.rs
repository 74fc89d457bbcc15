//! Adopting sockets from outside, detaching sockets, and lending their descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::config::ListenOptions;
use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::context::set_tcp_options;
use crate::error::{CloseReason, Detached, Error, Refused};
use crate::sys::{self, Adopted, Descriptor, LentFd};
use crate::token::{ListenerId, Token};

impl<C> Context<C> {
    /// Adds a connected stream socket from outside: created by the standard library or `socket2`, one end of a socket
    /// pair, or received from another process or reactor. `conn` is its state.
    ///
    /// The socket becomes a connection like one of [`connect`](Self::connect) whose connect has completed:
    /// [`on_open`](crate::Handler::on_open) is called in the next turn, and bytes may be written at once. The socket is
    /// made non-blocking and close-on-exec; its other options are not changed.
    ///
    /// ```
    /// use std::os::unix::net::UnixStream;
    /// # use reactor::{Config, Reactor};
    /// # let mut reactor = Reactor::<()>::new(&Config::default())?;
    /// let (inside, outside) = UnixStream::pair()?;
    /// let token = reactor.context().adopt(inside, ())?;
    /// # assert!(reactor.context().holds(token));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// All errors return the socket and the state: [`Error::Full`] at
    /// [`Config::connections_max`](crate::Config::connections_max); [`Error::Invalid`] if it is not a TCP or
    /// Unix-domain stream socket, and during a [`shutdown`](Self::shutdown); a system error: not a socket (`ENOTSOCK`),
    /// not connected (`ENOTCONN`), already watched by this reactor (`EEXIST`), no epoll watch left (`ENOSPC`).
    pub fn adopt(
        &mut self,
        socket: impl Into<OwnedFd>,
        conn: C,
    ) -> Result<Token, Refused<(OwnedFd, C)>> {
        match self.try_adopt(self.sockets.own(socket.into())) {
            Ok(token) => {
                self.give_back(token, conn);
                self.adopted.push_back(token);
                Ok(token)
            }
            Err(Refused { error, given }) => Err(Refused { error, given: (given.into(), conn) }),
        }
    }

    fn try_adopt(&mut self, socket: Descriptor) -> Result<Token, Refused<Descriptor>> {
        let prepared = self.refuse_while_shutting_down().and_then(|()| match self.lacks_slot() {
            Some(error) => Err(error),
            None => sys::adopt(&socket, Adopted::Connection),
        });
        match prepared {
            Ok(is_tcp) => self.insert_outbound(socket, is_tcp),
            Err(error) => Err(Refused { error, given: socket }),
        }
    }

    /// The next adopted connection that has not been opened yet.
    pub(crate) fn next_adopted(&mut self) -> Option<Token> {
        loop {
            let token = self.adopted.pop_front()?;
            if self.header(token).is_some_and(|header| header.flags.any(Flags::CONNECTING)) {
                return Some(token);
            }
        }
    }

    /// Listens on a socket from outside: passed by a service manager, handed over by an earlier process, or
    /// created with options that [`ListenOptions`] does not have. It must be bound, and may already be listening.
    ///
    /// The socket is made non-blocking and close-on-exec. The backlog, `connections_max` and the socket options that are
    /// set are applied to it; `backlog: None` sets the kernel's maximum, because the present value can't be read.
    /// `reuse_port` and `only_v6` must be set before `bind`, so they are ignored.
    ///
    /// # Errors
    /// As for [`listen`](Self::listen), and [`Error::Invalid`] if it is not a TCP or Unix-domain stream socket, or is
    /// neither bound nor listening. All errors return the socket.
    pub fn adopt_listener(
        &mut self,
        socket: impl Into<OwnedFd>,
        options: &ListenOptions,
    ) -> Result<ListenerId, Refused<OwnedFd>> {
        let socket = self.sockets.own(socket.into());
        let prepared = self.refuse_while_shutting_down().and_then(|()| {
            self.lacks_listener()?;
            let is_tcp = sys::adopt(&socket, Adopted::Listener)?;
            if is_tcp {
                set_tcp_options(&socket, &options.tcp())?;
            }
            sys::listen(&socket, options.backlog).map(|()| is_tcp)
        });
        match prepared {
            Ok(is_tcp) => self.insert_listener(socket, is_tcp, options),
            Err(error) => Err(Refused { error, given: socket }),
        }
        .map_err(|Refused { error, given }| Refused { error, given: given.into() })
    }

    /// Removes an open connection from the reactor and leaves its socket connected, for another reactor, another
    /// library or another process. [`on_close`](crate::Handler::on_close) is called with the state and
    /// [`CloseReason::Detached`], which contains the socket and the bytes that were not yet delivered or sent.
    ///
    /// Queued bytes are not sent first: they are returned in [`Detached::unsent`]. With
    /// [registered files](crate::FileTable::Registered) the socket gets a descriptor again. If another file now uses
    /// the descriptor number that the socket had when it was accepted, epoll continues to report the socket until it is
    /// closed; the reactor wakes up and drops these events ([`Stats::stale_events`](crate::Stats::stale_events)).
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Invalid`] if the connection is still connecting, is being closed, or has a part of a
    /// file in its queue; with registered files, a system error if there is no descriptor left (`EMFILE`). The
    /// connection is unchanged then.
    pub fn detach(&mut self, token: Token) -> Result<(), Error> {
        self.flush_sends();
        let header = self.connections.head_mut(token.key()).ok_or(Error::Stale)?;
        if header.flags.any(Flags::CONNECTING | Flags::CLOSING | Flags::CLOSED) {
            return Err(Error::Invalid("only a connection that is open can be detached"));
        }
        if header.queue().is_some_and(|queue| self.queues[queue as usize].files() > 0) {
            return Err(Error::Invalid("a part of a file is still queued"));
        }
        let descriptor = self.sockets.detach(&mut header.socket)?;
        if let Err(error) =
            self.poller.delete_connection(&descriptor, header.watched_as(&descriptor))
        {
            log::debug!("{token:?} stays in epoll until its socket is closed: {error}");
        }
        header.flags.set(Flags::CLOSED, true);
        self.clear_tagged_timeouts(token);
        self.detached.push((token, descriptor));
        if !self.delivering {
            self.close_detached();
        }
        Ok(())
    }

    /// A batch of receives is delivered from here on: bytes for a connection that is detached meanwhile are kept.
    pub(crate) fn begin_delivery(&mut self) {
        self.delivering = true;
    }

    pub(crate) fn end_delivery(&mut self) {
        self.delivering = false;
        self.close_detached();
    }

    /// Queues `on_close` for the detached connections.
    fn close_detached(&mut self) {
        while let Some((token, descriptor)) = self.detached.pop() {
            let queue = self.header(token).and_then(ConnHeader::queue);
            let unsent = queue.map_or(Vec::new(), |queue| self.queues[queue as usize].to_vec());
            let unread = self.take_held(token).map_or(Vec::new(), Vec::from);
            let detached = Detached { descriptor: descriptor.into(), unread, unsent };
            self.closed.push_back((token, CloseReason::Detached(detached)));
        }
    }

    /// Removes a listener without closing its socket, for another process or reactor; connections in its backlog are
    /// kept. Returns `None` if the id is stale.
    pub fn detach_listener(&mut self, listener: ListenerId) -> Option<OwnedFd> {
        self.remove_listener(listener).map(OwnedFd::from)
    }

    /// Returns the descriptor of a connection's socket, for getting and setting options. If the socket is a registered
    /// file, a descriptor is opened for this and closed on drop, with two system calls.
    ///
    /// Do not read or write with it: the reactor could then wait for an event that epoll does not report, and written
    /// bytes could be mixed with queued ones.
    ///
    /// # Errors
    /// [`Error::Stale`], or with registered files a system error if there is no descriptor left (`EMFILE`).
    pub fn connection_fd(&self, token: Token) -> Result<LentFd<'_>, Error> {
        self.sockets.descriptor(&self.header(token).ok_or(Error::Stale)?.socket)
    }

    /// Returns the descriptor of a listener; `None` if the id is stale.
    #[must_use]
    pub fn listener_fd(&self, listener: ListenerId) -> Option<BorrowedFd<'_>> {
        self.listeners.head(listener.key()).map(|listener| listener.socket().as_fd())
    }
}
