//! The write queue: bytes that the kernel has not accepted yet, in the order in which they were written.
//!
//! A connection has a queue only while bytes wait in it. Borrowed bytes are copied into the last chunk, or into a new
//! one if that is full. Owned and shared buffers are queued without a copy, except small ones behind others, and so are
//! parts of files, whose bytes are not in memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

/// The maximum number of chunks per send.
pub(crate) const CHUNKS_PER_SEND: usize = 16;

/// Borrowed bytes are copied into chunks of this size, or larger ones for larger writes. A single chunk for all of them
/// would never be freed on a connection whose queue never becomes empty.
const COPY_CHUNK_BYTES_MAX: usize = 64 * 1024;

/// A chunk up to this size is copied if others are queued before it: a separate entry would take about as much memory, and
/// would keep shared bytes alive.
const SMALL_CHUNK_BYTES_MAX: usize = 128;

/// A buffer for [`Context::write_chunk`](crate::Context::write_chunk).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Chunk {
    /// A buffer owned by the queue.
    Owned(Vec<u8>),
    /// A buffer that the queues of many connections can share.
    Shared(Arc<[u8]>),
    /// A part of a shared buffer.
    Part(SharedPart),
    /// A shared buffer of the `bytes` crate.
    #[cfg(feature = "bytes")]
    Bytes(bytes::Bytes),
}

/// A part of a shared buffer, which keeps the whole buffer alive.
#[derive(Clone, Debug)]
pub struct SharedPart {
    bytes: Arc<[u8]>,
    range: Range<usize>,
}

impl SharedPart {
    /// Creates the part of `bytes` in this range; `None` if the range is out of bounds.
    #[must_use]
    pub fn new(bytes: Arc<[u8]>, range: Range<usize>) -> Option<Self> {
        bytes.get(range.clone())?;
        Some(Self { bytes, range })
    }
}

impl Chunk {
    /// Returns the bytes of this chunk.
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

#[derive(Debug)]
enum Entry {
    Chunk(Chunk),
    File(FilePart),
}

impl Entry {
    /// The bytes in memory.
    fn as_bytes(&self) -> &[u8] {
        match self {
            Entry::Chunk(chunk) => chunk.as_bytes(),
            Entry::File(_) => &[],
        }
    }
}

/// The part of a file that is still to be sent; never empty.
#[derive(Debug)]
pub(crate) struct FilePart {
    pub(crate) file: Arc<File>,
    pub(crate) range: Range<u64>,
}

impl FilePart {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Invariants: no entry is empty after the offset, and `bytes` and `file_bytes` are the sums over all entries.
#[derive(Debug, Default)]
pub(crate) struct WriteQueue {
    entries: VecDeque<Entry>,
    /// The number of bytes of the first entry that were already sent, if it is a chunk.
    offset: usize,
    bytes: usize,
    file_bytes: u64,
}

impl WriteQueue {
    /// The bytes in memory.
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// All bytes, including those of files.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.bytes.saturating_add(usize::try_from(self.file_bytes).unwrap_or(usize::MAX))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of queued parts of files.
    pub(crate) fn files(&self) -> usize {
        if self.file_bytes == 0 {
            return 0;
        }
        self.entries.iter().filter(|entry| matches!(entry, Entry::File(_))).count()
    }

    /// A copy of all queued bytes in memory.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes);
        for entry in &self.entries {
            bytes.extend_from_slice(entry.as_bytes());
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
        match self.entries.back_mut() {
            Some(Entry::Chunk(Chunk::Owned(last)))
                if last.len() + bytes.len() <= COPY_CHUNK_BYTES_MAX =>
            {
                last.extend_from_slice(bytes);
            }
            _ => self.entries.push_back(Entry::Chunk(Chunk::Owned(bytes.to_vec()))),
        }
    }

    /// Appends the rest of a chunk after its first `sent` bytes; copies it only if other bytes are queued and `sent` is
    /// not zero.
    pub(crate) fn append(&mut self, chunk: Chunk, sent: usize) {
        let left = chunk.as_bytes().len() - sent;
        if left == 0 {
            return;
        }
        if self.entries.is_empty() {
            self.offset = sent;
            self.bytes = left;
            self.entries.push_back(Entry::Chunk(chunk));
        } else if sent == 0 && left > SMALL_CHUNK_BYTES_MAX {
            self.bytes += left;
            self.entries.push_back(Entry::Chunk(chunk));
        } else {
            self.copy(&chunk.as_bytes()[sent..]);
        }
    }

    /// Appends a part of a file.
    pub(crate) fn append_file(&mut self, part: FilePart) {
        if part.range.is_empty() {
            return;
        }
        self.file_bytes += part.len();
        self.entries.push_back(Entry::File(part));
    }

    /// The part of a file that is to be sent next; `None` if bytes in memory are next.
    pub(crate) fn first_file(&self) -> Option<&FilePart> {
        match self.entries.front() {
            Some(Entry::File(part)) => Some(part),
            _ => None,
        }
    }

    /// Removes the first `sent` bytes, which were sent, of the first entry, a part of a file.
    pub(crate) fn consume_file(&mut self, sent: usize) {
        let Some(Entry::File(part)) = self.entries.front_mut() else { return };
        let sent = (sent as u64).min(part.len());
        part.range.start += sent;
        self.file_bytes -= sent;
        if part.range.is_empty() {
            self.entries.pop_front();
        }
    }

    /// Fills `slices` with the first queued bytes, up to a file; returns the number of slices filled.
    pub(crate) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; CHUNKS_PER_SEND]) -> usize {
        let mut filled = 0;
        let mut offset = self.offset;
        let chunks = self.entries.iter().take_while(|entry| matches!(entry, Entry::Chunk(_)));
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(&chunk.as_bytes()[offset..]);
            offset = 0;
            filled += 1;
        }
        filled
    }

    /// Removes the first `sent` bytes, which were sent.
    pub(crate) fn consume(&mut self, sent: usize) {
        debug_assert!(sent <= self.bytes, "more was sent than was queued");
        self.bytes -= sent;
        self.offset += sent;
        while let Some(Entry::Chunk(first)) = self.entries.front() {
            let first_bytes = first.as_bytes().len();
            if self.offset < first_bytes {
                return;
            }
            self.offset -= first_bytes;
            self.entries.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Miri is about a thousand times slower.
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
        fn bytes_are_sent_in_the_order_written(steps in prop::collection::vec(step(), 1..STEPS_MAX)) {
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
    fn a_queue_that_never_becomes_empty_does_not_grow() {
        let mut queue = WriteQueue::default();
        queue.copy(&[0; 1000]);
        for _ in 0..10_000 {
            queue.copy(&[0; 1000]);
            queue.consume(1000);
        }
        let held: usize = queue.entries.iter().map(|entry| entry.as_bytes().len()).sum();
        assert_eq!(queue.len_bytes(), 1000);
        assert!(held <= 2 * COPY_CHUNK_BYTES_MAX, "{held} bytes are held for 1,000");
    }

    #[test]
    fn small_chunks_behind_others_are_copied() {
        let shared: Arc<[u8]> = vec![0; 1 << 20].into();
        let part = |bytes| Chunk::Part(SharedPart::new(Arc::clone(&shared), 0..bytes).unwrap());
        let mut queue = WriteQueue::default();
        for _ in 0..10_000 {
            queue.append(part(1), 0);
        }
        assert_eq!((queue.bytes, queue.entries.len(), Arc::strong_count(&shared)), (10_000, 2, 2));
        queue.append(part(SMALL_CHUNK_BYTES_MAX + 1), 0);
        assert_eq!((queue.entries.len(), Arc::strong_count(&shared)), (3, 3));
    }

    #[test]
    fn a_part_of_a_file_keeps_its_position_in_the_queue() {
        let file = Arc::new(File::open("/dev/null").expect("there is a null device"));
        let part = |range| FilePart { file: Arc::clone(&file), range };
        let mut queue = WriteQueue::default();
        queue.copy(b"before");
        queue.append_file(part(5..5));
        queue.append_file(part(10..30));
        queue.append_file(part(0..1));
        queue.copy(b"after");
        assert_eq!((queue.len_bytes(), queue.waiting_bytes(), queue.files()), (11, 32, 2));

        let mut slices = [IoSlice::new(&[]); CHUNKS_PER_SEND];
        assert_eq!(queue.slices(&mut slices), 1);
        assert_eq!(&slices[0][..], b"before");
        assert!(queue.first_file().is_none());
        queue.consume(6);
        assert_eq!(queue.slices(&mut [IoSlice::new(&[]); CHUNKS_PER_SEND]), 0);
        assert_eq!(queue.first_file().map(|part| part.range.clone()), Some(10..30));
        queue.consume_file(15);
        assert_eq!(queue.first_file().map(|part| part.range.clone()), Some(25..30));
        queue.consume_file(5);
        assert_eq!(queue.first_file().map(|part| part.range.clone()), Some(0..1));
        queue.consume_file(1);
        assert!(queue.first_file().is_none() && !queue.is_empty());
        assert_eq!(queue.waiting_bytes(), 5);
        queue.consume(5);
        assert!(queue.is_empty());
    }
}
