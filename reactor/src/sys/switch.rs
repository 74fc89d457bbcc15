//! With the feature `testing`: the types and functions of a backend, which dispatch to the real or the fake one.
//!
//! The backend is chosen when a reactor is created ([`in_memory`]), and everything it opens belongs to that backend. So a
//! build with this feature serves real sockets like any other, and takes one more comparison per call.

use std::cell::Cell;
use std::fs::File;
use std::io::IoSlice;
use std::mem::{self, ManuallyDrop};
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{
    AcceptResult, Adopted, IoResult, LentFd, Readiness, ReceiveBatch, SendBatch, fake, options,
    poller, signal, socket, sockets, wake,
};
use crate::address::Address;
use crate::config::{FileTable, Keepalive};
use crate::error::Error;
use crate::signal::Signal;

pub(crate) type Accepted = AcceptResult<Descriptor>;

thread_local! {
    static IN_MEMORY: Cell<bool> = const { Cell::new(false) };
}

/// Calls `make`, so that a reactor that it creates uses the fake kernel of this thread.
pub(crate) fn in_memory<T>(make: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IN_MEMORY.set(self.0);
        }
    }
    let _restore = Restore(IN_MEMORY.replace(true));
    make()
}

/// Makes the same call on either backend.
macro_rules! either {
    ($self:expr, $type:ident, $it:ident => $call:expr) => {
        match $self {
            $type::System($it) => $call,
            $type::Memory($it) => $call,
        }
    };
}

#[derive(Debug)]
pub(crate) enum Descriptor {
    System(socket::Descriptor),
    Memory(fake::Descriptor),
}

impl Descriptor {
    pub(crate) fn number(&self) -> i32 {
        either!(self, Descriptor, it => it.number())
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, Descriptor, it => it.as_fd())
    }
}

impl From<Descriptor> for OwnedFd {
    fn from(descriptor: Descriptor) -> Self {
        either!(descriptor, Descriptor, it => it.into())
    }
}

pub(crate) fn spare() -> Result<Descriptor, Error> {
    socket::spare().map(Descriptor::System)
}

pub(crate) fn accept(listener: &Descriptor) -> Accepted {
    match listener {
        Descriptor::System(listener) => map_accepted(socket::accept(listener), Descriptor::System),
        Descriptor::Memory(listener) => map_accepted(fake::accept(listener), Descriptor::Memory),
    }
}

fn map_accepted<D>(accepted: AcceptResult<D>, map: fn(D) -> Descriptor) -> Accepted {
    match accepted {
        AcceptResult::Connection(socket) => Accepted::Connection(map(socket)),
        AcceptResult::Empty => Accepted::Empty,
        AcceptResult::Lost(error) => Accepted::Lost(error),
        AcceptResult::Exhausted(error) => Accepted::Exhausted(error),
        AcceptResult::Broken(error) => Accepted::Broken(error),
    }
}

/// Calls on one descriptor.
macro_rules! on_descriptor {
    ($($module:ident::$name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {$(
        pub(crate) fn $name(socket: &Descriptor, $($argument: $type),*) -> Result<$answer, Error> {
            match socket {
                Descriptor::System(socket) => $module::$name(socket, $($argument),*),
                Descriptor::Memory(socket) => fake::$name(socket, $($argument),*),
            }
        }
    )*};
}

on_descriptor! {
    socket::adopt(wanted: Adopted) -> bool;
    socket::bind(address: &Address) -> ();
    socket::connect(address: &Address) -> ();
    socket::listen(backlog: Option<u32>) -> ();
    socket::local_addr() -> SocketAddr;
    socket::peer_addr() -> SocketAddr;
    options::defer_source_port() -> ();
    options::reset_on_close() -> ();
    options::set_keepalive(keepalive: &Keepalive) -> ();
    options::set_nodelay() -> ();
    options::set_notsent_lowat(bytes: u32) -> ();
    options::set_port_range(range: &RangeInclusive<u16>) -> ();
    options::set_receive_buffer(bytes: usize) -> ();
    options::set_send_buffer(bytes: usize) -> ();
    options::set_user_timeout(timeout: Duration) -> ();
}

#[derive(Debug)]
pub(crate) enum Poller {
    System(poller::Poller),
    Memory(fake::Poller),
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Error> {
        if IN_MEMORY.get() {
            fake::Poller::new().map(Self::Memory)
        } else {
            poller::Poller::new().map(Self::System)
        }
    }

    /// Whether a wait would find an event; always `false` for the real backend.
    pub(crate) fn has_events(&self) -> bool {
        match self {
            Poller::System(_) => false,
            Poller::Memory(poller) => fake::has_events(poller),
        }
    }

    pub(crate) fn add(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        match (self, descriptor) {
            (Poller::System(poller), Descriptor::System(it)) => poller.add(it, interest, data),
            (Poller::Memory(poller), Descriptor::Memory(it)) => poller.add(it, interest, data),
            _ => Err(OF_ANOTHER_KIND),
        }
    }

    pub(crate) fn add_connection(&self, descriptor: &Descriptor, data: u64) -> Result<(), Error> {
        match (self, descriptor) {
            (Poller::System(poller), Descriptor::System(it)) => poller.add_connection(it, data),
            (Poller::Memory(poller), Descriptor::Memory(it)) => poller.add_connection(it, data),
            _ => Err(OF_ANOTHER_KIND),
        }
    }

    pub(crate) fn delete_connection(
        &self,
        descriptor: &Descriptor,
        number: i32,
    ) -> Result<(), Error> {
        match (self, descriptor) {
            (Poller::System(poller), Descriptor::System(it)) => {
                poller.delete_connection(it, number)
            }
            (Poller::Memory(poller), Descriptor::Memory(it)) => {
                poller.delete_connection(it, number)
            }
            _ => Err(OF_ANOTHER_KIND),
        }
    }

    pub(crate) fn modify(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        match (self, descriptor) {
            (Poller::System(poller), Descriptor::System(it)) => poller.modify(it, interest, data),
            (Poller::Memory(poller), Descriptor::Memory(it)) => poller.modify(it, interest, data),
            _ => Err(OF_ANOTHER_KIND),
        }
    }

    pub(crate) fn delete(&self, descriptor: &Descriptor) -> Result<(), Error> {
        match (self, descriptor) {
            (Poller::System(poller), Descriptor::System(it)) => poller.delete(it),
            (Poller::Memory(poller), Descriptor::Memory(it)) => poller.delete(it),
            _ => Err(OF_ANOTHER_KIND),
        }
    }

    pub(crate) fn now(&self) -> Instant {
        either!(self, Poller, it => it.now())
    }

    pub(crate) fn wait(&self, events: &mut Events, wait: Option<Duration>) -> Result<(), Error> {
        match self {
            Poller::System(poller) => poller.wait(&mut events.system, wait),
            Poller::Memory(poller) => poller.wait(&mut events.memory, wait),
        }
    }
}

const OF_ANOTHER_KIND: Error = Error::Invalid(
    "a descriptor of the harness can't be used with a real reactor, nor a real one with the harness",
);

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, Poller, it => it.as_fd())
    }
}

/// One of the two buffers stays empty.
#[derive(Debug)]
pub(crate) struct Events {
    system: poller::Events,
    memory: fake::Events,
}

impl Events {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            system: poller::Events::with_capacity(capacity),
            memory: fake::Events::with_capacity(capacity),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.system.len() + self.memory.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.system.is_full() || self.memory.is_full()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Readiness)> {
        self.system.iter().chain(self.memory.iter())
    }
}

#[derive(Debug)]
pub(crate) enum WakeFd {
    System(wake::WakeFd),
    Memory(fake::WakeFd),
}

impl WakeFd {
    pub(crate) fn watched(poller: &Poller, data: u64) -> Result<Self, Error> {
        match poller {
            Poller::System(poller) => wake::WakeFd::watched(poller, data).map(Self::System),
            Poller::Memory(poller) => fake::WakeFd::watched(poller, data).map(Self::Memory),
        }
    }

    pub(crate) fn signal(&self) {
        either!(self, WakeFd, it => it.signal());
    }

    pub(crate) fn clear(&self) {
        either!(self, WakeFd, it => it.clear());
    }
}

#[derive(Debug)]
pub(crate) enum SignalReader {
    System(signal::SignalReader),
    Memory(fake::SignalReader),
}

impl SignalReader {
    pub(crate) fn watched(signals: &[Signal], poller: &Poller, data: u64) -> Result<Self, Error> {
        match poller {
            Poller::System(poller) => {
                signal::SignalReader::watched(signals, poller, data).map(Self::System)
            }
            Poller::Memory(poller) => {
                fake::SignalReader::watched(signals, poller, data).map(Self::Memory)
            }
        }
    }

    pub(crate) fn read(&self) -> Option<Signal> {
        either!(self, SignalReader, it => it.read())
    }
}

/// A real socket in its four bytes, or the number of a fake one, encoded as a place that no table has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Socket(sockets::Socket);

/// The place that encodes the fake socket with the number 0.
const MEMORY_FIRST: u32 = 1 << 30;

impl From<Descriptor> for Socket {
    fn from(descriptor: Descriptor) -> Self {
        match descriptor {
            Descriptor::System(descriptor) => Self(descriptor.into()),
            Descriptor::Memory(descriptor) => {
                Self::at_place(MEMORY_FIRST + descriptor.into_number() as u32)
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(number) = self.memory() {
            drop(fake::Socket::of_number(number));
        }
    }
}

impl Socket {
    pub(crate) const DETACHED: Self = Self(sockets::Socket::DETACHED);

    pub(crate) fn at_place(place: u32) -> Self {
        Self(sockets::Socket::at_place(place))
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.0.is_detached()
    }

    pub(crate) fn place(&self) -> Option<u32> {
        self.0.place().filter(|_| self.memory().is_none())
    }

    /// The number, if this is a fake socket.
    fn memory(&self) -> Option<i32> {
        let place = self.0.place().filter(|_| !self.is_detached())?;
        place.checked_sub(MEMORY_FIRST).map(|number| number as i32)
    }

    /// Takes the inner socket out.
    fn take(mut self) -> sockets::Socket {
        mem::replace(&mut self.0, sockets::Socket::DETACHED)
    }

    pub(crate) fn take_descriptor(self) -> Option<Descriptor> {
        match self.memory() {
            Some(number) => {
                self.take();
                fake::Socket::of_number(number).take_descriptor().map(Descriptor::Memory)
            }
            None => self.take().take_descriptor().map(Descriptor::System),
        }
    }

    /// Calls with the fake socket, or with a detached one if this is not a fake socket.
    fn with_memory<T>(&self, call: impl FnOnce(&fake::Socket) -> T) -> T {
        match self.memory() {
            Some(number) => call(&ManuallyDrop::new(fake::Socket::of_number(number))),
            None => call(&fake::Socket::DETACHED),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Sockets {
    System(sockets::Sockets),
    Memory(fake::Sockets),
}

/// Calls on one socket.
macro_rules! on_socket {
    ($($name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {$(
        pub(crate) fn $name(&self, socket: &Socket, $($argument: $type),*) -> $answer {
            match self {
                Sockets::System(sockets) => sockets.$name(&socket.0, $($argument),*),
                Sockets::Memory(sockets) => {
                    socket.with_memory(|socket| sockets.$name(socket, $($argument),*))
                }
            }
        }
    )*};
}

impl Sockets {
    pub(crate) fn new(wanted: FileTable, places: usize, others: usize) -> Result<Self, Error> {
        if IN_MEMORY.get() {
            fake::Sockets::new(wanted, places, others).map(Self::Memory)
        } else {
            sockets::Sockets::new(wanted, places, others).map(Self::System)
        }
    }

    pub(crate) fn bound(
        &self,
        address: &Address,
        reuse_port: bool,
        only_v6: bool,
    ) -> Result<Descriptor, Error> {
        match self {
            Sockets::System(sockets) => {
                sockets.bound(address, reuse_port, only_v6).map(Descriptor::System)
            }
            Sockets::Memory(sockets) => {
                sockets.bound(address, reuse_port, only_v6).map(Descriptor::Memory)
            }
        }
    }

    pub(crate) fn stream_socket(&self, address: &Address) -> Result<Descriptor, Error> {
        match self {
            Sockets::System(sockets) => sockets.stream_socket(address).map(Descriptor::System),
            Sockets::Memory(sockets) => sockets.stream_socket(address).map(Descriptor::Memory),
        }
    }

    pub(crate) fn own(&self, descriptor: OwnedFd) -> Descriptor {
        match self {
            Sockets::System(sockets) => Descriptor::System(sockets.own(descriptor)),
            Sockets::Memory(sockets) => Descriptor::Memory(sockets.own(descriptor)),
        }
    }

    pub(crate) fn has_tables(&self) -> bool {
        either!(self, Sockets, it => it.has_tables())
    }

    on_socket! {
        receive(buffer: &mut [u8]) -> IoResult;
        send(bytes: &[u8]) -> IoResult;
        send_vectored(slices: &[IoSlice<'_>]) -> IoResult;
        send_file(file: &File, place: u64, bytes: usize) -> IoResult;
        finish_writing() -> Result<(), Error>;
        unacknowledged_bytes() -> usize;
        take_error(call: &'static str) -> Option<Error>;
        peer_addr() -> Result<SocketAddr, Error>;
        local_addr() -> Result<SocketAddr, Error>;
    }

    pub(crate) fn descriptor<'a>(&self, socket: &'a Socket) -> Result<LentFd<'a>, Error> {
        match self {
            Sockets::System(sockets) => sockets.descriptor(&socket.0),
            Sockets::Memory(_) => Err(Error::Invalid("a socket of the harness has no descriptor")),
        }
    }

    pub(crate) fn detach(&mut self, socket: &mut Socket) -> Result<Descriptor, Error> {
        match self {
            Sockets::System(sockets) => sockets.detach(&mut socket.0).map(Descriptor::System),
            Sockets::Memory(_) => {
                mem::replace(socket, Socket::DETACHED).take_descriptor().ok_or(Error::Stale)
            }
        }
    }

    pub(crate) fn close(&mut self, socket: Socket, reset: bool) {
        match self {
            Sockets::System(sockets) => sockets.close(socket.take(), reset),
            Sockets::Memory(sockets) => {
                if let Some(number) = socket.memory() {
                    socket.take();
                    sockets.close(fake::Socket::of_number(number), reset);
                }
            }
        }
    }

    pub(crate) fn has_closes(&self) -> bool {
        either!(self, Sockets, it => it.has_closes())
    }

    pub(crate) fn flush_closes(&mut self) {
        either!(self, Sockets, it => it.flush_closes());
    }

    pub(crate) fn register(&self, moving: &mut Vec<(u32, Descriptor)>) {
        let Sockets::System(sockets) = self else { return };
        let mut real: Vec<(u32, socket::Descriptor)> = moving
            .drain(..)
            .filter_map(|(place, descriptor)| match descriptor {
                Descriptor::System(descriptor) => Some((place, descriptor)),
                Descriptor::Memory(_) => None,
            })
            .collect();
        sockets.register(&mut real);
        moving.extend(real.into_iter().map(|(place, it)| (place, Descriptor::System(it))));
    }

    pub(crate) fn receive_all(&self, batch: &mut ReceiveBatch) {
        either!(self, Sockets, it => it.receive_all(batch));
    }

    pub(crate) fn send_all(&self, batch: &mut SendBatch) {
        either!(self, Sockets, it => it.send_all(batch));
    }

    pub(crate) fn take_lost(&self) -> Option<Range<usize>> {
        either!(self, Sockets, it => it.take_lost())
    }
}
