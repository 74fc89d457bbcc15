//! The registered-file tables of io_uring: files without descriptors.
//!
//! Each ring has one table. `RLIMIT_NOFILE` limits the size of a table, but not the number of tables. A *place* is an
//! index over all tables: the first table has the first places. A table is created when one of its places is needed.
//! Every operation completes before the call that submits it returns, so a ring is empty between two calls, and no
//! buffer is used for longer than its borrow.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};
use nix::errno::Errno;
use nix::libc;

use super::batch::{LOST, Operation, ReceiveBatch, SendBatch, SendOperation};
use super::socket::{self, Descriptor};
use super::{IoResult, io_result, options, refused, ring_answer};
use crate::error::Error;

/// A place is stored as its complement in an `i32`.
const PLACES_MAX: usize = i32::MAX as usize;

/// The kernel's maximum size of a table.
const PLACES_PER_TABLE_MAX: u64 = 1 << 20;

/// The memory of all rings is locked, and an unprivileged user may usually lock 8 MiB, in all processes together.
const RINGS_BYTES_MAX: usize = 2 << 20;
/// The bytes of a submission, two completions and an index.
const ENTRY_BYTES: usize = 64 + 2 * 16 + 4;
const ENTRIES_MAX: usize = 256;
const ENTRIES_MIN: usize = 16;
const ENTRIES_LEAST: u32 = ENTRIES_MIN as u32;

/// A ring that accepts nothing for a second, because there is no memory, is given up.
const SUBMIT_TRIES_MAX: u32 = 1000;
const SUBMIT_PAUSE: Duration = Duration::from_millis(1);

/// The creation of the first table is retried for a fifth of a second.
const FIRST_TABLE_TRIES: u32 = 20;
const FIRST_TABLE_PAUSE: Duration = Duration::from_millis(10);

/// From linux/io_uring.h, since Linux 6.7; the io-uring crate does not define it.
const SOCKET_URING_OP_SIOCOUTQ: u32 = 1;

/// The usual maximum number of descriptors that are moved at once.
const RUN_MAX: usize = 64;

/// Replaces the place of a descriptor that was moved.
const MOVED: u32 = u32::MAX;

const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

pub(super) struct Tables<R: Ring = IoUring> {
    tables: Vec<Option<Box<Table<R>>>>,
    places_each: u32,
    entries_each: u32,
    /// The tables with operations to be submitted.
    busy: Vec<usize>,
    lost: Vec<usize>,
    /// The numbers of descriptors that are being moved; otherwise empty.
    numbers: Vec<RawFd>,
}

impl<R: Ring> std::fmt::Debug for Tables<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables")
            .field("made", &self.tables.iter().flatten().count())
            .field("places_each", &self.places_each)
            .field("entries_each", &self.entries_each)
            .finish_non_exhaustive()
    }
}

struct Table<R: Ring> {
    ring: R,
    /// The size of the submission queue.
    entries: usize,
    /// The number of operations without a result yet.
    queued: usize,
}

impl<R: Ring> Tables<R> {
    /// Plans tables with this many places in total, and creates the first one.
    pub(super) fn new(places: usize) -> Result<Self, Error> {
        let places = places.min(PLACES_MAX);
        let places_each = options::descriptors_max().clamp(1, PLACES_PER_TABLE_MAX);
        let places_each = places_each.min(places.max(1) as u64) as u32;
        let tables = places.div_ceil(places_each as usize).max(1);
        let entries = (RINGS_BYTES_MAX / ENTRY_BYTES / tables).clamp(ENTRIES_MIN, ENTRIES_MAX);
        Self::of(tables, places_each, 1 << entries.ilog2())
    }

    /// The same, for this number of tables of this size.
    fn of(tables: usize, places_each: u32, entries_each: u32) -> Result<Self, Error> {
        let first: Table<R> = Self::first_table(places_each, entries_each)?;
        first.ring.check_operations()?;
        let mut list = Vec::new();
        list.resize_with(tables, || None);
        list[0] = Some(Box::new(first));
        Ok(Self {
            tables: list,
            places_each,
            entries_each,
            busy: Vec::with_capacity(tables),
            lost: Vec::new(),
            numbers: Vec::with_capacity(RUN_MAX),
        })
    }

    /// Creates the first table, with retries: the kernel releases the locked memory of a ring some time after it was
    /// closed, so the memory of a recently closed ring may still be missing.
    fn first_table(places_each: u32, entries_each: u32) -> Result<Table<R>, Error> {
        let mut retries = 1..FIRST_TABLE_TRIES;
        loop {
            match Table::new(places_each, entries_each) {
                Err(error) if error.errno() == Some(libc::ENOMEM) && retries.next().is_some() => {
                    std::thread::sleep(FIRST_TABLE_PAUSE);
                }
                made => return made,
            }
        }
    }

    fn locate(&self, place: u32) -> (usize, u32) {
        ((place / self.places_each) as usize, place % self.places_each)
    }

    pub(super) fn receive(&mut self, place: u32, buffer: &mut [u8]) -> IoResult {
        let (start, room) = (buffer.as_mut_ptr(), length(buffer.len()));
        let answer = self.one(place, |file| {
            opcode::Recv::new(file, start, room).flags(libc::MSG_DONTWAIT).build()
        });
        io_result("recv", answer)
    }

    pub(super) fn send(&mut self, place: u32, bytes: &[u8]) -> IoResult {
        let (start, length) = (bytes.as_ptr(), length(bytes.len()));
        let answer = self
            .one(place, |file| opcode::Send::new(file, start, length).flags(SEND_FLAGS).build());
        io_result("send", answer)
    }

    pub(super) fn send_vectored(&mut self, place: u32, slices: &[IoSlice<'_>]) -> IoResult {
        // SAFETY: all zeroes is a valid message without an address, data and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // An IoSlice has the layout of an iovec, and the kernel only reads from it.
        message.msg_iov = slices.as_ptr().cast_mut().cast();
        message.msg_iovlen = slices.len() as _;
        let start = &raw const message;
        let answer = self
            .one(place, |file| opcode::SendMsg::new(file, start).flags(SEND_FLAGS as u32).build());
        io_result("sendmsg", answer)
    }

    /// The number of sent bytes that the peer has not acknowledged; `None` if the kernel does not support this operation.
    pub(super) fn unacknowledged_bytes(&mut self, place: u32) -> Option<usize> {
        self.one(place, |file| opcode::UringCmd16::new(file, SOCKET_URING_OP_SIOCOUTQ).build()).ok()
    }

    /// Shuts down the writing side. The kernel runs this on a worker thread, and the call waits for it.
    pub(super) fn finish_writing(&mut self, place: u32) -> Result<(), Error> {
        self.one(place, |file| opcode::Shutdown::new(file, libc::SHUT_WR).build())
            .map(drop)
            .map_err(refused("shutdown"))
    }

    /// Opens a descriptor of the file at this place.
    pub(super) fn install_descriptor(&mut self, place: u32) -> Result<OwnedFd, Error> {
        let number = self
            .one(place, |file| opcode::FixedFdInstall::new(file, 0).build())
            .map_err(refused("io_uring(FIXED_FD_INSTALL)"))?;
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
    }

    pub(super) fn receive_all(&mut self, batch: &mut ReceiveBatch) {
        let (entries, buffer, bytes_each) = batch.operations();
        let start = buffer.as_mut_ptr();
        self.all(
            entries,
            |entry: &Operation| entry.place,
            |index, _, file| {
                let part = start.wrapping_add(index * bytes_each);
                let receive = opcode::Recv::new(file, part, length(bytes_each));
                receive.flags(libc::MSG_DONTWAIT).build()
            },
            |entry, result| entry.result = result,
        );
    }

    pub(super) fn send_all(&mut self, batch: &mut SendBatch) {
        let (entries, buffer) = batch.operations();
        self.all(
            entries,
            |entry: &SendOperation| entry.operation.place,
            |_, entry, file| {
                let bytes = &buffer[entry.start..entry.end];
                let send = opcode::Send::new(file, bytes.as_ptr(), length(bytes.len()));
                send.flags(SEND_FLAGS).build()
            },
            |entry, result| entry.operation.result = result,
        );
    }

    /// Performs the steps, in this order within a table.
    pub(super) fn close(&mut self, steps: &mut [(u32, ClosingStep)]) {
        self.all(
            steps,
            |&(place, _)| place,
            |_, &(_, step), file| match step {
                ClosingStep::Reset => {
                    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
                    opcode::Connect::new(file, &raw const UNSPECIFIED, length).build()
                }
                ClosingStep::Close => opcode::Close::new(file).build(),
            },
            |_, _| {}, // A reset fails if the peer is gone already, and the files of a lost ring are closed.
        );
    }

    /// Moves the descriptors to the given places, with one call per run of consecutive places. Descriptors that could
    /// not be moved remain in the list.
    pub(super) fn register(&mut self, moving: &mut Vec<(u32, Descriptor)>) {
        moving.sort_unstable_by_key(|&(place, _)| place);
        let mut rest = &mut moving[..];
        while let Some(&(first, _)) = rest.first() {
            let (table, offset) = self.locate(first);
            let room = (self.places_each - offset) as usize;
            let neighbours = rest.iter().zip(first..).take(room);
            let run = neighbours.take_while(|((place, _), next)| place == next).count();
            let (run, others) = rest.split_at_mut(run);
            let count = self.update(table, offset, run);
            for (place, _) in run.iter_mut().take(count) {
                *place = MOVED;
            }
            rest = others;
        }
        for (_, descriptor) in moving.extract_if(.., |&mut (place, _)| place == MOVED) {
            self.numbers.push(descriptor.into_raw());
        }
        socket::close_all(&mut self.numbers);
    }

    /// Creates a table, unless it exists or the index is out of range.
    fn make(&mut self, index: usize) -> Result<(), Error> {
        if let Some(table @ None) = self.tables.get_mut(index) {
            *table = Some(Box::new(Table::new(self.places_each, self.entries_each)?));
        }
        Ok(())
    }

    /// Puts files into a table, which is created if needed; returns the number of files. The next table is created at the
    /// same time: when it is needed, the sockets to be moved may have used up all descriptors.
    fn update(&mut self, index: usize, offset: u32, run: &[(u32, Descriptor)]) -> usize {
        let made = self.make(index).and_then(|()| self.make(index + 1));
        let Some(table) = &self.tables[index] else {
            log::debug!("sockets keep their descriptors: {made:?}");
            return 0;
        };
        self.numbers.clear();
        self.numbers.extend(run.iter().map(|(_, file)| file.as_fd().as_raw_fd()));
        let moved = table.ring.update(offset, &self.numbers);
        self.numbers.clear();
        moved.unwrap_or_else(|error| {
            log::debug!("sockets keep their descriptors: io_uring_register(FILES_UPDATE): {error}");
            0
        })
    }

    /// Returns the places of a table that was lost, once per table.
    pub(super) fn take_lost(&mut self) -> Option<Range<usize>> {
        let first = self.lost.pop()? * self.places_each as usize;
        Some(first..first + self.places_each as usize)
    }

    /// Performs one operation.
    fn one(
        &mut self,
        place: u32,
        operation: impl FnOnce(types::Fixed) -> Entry,
    ) -> nix::Result<usize> {
        let (index, file) = self.locate(place);
        let table =
            self.tables.get_mut(index).and_then(Option::as_deref_mut).ok_or(Errno::ENOMEM)?;
        table.push(&operation(types::Fixed(file)), 0);
        let mut answer = Err(Errno::ENOMEM);
        self.complete(index, |_, result| answer = ring_answer(result));
        answer
    }

    /// Performs an operation for each entry, with one submission per table as far as possible.
    fn all<E>(
        &mut self,
        entries: &mut [E],
        place: impl Fn(&E) -> u32,
        operation: impl Fn(usize, &E, types::Fixed) -> Entry,
        mut done: impl FnMut(&mut E, i32),
    ) {
        for number in 0..entries.len() {
            let (index, file) = self.locate(place(&entries[number]));
            let Some(table) = self.tables.get_mut(index).and_then(Option::as_deref_mut) else {
                done(&mut entries[number], LOST);
                continue;
            };
            if table.queued == 0 {
                self.busy.push(index);
            }
            table.push(&operation(number, &entries[number], types::Fixed(file)), number as u64);
            if table.queued == table.entries {
                self.complete(index, |number, result| done(&mut entries[number], result));
                self.busy.retain(|&other| other != index);
            }
        }
        while let Some(index) = self.busy.pop() {
            self.complete(index, |number, result| done(&mut entries[number], result));
        }
    }

    /// Submits the operations of a table and passes each result to `done`. If the submission fails, the table is lost.
    fn complete(&mut self, index: usize, done: impl FnMut(usize, i32)) {
        let Some(table) = self.tables.get_mut(index).and_then(Option::as_deref_mut) else { return };
        if let Err(error) = table.complete(done) {
            log::error!("a table of {} sockets is lost: io_uring_enter: {error}", self.places_each);
            self.tables[index] = None;
            self.lost.push(index);
        }
    }
}

impl<R: Ring> Table<R> {
    fn new(places: u32, entries: u32) -> Result<Self, Error> {
        let (ring, entries) = match R::set_up(places, entries) {
            // The limit of locked memory may be low: try the smallest ring.
            Err(error) if error.errno() == Some(libc::ENOMEM) && entries > ENTRIES_LEAST => {
                (R::set_up(places, ENTRIES_LEAST)?, ENTRIES_LEAST)
            }
            other => (other?, entries),
        };
        Ok(Self { ring, entries: entries as usize, queued: 0 })
    }

    fn push(&mut self, operation: &Entry, number: u64) {
        let pushed = self.ring.push(operation, number);
        debug_assert!(pushed, "a full queue is submitted before the next push");
        self.queued += 1;
    }

    /// Submits the operations and passes the number and the result of each to `done`.
    fn complete(&mut self, mut done: impl FnMut(usize, i32)) -> io::Result<()> {
        let (mut tries, mut want) = (0, 0);
        while self.queued > 0 {
            let submitted = self.ring.submit_and_wait(want);
            let queued_before = self.queued;
            self.ring.completions(|number, result| {
                self.queued -= 1;
                done(number as usize, result);
            });
            match submitted {
                Ok(_) if self.queued < queued_before => tries = 0,
                // Most operations complete during the submission; the others are waited for in the next round.
                Ok(_) if want == 0 => {}
                Err(error) if !is_temporary(&error) || tries == SUBMIT_TRIES_MAX => {
                    return Err(error);
                }
                Ok(_) if tries == SUBMIT_TRIES_MAX => return Err(Errno::EAGAIN.into()),
                _ => {
                    tries += 1;
                    std::thread::sleep(SUBMIT_PAUSE);
                }
            }
            want = 1;
        }
        Ok(())
    }
}

/// The kernel releases a ring and its files some time after it is closed, but files that are unregistered at once.
impl<R: Ring> Drop for Table<R> {
    fn drop(&mut self) {
        self.ring.unregister();
    }
}

/// The operations of a ring with its table of files. The tests below implement it with a scripted ring.
pub(super) trait Ring: Sized {
    fn set_up(places: u32, entries: u32) -> Result<Self, Error>;
    /// Checks that the kernel supports all operations that are used here.
    fn check_operations(&self) -> Result<(), Error>;
    /// Adds an operation to the submission queue; returns `false` if it is full.
    fn push(&mut self, operation: &Entry, number: u64) -> bool;
    fn submit_and_wait(&mut self, want: usize) -> io::Result<usize>;
    /// Passes the number and the result of each completed operation to `done`.
    fn completions(&mut self, done: impl FnMut(u64, i32));
    fn update(&self, offset: u32, files: &[RawFd]) -> io::Result<usize>;
    fn unregister(&mut self);
}

impl Ring for IoUring {
    fn set_up(places: u32, entries: u32) -> Result<Self, Error> {
        let ring = IoUring::builder()
            .setup_clamp()
            .setup_submit_all()
            .build(entries)
            .map_err(failed("io_uring_setup"))?;
        ring.submitter()
            .register_files_sparse(places)
            .map_err(failed("io_uring_register(FILES)"))?;
        Ok(ring)
    }

    fn check_operations(&self) -> Result<(), Error> {
        let mut probe = Probe::new();
        self.submitter().register_probe(&mut probe).map_err(failed("io_uring_register(PROBE)"))?;
        // The newest operation in use, since Linux 6.8.
        if probe.is_supported(opcode::FixedFdInstall::CODE) {
            Ok(())
        } else {
            Err(Error::Invalid("registered files need io_uring of Linux 6.8 or later"))
        }
    }

    #[inline]
    fn push(&mut self, operation: &Entry, number: u64) -> bool {
        let entry = operation.clone().user_data(number);
        // SAFETY: the memory that the entry points to is borrowed until the call that pushes it returns, and that call
        // completes the entry first, or drops the ring.
        unsafe { self.submission().push(&entry) }.is_ok()
    }

    #[inline]
    fn submit_and_wait(&mut self, want: usize) -> io::Result<usize> {
        IoUring::submit_and_wait(self, want)
    }

    #[inline]
    fn completions(&mut self, mut done: impl FnMut(u64, i32)) {
        for completion in self.completion() {
            done(completion.user_data(), completion.result());
        }
    }

    fn update(&self, offset: u32, files: &[RawFd]) -> io::Result<usize> {
        self.submitter().register_files_update(offset, files)
    }

    fn unregister(&mut self) {
        let _ = self.submitter().unregister_files();
    }
}

/// The steps of closing a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum ClosingStep {
    /// Connecting to `AF_UNSPEC` ends a TCP connection with a reset.
    Reset,
    Close,
}

static UNSPECIFIED: libc::sockaddr =
    libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };

fn is_temporary(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOMEM))
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { call, source }
}

/// Limits the length of an operation; the kernel transfers no more at once anyway.
fn length(bytes: usize) -> u32 {
    bytes.min(i32::MAX as usize) as u32
}

#[cfg(test)]
mod tests;
