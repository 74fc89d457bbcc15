//! Sockets that come from elsewhere or go there, and their descriptors for the while.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::config::ListenOptions;
use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::context::set_tcp_options;
use crate::error::{CloseReason, Detached, Error, Refused};
use crate::sys::{self, Adopted, Descriptor, LentFd};
use crate::token::{ListenerId, Token};

impl<C> Context<C> {
    /// Takes in a connected stream socket that was made elsewhere: one of the standard library or of `socket2`, one end
    /// of a socket pair, one that another process or reactor has handed over. `conn` is its state.
    ///
    /// From here on it is as a connection of [`connect`](Self::connect) whose connect is decided:
    /// [`on_open`](crate::Handler::on_open) follows in the next turn, and bytes may be written at once. It is made
    /// non-blocking and close-on-exec; its other options stay as they are.
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
    /// The socket and the state come back with [`Error::Full`] at
    /// [`Config::connections_max`](crate::Config::connections_max), [`Error::Invalid`] for what is no stream of TCP or
    /// the Unix domain and during a [`shutdown`](Self::shutdown), and the system's refusal: not a socket (`ENOTSOCK`),
    /// not connected (`ENOTCONN`), watched by this reactor already (`EEXIST`), no epoll watch (`ENOSPC`).
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

    /// The next connection that was adopted and has not opened yet.
    pub(crate) fn next_adopted(&mut self) -> Option<Token> {
        loop {
            let token = self.adopted.pop_front()?;
            if self.header(token).is_some_and(|header| header.flags.any(Flags::CONNECTING)) {
                return Some(token);
            }
        }
    }

    /// Listens with a socket that was made elsewhere: passed by a service manager, handed over by an earlier process, or
    /// with options that [`ListenOptions`] does not have. It must be bound, and may listen already.
    ///
    /// Of the options, `connections_max`, those that are set and the backlog are applied to it; `reuse_port` and `only_v6` belong before
    /// the `bind` and are not looked at.
    ///
    /// # Errors
    /// As [`listen`](Self::listen), the socket coming back, and [`Error::Invalid`] for what is no stream of TCP or the
    /// Unix domain.
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

    /// Takes an open connection out of the reactor and leaves its socket connected, for another reactor, another library
    /// or another process. [`on_close`](crate::Handler::on_close) follows with the state and
    /// [`CloseReason::Detached`], which has the socket and the bytes that were under way.
    ///
    /// Its bytes are not waited for: what is queued comes out as [`Detached::unsent`]. With
    /// [registered files](crate::FileTable::Registered) the socket gets a descriptor again, and while the number that it
    /// had at its accept is another file's, the reactor goes on being woken for it, in vain
    /// ([`Stats::stale_events`](crate::Stats::stale_events)), until the socket is closed.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Invalid`] where it is still connecting or being closed already, or a part of a file waits
    /// to be sent; with registered files
    /// the system's refusal of a descriptor (`EMFILE`). The connection is as it was then.
    pub fn detach(&mut self, token: Token) -> Result<(), Error> {
        self.flush_sends();
        let header = self.connections.head_mut(token.key()).ok_or(Error::Stale)?;
        if header.flags.any(Flags::CONNECTING | Flags::CLOSING | Flags::CLOSED) {
            return Err(Error::Invalid("only a connection that is open can be detached"));
        }
        if header.queue().is_some_and(|queue| self.queues[queue as usize].files() > 0) {
            return Err(Error::Invalid("a part of a file waits to be sent"));
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

    /// What was received together is handed over from here on: what of it is for a connection that was detached is kept.
    pub(crate) fn begin_delivery(&mut self) {
        self.delivering = true;
    }

    pub(crate) fn end_delivery(&mut self) {
        self.delivering = false;
        self.close_detached();
    }

    /// Lets `on_close` follow for what was detached.
    fn close_detached(&mut self) {
        while let Some((token, descriptor)) = self.detached.pop() {
            let queue = self.header(token).and_then(ConnHeader::queue);
            let unsent = queue.map_or(Vec::new(), |queue| self.queues[queue as usize].to_vec());
            let unread = self.take_held(token).map_or(Vec::new(), Vec::from);
            let detached = Detached { descriptor: descriptor.into(), unread, unsent };
            self.closed.push_back((token, CloseReason::Detached(detached)));
        }
    }

    /// Ends a listener without closing its socket, for another process or reactor: what waits in its backlog waits on.
    /// `None` for a stale name.
    pub fn detach_listener(&mut self, listener: ListenerId) -> Option<OwnedFd> {
        self.remove_listener(listener).map(OwnedFd::from)
    }

    /// The descriptor of a connection's socket, to ask for an option or to set one. Where the socket is a registered
    /// file, it is opened for that and closed again, at two system calls.
    ///
    /// What is read or written by it passes by the reactor, which then waits for a report that does not come, or mixes
    /// it with what is queued.
    ///
    /// # Errors
    /// [`Error::Stale`], or with registered files the system's refusal of a descriptor (`EMFILE`).
    pub fn connection_fd(&self, token: Token) -> Result<LentFd<'_>, Error> {
        self.sockets.descriptor(&self.header(token).ok_or(Error::Stale)?.socket)
    }

    /// The descriptor of a listener. `None` for a stale name.
    #[must_use]
    pub fn listener_fd(&self, listener: ListenerId) -> Option<BorrowedFd<'_>> {
        self.listeners.head(listener.key()).map(|listener| listener.socket().as_fd())
    }
}
