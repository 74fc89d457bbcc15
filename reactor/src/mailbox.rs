//! Messages from any thread to a reactor: a bounded channel that wakes it.
//!
//! Built on `std::sync::mpsc::sync_channel` and the [`Waker`]: a sender never blocks, and all messages that are sent
//! before the reactor receives them cost one wake-up together.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::context::Context;
use crate::waker::Waker;

/// The maximum number of messages received per wake-up, so that a busy sender does not delay events.
const MESSAGES_PER_WAKE: usize = 1024;

impl<C> Context<C> {
    /// Creates a channel by which other threads send messages of type `M` to this reactor's service. The service keeps
    /// the [`Mailbox`] and empties it in [`on_wake`](crate::Handler::on_wake). Memory for `capacity` messages (at least
    /// one) is allocated now.
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

/// The sending end of a mailbox, which any thread can use; see [`Context::mailbox`].
pub struct Sender<M> {
    sender: SyncSender<M>,
    waker: Waker,
}

impl<M> Sender<M> {
    /// Sends a message and wakes the reactor. Never blocks. Makes one system call, or none while an earlier wake-up is
    /// pending.
    ///
    /// # Errors
    /// The error is that of [`std::sync::mpsc::SyncSender::try_send`] and returns the message: [`TrySendError::Full`] if
    /// the mailbox holds `capacity` messages (the sender may drop the message, or wait and retry),
    /// [`TrySendError::Disconnected`] if the [`Mailbox`] was dropped. After only the reactor was dropped, a send
    /// succeeds.
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

/// The receiving end of a mailbox, which the service keeps; see [`Context::mailbox`].
pub struct Mailbox<M> {
    receiver: Receiver<M>,
    waker: Waker,
    /// Messages that may still be received before events are served.
    left: usize,
}

impl<M> Mailbox<M> {
    /// Returns the next message. Call it in [`on_wake`](crate::Handler::on_wake) until it returns `None`.
    ///
    /// After 1,024 messages it returns `None` even if there are more, and wakes the reactor, so that `on_wake` is
    /// called again after other events have been served.
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
