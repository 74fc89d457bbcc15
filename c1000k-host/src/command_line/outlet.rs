//! Standard error, written by a separate thread, so that the program does not wait for its reader.
//!
//! A pipe that is not read is full after about 64 KB, and a terminal may be stopped: then a write may block
//! indefinitely. So text goes into a bounded queue, and is dropped and counted if the queue is full.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;

use crate::format;

/// The maximum number of queued texts; each is one or a few lines.
const TEXTS_MAX: usize = 1024;

/// How long the program waits at its end for the readers of its output.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// A pipe that is writable accepts this number of bytes at once (`PIPE_BUF`).
const PIECE_BYTES: usize = 4096;

/// It only calls `write`.
const STACK_BYTES: usize = 128 * 1024;

/// The only writer to standard error.
pub(super) static STANDARD_ERROR: Outlet = Outlet::new();

/// Texts queued for a writer.
#[derive(Debug)]
pub(super) struct Outlet {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    is_running: bool,
    is_writing: bool,
    /// Waiting for the writer timed out, and it has written nothing since.
    is_stuck: bool,
    waiting: VecDeque<Vec<u8>>,
    dropped: u64,
    /// Those of them that no line has reported.
    dropped_unreported: u64,
}

impl Outlet {
    pub(super) const fn new() -> Self {
        let state = State {
            is_running: false,
            is_writing: false,
            is_stuck: false,
            waiting: VecDeque::new(),
            dropped: 0,
            dropped_unreported: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Starts the writing thread, which blocks all signals.
    ///
    /// # Errors
    /// The system refused to start it; then each text is written by the thread that brings it.
    pub(super) fn start(&'static self, out: impl Write + Send + 'static) -> io::Result<()> {
        let before = SigSet::thread_get_mask()?;
        SigSet::all().thread_block()?;
        let thread = thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES);
        let started = thread.spawn(move || self.pour(out));
        before.thread_set_mask()?;
        started?;
        self.state().is_running = true;
        Ok(())
    }

    /// Queues a text, without waiting for its reader. Without a thread it is written here; after there was no reader
    /// for [`PATIENCE`], only text that does not block.
    pub(super) fn push(&self, text: Vec<u8>) {
        let mut state = self.state();
        if !state.is_running {
            let patience = if state.is_stuck { Duration::ZERO } else { PATIENCE };
            let written = write_within(io::stderr(), &text, patience);
            // A closed pipe is not an error.
            state.is_stuck = written.is_err_and(|error| error.kind() == ErrorKind::TimedOut);
            state.dropped += u64::from(state.is_stuck);
            return;
        }
        if state.waiting.len() < TEXTS_MAX {
            state.waiting.push_back(text);
            self.changed.notify_all();
        } else {
            state.dropped += 1;
            state.dropped_unreported += 1;
        }
    }

    /// Waits until everything is written, at most one second.
    pub(super) fn flush(&self) {
        let is_busy = |state: &mut State| {
            let has_more = state.dropped_unreported > 0 || !state.waiting.is_empty();
            state.is_running && !state.is_stuck && (state.is_writing || has_more)
        };
        let waited = self.changed.wait_timeout_while(self.state(), PATIENCE, is_busy);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_stuck |= waited.timed_out();
    }

    /// Texts that were dropped because the queue was full.
    pub(super) fn dropped(&self) -> u64 {
        self.state().dropped
    }

    fn pour(&self, mut out: impl Write) {
        loop {
            let text = self.next();
            let _ = out.write_all(&text).and_then(|()| out.flush());
        }
    }

    /// Waits for the next text. The number of dropped texts is reported when there is room again.
    fn next(&self) -> Vec<u8> {
        let mut state = self.state();
        (state.is_writing, state.is_stuck) = (false, false);
        self.changed.notify_all();
        let is_idle = |state: &mut State| state.waiting.is_empty() && state.dropped_unreported == 0;
        let waited = self.changed.wait_while(state, is_idle);
        state = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_writing = true;
        state.waiting.pop_front().unwrap_or_else(|| {
            let dropped = std::mem::take(&mut state.dropped_unreported);
            let lines = format::counted(dropped, "line");
            format!("{lines} dropped: standard error was not read in time\n").into()
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes to a pipe that may not be read, and waits at most `patience` for each piece.
///
/// # Errors
/// `TimedOut` if a part is not accepted in time, or the error of the write.
pub(super) fn write_within(
    mut out: impl Write + AsFd,
    text: &[u8],
    patience: Duration,
) -> io::Result<()> {
    for piece in text.chunks(PIECE_BYTES) {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(out.as_fd(), PollFlags::POLLOUT)], timeout)? == 0 {
            return Err(ErrorKind::TimedOut.into());
        }
        out.write_all(piece).and_then(|()| out.flush())?;
    }
    Ok(())
}

/// A log line, which arrives in one piece.
#[derive(Debug)]
pub(super) struct LogLines;

impl Write for LogLines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        STANDARD_ERROR.push(text.to_vec());
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::time::Instant;

    use super::*;

    fn outlet(out: impl Write + Send + 'static) -> &'static Outlet {
        let outlet = Box::leak(Box::new(Outlet::new()));
        outlet.start(out).unwrap();
        outlet
    }

    #[test]
    fn text_is_written_whole_and_in_order() {
        let (reader, writer) = io::pipe().unwrap();
        let outlet = outlet(writer);
        for number in 0..100 {
            outlet.push(format!("{number}\n").into());
        }
        outlet.flush();
        let mut lines = BufReader::new(reader).lines();
        for number in 0..100 {
            assert_eq!(lines.next().unwrap().unwrap(), number.to_string());
        }
        assert_eq!(outlet.dropped(), 0);
    }

    #[test]
    fn an_unread_pipe_blocks_no_thread_and_dropped_texts_are_reported() {
        let (reader, writer) = io::pipe().unwrap();
        let outlet = outlet(writer);
        let began = Instant::now();
        let line = format!("{}\n", "x".repeat(999));
        for _ in 0..TEXTS_MAX * 2 {
            outlet.push(line.clone().into());
        }
        outlet.flush();
        outlet.flush();
        assert!(began.elapsed() < PATIENCE * 5, "{:?}", began.elapsed());
        let dropped = outlet.dropped();
        assert!(dropped > 0);

        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let read = lines.by_ref().take_while(|line| !line.contains(" dropped: ")).count() as u64;
        assert_eq!(read + dropped, TEXTS_MAX as u64 * 2);
    }

    #[test]
    fn without_a_thread_a_text_is_written_whole_or_dropped_in_time() {
        let text: Vec<u8> = (0..30_000).map(|index| (index % 251) as u8).collect();
        let (mut reader, writer) = io::pipe().unwrap();
        write_within(&writer, &text, PATIENCE).unwrap();
        let mut read = vec![0; text.len()];
        io::Read::read_exact(&mut reader, &mut read).unwrap();
        assert!(read == text, "it differs");

        let filled = (0..1_000).find_map(|_| write_within(&writer, &text, Duration::ZERO).err());
        assert_eq!(filled.map(|error| error.kind()), Some(ErrorKind::TimedOut));
        drop(reader);
        let gone = write_within(&writer, &text, PATIENCE).map_err(|error| error.kind());
        assert_eq!(gone, Err(ErrorKind::BrokenPipe));
    }

    #[test]
    fn a_closed_pipe_is_not_an_error() {
        let (reader, writer) = io::pipe().unwrap();
        let outlet = outlet(writer);
        drop(reader);
        outlet.push(b"unread\n".to_vec());
        outlet.flush();
        assert!(!outlet.state().is_stuck && outlet.state().waiting.is_empty());
    }
}
