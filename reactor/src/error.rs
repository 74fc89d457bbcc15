//! What can go wrong, and why a connection ended.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use crate::queue::Chunk;

/// Why a call on the reactor did not work.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The system refused a call.
    System {
        /// The name of the system call.
        call: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// A bound of [`Config`](crate::Config) is reached.
    Full {
        /// Which bound.
        what: &'static str,
        /// Its value.
        limit: usize,
    },
    /// The slots of [`Config::connections_max`](crate::Config::connections_max) connections are more than the process has
    /// address space for: lower that bound, or box the state.
    NoAddressSpace {
        /// The bound.
        connections_max: usize,
        /// The bytes of a slot, the state of the connection included.
        bytes_each: usize,
    },
    /// The name belongs to nothing any more.
    Stale,
    /// An argument can't be used.
    Invalid(&'static str),
}

impl Error {
    /// The errno of the system's refusal, where it was that.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the process has no descriptor left.
    pub(crate) fn is_out_of_descriptors(&self) -> bool {
        self.errno() == Some(nix::libc::EMFILE)
    }

    /// Whether no local port, or no local address, is to be had.
    pub(crate) fn is_out_of_ports(&self) -> bool {
        self.errno() == Some(nix::libc::EADDRNOTAVAIL)
    }

    /// The kind of the system's refusal; [`io::ErrorKind::Other`] for all that was not the system's.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Error::System { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::System { call, source } => write!(f, "{call}: {source}"),
            Error::Full { what, limit } => write!(f, "{what} is at its bound of {limit}"),
            Error::NoAddressSpace { connections_max, bytes_each } => write!(
                f,
                "there is no address space for {connections_max} connections of {bytes_each} bytes, state included"
            ),
            Error::Stale => f.write_str("the name is stale: what it named is gone"),
            Error::Invalid(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::new(error.kind(), error)
    }
}

/// Why a call did not work, and what it was given, which comes back. `?` turns it into an [`Error`] and drops that.
pub struct Refused<T> {
    /// Why.
    pub error: Error,
    /// What the call was given.
    pub given: T,
}

impl<T> fmt::Debug for Refused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<T> fmt::Display for Refused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T> std::error::Error for Refused<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<T> From<Refused<T>> for Error {
    fn from(refused: Refused<T>) -> Self {
        refused.error
    }
}

impl<T> From<Refused<T>> for io::Error {
    fn from(refused: Refused<T>) -> Self {
        refused.error.into()
    }
}

/// Why bytes were not taken. None of them was sent or queued, unless the connection is lost by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteError {
    /// They would not fit into this connection's queue
    /// ([`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max)): too much waits there, or they are
    /// more than it ever takes.
    Full,
    /// They have to wait, and would not fit into what all queues together may hold
    /// ([`Config::write_queues_bytes_max`](crate::Config::write_queues_bytes_max)).
    FullInTotal,
    /// The connection is gone, is being closed, or its writing side is finished. Where the send itself showed that
    /// the peer is gone, or the kernel took a part and all queues are full, `on_close` follows with the reason.
    Closed,
}

/// A chunk that was not taken, which comes back; see
/// [`Context::try_write_chunk`](crate::Context::try_write_chunk). `?` turns it into a [`WriteError`] and drops it.
#[derive(Debug)]
pub struct ChunkRefused {
    /// Why.
    pub error: WriteError,
    /// What the call was given.
    pub chunk: Chunk,
}

impl fmt::Display for ChunkRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for ChunkRefused {}

impl From<ChunkRefused> for WriteError {
    fn from(refused: ChunkRefused) -> Self {
        refused.error
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WriteError::Full => "the connection's write queue is full",
            WriteError::FullInTotal => "all write queues together are full",
            WriteError::Closed => "the connection does not take bytes any more",
        })
    }
}

impl std::error::Error for WriteError {}

/// Where the bytes of a successful write are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All of them are with the kernel, or, with [registered files](crate::FileTable::Registered), in the batch that goes
    /// to it at the end of the turn. What the kernel does not take of that waits in the queue, and
    /// [`on_drain`](crate::Handler::on_drain) is called when it has run empty.
    Sent,
    /// Some of them wait in the queue; [`on_drain`](crate::Handler::on_drain) is called when it has run empty.
    Queued,
}

/// Why a connection ended; given to [`Handler::on_close`](crate::Handler::on_close).
#[derive(Debug)]
#[non_exhaustive]
pub enum CloseReason {
    /// [`close`](crate::Context::close) was called while the peer had not finished, and everything queued was handed to
    /// the kernel.
    Closed,
    /// The peer had finished writing when [`close`](crate::Context::close) was called, as the default
    /// [`on_eof`](crate::Handler::on_eof) does; everything queued was handed to the kernel.
    PeerClosed,
    /// [`abort`](crate::Context::abort) was called; the peer sees a reset.
    Aborted,
    /// Both sides had finished writing, so nothing was left to do.
    Finished,
    /// The system reported an error: the peer reset the connection, or stopped answering.
    Failed(Error),
    /// An outbound connect did not work; the connection never opened.
    ConnectFailed(Error),
    /// An outbound connect was not answered within its time; the connection never opened.
    ConnectTimedOut,
    /// [`close`](crate::Context::close) was called, but the peer did not take what was queued within
    /// [`Config::flush_timeout`](crate::Config::flush_timeout).
    FlushTimedOut,
    /// The grace of [`shutdown`](crate::Context::shutdown) had passed.
    ShutDown,
    /// [`detach`](crate::Context::detach) was called, and here the socket comes out; dropped, it is closed.
    Detached(Detached),
}

/// A socket that has left the reactor, still connected.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The socket: non-blocking and close-on-exec.
    pub descriptor: OwnedFd,
    /// What had arrived and was not handed to [`on_data`](crate::Handler::on_data) yet. It comes before all that can be
    /// read from the socket.
    pub unread: Vec<u8>,
    /// What was written and had not gone to the kernel yet. It belongs before all else that is sent.
    pub unsent: Vec<u8>,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Closed => f.write_str("closed"),
            CloseReason::PeerClosed => f.write_str("closed by the peer"),
            CloseReason::Aborted => f.write_str("aborted"),
            CloseReason::Finished => f.write_str("finished by both sides"),
            CloseReason::Failed(error) => write!(f, "failed: {error}"),
            CloseReason::ConnectFailed(error) => write!(f, "connect failed: {error}"),
            CloseReason::ConnectTimedOut => f.write_str("connect timed out"),
            CloseReason::FlushTimedOut => {
                f.write_str("the peer did not take the last bytes in time")
            }
            CloseReason::ShutDown => f.write_str("shut down"),
            CloseReason::Detached(_) => f.write_str("detached"),
        }
    }
}
