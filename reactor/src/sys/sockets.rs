//! A connection's socket and the calls on it, for descriptors and for registered files.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use nix::libc;

use super::batch::{ReceiveBatch, SendBatch};
use super::registered::{ClosingStep, Ring, Tables};
use super::socket::{self, Descriptor};
use super::{IoResult, LentFd, options};
use crate::address::Address;
use crate::config::FileTable;
use crate::error::Error;

/// The buffer size for sending a file when `sendfile` is not possible.
const COPIED_FILE_BYTES: usize = 64 * 1024;

/// A connection's socket in four bytes: a descriptor that it owns, or the complement of its place in the registered-file
/// tables. Dropping it closes a descriptor; a place is freed by [`Sockets::close`], or with the tables.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Socket(i32);

impl From<Descriptor> for Socket {
    fn from(descriptor: Descriptor) -> Self {
        Self(descriptor.into_raw())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.0 >= 0 {
            // SAFETY: the number is that of an owned descriptor, and nothing else closes it.
            drop(unsafe { OwnedFd::from_raw_fd(self.0) });
        }
    }
}

impl Socket {
    /// Replaces a socket that was taken out; no table has this place.
    pub(crate) const DETACHED: Self = Self(i32::MIN);

    pub(crate) fn at_place(place: u32) -> Self {
        Self(!(place as i32))
    }

    /// The place in the tables; `None` for a descriptor.
    #[inline]
    pub(crate) fn place(&self) -> Option<u32> {
        if self.0 < 0 { Some(!self.0 as u32) } else { None }
    }

    /// Takes the descriptor; `None` for a place in the tables.
    pub(crate) fn take_descriptor(self) -> Option<Descriptor> {
        let number = self.0;
        if number < 0 {
            return None;
        }
        std::mem::forget(self);
        // SAFETY: the number is that of an owned descriptor, and its owner has just been forgotten.
        Some(Descriptor::from(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    pub(crate) fn is_detached(&self) -> bool {
        *self == Self::DETACHED
    }

    fn location(&self) -> Location<'_> {
        match self.place() {
            Some(place) => Location::Place(place),
            // SAFETY: the descriptor is open as long as its owner is borrowed.
            None => Location::Descriptor(unsafe { BorrowedFd::borrow_raw(self.0) }),
        }
    }

    fn number(&self) -> RawFd {
        self.0
    }
}

enum Location<'a> {
    Descriptor(BorrowedFd<'a>),
    Place(u32),
}

/// The calls on connections' sockets, and the registered-file tables, if they are in use.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// In a cell, because methods that take `&self`, such as `peer_addr`, also use a ring.
    tables: Option<RefCell<Tables>>,
    /// The pending steps for closing files.
    closing: Vec<(u32, ClosingStep)>,
}

impl Sockets {
    /// Creates it for `places` connections. `Auto` selects registered files if `places` and `others` together exceed the
    /// limit of descriptors, and falls back to descriptors if io_uring is not available.
    pub(crate) fn new(wanted: FileTable, places: usize, others: usize) -> Result<Self, Error> {
        let tables = choose_tables(wanted, places, others)?;
        Ok(Self { tables: tables.map(RefCell::new), closing: Vec::new() })
    }

    /// Creates a socket that is bound but does not listen yet.
    pub(crate) fn bound(
        &self,
        address: &Address,
        reuse_port: bool,
        only_v6: bool,
    ) -> Result<Descriptor, Error> {
        socket::bound(address, reuse_port, only_v6)
    }

    /// Creates a socket for a connect.
    pub(crate) fn stream_socket(&self, address: &Address) -> Result<Descriptor, Error> {
        socket::stream_socket(address)
    }

    /// Takes ownership of a descriptor from outside.
    pub(crate) fn own(&self, descriptor: OwnedFd) -> Descriptor {
        descriptor.into()
    }

    /// Whether connections move to registered-file tables.
    #[inline]
    pub(crate) fn has_tables(&self) -> bool {
        self.tables.is_some()
    }

    #[inline]
    pub(crate) fn receive(&self, socket: &Socket, buffer: &mut [u8]) -> IoResult {
        match (socket.place(), &self.tables) {
            (Some(place), Some(tables)) => tables.borrow_mut().receive(place, buffer),
            _ => socket::receive(socket.number(), buffer),
        }
    }

    #[inline]
    pub(crate) fn send(&self, socket: &Socket, bytes: &[u8]) -> IoResult {
        match (socket.place(), &self.tables) {
            (Some(place), Some(tables)) => tables.borrow_mut().send(place, bytes),
            _ => socket::send(socket.number(), bytes),
        }
    }

    pub(crate) fn send_vectored(&self, socket: &Socket, slices: &[IoSlice<'_>]) -> IoResult {
        match (socket.place(), &self.tables) {
            (Some(place), Some(tables)) => tables.borrow_mut().send_vectored(place, slices),
            _ => socket::send_vectored(socket.number(), slices),
        }
    }

    /// Sends from a file, starting at the offset `place`. If no descriptor is available for the socket, or the file does
    /// not support `sendfile`, the bytes are copied through memory. 0 bytes mean that the file ends before the offset.
    pub(crate) fn send_file(
        &self,
        socket: &Socket,
        file: &File,
        place: u64,
        bytes: usize,
    ) -> IoResult {
        let sent = self.with_descriptor(socket, |socket| {
            socket::send_file(socket.as_raw_fd(), file, place, bytes)
        });
        match sent {
            Ok(IoResult::Failed(error)) if error.errno() == Some(libc::EINVAL) => {}
            Ok(sent) => return sent,
            Err(_) => {}
        }
        let mut buffer = vec![0; bytes.min(COPIED_FILE_BYTES)];
        match file.read_at(&mut buffer, place) {
            Ok(0) => IoResult::Bytes(0),
            Ok(read) => self.send(socket, &buffer[..read]),
            Err(source) if source.kind() == io::ErrorKind::Interrupted => IoResult::Interrupted,
            Err(source) => IoResult::Failed(Error::System { call: "pread", source }),
        }
    }

    pub(crate) fn finish_writing(&self, socket: &Socket) -> Result<(), Error> {
        let finished =
            self.with_descriptor(socket, |socket| socket::finish_writing(socket.as_raw_fd()));
        match (finished, socket.place(), &self.tables) {
            (Ok(finished), _, _) => finished,
            (Err(_), Some(place), Some(tables)) => tables.borrow_mut().finish_writing(place),
            (Err(error), _, _) => Err(error),
        }
    }

    /// The number of sent bytes that the peer has not acknowledged; 0 if it is not known.
    pub(crate) fn unacknowledged_bytes(&self, socket: &Socket) -> usize {
        if let (Some(place), Some(tables)) = (socket.place(), &self.tables)
            && let Some(bytes) = tables.borrow_mut().unacknowledged_bytes(place)
        {
            return bytes;
        }
        self.with_descriptor(socket, |socket| socket::unacknowledged_bytes(socket.as_raw_fd()))
            .unwrap_or(0)
    }

    /// Takes the pending error of the socket, if there is one.
    pub(crate) fn take_error(&self, socket: &Socket, call: &'static str) -> Option<Error> {
        let taken = self.with_descriptor(socket, |socket| socket::take_error(socket, call));
        taken.unwrap_or_else(|_| match self.send(socket, &[]) {
            IoResult::Failed(Error::System { source, .. }) => Some(Error::System { call, source }),
            _ => None,
        })
    }

    pub(crate) fn peer_addr(&self, socket: &Socket) -> Result<SocketAddr, Error> {
        self.with_descriptor(socket, |socket| socket::peer_addr(&socket))?
    }

    pub(crate) fn local_addr(&self, socket: &Socket) -> Result<SocketAddr, Error> {
        self.with_descriptor(socket, |socket| socket::local_addr(&socket))?
    }

    /// Takes the socket out and returns its descriptor. For a registered file this is a new descriptor, and its place is
    /// freed like that of a closed connection.
    pub(crate) fn detach(&mut self, socket: &mut Socket) -> Result<Descriptor, Error> {
        let installed = match socket.place() {
            Some(place) => Some(self.install(place)?),
            None => None,
        };
        let socket = std::mem::replace(socket, Socket::DETACHED);
        match installed {
            Some(descriptor) => {
                self.close(socket, false);
                Ok(descriptor.into())
            }
            None => socket.take_descriptor().ok_or(Error::Stale),
        }
    }

    /// Opens a descriptor of the file at a place.
    fn install(&self, place: u32) -> Result<OwnedFd, Error> {
        let tables = self.tables.as_ref().ok_or(Error::Stale)?;
        tables.borrow_mut().install_descriptor(place)
    }

    /// The socket's descriptor. For a registered file a new one is opened, which fails if descriptors have run out.
    pub(crate) fn descriptor<'a>(&self, socket: &'a Socket) -> Result<LentFd<'a>, Error> {
        match socket.location() {
            _ if socket.is_detached() => Err(Error::Stale),
            Location::Descriptor(descriptor) => Ok(LentFd::borrowed(descriptor)),
            Location::Place(place) => self.install(place).map(LentFd::installed),
        }
    }

    /// Closes a descriptor at once, and a registered file with the next [`flush_closes`](Self::flush_closes). With `reset`
    /// the peer receives a reset, and no TIME_WAIT state remains.
    pub(crate) fn close(&mut self, socket: Socket, reset: bool) {
        match socket.location() {
            _ if socket.is_detached() => {}
            Location::Place(place) => {
                if reset {
                    self.closing.push((place, ClosingStep::Reset));
                }
                self.closing.push((place, ClosingStep::Close));
            }
            Location::Descriptor(socket) if reset => {
                if let Err(error) = options::reset_on_close(&socket) {
                    log::debug!("a connection is closed without a reset: {error}");
                }
            }
            Location::Descriptor(_) => {}
        }
    }

    /// Whether closes are pending.
    #[inline]
    pub(crate) fn has_closes(&self) -> bool {
        !self.closing.is_empty()
    }

    pub(crate) fn flush_closes(&mut self) {
        if let Some(tables) = &self.tables {
            tables.borrow_mut().close(&mut self.closing);
        }
        self.closing.clear();
    }

    /// Moves the descriptors to the given places; those that could not be moved remain in the list.
    pub(crate) fn register(&self, moving: &mut Vec<(u32, Descriptor)>) {
        if let Some(tables) = &self.tables {
            tables.borrow_mut().register(moving);
        }
    }

    pub(crate) fn receive_all(&self, batch: &mut ReceiveBatch) {
        if let Some(tables) = &self.tables {
            tables.borrow_mut().receive_all(batch);
        }
    }

    pub(crate) fn send_all(&self, batch: &mut SendBatch) {
        if let Some(tables) = &self.tables {
            tables.borrow_mut().send_all(batch);
        }
    }

    /// Returns the places of a table that was lost, once per table.
    pub(crate) fn take_lost(&self) -> Option<Range<usize>> {
        self.tables.as_ref()?.borrow_mut().take_lost()
    }

    /// Calls `call` with the socket's descriptor.
    fn with_descriptor<T>(
        &self,
        socket: &Socket,
        call: impl FnOnce(BorrowedFd<'_>) -> T,
    ) -> Result<T, Error> {
        Ok(call(self.descriptor(socket)?.as_fd()))
    }
}

pub(super) fn choose_tables<R: Ring>(
    wanted: FileTable,
    places: usize,
    others: usize,
) -> Result<Option<Tables<R>>, Error> {
    match wanted {
        FileTable::Process => Ok(None),
        FileTable::Registered => Tables::new(places).map(Some),
        FileTable::Auto if places.saturating_add(others) as u64 <= options::descriptors_max() => {
            Ok(None)
        }
        FileTable::Auto => Ok(Tables::new(places)
            .inspect_err(|error| {
                log::warn!("connections stay in the process's descriptor table: {error}");
            })
            .ok()),
    }
}
