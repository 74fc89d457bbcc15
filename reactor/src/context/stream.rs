//! Writing, pausing and closing connections.

use std::io::IoSlice;

use crate::connection::{Flags, Link};
use crate::context::Context;
use crate::error::{CloseReason, Error, WriteError, Written};
use crate::queue::{CHUNKS_PER_SEND, Chunk, WriteQueue};
use crate::sys::{self, Transferred};
use crate::token::{Source, Token};
use crate::wheel::NodeId;

/// What a read from a connection brought.
pub(crate) enum Received<C> {
    /// So many, and the connection's state, which is lent from now on.
    Bytes(C, usize),
    /// None: the peer has finished, has sent nothing yet, or is lost.
    Nothing(Transferred),
}

impl<C> Context<C> {
    /// Sends bytes: to the kernel at once when nothing is queued, and what it does not take waits in the queue.
    ///
    /// [`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max) bounds the queue, and so the largest
    /// message: a larger one is refused even where nothing waits.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was taken then.
    #[inline]
    pub fn write(&mut self, token: Token, bytes: &[u8]) -> Result<Written, WriteError> {
        let sent = self.direct_socket(token, bytes.len())?.map(|socket| sys::send(socket, bytes));
        match self.count_sent(token, sent)? {
            sent if sent == bytes.len() => Ok(Written::Sent),
            sent => self.enqueue(token, sent, bytes.len(), |queue| queue.copy(&bytes[sent..])),
        }
    }

    /// The same for bytes that lie in several places, with one system call.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was taken then.
    pub fn write_vectored(
        &mut self,
        token: Token,
        slices: &[IoSlice<'_>],
    ) -> Result<Written, WriteError> {
        let total = slices.iter().map(|slice| slice.len()).sum();
        let first = &slices[..slices.len().min(CHUNKS_PER_SEND)];
        let sent =
            self.direct_socket(token, total)?.map(|socket| sys::send_vectored(socket, first));
        match self.count_sent(token, sent)? {
            sent if sent == total => Ok(Written::Sent),
            sent => self.enqueue(token, sent, total, |queue| {
                let mut skip = sent;
                for slice in slices {
                    let skipped = skip.min(slice.len());
                    queue.copy(&slice[skipped..]);
                    skip -= skipped;
                }
            }),
        }
    }

    /// The same for bytes that are given away or shared: what has to wait is queued without a copy.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was taken then.
    pub fn write_chunk(
        &mut self,
        token: Token,
        chunk: impl Into<Chunk>,
    ) -> Result<Written, WriteError> {
        let chunk = chunk.into();
        let total = chunk.as_bytes().len();
        let sent =
            self.direct_socket(token, total)?.map(|socket| sys::send(socket, chunk.as_bytes()));
        match self.count_sent(token, sent)? {
            sent if sent == total => Ok(Written::Sent),
            sent => self.enqueue(token, sent, total, |queue| queue.append(chunk, sent)),
        }
    }

    /// How many bytes wait in the connection's queue; 0 for a stale token.
    #[must_use]
    pub fn queued_bytes(&self, token: Token) -> usize {
        self.link(token).map_or(0, |link| self.queue_bytes(link))
    }

    /// Reads nothing from this connection until [`resume_reads`](Self::resume_reads): the peer is slowed down by TCP.
    /// Nothing for a stale token.
    pub fn pause_reads(&mut self, token: Token) {
        self.set_flag(token, Flags::READS_PAUSED, true);
    }

    /// Reads again. Nothing for a stale token.
    pub fn resume_reads(&mut self, token: Token) {
        self.set_flag(token, Flags::READS_PAUSED, false);
    }

    /// Ends the writing side once the queue is empty (FIN); reading goes on. When the peer has finished too, the
    /// connection ends: with [`CloseReason::Finished`], or with [`CloseReason::Closed`] where
    /// [`on_eof`](crate::Handler::on_eof) closes, as the default does. Nothing for a stale token.
    pub fn finish(&mut self, token: Token) {
        let Some(link) = self.link_mut(token) else { return };
        if !link.takes_writes() {
            return;
        }
        link.flags.set(Flags::FINISHING, true);
        if !link.has_queue() && !link.flags.any(Flags::CONNECTING) {
            self.finish_now(token);
        }
    }

    /// Closes the connection once everything written is with the peer: `on_close` follows. The service gets nothing more
    /// to read, and a peer that does not take the rest within
    /// [`Config::flush_timeout`](crate::Config::flush_timeout) is reset. A connection that is still connecting opens
    /// first when bytes wait in its queue, and is given up when none do. Nothing for a stale token.
    ///
    /// Closing a socket while input lies unread makes TCP send a reset and forget what the peer has not taken yet. So
    /// where something has still to go out, from the queue or from the kernel, the connection ends when the peer has
    /// finished too, or after the same time: what still arrives until then is dropped. Where nothing is on its way, or
    /// the peer has finished already, the socket is closed at once. To find out costs one system call where the peer
    /// has not finished and the queue is empty.
    pub fn close(&mut self, token: Token) {
        let Some(link) = self.link(token) else { return };
        if link.flags.any(Flags::CLOSING | Flags::DOOMED) {
            return;
        }
        if link.has_queue() {
            return self.begin_closing(token);
        }
        let is_over = link.flags.any(Flags::CONNECTING | Flags::EOF);
        if is_over || !sys::has_unsent(&link.socket) {
            return self.doom(token, CloseReason::Closed);
        }
        self.begin_closing(token);
        self.linger(token);
    }

    fn begin_closing(&mut self, token: Token) {
        self.set_flag(token, Flags::CLOSING, true);
        let flush_timeout = self.config.flush_timeout;
        self.arm(token, flush_timeout);
    }

    /// The queue has gone out: the connection ends when the peer has finished too.
    fn linger(&mut self, token: Token) {
        if self.link(token).is_some_and(|link| link.flags.any(Flags::EOF)) {
            return self.doom(token, CloseReason::Closed);
        }
        self.finish_now(token);
        self.unsettle(token);
    }

    /// The time for closing is over: what is with the kernel may still go out, the rest is lost.
    pub(crate) fn end_closing(&mut self, token: Token, reason: CloseReason) {
        match self.link(token) {
            Some(link) if link.lingers() => self.doom(token, CloseReason::Closed),
            _ => self.cut_off(token, reason),
        }
    }

    /// Closes the connection at once with a reset: what is queued is lost, no TIME_WAIT stays behind, and `on_close`
    /// follows. Nothing for a stale token.
    pub fn abort(&mut self, token: Token) {
        self.cut_off(token, CloseReason::Aborted);
    }

    pub(crate) fn cut_off(&mut self, token: Token, reason: CloseReason) {
        if let Some(link) = self.link_mut(token) {
            link.flags.set(Flags::RESET, true);
            self.doom(token, reason);
        }
    }

    /// Puts the connection on the list of those to be removed; the first reason counts.
    pub(crate) fn doom(&mut self, token: Token, reason: CloseReason) {
        if let Some(link) = self.link_mut(token)
            && !link.flags.any(Flags::DOOMED)
        {
            link.flags.set(Flags::DOOMED, true);
            self.doomed.push_back((token, reason));
        }
    }

    pub(crate) fn has_doomed(&self) -> bool {
        !self.doomed.is_empty()
    }

    /// Removes the next doomed connection, here and nowhere else, and closes its descriptor.
    pub(crate) fn bury(&mut self) -> Option<(Token, C, CloseReason)> {
        loop {
            let (token, reason) = self.doomed.pop_front()?;
            let Some((link, conn)) = self.connections.remove(token.name()) else { continue };
            if link.timer != NodeId::NONE {
                self.wheel.remove(link.timer);
            }
            if let Some(queue) = link.queue() {
                self.stats.queued_bytes -= self.queues[queue as usize].len_bytes();
                self.release_queue(queue);
            }
            if link.flags.any(Flags::RESET)
                && let Err(error) = sys::reset_on_close(&link.socket)
            {
                log::debug!("a connection is closed without a reset: {error}");
            }
            if link.flags.any(Flags::OPENED) {
                self.stats.closed += 1;
            } else {
                self.stats.connects_failed += 1;
            }
            self.freed += 1;
            return Some((token, conn, reason));
        }
    }

    /// Reads once, if the connection reads, and lends its state with the bytes; `None` where it does not read.
    #[inline]
    pub(crate) fn receive(&mut self, token: Token, buffer: &mut [u8]) -> Option<Received<C>> {
        let (link, conn) = self.connections.lend(token.name())?;
        let received = if link.reads() { Some(sys::receive(&link.socket, buffer)) } else { None };
        match received {
            Some(Transferred::Bytes(received @ 1..)) => {
                self.stats.bytes_in += received as u64;
                Some(Received::Bytes(conn, received))
            }
            other => {
                self.give_back(token, conn);
                other.map(Received::Nothing)
            }
        }
    }

    /// Reads once and forgets it, from a connection of which only the end is wanted.
    pub(crate) fn drain(&mut self, token: Token, buffer: &mut [u8]) {
        let Some(link) = self.link(token) else { return };
        match sys::receive(&link.socket, buffer) {
            Transferred::Bytes(0) => self.doom(token, CloseReason::Closed),
            Transferred::Bytes(_) | Transferred::NotNow => {}
            Transferred::Failed(error) => self.doom(token, CloseReason::Failed(error)),
        }
    }

    /// Hands queued bytes to the kernel; says whether the queue has run empty and the service is to be told.
    pub(crate) fn flush(&mut self, token: Token) -> bool {
        let Some(link) = self.connections.head_mut(token.name()) else { return false };
        let Some(index) = link.queue() else { return false };
        if link.flags.any(Flags::DOOMED) {
            return false;
        }
        let queue = &mut self.queues[index as usize];
        let mut slices = [IoSlice::new(&[]); CHUNKS_PER_SEND];
        let filled = queue.slices(&mut slices);
        match sys::send_vectored(&link.socket, &slices[..filled]) {
            Transferred::Bytes(sent) => {
                queue.consume(sent);
                self.stats.bytes_out += sent as u64;
                self.stats.queued_bytes -= sent;
            }
            Transferred::NotNow => {}
            Transferred::Failed(error) => {
                self.doom(token, CloseReason::Failed(error));
                return false;
            }
        }
        if !queue.is_empty() {
            return false;
        }
        link.set_queue(None);
        let flags = link.flags;
        self.release_queue(index);
        self.unsettle(token);
        if flags.any(Flags::CLOSING) {
            self.linger(token);
            return false;
        }
        if flags.any(Flags::FINISHING) {
            self.finish_now(token);
        }
        true
    }

    /// The peer has finished writing.
    pub(crate) fn note_eof(&mut self, token: Token) {
        self.set_flag(token, Flags::EOF, true);
    }

    /// Nothing can come any more when both sides have finished.
    pub(crate) fn end_if_finished(&mut self, token: Token) {
        if self
            .link(token)
            .is_some_and(|link| link.flags.any(Flags::EOF) && link.flags.any(Flags::FINISHED))
        {
            self.doom(token, CloseReason::Finished);
        }
    }

    /// Both directions are shut while the service does not read: epoll would report that without end, so the socket
    /// leaves epoll until the service reads again. With bytes in its queue it stays: the next send shows what is wrong.
    pub(crate) fn end_hung_up(&mut self, token: Token) {
        self.end_if_finished(token);
        let Some(link) = self.connections.head_mut(token.name()) else { return };
        if link.flags.any(Flags::DOOMED) || link.has_queue() || link.registered().is_none() {
            return;
        }
        if let Err(error) = self.poller.delete(&link.socket) {
            return self.doom(token, CloseReason::Failed(error));
        }
        link.set_registered(None);
    }

    /// Remembers that epoll may have to be told something about this connection.
    pub(crate) fn unsettle(&mut self, token: Token) {
        if let Some(link) = self.connections.head_mut(token.name())
            && !link.flags.any(Flags::UNSETTLED)
        {
            link.flags.set(Flags::UNSETTLED, true);
            self.unsettled.push(token);
        }
    }

    /// Tells epoll what has changed since the last turn, at most once per connection.
    pub(crate) fn settle(&mut self) {
        while let Some(token) = self.unsettled.pop() {
            if let Err(error) = self.settle_link(token) {
                self.cut_off(token, CloseReason::Failed(error));
            }
        }
    }

    fn settle_link(&mut self, token: Token) -> Result<(), Error> {
        let Some(link) = self.connections.head_mut(token.name()) else { return Ok(()) };
        link.flags.set(Flags::UNSETTLED, false);
        let interest = link.interest();
        let data = Source::Connection(token).to_bits();
        match link.registered() {
            Some(registered) if registered == interest => return Ok(()),
            Some(_) => self.poller.modify(&link.socket, interest, data)?,
            None if interest == sys::Readiness::NONE => return Ok(()),
            None => self.poller.add(&link.socket, interest, data)?,
        }
        link.set_registered(Some(interest));
        Ok(())
    }

    /// Checks that `total` bytes may be taken: the socket where they can be sent directly, `None` where they have to
    /// wait behind others.
    #[inline]
    fn direct_socket(
        &self,
        token: Token,
        total: usize,
    ) -> Result<Option<&sys::Descriptor>, WriteError> {
        let link = self.link(token).ok_or(WriteError::Closed)?;
        if link.sends_at_once() && (1..=self.config.write_queue_bytes_max).contains(&total) {
            return Ok(Some(&link.socket));
        }
        self.check_queueing(link, total).map(|()| None)
    }

    /// What is wrong with bytes that can't be sent directly, if anything.
    #[cold]
    #[inline(never)]
    fn check_queueing(&self, link: &Link, total: usize) -> Result<(), WriteError> {
        if !link.takes_writes() {
            Err(WriteError::Closed)
        } else if self.queue_bytes(link) + total > self.config.write_queue_bytes_max {
            Err(WriteError::Full)
        } else {
            Ok(())
        }
    }

    /// How many bytes have left, if it was tried.
    #[inline]
    fn count_sent(&mut self, token: Token, sent: Option<Transferred>) -> Result<usize, WriteError> {
        match sent {
            Some(Transferred::Bytes(sent)) => {
                self.stats.bytes_out += sent as u64;
                Ok(sent)
            }
            None | Some(Transferred::NotNow) => Ok(0),
            Some(Transferred::Failed(error)) => Err(self.fail_write(token, error)),
        }
    }

    #[cold]
    #[inline(never)]
    fn fail_write(&mut self, token: Token, error: Error) -> WriteError {
        self.doom(token, CloseReason::Failed(error));
        WriteError::Closed
    }

    /// Queues what is left of `total` bytes of which so many have been `sent`. Without room for it in all queues
    /// together, a connection that has sent a part can't go on.
    #[cold]
    #[inline(never)]
    fn enqueue(
        &mut self,
        token: Token,
        sent: usize,
        total: usize,
        fill: impl FnOnce(&mut WriteQueue),
    ) -> Result<Written, WriteError> {
        let (left, limit) = (total - sent, self.config.write_queues_bytes_max);
        if left > limit - self.stats.queued_bytes {
            if sent == 0 {
                return Err(WriteError::FullInTotal);
            }
            let full = Error::Full { what: "bytes in all write queues", limit };
            self.cut_off(token, CloseReason::Failed(full));
            return Err(WriteError::Closed);
        }
        let queue = match self.link(token).and_then(Link::queue) {
            Some(queue) => queue,
            None => self.claim_queue(token),
        };
        fill(&mut self.queues[queue as usize]);
        self.stats.queued_bytes += left;
        Ok(Written::Queued)
    }

    fn claim_queue(&mut self, token: Token) -> u32 {
        let queue = self.queues_free.pop().unwrap_or_else(|| {
            self.queues.push(WriteQueue::default());
            self.queues.len() as u32 - 1
        });
        if let Some(link) = self.link_mut(token) {
            link.set_queue(Some(queue));
        }
        self.unsettle(token);
        queue
    }

    /// The queue's memory goes back; its place is used again.
    fn release_queue(&mut self, queue: u32) {
        self.queues[queue as usize] = WriteQueue::default();
        self.queues_free.push(queue);
    }

    fn queue_bytes(&self, link: &Link) -> usize {
        link.queue().map_or(0, |queue| self.queues[queue as usize].len_bytes())
    }

    pub(super) fn finish_now(&mut self, token: Token) {
        let Some(link) = self.link_mut(token) else { return };
        if link.flags.any(Flags::DOOMED) {
            return;
        }
        if let Err(error) = sys::finish_writing(&link.socket) {
            return self.doom(token, CloseReason::Failed(error));
        }
        link.flags.set(Flags::FINISHED, true);
        self.end_if_finished(token);
    }

    fn set_flag(&mut self, token: Token, flag: Flags, on: bool) {
        if let Some(link) = self.link_mut(token) {
            link.flags.set(flag, on);
            self.unsettle(token);
        }
    }
}
