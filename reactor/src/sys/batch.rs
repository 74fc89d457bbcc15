//! Batches of receives and of sends: the operations, their bytes and their results.
//!
//! The batches are allocated once and reused in each turn, so that a message allocates nothing.

use nix::errno::Errno;

use super::{IoResult, io_result, ring_answer};
use crate::token::Token;

/// The initial result of an operation, which remains if its ring is lost.
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
    /// Creates a batch of up to `entries_max` receives of `bytes_each`. Unused memory is not touched.
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

    /// Adds a receive from the socket at this place of the tables.
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

    /// The result of a receive; its bytes are at the start of [`part`](Self::part).
    #[inline]
    pub(crate) fn result(&self, index: usize) -> IoResult {
        io_result("recv", ring_answer(self.entries[index].result))
    }

    #[inline]
    pub(crate) fn part(&mut self, index: usize) -> &mut [u8] {
        &mut self.buffer[index * self.bytes_each..][..self.bytes_each]
    }

    /// The receives, the buffer, and the size of each receive's part.
    pub(super) fn operations(&mut self) -> (&mut [Operation], &mut [u8], usize) {
        (&mut self.entries, &mut self.buffer, self.bytes_each)
    }
}

/// Sends, with their bytes copied into one buffer.
#[derive(Debug, Default)]
pub(crate) struct SendBatch {
    buffer: Vec<u8>,
    entries: Vec<SendOperation>,
    entries_max: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SendOperation {
    pub(super) operation: Operation,
    /// The range of its bytes in the buffer.
    pub(super) start: usize,
    pub(super) end: usize,
}

impl SendBatch {
    /// Creates a batch of up to `entries_max` sends with `bytes_max` in total. Unused memory is not touched.
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

    /// Adds a send of these bytes; returns `false` if it does not fit.
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

    /// Appends to the last send; returns `false` if that is of another connection, would exceed `bytes_max`, or the
    /// bytes don't fit into the buffer.
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

    /// Copies all parts or none; the buffer never grows.
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

    /// The total number of bytes.
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

    /// The number of bytes of one connection.
    #[cfg(any(test, fuzzing))]
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

    /// The sends, and the buffer that contains their bytes.
    pub(super) fn operations(&mut self) -> (&mut [SendOperation], &[u8]) {
        (&mut self.entries, &self.buffer)
    }
}
