//! Receives and sends that go to the kernel together: what is wanted, the bytes, and what came of it.
//!
//! Both are made once and used again in each turn, so that a message allocates nothing.

use nix::errno::Errno;

use super::{IoResult, io_result, ring_answer};
use crate::token::Token;

/// What an operation has come to until the kernel says otherwise: its ring is lost.
pub(super) const LOST: i32 = -(Errno::ENOMEM as i32);

/// Receives, each into a part of one buffer.
#[derive(Debug)]
pub(crate) struct ReceiveBatch {
    buffer: Vec<u8>,
    bytes_each: usize,
    entries: Vec<Operation>,
}

/// An operation on a socket in the registered-file tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) token: Token,
    pub(super) place: u32,
    /// Bytes, or an errno below zero.
    pub(super) result: i32,
}

impl ReceiveBatch {
    /// Room for `entries_max` receives of `bytes_each`. Memory that is not used is not touched.
    pub(crate) fn with_capacity(entries_max: usize, bytes_each: usize) -> Self {
        Self {
            buffer: vec![0; entries_max * bytes_each],
            bytes_each,
            entries: Vec::with_capacity(entries_max),
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        (self.entries.len() + 1) * self.bytes_each > self.buffer.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Wants a receive from the socket at this place of the tables.
    pub(crate) fn push(&mut self, token: Token, place: u32) {
        debug_assert!(!self.is_full(), "there is no room in the buffer");
        self.entries.push(Operation { token, place, result: LOST });
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(crate) fn token(&self, index: usize) -> Token {
        self.entries[index].token
    }

    pub(crate) fn bytes_each(&self) -> usize {
        self.bytes_each
    }

    /// What came of a receive; its bytes are the first of [`part`](Self::part).
    #[inline]
    pub(crate) fn result(&self, index: usize) -> IoResult {
        io_result("recv", ring_answer(self.entries[index].result))
    }

    #[inline]
    pub(crate) fn part(&mut self, index: usize) -> &mut [u8] {
        &mut self.buffer[index * self.bytes_each..][..self.bytes_each]
    }

    /// The receives with their parts of the buffer.
    pub(super) fn operations(&mut self) -> (&mut [Operation], &mut [u8], usize) {
        (&mut self.entries, &mut self.buffer, self.bytes_each)
    }
}

/// Sends, their bytes copied into one buffer.
#[derive(Debug, Default)]
pub(crate) struct SendBatch {
    buffer: Vec<u8>,
    entries: Vec<SendOperation>,
    entries_max: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SendOperation {
    pub(super) operation: Operation,
    /// Where its bytes begin and end in the buffer.
    pub(super) start: usize,
    pub(super) end: usize,
}

impl SendBatch {
    /// Room for `entries_max` sends of `bytes_max` in all. Memory that is not used is not touched.
    pub(crate) fn with_capacity(entries_max: usize, bytes_max: usize) -> Self {
        Self {
            buffer: Vec::with_capacity(bytes_max),
            entries: Vec::with_capacity(entries_max),
            entries_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Wants a send of these bytes; `false` where there is no room for it.
    #[inline]
    pub(crate) fn push<'a>(
        &mut self,
        token: Token,
        place: u32,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> bool {
        if self.entries.len() == self.entries_max {
            return false;
        }
        let start = self.buffer.len();
        if !self.copy(parts) {
            return false;
        }
        let operation = Operation { token, place, result: LOST };
        self.entries.push(SendOperation { operation, start, end: self.buffer.len() });
        true
    }

    /// Adds to the last send, where that is of the same connection, there is room, and it stays within `bytes_max`.
    pub(crate) fn append<'a>(
        &mut self,
        token: Token,
        parts: impl Iterator<Item = &'a [u8]>,
        bytes_max: usize,
    ) -> bool {
        let Some(&last) = self.entries.last() else { return false };
        if last.operation.token != token || !self.copy(parts) {
            return false;
        }
        let end = self.buffer.len();
        if end - last.start > bytes_max {
            self.buffer.truncate(last.end);
            return false;
        }
        if let Some(last) = self.entries.last_mut() {
            last.end = end;
        }
        true
    }

    /// Copies all of it or nothing; the buffer never grows.
    #[inline]
    fn copy<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>) -> bool {
        let start = self.buffer.len();
        for part in parts {
            if part.len() > self.buffer.capacity() - self.buffer.len() {
                self.buffer.truncate(start);
                return false;
            }
            self.buffer.extend_from_slice(part);
        }
        true
    }

    /// The bytes of all of them.
    #[inline]
    pub(crate) fn len_bytes(&self) -> usize {
        self.buffer.len()
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.buffer.clear();
    }

    pub(crate) fn token(&self, index: usize) -> Token {
        self.entries[index].operation.token
    }

    /// The bytes that wait for one connection.
    pub(crate) fn bytes_of(&self, token: Token) -> usize {
        let own = self.entries.iter().filter(|entry| entry.operation.token == token);
        own.map(|entry| entry.end - entry.start).sum()
    }

    #[inline]
    pub(crate) fn result(&self, index: usize) -> IoResult {
        io_result("send", ring_answer(self.entries[index].operation.result))
    }

    #[inline]
    pub(crate) fn bytes(&self, index: usize) -> &[u8] {
        let SendOperation { start, end, .. } = self.entries[index];
        &self.buffer[start..end]
    }

    /// The sends, and the buffer with their bytes.
    pub(super) fn operations(&mut self) -> (&mut [SendOperation], &[u8]) {
        (&mut self.entries, &self.buffer)
    }
}
