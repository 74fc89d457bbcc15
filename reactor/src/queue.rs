//! Bytes that the kernel would not take yet, in the order in which they were written.
//!
//! A connection has a queue only while something waits in it. Bytes that were lent are copied into the last chunk, or
//! into a new one when that is full; bytes that are shared or given away are queued as they are.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use crate::connection::Origin;

/// How many chunks one send hands to the kernel at most.
pub(crate) const CHUNKS_PER_SEND: usize = 16;

/// Bytes that were lent are copied into chunks of this size, or larger ones for larger writes. One chunk for all of them
/// would never be given back on a connection whose queue never runs empty.
const COPY_CHUNK_BYTES_MAX: usize = 64 * 1024;

/// Bytes handed to [`Context::write_chunk`](crate::Context::write_chunk) without a copy.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Chunk {
    /// Bytes given away to the connection.
    Owned(Vec<u8>),
    /// Bytes that many connections can have in their queues at once.
    Shared(Arc<[u8]>),
    /// A part of such bytes.
    Part(SharedPart),
    /// Bytes of the `bytes` crate, shared likewise.
    #[cfg(feature = "bytes")]
    Bytes(bytes::Bytes),
}

/// A part of shared bytes, which keeps the whole of them alive.
#[derive(Clone, Debug)]
pub struct SharedPart {
    bytes: Arc<[u8]>,
    range: Range<usize>,
}

impl SharedPart {
    /// The bytes of this range; `None` where it reaches beyond them.
    #[must_use]
    pub fn new(bytes: Arc<[u8]>, range: Range<usize>) -> Option<Self> {
        bytes.get(range.clone())?;
        Some(Self { bytes, range })
    }
}

impl Chunk {
    /// The bytes themselves.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Chunk::Owned(bytes) => bytes,
            Chunk::Shared(bytes) => bytes,
            Chunk::Part(SharedPart { bytes, range }) => &bytes[range.clone()],
            #[cfg(feature = "bytes")]
            Chunk::Bytes(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Chunk::Owned(bytes)
    }
}

impl From<Arc<[u8]>> for Chunk {
    fn from(bytes: Arc<[u8]>) -> Self {
        Chunk::Shared(bytes)
    }
}

impl From<SharedPart> for Chunk {
    fn from(part: SharedPart) -> Self {
        Chunk::Part(part)
    }
}

#[cfg(feature = "bytes")]
impl From<bytes::Bytes> for Chunk {
    fn from(bytes: bytes::Bytes) -> Self {
        Chunk::Bytes(bytes)
    }
}

/// Invariant: no chunk is empty past the offset, and `bytes` is what all of them still hold.
#[derive(Debug, Default)]
pub(crate) struct WriteQueue {
    chunks: VecDeque<Chunk>,
    /// How much of the first chunk has left already.
    offset: usize,
    bytes: usize,
    /// Its connection's.
    pub(crate) origin: Origin,
}

impl WriteQueue {
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// A copy of all that waits.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes);
        for chunk in &self.chunks {
            bytes.extend_from_slice(chunk.as_bytes());
        }
        bytes.drain(..self.offset.min(bytes.len()));
        bytes
    }

    /// Appends a copy.
    pub(crate) fn copy(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes += bytes.len();
        match self.chunks.back_mut() {
            Some(Chunk::Owned(last)) if last.len() + bytes.len() <= COPY_CHUNK_BYTES_MAX => {
                last.extend_from_slice(bytes);
            }
            _ => self.chunks.push_back(Chunk::Owned(bytes.to_vec())),
        }
    }

    /// Appends what is left of a chunk after its first `sent` bytes, without a copy of them.
    pub(crate) fn append(&mut self, chunk: Chunk, sent: usize) {
        let left = chunk.as_bytes().len() - sent;
        if left == 0 {
            return;
        }
        if self.chunks.is_empty() {
            self.offset = sent;
            self.bytes = left;
            self.chunks.push_back(chunk);
        } else if sent == 0 {
            self.bytes += left;
            self.chunks.push_back(chunk);
        } else {
            self.copy(&chunk.as_bytes()[sent..]);
        }
    }

    /// Fills `slices` with the first bytes that wait and says how many slices that made.
    pub(crate) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; CHUNKS_PER_SEND]) -> usize {
        let mut filled = 0;
        let mut offset = self.offset;
        for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
            *slice = IoSlice::new(&chunk.as_bytes()[offset..]);
            offset = 0;
            filled += 1;
        }
        filled
    }

    /// Forgets the first `sent` bytes: they have left.
    pub(crate) fn consume(&mut self, sent: usize) {
        debug_assert!(sent <= self.bytes, "more was sent than was queued");
        self.bytes -= sent;
        self.offset += sent;
        while let Some(first) = self.chunks.front() {
            let first_bytes = first.as_bytes().len();
            if self.offset < first_bytes {
                return;
            }
            self.offset -= first_bytes;
            self.chunks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Miri takes a thousand times as long.
    const STEPS_MAX: usize = if cfg!(miri) { 30 } else { 200 };

    #[derive(Clone, Debug)]
    enum Step {
        Copy(Vec<u8>),
        Append(Vec<u8>, bool, usize),
        Send(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..64);
        prop_oneof![
            bytes().prop_map(Step::Copy),
            (bytes(), any::<bool>(), any::<usize>())
                .prop_map(|(b, shared, sent)| Step::Append(b, shared, sent)),
            (0..200usize).prop_map(Step::Send),
        ]
    }

    proptest! {
        #[test]
        fn it_hands_out_the_bytes_in_the_order_written(steps in prop::collection::vec(step(), 1..STEPS_MAX)) {
            let mut queue = WriteQueue::default();
            let mut model = VecDeque::new();
            for step in steps {
                match step {
                    Step::Copy(bytes) => {
                        queue.copy(&bytes);
                        model.extend(bytes);
                    }
                    Step::Append(bytes, shared, sent) => {
                        let sent = sent % (bytes.len() + 1);
                        model.extend(&bytes[sent..]);
                        let chunk = if shared { Chunk::Shared(bytes.into()) } else { Chunk::Owned(bytes) };
                        queue.append(chunk, sent);
                    }
                    Step::Send(most) => {
                        let mut slices = [IoSlice::new(&[]); CHUNKS_PER_SEND];
                        let filled = queue.slices(&mut slices);
                        let offered: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
                        let sent = most.min(offered.len());
                        let expected: Vec<u8> = model.drain(..sent).collect();
                        prop_assert_eq!(&offered[..sent], &expected[..]);
                        queue.consume(sent);
                    }
                }
                prop_assert_eq!(queue.len_bytes(), model.len());
                prop_assert_eq!(queue.is_empty(), model.is_empty());
            }
        }
    }

    #[test]
    fn a_queue_that_never_runs_empty_does_not_grow() {
        let mut queue = WriteQueue::default();
        queue.copy(&[0; 1000]);
        for _ in 0..10_000 {
            queue.copy(&[0; 1000]);
            queue.consume(1000);
        }
        let held: usize = queue.chunks.iter().map(|chunk| chunk.as_bytes().len()).sum();
        assert_eq!(queue.len_bytes(), 1000);
        assert!(held <= 2 * COPY_CHUNK_BYTES_MAX, "{held} bytes are held for 1,000");
    }
}
