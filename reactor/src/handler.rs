//! What a service implements.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::context::{Context, SweepId};
use crate::error::{CloseReason, Error};
use crate::signal::Signal;
use crate::sys::{self, Readiness};
use crate::token::{ListenerId, TimerId, Token, WatchId};

/// How long the default [`Handler::on_signal`] lets connections hand over what they have queued.
const SIGNAL_GRACE: Duration = Duration::from_secs(5);

/// A service: what to do when something happens on a connection.
///
/// # Promises
/// - Each connection that was kept gets one [`on_open`](Self::on_open), then exactly one [`on_close`](Self::on_close)
///   when it goes. An outbound connect that fails gets only `on_close`.
/// - No callback is entered while another runs: what a callback closes is reported after it returned.
/// - No event of an earlier connection reaches a later one that uses the same slot or descriptor.
///
/// There is no `on_close` for what has not gone or goes with the reactor: a [`run`](crate::Reactor::run) that ends by
/// [`stop`](Context::stop) leaves its connections open for the next one, and a reactor that is dropped closes them and
/// drops their states without a word. A callback that panics ends all of this: see [`turn`](crate::Reactor::turn).
///
/// During a callback the connection's state is lent to it as `conn`. All *other* connections can be used through the
/// context; the same one too, except that [`Context::conn`] gives `None` for it.
pub trait Handler {
    /// The state of one connection, stored inline in its slot.
    type Conn;

    /// A peer wants in: `Some` keeps the connection with that state, `None` refuses it with a reset.
    ///
    /// The connection has no name yet and may still be lost before `on_open` (no epoll watch to be had), so count in
    /// [`on_open`](Self::on_open) and not here.
    fn on_accept(
        &mut self,
        cx: &mut Context<Self::Conn>,
        incoming: &Incoming<'_>,
    ) -> Option<Self::Conn>;

    /// The connection is open, either way round.
    fn on_open(&mut self, _cx: &mut Context<Self::Conn>, _token: Token, _conn: &mut Self::Conn) {}

    /// Bytes arrived: one read per wake, into a buffer that all connections share. They may be changed in place, as to
    /// decrypt or unmask them.
    fn on_data(
        &mut self,
        cx: &mut Context<Self::Conn>,
        token: Token,
        conn: &mut Self::Conn,
        bytes: &mut [u8],
    );

    /// The peer has finished writing; what was read before is all there is. Writing still works. The default closes,
    /// so that the reason is [`CloseReason::PeerClosed`] also where [`finish`](Context::finish) was called before.
    fn on_eof(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// The write queue ran empty after bytes had waited in it.
    fn on_drain(&mut self, _cx: &mut Context<Self::Conn>, _token: Token, _conn: &mut Self::Conn) {}

    /// The time of [`Context::set_timeout`] has come; it is not armed any more. The default closes.
    fn on_timeout(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// The time of [`Context::set_tagged_timeout`] with this tag has come; it is not armed any more. While the connection
    /// is still connecting, the state is that of a connection that has not opened.
    fn on_tagged_timeout(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: &mut Self::Conn,
        _tag: u64,
    ) {
    }

    /// The connection is gone, and with it its name; here its state comes back. Its addresses can still be asked for
    /// ([`peer_addr`](Context::peer_addr)): its socket is closed when this returns.
    fn on_close(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: Self::Conn,
        _reason: CloseReason,
    ) {
    }

    /// Accepting did not work. Where descriptors, memory, epoll watches or slots
    /// ([`Config::connections_max`](crate::Config::connections_max): [`Error::Full`]) ran out, the listener pauses by
    /// itself and comes back when a connection has closed, or after a while. Peers wait in its backlog meanwhile. At its own
    /// bound ([`ListenOptions::connections_max`](crate::ListenOptions::connections_max), [`Error::Full`] too) it waits for
    /// one of its own connections.
    fn on_accept_error(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _listener: ListenerId,
        _error: &Error,
    ) {
    }

    /// A listener of [`Context::drain_listener`] has accepted all that waited, and is gone; its name is stale now. It is
    /// not called for a listener that [`unlisten`](Context::unlisten), [`detach_listener`](Context::detach_listener) or a
    /// [`shutdown`](Context::shutdown) ends before that.
    fn on_listener_drained(&mut self, _cx: &mut Context<Self::Conn>, _listener: ListenerId) {}

    /// A timer of [`Context::add_timer`] has fired; its name is stale now.
    fn on_timer(&mut self, _cx: &mut Context<Self::Conn>, _timer: TimerId) {}

    /// The call that [`Context::defer`] has deferred.
    fn on_deferred(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _token: Token,
        _conn: &mut Self::Conn,
    ) {
    }

    /// It is this connection's turn in a sweep of [`Context::sweep`] or [`Context::sweep_of`].
    fn on_visit(
        &mut self,
        _cx: &mut Context<Self::Conn>,
        _sweep: SweepId,
        _token: Token,
        _conn: &mut Self::Conn,
    ) {
    }

    /// A sweep has visited all there was to visit. It is not called where a [`shutdown`](Context::shutdown) ends `run`
    /// before that.
    fn on_swept(&mut self, _cx: &mut Context<Self::Conn>, _sweep: SweepId) {}

    /// [`Context::shutdown`] was called, and this connection is open: the time for a goodbye. It need not end at once, but
    /// it is reset when the grace has passed. The default closes.
    fn on_shutdown(&mut self, cx: &mut Context<Self::Conn>, token: Token, _conn: &mut Self::Conn) {
        cx.close(token);
    }

    /// A [`Waker`](crate::Waker) was used since the last time; many uses make one call.
    fn on_wake(&mut self, _cx: &mut Context<Self::Conn>) {}

    /// A descriptor of [`Context::watch`] is ready. It is reported again in each turn for as long as it is, and it may
    /// turn out not to be ready after all: read until `WouldBlock`.
    ///
    /// No reading takes away the end of a stream (a read of 0 bytes), a hang-up, or the error of a pipe without a
    /// reader: these are reported without end. [`unwatch`](Context::unwatch) then, or the loop spins. The default ends
    /// the watch.
    fn on_ready(&mut self, cx: &mut Context<Self::Conn>, watch: WatchId, _readiness: Readiness) {
        cx.unwatch(watch);
    }

    /// A signal of [`Context::watch_signals`] arrived. The default shuts down with a grace of 5 seconds.
    fn on_signal(&mut self, cx: &mut Context<Self::Conn>, _signal: Signal) {
        cx.shutdown(SIGNAL_GRACE);
    }
}

/// A connection that waits for [`Handler::on_accept`] to say whether it may stay.
#[derive(Debug)]
pub struct Incoming<'a> {
    listener: ListenerId,
    socket: &'a sys::Descriptor,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(listener: ListenerId, socket: &'a sys::Descriptor) -> Self {
        Self { listener, socket }
    }

    /// The listener at which it arrived.
    #[must_use]
    pub fn listener(&self) -> ListenerId {
        self.listener
    }

    /// The address it comes from. Costs one system call (`getpeername`), so ask only where it matters.
    ///
    /// # Errors
    /// `ENOTCONN` where the peer has gone already; a Unix-domain peer has no IP address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(sys::peer_addr(self.socket)?)
    }

    /// The address at which it arrived. Costs one system call (`getsockname`).
    ///
    /// # Errors
    /// What `getsockname` answers; a Unix-domain socket has no IP address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(sys::local_addr(self.socket)?)
    }
}

/// Its descriptor, to ask for an option or to set one; it is non-blocking and close-on-exec.
impl AsFd for Incoming<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
