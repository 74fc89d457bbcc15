//! Messages from any thread into a reactor: a bounded channel that wakes it.
//!
//! Built on `std::sync::mpsc::sync_channel` and the [`Waker`]: a sender never blocks, and however many messages come
//! before the reactor gets there, they cost one wake-up.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::context::Context;
use crate::waker::Waker;

/// Messages that one wake-up hands out at most, so that a busy sender does not keep the sockets waiting.
const MESSAGES_PER_WAKE: usize = 1024;

impl<C> Context<C> {
    /// A way for other threads to send messages of type `M` to this reactor's service, which keeps the [`Mailbox`] and
    /// empties it in [`on_wake`](crate::Handler::on_wake). Room for `capacity` messages (one at least) is taken now.
    ///
    /// ```
    /// use reactor::{Config, Context, Handler, Incoming, Mailbox, Reactor, Token};
    ///
    /// struct Service {
    ///     mailbox: Mailbox<String>,
    ///     seen: Vec<String>,
    /// }
    ///
    /// impl Handler for Service {
    ///     type Conn = ();
    ///     fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
    ///         Some(())
    ///     }
    ///     fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &mut [u8]) {}
    ///     fn on_wake(&mut self, cx: &mut Context<()>) {
    ///         while let Some(message) = self.mailbox.receive() {
    ///             self.seen.push(message);
    ///         }
    ///         cx.stop();
    ///     }
    /// }
    ///
    /// let mut reactor = Reactor::new(&Config::default())?;
    /// let (sender, mailbox) = reactor.context().mailbox(16);
    /// let other = std::thread::spawn(move || sender.send("hello".to_owned()));
    /// let mut service = Service { mailbox, seen: Vec::new() };
    /// reactor.run(&mut service)?;
    /// assert_eq!(service.seen, ["hello"]);
    /// other.join().unwrap()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn mailbox<M>(&self, capacity: usize) -> (Sender<M>, Mailbox<M>) {
        let (sender, receiver) = sync_channel(capacity.max(1));
        let sender = Sender { sender, waker: self.waker() };
        (sender, Mailbox { receiver, waker: self.waker(), left: MESSAGES_PER_WAKE })
    }
}

/// The end of a mailbox that any thread may hold; see [`Context::mailbox`].
pub struct Sender<M> {
    sender: SyncSender<M>,
    waker: Waker,
}

impl<M> Sender<M> {
    /// Leaves a message and wakes the reactor. It is one system call, and none while an earlier wake-up is on its way.
    ///
    /// # Errors
    /// The message comes back: as [`TrySendError::Full`] when the reactor is behind by the whole capacity (drop it, wait,
    /// or slow down: the choice is the sender's), as [`TrySendError::Disconnected`] when the mailbox is gone.
    pub fn send(&self, message: M) -> Result<(), TrySendError<M>> {
        self.sender.try_send(message)?;
        self.waker.wake();
        Ok(())
    }
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waker: self.waker.clone() }
    }
}

impl<M> fmt::Debug for Sender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

/// The end of a mailbox that the service keeps; see [`Context::mailbox`].
pub struct Mailbox<M> {
    receiver: Receiver<M>,
    waker: Waker,
    /// Messages until the sockets get their turn.
    left: usize,
}

impl<M> Mailbox<M> {
    /// The next message. Call it in [`on_wake`](crate::Handler::on_wake) until it gives `None`.
    ///
    /// After 1,024 messages it gives `None` though more may wait, and sees to it that `on_wake` is called again once the
    /// sockets have had their turn.
    pub fn receive(&mut self) -> Option<M> {
        if self.left == 0 {
            self.left = MESSAGES_PER_WAKE;
            self.waker.wake();
            return None;
        }
        match self.receiver.try_recv() {
            Ok(message) => {
                self.left -= 1;
                Some(message)
            }
            Err(_) => {
                self.left = MESSAGES_PER_WAKE;
                None
            }
        }
    }
}

impl<M> fmt::Debug for Mailbox<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}
