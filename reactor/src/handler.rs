//! The trait that a service implements.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::context::{Context, SweepId};
use crate::error::{CloseReason, Error};
use crate::signal::Signal;
use crate::sys::{self, Readiness};
use crate::token::{ListenerId, TimerId, Token, WatchId};

/// The grace period of the shutdown that the default [`Handler::on_signal`] starts.
const SIGNAL_GRACE: Duration = Duration::from_secs(5);

/// A service: the callbacks for what happens on its connections.
///
/// # Guarantees
/// - Each accepted connection gets one [`on_open`](Self::on_open), and exactly one [`on_close`](Self::on_close) when it
///   ends. An outbound connect that fails gets only `on_close`.
/// - Callbacks are never nested: `on_close` for a connection that a callback closes is called after that callback.
/// - No event of an earlier connection reaches a later one that uses the same slot or descriptor.
///
/// A connection that is still open when [`run`](crate::Reactor::run) returns after [`stop`](Context::stop) stays open
/// for the next `run`. A reactor that is dropped closes its connections and drops their states without calling
/// `on_close`. After a panic in a callback the guarantees no longer hold: see [`turn`](crate::Reactor::turn).
///
/// During a callback, the connection's state is lent to the callback as `conn`. The context can be used for all
/// connections, including this one, except that [`Context::conn`] returns `None` for it.
pub trait Handler {
    /// The state of one connection, stored inline in its slot.
    type Conn;

    /// A connection was accepted: return `Some` to keep it with that state, or `None` to refuse it with a reset.
    ///
    /// [`on_open`](Self::on_open) follows before the next `on_accept`, so a comparison of
    /// [`connections`](Context::connections) with a limit here is exact. The connection has no token yet, and may still
    /// be dropped before `on_open` (if epoll watches have run out), so count connections in `on_open`, not here.
    fn on_accept(
        &mut self,
        cx: &mut Context<Self::Conn>,
        incoming: &Incoming<'_>,
    ) -> Option<Self::Conn>;

    /// The connection is open; called for accepted, outbound and adopted connections.
    fn on_open(&mut self, _cx: &mut Context<Self::Conn>, _token: Token, _conn: &mut Self::Conn) {}

    /// Bytes were received, by one read into a buffer that all connections share. They may be changed in place, for
    /// example to decrypt or unmask them.
    fn on_data(
        &mut self,
        cx: &mut Context<Self::Conn>,
        token: Token,
        conn: &mut Self::Conn,
        bytes: &mut [u8],
    );

    /// The peer has finished writing: no more data will arrive. Writing is still possible. The default closes the
    /// connection, with the reason [`CloseReason::PeerClosed`], even if [`finish`](Context::finish) was called before.
    fn on_eof(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// The connection's write queue has become empty. It is also called for a connection without a queue when all
    /// queues together have room again, after [`WriteError::FullInTotal`](crate::WriteError::FullInTotal) or after
    /// [`write_room`](Context::write_room) returned less for that reason.
    fn on_drain(&mut self, _cx: &mut Context<Self::Conn>, _token: Token, _conn: &mut Self::Conn) {}

    /// The timeout set with [`Context::set_timeout`] has expired and is disarmed. The default closes the connection.
    fn on_timeout(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// The timeout set with [`Context::set_tagged_timeout`] and this tag has expired and is disarmed. It may expire
    /// while the connection is still connecting, before [`on_open`](Self::on_open).
    fn on_tagged_timeout(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: &mut Self::Conn,
        _tag: u64,
    ) {
    }

    /// The connection has ended and its token is stale; its state is given back. Its addresses are still available
    /// ([`peer_addr`](Context::peer_addr)): the socket is closed when this callback returns. It is no longer counted in
    /// [`connections`](Context::connections), and a connect can already use its slot.
    fn on_close(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: Self::Conn,
        _reason: CloseReason,
    ) {
    }

    /// Accepting a connection failed. If descriptors, memory, epoll watches or slots
    /// ([`Config::connections_max`](crate::Config::connections_max): [`Error::Full`]) have run out, the listener pauses
    /// and resumes by itself when a connection has closed, or after a delay. Peers wait in its backlog meanwhile. At its
    /// own bound ([`ListenOptions::connections_max`](crate::ListenOptions::connections_max), also [`Error::Full`]) it
    /// resumes when one of its own connections has closed.
    ///
    /// This is called for each attempt that fails, with many short connections many times per second: do not log each
    /// call.
    fn on_accept_error(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _listener: ListenerId,
        _error: &Error,
    ) {
    }

    /// A listener drained with [`Context::drain_listener`] has accepted all connections in its backlog and is removed;
    /// its id is now stale. Not called if [`unlisten`](Context::unlisten),
    /// [`detach_listener`](Context::detach_listener) or a [`shutdown`](Context::shutdown) ends the listener before
    /// that.
    fn on_listener_drained(&mut self, _cx: &mut Context<Self::Conn>, _listener: ListenerId) {}

    /// A timer set with [`Context::add_timer`] has fired; its id is now stale.
    fn on_timer(&mut self, _cx: &mut Context<Self::Conn>, _timer: TimerId) {}

    /// The call that was requested with [`Context::defer`].
    fn on_deferred(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: &mut Self::Conn,
    ) {
    }

    /// A sweep started with [`Context::sweep`] or [`Context::sweep_of`] visits this connection.
    fn on_visit(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _sweep: SweepId,
        _token: Token,
        _conn: &mut Self::Conn,
    ) {
    }

    /// A sweep has visited all its connections. Not called if a [`shutdown`](Context::shutdown) ends `run` before that.
    fn on_swept(&mut self, _cx: &mut Context<Self::Conn>, _sweep: SweepId) {}

    /// [`Context::shutdown`] was called while this connection is open: the protocol may send its closing message. The
    /// connection need not end at once, but it is reset when the grace period has passed. The default closes it.
    fn on_shutdown(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// A [`Waker`](crate::Waker) was used since the last call; several uses result in one call.
    fn on_wake(&mut self, _cx: &mut Context<Self::Conn>) {}

    /// A descriptor watched with [`Context::watch`] is ready. This is called in each turn while the descriptor is
    /// ready. Reports can be spurious, so handle `WouldBlock`.
    ///
    /// The end of a stream (a read of 0 bytes), a hang-up, and the error of a pipe without a reader are permanent: they
    /// are reported in each turn, whatever is read. Call [`unwatch`](Context::unwatch) then, or the loop spins. The
    /// default ends the watch.
    fn on_ready(&mut self, cx: &mut Context<Self::Conn>, watch: WatchId, _readiness: Readiness) {
        cx.unwatch(watch);
    }

    /// A signal watched with [`Context::watch_signals`] was received. The default shuts down with a grace period of 5
    /// seconds.
    fn on_signal(&mut self, cx: &mut Context<Self::Conn>, _signal: Signal) {
        cx.shutdown(SIGNAL_GRACE);
    }
}

/// An accepted connection that [`Handler::on_accept`] can keep or refuse.
#[derive(Debug)]
pub struct Incoming<'a> {
    listener: ListenerId,
    socket: &'a sys::Descriptor,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(listener: ListenerId, socket: &'a sys::Descriptor) -> Self {
        Self { listener, socket }
    }

    /// The listener that accepted the connection.
    #[must_use]
    pub fn listener(&self) -> ListenerId {
        self.listener
    }

    /// Returns the peer's address. Makes one system call (`getpeername`).
    ///
    /// # Errors
    /// `ENOTCONN` if the peer has already closed the connection; a Unix-domain peer has no IP address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(sys::peer_addr(self.socket)?)
    }

    /// Returns the local address of the connection. Makes one system call (`getsockname`).
    ///
    /// # Errors
    /// An error of `getsockname`; a Unix-domain socket has no IP address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(sys::local_addr(self.socket)?)
    }
}

/// The socket's descriptor, for getting and setting options; it is non-blocking and close-on-exec.
impl AsFd for Incoming<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
