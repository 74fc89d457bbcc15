//! Writing, pausing and closing connections.

use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::error::{ChunkRefused, CloseReason, Error, WriteError, Written};
use crate::queue::{CHUNKS_PER_SEND, Chunk, FilePart, WriteQueue};
use crate::sys::{IoResult, Socket, Sockets};
use crate::token::{EventSource, Inner, Token};
use crate::wheel::NodeId;

/// The largest message that is copied into the batch of sends.
pub(super) const BATCHED_SEND_BYTES_MAX: usize = 2048;

/// The maximum number of listed connections that are served in one turn.
const LISTED_PER_TURN: usize = 64;

/// The interval at which queues are retried without a report by epoll.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const QUEUES_PER_RETRY: usize = 1024;

/// The maximum sent of a file in one turn, so that other connections are not delayed.
const FILE_BYTES_PER_SEND: usize = 256 * 1024;
const FILES_PER_QUEUE_MAX: usize = 64;

/// The result of a read from a connection.
pub(crate) enum Received<C> {
    /// The connection's state, which is lent from now on, and the number of bytes.
    Bytes(C, usize),
    /// No bytes: the peer has finished, has sent nothing yet, or the read failed.
    Nothing(IoResult),
}

impl<C> Context<C> {
    /// Sends bytes. If nothing is queued, they go to the kernel at once (`send`); bytes that it does not accept are
    /// queued.
    ///
    /// [`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max) bounds the queue, and thereby the
    /// largest message: a larger one is refused even if the queue is empty.
    ///
    /// With [registered files](crate::FileTable::Registered), messages of up to 2,048 bytes that callbacks write go to
    /// the kernel together, later in the turn; bytes that it does not accept are queued then.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was sent or queued.
    #[inline]
    pub fn write(&mut self, token: Token, bytes: &[u8]) -> Result<Written, WriteError> {
        let send = |sockets: &Sockets, socket: &Socket| sockets.send(socket, bytes);
        match self.send(token, bytes.len(), std::iter::once(bytes), send)? {
            sent if sent == bytes.len() => Ok(Written::Sent),
            sent => self.enqueue(token, sent, bytes.len(), |queue| queue.copy(&bytes[sent..])),
        }
    }

    /// Like [`write`](Self::write), for bytes in several slices, with one system call.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was sent or queued.
    pub fn write_vectored(
        &mut self,
        token: Token,
        slices: &[IoSlice<'_>],
    ) -> Result<Written, WriteError> {
        let total = slices.iter().map(|slice| slice.len()).sum();
        let first = &slices[..slices.len().min(CHUNKS_PER_SEND)];
        let send = |sockets: &Sockets, socket: &Socket| sockets.send_vectored(socket, first);
        match self.send(token, total, slices.iter().map(|slice| &slice[..]), send)? {
            sent if sent == total => Ok(Written::Sent),
            sent => {
                // There are more slices than one send takes: if it accepted all of its own, epoll will not report room.
                if sent > 0 && slices.len() > first.len() {
                    self.mark_unsent(token);
                }
                self.enqueue(token, sent, total, |queue| {
                    let mut skip = sent;
                    for slice in slices {
                        let skipped = skip.min(slice.len());
                        queue.copy(&slice[skipped..]);
                        skip -= skipped;
                    }
                })
            }
        }
    }

    /// Like [`write`](Self::write), for an owned or shared buffer: bytes that have to wait are queued without a copy.
    /// Only a chunk of up to 128 bytes behind others is copied, because a separate entry would take as much memory.
    ///
    /// # Errors
    /// [`WriteError`]; no byte was sent or queued.
    pub fn write_chunk(
        &mut self,
        token: Token,
        chunk: impl Into<Chunk>,
    ) -> Result<Written, WriteError> {
        Ok(self.try_write_chunk(token, chunk)?)
    }

    /// Like [`write_chunk`](Self::write_chunk), but returns a refused chunk, for example to write it again in
    /// [`on_drain`](crate::Handler::on_drain).
    ///
    /// # Errors
    /// [`ChunkRefused`], with the whole chunk. With [`WriteError::Closed`], a part of it may have been sent before the
    /// connection was lost.
    pub fn try_write_chunk(
        &mut self,
        token: Token,
        chunk: impl Into<Chunk>,
    ) -> Result<Written, ChunkRefused> {
        let chunk = chunk.into();
        let bytes = chunk.as_bytes();
        let total = bytes.len();
        let send = |sockets: &Sockets, socket: &Socket| sockets.send(socket, bytes);
        let sent = match self.send(token, total, std::iter::once(bytes), send) {
            Ok(sent) if sent == total => return Ok(Written::Sent),
            Ok(sent) => sent,
            Err(error) => return Err(ChunkRefused { error, chunk }),
        };
        let mut given = Some(chunk);
        let fill = |queue: &mut WriteQueue| {
            queue.append(given.take().expect("the queue is filled once"), sent);
        };
        self.enqueue(token, sent, total, fill).map_err(|error| ChunkRefused {
            error,
            chunk: given.take().expect("a refused chunk was not queued"),
        })
    }

    /// Sends a part of a file after everything written before, without copying it into this process's memory
    /// (`sendfile`). It stays in the queue until it has been sent; then [`on_drain`](crate::Handler::on_drain) is
    /// called. Many connections can share a file: its position is neither used nor changed.
    ///
    /// The file is read on the reactor's thread. Pages that are not in the page cache are read from the disk while the
    /// loop waits, at most 256 KiB per turn and connection. If the socket is a registered file, each piece needs two
    /// more system calls, for a descriptor. If no descriptor is left, or the file does not support `sendfile`, the
    /// bytes are read and sent in pieces of 64 KiB. If the file ends before the end of the range, the connection is
    /// reset, with [`CloseReason::Failed`]. `sendfile` raises SIGPIPE if the connection is lost; Rust programs ignore
    /// that signal by default.
    ///
    /// After [`close`](Self::close), the file must be sent within
    /// [`Config::flush_timeout`](crate::Config::flush_timeout); for a large file, close in `on_drain` instead. The
    /// bytes of a file are not in memory, so [`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max)
    /// does not count them. One queue can hold 64 parts of files.
    ///
    /// ```no_run
    /// # use reactor::{Context, Token};
    /// use std::fs::File;
    ///
    /// # fn send(cx: &mut Context<()>, token: Token) -> Result<(), Box<dyn std::error::Error>> {
    /// let file = File::open("film.webm")?;
    /// let length = file.metadata()?.len();
    /// cx.write(token, format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
    /// cx.write_file(token, file, 0..length)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`WriteError::Closed`], or [`WriteError::Full`] if 64 parts of files are queued. Nothing was queued then.
    pub fn write_file(
        &mut self,
        token: Token,
        file: impl Into<Arc<File>>,
        range: Range<u64>,
    ) -> Result<Written, WriteError> {
        self.flush_sends();
        let header = self.header(token).ok_or(WriteError::Closed)?;
        if !header.takes_writes() {
            return Err(WriteError::Closed);
        }
        let is_connecting = header.flags.any(Flags::CONNECTING);
        let queue = header.queue();
        if range.is_empty() {
            return Ok(if queue.is_some() { Written::Queued } else { Written::Sent });
        }
        if queue.is_some_and(|queue| self.queues[queue as usize].files() >= FILES_PER_QUEUE_MAX) {
            return Err(WriteError::Full);
        }
        let place = queue.unwrap_or_else(|| self.claim_queue(token));
        self.queues[place as usize].append_file(FilePart { file: file.into(), range });
        // If other bytes are queued, it is sent after them; the end of a connect is reported by epoll.
        if queue.is_none() && !is_connecting {
            self.mark_unsent(token);
        }
        Ok(Written::Queued)
    }

    /// Returns the number of bytes in the connection's queue, including those of files; 0 if the token is stale. Bytes
    /// in the batch of [registered files](crate::FileTable::Registered) are not queued yet.
    #[must_use]
    pub fn queued_bytes(&self, token: Token) -> usize {
        let queue = self.header(token).and_then(ConnHeader::queue);
        queue.map_or(0, |queue| self.queues[queue as usize].waiting_bytes())
    }

    /// Returns the number of bytes in the kernel's send buffer, which the peer has not acknowledged yet
    /// (`ioctl(SIOCOUTQ)`), without those in the batch; 0 if the token is stale. Makes one system call.
    #[must_use]
    pub fn unacknowledged_bytes(&self, token: Token) -> usize {
        self.header(token).map_or(0, |header| self.sockets.unacknowledged_bytes(&header.socket))
    }

    /// Stops reading from this connection until [`resume_reads`](Self::resume_reads); TCP flow control then slows the
    /// peer down. This sets a flag: one call of `resume_reads` undoes any number of pauses. Does nothing if the token is
    /// stale.
    pub fn pause_reads(&mut self, token: Token) {
        self.set_flag(token, Flags::READS_PAUSED, true);
    }

    /// Reads again after [`pause_reads`](Self::pause_reads). Does nothing if the token is stale.
    pub fn resume_reads(&mut self, token: Token) {
        self.set_flag(token, Flags::READS_PAUSED, false);
        self.list_unread(token);
    }

    /// Shuts down the writing side once the queue is empty (`shutdown`, a FIN); reading continues. When the peer has
    /// finished too, the connection ends, with [`CloseReason::Finished`], or with [`CloseReason::PeerClosed`] if
    /// [`on_eof`](crate::Handler::on_eof) closes it, as the default does. There is no time limit: if the peer may never
    /// finish, or reads are paused, set a timeout. Does nothing if the token is stale.
    pub fn finish(&mut self, token: Token) {
        let Some(header) = self.header_mut(token) else { return };
        if !header.takes_writes() {
            return;
        }
        header.flags.set(Flags::FINISHING, true);
        if !header.flags.any(Flags::QUEUED | Flags::SENDING | Flags::CONNECTING) {
            self.finish_now(token);
        }
    }

    /// Closes the connection once the peer has received everything written; then `on_close` is called. The service
    /// receives no more data. A connection that is still connecting is completed first if bytes are queued, and
    /// abandoned otherwise. Does nothing if the token is stale.
    ///
    /// If a socket with unread input is closed, TCP sends a reset and discards bytes that the peer has not received.
    /// Therefore the queue is sent, then a FIN, and the connection ends when the peer has acknowledged all bytes, which
    /// is checked every 50 ms, or has finished too. Input that arrives until then is discarded. If nothing is left to
    /// acknowledge, or the peer has already finished, the socket is closed at once. If the queue is empty and the peer
    /// has not finished, one system call (`ioctl(SIOCOUTQ)`) checks this.
    ///
    /// The connection ends at the latest after [`Config::flush_timeout`](crate::Config::flush_timeout): with a reset and
    /// [`CloseReason::FlushTimedOut`] if bytes are still queued, otherwise with [`CloseReason::Closed`], and the kernel
    /// goes on sending what it has.
    pub fn close(&mut self, token: Token) {
        let Some(header) = self.header(token) else { return };
        if header.flags.any(Flags::CLOSING | Flags::CLOSED) {
            return;
        }
        if header.flags.any(Flags::QUEUED | Flags::SENDING) {
            return self.begin_closing(token);
        }
        if self.can_close_at_once(token) {
            return self.mark_flushed(token);
        }
        self.begin_closing(token);
        self.linger(token);
    }

    /// Whether closing the socket now loses no written bytes.
    fn can_close_at_once(&self, token: Token) -> bool {
        self.header(token).is_none_or(|header| {
            header.flags.any(Flags::CONNECTING | Flags::EOF)
                || self.sockets.unacknowledged_bytes(&header.socket) == 0
        })
    }

    fn begin_closing(&mut self, token: Token) {
        self.clear_tagged_timeouts(token);
        self.set_flag(token, Flags::CLOSING, true);
        let flush_timeout = self.config.flush_timeout;
        self.arm(token, flush_timeout);
    }

    /// The flush timeout has expired: the kernel may still send the bytes that it has, queued bytes are lost.
    pub(crate) fn end_closing(&mut self, token: Token, reason: CloseReason) {
        match self.header(token) {
            Some(header) if header.lingers() => self.mark_flushed(token),
            _ => self.cut_off(token, reason),
        }
    }

    /// Closes the connection at once with a reset, and calls `on_close`. Queued bytes are lost, and no socket stays in
    /// TIME_WAIT. Does nothing if the token is stale.
    pub fn abort(&mut self, token: Token) {
        self.cut_off(token, CloseReason::Aborted);
    }

    pub(crate) fn cut_off(&mut self, token: Token, reason: CloseReason) {
        if let Some(header) = self.header_mut(token) {
            header.flags.set(Flags::RESET, true);
            self.mark_closed(token, reason);
        }
    }

    /// Adds the connection to the list of those to be removed; the first reason is kept.
    pub(crate) fn mark_closed(&mut self, token: Token, reason: CloseReason) {
        if let Some(header) = self.header_mut(token)
            && !header.flags.any(Flags::CLOSED)
        {
            header.flags.set(Flags::CLOSED, true);
            self.closed.push_back((token, reason));
            self.clear_tagged_timeouts(token);
        }
    }

    /// Everything that [`close`](Self::close) waited for has been sent.
    pub(super) fn mark_flushed(&mut self, token: Token) {
        let peer_finished = self.header(token).is_some_and(|header| header.flags.any(Flags::EOF));
        let reason = if peer_finished { CloseReason::PeerClosed } else { CloseReason::Closed };
        self.mark_closed(token, reason);
    }

    pub(crate) fn has_closed(&self) -> bool {
        !self.closed.is_empty()
    }

    /// Whether the connection has ended and is removed before the next callback.
    pub(crate) fn is_to_be_removed(&self, token: Token) -> bool {
        self.header(token).is_some_and(|header| header.flags.any(Flags::CLOSED))
    }

    /// The number of connections to be removed.
    pub(crate) fn closed(&self) -> usize {
        self.closed.len()
    }

    /// Removes the next closed connection; connections are removed only here. Its socket is closed by
    /// [`close_leaving`](Self::close_leaving).
    pub(crate) fn reap(&mut self) -> Option<(Token, C, CloseReason)> {
        loop {
            let (token, reason) = self.closed.pop_front()?;
            let Some((header, conn)) = self.connections.remove(token.key()) else { continue };
            if header.timer != NodeId::NONE {
                self.wheel.remove(header.timer);
            }
            if let Some(queue) = header.queue() {
                self.stats.queued_bytes -= self.queues[queue as usize].len_bytes();
                self.release_queue(queue);
            }
            if header.flags.any(Flags::HELD) {
                self.held.retain(|(held, _)| *held != token);
            }
            if header.has_opened() {
                self.stats.closed += 1;
            } else {
                self.stats.connects_failed += 1;
            }
            self.room_waiters.remove(token);
            self.freed += 1;
            self.outbound -= usize::from(header.flags.any(Flags::OUTBOUND));
            self.release_place(token);
            self.leaving = Some((token, header.socket, header.flags.any(Flags::RESET)));
            return Some((token, conn, reason));
        }
    }

    /// Closes the socket of the connection that was passed to `on_close`; returns whether there was one.
    pub(crate) fn close_leaving(&mut self) -> bool {
        let Some((_, socket, reset)) = self.leaving.take() else { return false };
        self.sockets.close(socket, reset);
        true
    }

    /// Reads once and lends the connection's state with the bytes; `None` if the connection needs more than a read.
    #[inline]
    pub(crate) fn receive(&mut self, token: Token, buffer: &mut [u8]) -> Option<Received<C>> {
        self.receive_where(token, buffer, ConnHeader::only_reads)
    }

    /// The same for a connection that may also have something to send.
    pub(crate) fn receive_beside_queue(
        &mut self,
        token: Token,
        buffer: &mut [u8],
    ) -> Option<Received<C>> {
        self.receive_where(token, buffer, ConnHeader::reads)
    }

    #[inline(always)]
    fn receive_where(
        &mut self,
        token: Token,
        buffer: &mut [u8],
        is_ready: fn(&ConnHeader) -> bool,
    ) -> Option<Received<C>> {
        let (header, conn) = self.connections.lend(token.key())?;
        if !is_ready(header) {
            self.give_back(token, conn);
            return None;
        }
        match self.sockets.receive(&header.socket, buffer) {
            IoResult::Bytes(received @ 1..) => {
                if received == buffer.len() || header.flags.any(Flags::READ_TO_END | Flags::UNREAD)
                {
                    self.note_partial_read(token, received == buffer.len());
                }
                self.stats.bytes_in += received as u64;
                Some(Received::Bytes(conn, received))
            }
            nothing => {
                self.give_back(token, conn);
                Some(Received::Nothing(nothing))
            }
        }
    }

    /// A read has returned bytes: lists the connection if it must be read again without a report by epoll.
    #[cold]
    #[inline(never)]
    pub(crate) fn note_partial_read(&mut self, token: Token, was_full: bool) {
        let Some(header) = self.header_mut(token) else { return };
        let is_unread = was_full || header.flags.any(Flags::READ_TO_END);
        header.flags.set(Flags::UNREAD, is_unread);
        self.list_unread(token);
    }

    /// A read has found nothing: epoll will report new input.
    pub(crate) fn note_read_empty(&mut self, token: Token) {
        self.set_flag(token, Flags::UNREAD, false);
    }

    /// epoll has reported input that is not read now.
    pub(crate) fn note_unread(&mut self, token: Token) {
        self.set_flag(token, Flags::UNREAD, true);
        self.list_unread(token);
    }

    /// Takes the bytes that were held while reads were paused.
    pub(crate) fn take_held(&mut self, token: Token) -> Option<Box<[u8]>> {
        let header = self.header_mut(token)?;
        if !header.flags.any(Flags::HELD) {
            return None;
        }
        header.flags.set(Flags::HELD, false);
        let index = self.held.iter().position(|(held, _)| *held == token)?;
        Some(self.held.swap_remove(index).1)
    }

    /// Reads once and discards the bytes, from a connection that waits only for the end of its input.
    pub(crate) fn drain(&mut self, token: Token, buffer: &mut [u8]) {
        drop(self.take_held(token));
        let Some(header) = self.connections.head_mut(token.key()) else { return };
        header.flags.set(Flags::UNREAD, false);
        match self.sockets.receive(&header.socket, buffer) {
            IoResult::Bytes(0) => self.mark_flushed(token),
            IoResult::Bytes(received) => self.note_partial_read(token, received == buffer.len()),
            IoResult::Interrupted => self.note_unread(token),
            IoResult::NotNow => {}
            IoResult::Failed(error) => self.mark_closed(token, CloseReason::Failed(error)),
        }
    }

    /// Sends queued bytes; returns whether the queue has become empty and `on_drain` is to be called.
    pub(crate) fn flush_queue(&mut self, token: Token) -> bool {
        let Some(header) = self.connections.head_mut(token.key()) else { return false };
        let Some(index) = header.queue() else { return false };
        if header.flags.any(Flags::CLOSED) {
            return false;
        }
        let queue = &mut self.queues[index as usize];
        if queue.first_file().is_some() {
            return self.flush_file(token, index);
        }
        let mut slices = [IoSlice::new(&[]); CHUNKS_PER_SEND];
        let filled = queue.slices(&mut slices);
        let offered: usize = slices[..filled].iter().map(|slice| slice.len()).sum();
        header.flags.set(Flags::UNSENT, false);
        let mut took_all = false;
        match self.sockets.send_vectored(&header.socket, &slices[..filled]) {
            IoResult::Bytes(sent) => {
                took_all = sent == offered;
                queue.consume(sent);
                self.stats.bytes_out += sent as u64;
                self.stats.queued_bytes -= sent;
            }
            IoResult::NotNow => {}
            IoResult::Interrupted => took_all = true,
            IoResult::Failed(error) => {
                self.mark_closed(token, CloseReason::Failed(error));
                return false;
            }
        }
        self.end_flush(token, index, took_all)
    }

    /// The same if a part of a file is first in the queue.
    fn flush_file(&mut self, token: Token, index: u32) -> bool {
        let Some(header) = self.connections.head_mut(token.key()) else { return false };
        let queue = &mut self.queues[index as usize];
        let Some(FilePart { file, range }) = queue.first_file() else { return false };
        let offered = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let offered = offered.min(FILE_BYTES_PER_SEND);
        header.flags.set(Flags::UNSENT, false);
        // More is sent in the next turn, also if a send was short because the file's next page was not in memory.
        let mut goes_on = true;
        match self.sockets.send_file(&header.socket, file, range.start, offered) {
            IoResult::Bytes(0) => {
                let error = Error::Invalid("the file ended before all of the part was sent");
                self.cut_off(token, CloseReason::Failed(error));
                return false;
            }
            IoResult::Bytes(sent) => {
                queue.consume_file(sent);
                self.stats.bytes_out += sent as u64;
            }
            IoResult::NotNow => goes_on = false,
            IoResult::Interrupted => {}
            IoResult::Failed(error) => {
                self.mark_closed(token, CloseReason::Failed(error));
                return false;
            }
        }
        self.end_flush(token, index, goes_on)
    }

    /// Queued bytes were sent; returns whether the queue has become empty and `on_drain` is to be called.
    fn end_flush(&mut self, token: Token, index: u32, goes_on: bool) -> bool {
        if !self.queues[index as usize].is_empty() {
            if goes_on {
                self.mark_unsent(token);
            }
            return false;
        }
        let Some(header) = self.connections.head_mut(token.key()) else { return false };
        header.set_queue(None);
        let flags = header.flags;
        self.release_queue(index);
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

    /// Ends the connection if both sides have finished writing.
    pub(crate) fn end_if_finished(&mut self, token: Token) {
        if self
            .header(token)
            .is_some_and(|header| header.flags.any(Flags::EOF) && header.flags.any(Flags::FINISHED))
        {
            self.mark_closed(token, CloseReason::Finished);
        }
    }

    /// Lists a connection that has input which epoll will not report, to be served again, unless its reads are paused.
    pub(crate) fn list_unread(&mut self, token: Token) {
        if self.header(token).is_some_and(ConnHeader::wants_reading) {
            self.list(token);
        }
    }

    /// Lists a connection that can send more, which epoll will not report.
    pub(crate) fn mark_unsent(&mut self, token: Token) {
        self.set_flag(token, Flags::UNSENT, true);
        self.list(token);
    }

    /// Adds a connection to the list of those to be served again without a report by epoll.
    fn list(&mut self, token: Token) {
        if let Some(header) = self.connections.head_mut(token.key())
            && !header.flags.any(Flags::LISTED)
        {
            header.flags.set(Flags::LISTED, true);
            self.listed.push_back(token);
        }
    }

    pub(crate) fn listed(&self) -> usize {
        self.listed.len()
    }

    /// The maximum number of them that one turn serves.
    pub(crate) fn served_again_max(&self) -> usize {
        self.config.events_per_wait.min(LISTED_PER_TURN)
    }

    pub(crate) fn next_listed(&mut self) -> Option<Token> {
        let token = self.listed.pop_front()?;
        self.set_flag(token, Flags::LISTED, false);
        Some(token)
    }

    /// Sends what can be sent at once, to the kernel or into the batch of this turn; returns the number of bytes
    /// accepted.
    #[inline]
    fn send<'a>(
        &mut self,
        token: Token,
        total: usize,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
        send: impl FnOnce(&Sockets, &Socket) -> IoResult,
    ) -> Result<usize, WriteError> {
        let header = self.connections.head(token.key()).ok_or(WriteError::Closed)?;
        if header.sends_at_once() && (1..=self.config.write_queue_bytes_max).contains(&total) {
            return match header.socket.place() {
                Some(place) if self.in_turn && self.may_batch(total) => {
                    self.batch_send(token, place, parts);
                    Ok(total)
                }
                _ => {
                    let sent = send(&self.sockets, &header.socket);
                    self.count_sent(token, sent)
                }
            };
        }
        if header.flags.any(Flags::SENDING) {
            if self.append_send(token, total, parts.clone()) {
                return Ok(total);
            }
            self.flush_sends();
            return self.send(token, total, parts, send);
        }
        self.check_queueing(header, total).map(|()| 0)
    }

    /// Whether bytes may be batched: any of them that the kernel does not accept must fit into a queue.
    #[inline]
    fn may_batch(&self, total: usize) -> bool {
        total <= BATCHED_SEND_BYTES_MAX && total <= self.queues_room()
    }

    /// Bytes that may still be queued, in all queues together.
    pub(super) fn queues_room(&self) -> usize {
        let taken = self.stats.queued_bytes + self.sends.len_bytes();
        self.config.write_queues_bytes_max.saturating_sub(taken)
    }

    #[inline(never)]
    fn batch_send<'a>(
        &mut self,
        token: Token,
        place: u32,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) {
        if !self.sends.push(token, place, parts.clone()) {
            self.flush_sends();
            let fits = self.sends.push(token, place, parts);
            debug_assert!(fits, "an empty batch has room for any batched message");
        }
        self.set_flag(token, Flags::SENDING, true);
    }

    /// Appends to the connection's bytes in the batch; returns false if there is no room.
    #[cold]
    #[inline(never)]
    fn append_send<'a>(
        &mut self,
        token: Token,
        total: usize,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> bool {
        self.header(token).is_some_and(ConnHeader::takes_writes)
            && self.may_batch(total)
            && self.sends.append(token, parts, self.config.write_queue_bytes_max)
    }

    /// Submits the batch of sends.
    pub(crate) fn flush_sends(&mut self) {
        if self.sends.is_empty() {
            return;
        }
        let mut sends = std::mem::take(&mut self.sends);
        self.sockets.send_all(&mut sends);
        for index in 0..sends.len() {
            self.finish_send(sends.token(index), sends.result(index), sends.bytes(index));
        }
        sends.clear();
        self.sends = sends;
    }

    #[inline]
    fn finish_send(&mut self, token: Token, result: IoResult, bytes: &[u8]) {
        let sent = match result {
            IoResult::Bytes(sent) => sent,
            _ => 0,
        };
        self.stats.bytes_out += sent as u64;
        let Some(header) = self.header_mut(token) else { return };
        header.flags.set(Flags::SENDING, false);
        let rests = Flags::CLOSING | Flags::FINISHING | Flags::CLOSED;
        if sent < bytes.len() || header.flags.any(rests) {
            self.go_on_after_send(token, result, &bytes[sent..]);
        }
    }

    /// Completes a batched send that the kernel did not accept completely, or after which the connection is to be
    /// closed or finished.
    #[cold]
    #[inline(never)]
    fn go_on_after_send(&mut self, token: Token, result: IoResult, left: &[u8]) {
        let Some(flags) = self.header(token).map(|header| header.flags) else { return };
        if flags.any(Flags::CLOSED) {
            return;
        }
        if let IoResult::Failed(error) = result {
            return self.mark_closed(token, CloseReason::Failed(error));
        }
        if !left.is_empty() {
            let queued = self.queue_left(token, left.len(), |queue| queue.copy(left));
            debug_assert!(queued.is_ok(), "there was room when it was batched");
            if matches!(result, IoResult::Interrupted) {
                self.mark_unsent(token);
            }
        } else if flags.any(Flags::CLOSING) {
            if self.can_close_at_once(token) {
                self.mark_flushed(token);
            } else {
                self.linger(token);
            }
        } else if flags.any(Flags::FINISHING) {
            self.finish_now(token);
        }
    }

    /// Returns an error if the connection can't queue `total` bytes.
    #[cold]
    #[inline(never)]
    fn check_queueing(&self, header: &ConnHeader, total: usize) -> Result<(), WriteError> {
        if !header.takes_writes() {
            Err(WriteError::Closed)
        } else if self.queue_bytes(header) + total > self.config.write_queue_bytes_max {
            Err(WriteError::Full)
        } else {
            Ok(())
        }
    }

    /// Counts a send; returns the number of bytes sent.
    #[inline]
    fn count_sent(&mut self, token: Token, sent: IoResult) -> Result<usize, WriteError> {
        match sent {
            IoResult::Bytes(sent) => {
                self.stats.bytes_out += sent as u64;
                Ok(sent)
            }
            other => self.note_unsent(token, other),
        }
    }

    #[cold]
    #[inline(never)]
    fn note_unsent(&mut self, token: Token, sent: IoResult) -> Result<usize, WriteError> {
        match sent {
            IoResult::Interrupted => self.mark_unsent(token),
            IoResult::Failed(error) => {
                self.mark_closed(token, CloseReason::Failed(error));
                return Err(WriteError::Closed);
            }
            IoResult::Bytes(_) | IoResult::NotNow => {}
        }
        Ok(0)
    }

    /// Queues the rest of `total` bytes of which `sent` were sent. If all queues together are full, a connection that
    /// has sent a part of a message can't continue and is reset.
    #[cold]
    #[inline(never)]
    fn enqueue(
        &mut self,
        token: Token,
        sent: usize,
        total: usize,
        fill: impl FnOnce(&mut WriteQueue),
    ) -> Result<Written, WriteError> {
        match self.queue_left(token, total - sent, fill) {
            Err(WriteError::FullInTotal) if sent > 0 => {
                let limit = self.config.write_queues_bytes_max;
                let full = Error::Full { what: "bytes in all write queues", limit };
                self.cut_off(token, CloseReason::Failed(full));
                Err(WriteError::Closed)
            }
            other => other,
        }
    }

    fn queue_left(
        &mut self,
        token: Token,
        left: usize,
        fill: impl FnOnce(&mut WriteQueue),
    ) -> Result<Written, WriteError> {
        if left > self.queues_room() {
            self.await_room(token);
            return Err(WriteError::FullInTotal);
        }
        let queue = match self.header(token).and_then(ConnHeader::queue) {
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
            self.queue_owners.push(None);
            self.queues.len() as u32 - 1
        });
        self.queue_owners[queue as usize] = Some(token);
        self.room_waiters.remove(token); // `on_drain` follows when the queue is empty.
        if let Some(header) = self.header_mut(token) {
            header.set_queue(Some(queue));
        }
        if self.retry.is_none() {
            self.arm_retry();
        }
        queue
    }

    fn arm_retry(&mut self) {
        let deadline = self.tick_after(RETRY_INTERVAL);
        self.retry = Some(self.wheel.insert(deadline, EventSource::Inner(Inner::Retry).to_bits()));
    }

    /// Retries some of the queues, in turn: those of connections without unacknowledged data. When TCP memory is short,
    /// the kernel refuses their bytes, and reports nothing when memory is available again.
    pub(crate) fn retry_queues(&mut self) {
        self.arm_retry();
        let queues = self.queue_owners.len();
        for _ in 0..queues.min(QUEUES_PER_RETRY) {
            self.retry_next = (self.retry_next + 1) % queues;
            if let Some(token) = self.queue_owners[self.retry_next]
                && self.unacknowledged_bytes(token) == 0
            {
                self.mark_unsent(token);
            }
        }
    }

    /// Frees the queue's memory; its place is reused.
    fn release_queue(&mut self, queue: u32) {
        self.queues[queue as usize] = WriteQueue::default();
        self.queue_owners[queue as usize] = None;
        self.queues_free.push(queue);
        if self.queues_free.len() == self.queues.len()
            && let Some(retry) = self.retry.take()
        {
            self.wheel.remove(retry);
        }
    }

    pub(super) fn queue_bytes(&self, header: &ConnHeader) -> usize {
        header.queue().map_or(0, |queue| self.queues[queue as usize].len_bytes())
    }

    pub(super) fn finish_now(&mut self, token: Token) {
        let Some(header) = self.connections.head_mut(token.key()) else { return };
        if header.flags.any(Flags::CLOSED) {
            return;
        }
        if let Err(error) = self.sockets.finish_writing(&header.socket) {
            // `ENOTCONN` says that the connection is gone, and the socket's error why.
            let why = self.sockets.take_error(&header.socket, "shutdown");
            return self.mark_closed(token, CloseReason::Failed(why.unwrap_or(error)));
        }
        header.flags.set(Flags::FINISHED, true);
        self.end_if_finished(token);
    }

    fn set_flag(&mut self, token: Token, flag: Flags, on: bool) {
        if let Some(header) = self.header_mut(token) {
            header.flags.set(flag, on);
        }
    }
}
