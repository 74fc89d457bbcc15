//! Errors, and the reasons why a connection ended.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use crate::queue::Chunk;
use crate::sys;

/// An error of an operation of the reactor.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    System {
        /// The name of the system call.
        call: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// A bound of [`Config`](crate::Config) is reached.
    Full {
        /// Which bound.
        what: &'static str,
        /// Its value.
        limit: usize,
    },
    /// The process does not have the address space for the slots of
    /// [`Config::connections_max`](crate::Config::connections_max) connections: lower that bound, or box the state.
    NoAddressSpace {
        /// The bound.
        connections_max: usize,
        /// The size of a slot, including the state of the connection.
        bytes_each: usize,
    },
    /// The token or id is stale: the connection, listener, timer or watch no longer exists, or the connection is being
    /// closed.
    Stale,
    /// An argument can't be used.
    Invalid(&'static str),
}

impl Error {
    /// Returns the errno of a failed system call; `None` for other errors.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the process has no descriptor left.
    pub(crate) fn is_out_of_descriptors(&self) -> bool {
        self.errno() == Some(sys::EMFILE)
    }

    /// Whether no local port, or no such local address, is available.
    pub(crate) fn is_out_of_ports(&self) -> bool {
        self.errno() == Some(sys::EADDRNOTAVAIL)
    }

    /// Returns the kind of a failed system call's error; [`io::ErrorKind::Other`] for other errors.
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
            Error::Stale => f.write_str("the token or id is stale"),
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

/// An error that also returns the value that the call was given. `?` converts it into an [`Error`] and drops the value.
pub struct Refused<T> {
    /// The error.
    pub error: Error,
    /// The value that the call was given.
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

/// The error of a refused write. None of its bytes was sent or queued, unless the connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteError {
    /// The bytes do not fit into this connection's queue
    /// ([`Config::write_queue_bytes_max`](crate::Config::write_queue_bytes_max)):
    /// [`on_drain`](crate::Handler::on_drain) is called when it is empty. Or they are more than an empty queue can hold.
    Full,
    /// The bytes would have to be queued, but all queues together are full
    /// ([`Config::write_queues_bytes_max`](crate::Config::write_queues_bytes_max)).
    /// [`on_drain`](crate::Handler::on_drain) is called when this connection's queue is empty or, if it has none, when
    /// all queues together have room for the largest message.
    FullInTotal,
    /// The token is stale, the connection is being closed, or its writing side is finished. If this write itself failed
    /// because the peer is gone, or because the kernel accepted a part and all queues are full, `on_close` is called
    /// with the reason.
    Closed,
}

/// The error of a refused chunk, which is returned; see
/// [`Context::try_write_chunk`](crate::Context::try_write_chunk). `?` converts it into a [`WriteError`] and drops the
/// chunk.
#[derive(Debug)]
pub struct ChunkRefused {
    /// The error.
    pub error: WriteError,
    /// The chunk that the call was given.
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
            WriteError::Closed => "the connection is closed for writing",
        })
    }
}

impl std::error::Error for WriteError {}

/// The state of the bytes of a successful write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The kernel has accepted all bytes; or, with [registered files](crate::FileTable::Registered), they are in the
    /// batch that is sent at the end of the turn. Bytes of the batch that the kernel does not accept are queued then,
    /// and [`on_drain`](crate::Handler::on_drain) is called when the queue has become empty.
    Sent,
    /// Some bytes are queued; [`on_drain`](crate::Handler::on_drain) is called when the queue has become empty.
    Queued,
}

/// The reason why a connection ended; passed to [`Handler::on_close`](crate::Handler::on_close).
#[derive(Debug)]
#[non_exhaustive]
pub enum CloseReason {
    /// [`close`](crate::Context::close) was called before the peer had finished writing; the kernel has accepted all
    /// queued bytes.
    Closed,
    /// [`close`](crate::Context::close) was called and the peer has finished writing, as with the default
    /// [`on_eof`](crate::Handler::on_eof); the kernel has accepted all queued bytes.
    PeerClosed,
    /// [`abort`](crate::Context::abort) was called; the peer sees a reset.
    Aborted,
    /// Both sides had finished writing.
    Finished,
    /// The connection failed, for example because the peer reset it or stopped answering.
    Failed(Error),
    /// An outbound connect failed; the connection never opened.
    ConnectFailed(Error),
    /// An outbound connect did not complete in time; the connection never opened.
    ConnectTimedOut,
    /// [`close`](crate::Context::close) was called, but the kernel has not accepted all of the queue within
    /// [`Config::flush_timeout`](crate::Config::flush_timeout); the peer sees a reset.
    FlushTimedOut,
    /// The grace period of [`shutdown`](crate::Context::shutdown) had passed.
    ShutDown,
    /// [`detach`](crate::Context::detach) was called; the value contains the socket and closes it when dropped.
    Detached(Detached),
}

/// A socket that was removed from the reactor and is still connected.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The socket: non-blocking and close-on-exec.
    pub descriptor: OwnedFd,
    /// Bytes that were received and not yet passed to [`on_data`](crate::Handler::on_data). They precede the bytes that
    /// can be read from the socket.
    pub unread: Vec<u8>,
    /// Bytes that were written and not yet accepted by the kernel. They must be sent before any other bytes.
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
